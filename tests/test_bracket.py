"""Selection and update in one pass: the same bits as one after the other, whatever the luck.

Sizes are such that the one-pass way is taken ("large") or not; forced misses and brackets that hold
everything show the ways out.
"""

from __future__ import annotations

import math

import pytest
import torch
from forked import program
from support import (
    BF16,
    FLOAT,
    HALF,
    ONE,
    PLAIN,
    ROSE,
    WIDTH,
    Problem,
    assert_all_same_bits,
    assert_consistent,
    assert_same_bits,
    compare_bracket,
    cut,
    hyper_table,
    some,
    values,
)

from rose_ops import definitions, reference
from rose_ops.definitions import Field

LARGE = (1 << 17) + 1303  # no multiple of anything; twice what brackets need
DATA = {
    "normal": (("normal",), ("normal",)),
    "wide": (("wide",), ("wide",)),
    "denormals": (("normal", "denormal", "smallest"), ("normal", "denormal", "underflow")),
    "mixed": (("normal", "zero", "nan", "inf", "huge", "ties"), ("normal", "zero", "nan", "inf")),
    "zero-gradients": (("normal", "zero", "zero"), ("normal",)),
    "equal": (("one",), ("one",)),
    "few-values": (("ties",), ("ties",)),
}  # risks of gradients and moments: values() of these kinds


def problem_of(generator, n=LARGE, data="normal", pieces=1, dtypes=(FLOAT,) * 4, **options) -> Problem:
    """p, g, m, v in ``pieces`` tensors of uneven lengths."""
    cuts = torch.randint(0, max(n, 1), (pieces - 1,), generator=generator).sort().values
    mixes = (("normal",), *DATA[data], ("normal",))
    p, g, m, v = (cut(values(n, mixes[k], dtypes[k], generator), cuts, k) for k in range(4))
    return Problem.of(g, m, params=p, exp_avg_sqs=[x.abs_() for x in v], **options)


KEPT = {"0.6": (600_000_000, 0), "few": (1_000_000, 0), "most": (999_999_999, 0),
        "between": (700_000_000, 300_000_000), "top": (ONE, 900_000_000)}  # fmt: skip


@pytest.mark.thin(3)
@pytest.mark.parametrize("data", DATA)
def test_as_select_and_update(ops, generator, data):
    problem = problem_of(generator, data=data)
    for kept in some(ops, [*KEPT.values()], generator, 3):
        assert compare_bracket(ops, problem.copy(), *kept)[Field.MISSES] == 0


