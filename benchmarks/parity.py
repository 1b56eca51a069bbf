"""Is everyone computing the same thing? Nothing is timed before this says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.contenders import (
    BETAS,
    EPS,
    GAMMA,
    LR,
    UPPER,
    WEIGHT_DECAY,
    Contender,
    Rule,
    Select,
    TorchAdamW,
    Unavailable,
)
from benchmarks.device import Clock, Device
from benchmarks.ours import Rose, RoseSelect, tensor_risks
from benchmarks.work import STEP, Problem
from rose_ops import capture_mask, select_threshold
from rose_ops.definitions import APPROX_FEWEST, sampled, unpack
from rose_ops.results import Selection

# An error of a few of the smallest denormals is none.
_SMALLEST = {torch.float32: 1e-42, torch.bfloat16: 1e-40}
# Masks are checked whole, values, which take longer, in every eighth chunk, or in so many at most.
_EVERY, _MOST = 8, 512
_SAMPLE = 1 << 20  # elements that the reference, which is slow, is asked about
# Relative error of what is kept in bfloat16: torch's foreach rounds several intermediate results.
_RTOL_BF16 = 2.0**-6
# torch sums squares in float32: on the CPU that was 0.5% off for 64Mi elements, 9% for 512Mi.
_RTOL_NORM = 0.05
_NEAR = 1e-5  # relative distance of a risk from the threshold at which rounding may decide

_FIRST_DRAW = STEP  # which sample a step takes that goes on from the problem's state

Part = tuple[int, int, int]


class ParityError(Exception):
    """Somebody computes something else."""


def _require(condition: bool, who: str, what: str) -> None:
    if not condition:
        raise ParityError(f"{who}: {what}")


class Expected:
    """Masks and updated values on a problem, by plain PyTorch, a part at a time: nothing of the size
    of the problem is stored."""

    def __init__(self, problem: Problem, device: Device) -> None:
        self.problem, self.chunk = problem, device.chunk
        self._thresholds: dict[tuple[object, ...], Tensor] = {}
        self._kept: dict[tuple[object, ...], int] = {}
        self.checked: set[tuple[object, ...]] = set()  # masks

    def parts(self) -> Iterator[Part]:
        return self.problem.numbers.parts(self.chunk)

    def part(self, role: str, part: Part, dtype: torch.dtype | None = None) -> Tensor:
        return self.problem.numbers.part(role, *part, dtype or self.problem.work.dtype)

    def grad(self, part: Part, rule: Rule) -> Tensor:
        """What the update sees, in float32."""
        g, factor = self.part("grads", part).float(), self.factor(rule)
        return g if factor is None else g * factor

    @cached_property
    def norm(self) -> Tensor:
        """Of all gradients."""
        squares = [self.part("grads", part).double().square().sum() for part in self.parts()]
        return torch.stack(squares).sum().sqrt().float()

    def factor(self, rule: Rule) -> Tensor | None:
        """That clipping multiplies gradients by, as ``clip_grad_norm_`` has it; None: no clipping."""
        if rule.max_norm is None:
            return None
        norm = self.norm if rule.norm is None else torch.tensor(rule.norm)
        return (rule.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def risk(self, kind: str, rule: Rule, moments: torch.dtype, part: Part) -> tuple[Tensor, Tensor]:
        """Eq. 2 or 4, and which elements have none."""
        if kind == "first":
            risk = self.part("kl_grads", part).float().abs()
            return risk, risk == 0
        m = self.part("exp_avgs", part, moments).float()
        return eager.second_order_risk(self.grad(part, rule), m, BETAS[0]), m == 0

    def threshold(self, kind: str, rule: Rule, moments: torch.dtype) -> tuple[Tensor, int]:
        """tau_h and how many risks are at most that.

        Raises:
            ParityError: what the kernels find is not the k-th smallest risk. They are asked, which is
                cheap, and what they say is checked by counting, which needs no memory.
        """
        approx = sum(rule.sampled) >= APPROX_FEWEST
        clip = rule.max_norm if kind == "second" else None
        key = (kind, rule.upper, clip, moments, rule.sampled if approx else ())
        if key not in self._thresholds:
            problem = self.problem
            find = self._of_sample if approx else self._of_kernels
            tau = find(kind, rule, moments)
            counts = torch.zeros(3, dtype=torch.int64, device=problem.place)
            for part in self.parts():
                risk, inactive = self.risk(kind, rule, moments, part)
                risk = torch.where(inactive, torch.inf, risk)
                counts += torch.stack([(risk < tau).sum(), (risk <= tau).sum(), (~inactive).sum()])
            below, kept, ranked = counts.tolist()
            k = int(Fraction(str(rule.upper)) * ranked)
            _require(
                approx or below < k <= kept,
                "rose_ops",
                f"{kind}-order threshold {tau.item()} has {below} risks below it and {kept} up to it; "
                f"expected the {k}-th smallest of {ranked}",
            )
            self._thresholds[key], self._kept[key] = tau, kept
        return self._thresholds[key], self._kept[key]

    def _of_kernels(self, kind: str, rule: Rule, moments: torch.dtype) -> Tensor:
        problem, exp_avgs = self.problem, None
        if kind == "second":
            exp_avgs = problem.moments(moments)[0]
            problem.numbers.fill("exp_avgs", exp_avgs)
        return select_threshold(
            problem.kl_grads if kind == "first" else problem.grads,
            exp_avgs,
            upper=rule.upper,
            beta1=BETAS[0],
            inv_scale=self.factor(rule),
        ).threshold

    def _of_sample(self, kind: str, rule: Rule, moments: torch.dtype) -> Tensor:
        """The quantile of selection="approx", of the sample that a first step takes."""
        places, found, start = sampled(rule.sampled, _FIRST_DRAW), [], 0
        for part in self.parts():
            stop = start + part[2] - part[1]
            first, last = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
            risk, inactive = self.risk(kind, rule, moments, part)
            at = (places[first:last] - start).to(risk.device)
            found.append(risk[at][~inactive[at]])
            start = stop
        ranked = torch.cat(found)
        return ranked.kthvalue(int(Fraction(str(rule.upper)) * len(ranked))).values

    def mask(self, kind: str, rule: Rule, moments: torch.dtype, part: Part) -> tuple[Tensor, Tensor]:
        """Which elements are selected, and of which of them rounding may decide."""
        tau, _ = self.threshold(kind, rule, moments)
        risk, inactive = self.risk(kind, rule, moments, part)
        near = (risk - tau).abs() <= _NEAR * tau
        return (risk <= tau) | inactive, near & ~inactive

    def tensors(self, rule: Rule) -> tuple[Tensor, int]:
        """Which tensors are selected, in second order, and how many of them by their rank."""
        risk, inactive = tensor_risks(self.problem)
        tau = torch.quantile(risk[~inactive].double(), rule.upper).float()
        ranked = (risk <= tau) & ~inactive
        return ranked | inactive, int(ranked.sum())

    def updated(
        self, rule: Rule, moments: torch.dtype, part: Part, tensors: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor | None]:
        """p, m, v after the step (Algorithm 1, lines 8-13), each with the size of what it was added up
        from: rounding errors are relative to that, also where the sum cancels. M, and where it may be
        another."""
        near: Tensor | None = None
        if not rule.kinds:
            weight = torch.ones((), device=self.problem.place)
        elif tensors is not None:
            weight = tensors[part[0]].float()
        else:
            masks = [self.mask(kind, rule, moments, part) for kind in rule.kinds]
            shares = (GAMMA, 1 - GAMMA) if len(masks) == 2 else (1.0,)
            weight = sum(mask.float() * share for (mask, _), share in zip(masks, shares, strict=True))  # type: ignore[assignment]
            if not rule.exact:
                near = masks[-1][1]
        p, m, v = (
            self.part(role, part, dtype).float()
            for role, dtype in (("params", None), ("exp_avgs", moments), ("exp_avg_sqs", moments))
        )
        values = _update(p, self.grad(part, rule), m, v, weight)
        return values, weight.expand_as(p), near


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    (beta1, beta2), t = BETAS, STEP + 1
    g = torch.where(weight == 1, g, torch.where(weight == 0, m, weight * g + (1 - weight) * m))
    new_m = torch.where(weight == 0, m, beta1 * m + (1 - beta1) * g)
    size_m = beta1 * m.abs() + (1 - beta1) * g.abs()
    new_v = beta2 * v + (1 - beta2) * g * g
    rate = LR * weight / (1 - beta1**t) / ((new_v / (1 - beta2**t)).sqrt() + EPS)
    new_p = p - rate * new_m - LR * weight * WEIGHT_DECAY * p
    return [(new_p, p.abs() + rate * size_m), (new_m, size_m), (new_v, new_v)]


# ---------------------------------------------------------------------------------------- contenders


def check_kernels(problem: Problem) -> None:
    """The risks of this module, and the kernels, against rose_ops.reference on the first elements.

    Raises:
        ParityError: naming who differs, and in what.
    """
    grads, kl_grads, exp_avgs = (
        _first(problem.made(role, problem.work.dtype)) for role in ("grads", "kl_grads", "exp_avgs")
    )
    for kind, of, moments in (("first", kl_grads, None), ("second", grads, exp_avgs)):
        on_cpu = [t.cpu() for t in of], moments and [t.cpu() for t in moments]
        truth, by_reference = capture_mask(*on_cpu, upper=UPPER, backend="reference")
        masks, by_kernel = capture_mask(of, moments, upper=UPPER)
        same = _same_bits(by_kernel.threshold.cpu(), by_reference.threshold)
        _require(same, "rose_ops", f"{kind}-order threshold of a sample is not the reference's")
        same = all(torch.equal(a.cpu(), b) for a, b in zip(masks, truth, strict=True))
        _require(same, "rose_ops", f"{kind}-order mask of a sample is not the reference's")
        for i, mask in enumerate(truth):
            g = on_cpu[0][i].float()
            m = None if on_cpu[1] is None else on_cpu[1][i].float()
            risk = g.abs() if m is None else eager.second_order_risk(g, m, BETAS[0])
            expected = (risk <= by_reference.threshold) | ((g if m is None else m) == 0)
            same = torch.equal(unpack(mask, g.numel()), expected)
            _require(same, "the expectation", f"{kind}-order mask of a sample is not the reference's")


def _first(tensors: list[Tensor]) -> list[Tensor]:
    left, taken = _SAMPLE, []
    for t in tensors:
        if left > 0:
            taken.append(t.view(-1)[:left].clone())
            left -= t.numel()
    return taken


def check(name: str, rtol: float, contender: Contender, expected: Expected) -> None:
    """One step of a contender.

    Raises:
        ParityError: naming who differs, and in what.
    """
    rule = contender.rule
    tensors, kept = None, 0
    # Before the step: the kernels are asked about the moments as they were.
    if rule is not None and rule.granularity == "tensor":
        tensors, kept = expected.tensors(rule)
    for kind in rule.kinds if rule is not None and tensors is None else ():
        expected.threshold(kind, rule, contender.exp_avgs[0].dtype)
    contender.restore()
    try:
        if isinstance(contender, (Select, RoseSelect)):
            _check_select(name, contender, expected)
        elif rule is not None:
            rose = contender if isinstance(contender, Rose) and rule.kinds else None
            if rose and tensors is None:
                _check_masks(name, rose, expected)
            contender.step(Clock())
            if rose:
                _check_selection(name, rose, expected, None if tensors is None else kept)
            _check_update(name, rtol, contender, expected, tensors)
    finally:
        contender.restore()


def _check_select(name: str, contender: Select | RoseSelect, expected: Expected) -> None:
    tau, _ = expected.threshold("second", Rule(("second",)), expected.problem.work.dtype)
    contender.step(Clock())
    found = contender.found
    if name == "quantile":  # interpolates between neighbours
        assert isinstance(contender, Select)
        k, n = int((contender.risks <= found).sum()), int((contender.risks <= tau).sum())
        _require(abs(k - n) <= 1, name, f"{k} risks are up to the threshold, expected {n}")
    else:
        _require(_same_bits(found, tau), name, f"threshold {found.item()}, expected {tau.item()}")


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _check_masks(name: str, contender: Rose, expected: Expected) -> None:
    """Captured masks, bit for bit."""
    problem, rule = contender.problem, contender.rule
    assert rule is not None
    if rule.sampled:  # of the list, also where the contender has it in one tensor
        rule = replace(rule, sampled=tuple(problem.work.sizes))
    how = {key: x for key, x in contender.settings.items() if key in ("selection", "backend")}
    moments = contender.exp_avgs[0].dtype
    for kind in rule.kinds:
        clip = rule.max_norm if kind == "second" else None
        call = (kind, rule.upper, clip, moments, *sorted(how.items()))
        if call in expected.checked:  # somebody else's, the same
            continue
        grads, exp_avgs = (
            (problem.kl_grads, None) if kind == "first" else (problem.grads, list(contender.exp_avgs))
        )
        try:
            masks, _ = capture_mask(
                grads,
                exp_avgs,
                upper=rule.upper,
                beta1=BETAS[0],
                inv_scale=expected.factor(rule),
                seed=STEP,
                **how,
            )
        except NotImplementedError:
            continue  # this selection is the optimizer's alone; its step is checked below
        same = torch.ones((), dtype=torch.bool, device=problem.place)
        for part in expected.parts():
            i, start, stop = part
            mask = masks[i][start // 8 : -(-stop // 8)]
            bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
            wanted, _ = expected.mask(kind, rule, moments, part)
            same &= (bits.bool().view(-1)[: stop - start] == wanted).all()
        _require(bool(same), name, f"{kind}-order mask differs from the eager one")
        expected.checked.add(call)


def _check_selection(name: str, contender: Rose, expected: Expected, kept: int | None) -> None:
    """What the step itself selected by: threshold and count, which together fix its mask. Of tensors
    (``kept`` is given) the count: norms are sums, whose last bit is nobody's promise."""
    rule = contender.rule
    assert rule is not None
    for kind in rule.kinds:
        found = contender.optimizer.selection[kind]
        assert isinstance(found, Selection)
        _require(int(found.misses) == 0, name, f"{kind} order's bracket missed its threshold")
        count = kept
        if count is None:
            tau, count = expected.threshold(kind, rule, contender.exp_avgs[0].dtype)
            _require(
                _same_bits(found.threshold, tau),
                name,
                f"{kind}-order threshold is {found.threshold.item()}, expected {tau.item()}",
            )
        _require(
            int(found.kept) == count, name, f"{kind} order keeps {int(found.kept)}, expected {count}"
        )


