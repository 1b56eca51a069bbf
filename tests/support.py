"""Builders, layouts and comparisons that the tests of the operators share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rose_ops import definitions, portable, reference
from rose_ops._ops import bracket_width
from rose_ops.definitions import Field, Hyper, Mode

T = TypeVar("T")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ONE = definitions.FRACTION_UNIT
FLT_MAX = torch.finfo(FLOAT).max
U = 2.0**-24  # unit roundoff of float32
WIDTH = 1 + 2.0**-40  # of brackets: as in use, but however little data there is

# ------------------------------------------------------------------------------------------ values

_MANTISSA = {FLOAT: 23, BF16: 7, HALF: 10}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _random_bits(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 1 << 32, (n,), generator=generator)


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    width = 16 if dtype != FLOAT else 32
    sign_extended = ((bits & ((1 << width) - 1)) ^ (1 << (width - 1))) - (1 << (width - 1))
    return sign_extended.to(_INTEGER[width // 8]).view(dtype)


def _of_exponent(kind: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random sign and mantissa; exponent random (finite), zero (denormals) or the largest."""
    mantissa = _MANTISSA[dtype]
    exponents = (1 << (15 - mantissa if dtype != FLOAT else 8)) - 1
    bits = _random_bits(n, generator)
    low, sign = bits & ((1 << mantissa) - 1), bits >> 31
    exponent = {
        "wide": torch.randint(0, exponents, (n,), generator=generator),
        "denormal": torch.zeros(n, dtype=torch.int64),
        "huge": torch.full((n,), exponents - 1),
        "smallest": torch.zeros(n, dtype=torch.int64),
    }[kind]
    if kind == "smallest":  # 1 to 3 units of the denormals
        low = low % 3 + 1
    width = 16 if dtype != FLOAT else 32
    return _from_bits(sign << (width - 1) | exponent << mantissa | low, dtype)


def values(n: int, mix: Sequence[str], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """n numbers, each of a kind drawn from ``mix`` (see KINDS)."""
    out = torch.empty(n, dtype=dtype)
    which = torch.randint(0, len(mix), (n,), generator=generator)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    for i, kind in enumerate(mix):
        if kind in ("wide", "denormal", "huge", "smallest"):
            new = _of_exponent(kind, n, dtype, generator)
        elif kind == "underflow":  # alpha times these is denormal or zero in float32
            new = _from_bits(_random_bits(n, generator) % 64 + (1 << _MANTISSA[dtype]), dtype)
        elif kind == "normal":
            new = torch.randn(n, generator=generator).to(dtype)
        elif kind == "ties":
            few = torch.tensor([0.25, 0.5, 1.0, 2.0])
            new = (few[torch.randint(0, 4, (n,), generator=generator)] * signs).to(dtype)
        else:
            constant = {"zero": 0.0, "one": 1.0, "nan": torch.nan, "inf": torch.inf}[kind]
            new = (constant * signs).to(dtype)
        out = torch.where(which == i, new, out)
    return out


KINDS = (
    "normal", "wide", "denormal", "smallest", "underflow", "huge", "zero", "one", "ties", "nan",
    "inf",
)  # fmt: skip

# ----------------------------------------------------------------------------------------- layouts

LAYOUTS = ("contiguous", "offset", "strided", "transposed", "channels_last", "padded", "size1")


def _row_major(shape: Sequence[int], inner: int = 1, pad: int = 0) -> list[int]:
    strides, step = [], inner
    for i, size in enumerate(reversed(shape)):
        strides.append(step)
        step *= size + (pad if i == 0 else 0)
    return strides[::-1]


def layout_strides(shape: Sequence[int], layout: str) -> list[int]:
    """Strides of a tensor without overlap."""
    dims = len(shape)
    if layout == "transposed":
        return _row_major(shape[::-1])[::-1]
    if layout == "channels_last" and dims >= 3:  # the second dimension is the innermost one
        order = [0, *range(2, dims), 1]
        strides = _row_major([shape[d] for d in order])
        return [strides[order.index(d)] for d in range(dims)]
    if layout == "strided":
        return _row_major(shape, inner=2)
    if layout == "padded":
        return _row_major(shape, pad=3)
    strides = _row_major(shape)
    if layout == "size1":  # PyTorch allows any stride there, and kernels trip over it
        strides = [997 if size == 1 else s for size, s in zip(shape, strides, strict=True)]
    return strides


def place(data: Tensor, layout: str = "contiguous", offset: int = 0) -> Tensor:
    """``data`` inside a larger poisoned buffer, in a layout and from an odd ``offset`` on."""
    strides = layout_strides(data.shape, layout)
    last = sum((size - 1) * s for size, s in zip(data.shape, strides, strict=True) if size > 1)
    size = offset + (last + 1 if data.numel() else 0) + 5
    buffer = torch.full((size * data.element_size(),), 0xA5, dtype=torch.uint8).view(data.dtype)
    view = buffer.as_strided(tuple(data.shape), strides, offset)
    view.copy_(data)
    return view


def cut(data: Tensor, ends: Sequence[int] | Tensor, operand: int = 0) -> list[Tensor]:
    """``data`` as tensors: two of three are views that are not contiguous, for each operand others. One
    alone is contiguous."""
    layouts, parts = ("contiguous", "offset", "strided"), data.tensor_split(ends)
    return [
        place(t, layouts[(i + operand) % 3 if len(parts) > 1 else 0], offset=i % 2)
        for i, t in enumerate(parts)
    ]


def expand(data: Tensor) -> Tensor:
    """Its first row (or element) for all: a view whose elements share memory."""
    if data.dim() == 0 or data.numel() == 0:
        return data
    return data[:1].clone().expand(data.shape)


def surroundings(view: Tensor) -> Tensor:
    """The bits of a view's storage but for its own elements."""
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).clone()
    storage.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return storage.view(_INTEGER[view.element_size()])