@pytest.mark.parametrize("kept", ["0.6", "between"])
@pytest.mark.parametrize("data", ["normal", "mixed", "zero-gradients", "few-values"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_as_select_and_capture(ops, generator, first, data, kept):
    problem = problem_of(generator, data=data)
    masks, record = problem.bracket_capture(ops, *KEPT[kept], first=first)
    expected, expected_record = problem.bracket_capture(reference, *KEPT[kept], first=first)
    assert_same_bits(record, expected_record, "record")
    assert_all_same_bits(masks, expected, "masks")


DTYPES = {
    "float32": (FLOAT,) * 4, "bf16": (BF16,) * 4, "bf16-params": (BF16, BF16, FLOAT, FLOAT),
    "half-grads": (FLOAT, HALF, FLOAT, BF16),
}  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
def test_scattered_tensors_of_any_dtype(ops, generator, dtypes):
    """With all that an update can have: groups, scales, a first-order mask, stochastic rounding."""
    problem = problem_of(
        generator, pieces=37, dtypes=DTYPES[dtypes], data="mixed",
        inv_scale=torch.tensor(0.25), clip=torch.tensor([0.7, 0.9]), gamma=0.3, seed=5, stochastic=True,
    )  # fmt: skip
    problem.hyper = hyper_table(ROSE, PLAIN, (0.8, 0.99, 1e-6, 0.1, -1.0, 1.0))
    problem.group = torch.arange(37) % 3
    problem.lr = torch.tensor([1e-2, 1e-3, 1e-1], dtype=torch.float64)
    first, _ = problem.bracket_capture(reference, 500_000_000, first=True)
    assert compare_bracket(ops, problem, 600_000_000, first=first)[Field.MISSES] == 0


def test_correlated_rows_and_drifting_scales(ops, generator):
    """As gradients are: rows alike, tensors of different scales, whole rows without gradient."""
    rows = 1024
    scale = torch.rand(rows, 1, generator=generator) * 8 - 6
    drift = torch.linspace(0, 3, rows)[:, None]
    g, m = (torch.randn(rows, 260, generator=generator) * 10 ** (scale + drift * k) for k in (1, 2))
    g[torch.rand(rows, generator=generator) < 0.2] = 0
    problem = Problem.of([g], [m], exp_avg_sqs=[g.square()])
    for draw in range(3):
        result = compare_bracket(ops, problem.copy(), 600_000_000, draw=draw)
        assert result[Field.MISSES] == 0


@pytest.mark.parametrize("n", [0, 1, 1000, 40_003])
def test_small(ops, generator, n):
    compare_bracket(ops, problem_of(generator, n, "mixed"), 600_000_000)


def test_a_forced_miss_is_a_step_with_the_nearest_threshold(ops, generator):
    """Brackets without width miss sooner or later; the record says so and all else follows from it."""
    missed = 0
    for draw in range(6):
        problem = problem_of(generator, pieces=3)
        exact = problem.select(reference, 600_000_000)
        record = compare_bracket(ops, problem, 600_000_000, draw=draw, width=0.0)[: Field.SIZE]
        missed += record[Field.MISSES].item()
        # Near: within what the sample can tell.
        assert abs(record[Field.KEPT] - exact[Field.KEPT]) < 0.05 * LARGE
        problem = problem_of(generator)
        masks, record = problem.bracket_capture(ops, 600_000_000, first=True, draw=draw, width=0.0)
        missed += record[Field.MISSES].item()
        assert_consistent(problem, record, first=True)
        assert_all_same_bits(masks, problem.capture(reference, record, first=True), "masks")
    assert missed > 0


@pytest.mark.parametrize("data", ["normal", "few-values"])
def test_a_bracket_that_holds_everything(ops, generator, data):
    """More than any log takes: exact all the same."""
    result = compare_bracket(ops, problem_of(generator, data=data), 600_000_000, width=1e9)
    assert result[Field.MISSES] == 0


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_clip_factor(ops, generator, value):
    """NaN, for a norm that is not finite: nothing is selected, all is counted."""
    problem = problem_of(generator, clip=torch.tensor([value, 0.5]))
    result = compare_bracket(ops, problem, 600_000_000)
    assert (result[Field.NONFINITE] == LARGE) == (result[Field.SIZE + 1] == LARGE) == (value != 1)


def test_found_inf_changes_nothing(ops, generator):
    problem = problem_of(generator, found_inf=torch.tensor(1.0))
    before, masks = problem.copy(), problem.random_masks()
    record = problem.select(reference, 600_000_000)
    for result in (
        problem.bracket_update(ops, 600_000_000),
        problem.bracket_update(ops, 600_000_000, approx=True),
        problem.exact_update(ops, 600_000_000),
        problem.given_update(ops, selection=record),
        problem.given_update(ops, masks),
    ):
        assert result.tolist() == [-1, -1] + [0] * 8
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert_all_same_bits(getattr(problem, name), getattr(before, name), name)


def test_same_bits_on_every_run(real_ops, generator):
    """Also after a miss, and from any number of threads."""
    problem, threads = problem_of(generator, pieces=5), torch.get_num_threads()
    for width in (0.0, WIDTH):
        results = []
        for count in (threads, 1, threads, 3):
            torch.set_num_threads(count)
            try:
                copy = problem.copy()
                result = copy.bracket_update(real_ops, 600_000_000, draw=2, width=width)
                results.append([result, *copy.written])
            finally:
                torch.set_num_threads(threads)
        for other in results[1:]:
            assert_all_same_bits(other, results[0], f"width {width}")


@pytest.mark.parametrize(("upper", "lower"), [(0, 0), (ONE + 1, 0), (5, 5), (5, -1)])
def test_refuses_fractions(ops, generator, upper, lower):
    problem = problem_of(generator, 100)
    before = problem.copy()
    with pytest.raises((RuntimeError, ValueError), match="expected 0 <= lower < upper"):
        problem.bracket_update(ops, upper, lower)
    with pytest.raises((RuntimeError, ValueError), match="expected 0 <= lower < upper"):
        problem.bracket_capture(ops, upper, lower)
    assert_all_same_bits(problem.params, before.params, "params")


def test_an_update_with_what_a_capture_left(tmp_path):
    """Memory is kept from one to the other. In a process of its own, where none was left before."""
    source = """
import torch
from rose_ops import RoseFusedAdamW
n = 1 << 23
p = torch.nn.Parameter(torch.randn(n))
p.grad = torch.randn(n)
optimizer = RoseFusedAdamW([p], order="ensemble")
moments = {"exp_avg": torch.randn(n), "exp_avg_sq": torch.rand(n)}
optimizer.state[p] = {"step": torch.tensor(9.0), **moments}
optimizer.capture("first", clear=False)
optimizer.step()
"""
    program(source, tmp_path)


def test_a_step_misses_with_less_than_the_promised_probability():
    """Two rankings of an ensemble, two thresholds each, 16 brackets each, three bounds each."""
    assert 2 * 2 * 16 * 3 * math.exp(-definitions.LOG_OF_FAILURE) < 1e-9
    assert str(round(definitions.LOG_OF_FAILURE)) in reference.step_.__doc__
