"""What the definitions imply, tested on every backend without using the reference as the oracle
(the reference itself is one of the backends here)."""

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
    ONE,
    PLAIN,
    ROSE,
    Problem,
    Spec,
    assert_all_same_bits,
    assert_same_bits,
    examples,
    fractions,
    hyper_table,
    random_masks,
    specs,
    values,
)

import rose_ops
from rose_ops import definitions, reference
from rose_ops.definitions import Field, Mode
from rose_ops.settings import check_fractions

pytestmark = pytest.mark.thin(2)

# ------------------------------------------------------------------- risks, by exact arithmetic


def to_float32(x: Fraction) -> float:
    """Round to nearest, ties to even, with denormals and overflow: by integers alone."""
    if x == 0:
        return 0.0
    sign, x = (-1 if x < 0 else 1), abs(x)
    exponent = max(math.floor(math.log2(x.numerator) - math.log2(x.denominator)) - 23, -149)
    while x / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and x / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    units = x / Fraction(2) ** exponent
    whole, rest = divmod(units.numerator, units.denominator)
    doubled = 2 * rest
    whole += doubled > units.denominator or (doubled == units.denominator and whole % 2 == 1)
    value = whole * Fraction(2) ** exponent
    return sign * (math.inf if value >= 2**128 else float(value))


def exact_risk(g: float, m: float, alpha: float) -> float:
    """fl(fl(fl(alpha*|g|) / |m|) - 1), absolute; m is not 0."""
    product = to_float32(Fraction(alpha) * abs(Fraction(g)))
    ratio = to_float32(Fraction(product) / abs(Fraction(m)))
    return math.inf if math.isinf(ratio) else abs(to_float32(Fraction(ratio) - 1))


def float_bits(x: float) -> int:
    return torch.tensor(x, dtype=FLOAT).view(torch.int32).item()


@pytest.mark.thin(3)
@pytest.mark.parametrize("beta1", [0.9, 0.999, 0.0, 0.3], ids=lambda b: f"beta{b}")
@pytest.mark.parametrize(
    "kinds",
    [("normal", "normal"), ("wide", "wide"), ("denormal", "denormal"), ("smallest", "smallest"),
     ("underflow", "normal"), ("denormal", "huge"), ("ties", "ties"), ("zero", "wide")],
    ids="-".join,
)  # fmt: skip
def test_risk_by_exact_arithmetic(any_ops, generator, kinds, beta1):
    """The threshold of a single element is its risk; alpha is float32(1.0 - beta1)."""
    g, m = (values(24, (kind,), FLOAT, generator) for kind in kinds)
    alpha = to_float32(Fraction(1.0 - beta1))
    for x, y in zip(g, m, strict=True):
        if y == 0:
            continue
        problem = Problem.of([x], [y], (beta1, *ROSE[1:]))
        record = problem.select(any_ops, ONE)
        expected = exact_risk(x.item(), y.item(), alpha)
        assert record[Field.HIGH] == float_bits(expected), (x.item(), y.item())


