"""The CPU's one pass next to large classes of ties: exact, and collapsed where that is sure."""

from __future__ import annotations

import pytest
import torch
from one_pass import (
    CPU,
    SMALL,
    Report,
    capture,
    in_groups,
    keys_of,
    normal,
    risky,
    sorted_ranks,
    split,
    update,
)  # fmt: skip
from support import ONE, PLAIN, ROSE, WIDTH, Problem, assert_all_same_bits
from torch import Tensor

from rose_ops import reference
from rose_ops.definitions import Field

LARGE = (1 << 20) + 1303  # so large that a log cannot hold a class of most elements
LITTLE = (1 << 19) + 1303
UPPER, LOWER = 600_000_000, 300_000_000


def tied(generator, n: int, *classes: tuple[float, float], order: str, **options) -> Problem:
    """Risks that are all different but for classes of ranks [a, b), given as shares of n or ranks, each
    of which has one."""
    # As many different float32 as that have even gaps between 1/4 and 1.
    risk = torch.arange(n, dtype=torch.float64) / n * 0.74 + 0.25
    for begin, end in classes:
        a, b = (int(x * n) if x < 1 else int(x) for x in (begin, end))
        risk[a:b] = risk[a].item()
    risk = risk.float()[torch.randperm(n, generator=generator)]
    p, _, m, v = normal(generator, n)
    m = m.sign()
    return split((p, risk * m if order == "first" else risky(risk, m), m, v), 5, **options)


def check(problem: Problem, order: str, *kept: int, **options) -> list[Report]:
    if order == "second":
        return [capture(problem, *kept, first=False, **options), update(problem, *kept, **options)]
    return [capture(problem, *kept, first=True, **options)]


