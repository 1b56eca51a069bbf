"""``first_order_every``: a first-order mask that is used in several steps."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import (
    assert_same_training,
    clones,
    each_granularity,
    give,
    gradients,
    masked_step,
    parameters,
)
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, rose_accumulate, rose_backward

STEPS = 9
each_first = pytest.mark.parametrize("order", ["first", "ensemble"])


def step(optimizer: RoseFusedAdamW, params: list[nn.Parameter], grads: Any, kl_grads: Any) -> bool:
    """With a mask if one is needed.

    Returns:
        Whether it was.
    """
    if needed := optimizer.needs_first_mask:
        give(params, kl_grads)
        optimizer.capture("first")
    give(params, grads)
    optimizer.step()
    return needed


@each_first
@each_granularity
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_a_mask_of_several_steps(order, granularity, every, warm_up, generator):
    """It is one that is made again from the gradient that it was made from at first, as the
    risk is that gradient's size."""
    params = parameters(generator)
    others = clones(params)
    options = {"order": order, "granularity": granularity, "selection_warmup_steps": warm_up}
    optimizer = RoseFusedAdamW(params, lr=0.1, first_order_every=every, **options)
    other = RoseFusedAdamW(others, lr=0.1, **options)
    needed = []
    latest = None
    for number in range(STEPS):
        grads, kl_grads = gradients(params, generator), gradients(params, generator)
        if number < warm_up or (number - warm_up) % every == 0:
            latest = kl_grads
        needed.append(step(optimizer, params, grads, kl_grads))
        masked_step(other, others, grads, latest)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, msg=f"step {number}")
    of_window = [(number - warm_up) % every == 0 for number in range(warm_up, STEPS)]
    assert needed == [False] * warm_up + of_window


@each_first
def test_resumed_at_any_step(order, generator):
    """The mask is in the state dict, and how often it was used follows from the number of steps."""
    params = parameters(generator)
    options: dict[str, Any] = {"order": order, "first_order_every": 4, "selection_warmup_steps": 1}
    optimizer = RoseFusedAdamW(params, lr=0.1, **options)
    all_grads = [(gradients(params, generator), gradients(params, generator)) for _ in range(STEPS)]
    saved = []
    for grads in all_grads:
        file = io.BytesIO()
        torch.save([params, optimizer.state_dict()], file)
        saved.append(file)
        step(optimizer, params, *grads)
    has_mask = []
    for number, file in enumerate(saved):
        file.seek(0)
        others, state = torch.load(file, weights_only=True)
        has_mask.append("first_mask" in state["state"].get(0, {}))
        resumed = RoseFusedAdamW(others, lr=0.1, **options)
        resumed.load_state_dict(state)
        for grads in all_grads[number:]:
            step(resumed, others, *grads)
        assert_same_training(optimizer, params, resumed, others, f"from step {number}")
    assert has_mask == [number >= 1 and (number - 1) % 4 != 0 for number in range(STEPS)]