def test_alpha_is_not_one_minus_a_rounded_beta(any_ops):
    """float32(1.0 - 0.9) is 0.1f, and 1f - 0.9f is not."""
    problem = Problem.of([torch.tensor([1.0])], [torch.tensor([0.1])])
    assert problem.select(any_ops, ONE)[Field.HIGH] == 0


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("rank_inactive", [False, True], ids=["update", "rank"])
def test_classes_of_elements(any_ops, first, rank_inactive):
    """Each special value of gradient and moment, and how it is counted and selected."""
    nan, inf, tiny = math.nan, math.inf, 2.0**-149
    gradients = [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, 1.0]
    moments = [nan, inf, -inf, 0.0, -0.0, tiny, -tiny, 1.0]
    pairs = [(g, m) for g in gradients for m in moments]
    g, m = (torch.tensor(column) for column in zip(*pairs, strict=True))
    problem = Problem.of([g], [m], rank_inactive=rank_inactive)
    record = problem.select(any_ops, ONE // 1000, first=first)  # keeps nothing that is ranked
    assert record[Field.HIGH] == -1
    mask = reference.unpack(problem.capture(any_ops, record, first=first)[0], len(pairs)).tolist()
    nonfinite = [not (math.isfinite(g) and (first or math.isfinite(m))) for g, m in pairs]
    inactive = [
        not bad and not rank_inactive and (g if first else m) == 0
        for bad, (g, m) in zip(nonfinite, pairs, strict=True)
    ]
    assert mask == inactive
    assert record[Field.NONFINITE] == sum(nonfinite)
    assert record[Field.INACTIVE] == sum(inactive)
    assert record[Field.RANKED] == len(pairs) - sum(nonfinite) - sum(inactive)
    assert record[Field.KEPT] == 0


def test_literal_risks_of_inactive_elements(any_ops):
    """inactive="rank": inf where m == 0 and g != 0, 1 where both are 0, 0 where g_kl == 0."""
    for g, m, risk in ((2.0, 0.0, math.inf), (-2.0, -0.0, math.inf), (0.0, 0.0, 1.0)):
        problem = Problem.of([torch.tensor(g)], [torch.tensor(m)], rank_inactive=True)
        assert problem.select(any_ops, ONE)[Field.HIGH] == float_bits(risk)
    first = Problem.of([torch.tensor(-0.0)], rank_inactive=True).select(any_ops, ONE, first=True)
    assert first[Field.HIGH] == 0


# --------------------------------------------------------------------------------------- ranks


@examples(1000)
@given(
    st.integers(0, ONE) | st.sampled_from((0, 1, ONE - 1, ONE)),
    st.integers(0, 2**63 - 1) | st.integers(0, 100) | st.sampled_from((2**31, 2**31 + 1, ONE)),
)
def test_rank_is_exact(fraction, n):
    assert reference.rank_of(fraction, n) == math.floor(Fraction(fraction, ONE) * n)


@examples(150)
@given(fraction=fractions(), n=st.integers(0, 300), tie=st.integers(1, 5))
def test_threshold_is_the_kth_smallest(any_ops, fraction, n, tie):
    """Over 1, .., n (each `tie` numbers equal), shuffled; counted with exact fractions."""
    risks = sorted((i // tie + 1) * 1.0 for i in range(n))
    order = torch.randperm(n)
    problem = Problem.of([torch.tensor(risks)[order] if n else torch.empty(0)])
    upper, lower = fraction
    record = problem.select(any_ops, upper, lower, first=True)
    high, low = (math.floor(Fraction(f, ONE) * n) for f in (upper, lower))
    tau_high = risks[high - 1] if high else None
    tau_low = risks[low - 1] if low else None
    assert record[Field.HIGH] == (-1 if tau_high is None else float_bits(tau_high))
    assert record[Field.LOW] == (-1 if tau_low is None else float_bits(tau_low))
    kept = [tau_high is not None and r <= tau_high and (tau_low is None or r > tau_low) for r in risks]
    assert record[Field.KEPT] == sum(kept)
    mask = reference.unpack(problem.capture(any_ops, record, first=True)[0], n)
    assert mask.tolist() == [kept[i] for i in order.tolist()]


@pytest.mark.parametrize(
    ("fraction", "n", "rank"),
    [(0.6, 10, 6), (0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57), (0.1, 30, 3), (1e-9, 100, 0),
     (0.9999, 10_000, 9999), (0.333333333, 3, 0), (0.55, 60, 33), (1, 7, 7)],
    ids=str,
)  # fmt: skip
def test_fractions_are_the_decimals_that_were_written(any_ops, fraction, n, rank):
    """In floating point 0.29 * 100 is 28.999999999999996."""
    upper, _ = check_fractions(fraction, 0.0)
    record = Problem.of([torch.arange(1.0, n + 1)]).select(any_ops, upper, first=True)
    assert record[Field.KEPT] == rank


# ----------------------------------------------------------------- order, layout, ties, nesting


@examples(60)
@given(spec=specs(), kept=fractions(), first=st.booleans(), seed=st.integers(0, 2**32))
def test_the_order_of_elements_and_tensors_does_not_matter(any_ops, spec: Spec, kept, first, seed):
    """One shuffled flat tensor for each group has the same record as the scattered ones."""
    problem = spec.problem()
    record = problem.select(any_ops, *kept, first=first)
    shuffle = torch.Generator().manual_seed(seed)
    grads, moments, rows = [], [], []
    for row in range(len(spec.groups)):
        at = [i for i, t in enumerate(spec.tensors) if t.group == row]
        if at:
            g, m = (
                torch.cat([x[i].float().reshape(-1) for i in at])
                for x in (problem.grads, problem.exp_avgs)
            )
            order = torch.randperm(len(g), generator=shuffle)
            grads.append(g[order])
            moments.append(m[order])
            rows.append(row)
    flat = Problem.of(
        grads, moments, hyper=problem.hyper, group=torch.tensor(rows, dtype=torch.int64),
        inv_scale=problem.inv_scale, clip=problem.clip, rank_inactive=problem.rank_inactive,
    )  # fmt: skip
    assert flat.select(any_ops, *kept, first=first).tolist() == record.tolist()


@examples(100)
@given(spec=specs(), kept=fractions(), first=st.booleans())
def test_record_agrees_with_the_mask(any_ops, spec: Spec, kept, first):
    """kept + inactive is the number of bits set, no bit is set beyond n, ties are all kept, and the
    achieved fraction is at least the one asked for."""
    upper, lower = kept
    problem = spec.problem()
    record = problem.select(any_ops, upper, lower, first=first)
    masks = problem.capture(any_ops, record, first=first)
    ones = sum(reference.unpack(b, 8 * b.numel()).sum().item() for b in masks if b.numel())
    assert ones == record[Field.KEPT] + record[Field.INACTIVE]
    classes = (Field.RANKED, Field.INACTIVE, Field.NONFINITE)
    assert sum(record[c] for c in classes) == sum(problem.numels)
    if lower == 0:
        assert record[Field.KEPT] >= math.floor(Fraction(upper, ONE) * record[Field.RANKED].item())
    if record[Field.LOW] == record[Field.HIGH]:
        assert record[Field.KEPT] == 0


@examples(60)
@given(spec=specs(), a=fractions(), b=fractions(), first=st.booleans())
def test_a_larger_fraction_keeps_all_that_a_smaller_one_keeps(any_ops, spec, a, b, first):
    problem = spec.problem()
    small, large = sorted((a[0], b[0]))
    for inner, outer in zip(
        problem.masks(any_ops, small, first=first), problem.masks(any_ops, large, first=first),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(inner & outer, inner)


@examples(60)
@given(spec=specs(), kept=fractions(), first=st.booleans())
def test_lower_and_its_complement_share_nothing_but_the_inactive(any_ops, spec, kept, first):
    """(0, c_l] and (c_l, c_h] are disjoint and together (0, c_h]."""
    upper, lower = kept
    if lower == 0:
        return
    problem = spec.problem()
    records = [problem.select(any_ops, u, w, first=first) for u, w in
               ((lower, 0), (upper, lower), (upper, 0))]  # fmt: skip
    below, between, all_of_it = (r[Field.KEPT].item() for r in records)
    assert below + between == all_of_it
    masks = [problem.capture(any_ops, r, first=first) for r in records]
    for x, y, z in zip(*masks, strict=True):
        assert torch.equal(x | y, z)


@examples(20)
@given(spec=specs(), kept=fractions(), first=st.booleans())
def test_approximate_thresholds_of_little_data_are_exact(any_ops, spec: Spec, kept, first):
    problem = spec.problem()
    exact, approx = (problem.select(any_ops, *kept, first=first, approx=x) for x in (False, True))
    assert torch.equal(approx, exact)


# -------------------------------------------------------------------------------------- update


def training_problem(generator, n=1025, dtype=FLOAT, **options) -> Problem:
    p, g, m, v = (values(n, ("normal",), FLOAT, generator) for _ in range(4))
    return Problem.of([g.to(dtype)], [m], ROSE, params=[p.to(dtype)], exp_avg_sqs=[v.abs()], **options)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("ensemble", [False, True], ids=["single", "ensemble"])
def test_masked_out_is_left_alone(any_ops, generator, dtype, ensemble):
    """M = 0 leaves p and m as they are bit for bit, with decay and whatever the gradient; v moves
    towards m^2."""
    problem = training_problem(generator, dtype=dtype)
    off = torch.rand(1025, generator=generator) < 0.5
    problem.params[0][off] = values(int(off.sum()), ("denormal", "zero"), dtype, generator)
    mask = [reference.pack(~off)]
    before = problem.copy()
    counts = problem.update(any_ops, mask, mask if ensemble else ())
    assert counts.tolist() == [int((~off).sum()), 0]
    assert_same_bits(problem.params[0][off], before.params[0][off])
    assert_same_bits(problem.exp_avgs[0][off], before.exp_avgs[0][off])
    m, v = before.exp_avgs[0][off].double(), before.exp_avg_sqs[0][off].double()
    expected = 0.999 * v + 0.001 * m.square()
    torch.testing.assert_close(problem.exp_avg_sqs[0][off].double(), expected, rtol=4e-7, atol=0)
    assert (problem.exp_avgs[0][~off] != before.exp_avgs[0][~off]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["gradient", "moment"])
@pytest.mark.parametrize("masks", ["first", "second", "selection", "both", "first+selection"])
def test_what_is_not_finite_is_never_updated(any_ops, generator, value, where, masks):
    """Whatever the masks say, an element with such a gradient or first moment has M = 0 and is
    counted; the others are as if it were not there."""
    problem = training_problem(generator, gamma=0.3)
    bad = torch.rand(1025, generator=generator) < 0.2
    target = problem.grads if where == "gradient" else problem.exp_avgs
    ones = [torch.full((129,), 255, dtype=torch.uint8)]
    record = torch.zeros(Field.SIZE, dtype=torch.int64)
    record[Field.HIGH], record[Field.LOW] = definitions.INFINITY_KEY, -1
    arguments = {
        "first": (ones,), "second": ((), ones), "selection": ((), (), record),
        "both": (ones, ones), "first+selection": (ones, (), record),
    }[masks]  # fmt: skip
    clean = problem.copy()
    target[0][bad] = value
    before = problem.copy()
    assert problem.update(any_ops, *arguments).tolist() == [int((~bad).sum()), int(bad.sum())]
    assert_same_bits(problem.params[0][bad], before.params[0][bad])
    assert_same_bits(problem.exp_avgs[0][bad], before.exp_avgs[0][bad])
    clean.update(any_ops, *arguments)
    for a, b in zip(problem.written, clean.written, strict=True):
        assert_same_bits(a[~bad], b[~bad])


def test_a_plain_group_spreads_nan_as_torch_does(any_ops):
    problem = Problem.of([torch.tensor([math.nan, 1.0])], None, PLAIN)
    assert problem.update(any_ops).tolist() == [2, 0]
    assert problem.params[0].isnan().tolist() == [True, False]


@examples(60)
@given(spec=specs(), kept=fractions())
def test_maximize_is_the_negated_gradient(any_ops, spec: Spec, kept):
    problem = spec.problem()
    flipped = spec.problem()
    flipped.grads = [-g for g in flipped.grads]
    flipped.hyper[:, reference.Hyper.SIGN] *= -1
    record = problem.select(any_ops, *kept)
    assert flipped.select(any_ops, *kept).tolist() == record.tolist()
    problem.update(any_ops, selection=record)
    flipped.update(any_ops, selection=record)
    assert_all_same_bits(flipped.written, problem.written, "written")


@examples(60)
@given(spec=specs(), kept=fractions())
def test_a_found_mask_is_the_captured_mask(any_ops, spec: Spec, kept):
    """Second order found on the way of the update, or captured before: the same."""
    problem, captured = spec.problem(), spec.problem()
    record = problem.select(any_ops, *kept)
    masks = captured.capture(any_ops, record)
    counts = problem.update(any_ops, selection=record)
    assert_same_bits(captured.update(any_ops, (), masks), counts)
    assert_all_same_bits(captured.written, problem.written, "written")


def test_powers_of_two_scale_out(any_ops, generator):
    """inv_scale multiplies the gradient first: the same as gradients that were scaled before."""
    problem = training_problem(generator)
    scaled = problem.copy()
    scaled.grads[0] *= 1024
    scaled.inv_scale = torch.tensor(1 / 1024)
    for first in (True, False):
        record = problem.select(any_ops, 600_000_000, first=first)
        assert scaled.select(any_ops, 600_000_000, first=first).tolist() == record.tolist()
    problem.update(any_ops, selection=record)
    scaled.update(any_ops, selection=record)
    assert_all_same_bits(scaled.written, problem.written, "written")


def test_weights_of_the_ensemble(any_ops):
    """Eq. 5: M is 0, gamma, 1 - gamma or 1. With m = v = 0 the first step moves p by lr*M*sign(g)
    and decays it by lr*M*weight_decay."""
    first, second = torch.tensor([0, 1, 0, 1]).bool(), torch.tensor([0, 0, 1, 1]).bool()
    problem = Problem.of(
        [torch.tensor([-1.0, 1.0, -1.0, 1.0])], None, (0.9, 0.999, 0.0, 0.1, 1.0, 1.0), 0.01,
        gamma=0.3,
    )  # fmt: skip
    counts = problem.update(any_ops, [reference.pack(first)], [reference.pack(second)])
    weight = torch.tensor([0.0, 0.3, 0.7, 1.0])
    expected = 1 - 0.01 * weight * 0.1 - 0.01 * weight * problem.grads[0]
    torch.testing.assert_close(problem.params[0], expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(problem.exp_avgs[0], 0.1 * weight * problem.grads[0])
    assert counts.tolist() == [3, 0]


def test_the_truth_knows_gamma_in_full(generator):
    """In float64 the reference is what errors are measured against: its gamma is not the nearest
    float32. With m = 0, one element with M = gamma has m <- (1 - beta1)*gamma*g."""
    problem = Problem.of([torch.tensor([1.0])], gamma=0.3).copy(torch.float64)
    problem.update(reference, [torch.tensor(True)], [torch.tensor(False)], dtype=torch.float64)
    assert abs(problem.exp_avgs[0].item() - (1.0 - 0.9) * 0.3) < 1e-17


# --------------------------------------------------------------- second moments in bfloat16


def bf16_problem(n: int, value: float, offset: int = 0, **options) -> Problem:
    """Nothing but the decay of v: no gradient, no momentum."""
    return Problem.of(
        [torch.zeros(n)], [torch.zeros(n)], PLAIN, offsets=torch.tensor([offset]),
        exp_avg_sqs=[torch.full((n,), value, dtype=BF16)], **options,
    )  # fmt: skip


def test_nearest_rounding_would_never_decay():
    assert (torch.tensor(1.0, dtype=BF16).float() * 0.999).to(BF16) == 1.0


@pytest.mark.parametrize("value", [1.0, 1.7e-12], ids=["one", "small"])
def test_bf16_second_moments_decay_on_average(any_ops, value):
    """E[v_t] = beta2^t * v_0: the mean over n elements is within 5 standard errors of that."""
    n, steps = 200_000, 60
    problem = bf16_problem(n, value, seed=int(torch.randint(0, 2**31, ())))
    start = problem.exp_avg_sqs[0][0].item()
    for t in range(1, steps + 1):
        problem.update(any_ops)
        v = problem.exp_avg_sqs[0].double()
        standard_error = (v.std() / n**0.5).item()
        expected = reference.float32(0.999) ** t * start
        assert abs(v.mean().item() - expected) <= 5 * standard_error + 1e-6 * expected, t
        assert 0 < standard_error < 1e-2 * start


def test_bf16_second_moments_do_not_depend_on_the_split(any_ops, generator):
    """The random bits are those of the global index: flat, split, reversed, any layout."""
    n = 5000
    v = values(n, ("normal", "wide"), FLOAT, generator).abs().to(BF16)
    g = torch.randn(n, generator=generator)

    def problem(pieces, starts):
        return Problem.of(
            [g[i:j] for i, j in pieces], None, PLAIN, seed=7,
            exp_avg_sqs=[v[i:j].clone() for i, j in pieces], offsets=torch.tensor(starts),
        )  # fmt: skip

    far = 3 * 2**32 - 1000
    flat = problem([(0, n)], [far])
    flat.update(any_ops)
    for cuts in ([1, 8, 1000, 1024, 4097], list(range(17, n, 61))):
        ends = list(zip([0, *cuts], [*cuts, n], strict=True))[::-1]
        split = problem(ends, [far + i for i, _ in ends])
        split.update(any_ops)
        assert_same_bits(torch.cat(split.exp_avg_sqs[::-1]), flat.exp_avg_sqs[0])


def hash_u32(index: int, seed: int, step: int) -> int:
    """The counter-based hash in plain Python."""

    def mix(x):
        x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0xD35A2D97 & 0xFFFFFFFF
        return x ^ x >> 15

    key = mix((seed ^ step * 0x9E3779B9) & 0xFFFFFFFF)
    return mix(index & 0xFFFFFFFF ^ mix(index >> 32 ^ key))


@pytest.mark.parametrize(
    "offset",
    [0, 1, 2**31 - 700, 2**32 - 700, 2**32 - 5, 2**32, 2**32 * 5 - 1025, 2**40 + 3],
    ids=lambda o: f"from-{o}",
)
def test_random_bits_across_the_carry_of_the_index(any_ops, generator, offset):
    """v goes up where the 16 bits cut off plus 16 random bits carry: predicted one by one."""
    n, seed, step = 2050, 12345, 8
    v = (torch.rand(n, generator=generator) + 0.5).to(BF16)
    problem = bf16_problem(n, 0.0, offset, seed=seed)
    problem.exp_avg_sqs = [v.clone()]
    problem.steps = [torch.tensor(float(step))]
    problem.update(any_ops)
    exact = reference.float32(0.999) * v.float()
    expected = [
        (pattern + (hash_u32(i & ~1, seed, step + 1) >> 16 * (i & 1) & 0xFFFF)) >> 16
        for i, pattern in enumerate(exact.view(torch.int32).tolist(), offset)
    ]
    assert problem.exp_avg_sqs[0].view(torch.int16).tolist() == expected


def test_random_bits_are_reproducible_and_keyed(any_ops):
    """The same for the same (seed, step, index); half of the choices differ for any other."""
    n = 20_000

    def rounded(seed=1, step=1.0, offset=0):
        problem = bf16_problem(n, 1.0, offset, seed=seed)
        problem.steps = [torch.tensor(step)]
        problem.update(any_ops)
        return problem.exp_avg_sqs[0]

    base = rounded()
    assert_same_bits(rounded(), base)
    up = (base == base.max()).double().mean().item()  # 0.999 lies between 0.99609375 and 1
    assert abs(up - 0.744) < 6 * (0.25 / n) ** 0.5
    independent = 2 * up * (1 - up)
    for other in (rounded(seed=2), rounded(seed=2**31 + 1), rounded(step=2.0), rounded(offset=1),
                  rounded(offset=2**32), rounded(offset=n)):  # fmt: skip
        differ = (other != base).double().mean().item()
        assert abs(differ - independent) < 6 * (0.25 / n) ** 0.5


def test_random_bits_look_random():
    """Each of the 32 bits is fair and independent of the next index, step and seed: within 6
    standard errors."""
    n = 1 << 17
    index = torch.arange(n)
    draws = [reference.hash_u32(index + d, s, t) for d, s, t in
             ((0, 3, 5), (1, 3, 5), (0, 4, 5), (0, 3, 6), (1 << 32, 3, 5))]  # fmt: skip
    limit = 6 * 0.5 / n**0.5
    for bit in range(32):
        first, *others = ((d >> bit & 1).double() for d in draws)
        assert abs(first.mean() - 0.5) < limit
        for other in others:
            assert abs((first != other).double().mean() - 0.5) < limit


def test_roundings_are_independent():
    """The 16 bits of an element, and those of its neighbour, and those of the other thing rounded."""
    n = 1 << 17
    index = torch.arange(n)
    draws = [reference.rounding_bits(i, 3, 5, parameter) for i in (index, index + 1) for parameter in
             (False, True)]  # fmt: skip
    limit = 6 * 0.5 / n**0.5
    assert all(d.min() >= 0 and d.max() < 1 << 16 for d in draws)
    for bit in range(16):
        first, *others = ((d >> bit & 1).double() for d in draws)
        assert abs(first.mean() - 0.5) < limit
        for other in others:
            assert abs((first != other).double().mean() - 0.5) < limit


def test_first_moments_round_to_nearest(any_ops):
    """Only second moments are rounded stochastically."""
    n = 1000
    problem = bf16_problem(n, 0.0)
    problem.exp_avgs = [torch.ones(n, dtype=BF16)]
    problem.update(any_ops)
    assert problem.exp_avgs[0].unique().tolist() == [torch.tensor(0.9).to(BF16).item()]


# --------------------------------------------------------------------------- functional API


BACKENDS = pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])


@BACKENDS
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("inactive", ["update", "rank"])
@pytest.mark.parametrize("selection", ["exact", "approx"])
def test_functional_api_is_the_operators(generator, backend, order, inactive, selection):
    g = [values(n, ("normal", "zero"), BF16, generator) for n in (100, 0, 37)]
    m = None if order == "first" else [values(t.numel(), ("normal",), FLOAT, generator) for t in g]
    options = {"upper": 0.6, "lower": 0.1, "beta1": 0.5, "inactive": inactive}
    options |= {"selection": selection, "inv_scale": torch.tensor(0.5)}
    found = rose_ops.select_threshold(g, m, **options, backend=backend)
    masks, again = rose_ops.capture_mask(g, m, **options, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    problem = Problem.of(
        g, m, (0.5, *ROSE[1:]), inv_scale=torch.tensor(0.5), rank_inactive=inactive == "rank"
    )
    first, approx = order == "first", selection == "approx"
    record = problem.select(reference, 600_000_000, 100_000_000, first=first, approx=approx)
    assert found.threshold.view(torch.int32) == record[Field.HIGH]
    assert [found.kept, found.ranked, found.inactive, found.nonfinite] == record[2:6].tolist()
    assert_all_same_bits(masks, problem.capture(reference, record, first=first), "masks")


@BACKENDS
def test_functional_threshold_of_nothing(backend):
    found = rose_ops.select_threshold([torch.zeros(5)], backend=backend)
    assert found.threshold.isnan()
    assert (found.kept, found.ranked, found.inactive) == (0, 0, 5)
    assert rose_ops.select_threshold([], backend=backend).ranked == 0


@BACKENDS
@pytest.mark.parametrize("granularity", ["element", "tensor"])
def test_functional_capture_of_an_empty_list(backend, granularity):
    masks, found = rose_ops.capture_mask([], granularity=granularity, backend=backend)
    assert masks == []
    assert found.ranked == 0


@BACKENDS
def test_functional_tensor_granularity(generator, backend):
    """Frobenius norms, kept where lower <= r <= upper quantile; bool masks speak for all."""
    g = [torch.full((n,), n**-0.5 * k) for k, n in ((3.0, 4), (1.0, 9), (2.0, 16), (4.0, 1))]
    masks, found = rose_ops.capture_mask(g, upper=0.6, granularity="tensor", backend=backend)
    assert [bool(m) for m in masks] == [False, True, True, False]  # quantile 0.6: 2.8
    assert (found.kept, found.ranked) == (2, 4)
    p, m, v = ([torch.ones(t.shape) for t in g] for _ in range(3))
    counts = rose_ops.rose_adamw_(
        p, g, m, v, [torch.zeros(()) for _ in g], first_masks=masks, backend=backend
    )
    assert (counts.updated, counts.nonfinite) == (25, 0)
    assert [bool((t == 1).all()) for t in p] == [True, False, False, True]


@BACKENDS
def test_functional_update_is_the_operator(generator, backend):
    problem = training_problem(generator, n=300, gamma=0.3, seed=5)
    expected = problem.copy()
    first = problem.masks(reference, 500_000_000, first=True)
    second = problem.masks(reference, 600_000_000)
    row = (0.8, 0.99, 1e-6, 0.1, -1.0, 1.0)
    expected.hyper, expected.lr = hyper_table(row), torch.tensor([0.1], dtype=torch.float64)
    expected.inv_scale = torch.tensor(0.25)
    counts = expected.update(reference, first, second)
    got = rose_ops.rose_adamw_(
        problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_sqs, problem.steps,
        first_masks=first, second_masks=second, lr=0.1, betas=(0.8, 0.99), eps=1e-6,
        weight_decay=0.1, gamma=0.3, maximize=True, inv_scale=torch.tensor(0.25), seed=5,
        backend=backend,
    )  # fmt: skip
    assert [got.updated, got.nonfinite] == counts.tolist()
    assert_all_same_bits(problem.exp_avgs, expected.exp_avgs, "exp_avgs")
    assert_all_same_bits(problem.exp_avg_sqs, expected.exp_avg_sqs, "exp_avg_sqs")
    torch.testing.assert_close(problem.params, expected.params, rtol=1e-6, atol=1e-7)


@BACKENDS
def test_functional_api_takes_tensors_that_require_gradients(generator, backend):
    """Parameters as they are: nothing is recorded, and autograd knows what was overwritten."""
    p = torch.ones(9).requires_grad_()
    (p * p).sum().backward(retain_graph=True)
    m, v = torch.ones(9), torch.ones(9)
    masks, found = rose_ops.capture_mask([p], [m], granularity="tensor", backend=backend)
    assert not any(t.requires_grad for t in (*masks, *found))
    loss = (p * p).sum()
    rose_ops.rose_adamw_([p], [p.grad], [m], [v], [torch.zeros(())], backend=backend)
    assert p.grad_fn is None
    # As after a step of torch.optim.AdamW: the graph above holds the old p.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"upper": 0.0}, ValueError, "upper=0.0 (float); expected 0 < upper <= 1"),
        ({"upper": 1.5}, ValueError, "upper=1.5 (float); expected 0 < upper <= 1"),
        ({"upper": math.nan}, ValueError, "upper=nan"),
        ({"upper": math.inf}, ValueError, "upper=inf"),
        ({"upper": 0.4e-9}, ValueError, "in units of 1e-9"),
        ({"upper": 0.5, "lower": 0.5}, ValueError, "lower=0.5 (float); expected 0 <= lower < upper"),
        ({"lower": -0.1}, ValueError, "lower=-0.1"),
        ({"inactive": "keep"}, ValueError, "inactive='keep'"),
        ({"selection": "best"}, ValueError, "selection='best'"),
        ({"granularity": "row"}, ValueError, "granularity='row'"),
        ({"backend": "magic"}, ValueError, "backend='magic'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_functional_api_refuses(options, error, words):
    with pytest.raises(error) as caught:
        rose_ops.capture_mask([torch.ones(3)], **options)
    assert words in str(caught.value)


def test_masks_of_capture_share_one_allocation_and_no_bit(any_ops, generator):
    """Masks of neighbours start at bytes of their own, and bits past the end are 0."""
    problem = Problem.of([values(n, ("normal",), FLOAT, generator) for n in (3, 9, 1, 8, 0, 13)])
    masks = random_masks(problem.numels)
    record = problem.select(any_ops, ONE, first=True)
    problem.rank(any_ops, masks, record, problem.ranking(Mode.GIVEN), first=True)
    assert [m.tolist() for m in masks] == [[7], [255, 1], [1], [255], [], [255, 31]]
