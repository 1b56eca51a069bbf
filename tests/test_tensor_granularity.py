"""``granularity="tensor"``: whole tensors ranked by their norms, against a direct implementation."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits
from torch import Tensor, nn
from training import clones, each_order, give, gradients, masked_step
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, capture_mask

each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def risks(grads: list[Tensor], exp_avgs: list[Tensor] | None, beta1s: list[float]) -> Tensor:
    """Of each tensor, float32; NaN where it is not finite, -1 where there is nothing to rank by."""
    found = []
    for i, g in enumerate(grads):
        norm = g.double().square().sum().sqrt().float()
        if exp_avgs is None:
            found.append(
                torch.tensor(-1.0) if norm == 0 else norm if norm < torch.inf else norm * torch.nan
            )
            continue
        m = exp_avgs[i].double().square().sum().sqrt().float()
        if not (norm.isfinite() and m.isfinite()):
            found.append(torch.tensor(torch.nan))
        elif m == 0:
            found.append(torch.tensor(-1.0))
        else:
            alpha = torch.tensor(1.0 - beta1s[i], dtype=torch.float64).float()
            found.append((alpha * norm / m - 1).abs())
    return torch.stack(found)


def kept(risk: Tensor, upper: float, lower: float) -> Tensor:
    """As the authors' code, with ``torch.quantile``: only for fractions at which it is exact."""
    ranked = risk[risk >= 0]
    if not len(ranked):
        return risk == -1
    for fraction in (upper, lower):
        rank = Fraction(fraction) * (len(ranked) - 1)  # of the number as it is in binary
        assert Fraction(float(torch.tensor(float(rank)))) == rank
    high, low = torch.quantile(ranked, upper), torch.quantile(ranked, lower)
    return ((low <= risk) & (risk <= high)) | (risk == -1)


SHAPES = [(7, 5), (5,), (2, 3, 4), (101,), (), (0, 3), (13,), (4, 4), (1,), (64,)]


def nonzero(params: list[nn.Parameter], generator: torch.Generator) -> list[Tensor]:
    """Gradients without zeros, so that a tensor of one element is not without evidence by chance."""
    return [torch.where(g == 0, 1e-3, g) for g in gradients(params, generator)]


def tensors(generator: torch.Generator) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


