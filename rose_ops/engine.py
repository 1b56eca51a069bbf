"""The only caller of operators: which one serves what is asked for, in which mode and order.

An optimizer's step comes here with a :class:`~rose_ops.batch.Batch`'s tensors, and so do the functions
of :mod:`rose_ops.functional`. ``ops`` is a backend's namespace of operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rose_ops import backends
from rose_ops.batch import Batch
from rose_ops.checks import MOMENTS, is_recording
from rose_ops.definitions import Field
from rose_ops.distributed import record_of
from rose_ops.layout import empty_masks, memory_order
from rose_ops.memory import with_own_storage
from rose_ops.operands import Operands, Ranking, Rounding, Scaling, Tables
from rose_ops.ranks import Ranks
from rose_ops.settings import Settings
from rose_ops.shards import is_spread, part_of


def clip(
    ops: Any, grads: list[Tensor], inv_scale: Tensor | None, max_norm: float | None
) -> tuple[Tensor | None, Scaling]:
    """The norm of all gradients (None: ``max_norm`` is), and what clips them to ``max_norm``."""
    if max_norm is None:
        return None, Scaling(inv_scale)
    sums = ops.sums_of_squares(grads, inv_scale)
    factors = ops.clip_factors(sums, max_norm)
    return factors[0], Scaling(inv_scale, factors[1:], sums)


def rank(
    ops: Any,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    tables: Tables,
    scaling: Scaling,
    ranking: Ranking,
    masks: list[Tensor] | None = None,
    record: Tensor | None = None,
) -> Tensor:
    """Rank all elements, and write which are selected into ``masks`` (None: the threshold alone).

    Args:
        exp_avgs: empty: first order.
        record: whose thresholds are known; None: they are found.

    Returns:
        The record of the selection (:class:`rose_ops.definitions.Field`).
    """
    return ops.rank_(
        masks or [], grads, exp_avgs, tables.hyper, tables.group, scaling.inv_scale, scaling.clip,
        record, ranking.numbers(is_known=record is not None),
    )  # fmt: skip


class Sums(NamedTuple):
    """Sums of squares of whole tensors, float64 ``[N]`` each; first order has no moments."""

    grads: Tensor
    exp_avgs: Tensor | None = None


def sums_of(
    ops: Any, mask: Tensor, grads: list[Tensor], exp_avgs: list[Tensor], scaling: Scaling
) -> Sums:
    """For :func:`rank_tensors`, whose ``mask`` is like one of them; ``exp_avgs`` empty: first order."""
    sums = scaling.sums
    if sums is None or len(sums) != len(grads):  # those of clipping are of all parameters
        # An operator is found by its tensors; there is none to ask about an empty list.
        sums = ops.sums_of_squares(grads, scaling.inv_scale) if grads else mask.double()
    return Sums(sums, ops.sums_of_squares(exp_avgs, None) if exp_avgs else None)


def rank_tensors(
    ops: Any, mask: Tensor, sums: Sums, tables: Tables, clip: Tensor | None, ranking: Ranking
) -> Tensor:
    """Rank whole tensors by their norms, and write which are selected into ``mask``, bool ``[N]``.

    Returns:
        The record of the selection.
    """
    return ops.select_tensors_(
        mask, *sums, tables.hyper, tables.group, clip, ranking.upper, ranking.lower,
        ranking.rank_inactive,
    )  # fmt: skip


def update(
    ops: Any,
    operands: Operands,
    masks: tuple[list[Tensor], list[Tensor]],
    tables: Tables,
    scaling: Scaling,
    gamma: float,
    ranking: Ranking | None,
    rounding: Rounding,
    *,
    record: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The masked update, in place.

    Args:
        masks: of the first order and of the second one; empty lists: none.
        ranking: finds the second-order mask on the way; None: it is given, or there is none.
        record: of the ranking, where its thresholds are known already.
        found_inf: not 0: nothing is updated.

    Returns:
        The record of the ranking (empty without one), and int64 ``[2]``: elements that were updated,
        and that were left alone because they are not finite.
    """
    first, second = masks
    result = ops.step_(
        *operands, first, second, record, tables.lr, tables.hyper, tables.group, tables.offsets,
        scaling.inv_scale, scaling.clip, found_inf, gamma,
        [] if ranking is None else ranking.numbers(is_known=record is not None),
        [rounding.seed, int(rounding.stochastic)],
    )  # fmt: skip
    found, counts = result.split([Field.SIZE, 2])
    return found, counts


