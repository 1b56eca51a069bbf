"""The kernels against ``rose_ops.reference``: bit for bit, but for theta (see compare_update)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BF16,
    FLOAT,
    HALF,
    KINDS,
    ONE,
    PLAIN,
    ROSE,
    SIZES,
    Problem,
    Spec,
    Truth,
    any_of,
    assert_all_same_bits,
    assert_same_bits,
    bits,
    compare_bracket,
    compare_exact,
    compare_rounding,
    compare_update,
    examples,
    fewer,
    fractions,
    hyper_table,
    is_simulated,
    place,
    some,
    specs,
    tensor_norms,
    ulp,
    values,
)

from rose_ops import definitions, portable, reference
from rose_ops.definitions import Field, Mode

# ---------------------------------------------------------------------------------- any mixture


def compare_selection(ops, problem: Problem, upper, lower, *, first, approx=False):
    """Records and masks must be equal, in one call or two; returns them."""
    expected = problem.select(reference, upper, lower, first=first, approx=approx)
    record = problem.select(ops, upper, lower, first=first, approx=approx)
    assert record.tolist() == expected.tolist()
    masks, wanted = (
        problem.capture(ops, record, first=first),
        problem.capture(reference, record, first=first),
    )
    assert_all_same_bits(masks, wanted, "masks")
    if not approx:
        ranking, masks = problem.ranking(Mode.EXACT, upper, lower), problem.random_masks()
        assert_same_bits(problem.rank(ops, masks, None, ranking, first=first), expected, "record")
        assert_all_same_bits(masks, wanted, "masks of one call")
    return record, masks


def compare_selections(ops, problem: Problem, fractions, *, first) -> None:
    """The same for many fractions; of a large problem on the simulated device, the mask of the last."""
    truth = Truth(problem, first=first)
    for kept in fractions:
        record = problem.select(ops, *kept, first=first)
        assert record.tolist() == truth.select(*kept)
        if kept is fractions[-1] or not is_simulated(ops) or sum(problem.numels) < UNSAMPLED:
            masks = problem.capture(ops, record, first=first)
            assert_all_same_bits(masks, truth.capture(record), "masks")


@pytest.mark.thin(2)
@examples(200)
@given(spec=specs(), kept=fractions(), first=st.booleans(), approx=st.booleans())
def test_selection_of_any_mixture(ops, spec: Spec, kept, first, approx):
    compare_selection(ops, spec.problem(), *kept, first=first, approx=approx)


@examples(100)
@given(spec=specs(), first=st.booleans(), literally=st.booleans(), data=st.data())
def test_counts_of_keys_of_any_mixture(spec: Spec, first, literally, data):
    """What processes add up. (Devices other than the CPU have it from the reference.)"""
    p = spec.problem()
    arguments = p.grads, [] if first else p.exp_avgs, p.hyper, p.group, p.inv_scale, p.clip, literally
    leading, counted = (ops.count_keys(*arguments, None) for ops in (reference, torch.ops.rose_ops))
    assert torch.equal(leading, counted)
    assert leading.sum() == sum(p.numels)
    some = st.sampled_from([*leading[:-2].nonzero().flatten().tolist(), 0, 2**16 - 1])
    digits = torch.tensor(data.draw(st.lists(some, min_size=1, max_size=2)))
    below, counted = (ops.count_keys(*arguments, digits) for ops in (reference, torch.ops.rose_ops))
    assert torch.equal(below, counted)
    for digit, found in zip(digits.tolist(), below.view(len(digits), -1), strict=True):
        assert found.sum() == leading[digit]
    for digit in (-1, 2**16):
        with pytest.raises(RuntimeError, match=rf"digits\[0\] is {digit}; expected 0 to 65535"):
            torch.ops.rose_ops.count_keys(*arguments, torch.tensor([digit]))


MODES = ("none", "first", "second", "selection", "first+second", "first+selection")
# Bits, one bool for the whole tensor, or nothing; of up to four tensors.
MASKS = any_of(*[("bits", "bits", "true", "false", "empty")] * 4)


@pytest.mark.thin(2)
@examples(300)
@given(
    spec=specs(), kept=fractions(), kept_first=fractions(), mode=st.sampled_from(MODES),
    kinds_first=MASKS, kinds=MASKS,
)  # fmt: skip
def test_update_of_any_mixture(ops, spec: Spec, kept, kept_first, mode, kinds_first, kinds):
    problem = spec.problem()
    if mode == "none":
        problem.hyper[:, reference.Hyper.SELECTIVE] = 0
        compare_update(ops, problem)
        return

    def masks(kept, first, kinds):
        found = problem.masks(reference, *kept, first=first)
        of_kind = {"empty": torch.empty(0, dtype=torch.uint8)}
        of_kind |= {"true": torch.tensor(True), "false": torch.tensor(False)}
        # (Masks are views of one allocation.)
        return [
            place(mask, offset=3) if kind == "bits" else of_kind[kind]
            for mask, kind in zip(found, kinds, strict=False)
        ]

    compare_update(
        ops,
        problem,
        masks(kept_first, True, kinds_first) if "first" in mode else (),
        masks(kept, False, kinds) if "second" in mode else (),
        problem.select(reference, *kept) if "selection" in mode else None,
    )


@pytest.mark.thin(2)
@examples(100)
@given(spec=specs(), kept=fractions(), with_first=st.booleans())
def test_ranking_and_update_in_one_call(ops, spec: Spec, kept, with_first):
    problem = spec.problem()
    compare_exact(ops, problem, *kept, problem.masks(reference, ONE // 3, first=True) * with_first)


@examples(50)
@given(specs())
def test_nothing_moves_when_an_infinity_was_found(ops, spec: Spec):
    problem = spec.problem()
    problem.found_inf = torch.tensor(1.0)
    before = [bits(t).clone() for t in (*problem.written, *problem.steps)]
    problem.hyper[:, reference.Hyper.SELECTIVE] = 0
    assert problem.update(ops).tolist() == [0, 0]
    for old, t in zip(before, (*problem.written, *problem.steps), strict=True):
        assert torch.equal(old, bits(t))


@pytest.mark.thin(3)
@pytest.mark.parametrize("moment", [FLOAT, BF16], ids=["fp32-moments", "bf16-moments"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [(0.7, 1 / 3), (1.0, 0.7), (0.7, 1.0)], ids=str)
@pytest.mark.parametrize("inv_scale", [None, 1.0, 1 / 3], ids=["unscaled", "one", "third"])
def test_gradients_are_multiplied_by_two_factors(ops, generator, dtype, moment, clip, inv_scale):
    """One after the other, each product rounded, where loops that know their dtypes make one of them.

    Of a tensor that is ranked and of one that is not, each of them large enough for such loops.
    """
    n = fewer(ops, 3001, 300)
    p, g, m, v = (
        [values(n, ("normal",), kind, generator) for _ in range(2)]
        for kind in (dtype,) * 2 + (moment,) * 2
    )
    problem = Problem.of(
        g, m, params=p, exp_avg_sqs=[x.abs_() for x in v], hyper=hyper_table(ROSE, PLAIN),
        group=torch.arange(2), lr=torch.tensor([1e-2, 1e-3]), clip=torch.tensor(clip),
        inv_scale=None if inv_scale is None else torch.tensor(inv_scale),
    )  # fmt: skip
    for kept in ((600_000_000, 0), (700_000_000, 300_000_000)):
        _, first = compare_selection(ops, problem, *kept, first=True)
        record, second = compare_selection(ops, problem, *kept, first=False)
        compare_update(ops, problem.copy(), first, second)
        compare_update(ops, problem.copy(), selection=record)
        compare_bracket(ops, problem.copy(), *kept)


# -------------------------------------------------------------------------------- every boundary

CLASSES = ("normal", "zero", "nan", "ties", "denormal")


@pytest.mark.thin(3)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("n", SIZES, ids=lambda n: f"n{n}")
def test_every_rank_at_every_boundary(ops, generator, n, first):
    """k from 0 to n (all of them up to 65), distinct risks and ties."""
    all_ranks = n <= fewer(ops, 65, 5, 17)
    for mix in (("normal",), CLASSES):
        g, m = (values(n, mix, FLOAT, generator) for _ in range(2))
        problem = Problem.of([g], [m])
        ranks = (0, 1, 2, n // 3, n // 2, n - 2, n - 1, n)
        kept = []
        for k in range(n + 1) if all_ranks else ranks[:: fewer(ops, 1, 3)]:
            upper = max(1, -(-k * ONE // max(n, 1)))  # the smallest fraction with floor(c*n) >= k
            kept.append((upper, 0 if k % 2 else upper // 2))
        compare_selections(ops, problem, kept, first=first)


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("n", SIZES, ids=lambda n: f"n{n}")
def test_update_at_every_boundary(ops, generator, n, dtype):
    """Each dtype's vector body and tail, with a single mask and an ensemble."""
    moment = FLOAT if dtype == HALF else dtype
    for mask_count in (1, 2):
        p, g = (values(n, ("normal", "one"), dtype, generator) for _ in range(2))
        m, v = (values(n, ("normal", "zero"), moment, generator) for _ in range(2))
        problem = Problem.of(
            [place(g, offset=1)], [place(m, offset=3)],
            params=[place(p, offset=5)], exp_avg_sqs=[place(v.abs(), offset=7)], gamma=0.3,
        )  # fmt: skip
        record = problem.select(reference, 600_000_000)
        first = problem.masks(reference, 400_000_000, first=True) if mask_count == 2 else ()
        compare_update(ops, problem, first, selection=record)


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", KINDS)
def test_every_pair_of_classes(ops, generator, kind, moment):
    """Every kind of gradient over every kind of moment, alone and among ordinary elements."""
    for mix_g, mix_m in (((kind,), (moment,)), ((kind, "normal"), (moment, "normal"))):
        g, m = values(83, mix_g, FLOAT, generator), values(83, mix_m, FLOAT, generator)
        # What is inactive can be ranked; nothing is without a zero.
        both = (len(mix_g) == 1, len(mix_g) > 1)[: 2 if "zero" in (kind, moment) else 1]
        for rank_inactive in some(ops, both[: fewer(ops, 2, 1)], generator, 1):
            problem = Problem.of([g], [m], rank_inactive=rank_inactive)
            if kind == moment:  # the first order is of gradients alone
                compare_selection(ops, problem, 290_000_000, 100_000_000, first=True)
            record, masks = compare_selection(ops, problem, 500_000_000, 0, first=False)
            compare_update(ops, problem.copy(), selection=record)
            compare_update(ops, problem.copy(), masks)