# -------------------------------------------------------------------------------------- comparison


def bits(x: Tensor) -> Tensor:
    """The bits of every element, row-major; NaNs are all one, their payload means nothing."""
    if not x.is_floating_point():
        return x.contiguous().reshape(-1)
    x = torch.where(x.isnan(), torch.full((), torch.nan, dtype=x.dtype), x).contiguous()
    return x.view(_INTEGER[x.element_size()]).reshape(-1)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    wrong = (bits(actual) != bits(expected)).nonzero().reshape(-1)
    if len(wrong):
        i = wrong[:8]
        raise AssertionError(
            f"{what}: {len(wrong)} of {actual.numel()} differ, at {i.tolist()}: "
            f"{actual.reshape(-1)[i].tolist()} instead of {expected.reshape(-1)[i].tolist()}"
        )


def assert_all_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, e, f"{what}[{i}]")


def ulp(x: Tensor, dtype: torch.dtype = FLOAT) -> Tensor:
    """Distance of the neighbours of |x| in ``dtype``, as float64: the unit that errors count in."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full(x.shape, info.eps, dtype=torch.float64), exponent - 1)


def digest(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(bits(tensor).numpy().tobytes())
    return sha.hexdigest()


# ------------------------------------------------------------------------------------ other devices


class OnDevice:
    """Operators of a device for tensors on the CPU: storages go there, as they are, and come back."""

    TABLES = ("hyper", "group", "offsets", "lr")  # stay on the CPU

    def __init__(self, ops: Any, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._ops, name)
        arguments = [a.name for a in getattr(torch.ops.rose_ops, name).default._schema.arguments]

        def call(*args: Any) -> Any:
            storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

            def move(x: Any) -> Any:
                if isinstance(x, (list, tuple)):
                    return [move(t) for t in x]
                if not isinstance(x, Tensor) or x.is_meta:
                    return x
                here = x.untyped_storage()
                last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                if x.numel() and (x.storage_offset() + last + 1) * x.element_size() > here.nbytes():
                    buffer = torch.empty(
                        x.storage_offset() + last + 1, dtype=x.dtype, device=self._device
                    )
                    moved = buffer.as_strided(x.shape, x.stride(), x.storage_offset())
                    moved.untyped_storage().resize_(here.nbytes())  # as too small as it is here
                    return moved
                if here.data_ptr() not in storages:
                    there = torch.UntypedStorage(here.nbytes(), device=self._device)
                    there.copy_(here)
                    storages[here.data_ptr()] = here, there
                there = storages[here.data_ptr()][1]
                moved = torch.empty(0, dtype=x.dtype, device=self._device).set_(there)
                moved = moved.as_strided(x.shape, x.stride(), x.storage_offset())
                return moved._neg_view() if x.is_neg() else moved

            moved = [
                x if key in self.TABLES else move(x) for key, x in zip(arguments, args, strict=True)
            ]
            try:
                result = op(*moved)
            finally:  # what a failed call has written is to be seen, too
                for here, there in storages.values():
                    here.copy_(there)
            return result.cpu() if isinstance(result, Tensor) else result

        return call


def fewer(ops: Any, usual: int, interpreted: int, simulated: int | None = None) -> int:
    """``usual``, or ``interpreted`` where that is how ops run, thousands of times slower; on the
    simulated device, hundreds of times slower, ``simulated`` if given."""
    if getattr(ops, "INTERPRETED", False):
        return interpreted
    return simulated if simulated is not None and is_simulated(ops) else usual


def is_simulated(ops: Any) -> bool:
    return getattr(ops, "name", "") == "rose_simt"


def some(ops: Any, cases: Sequence[T], generator: torch.Generator, count: int = 3) -> Sequence[T]:
    """All cases; on the simulated device the first one and others that are drawn in every run."""
    if not is_simulated(ops):
        return cases
    others = torch.randperm(len(cases) - 1, generator=generator)[: count - 1] + 1
    return [cases[i] for i in (0, *others.tolist())]


class Truth:
    """The reference's records of one problem for any fractions: its keys are sorted once."""

    def __init__(self, problem: Problem, *, first: bool) -> None:
        self.keys = keys_of(problem, first=first, everything=True)
        keys = torch.cat([torch.empty(0, dtype=torch.int64), *self.keys])
        self._ranked = keys[keys < reference.INACTIVE_KEY].int().sort().values.long()
        rest = (keys == key for key in (reference.INACTIVE_KEY, reference.NONFINITE_KEY))
        self._rest = [int(at.sum()) for at in rest]

    def select(self, *fractions: int) -> list[int]:
        ranks = (reference.rank_of(fraction, len(self._ranked)) for fraction in fractions)
        high, low = (int(self._ranked[k - 1]) if k else -1 for k in ranks)
        kept = torch.searchsorted(self._ranked, torch.tensor([low, high]), right=True).diff()
        return [high, low, max(int(kept), 0), len(self._ranked), *self._rest, 0, 0]

    def capture(self, record: Tensor) -> list[Tensor]:
        return [reference.pack(reference.is_selected(key, record)) for key in self.keys]


