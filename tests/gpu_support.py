"""What the tests of the optimizer on a GPU share: parameters, gradients, settings and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import BF16, assert_all_same_bits
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

SHAPES = ((64, 33), (33,), (5, 7, 3, 3), (1,), (0,), (3000,))
SAMPLED = (*SHAPES, (200, 350))  # enough elements for a sample and for several blocks

# Settings that take different ways through the kernels.
WAYS: dict[str, dict[str, Any]] = {
    "bracket": {},
    "exact": {"selection": "exact"},
    "approx": {"selection": "approx"},
    "first": {"order": "first"},
    "first-exact": {"order": "first", "selection": "exact"},
    "ensemble": {"order": "ensemble"},
    "ensemble-exact": {"order": "ensemble", "selection": "exact"},
    "ensemble-approx": {"order": "ensemble", "selection": "approx"},
    "between": {"order": "ensemble", "upper": (0.7, 0.6), "lower": (0.1, 0.2), "gamma": 0.3},
    "tensor": {"granularity": "tensor"},
    "tensor-ensemble": {"granularity": "tensor", "order": "ensemble"},
    "clipping": {"max_grad_norm": 1.0},
    "clipping-exact": {"max_grad_norm": 1.0, "selection": "exact"},
    "clipping-ensemble": {"max_grad_norm": 1.0, "order": "ensemble"},
    "clipping-tensor": {"max_grad_norm": 1.0, "granularity": "tensor"},
}


def generator_on(device: str, generator: torch.Generator) -> torch.Generator:
    """Random numbers of a device, as fresh as ``generator``'s."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def parameters(
    generator: torch.Generator, dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES
) -> list[Tensor]:
    """On the generator's device."""
    return [
        torch.randn(shape, generator=generator, device=generator.device).to(dtype) for shape in shapes
    ]


def gradients(
    generator: torch.Generator, dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES
) -> list[Tensor]:
    """With zeros, so that there are ties."""
    made = parameters(generator, torch.float32, shapes)
    return [torch.where(g.abs() < 0.3, 0.0, g).to(dtype) for g in made]


def passes_of(way: dict[str, Any]) -> int:
    """Backward passes of a step: one for each mask to capture, and the one to update with."""
    return 1 if way.get("order", "second") == "second" else 2


def optimizer_of(
    start: Sequence[Tensor], way: dict[str, Any], device: str | None = None, **options: Any
) -> RoseFusedAdamW:
    """Over copies of ``start``."""
    copies = [nn.Parameter(p.detach().to(device or p.device, copy=True)) for p in start]
    return RoseFusedAdamW(copies, **{**way, **options})


def params_of(optimizer: RoseFusedAdamW) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(
    optimizer: RoseFusedAdamW, passes: Sequence[Sequence[Tensor]], scale: Tensor | None = None
) -> None:
    """With the gradients of each pass; what comes before the last one is captured."""
    *captured, last = passes
    for grads in captured:
        set_gradients(optimizer, grads)
        optimizer.capture("first", grad_scale=scale)
    set_gradients(optimizer, last)
    optimizer.step()


def set_gradients(optimizer: RoseFusedAdamW, grads: Sequence[Tensor]) -> None:
    for p, g in zip(params_of(optimizer), grads, strict=True):
        p.grad = g.to(p.device)


def results(optimizer: RoseFusedAdamW) -> dict[str, list[Tensor]]:
    """All that a step writes, on the CPU."""
    params = params_of(optimizer)
    found = {"params": [p.detach().cpu() for p in params]}
    for key in ("exp_avg", "exp_avg_sq", "step"):
        found[key] = [optimizer.state[p][key].cpu() for p in params]
    return found


def assert_same_results(actual: RoseFusedAdamW, expected: RoseFusedAdamW) -> None:
    found, wanted = results(actual), results(expected)
    for key in wanted:
        assert_all_same_bits(found[key], wanted[key], key)


def moved(start: Sequence[Tensor], optimizer: RoseFusedAdamW) -> bool:
    """Whether steps changed parameters at all."""
    changes = zip(start, params_of(optimizer), strict=True)
    return any(not torch.equal(p.cpu(), q.detach().cpu()) for p, q in changes)


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def paused_streams(count: int) -> list[torch.cuda.Stream]:
    """Each with a pause, behind which work can be queued up that then is in all of them at once."""
    streams = [torch.cuda.Stream() for _ in range(count)]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
    return streams


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


BF16_TRAINING = {"state_dtype": BF16, "param_rounding": "stochastic"}