def test_overflow_and_underflow_of_the_risk(ops):
    """Finite inputs whose alpha*|g|/|m| overflows, and whose alpha*|g| is denormal or zero."""
    tiny, largest = 2.0**-149, torch.finfo(FLOAT).max
    g = torch.tensor([largest, 1.0, largest, tiny, 5 * tiny, 2.0**-126, 9 * tiny, -largest])
    m = torch.tensor([0.05, tiny, -tiny, tiny, tiny, 2.0**-126, largest, largest])
    key = reference.risk_key(g, m, reference.float32(1.0 - 0.9), False)
    infinite = [True, True, True, False, False, False, False, False]
    assert (key == definitions.INFINITY_KEY).tolist() == infinite
    one = 0x3F800000  # alpha*|g| fell to 0, so the risk is |0 - 1|
    assert key.tolist()[3] == key.tolist()[6] == one
    problem = Problem.of([g], [m])
    for k in range(1, 9):
        record, _ = compare_selection(ops, problem, k * ONE // 8, 0, first=False)
        assert record[Field.RANKED] == 8
        compare_update(ops, problem.copy(), selection=record)


def test_groups_with_different_alpha(ops, generator):
    """A group's risks use its own beta1, in one ranking."""
    sizes = (1500, 70, 2100)
    g = [values(n, ("normal",), FLOAT, generator) for n in sizes]
    m = [values(n, ("normal",), FLOAT, generator) for n in sizes]
    rows = (ROSE, (0.5, 0.99, 1e-6, 0.1, -1.0, 1.0), PLAIN)
    problem = Problem.of(
        g, m, hyper=hyper_table(*rows), group=torch.tensor([1, 0, 1]),
        lr=torch.tensor([1e-2, 1e-3, 0.1], dtype=torch.float64),
    )  # fmt: skip
    record, _ = compare_selection(ops, problem, 600_000_000, 0, first=False)
    one_alpha = Problem.of(g, m).select(ops, 600_000_000)
    assert record[Field.HIGH] != one_alpha[Field.HIGH]
    problem.group[1] = 2
    compare_update(ops, problem, selection=record)


def test_thousands_of_tiny_tensors(ops, generator):
    """With empty ones among them; the same as one flat tensor."""
    count = fewer(ops, 3000, 60)
    sizes = torch.randint(0, 24, (count,), generator=generator).tolist()
    mix = ("normal", "zero", "ties", "nan", "denormal")
    g, m = (values(sum(sizes), mix, FLOAT, generator) for _ in range(2))
    p = values(sum(sizes), ("normal",), FLOAT, generator)
    scattered = Problem.of(
        list(g.split(sizes)), [t.clone() for t in m.split(sizes)],
        params=[t.clone() for t in p.split(sizes)],
    )  # fmt: skip
    flat = Problem.of([g], [m], params=[p])
    for first in (True, False):
        record = scattered.select(ops, 600_000_000, 100_000_000, first=first)
        flat_record, flat_mask = compare_selection(ops, flat, 600_000_000, 100_000_000, first=first)
        assert_same_bits(record, flat_record)
        masks = scattered.capture(ops, record, first=first)
        unpacked = [reference.unpack(b, n) for b, n in zip(masks, sizes, strict=True) if n]
        assert torch.equal(torch.cat(unpacked), reference.unpack(flat_mask[0], sum(sizes)))
    counts = scattered.update(ops, masks)
    assert_same_bits(counts, flat.update(ops, flat_mask))
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert_same_bits(torch.cat(getattr(scattered, name)), getattr(flat, name)[0], name)


def test_no_tensors_at_all(ops):
    problem = Problem.of([])
    for approx in (False, True):
        compare_selection(ops, problem, 600_000_000, 100_000_000, first=False, approx=approx)
    assert problem.update(ops).tolist() == [0, 0]


# -------------------------------------------------------------------------------- sampled window

N = 263_007  # a kernel may take a sample from so many
UNSAMPLED = 20_011  # where none does, and it is not the number that counts


def _data(name: str, n: int, generator: torch.Generator) -> torch.Tensor:
    return WINDOW_DATA[name](torch.arange(n), torch.rand(n, generator=generator)).float()


# From the index, 0 to n - 1, and a random number.
WINDOW_DATA = {
    "uniform": lambda i, r: r,
    "all-equal": lambda i, r: torch.ones(len(i)),
    "two-values": lambda i, r: 1.0 + (r < 0.6),
    "99%-ties": lambda i, r: torch.where(r < 0.99, 1.0, 2 * r),
    "60%-ties-at-rank": lambda i, r: torch.where((r > 0.2) & (r < 0.8), 0.5, r),
    # A class of ties inside the window that is not its middle: the log overflows.
    "ties-next-to-threshold": lambda i, r: torch.where((r > 0.601) & (r < 0.7), 0.6011, r),
    "sorted": lambda i, r: i + 1.0,
    "reversed": lambda i, r: len(i) - i + 0.0,
    "period-of-a-line": lambda i, r: i % 16 + 1.0,
    "period-of-a-line-plus-1": lambda i, r: i % 17 + r,
    "period-of-a-tile": lambda i, r: i % 1024 + 1.0,
    "lines-of-one-value": lambda i, r: i // 16 * 7919 % 65536 + 1.0,
    "tiles-of-one-value": lambda i, r: i // 1024 * 7919 % 65536 + 1.0,
    "blocks-of-different-scale": lambda i, r: (1 + r) * 2.0 ** (i // 10_000 * 37 % 60),
    "last-bits": lambda i, r: 1.0 + (r * 64).floor() * 2.0**-23,
    "one-bit": lambda i, r: 1.0 + (r < 0.5) * 2.0**-23,
    "at-a-power-of-two": lambda i, r: torch.where(r < 0.6, 2.0 - 2.0**-23, 2.0),
    "denormal": lambda i, r: (r * 4096).floor() * 2.0**-149,
    "all-exponents": lambda i, r: 2.0 ** ((r.double() * 270).floor() - 140),
    "one-huge-line": lambda i, r: torch.where((i - len(i) // 3).abs() < 9, 1e38, r),
    "last-element-alone": lambda i, r: torch.where(i == len(i) - 1, r, 0.0),
    "inactive": lambda i, r: torch.zeros(len(i)),
    "infinite": lambda i, r: torch.full(i.shape, torch.inf),
    "nan": lambda i, r: torch.full(i.shape, torch.nan),
    "half-inactive": lambda i, r: torch.where(r < 0.5, 0.0, r),
    "inactive-tiles": lambda i, r: torch.where(i // 1024 % 3 > 0, 0.0, r),
    "nan-lines": lambda i, r: torch.where(i // 16 % 2 > 0, torch.nan, r),
}  # fmt: skip

WINDOW_FRACTIONS = (
    (600_000_000, 0),
    (1, 0),
    (ONE, 0),
    (ONE, ONE - 1),
    (600_000_000, 599_990_000),  # both thresholds in one window
    (500_000_000, 100_000_000),
    (20_000, 10_000),
)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", WINDOW_DATA)
def test_first_order_where_a_sample_is_taken(ops, generator, name):
    problem = Problem.of([_data(name, fewer(ops, N, UNSAMPLED), generator)])
    compare_selections(ops, problem, some(ops, WINDOW_FRACTIONS, generator, 2), first=True)
    compare_selection(ops, problem, 600_000_000, 0, first=True, approx=True)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", WINDOW_DATA)
def test_second_order_where_a_sample_is_taken(ops, generator, name):
    """The same data as the gradient over moments of one, and as moments under noise."""
    n = fewer(ops, N, UNSAMPLED)
    data = _data(name, n, generator)
    noise = torch.randn(n, generator=generator)
    kept = WINDOW_FRACTIONS
    for problem, chosen, few in ((Problem.of([data], [torch.ones(n)]), kept[:5], 2),
                                 (Problem.of([noise], [data]), (kept[0], kept[-1]), 1)):  # fmt: skip
        compare_selections(ops, problem, some(ops, chosen, generator, few), first=False)


@pytest.mark.thin(2)
@pytest.mark.parametrize("run", [0.1, 0.9], ids=["low", "high"])
def test_a_run_that_a_sample_misses(ops, generator, run):
    """Every line of 16 has 8 elements below the median, so a sample has no variance and its window is
    as narrow as can be; one run of 512 unlike all the rest moves the median out of it, unless the
    sample met that run. Then the answer must be found without the window."""
    n = fewer(ops, N, 5 * UNSAMPLED)
    index = torch.arange(n)
    alike = (index % 16 + torch.rand(n, generator=generator)) / 16
    for start in torch.randint(0, n - 512, (fewer(ops, 12, 2),), generator=generator).tolist():
        data = alike.clone()
        data[start : start + 512] = run + data[start : start + 512] / 1024
        kept = ((500_000_000, 0), (750_000_000, 250_000_000))
        compare_selections(ops, Problem.of([data]), kept, first=True)


@pytest.mark.thin(2)
@pytest.mark.parametrize("above", [0, 1], ids=["last-of-the-lower", "first-of-the-upper"])
def test_two_large_ties_around_the_rank(ops, generator, above):
    """Two values only, and the rank is the last of the one or the first of the other: one of them is
    not where a sample points, and is too many to be put down one by one."""
    n = fewer(ops, 4_000_000, 100_000, 1_000_000)
    k = n // 5 * 3
    for _ in range(fewer(ops, 4, 4, 2)):
        data = torch.where(torch.arange(n) < k - above, 1.0, 2.0)
        data = data[torch.randperm(n, generator=generator)]
        record = Problem.of([data], [], params=[], exp_avg_sqs=[]).select(ops, 600_000_000, first=True)
        kept = n if above else k
        assert record.tolist() == [0x40000000 if above else 0x3F800000, -1, kept, n, 0, 0, 0, 0]


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("pieces", "dtype"), [(3, BF16), (3, HALF), (400, HALF), (1500, BF16)], ids=str
)
def test_sample_of_scattered_half_precision(ops, generator, pieces, dtype):
    """Many tensors (some empty, some odd views), few distinct keys."""
    n, pieces = fewer(ops, N, UNSAMPLED), fewer(ops, pieces, min(pieces, 30), min(pieces, 600))
    cuts = torch.randint(0, n, (pieces - 1,), generator=generator).sort().values
    g = values(n, ("normal", "zero"), dtype, generator).tensor_split(cuts)
    m = values(n, ("normal", "ties"), BF16, generator).tensor_split(cuts)
    layouts = ("contiguous", "strided", "offset")
    problem = Problem.of(
        [place(t, layouts[i % 3], offset=i % 5) for i, t in enumerate(g)],
        [place(t, layouts[i % 2], offset=i % 3) for i, t in enumerate(m)],
    )
    for first in (True, False):
        compare_selection(ops, problem, 600_000_000, 100_000_000, first=first)


# --------------------------------------------------------------------------------------- theta


def adamw_like(n: int, generator, lr: float, *, well_conditioned: bool):
    """p, g, m, v as in training. Well conditioned: no sum cancels and no quotient is extreme, so
    that the largest error says something about the arithmetic. There, parameters go from far below
    the size of the update to far above it."""
    p, g, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    g, m, v = g * 1e-3, m * 3e-4, (v * 1e-3).square()
    if well_conditioned:
        m = g * (0.1 + torch.rand(n, generator=generator))
        v = g.square() * (0.5 + torch.rand(n, generator=generator))
        p = -lr * torch.exp2(torch.rand(n, generator=generator) * 20 - 10).copysign(g)
    return p, g, m, v


def fused(p, g, m, v, step: int, lr: float, row=ROSE):
    """What ``torch.optim.AdamW(fused=True)`` makes of p."""
    beta1, beta2, eps, weight_decay, *_ = row
    parameter = p.clone().requires_grad_()
    parameter.grad = g.clone()
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step)),
        "exp_avg": m.clone(),
        "exp_avg_sq": v.clone(),
    }
    optimizer.step()
    return parameter.detach()


MANY = 200_003
QUANTILES = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)  # thousands are above the last


def assert_within_twice(ours, theirs, truth, *, largest: bool, dtype=FLOAT):
    """Errors in ulps, ours at most twice theirs: the largest one, or its quantiles.

    Where sums cancel, the largest error is that of the one element with the smallest result, and
    which of two implementations is luckier there says nothing: a factor of 8 either way was seen.
    """
    unit = ulp(truth, dtype)
    a, b = ((x.double() - truth).abs() / unit for x in (ours, theirs))
    a, b = (a.max(), b.max()) if largest else (a.quantile(QUANTILES), b.quantile(QUANTILES))
    assert (a <= 2 * b).all(), f"{a.tolist()} ulps, fused AdamW has {b.tolist()}"


def truth_of(problem: Problem, *masks) -> Problem:
    problem = problem.copy(torch.float64)
    problem.update(reference, *masks, dtype=torch.float64)
    return problem


CONDITIONS = pytest.mark.parametrize("well", [True, False], ids=["conditioned", "any"])


@pytest.mark.thin(3)
@CONDITIONS
@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0], ids=lambda lr: f"lr{lr}")
@pytest.mark.parametrize("step", [0, 6, 99_999], ids=lambda t: f"step{t + 1}")
@pytest.mark.parametrize("kind", ["adamw", "masked"])
def test_error_of_theta_where_everything_is_selected(ops, generator, kind, step, lr, well):
    """Rule 2: the largest error in ulps against float64 is at most twice fused AdamW's."""
    p, g, m, v = adamw_like(MANY, generator, lr, well_conditioned=well)
    if step == 0:
        m, v = torch.zeros(MANY), torch.zeros(MANY)
    row = PLAIN if kind == "adamw" else ROSE
    problem = Problem.of([g], [m.clone()], row, lr, params=[p.clone()], exp_avg_sqs=[v.clone()])
    problem.steps = [torch.tensor(float(step))]
    ones = [torch.full(((MANY + 7) // 8,), 255, dtype=torch.uint8)]
    masks = () if kind == "adamw" else (ones,)
    truth = truth_of(problem, *masks)
    assert problem.update(ops, *masks).tolist() == [MANY, 0]
    theirs = fused(p, g, m, v, step, lr)
    assert_within_twice(problem.params[0], theirs, truth.params[0], largest=well)


def test_all_ways_to_select_everything_are_adamw(ops, generator):
    """The same bits, whichever loop of the kernel is taken."""
    n = 5003
    p, g, m, v = adamw_like(n, generator, 0.1, well_conditioned=False)

    def updated(row, *masks, **options):
        problem = Problem.of(
            [g], [m.clone()], row, 0.1, params=[p.clone()], exp_avg_sqs=[v.clone()], gamma=0.3
        )
        problem.update(ops, *masks, **options)
        return problem.written

    expected = updated(PLAIN)
    ones = [torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)]
    true, empty = [torch.tensor(True)], [torch.empty(0, dtype=torch.uint8)]
    record = torch.zeros(Field.SIZE, dtype=torch.int64)
    record[Field.HIGH], record[Field.LOW] = definitions.INFINITY_KEY, -1
    for masks in ((ones,), (true,), (empty,), ((), ones), (ones, ones), (empty, true)):
        assert_all_same_bits(updated(ROSE, *masks), expected, "written")
    for first in ((), ones):
        assert_all_same_bits(updated(ROSE, first, selection=record), expected, "written")


@CONDITIONS
@pytest.mark.parametrize("gamma", [0.5, 0.3, 0.9], ids=lambda x: f"gamma{x}")
def test_error_of_theta_in_an_ensemble(ops, generator, gamma, well):
    """An element with mask M is AdamW with gradient g' and learning rate lr*M, so its error is at
    most twice that of fused AdamW on those."""
    lr, step = 0.1, 6
    p, g, m, v = adamw_like(MANY, generator, lr, well_conditioned=well)
    first, second = (torch.rand(MANY, generator=generator) < 0.5 for _ in range(2))
    masks = [reference.pack(first)], [reference.pack(second)]
    problem = Problem.of(
        [g], [m.clone()], lr=lr, params=[p.clone()], exp_avg_sqs=[v.clone()], gamma=gamma
    )
    problem.steps = [torch.tensor(float(step))]
    truth = truth_of(problem, *masks).params[0]
    problem.update(ops, *masks)
    for weight, chosen in (
        (1.0, first & second), (gamma, first & ~second), (1.0 - gamma, ~first & second),
    ):  # fmt: skip
        at = chosen.nonzero().reshape(-1)
        w, c = (reference.float32(x) for x in (weight, 1.0 - weight))
        blend = w * g + c * m
        theirs = fused(p[at], blend[at], m[at], v[at], step, lr * weight)
        assert_within_twice(problem.params[0][at], theirs, truth[at], largest=well)
    neither = ~first & ~second
    assert_same_bits(problem.params[0][neither], p[neither])
    assert_same_bits(problem.exp_avgs[0][neither], m[neither])


@CONDITIONS
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("moment", [FLOAT, BF16], ids=lambda d: f"moments-{d}")
def test_error_of_theta_in_half_precision(ops, generator, dtype, moment, well):
    """In ulps of the parameter's dtype, at most twice that of fused AdamW on parameters widened to
    float32 and narrowed again: torch has no fused AdamW with moments of another dtype."""
    lr, step = 0.1, 6
    p, g, m, v = adamw_like(MANY, generator, lr, well_conditioned=well)
    p, g, m, v = p.to(dtype), (g * 100).to(dtype), (m * 100).to(moment), (v * 1e4).to(moment)
    problem = Problem.of([g], [m.clone()], PLAIN, lr, params=[p.clone()], exp_avg_sqs=[v.clone()])
    problem.steps = [torch.tensor(float(step))]
    truth = truth_of(problem)
    problem.update(ops)
    theirs = fused(*(t.float() for t in (p, g, m, v)), step, lr).to(dtype)
    assert_within_twice(problem.params[0], theirs, truth.params[0], largest=well, dtype=dtype)


# ----------------------------------------------------------------------------------- conversions

NARROW = pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


@NARROW
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_pattern_widens_exactly(ops, dtype, layout):
    """With beta1 = 0 and m = -0 the new first moment is the gradient, sign of zero included."""
    g = all_patterns(dtype)
    problem = Problem.of([place(g, layout, offset=1)], [torch.full(g.shape, -0.0)], (0.0, *PLAIN[1:]))
    problem.update(ops)
    assert_same_bits(problem.exp_avgs[0], g.float())
    if layout != "contiguous":
        return
    # First-order keys are the bits of the widened magnitude: one element per selection.
    finite = g[g.isfinite() & (g != 0)].abs().unique()
    for one in finite[:: fewer(ops, 97, 16 * 97, 4 * 97)]:
        record = Problem.of([one.reshape(1)]).select(ops, ONE, first=True)
        assert record[Field.HIGH] == one.float().view(torch.int32).item(), one


@NARROW
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_pattern_comes_back(ops, dtype, layout):
    """lr = 0: parameters are widened, kept and narrowed to what they were."""
    p = all_patterns(dtype)
    problem = Problem.of([torch.ones(p.shape)], None, PLAIN, 0.0, params=[place(p, layout, offset=1)])
    problem.update(ops)
    assert_same_bits(problem.params[0], p)


def floats_to_narrow(dtype: torch.dtype, generator, n: int) -> torch.Tensor:
    """n of any float32, and all that matters to the rounding: ties and their neighbours between every
    two numbers of the dtype (denormal ones, overflow), and random ones of their range."""
    patterns = all_patterns(dtype)
    exact = patterns[patterns.isfinite()].float()
    half_ulp = 1 << (22 - {BF16: 7, HALF: 10}[dtype])
    keys = exact.view(torch.int32).long()
    near = [keys + d for d in (-1, 1, half_ulp - 1, half_ulp, half_ulp + 1)]
    anything = torch.randint(-(1 << 31), 1 << 31, (n,), generator=generator)
    bits_ = torch.cat([*near, anything])
    bits_ = bits_.clamp(-(1 << 31), (1 << 31) - 1).to(torch.int32)
    # Denormals of binary16 lie where float32 has normal numbers: their ties need other bits.
    smallest = torch.finfo(dtype).smallest_normal
    denormal = (torch.rand(n // 6, generator=generator) * 2 - 1) * smallest * 2
    steps = torch.arange(-2050, 2051) * (smallest * torch.finfo(dtype).eps / 2)
    limit = torch.finfo(dtype).max * (1 + torch.rand(10_000, generator=generator) * 2e-2 - 1e-2)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.996, 65520.0])
    return torch.cat([bits_.view(FLOAT), denormal, steps, limit, special])


@NARROW
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_narrowing_is_that_of_torch(ops, generator, dtype, layout):
    """Round to nearest, ties to even, for parameters and first moments."""
    x = floats_to_narrow(dtype, generator, fewer(ops, 3_000_000, 50_000, 300_000))
    n = len(x)
    # First moments: with beta1 = 0 and m = -0 they are the gradients.
    state = place(torch.full((n,), -0.0, dtype=dtype), layout, offset=1)
    problem = Problem.of([x], [state], (0.0, *PLAIN[1:]))
    problem.update(ops)
    assert_same_bits(problem.exp_avgs[0], x.to(dtype))
    # Parameters: p = 0 and v = g = 0 leave 0 - lr/(1 - beta1) * (beta1*m / eps) = -2*(m/2).
    problem = Problem.of(
        [torch.zeros(n)], [x.clone()], (0.5, 0.5, 1.0, 0.01, 1.0, 0.0), 1.0,
        params=[place(torch.zeros(n, dtype=dtype), layout, offset=3)],
    )  # fmt: skip
    problem.update(ops)
    assert_same_bits(problem.params[0], (0.0 - 2 * (0.5 * x)).to(dtype))


def test_stochastic_rounding_bit_for_bit(ops, generator):
    compare_rounding(ops, generator)


# ----------------------------------------------------------------------------------------- norms


def exact_norm(x: torch.Tensor) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in x.reshape(-1).tolist()))


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("inv_scale", [None, 2.0**-10], ids=["unscaled", "scaled"])
def test_tensor_norms(ops, generator, dtype, inv_scale):
    """The exact norm, rounded to float32; float64 sums leave a doubt of 1e-6 of an ulp."""
    scale = None if inv_scale is None else torch.tensor(inv_scale)
    tensors = [
        place(values(n, ("normal",), dtype, generator), layout, offset=1)
        for n in SIZES
        for layout in ("contiguous", "strided")
    ]
    tensors.append(place(values(35, ("normal",), dtype, generator).view(5, 7), "transposed"))
    norms = tensor_norms(ops, tensors, scale)
    assert norms.dtype == FLOAT
    for norm, tensor in zip(norms, tensors, strict=True):
        truth = exact_norm(reference.scaled(tensor, scale))
        error = abs(norm.item() - truth)
        assert error <= (0.5 + 1e-6) * ulp(torch.tensor(truth, dtype=torch.float64)).item()


