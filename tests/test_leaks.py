"""A mask is of one loss, and of all gradients: what would put others into it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits
from torch import Tensor, nn
from training import assert_same_training, clones, each_order, give, gradients, parameters, train
from training import one_thread as one_thread
from training import process_group as process_group

from rose_ops import RoseFusedAdamW, flatten_parameters


def model_of(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))


def mask_of(optimizer: RoseFusedAdamW) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["first_mask"].clone() for p in params]


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(5, 6, generator=generator)


# -------------------------------------------------------------------------- leftovers of another loss


def test_capturing_is_capture(x):
    """And the gradient is gone afterwards, as with capture()."""
    masks = []
    for by_hand in (True, False):
        model = model_of()
        optimizer = RoseFusedAdamW(model.parameters(), order="first")
        if by_hand:
            model(x).square().sum().backward()
            optimizer.capture("first")
        else:
            with optimizer.capturing("first"):
                model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        masks.append(mask_of(optimizer))
    assert_all_same_bits(*masks, "masks")


@pytest.mark.parametrize("flat", [False, True])
def test_capturing_refuses_leftovers_or_sets_them_aside(x, flat):
    model, clean = model_of(), model_of()
    optimizers = [
        RoseFusedAdamW(flatten_parameters(m.parameters()) if flat else m.parameters(), order="first")
        for m in (model, clean)
    ]
    optimizer, other = optimizers
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with (
        pytest.raises(RuntimeError, match=r"4 of 4 parameters have a gradient already \(zeros count\)"),
        optimizer.capturing("first"),
    ):
        raise AssertionError("the backward of the KL must not run")
    assert_all_same_bits([p.grad for p in model.parameters()], before, "gradients")
    assert not optimizer.state
    with optimizer.capturing("first", set_aside=True):
        model(x).square().sum().backward()
    with other.capturing("first"):
        clean(x).square().sum().backward()
    assert_all_same_bits(mask_of(optimizer), mask_of(other), "masks")
    assert_all_same_bits([p.grad for p in model.parameters()], before, "gradients")
    # The step then uses what was there.
    clean(x).sum().backward()
    for one in optimizers:
        one.step()
    assert_all_same_bits([*model.parameters()], [*clean.parameters()], "parameters")


def test_an_error_inside_leaves_everything_as_it_was(x):
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    model(x).sum().backward()
    before = [p.grad for p in model.parameters()]

    def fail() -> None:
        with optimizer.capturing("first", set_aside=True):
            model(x).square().sum().backward()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    with pytest.raises(ValueError, match="has no such mask"):
        optimizer.capturing("second")


@pytest.mark.parametrize("forgotten", ["zero_grad", "micro-batches", "no backward"])
@pytest.mark.parametrize("kind", ["first", "second"])
def test_gradients_of_the_latest_step_are_noticed(forgotten, kind, x):
    """A loop that clears gradients after the capture instead of before the KL's backward."""
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="ensemble")
    for kl in (model(x).square().sum(),):
        kl.backward()
        optimizer.capture("first")
    model(x).sum().backward()
    optimizer.step()
    for _ in range({"zero_grad": 1, "micro-batches": 3, "no backward": 0}[forgotten]):
        model(x).square().sum().backward()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        RuntimeError, match=r"4 gradients were there at the latest step already.*zero_g"
    ):
        optimizer.capture(kind)
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_were_cleared_are_not_held_against_anyone(set_to_none, x):
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    masks = []
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.capture("first", clear=False)
        optimizer.zero_grad(set_to_none)
        masks.append(mask_of(optimizer))
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    assert len(masks) == 3


def test_a_model_s_zero_grad_clears_too(x):
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.capture("first")
        model(x).sum().backward()
        optimizer.step()
        model.zero_grad()


@pytest.mark.usefixtures("process_group")
def test_views_of_a_bucket_are_put_back(x):
    """Every backward of DistributedDataParallel writes to them again."""
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(3):
        ddp(x).sum().backward()
        before = [p.grad.clone() for p in model.parameters()]
        with optimizer.capturing("first", set_aside=True):
            ddp(x).square().sum().backward()
        assert_all_same_bits([p.grad for p in model.parameters()], before, "gradients")
        optimizer.step()


