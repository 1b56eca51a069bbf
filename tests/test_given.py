"""What the optimizer is given: parameters of every kind, other defaults of PyTorch, others' numbers."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from support import assert_all_same_bits
from torch import Tensor, nn
from training import (
    Snapshot,
    assert_same_training,
    clones,
    each_order,
    give,
    gradients,
    parameters,
    train,
)
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW
from rose_ops.settings import fraction_units

# ------------------------------------------------------------------------------------- frozen, lazy

FROZEN = {
    "uint8": lambda: torch.zeros(3, dtype=torch.uint8),
    "int8": lambda: torch.zeros(3, dtype=torch.int8),
    "bool": lambda: torch.zeros(3, dtype=torch.bool),
    "float64": lambda: torch.zeros(3, dtype=torch.float64),
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "complex64": lambda: torch.zeros(3, dtype=torch.complex64),
    "meta": lambda: torch.zeros(3, device="meta"),
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "expanded": lambda: torch.zeros(1).expand(3),
    "another subclass": lambda: Two(torch.zeros(3)),
}


class Two(Tensor):
    """A tensor subclass that computes itself, as quantized ones do."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise AssertionError(f"{func} is called")


@each_order
@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_may_be_anything(name, order, generator):
    """It never gets a gradient, so nothing about it is used."""
    frozen = nn.Parameter(FROZEN[name](), requires_grad=False)
    params, others = parameters(generator), None
    others = clones(params)
    optimizer = RoseFusedAdamW([*params[:2], frozen, *params[2:]], order=order)
    alone = RoseFusedAdamW(others, order=order)
    state = generator.get_state()
    train(optimizer, params, 3, generator)
    generator.set_state(state)
    train(alone, others, 3, generator)
    assert_same_training(optimizer, params, alone, others)
    assert frozen not in optimizer.state


