"""What is stepped: shapes of tensors, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import record
from rose_ops import memory

Gradient = Literal["ce", "kl"]
Shapes = Sequence[tuple[int, ...]]

STEP = record.STEPS  # every timed step is the one after this
_HISTORY = 0.23  # |m| / |g| of pure noise at beta1 = 0.9
_SHARE_DENORMAL = 0.1
_SHARE_ZERO = 0.5  # of gradients in "ties": puts the 0.6 quantile of the risk inside the class at 1
_MAX_CHUNK = 1 << 22


@dataclass(frozen=True)
class Work:
    """A list of tensors to step.

    Attributes:
        dtype: of parameters, gradients and moments.
        full_size: whether it is one that the targets speak of.
    """

    name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    full_size: bool = False

    @cached_property
    def elements(self) -> int:
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]


def flat(elements: int) -> Work:
    """One tensor."""
    return Work(f"flat-{_short(elements)}", [(elements,)], full_size=elements >= 1 << 26)


def _encoder(vocabulary: int, positions: int, types: int, d: int, layers: int) -> list[tuple[int, ...]]:
    """BERT's tensors, up to the last layer; the feed-forward width is four times d."""
    norm = [(d,), (d,)]
    layer = [*[(d, d), (d,)] * 4, *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,), *norm]
    return [(vocabulary, d), (positions, d), (types, d), *norm, *layer * layers]


def roberta() -> Work:
    """The 201 tensors of RoBERTa-base with a classifier of two labels: 124.6M elements."""
    d = 768
    shapes = [*_encoder(50265, 514, 1, d, layers=12), (d, d), (d,), (2, d), (2,)]
    return Work("roberta-base", shapes, full_size=True)


def minilm() -> Work:
    """The 105 tensors that record.py fine-tunes, 22.7M elements: "recorded" fits it as it was."""
    d = 384
    return Work("minilm", [*_encoder(30522, 512, 2, d, layers=6), (d, d), (d,), (2, d), (2,)])


def llama() -> Work:
    """The 146 tensors of a Llama of 1.24B parameters (tied embeddings, 8 key-value heads), bfloat16."""
    d, kv, ff = 2048, 512, 8192
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff), (d,), (d,)]
    return Work("llama-1b", [(128256, d), *layer * 16, (d,)], torch.bfloat16)


def tiny() -> Work:
    """10,000 tensors of 64 elements: what a step costs beyond its elements."""
    return Work("tiny-10000", [(64,)] * 10_000)


SCALING = tuple(n << 20 for n in (1, 4, 16, 64, 256, 512))


def _short(n: int) -> str:
    for shift, unit in ((20, "Mi"), (10, "Ki")):
        if n >= 1 << shift and n % (1 << shift) == 0:
            return f"{n >> shift}{unit}"
    return str(n)


# ------------------------------------------------------------------------------------------- numbers

ROLES = ("params", "grads", "kl_grads", "exp_avgs", "exp_avg_sqs")

DATA = {
    "gaussian": "independent Gaussian gradients and first moments",
    "heavy": "the same from Student's t distribution with two degrees of freedom",
    "ties": "half of the gradients zero (risk exactly 1, and the threshold is 1 as well)",
    "denormals": "Gaussian, 10% of each of g, m and v denormal",
    "recorded": "all from a fine-tuning run of MiniLM, with its correlations (see record.py)",
}

# Of different, prime lengths, so that no pair of g and m comes twice in the largest work.
_LENGTHS = dict(zip(ROLES, (4194301, 4194287, 4194277, 4194271, 4194247), strict=True))


@cache
def _tiles(data: str, limit: int, seed: int) -> dict[str, Tensor]:
    """Numbers of every role, for gradients of scale 1, that are repeated over a work of ``limit``
    elements."""
    if data == "recorded":
        return record.load()
    random = torch.Generator().manual_seed(seed)
    lengths = {role: min(length, limit) for role, length in _LENGTHS.items()}

    def noise(role: str) -> Tensor:
        made = torch.randn(lengths[role], generator=random)
        if data == "heavy":  # z / sqrt(chi2(2) / 2)
            made /= torch.rand(lengths[role], generator=random).log_().neg_().sqrt_().clamp_(min=1e-4)
        return made

    g, kl, m = noise("grads"), noise("kl_grads"), noise("exp_avgs").mul_(_HISTORY)
    v = torch.rand(lengths["exp_avg_sqs"], generator=random).add_(0.5)
    if data == "ties":
        g.masked_fill_(torch.rand(g.shape, generator=random) < _SHARE_ZERO, 0.0)
        kl.copy_(torch.copysign((kl.abs() * 2).ceil_() / 2, kl))
    # An exact zero would be inactive, which the eager reference does not know about.
    for t in (kl, m):
        t.masked_fill_(t == 0, 1.0)
    if data == "denormals":  # by the scale of the tensor, which is squared for v
        for t, size in ((g, 1e-37), (kl, 1e-37), (m, 1e-37), (v, 1e-34)):
            small = torch.rand(t.shape, generator=random).add_(0.5).mul_(size).copysign_(t)
            t.copy_(torch.where(torch.rand(t.shape, generator=random) < _SHARE_DENORMAL, small, t))
    p = torch.randn(lengths["params"], generator=random).mul_(0.02)
    return dict(zip(ROLES, (p, g, kl, m, v), strict=True))


