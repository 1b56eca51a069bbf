"""``--preset gpu``: what an hour on a rented GPU should begin with, in two minutes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.device import Cuda, Device
from benchmarks.specs import BASELINE, BASELINE_SELECT, CLIPPED, EAGER
from benchmarks.work import Work, flat, llama, roberta

SECONDS = 110  # for everything; a case that has no time left is not begun
ROUNDS, FEWEST = 20, 5  # of a case: with time to spare, and at least
SLOW_SHARE = 5
FLAT = 1 << 26
BF16 = "-bf16"  # what a work in bfloat16 is called beyond its name in float32

_BRACKET = ("rose bracket", "rose bracket, graph")
_STEPS = (
    BASELINE, f"{BASELINE}, graph", "AdamW foreach", "AdamW foreach, graph", CLIPPED,
    f"{CLIPPED}, graph", EAGER, *_BRACKET, "rose exact", "rose exact, graph", "rose approx",
    "rose bracket, clip", "rose bracket, clip, graph", "rose ensemble, bracket",
    "rose ensemble, bracket, graph",
)  # fmt: skip
_IN_BF16 = (BASELINE, f"{BASELINE}, graph", *_BRACKET, "rose bracket, stochastic", "rose bracket, clip")


@dataclass(frozen=True)
class Case:
    """A work, who steps it, and the share of the time that it may take."""

    work: Work
    contenders: tuple[str, ...]
    share: float


def cases(sizes: Sequence[int] | None) -> Iterator[Case]:
    """
    Args:
        sizes: for a rehearsal: of the flat works, and what lists are cut to.
    """
    for n in sizes or [FLAT]:
        lists = roberta(), llama()
        roberta_, llama_ = lists if sizes is None else (cut(work, n) for work in lists)
        yield Case(flat(n), ("copy", *_STEPS, BASELINE_SELECT, "rose upper=1"), 0.3)
        yield Case(_narrow(flat(n)), ("copy", *_IN_BF16), 0.1)
        yield Case(roberta_, ("copy", *_STEPS), 0.3)
        yield Case(_narrow(roberta_), ("copy", *_IN_BF16), 0.1)
        yield Case(llama_, ("copy", *_IN_BF16), 0.2)


def cut(work: Work, elements: int) -> Work:
    """The tensors of a work that are small beside ``elements``, about as many as they come to."""
    shapes, left = [], elements
    for shape, size in zip(work.shapes, work.sizes, strict=True):
        if size <= min(left, elements // 8):
            shapes.append(shape)
            left -= size
    return replace(work, name=f"{work.name}-cut", shapes=shapes, full_size=False)


def _narrow(work: Work) -> Work:
    return replace(work, name=work.name + BF16, dtype=torch.bfloat16)


def name(device: Device) -> str:
    """Of the files: the GPU's, such as ``nvidia-h200``."""
    gpu = device.properties.name if isinstance(device, Cuda) else f"{device.name}-rehearsal"
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
