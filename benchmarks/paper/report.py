"""`python -m benchmarks.paper report`: the study's tables and figures as one HTML file.

Made from the CSV files in the results folder, whatever is there: of a study that is not finished it
says what is missing. Nothing in it is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.paper import figures, landscape, matched, probing, rows, tables
from benchmarks.paper.analyses import ANALYSES
from benchmarks.paper.methods import CONTROLS, METHODS
from benchmarks.paper.rows import PAPER_BASELINES, ROSE, WITH_R_DROP
from benchmarks.paper.runner import RESULTS
from benchmarks.paper.tables import Table

TEMPLATE = Path(__file__).with_name("report.html.j2")
_CURVES = ("adamw", "random-mask", "r-drop", "smart", "freelb", *ROSE)


@dataclass
class Section:
    """One result.

    Attributes:
        title: Of the table or figure.
        question: What it shows, and how to read it.
        ran: What was run for it; empty where nothing was.
        missing: What is not there, or how to make it.
        tables: Shown at once.
        figures: PNGs as data URLs, each with a caption.
        details: Tables that are folded.
    """

    title: str
    question: str
    ran: str = ""
    missing: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    details: list[tuple[str, Table]] = field(default_factory=list)

    def draw(self, png: bytes, caption: str) -> None:
        """Add a figure."""
        self.figures.append((f"data:image/png;base64,{base64.b64encode(png).decode()}", caption))


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
    sections = []
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
    sections += [_gamma(runs), *_sweeps(runs), *_analyses(folder)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    now = datetime.now(timezone.utc).isoformat(" ", timespec="minutes")
    return environment.get_template(TEMPLATE.name).render(
        sections=sections, ran=ran(runs), made=now, other=len(runs) - len(main)
    )


def ran(frame: pd.DataFrame) -> str:
    """What was run, in sentences: methods, tasks, steps, seeds, machine and commit."""
    if frame.empty:
        return ""

    def listed(column: str) -> str:
        values = frame[column].dropna().unique()
        return ", ".join(str(x) for x in values)

    seconds = frame["seconds"].sum()
    where = " and ".join(x for x in (listed("machine"), listed("gpu")) if x)
    return (
        f"{len(frame)} runs, {seconds / 3600:.1f} hours in all. Methods: {listed('method')}. Tasks: "
        f"{listed('task')}. Model: {listed('model')}. Settings: {listed('preset')}; steps: "
        f"{listed('steps')}; seeds: {listed('seed')}. Granularity: {listed('granularity')}. Machine: "
        f"{where}, {listed('threads')} threads; {listed('used_precision')}; torch "
        f"{listed('torch')}; commit {listed('revision')}; {min(frame['date'])[:10]} to "
        f"{max(frame['date'])[:10]}."
    )


# ----------------------------------------------------------------------------- tables 1 and 2, curves


def _comparison(name: tuple[str, str, str], runs: pd.DataFrame, curves: pd.DataFrame) -> list[Section]:
    preset, model, granularity = name
    where = f"{model}, {granularity} granularity, {preset} settings"
    others = [*PAPER_BASELINES, *CONTROLS]
    first = Section(
        f"Table 1: {where}",
        "ROSE against the paper's baselines and against controls: masks of the same size that are "
        "random, fixed or inverted, and AdamW with a smaller learning rate.",
        ran(runs),
        _missing(runs, [x for x in METHODS if x not in WITH_R_DROP]),
        [tables.accuracies(runs, [x for x in METHODS if x not in WITH_R_DROP], others, ROSE)],
    )
    score = "adversarial_accuracy"
    first.details += [
        ("t-tests of AdvGLUE accuracy", tables.tests(runs, ROSE, others, score)),
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
            ("t-tests of AdvGLUE accuracy", tables.tests(members, WITH_R_DROP, ["r-drop"], score))
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
    return f"Fewer than {len(wanted)} seeds, the number is in brackets: {', '.join(gaps)}."


def _at_matched_accuracy(where: str, runs: pd.DataFrame, curves: pd.DataFrame) -> Section:
    # The curves of these runs, under the granularity that they are compared at.
    keys = runs[["run", "granularity"]]
    curves = curves.drop(columns="granularity", errors="ignore").merge(keys, on="run")
    others = [x for x in METHODS if x != "adamw"]
    pairs = [
        matched.matched(runs, curves, others, ["adamw"]),
        matched.matched(runs, curves, ROSE, ["random-mask"]),
    ]
    section = Section(
        f"Accuracy at matched clean accuracy: {where}",
        "A method that has learnt less often looks more robust. Here each run is compared with the run "
        "of AdamW (and of a random mask) with the same seed, stopped where that was as accurate on "
        "clean examples: at the first evaluation with this accuracy, on the line from the one before.",
    )
    if not any(len(x) for x in pairs):
        section.missing = "There are no curves of AdamW or of the random mask to compare with."
        return section
    section.ran = ran(runs[runs["run"].isin(curves["run"])])
    section.tables = [tables.at_matched_accuracy(x) for x in pairs if len(x)]
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
    return [Section("Sweeps", question, ran(swept), tables=[tables.sweep(swept)])]


# ----------------------------------------------------------------------------- other measurements


def _analyses(folder: Path) -> list[Section]:
    known = rows.read(folder / "analyses.csv", ANALYSES)

    def of(command: str, columns: Sequence[str]) -> pd.DataFrame:
        """The numbers of a command, with what they are of."""
        numbers = rows.read(folder / f"{command}.csv", ["analysis", *columns])
        entries = known[known["command"] == command].drop(columns="steps")
        joined = numbers.merge(entries, on="analysis")
        options = [json.loads(x) for x in joined["options"]]
        return joined.assign(options_of=options)

    return [
        _dropout(of(probing.DROPOUT, probing.DROPOUT_COLUMNS), known),
        _surfaces(of(landscape.SURFACES, landscape.SURFACE_COLUMNS), known),
        _probing(of(probing.PROBING, probing.PROBING_COLUMNS), known),
        _interpolation(of(landscape.INTERPOLATION, landscape.LINE_COLUMNS), known),
    ]


def _ran(frame: pd.DataFrame, known: pd.DataFrame) -> str:
    """`ran` of measurements, with their options."""
    entries = known[known["analysis"].isin(frame["analysis"])]
    options = ", ".join(
        f"{name} {value}"
        for name, value in json.loads(entries["options"].iloc[0]).items()
        if not name.startswith("second")
    )
    return f"{ran(entries)} Measured with {options}."


def _dropout(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Table 4: predictions of two dropout passes",
        "How many training examples get another label in a second pass with dropout: how strong the "
        "perturbation is that first-order ROSE ranks by.",
    )
    if frame.empty:
        section.missing = "Not measured: python -m benchmarks.paper dropout"
        return section
    section.ran = _ran(frame, known)
    section.tables.append(tables.inconsistent(frame))
    return section


def _surfaces(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Figures 1 and 2: loss surfaces",
        "Cross-entropy around each model, in two random directions whose filters have the norms of "
        "the model's (Li et al., 2018), without dropout; the same directions for all, but for those "
        "norms. One colour scale in each figure. The red cross is the model. One seed and one pair of "
        "directions show what a surface can look like, and are no test of a difference.",
    )
    if frame.empty:
        section.missing = "Not measured: python -m benchmarks.paper surfaces"
        return section
    section.ran = _ran(frame, known)
    for (model, options), group in frame.groupby(["model", "options"], sort=False):
        for granularity in [x for x in group["granularity"].unique() if x != "none"] or ["none"]:
            members = group[group["granularity"].isin([granularity, "none"])]
            section.draw(figures.surfaces(members), f"{model}, {granularity} granularity; {options}")
    return section


def _probing(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Figure 3: linguistic or superficial features",
        "Trained on MSGS sentences where a linguistic and a superficial feature agree, tested where "
        "they disagree: a Matthews correlation of 1 is reliance on the linguistic feature, -1 on the "
        "superficial one. One point for each seed, a line for their mean. A model that has not learnt "
        "its training sentences (see their accuracy) is near 0 without preferring either.",
    )
    if frame.empty:
        section.missing = "Not measured: python -m benchmarks.paper probe"
        return section
    section.ran = _ran(frame, known)
    section.tables.append(tables.probing(frame))
    for (model, task), group in frame.groupby(["model", "task"], sort=False):
        section.draw(figures.probing(group), f"{model}, {task}")
    return section


def _interpolation(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Figure 4: between two models",
        "Cross-entropy (solid, left) and accuracy (dashed, right) on the line between two fine-tuned "
        "models, (1 - α) θ + α θ', without dropout; one line for each seed.",
    )
    if frame.empty:
        section.missing = "Not measured: python -m benchmarks.paper interpolate"
        return section
    section.ran = _ran(frame, known)
    ends = frame.assign(first=frame["method"], second=[x["second"] for x in frame["options_of"]])
    section.draw(figures.interpolations(ends), "One panel for each task and pair of methods.")
    return section