def test_tensor_norms_of_extremes(ops):
    """Squares that float32 could not hold; what is not finite shows."""
    largest = torch.finfo(FLOAT).max
    cases = [
        (torch.full((4,), largest / 2), largest),
        (torch.full((4,), 2.0**-149), 2.0**-148),
        (torch.full((5,), largest), math.inf),
        (torch.tensor([1.0, math.inf]), math.inf),
        (torch.tensor([math.nan, 1.0]), math.nan),
        (torch.zeros(3), 0.0),
        (torch.zeros(0), 0.0),
    ]
    norms = tensor_norms(ops, [x for x, _ in cases], None)
    assert_same_bits(norms, torch.tensor([norm for _, norm in cases]))


# ----------------------------------------------------------------- selection of whole tensors


def quantile(risks: list[Fraction], fraction: Fraction) -> Fraction:
    position = fraction * (len(risks) - 1)
    low = math.floor(position)
    high = min(low + 1, len(risks) - 1)
    return risks[low] + (position - low) * (risks[high] - risks[low])


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 91, 200], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("upper", ["0.7", "0.6", "0.333333333", "1.0"])
@pytest.mark.parametrize("lower", ["0.0", "0.1"])
def test_selection_of_tensors_by_exact_quantiles(generator, n, upper, lower):
    """In floating point 0.7 of 91 loses a tensor: 0.7 * 90 is below 63."""
    g = torch.rand(n, generator=generator) + 0.5
    fractions_ = [Fraction(upper), Fraction(lower)]
    mask, record = portable.select_tensors(
        g, None, torch.full((n,), 0.1), *(int(f * ONE) for f in fractions_), False
    )
    risks = sorted(Fraction(x) for x in g.tolist())
    high, low = (quantile(risks, f) for f in fractions_)
    for x, kept in zip(g.tolist(), mask.tolist(), strict=True):
        # Only within the rounding of an interpolated threshold may float32 decide otherwise.
        doubt = Fraction(2.0**-22)
        if any(0 < abs(Fraction(x) - t) < doubt for t in (high, low)):
            continue
        assert kept == (low <= Fraction(x) <= high)
    assert record[Field.KEPT] == mask.sum()
    assert record[Field.RANKED] == n


