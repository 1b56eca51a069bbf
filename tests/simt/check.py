"""Compares the kernels of an extension, possibly a mutant, with the reference; exits with 1 if unequal.

Data that finds bugs: ties, thresholds at the edges of bins, sizes that do not divide, many tensors,
keys that differ in their last bits, masks with stale bits around them, every order of threads.
"""

from __future__ import annotations

import sys
import traceback
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

# ruff: noqa: E402
from support import (
    BF16,
    FLOAT,
    HALF,
    ONE,
    PLAIN,
    ROSE,
    Problem,
    assert_consistent,
    bits,
    compare_bracket,
    compare_rounding,
    compare_update,
    hyper_table,
    place,
    tensor_norms,
    values,
)

from rose_ops import reference
from rose_ops.reference import Field

MIXES = (
    ("normal",), ("ties",), ("normal", "zero", "nan", "inf", "denormal"), ("one",), ("zero", "one"),
)  # fmt: skip
KEPT = ((600_000_000, 0), (ONE, 500_000_000), (1, 0), (999_999_999, 999_000_000))


def problem_of(n: int, mix, pieces: int, dtype, moment, generator) -> Problem:
    cuts = torch.randint(0, n, (pieces - 1,), generator=generator).sort().values
    layouts = ("contiguous", "transposed", "strided", "padded")

    def tensors(operand, dtype):
        split = values(n, mix, dtype, generator).tensor_split(cuts)
        if pieces == 1:
            return list(split)
        split = [t.view(-1, 3) if t.numel() % 3 == 0 else t for t in split]
        return [place(t, layouts[(i + operand) % 4], offset=i % 3) for i, t in enumerate(split)]

    p, g, m, v = tensors(0, dtype), tensors(1, dtype), tensors(2, moment), tensors(3, moment)
    v = [t.abs_() for t in v]
    group = (torch.arange(pieces) % 4 == 3).long()  # some are not selective
    return Problem.of(
        g, m, params=p, exp_avg_sqs=v, gamma=0.3, seed=3, stochastic=True,
        clip=torch.tensor([0.75, 0.5]), hyper=hyper_table(ROSE, PLAIN), group=group,
        lr=torch.tensor([1e-2, 1e-3], dtype=torch.float64),
    )  # fmt: skip


def check(ops, problem: Problem) -> None:
    for first in (True, False):
        for kept in KEPT:
            record = problem.select(ops, *kept, first=first)
            assert record.tolist() == problem.select(reference, *kept, first=first).tolist()
        masks = problem.capture(ops, record, first=first)
        expected = problem.capture(reference, record, first=first)
        assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    record = problem.select(reference, 600_000_000)
    norms = tensor_norms(ops, problem.grads, None).double()
    truth = torch.stack([t.double().norm() for t in problem.grads])
    finite = truth.isfinite()
    assert torch.allclose(norms[finite], truth[finite], rtol=1e-6)
    everything = [torch.empty(0, dtype=torch.uint8) for _ in problem.grads]
    compare_update(ops, problem.copy(), everything)
    nothing = [torch.zeros(1, dtype=torch.bool) for _ in problem.grads]
    compare_update(ops, problem.copy(), nothing)
    compare_update(ops, problem.copy(), nothing, masks)
    compare_update(ops, problem.copy(), masks, nothing)
    compare_update(ops, problem, [place(mask, offset=9) for mask in masks], selection=record)
    compare_bracket(ops, problem.copy(), 600_000_000)  # too few elements for one
    problem.found_inf = torch.ones(())
    before = [bits(t) for t in problem.params]
    problem.update(ops, masks)
    assert problem.bracket_update(ops, 600_000_000).tolist() == [-1, -1] + [0] * Field.SIZE
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, problem.params, strict=True))


