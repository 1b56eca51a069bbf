"""Who is compared: what a contender is, and torch's, DeepSpeed's and apex's on one :class:`Problem`.

This project's are in ours.py; which there are, and what is known of them, is in specs.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import eager
from benchmarks.device import Call, Clock
from benchmarks.work import STEP, Problem

UPPER = 0.6
GAMMA = 0.5
MAX_NORM = 1.0
LR = 1e-2  # large, as is the decay: what the parity check could miss is small
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.1
ADAMW: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


class Unavailable(Exception):
    """A contender that cannot take part; the message says why."""


@dataclass(frozen=True)
class Traffic:
    """How often a step has to move an element's parameter, gradient, moments (each one counts) and
    mask bits."""

    params: float = 0
    grads: float = 0
    moments: float = 0
    bits: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def bytes(self, dtype: torch.dtype, moments: torch.dtype) -> float:
        """Per element."""
        numbers = (self.params + self.grads) * dtype.itemsize + self.moments * moments.itemsize
        return numbers + self.bits / 8


@dataclass(frozen=True)
class Rule:
    """What a contender should compute, in the terms of Algorithm 1.

    Attributes:
        kinds: the masks that M is made of; none: plain AdamW.
        sampled: the sizes of the tensors that selection="approx" takes its sample of; empty: exact.
        norm: that it clips by; None: as it is in float64.
        exact: bit for bit; else an element whose risk rounds to the threshold may be on either side.
    """

    kinds: tuple[str, ...] = ()
    granularity: str = "element"
    upper: float = UPPER
    sampled: tuple[int, ...] = ()
    max_norm: float | None = None
    norm: float | None = None
    exact: bool = True


class Contender(ABC):
    """One implementation of a step on a problem.

    Attributes:
        rule: None: it is no step.
        params, exp_avgs, exp_avg_sqs: what the step changes, in the shapes of the work.
        writes_grads: whether it changes the gradients, too.
        traffic: where it depends on the numbers; else the specification has it.
    """

    rule: Rule | None = None
    writes_grads = False
    traffic: Traffic | None = None
    is_rose = False

    def __init__(self, problem: Problem, moments: torch.dtype | None = None) -> None:
        self.problem = problem
        self.elements = problem.work.elements
        self.params: Sequence[Tensor] = [p.data for p in problem.params]
        self.exp_avgs, self.exp_avg_sqs = problem.moments(moments or problem.work.dtype, self.is_rose)

    def restore(self) -> None:
        """Back to before the step."""
        fill = self.problem.numbers.fill
        fill("params", self.params)
        fill("exp_avgs", self.exp_avgs)
        fill("exp_avg_sqs", self.exp_avg_sqs)
        if self.writes_grads:
            fill("grads", self.problem.grads)

    @abstractmethod
    def step(self, clock: Clock) -> None:
        """One step; ``clock`` runs during what counts."""

    def kept(self) -> float | None:
        """Share of the elements that the latest step updated, where it says so."""
        return None


class OfOptimizer(Contender):
    """A step of an optimizer."""

    optimizer: Optimizer

    def adopt(self, optimizer: Optimizer, step: Tensor | int) -> None:
        """Let ``optimizer`` continue from the problem's moments."""
        self.optimizer = optimizer
        for p, m, v in zip(self.problem.params, self.exp_avgs, self.exp_avg_sqs, strict=True):
            start = step.clone() if isinstance(step, Tensor) else step
            optimizer.state[p] = {"step": start, "exp_avg": m, "exp_avg_sq": v}

    def restore(self) -> None:
        super().restore()
        for state in self.optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(STEP)
            else:
                state["step"] = STEP

    def step(self, clock: Clock) -> None:
        with clock:
            self.optimizer.step()


def step_tensor(place: torch.device | str) -> Tensor:
    return torch.tensor(float(STEP), device=place)


