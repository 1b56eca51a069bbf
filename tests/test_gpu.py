"""The optimizer on a GPU, against the reference, the CPU and itself.

What can run on the CPU does so, too ("cpu"). The operators' own tests run on a GPU as they are, see
conftest.py; graphs, synchronisation, launches and sizes that fill a GPU are in ``test_gpu_*.py``.
"""

from __future__ import annotations

import io

import pytest
import torch
from gpu_support import (
    BF16_TRAINING,
    CUDA,
    SAMPLED,
    SHAPES,
    WAYS,
    assert_same_results,
    generator_on,
    gradients,
    moved,
    optimizer_of,
    parameters,
    params_of,
    passes_of,
    paused_streams,
    results,
    set_gradients,
    step,
)
from support import BF16, FLOAT, HALF, assert_all_same_bits
from torch import Tensor, nn
from torch.nn import functional as F

from rose_ops import RoseFusedAdamW, flatten_parameters


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(FLOAT, None), (BF16, None), (HALF, None), (BF16, BF16)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_as_the_reference(device, generator, way, dtype, state_dtype):
    """Masks and moments bit for bit over steps, so that no difference can build up."""
    shapes = SAMPLED if device == "cuda" and dtype == FLOAT else SHAPES
    start = parameters(generator, dtype, shapes)
    passes = passes_of(WAYS[way])
    steps = [[gradients(generator, dtype, shapes) for _ in range(passes)] for _ in range(4)]
    found = []
    for place, backend in ((device, "auto"), ("cpu", "reference")):
        found.append(optimizer_of(start, WAYS[way], place, state_dtype=state_dtype, backend=backend))
        for grads in steps:
            step(found[-1], grads)
    optimizer, reference = found
    for p in params_of(optimizer):
        assert all(x.device.type == device for x in (p, *optimizer.state[p].values()))
    actual, expected = results(optimizer), results(reference)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert_all_same_bits(actual[key], expected[key], key)
    for kind, selection in reference.selection.items():
        for name in selection._fields:
            a, b = getattr(optimizer.selection[kind], name), getattr(selection, name)
            assert torch.equal(a.cpu().nan_to_num(-1), b.nan_to_num(-1)), (kind, name)
    for p, e in zip(actual["params"], expected["params"], strict=True):
        torch.testing.assert_close(p, e)


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


# ----------------------------------------------------------------------------------------- streams


