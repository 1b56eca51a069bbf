"""Training one model with one method."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rose_ops.finetune import UserError
from rose_ops.finetune.classifier import Encoded
from rose_ops.finetune.recipes import Context, Method, Settings, make_optimizer
from rose_ops.finetune.runtime import Runtime
from rose_ops.losses import RoseLosses

# Batches are cut from this many batches' worth of shuffled examples, sorted by length.
_BATCHES_PER_BUCKET = 50


class Diverged(UserError):
    """The loss was not finite; the message says at which step."""


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
