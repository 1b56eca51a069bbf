"""What is kept from step to step is right for the next one: corners that mutants have shown."""

from __future__ import annotations

import pytest
import torch
from seeded import changed, parameters, set_gradients, train
from support import assert_all_same_bits, assert_same_bits
from torch import nn

from rose_ops import RoseFusedAdamW, batch, checks


def test_groups_of_parameters_without_gradients():
    """Rows are those of the groups that parameters with a gradient are in."""
    a, b = parameters((50,), (50,))
    optimizer = RoseFusedAdamW(
        [{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.1}], upper=1.0, weight_decay=0.0
    )
    assert changed(optimizer, [b], 0) == 50


def test_gradients_that_alternate():
    """As many parameters with a gradient as in the step before, but others."""
    params, others = parameters((40,), (40,)), parameters((40,), (40,))
    optimizer = RoseFusedAdamW(params, lr=0.1, upper=1.0)
    apart = [RoseFusedAdamW([p], lr=0.1, upper=1.0) for p in others]
    for step in range(6):
        i = step % 2
        for p, one in ((params[i], optimizer), (others[i], apart[i])):
            set_gradients([p], step)
            one.step()
            one.zero_grad()
    assert_all_same_bits(params, others, "params")


def test_gradients_of_empty_parameters_that_alternate():
    """Nothing but the gradients tells which of them a step is of: they have no place in memory."""
    params = parameters((0,), (0,))
    optimizer = RoseFusedAdamW(params, lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        params[step % 2].grad = torch.zeros(0)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]


def test_another_parameter_in_the_same_place():
    """It has no history, whatever else there is to its memory."""
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1)
    train(optimizer, [p], 3)
    q = nn.Parameter(p.detach())
    optimizer.param_groups[0]["params"][0] = q
    train(optimizer, [q], 2, 3)
    assert optimizer.state[q]["step"] == 2
    assert optimizer.state[p]["step"] == 3


def test_selective_may_change():
    """The groups of what is ranked are those of now: as of a new optimizer."""

    def made(params, *selective):
        betas = ((0.9, 0.99), (0.3, 0.99))
        groups = [
            {"params": [p], "betas": beta, "selective": chosen}
            for p, beta, chosen in zip(params, betas, selective, strict=True)
        ]
        return RoseFusedAdamW(groups, lr=0.1, selection="exact")

    params = parameters((300,), (300,))
    optimizer = made(params, False, True)
    train(optimizer, params, 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    new = made(others, True, False)
    for p, q in zip(params, others, strict=True):
        new.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.param_groups[0]["selective"] = True
    optimizer.param_groups[1]["selective"] = False
    for one, its in ((optimizer, params), (new, others)):
        train(one, its, 2, 3)
    assert_all_same_bits(params, others, "params")


def test_a_size_that_changes():
    """Of what has no gradient: the elements behind it have other places, and so other random bits."""

    def made(p):
        front = nn.Parameter(torch.zeros(64))
        options = {"param_rounding": "stochastic", "upper": 1.0, "seed": 5}
        return front, RoseFusedAdamW([front, p], lr=0.1, **options)

    (p,) = parameters((300,))
    p = nn.Parameter(p.detach().bfloat16())
    front, optimizer = made(p)
    train(optimizer, [p], 3)
    q = nn.Parameter(p.detach().clone())
    other, new = made(q)
    new.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    for x in (front, other):
        x.data = torch.zeros(100)
    for one, its in ((optimizer, p), (new, q)):
        train(one, [its], 1, 3)
    assert_same_bits(p.detach(), q.detach(), "params")


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_lost_a_part(key):
    """It is not made anew: what is there would be lost, too."""
    params = parameters((40,), (40,))
    optimizer = RoseFusedAdamW(params, lr=0.1)
    train(optimizer, params, 2)
    del optimizer.state[params[1]][key]
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"has no {key!r}; expected step, exp_avg, exp_avg_sq"):
        train(optimizer, params, 1, 2)
    assert_all_same_bits([p.detach() for p in params], before, "params")
    assert key not in optimizer.state[params[1]]


def test_a_mark_of_what_splits_a_parameter_after_some_steps(monkeypatch):
    """As seen where one of several processes is this one."""
    params = parameters((40,), (40,))
    optimizer = RoseFusedAdamW(params, lr=0.1)
    train(optimizer, params, 2)
    monkeypatch.setattr(checks, "is_sharded", lambda settings: True)
    params[1].grad = None  # other gradients than in the step before: they are looked at
    train(optimizer, params[:1], 1, 2)
    params[0].tensor_model_parallel = True
    with pytest.raises(RuntimeError, match="this rank's part of one that Megatron's tensor"):
        train(optimizer, params, 1, 3)


def test_fewer_parameters_are_a_part_only_if_others_are_among_them(monkeypatch):
    """As seen where one of several processes is this one."""
    params = parameters((40,), (40,))
    optimizer = RoseFusedAdamW(params, lr=0.1)
    train(optimizer, params, 2)
    monkeypatch.setattr(batch, "is_sharded", lambda settings: True)
    group = optimizer.param_groups[0]["params"]
    del group[1]
    train(optimizer, params[:1], 1, 2)
    group[0] = nn.Parameter(torch.randn(20))
    with pytest.raises(RuntimeError, match="are not those that it was given"):
        train(optimizer, group, 1, 3)


def test_states_in_another_order():
    """What is taken out of the state and put back is still that of its parameter."""
    params, others = parameters((40,), (40,)), parameters((40,), (40,))
    results = []
    for its, moves in ((params, True), (others, False)):
        optimizer = RoseFusedAdamW(its, lr=0.1)
        train(optimizer, its, 3)
        if moves:
            optimizer.state[its[0]] = optimizer.state.pop(its[0])
        train(optimizer, its, 2, 3)
        results.append([p.detach() for p in its])
    assert_all_same_bits(*results, "params")


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.3}, {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.5}, {"maximize": True},
        {"selective": False},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_that_changes_is_that_of_a_new_optimizer(option):
    """Tables are kept from step to step; a new optimizer has kept none."""

    def made(params, **options):
        groups = [{"params": params[:1]}, {"params": params[1:], **options}]
        return RoseFusedAdamW(groups, lr=0.1)

    params = parameters((300,), (300,))
    optimizer = made(params)
    train(optimizer, params, 3)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    new = made(others, **option)
    for p, q in zip(params, others, strict=True):
        new.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.param_groups[1].update(option)
    for one, its in ((optimizer, params), (new, others)):
        train(one, its, 1, 3)
    assert_all_same_bits(params, others, "params")


@pytest.mark.parametrize("selection", ["exact", "bracket"])
@pytest.mark.parametrize("order", ["second", "first"])
def test_scattered_parameters_behind_plain_ones(order, selection):
    """Only what is ranked goes to a selection: which of that is not contiguous counts anew."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain, conv, last = parameters((40,), (6, 5, 3, 3), (4, 3, 2, 2))
        for p in (conv, last):
            p.data = p.data.contiguous(memory_format=memory_format)
        groups = [{"params": [plain], "selective": False}, {"params": [conv, last]}]
        optimizer = RoseFusedAdamW(groups, lr=0.1, order=order, selection=selection)
        for step in range(4):
            if order == "first":
                set_gradients([plain, conv, last], 100 + step)
                optimizer.capture("first")
            train(optimizer, [plain, conv, last], 1, step)
        results.append([p.detach().contiguous() for p in (plain, conv, last)])
    assert_all_same_bits(*results, "params")
