"""Training from parameters and gradients that are the same in every run."""

from __future__ import annotations

import torch
from torch import nn


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, params, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(params, step)
        optimizer.step()


def changed(optimizer, params, step: int) -> int:
    """How many elements a step changes."""
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, step)
    return sum(int((p != q).sum()) for p, q in zip(params, before, strict=True))
