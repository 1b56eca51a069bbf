"""The optimizer on a GPU: against the reference, in CUDA graphs, without synchronisation.

What can run on the CPU does so, too ("cpu"). The operators' own tests run on a GPU as they are, see
conftest.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import BF16, FLOAT, HALF, assert_all_same_bits
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW
from rose_ops.optim import ORDERS

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = ((64, 33), (33,), (5, 7, 3, 3), (1,), (0,), (3000,))


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def parameters(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def gradients(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """With zeros, so that there are ties."""
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [torch.where(g.abs() < 0.3, 0.0, g).to(dtype) for g in made]


def train(optimizer: RoseFusedAdamW, steps: list[list[list[Tensor]]]) -> None:
    """Each step is one list of gradients for each mask to capture, and the one to update with."""
    params = optimizer.param_groups[0]["params"]
    for passes in steps:
        for kind, grads in zip([*optimizer.settings.kinds[:-1], None], passes, strict=False):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.device)
            if kind is not None:
                optimizer.capture(kind)
        optimizer.step()


@pytest.mark.parametrize("granularity", ["element", "tensor"])
@pytest.mark.parametrize("order", ["second", "ensemble"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(FLOAT, None), (BF16, None), (HALF, None), (BF16, BF16)], ids=str
)
def test_as_the_reference(device, generator, order, granularity, dtype, state_dtype):
    """Masks and moments bit for bit over steps, so that no difference can build up."""
    start = parameters(generator, dtype)
    passes = len(ORDERS[order])
    steps = [[gradients(generator, dtype) for _ in range(passes)] for _ in range(4)]
    found = []
    for place, backend in ((device, "auto"), ("cpu", "reference")):
        params = [nn.Parameter(p.to(place, copy=True)) for p in start]
        optimizer = RoseFusedAdamW(
            params, order=order, granularity=granularity, state_dtype=state_dtype, backend=backend
        )
        train(optimizer, steps)
        found.append((optimizer, params))
    (optimizer, params), (reference, expected) = found
    for key in ("exp_avg", "exp_avg_sq", "step"):
        actual = [optimizer.state[p][key].cpu() for p in params]
        assert all(optimizer.state[p][key].device.type == device for p in params)
        assert_all_same_bits(actual, [reference.state[p][key] for p in expected], key)
    for kind, selection in reference.selection.items():
        for name in selection._fields:
            a, b = getattr(optimizer.selection[kind], name), getattr(selection, name)
            assert torch.equal(a.cpu().nan_to_num(-1), b.nan_to_num(-1)), (kind, name)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), e.detach())


def test_a_learning_rate_on_the_device(device, generator):
    """A tensor lr in one group, a number in the other."""
    first, second = (nn.Parameter(p.to(device)) for p in parameters(generator, FLOAT)[:2])
    lr = torch.tensor(0.5, device=device)
    optimizer = RoseFusedAdamW([{"params": [first], "lr": lr}, {"params": [second], "lr": 0.0}])
    before = first.detach().clone(), second.detach().clone()
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(before[0], first)
    assert torch.equal(before[1], second)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_in_a_cuda_graph(generator, order):
    """Replays equal steps, with a learning rate that changes between them."""
    start = [nn.Parameter(p.cuda()) for p in parameters(generator, FLOAT)]
    other = [nn.Parameter(p.detach().clone()) for p in start]
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    optimizers = [
        RoseFusedAdamW(params, lr=lr, order=order, capturable=True)
        for params, lr in zip((start, other), lrs, strict=True)
    ]
    grads = [[torch.randn_like(p) for p in start] for _ in range(2)]

    def step(optimizer: RoseFusedAdamW, params: list[nn.Parameter]) -> None:
        if order == "ensemble":
            for p, g in zip(params, grads[0], strict=True):
                p.grad = g
            optimizer.capture("first", clear=False)
        for p, g in zip(params, grads[1], strict=True):
            p.grad = g
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(optimizers[0], start)
    torch.cuda.current_stream().wait_stream(side)
    step(optimizers[1], other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(optimizers[0], start)
    for i in range(3):
        for tensors in grads:
            for g in tensors:
                g.normal_()
        for lr in lrs:
            lr.fill_(1e-2 / (i + 1))
        graph.replay()
        step(optimizers[1], other)
    assert_all_same_bits([p.detach().cpu() for p in start], [p.detach().cpu() for p in other], "params")


@pytest.mark.gpu
@needs_gpu
def test_a_step_does_not_synchronise(generator):
    params = [nn.Parameter(p.cuda()) for p in parameters(generator, FLOAT)]
    optimizer = RoseFusedAdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("count", [1, 300])
def test_launches_of_a_step(count):
    params = [nn.Parameter(torch.randn(70, device="cuda")) for _ in range(count)]
    optimizer = RoseFusedAdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "kernel" in e.name and "Memcpy" not in e.name]
    assert 0 < len(kernels) <= 6


@pytest.mark.gpu
@needs_gpu
def test_other_streams_and_devices(generator):
    """The current stream is used, and the device of the parameters even where it is not current."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    start, grads = parameters(generator, FLOAT), gradients(generator, FLOAT)
    results = []
    for place in devices:
        with torch.cuda.stream(torch.cuda.Stream(place)), torch.cuda.device(devices[0]):
            params = [nn.Parameter(p.to(place)) for p in start]
            optimizer = RoseFusedAdamW(params)
            train(optimizer, [[copy.deepcopy(grads)] for _ in range(3)])
        torch.cuda.synchronize(place)
        results.append([p.detach().cpu() for p in params])
    for result in results[1:]:
        assert_all_same_bits(result, results[0], "params")


@pytest.mark.gpu
@needs_gpu
def test_grad_scaler_skips_a_step_with_an_infinity(generator):
    params = [nn.Parameter(p.cuda()) for p in parameters(generator, FLOAT)]
    optimizer = RoseFusedAdamW(params)
    scaler = torch.amp.GradScaler("cuda")
    for value in (1.0, torch.inf):
        before = [p.detach().clone() for p in params]
        scaler.scale(sum((p * value).sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_all_same_bits([p.detach().cpu() for p in params], [p.cpu() for p in before], "params")