def test_copies_go_on(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    step(optimizer, params, gradients(params, generator), gradients(params, generator))
    others, copied = copy.deepcopy((params, optimizer))
    assert not copied.needs_first_mask
    grads = gradients(params, generator)
    step(optimizer, params, grads, None)
    step(copied, others, grads, None)
    assert_same_training(optimizer, params, copied, others)


def test_a_mask_that_was_lost_is_made_anew(generator):
    """As by a checkpoint that has moments alone."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    step(optimizer, params, gradients(params, generator), gradients(params, generator))
    assert not optimizer.needs_first_mask
    state_dict = optimizer.state_dict()
    state_dict["state"] = {
        i: {key: value for key, value in state.items() if key != "first_mask"}
        for i, state in state_dict["state"].items()
    }
    optimizer.load_state_dict(state_dict)
    assert optimizer.needs_first_mask
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()
    needed = [
        step(optimizer, params, gradients(params, generator), gradients(params, generator))
        for _ in range(5)
    ]
    assert needed == [True, False, True, False, False]  # the next one when it is due anyway


def test_a_mask_is_not_used_longer(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    for _ in range(3):
        step(optimizer, params, gradients(params, generator), gradients(params, generator))
    assert all("first_mask" not in state for state in optimizer.state.values())
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()


@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_masks_of_ones_own(keep, limit):
    """Those that are given need no second pass, as long as they are there; one that is limited by them
    is a mask like others."""
    model = Counting()
    weight = model.layers[0].weight
    optimizer = RoseFusedAdamW(model.parameters(), order="first", lr=0.1, first_order_every=2)
    passes = []
    for number in range(5):
        if number == 1:
            optimizer.set_masks({weight: torch.zeros_like(weight) > 0}, "first", keep=keep, limit=limit)
        before, model.passes = weight.clone(), 0
        rose_backward(model, *batch(number), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        passes.append(model.passes)
        assert torch.equal(weight, before) == (number == 1 or (keep and number > 1)), number
    assert passes == ([2, 2, 2, 1, 2] if limit else [2, 1, 1, 1, 1] if keep else [2, 1, 2, 1, 2])


def test_two_captures_before_a_step(generator):
    """As in every order: the second one replaces the first."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    step(optimizer, params, gradients(params, generator), gradients(params, generator))
    for _ in range(2):
        step(optimizer, params, gradients(params, generator), None)
    for _ in range(2):
        assert optimizer.needs_first_mask
        give(params, gradients(params, generator))
        optimizer.capture("first")


def test_a_second_order_mask_is_used_once(generator):
    """It is of the gradient that updates."""
    params = parameters(generator)
    others = clones(params)
    optimizer = RoseFusedAdamW(params, order="ensemble", lr=0.1, first_order_every=3)
    other = RoseFusedAdamW(others, order="ensemble", lr=0.1)
    kl_grads = gradients(params, generator)
    for number in range(3):
        grads, of_second = gradients(params, generator), gradients(params, generator)
        for own, one in ((params, optimizer), (others, other)):
            if one is other or number == 0:
                give(own, kl_grads)
                one.capture("first")
            if number == 0:
                give(own, of_second)
                one.capture("second")
            give(own, grads)
            one.step()
        assert all(map(torch.equal, params, others)), number


def test_a_capture_in_between_counts_from_then_on(generator):
    params = parameters(generator)
    others = clones(params)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    other = RoseFusedAdamW(others, order="first")
    first, second = gradients(params, generator), gradients(params, generator)
    for kl_grads, of_step in ((first, first), (second, second), (None, second)):
        grads = gradients(params, generator)
        if kl_grads is not None:
            give(params, kl_grads)
            optimizer.capture("first")
        give(params, grads)
        optimizer.step()
        masked_step(other, others, grads, of_step)
        assert all(map(torch.equal, params, others))
    assert optimizer.needs_first_mask


def test_a_step_that_a_scaler_leaves_out(generator):
    """The first of a mask's steps has overflowed, so that its mask may be of what overflowed, too; a
    later one takes nothing away."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def scaled(overflows: bool) -> bool:
        if needed := optimizer.needs_first_mask:
            give(params, gradients(params, generator))
            optimizer.capture("first")
        give(params, gradients(params, generator))
        if overflows:
            params[0].grad.fill_(float("inf"))
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        return needed

    assert [scaled(overflows) for overflows in (True, False, True, False, False, False)] == [
        True, True, False, False, False, True,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ training loops


class Counting(nn.Module):
    """A classifier that counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layers(x)


def batch(number: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 4, generator=generator)
    return x, torch.randint(3, (rows,), generator=generator)


@each_first
@pytest.mark.parametrize("r_drop", [0.0, 0.5])
@pytest.mark.parametrize("way", ["rose_backward", "rose_accumulate"])
def test_no_second_pass_where_one_does(order, r_drop, way):
    """R-Drop takes two in every step, and keeps the mask likewise."""
    model = Counting()
    optimizer = RoseFusedAdamW(model.parameters(), order=order, lr=0.1, first_order_every=3)
    weight = model.layers[0].weight
    passes, masks, kls = [], [], []
    for number in range(7):
        model.passes = 0
        if way == "rose_backward":
            losses = rose_backward(model, *batch(number), optimizer, r_drop=r_drop)
        else:
            micro = [batch(2 * number), batch(2 * number + 1)]
            losses = rose_accumulate(model, micro, optimizer, r_drop=r_drop)
        masks.append(optimizer.state[weight]["first_mask"].clone())
        kls.append(losses.kl)
        optimizer.step()
        optimizer.zero_grad()
        passes.append(model.passes // (1 if way == "rose_backward" else 2))
    assert passes == ([2, 1, 1, 2, 1, 1, 2] if r_drop == 0 else [2] * 7)
    assert [kl is None for kl in kls] == [count == 1 for count in passes]
    same = [torch.equal(one, other) for one, other in itertools.pairwise(masks)]
    assert same == [True, True, False, True, True, False]


@each_first
@pytest.mark.parametrize("way", ["rose_backward", "rose_accumulate"])
@pytest.mark.parametrize(
    "options", [{"selection_warmup_steps": 2}, {"upper": 1.0}, {"selective": False}], ids=str
)
def test_one_pass_where_nothing_is_selected(order, way, options):
    """As AdamW takes in the same loop, and the same parameters come of it."""
    model = Counting()
    other = copy.deepcopy(model)
    group = {"params": model.parameters(), "selective": options.get("selective", True)}
    settings = {name: x for name, x in options.items() if name != "selective"}
    optimizer = RoseFusedAdamW([group], order=order, lr=0.1, **settings)
    adamw = torch.optim.AdamW(other.parameters(), lr=0.1)
    for number in range(2):
        for one, its in ((model, optimizer), (other, adamw)):
            torch.manual_seed(number)
            if way == "rose_backward":
                assert rose_backward(one, *batch(number), its).kl is None
            else:
                assert rose_accumulate(one, [batch(number), batch(9)], its).kl is None
            its.step()
            its.zero_grad()
    assert model.passes == other.passes == (2 if way == "rose_backward" else 4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.needs_first_mask == ("selection_warmup_steps" in options)


@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_r_drop_takes_one_backward_where_nothing_is_selected(order):
    model = Counting()
    backwards = []
    model.layers[0].weight.register_hook(backwards.append)
    optimizer = RoseFusedAdamW(model.parameters(), order=order, lr=0.1, selection_warmup_steps=1)
    for expected in (1, 2 if order == "second" else 3):
        backwards.clear()
        rose_backward(model, *batch(0), optimizer, r_drop=0.5)
        assert len(backwards) == expected
        optimizer.step()
        optimizer.zero_grad()


def test_a_mask_that_somebody_cleared_is_needed_again(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=4)
    step(optimizer, params, gradients(params, generator), gradients(params, generator))
    assert not optimizer.needs_first_mask
    optimizer.state.clear()
    assert step(optimizer, params, gradients(params, generator), gradients(params, generator))


@pytest.mark.parametrize("captures", [False, True])
def test_steps_of_a_state_that_somebody_else_filled(captures, generator):
    """As ``ZeroRedundancyOptimizer`` does, which does not call ``load_state_dict``."""
    params = parameters(generator)
    options = {"order": "first" if captures else "second", "selection_warmup_steps": 2, "lr": 0.1}
    optimizer = RoseFusedAdamW(params, **options)
    for _ in range(3):
        step(optimizer, params, gradients(params, generator), gradients(params, generator))
    others = clones(params)
    other = RoseFusedAdamW(others, **options)
    for p, q in zip(params, others, strict=True):
        other.state[q] = copy.deepcopy(optimizer.state[p])
    grads, kl_grads = gradients(params, generator), gradients(params, generator)
    assert step(optimizer, params, grads, kl_grads) == captures
    assert step(other, others, grads, kl_grads) == captures
    assert_same_training(optimizer, params, other, others)


def test_micro_batches_one_at_a_time_are_refused_in_every_step():
    """Not in those alone that capture."""
    model = Counting()
    optimizer = RoseFusedAdamW(model.parameters(), order="first", first_order_every=3)
    rose_backward(model, *batch(0), optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=r"have a \.grad already"):
        rose_backward(model, *batch(1), optimizer)


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "2"], ids=repr)
def test_bad_values(value):
    with pytest.raises(ValueError, match=r"^first_order_every=.*; expected an integer >= 1$"):
        RoseFusedAdamW([nn.Parameter(torch.ones(2))], order="first", first_order_every=value)


def test_second_order_has_no_such_mask():
    with pytest.raises(ValueError, match=r"^first_order_every=2 \(int\) with order='second', which"):
        RoseFusedAdamW([nn.Parameter(torch.ones(2))], first_order_every=2)
    optimizer = RoseFusedAdamW([nn.Parameter(torch.ones(2))], first_order_every=1)
    assert not optimizer.needs_first_mask


def test_another_number_in_a_checkpoint_is_said(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", first_order_every=3)
    step(optimizer, params, gradients(params, generator), gradients(params, generator))
    other = RoseFusedAdamW(clones(params), order="first")
    with pytest.warns(UserWarning, match=r"first_order_every=1 \(the checkpoint has 3\)"):
        other.load_state_dict(optimizer.state_dict())
    older = optimizer.state_dict()
    del older["rose"]["settings"]["first_order_every"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(older)
