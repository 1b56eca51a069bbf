"""The study's tables, from rows of finished runs to cells of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from benchmarks.paper import matched, stats

SIGNIFICANT = 0.05
NOTHING = "–"
# What tells measurements apart, of what `analyses.csv` has.
MEASURED_WITH = ("preset", "steps", "lr", "upper", "gamma", "options", "used_precision")
_NAMES = ("task", "method", "baseline")


@dataclass(frozen=True)
class Cell:
    """One cell, which may be printed in bold."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table to be rendered.

    Attributes:
        caption: what the numbers are, in a sentence or two.
        header: column titles.
        rows: as many cells each.
    """

    caption: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


def percent(mean: float, sd: float = float("nan"), sign: str = "") -> str:
    """A fraction in percent, with its standard deviation where there is one."""
    if pd.isna(mean):
        return NOTHING
    spread = "" if pd.isna(sd) else f" ± {100 * sd:.1f}"
    return f"{100 * mean:{sign}.1f}{spread}"


def number(mean: float, sd: float = float("nan")) -> str:
    """As `percent`, of what is no fraction."""
    if pd.isna(mean):
        return NOTHING
    return f"{mean:.3f}" if pd.isna(sd) else f"{mean:.3f} ± {sd:.3f}"


def p_value(p: float) -> str:
    return NOTHING if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def varying(rows: pd.DataFrame, keys: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Settings of which rows with the same keys have several: a mean over those would be of neither."""
    alike = rows.groupby(list(keys), dropna=False)
    return [x for x in settings if (alike[x].nunique(dropna=False) > 1).any()]


def accuracies(
    runs: pd.DataFrame, methods: Sequence[str], baselines: Sequence[str], claims: Sequence[str]
) -> Table:
    """Tables 1 and 2 of the paper: accuracies, macro average and drop, for one model and granularity.

    Args:
        runs: of one model and granularity.
        methods: rows, in this order; those without runs are left out.
        baselines: what a claim has to beat to be printed in bold.
        claims: the methods that may be.
    """
    tasks = list(dict.fromkeys(runs["task"]))
    runs = runs[runs["method"].isin(methods)]
    means = stats.over_seeds(runs, ["clean_accuracy", "adversarial_accuracy"], ["task", "method"])
    macro = stats.macro_average(runs)
    beaten = _beats_all(runs, claims, baselines)
    table = Table(
        "Accuracy in percent: mean ± standard deviation over seeds. Avg: mean over tasks of (GLUE + "
        "AdvGLUE) / 2; Δ: mean drop from GLUE to AdvGLUE; both only for methods that have every task "
        "of this table. Bold: higher than each of the baselines that are there (one-tailed t-test, "
        f"p < {SIGNIFICANT} against each, not adjusted for the number of tests).",
        ["method", *(f"{t} {s}" for t in tasks for s in ("GLUE", "AdvGLUE")), "Avg", "Δ", "seeds"],
    )
    for method in (x for x in methods if x in macro.index):
        cells, counts = [], set()
        for task in tasks:
            for score in ("clean_accuracy", "adversarial_accuracy"):
                if (task, method) not in means.index:
                    cells.append(Cell(NOTHING))
                    continue
                mean, sd, n = means.loc[(task, method), score]
                counts |= {int(n)} - {0}
                cells.append(Cell(percent(mean, sd), (task, method, score) in beaten))
        average, drop = macro.loc[method]
        seeds = "–".join(str(x) for x in sorted({min(counts), max(counts)})) if counts else "0"
        table.rows.append(
            [Cell(method), *cells, Cell(percent(average)), Cell(percent(drop)), Cell(seeds)]
        )
    return table


def _beats_all(
    runs: pd.DataFrame, claims: Sequence[str], baselines: Sequence[str]
) -> set[tuple[str, str, str]]:
    """(task, method, score) where a method is significantly better than every baseline there is."""
    found = set()
    for score in ("clean_accuracy", "adversarial_accuracy"):
        tests = stats.compare_methods(runs, claims, baselines, score)
        # A baseline without a test (NaN) is one that was not beaten.
        better = (tests["p"] < SIGNIFICANT).groupby([tests["task"], tests["method"]]).all()
        found |= {(task, method, score) for (task, method), yes in better.items() if yes}
    return found


