"""What selections and updates report, as tensors: reading them is the caller's choice."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from rose_ops.definitions import Field


class Selection(NamedTuple):
    """What a selection found, as 0-dim tensors: reading them is the caller's choice.

    Attributes:
        threshold: tau_h, the largest risk kept (float32; NaN: nothing ranked was kept).
        kept: ranked elements that are kept, ``tau_l < r <= tau_h`` (int64, as all below). Ties at
            tau_h are all kept; 0 if tau_l equals tau_h.
        ranked: elements in the ranking.
        inactive: elements without evidence to rank by, which are selected.
        nonfinite: elements whose gradient or first moment is NaN or inf, which are not.
        misses: 1 if ``selection="bracket"`` had to settle for an end of its bracket.

    At ``granularity="tensor"`` the counts are of tensors.
    """

    threshold: Tensor
    kept: Tensor
    ranked: Tensor
    inactive: Tensor
    nonfinite: Tensor
    misses: Tensor

    @classmethod
    def from_record(cls, record: Tensor) -> Selection:
        """Views of an operator's selection record."""
        fields = record.unbind()
        threshold = fields[Field.HIGH].to(torch.int32).view(torch.float32)
        counts = (Field.KEPT, Field.RANKED, Field.INACTIVE, Field.NONFINITE, Field.MISSES)
        return cls(threshold, *(fields[field] for field in counts))


class UpdateCounts(NamedTuple):
    """What an update did, as 0-dim int64 tensors.

    Attributes:
        updated: elements with M > 0 (all those of plain AdamW).
        nonfinite: elements left alone because their gradient or first moment is NaN or inf.
    """

    updated: Tensor
    nonfinite: Tensor


class Selections(TypedDict, total=False):
    """What :attr:`rose_ops.RoseFusedAdamW.selection` has, of those that there were."""

    first: Selection
    second: Selection
    update: UpdateCounts