def _check_update(
    name: str, rtol: float, contender: Contender, expected: Expected, tensors: Tensor | None
) -> None:
    """Parameters and moments: unchanged bits where M = 0, the same value to rounding elsewhere.
    Gradients as they were, unless the contender clips them."""
    rule = contender.rule
    assert rule is not None
    if isinstance(contender, TorchAdamW) and contender.norm is not None:
        rule = replace(rule, norm=contender.norm.item())
        off = abs(rule.norm / expected.norm.item() - 1)
        if off > _RTOL_NORM:  # torch's error, which is no reason to time nobody
            raise Unavailable(f"clip_grad_norm_ finds a norm that is off by {off:.0%}")
    moments = contender.exp_avgs[0].dtype
    columns = {
        "parameter": ("params", contender.params),
        "first moment": ("exp_avgs", contender.exp_avgs),
        "second moment": ("exp_avg_sqs", contender.exp_avg_sqs),
    }
    every = max(_EVERY, sum(1 for _ in expected.parts()) // _MOST)
    for part in islice(expected.parts(), 0, None, every):
        i, start, stop = part
        where = f"in tensor {i} (shape {tuple(contender.params[i].shape)})"
        values, weight, near = expected.updated(rule, moments, part, tensors)
        for (what, (role, now)), (b, size) in zip(columns.items(), values, strict=True):
            after = now[i].view(-1)[start:stop]
            allowed = rtol if after.dtype == torch.float32 else max(rtol, _RTOL_BF16)
            error = (after.float() - b).abs_().div_(size + _SMALLEST[after.dtype] / allowed)
            before = expected.part(role, part, after.dtype)
            changed = (_bits(after) != _bits(before)) & (weight == 0)
            if near is not None:
                error, changed = error.masked_fill(near, 0.0), changed & ~near
            worst = float(error.max())
            _require(worst <= allowed, name, f"{what} {where} is off by a relative {worst:.2g}")
            if what != "second moment":
                _require(not bool(changed.any()), name, f"{what} {where} moved at M = 0")
        if not contender.writes_grads:
            same = torch.equal(
                expected.problem.grads[i].view(-1)[start:stop], expected.part("grads", part)
            )
            _require(same, name, f"the gradient {where} was changed")
