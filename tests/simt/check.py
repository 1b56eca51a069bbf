"""Compares the kernels of an extension, possibly a mutant, with the reference; exits with 1 if unequal.

Data that finds bugs: ties, thresholds at the edges of bins, sizes that do not divide, many tensors,
keys that differ in their last bits, rows without a history, masks with stale bits around them, every
order of threads; of what there are several ways to do, all of them.
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
    compare_exact,
    compare_rounding,
    compare_update,
    hyper_table,
    place,
    tensor_norms,
    values,
)

from rose_ops import definitions, reference
from rose_ops.definitions import Field

MIXES = (
    ("normal",), ("ties",), ("normal", "zero", "nan", "inf", "denormal"), ("one",), ("zero", "one"),
)  # fmt: skip
KEPT = ((600_000_000, 0), (ONE, 500_000_000), (1, 0), (999_999_999, 999_000_000))


# Of parameters and gradients, and of moments: each has a loop of its own, but for float16.
DTYPES = ((FLOAT, FLOAT), (BF16, BF16), (HALF, FLOAT), (FLOAT, BF16), (BF16, FLOAT))
MAXIMIZED = (*PLAIN[:4], -1.0, 0.0)


def problem_of(
    n: int, mix, pieces: int, dtype, moment, generator, inv_scale=None, rank_inactive=False
) -> Problem:
    """Of several tensors, every third is contiguous in all operands; ``inv_scale``: a second factor."""
    cuts = torch.randint(4096, n, (pieces - 1,), generator=generator).sort().values
    cuts[:1] = 4096  # the first tensor ends with a tile
    layouts = ("contiguous", "transposed", "strided", "padded")

    def tensors(operand, dtype):
        split = values(n, mix, dtype, generator).tensor_split(cuts)
        if "zero" in mix:
            for t in split:  # whole rows without a history, and without a gradient
                t[100:400] = 0 if operand == 2 else t[100:400]
                t[300:500] = 0 if operand == 1 else t[300:500]
        if pieces == 1:
            return [place(t, offset=4 if dtype == HALF else 8) for t in split]
        split = [t.view(-1, 3) if t.numel() % 3 == 0 and i % 3 else t for i, t in enumerate(split)]
        return [
            place(t, layouts[(i + operand) % 4 if i % 3 else 0], offset=i % 3)
            for i, t in enumerate(split)
        ]

    p, g, m, v = tensors(0, dtype), tensors(1, dtype), tensors(2, moment), tensors(3, moment)
    v = [t.abs_() for t in v]
    group = (torch.arange(pieces) % 4 == 3).long()  # some are not selective
    return Problem.of(
        g, m, params=p, exp_avg_sqs=v, gamma=0.3, seed=3, stochastic=True,
        clip=torch.tensor([0.7, 0.6]), hyper=hyper_table(ROSE, MAXIMIZED), group=group,
        lr=torch.tensor([1e-2, 1e-3], dtype=torch.float64), rank_inactive=rank_inactive,
        inv_scale=None if inv_scale is None else torch.tensor(inv_scale),
    )  # fmt: skip


def check(ops, problem: Problem) -> None:
    for first in (True, False):
        for kept in KEPT:
            record = problem.select(ops, *kept, first=first)
            assert record.tolist() == problem.select(reference, *kept, first=first).tolist()
        record = problem.select(reference, *KEPT[1], first=first)
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
    compare_exact(ops, problem.copy(), 600_000_000, 300_000_000, masks)
    problem.found_inf = torch.ones(())
    before = [bits(t) for t in problem.params]
    for result in (
        problem.given_update(ops, masks), problem.given_update(ops, (), (), record),
        problem.exact_update(ops, 600_000_000), problem.bracket_update(ops, 600_000_000),
    ):  # fmt: skip
        assert result.tolist() == [-1, -1] + [0] * Field.SIZE
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


def check_approx(ops, generator) -> None:
    """Thresholds of a sample, whose last lines are short, and which need not know any."""
    n = reference.APPROX_FEWEST + 300_007
    for mix, pieces, dtype, draw in ((MIXES[2], 17, BF16, 1), (("ties",), 1, FLOAT, 2)):
        problem = problem_of(n, mix, pieces, dtype, FLOAT, generator)
        for kept in ((600_000_000, 300_000_000), (1, 0)):
            options = {"draw": draw, "approx": True}
            for first in (True, False):
                expected = problem.select(reference, *kept, first=first, **options)
                for _ in range(2):
                    record = problem.select(ops, *kept, first=first, **options)
                    assert record.tolist() == expected.tolist()
                masks, record = problem.bracket_capture(ops, *kept, first=first, **options)
                assert record.tolist() == expected.tolist()
                pairs = zip(masks, problem.capture(reference, record, first=first), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
            compare_bracket(ops, problem.copy(), *kept, **options)
    compare_bracket(ops, problem, 600_000_000, first=masks, **options)
    # A key with no bits but the leading ones: what is left in their bins would be counted.
    problem, options = Problem.of([torch.ones(n)]), {"first": True, "approx": True}
    record = problem.select(ops, 600_000_000, **options)
    assert record.tolist() == problem.select(reference, 600_000_000, **options).tolist()


def check_close_risks(ops, generator) -> None:
    """Keys within a few units of the threshold's last place: a comparison alone could not tell them."""
    n = 8192
    for risk in (2.0**-9, 0.6, 300.0):
        m = (torch.rand(n, generator=generator) + 0.5) * values(n, ("one",), FLOAT, generator)
        few = torch.randint(-8, 9, (n,), generator=generator)
        r = risk * (1 + few * 2.0**-24) + torch.randint(-1, 2, (n,), generator=generator) * 2.0**-25
        side = 1 if risk > 1 else torch.randint(0, 2, (n,), generator=generator) * 2 - 1
        alpha = reference.float32(1.0 - ROSE[0])
        problem = Problem.of([(m.double() * (1 + side * r.double()) / alpha).float()], [m])
        for kept in ((500_000_000, 0), (700_000_000, 300_000_000)):
            record = problem.select(ops, *kept)
            assert record.tolist() == problem.select(reference, *kept).tolist()
            expected = problem.capture(reference, record)
            assert torch.equal(problem.capture(ops, record)[0], expected[0])
            compare_update(ops, problem.copy(), selection=record)


