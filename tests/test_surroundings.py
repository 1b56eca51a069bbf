"""What surrounds the optimizer: PyTorch's defaults, tensors without memory, torch.compile."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from forked import program
from support import assert_all_same_bits
from torch import nn
from training import assert_same_training, clones, each_order, give, gradients, parameters, train
from training import one_thread as one_thread

import rose_ops
from rose_ops import RoseFusedAdamW

# --------------------------------------------------------------------------- other defaults of torch


@contextmanager
def other_default(what: str) -> Iterator[None]:
    """A device on which nothing can be read, or a dtype."""
    if what == "device":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


each_default = pytest.mark.parametrize("default", ["device", "dtype"])


@pytest.mark.thin(3)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection": "exact"},
        {"selection": "approx"},
        {"granularity": "tensor"},
        {"max_grad_norm": 1.0},
        {"granularity": "tensor", "max_grad_norm": 1.0},
        {"lr": torch.tensor(1e-3)},
    ],
    ids=str,
)
@each_order
@each_default
def test_another_default_changes_nothing(default, order, options, backend, generator):
    params = parameters(generator)
    others = clones(params)
    optimizers = [RoseFusedAdamW(p, order=order, backend=backend, **options) for p in (params, others)]
    state = generator.get_state()
    train(optimizers[0], params, 3, generator)
    generator.set_state(state)
    grads = [(gradients(others, generator), gradients(others, generator)) for _ in range(3)]
    with other_default(default):
        for of_update, of_kl in grads:
            if order != "second":
                give(others, of_kl)
                optimizers[1].capture("first")
            give(others, of_update)
            optimizers[1].step()
        saved = optimizers[1].state_dict()
        optimizers[1].load_state_dict(saved)
    assert_same_training(optimizers[0], params, optimizers[1], others)


@each_default
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_another_default_and_the_functions(backend, default, generator):
    g, m = ([torch.randn(n, generator=generator) for n in (50, 0, 7)] for _ in range(2))

    def run():
        p, v = [x.clone() for x in g], [x.square() for x in m]
        masks, selection = rose_ops.capture_mask(g, m, backend=backend)
        whole, _ = rose_ops.capture_mask(g, m, backend=backend, granularity="tensor")
        rose_ops.select_threshold(g, m, backend=backend)
        steps = [x.new_zeros(()) for x in p]
        moments = [x.clone() for x in m]
        counts = rose_ops.rose_adamw_(p, g, moments, v, steps, second_masks=masks, backend=backend)
        return [*masks, *whole, *p, *moments, *v, *selection, *counts]

    expected = run()
    with other_default(default):
        found = run()
    assert_all_same_bits(found, expected, backend)


# ------------------------------------------------------------------------------- without any memory


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "exact"}, {"granularity": "tensor"}, {"max_grad_norm": 1.0}, {"backend": "cpu"}],
    ids=str,
)
@each_order
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_training_without_memory(kind, order, options):
    """As estimators of memory run it: shapes, dtypes and the keys of the state are as they will be."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(device: str) -> list:
        model = nn.Sequential(nn.Linear(40, 30, device=device), nn.Linear(30, 4, device=device))
        optimizer = RoseFusedAdamW(model.parameters(), order=order, **options)
        x = torch.randn(3, 40, device=device)
        for _ in range(2):
            if order != "second":
                model(x).square().sum().backward()
                optimizer.capture("first")
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [
            {key: (value.shape, value.dtype) for key, value in optimizer.state[p].items()}
            for p in model.parameters()
        ]

    expected = run("cpu")
    if kind == "meta":
        assert run("meta") == expected
    else:
        with FakeTensorMode():
            assert run("cpu") == expected


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_state_without_memory_is_loaded_and_copied(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run() -> None:
        device = "meta" if kind == "meta" else "cpu"
        model = nn.Linear(4, 3, device=device)
        optimizer = RoseFusedAdamW(model.parameters(), order="first")
        for _ in range(2):
            model(torch.ones(2, 4, device=device)).sum().backward()
            optimizer.capture("first", clear=False)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        if kind == "meta":
            copy.deepcopy(optimizer)
            real = nn.Linear(4, 3)
            of_real = RoseFusedAdamW(real.parameters(), order="first")
            real(torch.ones(2, 4)).sum().backward()
            of_real.capture("first", clear=False)
            of_real.step()
            optimizer.load_state_dict(of_real.state_dict())

    with FakeTensorMode() if kind == "fake" else nullcontext():
        run()


def test_rose_backward_without_memory():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)).to("meta")
    optimizer = RoseFusedAdamW(model.parameters(), order="ensemble")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    rose_ops.rose_backward(model, torch.ones(2, 4, device="meta"), labels, optimizer, r_drop=1.0)
    optimizer.step()


