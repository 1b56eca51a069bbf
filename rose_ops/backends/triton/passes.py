"""The operators' passes over tensors: what is launched, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rose_ops.backends.triton import words
from rose_ops.backends.triton.arguments import Factors, Ranking, Update
from rose_ops.backends.triton.bracket import (
    capture_fix_kernel,
    capture_pass_kernel,
    update_fix_kernel,
    update_pass_kernel,
)
from rose_ops.backends.triton.launch import (
    BLOCK,
    COUNTED_LINES,
    DRAWN_LINES,
    SELECT_BLOCK,
    launch,
    on,
    programs_for,
)
from rose_ops.backends.triton.resolve import resolve_kernel
from rose_ops.backends.triton.sample import bracket_kernel, sample_kernel
from rose_ops.backends.triton.select import capture_kernel, select_kernel
from rose_ops.backends.triton.squares import squares_kernel, sums_kernel
from rose_ops.backends.triton.table import Class, Role, Table, check, check_counts, device_of, make
from rose_ops.backends.triton.update import prepare_kernel, update_kernel
from rose_ops.definitions import APPROX_FEWEST, LINE, Field, Hyper, Mode

bracket_width = 1.0  # that half-widths are multiplied by; else than 1 in tests


def _risk_constants(c: Class, second: bool) -> dict[str, Any]:
    return {
        "D0": c.dtypes[0],
        "D1": c.dtypes[-1],
        "LINEAR": c.linear,
        "ALIGNED": c.aligned,
        "SECOND": second,
    }


def _risk_roles(grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> list[Role]:
    return [Role("grads", grads), *([Role("exp_avgs", exp_avgs)] if exp_avgs else [])]


def _select_from(
    sources: Sequence[tuple[int, tuple[Any, ...], dict[str, Any]]], state: Tensor, record: Tensor,
    upper: int, lower: int,
) -> None:  # fmt: skip
    """The record of all that ``sources`` have: programs, arguments and constants of a launch each."""
    programs = sum(own for own, *_ in sources)
    for number in range(words.ROUNDS.value):
        for own, args, constants in sources:
            launch(
                select_kernel, own, *args, state, record, upper, lower, programs, number,
                BLOCK=SELECT_BLOCK, **constants,
            )  # fmt: skip


def select(
    grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor, factors: Factors,
    wanted: Ranking,
) -> Tensor:  # fmt: skip
    """The record of a ranking, for which nothing else is done."""
    device, roles = device_of(grads), _risk_roles(grads, exp_avgs)
    if wanted.mode == Mode.APPROX and sum(g.numel() for g in grads) >= APPROX_FEWEST:
        return _captured(make(roles, hyper, group, BLOCK), bool(exp_avgs), factors, wanted)
    table = make(roles, hyper, group, SELECT_BLOCK)
    state = torch.zeros(words.SELECT_STATE.value + Field.SIZE, dtype=torch.int64, device=device)
    record = state[words.SELECT_STATE.value :]
    sources = [
        (
            programs_for(c.tiles, device),
            (c.rows, c.tile_rows, c.tiles, table.dims, table.hyper, *factors.of(table)),
            _risk_constants(c, bool(exp_avgs)),
        )
        for c in table.classes
    ]
    with on(device):
        _select_from(sources, state, record, wanted.upper, wanted.lower)
    return record


def _capture_table(
    masks: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], hyper: Tensor,
    group: Tensor,
) -> Table:  # fmt: skip
    device = device_of(grads)
    check_counts(_risk_roles(grads, exp_avgs))
    if len(masks) != len(grads):
        raise RuntimeError(
            f"masks has {len(masks)} tensors; expected one for each of {len(grads)} gradients"
        )
    for mask, g in zip(masks, grads, strict=True):
        check("masks", mask, torch.uint8, (g.numel() + 7) // 8, device)
    columns = {words.BITS.value: [mask.data_ptr() for mask in masks]}
    return make(_risk_roles(grads, exp_avgs), hyper, group, BLOCK, columns=columns)


def capture(
    masks: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor,
    factors: Factors, wanted: Ranking, record: Tensor | None,
) -> Tensor:  # fmt: skip
    """Masks of a ranking, whose record is known or found and returned."""
    device = device_of(grads)
    table = _capture_table(masks, grads, exp_avgs, hyper, group)
    if record is not None:
        check("record", record, torch.int64, Field.SIZE, device)
    elif wanted.mode == Mode.EXACT:
        record = select(grads, exp_avgs, hyper, group, factors, wanted)
    else:
        return _captured(table, bool(exp_avgs), factors, wanted)
    with on(device):
        for c in table.classes:
            launch(
                capture_kernel, programs_for(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, table.hyper, *factors.of(table), record,
                BLOCK=BLOCK, **_risk_constants(c, bool(exp_avgs)),
            )  # fmt: skip
    return record.clone() if wanted.mode == Mode.GIVEN else record


def update(u: Update, selection: Tensor | None) -> Tensor:
    """By masks, or the record of a selection. Returns that of what was done, and its counts."""
    table = u.table
    result = torch.empty(Field.SIZE + 2, dtype=torch.int64, device=u.device)
    counts = result[Field.SIZE :]
    given, known = (result, 0) if selection is None else (selection, 1)
    with on(u.device):
        launch(
            prepare_kernel, max(u.count, 1), table.rows, u.count, table.hyper, u.lr, u.found,
            u.prepared, u.keys, result, given, known, table.extra, table.extra[1:], *u.weights,
            int(u.rules_out),
        )  # fmt: skip
        for c in table.classes:
            launch(
                update_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles, table.dims,
                table.hyper, *u.factors.of(table), u.found, given, u.prepared, u.keys, counts,
                *u.weights, FROM_RISK=selection is not None, **u.of(c),
            )  # fmt: skip
    return result


def ranked_update(
    u: Update,
    wanted: Ranking,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hyper: Tensor,
    group: Tensor,
) -> Tensor:
    """With the ranking of the selective tensors; likewise."""
    if wanted.mode == Mode.EXACT:
        columns = hyper.reshape(-1, len(Hyper))
        chosen = [i for i, row in enumerate(group.tolist()) if columns[row, Hyper.SELECTIVE] != 0]
        pairs = [grads[i] for i in chosen], [exp_avgs[i] for i in chosen]
        return update(u, select(*pairs, hyper, group[chosen], u.factors, wanted))
    constants = [
        {
            **_risk_constants(c, True),
            "D0": c.dtypes[min(1, len(c.dtypes) - 1)],
            "D1": c.dtypes[min(2, len(c.dtypes) - 1)],
        }
        for c in u.table.classes
    ]
    prepare = (u.lr, u.prepared, u.keys, u.table.extra, u.table.extra[1:], *u.weights)
    factors = u.factors.of(u.table)
    return _OnePass(u.table, wanted, u.found, factors, constants, u).run(prepare)


@dataclass
class Bracket:
    """Workspaces of a bracketed pass, within 1 bit for each element and 16 MiB."""

    stratum: int  # lines of which one is sampled
    strata: int
    capacity: int  # of the log
    state: Tensor
    record: Tensor
    log: tuple[Tensor, ...]  # keys, places, and old p, m and v
    sample: Tensor  # in the memory of the log, which is written later

    @classmethod
    def of(
        cls, lines: int, elements: int, updates: bool, approx: bool, device: torch.device
    ) -> Bracket:
        # The log shrinks as 1 / sqrt(lines): n^(2/3) lines balance its cost and the sample's. More, so
        # that it fits, where 1 bit for each element is much of the memory.
        wanted = max(1.0, 0.4 * elements ** (2 / 3), elements / 640)
        if approx:  # as reference.sampled has it
            wanted = min(max(lines // 128, min(lines // 8, 1 << 14)), 1 << 16)
        stratum = max(1, int(lines // wanted))
        tile = SELECT_BLOCK // LINE  # whole ones: of strata beyond the end, no line is there
        strata = -(-lines // (stratum * tile)) * tile
        size = 6 if updates else 3  # int32 words of an entry
        capacity = max(1, min(elements, (elements // 8 + (14 << 20)) // (4 * size)))
        capacity = 0 if approx else capacity
        numbers = max(capacity * size, LINE * strata)
        memory = torch.empty((numbers + 1) // 2, dtype=torch.int64, device=device)
        places, rest = memory[:capacity], memory.view(torch.int32)[2 * capacity :]
        log = (rest[:capacity], places, *([rest[capacity:].view(torch.float32)] if updates else []))
        return cls(
            stratum, strata, capacity,
            torch.empty(words.STATE.value, dtype=torch.int64, device=device),
            torch.empty(Field.SIZE + 2 * updates, dtype=torch.int64, device=device),
            log, memory.view(torch.int32),
        )  # fmt: skip


class _OnePass:
    """The launches of bracket.py, for an update or for a capture."""

    def __init__(
        self, table: Table, wanted: Ranking, found: Tensor, factors: tuple[Any, ...],
        constants: list[dict[str, Any]], update: Update | None,
    ) -> None:  # fmt: skip
        """
        Args:
            found: see ``found_inf`` of :func:`rose_ops.reference.step_`.
            factors: see :meth:`Factors.of`.
            constants: of the kernels that find keys, for each class.
            update: or None for a capture.
        """
        self.table, self.wanted, self.found, self.factors = table, wanted, found, factors
        self.constants, self.update = constants, update
        self.device = table.rows.device
        self.approx = wanted.mode == Mode.APPROX and table.elements >= APPROX_FEWEST
        self.workspaces = Bracket.of(
            table.lines, table.elements, update is not None, self.approx, self.device
        )
        self.operand = int(update is not None)  # gradients follow parameters, or are the first
        self.programs = [programs_for(c.tiles, self.device) for c in table.classes]

    def run(self, prepare: tuple[Any, ...]) -> Tensor:
        """All launches. Returns the record.

        Args:
            prepare: arguments of the first kernel to prepare the update.
        """
        with on(self.device):
            self._sample(prepare)
            if self.approx:
                self._estimate()
            else:
                self._bracket()
            self._pass()
            self._resolve()
            if not self.approx:
                self._fix()
        return self.workspaces.record

    def _sample(self, prepare: tuple[Any, ...]) -> None:
        table, b = self.table, self.workspaces
        # Always an int32: no kernel is compiled again for it.
        draw = (self.wanted.draw + 2**31) % 2**32 - 2**31
        for i, c in enumerate(table.classes):
            prepared = self.update.count if i == 0 and self.update is not None else 0
            strata = b.strata if c.ranked else 0
            keys = {k: v for k, v in self.constants[i].items() if k != "ALIGNED"}
            launch(
                sample_kernel, max(-(-strata // DRAWN_LINES), prepared, 1), c.rows, c.ranked,
                table.dims, table.hyper, *self.factors, self.operand, self.found, b.state, b.record,
                len(b.record), b.sample, draw, strata, b.stratum, table.lines, table.rows, prepared,
                *prepare, **keys, LINES=DRAWN_LINES,
            )  # fmt: skip

    def _estimate(self) -> None:
        """Quantiles of the sample, instead of a bracket."""
        table, b = self.table, self.workspaces
        tiles = b.strata * LINE // SELECT_BLOCK
        args = (table.rows, b.sample, tiles, table.dims, table.hyper, *self.factors)
        constants = {**self.constants[0], "D0": words.KEYS.value}
        source = (programs_for(tiles, self.device), args, constants)
        state, estimate = b.state[words.WINDOWS.value :], b.state[words.ESTIMATE.value :]
        _select_from([source], state, estimate, self.wanted.upper, self.wanted.lower)

    def _bracket(self) -> None:
        b, wanted = self.workspaces, self.wanted
        programs = programs_for(-(-b.strata // COUNTED_LINES), self.device, each=1)
        launch(
            bracket_kernel, programs, self.found, b.state, b.sample, b.strata, b.stratum, wanted.upper,
            wanted.lower, float(bracket_width), self.table.elements, b.capacity, LINES=COUNTED_LINES,
        )  # fmt: skip

    def _pass(self) -> None:
        table, b, u, two = self.table, self.workspaces, self.update, self.wanted.lower > 0
        for c, constants in zip(table.classes, self.constants, strict=True):
            place = c.base * BLOCK
            if u is None:
                launch(
                    capture_pass_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles, table.dims,
                    table.hyper, *self.factors, b.state, *b.log, b.capacity, place, BLOCK=BLOCK,
                    TWO=two, **constants,
                )  # fmt: skip
            else:
                launch(
                    update_pass_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles, c.ranked_tiles,
                    table.dims, table.hyper, *self.factors, self.found, b.state, *b.log, b.capacity,
                    place, u.prepared, u.keys, *u.weights, TWO=two, **u.of(c),
                )  # fmt: skip

    def _resolve(self) -> None:
        table, b, wanted = self.table, self.workspaces, self.wanted
        for i, c in enumerate(table.classes):
            launch(
                resolve_kernel, self.programs[i], c.rows, c.tile_rows, c.ranked_tiles, table.dims,
                table.hyper, *self.factors, self.operand, self.found, b.state, b.record, b.log[0],
                b.capacity, table.elements, wanted.upper, wanted.lower, sum(self.programs), int(i == 0),
                int(self.update is not None), int(self.approx), BLOCK=BLOCK, **self.constants[i],
            )  # fmt: skip

    def _fix(self) -> None:
        table, b, u = self.table, self.workspaces, self.update
        for c, programs, constants in zip(table.classes, self.programs, self.constants, strict=True):
            place = c.base * BLOCK
            if u is None:
                launch(
                    capture_fix_kernel, programs, c.rows, c.tile_rows, c.tiles, table.dims, table.hyper,
                    *self.factors, b.state, b.record, *b.log, b.capacity, place, BLOCK=BLOCK,
                    **constants,
                )  # fmt: skip
            else:
                launch(
                    update_fix_kernel, programs, c.rows, c.tile_rows, c.tiles, c.ranked_tiles,
                    table.dims, table.hyper, *self.factors, self.found, b.state, b.record, *b.log,
                    b.capacity, place, u.prepared, u.keys, *u.weights, **u.of(c),
                )  # fmt: skip


def _captured(table: Table, second: bool, factors: Factors, wanted: Ranking) -> Tensor:
    """A ranking in one pass; of tensors whose rows have memory for bits, with masks."""
    constants = [_risk_constants(c, second) for c in table.classes]
    unused = (
        table.hyper, table.ones, table.rows.view(torch.int32), table.extra, table.extra, 0, 0,
    )  # fmt: skip
    return _OnePass(table, wanted, table.zero, factors.of(table), constants, None).run(unused)


def squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """See :func:`rose_ops.reference.sums_of_squares`."""
    device = device_of(tensors)
    factors = Factors(inv_scale, None, False, device)
    hyper = torch.zeros(1, len(Hyper), dtype=torch.float64, device="cpu")
    group = torch.zeros(len(tensors), dtype=torch.int64, device="cpu")
    table: Table = make([Role("tensors", tensors)], hyper, group, BLOCK)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    if not tensors:
        return sums
    partial = torch.empty(table.tiles + 1, dtype=torch.float64, device=device)
    with on(device):
        for c in table.classes:
            launch(
                squares_kernel, programs_for(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, factors.of(table)[0], partial, c.base, D0=c.dtypes[0],
                LINEAR=c.linear, ALIGNED=c.aligned, BLOCK=BLOCK,
            )  # fmt: skip
            launch(sums_kernel, len(c.rows), c.rows, partial, c.base, sums, BLOCK=BLOCK, PARTS=256)
    return sums
