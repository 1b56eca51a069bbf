"""``python -m benchmarks.compare OLD.csv NEW.csv``: has anything become slower, beyond the noise?

What is compared are ratios within a case, to AdamW or whoever else a contender is compared with: times
of two runs say as much about the machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from benchmarks import report
from benchmarks.report import BUSY, CASE

_KEY = [*CASE, "contender"]
_FEWEST = 3  # rounds, below which they say nothing about their spread
_ERRORS = 3.0  # standard errors; a comparison has some two hundred rows
# Of a normal distribution, from half of what is between p20 and p80: the standard error of a median is
# 1.253 standard deviations over the root of the number, a standard deviation is 1.188 of these halves.
_OF_HALF = 1.253 * 1.188
_MACHINE = (
    "machine", "gpu", "capability", "cores", "isa", "cpu_flags", "transparent_huge_pages", "device",
    "threads", "python", "torch", "cuda", "triton", "deepspeed", "apex",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a ratio of ours is worse, 2 if there is nothing to compare."""
    args = _parser().parse_args(argv)
    try:
        old, new = _load(args.old), _load(args.new)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for label, path, frame in (("old", args.old, old), ("new", args.new, new)):
        print(f"{label}: {path}, revision {_values(frame, 'revision')}, {_values(frame, 'date')}")
    common = old.index[old["timed"]].intersection(new.index[new["timed"]], sort=False)
    rows = _judged(old.loc[common], new.loc[common], args.tolerance)
    for _, case in rows.groupby(CASE, sort=False):
        print(f"\n## {report.title(case)}\n\n{_table(case)}")
    alone = (("old", args.old, old, new), ("new", args.new, new, old))
    for label, path, there, other in alone:
        _print(f"Only in {label}, {path}:", _alone(there, other))
    for title, lines in _doubts(old, new, rows):
        _print(f"Warning: {title}:", lines)
    if rows.empty:
        print(
            f"{args.old} and {args.new} have no rows in common: nothing was compared", file=sys.stderr
        )
        return 2
    ours = rows[rows["contender"].str.startswith("rose")]
    worse = ours[ours["verdict"] == "WORSE"]
    print(
        f"\nOf {len(ours)} ratios of rose_ops, {len(worse)} are worse, "
        f"{(ours['verdict'] == 'better').sum()} better; the others are within the noise or not judged."
    )
    for case, row in zip(_titles(worse), worse.itertuples(), strict=True):
        print(
            f"WORSE: {case}: {row.contender} over {row.against}: {row.ratio_old:.3g}, now "
            f"{row.ratio_new:.3g} ({row.change:+.1%}, noise {row.noise:.1%})"
        )
    return 1 if len(worse) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare two results. The exit status is 1 if a contender of rose_ops has become "
        "slower, relative to who it is compared with, by more than the noise of both runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="a CSV that python -m benchmarks wrote")
    parser.add_argument("new", type=Path, help="another one, of the same machine")
    parser.add_argument(
        "--tolerance", type=_share, default=0.02, help="the least that counts, as a share of the ratio"
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a share such as 0.02, got {text!r}")
    return value


def _load(path: Path) -> pd.DataFrame:
    """By case and contender.

    Attributes that are added: ``timed``, whether there is a ratio to compare; ``error``, its relative
    standard error, NaN if there are too few rounds to know.
    """
    frame = report.read(path)
    if (twice := frame.duplicated(_KEY)).any():
        first = frame[twice].iloc[0]
        raise ValueError(
            f"{path}: expected every contender once in a case, found {first['contender']!r} twice in "
            f"{report.title(frame[twice])}"
        )
    frame = frame.set_index(_KEY, drop=False).rename_axis([f"key {name}" for name in _KEY])
    frame["timed"] = frame["ratio"].notna() & (frame["contender"] != frame["against"])
    peers = pd.MultiIndex.from_frame(frame[[*CASE, "against"]])
    pairs = frame["rounds"].clip(upper=frame["rounds"].reindex(peers).to_numpy())
    half = (frame["ratio_p80"] - frame["ratio_p20"]) / 2 / frame["ratio"]
    frame["error"] = (_OF_HALF * half / pairs**0.5).where(pairs >= _FEWEST)
    return frame


def _judged(old: pd.DataFrame, new: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    rows = new[[*_KEY, "against"]].copy()
    rows["ratio_old"], rows["ratio_new"] = old["ratio"], new["ratio"]
    rows["change"] = rows["ratio_new"] / rows["ratio_old"] - 1
    # Of the quotient.
    rows["noise"] = (_ERRORS * (old["error"] ** 2 + new["error"] ** 2) ** 0.5).clip(lower=tolerance)
    rows["verdict"] = ""
    rows.loc[rows["change"] > rows["noise"], "verdict"] = "WORSE"
    rows.loc[1 / (1 + rows["change"]) - 1 > rows["noise"], "verdict"] = "better"
    rows.loc[rows["noise"].isna(), "verdict"] = "too few rounds"
    rows.loc[old["against"] != new["against"], "verdict"] = "not over " + old["against"]
    busy_old, busy_new = old["others_busy_cores"] > BUSY, new["others_busy_cores"] > BUSY
    rows["busy"] = ""
    rows.loc[busy_old, "busy"] = "old"
    rows.loc[busy_new, "busy"] = "new"
    rows.loc[busy_old & busy_new, "busy"] = "old, new"
    return rows


_SHOWN = {
    "contender": ("contender", ""),
    "against": ("to", ""),
    "ratio_old": ("old", ".3g"),
    "ratio_new": ("new", ".3g"),
    "change": ("change", "+.1%"),
    "noise": ("noise", ".1%"),
    "verdict": ("verdict", ""),
    "busy": ("busy machine", ""),
}


def _table(case: pd.DataFrame) -> str:
    """In Markdown."""
    return pd.DataFrame(
        {
            title: ["" if pd.isna(x) else format(x, how) for x in case[column]]
            for column, (title, how) in _SHOWN.items()
            if (case[column] != "").any()
        }
    ).to_markdown(index=False, disable_numparse=True)


def _print(title: str, lines: Iterable[str]) -> None:
    """Nothing if there are no lines."""
    if lines := list(lines):
        print("", title, *(f"- {line}" for line in lines), sep="\n")


def _titles(rows: pd.DataFrame) -> list[str]:
    return [report.name(*row) for row in rows[CASE[1:]].itertuples(index=False)]


def _alone(there: pd.DataFrame, other: pd.DataFrame) -> Iterator[str]:
    """What was timed in one file and not in the other."""
    lost = there[there["timed"] & ~there.index.isin(other.index[other["timed"]])]
    cases = set(other[CASE].itertuples(index=False, name=None))
    for case, rows in lost.groupby(CASE, sort=False):
        names = []
        for key, name in rows["contender"].items():
            why = other["skipped"].get(key) if "skipped" in other else None
            names.append(name if why is None or pd.isna(why) else f"{name} (in the other: {why})")
        all_of_them = f"the whole case, {len(names)} contenders"
        yield f"{report.title(rows)}: {'; '.join(names) if case in cases else all_of_them}"


def _doubts(
    old: pd.DataFrame, new: pd.DataFrame, rows: pd.DataFrame
) -> Iterator[tuple[str, Iterable[str]]]:
    """Why the comparison may mean little."""
    yield (
        "not the same machine, software or threads, so this means little",
        (
            f"{column}: {was}; now {now}"
            for column in _MACHINE
            if (was := _values(old, column)) != (now := _values(new, column))
        ),
    )
    busy = rows[rows["busy"] != ""]
    yield "other processes kept the machine busy during", dict.fromkeys(_titles(busy))
    moved = rows[~rows["contender"].str.startswith("rose") & rows["verdict"].isin(["WORSE", "better"])]
    yield (
        "peers changed, too, so perhaps the machine did",
        map(": ".join, zip(_titles(moved), moved["contender"], strict=True)),
    )


def _values(frame: pd.DataFrame, column: str) -> str:
    values = frame[column].dropna() if column in frame else []
    return ", ".join(sorted({str(value) for value in values})) or "none"


if __name__ == "__main__":
    sys.exit(main())
