"""Results as rows, tables, a plot, and against the targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.specs import BASELINE, BASELINE_SELECT, Spec

CASE = ["device", "work", "data", "threads", "beside"]
BANDWIDTH = ("copy", "triad")
BUSY = 0.1  # cores that other processes keep busy; above it, times mean little


def row(
    spec: Spec,
    elements: int,
    moved: float | None,
    seconds: Sequence[float],
    baseline: Sequence[float | None],
) -> dict[str, object]:
    """Statistics of one contender.

    Args:
        elements: that one step covers.
        moved: bytes of each that the algorithm has to move.
        seconds: of its rounds.
        baseline: of whom it is compared with in the same rounds, for the spread of the ratio.
    """
    times = pd.Series(seconds, dtype=float)
    p20, p50, p80 = times.quantile([0.2, 0.5, 0.8])
    ratios = (times / pd.Series(baseline, dtype=float)).quantile([0.2, 0.8])
    return {
        "rounds": len(times),
        "ms_p20": p20 * 1e3,
        "ms_p50": p50 * 1e3,
        "ms_p80": p80 * 1e3,
        "ns_per_element": p50 / elements * 1e9,
        "bytes_per_element": moved,
        "gb_per_s": None if moved is None else moved * elements / p50 / 1e9,
        "against": spec.against,
        "ratio_p20": ratios.iloc[0],
        "ratio_p80": ratios.iloc[1],
    }


def compare(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Adds the ratio to the baseline and the shares of the bandwidth, within each case."""
    frame = pd.DataFrame(rows)
    if "ms_p50" not in frame:
        return frame

    def add(case: pd.DataFrame) -> pd.DataFrame:
        by_name = case.set_index("contender")
        case = case.assign(ratio=case["ms_p50"] / case["against"].map(by_name["ms_p50"]))
        for peer in BANDWIDTH:
            if peer in by_name.index:
                case[f"of_{peer}"] = case["gb_per_s"] / by_name.loc[peer, "gb_per_s"]
        return case

    return pd.concat([add(case) for _, case in frame.groupby(CASE, sort=False)])


_NUMBERS = [
    "threads", "elements", "others_busy_cores", "rounds", "ms_p50", "ratio", "ratio_p20", "ratio_p80",
]  # fmt: skip
_NEEDED = ["device", "work", "data", "full_size", "contender", "against", *_NUMBERS]


def read(path: Path) -> pd.DataFrame:
    """What a run has written. In older files nobody was beside.

    Raises:
        ValueError: it is something else; the message says what was expected.
    """
    try:
        frame = pd.read_csv(path)
        if missing := [column for column in _NEEDED if column not in frame]:
            raise ValueError(f"it lacks the columns {', '.join(missing)}")
        frame[_NUMBERS] = frame[_NUMBERS].apply(pd.to_numeric)
        beside = frame["beside"] if "beside" in frame else pd.Series(0, frame.index)
        frame["beside"] = beside.fillna(0).astype(int)
        if frame[[*CASE, "contender"]].isna().any(axis=None):
            raise ValueError(f"there are rows without one of {', '.join(CASE)}, contender")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table that `python -m benchmarks` wrote, as those in "
            f"benchmarks/results are: {error}"
        ) from error
    return frame


_SHOWN = {
    "contender": ("", ""),
    "ms_p20": ("p20 ms", ".4g"),
    "ms_p50": ("p50 ms", ".4g"),
    "ms_p80": ("p80 ms", ".4g"),
    "host_ms": ("host ms", ".3g"),
    "ns_per_element": ("ns/elem", ".3g"),
    "ratio": ("ratio", ".3g"),
    "ratio_p20": ("p20", ".3g"),
    "ratio_p80": ("p80", ".3g"),
    "against": ("to", ""),
    "bytes_per_element": ("B/elem", ".1f"),
    "gb_per_s": ("GB/s", ".1f"),
    "of_copy": ("of copy", ".0%"),
    "of_triad": ("of triad", ".0%"),
    "kept": ("kept", ".0%"),
    "peak_bytes_per_element": ("peak B/elem", ".2f"),
}


def table(case: pd.DataFrame) -> str:
    """One case in Markdown."""
    case = case[case["ms_p50"].notna()]
    shown = pd.DataFrame()
    for column, (title, how) in _SHOWN.items():
        if column in case and not case[column].isna().all():
            shown[title or column] = ["" if pd.isna(x) else format(x, how) for x in case[column]]
    return shown.to_markdown(
        index=False,
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(shown.columns) - 1),
    )