# ---------------------------------------------------------------------------------------- problems


def hyper_table(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(Hyper))


PLAIN = (0.9, 0.999, 1e-8, 1e-2, 1.0, 0.0)  # a group that is not selective
ROSE = (0.9, 0.999, 1e-8, 1e-2, 1.0, 1.0)


def random_masks(numels: Iterable[int], device: torch.device | None = None) -> list[Tensor]:
    """Where masks are to be written, with random bytes in it, so that stale bits show."""
    return [torch.randint(0, 256, ((n + 7) // 8,), dtype=torch.uint8, device=device) for n in numels]


@dataclass
class Problem:
    """The arguments of the operators, and how to call them."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    hyper: Tensor
    group: Tensor
    lr: Tensor
    offsets: Tensor
    inv_scale: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None
    gamma: float = 0.5
    rank_inactive: bool = False
    seed: int = 0
    stochastic: bool = False

    @classmethod
    def of(
        cls,
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor] | None = None,
        row: Sequence[float] = ROSE,
        lr: float | Tensor = 1e-2,
        **options: Any,
    ) -> Problem:
        """One group, parameters of one and moments of zero unless given."""
        sizes = torch.tensor([g.numel() for g in grads], dtype=torch.int64)

        def constant(value: float) -> list[Tensor]:
            return [torch.full(g.shape, value) for g in grads]

        if "params" not in options:
            options["params"] = constant(1.0)
        if "exp_avg_sqs" not in options:
            options["exp_avg_sqs"] = constant(0.0)
        rest: dict[str, Any] = {
            "exp_avgs": constant(0.0) if exp_avgs is None else list(exp_avgs),
            "steps": [torch.zeros(()) for _ in grads],
            "hyper": hyper_table(row),
            "group": torch.zeros(len(grads), dtype=torch.int64),
            "lr": torch.as_tensor(lr, dtype=torch.float64).reshape(-1),
            "offsets": sizes.cumsum(0) - sizes,
        }
        return cls(grads=list(grads), **{**rest, **options})

    @property
    def written(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]

    @property
    def numels(self) -> list[int]:
        return [g.numel() for g in self.grads]

    def random_masks(self) -> list[Tensor]:
        return random_masks(self.numels, self.grads[0].device if self.grads else None)

    def copy(self, dtype: torch.dtype | None = None) -> Problem:
        """With contiguous copies of the tensors, in float64 for the truth."""

        def copies(tensors: list[Tensor], cast: bool = True) -> list[Tensor]:
            return [t.to(dtype if dtype and cast else t.dtype, copy=True).contiguous() for t in tensors]

        moved = {name: copies(getattr(self, name)) for name in ("params", "exp_avgs", "exp_avg_sqs")}
        moved["grads"] = copies(self.grads, cast=False)
        moved["steps"] = copies(self.steps, cast=False)
        return Problem(**{**vars(self), **moved})

    def ranking(self, mode: Mode, upper: int = 0, lower: int = 0, draw: int = 0) -> list[int]:
        return [int(mode), upper, lower, int(self.rank_inactive), draw]

    def rank(self, ops, masks, record, ranking: list[int], *, first=False) -> Tensor:
        return ops.rank_(
            masks, self.grads, [] if first else self.exp_avgs, self.hyper, self.group, self.inv_scale,
            self.clip, record, ranking,
        )  # fmt: skip

    def select(self, ops, upper, lower=0, *, first=False, approx=False, draw: int = 0) -> Tensor:
        mode = Mode.APPROX if approx else Mode.EXACT
        return self.rank(ops, [], None, self.ranking(mode, upper, lower, draw), first=first)

    def capture(self, ops, record: Tensor, *, first=False) -> list[Tensor]:
        """By thresholds that are known."""
        masks = self.random_masks()
        result = self.rank(ops, masks, record, self.ranking(Mode.GIVEN), first=first)
        assert_same_bits(result, record, "record")
        return masks

    def masks(self, ops, upper, lower=0, *, first=False) -> list[Tensor]:
        masks = self.random_masks()
        self.rank(ops, masks, None, self.ranking(Mode.EXACT, upper, lower), first=first)
        return masks

    def step(self, ops, first, second, record, ranking: list[int], **options: Any) -> Tensor:
        return ops.step_(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, list(first),
            list(second), record, self.lr, self.hyper, self.group, self.offsets, self.inv_scale,
            self.clip, self.found_inf, self.gamma, ranking, [self.seed, int(self.stochastic)],
            **options,
        )  # fmt: skip

    def given_update(self, ops, first=(), second=(), selection=None, **options: Any) -> Tensor:
        """By masks, and thresholds that are known."""
        ranking = [] if selection is None else self.ranking(Mode.GIVEN)
        return self.step(ops, first, second, selection, ranking, **options)

    def update(self, ops, first=(), second=(), selection=None, **options: Any) -> Tensor:
        """The same; returns the counts alone."""
        return self.given_update(ops, first, second, selection, **options)[Field.SIZE :]

    def exact_update(self, ops, upper: int, lower: int = 0, first=()) -> Tensor:
        return self.step(ops, first, [], None, self.ranking(Mode.EXACT, upper, lower))

    def bracket_update(
        self, ops, upper: int, lower: int = 0, first=(), draw: int = 0, width: float = WIDTH,
        approx: bool = False,
    ) -> Tensor:  # fmt: skip
        mode = Mode.APPROX if approx else Mode.BRACKET
        with bracket_width(ops, width):
            return self.step(ops, first, [], None, self.ranking(mode, upper, lower, draw))

    def bracket_capture(
        self,
        ops,
        upper: int,
        lower: int = 0,
        *,
        first=False,
        draw: int = 0,
        width: float = WIDTH,
        approx: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        masks, mode = self.random_masks(), Mode.APPROX if approx else Mode.BRACKET
        with bracket_width(ops, width):
            ranking = self.ranking(mode, upper, lower, draw)
            return masks, self.rank(ops, masks, None, ranking, first=first)

    def with_moments(self, other: Problem) -> Problem:
        return Problem(**{**vars(self), "exp_avgs": other.exp_avgs})


def compare_bracket(
    ops, problem: Problem, upper: int, lower: int = 0, first=(), draw: int = 0, width: float = WIDTH,
    approx: bool = False,
) -> Tensor:  # fmt: skip
    """Rank and update in one pass, and hold all that does against the reference; returns the result.

    With a miss, the reference takes the threshold found: everything else must follow from it.
    """
    expected, update = problem.copy(), problem.copy()
    around = [surroundings(t) for t in problem.written]
    before = problem.copy()
    result = problem.bracket_update(ops, upper, lower, first, draw, width, approx)
    record = result[: reference.Field.SIZE]
    if record[reference.Field.MISSES]:
        assert_consistent(problem.with_moments(before), record)
        found = expected.update(reference, first, selection=record)
        update.params = [torch.zeros(p.shape) for p in problem.params]
        update.update(reference, first, selection=record)
        assert_same_bits(result[reference.Field.SIZE :], found, "counts")
    else:
        assert_same_bits(
            result,
            expected.bracket_update(reference, upper, lower, first, draw, approx=approx),
            "record and counts",
        )
        update.params = [torch.zeros(p.shape) for p in problem.params]
        update.bracket_update(reference, upper, lower, first, draw, approx=approx)
    for name in ("steps", "exp_avgs", "exp_avg_sqs"):
        assert_all_same_bits(getattr(problem, name), getattr(expected, name), name)
    for i, (p, p0, e, u) in enumerate(
        zip(problem.params, before.params, expected.params, update.params, strict=True)
    ):
        assert_theta_close(p, p0, e, u, f"params[{i}]")
    assert_all_same_bits(
        [surroundings(t) for t in problem.written], around, "memory around the tensors written"
    )
    return result


def keys_of(problem: Problem, *, first: bool = False, everything: bool = False) -> list[Tensor]:
    """The keys of all tensors that a call looks at: of an update, the selective ones."""
    found = []
    for g, m, row in zip(problem.grads, problem.exp_avgs, problem.group.tolist(), strict=True):
        if not everything and problem.hyper[row, Hyper.SELECTIVE] == 0:
            continue
        alpha = reference.float32(1.0 - problem.hyper[row, Hyper.BETA1].item())
        scaled = reference.scaled(g, problem.inv_scale, problem.clip)
        key = reference.risk_key(scaled, None if first else m, alpha, problem.rank_inactive)
        found.append(key.reshape(-1))
    return found


def assert_consistent(problem: Problem, record: Tensor, *, first: bool = False) -> None:
    """The counts of a selection record are those of its thresholds."""
    keys = torch.cat(keys_of(problem, first=first, everything=first))
    high, low = record[reference.Field.HIGH], record[reference.Field.LOW]
    ranked = keys < reference.INACTIVE_KEY
    assert record[reference.Field.KEPT] == (ranked & (keys > low) & (keys <= high)).sum()
    assert record[reference.Field.RANKED] == ranked.sum()
    assert record[reference.Field.INACTIVE] == (keys == reference.INACTIVE_KEY).sum()
    assert record[reference.Field.NONFINITE] == (keys == reference.NONFINITE_KEY).sum()


def tensor_norms(ops, tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    return portable.norm_of(ops.sums_of_squares(tensors, inv_scale))


def compare_update(ops, problem: Problem, first=(), second=(), selection=None) -> Problem:
    """Update by masks or thresholds, and hold all that does against the reference; returns the problem
    after it."""
    inputs = (*first, *second)
    return _compare(ops, problem, lambda p, o: p.given_update(o, first, second, selection), inputs)


def compare_exact(ops, problem: Problem, upper: int, lower: int = 0, first=()) -> Problem:
    """The same of a ranking and an update in one call."""
    return _compare(ops, problem, lambda p, o: p.exact_update(o, upper, lower, first), (*first,))


def _compare(ops, problem: Problem, step: Callable, masks: Sequence[Tensor]) -> Problem:
    """Moments, steps and the result must be equal bit for bit, parameters where M = 0, too. Elsewhere
    two evaluations of Algorithm 1, line 13, in float32 are at most so far apart, by counting roundings:
    each has at most 8 in the update term, 2 in the decay and 1 in the result.
    """
    expected, update = problem.copy(), problem.copy()
    result = step(expected, reference)
    # The update term alone: the same with parameters of zero.
    update.params = [torch.zeros(p.shape) for p in problem.params]
    step(update, reference)

    before = problem.copy()
    around = [surroundings(t) for t in problem.written]
    inputs = [*problem.grads, *masks, problem.hyper, problem.group, problem.lr]
    inputs_before = [t.clone() for t in inputs]
    actual = step(problem, ops)

    assert_same_bits(actual, result, "record and counts")
    assert_all_same_bits(problem.steps, expected.steps, "steps")
    assert_all_same_bits(problem.exp_avgs, expected.exp_avgs, "exp_avgs")
    assert_all_same_bits(problem.exp_avg_sqs, expected.exp_avg_sqs, "exp_avg_sqs")
    for i, (p, p0, e, u) in enumerate(
        zip(problem.params, before.params, expected.params, update.params, strict=True)
    ):
        assert_theta_close(p, p0, e, u, f"params[{i}]")
    untouched = [surroundings(t) for t in problem.written]
    assert_all_same_bits(untouched, around, "memory around the tensors written")
    assert_all_same_bits(inputs, inputs_before, "inputs")
    return problem


def compare_rounding(ops, generator: torch.Generator) -> None:
    """bfloat16 parameters and second moments, each rounded by random bits of its own: bit for bit.

    With beta2 = 0, in a first step, two evaluations of the update term have no rounding that differs.
    """
    for base in (
        0,
        2**32 - 1300,
    ):  # the last tensor starts at an odd index; the second time, before 2^32
        data = [values(2002, ("normal",), BF16, generator) for _ in range(4)]
        p, g, m, v = ([place(x[:600]), place(x[600:1001], "strided"), place(x[1001:])] for x in data)
        problem = Problem.of(
            g, m, (0.9, 0.0, *ROSE[2:]), params=p, exp_avg_sqs=[x.abs_() for x in v], lr=1e-2, seed=3,
            stochastic=True,
        )  # fmt: skip
        problem.offsets += base
        expected = problem.copy()
        everything = [torch.empty(0, dtype=torch.uint8)] * 3
        expected.update(reference, everything)
        problem.update(ops, everything)
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            assert_all_same_bits(getattr(problem, name), getattr(expected, name), name)


def assert_theta_close(p: Tensor, p0: Tensor, expected: Tensor, update: Tensor, what: str) -> None:
    assert p.dtype == expected.dtype == p0.dtype
    finite = expected.isfinite()
    actual, before = p.double(), p0.double().where(finite, torch.zeros(()).double())
    wanted = expected.double()
    bound = U * (4 * before.abs() + 2 * wanted.abs() + 16 * update.double().abs()) + 2.0**-140
    if p.dtype != FLOAT:
        bound = bound + ulp(wanted, p.dtype)  # the narrowing may tip over to the neighbour
    close = torch.where(finite, (actual - wanted).abs() <= bound, False)
    same = (actual == wanted) | (actual.isnan() & wanted.isnan())
    wrong = (~(close | same)).reshape(-1).nonzero().reshape(-1)
    if len(wrong):
        i = wrong[:5]
        raise AssertionError(
            f"{what}: {len(wrong)} of {p.numel()} too far off, at {i.tolist()}: "
            f"{actual.reshape(-1)[i].tolist()} instead of {wanted.reshape(-1)[i].tolist()}, "
            f"at most {bound.reshape(-1)[i].tolist()} apart"
        )


# ------------------------------------------------------------------------------ hypothesis problems


def examples(count: int) -> settings:
    """Settings of a test with so many examples; ROSE_TEST_THOROUGH=20 tries 20 times as many."""
    return settings(max_examples=max(1, int(count * float(os.environ.get("ROSE_TEST_THOROUGH", "1")))))


SIZES = (
    0, 1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 127, 128, 129, 143, 257,
    509, 1023, 1024, 1025, 2053,
)  # fmt: skip
SHAPES = [
    (), *((n,) for n in SIZES), (3, 5), (1, 7), (9, 1), (1, 1), (4, 1, 6), (5, 0, 3), (2, 3, 4, 5),
    (2, 8, 3, 3), (1, 3, 1, 9), (33, 31), (3, 700), (700, 3),
]  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: its shape, and dtype, layout and storage offset of p, g, m and v."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    offsets: tuple[int, ...]
    group: int


@dataclass(frozen=True)
class Spec:
    """All that determines a problem; hypothesis prints it when a test fails."""

    seed: int
    tensors: tuple[TensorSpec, ...]
    groups: tuple[tuple[float, ...], ...]
    gradient: tuple[str, ...]
    moment: tuple[str, ...]
    related: bool  # m close to alpha*g, so that risks are 0 or differ in their last bits
    inv_scale: float | None
    clip: tuple[float, float] | None
    rank_inactive: bool
    gamma: float
    step: int
    rounding_seed: int
    lr: tuple[float, ...] = field(default=(1e-3, 1e-2, 0.5))

    def problem(self) -> Problem:
        generator = torch.Generator().manual_seed(self.seed)
        columns: dict[str, list[Tensor]] = {"p": [], "g": [], "m": [], "v": []}
        for spec in self.tensors:
            n = torch.Size(spec.shape).numel()
            dp, dg, dm, dv = spec.dtypes
            p = values(n, ("normal", "wide", "zero", "one", "normal"), dp, generator)
            g = values(n, self.gradient, dg, generator)
            m = values(n, self.moment, dm, generator)
            if self.related:
                alpha = reference.float32(1.0 - self.groups[spec.group][0])
                near = torch.randint(0, 2, (n,), generator=generator).bool()
                m = torch.where(near, (g.float() * alpha).to(dm), m)
            v = values(n, ("normal", "wide", "zero", *self.moment), dv, generator).abs()
            for key, data, layout, offset in zip(
                "pgmv", (p, g, m, v), spec.layouts, spec.offsets, strict=True
            ):
                data = data.view(spec.shape)
                placed = expand(data) if layout == "expanded" else place(data, layout, offset)
                columns[key].append(placed)
        sizes = torch.tensor([t.numel() for t in columns["p"]], dtype=torch.int64)
        scale = self.inv_scale
        return Problem(
            columns["p"], columns["g"], columns["m"], columns["v"],
            [torch.tensor(float(self.step)) for _ in self.tensors],
            hyper_table(*self.groups),
            torch.tensor([t.group for t in self.tensors], dtype=torch.int64),
            torch.tensor(self.lr[: len(self.groups)], dtype=torch.float64),
            sizes.cumsum(0) - sizes,
            None if scale is None else torch.tensor(scale),
            None if self.clip is None else torch.tensor(self.clip),
            gamma=self.gamma, rank_inactive=self.rank_inactive, seed=self.rounding_seed,
        )  # fmt: skip


def any_of(*choices: Sequence[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """One of each, in a single draw: drawing them one by one takes longer than the tests themselves."""
    counts = [len(c) for c in choices]

    def of(index: int) -> tuple[Any, ...]:
        found = []
        for choice, count in zip(choices, counts, strict=True):
            index, at = divmod(index, count)
            found.append(choice[at])
        return tuple(found)

    return st.integers(0, math.prod(counts) - 1).map(of)


_WIDE, _NARROW = (FLOAT, BF16, HALF), (FLOAT, BF16)
# Of p, g, m and v.
_DTYPES = any_of(_WIDE, _WIDE, _NARROW, _NARROW)
_LAYOUTS = any_of(LAYOUTS, (*LAYOUTS, "expanded"), LAYOUTS, LAYOUTS)
_OFFSETS = any_of(*[(0, 1, 3, 7)] * 4)
_GROUPS = any_of(
    (0.9, 0.0, 0.5, 0.95, 0.999),
    (0.999, 0.9, 0.95, 0.0),
    (1e-8, 1e-6, 0.0),
    (1e-2, 0.1, 1e-4),  # never 0: an error in the decay would hide
    (1.0, -1.0),
    (1.0, 1.0, 0.0),
)
_OPTIONS = any_of(
    (False, True),  # related
    (None, 1.0, 0.5, 1 / 3, 2.0**-16, 1e-38, 3e38),  # inv_scale
    (None, None, (0.7, 1 / 3), (1.0, 0.3)),  # clip
    (False, True),  # rank_inactive
    (0.5, 0.3, 0.9, 1e-6),  # gamma
    (0, 1, 9, 100_000),  # step
)


def _tensor_specs(groups: int) -> st.SearchStrategy[TensorSpec]:
    group = st.integers(0, groups - 1)
    return st.builds(TensorSpec, st.sampled_from(SHAPES), _DTYPES, _LAYOUTS, _OFFSETS, group)


@st.composite
def specs(draw, max_tensors: int = 4) -> Spec:
    groups = tuple(draw(st.lists(_GROUPS, min_size=1, max_size=3)))
    tensors = draw(st.lists(_tensor_specs(len(groups)), max_size=max_tensors))
    mix = st.lists(st.sampled_from(KINDS), min_size=1, max_size=5).map(tuple)
    seed, rounding_seed = draw(st.integers(0, 2**32)), draw(st.integers(-(2**33), 2**33))
    return Spec(seed, tuple(tensors), groups, draw(mix), draw(mix), *draw(_OPTIONS), rounding_seed)


@st.composite
def fractions(draw) -> tuple[int, int]:
    """upper and lower in units of 1e-9, 0 <= lower < upper <= 1."""
    usual = st.sampled_from((600_000_000, ONE, 1, 290_000_000, 500_000_000, ONE - 1, 999_000_000))
    upper = draw(usual | st.integers(1, ONE))
    lower = draw(st.just(0) | st.integers(0, upper - 1))
    return upper, lower
