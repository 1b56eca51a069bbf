"""What splits parameters over processes: a part of them is not taken for the whole without a word.

Each test runs its cases in the same two processes, which takes most of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forked import context
from support import assert_all_same_bits
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)

STEPS = 3


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, optimizer: Any, rank: int) -> None:
    for step in range(STEPS):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_batch(**options: Any) -> list[Tensor]:
    """What one process trains from the mean over both processes' batches."""
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), **options)
    for step in range(STEPS):
        sum(model(batch(rank, step)).square().mean() / 2 for rank in range(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def message(function: Callable[[], Any]) -> str:
    """Of the error that it must raise."""
    with pytest.raises(RuntimeError) as raised:
        function()
    return str(raised.value)


def fsdp(rank: int, use_orig_params: bool, early: bool = False, **options: Any) -> list[Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), **options) if early else None
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    train(wrapped, optimizer or RoseFusedAdamW(wrapped.parameters(), **options), rank)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [p.detach().clone() for p in wrapped.parameters()]


def zero(rank: int, **options: Any) -> list[Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(model_of())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=functools.partial(RoseFusedAdamW, **options), lr=1e-3
    )
    train(model, optimizer, rank)
    return [p.detach().clone() for p in model.parameters()]


def replaced(rank: int, **options: Any) -> None:
    """As DeepSpeed's ZeRO and Megatron do: a part of all parameters as one new tensor."""
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), **options)
    part = nn.Parameter(torch.cat([p.detach().view(-1) for p in model.parameters()]).chunk(2)[rank])
    part.grad = torch.ones_like(part)
    state_dict = optimizer.state_dict()
    optimizer.param_groups[0]["params"] = [part]
    # As where a run is resumed, before its first step.
    state_dict["param_groups"][0]["params"] = [0]
    optimizer.load_state_dict(state_dict)
    optimizer.step()


def marked(rank: int, mark: str, value: object, **options: Any) -> None:
    model = model_of()
    setattr(model[0].weight, mark, value)
    train(model, RoseFusedAdamW(model.parameters(), **options), rank)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    flat = [torch.cat([t.reshape(-1) for t in tensors]) for tensors in (found, expected)]
    torch.testing.assert_close(*flat, rtol=1e-5, atol=1e-7)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    local = "local_ranking=True"
    # A ranking, and a clipping norm, of a shard.
    global_ones: list[dict[str, Any]] = [
        {"upper": 0.6},
        {"upper": 0.6, "granularity": "tensor"},
        {"order": "first"},
        {"upper": 1, "max_grad_norm": 1.0},
    ]
    for options in global_ones:
        for use_orig_params in (False, True):
            said = message(lambda o=options, u=use_orig_params: fsdp(rank, u, **o))
            assert "FullyShardedDataParallel (FSDP1)" in said, said
            assert local in said, said
        said = message(lambda o=options: fsdp(rank, True, early=True, **o))
        assert "FullyShardedDataParallel (FSDP1)" in said, said
        said = message(lambda o=options: zero(rank, **o))
        assert "ZeroRedundancyOptimizer" in said, said
        assert local in said, said
        said = message(lambda o=options: replaced(rank, **o))
        assert "not those that it was given" in said, said
        assert local in said, said
        said = message(lambda o=options: marked(rank, "tensor_model_parallel", True, **o))
        assert "tensor parallelism" in said, said
        said = message(lambda o=options: marked(rank, "ds_tensor", torch.ones(2), **o))
        assert "ZeRO-3" in said, said
    # Nothing global is asked for: as one process with the whole batch.
    expected = whole_batch(upper=1)
    assert_close([t.reshape(-1) for t in fsdp(rank, False, upper=1)], expected)
    assert_close(fsdp(rank, True, upper=1), expected)
    assert_close(zero(rank, upper=1), expected)
    replaced(rank, upper=1)
    marked(rank, "tensor_model_parallel", True, upper=1)
    # A mark that says no.
    marked(rank, "tensor_model_parallel", False)
    # Asked for: each part by itself, which is something else.
    for options in ({"upper": 0.4}, {"upper": 0.4, "max_grad_norm": 0.1}):
        expected = whole_batch(**options)
        for found in (
            fsdp(rank, True, local_ranking=True, **options),
            zero(rank, local_ranking=True, **options),
        ):
            with pytest.raises(AssertionError):
                assert_close(found, expected)
    replaced(rank, local_ranking=True)
    # A process that ranks alone is not asked anything.
    alone = torch.distributed.new_group([0]), torch.distributed.new_group([1])
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters())
    train(model, optimizer, 0)
    others = model_of()
    train(others, RoseFusedAdamW(others.parameters()), 0)
    assert_all_same_bits([*model.parameters()], [*others.parameters()], "alone")
    assert len(alone) == 2
    torch.distributed.destroy_process_group()


def test_parts_are_refused_where_the_whole_is_needed(tmp_path):
    context()  # of processes that need not import torch
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="forkserver")


def test_one_process_has_the_whole(tmp_path):
    """What splits nothing is not refused."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        expected = model_of()
        train(expected, RoseFusedAdamW(expected.parameters(), upper=0.5), 0)
        for found in (fsdp(0, True, upper=0.5), zero(0, upper=0.5)):
            assert_close(found, [p.detach() for p in expected.parameters()])
        replaced(0)
    finally:
        torch.distributed.destroy_process_group()
