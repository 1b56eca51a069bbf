"""max_grad_norm: as ``clip_grad_norm_`` and then the step. And stochastic rounding of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from support import BF16, FLOAT, HALF, assert_all_same_bits
from torch import Tensor, nn
from training import clones

from rose_ops import RoseFusedAdamW
from rose_ops.settings import ORDERS

SHAPES = ((64, 33), (33,), (5, 7, 3, 3), (1,), (0,), (3000,))


def parameters(generator, dtype=FLOAT) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(generator, dtype=FLOAT) -> list[Tensor]:
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def step_gradients(generator, order: str) -> list[list[Tensor]]:
    """For the first-order mask, where there is one, and to update with."""
    return [gradients(generator) for _ in range(1 + ("first" in ORDERS[order]))]


def train(optimizer: RoseFusedAdamW, params, steps, max_norm: float | None = None) -> list[float]:
    """With ``max_norm``, gradients are clipped by PyTorch before each step; returns the norms."""
    norms = []
    for passes in steps:
        for kind, grads in zip(["first", None][-len(passes) :], passes, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            if kind is not None:
                optimizer.capture(kind)
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(params, max_norm).item())
        optimizer.step()
        if max_norm is None:
            norms.append(optimizer.grad_norm.item())
    return norms


def state_of(optimizer, params) -> list[Tensor]:
    return [optimizer.state[p][key] for p in params for key in ("step", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("granularity", ["element", "tensor"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [1.0, 1e4, math.inf], ids=["clips", "does-not", "inf"])
def test_as_clipping_before_the_step(generator, order, granularity, max_norm):
    """The same bits where nothing is clipped; else alike up to the rounding of the norm (float64 sums
    here, float32 there): each term of a moment by the norms' relative difference and three roundings.
    The terms of a first moment may cancel, so its error is relative to them."""
    params = parameters(generator)
    other = clones(params)
    steps = [step_gradients(generator, order) for _ in range(4)]
    options = {"order": order, "granularity": granularity, "weight_decay": 0.1}
    optimizer = RoseFusedAdamW(params, max_grad_norm=max_norm, **options)
    expected = RoseFusedAdamW(other, **options)
    norms = train(optimizer, params, steps)
    theirs = train(expected, other, steps, max_norm)
    assert norms == pytest.approx(theirs, rel=1e-6)
    assert isinstance(optimizer.grad_norm, Tensor)
    assert optimizer.grad_norm.shape == ()
    ours, of_peer = state_of(optimizer, params), state_of(expected, other)
    if max(theirs) <= max_norm:
        assert_all_same_bits(ours, of_peer, "state")
        assert_all_same_bits(params, other, "params")
        return
    error = max(abs(a - b) / b for a, b in zip(norms, theirs, strict=True)) + 3 * 2.0**-24
    largest = max(
        g.abs().max().item() * max_norm / norm
        for passes, norm in zip(steps, theirs, strict=True)
        for g in passes[-1]
        if g.numel() > 0
    )
    terms = len(steps) * (1 - 0.9) * largest  # at most, of a first moment
    for a, b in zip(ours, of_peer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=error * terms)
    torch.testing.assert_close(params, other)


@pytest.mark.parametrize("granularity", ["element", "tensor"])
@pytest.mark.parametrize("order", ORDERS)
def test_as_the_reference(generator, order, granularity):
    params = parameters(generator)
    other = clones(params)
    steps = [step_gradients(generator, order) for _ in range(4)]
    options = {"order": order, "granularity": granularity, "max_grad_norm": 3.0}
    optimizer = RoseFusedAdamW(params, **options)
    reference = RoseFusedAdamW(other, backend="reference", **options)
    assert train(optimizer, params, steps) == train(reference, other, steps)
    assert_all_same_bits(state_of(optimizer, params), state_of(reference, other), "state")


def test_gradients_are_not_written(generator):
    params, grads = parameters(generator), gradients(generator)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    RoseFusedAdamW(params, max_grad_norm=0.1).step()
    assert_all_same_bits([p.grad for p in params], grads, "grads")


def test_unscaled_first(generator):
    """A loss scale changes neither the norm nor the step."""
    found = []
    start, grads = parameters(generator), gradients(generator)
    for scale in (1.0, 2.0**10):
        params = clones(start)
        optimizer = RoseFusedAdamW(params, max_grad_norm=1.0)
        for _ in range(3):
            for p, g in zip(params, grads, strict=True):
                p.grad = g * scale
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        found.append((optimizer.grad_norm.item(), [p.detach() for p in params]))
    assert found[0][0] == found[1][0]
    assert_all_same_bits(found[0][1], found[1][1], "params")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("order", ORDERS)
def test_a_norm_that_is_not_finite_selects_nothing(generator, order, value):
    """Selective parameters and all moments of theirs' first order stay; everything is counted."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order, max_grad_norm=1.0)
    train(optimizer, params, [step_gradients(generator, order) for _ in range(2)])
    before = [p.detach().clone() for p in params]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
    bad = gradients(generator)
    bad[0][3, 4] = value
    (norm,) = train(optimizer, params, [[*step_gradients(generator, order)[:-1], bad]])
    assert not math.isfinite(norm)
    assert_all_same_bits([p.detach() for p in params], before, "params")
    assert_all_same_bits([optimizer.state[p]["exp_avg"] for p in params], moments, "exp_avg")
    counts = optimizer.selection["update"]
    assert counts.updated == 0
    assert counts.nonfinite == sum(p.numel() for p in params)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_if_nonfinite(generator, value):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, max_grad_norm=1.0, error_if_nonfinite=True)
    train(optimizer, params, [[gradients(generator)]])
    before = [p.detach().clone() for p in params] + [t.clone() for t in state_of(optimizer, params)]
    bad = gradients(generator)
    bad[2].view(-1)[7] = value
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0; nothing was changed"):
        train(optimizer, params, [[bad]])
    after = [p.detach() for p in params] + state_of(optimizer, params)
    assert_all_same_bits(after, before, "params and state")
    train(optimizer, params, [[gradients(generator)]])


