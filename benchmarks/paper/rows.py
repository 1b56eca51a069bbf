"""The results folder, read: finished runs, their curves, and what is compared with what."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pandas as pd

from benchmarks.paper.methods import METHODS
from benchmarks.paper.results import CURVES, RUNS
from benchmarks.paper.runs import Run
from benchmarks.paper.stats import SETTING
from rose_ops.finetune import UserError

ROSE = tuple(x for x in METHODS if x.startswith("rose-"))
WITH_R_DROP = tuple(x for x in METHODS if x.startswith("r-drop+"))
PAPER_BASELINES = ("adamw", "r-drop", "child-tuning-d", "smart", "freelb")
# What tells runs of one method, task, model, granularity and seed apart.
SETTINGS = tuple(
    x.name for x in fields(Run) if x.name not in ("method", "task", "model", "granularity", "seed")
)
# Those that belong to a method: what it is tuned by. All others are shared by what is compared.
OF_A_METHOD = ("lr", "upper", "lower", "gamma", "r_drop")
SHARED = (*(x for x in SETTINGS if x not in (*OF_A_METHOD, "preset")), "used_precision")
SWEEP = "sweep"


def read(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """The rows of a CSV file; none if it is not there. A last line that is being written is none.

    Raises:
        UserError: It lacks columns.
    """
    if not path.exists():
        return pd.DataFrame(columns=list(needed))
    text = path.read_text(encoding="utf-8")
    complete = io.StringIO(text[: text.rfind("\n") + 1])
    try:
        # Only an empty cell is missing: "none" is a name here. Ids may consist of digits, and are none.
        ids = {"run": str, "analysis": str, "revision": str}
        frame = pd.read_csv(complete, keep_default_na=False, na_values=[""], dtype=ids)
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=list(needed))
    if missing := [x for x in needed if x not in frame]:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}; expected a file that `python -m "
            "benchmarks.paper` of this version wrote: choose another --results folder"
        )
    return frame


def read_runs(folder: Path) -> pd.DataFrame:
    """Finished runs, as `results.RUNS` has them."""
    return read(folder / "runs.csv", RUNS)


def read_curves(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """Evaluations of `runs`: one row for each run and step, with its ``preset`` and key.

    The columns of a split's scores are named as in `runs`: ``clean_accuracy`` and so on.
    """
    rows = read(folder / "curves.csv", CURVES)
    keys = ["run", *SETTING, "method", "seed", "step"]
    rows = rows.merge(runs[["run", "preset"]], on="run")
    if rows.empty:
        return pd.DataFrame(columns=[*keys, "clean_accuracy", "adversarial_accuracy"])
    scores = [x for x in CURVES if x not in (*keys, "split")]
    wide = rows.pivot(index=keys, columns="split", values=scores)
    wide.columns = [f"{split}_{score}" for score, split in wide.columns]
    return wide.reset_index()


def main_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that are compared: of each task with the same steps, batches, data types and so on.

    Of each preset, model and task, the shared settings (`SHARED`) that most runs have; then, of each
    method at each granularity, the settings of its own (`OF_A_METHOD`) that most seeds have. Of
    settings with as many, those that came first. Sweeps have no part.
    """
    kept = []
    for _, rows in runs[runs["preset"] != SWEEP].groupby(["preset", "model", "task"], sort=False):
        shared = _most(rows, SHARED, "run")
        for _, of_method in shared.groupby(["granularity", "method"], sort=False):
            kept.append(_most(of_method, OF_A_METHOD, "seed"))
    return pd.concat(kept) if kept else runs.iloc[:0]


def _most(rows: pd.DataFrame, settings: Sequence[str], counted: str) -> pd.DataFrame:
    """Those rows that agree in settings and have most values of a column; of as many, the first."""
    alike = rows.groupby(list(settings), sort=False, dropna=False)
    return max((group for _, group in alike), key=lambda group: group[counted].nunique())


def random_masks(runs: pd.DataFrame, compared: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """Random masks by the share that they keep: of all settings alike but that.

    Args:
        runs: all that have finished.
        compared: of these, the runs that are compared, of one task, model and granularity.
    """
    first = compared[compared["method"] == "random-mask"].iloc[:1]
    fixed = [x for x in (*SETTING, *SHARED, *OF_A_METHOD) if x != "upper"]
    alike = runs[runs["method"] == "random-mask"].merge(first[fixed], on=fixed)
    return {float(upper): group for upper, group in alike.groupby("upper")}


def comparisons(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """What is compared: the rows of each preset, model and granularity.

    Methods without masks are run once, with granularity `"none"`, and are compared with both.
    """
    for (preset, model), group in rows.groupby(["preset", "model"], sort=False):
        found = [x for x in group["granularity"].unique() if x != "none"] or ["none"]
        for granularity in sorted(found):
            members = group["granularity"].isin([granularity, "none"])
            yield (preset, model, granularity), group[members].assign(granularity=granularity)


def of_gammas(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of ROSE-Ensemble that differ in gamma, and in seeds: for each model, granularity and task
    those with the other settings that most gammas were tried with; none with one gamma only."""
    others = [*SHARED, *(x for x in OF_A_METHOD if x != "gamma")]
    kept = []
    ensembles = runs[runs["method"] == "rose-ensemble"]
    for _, rows in ensembles.groupby(["model", "granularity", "task"], sort=False):
        most = _most(rows, others, "gamma")
        if most["gamma"].nunique() > 1:
            # The same settings under two presets are the same run.
            kept.append(most.drop_duplicates(["gamma", "seed"]))
    return pd.concat(kept) if kept else runs.iloc[:0]
