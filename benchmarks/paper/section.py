"""One result of the report: what was run, its tables and its figures."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import pandas as pd

from benchmarks.paper.tables import Table


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
