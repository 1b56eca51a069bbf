"""The operators as PyTorch sees them: ``opcheck``, tensor subclasses, and bad input."""

from __future__ import annotations

import math
import re

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
    bits,
    hyper_table,
    place,
    random_masks,
    tensor_norms,
    values,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from rose_ops import reference
from rose_ops._ops import OPERATORS
from rose_ops.definitions import Field, Mode

rose = torch.ops.rose_ops

# ----------------------------------------------------------------------------------- opcheck


def problem_of(generator, dtype=FLOAT, moment=FLOAT, row=ROSE, **options) -> Problem:
    """Two tensors, one of them a view."""
    shapes = ((37,), (5, 9))

    def tensors(kind):
        flat = [values(math.prod(s), ("normal", "zero"), kind, generator) for s in shapes]
        return [flat[0], place(flat[1].view(5, 9), "transposed", offset=3)]

    p, g, m, v = (tensors(kind) for kind in (dtype, dtype, moment, moment))
    return Problem.of(g, m, row, params=p, exp_avg_sqs=[t.abs() for t in v], **options)


def ranking(mode: Mode, upper: int = 600_000_000, lower: int = 0) -> list[int]:
    return [int(mode), upper, lower, 0, 3]


def rank_args(p: Problem, mode: Mode, *, masks: bool, first=False):
    record = p.select(rose, 600_000_000, first=first) if mode == Mode.GIVEN else None
    return (
        random_masks(p.numels) if masks else [], p.grads, [] if first else p.exp_avgs, p.hyper, p.group,
        p.inv_scale, p.clip, record, ranking(mode),
    )  # fmt: skip


def step_args(p: Problem, mode: Mode | None = None, first=(), second=()):
    record = p.select(rose, 600_000_000) if mode == Mode.GIVEN else None
    return (
        p.params, p.grads, p.exp_avgs, p.exp_avg_sqs, p.steps, list(first), list(second), record, p.lr,
        p.hyper, p.group, p.offsets, p.inv_scale, p.clip, p.found_inf, 0.3,
        [] if mode is None else ranking(mode), [7, 1],
    )  # fmt: skip


def count_args(p: Problem, digits):
    return p.grads, p.exp_avgs, p.hyper, p.group, p.inv_scale, p.clip, False, digits


def sums_of(generator, n: int = 9):
    return torch.rand(n, generator=generator, dtype=torch.float64)


def select_tensors_args(generator, first: bool = False):
    problem, n = problem_of(generator), 9
    return (
        torch.zeros(n, dtype=torch.bool), sums_of(generator), None if first else sums_of(generator),
        problem.hyper, torch.zeros(n, dtype=torch.int64), torch.tensor([0.5, 0.5]) if first else None,
        600_000_000, 100_000_000, False,
    )  # fmt: skip


