"""The step as a float32: what it counts to, and that no two steps round alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, FLT_MAX, Problem, assert_all_same_bits, bits, examples, place, values

from rose_ops import reference

# Around and beyond 2^24, from where on adding 1 may change nothing; 2^32, where a uint32 ends.
LATE = [2.0**24 - 2, 2.0**24 - 1, *(2.0**24 + k for k in (0, 2, 4)), 2.0**25, 2.0**31 - 128, 2.0**31,
        2.0**32 - 256, 2.0**32, 2.0**32 + 512, 2.0**33, 2.0**40, 2.0**100]  # fmt: skip


def problem_at(steps: list[float]) -> Problem:
    """Everything that is rounded stochastically, the same for every call."""
    generator = torch.Generator().manual_seed(5)
    p, g, m, v = (
        [
            place(values(300, ("normal",), BF16, generator), layout)
            for layout in ("contiguous", "strided")
        ]
        for _ in range(4)
    )
    return Problem.of(
        g, m, params=p, exp_avg_sqs=[x.abs_() for x in v], seed=3, stochastic=True,
        steps=[torch.tensor(step) for step in steps],
    )  # fmt: skip


def update(ops, problem: Problem) -> Problem:
    problem.update(ops, [torch.empty(0, dtype=torch.uint8)] * len(problem.grads))
    return problem


@pytest.mark.parametrize("start", LATE)
def test_no_two_steps_round_alike(every_ops, start):
    """With all inputs the same, bits still differ, and are those of the reference."""
    steps, seen = [torch.tensor(start)] * 2, []
    for _ in range(3):
        problem = problem_at([step.item() for step in steps])
        expected = update(reference, problem.copy())
        update(every_ops, problem)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
            assert_all_same_bits(getattr(problem, name), getattr(expected, name), name)
        for before, after in zip(steps, problem.steps, strict=True):
            assert math.isfinite(after)
            assert after > before
        rounded = (problem.params, problem.exp_avg_sqs)
        seen.extend(torch.cat([bits(t) for t in tensors]) for tensors in rounded)
        steps = problem.steps
    for one in range(6):
        for other in range(one % 2, one, 2):  # each with the same of earlier steps
            assert (seen[one] != seen[other]).sum() > 100


@pytest.mark.parametrize("step", [math.inf, math.nan])
def test_a_step_that_is_not_finite_stays(every_ops, step):
    problem = problem_at([step] * 2)
    expected = update(reference, problem.copy())
    update(every_ops, problem)
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        assert_all_same_bits(getattr(problem, name), getattr(expected, name), name)
    assert str(problem.steps[0].item()) == str(step)


def test_a_step_in_one_pass_counts_likewise(every_ops):
    problem = problem_at([2.0**24, 2.0**25])
    expected = problem.copy()
    record = problem.bracket_update(every_ops, 600_000_000)
    assert torch.equal(record, expected.bracket_update(reference, 600_000_000))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert_all_same_bits(getattr(problem, name), getattr(expected, name), name)
    assert [step.item() for step in problem.steps] == [2.0**24 + 2, 2.0**25 + 4]


@examples(200)
@given(st.integers(0, 2**24 - 1))
def test_below_two_to_the_24_a_step_is_its_number(step):
    assert reference.next_step(torch.tensor(float(step))) == step + 1
    assert reference.step_word(float(step)) == step


@examples(300)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_next_step_is_another_one(step):
    after = reference.next_step(torch.tensor(step)).item()
    one_more = np.float32(step) + np.float32(1)
    if one_more != np.float32(step):
        assert after == one_more
    else:
        assert after == np.nextafter(np.float32(step), np.float32(np.inf))
    assert after > step


@examples(300)
@given(st.floats(2.0**24, width=32) | st.integers(0, 2**24).map(float), st.floats(width=32))
def test_steps_have_different_words(step, other):
    words = [reference.step_word(x) for x in (step, other)]
    assert all(0 <= word < 2**32 for word in words)
    if 0 <= other < 2**24:
        other = float(int(other))
    assert (words[0] == words[1]) == (step == other or (math.isnan(step) and math.isnan(other)))


def test_the_largest_step_is_the_last():
    assert reference.next_step(torch.tensor(FLT_MAX)) == math.inf
