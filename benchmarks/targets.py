"""Results against the project's targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from benchmarks.preset import BF16, FLAT
from benchmarks.report import BUSY, CASE, title
from benchmarks.specs import BASELINE, BASELINE_SELECT, CLIPPED, EAGER
from benchmarks.work import flat

_MIB = 2**20
THREADS = 2
_ROSE = "rose bracket"


@dataclass(frozen=True)
class Target:
    """Bounds on what :attr:`measure` makes of the rows of one case, by contender.

    Attributes:
        reach: the bound. aim: a tighter one.
        only: the one work that it speaks of; empty: every one of full size.
    """

    says: str
    measure: Callable[[pd.DataFrame], float]
    reach: float
    aim: float | None = None
    only: str = ""

    def verdict(self, case: pd.DataFrame) -> str | None:
        """None if nothing was measured."""
        try:
            value = self.measure(case)
        except KeyError:
            value = float("nan")
        if pd.isna(value):
            return None
        work, threads = case["work"].iloc[0], case["threads"].iloc[0]
        full = case["full_size"].all() if not self.only else work == self.only
        on_cpu = (case["device"] == "cpu").all()
        if not full or (on_cpu and threads != THREADS):
            meant = f"full sizes and {THREADS} threads" if on_cpu else "full sizes"
            return f"{value:.3g}; not judged, meant for {meant}"
        bounds = f"at most {self.reach:.3g}"
        if self.aim is not None:
            bounds += f"; aim {self.aim:.3g} {'met' if value <= self.aim else 'missed'}"
        busy = "" if (case["others_busy_cores"] <= BUSY).all() else "; on a busy machine"
        return f"{'PASS' if value <= self.reach else 'FAIL'}: {value:.3g} ({bounds}{busy})"


def _time(name: str, over: str) -> Callable[[pd.DataFrame], float]:
    return lambda case: case.at[name, "ms_p50"] / case.at[over, "ms_p50"]


def _extra_memory(case: pd.DataFrame) -> float:
    """MiB beyond one bit per element, of the worst."""
    names = [
        n for n in ("rose exact", _ROSE, "rose ensemble", "rose ensemble, bracket") if n in case.index
    ]
    rows = case.loc[names]
    return ((rows["peak_bytes"] - rows["elements"] / 8) / _MIB).max()


TARGETS = (
    Target(f"second order over {BASELINE}", _time(_ROSE, BASELINE), 1.20, 1.00),
    Target(
        f"second order with clipping over {CLIPPED}", _time(f"{_ROSE}, clip", CLIPPED), 1.00, 0.85
    ),
    Target(f"ensemble over {BASELINE}", _time("rose ensemble, bracket", BASELINE), 1.50, 1.30),
    Target(f"tensors, 40% kept, over {BASELINE}", _time("rose tensors, 40%", BASELINE), 0.80, 0.66),
    Target(
        f"bfloat16 moments over {BASELINE}", _time(f"{_ROSE}, bf16 moments", BASELINE), 0.90, 0.75
    ),
    Target(f"exact over {BASELINE}", _time("rose exact", BASELINE), 1.9, 1.6),
    Target(f"second order over {EAGER}", _time(_ROSE, EAGER), 1 / 40, 1 / 55),
    Target(
        f"select over {BASELINE_SELECT}", _time("rose select", BASELINE_SELECT), 1 / 15, 1 / 25,
        only="flat-64Mi",
    ),
    Target("MiB of temporaries beyond one bit per element", _extra_memory, 16),
)  # fmt: skip
_SCALING = Target(
    f"second order over {BASELINE}: at 512Mi over at 16Mi", lambda case: case["value"].max(), 1.15, 1.05
)

# On a GPU, by the device's time.
GPU_TARGETS = (
    Target(f"second order over {BASELINE}", _time(_ROSE, BASELINE), 1.10),
    Target(f"second order with clipping over {CLIPPED}", _time(f"{_ROSE}, clip", CLIPPED), 0.95),
    Target(f"exact over {BASELINE}", _time("rose exact", BASELINE), 1.5),
    Target(
        f"ensemble with its capture over {BASELINE}", _time("rose ensemble, bracket", BASELINE), 1.4
    ),
)
_NARROW = Target(
    f"bfloat16 parameters and moments over {BASELINE} in float32, per element",
    lambda case: case["value"].max(), 0.55,
)  # fmt: skip


def judge(frame: pd.DataFrame) -> list[str]:
    """PASS or FAIL for every target and case that it speaks of."""
    on_cpu = frame["device"] == "cpu"
    return [*_judge(frame[on_cpu]), *_judge_gpu(frame[~on_cpu])]


def _judge_gpu(frame: pd.DataFrame) -> Iterator[str]:
    frame = frame.assign(contender=frame["contender"].str.replace(" [cuda]", "", regex=False))
    cases = {key: case.set_index("contender") for key, case in frame.groupby(CASE, sort=False)}
    for key, rows in cases.items():
        for target in GPU_TARGETS if (rows["dtype"] == "float32").all() else ():
            if (verdict := target.verdict(rows)) is not None:
                yield f"{key[1]}, {key[2]}: {target.says}: {verdict}"
        yield from _host(key, rows)
    for key, rows in cases.items():
        for work in (key[1].removesuffix(BF16), flat(FLAT).name):
            wide = cases.get((key[0], work, *key[2:]))
            alike = wide is not None and (wide["dtype"] == "float32").all()
            if alike and (rows["dtype"] == "bfloat16").all():
                yield from _narrow(key, rows, wide)
                break


def _narrow(key: Sequence[str], rows: pd.DataFrame, wide: pd.DataFrame) -> Iterator[str]:
    try:
        value = rows.at[_ROSE, "ns_per_element"] / wide.at[BASELINE, "ns_per_element"]
    except KeyError:
        return
    full = bool(wide["full_size"].all())
    if (verdict := _NARROW.verdict(rows.assign(value=value, full_size=full))) is not None:
        yield f"{key[1]} to {wide['work'].iloc[0]}, {key[2]}: {_NARROW.says}: {verdict}"


def _host(key: Sequence[str], rows: pd.DataFrame) -> Iterator[str]:
    """Whether the host is ahead of the device in every one of ours."""
    ours = rows[rows.index.str.startswith("rose ") & rows["ms_p50"].notna()]
    if "host_ms" in ours and len(ours):
        share = ours["host_ms"] / ours["ms_p50"]
        worst = f"{share.max():.3g}, {share.idxmax()}"
        says = f"{'PASS' if share.max() < 1 else 'FAIL'}: {worst} (below 1)"
        if not ours["full_size"].all():
            says = f"{worst}; not judged, meant for full sizes"
        yield f"{key[1]}, {key[2]}: host's time of a step over the device's, worst: {says}"


def _judge(frame: pd.DataFrame) -> Iterator[str]:
    for _, case in frame.groupby(CASE, sort=False):
        rows = case.set_index("contender")
        for target in TARGETS:
            if (verdict := target.verdict(rows)) is not None:
                yield f"{title(case)}: {target.says}: {verdict}"
    ends = frame[(frame["contender"] == _ROSE) & frame["work"].isin(["flat-16Mi", "flat-512Mi"])]
    for (data, threads), rows in ends.groupby(["data", "threads"], sort=False):
        ratios = rows.set_index("work")["ratio"]
        if {"flat-16Mi", "flat-512Mi"} <= set(ratios.index):
            value = ratios["flat-512Mi"] / ratios["flat-16Mi"]
            rows = rows.assign(value=value, full_size=True)
            if (verdict := _SCALING.verdict(rows)) is not None:
                yield f"{data}, {threads} threads: {_SCALING.says}: {verdict}"
