"""Results folders of a study that nobody ran."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path

from benchmarks.paper import upper
from benchmarks.paper.analyses import ANALYSES
from benchmarks.paper.results import CURVES, RUNS
from benchmarks.paper.runs import Run, small

MACHINE = {
    "machine": "a made-up machine", "threads": 1, "torch": "2.13.0", "used_precision": "float32",
    "date": "2026-01-02T03:04:05+00:00", "revision": "abc123", "seconds": 36.0,
}  # fmt: skip


def write(path: Path, columns, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(content)


def finished(run: Run, clean: float, adversarial: float) -> dict[str, object]:
    scores = {"clean_accuracy": clean, "adversarial_accuracy": adversarial}
    for split in ("clean", "adversarial"):
        scores |= {f"{split}_cross_entropy": 0.5, f"{split}_calibration_error": 0.1}
    return {"run": run.id, **asdict(run), **scores, **MACHINE}


def curve(run: Run, points) -> list[dict[str, object]]:
    return [
        {"run": run.id, **asdict(run), "step": 25 * i, "split": split, "n": 100, "accuracy": accuracy}
        for i, pair in enumerate(points, start=1)
        for split, accuracy in zip(("clean", "adversarial"), pair, strict=True)
    ]


def study(methods, tasks=("sst2", "rte"), seeds=(0, 1, 2), model="minilm"):
    """Runs with accuracies of their own: better methods come later."""
    found = []
    for (i, method), task, seed in itertools.product(enumerate(methods), tasks, seeds):
        run = small(method, task, model, "element", seed)
        found.append((run, 0.8 + 0.002 * seed, 0.3 + 0.02 * i + 0.01 * seed * (1 + i % 2)))
    return found


def save_study(folder: Path, found) -> None:
    write(folder / "runs.csv", RUNS, [finished(*one) for one in found])
    curves = [
        x
        for run, clean, adversarial in found
        for x in curve(run, [(0.6, 0.5), (clean, adversarial), (clean, adversarial)])
    ]
    write(folder / "curves.csv", CURVES, curves)


def save_analysis(folder: Path, command: str, columns, entries) -> None:
    """`entries`: (run, options, rows); numbers are appended as those of the commands are."""
    numbers, known = [], []
    if (folder / "analyses.csv").exists():
        known = list(csv.DictReader((folder / "analyses.csv").open()))
    for i, (run, options, of_run) in enumerate(entries):
        # Ids that a reader could take for numbers.
        analysis = f"{len(known):04d}12e{i:02d}"
        numbers += [{"analysis": analysis, **row} for row in of_run]
        entry = {
            "analysis": analysis,
            "command": command,
            "run": run.id,
            "options": json.dumps(options),
        }
        known.append({**asdict(run), **MACHINE, **entry})
    write(folder / f"{command}.csv", ("analysis", *columns), numbers)
    write(folder / "analyses.csv", ANALYSES, known)


def save_upper(folder: Path, run: Run, better: float = 0.0) -> None:
    """Two steps of a look, and trainings with 0.6 and 1, more accurate by `better`."""
    said = [
        {"step": step, "rule": rule, "upper": value + 0.02 * (step - 75), "ranked": 100}
        for step in (74, 75)
        for rule, value in (("below one", 0.63), ("elbow", 0.33))
    ]
    save_analysis(folder, upper.RISKS, upper.RISK_COLUMNS, [(replace(run, upper=1.0), {}, said)])
    trials = []
    for value, accuracy in ((0.6, 0.7), (1.0, 0.8)):
        accuracy += better
        scores = {"validation": accuracy, "validation-characters": 0.5, "validation-words": 0.6}
        scores |= {"clean": accuracy, "adversarial": 0.4, "characters": 0.5, "words": 0.5}
        measured = [{"split": x, "accuracy": y, "n": 10} for x, y in scores.items()]
        trials.append((replace(run, upper=value), {"examples": 10}, measured))
    save_analysis(folder, upper.TRIALS, upper.TRIAL_COLUMNS, trials)


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>|data:image[^\"]*", "", html, flags=re.DOTALL)
    html = html.replace("</td><td>", " | ").replace("</th><th>", " | ")
    return unescape(re.sub(r"<[^>]+>", "", html))
