"""The table of contenders, and what is known of each before it runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.contenders import (
    MAX_NORM,
    UPPER,
    Apex,
    Bandwidth,
    Contender,
    DeepSpeed,
    Eager,
    Rule,
    Select,
    TorchAdamW,
    Traffic,
)
from benchmarks.device import Device
from benchmarks.ours import Rose, RoseFlat, RoseSelect, RoseTensor, share_of_tensors, tensor_risks
from benchmarks.work import Problem
from rose_ops import backends

BASELINE = "AdamW fused"
BASELINE_SELECT = "kthvalue"
CLIPPED = "AdamW fused, clip"
EAGER = "eager ROSE"
_FOLD = 1 << 27  # elements beyond which nobody has the patience for the slow ones
_MOST_TENSORS = 1000


@dataclass(frozen=True)
class Spec:
    """How a contender is made and judged.

    Attributes:
        kind: what it is compared with: the baseline of steps, or that of selections; or it is what the
            memory gives.
        traffic: what the algorithm has to move; None: not counted.
        rtol: relative error allowed in the parity check.
        slow: takes part in fewer rounds.
        needs: bytes per element of a float32 work that it takes beyond the problem, for a while or
            for long.
        peak: whether its temporaries are measured.
        why_not: why it cannot run on a problem, or None.
    """

    name: str
    make: Callable[[Problem], Contender]
    traffic: Traffic | None
    kind: Literal["bandwidth", "step", "select"] = "step"
    rtol: float = 1e-5
    slow: bool = False
    needs: float = 1.0
    peak: bool = True
    why_not: Callable[[Problem], str | None] = field(default=lambda problem: None)

    def obstacle(self, problem: Problem, device: Device) -> str | None:
        """Why it cannot or should not run here, or None."""
        if (reason := self.why_not(problem)) is not None:
            return reason
        n, width = problem.work.elements, problem.work.dtype.itemsize
        if self.slow and n > _FOLD:
            return f"slow; left out of more than {_FOLD >> 20}Mi elements"
        if (needs := self.needs * n * width / 4) > (free := device.free_bytes()):
            return f"needs about {needs / 2**30:.0f} GiB more, {free / 2**30:.0f} GiB are free"
        return None

    @property
    def against(self) -> str | None:
        """What its time is compared with."""
        return {"step": BASELINE, "select": BASELINE_SELECT, "bandwidth": None}[self.kind]


def specs(device: Device) -> dict[str, Spec]:
    """Everyone who could take part on a device, by name."""
    everyone = (
        _bandwidth("copy", Traffic(params=2)),
        _bandwidth("triad", Traffic(params=3)),
        *(_adamw_cpu() if device.name == "cpu" else _adamw_gpu(device)),
        *_eager(),
        *_rose(device),
        *_select(device),
    )
    return {spec.name: spec for spec in everyone}


# --------------------------------------------------------------------------------------------- peers

_STEP = Traffic(params=2, grads=1, moments=4)  # AdamW reads p, g, m, v and writes p, m, v
_CLIP = Traffic(params=2, grads=1 + 3, moments=4)  # and the norm reads g, the clipping changes it


def _bandwidth(name: str, traffic: Traffic) -> Spec:
    triad = name == "triad"
    return Spec(name, lambda problem: Bandwidth(problem, triad), traffic, kind="bandwidth", peak=False)


def _torch_adamw(name: str, needs: float = 1.0, **how: Any) -> Spec:
    traffic = _CLIP if how.get("clip") else _STEP
    return Spec(name, lambda problem: TorchAdamW(problem, **how), traffic, needs=needs)


def _adamw() -> Iterator[Spec]:
    yield _torch_adamw(BASELINE, fused=True)
    yield _torch_adamw(CLIPPED, fused=True, clip=True)
    yield _torch_adamw("AdamW foreach", needs=8, foreach=True)


def _adamw_cpu() -> Iterator[Spec]:
    yield from _adamw()
    yield _torch_adamw("AdamW single", needs=8, foreach=False, fused=False)
    yield Spec(
        "DeepSpeedCPUAdam",
        DeepSpeed,
        _STEP,
        rtol=1e-4,  # it subtracts beta2 from 1 in float32: 1.3e-5 off
        why_not=_float32_only(_deepspeed_missing),
    )


def _adamw_gpu(device: Device) -> Iterator[Spec]:
    yield from _adamw()
    fused = {"fused": True}
    peers = {BASELINE: fused, CLIPPED: {**fused, "clip": True}, "AdamW foreach": {"foreach": True}}
    for name, how in peers.items():
        spec = _torch_adamw(f"{name}, graph", needs=8, graph=device.graph, **how)
        yield replace(spec, peak=False)
    yield Spec("apex FusedAdam", Apex, _STEP, why_not=_float32_only(_apex_missing))


def _eager() -> Iterator[Spec]:
    second = Rule(("second",))

    def plain(problem: Problem) -> Contender:
        return Eager(problem, eager.step_, second)

    def compiled(problem: Problem) -> Contender:
        step = torch.compile(eager.step_, dynamic=False)
        return Eager(problem, step, replace(second, exact=False))

    def tensors(problem: Problem) -> Contender:
        upper, _ = share_of_tensors(problem, SHARE)
        return Eager(problem, eager.tensor_step_, replace(second, granularity="tensor", upper=upper))

    yield Spec(EAGER, plain, None, slow=True, needs=24, why_not=_plain)
    yield Spec(f"{EAGER}, compiled", compiled, None, slow=True, needs=24, why_not=_compiled)
    yield Spec(
        f"{EAGER}, tensors", tensors, None, slow=True, needs=8,
        why_not=_tensors,
    )  # fmt: skip


def _compiled(problem: Problem) -> str | None:
    if len(problem.work.shapes) > _MOST_TENSORS:
        return f"compiling takes too long for more than {_MOST_TENSORS} tensors"
    return _plain(problem)


def _tensors(problem: Problem) -> str | None:
    if problem.work.dtype != torch.float32:
        return "it would compute in bfloat16"
    if bool(tensor_risks(problem)[1].any()):
        return "there are tensors with m = 0, which it does not know about"
    return None


def _plain(problem: Problem) -> str | None:
    if problem.work.dtype != torch.float32:
        return "it would compute in bfloat16"
    if any(bool((m == 0).any()) for m in problem.moments(torch.float32)[0]):
        return "there are elements with m = 0, which it does not know about"
    return None


def _select(device: Device) -> Iterator[Spec]:
    yield _peer(BASELINE_SELECT, lambda risks, k: risks.kthvalue(k).values, needs=16)
    yield _peer("topk", lambda risks, k: risks.topk(k, largest=False, sorted=False).values.max(), 28)
    yield _peer("sort", lambda risks, k: risks.sort().values[k - 1], needs=24)
    quantile = _peer("quantile", lambda risks, k: risks.quantile(UPPER), needs=24)
    yield replace(quantile, why_not=_quantile_refuses)
    if device.name == "cpu":
        yield _peer("numpy.partition", _partition, needs=4)
    for backend in device.backends:
        yield _rose_select(device, backend)


def _peer(name: str, find: Callable[[Tensor, int], Tensor], needs: float) -> Spec:
    return Spec(
        name, lambda problem: Select(problem, find), None, kind="select", slow=True,
        needs=4 + needs, peak=False,
    )  # fmt: skip


def _partition(risks: Tensor, k: int) -> Tensor:
    return torch.tensor(numpy.partition(risks.numpy(), k - 1)[k - 1])


def _quantile_refuses(problem: Problem) -> str | None:
    try:
        torch.zeros(()).expand(problem.work.elements).quantile(UPPER)
    except RuntimeError as error:
        return f"torch refuses: {error}"
    return None


def _rose_select(device: Device, backend: str) -> Spec:
    return Spec(
        "rose select" + _suffix(device, backend),
        lambda problem: RoseSelect(problem, backend=backend),
        Traffic(grads=1, moments=1),
        kind="select",
        peak=False,
        why_not=lambda problem: _why_not(backend),
    )


# ---------------------------------------------------------------------------------------------- rose

SHARE = 0.4
EXACT, BRACKET, APPROX = ({"selection": how} for how in ("exact", "bracket", "approx"))
CLIP, BF16 = {"max_grad_norm": MAX_NORM}, {"state_dtype": torch.bfloat16}
FIRST, ENSEMBLE = {"order": "first"}, {"order": "ensemble"}
EXACT_STEP = _STEP + Traffic(grads=1, moments=1)  # over g and m for the threshold, once with luck
_FIRST = _STEP + Traffic(grads=1, bits=2)  # over g_kl for the threshold and the mask; the mask again


@dataclass(frozen=True)
class _Entry:
    name: str
    traffic: Traffic | None
    settings: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., Contender] = Rose
    graph: bool = False  # whether it takes part as a graph, too
    needs: float = 1.0
    dtype: torch.dtype | None = None  # of the works that it is for; None: all


_ENTRIES = (
    _Entry("rose exact", EXACT_STEP, EXACT, graph=True),
    _Entry("rose bracket", _STEP, BRACKET, graph=True),
    _Entry("rose approx", _STEP, APPROX),
    _Entry("rose upper=1", _STEP, {"upper": 1}, graph=True),
    _Entry("rose exact, clip", EXACT_STEP + Traffic(grads=1), EXACT | CLIP),
    _Entry("rose bracket, clip", _STEP + Traffic(grads=1), BRACKET | CLIP, graph=True),
    _Entry("rose approx, clip", _STEP + Traffic(grads=1), APPROX | CLIP),
    # Exact: over g_kl twice.
    _Entry("rose first", _FIRST + Traffic(grads=1), EXACT | FIRST),
    _Entry("rose first, bracket", _FIRST, BRACKET | FIRST),
    _Entry("rose ensemble", _FIRST + Traffic(grads=2, moments=1), EXACT | ENSEMBLE),
    _Entry("rose ensemble, bracket", _FIRST, BRACKET | ENSEMBLE, graph=True),
    _Entry("rose tensors, 40%", None, {"share": SHARE}, RoseTensor),
    _Entry("rose exact, bf16 moments", EXACT_STEP, EXACT | BF16, needs=4, dtype=torch.float32),
    _Entry("rose bracket, bf16 moments", _STEP, BRACKET | BF16, needs=4, dtype=torch.float32),
    _Entry("rose approx, bf16 moments", _STEP, APPROX | BF16, needs=4, dtype=torch.float32),
    _Entry(
        "rose bracket, stochastic", _STEP, BRACKET | {"param_rounding": "stochastic"},
        dtype=torch.bfloat16,
    ),
    _Entry("rose exact, flat", EXACT_STEP, EXACT, RoseFlat, needs=18),
    _Entry("rose bracket, flat", _STEP, BRACKET, RoseFlat, needs=18),
    _Entry("rose approx, flat", _STEP, APPROX, RoseFlat, needs=18),
)  # fmt: skip


def _rose(device: Device) -> Iterator[Spec]:
    for entry in _ENTRIES:
        for backend in device.backends:
            yield _rose_spec(entry, device, backend)
        for backend in device.backends if entry.graph and device.name != "cpu" else ():
            yield _rose_spec(entry, device, backend, graph=True)


def _rose_spec(entry: _Entry, device: Device, backend: str, graph: bool = False) -> Spec:
    how = {**entry.settings, "backend": backend} | ({"graph": device.graph} if graph else {})

    def why_not(problem: Problem) -> str | None:
        if entry.dtype not in (None, problem.work.dtype):
            return f"for works in {entry.dtype}".replace("torch.", "")
        return _why_not(backend)

    return Spec(
        entry.name + _suffix(device, backend, graph),
        lambda problem: entry.make(problem, **how),
        entry.traffic,
        needs=entry.needs,
        peak=not graph,
        why_not=why_not,
    )


def _suffix(device: Device, backend: str, graph: bool = False) -> str:
    if len(device.backends) == 1:
        return ", graph" if graph else ""
    return f" [{backend}{', graph' if graph else ''}]"


def _why_not(backend: str) -> str | None:
    return backends.BACKENDS[backend].why_not()


# ------------------------------------------------------------------------------ installed or not


def _float32_only(missing: Callable[[], str | None]) -> Callable[[Problem], str | None]:
    why = "it keeps moments in float32"
    return lambda problem: why if problem.work.dtype != torch.float32 else missing()


def _apex_missing() -> str | None:
    if importlib.util.find_spec("apex") is None:
        return "not installed, see benchmarks/README.md"
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except ImportError as error:
        return f"did not import: {error}"
    return None


_BUILD_TIMEOUT_S = 300
_LOAD_DEEPSPEED = "from deepspeed.ops.op_builder import CPUAdamBuilder as B; B().load(verbose=False)"


@cache
def _deepspeed_missing() -> str | None:
    # Its just-in-time build looks for ninja in PATH. The first load is in a process of its own, since
    # it waits for ever if an earlier build was killed.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed") is None:
        return "not installed, see benchmarks/README.md"
    print("loading DeepSpeed's cpu_adam (a minute or two at first: it compiles)", file=sys.stderr)
    try:
        subprocess.run(
            [sys.executable, "-c", _LOAD_DEEPSPEED],
            capture_output=True,
            text=True,
            check=True,
            timeout=_BUILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return (
            f"did not build in {_BUILD_TIMEOUT_S} s; if that is because an earlier build was killed, "
            "delete the folder cpu_adam where TORCH_EXTENSIONS_DIR points (by default in the user's "
            "cache, under torch_extensions)"
        )
    except subprocess.CalledProcessError as error:
        return f"did not build or load: {(error.stderr.strip().splitlines() or [str(error)])[-1]}"
    return None