def test_an_estimator_of_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with FakeTensorMode():
        model = nn.Linear(1000, 3000, bias=False)
        optimizer = RoseFusedAdamW(model.parameters())
        tracked = tracker.MemTracker()
        tracked.track_external(model, optimizer)
        with tracked:
            model(torch.ones(2, 1000)).sum().backward()
            optimizer.step()
    peak = tracked.get_tracker_snapshot("peak")[torch.device("cpu")]
    optimizer_state = next(value for key, value in peak.items() if "OPT" in str(key).upper())
    assert math.isclose(optimizer_state, 2 * 4 * 3_000_000, rel_tol=0.01)


# -------------------------------------------------------------------------------- torch.compile


@pytest.mark.thin(2)
@pytest.mark.parametrize(("order", "lr"), [("second", "0.1"), ("ensemble", "torch.tensor(0.1)")])
def test_nothing_is_compiled_again(order, lr, tmp_path):
    """When learning rates or other options change, the warm-up ends, or a mask is used again: the
    optimizer is outside of the graphs. Statistics and counters are those of eager training."""
    source = f"""
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from rose_ops import RoseFusedAdamW, rose_backward
counter = CompileCounterWithBackend("aot_eager")
found = []
for compiled in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, 3))
    every = {{"first_order_every": 2}} if {order!r} == "ensemble" else {{}}
    optimizer = RoseFusedAdamW(
        model.parameters(), lr={lr}, order={order!r}, selection_warmup_steps=2, **every
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    forward = torch.compile(model, backend=counter) if compiled else model
    def train_step(x, y):
        if optimizer.needs_first_mask:
            with optimizer.capturing("first"):
                (forward(x) - forward(x)).square().sum().backward()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    if compiled:
        train_step = torch.compile(train_step, backend=counter)
    kept = []
    for step in range(8):
        if compiled and step == 4:
            graphs = counter.frame_count, counters["stats"]["unique_graphs"]
            torch._dynamo.config.error_on_recompile = True
        train_step(x, y)
        schedule.step()
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        records = optimizer.selection
        kept.append([records[kind].kept.item() for kind in optimizer.settings.kinds if kind in records])
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    found.append((kept, optimizer._steps_done, rates, [p.detach() for p in model.parameters()]))
assert graphs == (counter.frame_count, counters["stats"]["unique_graphs"]) and graphs[0] > 0, graphs
(kept, *counts, eager), (kept_, *counts_, compiled) = found
assert counts == counts_ and counts[0] == 8 and counts[1][0] < 0.1 / 7, counts
assert kept == kept_ and all(kept[-1]), kept
for p, q in zip(eager, compiled):
    torch.testing.assert_close(p, q)
"""
    program(source, tmp_path)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("order", "what"), [("second", "step"), ("ensemble", "loop")])
def test_compiled_training_is_eager_training(order, what, tmp_path):
    """Counters included: the warm-up ends. In a process of its own, as the compiler changes a lot."""
    source = f"""
import torch
from torch import nn
from rose_ops import RoseFusedAdamW
found = []
for compiled in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    optimizer = RoseFusedAdamW(model.parameters(), lr=0.1, order={order!r}, selection_warmup_steps=2)
    x = torch.randn(5, 6)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    def loop():
        if {order!r} != "second":
            with optimizer.capturing("first"):
                model(x).square().sum().backward()
        model(x).sum().backward()
        (optimizer.step if {what!r} == "loop" else step)()
        schedule.step()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.5
        optimizer.zero_grad()
    if compiled and {what!r} == "loop":
        loop = torch.compile(loop, backend="eager")
    for _ in range(5):
        loop()
    kept = optimizer.selection[optimizer.settings.kinds[-1]].kept
    found.append(([p.detach() for p in model.parameters()], kept, optimizer._steps_done))
(a, kept_a, steps_a), (b, kept_b, steps_b) = found
assert all(map(torch.equal, a, b)) and kept_a == kept_b > 0 and steps_a == steps_b == 5
"""
    program(source, tmp_path)