def _lapped(tile: Tensor, limit: int) -> Tensor:
    """What follows if it is repeated, for a part that starts anywhere in it."""
    beyond = min(_MAX_CHUNK, max(0, limit - len(tile)))
    return torch.cat([tile, tile.repeat(-(-beyond // len(tile)))[:beyond]]) if beyond else tile


class Numbers:
    """The numbers of a work: any part of them again, at no more memory than a few tiles.

    Each role's tile is repeated over the index space of the work, and multiplied by the scale of the
    tensor: tensors of a model differ in the scale of their gradients.
    """

    def __init__(self, work: Work, data: str, place: torch.device, seed: int = 0) -> None:
        self.work = work
        tiles = _tiles(data, work.elements, seed)
        self._lengths = {role: len(tile) for role, tile in tiles.items()}
        self._tiles = {role: _lapped(tile, work.elements).to(place) for role, tile in tiles.items()}
        count = len(work.sizes)
        if data == "recorded":
            scales = [1.0] * count
        elif count == 1:
            scales = [1e-3]
        else:
            exponents = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 2 - 4
            scales = (10**exponents).tolist()
        self._scales = {
            role: [s**power for s in scales] for role, power in zip(ROLES, (0, 1, 1, 1, 2), strict=True)
        }
        self._offsets = [0]
        for size in work.sizes:
            self._offsets.append(self._offsets[-1] + size)

    def _part(self, role: str, tensor: int, start: int, stop: int) -> Tensor:
        """Of at most 4Mi elements, before scaling."""
        first = (self._offsets[tensor] + start) % self._lengths[role]
        return self._tiles[role][first : first + stop - start]

    def part(self, role: str, tensor: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Elements of a tensor, flat."""
        return (self._part(role, tensor, start, stop) * self._scales[role][tensor]).to(dtype)

    def fill(self, role: str, tensors: Sequence[Tensor]) -> None:
        """``tensors``, which are contiguous, with the work's own shapes."""
        for i, (t, scale) in enumerate(zip(tensors, self._scales[role], strict=True)):
            for start, out in zip(
                range(0, t.numel(), _MAX_CHUNK), t.view(-1).split(_MAX_CHUNK), strict=True
            ):
                torch.mul(self._part(role, i, start, start + out.numel()), scale, out=out)

    def parts(self, chunk: int) -> Iterator[tuple[int, int, int]]:
        """The whole work in pieces: tensor, start, stop."""
        chunk = min(chunk, _MAX_CHUNK)
        for i, size in enumerate(self.work.sizes):
            for start in range(0, size, chunk):
                yield i, start, min(start + chunk, size)


class Problem:
    """Parameters, gradients and moments of one step, shared by everyone who is compared.

    Sharing makes them equal in what the allocator and the pages do, but for moments, which optimizers
    make: those of RoseFusedAdamW lie where it puts them. Filled again before every step, they are the
    same numbers each time (with a gradient that stays, m would converge to it).

    Args:
        data: one of ``DATA``.
    """

    def __init__(self, work: Work, data: str, place: torch.device, seed: int = 0) -> None:
        self.work, self.data, self.place = work, data, place
        self.numbers = Numbers(work, data, place, seed)
        self.params = [nn.Parameter(t) for t in self.made("params", work.dtype)]
        self.grads = self.made("grads", work.dtype)
        self._moments: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        self._cached: dict[str, Tensor] = {}
        self.moments(work.dtype)
        self.use("ce")

    def made(self, role: str, dtype: torch.dtype) -> list[Tensor]:
        """New tensors, filled."""
        tensors = [torch.empty(shape, dtype=dtype, device=self.place) for shape in self.work.shapes]
        self.numbers.fill(role, tensors)
        return tensors

    @cached_property
    def kl_grads(self) -> list[Tensor]:
        return self.made("kl_grads", self.work.dtype)

    def moments(self, dtype: torch.dtype, of_rose: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """First and second, in a precision of one's own.

        Args:
            of_rose: as RoseFusedAdamW makes them.
        """
        if (dtype, of_rose) not in self._moments:
            m, v = (
                memory.zeros_like(self.grads, dtype)
                if of_rose
                else [torch.empty_like(g, dtype=dtype) for g in self.grads]
                for _ in range(2)
            )
            self.numbers.fill("exp_avgs", m)
            self.numbers.fill("exp_avg_sqs", v)
            self._moments[dtype, of_rose] = m, v
        return self._moments[dtype, of_rose]

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What several contenders share."""
        if name not in self._cached:
            self._cached[name] = make()
        return self._cached[name]

    def use(self, which: Gradient) -> None:
        """Put the gradient of the classification loss or of the KL divergence in ``.grad``."""
        for p, grad in zip(self.params, self.grads if which == "ce" else self.kl_grads, strict=True):
            p.grad = grad
