"""Passes over tensors: arguments of Triton kernels, checked, and in which order these are launched."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from rose_ops.backends.triton import bracket, kernels
from rose_ops.backends.triton.table import (
    ALL,
    BITS,
    DTYPES,
    NO_MASK,
    WHOLE,
    Class,
    Role,
    Table,
    check,
    check_counts,
    check_groups,
    make,
    upload,
)
from rose_ops.definitions import APPROX_FEWEST, FRACTION_UNIT, LINE, Field, Hyper, Mode

INTERPRETED = bool(knobs.runtime.interpret)

# Elements of a tile. The interpreter has a price for each tile; a GPU wants 16 bytes for each thread,
# and more where each tile takes a histogram.
BLOCK = 1 << 14 if INTERPRETED else 512
SELECT_BLOCK = 1 << 14 if INTERPRETED else 1024
_STATE = 16 + 2 * 256
_ESTIMATE, _WINDOWS = 8, 48 + 64 * 8  # see bracket.py
_BRACKET_STATE = _WINDOWS + 2 * 2048 + 2 * (1 << 15) + 2 * (1 << 16)
bracket_width = 1.0  # that half-widths are multiplied by; else than 1 in tests
# Lines of the sample at a time: drawn, and counted.
DRAWN_LINES, LINES = (1024, 1024) if INTERPRETED else (32, 64)


@contextlib.contextmanager
def _on(device: torch.device):
    """Launch there: Triton would use the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    elif INTERPRETED:  # NumPy says so when it computes with inf and NaN
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    else:
        yield


def _programs(tiles: int, device: torch.device, each: int = 8) -> int:
    """Programs that walk the tiles: ``each`` for each multiprocessor."""
    resident = 3
    if device.type == "cuda":
        resident = each * torch.cuda.get_device_properties(device).multi_processor_count
    elif not INTERPRETED:
        resident = 2048
    return max(1, min(tiles, resident))


def _options(kernel: Any) -> dict[str, Any]:
    """What to launch a kernel with: all that Triton knows on this machine."""
    options = kernels.OPTIONS[kernel.fn.__name__]
    if torch.version.cuda is None:  # a limit to registers is NVIDIA's
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    return options


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    kernel[(programs,)](*args, **constants, **_options(kernel))


def _check(name: str, tensor: Tensor | None, numel: int, device: torch.device) -> None:
    if tensor is not None:
        check(name, tensor, torch.float32, numel, device)


def check_fractions(upper: int, lower: int) -> None:
    if not 0 <= lower < upper <= FRACTION_UNIT:
        raise RuntimeError(
            f"expected 0 <= lower < upper <= {FRACTION_UNIT} (units of 1e-9); got lower {lower} and "
            f"upper {upper}"
        )


class Ranking(NamedTuple):
    """What is asked of a ranking."""

    mode: Mode
    upper: int
    lower: int
    rank_inactive: bool
    draw: int

    @classmethod
    def of(
        cls, ranking: Sequence[int], record: Tensor | None, may_be_empty: bool = False
    ) -> Ranking | None:
        """None: nothing."""
        if len(ranking) != len(cls._fields) and not (may_be_empty and len(ranking) == 0):
            raise RuntimeError(
                f"ranking has {len(ranking)} numbers; expected {'none or ' if may_be_empty else ''}"
                "mode, upper, lower, rank_inactive and draw"
            )
        if ranking and ranking[0] not in [*Mode]:
            raise RuntimeError(
                f"ranking[0] is {ranking[0]}; expected a mode: given (0), exact, bracket or approx"
            )
        if ranking and ranking[0] != Mode.GIVEN:
            check_fractions(ranking[1], ranking[2])
        if (record is not None) != (len(ranking) > 0 and ranking[0] == Mode.GIVEN):
            what = "not given" if record is None else "given"
            raise RuntimeError(
                f"record is {what}; expected it with a ranking of mode given (0), and with no other"
            )
        if not ranking:
            return None
        mode, upper, lower, rank_inactive, draw = ranking
        return cls(Mode(mode), upper, lower, bool(rank_inactive), draw)