@pytest.mark.parametrize("name", ["float64", "complex64", "another subclass"])
def test_once_it_is_trained_it_is_looked_at(name, generator):
    params = parameters(generator)
    frozen = nn.Parameter(FROZEN[name](), requires_grad=False)
    with pytest.raises(TypeError, match=r"not supported|cannot be ranked|tensor subclass"):
        RoseFusedAdamW([nn.Parameter(FROZEN[name]())])
    optimizer = RoseFusedAdamW([*params, frozen])
    frozen.requires_grad_()
    if name == "another subclass":
        return  # to give it a gradient, it would have to compute one
    give(params, gradients(params, generator))
    frozen.grad = torch.ones_like(frozen)
    snapshot = Snapshot(optimizer, params)
    with pytest.raises((TypeError, RuntimeError), match=r"not supported|is complex"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_a_gradient_that_is_not_simply_in_memory(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    give(params, gradients(params, generator))

    class Holder(nn.Parameter):
        grad = None

    odd = Holder(torch.zeros(3))
    optimizer.add_param_group({"params": [odd]})
    odd.grad = Two(torch.ones(3))
    with pytest.raises(TypeError, match=r"gradient of the parameter of shape \(3,\).* is a Two"):
        optimizer.step()


def test_lazy_modules(generator):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = RoseFusedAdamW(model.parameters())
    optimizer.step()  # nothing has a gradient yet
    model(torch.randn(3, 5, generator=generator)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


# ------------------------------------------------------------------------------------ shared memory

W = torch.arange(60.0).reshape(6, 10)
SHARED = {
    "the same": (W, W.data),
    "a view": (W, W.view(-1)),
    "rows": (W[:3], W[2:]),
    "transposed": (W, W.t()),
    "columns": (W[:, :6], W[:, 5:]),
    "one row and columns": (W[2, :6], W[:, 5:]),
    "every other": (W[::2], W[1:3]),
    "another dtype": (W, W.view(torch.int32).view(torch.bfloat16)),
}
APART = {
    "rows": (W[:3], W[3:]),
    "columns": (W[:, :5], W[:, 5:]),
    "a row in the gap": (W[2, :5], W[:, 5:]),
    "every other": (W[::2], W[1::2]),
    "three, interleaved": (W[:, 0::3], W[:, 1::3], W[:, 2::3]),
    "empty": (W, W[:0]),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_two_parameters_in_one_place(name, frozen):
    """Two threads would update the same elements, with other bits in every run."""
    one, other = (nn.Parameter(t) for t in SHARED[name])
    if frozen:  # then nobody writes there twice
        other.requires_grad_(False)
        RoseFusedAdamW([one, other])
        return
    for groups in ([one, other], [{"params": [one]}, {"params": [other]}]):
        with pytest.raises(ValueError, match=r"share memory.*Tie them as one parameter"):
            RoseFusedAdamW(groups)


def test_two_parameters_that_came_to_be_in_one_place_later(generator):
    params = parameters(generator)
    params[1] = nn.Parameter(torch.randn(7, 5, generator=generator))
    optimizer = RoseFusedAdamW(params)
    params[1].data = params[0].data
    give(params, gradients(params, generator))
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_two_parameters_that_came_to_be_in_one_place_after_some_steps(generator):
    params = parameters(generator)
    params[1] = nn.Parameter(torch.randn(7, 5, generator=generator))
    optimizer = RoseFusedAdamW(params, upper=1)
    train(optimizer, params, 3, generator)
    give(params, gradients(params, generator))
    params[1].data = params[0].data
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_many_neighbours_take_no_time():
    """Of columns, every span meets every other."""
    whole = torch.zeros(300, 3000)
    RoseFusedAdamW([nn.Parameter(whole[:, i]) for i in range(3000)])
    with pytest.raises(ValueError, match="share memory"):
        RoseFusedAdamW([nn.Parameter(whole[:, i : i + 2]) for i in range(0, 2999)])


@pytest.mark.parametrize("name", APART)
def test_neighbours_in_one_buffer(name, generator):
    whole = W.clone()
    views = [whole.as_strided(t.shape, t.stride(), t.storage_offset()) for t in APART[name]]
    params, others = [nn.Parameter(v) for v in views], clones(v.clone() for v in views)
    optimizers = RoseFusedAdamW(params), RoseFusedAdamW(others)
    for _ in range(3):
        grads = gradients(params, generator)
        for optimizer, own in zip(optimizers, (params, others), strict=True):
            give(own, grads)
            optimizer.step()
    assert_all_same_bits([*params], [*others], name)


def test_settings_of_a_made_optimizer_are_not_ignored():
    optimizer = RoseFusedAdamW([nn.Parameter(torch.ones(2))])
    for name in ("upper", "order", "max_grad_norm", "seed"):
        with pytest.raises(AttributeError, match=rf"'{name}' cannot be changed: make a new optimizer"):
            setattr(optimizer, name, 0.5)


# ------------------------------------------------------------------------------- what is kept alive


@pytest.mark.parametrize(
    ("how", "order", "granularity"),
    [("params", "ensemble", "element"), ("params", "second", "tensor"),
     ("removed group", "ensemble", "tensor"), ("removed group", "first", "element")],
)  # fmt: skip
def test_replaced_parameters_are_let_go(how, order, granularity, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW([nn.Parameter(torch.ones(2))], order=order, granularity=granularity)
    optimizer.add_param_group({"params": params})
    train(optimizer, params, 2, generator)
    old = [weakref.ref(p) for p in params]
    moments = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params]
    if how == "params":
        optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(3))]
    else:
        del optimizer.param_groups[1]
    for p in params:
        del optimizer.state[p]
    del params, p
    gc.collect()
    assert sum(ref() is not None for ref in old) == 0
    assert sum(ref() is not None for ref in moments) == 0


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("value", "units"),
    [
        (1 / 3, 333_333_333),
        (2 / 3, 666_666_667),
        (0.1 + 0.2, 300_000_000),
        (0.29, 290_000_000),
        (1e-9, 1),
        (np.float64(0.6), 600_000_000),
        (np.float32(0.6), 600_000_024),
        (np.float16(0.5), 500_000_000),
        (np.int64(1), 1_000_000_000),
        (1, 1_000_000_000),
        (Fraction(1, 3), 333_333_333),
        (Decimal("0.123456789"), 123_456_789),
    ],
    ids=repr,
)
def test_fractions_are_rounded_from_their_exact_value(value, units):
    assert fraction_units("upper", value) == units
    assert type(fraction_units("upper", value)) is int
    if 0 < units < 1e9:
        optimizer = RoseFusedAdamW([nn.Parameter(torch.ones(2))], upper=value, lower=0.0)
        assert optimizer.settings.fractions("second") == (units, 0)


NUMBERS = [
    {"lr": np.float32(1e-2)},
    {"lr": np.float64(1e-2), "weight_decay": np.int64(1), "eps": np.float64(1e-8)},
    {"betas": (np.float32(0.9), np.float64(0.99))},
    {"betas": [0.9, 0.99]},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"upper": np.float32(0.5), "gamma": np.float32(0.5), "order": "second"},
    {"selection_warmup_steps": np.int64(3), "seed": np.uint32(5)},
    {"order": "first", "first_order_every": np.int64(3)},
    {"max_grad_norm": np.float32(1.0)},
    {"amsgrad": False, "foreach": True, "fused": None, "differentiable": False},
    {"fused": True, "foreach": False, "maximize": True},
]


@pytest.mark.parametrize("options", NUMBERS, ids=str)
def test_what_adamw_takes_is_taken(options, generator):
    """And what is saved of it can be loaded without running code."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **options)
    others = clones(params)
    as_python = {
        key: tuple(float(x) for x in value)
        if key == "betas"
        else (value.item() if isinstance(value, np.generic) else value)
        for key, value in options.items()
    }
    other = RoseFusedAdamW(others, **as_python)
    state = generator.get_state()
    train(optimizer, params, 4, generator)
    generator.set_state(state)
    train(other, others, 4, generator)
    assert_same_training(optimizer, params, other, others)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    pickle.loads(pickle.dumps(optimizer))


def test_adamw_s_positional_arguments():
    RoseFusedAdamW([nn.Parameter(torch.ones(2))], 1e-3, (0.9, 0.99), 1e-8, 0.1, False)


def test_a_tensor_of_betas_may_change_in_place(generator):
    beta = torch.tensor(0.9)
    params = parameters(generator)
    others = clones(params)
    optimizer = RoseFusedAdamW(params, betas=(beta, torch.tensor(0.99)))
    other = RoseFusedAdamW(others, betas=(0.5, torch.tensor(0.99).item()))
    beta.fill_(0.5)
    grads = gradients(params, generator)
    for one, own in ((optimizer, params), (other, others)):
        give(own, grads)
        one.step()
    assert_same_training(optimizer, params, other, others)