def tests(runs: pd.DataFrame, methods: Sequence[str], baselines: Sequence[str]) -> Table:
    """The t-tests behind the bold print, one row for each pair."""
    table = Table(
        "AdvGLUE accuracy, method minus baseline, in points, with its two-sided 95% interval over "
        "seeds. p: one-tailed t-test, paired over common seeds or else Welch's; q: the same, adjusted "
        "for the number of tests in this table (Benjamini and Hochberg). Every run is measured on the "
        "same examples, so the interval does not say what other examples would give.",
        [*_NAMES, "difference", "95% interval", "p", "q", "test", "n"],
    )
    found = stats.compare_methods(runs, methods, baselines, "adversarial_accuracy")
    for row in found.to_dict("records"):
        names, kind = [row["task"], row["method"], row["baseline"]], [row["kind"], str(row["n"])]
        table.rows.append([*map(Cell, names), *_comparison(row), *map(Cell, kind)])
    return table


def _comparison(row: dict[str, float]) -> list[Cell]:
    interval = NOTHING
    if not pd.isna(row["low"]):
        interval = f"{percent(row['low'], sign='+')} to {percent(row['high'], sign='+')}"
    texts = [percent(row["difference"], sign="+"), interval, p_value(row["p"])]
    cells = [Cell(text, row["p"] < SIGNIFICANT) for text in texts]
    return cells + ([Cell(p_value(row["q"]))] if "q" in row else [])


def uncertainty(runs: pd.DataFrame, methods: Sequence[str]) -> Table:
    """Cross-entropy and calibration, clean and adversarial."""
    shown = {"cross_entropy": number, "calibration_error": percent}
    scores = [f"{split}_{score}" for split in ("clean", "adversarial") for score in shown]
    means = stats.over_seeds(runs, scores, ["task", "method"])
    table = Table(
        "Cross-entropy in nats, and expected calibration error (ECE) in points: mean ± standard "
        "deviation over seeds; lower is better.",
        ["task", "method", "GLUE loss", "GLUE ECE", "AdvGLUE loss", "AdvGLUE ECE"],
    )
    for task in dict.fromkeys(runs["task"]):
        for method in (x for x in methods if (task, x) in means.index):
            of_row = means.loc[(task, method)]
            texts = [shown[score.partition("_")[2]](*of_row[score][["mean", "sd"]]) for score in scores]
            table.rows.append([Cell(task), Cell(method), *map(Cell, texts)])
    return table


def at_matched_accuracy(pairs: pd.DataFrame) -> Table:
    """Gains over baselines that were stopped at the same clean accuracy (see `matched`)."""
    table = Table(
        "AdvGLUE accuracy of the finished run minus that of the baseline's run of the same seed, "
        "read where the baseline's curve first reaches the finished run's clean accuracy (on the line "
        "between two evaluations). Never: baseline runs that do not reach it, and so have no part in "
        "the mean. At once: baseline runs that are there at their first evaluation, whose value is "
        "taken as it is. p: one-tailed paired t-test over the seeds that have a difference.",
        [*_NAMES, "clean", "gain", "95% interval", "p", "runs", "never", "at once"],
    )
    for row in matched.summarise(pairs).to_dict("records"):
        names = [row["task"], row["method"], row["baseline"], percent(row["clean"])]
        counts = [str(row[x]) for x in ("runs", "never", "at_once")]
        table.rows.append([*map(Cell, names), *_comparison(row), *map(Cell, counts)])
    return table


def by_gamma(runs: pd.DataFrame) -> Table:
    """Table 3 of the paper: averages for each gamma, of ensembles of one granularity."""
    keys = ["model", "gamma"]
    averages = stats.macro_average(runs, keys)
    seeds = runs.groupby(keys)["seed"].nunique()
    table = Table(
        "ROSE-Ensemble with other γ, in percent; columns as in Table 1. Only γ that have every task of "
        "this table have an average.",
        ["model", "γ", "Avg", "Δ", "seeds"],
    )
    for model, gamma in sorted(averages.index):
        average, drop = averages.loc[(model, gamma)]
        texts = [model, f"{gamma:g}", percent(average), percent(drop), str(seeds[(model, gamma)])]
        table.rows.append([*map(Cell, texts)])
    return table


def inconsistent(rows: pd.DataFrame) -> Table:
    """Table 4 of the paper: two dropout passes that disagree, by task and step.

    Measurements with other settings have a row of their own, with those settings.
    """
    keys = ["model", "task", "granularity", "method"]
    keys += varying(rows, [*keys, "step"], MEASURED_WITH)
    steps = sorted(rows["step"].unique())
    means = stats.over_seeds(rows, ["inconsistent"], [*keys, "step"])["inconsistent"]
    table = Table(
        "Training examples, in percent, whose predictions from two passes with dropout differ: mean ± "
        "standard deviation over seeds.",
        [*keys, *(f"step {step}" for step in steps)],
    )
    for key, _ in rows.groupby(keys, sort=False):
        texts = [
            percent(*means.loc[(*key, step), ["mean", "sd"]])
            if (*key, step) in means.index
            else NOTHING
            for step in steps
        ]
        table.rows.append([*(Cell(plain(x)) for x in key), *map(Cell, texts)])
    return table