class Factors:
    """What gradients are multiplied by, on the device, and whether inactive elements are ranked."""

    def __init__(
        self, inv_scale: Tensor | None, clip: Tensor | None, rank_inactive: bool, device: torch.device
    ) -> None:
        _check("inv_scale", inv_scale, 1, device)
        _check("clip", clip, 2, device)
        self.inv_scale, self.clip, self.rank_inactive = inv_scale, clip, rank_inactive

    def of(self, table: Table) -> tuple[Tensor, Tensor, int]:
        """As arguments of kernels: ones where there is nothing."""
        scale, clip = (table.ones if t is None else t for t in (self.inv_scale, self.clip))
        return scale, clip, int(self.rank_inactive)


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


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _select_from(
    sources: Sequence[tuple[int, tuple[Any, ...], dict[str, Any]]], state: Tensor, record: Tensor,
    upper: int, lower: int,
) -> None:  # fmt: skip
    """The record of all that ``sources`` have: programs, arguments and constants of a launch each."""
    programs = sum(own for own, *_ in sources)
    for number in range(4):
        for own, args, constants in sources:
            _launch(
                kernels._select_kernel, own, *args, state, record, upper, lower, programs, number,
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
    state = torch.zeros(_STATE + Field.SIZE, dtype=torch.int64, device=device)
    record = state[_STATE:]
    sources = [
        (
            _programs(c.tiles, device),
            (c.rows, c.tile_rows, c.tiles, table.dims, table.hyper, *factors.of(table)),
            _risk_constants(c, bool(exp_avgs)),
        )
        for c in table.classes
    ]
    with _on(device):
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
    columns = {11: [mask.data_ptr() for mask in masks]}
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
    with _on(device):
        for c in table.classes:
            _launch(
                kernels._capture_kernel, _programs(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, table.hyper, *factors.of(table), record,
                BLOCK=BLOCK, **_risk_constants(c, bool(exp_avgs)),
            )  # fmt: skip
    return record.clone() if wanted.mode == Mode.GIVEN else record


def _mask_columns(
    name: str, masks: Sequence[Tensor], params: Sequence[Tensor], selective: Sequence[bool]
) -> tuple[list[int], list[int]]:
    """Addresses and kinds."""
    if not masks:
        return [0] * len(params), [NO_MASK] * len(params)
    if len(masks) != len(params):
        raise RuntimeError(
            f"{name} has {len(masks)} tensors; expected none or one for each of {len(params)} "
            "parameters"
        )
    kinds = []
    for mask, p, counts in zip(masks, params, selective, strict=True):
        kind = ALL if mask.numel() == 0 else WHOLE if mask.dtype == torch.bool else BITS
        if kind == WHOLE:
            check(name, mask, torch.bool, 1, params[0].device)
        elif kind == BITS:
            check(name, mask, torch.uint8, (p.numel() + 7) // 8, params[0].device)
        kinds.append(kind if counts else NO_MASK)
    return [mask.data_ptr() for mask in masks], kinds


class Update:
    """The arguments of an update, checked, and its workspaces."""

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor], steps: list[Tensor], first_masks: list[Tensor],
        second_masks: list[Tensor], lr: Tensor, hyper: Tensor, group: Tensor, offsets: Tensor,
        inv_scale: Tensor | None, clip: Tensor | None, found_inf: Tensor | None, gamma: float,
        wanted: Ranking | None, seed: int, stochastic: bool,
    ) -> None:  # fmt: skip
        device, from_risk = device_of(params), wanted is not None
        self.device, cpu = device, torch.device("cpu")
        roles = [
            Role("params", params, True), Role("grads", grads), Role("exp_avgs", exp_avgs, True),
            Role("exp_avg_sqs", exp_avg_sqs, True),
        ]  # fmt: skip
        check_counts(roles)
        check_groups(hyper, group, len(grads))
        check("offsets", offsets, torch.int64, len(params), cpu)
        check("lr", lr, torch.float64, hyper.numel() // 6, cpu if lr.is_cpu else device)
        if len(steps) != len(params):
            raise RuntimeError(
                f"steps has {len(steps)} tensors; expected one for each of {len(params)} parameters"
            )
        for step in steps:
            check("steps", step, torch.float32, 1, device)
        rank_inactive = wanted is not None and wanted.rank_inactive
        self.factors = Factors(inv_scale, clip, rank_inactive, device)
        _check("found_inf", found_inf, 1, device)
        flags = hyper.reshape(-1, 6)[:, 5].tolist()
        if from_risk and second_masks:
            raise RuntimeError("both record and second_masks are given; expected one second-order mask")
        selective = [0 <= row < len(flags) and flags[row] != 0 for row in group.tolist()]
        if any(selective) and not first_masks and not second_masks and not from_risk:
            raise RuntimeError(
                f"params[{selective.index(True)}] is selective; expected first_masks, second_masks or "
                "a selection"
            )
        firsts, first_kinds = _mask_columns("first_masks", first_masks, params, selective)
        seconds, second_kinds = _mask_columns("second_masks", second_masks, params, selective)
        columns = {
            2: offsets.tolist(), 7: firsts, 8: seconds, 9: first_kinds, 10: second_kinds,
            12: [step.data_ptr() for step in steps],
        }  # fmt: skip
        extra = [gamma, float(seed % 2**32)]
        table = self.table = make(roles, hyper, group, BLOCK, extra, columns)
        fractional = bool(first_masks) and (from_risk or bool(second_masks))
        self.weights = (1, 2) if fractional else (3, 3)
        self.rules_out = not from_risk and WHOLE in first_kinds + second_kinds
        self.found = table.zero if found_inf is None else found_inf
        self.stochastic, self.fractional = stochastic, fractional
        # Written by the first launch, before others read them.
        count = self.count = len(params)
        self.prepared = torch.empty(max(count, 1), 16, device=device)
        self.keys = torch.empty(max(count, 1), 2, dtype=torch.int32, device=device)
        self.lr = upload(lr, device) if lr.is_cpu else lr

    def of(self, c: Class) -> dict[str, Any]:
        """Constants of kernels that update a class."""
        dtypes = {f"D{i}": dtype for i, dtype in enumerate(c.dtypes)}
        return {
            **dtypes, "LINEAR": c.linear, "ALIGNED": c.aligned, "FRACTIONAL": self.fractional,
            "STOCHASTIC": self.stochastic and c.dtypes[0] == DTYPES[torch.bfloat16], "BLOCK": BLOCK,
        }  # fmt: skip


def update(u: Update, selection: Tensor | None) -> Tensor:
    """By masks, or the record of a selection. Returns that of what was done, and its counts."""
    table = u.table
    result = torch.empty(Field.SIZE + 2, dtype=torch.int64, device=u.device)
    counts = result[Field.SIZE :]
    given, known = (result, 0) if selection is None else (selection, 1)
    with _on(u.device):
        _launch(
            kernels._prepare_kernel, max(u.count, 1), table.rows, u.count, table.hyper, u.lr, u.found,
            u.prepared, u.keys, result, given, known, table.extra, table.extra[1:], *u.weights,
            int(u.rules_out),
        )  # fmt: skip
        for c in table.classes:
            _launch(
                kernels._update_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles, table.dims,
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
    return _bracketed(u.table, wanted, u.found, factors, prepare, constants, u)


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
        words = max(capacity * size, LINE * strata)
        memory = torch.empty((words + 1) // 2, dtype=torch.int64, device=device)
        places, rest = memory[:capacity], memory.view(torch.int32)[2 * capacity :]
        log = (rest[:capacity], places, *([rest[capacity:].view(torch.float32)] if updates else []))
        return cls(
            stratum, strata, capacity,
            torch.empty(_BRACKET_STATE, dtype=torch.int64, device=device),
            torch.empty(Field.SIZE + 2 * updates, dtype=torch.int64, device=device),
            log, memory.view(torch.int32),
        )  # fmt: skip


def _bracketed(
    table: Table, wanted: Ranking, found: Tensor, factors: tuple[Any, ...], prepare: tuple[Any, ...],
    constants: list[dict[str, Any]], update: Update | None,
) -> Tensor:  # fmt: skip
    """The launches of bracket.py.

    Args:
        factors: see :meth:`Factors.of`.
        prepare: arguments of the first kernel to prepare the update.
        constants: of the kernels that find keys, for each class.
        update: or None for a capture.
    """
    _, upper, lower, _, draw = wanted
    approx = wanted.mode == Mode.APPROX and table.elements >= APPROX_FEWEST
    device = table.rows.device
    b = Bracket.of(table.lines, table.elements, update is not None, approx, device)
    two, updates = {"TWO": lower > 0}, int(update is not None)
    operand = updates  # gradients follow parameters, or are the first
    draw = (draw + 2**31) % 2**32 - 2**31  # always an int32: no kernel is compiled again for it
    programs = [_programs(c.tiles, device) for c in table.classes]
    with _on(device):
        for i, c in enumerate(table.classes):
            prepared = update.count if i == 0 and update is not None else 0
            strata = b.strata if c.ranked else 0
            keys = {k: v for k, v in constants[i].items() if k != "ALIGNED"}
            _launch(
                bracket._sample_kernel, max(-(-strata // DRAWN_LINES), prepared, 1), c.rows, c.ranked,
                table.dims, table.hyper, *factors, operand, found, b.state, b.record, len(b.record),
                b.sample, draw, strata, b.stratum, table.lines, table.rows, prepared, *prepare,
                **keys, LINES=DRAWN_LINES,
            )  # fmt: skip
        if approx:
            tiles, keys = b.strata * LINE // SELECT_BLOCK, {**constants[0], "D0": kernels.KEYS.value}
            args = (table.rows, b.sample, tiles, table.dims, table.hyper, *factors)
            source = (_programs(tiles, device), args, keys)
            _select_from([source], b.state[_WINDOWS:], b.state[_ESTIMATE:], upper, lower)
        else:
            _launch(
                bracket._bracket_kernel, _programs(-(-b.strata // LINES), device, each=1), found,
                b.state, b.sample, b.strata, b.stratum, upper, lower, float(bracket_width),
                table.elements, b.capacity, LINES=LINES,
            )  # fmt: skip
        for i, c in enumerate(table.classes):
            place = c.base * BLOCK
            if update is None:
                _launch(
                    bracket._capture_pass_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles,
                    table.dims, table.hyper, *factors, b.state, *b.log, b.capacity, place,
                    BLOCK=BLOCK, **two, **constants[i],
                )  # fmt: skip
            else:
                _launch(
                    bracket._update_pass_kernel, max(c.tiles, 1), c.rows, c.tile_rows, c.tiles,
                    c.ranked_tiles, table.dims, table.hyper, *factors, found, b.state, *b.log,
                    b.capacity, place, update.prepared, update.keys, *update.weights, **two,
                    **update.of(c),
                )  # fmt: skip
        for i, c in enumerate(table.classes):
            _launch(
                bracket._resolve_kernel, programs[i], c.rows, c.tile_rows, c.ranked_tiles, table.dims,
                table.hyper, *factors, operand, found, b.state, b.record, b.log[0], b.capacity,
                table.elements, upper, lower, sum(programs), int(i == 0), updates, int(approx),
                BLOCK=BLOCK, **constants[i],
            )  # fmt: skip
        for i, c in enumerate(() if approx else table.classes):
            place = c.base * BLOCK
            if update is None:
                _launch(
                    bracket._capture_fix_kernel, programs[i], c.rows, c.tile_rows, c.tiles, table.dims,
                    table.hyper, *factors, b.state, b.record, *b.log, b.capacity, place, BLOCK=BLOCK,
                    **constants[i],
                )  # fmt: skip
            else:
                _launch(
                    bracket._update_fix_kernel, programs[i], c.rows, c.tile_rows, c.tiles,
                    c.ranked_tiles, table.dims, table.hyper, *factors, found, b.state, b.record, *b.log,
                    b.capacity, place, update.prepared, update.keys, *update.weights, **update.of(c),
                )  # fmt: skip
    return b.record


def _captured(table: Table, second: bool, factors: Factors, wanted: Ranking) -> Tensor:
    constants = [_risk_constants(c, second) for c in table.classes]
    unused = (
        table.hyper, table.ones, table.rows.view(torch.int32), table.extra, table.extra, 0, 0,
    )  # fmt: skip
    return _bracketed(table, wanted, table.zero, factors.of(table), unused, constants, None)


def squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """Sums of squares."""
    device = device_of(tensors)
    factors = Factors(inv_scale, None, False, device)
    hyper = torch.zeros(1, 6, dtype=torch.float64, device="cpu")
    group = torch.zeros(len(tensors), dtype=torch.int64, device="cpu")
    table: Table = make([Role("tensors", tensors)], hyper, group, BLOCK)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    if not tensors:
        return sums
    partial = torch.empty(table.tiles + 1, dtype=torch.float64, device=device)
    with _on(device):
        for c in table.classes:
            _launch(
                kernels._squares_kernel, _programs(c.tiles, device), c.rows, c.tile_rows, c.tiles,
                table.dims, factors.of(table)[0], partial, c.base, D0=c.dtypes[0],
                LINEAR=c.linear, ALIGNED=c.aligned, BLOCK=BLOCK,
            )  # fmt: skip
            _launch(
                kernels._sums_kernel, len(c.rows), c.rows, partial, c.base, sums, BLOCK=BLOCK, PARTS=256
            )
    return sums