@each_backend
@each_order
@pytest.mark.parametrize(
    ("upper", "lower"),
    [(0.5, 0.0), (0.75, 0.25), (1.0, 0.125), ((0.25, 0.875), (0.0, 0.5))],
    ids=["half", "between", "upper-1", "pairs"],
)
def test_against_a_direct_implementation(upper, lower, order, backend, generator):
    """Nine ranked tensors, so that eighths are exact; of every step the masks and the update."""
    lr, weight_decay, eps, gamma = 0.05, 0.1, 1e-6, 0.25
    betas = ((0.9, 0.99), (0.5, 0.9))
    params = tensors(generator)
    optimizer = RoseFusedAdamW(
        [{"params": params[:4], "betas": betas[0]}, {"params": params[4:], "betas": betas[1]}],
        lr=lr, weight_decay=weight_decay, eps=eps, gamma=gamma, order=order, upper=upper, lower=lower,
        granularity="tensor", backend=backend,
    )  # fmt: skip
    beta1s = [betas[i >= 4][0] for i in range(len(params))]
    seen = set()
    for step in range(1, 7):
        kl, grads = nonzero(params, generator), nonzero(params, generator)
        before = [p.detach().double() for p in params]
        zeros = [torch.zeros(p.shape) for p in params]
        ms = [
            optimizer.state[p]["exp_avg"].clone() if step > 1 else z
            for p, z in zip(params, zeros, strict=True)
        ]
        vs = [
            optimizer.state[p]["exp_avg_sq"].clone() if step > 1 else z
            for p, z in zip(params, zeros, strict=True)
        ]
        weights = torch.zeros(len(params), dtype=torch.float64)
        share = {"first": {"first": 1.0}, "second": {"second": 1.0}}.get(
            order, {"first": gamma, "second": 1 - gamma}
        )
        masks = {}
        for kind, weight in share.items():
            risk = risks(kl, None, beta1s) if kind == "first" else risks(grads, ms, beta1s)
            c_h, c_l = (x[kind == "second"] if isinstance(x, tuple) else x for x in (upper, lower))
            masks[kind] = kept(risk, c_h, c_l)
            weights += weight * masks[kind]

        masked_step(optimizer, params, grads, kl)
        for kind, mask in masks.items():
            found = optimizer.selection[kind]
            assert found.ranked + found.inactive == len(params)
            assert found.kept + found.inactive == mask.sum()
        for i, p in enumerate(params):
            M, g, m, v = weights[i], grads[i].double(), ms[i].double(), vs[i].double()
            beta1, beta2 = betas[i >= 4]
            g = M * g + (1 - M) * m
            m_new, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            update = m_new / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
            expected = before[i] - lr * M * (update + weight_decay * before[i])
            torch.testing.assert_close(p.detach(), expected.float())
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v.float())
            if M == 0:
                assert_same_bits(p.detach(), before[i].float(), f"params[{i}]")
                assert_same_bits(optimizer.state[p]["exp_avg"], ms[i], f"exp_avg[{i}]")
            else:
                torch.testing.assert_close(optimizer.state[p]["exp_avg"], m_new.float())
                assert p.numel() == 0 or (p.detach() != before[i]).any()
            seen.add(float(M))
    assert {1.0} < seen <= ({0.0, 0.25, 0.75, 1.0} if order == "ensemble" else {0.0, 1.0})


FRACTIONS = (0.7, 0.1, 0.3, 0.6, 0.9, 0.05, 0.55, 0.123456789, 0.999)


@pytest.mark.thin(2)
@each_backend
@pytest.mark.parametrize("upper", FRACTIONS, ids=str)
def test_ranks_come_from_exact_fractions(upper, backend, generator):
    """0.7 of the way through 91 tensors is tensor 63 (from 0), which floating point misses."""
    for n in [91, *range(1, 60), 101, 201]:
        norms = torch.randperm(n, generator=generator) + 1.0
        grads = [x.reshape(1) for x in norms]
        for lower in (0.0, upper / 2 if upper != 0.123456789 else 0.1):
            lower = round(lower, 9)
            masks, found = capture_mask(
                grads, upper=upper, lower=lower, granularity="tensor", backend=backend
            )
            high, low = (Fraction(str(c)) * (n - 1) for c in (upper, lower))
            # Norms are 1, 2, .. n, so that the quantile at rank r is 1 + r.
            expected = (norms - 1 >= math.ceil(low)) & (norms - 1 <= math.floor(high))
            assert_same_bits(torch.stack(masks), expected, f"n={n}, lower={lower}")
            assert found.kept == expected.sum() == max(math.floor(high) - math.ceil(low) + 1, 0)
            assert found.ranked == n
            torch.testing.assert_close(found.threshold, torch.tensor(float(1 + high)))


def test_seven_tenths_of_91_tensors():
    assert 0.7 * 90 < 63  # so that floating point loses a tensor
    grads = [torch.full((1,), float(x)) for x in range(1, 92)]
    masks, _ = capture_mask(grads, upper=0.7, granularity="tensor")
    assert sum(masks) == 64


@each_backend
@pytest.mark.parametrize("kind", ["first", "second"])
def test_ties_are_all_kept(kind, backend, generator):
    norms = torch.tensor([2.0, 1.0, 2.0, 3.0, 2.0, 4.0, 2.0])
    grads = [x.reshape(1) for x in norms]
    exp_avgs = None
    if kind == "second":  # risk |alpha*g/m - 1|, so that larger norms of m than of g are alike
        exp_avgs = [0.05 * torch.sign(torch.randn(1, generator=generator)) for _ in grads]
    masks, found = capture_mask(
        grads, exp_avgs, upper=0.2, beta1=0.9, granularity="tensor", backend=backend
    )
    # The quantile at rank 1.2 of 1, 2, 2, 2, 2, 3, 4 is 2.
    assert torch.stack(masks).tolist() == [True, True, True, False, True, False, True]
    assert found.kept == 5


