"""Statistics of finished runs: means over seeds, macro averages, one-tailed t-tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

# What a comparison holds fixed besides the method, and what a mean is taken over.
SETTING = ["preset", "model", "granularity", "task"]
CONFIDENCE = 0.95
# Differences that agree to this many accuracies' worth are the same but for rounding.
_ROUNDING = 1e-12


class Comparison(NamedTuple):
    """How much higher one sample is than another.

    Attributes:
        n: pairs, where seeds are common; the smaller of both samples' sizes otherwise.
        difference: mean of the first minus mean of the second (of the pairs, where there are any).
        low, high: two-sided 95% confidence interval of the difference.
        p: one-tailed p-value, alternative: the first mean is the higher one. NaN without a test.
        kind: `"paired"`, `"welch"`, or why there is no test.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    kind: str


def compare(first: pd.Series, second: pd.Series) -> Comparison:
    """One-tailed t-test of whether ``first`` is higher on average than ``second``.

    Paired (``scipy.stats.ttest_rel``) over the seeds that both have: runs of one seed share the
    classifier's initial weights and the order of the batches, and runs of other seeds would add what
    differs between seeds. Where no seed is common, Welch's test (``ttest_ind`` with
    ``equal_var=False``) over all seeds of both. The paper does not say which it used.

    There is no test with fewer than two pairs (or values on a side), or where nothing varies: t would
    be 0/0, or infinite from a few ties among accuracies that are counts of some hundred examples.

    Args:
        first: scores, indexed by seed. Missing (NaN) scores are left out.
        second: those it is compared with.

    Raises:
        ValueError: a seed comes twice, so that pairs would be ambiguous.
    """
    first, second = first.dropna(), second.dropna()
    for side in (first, second):
        if side.index.has_duplicates:
            twice = side.index[side.index.duplicated()][0]
            raise ValueError(
                f"seed {twice} comes twice in what is compared; expected one score for each seed "
                "(are there runs of several settings under one name?)"
            )
    common = first.index.intersection(second.index)
    if len(common):
        first, second, kind = first[common], second[common], "paired"
        still = np.ptp((first - second).to_numpy()) < _ROUNDING
    else:
        kind = "welch"
        still = all(len(side) < 2 or np.ptp(side.to_numpy()) < _ROUNDING for side in (first, second))
    n = min(len(first), len(second))
    difference = first.mean() - second.mean() if n else math.nan
    if n < 2 or still:
        why = "fewer than two seeds" if n < 2 else "the differences do not vary"
        return Comparison(n, difference, math.nan, math.nan, math.nan, why)
    if kind == "paired":
        one, two = (stats.ttest_rel(first, second, alternative=x) for x in ("greater", "two-sided"))
    else:
        one, two = (
            stats.ttest_ind(first, second, equal_var=False, alternative=x)
            for x in ("greater", "two-sided")
        )
    interval = two.confidence_interval(CONFIDENCE)
    return Comparison(n, difference, interval.low, interval.high, one.pvalue, kind)


def compare_methods(
    runs: pd.DataFrame, methods: Sequence[str], baselines: Sequence[str], score: str
) -> pd.DataFrame:
    """Each method against each baseline, in each setting that has both.

    Args:
        runs: one row for each run, with the columns of `SETTING`, ``method``, ``seed`` and ``score``.
        methods: what is claimed to be better.
        baselines: than these. Pairs of a method with itself are left out.
        score: the column that is compared; higher is better.

    Returns:
        One row for each comparison: the setting, ``method``, ``baseline``, the fields of `Comparison`,
        and ``q``, the p-value adjusted for the number of tests in this table (Benjamini and Hochberg,
        1995): of the rows with q < 0.05, one in twenty is expected to be chance.
    """
    rows = []
    for setting, group in runs.groupby(SETTING, sort=False):
        by_method = {name: rows.set_index("seed")[score] for name, rows in group.groupby("method")}
        for method in methods:
            rows += [
                (*setting, method, baseline, *compare(by_method[method], by_method[baseline]))
                for baseline in baselines
                if baseline != method and {method, baseline} <= by_method.keys()
            ]
    table = pd.DataFrame(rows, columns=[*SETTING, "method", "baseline", *Comparison._fields])
    tested = table["p"].notna()
    table["q"] = math.nan
    if tested.any():
        table.loc[tested, "q"] = stats.false_discovery_control(table.loc[tested, "p"].astype(float))
    return table


def over_seeds(runs: pd.DataFrame, scores: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds.

    Args:
        runs: one row for each run.
        scores: the columns to average; missing (NaN) ones do not count.
        keys: what tells rows of the result apart.

    Returns:
        Indexed by ``keys``, in the order in which they first come; columns ``(score, "mean")``,
        ``(score, "sd")`` (with n - 1; NaN for one seed) and ``(score, "n")``.
    """
    grouped = runs.groupby(list(keys), sort=False)[list(scores)].agg(["mean", "std", "count"])
    return grouped.rename(columns={"std": "sd", "count": "n"}, level=1)


def macro_average(runs: pd.DataFrame, keys: Sequence[str] = ("method",)) -> pd.DataFrame:
    """The last two columns of the paper's Tables 1 and 2.

    Over tasks, each with its mean over seeds: ``average`` is that of (clean + adversarial) / 2,
    ``drop`` that of clean - adversarial. A row that lacks one of the tasks has NaN there, as an average
    over other tasks could not be compared.

    Args:
        runs: with ``task``, ``clean_accuracy`` and ``adversarial_accuracy``, of those tasks that count.
        keys: what tells rows of the result apart.
    """
    scores = ["clean_accuracy", "adversarial_accuracy"]
    means = runs.groupby([*keys, "task"], sort=False)[scores].mean().dropna()
    by_task = means.groupby(list(keys), sort=False)
    mean = by_task.mean().reindex(runs.groupby(list(keys), sort=False).size().index)
    complete = by_task.size().reindex(mean.index) == runs["task"].nunique()
    return pd.DataFrame(
        {
            "average": mean.mean(axis=1).where(complete),
            "drop": (mean["clean_accuracy"] - mean["adversarial_accuracy"]).where(complete),
        }
    )