def test_plain_groups_are_clipped_as_by_pytorch(generator):
    """Also where the norm is infinite: a factor of 0 there."""
    params = parameters(generator)
    other = clones(params)
    optimizer = RoseFusedAdamW(
        [{"params": params, "selective": False}], max_grad_norm=1.0, weight_decay=0.1
    )
    expected = torch.optim.AdamW(other, weight_decay=0.1)
    for value in (1.0, math.inf):
        grads = gradients(generator)
        grads[5][0] = value
        for a, b, g in zip(params, other, grads, strict=True):
            a.grad, b.grad = g.clone(), g.clone()
        nn.utils.clip_grad_norm_(other, 1.0)
        expected.step()
        optimizer.step()
    torch.testing.assert_close(params, other, equal_nan=True)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1", True])
def test_refuses(value):
    with pytest.raises(ValueError, match="max_grad_norm="):
        RoseFusedAdamW([nn.Parameter(torch.ones(2))], max_grad_norm=value)


# --------------------------------------------------------------------------- rounding of parameters


@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT], ids=str)
def test_stochastic_rounding_as_the_reference(generator, dtype, state_dtype):
    params = parameters(generator, dtype)
    other = clones(params)
    steps = [[gradients(generator, dtype)] for _ in range(4)]
    options = {"param_rounding": "stochastic", "state_dtype": state_dtype, "seed": 7, "lr": 1e-2}
    optimizer = RoseFusedAdamW(params, max_grad_norm=1e9, **options)
    reference = RoseFusedAdamW(other, max_grad_norm=1e9, backend="reference", **options)
    train(optimizer, params, steps)
    train(reference, other, steps)
    assert_all_same_bits(state_of(optimizer, params), state_of(reference, other), "state")
    torch.testing.assert_close(params, other)
    if dtype == BF16:  # promised to a few roundings before the last: few come out differently
        flat, expected = (torch.cat([p.detach().view(-1) for p in ps]) for ps in (params, other))
        assert (flat != expected).float().mean() < 0.01


def test_small_updates_add_up_on_average():
    """Each a tenth of what rounding to nearest would notice; the spread is that of coin tosses."""
    n, steps, lr = 4096, 100, 2.0**-8 / 10  # half a unit in the last place below 1 is 2^-9 ... 2^-8
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.full((n,), 1.5, dtype=BF16))
        optimizer = RoseFusedAdamW([p], lr=lr / 10, upper=1, weight_decay=0, param_rounding=rounding)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = (1.5 - p.detach().double()).mean().item()
    assert moved["nearest"] == 0
    expected = lr / 10 * steps  # Adam's steps are lr where gradients do not change
    # One element's sum has a variance of at most steps * ulp^2 / 4, ulp = 2^-7; five standard errors.
    assert abs(moved["stochastic"] - expected) < 5 * 2.0**-7 / 2 * math.sqrt(steps / n)


def test_stochastic_rounding_resumes_bit_for_bit(generator):
    params = parameters(generator, BF16)
    options = {"param_rounding": "stochastic", "state_dtype": BF16, "seed": 3}
    steps = [[gradients(generator, BF16)] for _ in range(6)]
    optimizer = RoseFusedAdamW(params, max_grad_norm=1.0, **options)
    train(optimizer, params, steps[:3])
    resumed = clones(params)
    other = RoseFusedAdamW(resumed, max_grad_norm=1.0, **options)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, params, steps[3:])
    train(other, resumed, steps[3:])
    assert_all_same_bits([p.detach() for p in params], [p.detach() for p in resumed], "params")


def test_refuses_other_roundings():
    with pytest.raises(
        ValueError, match=r"param_rounding='up' \(str\); expected one of 'nearest', 'stochastic'"
    ):
        RoseFusedAdamW([nn.Parameter(torch.ones(2))], param_rounding="up")