def check_nans(ops, generator) -> None:
    """Of a GPU: all bits set but the sign, so that random bits added to them could make a zero."""
    for dtype in (FLOAT, BF16):
        p, g, m, v = (values(2000, ("normal",), FLOAT, generator) for _ in range(4))
        g.view(torch.int32)[::37] = 0x7FFFFFFF
        narrow = [p.to(dtype)], [v.abs_().to(BF16)]
        problem = Problem.of(
            [g], [m.to(BF16)], MAXIMIZED, params=narrow[0], exp_avg_sqs=narrow[1], stochastic=True
        )
        compare_update(ops, problem)


def check_norms(ops, generator) -> None:
    """Of tensors, more than a block has threads: ordinary ones, ties and zeros."""
    sums, moments = torch.rand(2, 300, generator=generator, dtype=torch.float64) * 100
    sums[::5], moments[::7] = 4.0, 0.0
    for max_norm in (1.0, 1e9):
        factors = [one.clip_factors(sums.round(), max_norm).tolist() for one in (reference, ops)]
        assert factors[0] == factors[1]
    for first in (True, False):
        for clip in (None, torch.tensor([0.3, 0.7])):
            found = []
            for one in (reference, ops):
                mask = torch.zeros(300, dtype=torch.bool)
                record = one.select_tensors_(
                    mask, sums, None if first else moments, hyper_table(ROSE, (0.5, *ROSE[1:])),
                    torch.arange(300) % 2, clip, 600_000_000, 300_000_000, False,
                )  # fmt: skip
                found.append((record.tolist(), mask.tolist()))
            assert found[0] == found[1]


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
    apart = lines // int((0.5 if of_bracket else 0.1) * round(n ** (1 / 3), 9) ** 2)
    strata = torch.arange(-(-lines // apart))
    line = strata * apart + (reference.hash_u32(strata, 0, definitions.SAMPLE_KEY) * apart >> 32)
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
        others[: n // 10] = 0  # inactive, and not to be counted twice
        problem = Problem.of([torch.where(is_sampled, anywhere + 1, others)])
        for kept in ((600_000_000, 0), (600_000_000, 300_000_000)):
            record = problem.select(ops, *kept, first=True)
            assert record.tolist() == problem.select(reference, *kept, first=True).tolist()
    # In a step without a bracket, whose second tensor is not ranked.
    is_sampled = sampled(n, True)
    m = torch.ones(n)
    risk = torch.where(is_sampled, anywhere, 2.0 + near)
    other = values(5000, ("normal",), FLOAT, generator)
    problem = Problem.of(
        [10 * (1 + risk), other], [m, other], hyper=hyper_table(ROSE, PLAIN), group=torch.arange(2),
        lr=torch.tensor([1e-2, 1e-2]),
    )  # fmt: skip
    compare_bracket(ops, problem, 600_000_000, width=1e9)
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
    check_norms(ops, generator)
    check_nans(ops, generator)
    check_close_risks(ops, generator)
    check_misleading_samples(ops, generator)
    check_approx(ops, generator)
    check_graph(module, ops, generator)
    for k, order in enumerate(("random", "forward", "reverse")):
        # One block walks several runs; each of three has a share.
        module.configure(order, seed=torch.seed() % 2**32, resident=1 if order == "forward" else 3)
        options = {"inv_scale": (None, None, 0.3)[k], "rank_inactive": order == "forward"}
        for i, mix in enumerate(MIXES):
            for n, pieces in ((8_192 if order == "forward" else 9_001, 1), (30_011, 17)):
                check(ops, problem_of(n, mix, pieces, *DTYPES[(i + 2 * k) % 5], generator, **options))
        if order == "random":  # the one that finds most
            brackets = (
                (("normal",), 300_007, 1, FLOAT, FLOAT, None),
                (("normal",), 100_003, 5, BF16, BF16, None),
                (MIXES[2], 100_003, 17, FLOAT, FLOAT, 0.3),
                (("ties",), 100_003, 5, FLOAT, FLOAT, None),
            )  # fmt: skip
            for mix, n, pieces, dtype, moment, inv_scale in brackets:
                problem = problem_of(n, mix, pieces, dtype, moment, generator, inv_scale)
                check_brackets(ops, problem)
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