@pytest.mark.gpu
def test_other_streams_and_devices(generator):
    """The current stream is used, and the device of the parameters even where it is not current."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    start, grads = parameters(generator, FLOAT), gradients(generator, FLOAT)
    found = [optimizer_of(start, {})]
    for place in devices:
        with torch.cuda.stream(torch.cuda.Stream(place)), torch.cuda.device(devices[0]):
            found.append(optimizer_of(start, {}, place))
            for _ in range(3):
                step(found[-1], [grads])
        torch.cuda.synchronize(place)
    for _ in range(3):
        step(found[0], [grads])
    for optimizer in found[1:]:
        assert_all_same_bits(results(optimizer)["exp_avg"], results(found[0])["exp_avg"], "exp_avg")
        assert_same_results(optimizer, found[1])


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["bracket", "exact", "ensemble", "clipping", "tensor-ensemble"])
def test_two_optimizers_on_two_streams_at_once(generator, way):
    """Steps queued up behind a pause, so that both streams have work all the time."""
    on_device = generator_on("cuda", generator)
    work = []
    for shapes in ([(1_500_001,), (1000, 1500), (7,)], [(200_003,), (100, 1000), (1,)]):
        start = parameters(on_device, FLOAT, shapes)
        steps = [
            [gradients(on_device, FLOAT, shapes) for _ in range(passes_of(WAYS[way]))] for _ in range(6)
        ]
        work.append((start, steps))
    alone = [optimizer_of(start, WAYS[way]) for start, _ in work]
    for optimizer, (_, steps) in zip(alone, work, strict=True):
        for grads in steps:
            step(optimizer, grads)
        torch.cuda.synchronize()
    together = [optimizer_of(start, WAYS[way]) for start, _ in work]
    streams = paused_streams(len(work))
    for i in range(6):
        for stream, optimizer, (_, steps) in zip(streams, together, work, strict=True):
            with torch.cuda.stream(stream):
                step(optimizer, steps[i])
    torch.cuda.synchronize()
    for optimizer, expected, (start, _) in zip(together, alone, work, strict=True):
        assert_same_results(optimizer, expected)
        assert moved(start, optimizer)


# ------------------------------------------------------------------------------------ loss scaling


@pytest.mark.parametrize("way", ["bracket", "ensemble", "clipping", "tensor"])
def test_grad_scaler(device, generator, way):
    """Scales are powers of two, so what is not skipped equals steps without a scaler, bit for bit."""
    start = parameters(generator, FLOAT, SAMPLED)
    passes = passes_of(WAYS[way])
    steps = [[gradients(generator, FLOAT, SAMPLED) for _ in range(passes)] for _ in range(4)]
    scaled, plain = (optimizer_of(start, WAYS[way], device) for _ in range(2))
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    def backward(grads: list[Tensor], spoilt: bool) -> None:
        pairs = zip(params_of(scaled), grads, strict=True)
        loss = sum((p * g.to(device)).sum() for p, g in pairs)
        scaler.scale(loss * torch.inf if spoilt else loss).backward()

    for i, grads in enumerate(steps):
        *captured, last = grads
        for of_mask in captured:
            backward(of_mask, False)
            scaled.capture("first", grad_scale=scaler._scale)
        backward(last, i == 2)
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
        if i != 2:
            step(plain, grads)
    assert_same_results(scaled, plain)
    assert moved(start, scaled)
    assert scaler.get_scale() == 512


# ------------------------------------------------------------------------------------ flat, resumed


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("way", ["bracket", "exact", "ensemble"])
def test_flat_parameters(device, generator, way, dtype):
    """The same bits as over the parameters one by one, gradients made by autograd."""
    shapes = [shape for shape in SAMPLED if 0 not in shape]  # a flat parameter has no empty members
    start = parameters(generator, dtype, shapes)
    options = {**WAYS[way], **(BF16_TRAINING if dtype == BF16 else {})}
    single = optimizer_of(start, options, device)
    members = [nn.Parameter(p.to(device, copy=True)) for p in start]
    (flat,) = flatten_parameters(members)
    optimizer = RoseFusedAdamW([flat], **options)
    assert flat.numel() == sum(p.numel() for p in start)

    def backward(grads: list[Tensor]) -> None:
        sum((p * g.to(device)).sum() for p, g in zip(members, grads, strict=True)).backward()

    for _ in range(4):
        *captured, last = [gradients(generator, dtype, shapes) for _ in range(passes_of(options))]
        step(single, [*captured, last])
        for grads in captured:
            backward(grads)
            optimizer.capture("first")
        backward(last)
        optimizer.step()
        optimizer.zero_grad()
    expected = results(single)
    assert_all_same_bits([p.detach().cpu() for p in members], expected["params"], "params")
    for key in ("exp_avg", "exp_avg_sq"):
        views = [view.cpu() for view in flat.views(optimizer.state[flat][key])]
        assert_all_same_bits(views, expected[key], key)
    assert moved(start, single)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("way", ["bracket", "exact", "ensemble", "tensor-ensemble", "clipping"])
@pytest.mark.parametrize("through", ["file", "cpu", "device"])
def test_a_resumed_run(device, generator, way, dtype, through):
    """Saved between a capture and its step, to a file, by way of the CPU or on the device."""
    start = parameters(generator, dtype, SAMPLED)
    options = {**WAYS[way], **(BF16_TRAINING if dtype == BF16 else {})}
    passes = passes_of(options)
    steps = [[gradients(generator, dtype, SAMPLED) for _ in range(passes)] for _ in range(5)]
    straight = optimizer_of(start, options, device)
    for grads in steps[:2]:
        step(straight, grads)
    *captured, last = steps[2]
    for grads in captured:
        set_gradients(straight, grads)
        straight.capture("first")

    saved = {"params": [p.detach() for p in params_of(straight)], "optimizer": straight.state_dict()}
    if through == "device":
        resumed = optimizer_of(saved["params"], options)
        resumed.load_state_dict(saved["optimizer"])
    else:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, map_location="cpu" if through == "cpu" else None)
        resumed = optimizer_of(loaded["params"], options, device)
        resumed.load_state_dict(loaded["optimizer"])

    for optimizer in (straight, resumed):
        set_gradients(optimizer, last)
        optimizer.step()
        for grads in steps[3:]:
            step(optimizer, grads)
    for p in params_of(resumed):
        assert all(x.device.type == device for x in (p, *resumed.state[p].values()))
    assert_same_results(resumed, straight)
    assert moved(start, resumed)


# ---------------------------------------------------------------------------------------- training


class Classifier(nn.Module):
    """A small transformer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


