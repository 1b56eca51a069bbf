"""The command line: `python -m rose_ops finetune`, `evaluate`, `tune` and `doctor`."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rose_ops.doctor import doctor
from rose_ops.finetune import exit_status
from rose_ops.finetune.data import TASKS
from rose_ops.finetune.recipes import METHODS
from rose_ops.finetune.run import evaluate, finetune
from rose_ops.finetune.tune import tune

_MODEL = "minilm, or mpnet (109M, eight times as slow), both from PyPI; or a folder or hub name"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 for an error, 2 for a wrong call."""
    return exit_status(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rose_ops", description="Robust selective fine-tuning (ROSE)."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_tune(commands)
    commands.add_parser(
        "doctor",
        help="say what is installed, and check every usable backend",
        description="Prints versions, devices and backends, and compares each usable backend with the "
        "reference on random data. The exit status is not 0 if one is wrong.",
    ).set_defaults(run=doctor)
    return parser


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune an encoder with AdamW and ROSE, and compare them",
        description="Fine-tunes the same encoder on the same batches with each method, with accuracy "
        "on validation examples, clean and perturbed, along the way; then measures accuracy on the "
        "clean test set, on copies with typing errors and with swapped, doubled or missing words, and "
        "on AdvGLUE where the task has it. Robust accuracy is compared at the same clean accuracy, "
        "too. Writes run.json, run.png and the models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=finetune)
    group = parser.add_argument_group("what to train")
    group.add_argument(
        "--task",
        choices=TASKS,
        default="movies",
        help="movies: review snippets from a PyPI package; the others: GLUE",
    )
    group.add_argument("--model", default="minilm", help=_MODEL)
    group.add_argument(
        "--methods",
        type=_methods,
        default="adamw,random,second,ensemble",
        help=f"comma-separated, from: {', '.join(METHODS)}",
    )
    group.add_argument("--seeds", type=_seed, nargs="+", default=[0], help="one run for each")
    group.add_argument(
        "--evaluate-on",
        choices=("test", "validation"),
        default="test",
        help="use validation when choosing hyperparameters",
    )
    group.add_argument(
        "--evaluations",
        type=int,
        choices=range(101),
        default=8,
        metavar="N",
        help="how often validation accuracy is measured along the way; 0: never",
    )
    group.add_argument("--epochs", type=_positive(float), help="instead of --steps")
    group = parser.add_argument_group("what `tune` searches")
    group.add_argument("--lr", type=_positive(float), default=1e-4)
    group.add_argument("--upper", type=_pair, default=0.6, help="c_h; a pair first,second too")
    group.add_argument("--gamma", type=float, default=0.5)
    _add_training(parser)
    _add_common(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, help="folder; default: runs/<task>-<time>")
    group.add_argument("--no-models", action="store_true", help="do not save the models")


def _add_training(parser: Any) -> None:
    """Hyperparameters: the fields of `Settings`."""
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=_positive(int), default=80)
    group.add_argument("--batch-size", type=_positive(int), default=32)
    group.add_argument("--max-length", type=_positive(int), default=128, help="in tokens")
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--betas", type=float, nargs=2, metavar=("BETA1", "BETA2"), default=(0.9, 0.999))
    group.add_argument("--eps", type=_positive(float), default=1e-8)
    group.add_argument(
        "--eps-placement",
        choices=("after", "before"),
        default="after",
        help="of the bias correction: after it as in torch, or before it as in the paper's code",
    )
    group.add_argument("--warmup", type=_fraction, default=0.1, help="share of the steps")
    group.add_argument("--max-grad-norm", type=_positive(float), default=1.0)
    group = parser.add_argument_group("ROSE (see RoseFusedAdamW)")
    group.add_argument("--lower", type=_pair, default=0.0, help="c_l; a pair first,second too")
    group.add_argument("--granularity", choices=("element", "tensor"), default="element")
    group.add_argument("--selection", choices=("exact", "bracket", "approx"), default="exact")
    group.add_argument("--inactive", choices=("update", "rank"), default="update")
    group.add_argument("--selective", choices=("all", "encoder-weights"), default="all")
    group.add_argument("--selection-warmup-steps", type=int, default=0)
    group.add_argument("--backend", default="auto")
    group.add_argument(
        "--r-drop",
        type=_positive(float),
        default=0.25,
        help="weight of the KL in rdrop methods; a quarter of the R-Drop paper's alpha",
    )


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a saved run again",
        description="Measures the models that finetune saved: on the clean and the perturbed test "
        "set, and on AdvGLUE where the task has it. Writes evaluation.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=evaluate)
    parser.add_argument("folder", type=Path, help="the output folder of a finetune run")
    parser.add_argument(
        "--perturbation-seed", type=int, default=0, help="another seed draws other errors"
    )
    _add_common(parser)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="search lr, upper and gamma, and compare them with the published presets",
        description="Searches by successive halving on the validation split, clean and perturbed, "
        "trains published presets with as many steps, and compares the best of both on the test sets. "
        "Writes tune.json and study.log, from which the same command goes on after a stop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=tune)
    group = parser.add_argument_group("what to tune")
    group.add_argument("--task", choices=TASKS, default="movies")
    group.add_argument("--model", default="minilm", help=_MODEL)
    group.add_argument("--method", choices=list(METHODS), default="second")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--budget",
        type=_positive(float),
        default=8.0,
        help="full trainings that the search may cost, and the presets as many",
    )
    for name, default in (("lr", (1e-5, 1e-4)), ("upper", (0.1, 0.9)), ("gamma", (0.1, 0.9))):
        group.add_argument(
            f"--{name}",
            type=_positive(float),
            nargs=2,
            default=default,
            metavar=("LOW", "HIGH"),
            help="of the ensemble" if name == "gamma" else None,
        )
    group.add_argument(
        "--reduction", type=int, choices=range(2, 11), default=3, metavar="N", help="one in N goes on"
    )
    group.add_argument("--examples", type=_positive(int), default=500, help="of the validation split")
    group.add_argument("--search-seed", type=_seed, default=0, help="of the search and its trainings")
    group.add_argument(
        "--seeds", type=_seed, nargs="+", default=[1, 2, 3], help="for the comparison at the end"
    )
    _add_training(parser)
    _add_common(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, help="folder; default: runs/tune-<task>-<method>")


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and machine")
    group.add_argument(
        "--data-dir",
        type=Path,
        help="folder with <task>/train.tsv, <task>/dev.tsv and advglue/dev.json; default: the hub",
    )
    group.add_argument("--cache-dir", type=Path, help="for downloads; default: the user's cache")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    group.add_argument("--threads", type=_positive(int), help="default: what torch chooses")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:  # as NumPy has it
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^32 - 1, got {text[:40]}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text}")
    return value


def _pair(text: str) -> float | tuple[float, float]:
    values = [float(x) for x in text.split(",")]
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"expected one number or two, as in 0.6,0.3; got {text}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def _methods(text: str) -> list[str]:
    names = list(dict.fromkeys(x.strip() for x in text.split(",")))
    unknown = [x for x in names if x not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(METHODS)}"
        )
    return names
