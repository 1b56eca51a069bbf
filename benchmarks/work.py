"""What is stepped: shapes of tensors, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Gradient = Literal["ce", "kl"]

STEP = 10  # every timed step is the one after this
_HISTORY = 0.23  # |m| / |g| of pure noise at beta1 = 0.9
_SHARE_DENORMAL = 0.1
_SHARE_ZERO = 0.5  # of gradients in "ties": puts the 0.6 quantile of the risk inside the class at 1
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Work:
    """A list of tensors to step.

    Attributes:
        full_size: whether it is one that the targets speak of.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    full_size: bool = True

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))


def flat(elements: int) -> Work:
    """One tensor."""
    return Work(f"flat-{_short(elements)}", [(elements,)], full_size=elements >= 1 << 26)


def roberta() -> Work:
    """The 201 tensors of RoBERTa-base with a classifier of two labels: 124.6M elements."""
    d, ff = 768, 3072
    linear = [(d, d), (d,)]
    norm = [(d,), (d,)]
    layer = [*linear * 4, *norm, (ff, d), (ff,), (d, ff), (d,), *norm]
    embeddings = [(50265, d), (514, d), (1, d), *norm]
    return Work("roberta-base", [*embeddings, *layer * 12, *linear, (2, d), (2,)])


def tiny() -> Work:
    """10,000 tensors of 64 elements: what a step costs beyond its elements."""
    return Work("tiny-10000", [(64,)] * 10_000, full_size=False)


def _short(n: int) -> str:
    for shift, unit in ((20, "Mi"), (10, "Ki")):
        if n >= 1 << shift and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


class Problem:
    """Parameters, gradients and moments of one step, shared by everyone who is compared.

    Sharing makes them equal in what the allocator and the pages do, and :meth:`restore` makes every
    timed step meet the same numbers (with a gradient that stays, m would converge to it).

    Args:
        data: one of ``DATA``, or ``"tiled"``: random numbers that repeat, made fast.
        restorable: keep what :meth:`restore` needs, 12 bytes per element.
    """

    def __init__(self, work: Work, data: str, *, restorable: bool = True, seed: int = 0) -> None:
        self.work, self.data = work, data
        random = torch.Generator().manual_seed(seed)
        empty = [[torch.empty(shape) for shape in work.shapes] for _ in range(5)]
        self.params = [nn.Parameter(t) for t in empty[0]]
        self.grads, self.kl_grads, self.exp_avgs, self.exp_avg_sqs = empty[1:]
        # Tensors of a model differ in the scale of their gradients.
        exponents = torch.rand(len(work.shapes), generator=random) * 2 - 4
        scales = (10**exponents).tolist() if len(work.shapes) > 1 else [1e-3]
        for p, g, kl, m, v, scale in zip(
            self.params, self.grads, self.kl_grads, self.exp_avgs, self.exp_avg_sqs, scales, strict=True
        ):
            fill = _fill_tiled if data == "tiled" else Tensor.normal_
            fill(p.data, 0, 0.02, generator=random)
            fill(g, 0, scale, generator=random)
            fill(kl, 0, scale, generator=random)
            fill(m, 0, scale * _HISTORY, generator=random)
            if data == "tiled":
                v.fill_(scale**2)
                continue
            v.uniform_(0.5 * scale**2, 1.5 * scale**2, generator=random)
            if data == "denormals":
                for t in (g, kl, m, v):
                    _make_denormal(t, random)
            elif data == "ties":
                g.masked_fill_(torch.rand(g.shape, generator=random) < _SHARE_ZERO, 0.0)
                kl.copy_(torch.copysign((kl.abs() * (2 / scale)).ceil_() * (scale / 2), kl))
            # An exact zero would be inactive, which the eager reference does not know about.
            for t in (kl, m):
                t.masked_fill_(t == 0, scale)
            if data == "denormals":
                v.abs_()
        self._moving = [[p.data for p in self.params], self.exp_avgs, self.exp_avg_sqs]
        self.originals = (
            [[t.clone() for t in tensors] for tensors in self._moving] if restorable else []
        )
        self.use("ce")

    def restore(self) -> None:
        """Undo what a step did to parameters and moments."""
        for tensors, originals in zip(self._moving, self.originals, strict=True):
            torch._foreach_copy_(tensors, originals)

    def use(self, which: Gradient) -> None:
        """Put the gradient of the classification loss or of the KL divergence in ``.grad``."""
        for p, grad in zip(self.params, self.grads if which == "ce" else self.kl_grads, strict=True):
            p.grad = grad


DATA = {
    "gaussian": "independent Gaussian gradients and first moments",
    "denormals": "the same, 10% of each of g, m and v denormal",
    "ties": "half of the gradients zero (risk exactly 1, and the threshold is 1 as well)",
}


def _make_denormal(t: Tensor, random: torch.Generator) -> None:
    chosen = torch.rand(t.shape, generator=random) < _SHARE_DENORMAL
    tiny = torch.rand(t.shape, generator=random).add_(0.5).mul_(1e-39)  # never zero
    torch.where(chosen, tiny.copysign_(t), t, out=t)


def _fill_tiled(t: Tensor, mean: float, std: float, *, generator: torch.Generator) -> None:
    block = torch.empty(min(_BLOCK, t.numel())).normal_(mean, std, generator=generator)
    for part in t.view(-1).split(_BLOCK):
        part.copy_(block[: part.numel()])
