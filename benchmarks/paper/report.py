"""`python -m benchmarks.paper report`: the study's tables and figures as one HTML file.

Made from the CSV files in the results folder, whatever is there: of a study that is not finished it
says what is missing. Nothing in it is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.paper import figures, matched, report_analyses, rows, tables
from benchmarks.paper.methods import CONTROLS, METHODS
from benchmarks.paper.rows import PAPER_BASELINES, ROSE, WITH_R_DROP
from benchmarks.paper.runner import RESULTS
from benchmarks.paper.section import Section, ran

TEMPLATE = Path(__file__).with_name("report.html.j2")
_CURVES = ("adamw", "random-mask", *ROSE, "r-drop", "smart", "freelb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--output", type=Path, help="default: report.html in that folder")


def report(args: argparse.Namespace) -> None:
    """Write the report."""
    output = args.output or args.results / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(args.results), encoding="utf-8")
    print(f"wrote {output}")


def render(folder: Path) -> str:
    """The HTML of a results folder."""
    runs = rows.read_runs(folder)
    curves = rows.read_curves(folder, runs)
    main = rows.main_settings(runs)
    sections: list[Section] = []
    for name, group in rows.comparisons(main):
        sections += _comparison(name, group, curves)
    if not sections:
        sections.append(
            Section(
                "Tables 1 and 2: accuracy on GLUE and AdvGLUE",
                "Every method on every task, with controls.",
                missing="No run has finished: python -m benchmarks.paper run",
            )
        )
    sections += [_gamma(runs), *_sweeps(runs), *report_analyses.sections(folder)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}"
    return environment.get_template(TEMPLATE.name).render(
        sections=sections, ran=ran(runs), made=now, other=len(runs) - len(main)
    )


# ----------------------------------------------------------------------------- tables 1 and 2, curves


def _comparison(name: tuple[str, str, str], runs: pd.DataFrame, curves: pd.DataFrame) -> list[Section]:
    preset, model, granularity = name
    where = f"{model}, {granularity} granularity, {preset} settings"
    others = [*PAPER_BASELINES, *CONTROLS]
    first = Section(
        f"Table 1: {where}",
        "ROSE against the paper's baselines and against controls: random masks of second order's size, "
        "drawn anew in every step or once; the inverse of second order's mask; and AdamW with a "
        "smaller learning rate. First order and the ensemble may keep more, or less, than those do.",
        ran(runs),
        _missing(runs, [x for x in METHODS if x not in WITH_R_DROP]),
        [tables.accuracies(runs, [x for x in METHODS if x not in WITH_R_DROP], others, ROSE)],
    )
    first.details += [
        ("t-tests of AdvGLUE accuracy", tables.tests(runs, ROSE, others)),
        ("Cross-entropy and calibration", tables.uncertainty(runs, list(METHODS))),
        ("Settings", tables.settings(runs, ["method", "task", *rows.SETTINGS])),
    ]
    sections = [first, _at_matched_accuracy(where, runs, curves)]
    if runs["method"].isin(WITH_R_DROP).any():
        members = runs[runs["method"].isin(["r-drop", *WITH_R_DROP])]
        shown = ["r-drop", *WITH_R_DROP]
        second = Section(
            f"Table 2: R-Drop with ROSE; {where}",
            "Masks of ROSE with the loss of R-Drop, against R-Drop alone.",
            ran(members),
            _missing(members, shown),
            [tables.accuracies(members, shown, ["r-drop"], WITH_R_DROP)],
        )
        second.details.append(
            ("t-tests of AdvGLUE accuracy", tables.tests(members, WITH_R_DROP, ["r-drop"]))
        )
        sections.append(second)
    return sections


def _missing(runs: pd.DataFrame, methods: Sequence[str]) -> str:
    """Methods and tasks without the seeds that others have."""
    wanted = sorted(runs["seed"].unique())
    found = runs.groupby(["method", "task"])["seed"].nunique()
    gaps = [
        f"{method} on {task} ({found.get((method, task), 0)})"
        for method in methods
        for task in runs["task"].unique()
        if found.get((method, task), 0) < len(wanted)
    ]
    if not gaps:
        return ""
    if len(wanted) == 1:
        return f"Not there yet: {', '.join(x.removesuffix(' (0)') for x in gaps)}."
    return f"Fewer than {len(wanted)} seeds, the number is in brackets: {', '.join(gaps)}."


def _at_matched_accuracy(where: str, runs: pd.DataFrame, curves: pd.DataFrame) -> Section:
    # The curves of these runs, under the granularity that they are compared at.
    keys = runs[["run", "granularity"]]
    curves = curves.drop(columns="granularity", errors="ignore").merge(keys, on="run")
    others = [x for x in METHODS if x != "adamw"]
    found = [
        matched.matched(runs, curves, others, ["adamw"]),
        matched.matched(runs, curves, ROSE, ["random-mask"]),
    ]
    pairs = pd.concat([x for x in found if len(x)] or found[:1])
    section = Section(
        f"Accuracy at matched clean accuracy: {where}",
        "A method that has learnt less often looks more robust. Here each run is compared with the run "
        "of AdamW (and of a random mask of second order's size) with the same seed, stopped where that "
        "was as accurate on clean examples: at the first evaluation with this accuracy, on the line "
        "from the one before.",
    )
    if pairs.empty:
        section.missing = "There are no curves of AdamW or of the random mask to compare with."
        return section
    section.ran = ran(runs[runs["run"].isin(curves["run"])])
    section.tables = [tables.at_matched_accuracy(pairs)]
    shown = [x for x in _CURVES if x in set(curves["method"])]
    if shown:
        section.draw(
            figures.robust_against_clean(curves, shown),
            "AdvGLUE against GLUE accuracy along training. Bold lines: means over seeds at equal clean "
            "accuracy, where every seed has been; faint lines: runs; dots: where they ended.",
        )
    return section


# -------------------------------------------------------------------------------- table 3 and sweeps


def _gamma(runs: pd.DataFrame) -> Section:
    section = Section("Table 3: the weight γ", "ROSE-Ensemble with other weights of its two masks.")
    of_gammas = rows.of_gammas(runs)
    if of_gammas.empty:
        section.missing = (
            "No ensemble was run with two γ: python -m benchmarks.paper run --methods rose-ensemble "
            "--sweep gamma=0.1,0.3,0.5,0.7,0.9"
        )
        return section
    section.ran = ran(of_gammas)
    section.tables = [
        tables.by_gamma(group.assign(model=f"{model}, {granularity}"))
        for (model, granularity), group in of_gammas.groupby(["model", "granularity"], sort=False)
    ]
    return section


def _sweeps(runs: pd.DataFrame) -> list[Section]:
    swept = runs[runs["preset"] == rows.SWEEP]
    if swept.empty:
        return []
    question = "Every combination of settings that was asked for with --sweep."
    return [
        Section(
            "Sweeps",
            question,
            ran(swept),
            tables=[tables.sweep(swept, [*rows.SETTINGS, "used_precision"])],
        )
    ]
