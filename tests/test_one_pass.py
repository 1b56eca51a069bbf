"""The CPU's one pass: that it was taken, and what it does where every part of it decides.

Brackets are so wide, for these sizes, that elements are logged, and so narrow that one pass is worth
it. Each test asserts that elements were logged and done again.
"""

from __future__ import annotations

import pytest
import torch
from one_pass import (
    CPU,
    LINE,
    SMALL,
    Layouts,
    Report,
    capture,
    in_groups,
    keys_of,
    normal,
    one_pass,
    risky,
    sorted_ranks,
    split,
    update,
    with_plain_front,
)
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
    compare_bracket,
    random_masks,
    values,
)

from rose_ops import reference

LARGE = (1 << 19) + 1303  # no multiple of anything
LITTLE = (1 << 18) + 1303
SCALES = {"inv_scale": torch.tensor(1 / 3), "clip": torch.tensor([0.7, 0.9])}
KEPT = {
    "0.6": (600_000_000, 0), "few": (50_000_000, 0), "most": (950_000_000, 0),
    "between": (700_000_000, 300_000_000), "top": (ONE, 900_000_000),
    "close": (500_000_000, 490_000_000),
}  # fmt: skip


def drifting(generator, n: int, pieces: int, **options) -> Problem:
    """Risks whose scale grows from tensor to tensor: what is left is never like what has passed."""
    p, _, m, v = normal(generator, n)
    drift = torch.linspace(-2, 2, pieces).repeat_interleave(-(-n // pieces))[:n]
    g = risky(torch.randn(n, generator=generator).abs() * 10**drift, m)
    return split((p, g, m, v), pieces, **options)


# ------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("kept", ["0.6", "between"])
def test_as_in_use(generator, kept):
    """With the width of use: all that is next to a threshold is logged, some of it done again."""
    for report in (
        update(split(normal(generator, LARGE)), *KEPT[kept]),
        capture(split(normal(generator, LARGE)), *KEPT[kept], first=True),
        capture(split(normal(generator, LARGE)), *KEPT[kept], first=False),
    ):
        # Of what is logged, little is done again: it was treated by a good guess of the threshold.
        assert 0 < report.redone < 0.2 * report.logged
        assert report.logged < 0.2 * LARGE


def test_brackets_shrink_as_elements_are_counted(generator):
    """By the square root of what is left, and less is logged then than the first one held."""
    p, g, m, v = (x.repeat_interleave(LINE)[:LARGE] for x in normal(generator, -(-LARGE // LINE)))
    problem = split((p, g, m, v))
    ranked = sorted_ranks(keys_of(problem))
    report = update(problem, width=0.4)
    first, last = (
        int(((ranked >= low[0]) & (ranked <= high[0])).sum())
        for low, high in ((report.first_low, report.first_high), (report.low, report.high))
    )
    assert last < 0.6 * first
    assert report.logged < 0.9 * first


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("order", ["update", "first", "second"])
def test_drifting_scales(generator, kept, order):
    problem = drifting(generator, LITTLE, 24)
    of_order = {"update": update, "first": capture, "second": capture}[order]
    options = {} if order == "update" else {"first": order == "first"}
    # Next to the largest risk of all, only a narrow bracket has room: so narrow that it may miss.
    width, misses = (0.1, True) if kept == "top" else (SMALL, False)
    report = of_order(problem, *KEPT[kept], width=width, misses=misses, **options)
    assert report.redone > 0


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_step_in_the_middle(generator, order, share):
    """A part of small risks in front of a part of large ones, and the other way round: a bracket that
    took what is left for what has passed would be wrong by all of it."""
    p, _, m, v = normal(generator, LARGE)
    risk = torch.rand(LARGE, generator=generator)
    risk[: int(share * LARGE)] *= 0.75
    for data in (risk, risk.flip(0)):
        problem = split((p, risky(data, m), m, v), 7)
        assert capture(problem, first=order == "first").redone > 0
        assert update(problem).redone > 0


# -------------------------------------------------------------------------------- groups and tensors


@pytest.mark.parametrize("data", ["normal", "drifting"])
@pytest.mark.parametrize("factors", [{}, SCALES], ids=["plain", "scaled"])
def test_half_of_the_elements_in_front_are_not_ranked(generator, factors, data):
    """Places in the ranking and among all tensors differ then. Both clipping factors count."""
    if data == "drifting":
        problem = drifting(generator, LARGE, 32, **factors)
    else:
        problem = split(normal(generator, LARGE), 8, **factors)
    problem = with_plain_front(problem, ROSE)
    compare_bracket(CPU, problem.copy(), 600_000_000, width=SMALL)
    report = update(problem, width=SMALL)
    assert report.redone > 0


@pytest.mark.parametrize("layouts", [Layouts.CONTIGUOUS, Layouts.SCATTERED], ids=["whole", "scattered"])
@pytest.mark.parametrize("dtypes", [(FLOAT,) * 4, (BF16, HALF, BF16, BF16)], ids=["float32", "half"])
def test_groups_with_other_alphas_among_small_tensors(generator, layouts, dtypes):
    """Lines of several groups are next to each other in a sample; tensors are of any length."""
    sizes = torch.randint(1, 2400, (200,), generator=generator)
    n = int(sizes.sum())
    rows = (ROSE, (0.5, 0.99, 1e-8, 0.1, 1.0, 1.0), (0.99, 0.95, 1e-6, 0.0, -1.0, 1.0), PLAIN)
    data = normal(generator, n, dtypes)
    problem = split(data, sizes.tolist(), layouts, **SCALES)
    in_groups(problem, rows, [i % 4 for i in range(len(sizes))])
    problem.steps = [torch.tensor(float(i % 7) * 10 ** (i % 3)) for i in range(len(sizes))]
    for first in (False, True):
        assert capture(problem, first=first, width=SMALL).redone > 0
    if layouts == Layouts.CONTIGUOUS:  # steps, learning rates and factors are those of each tensor
        compare_bracket(CPU, problem.copy(), 600_000_000, width=SMALL)
    assert update(problem, width=SMALL).redone > 0


DTYPES = {
    "bf16-moments": (FLOAT, FLOAT, BF16, BF16), "all-bf16": (BF16,) * 4,
    "half-grads": (FLOAT, HALF, FLOAT, BF16), "half-params": (HALF, HALF, FLOAT, FLOAT),
}  # fmt: skip


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("layouts", [Layouts.CONTIGUOUS, Layouts.SCATTERED], ids=["whole", "scattered"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rounding_of_what_is_done_again(generator, dtypes, layouts, stochastic):
    """Random bits are those of the step, the tensor's place and the operand, whenever it is written."""
    problem = split(
        normal(generator, LITTLE, DTYPES[dtypes]), 9, layouts, **SCALES, stochastic=stochastic, seed=7
    )  # fmt: skip
    problem.offsets += (1 << 32) - LITTLE // 2  # the index carries on the way
    problem.steps = [torch.tensor(float(3 * i)) for i in range(9)]
    report = update(problem, width=SMALL)
    assert report.redone > 0


@pytest.mark.parametrize("lower", [0, 300_000_000], ids=["one-threshold", "two"])
@pytest.mark.parametrize("kind", ["bits", "whole", "ensemble of both"])
def test_an_ensemble_s_first_masks(generator, kind, lower):
    """An element that is done again keeps its first-order mask, and counts where it is updated."""
    problem = split(normal(generator, LITTLE), 6, Layouts.SCATTERED, gamma=0.3, **SCALES)
    masks = random_masks(problem.numels)
    if kind != "bits":
        masks[::2] = [torch.tensor([i % 4 == 0]) for i in range(0, 6, 2)]
    if kind == "ensemble of both":
        masks[1] = torch.empty(0, dtype=torch.uint8)
    in_groups(problem, (ROSE, PLAIN), [0, 0, 0, 0, 1, 0])
    report = update(problem, 600_000_000, lower, masks, width=SMALL)
    assert report.redone > 0


@pytest.mark.parametrize("rank_inactive", [False, True], ids=["update", "rank"])
@pytest.mark.parametrize("kept", ["0.6", "between"])
def test_elements_without_evidence_or_a_value(generator, kept, rank_inactive):
    """Rows of zeros, whole tensors of them, NaN and inf: in the sample, and in the pass."""
    p, g, m, v = normal(generator, LARGE)
    m[torch.rand(LARGE, generator=generator) < 0.1] = 0
    g[: LARGE // 8] = 0
    m[LARGE // 4 : LARGE // 3] = 0
    for x in (g, m):
        x[torch.rand(LARGE, generator=generator) < 0.002] = torch.nan
        x[torch.rand(LARGE, generator=generator) < 0.002] = -torch.inf
    problem = split((p, g, m, v), 12, rank_inactive=rank_inactive)
    for first in (True, False):
        assert capture(problem, *KEPT[kept], first=first, width=SMALL).logged > 0
    assert update(problem, *KEPT[kept], width=SMALL).redone > 0


def test_lines_of_one_value(generator):
    """Where the elements of a line are all alike, a sample says least: its own variance must say so."""
    few = -(-LARGE // LINE)
    p, g, m, v = (x.repeat_interleave(LINE)[:LARGE] for x in normal(generator, few))
    alike = update(split((p, g, m, v)), width=0.4)
    independent = update(split(normal(generator, LARGE)), width=0.4)
    assert alike.redone > 0
    # sqrt(2*U*l) is four times as large, and (8/3)*16*l as it was.
    assert 1.5 < alike.first_width / independent.first_width < 4


# ------------------------------------------------------------------------------ threads and chance


@pytest.mark.parametrize("width", [0.0, SMALL, WIDTH])
@pytest.mark.parametrize("lower", [0, 300_000_000], ids=["one-threshold", "two"])
def test_the_same_from_any_number_of_threads(generator, width, lower):
    problem = drifting(generator, LARGE, 5, **SCALES)

    def bracket_capture(draw):
        return problem.bracket_capture(CPU, 600_000_000, lower, draw=draw, width=width)

    _, draw = one_pass(problem, 3, bracket_capture)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            copy = problem.copy()
            result = copy.bracket_update(CPU, 600_000_000, lower, draw=draw, width=width)
            report = Report.latest()
            assert report.one_pass
            masks, record = bracket_capture(draw)
        finally:
            torch.set_num_threads(threads)
        assert Report.latest().one_pass
        brackets = [report.first_low, report.first_high, report.low, report.high]
        results.append([result, record, torch.tensor(brackets), *copy.written, *masks])
    for other in results[1:]:
        assert_all_same_bits(other, results[0], "other numbers of threads")


@pytest.mark.thin(2)
@pytest.mark.parametrize("kept", ["0.6", "between", "close"])
@pytest.mark.parametrize("data", ["normal", "drifting", "coarse"])
def test_misses_of_either_threshold(generator, data, kept):
    """Brackets without width: each miss is reported, and the nearest end taken, for both thresholds.
    Where risks are coarse, thresholds are ends of brackets, too."""
    missed = 0
    dtypes = (FLOAT, BF16 if data == "coarse" else FLOAT, FLOAT, FLOAT)
    for draw in range(4):
        n = LITTLE
        if data == "drifting":
            problem = drifting(generator, n, 11)
        else:
            problem = split(normal(generator, n, dtypes), 3)
        for first in (True, False):
            report = capture(problem, *KEPT[kept], first=first, draw=draw, width=0.0, misses=True)
            missed += report.misses
        missed += update(problem, *KEPT[kept], draw=draw, width=0.0, misses=True).misses
    assert missed > 0


@pytest.mark.parametrize("small", ["upper", "lower"])
def test_misses_of_one_threshold_alone(generator, small):
    """One threshold in a large class of ties, which no bracket misses, the other where it may be."""
    n, missed = LITTLE, 0
    p, g, m, v = normal(generator, n)
    # Ranks up to 0.5 are one value; or those from 0.5 on.
    risk = torch.rand(n, generator=generator)
    tied = risk < 0.5 if small == "upper" else risk >= 0.5
    m = m.sign()
    g = torch.where(tied, torch.tensor(12.0 if small == "upper" else 18.0) * m, risky(risk, m))
    for draw in range(8):
        problem = split((p, g, m, v), 3)
        missed += update(problem, 700_000_000, 300_000_000, draw=draw, width=0.0, misses=True).misses
    assert missed > 0


def test_draws_are_different(generator):
    problem = split(normal(generator, LITTLE))
    brackets = set()
    for draw in range(5):
        report = capture(problem, first=True, draw=draw, width=SMALL)
        brackets.add((report.low, report.high))
    assert len(brackets) == 5


def test_values_of_every_size(generator):
    """Denormals, the largest, zeros: the exact comparison where a quick one is not sure."""
    mix = ("normal", "denormal", "smallest", "huge", "underflow", "wide")
    n = LITTLE
    p, v = values(n, ("normal",), FLOAT, generator), values(n, ("normal",), FLOAT, generator).abs()
    for moments in (mix, ("normal", "denormal"), ("wide",)):
        g, m = values(n, mix, FLOAT, generator), values(n, moments, FLOAT, generator)
        problem = split((p, g, m, v), 3)
        assert capture(problem, first=True, width=0.25).logged > 0
        assert capture(problem, first=False, width=0.25).logged > 0
        assert update(problem, width=0.25).logged > 0


def test_bracket_ends_among_close_risks(generator):
    """So many elements next to a bracket's ends that each wrong answer of a quick comparison counts."""
    n = LITTLE
    p, _, m, v = normal(generator, n)
    for spread in (2e-3, 1e-4):  # bins of several keys, and of one
        risk = 0.6 * (1 + spread * torch.rand(n, generator=generator))
        problem = split((p, risky(risk, m), m, v), 3)
        assert capture(problem, first=False, width=SMALL).logged > 0
        # With a threshold that is known, its neighbours are answered as quickly.
        given = problem.masks(CPU, 500_000_000)
        assert_all_same_bits(given, problem.masks(reference, 500_000_000), "masks")


def test_moments_of_few_units(generator):
    """Products with the smallest denormals have no digits left to compare."""
    n = LITTLE
    risk = torch.rand(n, generator=generator) * 0.75 + 0.25
    p, _, m, v = normal(generator, n)
    g = risky(risk, m)
    few = torch.rand(n, generator=generator) < 0.2
    unit = 2.0**-149
    m[few] = torch.randint(1, 8, (n,), generator=generator)[few] * unit
    g[few] = torch.randint(0, 90, (n,), generator=generator)[few] * unit
    problem = split((p, g, m, v), 3)
    assert capture(problem, first=False, width=SMALL).logged > 0
    assert capture(problem, *KEPT["between"], first=False, width=SMALL).logged > 0
    for kept in ((300_000_000, 0), (600_000_000, 0), (700_000_000, 300_000_000)):
        given = problem.masks(CPU, *kept)
        assert_all_same_bits(given, problem.masks(reference, *kept), "masks")


@pytest.mark.parametrize("stochastic", [False, True])
def test_random_bits_of_every_tensor(generator, stochastic):
    """Bit for bit those of the reference, of tensors at different steps and places. With beta2 = 0 and
    moments of zero, two evaluations of the update have no rounding that differs."""
    row = (0.0, 0.0, 1e-8, 1e-2, 1.0, 1.0)
    p, g, m, v = normal(generator, LITTLE // 2, (BF16, FLOAT, BF16, BF16))
    problem = split((p, g, m, v), 5, row=row, stochastic=stochastic, seed=11)
    problem.steps = [torch.tensor(float(5 * i)) for i in range(5)]
    expected = problem.copy()
    problem.bracket_update(CPU, 600_000_000, width=0.4)
    expected.bracket_update(reference, 600_000_000)
    assert_all_same_bits(problem.exp_avg_sqs, expected.exp_avg_sqs, "second moments")
    assert_all_same_bits(problem.exp_avgs, expected.exp_avgs, "moments")
    if stochastic:
        wrong = sum(int((a != b).sum()) for a, b in zip(problem.params, expected.params, strict=True))
        assert wrong < 1e-3 * LITTLE
