"""Masks are packed in the order of their parameters in memory, which may change between a mask and the
step that uses it, or be another one where it is loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support import assert_all_same_bits
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW

LAST = torch.channels_last


def model(generator: torch.Generator) -> nn.Module:
    found = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 5, 2), nn.Conv2d(5, 4, 1))
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return found


def give(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.empty_like(p).copy_(grad)


def gradients(params: list[nn.Parameter], generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(p.shape, generator=generator) for p in params]


def in_bytes(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def carried(way: str, net: nn.Module, optimizer: RoseFusedAdamW) -> tuple[nn.Module, RoseFusedAdamW]:
    """A model of another order in memory, and the optimizer that goes on with it."""
    last = net[0].weight.is_contiguous(memory_format=LAST)
    order = torch.contiguous_format if last else LAST
    if way == "moved":
        net.to(memory_format=order)
        return net, optimizer
    if way == "copied":
        return copy.deepcopy([net.to(memory_format=order), optimizer])
    if way == "pickled":
        return pickle.loads(pickle.dumps([net.to(memory_format=order), optimizer]))
    if way == "moved, then saved":
        net.to(memory_format=order)
        saved = in_bytes(optimizer.state_dict())
    else:
        saved = in_bytes(optimizer.state_dict())
    other = copy.deepcopy(net).to(memory_format=order)
    options = {"order": optimizer.settings.order, "upper": 0.5}
    loaded = RoseFusedAdamW(
        other.parameters(), lr=0.1, first_order_every=optimizer.settings.first_order_every, **options
    )
    loaded.load_state_dict(saved)
    return other, loaded


each_way = pytest.mark.parametrize("way", ["moved", "copied", "pickled", "saved", "moved, then saved"])
each_start = pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])


@each_start
@each_way
@pytest.mark.parametrize("every", [1, 4], ids=["once", "kept"])
def test_a_captured_mask(way, last, every, generator):
    """It selects the same elements; ``every`` 4: also in the steps after that."""
    net = model(generator)
    if last:
        net.to(memory_format=LAST)
    still = copy.deepcopy(net)
    optimizers = [
        RoseFusedAdamW(x.parameters(), lr=0.1, order="first", upper=0.5, first_order_every=every)
        for x in (net, still)
    ]
    nets = [net, still]
    for number in range(every):
        grads = [gradients([*still.parameters()], generator) for _ in range(2)]
        for i in range(2):
            params = [*nets[i].parameters()]
            if number == 0:
                give(params, grads[0])
                optimizers[i].capture("first")
            if i == 0:  # in every step: back, too
                nets[0], optimizers[0] = carried(way, nets[0], optimizers[0])
                params = [*nets[0].parameters()]
            give(params, grads[1])
            optimizers[i].step()
        assert nets[0][0].weight.stride() != nets[1][0].weight.stride() or number % 2
        assert_all_same_bits(
            [p.detach().contiguous() for p in nets[0].parameters()],
            [p.detach().contiguous() for p in nets[1].parameters()],
            f"step {number}",
        )


@each_start
@each_way
def test_masks_of_ones_own(way, last, generator):
    net = model(generator)
    if last:
        net.to(memory_format=LAST)
    optimizer = RoseFusedAdamW(net.parameters(), lr=0.1, upper=0.5)
    masks = {p: torch.rand(p.shape, generator=generator) < 0.4 for p in net.parameters()}
    optimizer.set_masks(masks, keep=True)
    for _ in range(3):
        net, optimizer = carried(way, net, optimizer)
        params = [*net.parameters()]
        before = [p.detach().clone() for p in params]
        give(params, gradients(params, generator))
        optimizer.step()
        moved = [p.detach() != old for p, old in zip(params, before, strict=True)]
        for found, expected in zip(moved, masks.values(), strict=True):
            assert not (found & ~expected).any()
            # By chance, an update may be smaller than what is between two numbers.
            assert (found != expected).sum() <= 1


def test_hooks_may_name_the_states(generator):
    """As those do that save states by the parameters' names."""
    net = model(generator).to(memory_format=LAST)
    names = [name for name, _ in net.named_parameters()]

    def rename(_: object, state_dict: dict) -> dict:
        return {**state_dict, "state": {names[i]: x for i, x in state_dict["state"].items()}}

    optimizer = RoseFusedAdamW(net.parameters(), order="first", upper=0.5)
    give([*net.parameters()], gradients([*net.parameters()], generator))
    optimizer.capture("first")
    numbered = optimizer.state_dict()["state"]
    optimizer.register_state_dict_post_hook(rename)
    for i, (name, p) in enumerate(net.named_parameters()):
        mask = optimizer.state_dict()["state"][name]["first_mask"]
        assert torch.equal(mask, numbered[i]["first_mask"])
        assert (mask.dtype == torch.bool) == (not p.is_contiguous())


@each_start
def test_a_whole_tensor_is_one_in_any_order(last, generator):
    net = model(generator)
    if last:
        net.to(memory_format=LAST)
    optimizer = RoseFusedAdamW(net.parameters(), lr=0.1, order="first", upper=0.5, granularity="tensor")
    params = [*net.parameters()]
    give(params, gradients(params, generator))
    optimizer.capture("first")
    kept = [bool(optimizer.state[p]["first_mask"]) for p in params]
    net.to(memory_format=torch.contiguous_format if last else LAST)
    before = [p.detach().clone() for p in params]
    give(params, gradients(params, generator))
    optimizer.step()
    assert [not torch.equal(p, q) for p, q in zip(params, before, strict=True)] == kept


@pytest.mark.parametrize("before", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("after", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adamw_makes_of_masks_is_left_out(before, after, dtype, generator):
    """Whatever dtype and order in memory its parameters had."""
    net = model(generator).to(memory_format=before)
    optimizer = RoseFusedAdamW(net.parameters(), order="first", first_order_every=4)
    for _ in range(2):
        give([*net.parameters()], gradients([*net.parameters()], generator))
        optimizer.capture("first")
    theirs = copy.deepcopy(net).to(dtype)
    adamw = torch.optim.AdamW(theirs.parameters())
    adamw.load_state_dict(in_bytes(optimizer.state_dict()))
    other = copy.deepcopy(net).to(memory_format=after)
    back = RoseFusedAdamW(other.parameters(), order="first", first_order_every=4)
    back.load_state_dict(in_bytes(adamw.state_dict()))
    assert back.needs_first_mask
    assert not any("first_mask" in state for state in back.state.values())


@each_start
def test_without_memory(last, generator):
    net = model(generator).to("meta", memory_format=LAST if last else torch.contiguous_format)
    optimizer = RoseFusedAdamW(net.parameters(), order="first", backend="reference")
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    optimizer.capture("first")
    saved = optimizer.state_dict()
    RoseFusedAdamW(net.parameters(), order="first", backend="reference").load_state_dict(saved)
