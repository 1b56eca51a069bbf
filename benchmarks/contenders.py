"""Who is compared: torch's, DeepSpeed's, apex's and this project's steps, on one :class:`Problem`.

Which of them there are, and what is known of them, is in specs.py.
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

import rose_ops
from benchmarks import eager
from benchmarks.device import Call, Clock
from benchmarks.work import STEP, Gradient, Problem
from rose_ops import RoseFusedAdamW, memory, select_threshold

UPPER = 0.6
GAMMA = 0.5
MAX_NORM = 1.0
LR = 1e-2  # large, as is the decay: what the parity check could miss is small
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.1
_ADAMW: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


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


class _Optimizer(Contender):
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


def _step_tensor(place: torch.device | str) -> Tensor:
    return torch.tensor(float(STEP), device=place)


class TorchAdamW(_Optimizer):
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
        optimizer = torch.optim.AdamW(problem.params, **_ADAMW, **how, capturable=capturable)
        self.adopt(optimizer, _step_tensor(problem.place if on_device else "cpu"))
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


class DeepSpeed(_Optimizer):
    rule = Rule()

    def __init__(self, problem: Problem) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        super().__init__(problem)
        self.adopt(DeepSpeedCPUAdam(problem.params, **_ADAMW, adamw_mode=True), STEP)


class Apex(_Optimizer):
    """Keeps the step in its group, and moments in float32 only."""

    rule = Rule()

    def __init__(self, problem: Problem) -> None:
        from apex.optimizers import FusedAdam

        super().__init__(problem)
        self.adopt(FusedAdam(problem.params, **_ADAMW, adam_w_mode=True), STEP)

    def restore(self) -> None:
        super().restore()
        self.optimizer.param_groups[0]["step"] = STEP


class Rose(_Optimizer):
    """Capture (where the order has a first-order mask) and step.

    Raises:
        Unavailable: this RoseFusedAdamW does not know a setting.
    """

    optimizer: RoseFusedAdamW
    is_rose = True

    def __init__(
        self, problem: Problem, *, graph: Callable[[Call], Call] | None = None, **settings: Any
    ) -> None:
        low = problem.work.dtype if problem.work.dtype == torch.bfloat16 else None
        settings = {"upper": UPPER, "gamma": GAMMA, "state_dtype": low, **settings}
        super().__init__(problem, settings["state_dtype"])
        self.settings = settings
        optimizer = self._make(problem.params, capturable=graph is not None)
        self.adopt(optimizer, _step_tensor(problem.place))
        self.rule = Rule(
            () if settings["upper"] == 1 else optimizer.settings.kinds,
            optimizer.settings.granularity,
            settings["upper"],
            tuple(p.numel() for p in optimizer.param_groups[0]["params"])
            if optimizer.settings.selection == "approx"
            else (),
            settings.get("max_grad_norm"),
        )
        calls: list[tuple[Gradient, Call]] = [("ce", optimizer.step)]
        if "first" in self.rule.kinds:
            calls.insert(0, ("kl", lambda: optimizer.capture("first", clear=False)))
        if graph is not None:

            def whole() -> None:
                for gradient, call in calls:
                    problem.use(gradient)
                    call()

            self.restore()
            self._calls = [("ce", graph(whole))]
        else:
            self._calls = calls

    def _make(self, params: Any, capturable: bool) -> RoseFusedAdamW:
        try:
            return RoseFusedAdamW(params, **_ADAMW, **self.settings, capturable=capturable)
        except (NotImplementedError, TypeError) as error:
            raise Unavailable(str(error)) from error

    def step(self, clock: Clock) -> None:
        for gradient, call in self._calls:
            self.problem.use(gradient)
            with clock:
                call()

    def kept(self) -> float | None:
        return int(self.optimizer.selection["update"].updated) / self.elements


class RoseTensor(Rose):
    """At the granularity of tensors; see :func:`share_of_tensors`."""

    def __init__(self, problem: Problem, share: float, **settings: Any) -> None:
        upper, kept = share_of_tensors(problem, share)
        super().__init__(problem, granularity="tensor", upper=upper, **settings)
        # Of every tensor, the gradient's norm, and m and v, of which v changes; of those that are kept,
        # the rest. On the CPU, the moment's norm is taken only where the last step changed it:
        # restoring what the others have does not count as a change.
        self.exp_avgs = [m.data for m in self.exp_avgs]
        ranked = kept if problem.place.type == "cpu" else 1
        self.traffic = Traffic(2 * kept, 1 + kept, ranked + 3 + kept)


def share_of_tensors(problem: Problem, share: float) -> tuple[float, float]:
    """The fraction of tensors to keep (``upper``) that keeps nearest to ``share`` of the elements, on
    which the time of a step depends, and what it keeps of them.

    Raises:
        Unavailable: there are not two tensors to rank.
    """
    risk, inactive = tensor_risks(problem)
    if (~inactive).sum() < 2:
        raise Unavailable("one tensor: nothing to rank")
    sizes = torch.tensor(problem.work.sizes) / problem.work.elements
    order = risk.masked_fill(inactive, torch.inf).argsort()[: int((~inactive).sum())]
    shares = sizes[order.cpu()].cumsum(0) + sizes[inactive.cpu()].sum()
    last = min(int((shares - share).abs().argmin()), len(shares) - 2)
    # Half way to the next risk, so that nobody's rounding of norms and quantiles matters.
    return round((last + 0.5) / (len(shares) - 1), 9), float(shares[last])


def tensor_risks(problem: Problem) -> tuple[Tensor, Tensor]:
    """Eq. 4 of whole tensors, by their norms, and which of them have no history."""
    exp_avgs = problem.moments(problem.work.dtype)[0]
    problem.numbers.fill("exp_avgs", exp_avgs)
    g, m = (
        torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).float()
        for tensors in (problem.grads, exp_avgs)
    )
    return eager.second_order_risk(g, m, BETAS[0]), m == 0


class RoseFlat(Rose):
    """With tensors of its own, as views of flat buffers."""

    def __init__(self, problem: Problem, **settings: Any) -> None:
        if not hasattr(rose_ops, "flatten_parameters"):
            raise Unavailable("rose_ops has no flatten_parameters")
        super().__init__(problem, **settings)

    def _make(self, params: Any, capturable: bool) -> RoseFusedAdamW:
        work = self.problem.work
        own = [nn.Parameter(t) for t in self.problem.made("params", work.dtype)]
        self._flat = rose_ops.flatten_parameters(own)
        self.params = [p.data for p in own]
        for flat in self._flat:
            flat.grad = torch.zeros_like(flat)
        self.problem.numbers.fill("grads", [p.grad for p in own])
        return super()._make(self._flat, capturable)

    def adopt(self, optimizer: Optimizer, step: Tensor | int) -> None:
        self.optimizer = optimizer
        (flat,) = optimizer.param_groups[0]["params"]
        state = {key: memory.zeros_like([flat], flat.dtype)[0] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[flat] = {"step": step.clone(), **state}
        self.exp_avgs, self.exp_avg_sqs = (self._parts(t) for t in state.values())

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self.problem.work.sizes)
        return [t.view(shape) for t, shape in zip(parts, self.problem.work.shapes, strict=True)]


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
                upper=self.rule.upper, **_ADAMW,
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


class RoseSelect(Contender):
    found: Tensor
    is_rose = True

    def __init__(self, problem: Problem, **settings: Any) -> None:
        super().__init__(problem)
        self.settings = settings

    def restore(self) -> None:  # earlier steps changed the moments
        self.problem.numbers.fill("exp_avgs", self.exp_avgs)

    def step(self, clock: Clock) -> None:
        with clock:
            self.found = select_threshold(
                self.problem.grads, self.exp_avgs, upper=UPPER, beta1=BETAS[0], **self.settings
            ).threshold


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