SIZE = LITTLE // 50
PLACES = {  # ranks of a class; the k-th element is at k - 1
    "just below": lambda k: (k - 1 - SIZE, k - 1), "its last is the k-th": lambda k: (k - SIZE, k),
    "its first is the k-th": lambda k: (k - 1, k - 1 + SIZE), "just above": lambda k: (k, k + SIZE),
    "around": lambda k: (k - SIZE // 2, k + SIZE // 2), "two": lambda k: (k - SIZE, k),
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("at", ["upper", "lower"])
def test_a_class_next_to_a_threshold(generator, at, order, place):
    """Inside of the bracket: which of its elements are kept is not known before all were counted."""
    k = reference.rank_of(UPPER if at == "upper" else LOWER, LITTLE)
    classes = [PLACES[place](k)] + ([(k, k + SIZE)] if place == "two" else [])
    problem = tied(generator, LITTLE, *classes, order=order)
    for report in check(
        problem, order, *((UPPER, 0) if at == "upper" else (UPPER, LOWER)), width=SMALL
    ):
        assert report.logged > 0 or report.collapsed


@pytest.mark.thin(2)
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("classes", "lower", "collapsed"),
    [
        pytest.param([(0.2, 0.95)], 0, 1, id="one"),
        pytest.param([(0.05, 0.63)], 0, 1, id="with-others-in-its-window"),
        pytest.param([(0.1, 0.98)], LOWER, 2, id="both-on-one-class"),
        pytest.param([(0.1, 0.45), (0.45, 0.9)], LOWER, 2, id="each-on-its-own"),
        pytest.param([(0.45, 0.9)], LOWER, 1, id="the-upper"),
        pytest.param([(0.05, 0.5)], LOWER, 1, id="the-lower"),
    ],
)
def test_collapse(generator, order, classes, lower, collapsed):
    """Elements that have the value are counted, not logged, and nothing of it is done again."""
    problem = tied(generator, LARGE, *classes, order=order)
    for report in check(problem, order, UPPER, lower, width=SMALL):
        assert report.collapsed == collapsed
        assert (report.logged > 0) == (collapsed < (2 if lower else 1))
        assert report.logged < 0.1 * LARGE


@pytest.mark.parametrize("order", ["first", "second"])
def test_collapse_in_groups_and_scales(generator, order):
    """The class of zeros in the gradient, of risk 1, is one for all alphas, scales and clip factors."""
    n = LARGE
    p, g, m, v = normal(generator, n)
    g[torch.rand(n, generator=generator) < 0.85] = 0
    problem = split((p, g, m, v), 8, inv_scale=torch.tensor(1 / 3), clip=torch.tensor([0.7, 0.9]))
    rows = (ROSE, (0.5, 0.99, 1e-8, 0.1, 1.0, 1.0), PLAIN)
    in_groups(problem, rows, [0, 1, 0, 1, 0, 1, 0, 2])
    if order == "first":
        problem.rank_inactive = True
        assert capture(problem, first=True, width=SMALL).collapsed == 1
    else:
        assert update(problem, width=SMALL).collapsed == 1


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_no_collapse_where_the_class_might_end_before_the_threshold(generator, order, end):
    """The class reaches beyond the threshold, but by less than the sample can tell."""
    upper = 200_000_000 if end == "first" else UPPER  # for the class to be large enough
    k, beyond = reference.rank_of(upper, LARGE), LARGE // 500
    a, b = (k - beyond, LARGE - 100) if end == "first" else (100, k + beyond)
    problem = tied(generator, LARGE, (a, b), order=order)
    keys = keys_of(problem, first=order == "first")
    for draw in range(2):
        masks, record = problem.bracket_capture(CPU, upper, first=order == "first", draw=draw)
        assert Report.latest().collapsed == 0
        assert record[Field.MISSES] == 0
        assert record[Field.HIGH] == sorted_ranks(keys)[k - 1]
        expected = [reference.pack(reference.is_selected(key, record)) for key in keys]
        assert_all_same_bits(masks, expected, "masks")


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_class_that_is_missed(generator, order, end):
    """Without a margin it is collapsed onto a class that ends before the threshold: a miss."""
    upper = 200_000_000 if end == "first" else UPPER
    k = reference.rank_of(upper, LARGE)
    # Beyond the class by a part of a standard deviation of what a sample says.
    beyond = 400
    a, b = (k + beyond, LARGE - 100) if end == "first" else (100, k - beyond)
    problem = tied(generator, LARGE, (a, b), order=order)
    missed = 0
    for draw in range(24):
        problem.bracket_capture(CPU, upper, first=order == "first", draw=draw, width=0.0)
        if not Report.latest().collapsed:
            continue  # the sample says that the class is not reached
        for report in check(problem, order, upper, draw=draw, width=0.0, misses=True):
            missed += report.misses
        if missed:
            break
    assert missed > 0


@pytest.mark.parametrize("order", ["first", "second"])
def test_everything_is_one_value(generator, order):
    problem = tied(generator, LARGE, (0, 0.9999999), order=order)
    for report in check(problem, order, UPPER, width=WIDTH):
        assert report.collapsed == 1
        assert report.logged == 0
    record = problem.bracket_capture(CPU, UPPER, LOWER, first=order == "first")[1]
    assert record[Field.KEPT] == 0  # the thresholds are the same


@pytest.mark.parametrize("end", [0.599, 0.7])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_log_of_several_blocks(generator, order, end):
    """A class that is logged, since it is not so large that it must be collapsed."""
    problem = tied(generator, LARGE, (end - 0.25, end), order=order)
    for report in check(problem, order, UPPER, width=SMALL):
        assert not report.collapsed
        assert report.logged > 3 << 16


def units_of(rank: int, n: int) -> int:
    """A fraction that keeps so many of n."""
    return -(-rank * ONE // n)


def close_keys(n: int, *classes: tuple[int, int]) -> Tensor:
    """Keys in order, each one more than the one before it but in classes of ranks [a, b)."""
    steps = torch.ones(n, dtype=torch.int32)
    for a, b in classes:
        steps[a + 1 : b] = 0
    return 0x3F000000 + steps.cumsum(0, dtype=torch.int32)


def check_selection(problem: Problem, ranked: Tensor, upper: int, lower: int) -> None:
    """Of the thresholds at these ranks."""
    n = len(ranked)
    record = problem.select(CPU, units_of(upper, n), units_of(lower, n), first=True)
    high, low = ranked[upper - 1], ranked[lower - 1]
    kept = int(((ranked > low) & (ranked <= high)).sum())
    assert record.tolist() == [int(high), int(low), kept, n, 0, 0, 0, 0]


def test_a_class_that_a_selection_counts(generator):
    """A class so large that not even a log of keys could hold it, and thresholds so near its ends that
    a sample does not know on which side they are: its elements are counted, not logged."""
    n, begin, end = 2_800_003, 280_000, 2_520_000
    ranked = close_keys(n, (begin, end))
    problem = Problem.of([ranked.view(torch.float32)[torch.randperm(n, generator=generator)]])
    for d in (-300, 0, 1, 9, 300):
        check_selection(problem, ranked, end + d, begin - d)
        check_selection(problem, ranked, end + d, begin + 1)


def test_two_classes_that_a_selection_counts(generator):
    """The upper threshold's class is logged, too: the lower one's bracket has it and a larger one."""
    n, first, second, last = 6_000_000, 1_000_000, 3_300_000, 5_330_000
    ranked = close_keys(n, (first, second), (second, last))
    problem = Problem.of([ranked.view(torch.float32)[torch.randperm(n, generator=generator)]])
    for beyond in (100, 5000):  # in the class's bin, and in another one
        check_selection(problem, ranked, last + beyond, second - 10)
        check_selection(problem, ranked, last + beyond, second + 10)
