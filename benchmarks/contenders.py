"""Who is compared: torch's, DeepSpeed's and this project's steps, on one :class:`Problem`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks import eager
from benchmarks.work import STEP, Problem, Work
from rose_ops import RoseFusedAdamW

UPPER = 0.6
GAMMA = 0.5
LR = 1e-2  # large, as is the decay: what the parity check could miss is small
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.1
_ADAMW: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


class Clock:
    """Adds up the time spent in its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Contender(ABC):
    """One implementation of a step on a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.elements = problem.work.elements

    def restore(self) -> None:
        """Back to before the step."""
        self.problem.restore()

    @abstractmethod
    def step(self, clock: Clock) -> None:
        """One step; ``clock`` runs during what counts."""


class _Optimizer(Contender):
    def __init__(self, problem: Problem, optimizer: Optimizer, step: torch.Tensor | int) -> None:
        super().__init__(problem)
        self.optimizer = optimizer
        for p, m, v in zip(problem.params, problem.exp_avgs, problem.exp_avg_sqs, strict=True):
            start = step.clone() if isinstance(step, torch.Tensor) else step
            optimizer.state[p] = {"step": start, "exp_avg": m, "exp_avg_sq": v}

    def restore(self) -> None:
        super().restore()
        for state in self.optimizer.state.values():
            if isinstance(state["step"], torch.Tensor):
                state["step"].fill_(STEP)
            else:
                state["step"] = STEP

    def step(self, clock: Clock) -> None:
        with clock:
            self.optimizer.step()


class TorchAdamW(_Optimizer):
    def __init__(self, problem: Problem, **how: bool) -> None:
        optimizer = torch.optim.AdamW(problem.params, **_ADAMW, **how)  # type: ignore[arg-type]
        super().__init__(problem, optimizer, torch.tensor(float(STEP)))


class DeepSpeed(_Optimizer):
    def __init__(self, problem: Problem) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        super().__init__(problem, DeepSpeedCPUAdam(problem.params, **_ADAMW, adamw_mode=True), STEP)


class Rose(_Optimizer):
    """Capture (where the order has a first-order mask) and step."""

    optimizer: RoseFusedAdamW

    def __init__(self, problem: Problem, **settings: Any) -> None:
        optimizer = RoseFusedAdamW(
            problem.params, **_ADAMW, gamma=GAMMA, **{"upper": UPPER, **settings}
        )
        super().__init__(problem, optimizer, torch.tensor(float(STEP)))

    def step(self, clock: Clock) -> None:
        if "first" in self.optimizer.settings.kinds:
            self.problem.use("kl")
            with clock:
                self.optimizer.capture("first", clear=False)
            self.problem.use("ce")
        with clock:
            self.optimizer.step()


class Eager(Contender):
    def step(self, clock: Clock) -> None:
        problem = self.problem
        with clock:
            eager.step_(
                problem.params, problem.grads, problem.exp_avgs, problem.exp_avg_sqs, STEP + 1,
                upper=UPPER, **_ADAMW,
            )  # fmt: skip


class Bandwidth(Contender):
    """What the memory gives: ``a = b`` or ``a = b + s*c``, bytes counted as STREAM does."""

    _LARGEST = 1 << 26

    def __init__(self, problem: Problem, triad: bool) -> None:
        super().__init__(problem)
        self.elements = min(self.elements, self._LARGEST)
        self._a = torch.zeros(self.elements)
        self._b = torch.ones(self.elements)
        self._c = torch.ones(self.elements) if triad else None

    def restore(self) -> None:
        pass

    def step(self, clock: Clock) -> None:
        with clock:
            if self._c is None:
                self._a.copy_(self._b)
            else:
                torch.add(self._b, self._c, alpha=3.0, out=self._a)


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


def _always(_: Work) -> None:
    return None


@dataclass(frozen=True)
class Spec:
    """How a contender is made and judged.

    Attributes:
        bytes_per_element: that the algorithm has to move, in fp32; None: not counted.
        settings: of RoseFusedAdamW; None for others.
        adamw: does what ``torch.optim.AdamW`` does.
        rtol: relative error allowed in the parity check.
        slow: takes part in fewer rounds.
        why_not: why it cannot run on a work, or None.
    """

    name: str
    make: Callable[[Problem], Contender]
    bytes_per_element: float | None
    settings: dict[str, Any] | None = None
    adamw: bool = False
    rtol: float = 1e-5
    slow: bool = False
    why_not: Callable[[Work], str | None] = field(default=_always)


def _rose(name: str, bytes_per_element: float, **settings: Any) -> Spec:
    def why_not(work: Work) -> str | None:
        alone = settings.get("granularity") == "tensor" and len(work.shapes) == 1
        return "one tensor: nothing to rank" if alone else None

    return Spec(
        name,
        lambda problem: Rose(problem, **settings),
        bytes_per_element,
        settings,
        adamw=settings.get("upper") == 1,
        why_not=why_not,
    )


BASELINE = "AdamW fused"
EAGER = "eager ROSE"
_STEP = 28  # AdamW: read p, g, m, v; write p, m, v
_BIT = 1 / 8
SPECS = {
    spec.name: spec
    for spec in (
        Spec("copy", lambda problem: Bandwidth(problem, triad=False), 8),
        Spec("triad", lambda problem: Bandwidth(problem, triad=True), 12),
        Spec(BASELINE, lambda problem: TorchAdamW(problem, fused=True), _STEP, adamw=True),
        Spec("AdamW foreach", lambda problem: TorchAdamW(problem, foreach=True), _STEP, adamw=True),
        Spec(
            "DeepSpeedCPUAdam",
            DeepSpeed,
            _STEP,
            adamw=True,
            rtol=1e-4,  # it subtracts beta2 from 1 in float32: 1.3e-5 off
            why_not=lambda _: _deepspeed_missing(),
        ),
        Spec(EAGER, Eager, None, slow=True),
        # One pass over g and m for the threshold, if its sample settles it.
        _rose("rose exact", 8 + _STEP),
        _rose("rose approx", 8 + _STEP, selection="approx"),
        _rose("rose upper=1", _STEP, upper=1),
        # Over g_kl for the threshold, again for the mask.
        _rose("rose first", 4 + 4 + _BIT + _STEP + _BIT, order="first"),
        _rose("rose ensemble", 4 + 4 + _BIT + 8 + _STEP + _BIT, order="ensemble"),
        _rose("rose tensor", 8 + _STEP, granularity="tensor"),
    )
}
