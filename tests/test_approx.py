"""selection="approx": thresholds of a sample of lines, as the reference draws it, and exact counts."""

from __future__ import annotations

import math

import pytest
import torch
from support import (
    BF16,
    FLOAT,
    HALF,
    ONE,
    PLAIN,
    ROSE,
    Problem,
    assert_all_same_bits,
    assert_same_bits,
    compare_bracket,
    hyper_table,
    is_simulated,
    place,
    values,
)

from rose_ops import backends, reference
from rose_ops.definitions import APPROX_FEWEST, LINE, Field

N = APPROX_FEWEST + 1303  # no multiple of anything
KEPT = 600_000_000, 0
BETWEEN = 700_000_000, 100_001


def problem_of(generator, g, m, pieces: int = 1, dtypes=(FLOAT,) * 4, **options) -> Problem:
    """Of risks by g and m. Of several tensors, two have 0 and 1 elements and the last one most of them;
    some are not contiguous."""
    n = g.numel()
    cuts = torch.randint(0, n // 3 + 1, (max(pieces - 4, 0),), generator=generator).tolist()
    ends = sorted([*cuts, 0, 1, n // 3]) if pieces > 1 else []
    last = len(ends)

    def tensors(k: int, data: torch.Tensor) -> list[torch.Tensor]:
        parts = enumerate(data.to(dtypes[k]).tensor_split(ends))
        layouts = ("contiguous", "offset", "strided")
        return [place(t, layouts[(i + k) % 3] if i < last else "contiguous", i % 2) for i, t in parts]

    p = torch.linspace(-1, 1, n)
    return Problem.of(
        tensors(1, g), tensors(2, m), params=tensors(0, p), exp_avg_sqs=tensors(3, p + 1), **options
    )


def is_sampled(n: int, draw: int) -> torch.Tensor:
    """Of one tensor."""
    found = torch.zeros(n, dtype=torch.bool)
    found[reference.sampled([n], draw)] = True
    return found


def compare_selection(ops, problem: Problem, kept=KEPT, *, first=False, draw=0) -> torch.Tensor:
    """By a selection alone, and by a capture."""
    expected = problem.select(reference, *kept, first=first, approx=True, draw=draw)
    record = problem.select(ops, *kept, first=first, approx=True, draw=draw)
    assert_same_bits(record, expected, "record")
    masks, record = problem.bracket_capture(ops, *kept, first=first, approx=True, draw=draw)
    assert_same_bits(record, expected, "record of a capture")
    assert_all_same_bits(masks, problem.capture(reference, expected, first=first), "masks")
    return expected


MIXED = ("normal", "zero", "nan", "inf", "huge", "ties", "denormal")
DATA = {
    "normal": lambda i, r: values(len(i), ("normal",), FLOAT, r),
    "mixed": lambda i, r: values(len(i), MIXED, FLOAT, r),
    "few-values": lambda i, r: values(len(i), ("ties",), FLOAT, r),
    "equal": lambda i, _: torch.ones(len(i)),
    "lines-of-one-value": lambda i, _: i // LINE * 7919 % 65536 + 1.0,
    "period-of-a-stratum": lambda i, _: i // LINE % 8 * 2.0 ** -(i % 8),
    "inactive": lambda i, _: torch.zeros(len(i)),
    # The sample knows nothing of the others, or of any that is ranked.
    "sample-alone-is-ranked": lambda i, _: torch.where(is_sampled(len(i), 3), i + 1.0, 0.0),
    "sample-is-not-ranked": lambda i, _: torch.where(is_sampled(len(i), 3), torch.nan, i + 1.0),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("data", DATA)
def test_selection(ops, generator, data):
    g = DATA[data](torch.arange(N), generator).float()
    flat = torch.rand((), generator=generator) < 0.5
    if flat or not is_simulated(ops):  # which has time for one of them
        problem = problem_of(generator, g, torch.ones(N))
        compare_selection(ops, problem, first=True, draw=3)
    if not flat or not is_simulated(ops):
        problem = problem_of(generator, torch.ones(N), g, pieces=40, rank_inactive=data == "mixed")
        compare_selection(ops, problem, BETWEEN, draw=2**32 - 1)


def test_the_most_lines_of_a_few_million_elements(real_ops, generator):
    """There are 2^14 up to 32Mi elements, and here not an eighth of all lines any more."""
    n = 5 * APPROX_FEWEST // 2
    assert len(reference.sampled([n], 7)) // LINE < n // LINE // 8
    problem = problem_of(generator, *torch.randn(2, n, generator=generator))
    compare_selection(real_ops, problem, draw=7)


def test_kept_fractions(ops, generator):
    """Also of less than one element of the sample: nothing is kept, or there is no lower threshold."""
    problem = problem_of(generator, *torch.randn(2, N, generator=generator))
    for upper, lower in ((100, 1), (ONE, 1), (ONE, ONE - 1), (500_000, 499_999)):
        record = compare_selection(ops, problem, (upper, lower), draw=upper)
        assert (record[Field.HIGH] == -1) == (upper <= 100)
        assert (record[Field.LOW] == -1) == (lower <= 1)


UPDATES = {
    "flat": (1, (FLOAT,) * 4, KEPT),
    "flat-bf16": (1, (BF16,) * 4, BETWEEN),
    "scattered": (40, (FLOAT, HALF, FLOAT, BF16), BETWEEN),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", UPDATES)
def test_update(ops, generator, name):
    pieces, dtypes, kept = UPDATES[name]
    g, m = (values(N, MIXED, FLOAT, generator) for _ in range(2))
    problem = problem_of(generator, g, m, pieces, dtypes, stochastic=True, seed=9)
    result = compare_bracket(ops, problem, *kept, draw=pieces, approx=True)
    assert result[Field.HIGH] > 0
    assert result[Field.MISSES] == 0


@pytest.mark.thin(2)
def test_update_of_an_ensemble(ops, generator):
    """With all that it can have: groups, of which one is not ranked, scales, a first-order mask."""
    g, m = (values(N + N // 2, MIXED, FLOAT, generator) for _ in range(2))
    problem = problem_of(
        generator, g, m, 33, inv_scale=torch.tensor(0.25), clip=torch.tensor([0.7, 0.9]), gamma=0.3
    )
    problem.hyper = hyper_table(ROSE, PLAIN, (0.8, 0.99, 1e-6, 0.1, -1.0, 1.0))
    problem.group = torch.arange(len(problem.grads)) % 3
    problem.lr = torch.tensor([1e-2, 1e-3, 1e-1], dtype=torch.float64)
    of_rank = [n for n, row in zip(problem.numels, problem.group.tolist(), strict=True) if row != 1]
    assert sum(of_rank) >= APPROX_FEWEST
    compare_bracket(ops, problem, *BETWEEN, problem.random_masks(), draw=5, approx=True)


@pytest.mark.thin(2)
@pytest.mark.parametrize("n", [0, 1, 1000, APPROX_FEWEST - 1, APPROX_FEWEST])
def test_few_elements_need_no_sample(ops, generator, n):
    """One that misleads shows where it is taken."""
    sampled = is_sampled(n, 0) if n else torch.zeros(0, dtype=torch.bool)
    m = torch.rand(n, generator=generator) + 0.5
    risk = torch.rand(n, generator=generator) + 2 * sampled
    problem = problem_of(generator, 10 * m * (1 + risk), m)
    exact = problem.select(reference, *KEPT)
    for record in (
        compare_selection(ops, problem), compare_bracket(ops, problem, *KEPT, approx=True)
    ):  # fmt: skip
        assert (record[Field.HIGH] == exact[Field.HIGH]) == (n < APPROX_FEWEST)
        assert record[Field.MISSES] == 0


@pytest.mark.thin(2)
def test_tensors_that_are_not_ranked_do_not_count(ops, generator):
    """Of an update's; where enough are, the sample is of the others."""
    for large, row in ((APPROX_FEWEST - 1, PLAIN), (APPROX_FEWEST, PLAIN), (APPROX_FEWEST - 9, ROSE)):
        sizes = [70_000, large, 9]
        g, m = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))
        problem = Problem.of(
            g, m, hyper=hyper_table(row, ROSE), group=torch.tensor([0, 1, 0]),
            lr=torch.tensor([1e-2, 1e-3], dtype=torch.float64),
        )  # fmt: skip
        compare_bracket(ops, problem, *KEPT, draw=1, approx=True)


def test_many_small_tensors(ops, generator):
    """Each ends with a line of its own, mostly a short one."""
    sizes = torch.randint(0, 5000, (500,), generator=generator).tolist()
    sizes.append(max(0, APPROX_FEWEST - sum(sizes)) + 1)
    g, m = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))
    compare_selection(ops, Problem.of(g, m), BETWEEN, draw=8)


def test_tensors_of_other_dtypes_or_alphas_next_to_each_other(ops, generator):
    """Lines are read as what they are."""
    sizes = [5000] * (APPROX_FEWEST // 5000 + 1)
    dtypes = (FLOAT, BF16, HALF)
    g, m = (
        [torch.randn(n, generator=generator).to(dtypes[i // k % 3]) for i, n in enumerate(sizes)]
        for k in (2, 6)
    )
    problem = Problem.of(g, m, hyper=hyper_table(ROSE, (0.8, *ROSE[1:])))
    problem.group = (torch.arange(len(sizes)) + 1) // 2 % 2
    for first in (True, False):
        compare_selection(ops, problem, BETWEEN, first=first)


def test_draws_and_runs(ops, generator):
    """Draws are other samples; the same one gives the same bits every time, whatever came between."""
    problem = problem_of(generator, torch.randn(N, generator=generator), torch.ones(N))
    found = {}
    for draw in (0, 1, 2**31, 0, 1):
        record = problem.select(ops, *BETWEEN, approx=True, draw=draw).tolist()
        assert found.setdefault(draw, record) == record
        problem.select(ops, *KEPT, first=True)
    assert len({record[Field.HIGH] for record in found.values()}) == 3


def test_nothing_changes_if_an_infinity_was_found(ops, generator):
    problem = problem_of(generator, torch.ones(N), torch.ones(N), found_inf=torch.ones(()))
    before = problem.copy()
    result = problem.bracket_update(ops, *KEPT, approx=True)
    assert result.tolist() == [-1, -1] + [0] * Field.SIZE
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert_all_same_bits(getattr(problem, name), getattr(before, name), name)


def test_a_norm_that_is_not_finite(ops, generator):
    """NaN for a factor: nothing is ranked, all is counted."""
    problem = problem_of(generator, torch.ones(N), torch.ones(N), clip=torch.tensor([torch.nan, 1.0]))
    result = compare_bracket(ops, problem, *KEPT, approx=True)
    assert result.tolist() == [-1, -1, 0, 0, 0, N, 0, 0, 0, N]


# ------------------------------------------------------------------------------------------- the errors

DRAWS = 24


def rank_errors(g: torch.Tensor, c: float) -> torch.Tensor:
    """Of the fraction kept, by all draws."""
    problem, ops = Problem.of([g]), backends.BACKENDS["cpu"].ops
    records = [
        problem.select(ops, round(c * ONE), first=True, approx=True, draw=draw) for draw in range(DRAWS)
    ]
    return torch.stack([record[Field.KEPT] / record[Field.RANKED] - c for record in records])


def lines_of(n: int) -> int:
    return len(reference.sampled([n], 0)) // LINE


@pytest.mark.parametrize("c", [0.6, 0.05])
def test_error_where_risks_are_independent(generator, c):
    """sqrt(c*(1-c)/(16*L)), and on average none. One run in 10^5 is outside of these."""
    n = APPROX_FEWEST
    errors = rank_errors(torch.rand(n, generator=generator) + 0.1, c)
    expected = math.sqrt(c * (1 - c) / (LINE * lines_of(n)))
    ratio = float(errors.square().mean().sqrt()) / expected
    assert 0.4 < ratio < 1.8
    assert abs(float(errors.mean())) < 5 * expected / math.sqrt(DRAWS)


@pytest.mark.parametrize("row", [LINE, 3 * LINE, 768, 1000])
@pytest.mark.parametrize("sort", [False, True], ids=["", "sorted"])
def test_error_where_the_risks_of_a_row_are_alike(generator, row, sort):
    """Within five times sqrt(c*(1-c)/L), and where a line is a row, not much less."""
    n, c = APPROX_FEWEST, 0.6
    risks = torch.rand(-(-n // row), generator=generator) + 0.1
    risks = risks.sort().values if sort else risks
    errors = rank_errors(risks.repeat_interleave(row)[:n], c)
    at_most = math.sqrt(c * (1 - c) / lines_of(n))
    assert float(errors.abs().max()) < 5 * at_most
    if row == LINE and not sort:
        assert float(errors.square().mean().sqrt()) > 0.4 * at_most