@each_backend
@each_order
def test_tensors_that_are_not_finite_are_left_alone(order, backend, generator):
    params = tensors(generator)
    optimizer = RoseFusedAdamW(
        params, order=order, granularity="tensor", lr=0.1, weight_decay=0.1, backend=backend
    )
    masked_step(optimizer, params, gradients(params, generator), gradients(params, generator))
    grads, kl = gradients(params, generator), gradients(params, generator)
    bad = kl if order == "first" else grads
    bad[0][2, 3] = torch.nan
    bad[2][1, 1, 1] = -torch.inf
    bad[3][:] = 3e38  # each is finite, and their norm is not
    before = [p.detach().clone() for p in params]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
    masked_step(optimizer, params, grads, kl)
    found = optimizer.selection[optimizer.settings.kinds[-1]]
    assert found.nonfinite == 3
    assert found.ranked + found.inactive == len(params) - 3
    if order == "ensemble":  # the first-order mask keeps some of them: but M = 0 where not finite
        assert params[0][2, 3] == before[0][2, 3]
        assert params[2][1, 1, 1] == before[2][1, 1, 1]
    else:
        for i in (0, 2, 3):
            assert_same_bits(params[i].detach(), before[i], f"params[{i}]")
            assert_same_bits(optimizer.state[params[i]]["exp_avg"], moments[i], f"exp_avg[{i}]")
    for p in params:
        assert p.isfinite().all()
        assert optimizer.state[p]["exp_avg"].isfinite().all()


@each_backend
def test_tensors_without_history_are_selected_and_not_ranked(backend, generator):
    params = tensors(generator)
    optimizer = RoseFusedAdamW(
        params, granularity="tensor", upper=0.5, weight_decay=0.1, backend=backend
    )
    give(params, nonzero(params, generator))
    optimizer.step()
    # The first step is AdamW, as the authors'.
    assert optimizer.selection["second"].inactive == len(params)
    assert optimizer.selection["second"].threshold.isnan()
    assert optimizer.selection["update"].updated == sum(p.numel() for p in params)

    late = [nn.Parameter(torch.randn(6, generator=generator)) for _ in range(2)]
    optimizer.add_param_group({"params": late})
    before = [p.detach().clone() for p in late]
    give([*params, *late], nonzero([*params, *late], generator))
    optimizer.step()
    found = optimizer.selection["second"]
    assert found.ranked == len(params) - 1  # but for the empty one
    assert found.inactive == 3
    for p, old in zip(late, before, strict=True):
        assert (p != old).all()


@each_backend
@pytest.mark.parametrize(
    ("upper", "tau"),
    [
        (0.5, 1.0),
        (0.8, torch.inf),  # rank 3.2, between 1 and inf
        (0.9, torch.inf),  # rank 3.6, likewise
        (1.0, torch.inf),
    ],
)
def test_inactive_rank_takes_the_formulas_literally(upper, tau, backend):
    """m = 0: risk inf, or 1 if g = 0 as well; first order: 0 where the gradient is 0."""

    def row(*values: float) -> list[Tensor]:
        return [torch.tensor([x, 0.0]) for x in values]

    grads, exp_avgs = row(3.0, 0.0, 5.0, 0.2, 0.0), row(0.0, 0.0, 1.0, 0.1, 1.0)
    literal = torch.tensor([torch.inf, 1.0, 0.5, 0.8, 1.0])  # |0.1*g/m - 1|
    options = {"granularity": "tensor", "inactive": "rank", "backend": backend, "upper": upper}
    masks, found = capture_mask(grads, exp_avgs, **options)
    assert torch.stack(masks).tolist() == (literal <= tau).tolist()
    assert found.threshold == tau
    assert (found.ranked, found.inactive) == (5, 0)

    masks, found = capture_mask(grads, **options)
    norms = torch.tensor([3.0, 0.0, 5.0, 0.2, 0.0])
    assert torch.stack(masks).tolist() == (norms <= torch.quantile(norms, upper)).tolist()
    assert (found.ranked, found.inactive) == (5, 0)


