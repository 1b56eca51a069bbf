"""The study's figures, each as the bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.paper import matched

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442")
_LINES = ("-", "--", ":", "-.")
_LEVELS = 41


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _pyplot().close(figure)
    return buffer.getvalue()


def _styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a kind of line for each method."""
    return {
        x: (_COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)])
        for i, x in enumerate(methods)
    }


def _legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, below them."""
    handles = {
        label: handle
        for axis in np.ravel(axes)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles))
        )


def robust_against_clean(curves: pd.DataFrame, methods: Sequence[str]) -> bytes:
    """Adversarial against clean accuracy along the way, one panel for each task.

    Lines are means over seeds at equal clean accuracy (`matched.curve_over_seeds`); a faint line is one
    run, evaluation by evaluation; a dot is where a run has ended.

    Args:
        curves: evaluations of one model and granularity.
        methods: what is drawn, in the order of the legend.
    """
    pyplot = _pyplot()
    curves = curves[curves["method"].isin(methods)]
    tasks = list(dict.fromkeys(curves["task"]))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(5.5 * len(tasks) + 1, 5.2), squeeze=False, layout="constrained"
    )
    styles = _styles(methods)
    for axis, task in zip(axes.flat, tasks, strict=True):
        of_task = curves[curves["task"] == task]
        for method, rows in of_task.groupby("method", sort=False):
            colour, line = styles[method]
            for _, run in rows.groupby("seed"):
                run = 100 * run.sort_values("step")[["clean_accuracy", "adversarial_accuracy"]]
                axis.plot(*run.T.to_numpy(), line, color=colour, alpha=0.2, linewidth=0.7)
                axis.plot(*run.iloc[-1], "o", color=colour, markersize=3)
            levels = np.linspace(*rows["clean_accuracy"].agg(["min", "max"]), _LEVELS)
            mean = matched.curve_over_seeds(rows, levels)
            # Where some runs have no part, a mean is one of other runs.
            mean = 100 * mean[mean["n"] == rows["seed"].nunique()]
            axis.plot(mean["clean"], mean["mean"], line, color=colour, label=method)
        axis.set(title=task, xlabel="clean accuracy (%)", ylabel="adversarial accuracy (%)")
        axis.grid(linewidth=0.3)
    _legend(figure, axes)
    return _png(figure)


def surfaces(points: pd.DataFrame) -> bytes:
    """Loss around models: a row for each task, a column for each method, one colour scale for all.

    Args:
        points: of one model and granularity, on one grid: ``task``, ``method``, ``seed``, ``alpha``,
            ``beta``, ``loss``. Of several seeds the first is drawn, and of several measurements of one
            task, method and seed (with other steps or learning rates) that whose rows come first.
    """
    from matplotlib import colors

    pyplot = _pyplot()
    points = points[points["seed"] == points["seed"].min()]
    points = points.drop_duplicates(["task", "method", "alpha", "beta"])
    tasks, methods = (list(dict.fromkeys(points[x])) for x in ("task", "method"))
    figure, axes = pyplot.subplots(
        len(tasks),
        len(methods),
        figsize=(3.2 * len(methods) + 1, 3.1 * len(tasks)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    finite = points["loss"][np.isfinite(points["loss"])]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    high = max(high, low + 1e-6)  # a flat surface has one colour, too
    scale, levels = colors.Normalize(low, high), np.linspace(low, high, 25)
    shown = None
    for (task, method), axis in zip(((t, m) for t in tasks for m in methods), axes.flat, strict=True):
        of_panel = points[(points["task"] == task) & (points["method"] == method)]
        axis.set_title(f"{task}, {method}", fontsize=9)
        if of_panel.empty:
            axis.text(0.5, 0.5, "not there", transform=axis.transAxes, ha="center")
            continue
        grid = of_panel.pivot(index="beta", columns="alpha", values="loss")
        place = (grid.columns, grid.index, np.ma.masked_invalid(grid.to_numpy()))
        shown = axis.contourf(*place, levels=levels, norm=scale, cmap="viridis")
        axis.contour(*place, levels=levels, colors="white", linewidths=0.3)
        axis.plot(0, 0, "+", color="red")
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="cross-entropy (nats)", shrink=0.8)
    figure.supxlabel("α")
    figure.supylabel("β")
    return _png(figure)


def interpolations(points: pd.DataFrame) -> bytes:
    """Loss (solid) and accuracy (dashed) along lines between models, one panel for each pair.

    Args:
        points: ``analysis`` (each is a line), ``model``, ``granularity``, ``task``, ``first``,
            ``second``, ``alpha``, ``loss``, ``accuracy``.
    """
    pyplot = _pyplot()
    panels = list(
        points.groupby(["model", "granularity", "task", "first", "second"], sort=False, dropna=False)
    )
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.4 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((model, granularity, task, first, second), rows) in zip(axes.flat, panels, strict=False):
        right = axis.twinx()
        for _, run in rows.groupby("analysis"):
            run = run.sort_values("alpha")
            axis.plot(run["alpha"], run["loss"], color=_COLOURS[4])
            right.plot(run["alpha"], 100 * run["accuracy"], "--", color=_COLOURS[5])
        for end in (0, 1):
            axis.axvline(end, color="grey", linewidth=0.6)
        axis.set_title(f"{model}, {task}, {granularity}: {first} (0) to {second} (1)", fontsize=8)
        axis.set_xlabel("α")
        axis.set_ylabel("cross-entropy (nats)", color=_COLOURS[4])
        right.set_ylabel("accuracy (%)", color=_COLOURS[5])
    return _png(figure)


def probing(rows: pd.DataFrame) -> bytes:
    """Matthews correlation of each run, by method, one panel for each share of inoculating data.

    Args:
        rows: of one model and task: ``method``, ``granularity``, ``inoculated``, ``matthews``.
    """
    pyplot = _pyplot()
    shares = sorted(rows["inoculated"].unique())
    # Both granularities of a method side by side.
    at = rows["granularity"].map({"element": ", element", "tensor": ", tensor"}).fillna("")
    rows = rows.assign(method=rows["method"] + at)
    methods = list(dict.fromkeys(rows["method"]))
    figure, axes = pyplot.subplots(
        1,
        len(shares),
        figsize=(0.55 * len(methods) * len(shares) + 3, 4.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, share in zip(axes.flat, shares, strict=True):
        of_share = rows[rows["inoculated"] == share]
        for place, method in enumerate(methods):
            values = of_share.loc[of_share["method"] == method, "matthews"]
            axis.plot([place] * len(values), values, "o", color=_COLOURS[4], alpha=0.6)
            axis.plot(place, values.mean(), "_", color=_COLOURS[5], markersize=14)
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set(title=f"{100 * share:g}% inoculated", ylim=(-1.05, 1.05))
        axis.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
    axes[0, 0].set_ylabel("Matthews correlation")
    return _png(figure)
