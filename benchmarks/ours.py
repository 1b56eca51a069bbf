"""This project's steps and selections, as contenders on one :class:`Problem`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import rose_ops
from benchmarks import eager
from benchmarks.contenders import (
    ADAMW,
    BETAS,
    GAMMA,
    UPPER,
    Contender,
    OfOptimizer,
    Rule,
    Traffic,
    Unavailable,
    step_tensor,
)
from benchmarks.device import Call, Clock
from benchmarks.work import Gradient, Problem
from rose_ops import RoseFusedAdamW, memory, select_threshold


class Rose(OfOptimizer):
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
        self.adopt(optimizer, step_tensor(problem.place))
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
            return RoseFusedAdamW(params, **ADAMW, **self.settings, capturable=capturable)
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
