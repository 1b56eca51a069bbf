"""Masks of one's own: ``set_masks()``, alone and as a limit to a ranking."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits
from torch import Tensor
from training import (
    Snapshot,
    assert_same_training,
    clones,
    each_granularity,
    each_order,
    give,
    gradients,
    masked_step,
    parameters,
    train,
)
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, reference
from rose_ops.layout import packed

LR, BETAS, EPS, DECAY = 0.05, (0.9, 0.98), 1e-8, 0.1
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "upper": 0.5}


def drawn(params, generator) -> dict[Tensor, Tensor]:
    return {p: torch.rand(p.shape, generator=generator) < 0.4 for p in params}


def values(optimizer, p) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter and its moments."""
    moments = (optimizer.state.get(p, {}).get(key) for key in ("exp_avg", "exp_avg_sq"))
    zero = torch.zeros_like(p.detach())
    return (p.detach().clone(), *(zero if m is None else m.clone() for m in moments))


def by_hand(p, g, m, v, mask, step) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, lines 8-13, with weights ``mask`` of each element, in float64."""
    p, g, m, v, mask = (x.double() for x in (p, g, m, v, mask))
    mixed = mask * g + (1 - mask) * m
    m = BETAS[0] * m + (1 - BETAS[0]) * mixed
    v = BETAS[1] * v + (1 - BETAS[1]) * mixed**2
    mhat, vhat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
    return p - LR * mask * (mhat / (vhat.sqrt() + EPS) + DECAY * p), m, v


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1001])
def test_bits_are_packed_as_operators_read_them(n, generator):
    mask = torch.rand(n, generator=generator) < 0.5
    assert_same_bits(packed(mask), reference.pack(mask), str(n))


@each_granularity
def test_a_given_mask_says_what_is_updated(granularity, generator):
    params = parameters(generator)
    params.append(torch.nn.Parameter(torch.randn(6, 4, generator=generator).t()))  # other memory order
    optimizer = RoseFusedAdamW(params, granularity=granularity, **OPTIONS)
    for step in range(1, 4):
        masks, grads = drawn(params, generator), gradients(params, generator)
        before = [values(optimizer, p) for p in params]
        optimizer.set_masks(masks)
        give(params, grads)
        optimizer.step()
        for p, g, (old, m, v) in zip(params, grads, before, strict=True):
            mask, found = masks[p], values(optimizer, p)
            for mine, expected in zip(found, by_hand(old, g, m, v, mask, step), strict=True):
                torch.testing.assert_close(mine, expected.float(), rtol=1e-5, atol=1e-7)
            assert_same_bits(found[0][~mask], old[~mask], "left alone")
            assert_same_bits(found[1][~mask], m[~mask], "first moment")


def test_the_ensemble_weighs_given_masks(generator):
    """One kind given, the other captured; and both given."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="ensemble", gamma=0.3, **OPTIONS)
    first, second = drawn(params, generator), drawn(params, generator)
    optimizer.set_masks(first, "first")
    optimizer.set_masks(second, "second")
    old, grads = [p.detach().clone() for p in params], gradients(params, generator)
    give(params, grads)
    optimizer.step()
    for p, q, g in zip(params, old, grads, strict=True):
        weight = 0.3 * first[p].double() + 0.7 * second[p].double()
        expected, *_ = by_hand(q, g, torch.zeros_like(q), torch.zeros_like(q), weight, 1)
        torch.testing.assert_close(p.detach(), expected.float(), rtol=1e-5, atol=1e-7)
    optimizer.set_masks(second, "second")
    give(params, grads)
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()


def test_a_mask_is_for_one_step_or_until_it_is_taken_away(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    nothing = {p: torch.zeros_like(p, dtype=torch.bool) for p in params}

    def moved() -> bool:
        before = [p.detach().clone() for p in params]
        train(optimizer, params, 1, generator)
        return any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))

    optimizer.set_masks(nothing)
    assert [moved(), moved()] == [False, True]
    optimizer.set_masks(nothing, keep=True)
    assert [moved(), moved(), moved()] == [False, False, False]
    optimizer.clear_masks("second")
    assert moved()
    optimizer.set_masks(nothing, keep=True)
    optimizer.clear_masks()
    assert moved()


@pytest.mark.parametrize("limit", [False, True])
def test_masks_are_copies_and_replace_each_other(limit, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    mask = {p: torch.zeros_like(p, dtype=torch.bool) for p in params}
    optimizer.set_masks({p: ~m for p, m in mask.items()}, keep=True)
    optimizer.set_masks(mask, keep=True, limit=limit)
    for one in mask.values():
        one.fill_(True)
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 2, generator)
    assert_all_same_bits([p.detach() for p in params], before, "left alone")


