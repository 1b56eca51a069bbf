"""Robust accuracy at the same clean accuracy, over runs and seeds.

How it is read from a curve, and why, is in `rose_ops.finetune.curves`. Runs that are as accurate at
their first evaluation already are counted (``at_once``), as they may have had another robust accuracy
at just that clean accuracy; so are runs that never are (``never``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from benchmarks.paper.stats import SETTING, Comparison, compare
from rose_ops.finetune import curves as of_runs
from rose_ops.finetune.curves import Reading

RUN = [*SETTING, "method", "seed"]
_POINT = ["step", "clean_accuracy"]


def read_at(curve: pd.DataFrame, clean: float, robust: str = "adversarial_accuracy") -> Reading:
    """Robust accuracy of one run where it first reaches a clean accuracy (see the module).

    Args:
        curve: the run's evaluations: ``step``, ``clean_accuracy`` and ``robust``, in any order.
        clean: the clean accuracy, as a fraction.
        robust: the column that is read.
    """
    points = curve[[*_POINT, robust]].dropna().itertuples(index=False, name=None)
    return of_runs.read_at(itertools.starmap(of_runs.Point, points), clean)


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
