"""The operators' passes over tensors: what is launched, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rose_ops.backends.triton import bracket, sample, squares, update, words
from rose_ops.backends.triton import select as selection
from rose_ops.backends.triton.arguments import Factors, Ranking, UpdatePlan
from rose_ops.backends.triton.launch import (
    BLOCK,
    COUNTED_LINES,
    DRAWN_LINES,
    SELECT_BLOCK,
    launch,
    on,
    programs_for,
)
from rose_ops.backends.triton.table import Role, Table, check, check_counts, device_of, make
from rose_ops.definitions import APPROX_FEWEST, LINE, Field, Hyper, Mode

bracket_width = 1.0  # that half-widths are multiplied by; else than 1 in tests


def _risk_roles(grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> list[Role]:
    return [
        Role("grads", words.GRAD, grads),
        *([Role("exp_avgs", words.MOMENT, exp_avgs)] if exp_avgs else []),
    ]


def select(
    grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor, factors: Factors,
    wanted: Ranking,
) -> Tensor:  # fmt: skip
    """The record of a ranking, for which nothing else is done."""
    roles = _risk_roles(grads, exp_avgs)
    if wanted.mode == Mode.APPROX and sum(g.numel() for g in grads) >= APPROX_FEWEST:
        return _ranked_on_the_way(make(roles, hyper, group, BLOCK), bool(exp_avgs), factors, wanted)
    table = make(roles, hyper, group, SELECT_BLOCK)
    device = table.rows.device
    state = torch.zeros(words.STATE.value, dtype=torch.int64, device=device)
    record = state[words.ESTIMATE.value :][: Field.SIZE]
    common = {
        **factors.of(table), **wanted.arguments, "SECOND_ORDER": bool(exp_avgs),
        "BLOCK": SELECT_BLOCK, "elements": table.elements, "state": state, "record": record,
        "found_inf": table.zero, "log_keys": table.rows.view(torch.int32), "capacity": 0,
    }  # fmt: skip
    with on(device):
        _select([{**common, **c.arguments} for c in table.classes], device)
    return record


def _select(sources: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """The record of all that there is in the arguments of a launch each."""
    programs = [programs_for(source["ranked_tiles"], device) for source in sources]
    for number in range(words.ROUNDS.value):
        for i, (own, source) in enumerate(zip(programs, sources, strict=True)):
            its = {**source, "programs": sum(programs), "round": number, "first": int(i == 0)}
            launch(selection.select_kernel, own, its)


def capture(
    masks: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], hyper: Tensor, group: Tensor,
    factors: Factors, wanted: Ranking, record: Tensor | None,
) -> Tensor:  # fmt: skip
    """Masks of a ranking, whose record is known or found and returned."""
    device, roles = device_of(grads), _risk_roles(grads, exp_avgs)
    check_counts(roles)
    if len(masks) != len(grads):
        raise RuntimeError(
            f"masks has {len(masks)} tensors; expected one for each of {len(grads)} gradients"
        )
    for mask, g in zip(masks, grads, strict=True):
        check("masks", mask, torch.uint8, (g.numel() + 7) // 8, device)
    table = make(roles, hyper, group, BLOCK, columns={words.BITS: [mask.data_ptr() for mask in masks]})
    if record is not None:
        check("record", record, torch.int64, Field.SIZE, device)
    elif wanted.mode == Mode.EXACT:
        record = select(grads, exp_avgs, hyper, group, factors, wanted)
    else:
        return _ranked_on_the_way(table, bool(exp_avgs), factors, wanted)
    with on(device):
        for c in table.classes:
            given = {"record": record, "SECOND_ORDER": bool(exp_avgs), "BLOCK": BLOCK}
            arguments = {**factors.of(table), **c.arguments, **given}
            launch(selection.capture_kernel, programs_for(c.tiles, device), arguments)
    return record.clone() if wanted.mode == Mode.GIVEN else record


def step(plan: UpdatePlan, wanted: Ranking | None, record: Tensor | None) -> Tensor:
    """An update by masks, by a record, or with a ranking of the selective tensors. Returns the record,
    and how many elements were updated and not finite."""
    if wanted is not None and wanted.mode == Mode.EXACT:
        columns = plan.hyper.reshape(-1, len(Hyper))
        chosen = [i for i, k in enumerate(plan.group.tolist()) if columns[k, Hyper.SELECTIVE] != 0]
        pairs = [plan.grads[i] for i in chosen], [plan.exp_avgs[i] for i in chosen]
        record = select(*pairs, plan.hyper, plan.group[chosen], plan.factors, wanted)
    elif wanted is not None and wanted.mode != Mode.GIVEN:
        return _bracketed(plan.table, wanted, plan.arguments, True)
    result = torch.empty(Field.SIZE + 2, dtype=torch.int64, device=plan.device)
    selected = result if record is None else record
    arguments = {**plan.arguments, "record": result, "selection": selected}
    with on(plan.device):
        launch(update.prepare_kernel, max(plan.arguments["count"], 1), arguments)
        for c in plan.table.classes:
            launch(update.update_kernel, max(c.tiles, 1), {**arguments, **c.arguments})
    return result


def _ranked_on_the_way(table: Table, second: bool, factors: Factors, wanted: Ranking) -> Tensor:
    """Masks, where rows have memory for them."""
    arguments = {
        **factors.of(table), "SECOND_ORDER": second, "found_inf": table.zero, "all_rows": table.rows,
        "count": 0, "hyper": table.hyper, "lr": table.hyper, "gamma": table.gamma, "seed": 0,
        "prepared": table.rows.view(torch.int32), "FRACTIONAL": False, "BLOCK": BLOCK,
    }  # fmt: skip
    return _bracketed(table, wanted, arguments, False)[: Field.SIZE]


@dataclass
class Bracket:
    """Workspaces of a bracketed pass, within 1 bit for each element and 16 MiB."""

    stratum: int  # lines of which one is sampled
    strata: int
    capacity: int  # of the log
    state: Tensor
    record: Tensor
    log: Tensor  # its places, and from ``log_keys`` on the rest; before the pass, the sample

    @classmethod
    def of(
        cls, lines: int, elements: int, updates: bool, approx: bool, device: torch.device
    ) -> Bracket:
        # The log shrinks as 1 / sqrt(lines): n^(2/3) lines balance its cost and the sample's. More, so
        # that it fits, where 1 bit for each element is much of the memory.
        wanted = max(1.0, 0.4 * elements ** (2 / 3), elements / 640)
        if approx:  # as definitions.sampled has it
            wanted = min(max(lines // 128, min(lines // 8, 1 << 14)), 1 << 16)
        stratum = max(1, int(lines // wanted))
        strata = -(-lines // stratum)
        size = 6 if updates else 3  # int32 words of an entry
        capacity = max(1, min(elements, (elements // 8 + (14 << 20)) // (4 * size)))
        capacity = 0 if approx else capacity
        numbers = max(capacity * size, LINE * strata)
        return cls(
            stratum, strata, capacity,
            torch.empty(words.STATE.value, dtype=torch.int64, device=device),
            torch.empty(words.RECORD.value, dtype=torch.int64, device=device),
            torch.empty((numbers + 1) // 2, dtype=torch.int64, device=device),
        )  # fmt: skip

    @property
    def arguments(self) -> dict[str, Any]:
        sample = self.log.view(torch.int32)
        keys, old = (sample[number * self.capacity :] for number in (2, 3))
        return {
            "state": self.state, "record": self.record, "sample": sample, "log_places": self.log,
            "log_keys": keys, "log_old": old.view(torch.float32), "capacity": self.capacity,
            "stratum": self.stratum, "strata": self.strata,
        }  # fmt: skip


def _bracketed(table: Table, wanted: Ranking, given: Mapping[str, Any], updates: bool) -> Tensor:
    """The launches of bracket.py, of an update or a capture, with what is ``given`` to kernels."""
    approx = wanted.mode == Mode.APPROX and table.elements >= APPROX_FEWEST
    device, classes = table.rows.device, table.classes
    b = Bracket.of(table.lines, table.elements, updates, approx, device)
    common = {
        **given, **wanted.arguments, **b.arguments, "width": float(bracket_width),
        "elements": table.elements, "lines": table.lines,
        "course": words.APPROX.value if approx else words.EXACT.value,
        "TWO": wanted.lower > 0,
    }  # fmt: skip
    each = [{**common, **c.arguments, "first_place": c.base * BLOCK} for c in classes]
    with on(device):
        for i, (c, own) in enumerate(zip(classes, each, strict=True)):
            own["count"], strata = given["count"] if i == 0 else 0, b.strata if c.ranked else 0
            programs = max(-(-strata // DRAWN_LINES), own["count"], 1)
            launch(sample.sample_kernel, programs, {**own, "strata": strata, "LINES": DRAWN_LINES})
        if approx:
            keys = b.strata * LINE
            its = {"log_keys": common["sample"], "capacity": keys}
            its |= {"record": b.state[words.ESTIMATE.value :], "ranked_tiles": -(-keys // BLOCK)}
            _select([{**each[0], **its}], device)
        else:
            programs = programs_for(-(-b.strata // COUNTED_LINES), device, each=1)
            launch(sample.bracket_kernel, programs, {**common, "LINES": COUNTED_LINES})
        for own in each:
            kernel = bracket.update_pass_kernel if updates else bracket.capture_pass_kernel
            launch(kernel, max(own["tiles"], 1), own)
        if approx:
            launch(selection.estimated_record_kernel, 1, common)
            return b.record
        _select(each, device)
        for own in each:
            kernel = bracket.update_finish_kernel if updates else bracket.capture_finish_kernel
            launch(kernel, programs_for(own["tiles"], device), own)
    return b.record


def sums_of_squares(tensors: list[Tensor], inv_scale: Tensor | None) -> Tensor:
    """See :func:`rose_ops.reference.sums_of_squares`."""
    device = device_of(tensors)
    factors = Factors(inv_scale, None, False, device)
    hyper = torch.zeros(1, len(Hyper), dtype=torch.float64, device="cpu")
    group = torch.zeros(len(tensors), dtype=torch.int64, device="cpu")
    table = make([Role("tensors", words.GRAD, tensors)], hyper, group, BLOCK)
    sums = torch.empty(len(tensors), dtype=torch.float64, device=device)
    if not tensors:
        return sums
    partial = torch.empty(table.tiles + 1, dtype=torch.float64, device=device)
    with on(device):
        for c in table.classes:
            own = {
                **factors.of(table),
                **c.arguments,
                "partial": partial[c.base :],
                "sums": sums,
                "BLOCK": BLOCK,
            }
            launch(squares.squares_kernel, programs_for(c.tiles, device), own)
            launch(squares.sums_kernel, len(c.rows), own)
    return sums