@pytest.mark.parametrize("way", ["bracket", "ensemble", "clipping", "tensor-ensemble"])
def test_autocast_training_as_the_cpu(device, generator, way):
    """The CPU's kernels are fed the gradients of training in bfloat16 and must do what the device does:
    masks and moments bit for bit, which depend on gradients only."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    model = Classifier().to(device)
    tokens = torch.randint(50, (32, 16), generator=generator).to(device)
    labels = (tokens < 25).sum(1).gt(8).long()
    optimizer = RoseFusedAdamW(model.parameters(), lr=2e-3, **WAYS[way])
    copy = optimizer_of(params_of(optimizer), WAYS[way], "cpu", lr=2e-3, backend="cpu")
    start = [p.detach().clone() for p in model.parameters()]

    def forward() -> Tensor:
        with torch.autocast(device, BF16):
            return model(tokens).float()

    def hand_over() -> None:
        set_gradients(copy, [p.grad for p in params_of(optimizer)])

    losses = []
    for _ in range(20):
        if passes_of(WAYS[way]) == 2:
            p, q = F.log_softmax(forward(), 1), F.log_softmax(forward(), 1)
            F.kl_div(p, q, reduction="batchmean", log_target=True).backward()
            hand_over()
            for each in (optimizer, copy):
                each.capture("first")
        loss = F.cross_entropy(forward(), labels)
        loss.backward()
        hand_over()
        for each in (optimizer, copy):
            each.step()
            each.zero_grad()
        losses.append(loss.item())
    actual, expected = results(optimizer), results(copy)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert_all_same_bits(actual[key], expected[key], key)
    for kind, selection in copy.selection.items():
        for a, e in zip(optimizer.selection[kind], selection, strict=True):
            assert a.item() == e.item(), kind
    for p, e in zip(actual["params"], expected["params"], strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-6)
    assert moved(start, optimizer)
    assert sum(losses[-5:]) < sum(losses[:5])


# -------------------------------------------------------------------------------------- repetition


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("way", ["bracket", "exact", "approx", "between", "clipping-ensemble"])
def test_the_same_bits_from_twenty_repetitions(device, generator, way, dtype):
    """Of one step over 8Mi elements (fewer on the CPU) in 200 tensors, each time from other lines of
    the sample, unless these decide."""
    on_device = generator_on(device, generator)
    n = 8 << 20 if device == "cuda" else 150_000
    shapes = [(int(size),) for size in torch.rand(200, generator=generator) * 2 * n / 200]
    options = {**WAYS[way], **(BF16_TRAINING if dtype == BF16 else {})}
    optimizer = optimizer_of(parameters(on_device, dtype, shapes), options)
    passes = [
        [gradients(on_device, dtype, shapes) for _ in range(passes_of(options))] for _ in range(2)
    ]
    step(optimizer, passes[0])  # moments that are not zero
    params = params_of(optimizer)
    written = {"params": [p.detach() for p in params]}
    for key in ("exp_avg", "exp_avg_sq", "step"):
        written[key] = [optimizer.state[p][key] for p in params]
    before = {key: [x.clone() for x in tensors] for key, tensors in written.items()}
    done = optimizer._steps_done

    def bits_of(tensors: list[Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in tensors]).view(torch.uint8)

    for i in range(20):
        for key, tensors in written.items():
            torch._foreach_copy_(tensors, before[key])
        if way == "approx":
            optimizer._steps_done = done
        step(optimizer, passes[1])
        found = {key: bits_of(tensors) for key, tensors in written.items()}
        for kind, selection in optimizer.selection.items():
            found[kind] = torch.stack([x.double() for x in selection])
        if i == 0:
            first = found
            assert not any(torch.equal(found[key], bits_of(before[key])) for key in written)
        for key, value in found.items():
            assert torch.equal(value, first[key]), f"{key}, repetition {i}"


@pytest.mark.gpu
def test_the_hardware_rounds_to_bfloat16_as_the_kernels_expect():
    """pack_bf16 leaves it to cvt.rn.bf16: every number but NaN, denormals kept."""
    step = 1 << 26
    for first in range(-(1 << 31), 1 << 31, step):
        bits = torch.arange(first, first + step, dtype=torch.int64, device="cuda")
        x = bits.int().view(torch.float32)
        found = x.to(BF16).view(torch.int16)
        u = bits & 0xFFFFFFFF
        expected = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).short()
        assert torch.equal(torch.where(x.isnan(), 0, found), torch.where(x.isnan(), 0, expected))