class TorchAdamW(OfOptimizer):
    """
    Args:
        clip: ``clip_grad_norm_`` before.
        graph: of a device: the step is recorded, which ``capturable=True`` allows, and replayed.

    Attributes:
        norm: that was clipped by.
    """

    rule = Rule()
    norm: Tensor | None = None

    def __init__(
        self, problem: Problem, *, clip: bool = False, graph: Callable[[Call], Call] | None = None,
        **how: bool,
    ) -> None:  # fmt: skip
        super().__init__(problem)
        if clip:
            self.rule, self.writes_grads = Rule(max_norm=MAX_NORM), True
        capturable = graph is not None
        on_device = capturable or how.get("fused", False)
        optimizer = torch.optim.AdamW(problem.params, **ADAMW, **how, capturable=capturable)
        self.adopt(optimizer, step_tensor(problem.place if on_device else "cpu"))
        self._call: Call = self._step
        if graph is not None:
            self.restore()
            self._call = graph(self._step)

    def _step(self) -> None:
        if self.writes_grads:
            self.norm = nn.utils.clip_grad_norm_(self.problem.params, MAX_NORM)
        self.optimizer.step()

    def step(self, clock: Clock) -> None:
        with clock:
            self._call()


class DeepSpeed(OfOptimizer):
    rule = Rule()

    def __init__(self, problem: Problem) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        super().__init__(problem)
        self.adopt(DeepSpeedCPUAdam(problem.params, **ADAMW, adamw_mode=True), STEP)


class Apex(OfOptimizer):
    """Keeps the step in its group, and moments in float32 only."""

    rule = Rule()

    def __init__(self, problem: Problem) -> None:
        from apex.optimizers import FusedAdam

        super().__init__(problem)
        self.adopt(FusedAdam(problem.params, **ADAMW, adam_w_mode=True), STEP)

    def restore(self) -> None:
        super().restore()
        self.optimizer.param_groups[0]["step"] = STEP


class Eager(Contender):
    """ROSE in plain PyTorch, by one of the functions of eager.py, or what torch.compile makes of it."""

    rule: Rule

    def __init__(self, problem: Problem, function: Callable[..., None], rule: Rule) -> None:
        super().__init__(problem)
        self.rule, self._function = rule, function

    def step(self, clock: Clock) -> None:
        with clock:
            self._function(
                self.params, self.problem.grads, self.exp_avgs, self.exp_avg_sqs, STEP + 1,
                upper=self.rule.upper, **ADAMW,
            )  # fmt: skip


class Bandwidth(Contender):
    """What the memory gives: ``a = b`` or ``a = b + s*c``, bytes counted as STREAM does."""

    _LARGEST = 1 << 28  # bytes

    def __init__(self, problem: Problem, triad: bool) -> None:
        super().__init__(problem)
        self.elements = min(self.elements, self._LARGEST // problem.work.dtype.itemsize)
        a, b, c = (problem.once(f"bandwidth {name}", self._ones) for name in "abc")
        self._call: Call = (
            (lambda: torch.add(b, c, alpha=3.0, out=a)) if triad else (lambda: a.copy_(b))
        )

    def _ones(self) -> Tensor:
        return torch.ones(self.elements, dtype=self.problem.work.dtype, device=self.problem.place)

    def restore(self) -> None:
        pass

    def step(self, clock: Clock) -> None:
        with clock:
            self._call()


class Select(Contender):
    """The threshold alone. The peers are given the risks of all ranked elements, in one tensor;
    RoseSelect is not, and computes them on its way.

    Attributes:
        found: tau_h.
    """

    found: Tensor

    def __init__(self, problem: Problem, find: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(problem)
        self.risks = problem.once("risks", lambda: _risks(problem))
        self.elements = len(self.risks)
        k = int(Fraction(str(UPPER)) * self.elements)
        self._call = lambda: find(self.risks, k)

    def restore(self) -> None:
        pass

    def step(self, clock: Clock) -> None:
        with clock:
            self.found = self._call()


def _risks(problem: Problem) -> Tensor:
    out = torch.empty(problem.work.elements, device=problem.place)
    end = 0
    for part in problem.numbers.parts(1 << 22):
        g, m = (
            problem.numbers.part(role, *part, problem.work.dtype).float()
            for role in ("grads", "exp_avgs")
        )
        ranked = eager.second_order_risk(g, m, BETAS[0])[m != 0]
        out[end : end + len(ranked)] = ranked
        end += len(ranked)
    return out[:end]