def probing(rows: pd.DataFrame) -> Table:
    """Figure 3 of the paper as numbers. Settings as in `inconsistent`."""
    keys = ["model", "task", "granularity", "method", "inoculated"]
    keys += varying(rows, keys, MEASURED_WITH)
    means = stats.over_seeds(rows, ["matthews", "training_accuracy"], keys)
    table = Table(
        "Matthews correlation on disambiguating sentences, and accuracy in percent on sentences that "
        "were trained on: mean ± standard deviation over seeds.",
        [*keys, "Matthews", "training accuracy", "seeds"],
    )
    for key, row in means.iterrows():
        texts = [number(*row["matthews"][["mean", "sd"]])]
        texts += [percent(*row["training_accuracy"][["mean", "sd"]]), str(int(row["matthews"]["n"]))]
        table.rows.append([Cell(plain(x)) for x in (*key, *texts)])
    return table


def settings(runs: pd.DataFrame, columns: Sequence[str]) -> Table:
    """What the runs were made with: one row for each setting that differs.

    Args:
        runs: finished runs, with ``seed``.
        columns: names and settings; those that are the same in all runs are left out.
    """
    columns = [x for x in columns if x in ("method", "task") or runs[x].nunique(dropna=False) > 1]
    table = Table("Settings that differ between runs, and the seeds.", [*columns, "seeds"])
    for key, group in runs.groupby(columns, sort=False, dropna=False):
        seeds = " ".join(str(x) for x in sorted(group["seed"].unique()))
        table.rows.append([*(Cell(plain(x)) for x in key), Cell(seeds)])
    return table


def sweep(runs: pd.DataFrame, settings: Sequence[str]) -> Table:
    """Accuracies of the runs of a grid, the best average first within a method and task.

    Args:
        runs: of the grid.
        settings: what runs may differ by; shown besides lr, upper and gamma where they do.
    """
    keys = ["model", "granularity", "task", "method", "lr", "upper", "gamma"]
    keys += varying(runs, keys, [x for x in settings if x not in keys])
    scores = ["clean_accuracy", "adversarial_accuracy"]
    means = stats.over_seeds(runs, scores, keys)
    average = sum(means[(score, "mean")] for score in scores) / 2
    table = Table(
        "Accuracy in percent, mean ± standard deviation over seeds. The best of many settings on the "
        "examples that they are compared on looks better than it is.",
        [*keys, "GLUE", "AdvGLUE", "seeds"],
    )
    order = average.reset_index(name="average").sort_values([*keys[:4], "average"], ascending=False)
    for key in order[keys].itertuples(index=False, name=None):
        of_row = means.loc[key]
        texts = [percent(*of_row[score][["mean", "sd"]]) for score in scores]
        seeds = str(int(of_row[("clean_accuracy", "n")]))
        table.rows.append([Cell(plain(x)) for x in (*key, *texts, seeds)])
    return table


def uppers(chosen: pd.DataFrame, name: str) -> Table:
    """What rules, a search and controls took for upper, and what came of it (see `upper.choices`)."""
    chosen = chosen.assign(average=(chosen["clean"] + chosen["adversarial"]) / 2)
    by_source = {x: rows.set_index("seed") for x, rows in chosen.groupby("source", sort=False)}
    table = Table(
        f"{name}. "
        "Said: what the rule says, before it is rounded to a multiple of 0.05. Trainings: what it "
        "costs. Validation: mean of clean and perturbed accuracy, which the search maximises. Mean ± "
        "standard deviation over seeds, accuracies in percent. The last columns: mean of GLUE and "
        "AdvGLUE minus the search's, with a two-sided 95% interval over seeds (paired).",
        [
            "source",
            "said",
            "upper",
            "trainings",
            "validation",
            "GLUE",
            "AdvGLUE",
            "minus",
            "interval",
            "seeds",
        ],
    )
    for source, rows in by_source.items():
        texts = [source, *(_mean(rows[x], ".2f") for x in ("said", "upper", "trainings"))]
        texts += [
            percent(rows[x].mean(), rows[x].std()) for x in ("validation", "clean", "adversarial")
        ]
        gain = stats.compare(rows["average"], by_source["search"]["average"])
        difference, interval, _ = (cell.text for cell in _comparison(gain._asdict()))
        table.rows.append([Cell(x) for x in (*texts, difference, interval, str(len(rows)))])
    return table


def _mean(values: pd.Series, how: str) -> str:
    return NOTHING if values.isna().all() else format(values.mean(), how)


def plain(value: object) -> str:
    """A name or a number as it is, without zeros that say nothing."""
    if isinstance(value, float):
        return NOTHING if pd.isna(value) else f"{value:g}"
    return str(value)
