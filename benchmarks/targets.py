"""Results against the project's targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.preset import BF16, FLAT
from benchmarks.report import BUSY, CASE, company, title
from benchmarks.specs import BASELINE, BASELINE_SELECT, CLIPPED, EAGER
from benchmarks.work import flat, llama, roberta

_MIB = 2**20
THREADS = 2
_ROSE = "rose bracket"


@dataclass(frozen=True)
class Bound:
    """And the cases that it is meant for.

    Attributes:
        reach: at most this. aim: a tighter one.
        works: empty: every one of full size. data: empty: any.
        threads: of a CPU; None: any. beside: busy processes.
    """

    reach: float
    aim: float | None = None
    works: Sequence[str] = ()
    data: Sequence[str] = ()
    threads: int | None = THREADS
    beside: int = 0

    def is_for(self, case: pd.DataFrame) -> bool:
        first = case.iloc[0]
        return (
            (first["work"] in self.works if self.works else bool(case["full_size"].all()))
            and (not self.data or first["data"] in self.data)
            and self.threads in (None, first["threads"])
            and self.beside == first["beside"]
        )


@dataclass(frozen=True)
class Target:
    """Bounds on what :attr:`measure` makes of the rows of one case, by contender."""

    says: str
    measure: Callable[[pd.DataFrame], float]
    bounds: Sequence[Bound]

    def verdict(self, case: pd.DataFrame) -> str | None:
        """None if nothing was measured."""
        try:
            value = self.measure(case)
        except KeyError:
            value = float("nan")
        if pd.isna(value):
            return None
        bound = next((bound for bound in self.bounds if bound.is_for(case)), None)
        if bound is None:
            return f"{value:.3g}; not judged, no bound is meant for it"
        says = f"at most {bound.reach:.3g}"
        if bound.aim is not None:
            says += f"; aim {bound.aim:.3g} {'met' if value <= bound.aim else 'missed'}"
        busy = "" if (case["others_busy_cores"] <= BUSY).all() else "; on a busy machine"
        return f"{'PASS' if value <= bound.reach else 'FAIL'}: {value:.3g} ({says}{busy})"


def _time(name: str, over: str) -> Callable[[pd.DataFrame], float]:
    return lambda case: case.at[name, "ms_p50"] / case.at[over, "ms_p50"]


def _extra_memory(case: pd.DataFrame) -> float:
    """MiB beyond one bit per element, of the worst."""
    names = [
        n for n in ("rose exact", _ROSE, "rose ensemble", "rose ensemble, bracket") if n in case.index
    ]
    rows = case.loc[names]
    return ((rows["peak_bytes"] - rows["elements"] / 8) / _MIB).max()


_FLAT, _LIST, _LLAMA, _SMALL = (work.name for work in (flat(FLAT), roberta(), llama(), flat(1 << 20)))


def _bound(reach: float, aim: float, *works: str, data: str = "gaussian", **where: int) -> Bound:
    return Bound(reach, aim, works or (_FLAT, _LIST), (data,), **where)


TARGETS = (
    Target(f"approx over {BASELINE}", _time("rose approx", BASELINE), [_bound(1.06, 1.03)]),
    Target(
        f"second order over {BASELINE}",
        _time(_ROSE, BASELINE),
        [
            _bound(1.12, 1.06),
            _bound(1.25, 1.12, _LIST, data="recorded"),
            *(_bound(1.25, 1.12, _FLAT, data=data) for data in ("heavy", "ties", "denormals")),
            _bound(1.25, 1.10, threads=1),
            _bound(1.30, 1.10, beside=1),
            _bound(1.20, 1.05, _LLAMA),
            _bound(1.40, 1.15, _SMALL),
        ],
    ),
    Target(
        f"second order with clipping over {CLIPPED}",
        _time(f"{_ROSE}, clip", CLIPPED),
        [_bound(0.85, 0.80)],
    ),
    Target(
        f"ensemble with its capture over {BASELINE}",
        _time("rose ensemble, bracket", BASELINE),
        [_bound(1.35, 1.25)],
    ),
    Target(
        f"tensors, 40% kept, over {BASELINE}",
        _time("rose tensors, 40%", BASELINE),
        [_bound(0.80, 0.66)],
    ),
    Target(
        f"bfloat16 moments over {BASELINE}",
        _time(f"{_ROSE}, bf16 moments", BASELINE),
        [_bound(0.85, 0.75)],
    ),
    Target(f"exact over {BASELINE}", _time("rose exact", BASELINE), [_bound(1.45, 1.35)]),
    Target(f"second order over {EAGER}", _time(_ROSE, EAGER), [Bound(1 / 40, 1 / 55)]),
    Target(
        f"select over {BASELINE_SELECT}",
        _time("rose select", BASELINE_SELECT),
        [Bound(1 / 15, 1 / 25, [_FLAT])],
    ),
    Target("MiB of temporaries beyond one bit per element", _extra_memory, [Bound(16)]),
)
_SCALING = Target(
    f"second order over {BASELINE}: at 512Mi over at 16Mi",
    lambda case: case["value"].max(),
    [Bound(1.05, 1.00, data=["gaussian"])],
)


def _on_gpu(says: str, measure: Callable[[pd.DataFrame], float], reach: float) -> Target:
    return Target(says, measure, [Bound(reach, threads=None)])


# On a GPU, by the device's time.
GPU_TARGETS = (
    _on_gpu(f"second order over {BASELINE}", _time(_ROSE, BASELINE), 1.10),
    _on_gpu(f"second order with clipping over {CLIPPED}", _time(f"{_ROSE}, clip", CLIPPED), 0.95),
    _on_gpu(f"exact over {BASELINE}", _time("rose exact", BASELINE), 1.5),
    _on_gpu(
        f"ensemble with its capture over {BASELINE}", _time("rose ensemble, bracket", BASELINE), 1.4
    ),
)
_NARROW = _on_gpu(
    f"bfloat16 parameters and moments over {BASELINE} in float32, per element",
    lambda case: case["value"].max(),
    0.55,
)


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
                yield f"{_name(key)}: {target.says}: {verdict}"
        yield from _host(key, rows)
    for key, rows in cases.items():
        for work in (key[1].removesuffix(BF16), flat(FLAT).name):
            wide = cases.get((key[0], work, *key[2:]))
            alike = wide is not None and (wide["dtype"] == "float32").all()
            if alike and (rows["dtype"] == "bfloat16").all():
                yield from _narrow(key, rows, wide)
                break


def _name(key: Sequence[Any]) -> str:
    return f"{key[1]}, {key[2]}{company(key[-1])}"


def _narrow(key: Sequence[Any], rows: pd.DataFrame, wide: pd.DataFrame) -> Iterator[str]:
    try:
        value = rows.at[_ROSE, "ns_per_element"] / wide.at[BASELINE, "ns_per_element"]
    except KeyError:
        return
    full = bool(wide["full_size"].all())
    if (verdict := _NARROW.verdict(rows.assign(value=value, full_size=full))) is not None:
        to = f"{key[1]} to {wide['work'].iloc[0]}"
        yield f"{_name((key[0], to, *key[2:]))}: {_NARROW.says}: {verdict}"


def _host(key: Sequence[Any], rows: pd.DataFrame) -> Iterator[str]:
    """Whether the host is ahead of the device in every one of ours."""
    ours = rows[rows.index.str.startswith("rose ") & rows["ms_p50"].notna()]
    if "host_ms" in ours and len(ours):
        share = ours["host_ms"] / ours["ms_p50"]
        worst = f"{share.max():.3g}, {share.idxmax()}"
        says = f"{'PASS' if share.max() < 1 else 'FAIL'}: {worst} (below 1)"
        if not ours["full_size"].all():
            says = f"{worst}; not judged, meant for full sizes"
        elif (ours["beside"] > 0).any():
            says = f"{worst}; not judged beside busy processes"
        yield f"{_name(key)}: host's time of a step over the device's, worst: {says}"


def _judge(frame: pd.DataFrame) -> Iterator[str]:
    for _, case in frame.groupby(CASE, sort=False):
        rows = case.set_index("contender")
        for target in TARGETS:
            if (verdict := target.verdict(rows)) is not None:
                yield f"{title(case)}: {target.says}: {verdict}"
    ends = frame[(frame["contender"] == _ROSE) & frame["work"].isin(["flat-16Mi", "flat-512Mi"])]
    for (data, threads, beside), rows in ends.groupby(CASE[2:], sort=False):
        ratios = rows.set_index("work")["ratio"]
        if {"flat-16Mi", "flat-512Mi"} <= set(ratios.index):
            value = ratios["flat-512Mi"] / ratios["flat-16Mi"]
            rows = rows.assign(value=value, full_size=True)
            if (verdict := _SCALING.verdict(rows)) is not None:
                yield f"{data}, {threads} threads{company(beside)}: {_SCALING.says}: {verdict}"