@pytest.mark.usefixtures("process_group")
def test_a_capture_in_the_forward_of_ddp(x):
    """What is made there is not averaged."""
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    inner = model.forward

    def forward(x: Tensor) -> Tensor:
        with optimizer.capturing("first"):
            inner(x).square().sum().backward()
        return inner(x)

    model.forward = forward
    ddp = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="inside the forward of DistributedDataParallel"):
        ddp(x)
    assert not optimizer.state


# -------------------------------------------------------------------------- inside a backward


class Step(torch.autograd.Function):
    """Calls a function in the middle of a backward."""

    @staticmethod
    def forward(ctx, x: Tensor, call) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.enable_grad():
            ctx.call()
        return grad, None


@each_order
def test_inside_a_backward_of_something_else(order, x):
    """As a learned optimizer's outer loop does."""
    models = model_of(), model_of()
    optimizers = [RoseFusedAdamW(m.parameters(), order=order) for m in models]

    def one_step(i: int) -> None:
        if order != "second":
            models[i](x).square().sum().backward()
            optimizers[i].capture("first")
        models[i](x).sum().backward()
        optimizers[i].step()
        optimizers[i].zero_grad()

    one_step(0)
    Step.apply(torch.ones(2, requires_grad=True), lambda: one_step(1)).sum().backward()
    assert_same_training(
        optimizers[0], [*models[0].parameters()], optimizers[1], [*models[1].parameters()]
    )


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"upper": 1}, False),
        ({"selection_warmup_steps": 1}, False),
        ({"local_ranking": True}, False),
        ({"local_ranking": True, "max_grad_norm": 1.0}, False),
        ({}, True),
        ({"upper": 1, "max_grad_norm": 1.0}, True),
        ({"selection_warmup_steps": 1, "max_grad_norm": 1.0}, True),
        ({"granularity": "tensor"}, True),
    ],
    ids=str,
)
def test_an_optimizer_for_each_parameter_in_a_hook(options, refused, x):
    """What a step needs decides, not where it is called."""
    model, expected = model_of(), model_of()
    of_each = {p: RoseFusedAdamW([p], **options) for p in model.parameters()}
    for p, optimizer in of_each.items():
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step() and None)
    if refused:
        with pytest.raises(RuntimeError, match=r"inside a backward pass.*needs all gradients"):
            model(x).sum().backward()
        assert_all_same_bits([*model.parameters()], [*expected.parameters()], "parameters")
        return
    model(x).sum().backward()
    expected(x).sum().backward()
    for p in expected.parameters():
        RoseFusedAdamW([p], **options).step()
    assert_all_same_bits([*model.parameters()], [*expected.parameters()], "parameters")


# -------------------------------------------------------------------------- what is forgotten


def test_clearing_the_state_begins_anew(generator):
    """Moments, the warm-up, and a captured mask."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", selection_warmup_steps=2)
    train_adamw = [gradients(params, generator) for _ in range(2)]
    for grads in train_adamw:
        give(params, grads)
        optimizer.step()
    train(optimizer, params, 2, generator)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    optimizer.state.clear()
    others = clones(params)
    new = RoseFusedAdamW(others, order="first", selection_warmup_steps=2)
    for grads in train_adamw:
        for one, own in ((optimizer, params), (new, others)):
            give(own, grads)
            one.step()  # without a mask, as in any warm-up
    assert_same_training(optimizer, params, new, others)
    give(params, train_adamw[0])
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()


@pytest.mark.parametrize("fails", [1, 2], ids=["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_first_step_that_fails_half_way(fails, error, generator, monkeypatch):
    """State is there whole or not at all, and the next step is the first."""
    from rose_ops import memory

    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    calls = []
    original = memory.zeros_like

    def failing(*args):
        calls.append(args)
        if len(calls) == fails:
            raise error
        return original(*args)

    grads = gradients(params, generator)
    give(params, grads)
    monkeypatch.setattr(memory, "zeros_like", failing)
    with pytest.raises(error):
        optimizer.step()
    assert not any(optimizer.state.values())
    monkeypatch.undo()
    optimizer.step()
    assert all(optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"} for p in params)
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def test_a_state_that_lacks_something_is_said(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    del optimizer.state[params[2]]["exp_avg"]
    give(params, gradients(params, generator))
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=r"state of the parameter of shape \(2, 3, 4\).*no 'exp_avg'"
    ):
        optimizer.step()
    assert_all_same_bits([p.detach() for p in params], before, "parameters")
    optimizer.state[params[2]].clear()
    optimizer.step()
    assert_same_bits(optimizer.state[params[2]]["step"], torch.tensor(1.0))
