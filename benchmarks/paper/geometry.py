"""Losses around and between models: the paper's Figures 1, 2 and 4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rose_ops.finetune.classifier import Encoded, predict
from rose_ops.finetune.runtime import Runtime

Weights = Mapping[str, Tensor]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name. Tied parameters come once, as in the model."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def random_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A Gaussian direction with the norms of the model's filters (Li et al., 2018, section 4).

    ``d_ij <- d_ij / ||d_ij|| * ||theta_ij||`` for each filter j of each layer i. A filter is what makes
    one output: a row of a linear layer's or an embedding's matrix, as in Li et al.'s code. Biases and
    the weights of norms (all that has fewer than two dimensions) stay: their direction is zero, as in
    that code, too (``ignore='biasbn'``).

    Args:
        model: of which parameters the direction is. Those that are not trained take part, too.
        generator: on the CPU; gives the same direction for models with the same shapes, whatever their
            device.

    Returns:
        Directions by the parameters' names, on their devices and of their dtypes.
    """
    direction = {}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            direction[name] = torch.zeros_like(p)
            continue
        norms = (x.detach().flatten(1).norm(dim=1) for x in (p, noise))
        scale = torch.div(*norms).reshape(-1, *[1] * (p.ndim - 1))
        direction[name] = noise * scale
    return direction


@contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's parameters, which are again what they were, bit for bit, when the block ends."""
    before = weights(model)
    try:
        yield before
    finally:
        move(model, before)


@torch.no_grad()
def move(model: nn.Module, to: Weights, steps: Iterable[tuple[float, Weights]] = ()) -> None:
    """Set ``model``'s parameters to ``to + sum(a * direction for a, direction in steps)``."""
    steps = list(steps)
    for name, p in model.named_parameters():
        p.copy_(to[name])
        for size, direction in steps:
            p.add_(direction[name], alpha=size)


def mean_loss(model: nn.Module, data: Encoded, runtime: Runtime) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy, without dropout. NaN or inf losses are passed on."""
    logits = predict(model, data, runtime)
    right = logits.argmax(dim=-1) == data.labels
    return F.cross_entropy(logits, data.labels).item(), right.float().mean().item()


def surface(
    model: nn.Module,
    measure: Callable[[], tuple[float, float]],
    coordinates: Sequence[float],
    seed: int,
) -> Iterator[dict[str, float]]:
    """f(alpha, beta) = L(theta + alpha * delta + beta * eta), Equation 6 of the paper.

    delta and eta are of `random_direction`. Models with equal seeds and shapes get directions that
    differ by their filters' norms only.

    Args:
        model: at theta, and again when this ends.
        measure: gives loss and accuracy of ``model`` as it is.
        coordinates: values of alpha and of beta; the paper's are 51 in [-0.25, 0.25].
        seed: of the directions.

    Yields:
        Points of the grid: ``alpha``, ``beta``, ``loss``, ``accuracy``.
    """
    generator = torch.Generator().manual_seed(seed)
    delta, eta = (random_direction(model, generator) for _ in range(2))
    with restored(model) as theta:
        for alpha in coordinates:
            for beta in coordinates:
                move(model, theta, [(alpha, delta), (beta, eta)])
                loss, accuracy = measure()
                yield {"alpha": alpha, "beta": beta, "loss": loss, "accuracy": accuracy}


def interpolation(
    model: nn.Module,
    first: Weights,
    second: Weights,
    measure: Callable[[], tuple[float, float]],
    coordinates: Sequence[float],
) -> Iterator[dict[str, float]]:
    """f(alpha) = L((1 - alpha) * theta + alpha * theta'), Equation 7 of the paper.

    Args:
        model: whose parameters are set, and restored when this ends.
        first: theta, at alpha = 0.
        second: theta', at alpha = 1.
        measure: gives loss and accuracy of ``model`` as it is.
        coordinates: values of alpha; the paper's are 51 in [-0.5, 1.5].

    Yields:
        Points of the line: ``alpha``, ``loss``, ``accuracy``.

    Raises:
        ValueError: ``first`` or ``second`` are of another architecture.
    """
    for label, ends in (("first", first), ("second", second)):
        _check_fits(model, ends, label)
    with restored(model):
        for alpha in coordinates:
            # Not theta + alpha * (theta' - theta), which is not theta' at alpha = 1, but for rounding.
            move(model, {name: (1 - alpha) * w for name, w in first.items()}, [(alpha, second)])
            loss, accuracy = measure()
            yield {"alpha": alpha, "loss": loss, "accuracy": accuracy}


def _check_fits(model: nn.Module, ends: Weights, label: str) -> None:
    shapes: dict[str, Any] = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(w.shape) for name, w in ends.items()}
    if shapes != given:
        wrong = sorted(x for x in shapes.keys() | given.keys() if shapes.get(x) != given.get(x))
        raise ValueError(
            f"{label}: {wrong[0]} has shape {given.get(wrong[0])}; expected {shapes.get(wrong[0])}, as "
            "in the model (both ends must be models of one architecture and task)"
        )
