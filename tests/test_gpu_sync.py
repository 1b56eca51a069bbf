"""Steps on a GPU never wait for it, and what is queued up behind a pause is still right."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    BF16_TRAINING,
    SAMPLED,
    WAYS,
    assert_same_results,
    gradients,
    moved,
    no_synchronisation,
    optimizer_of,
    parameters,
    params_of,
    passes_of,
    step,
)
from support import BF16, FLOAT
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW, flatten_parameters, rose_backward

pytestmark = pytest.mark.gpu


def steps_of(on_device: torch.Generator, way: str, count: int, dtype=FLOAT) -> list[list[list[Tensor]]]:
    passes = passes_of(WAYS[way])
    return [[gradients(on_device, dtype, SAMPLED) for _ in range(passes)] for _ in range(count)]


def test_a_synchronisation_would_be_seen():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        x.sum().item()
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        torch.ones(3).to("cuda")
    assert x.sum().item() == 3


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_steps_do_not_synchronise(on_device, way, dtype):
    """With other gradients and another learning rate in each, and statistics taken."""
    start = parameters(on_device, dtype, SAMPLED)
    optimizer = optimizer_of(start, WAYS[way], **(BF16_TRAINING if dtype == BF16 else {}))
    steps = steps_of(on_device, way, 5, dtype)
    step(optimizer, steps[0])
    found = []
    with no_synchronisation():
        for i, grads in enumerate(steps[1:]):
            optimizer.param_groups[0]["lr"] = 1e-3 / (i + 2)
            step(optimizer, grads)
            found.append([*optimizer.selection.values(), optimizer.grad_norm])
    assert len(found) == 4
    assert moved(start, optimizer)


@pytest.mark.parametrize("way", ["bracket", "clipping-ensemble"])
@pytest.mark.parametrize("kind", ["scheduler", "tensor", "groups"])
def test_a_changing_learning_rate_does_not_synchronise(on_device, way, kind):
    """As a number from a scheduler, as a tensor on the device, and as one of each in two groups."""
    start = parameters(on_device, FLOAT, [*SAMPLED, (5000,)])
    lr = 1e-2 if kind == "scheduler" else torch.tensor(1e-2, device="cuda")
    params = [nn.Parameter(p.clone()) for p in start]
    groups = [{"params": params}]
    if kind == "groups":
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1e-3, "betas": (0.8, 0.99)}]
    optimizer = RoseFusedAdamW(groups, lr=lr, **WAYS[way])
    shapes = [p.shape for p in start]
    passes = [gradients(on_device, FLOAT, shapes) for _ in range(passes_of(WAYS[way]))]
    if kind == "scheduler":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    step(optimizer, passes)
    with no_synchronisation():
        for i in range(4):
            if kind == "scheduler":
                schedule.step()
            else:
                lr.fill_(1e-2 / (i + 2))
            if kind == "groups":
                optimizer.param_groups[1]["lr"] = 1e-3 / (i + 2)
            step(optimizer, passes)
    assert moved(start, optimizer)


@pytest.mark.parametrize("way", ["bracket", "exact", "ensemble", "clipping-ensemble", "tensor"])
def test_grad_scaler_does_not_synchronise(on_device, way):
    start = parameters(on_device, FLOAT, SAMPLED)
    optimizer = optimizer_of(start, WAYS[way])
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)

    def run(passes: list[list[Tensor]]) -> None:
        for grads in passes:
            loss = sum((p * g).sum() for p, g in zip(params_of(optimizer), grads, strict=True))
            scaler.scale(loss).backward()
            if grads is not passes[-1]:
                optimizer.capture("first", grad_scale=scaler._scale)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    steps = steps_of(on_device, way, 4)
    run(steps[0])
    with no_synchronisation():
        for passes in steps[1:]:
            run(passes)
    assert moved(start, optimizer)


@pytest.mark.parametrize("way", ["bracket", "ensemble"])
def test_flat_parameters_do_not_synchronise(on_device, way):
    torch.manual_seed(on_device.initial_seed())
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Dropout(0.1), nn.Linear(300, 3)).cuda()
    optimizer = RoseFusedAdamW(flatten_parameters(model.parameters()), **WAYS[way])
    inputs = torch.randn(8, 300, generator=on_device, device="cuda")
    labels = torch.zeros(8, dtype=torch.int64, device="cuda")

    def run() -> None:
        if way == "ensemble":
            rose_backward(model, inputs, labels, optimizer)
        else:
            nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    start = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with no_synchronisation():
        for _ in range(3):
            run()
    assert moved(start, optimizer)


@pytest.mark.parametrize("way", ["bracket", "exact", "clipping-ensemble", "tensor-ensemble"])
def test_steps_queued_up_have_their_own_tables(on_device, way):
    """Forty steps that the device has not begun when the last one is issued: what the host writes for
    one must not reach another. With gradients at other addresses and another learning rate each."""
    start = parameters(on_device, FLOAT, SAMPLED)
    waiting, queued = (optimizer_of(start, WAYS[way]) for _ in range(2))
    steps = steps_of(on_device, way, 5)
    torch.cuda.synchronize()
    for optimizer in (waiting, queued):
        step(optimizer, steps[0])
        torch.cuda.synchronize()
        if optimizer is queued:
            torch.cuda._sleep(200_000_000)
        for i in range(40):
            optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            step(optimizer, steps[i % 5])
            if optimizer is waiting:
                torch.cuda.synchronize()
    assert_same_results(queued, waiting)
    assert moved(start, queued)