@each_backend
def test_first_order_tensors_without_signal_are_selected(backend):
    grads = [torch.zeros(3), torch.ones(2), torch.zeros(0), 2 * torch.ones(5), 3 * torch.ones(1)]
    masks, found = capture_mask(grads, upper=0.5, granularity="tensor", backend=backend)
    # Norms sqrt(2), 2*sqrt(5) and 3 are ranked, and the one in the middle is the quantile.
    assert torch.stack(masks).tolist() == [True, True, True, False, True]
    assert (found.ranked, found.inactive, found.kept) == (3, 2, 2)
    assert found.threshold == 3


@each_backend
def test_a_mask_is_one_bool_for_each_tensor(backend, generator):
    params = tensors(generator)
    optimizer = RoseFusedAdamW(params, order="first", granularity="tensor", backend=backend)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    masks = [optimizer.state[p]["first_mask"] for p in params]
    assert {(m.dtype, m.shape) for m in masks} == {(torch.bool, torch.Size([]))}


@each_backend
def test_scaled_gradients_have_scaled_norms(backend, generator):
    """Second-order risks of scaled gradients are others, unless the scale is taken out again."""
    params = tensors(generator)
    exp_avgs = [0.1 * g for g in gradients(params, generator)]
    grads = gradients(params, generator)
    options = {"granularity": "tensor", "backend": backend, "upper": 0.4}
    plain, _ = capture_mask(grads, exp_avgs, **options)
    scaled, _ = capture_mask(
        [g * 64 for g in grads], exp_avgs, inv_scale=torch.tensor(1 / 64), **options
    )
    assert_same_bits(torch.stack(scaled), torch.stack(plain))


def test_the_two_backends_agree_over_a_run(generator):
    start = tensors(generator)
    runs = {}
    for backend in ("cpu", "reference"):
        params = clones(start)
        optimizer = RoseFusedAdamW(
            params, order="ensemble", granularity="tensor", weight_decay=0.1, backend=backend
        )
        same = torch.Generator().manual_seed(3)
        for _ in range(20):
            masked_step(optimizer, params, gradients(params, same), gradients(params, same))
        runs[backend] = [optimizer.state[p]["exp_avg"] for p in params]
    for a, b in zip(*runs.values(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("write", ["in place", "data", "storage"])
def test_what_others_write_to_moments_counts(write, max_grad_norm, generator):
    """Also by ways that no version counter sees: as a new optimizer, which remembers nothing."""
    params = tensors(generator)
    options = {"upper": 0.4, "granularity": "tensor", "max_grad_norm": max_grad_norm}
    optimizer = RoseFusedAdamW(params, **options)
    for _ in range(4):
        give(params, nonzero(params, generator))
        optimizer.step()
        for p in params[::2]:
            m = optimizer.state[p]["exp_avg"]
            m = {"in place": m, "data": m.data, "storage": torch.from_numpy(m.numpy())}[write]
            m.mul_(torch.rand((), generator=generator) * 5)
        copies = clones(params)
        again = RoseFusedAdamW(copies, **options)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        grads = nonzero(params, generator)
        for optim, own in ((optimizer, params), (again, copies)):
            give(own, [g.clone() for g in grads])
            optim.step()
        assert_all_same_bits([p.detach() for p in params], [p.detach() for p in copies], write)
