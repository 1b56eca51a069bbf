"""Is everyone computing the same thing? Nothing is timed before this says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import eager
from benchmarks.contenders import (
    BETAS,
    EAGER,
    EPS,
    GAMMA,
    LR,
    SPECS,
    UPPER,
    WEIGHT_DECAY,
    Clock,
    Contender,
    Rose,
)
from benchmarks.work import STEP, Problem
from rose_ops import capture_mask
from rose_ops.functional import Selection
from rose_ops.reference import APPROX_BITS, unpack

_SMALLEST = 1e-42  # an error of a few of the smallest denormals is none
_CHUNK = 1 << 15  # in cache, and too small for torch to start threads
_EVERY = 4  # so many chunks: masks are checked whole, values only for who does something else
_SAMPLE = 1 << 20  # elements that the reference, which is slow, is asked about


class ParityError(Exception):
    """Somebody computes something else."""


def _require(condition: bool, who: str, what: str) -> None:
    if not condition:
        raise ParityError(f"{who}: {what}")


class Risks(NamedTuple):
    """What elements are ranked by."""

    grads: list[Tensor]
    kl_grads: list[Tensor]
    exp_avgs: list[Tensor]

    def mask(self, kind: str, granularity: str, selection: str) -> tuple[Tensor, Tensor]:
        """Bool mask of all elements, or of all tensors, and its threshold."""
        by_tensor = granularity == "tensor"
        flatten: Callable[[list[Tensor]], Tensor] = _norms if by_tensor else eager.flatten
        risk = (
            flatten(self.kl_grads).abs()
            if kind == "first"
            else eager.second_order_risk(flatten(self.grads), flatten(self.exp_avgs), BETAS[0])
        )
        if by_tensor:
            tau = torch.quantile(risk.double(), UPPER).float()
        else:
            tau = eager.threshold(risk, UPPER)
        if selection == "approx":  # the last risk with the same leading bits
            tau = (tau.view(torch.int32) | ((1 << APPROX_BITS) - 1)).view(torch.float32)
        return risk <= tau, tau


class Expected:
    """Masks and updated values on a problem, by plain PyTorch."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._risks = Risks(problem.grads, problem.kl_grads, problem.originals[1])
        self._found: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}

    def mask(self, kind: str, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As :meth:`Risks.mask`."""
        key = (kind, settings.get("granularity", "element"), settings.get("selection", "exact"))
        if key not in self._found:
            self._found[key] = self._risks.mask(*key)
        return self._found[key]

    def weights(self, settings: dict[str, Any]) -> Iterator[Tensor]:
        """M of every tensor."""
        if settings.get("upper") == 1:
            yield from (torch.ones(()) for _ in self.problem.params)
            return
        order = settings.get("order", "second")
        kinds = ("first", "second") if order == "ensemble" else (order,)
        shares = (GAMMA, 1 - GAMMA) if order == "ensemble" else (1.0,)
        sizes = [p.numel() for p in self.problem.params]
        masks = [self.mask(kind, settings)[0] for kind in kinds]
        if settings.get("granularity") == "tensor":
            sizes = [1] * len(sizes)
        for parts in zip(*(mask.split(sizes) for mask in masks), strict=True):
            yield sum(part.float() * share for part, share in zip(parts, shares, strict=True))


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """p, m, v after the step (Algorithm 1, lines 8-13), each with the size of what it was added up
    from: rounding errors are relative to that, also where the sum cancels."""
    (beta1, beta2), t = BETAS, STEP + 1
    g = torch.where(weight == 1, g, torch.where(weight == 0, m, weight * g + (1 - weight) * m))
    new_m = torch.where(weight == 0, m, beta1 * m + (1 - beta1) * g)
    size_m = beta1 * m.abs() + (1 - beta1) * g.abs()
    new_v = beta2 * v + (1 - beta2) * g * g
    rate = LR * weight / (1 - beta1**t) / ((new_v / (1 - beta2**t)).sqrt() + EPS)
    new_p = p - rate * new_m - LR * weight * WEIGHT_DECAY * p
    return [(new_p, p.abs() + rate * size_m), (new_m, size_m), (new_v, new_v)]


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).float()


def check(problem: Problem, contenders: dict[str, Contender]) -> None:
    """Raises:
    ParityError: naming who differs, and in what.
    """
    _check_sample(problem)
    expected = Expected(problem)
    bar = tqdm(contenders.items(), leave=False)
    for name, contender in bar:
        bar.set_description_str(f"parity: {name}")
        spec = SPECS[name]
        if spec.settings is None and not spec.adamw and name != EAGER:
            continue  # bandwidth
        contender.restore()
        if isinstance(contender, Rose) and not spec.adamw:
            _check_masks(name, contender, expected)
        contender.step(Clock())
        if isinstance(contender, Rose) and not spec.adamw:
            _check_selection(name, contender, expected)
        settings = {"upper": 1} if spec.adamw else spec.settings or {}
        _check_update(name, problem, expected, settings)
    problem.restore()


def _check_sample(problem: Problem) -> None:
    """The expectation itself, and the kernels, against rose_ops.reference on the first elements."""
    sample = Risks(*map(_first, (problem.grads, problem.kl_grads, problem.exp_avgs)))
    for kind, grads, exp_avgs in (
        ("first", sample.kl_grads, None),
        ("second", sample.grads, sample.exp_avgs),
    ):
        truth, by_reference = capture_mask(grads, exp_avgs, upper=UPPER, backend="reference")
        masks, by_kernel = capture_mask(grads, exp_avgs, upper=UPPER)
        _, tau = sample.mask(kind, "element", "exact")
        for who, found in (("rose_ops", by_kernel.threshold), (EAGER, tau)):
            same = _same_bits(found, by_reference.threshold)
            _require(same, who, f"{kind}-order threshold of a sample is not the reference's")
        same = all(torch.equal(a, b) for a, b in zip(masks, truth, strict=True))
        _require(same, "rose_ops", f"{kind}-order mask of a sample is not the reference's")


def _first(tensors: list[Tensor]) -> list[Tensor]:
    left, taken = _SAMPLE, []
    for t in tensors:
        if left > 0:
            taken.append(t.view(-1)[:left])
            left -= t.numel()
    return taken


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _check_masks(name: str, contender: Rose, expected: Expected) -> None:
    """Captured masks, bit for bit."""
    problem, settings = contender.problem, SPECS[name].settings or {}
    how = {k: v for k, v in settings.items() if k in ("selection", "granularity")}
    for kind in contender.optimizer.settings.kinds:
        grads, exp_avgs = (
            (problem.kl_grads, None) if kind == "first" else (problem.grads, problem.exp_avgs)
        )
        masks, _ = capture_mask(grads, exp_avgs, upper=UPPER, beta1=BETAS[0], **how)
        wanted, _ = expected.mask(kind, settings)
        if "granularity" in how:
            same = torch.equal(torch.stack(masks), wanted)
        else:
            parts = wanted.split([p.numel() for p in problem.params])
            same = all(
                torch.equal(unpack(mask, part.numel()), part)
                for mask, part in zip(masks, parts, strict=True)
            )
        _require(same, name, f"{kind}-order mask differs from the eager one")


def _check_selection(name: str, contender: Rose, expected: Expected) -> None:
    """What the step itself selected by: threshold and count, which together fix its mask."""
    settings = SPECS[name].settings or {}
    for kind in contender.optimizer.settings.kinds:
        found = contender.optimizer.selection[kind]
        assert isinstance(found, Selection)
        mask, tau = expected.mask(kind, settings)
        # Norms of tensors are sums, whose last bit is nobody's promise.
        _require(
            settings.get("granularity") == "tensor" or _same_bits(found.threshold, tau),
            name,
            f"{kind}-order threshold is {found.threshold.item()}, expected {tau.item()}",
        )
        kept = int(mask.sum())
        _require(
            int(found.kept) == kept, name, f"{kind} order keeps {int(found.kept)}, expected {kept}"
        )


def _check_update(name: str, problem: Problem, expected: Expected, settings: dict[str, Any]) -> None:
    """Parameters and moments: unchanged bits where M = 0, the same value to rounding elsewhere."""
    names = ("parameter", "first moment", "second moment")
    rtol = SPECS[name].rtol
    for i, weight in enumerate(expected.weights(settings)):
        new = (problem.params[i].data, problem.exp_avgs[i], problem.exp_avg_sqs[i])
        tensors = (*new, *(moving[i] for moving in problem.originals), problem.grads[i])
        flat = [t.view(-1) for t in tensors]
        chunks = zip(*(t.split(_CHUNK) for t in (*flat, weight.expand_as(flat[0]))), strict=True)
        for chunk in islice(chunks, 0, None, _EVERY):
            after, before, (grad, M) = chunk[:3], chunk[3:6], chunk[6:]
            for what, a, (b, size), old in zip(
                names, after, _update(before[0], grad, before[1], before[2], M), before, strict=True
            ):
                where = f"{what} in tensor {i} (shape {tuple(new[0].shape)})"
                error = float((a - b).abs_().div_(size + _SMALLEST / rtol).max())
                _require(error <= rtol, name, f"{where} is off by a relative {error:.2g}")
                if what != "second moment":
                    changed = a.view(torch.int32) != old.view(torch.int32)
                    _require(not bool((changed & (M == 0)).any()), name, f"{where} moved at M = 0")
