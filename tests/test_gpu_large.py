"""Sizes that fill a GPU: blocks of many tiles, and more than 2^31 elements in one tensor.

What the device does is held against the CPU's kernels, or against the same data cut into other tensors.
It needs a GPU, and is not part of ``make test``, which rehearses it on the simulated device with little
data: ``pytest -m gpu tests/test_gpu_large.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gpu_large_support import TENSORS, Machine, assert_close, twins_of
from support import BF16, FLOAT, HALF, Problem, assert_all_same_bits, assert_same_bits
from torch import Tensor

from rose_ops import backends, reference
from rose_ops.definitions import Field

GIB = 1 << 30
ALPHA = reference.float32(1.0 - 0.9)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])


@pytest.fixture(scope="module", params=["simt", CUDA])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "simt":
        from simt import build

        return Machine(build.load(), "cpu", 20_000, 1 << 17, 8192, 1 << 16)
    backend = backends.BACKENDS["cuda"]
    if (reason := backend.why_not()) is not None:
        pytest.skip(reason)
    return Machine(backend.ops, "cuda", 20 << 20, 2**31, 1 << 20, 1 << 26)


UPPER, LOWER = 600_000_000, 200_000_000
Found = list[Tensor]  # records, counts and masks


def exact(ops, problem: Problem) -> Found:
    record = problem.select(ops, UPPER)
    return [record, problem.update(ops, selection=record)]


def approx(ops, problem: Problem) -> Found:
    masks, record = problem.bracket_capture(ops, UPPER, LOWER, first=True, draw=3, approx=True)
    return [
        record, *masks, problem.select(ops, UPPER, approx=True, draw=4),
        problem.bracket_update(ops, UPPER, LOWER, masks, draw=5, approx=True),
    ]  # fmt: skip


def bracket(ops, problem: Problem) -> Found:
    return [problem.bracket_update(ops, UPPER, draw=3, width=1.0)]


def bracket_between(ops, problem: Problem) -> Found:
    return [problem.bracket_update(ops, UPPER, LOWER, width=1.0)]


def first(ops, problem: Problem) -> Found:
    masks = problem.masks(ops, UPPER, first=True)
    return [problem.update(ops, masks), *masks]


def ensemble_bracket(ops, problem: Problem) -> Found:
    masks, record = problem.bracket_capture(ops, UPPER, first=True, width=1.0)
    return [record, problem.bracket_update(ops, UPPER, LOWER, masks, width=1.0), *masks]


def ensemble_exact(ops, problem: Problem) -> Found:
    masks, record = problem.masks(ops, UPPER, LOWER, first=True), problem.select(ops, UPPER)
    return [record, problem.update(ops, masks, selection=record), *masks]


def ensemble_captured(ops, problem: Problem) -> Found:
    masks = problem.masks(ops, UPPER, LOWER, first=True), problem.masks(ops, UPPER, LOWER)
    return [problem.update(ops, *masks), *masks[0], *masks[1]]


def whole_tensors(ops, problem: Problem) -> Found:
    """Granularity "tensor": one bool for each, or none where all is selected."""
    device = problem.grads[0].device
    chosen = [torch.tensor([(i // k) % 3 < 2 for i in range(TENSORS)], device=device) for k in (1, 2)]
    masks = [list(mask.unbind()) for mask in chosen]
    for i in range(0, TENSORS, 7):
        masks[0][i] = torch.empty(0, dtype=torch.uint8, device=device)
    return [problem.update(ops, *masks)]


def whole_tensors_and_bits(ops, problem: Problem) -> Found:
    device = problem.grads[0].device
    masks = list(torch.tensor([i % 3 < 2 for i in range(TENSORS)], device=device).unbind())
    return [problem.bracket_update(ops, UPPER, first=masks, width=1.0)]


def captures(ops, problem: Problem) -> Found:
    found = []
    for of_first in (True, False):
        for lower in (0, LOWER):
            record = problem.select(ops, UPPER, lower, first=of_first)
            masks = problem.capture(ops, record, first=of_first)
            bracketed, same = problem.bracket_capture(ops, UPPER, lower, first=of_first, width=1.0)
            assert_same_bits(same, record, "record")
            assert_all_same_bits(bracketed, masks, "masks")
            found += [record, *masks]
    return found


UPDATES = (
    exact, approx, bracket, bracket_between, first, ensemble_bracket, ensemble_exact,
    ensemble_captured, whole_tensors, whole_tensors_and_bits,
)  # fmt: skip
DTYPES = {
    "float": (FLOAT,) * 4,
    "bf16": (BF16, BF16, FLOAT, FLOAT),
    "half": (HALF, HALF, FLOAT, FLOAT),
    "bf16-moments": (BF16,) * 4,
    "mixed": (FLOAT, BF16, FLOAT, BF16),
}


def cases(*of_simt: str) -> Any:
    """A GPU sees all combinations of dtypes, the simulated device one or a few."""
    return pytest.mark.parametrize(
        ("machine", "dtypes"),
        [
            *(pytest.param("cuda", name, marks=CUDA.marks) for name in DTYPES),
            *(("simt", name) for name in of_simt),
        ],
        indirect=["machine"],
    )


def of_all(tensors: Found) -> Tensor:
    """Masks of hundreds of tensors, and records, as bytes."""
    return torch.cat([t.reshape(-1).view(torch.uint8).cpu() for t in tensors])


@cases("bf16-moments")
@pytest.mark.parametrize("run", UPDATES, ids=lambda run: run.__name__)
def test_many_tiles_for_a_block(machine, generator, run: Callable[[Any, Problem], Found], dtypes):
    """More tiles than the device runs at once, in tensors of all sizes, layouts and groups."""
    scaled = dtypes in ("float", "bf16")
    options = {
        "inv_scale": torch.tensor(1 / 3) if scaled else None,
        "clip": torch.tensor([0.7, 0.6]) if scaled else None,
        "stochastic": dtypes == "bf16-moments",
        "rank_inactive": dtypes == "half",
    }
    twins = twins_of(machine, generator, DTYPES[dtypes], **options)
    found, expected = run(machine.ops, twins.device), run(machine.cpu, twins.cpu)
    assert torch.equal(of_all(found), of_all(expected))
    twins.check()
    assert twins.changed()


@cases("half")
def test_captures_of_many_tiles(machine, generator, dtypes):
    twins = twins_of(machine, generator, DTYPES[dtypes], inv_scale=torch.tensor(0.5))
    found, expected = captures(machine.ops, twins.device), captures(machine.cpu, twins.cpu)
    assert torch.equal(of_all(found), of_all(expected))
    assert not twins.changed()


@cases("float")
def test_sums_of_squares_of_many_tiles(machine, generator, dtypes):
    """Sums in another order than the CPU's: float64, of positive numbers."""
    twins = twins_of(machine, generator, DTYPES[dtypes], inv_scale=torch.tensor(1 / 3))
    for name in ("grads", "params"):
        actual = machine.ops.sums_of_squares(getattr(twins.device, name), twins.device.inv_scale)
        expected = machine.cpu.sums_of_squares(getattr(twins.cpu, name), twins.cpu.inv_scale)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=0.0, equal_nan=True)
        again = machine.ops.sums_of_squares(getattr(twins.device, name), twins.device.inv_scale)
        assert_same_bits(again.cpu(), actual.cpu(), name)