class Engine:
    """What the captures and steps of one optimizer ask of operators.

    Attributes:
        records: of the latest selection of each kind, and ``"update"``: int64 ``[2]``.
        ranks: the processes that share rankings and norms; None: this one has everything. All of them
            make the same calls of the methods below, whatever gradients they have.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: tuple[torch.device, backends.Backend] | None = None
        self.records: dict[str, Tensor] = {}
        self.ranks: Ranks | None = None

    def resolve(self, p: Tensor) -> backends.Backend:
        """The backend for a parameter; raises where there is none."""
        # Without a FakeTensorMode that is on, nothing can be computed with fake tensors.
        is_faking = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        fake = isinstance(p, FakeTensor) and is_faking
        return backends.resolve(self._settings.backend, p.device, fake=fake)

    @property
    def checks_shapes(self) -> bool:
        """Whether operators refuse tensors that do not fit. The reference's do not."""
        return self._loaded is None or self._loaded[1].name != "reference"

    def _ops(self, batch: Batch) -> Any:
        device = batch.device if batch.params else self.ranks.device  # type: ignore[union-attr]
        if self._loaded is None or self._loaded[0] != device:
            whose = batch.parts[0] if batch.params else torch.empty(0, device=device)
            self._loaded = device, self.resolve(whose)
        return self._loaded[1].ops

    @property
    def _adds_up(self) -> bool:
        """Whether the operators add up over processes on their way through the data."""
        return self._loaded is not None and self._loaded[1].name == "cpu"

    def clip(
        self, batch: Batch, inv_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor | None, Scaling]:
        """See :func:`clip`."""
        if self.ranks is None or max_norm is None:
            return clip(self._ops(batch), batch.grads, inv_scale, max_norm)
        sums = self._shared_sums(self.ranks, batch, [batch.grads], inv_scale)
        factors = self._ops(batch).clip_factors(sums, max_norm)
        return factors[0], Scaling(inv_scale, factors[1:], sums if self.ranks.is_uniform else None)

    def _shared_sums(
        self, ranks: Ranks, batch: Batch, lists: list[list[Tensor]], inv_scale: Tensor | None
    ) -> Tensor:
        """Sums of squares over all processes, of which the first list's are scaled: one for each tensor
        of each list, or, of parts, one for all.
        """
        count = len(batch.params)
        own = torch.zeros(len(lists), count, dtype=torch.float64, device=ranks.device)
        if count:
            for row, tensors in zip(own, lists, strict=True):
                row.copy_(self._ops(batch).sums_of_squares(tensors, inv_scale))
                inv_scale = None
        for i, p in enumerate(batch.params):
            if not ranks.counts(p):
                own[:, i] = 0
        if not ranks.is_uniform:
            own = own.sum(1)
        return ranks.rows(own.flatten()).sum(0)

    def _ranking(self, kind: str, draw: int) -> Ranking:
        settings = self._settings
        rank_inactive = settings.inactive == "rank"
        return Ranking(*settings.fractions(kind), rank_inactive, settings.selection, draw)

    def _rank(
        self,
        kind: str,
        batch: Batch,
        exp_avgs: list[Tensor],
        hyper: Tensor,
        scaling: Scaling,
        ranking: Ranking,
        use: Callable[[Ranking, Tensor | None], Tensor],
    ) -> None:
        """Rank, over all processes if they share it, and use that.

        Args:
            batch: what is ranked, which may be nothing where processes share it.
            exp_avgs: empty: first order.
            use: called with a ranking and, where its thresholds are known, their record; returns the
                record.
        """
        ranks = self.ranks
        if ranks is None:
            self.records[kind] = use(ranking, None)
            return
        ops, record = self._ops(batch), None
        if self._adds_up and ranking.selection == "bracket":
            on_the_way = ranks.one_pass(kind, ranking, batch.params)
            if on_the_way is not None:
                with ranks.raising():
                    record = use(on_the_way, None)
        if record is None or record[Field.MISSES] < 0:  # it did nothing
            counted = kind if self._adds_up else None
            known = record_of(ranks, ops, batch, exp_avgs, hyper, scaling, ranking, counted)
            record = use(ranking, known)
        if self._adds_up:
            ranks.latest[kind] = record[:2].tolist()
        self.records[kind] = record

    def capture(
        self,
        kind: str,
        batch: Batch,
        hyper: Tensor,
        scaling: Scaling,
        draw: int,
        limit: Mapping[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """The mask of the elements, or tensors, of ``batch``: one for each of its parameters.

        Args:
            limit: bool masks of what is ranked, by parameter.
        """
        if limit is not None:
            batch, scaling = _within(limit, batch), scaling._replace(sums=None)
        ranking, tables = self._ranking(kind, draw), Tables(hyper, batch.layout.group)
        exp_avgs = batch.state("exp_avg") if kind == "second" else []
        if self._settings.granularity == "tensor":
            return self._capture_tensors(kind, batch, exp_avgs, tables, scaling, ranking)
        masks = _reused(kind, batch, _empty_masks) if batch.params else []

        def use(ranking: Ranking, record: Tensor | None) -> Tensor:
            if record is not None and not batch.params:
                return record
            ops = self._ops(batch)
            return rank(ops, batch.grads, exp_avgs, tables, scaling, ranking, masks, record)

        if batch.params or self.ranks is not None:
            self._rank(kind, batch, exp_avgs, hyper, scaling, ranking, use)
        return masks

    def _capture_tensors(
        self,
        kind: str,
        batch: Batch,
        exp_avgs: list[Tensor],
        tables: Tables,
        scaling: Scaling,
        ranking: Ranking,
    ) -> list[Tensor]:
        shared = None
        if self.ranks is not None:
            lists = [batch.grads, exp_avgs] if exp_avgs else [batch.grads]
            shared = self._shared_sums(self.ranks, batch, lists, scaling.inv_scale)
        if not batch.params:
            return []
        mask, *masks = _reused(f"{kind} of tensors", batch, _empty_masks_of_tensors)
        if shared is None:
            sums = sums_of(self._ops(batch), mask, batch.grads, exp_avgs, scaling)
        else:
            sums = Sums(*shared.split(len(batch.params)))
        self.records[kind] = rank_tensors(self._ops(batch), mask, sums, tables, scaling.clip, ranking)
        return masks

    def step(
        self,
        batch: Batch,
        selective: Batch | None,
        captured: dict[str, list[Tensor | None]],
        tables: Tables,
        scaling: Scaling,
        draw: int,
        found_inf: Tensor | None,
        limits: Mapping[str, Mapping[Tensor, Tensor]],
    ) -> None:
        """Update ``batch``, by masks that were captured and by those that are found now.

        Args:
            selective: of that what is ranked; None: this step selects nothing.
            captured: masks by kind; None of a parameter that had no gradient then.
            limits: to what is ranked now, by kind and parameter.
        """
        settings, masks = self._settings, dict(captured)
        ranking = None
        if selective is not None:
            for kind in settings.kinds:
                if kind in captured:
                    continue
                limit = limits.get(kind)
                if settings.granularity == "element" and limit is None:
                    ranking = self._ranking(kind, draw)
                    continue
                bools = self.capture(kind, selective, tables.hyper, scaling, draw, limit)
                # Hashing a tensor takes a call in Python.
                by_id = dict(zip(map(id, selective.params), bools, strict=True))
                masks[kind] = [by_id.get(id(p)) for p in batch.params]
        # A parameter that had no gradient at the capture is outside that ranking: selected.
        none = torch.empty(0, dtype=torch.uint8, device=tables.group.device)
        first, second = (
            [none if mask is None else mask for mask in masks.get(kind, ())]
            for kind in ("first", "second")
        )
        operands = Operands(batch.views, batch.grads, *map(batch.state, (*MOMENTS, "step")))
        rounding = Rounding(settings.seed, settings.param_rounding == "stochastic")

        def use(ranking: Ranking | None, record: Tensor | None) -> Tensor:
            if record is not None and not batch.params:
                return record
            found, counts = update(
                self._ops(batch), operands, (first, second), tables, scaling, settings.gamma, ranking,
                rounding, record=record, found_inf=found_inf,
            )  # fmt: skip
            if ranking is not None and ranking.shared and found[Field.MISSES] < 0:  # it did nothing
                return found
            if ranking is not None:
                self.records["second"] = found
            self.records["update"] = counts
            return found

        if ranking is not None and selective is not None:
            exp_avgs = selective.state("exp_avg")
            self._rank("second", selective, exp_avgs, tables.hyper, scaling, ranking, use)
        elif batch.params:
            use(None, None)


def _within(limit: Mapping[Tensor, Tensor], batch: Batch) -> Batch:
    """The batch with gradients that are NaN outside of ``limit``: no ranking counts or selects them."""
    grads = list(batch.grads)
    for i, p in enumerate(batch.params):
        if (mask := limit.get(p)) is not None:
            mask = part_of(mask if is_spread(mask) else mask.expand(p.shape), p)
            (mask,) = memory_order(batch.parts[i], (mask,))
            grads[i] = grads[i].masked_fill(~mask, torch.nan)
    return batch._replace(grads=grads)


def _reused(kind: str, batch: Batch, make: Callable[[Batch], list[Tensor]]) -> list[Tensor]:
    """Where masks go: again where the latest were, which are used up, or about to be replaced. A graph
    owns its masks."""
    if is_recording(batch.device):
        return make(batch)
    masks = batch.layout.masks
    if kind not in masks or masks[kind][0].device != batch.device:
        masks[kind] = make(batch)
    return masks[kind]


def _empty_masks(batch: Batch) -> list[Tensor]:
    return empty_masks([view.numel() for view in batch.views], batch.device)


def _empty_masks_of_tensors(batch: Batch) -> list[Tensor]:
    """The whole first, then its parts."""
    whole = torch.empty(len(batch.params), dtype=torch.bool, device=batch.device)
    return [whole, *(with_own_storage(one) for one in whole.unbind())]
