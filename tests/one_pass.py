"""Problems for the CPU's one pass, and what must hold where it was taken.

Everything is seen from outside: through the operators, and the report of the latest bracketed call
(``BracketReport`` in csrc/cpu/pass.h), which says whether the one pass was taken and how much it
logged, did again and collapsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from support import (
    FLOAT,
    PLAIN,
    WIDTH,
    Problem,
    assert_all_same_bits,
    assert_same_bits,
    hyper_table,
    keys_of,
    place,
    surroundings,
)
from torch import Tensor

from rose_ops import reference
from rose_ops.definitions import Field

T = TypeVar("T")
CPU = torch.ops.rose_ops
SMALL = 0.5  # width with which brackets of little data are inside of their windows
LINE = 16


class Report(NamedTuple):
    """Of the latest bracketed call; pairs are of the upper and the lower threshold (-1: there is none).

    Attributes:
        one_pass: whether it was taken; if not, ``lines`` alone may mean something.
        lines: that were sampled, one from each of as many strata.
        logged: elements that were noted, as they lay in a bracket when they were passed.
        redone: of these, those that were written again, or only then.
        collapsed: thresholds whose bracket was one key from the first.
        first_low, first_high: ends of the brackets before the pass.
        low, high: ends of the brackets in the end.
        misses: of the record (0 in what ``latest`` returns).
    """

    one_pass: bool
    lines: int
    logged: int
    redone: int
    collapsed: int
    first_low: tuple[int, int]
    first_high: tuple[int, int]
    low: tuple[int, int]
    high: tuple[int, int]
    misses: int = 0

    @property
    def first_width(self) -> int:
        return self.first_high[0] - self.first_low[0] + 1

    @classmethod
    def latest(cls) -> Report:
        taken, lines, logged, redone, collapsed, *pairs = CPU.latest_bracket_report().tolist()
        return cls(
            bool(taken), lines, logged, redone, collapsed, *zip(pairs[::2], pairs[1::2], strict=True)
        )


# ---------------------------------------------------------------------------------------- problems


def risky(risk: Tensor, m: Tensor) -> Tensor:
    """Gradients whose second-order risks with these moments are about ``risk``; signs are m's."""
    return (1 + risk) * m.float() / (1 - 0.9)  # by beta1


class Layouts:
    """Whether tensors of a problem are contiguous, or views of several kinds."""

    CONTIGUOUS = ("contiguous",)
    SCATTERED = ("contiguous", "strided", "offset", "padded")