def test_parameters_without_a_mask_are_updated_and_those_without_upper_too(generator):
    """With upper=1, nothing would be ranked; a given mask counts all the same."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **{**OPTIONS, "upper": 1.0})
    optimizer.set_masks({params[0]: torch.tensor(False)})
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, generator)
    assert torch.equal(params[0], before[0])
    assert all(not torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True) if p.numel())


@each_order
def test_a_limit_ranks_what_is_in_it_and_leaves_the_rest(order, generator):
    """As an optimizer does that has nothing but the elements in the mask."""
    params = parameters(generator)
    masks = drawn(params, generator)
    inside = [torch.nn.Parameter(p.detach()[masks[p]]) for p in params]
    outside = [p.detach()[~masks[p]].clone() for p in params]
    one = RoseFusedAdamW(params, order=order, **OPTIONS)
    other = RoseFusedAdamW(inside, order=order, **OPTIONS)
    for kind in one.settings.kinds:
        one.set_masks(masks, kind, keep=True, limit=True)
    for _ in range(4):
        grads, of_kl = gradients(params, generator), gradients(params, generator)
        masked_step(one, params, grads, of_kl)
        part = [[g[masks[p]] for p, g in zip(params, some, strict=True)] for some in (grads, of_kl)]
        masked_step(other, inside, *part)
        found = [p.detach()[masks[p]] for p in params]
        assert_all_same_bits(found, [p.detach() for p in inside], "inside")
        assert_all_same_bits([p.detach()[~masks[p]] for p in params], outside, "outside")
        for kind in one.settings.kinds:
            assert one.selection[kind].ranked == other.selection[kind].ranked
            assert one.selection[kind].kept == other.selection[kind].kept


def test_a_limit_of_whole_tensors(generator):
    params = parameters(generator)
    masks = {p: torch.tensor(i % 2 == 0) for i, p in enumerate(params)}
    inside = clones(params[::2])
    options = {**OPTIONS, "granularity": "tensor", "max_grad_norm": 1e9}
    one, other = RoseFusedAdamW(params, **options), RoseFusedAdamW(inside, **options)
    before = [p.detach().clone() for p in params[1::2]]
    one.set_masks(masks, keep=True, limit=True)
    for _ in range(4):
        grads = gradients(params, generator)
        masked_step(one, params, grads, grads)
        masked_step(other, inside, grads[::2], grads[::2])
    assert_all_same_bits([p.detach() for p in params[::2]], [p.detach() for p in inside], "inside")
    assert_all_same_bits([p.detach() for p in params[1::2]], before, "outside")


@pytest.mark.parametrize("limit", [False, True])
def test_masks_travel_in_the_state_dict(limit, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks(drawn(params, generator), keep=True, limit=limit)
    train(optimizer, params, 2, generator)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = clones(params)
    other = RoseFusedAdamW(others, **OPTIONS)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.state_dict()["rose"]["format"] == 2  # which an older rose_ops refuses
    third, its_params = copy.deepcopy((optimizer, params))
    for one, of_one in ((optimizer, params), (other, others), (third, its_params)):
        train(one, of_one, 2, torch.Generator().manual_seed(1))
    assert_same_training(optimizer, params, other, others)
    assert_same_training(optimizer, params, third, its_params)


def test_masks_stay_when_a_state_without_any_is_loaded(generator):
    params = parameters(generator)
    adamw = torch.optim.AdamW(params, lr=LR)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks({p: torch.tensor(False) for p in params}, keep=True)
    optimizer.load_state_dict(adamw.state_dict())
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, generator)
    assert_all_same_bits([p.detach() for p in params], before, "left alone")


def test_a_capture_of_what_was_given_is_refused(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", **OPTIONS)
    optimizer.set_masks(drawn(params, generator), "first")
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match=r"set_masks\(\) has given.*clear_masks\('first'\)"):
        optimizer.capture("first")


REFUSED = {
    "no mapping": (lambda p, q: [p], {}, TypeError, "masks is a list; expected a mapping"),
    "empty": (lambda p, q: {}, {}, ValueError, "masks is empty.*clear_masks"),
    "another parameter": (
        lambda p, q: {torch.zeros(3): torch.ones(3) > 0}, {}, ValueError,
        r"a key \(of shape \(3,\)\) that is no parameter of this optimizer",
    ),
    "a name": (lambda p, q: {"weight": torch.tensor(True)}, {}, ValueError, r"a key \(a str\)"),
    "float": (
        lambda p, q: {p: torch.ones_like(p)}, {}, TypeError,
        "parameter 0 of group 0 .* is torch.float32; expected a bool tensor",
    ),
    "no tensor": (lambda p, q: {p: True}, {}, TypeError, "is bool; expected a bool tensor"),
    "shape": (
        lambda p, q: {p: torch.ones(2, 2) > 0}, {}, ValueError,
        r"has shape \(2, 2\); expected the parameter's, or a 0-dim tensor",
    ),
    "device": (
        lambda p, q: {p: torch.ones_like(p, device="meta") > 0}, {}, ValueError,
        "is on meta; expected cpu",
    ),
    "a plain group": (
        lambda p, q: {q: torch.tensor(True)}, {}, ValueError, "its group has selective=False",
    ),
    "a kind that the order lacks": (
        lambda p, q: {p: torch.tensor(True)}, {"kind": "first"}, ValueError,
        r"set_masks\('first'\): order='second' has no such mask; expected 'second'",
    ),
    "parts of tensors": (
        lambda p, q: {p: torch.ones_like(p) > 0}, {"limit": True}, NotImplementedError,
        "takes whole tensors only; expected a 0-dim bool tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_cannot_be_used_are_refused(case, generator):
    masks, options, error, message = REFUSED[case]
    params = parameters(generator)
    p, q = params[0], params[-1]
    groups = [{"params": params[:-1]}, {"params": [q], "selective": False}]
    optimizer = RoseFusedAdamW(groups, granularity="tensor", **OPTIONS)
    optimizer.set_masks({p: torch.tensor(False)}, keep=True)
    train(optimizer, params, 1, generator)
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.set_masks(masks(p, q), **options)
    snapshot.assert_unchanged()
    before = p.detach().clone()
    train(optimizer, params, 1, generator)
    assert_same_bits(p.detach(), before, "the earlier mask still counts")


def test_a_state_dict_with_masks_that_do_not_fit_is_refused(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks({params[0]: torch.tensor(True)}, keep=True)
    train(optimizer, params, 1, generator)
    saved = copy.deepcopy(optimizer.state_dict())
    snapshot = Snapshot(optimizer, params)
    saved["rose"]["masks"]["second"]["masks"] = {0: torch.ones(1, 1, 1, dtype=torch.bool)}
    with pytest.raises(
        ValueError, match=r"masks that set_masks\(\) would not take.*nothing was loaded"
    ):
        optimizer.load_state_dict(saved)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_a_step_that_overflowed_uses_up_no_masks(keep, amp_scaling, generator):
    """Whoever leaves it out: GradScaler, or the optimizer."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS, amp_scaling=amp_scaling)
    masks = drawn(params, generator)
    optimizer.set_masks(masks, keep=keep)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    selected = []
    for factor in (torch.inf, 1.0, 1.0):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        grads = gradients(params, generator)
        scaler.scale(sum((p * g * factor).sum() for p, g in zip(params, grads, strict=True))).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [p.detach() != q for p, q in zip(params, before, strict=True)]
        # By chance, an update may be smaller than what is between two numbers.
        selected.append([(x != masks[p]).sum() <= 1 for p, x in zip(params, moved, strict=True)])
        assert any(x.any() for x in moved) == (factor == 1.0)
    assert all(selected[1])
    assert all(selected[2]) == keep  # without, AdamW moves the rest, too


def test_masks_of_what_is_no_longer_selective(generator):
    """They wait: a state dict has them, and the optimizer itself can load it."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks({p: torch.zeros_like(p, dtype=torch.bool) for p in params}, keep=True)
    optimizer.param_groups[0]["selective"] = False
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, generator)
    assert all((p != q).all() for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["selective"] = True
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, generator)
    assert_all_same_bits([p.detach() for p in params], before, "left alone")


def test_masks_of_a_parameter_that_is_no_longer_there(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks(drawn(params, generator), keep=True)
    optimizer.param_groups[0]["params"].pop()
    masks = optimizer.state_dict()["rose"]["masks"]["second"]["masks"]
    assert [*masks] == [*range(len(params) - 1)]


def test_a_step_of_no_gradients_uses_up_no_masks(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    optimizer.set_masks({p: torch.zeros_like(p, dtype=torch.bool) for p in params})
    optimizer.step()
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 1, generator)
    assert_all_same_bits([p.detach() for p in params], before, "left alone")
    train(optimizer, params, 1, generator)
    assert any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