def check_brackets(ops, problem: Problem) -> None:
    """As after a selection, and consistent after a forced miss."""
    masks = problem.masks(reference, 500_000_000, first=True)
    for kept in KEPT:
        assert compare_bracket(ops, problem.copy(), *kept)[Field.MISSES] == 0
    for draw in range(3):
        for width in (1.0, 0.0):
            options = {"draw": draw, "width": width}
            for first in ((), masks):
                compare_bracket(ops, problem.copy(), 600_000_000, 300_000_000, first, **options)
            for first in (True, False):
                found, record = problem.bracket_capture(ops, 600_000_000, first=first, **options)
                if width == 1:
                    exact = problem.select(reference, 600_000_000, first=first)
                    assert record.tolist() == exact.tolist()
                elif first:  # of second order, all tensors are ranked, selective or not
                    assert_consistent(problem, record, first=True)
                expected = problem.capture(reference, record, first=first)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_graph(module, ops, generator) -> None:
    """Replays of a step with a table of several launches, and more learning rates than are by value."""
    problem = problem_of(30_011, ("normal",), 60, FLOAT, FLOAT, generator)
    problem.hyper, problem.lr = problem.hyper.repeat(10, 1), torch.rand(20, dtype=torch.float64)
    problem.group = torch.arange(60) % 20
    graph = module.Graph()
    with graph:
        result = problem.bracket_update(ops, 600_000_000)
    for _ in range(2):
        expected = problem.copy()
        graph.replay()
        assert result.tolist() == expected.bracket_update(reference, 600_000_000).tolist()
        for name in ("steps", "exp_avgs", "exp_avg_sqs"):
            pairs = zip(getattr(problem, name), getattr(expected, name), strict=True)
            assert all(torch.equal(bits(a), bits(b)) for a, b in pairs)
        for a, b in zip(problem.params, expected.params, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def sampled(n: int, of_bracket: bool) -> torch.Tensor:
    """Which of n elements (a multiple of 16) in one tensor are in the sample, with ``draw=0``."""
    lines = n // 16
    share, step = (0.5, 0x5A3B) if of_bracket else (0.1, 0)
    apart = lines // int(share * round(n ** (1 / 3), 9) ** 2)
    strata = torch.arange(-(-lines // apart))
    line = strata * apart + (reference.hash_u32(strata, 0, step) * apart >> 32)
    is_sampled = torch.zeros(lines, 16, dtype=torch.bool)
    is_sampled[line[line < lines]] = True
    return is_sampled.reshape(-1)


def overflowing(generator) -> Problem:
    """A step with ``draw=0`` whose log overflows: the lines that are sampled say nothing of the others.

    They have risks all over [0, 1], and the other elements have risks close to the threshold.
    """
    n = 1 << 20
    anywhere, close = torch.rand(2, n, generator=generator)
    risk = torch.where(sampled(n, True), anywhere, 0.595 + 0.01 * close)
    m = torch.rand(n, generator=generator) + 0.5
    return Problem.of([10 * m * (1 - risk)], [m])


def check_misleading_samples(ops, generator) -> None:
    """Thresholds below and above of where the sample has them, and a log that overflows."""
    n = 300_000
    is_sampled, (anywhere, near) = sampled(n, False), torch.rand(2, n, generator=generator)
    for others in (near, near + 2, 1.595 + 0.01 * near):
        problem = Problem.of([torch.where(is_sampled, anywhere + 1, others)])
        for kept in ((600_000_000, 0), (600_000_000, 300_000_000)):
            record = problem.select(ops, *kept, first=True)
            assert record.tolist() == problem.select(reference, *kept, first=True).tolist()
    n = 100_000
    for shift in (500, -500):
        # Every key is that of many elements, those at the ends of a bracket, too.
        key = torch.randint(500, 1500, (n,), generator=generator)
        key += shift * sampled(n, True)
        problem = Problem.of([1 + key * 2.0**-23])
        for kept in ((600_000_000, 0), (600_000_000, 300_000_000)):
            masks, record = problem.bracket_capture(ops, *kept, first=True, width=0.0)
            assert record[Field.MISSES] == 1
            assert_consistent(problem, record, first=True)
            assert torch.equal(masks[0], problem.capture(reference, record, first=True)[0])


def main(library: str) -> None:
    loader = ExtensionFileLoader("rose_simt", library)
    spec = spec_from_loader("rose_simt", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    ops = torch.ops.rose_simt
    generator = torch.Generator()
    generator.seed()
    module.configure("random", seed=torch.seed() % 2**32, resident=3)
    compare_rounding(ops, generator)
    check_misleading_samples(ops, generator)
    check_graph(module, ops, generator)
    for order in ("random", "forward", "reverse"):
        module.configure(order, seed=torch.seed() % 2**32, resident=3)
        for i, mix in enumerate(MIXES):
            for n, pieces in ((9_001, 1), (30_011, 17)):
                dtype, moment = ((FLOAT, FLOAT), (BF16, BF16), (HALF, FLOAT))[i % 3]
                check(ops, problem_of(n, mix, pieces, dtype, moment, generator))
        if order == "random":  # the one that finds most
            brackets = (("normal",), 300_007, 1), (MIXES[2], 100_003, 17), (("ties",), 100_003, 5)
            for mix, n, pieces in brackets:
                check_brackets(ops, problem_of(n, mix, pieces, FLOAT, FLOAT, generator))
            assert compare_bracket(ops, overflowing(generator), 600_000_000)[Field.MISSES] == 1
    # Large enough to be sampled: a window, a log that is used, and one that overflows.
    for mix in (("normal",), ("normal", "ties", "ties"), ("one",) * 30 + ("normal",)):
        g, m = (values(300_007, mix, FLOAT, generator) for _ in range(2))
        problem = Problem.of([g], [m])
        for kept in KEPT:
            for first in (True, False):
                record = problem.select(ops, *kept, first=first)
                assert record.tolist() == problem.select(reference, *kept, first=first).tolist()
                again = problem.select(ops, *kept, first=first)
                assert record.tolist() == again.tolist()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (AssertionError, RuntimeError):
        traceback.print_exc()
        sys.exit(1)
