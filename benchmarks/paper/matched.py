"""Robust accuracy at the same clean accuracy.

A method that learns more slowly looks more robust for as long as it has learnt less: accuracy under
attack often falls while clean accuracy still rises. So a method is compared with its baseline *stopped
where it was as accurate on clean examples*.

Definition. A run is evaluated at some steps on the way, which gives a curve of points (clean, robust)
in the order of the steps. The robust accuracy of the run at clean accuracy c is read where the curve
first reaches c: at the first evaluation i whose clean accuracy is c or more, on the straight line from
evaluation i - 1, whose clean accuracy is below c. What the curve does later (clean accuracy is not
monotone) does not matter: someone who stops at c stops there. If the first evaluation of all is at c or
above, its robust accuracy is taken as it is; such runs are counted (``at_once``), as they may have had
another one at c itself. A run that never reaches c has none, and is counted (``never``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.paper.stats import SETTING, Comparison, compare

RUN = [*SETTING, "method", "seed"]
_POINT = ["step", "clean_accuracy"]


class Reading(NamedTuple):
    """Where a curve first reaches a clean accuracy.

    Attributes:
        robust: the robust accuracy there; NaN if it never does.
        step: the step, interpolated like it.
        how: `"between"` two evaluations, `"at once"` (the first one is there), or `"never"`.
    """

    robust: float
    step: float
    how: str


def read_at(curve: pd.DataFrame, clean: float, robust: str = "adversarial_accuracy") -> Reading:
    """Robust accuracy of one run where it first reaches a clean accuracy (see the module).

    Args:
        curve: the run's evaluations: ``step``, ``clean_accuracy`` and ``robust``, in any order.
        clean: the clean accuracy, as a fraction.
        robust: the column that is read.
    """
    points = curve[[*_POINT, robust]].dropna().sort_values("step").to_numpy(dtype=float)
    reached = np.flatnonzero(points[:, 1] >= clean)
    if not len(reached):
        return Reading(math.nan, math.nan, "never")
    after = points[reached[0]]
    if reached[0] == 0:
        return Reading(after[2], after[0], "at once")
    before = points[reached[0] - 1]
    share = (clean - before[1]) / (after[1] - before[1])
    step, _, value = before + share * (after - before)
    return Reading(value, step, "between")


def matched(
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    methods: Sequence[str],
    baselines: Sequence[str],
    robust: str = "adversarial_accuracy",
) -> pd.DataFrame:
    """Each finished run against the baselines' runs of its seed, stopped at its clean accuracy.

    Args:
        runs: finished runs, with the columns of `RUN`, ``clean_accuracy`` and ``robust``: their final
            scores are what is compared.
        curves: evaluations, with the columns of `RUN`, ``step``, ``clean_accuracy`` and ``robust``.
        methods: whose final scores are compared.
        baselines: whose curves are read.
        robust: the column that is compared.

    Returns:
        One row for each pair of runs: the setting, ``method``, ``baseline``, ``seed``, ``clean`` (the
        method's), ``robust`` (the method's) and ``baseline_robust``, ``baseline_step``, ``how`` of
        `read_at`. Pairs without a curve of the baseline are left out.
    """
    by_run = dict(iter(curves.groupby(RUN)))
    rows = []
    for run in runs[runs["method"].isin(methods)].to_dict("records"):
        setting = tuple(run[column] for column in SETTING)
        for baseline in baselines:
            curve = by_run.get((*setting, baseline, run["seed"]))
            if baseline == run["method"] or curve is None:
                continue
            reading = read_at(curve, run["clean_accuracy"], robust)
            pair = (run["method"], baseline, run["seed"])
            rows.append((*setting, *pair, run["clean_accuracy"], run[robust], *reading))
    fields = ["baseline_robust", "baseline_step", "how"]
    columns = [*SETTING, "method", "baseline", "seed", "clean", "robust", *fields]
    return pd.DataFrame(rows, columns=columns)


def summarise(pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean gains over seeds, with the t-test of `stats.compare` (paired: the same seeds).

    Args:
        pairs: as `matched` gives them.

    Returns:
        One row for each setting, method and baseline: the number of ``runs``, how many of the
        baseline's were there ``at_once`` and ``never`` (which have no difference and so no part in the
        mean), mean ``clean`` of all, and the fields of `stats.Comparison`.
    """
    rows = []
    keys = [*SETTING, "method", "baseline"]
    for key, group in pairs.groupby(keys, sort=False):
        by_seed = group.set_index("seed")
        reached = by_seed[by_seed["how"] != "never"]
        comparison = compare(reached["robust"], reached["baseline_robust"])
        counts = [(group["how"] == how).sum() for how in ("at once", "never")]
        rows.append((*key, len(group), *counts, group["clean"].mean(), *comparison))
    columns = [*keys, "runs", "at_once", "never", "clean", *Comparison._fields]
    return pd.DataFrame(rows, columns=columns)


def curve_over_seeds(
    curves: pd.DataFrame, levels: Sequence[float], robust: str = "adversarial_accuracy"
) -> pd.DataFrame:
    """Robust accuracy at given clean accuracies: what is plotted.

    Args:
        curves: evaluations of runs of one setting and method, with ``seed``.
        levels: clean accuracies.
        robust: the column that is read.

    Returns:
        One row for each level that a run reached between two evaluations: ``clean``, ``mean``, ``sd``
        and ``n``, the number of runs that did. Runs that were above a level from the start, or never
        reached it, have no part.
    """
    of_seeds = [curve for _, curve in curves.groupby("seed")]
    rows = []
    for level in levels:
        readings = (read_at(curve, level, robust) for curve in of_seeds)
        values = pd.Series([x.robust for x in readings if x.how == "between"], dtype=float)
        if len(values):
            rows.append((level, values.mean(), values.std(), len(values)))
    return pd.DataFrame(rows, columns=["clean", "mean", "sd", "n"])
