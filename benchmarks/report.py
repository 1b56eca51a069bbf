"""Results as rows, tables, a plot, and against the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.contenders import BASELINE, EAGER, SPECS

CASE = ["work", "data", "threads"]
BANDWIDTH = ("copy", "triad")
_MIB = 2**20


def row(
    name: str, elements: int, seconds: Sequence[float], baseline: Sequence[float | None]
) -> dict[str, object]:
    """Statistics of one contender.

    Args:
        elements: that one step covers.
        seconds: of its rounds.
        baseline: of the baseline in the same rounds, for the spread of the ratio.
    """
    times = pd.Series(seconds, dtype=float)
    p20, p50, p80 = times.quantile([0.2, 0.5, 0.8])
    counted = SPECS[name].bytes_per_element
    ratios = (times / pd.Series(baseline, dtype=float)).quantile([0.2, 0.8])
    return {
        "contender": name,
        "rounds": len(times),
        "ms_p20": p20 * 1e3,
        "ms_p50": p50 * 1e3,
        "ms_p80": p80 * 1e3,
        "ns_per_element": p50 / elements * 1e9,
        "bytes_per_element": counted,
        "gb_per_s": None if counted is None else counted * elements / p50 / 1e9,
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
        own = ~case["contender"].isin(BANDWIDTH)
        if BASELINE in by_name.index:
            ratio = case["ms_p50"] / by_name.loc[BASELINE, "ms_p50"]
            case = case.assign(ratio=ratio.where(own))
            for end in ("ratio_p20", "ratio_p80"):
                case[end] = case[end].where(own)
        for name in BANDWIDTH:
            if name in by_name.index:
                case[f"of_{name}"] = case["gb_per_s"] / by_name.loc[name, "gb_per_s"]
        return case

    return pd.concat([add(case) for _, case in frame.groupby(CASE, sort=False)])


_SHOWN = {
    "contender": ("", ""),
    "ms_p20": ("p20 ms", ".1f"),
    "ms_p50": ("p50 ms", ".1f"),
    "ms_p80": ("p80 ms", ".1f"),
    "ns_per_element": ("ns/elem", ".2f"),
    "ratio": (f"x {BASELINE}", ".2f"),
    "ratio_p20": ("p20", ".2f"),
    "ratio_p80": ("p80", ".2f"),
    "bytes_per_element": ("B/elem", ".1f"),
    "gb_per_s": ("GB/s", ".1f"),
    "of_triad": ("of triad", ".0%"),
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


# ---------------------------------------------------------------------------------------- targets


THREADS = 2
BUSY = 0.1  # cores that other processes keep busy; above it, times mean little
_EXACT = "rose exact"


@dataclass(frozen=True)
class Target:
    """A bound on what :attr:`measure` makes of the rows of one case, by contender."""

    says: str
    measure: Callable[[pd.DataFrame], float]
    bound: float
    at_least: bool = False

    def verdict(self, case: pd.DataFrame) -> str:
        try:
            value = self.measure(case)
        except KeyError:
            value = float("nan")
        if pd.isna(value):
            return "not measured"
        if not case["full_size"].all() or not (case["threads"] == THREADS).all():
            return f"{value:.3g}; not judged, meant for full sizes and {THREADS} threads"
        met = value >= self.bound if self.at_least else value <= self.bound
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:.3g}"
        busy = "" if (case["others_busy_cores"] <= BUSY).all() else ", on a busy machine"
        return f"{'PASS' if met else 'FAIL'}: {value:.3g} ({bound}{busy})"


TARGETS = (
    Target(
        f"exact, time over that of {BASELINE}",
        lambda case: case.at[_EXACT, "ms_p50"] / case.at[BASELINE, "ms_p50"],
        2.2,
    ),
    Target(
        "exact, times faster than the eager reference",
        lambda case: case.at[EAGER, "ms_p50"] / case.at[_EXACT, "ms_p50"],
        20,
        at_least=True,
    ),
    Target(  # so that none is the size of the parameters, at 32 bits per element
        "exact, MiB of temporaries beyond one bit per element",
        lambda case: (case.at[_EXACT, "peak_bytes"] - case.at[_EXACT, "elements"] / 8) / _MIB,
        16,
    ),
)


def judge(frame: pd.DataFrame) -> list[str]:
    """PASS or FAIL for every target and case it speaks of."""
    return [
        f"{_title(rows)}: {target.says}: {target.verdict(rows.set_index('contender'))}"
        for _, rows in frame.groupby(CASE, sort=False)
        for target in TARGETS
    ]


def _title(case: pd.DataFrame) -> str:
    first = case.iloc[0]
    return f"{first['work']}, {first['data']}, {first['threads']} threads"


# ------------------------------------------------------------------------------------------- plot


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Ratios to the baseline, one panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    frame = frame[frame["ratio"].notna()]
    cases = list(frame.groupby(CASE, sort=False))
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    names = [name for name in SPECS if name in set(frame["contender"])]
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns + 1, 0.32 * len(names) * lines + 1.6),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (_, case) in zip(axes.flat, cases, strict=False):
        axis.set_title(_title(case), fontsize=9)
        rows = case.set_index("contender").reindex(names)
        ratio = rows["ratio"]
        colours = ["#0072B2" if name.startswith("rose") else "#999999" for name in names]
        whiskers = [
            (ratio - rows["ratio_p20"]).clip(lower=0),
            (rows["ratio_p80"] - ratio).clip(lower=0),
        ]
        axis.barh(names, ratio, xerr=whiskers, color=colours, ecolor="black", capsize=2)
        ends = rows[["ratio", "ratio_p80"]].max(axis=1)
        for y, (value, end) in enumerate(zip(ratio, ends, strict=True)):
            if pd.notna(value):
                axis.annotate(f"  {value:.2f}", (end, y), va="center", fontsize=7)
        axis.margins(x=0.2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    first = frame.iloc[0]
    figure.supxlabel(f"time of a step / time of {BASELINE} (medians; bars: p20 to p80)", fontsize=9)
    figure.suptitle(f"{first['machine']}, {first['isa']}, torch {first['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
