"""Problems that fill a GPU, on it and on the CPU: hundreds of tensors of all sizes and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_support import generator_on
from support import (
    FLOAT,
    PLAIN,
    ROSE,
    Problem,
    U,
    assert_all_same_bits,
    assert_same_bits,
    bits,
    hyper_table,
    layout_strides,
)
from torch import Tensor

TENSORS = 300


@dataclass(frozen=True)
class Machine:
    """Where the kernels to check run, those of the CPU, and how much data they get."""

    ops: Any
    device: str
    elements: int  # of many tensors together
    seam: int  # a tensor has more elements than this
    span: int  # of elements that the CPU looks at, too
    chunk: int  # of elements that are looked at together on the device
    cpu: Any = field(default_factory=lambda: torch.ops.rose_ops)

    @property
    def giant(self) -> int:
        return self.seam + 12_347


def moved(x: Tensor, device: str) -> Tensor:
    """A copy, by way of pinned memory alone."""
    if x.device.type == device:
        return x.clone()
    if device == "cpu":
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return x.to(device)


def numbers(n: int, dtype: torch.dtype, generator: torch.Generator, spoilt: bool = False) -> Tensor:
    """Normal, with zeros, ties and denormals; spoilt ones have huge numbers, NaNs and infinities."""
    x = torch.randn(n, generator=generator, device=generator.device)
    kind = torch.randint(0, 4096, (n,), generator=generator, device=generator.device)
    x = torch.where(kind < 200, 0.0, x)
    x = torch.where((kind >= 200) & (kind < 700), (4 * x).round() / 4, x)
    x = torch.where((kind >= 700) & (kind < 760), x * 1e-39, x)
    if spoilt:
        x = torch.where((kind >= 760) & (kind < 765), x * 1e37, x)
        x = torch.where(kind == 4094, torch.inf, torch.where(kind == 4095, torch.nan, x))
    return x.to(dtype)


@dataclass
class Operand:
    """One of p, g, m and v: views of one buffer, with gaps between them."""

    buffer: Tensor
    places: list[tuple[tuple[int, ...], list[int], int]]  # shape, strides, offset

    def views(self) -> list[Tensor]:
        return [self.buffer.as_strided(*place) for place in self.places]


def shapes_of(elements: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """TENSORS of them: empty, of one element, around the size of a tile, of odd sizes; some large."""
    shapes: list[tuple[int, ...]] = [
        (0,), (3, 0), (1,), (1,), (1, 1), (2,), (7, 5), (63, 65), (4095,), (4096,), (4097,), (8193,),
    ]  # fmt: skip
    share = torch.rand(TENSORS - len(shapes), generator=generator) ** 24
    for i, n in enumerate((share / share.sum() * elements).long().tolist()):
        columns = (0, 3, 17, 100)[i % 4]
        shapes.append((n // columns + 1, columns) if columns else (n | 1,))
    return [shapes[i] for i in torch.randperm(len(shapes), generator=generator)]


def places_of(
    shapes: Sequence[tuple[int, ...]], generator: torch.Generator
) -> list[list[tuple[tuple[int, ...], list[int], int]]]:
    """For each operand. Most tensors are vectors and aligned in all four, some in none."""
    at = [0] * 4
    places: list[list[tuple[tuple[int, ...], list[int], int]]] = [[], [], [], []]
    for shape in shapes:
        kind = float(torch.rand((), generator=generator))
        for k in range(4):
            layout, skip = "contiguous", 0
            if kind < 0.2:  # another layout in each
                choices = ("contiguous", "strided", "transposed", "padded")
                layout = choices[int(torch.randint(4, (), generator=generator))]
            if kind < 0.4:
                skip = int(torch.randint(8, (), generator=generator))
            strides, offset = layout_strides(shape, layout), -(-at[k] // 8) * 8 + skip
            places[k].append((shape, strides, offset))
            reach = sum((size - 1) * s for size, s in zip(shape, strides, strict=True)) + 1
            at[k] = offset + (reach if 0 not in shape else 0) + 3
    return places


@dataclass
class Twins:
    """The same problem on the device and on the CPU."""

    device: Problem
    cpu: Problem
    buffers: dict[str, tuple[Operand, Operand, Tensor]]  # on the device, on the CPU, before

    def check(self) -> None:
        """All that was written and what lies around it."""
        for name, (actual, expected, before) in self.buffers.items():
            wanted = moved(expected.buffer, before.device.type)
            if name == "params":
                assert_close(actual.buffer, wanted, before)
            else:
                assert_same_bits(actual.buffer, wanted, name)
        assert_all_same_bits([s.cpu() for s in self.device.steps], self.cpu.steps, "steps")

    def changed(self) -> bool:
        actual, _, before = self.buffers["params"]
        return not torch.equal(bits(actual.buffer), bits(before))


def twins_of(
    machine: Machine, generator: torch.Generator, dtypes: Sequence[torch.dtype], **options: Any
) -> Twins:
    shapes = shapes_of(machine.elements, generator)
    on_device = generator_on(machine.device, generator)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    buffers = {}
    for name, dtype, places in zip(names, dtypes, places_of(shapes, generator), strict=True):
        shape, strides, offset = places[-1]
        size = offset + sum(n * s for n, s in zip(shape, strides, strict=True)) + 8
        data = numbers(size, dtype, on_device, spoilt=name in ("grads", "exp_avgs"))
        data = data.abs_() if name == "exp_avg_sqs" else data
        here = Operand(moved(data, "cpu"), places)
        buffers[name] = (Operand(data, places), here, data.clone())
    sizes = torch.tensor([torch.Size(shape).numel() for shape in shapes])
    rest = {
        "hyper": hyper_table(ROSE, (0.8, 0.99, 1e-6, 0.1, -1.0, 1.0), PLAIN),
        "group": torch.randint(0, 3, (len(shapes),), generator=generator),
        "lr": torch.tensor([1e-2, 1e-3, 1e-2], dtype=torch.float64),
        "offsets": sizes.cumsum(0) - sizes,
        "gamma": 0.3,
        "seed": 5,
    }

    def problem(i: int, device: str) -> Problem:
        operands = {name: operand[i].views() for name, operand in buffers.items()}
        steps = list(torch.full((len(shapes),), 3.0, device=device).unbind())
        placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        return Problem(**operands, **rest, **placed, steps=steps)

    return Twins(problem(0, machine.device), problem(1, "cpu"), buffers)


def assert_close(actual: Tensor, expected: Tensor, before: Tensor) -> None:
    """Parameters: the bound of ``support.assert_theta_close``, with |update| <= |before| + |after|; and
    few differ at all, so that what is rounded by random bits is rounded by the same ones."""
    a, e, b = actual.double(), expected.double(), before.double()
    eps, tiny = torch.finfo(actual.dtype).eps, torch.finfo(actual.dtype).tiny
    bound = U * (20 * b.abs() + 18 * e.abs()) + 2.0**-140
    if actual.dtype != FLOAT:
        bound += eps * e.abs().clamp(min=tiny)
    differ = bits(actual) != bits(expected)
    wrong = differ & (~((a - e).abs() <= bound) | e.isinf())
    where = wrong.nonzero().reshape(-1)[:5]
    assert len(where) == 0, f"{a[where].tolist()} instead of {e[where].tolist()} at {where.tolist()}"
    count = int(differ.sum())
    assert count <= 0.01 * len(differ), f"{count} of {len(differ)} parameters differ"
