"""One run: a model trained by a method, and measured along the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper.methods import METHODS
from benchmarks.paper.runs import Run
from benchmarks.paper.vocabulary import prune
from rose_ops.finetune.classifier import Encoder, load_model, predict
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.perturb import PERTURBATIONS, perturb
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.train import train

_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Of one model on one split.

    Attributes:
        n: Number of examples.
        accuracy: Fraction of them that is right.
        cross_entropy: Mean, in nats.
        calibration_error: Expected calibration error, see `calibration_error`.
    """

    n: int
    accuracy: float
    cross_entropy: float
    calibration_error: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of all splits after `step` steps; split -> scores."""

    step: int
    scores: dict[str, Scores]


@dataclass(frozen=True)
class Trained:
    """What a run left: the model (word embeddings pruned to the task's) and how it came about.

    Attributes:
        model: In evaluation mode.
        encoder: For texts of the task; it fits the model.
        curve: Evaluations, the last of which is after the last step.
        history: The record of each step, see `rose_ops.finetune.train.train`.
        seconds: Of training, evaluations excluded.
    """

    model: Any
    encoder: Encoder
    curve: list[Evaluation]
    history: list[dict[str, Any]]
    seconds: float

    @property
    def scores(self) -> dict[str, Scores]:
        """After the last step."""
        return self.curve[-1].scores


def splits(task: Task, limit: int) -> dict[str, Examples]:
    """What runs are measured on: `clean` (GLUE dev), `adversarial` (AdvGLUE dev of the task) where the
    task has it, and perturbed copies of clean, `characters` and `words`.

    Args:
        task: The task.
        limit: How many of the perturbed examples, at most (the first ones).
    """
    found = {"clean": task.test}
    if task.adversarial:
        name = next(iter(task.adversarial))
        found["adversarial"] = task.adversarial[name]
    for kind in PERTURBATIONS:
        found[kind] = Examples(perturb(task.test.texts, kind), task.test.labels)[:limit]
    return found


def train_run(
    run: Run,
    task: Task,
    runtime: Runtime,
    model_name: str,
    tests: Mapping[str, Examples] | None = None,
    on_evaluation: Callable[[Evaluation, Any], None] = lambda evaluation, model: None,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Trained:
    """Fine-tune a model as `run` says.

    The initial model, the order of the examples and the dropout depend on the task, the model and the
    seed alone, so that methods are compared on the same batches.

    Args:
        run: Method and settings.
        task: Its data; models are trained on `task.train`.
        runtime: Device and precision.
        model_name: Folder or hub name of the checkpoint, see `rose_ops.finetune.models.model_folder`.
        tests: What to evaluate on; None is `splits(task, run.perturbed)`.
        on_evaluation: Called after each evaluation with it and the model, in evaluation mode.
        on_step: Called after each step with its record.

    Raises:
        UserError: The model cannot be loaded, or the loss was not finite.
    """
    tests = splits(task, run.perturbed) if tests is None else tests
    model, encoder = load_model(model_name, task, run.max_length, run.seed, runtime)
    encoder = prune(model, encoder, [task.train, *tests.values()])
    encoded = {name: encoder(examples) for name, examples in tests.items()}
    curve: list[Evaluation] = []
    evaluating = 0.0

    def evaluate(step: int) -> None:
        nonlocal evaluating
        start = time.perf_counter()
        scores = {x: score(predict(model, data, runtime), data.labels) for x, data in encoded.items()}
        curve.append(Evaluation(step, scores))
        on_evaluation(curve[-1], model)
        evaluating += time.perf_counter() - start

    start = time.perf_counter()
    history = train(
        model, encoder(task.train), METHODS[run.method], run.settings(), runtime, run.seed, on_step,
        evaluate, run.eval_every,
    )  # fmt: skip
    seconds = time.perf_counter() - start - evaluating
    model.eval()
    return Trained(model, encoder, curve, history, seconds)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits `[n, classes]` against labels `[n]`."""
    return Scores(
        n=len(labels),
        accuracy=float((logits.argmax(1) == labels).double().mean()),
        cross_entropy=float(F.cross_entropy(logits.double(), labels)),
        calibration_error=calibration_error(logits, labels),
    )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: `sum_b n_b / n * |accuracy_b - confidence_b|` over 15 bins of equal
    width of the confidence, the largest probability.

    Source: Guo et al., ICML 2017, Eq. 3.
    """
    confidence, predicted = torch.softmax(logits.double(), 1).max(1)
    right = (predicted == labels).double()
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return float(gaps.abs().sum() / len(labels))