def _cases():
    """(operator, arguments from a generator), by name."""
    scale = torch.tensor(0.5)

    def masked(g):
        p = problem_of(g)
        masks = p.masks(rose, 500_000_000), p.masks(rose, ONE // 3, first=True)
        return step_args(p, None, *masks)

    def given(g):
        return step_args(problem_of(g, found_inf=torch.tensor(0.0)), Mode.GIVEN)

    def clipped(g):
        p = problem_of(g, BF16, clip=torch.tensor([0.5, 0.5]), found_inf=torch.tensor(0.0))
        return step_args(p, Mode.BRACKET, p.masks(rose, ONE // 3, first=True))

    def rank(mode, problem=problem_of, **options):
        return rose.rank_, lambda g: rank_args(problem(g), mode, **options)

    def scaled(g):
        return problem_of(g, inv_scale=scale)

    return {
        "rank_-second": rank(Mode.EXACT, masks=False),
        "rank_-first": rank(Mode.EXACT, scaled, masks=False, first=True),
        "rank_-approx": rank(Mode.APPROX, lambda g: problem_of(g, BF16), masks=False),
        "rank_-masks": rank(Mode.EXACT, masks=True),
        "rank_-masks-bracket": rank(Mode.BRACKET, masks=True, first=True),
        "rank_-masks-given": rank(Mode.GIVEN, lambda g: problem_of(g, HALF), masks=True, first=True),
        "step_-plain": (rose.step_, lambda g: step_args(problem_of(g, row=PLAIN))),
        "step_-bf16": (rose.step_, lambda g: step_args(problem_of(g, BF16, BF16, PLAIN))),
        "step_-masks": (rose.step_, masked),
        "step_-given": (rose.step_, given),
        "step_-exact": (rose.step_, lambda g: step_args(problem_of(g), Mode.EXACT)),
        "step_-bracket": (rose.step_, lambda g: step_args(problem_of(g), Mode.BRACKET)),
        "step_-bracket-clip": (rose.step_, clipped),
        "count_keys": (rose.count_keys, lambda g: count_args(problem_of(g), None)),
        "count_keys-digits": (rose.count_keys, lambda g: count_args(scaled(g), torch.tensor([3, 9]))),
        "sums_of_squares": (rose.sums_of_squares, lambda g: (problem_of(g).grads, None)),
        "sums_of_squares-scaled": (rose.sums_of_squares, lambda g: (problem_of(g, BF16).grads, scale)),
        "clip_factors": (rose.clip_factors, lambda g: (sums_of(g), 1.0)),
        "select_tensors_-second": (rose.select_tensors_, lambda g: select_tensors_args(g)),
        "select_tensors_-first": (rose.select_tensors_, lambda g: select_tensors_args(g, True)),
    }


CASES = _cases()


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "check",
    ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
)
def test_opcheck(generator, name, check):
    """All four of opcheck's tests apply to all operators."""
    op, arguments = CASES[name]
    result = torch.library.opcheck(op.default, arguments(generator), test_utils=check)
    assert result == {check: "SUCCESS"}


def test_what_is_written_is_what_the_schema_says():
    written = {
        name: [a.name for a in getattr(rose, name).default._schema.arguments if a.is_write]
        for name in OPERATORS
    }
    assert written == {
        "rank_": ["masks"],
        "step_": ["params", "exp_avgs", "exp_avg_sqs", "steps"],
        "count_keys": [],
        "sums_of_squares": [],
        "clip_factors": [],
        "select_tensors_": ["mask"],
    }


@pytest.mark.parametrize("name", CASES)
def test_fakes_have_the_shape_of_the_truth(generator, name):
    op, arguments = CASES[name]
    real = arguments(generator)
    with FakeTensorMode() as mode:

        def fake(x):
            if isinstance(x, list):
                return [fake(y) for y in x]
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        shown = op(*(fake(x) for x in real))
    actual = op(*real)
    assert (shown.shape, shown.dtype, shown.device) == (actual.shape, actual.dtype, actual.device)


def test_lazily_negated_gradients_are_read_as_what_they_are(ops):
    """The memory of such a tensor (``imag`` of a conjugate) holds the negated values."""
    lazy = torch.complex(torch.zeros(5), torch.arange(1.0, 6)).conj().imag
    assert lazy.is_neg()
    problem, plain = Problem.of([lazy], None, PLAIN), Problem.of([lazy.clone()], None, PLAIN)
    problem.update(ops)
    plain.update(ops)
    assert_all_same_bits(problem.written, plain.written, "written")
    assert (problem.exp_avgs[0] < 0).all()


# --------------------------------------------------------------------------------- bad input

N = 20


def good(**options) -> Problem:
    generator = torch.Generator().manual_seed(1)
    p, g, m, v = ([values(N, ("normal",), FLOAT, generator) for _ in range(3)] for _ in range(4))
    return Problem.of(g, m, params=p, exp_avg_sqs=[t.abs() for t in v], **options)


def set_item(name: str, value):
    def change(p: Problem) -> None:
        getattr(p, name)[1] = value

    return change


def set_field(name: str, value):
    def change(p: Problem) -> None:
        setattr(p, name, value() if callable(value) else value)

    return change


def drop(name: str):
    return lambda p: getattr(p, name).pop()


def _meta(*shape, dtype=FLOAT):
    return torch.empty(shape, dtype=dtype, device="meta")


# What is wrong with the risks' arguments: what to change, and words of the message.
BAD_RISKS = {
    "grad-shape": (set_item("exp_avgs", torch.zeros(N + 1)), "exp_avgs[1] and grads[1]"),
    "grad-dims": (set_item("exp_avgs", torch.zeros(1, N)), "exp_avgs[1] and grads[1]"),
    "grad-float64": (set_item("grads", torch.zeros(N, dtype=torch.float64)), "grads[1] has dtype"),
    "grad-int": (set_item("grads", torch.zeros(N, dtype=torch.int32)), "grads[1] has dtype"),
    "grad-bool": (set_item("grads", torch.zeros(N, dtype=torch.bool)), "grads[1] has dtype"),
    "grad-complex": (set_item("grads", torch.zeros(N, dtype=torch.cfloat)), "grads[1] has dtype"),
    "moment-float64": (set_item("exp_avgs", torch.zeros(N).double()), "exp_avgs[1] has dtype"),
    "fewer-grads": (drop("grads"), "exp_avgs has 3 tensors and grads has 2"),
    "fewer-moments": (drop("exp_avgs"), "exp_avgs has 2 tensors and grads has 3"),
    "grad-meta": (set_item("grads", _meta(N)), "grads[1]"),
    "moment-meta": (set_item("exp_avgs", _meta(N)), "exp_avgs[1]"),
    "hyper-float32": (set_field("hyper", hyper_table(ROSE).float()), "hyper must be"),
    "hyper-columns": (set_field("hyper", torch.ones(7).double()), "hyper must be"),
    "hyper-strided": (set_field("hyper", torch.ones(12).double()[::2]), "hyper must be"),
    "hyper-meta": (set_field("hyper", _meta(1, 6, dtype=torch.float64)), "hyper"),
    "group-int32": (set_field("group", torch.zeros(3, dtype=torch.int32)), "group must be"),
    "group-short": (set_field("group", torch.zeros(2, dtype=torch.int64)), "group must be"),
    "group-meta": (set_field("group", _meta(3, dtype=torch.int64)), "group"),
    "group-too-large": (set_field("group", torch.tensor([0, 1, 0])), "group[1] is 1"),
    "group-negative": (set_field("group", torch.tensor([0, 0, -1])), "group[2] is -1"),
    "inv_scale-float64": (set_field("inv_scale", torch.ones(()).double()), "inv_scale must be"),
    "inv_scale-two": (set_field("inv_scale", torch.ones(2)), "inv_scale must be"),
    "inv_scale-meta": (set_field("inv_scale", _meta()), "inv_scale"),
}  # fmt: skip

ERRORS = (RuntimeError, NotImplementedError)


def tensors_of(problem: Problem) -> list[torch.Tensor]:
    kept = [*problem.grads, *problem.written, *problem.steps]
    return [t for t in kept if t.device.type == "cpu" and not t.is_complex()]


def assert_plain(message: str) -> None:
    """No path of a source, no function, no line: the text alone."""
    assert "/" not in message
    assert not re.search(r"\.(cpp|h|cu|cuh|py)\b", message)
    assert re.match(r"(expected|both|[\w.\[\]]+ (has|is|and|must)) ", message), message


def assert_refused(problem: Problem, call, words: str, written=()) -> None:
    """The error names what is wrong, and nothing has changed."""
    watched = [*tensors_of(problem), *written]
    before = [bits(t).clone() for t in watched]
    with pytest.raises(ERRORS) as caught:
        call()
    assert words in str(caught.value)
    assert_plain(str(caught.value))
    for old, new in zip(before, watched, strict=True):
        assert torch.equal(old, bits(new))


@pytest.mark.parametrize("name", BAD_RISKS)
def test_select_refuses(ops, name):
    problem = good()
    change, words = BAD_RISKS[name]
    change(problem)
    assert_refused(problem, lambda: problem.select(ops, 600_000_000), words)


@pytest.mark.parametrize(
    ("upper", "lower"),
    [(0, 0), (-1, 0), (ONE + 1, 0), (500, 500), (500, 501), (500, -1)],
    ids=str,
)
def test_select_refuses_fractions(ops, upper, lower):
    problem = good()
    assert_refused(problem, lambda: problem.select(ops, upper, lower), "expected 0 <= lower < upper")


def call_capture(ops, problem, masks, record):
    problem.rank(ops, masks, record, problem.ranking(Mode.GIVEN))


BAD_TENSORS = {
    "mask-uint8": (0, torch.zeros(9, dtype=torch.uint8), "mask must be"),
    "mask-short": (0, torch.zeros(8, dtype=torch.bool), "sums must be"),
    "sums-float32": (1, torch.zeros(9), "sums must be"),
    "sums-strided": (1, torch.zeros(18, dtype=torch.float64)[::2], "sums must be"),
    "moments-short": (2, torch.zeros(8, dtype=torch.float64), "exp_avg_sums must be"),
    "hyper-float32": (3, torch.zeros(1, 6), "hyper must be"),
    "group-short": (4, torch.zeros(8, dtype=torch.int64), "group must be"),
    "group-too-large": (4, torch.ones(9, dtype=torch.int64), "group[0] is 1"),
    "clip-three": (5, torch.ones(3), "clip must be"),
    "upper": (6, ONE + 1, "expected 0 <= lower < upper"),
    "lower": (7, 600_000_000, "expected 0 <= lower < upper"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_select_tensors_refuses(ops, generator, name):
    at, value, words = BAD_TENSORS[name]
    arguments = list(select_tensors_args(generator))
    arguments[at] = value
    with pytest.raises(ERRORS, match=re.escape(words)) as caught:
        ops.select_tensors_(*arguments)
    assert_plain(str(caught.value))
    assert not arguments[0].any()


def test_clip_factors_refuses(ops):
    with pytest.raises(ERRORS, match="sums must be") as caught:
        ops.clip_factors(torch.zeros(3), 1.0)
    assert_plain(str(caught.value))


@pytest.mark.parametrize("name", BAD_RISKS)
def test_capture_refuses(ops, name):
    problem = good()
    record, masks = problem.select(ops, 600_000_000), random_masks([N] * 3)
    change, words = BAD_RISKS[name]
    change(problem)
    assert_refused(problem, lambda: call_capture(ops, problem, masks, record), words, masks)


def _record(*, dtype=torch.int64, size=8):
    return torch.zeros(size, dtype=dtype)


BAD_MASKS = {
    "fewer": (lambda: random_masks([N] * 2), _record(), "masks has 2"),
    "more": (lambda: random_masks([N] * 4), _record(), "masks has 4"),
    "short": (lambda: random_masks([N, N, 8]), _record(), "masks must be"),
    "long": (lambda: random_masks([N, N, 40]), _record(), "masks must be"),
    "bool": (lambda: [torch.zeros(3, dtype=torch.bool)] * 3, _record(), "masks must be"),
    "int8": (lambda: [torch.zeros(3, dtype=torch.int8)] * 3, _record(), "masks must be"),
    "strided": (lambda: [torch.zeros(6, dtype=torch.uint8)[::2]] * 3, _record(), "masks must be"),
    "meta": (lambda: [*random_masks([N] * 2), _meta(3, dtype=torch.uint8)], _record(), "masks"),
    "none": (list, _record(), "masks has 0"),
    "record-int32": (lambda: random_masks([N] * 3), _record(dtype=torch.int32), "record must"),
    "record-short": (lambda: random_masks([N] * 3), _record(size=7), "record must be"),
    "record-meta": (lambda: random_masks([N] * 3), _meta(8, dtype=torch.int64), "record"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_capture_refuses_masks(ops, name):
    problem = good()
    masks, record, words = BAD_MASKS[name]
    masks = masks()
    watched = [m for m in masks if m.device.type == "cpu"]
    assert_refused(problem, lambda: call_capture(ops, problem, masks, record), words, watched)


def _expanded():
    return torch.zeros(1).expand(N)


BAD_UPDATES = {
    "params-shape": (set_item("params", torch.zeros(N + 1)), "grads[1] and params[1]"),
    "params-float64": (set_item("params", torch.zeros(N).double()), "params[1] has dtype"),
    "params-int": (set_item("params", torch.zeros(N, dtype=torch.int64)), "params[1] has dtype"),
    "params-expanded": (set_item("params", _expanded()), "params[1] is an expanded tensor"),
    "params-meta": (set_item("params", _meta(N)), "params[1]"),
    "moment-expanded": (set_item("exp_avgs", _expanded()), "exp_avgs[1] is an expanded tensor"),
    "square-expanded": (set_item("exp_avg_sqs", _expanded()), "exp_avg_sqs[1] is an expanded"),
    "square-shape": (set_item("exp_avg_sqs", torch.zeros(N, 1)), "exp_avg_sqs[1] and params[1]"),
    "square-float64": (set_item("exp_avg_sqs", torch.ones(N).double()), "exp_avg_sqs[1] has dtype"),
    "square-meta": (set_item("exp_avg_sqs", _meta(N)), "exp_avg_sqs[1]"),
    "fewer-params": (drop("params"), "grads has 3 tensors and params has 2"),
    "fewer-squares": (drop("exp_avg_sqs"), "exp_avg_sqs has 2 tensors and params has 3"),
    "fewer-steps": (drop("steps"), "steps has 2"),
    "step-float64": (set_item("steps", torch.zeros(()).double()), "steps must be"),
    "step-int": (set_item("steps", torch.zeros((), dtype=torch.int64)), "steps must be"),
    "step-two": (set_item("steps", torch.zeros(2)), "steps must be"),
    "step-meta": (set_item("steps", _meta()), "steps"),
    "lr-float32": (set_field("lr", torch.ones(1)), "lr must be"),
    "lr-two": (set_field("lr", torch.ones(2).double()), "lr must be"),
    "lr-meta": (set_field("lr", _meta(1, dtype=torch.float64)), "lr"),
    "offsets-int32": (set_field("offsets", torch.zeros(3, dtype=torch.int32)), "offsets must be"),
    "offsets-short": (set_field("offsets", torch.zeros(2, dtype=torch.int64)), "offsets must be"),
    "offsets-meta": (set_field("offsets", _meta(3, dtype=torch.int64)), "offsets"),
    "found_inf-int": (set_field("found_inf", torch.tensor(0)), "found_inf must be"),
    "found_inf-two": (set_field("found_inf", torch.zeros(2)), "found_inf must be"),
    "found_inf-meta": (set_field("found_inf", _meta()), "found_inf"),
}  # fmt: skip
for _name in ("grad-float64", "grad-int", "moment-float64", "hyper-float32", "hyper-columns",
              "hyper-meta", "group-int32", "group-short", "group-too-large", "group-negative",
              "group-meta", "inv_scale-float64", "inv_scale-two", "inv_scale-meta", "grad-meta",
              "moment-meta"):  # fmt: skip
    BAD_UPDATES[_name] = BAD_RISKS[_name]


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_update_refuses(ops, name):
    problem = good()
    change, words = BAD_UPDATES[name]
    change(problem)
    assert_refused(problem, lambda: problem.update(ops, random_masks([N] * 3)), words)


MASKS_OF_UPDATE = {
    "fewer": ([N, N], torch.uint8, "has 2 tensors"),
    "more": ([N] * 4, torch.uint8, "has 4 tensors"),
    "short": ([N, N, 8], torch.uint8, "must be"),
    "long": ([N, N, 64], torch.uint8, "must be"),
    "float": ([N, N, N], torch.float32, "must be"),
    "bool-bits": ([N, N, N], torch.bool, "must be"),
}


@pytest.mark.parametrize("kind", ["first_masks", "second_masks"])
@pytest.mark.parametrize("name", MASKS_OF_UPDATE)
def test_update_refuses_masks(ops, kind, name):
    problem = good()
    sizes, dtype, words = MASKS_OF_UPDATE[name]
    masks = [m.to(dtype) for m in random_masks(sizes)]
    arguments = (masks, ()) if kind == "first_masks" else ((), masks)
    with pytest.raises(ERRORS, match=kind):
        problem.update(ops, *arguments)
    assert_refused(problem, lambda: problem.update(ops, *arguments), words)


@pytest.mark.parametrize("kind", ["first_masks", "second_masks"])
def test_update_refuses_masks_elsewhere(ops, kind):
    problem = good()
    masks = [*random_masks([N, N]), _meta(3, dtype=torch.uint8)]
    arguments = (masks, ()) if kind == "first_masks" else ((), masks)
    assert_refused(problem, lambda: problem.update(ops, *arguments), kind)


@pytest.mark.parametrize(
    "record", [_record(size=7), _record(dtype=torch.int32), _meta(8, dtype=torch.int64)],
    ids=["short", "int32", "meta"],
)  # fmt: skip
def test_update_refuses_selections(ops, record):
    problem = good()
    assert_refused(problem, lambda: problem.update(ops, selection=record), "record")


@pytest.mark.parametrize("mode", Mode)
def test_update_refuses_two_second_order_masks(ops, mode):
    problem, record = good(), _record() if mode == Mode.GIVEN else None
    masks = random_masks([N] * 3)
    assert_refused(
        problem, lambda: problem.step(ops, (), masks, record, ranking(mode)),
        "both record and second_masks are given",
    )  # fmt: skip


BAD_RANKINGS = {
    "short": ([1, ONE, 0, 0], False, "ranking has 4 numbers; expected"),
    "long": ([1, ONE, 0, 0, 0, 0], False, "ranking has 6 numbers; expected"),
    "mode": ([4, ONE, 0, 0, 0], False, "ranking[0] is 4; expected a mode"),
    "mode-negative": ([-1, ONE, 0, 0, 0], False, "ranking[0] is -1; expected a mode"),
    "fractions": ([2, 5, 5, 0, 0], False, "expected 0 <= lower < upper"),
    "given-without-record": ([0] * 5, False, "record is not given; expected it with"),
    "record-and-exact": ([1, ONE, 0, 0, 0], True, "record is given; expected it with"),
}


@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_what_is_no_ranking_is_refused(ops, name):
    numbers, has_record, words = BAD_RANKINGS[name]
    problem, record = good(), _record() if has_record else None
    assert_refused(problem, lambda: problem.step(ops, (), (), record, numbers), words)
    masks = problem.random_masks()
    assert_refused(problem, lambda: problem.rank(ops, masks, record, numbers), words, masks)


def test_what_there_must_be_is_asked_for(ops):
    problem = good()
    words = "ranking has 0 numbers; expected mode"
    assert_refused(problem, lambda: problem.rank(ops, [], None, []), words)
    words = "record is given; expected it with"
    assert_refused(problem, lambda: problem.step(ops, (), (), _record(), []), words)
    problem.hyper = hyper_table(PLAIN)
    arguments = [*step_args(problem)[:-1], [7]]
    words = "rounding has 1 numbers; expected seed and stochastic"
    assert_refused(problem, lambda: ops.step_(*arguments), words)


def test_update_refuses_a_selective_group_without_a_mask(ops):
    problem = good(hyper=hyper_table(PLAIN, ROSE), lr=torch.ones(2), group=torch.tensor([0, 0, 1]))
    assert_refused(problem, lambda: problem.update(ops), "params[2] is selective")


@pytest.mark.parametrize("kind", ["float64", "int", "meta"])
def test_norms_refuse(ops, kind):
    bad = {
        "float64": torch.zeros(3).double(), "int": torch.zeros(3, dtype=torch.int64),
        "meta": _meta(3),
    }[kind]  # fmt: skip
    with pytest.raises(ERRORS, match=r"tensors\[1\]") as caught:
        tensor_norms(ops, [torch.zeros(3), bad], None)
    assert_plain(str(caught.value))
    with pytest.raises(ERRORS, match="inv_scale") as caught:
        tensor_norms(ops, [torch.zeros(3)], torch.ones(2))
    assert_plain(str(caught.value))


def test_all_inputs_on_meta_give_fakes_only():
    """Wholly on the meta device the operators say shapes, as torch's own do."""
    p = good()
    args = [[_meta(N)] * 3, [_meta(N)] * 3, p.hyper.to("meta"), p.group.to("meta")]
    record = rose.rank_([], *args, None, None, None, ranking(Mode.EXACT))
    assert (record.shape, record.dtype, record.device.type) == ((8,), torch.int64, "meta")


def test_a_gradient_may_be_expanded_and_moments_may_not(ops):
    """Reading is fine however elements share memory."""
    g = torch.tensor([[2.0], [3.0]]).expand(2, 7)
    problem = Problem.of([g])
    record = problem.select(ops, 500_000_000, first=True)
    assert record[Field.RANKED] == 14
    (mask,) = problem.capture(ops, record, first=True)
    expected = torch.tensor([True] * 7 + [False] * 7)
    assert torch.equal(reference.unpack(mask, 14), expected)
    problem.update(ops, [mask])
    assert_same_bits(problem.params[0] != 1, expected.view(2, 7))