def test_selection_of_tensors_is_that_of_torch_quantile(generator):
    g, m = (torch.rand(257, generator=generator) + 0.1 for _ in range(2))
    alpha = torch.full((257,), 0.1)
    mask, _ = portable.select_tensors(g, m, alpha, 500_000_000, 250_000_000, False)
    risk = (0.1 * g / m - 1).abs()
    high, low = risk.quantile(torch.tensor([0.5, 0.25]))
    assert torch.equal(mask, (risk >= low) & (risk <= high))


def test_tensors_without_history_or_finite_norm(generator):
    g = torch.tensor([1.0, 2.0, math.nan, 4.0, math.inf, 3.0])
    m = torch.tensor([1.0, 0.0, 1.0, math.inf, 1.0, 1.0])
    mask, record = portable.select_tensors(g, m, torch.full((6,), 0.1), ONE // 2, 0, False)
    assert mask.tolist() == [False, True, False, False, False, True]  # risks 0.9 and 0.7
    assert record[Field.RANKED] == 2
    assert record[Field.INACTIVE] == 1
    assert record[Field.NONFINITE] == 3


def sums_like(generator, n: int, mix=()) -> torch.Tensor:
    """Squared norms, and some special ones."""
    sums = torch.rand(n, generator=generator, dtype=torch.float64) * 100
    for i, value in enumerate(mix):
        sums[i::11] = value
    return sums


SPECIAL_SUMS = (0.0, math.inf, math.nan, 1e-320, 1e300, 4.0, 4.0)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 201, 256, 300, 1000])
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_selection_of_tensors(ops, generator, n, special, first):
    """Masks and records of every fraction, bit for bit."""
    mix = SPECIAL_SUMS if special else ()
    sums, moments = sums_like(generator, n, mix), sums_like(generator, n, mix[::-1])
    hyper = hyper_table(ROSE, (0.5, *ROSE[1:]))
    group = torch.arange(n) % len(hyper)
    for upper, lower, clip, rank_inactive in (
        (600_000_000, 0, None, False),
        (333_333_333, 100_000_000, torch.tensor([0.3, 1.0]), True),
        (ONE, 999_999_999, None, True),
        (1, 0, torch.tensor([math.nan, 0.0]), False),
    ):
        found = []
        for one in (reference, ops):
            mask = torch.zeros(n, dtype=torch.bool)
            record = one.select_tensors_(
                mask, sums, None if first else moments, hyper, group, clip, upper, lower, rank_inactive
            )
            found.append((record.tolist(), mask.tolist()))
        assert found[0] == found[1]


@pytest.mark.parametrize("n", [0, 1, 2, 201, 256, 257, 3000])
def test_clip_factors(ops, generator, n):
    """Norm and factors, bit for bit: sums of whole numbers are exact in any order."""
    sums = sums_like(generator, n).round()
    for max_norm in (1.0, 1e-3, 37.7, 1e9, math.inf):
        for value in (None, 0.0, math.inf, math.nan, 1e-320, 1e300):
            if value is not None and n > 0:
                sums = torch.full((n,), 0.0, dtype=torch.float64)
                sums[n // 2] = value
            expected = reference.clip_factors(sums, max_norm)
            assert_same_bits(ops.clip_factors(sums, max_norm).nan_to_num(-1), expected.nan_to_num(-1))