# --------------------------------------------------------------------------- more than 2^31 elements


@dataclass
class Giant:
    """One tensor each of p, g, m and v, in bfloat16."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor

    def copy(self) -> Giant:
        return Giant(self.p.clone(), self.g, self.m.clone(), self.v.clone())

    def problem(self, cuts: Sequence[int] = (), offset: int = 0) -> Problem:
        p, g, m, v = (list(x.tensor_split(cuts)) for x in (self.p, self.g, self.m, self.v))
        steps = list(torch.full((len(p),), 3.0, device=self.p.device).unbind())
        problem = Problem.of(
            g, m, params=p, exp_avg_sqs=v, steps=steps, lr=1e-2, seed=7, stochastic=True, gamma=0.3
        )
        problem.offsets += offset
        return problem


@pytest.fixture(scope="module")
def giant(machine) -> Iterator[Giant]:
    if machine.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        needed = 48 * GIB
        if free < needed:
            pytest.skip(f"needs {needed >> 30} GiB of the GPU's memory, {free / GIB:.1f} are free")
    generator = torch.Generator(machine.device).manual_seed(torch.seed() % 2**31)

    def filled(kind: str) -> Tensor:
        x = torch.empty(machine.giant, dtype=BF16, device=machine.device)
        for part in x.split(machine.chunk):
            new = torch.randn(len(part), generator=generator, device=machine.device)
            if kind in "gm":
                dice = torch.randint(0, 1000, new.shape, generator=generator, device=new.device)
                new = torch.where(dice < 50, 0.0, torch.where(dice == 999, torch.nan, new))
            part.copy_(new.abs_() if kind == "v" else new)
        return x

    yield Giant(*(filled(kind) for kind in "pgmv"))
    gc.collect()
    if machine.device == "cuda":
        torch.cuda.empty_cache()


def chunks(machine: Machine, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(machine.chunk) for t in tensors), strict=True)


def same(machine: Machine, a: Giant, b: Giant) -> bool:
    pairs = ((a.p, b.p), (a.m, b.m), (a.v, b.v))
    return all(
        torch.equal(x.view(torch.int16), y.view(torch.int16))
        for pair in pairs
        for x, y in chunks(machine, *pair)
    )


def keys_of(g: Tensor, m: Tensor | None) -> Tensor:
    return reference.risk_key(reference.scaled(g, None), m, ALPHA, False)


def check_record(machine: Machine, giant: Giant, record: Tensor, first: bool, *kept: int) -> None:
    """By counting: the threshold has the rank asked for, and counts are those of its sides."""
    high, low = record[Field.HIGH], record[Field.LOW]
    counted = torch.zeros(8, dtype=torch.int64, device=record.device)
    for g, m in chunks(machine, giant.g, giant.m):
        key = keys_of(g, None if first else m)
        ranked = key < reference.INACTIVE_KEY
        of_chunk = (
            ranked & (key > low) & (key <= high), ranked, key == reference.INACTIVE_KEY,
            key == reference.NONFINITE_KEY, key < high, key <= high, key < low, key <= low,
        )  # fmt: skip
        counted += torch.stack([x.sum() for x in of_chunk])
    assert counted[:4].tolist() == record[Field.KEPT : Field.NONFINITE + 1].tolist()
    assert record[Field.MISSES] == 0
    _, n, _, _, *sides = counted.tolist()
    assert n > 0.9 * machine.seam
    for fraction, below, upto in zip(kept, sides[::2], sides[1::2], strict=True):
        if fraction:
            assert below < reference.rank_of(fraction, n) <= upto
        else:
            assert low == -1


def spans(machine: Machine) -> list[slice]:
    """At both ends and around the seam, from whole bytes of masks on."""
    last = (machine.giant - machine.span) // 8 * 8
    starts = (0, machine.seam - machine.span // 2, last)
    return [slice(start, min(start + machine.span, machine.giant)) for start in starts]


def check_spans(
    machine: Machine, before: Giant, after: Giant, record: Tensor, mask: Tensor | None = None
) -> None:
    """An update by the CPU, with the thresholds found."""
    for span in spans(machine):
        here, there = (
            Giant(*(x[span].cpu().clone() for x in (state.p, state.g, state.m, state.v)))
            for state in (before, after)
        )
        p0 = here.p.clone()
        masks = [] if mask is None else [mask[span.start // 8 : -(-span.stop // 8)].cpu()]
        here.problem(offset=span.start).update(machine.cpu, masks, selection=record.cpu())
        assert_same_bits(there.m, here.m, f"exp_avg of {span}")
        assert_same_bits(there.v, here.v, f"exp_avg_sq of {span}")
        assert_close(there.p, here.p, p0)
        assert not torch.equal(there.p, p0)


def test_update_beyond_2_31(machine, generator, giant):
    """In one pass, in one over pieces that begin anywhere, and in two; against counts and the CPU."""
    cuts = sorted((torch.randint(machine.giant // 2, (6,), generator=generator) * 2 + 1).tolist())
    one, other = giant.copy(), giant.copy()
    result = one.problem().bracket_update(machine.ops, UPPER, LOWER, draw=1, width=1.0)
    record, counts = result.split([Field.SIZE, 2])
    assert not same(machine, one, giant)
    check_record(machine, giant, record, False, UPPER, LOWER)
    check_spans(machine, giant, one, record)
    assert counts[0] == record[Field.KEPT] + record[Field.INACTIVE]
    assert counts[1] == record[Field.NONFINITE]

    pieces = other.problem(cuts)
    assert_same_bits(pieces.bracket_update(machine.ops, UPPER, LOWER, draw=2, width=1.0), result)
    assert same(machine, one, other)

    for x, y in ((other.p, giant.p), (other.m, giant.m), (other.v, giant.v)):
        x.copy_(y)
    problem = other.problem()
    found = problem.select(machine.ops, UPPER, LOWER)
    assert_same_bits(found, record)
    assert_same_bits(problem.update(machine.ops, selection=found), counts)
    assert same(machine, one, other)


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_captures_beyond_2_31(machine, giant, first):
    problem = giant.problem()
    (mask,), record = problem.bracket_capture(machine.ops, UPPER, first=first, width=1.0)
    check_record(machine, giant, record, first, UPPER, 0)
    assert_same_bits(problem.select(machine.ops, UPPER, first=first), record)
    assert_same_bits(problem.capture(machine.ops, record, first=first)[0], mask)
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=mask.device)
    selected = sum(ones[part.int()].sum() for part in mask.split(machine.chunk))
    assert selected == record[Field.KEPT] + record[Field.INACTIVE]
    for span in spans(machine):
        key = keys_of(giant.g[span].cpu(), None if first else giant.m[span].cpu())
        wanted = reference.pack(reference.is_selected(key, record.cpu()))
        assert_same_bits(mask[span.start // 8 : -(-span.stop // 8)].cpu(), wanted, str(span))


def test_ensemble_beyond_2_31(machine, giant):
    """With a first-order mask of more than 2^28 bytes."""
    one = giant.copy()
    problem = one.problem()
    masks, _ = problem.bracket_capture(machine.ops, UPPER, first=True, width=1.0)
    result = problem.bracket_update(machine.ops, UPPER, 0, masks, width=1.0)
    record, counts = result.split([Field.SIZE, 2])
    check_record(machine, giant, record, False, UPPER, 0)
    check_spans(machine, giant, one, record, masks[0])
    assert counts[0] > record[Field.KEPT]
    assert counts[1] == record[Field.NONFINITE]