def split(
    data: Sequence[Tensor],
    pieces: int | Sequence[int] = 1,
    layouts: Sequence[str] = Layouts.CONTIGUOUS,
    **options: object,
) -> Problem:
    """A problem of p, g, m, v, cut into tensors, the k-th of the i-th in a layout of its own."""

    def cut(k: int) -> list[Tensor]:
        parts = data[k].tensor_split(pieces) if isinstance(pieces, int) else data[k].split(list(pieces))
        placed = []
        for i, part in enumerate(parts):
            layout = layouts[(i + k) % len(layouts)]
            if len(layouts) > 1 and part.numel() % 4 == 0:  # "padded": rows with gaps between them
                part = part.view(-1, part.numel() // 4)
            placed.append(place(part, layout, offset=i % 2 if len(layouts) > 1 else 0))
        return placed

    p, g, m, v = (cut(k) for k in range(4))
    return Problem.of(g, m, params=p, exp_avg_sqs=v, **options)


def normal(
    generator: torch.Generator, n: int, dtypes: Sequence[torch.dtype] = (FLOAT,) * 4
) -> list[Tensor]:
    """p, g, m, v as a step finds them."""
    p, g, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    return [x.to(dtype) for x, dtype in zip((p, g, m, v.abs()), dtypes, strict=True)]


def in_groups(problem: Problem, rows: Sequence[Sequence[float]], group: Sequence[int]) -> Problem:
    problem.hyper = hyper_table(*rows)
    problem.group = torch.tensor(group, dtype=torch.int64)
    problem.lr = torch.logspace(-3, -1, len(rows), dtype=torch.float64)
    return problem


def with_plain_front(problem: Problem, row: Sequence[float]) -> Problem:
    """The first half of the tensors outside of the ranking."""
    count = len(problem.grads)
    return in_groups(problem, (row, PLAIN), [int(i < count // 2) for i in range(count)])


# ------------------------------------------------------------------------------------- comparisons


def sorted_ranks(keys: Sequence[Tensor]) -> Tensor:
    keys = torch.cat([torch.empty(0, dtype=torch.int64), *keys])
    return keys[keys < reference.INACTIVE_KEY].int().sort().values.long()


def check_record(keys: Sequence[Tensor], record: Tensor, report: Report, units: Sequence[int]) -> None:
    """Thresholds are exact where they lie in their brackets, and else the nearest ends of these; the
    counts are those of the thresholds, and all of the brackets was logged."""
    ranked = sorted_ranks(keys)
    inside = torch.zeros(len(ranked), dtype=torch.bool)
    missed = False
    for i, (unit, field) in enumerate(zip(units, (Field.HIGH, Field.LOW), strict=True)):
        found, low, high = record[field].item(), report.low[i], report.high[i]
        if unit == 0:
            assert found == low == high == -1
            continue
        k = reference.rank_of(unit, len(ranked))
        exact = int(ranked[k - 1]) if k else -1
        assert report.first_low[i] <= low <= high <= report.first_high[i]
        if low == high and report.collapsed:
            assert found == low
            missed = missed or exact != low
            continue
        inside |= (ranked >= low) & (ranked <= high)
        if low <= exact <= high:
            assert found == exact
        elif exact > high:
            assert found == high
            missed = True
        elif k or (ranked < low).any():
            assert found == low - 1
            missed = True
    # What was logged may have been inside of an earlier bracket only.
    assert report.redone <= report.logged
    assert inside.sum() <= report.logged
    kept = (ranked > record[Field.LOW]) & (ranked <= record[Field.HIGH])
    counts = {
        Field.KEPT: kept.sum(), Field.RANKED: len(ranked), Field.MISSES: missed,
        Field.INACTIVE: sum((key == reference.INACTIVE_KEY).sum() for key in keys),
        Field.NONFINITE: sum((key == reference.NONFINITE_KEY).sum() for key in keys),
    }  # fmt: skip
    for field, count in counts.items():
        assert record[field] == count, field


def one_pass(problem: Problem, draw: int, call: Callable[[int], T]) -> tuple[T, int]:
    """What a call of ``call`` with a draw returns, and the draw, which is another one where two passes
    were taken: by chance, a bracket may be outside of what the pass can hold. For some data, a draw
    fails as often as not."""
    saved = problem.copy()
    for other in range(draw, draw + 100_000, 1000):
        result = call(other)
        if Report.latest().one_pass:
            return result, other
        for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
            for to, x in zip(getattr(problem, name), getattr(saved, name), strict=True):
                to.copy_(x)
    raise AssertionError("two passes were taken, and this test means the one")


def update(
    problem: Problem,
    upper: int = 600_000_000,
    lower: int = 0,
    first: Sequence[Tensor] = (),
    draw: int = 0,
    width: float = WIDTH,
    misses: bool = False,
) -> Report:
    """An update in one pass: its record is held against the reference's keys, and all that it writes,
    bit for bit, against an update that is given the thresholds."""
    keys, given = keys_of(problem), problem.copy()
    around = [surroundings(t) for t in problem.written]
    result, _ = one_pass(
        problem, draw, lambda d: problem.bracket_update(CPU, upper, lower, first, d, width)
    )
    report, record = Report.latest(), result[: Field.SIZE]
    check_record(keys, record, report, (upper, lower))
    assert misses or record[Field.MISSES] == 0
    counts = given.update(CPU, first, selection=record)
    assert_same_bits(result[Field.SIZE :], counts, "counts")
    assert_all_same_bits(problem.written, given.written, "one pass and one that knows the thresholds")
    assert_all_same_bits(problem.steps, given.steps, "steps")
    now = [surroundings(t) for t in problem.written]
    assert_all_same_bits(now, around, "memory around the tensors written")
    return report._replace(misses=int(record[Field.MISSES]))


def capture(
    problem: Problem,
    upper: int = 600_000_000,
    lower: int = 0,
    *,
    first: bool,
    draw: int = 0,
    width: float = WIDTH,
    misses: bool = False,
) -> Report:
    """A capture in one pass: its record and its masks are held against the reference's keys."""
    (masks, record), _ = one_pass(
        problem, draw,
        lambda d: problem.bracket_capture(CPU, upper, lower, first=first, draw=d, width=width),
    )  # fmt: skip
    report = Report.latest()
    keys = keys_of(problem, first=first, everything=True)
    check_record(keys, record, report, (upper, lower))
    assert misses or record[Field.MISSES] == 0
    expected = [reference.pack(reference.is_selected(key, record)) for key in keys]
    assert_all_same_bits(masks, expected, "masks")
    return report._replace(misses=int(record[Field.MISSES]))
