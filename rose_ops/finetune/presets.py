"""The published settings of ROSE: learning rate and upper threshold of each task, order and size.

From the authors' repository (https://github.com/jiangllan/ROSE), for RoBERTa-base and -large. They go
with tensor granularity, betas (0.9, 0.98), lower 0, gamma 0.5 and ten epochs.
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """Learning rate, and the fraction of the ranking that is kept (in the ensemble, of both)."""

    lr: float
    upper: float


PUBLISHED_GAMMA = 0.5
PUBLISHED = {
    ("first", "qnli", "base"): Preset(2e-5, 0.7),
    ("first", "qnli", "large"): Preset(3e-5, 0.5),
    ("first", "qqp", "base"): Preset(2e-5, 0.7),
    ("first", "qqp", "large"): Preset(2e-5, 0.7),
    ("first", "rte", "base"): Preset(4e-5, 0.8),
    ("first", "rte", "large"): Preset(1e-5, 0.8),
    ("first", "sst2", "base"): Preset(2e-5, 0.6),
    ("first", "sst2", "large"): Preset(4e-5, 0.7),
    ("second", "qnli", "base"): Preset(1e-5, 0.4),
    ("second", "qnli", "large"): Preset(1e-5, 0.5),
    ("second", "qqp", "base"): Preset(1e-4, 0.6),
    ("second", "qqp", "large"): Preset(1e-5, 0.6),
    ("second", "rte", "base"): Preset(4e-5, 0.6),
    ("second", "rte", "large"): Preset(2e-5, 0.5),
    ("second", "sst2", "base"): Preset(1e-4, 0.3),
    ("second", "sst2", "large"): Preset(1e-5, 0.5),
    ("ensemble", "qnli", "base"): Preset(1e-5, 0.9),
    ("ensemble", "qnli", "large"): Preset(1e-5, 0.3),
    ("ensemble", "qqp", "base"): Preset(5e-5, 0.75),
    ("ensemble", "qqp", "large"): Preset(1e-5, 0.8),
    ("ensemble", "rte", "base"): Preset(4e-5, 0.8),
    ("ensemble", "rte", "large"): Preset(1e-5, 0.85),
    ("ensemble", "sst2", "base"): Preset(5e-5, 0.4),
    ("ensemble", "sst2", "large"): Preset(1e-5, 0.7),
}
"""Preset by (order, task, size)."""


def candidates(order: str, task: str) -> list[Preset]:
    """The distinct presets of an order, those of the task first: what to try without a search."""
    keys = sorted((x for x in PUBLISHED if x[0] == order), key=lambda x: x[1] != task)
    return list(dict.fromkeys(PUBLISHED[x] for x in keys))
