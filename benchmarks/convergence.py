"""``python -m benchmarks.convergence``: does a fine-tune with small states reach what float32 reaches?

The demo's encoder is fine-tuned on the demo's task by second-order ROSE, with parameters and moments
stored in float32 and in bfloat16. All computation is float32: what differs is what is stored between
the steps. Variants of one seed have the same initial weights, batches and dropout.

Most weights of an encoder lie between 2^-7 and 2^-3, where neighbours in bfloat16 are 6e-5 to 5e-4
apart, and a step of AdamW changes a weight by at most about the learning rate. With usual ones, most
changes are below half of that distance, and rounding to nearest undoes them.

Losses do not depend on what else the machine does; how long it takes does.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from rose_ops import RoseFusedAdamW, rose_param_groups
from rose_ops.finetune import require
from rose_ops.finetune.classifier import Encoded, load_model
from rose_ops.finetune.data import Task, load_task
from rose_ops.finetune.models import bundled_model
from rose_ops.finetune.report import environment
from rose_ops.finetune.runtime import choose_runtime
from rose_ops.finetune.train import batches

FLOAT, BF16 = torch.float32, torch.bfloat16
STOCHASTIC = {"param_rounding": "stochastic"}
# Name: dtype of the parameters, and arguments of RoseFusedAdamW.
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (FLOAT, {}),
    "bf16 states": (FLOAT, {"state_dtype": BF16}),
    "bf16 parameters, nearest": (BF16, {}),
    "bf16 parameters, stochastic": (BF16, STOCHASTIC),
    "bf16 parameters, stochastic, and states": (BF16, {**STOCHASTIC, "state_dtype": BF16}),
}
_RESULTS = Path(__file__).parent / "results"
_MAX_LENGTH = 32  # tokens
_TEST = 600  # examples
_EVALUATION_BATCH = 100
_LAST = 0.1  # the final training loss is the mean over this share of the steps


def main() -> None:
    args = _parser().parse_args()
    require("transformers").utils.logging.set_verbosity_error()  # it warns of the new classifier
    require("transformers").utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_flush_denormal(True)  # as the demo: activations underflow, and masks do not depend on it
    task = load_task("movies")
    known = inspect.signature(RoseFusedAdamW).parameters
    runs: list[pd.DataFrame] = []
    for name in args.variants:
        if unknown := VARIANTS[name][1].keys() - known:
            print(f"not run: {name}: this RoseFusedAdamW has no argument {', '.join(unknown)}")
            continue
        runs += [_run(name, seed, task, args) for seed in args.seeds]
    frame = pd.concat(runs)
    about = {
        "arguments": {k: v for k, v in vars(args).items() if k != "output"},
        "task": {"name": task.name, "train": len(task.train), "test": _TEST},
        **environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    csv, png = args.output.with_suffix(".csv"), args.output.with_suffix(".png")
    with csv.open("w", encoding="utf-8") as file:  # pandas.read_csv(path, comment="#") reads it
        file.writelines(f"# {key}: {json.dumps(value)}\n" for key, value in about.items())
        frame.to_csv(file, index=False, float_format="%.6g")
    print(summary(frame).to_markdown(floatfmt=".4f"))
    _plot(frame, png, f"MiniLM-L6 on {task.name}, lr={args.lr:g}, upper={args.upper}")
    print(f"Written: {csv} and {png}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4, help="falls linearly to 0")
    parser.add_argument("--upper", type=float, default=0.6, help="1: AdamW")
    parser.add_argument("--output", type=Path, default=_RESULTS / "convergence", help="without suffix")
    return parser


def _run(name: str, seed: int, task: Task, args: argparse.Namespace) -> pd.DataFrame:
    """Fine-tune; one row per step, the last one with the test set's loss and accuracy."""
    dtype, options = VARIANTS[name]
    runtime = choose_runtime("cpu", "float32")
    model, encoder = load_model(bundled_model(), task, _MAX_LENGTH, seed, runtime)
    data = encoder(task.train)
    model.to(dtype).train()
    groups = rose_param_groups(model, weight_decay=0.01)
    optimizer = RoseFusedAdamW(groups, lr=args.lr, upper=args.upper, seed=seed, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    torch.manual_seed(seed)
    order = batches(data.lengths, args.batch_size, args.steps, seed)
    rows: list[dict[str, Any]] = []
    bar = tqdm(order, desc=f"{name}, seed {seed}", total=args.steps, mininterval=5)
    for step, indices in enumerate(bar, start=1):
        inputs, labels = data.batch(indices)
        loss = cross_entropy(_logits(model, inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rows.append({"variant": name, "seed": seed, "step": step, "loss": loss.item()})
    tested = _evaluate(model, encoder(task.test[:_TEST]))
    tqdm.write(f"{name}, seed {seed}: {tested}")
    rows[-1] |= tested
    return pd.DataFrame(rows)


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """In float32, whatever the parameters are stored in, who get gradients of their own dtype."""
    parameters = {name: p.float() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, parameters, (), dict(inputs)).logits


@torch.no_grad()
def _evaluate(model: nn.Module, data: Encoded) -> dict[str, float]:
    model.float().eval()
    loss, right = 0.0, 0
    for indices in _by_length(data):
        inputs, labels = data.batch(indices)
        logits = model(**inputs).logits
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
    n = len(data.rows)
    return {"test_loss": loss / n, "test_accuracy": right / n}


def _by_length(data: Encoded) -> Iterator[list[int]]:
    order = sorted(range(len(data.rows)), key=data.lengths.__getitem__)
    for i in range(0, len(order), _EVALUATION_BATCH):
        yield order[i : i + _EVALUATION_BATCH]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per variant: mean and standard deviation over seeds, and the difference from float32 in pairs."""
    last = frame[frame.step > frame.step.max() * (1 - _LAST)]
    final = last.groupby(["variant", "seed"], sort=False).agg(
        train_loss=("loss", "mean"), test_loss=("test_loss", "max"), accuracy=("test_accuracy", "max")
    )
    if "float32" in final.index.unique("variant"):
        final["test_loss_over_float32"] = final.test_loss - final.test_loss.xs("float32")
    table = final.groupby("variant", sort=False).agg(["mean", "std"])
    table.columns = [f"{name} {'sd' if of == 'std' else of}" for name, of in table.columns]
    return table


def _plot(frame: pd.DataFrame, path: Path, title: str) -> None:
    """Training losses, smoothed; the band is a standard deviation over seeds to each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, frame.step.max() // 10)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, runs in frame.groupby("variant", sort=False):
        losses = runs.pivot(index="step", columns="seed", values="loss").rolling(window).mean()
        mean, sd = losses.mean(axis=1), losses.std(axis=1)
        [line] = axes.plot(mean.index, mean, label=name)
        axes.fill_between(mean.index, mean - sd, mean + sd, color=line.get_color(), alpha=0.12, lw=0)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} steps", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