def title(case: pd.DataFrame) -> str:
    first = case.iloc[0]
    return name(*first[["work", "data", "threads", "beside"]])


def name(work: str, data: str, threads: int, beside: int) -> str:
    """Of a case."""
    return f"{work}, {data}, {threads} threads{company(beside)}"


def company(beside: int) -> str:
    """What a name has in the end."""
    return f", beside {beside} busy process{'es' if beside > 1 else ''}" if beside else ""


# ------------------------------------------------------------------------------------------- plot

_COLOURS = {"bandwidth": "#DDDDDD", "peer": "#999999", "rose": "#0072B2"}


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Time per element and ratios, one panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frame = frame[frame["ms_p50"].notna()]
    sizes = [key for key, _ in _by_size(frame)]
    every = list(frame.groupby(CASE, sort=False))
    cases = (
        [  # plot_scaling shows the others
            (key, case)
            for key, case in every
            if case["full_size"].all() or not (key[1].startswith("flat-") and key[2:] in sizes)
        ]
        or every
    )
    columns = min(4, len(cases))
    lines = -(-len(cases) // columns)
    names = list(dict.fromkeys(frame["contender"]))
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns + 1.6, 0.19 * len(names) * lines + 1.4),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (_, case) in zip(axes.flat, cases, strict=False):
        axis.set_title(title(case).replace(", beside", "\nbeside"), fontsize=9)
        rows = case.set_index("contender").reindex(names)
        time = rows["ns_per_element"]
        low, high = (time * rows[f"ms_{p}"] / rows["ms_p50"] for p in ("p20", "p80"))
        kinds = ["bandwidth" if n in BANDWIDTH else n.split()[0] for n in names]
        colours = [_COLOURS.get(kind, _COLOURS["peer"]) for kind in kinds]
        axis.barh(
            names, time, xerr=[(time - low).clip(lower=0), (high - time).clip(lower=0)],
            color=colours, ecolor="black", error_kw={"elinewidth": 0.8}, capsize=1.5,
        )  # fmt: skip
        for y, (end, ratio) in enumerate(
            zip(pd.concat([time, high], axis=1).max(axis=1), rows["ratio"], strict=True)
        ):
            if pd.notna(ratio):
                axis.annotate(f" {ratio:.3g}", (end, y), va="center", fontsize=6)
        axis.margins(x=0.12, y=0.01)
        axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", linewidth=0.4)
        axis.set_axisbelow(True)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    first = frame.iloc[0]
    figure.supxlabel(
        f"ns per element (medians; whiskers: p20 to p80). Numbers: over {BASELINE}, for "
        f"selections over {BASELINE_SELECT}",
        fontsize=8,
    )
    where = first["gpu"] if "gpu" in first else f"{first['machine']}, {first['isa']}"
    figure.suptitle(f"{where}, torch {first['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _by_size(frame: pd.DataFrame) -> list[tuple[tuple[str, int, int], pd.DataFrame]]:
    """Flat works of three sizes or more, by data, threads and busy processes."""
    flat = frame[frame["work"].str.startswith("flat-")].groupby(CASE[2:], sort=False)
    return [(key, rows) for key, rows in flat if rows["elements"].nunique() >= 3]


def plot_scaling(frame: pd.DataFrame, path: Path) -> bool:
    """Ratios over the number of elements, where flat works of three sizes or more were measured.

    Returns:
        Whether there are any.
    """
    from matplotlib import pyplot

    shown = frame["contender"].str.startswith("rose") & (frame["against"] == BASELINE)
    panels = _by_size(frame[shown & frame["ratio"].notna()])
    if not panels:
        return False
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels) + 2, 4.5),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (case, panel) in zip(axes.flat, panels, strict=True):
        for contender, rows in panel.groupby("contender", sort=False):
            rows = rows.sort_values("elements")
            axis.plot(rows["elements"], rows["ratio"], marker="o", markersize=3, label=contender)
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(name("flat", *case), fontsize=9)
        axis.set_xlabel("elements")
        axis.grid(linewidth=0.4)
    axes[0, 0].set_ylabel(f"time over {BASELINE}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
