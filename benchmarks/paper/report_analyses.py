"""The report's part on what `analyses` measured, in the order of the paper; then rules for `upper`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from benchmarks.paper import figures, landscape, probing, rows, tables, upper
from benchmarks.paper.analyses import ANALYSES
from benchmarks.paper.section import Section, ran
from benchmarks.paper.tables import MEASURED_WITH


def sections(folder: Path) -> list[Section]:
    """Of all measurements, those that are not there included."""
    known = rows.read(folder / "analyses.csv", ANALYSES)

    def of(command: str, columns: Sequence[str]) -> pd.DataFrame:
        """The numbers of a command, with what they are of."""
        numbers = rows.read(folder / f"{command}.csv", ["analysis", *columns])
        entries = known[known["command"] == command].drop(columns=[x for x in columns if x in known])
        return numbers.merge(entries, on="analysis")

    return [
        _dropout(of(probing.DROPOUT, probing.DROPOUT_COLUMNS), known),
        _surfaces(of(landscape.SURFACES, landscape.SURFACE_COLUMNS), known),
        _probing(of(probing.PROBING, probing.PROBING_COLUMNS), known),
        _interpolation(of(landscape.INTERPOLATION, landscape.LINE_COLUMNS), known),
        _upper(of(upper.RISKS, upper.RISK_COLUMNS), of(upper.TRIALS, upper.TRIAL_COLUMNS), known),
    ]


def _ran(frame: pd.DataFrame, known: pd.DataFrame) -> str:
    """`ran` of measurements, with their options."""
    entries = known[known["analysis"].isin(frame["analysis"])]
    options: dict[str, list[str]] = {}
    for entry in entries["options"]:
        for name, value in json.loads(entry).items():
            if str(value) not in options.setdefault(name, []):
                options[name].append(str(value))
    shown = [f"{x} {', '.join(y)}" for x, y in options.items() if not x.startswith("second")]
    return f"{ran(entries)} Measured with {'; '.join(shown)}."


def _is_missing(section: Section, frame: pd.DataFrame, known: pd.DataFrame, command: str) -> bool:
    """Whether the command has measured nothing. Says so in the section, or else what was run."""
    if frame.empty:
        section.missing = f"Not measured: python -m benchmarks.paper {command}"
    else:
        section.ran = _ran(frame, known)
    return frame.empty


def _dropout(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Table 4: predictions of two dropout passes",
        "How many training examples get another label in a second pass with dropout: how strong the "
        "perturbation is that first-order ROSE ranks by.",
    )
    if _is_missing(section, frame, known, "dropout"):
        return section
    section.tables.append(tables.inconsistent(frame))
    return section


def _surfaces(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Figures 1 and 2: loss surfaces",
        "Cross-entropy around each model, in two random directions whose filters have the norms of "
        "the model's (Li et al., 2018), without dropout; the same directions for all, but for those "
        "norms. One colour scale in each figure. The red cross is the model. One seed and one pair of "
        "directions show what a surface can look like, and are no test of a difference. Of several "
        "measurements of one task and method (other seeds, steps, learning rates) the first is drawn.",
    )
    if _is_missing(section, frame, known, "surfaces"):
        return section
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
    if _is_missing(section, frame, known, "probe"):
        return section
    section.tables.append(tables.probing(frame))
    names = ["model", "task"]
    settings = tables.varying(frame, [*names, "granularity", "method", "inoculated"], MEASURED_WITH)
    for title, group in _by(frame, names, settings):
        section.draw(figures.probing(group), title)
    return section


def _interpolation(frame: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "Figure 4: between two models",
        "Cross-entropy (solid, left) and accuracy (dashed, right) on the line between two fine-tuned "
        "models, (1 - α) θ + α θ', without dropout; one line for each seed (and other setting).",
    )
    if _is_missing(section, frame, known, "interpolate"):
        return section
    ends = frame.assign(
        first=frame["method"], second=[json.loads(x)["second"] for x in frame["options"]]
    )
    section.draw(figures.interpolations(ends), "One panel for each task and pair of methods.")
    return section


def _upper(risks: pd.DataFrame, trials: pd.DataFrame, known: pd.DataFrame) -> Section:
    section = Section(
        "A rule for upper?",
        "Rules that read upper off the second-order risks in the first steps of AdamW, against a "
        "search over all that was trained here (the best on the validation split, clean and perturbed;"
        " upper = 1, which is AdamW, included), against 0.6 whatever the risks are, and against AdamW."
        " Below one: the share of risks below 1; below mean: the share below their mean, the largest "
        "1% left out of it; elbow: where sorted risks begin to rise steeply.",
    )
    chosen = upper.choices(risks, trials)
    if chosen.empty:
        section.missing = "Not measured: python -m benchmarks.paper upper"
        return section
    section.ran = _ran(trials, known)
    names = ["model", "granularity", "task"]
    settings = tables.varying(chosen, names, upper.MEASURED_WITH)
    section.tables = [tables.uppers(group, title) for title, group in _by(chosen, names, settings)]
    return section


def _by(
    frame: pd.DataFrame, names: Sequence[str], settings: Sequence[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Rows that agree in names and settings, under a title of them."""
    for key, group in frame.groupby([*names, *settings], sort=False, dropna=False):
        values = [tables.plain(x) for x in key]
        shown = [f"{x} {y}" for x, y in zip(settings, values[len(names) :], strict=True)]
        yield ", ".join([*values[: len(names)], *shown]), group
