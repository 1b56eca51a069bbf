"""Robust accuracy at the same clean accuracy, from evaluations along the way.

A method that learns more slowly looks more robust for as long as it has learnt less: accuracy under
attack often falls while clean accuracy still rises. So a method is compared with its baseline *stopped
where it was as accurate on clean examples*.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple


class Point(NamedTuple):
    """An evaluation: after which step, and the accuracies, as fractions."""

    step: float
    clean: float
    robust: float


class Reading(NamedTuple):
    """Where a curve first reaches a clean accuracy.

    Attributes:
        robust: The robust accuracy there; NaN if it never does.
        step: The step, interpolated like it.
        how: `"between"` two evaluations, `"at once"` (the first one is there), or `"never"`.
    """

    robust: float
    step: float
    how: str


def read_at(points: Iterable[Point], clean: float) -> Reading:
    """Robust accuracy where a run first reaches a clean accuracy.

    It is read at the first evaluation i whose clean accuracy is `clean` or more, on the straight line
    from evaluation i - 1, whose clean accuracy is below it. What the curve does later (clean accuracy
    is not monotone) does not matter: someone who stops at `clean` stops there. If the first evaluation
    of all is at `clean` or above, its robust accuracy is taken as it is.

    Args:
        points: The run's evaluations, in any order.
        clean: The clean accuracy.
    """
    points = sorted(points)
    if points and points[0].clean >= clean:
        return Reading(points[0].robust, points[0].step, "at once")
    for before, after in itertools.pairwise(points):
        if after.clean >= clean:
            share = (clean - before.clean) / (after.clean - before.clean)
            step, _, robust = (a + share * (b - a) for a, b in zip(before, after, strict=True))
            return Reading(robust, step, "between")
    return Reading(math.nan, math.nan, "never")
