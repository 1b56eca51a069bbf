"""What operators take together: tables of the groups, factors of gradients, what is asked of a ranking,
the tensors of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rose_ops.definitions import Mode


class Tables(NamedTuple):
    """What tensors share, as operators read it; see :func:`rose_ops.reference.step_`.

    Attributes:
        hyper: float64 ``[G, 6]``, the groups' hyperparameters (:class:`rose_ops.definitions.Hyper`).
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
        shared: of a ranking that processes share; see :meth:`rose_ops.ranks.Ranks.one_pass`.
    """

    upper: int
    lower: int
    rank_inactive: bool = False
    selection: str = "exact"
    draw: int = 0
    shared: Sequence[int] = ()

    def numbers(self, is_known: bool = False) -> list[int]:
        """As operators take it.

        Args:
            is_known: whether its thresholds are, by a record.
        """
        mode = int(Mode.GIVEN if is_known else Mode[self.selection.upper()])
        return [mode, self.upper, self.lower, int(self.rank_inactive), self.draw, *self.shared]


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
