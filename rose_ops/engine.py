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
from rose_ops.layout import empty_masks, memory_order
from rose_ops.memory import with_own_storage
from rose_ops.reference import Field, Mode
from rose_ops.settings import Settings


class Tables(NamedTuple):
    """What tensors share, as operators read it; see :func:`rose_ops.reference.step_`.

    Attributes:
        hyper: float64 ``[G, 6]``, the groups' hyperparameters (:class:`rose_ops.reference.Hyper`).
        group: int64 ``[N]``, each tensor's row of that.
        lr: float64 ``[G]``; for updates only.
        offsets: int64 ``[N]``, where each tensor begins in the index space; for updates only.
    """

    hyper: Tensor
    group: Tensor
    lr: Tensor | None = None
    offsets: Tensor | None = None


class Scaling(NamedTuple):
    """What gradients are multiplied by before they are used; None: by nothing.

    Attributes:
        inv_scale: float32 scalar, of a loss scale.
        clip: float32 ``[2]``, of selective tensors and of plain ones.
        sums: float64 ``[N]``, the sums of squares that ``clip`` follows from.
    """

    inv_scale: Tensor | None = None
    clip: Tensor | None = None
    sums: Tensor | None = None


class Ranking(NamedTuple):
    """What one ranking is asked for.

    Attributes:
        upper, lower: fractions in units of 1e-9.
        rank_inactive: whether elements without evidence are ranked.
        selection: ``"exact"``, ``"bracket"`` or ``"approx"``.
        draw: which sample is taken, 32 bits.
    """

    upper: int
    lower: int
    rank_inactive: bool = False
    selection: str = "exact"
    draw: int = 0

    def numbers(self) -> list[int]:
        """As operators take it."""
        mode = int(Mode[self.selection.upper()])
        return [mode, self.upper, self.lower, int(self.rank_inactive), self.draw]


class Operands(NamedTuple):
    """Of an update, one tensor for each parameter."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


class Rounding(NamedTuple):
    """Of what is stored in bfloat16; see :func:`rose_ops.reference.step_`."""

    seed: int = 0
    stochastic: bool = False


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
) -> Tensor:
    """Rank all elements, and write which are selected into ``masks`` (None: the threshold alone).

    Args:
        exp_avgs: empty: first order.

    Returns:
        The record of the selection (:class:`rose_ops.reference.Field`).
    """
    return ops.rank_(
        masks or [], grads, exp_avgs, tables.hyper, tables.group, scaling.inv_scale, scaling.clip, None,
        ranking.numbers(),
    )  # fmt: skip


def rank_tensors(
    ops: Any,
    mask: Tensor,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    tables: Tables,
    scaling: Scaling,
    ranking: Ranking,
) -> Tensor:
    """Rank whole tensors by their norms, and write which are selected into ``mask``, bool ``[N]``.

    Args:
        exp_avgs: empty: first order.

    Returns:
        The record of the selection.
    """
    sums = scaling.sums
    if sums is None or len(sums) != len(grads):  # those of clipping are of all parameters
        # An operator is found by its tensors; there is none to ask about an empty list.
        sums = ops.sums_of_squares(grads, scaling.inv_scale) if grads else mask.double()
    of_moments = ops.sums_of_squares(exp_avgs, None) if exp_avgs else None
    return ops.select_tensors_(
        mask, sums, of_moments, tables.hyper, tables.group, scaling.clip, ranking.upper, ranking.lower,
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
    found_inf: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The masked update, in place.

    Args:
        masks: of the first order and of the second one; empty lists: none.
        ranking: finds the second-order mask on the way; None: it is given, or there is none.
        found_inf: not 0: nothing is updated.

    Returns:
        The record of the ranking (None without one), and int64 ``[2]``: elements that were updated, and
        that were left alone because they are not finite.
    """
    first, second = masks
    result = ops.step_(
        *operands, first, second, None, tables.lr, tables.hyper, tables.group, tables.offsets,
        scaling.inv_scale, scaling.clip, found_inf, gamma,
        [] if ranking is None else ranking.numbers(), [rounding.seed, int(rounding.stochastic)],
    )  # fmt: skip
    record, counts = result.split([Field.SIZE, 2])
    return None if ranking is None else record, counts


class Engine:
    """What the captures and steps of one optimizer ask of operators.

    Attributes:
        records: of the latest selection of each kind, and ``"update"``: int64 ``[2]``.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: tuple[torch.device, backends.Backend] | None = None
        self.records: dict[str, Tensor] = {}

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
        if self._loaded is None or self._loaded[0] != batch.device:
            self._loaded = batch.device, self.resolve(batch.params[0])
        return self._loaded[1].ops

    def clip(
        self, batch: Batch, inv_scale: Tensor | None, max_norm: float | None
    ) -> tuple[Tensor | None, Scaling]:
        """See :func:`clip`."""
        return clip(self._ops(batch), batch.grads, inv_scale, max_norm)

    def _ranking(self, kind: str, draw: int) -> Ranking:
        settings = self._settings
        rank_inactive = settings.inactive == "rank"
        return Ranking(*settings.fractions(kind), rank_inactive, settings.selection, draw)

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
            mask, *masks = _reused(f"{kind} of tensors", batch, _empty_masks_of_tensors)
            self.records[kind] = rank_tensors(
                self._ops(batch), mask, batch.grads, exp_avgs, tables, scaling, ranking
            )
            return masks
        masks = _reused(kind, batch, _empty_masks)
        self.records[kind] = rank(
            self._ops(batch), batch.grads, exp_avgs, tables, scaling, ranking, masks
        )
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
        none = torch.empty(0, dtype=torch.uint8, device=batch.device)
        first, second = (
            [none if mask is None else mask for mask in masks.get(kind, ())]
            for kind in ("first", "second")
        )
        record, counts = update(
            self._ops(batch),
            Operands(batch.views, batch.grads, *(batch.state(key) for key in (*MOMENTS, "step"))),
            (first, second),
            tables,
            scaling,
            settings.gamma,
            ranking,
            Rounding(settings.seed, settings.param_rounding == "stochastic"),
            found_inf=found_inf,
        )
        if record is not None:
            self.records["second"] = record
        self.records["update"] = counts


def _within(limit: Mapping[Tensor, Tensor], batch: Batch) -> Batch:
    """The batch with gradients that are NaN outside of ``limit``: no ranking counts or selects them."""
    grads = list(batch.grads)
    for i, p in enumerate(batch.params):
        if (mask := limit.get(p)) is not None:
            (mask,) = memory_order(p, (mask.expand(p.shape),))
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
