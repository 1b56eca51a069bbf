"""Small training runs from given gradients, for the tests of the optimizer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW

SHAPES = [(7, 5), (5,), (2, 3, 4), (), (0, 4), (101,)]
ORDERS = ("second", "first", "ensemble")
GRANULARITIES = ("element", "tensor")
each_order = pytest.mark.parametrize("order", ORDERS)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.fixture(autouse=True)
def one_thread():
    """These problems are small; on shared cores more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """This process alone, for what comes with DistributedDataParallel."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/meet",
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=1),
    )
    yield
    gc.collect()  # what reduces gradients goes before the group that it does so with
    torch.distributed.destroy_process_group()


def parameters(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def clones(params: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradients(params: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random, of different sizes, and some of them zero."""
    found = []
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 1)
        zero = torch.rand(p.shape, generator=generator) < 0.2
        found.append(g.masked_fill(zero, 0.0).to(p.dtype))
    return found


def give(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def masked_step(optimizer: RoseFusedAdamW, params, grads, kl_grads) -> None:
    """One step of any order from given gradients."""
    if "first" in optimizer.settings.kinds:
        give(params, kl_grads)
        optimizer.capture("first")
    give(params, grads)
    optimizer.step()


def train(optimizer: RoseFusedAdamW, params, steps: int, generator: torch.Generator) -> None:
    for _ in range(steps):
        masked_step(optimizer, params, gradients(params, generator), gradients(params, generator))


def assert_same_training(one, params_one, other, params_other, what: str = "") -> None:
    """Parameters and state equal bit for bit."""
    assert_all_same_bits([*params_one], [*params_other], f"{what} params")
    for i, (p, q) in enumerate(zip(params_one, params_other, strict=True)):
        mine, theirs = one.state.get(p, {}), other.state.get(q, {})
        assert mine.keys() == theirs.keys(), f"{what} state[{i}]"
        for key, value in mine.items():
            assert_same_bits(value, theirs[key], f"{what} state[{i}][{key}]")


class Snapshot:
    """Everything that a failed call must leave alone."""

    def __init__(self, optimizer: RoseFusedAdamW, params: list[nn.Parameter]) -> None:
        self.optimizer, self.params = optimizer, params
        self.taken = self.take()

    def take(self) -> dict[str, Any]:
        optimizer = self.optimizer
        return copy.deepcopy(
            {
                "params": [p.detach() for p in self.params],
                "gradients": [p.grad for p in self.params],
                # A key per parameter: those that have no state are to stay without.
                "state": [
                    dict(optimizer.state[p]) if p in optimizer.state else None for p in self.params
                ],
                "others": len(optimizer.state),
                "groups": [
                    {k: v for k, v in group.items() if k != "params"}
                    for group in optimizer.param_groups
                ],
                "members": [list(map(id, group["params"])) for group in optimizer.param_groups],
                "defaults": optimizer.defaults,
                "settings": optimizer.settings,
                "captured": optimizer._captures.kinds,
                "steps_done": optimizer._steps_done,
                "attributes": sorted(vars(optimizer)),
            }
        )

    def assert_unchanged(self) -> None:
        assert_same(self.take(), self.taken, "optimizer")


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Nested containers equal, tensors bit for bit."""
    assert type(actual) is type(expected), what
    if isinstance(expected, dict):
        assert list(actual) == list(expected), what
        for key, value in expected.items():
            assert_same(actual[key], value, f"{what}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), what
        for i, value in enumerate(expected):
            assert_same(actual[i], value, f"{what}[{i}]")
    elif not isinstance(expected, Tensor):
        assert actual == expected, what
    elif expected.layout != torch.strided or expected.device.type == "meta":
        assert (actual.layout, actual.device, actual.shape) == (
            expected.layout,
            expected.device,
            expected.shape,
        ), what
    else:
        assert_same_bits(actual.resolve_conj(), expected, what)
