"""`python -m benchmarks.paper summary`: what the study says, as Markdown for a page or a terminal.

One table for each model, granularity and task, of the methods that have enough seeds. All differences
are of AdvGLUE accuracy, in points, with their two-sided 95% intervals over seeds (paired): to the runs
of AdamW and of a random mask that keeps as much, with the same seeds, and to AdamW where it first was
as accurate on clean examples (`matched`). Random masks are named with what they keep; those of the
study are of second order's size, and others are run by `run --methods random-mask --set upper=0.6`.

The mean of the last difference is of those runs of AdamW that ever were as accurate. Some of them may
have been at their first evaluation, at once: how robust they were when they were just as accurate was
not measured, and the first evaluation stands for it. `[2 of 3 runs, 1 at once]` says that one run has
no part, and that of the two that have, one was there at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.paper import matched, rows
from benchmarks.paper.arguments import at_least
from benchmarks.paper.methods import METHODS, has_granularity
from benchmarks.paper.runner import RESULTS
from benchmarks.paper.stats import Comparison, compare
from benchmarks.paper.tables import percent

_ADVERSARIAL = "adversarial_accuracy"
COLUMNS = (
    *("method", "seeds", "clean", "AdvGLUE", "over AdamW"),
    *("over a random mask of its size", "over AdamW at the same clean accuracy"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `summary`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--fewest", type=at_least(1), default=3, metavar="SEEDS", help="of a method")


def summary(args: argparse.Namespace) -> None:
    """Print the tables."""
    found = list(tables(args.results, args.fewest))
    for title, table in found:
        print(f"### {title}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n")
    if not found:
        print(f"no method has {args.fewest} seeds in {args.results}: try --fewest 1")


def tables(folder: Path, fewest: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and table of each comparison."""
    runs = rows.read_runs(folder)
    curves = rows.read_curves(folder, runs)
    for (preset, model, granularity), group in rows.comparisons(rows.main_settings(runs)):
        alike = curves[curves["run"].isin(group["run"])].assign(granularity=granularity)
        for task, of_task in group.groupby("task", sort=False):
            masks = rows.random_masks(runs, of_task)
            table = _table(of_task, masks, alike[alike["task"] == task], fewest)
            # Methods without masks are in the tables of both granularities: alone, they make none.
            if table["method"].map(_has_masks).any() or (granularity == "none" and len(table)):
                steps = of_task["steps"].iloc[0]
                yield f"{task}, {model}, by {granularity}, {preset} settings, {steps} steps", table


def _table(
    runs: pd.DataFrame, masks: dict[float, pd.DataFrame], curves: pd.DataFrame, fewest: int
) -> pd.DataFrame:
    named = [group.assign(method=_random(upper)) for upper, group in masks.items()]
    runs = pd.concat([runs[runs["method"] != "random-mask"], *named])
    scores = {name: x.set_index("seed")[_ADVERSARIAL] for name, x in runs.groupby("method")}
    pairs = matched.matched(runs, curves, list(scores), ["adamw"])
    gains = {x["method"]: _gain(x) for x in matched.summarise(pairs).to_dict("records")}

    def over(method: str, baseline: str) -> str:
        if method == baseline or baseline not in scores:
            return ""
        return _over(compare(scores[method], scores[baseline]))

    lines = []
    for method, group in runs.groupby("method", sort=False):
        if len(group) >= fewest:
            accuracies = [
                percent(group[x].mean(), group[x].std()) for x in ("clean_accuracy", _ADVERSARIAL)
            ]
            over_mask = over(method, _random(_kept(group))) if _has_masks(method) else ""
            differences = over(method, "adamw"), over_mask, gains.get(method, "")
            lines.append((method, len(group), *accuracies, *differences))
    order = list(METHODS)
    lines.sort(key=lambda line: order.index(line[0].partition(",")[0]))  # else as they are
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _random(kept: float) -> str:
    return f"random-mask, {kept:.0%}"


def _has_masks(method: str) -> bool:
    return has_granularity(method.partition(",")[0])


def _kept(runs: pd.DataFrame) -> float:
    """The share that a method's masks keep."""
    one = runs.iloc[0]
    kept = float(one["upper"] - one["lower"])
    return round(1 - kept if one["method"] == "inverted-mask" else kept, 9)


def _gain(row: dict[str, Any]) -> str:
    """With how many of the baseline's runs the mean is of, where some never get there or some are there
    at their first evaluation, and how many those are."""
    at_once = f", {row['at_once']} at once" if row["at_once"] else ""
    of = f" [{row['n']} of {row['runs']} runs{at_once}]" if row["never"] or at_once else ""
    return _over(Comparison(*(row[x] for x in Comparison._fields))) + of


def _over(found: Comparison) -> str:
    interval = "" if pd.isna(found.low) else f" ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return percent(found.difference, sign="+") + interval
