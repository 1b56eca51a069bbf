"""rose_accumulate: several micro-batches are one large batch."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from rose_ops import (
    Accumulation,
    RoseFusedAdamW,
    flatten_parameters,
    rose_accumulate,
    rose_backward,
)
from rose_ops.definitions import unpack

SIZES = (5, 1, 10)
ORDERS = [(order, r_drop) for order in ("first", "second", "ensemble") for r_drop in (0.0, 0.3)]


class Noisy(nn.Module):
    """Two kinds of passes, in turns, each with noise of its own: what dropout would do, and the same
    for a row whatever batch it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 11), nn.Linear(11, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("noise", torch.rand(2, 11) + 0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x)) * self.noise[self.calls % 2]
        self.calls += 1
        return self.outer(hidden)


@pytest.fixture
def model(generator) -> Noisy:
    torch.manual_seed(generator.initial_seed())
    return Noisy()


@pytest.fixture
def data(generator) -> tuple[Tensor, Tensor]:
    n = sum(SIZES)
    return torch.randn(n, 7, generator=generator), torch.randint(3, (n,), generator=generator)


def micro(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(x.split(SIZES) for x in data), strict=True))


def made(model: nn.Module, **options: Any) -> RoseFusedAdamW:
    return RoseFusedAdamW(options.pop("params", model.parameters()), lr=1e-2, **options)


def unpacked_masks(optimizer: RoseFusedAdamW, kind: str) -> list[Tensor]:
    key = f"{kind}_mask"
    return [unpack(state[key], p.numel()) for p, state in optimizer.state.items() if key in state]


def assert_alike(model: Noisy, other: Noisy, optimizer, reference) -> None:
    """Gradients within rounding, and masks but for elements whose risk is within rounding of the
    threshold."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    for kind in optimizer._captures.kinds | reference._captures.kinds:
        flipped = sum(
            int((a != b).sum())
            for a, b in zip(
                unpacked_masks(optimizer, kind), unpacked_masks(reference, kind), strict=True
            )
        )
        assert flipped <= 2, kind


@pytest.mark.parametrize(("order", "r_drop"), ORDERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_are_one_batch(model, data, order, r_drop, clip):
    if (order, r_drop) == ("second", 0.0):  # one pass, whichever it is
        model.noise[1] = model.noise[0]
    other = copy.deepcopy(model)
    optimizer, reference = made(model, order=order), made(other, order=order)
    for _ in range(3):
        losses = rose_accumulate(model, micro(data), optimizer, r_drop=r_drop, max_grad_norm=clip)
        expected = rose_backward(other, *data, reference, r_drop=r_drop, max_grad_norm=clip)
        for name, value in expected._asdict().items():
            if value is None or getattr(losses, name) is None:
                assert getattr(losses, name) is value, name
            else:
                torch.testing.assert_close(getattr(losses, name), value)
        assert_alike(model, other, optimizer, reference)
        # The one goes on from where the other is: what rounding did is not to add up.
        reference.step()
        optimizer.step()
        model.load_state_dict(other.state_dict())
        optimizer.load_state_dict(reference.state_dict())
        optimizer.zero_grad()
        reference.zero_grad()


@pytest.mark.parametrize(("order", "r_drop"), ORDERS)
def test_no_third_forward(model, data, order, r_drop):
    rose_accumulate(model, micro(data), made(model, order=order), r_drop=r_drop)
    assert model.calls == len(SIZES) * (1 if (order, r_drop) == ("second", 0.0) else 2)


@pytest.mark.parametrize(("order", "r_drop"), ORDERS)
def test_flat_parameters(model, data, order, r_drop):
    model.unused = None
    other = copy.deepcopy(model)
    optimizer = made(model, order=order, params=flatten_parameters(model.parameters()))
    reference = made(other, order=order)
    rose_accumulate(model, micro(data), optimizer, r_drop=r_drop)
    rose_accumulate(other, micro(data), reference, r_drop=r_drop)
    optimizer.step()
    reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("order", "r_drop"), ORDERS)
def test_scaled_losses(model, data, order, r_drop):
    """By a power of two: the same bits."""
    other = copy.deepcopy(model)
    optimizer, reference = made(model, order=order), made(other, order=order)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        rose_accumulate(model, micro(data), optimizer, r_drop=r_drop, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        rose_accumulate(other, micro(data), reference, r_drop=r_drop)
        reference.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        optimizer.zero_grad()
        reference.zero_grad()


def test_a_baseline(model, data):
    """Another optimizer gets the gradient, of R-Drop, too."""
    other = copy.deepcopy(model)
    optimizer, reference = (SGD(m.parameters(), lr=0.1) for m in (model, other))
    rose_accumulate(model, micro(data), optimizer, r_drop=0.5)
    rose_backward(other, *data, reference, r_drop=0.5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_what_is_refused_changes_nothing(model, data):
    optimizer = made(model, order="first")
    with pytest.raises(ValueError, match="micro_batches is empty"):
        rose_accumulate(model, [], optimizer)
    with pytest.raises(ValueError, match="r_drop=-1"):
        rose_accumulate(model, micro(data), optimizer, r_drop=-1)
    with pytest.raises(ValueError, match=r"max_grad_norm=0 "):
        rose_accumulate(model, micro(data), optimizer, max_grad_norm=0)
    F.cross_entropy(model(data[0]), data[1]).backward()
    with pytest.raises(ValueError, match=r"have a \.grad already"):
        rose_accumulate(model, micro(data), optimizer)
    assert all(p.grad is not None for p in [*model.inner.parameters(), *model.outer.parameters()])


def test_an_error_on_the_way_leaves_no_gradients(model, data):
    optimizer = made(model, order="ensemble")
    batches = micro(data)
    batches[-1] = batches[-1][0], batches[-1][1] + 100  # no such class
    with pytest.raises(IndexError):
        rose_accumulate(model, batches, optimizer)
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer._captures.kinds
    rose_accumulate(model, micro(data), optimizer)
    optimizer.step()


def test_an_error_of_a_capture_leaves_no_gradients(model, data, monkeypatch):
    optimizer = made(model, order="ensemble")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer, "capture", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        rose_accumulate(model, micro(data), optimizer, r_drop=0.3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("limit", [-1.0, 0.0, float("nan"), "2", True])
def test_a_limit_that_is_none_is_refused_at_the_end(limit, model, data):
    optimizer = made(model, order="first")
    step = Accumulation(model, optimizer)
    with step.forward():
        first = model(data[0])
    with step.forward():
        second = model(data[0])
    step.backward(F.cross_entropy(first, data[1]), (first - second).square().mean())
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"expected None \(no clipping\) or a number > 0"):
        step.finish(limit)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is grad is None or torch.equal(p.grad, grad)
    assert not optimizer._captures.kinds
    step.finish(0.5)
    assert optimizer._captures.kinds == {"first"}


def test_two_limits_are_refused_at_the_end(model):
    step = Accumulation(model, made(model, max_grad_norm=1.0))
    with pytest.raises(ValueError, match="the optimizer has its own max_grad_norm"):
        step.finish(0.5)


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: (y, 0.5),
        lambda y: (torch.tensor(0.5), y),
        lambda y: {"weight": torch.tensor(2.0), "labels": y},
        lambda y: UserDict(labels=y),
        lambda y: y.tolist(),
        lambda y: [*y],
        lambda y: [{"boxes": torch.ones(5 - len(y) % 5, 4), "label": one} for one in y],
    ],
    ids=["tuple", "0-dim in front", "dict", "mapping", "numbers", "0-dim tensors", "one for each"],
)
def test_micro_batches_count_by_their_labels(pack, model, data):
    """Whatever these are in."""

    def criterion(logits: Tensor, labels: Any) -> Tensor:
        if isinstance(labels, (dict, UserDict)):
            labels = labels["labels"]
        elif isinstance(labels, tuple):
            labels = next(x for x in labels if isinstance(x, Tensor) and x.dim())
        elif isinstance(labels[0], dict):
            labels = [x["label"] for x in labels]
        return F.cross_entropy(logits, torch.as_tensor(labels))

    batches = [(x, pack(y)) for x, y in micro(data)]
    found = rose_accumulate(model, batches, SGD(model.parameters(), 0.1), criterion=criterion)
    model.calls = 0
    expected = [F.cross_entropy(model(x), y) * len(y) / sum(SIZES) for x, y in micro(data)]
    torch.testing.assert_close(found.ce, sum(expected).detach())


def test_labels_of_nothing_are_refused(model, data):
    optimizer = made(model)
    with pytest.raises(ValueError, match="micro_batches have no labels"):
        rose_accumulate(model, [(data[0][:0], data[1][:0])], optimizer)
    with pytest.raises(ValueError, match="labels are a 0-dim tensor"):
        rose_accumulate(model, [(data[0][:1], data[1][0])], optimizer)


def test_passes_without_dropout(model, data):
    model.noise[1] = model.noise[0]
    with pytest.raises(ValueError, match="identical outputs"):
        rose_accumulate(model, micro(data), made(model, order="first"))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("accumulation", [1, len(SIZES)])
def test_with_accelerate(model, data, accumulation):
    """Which may be told that gradients are accumulated: here this function does it."""
    accelerate = pytest.importorskip("accelerate")
    other = copy.deepcopy(model)
    reference = made(other, order="ensemble")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, made(model, order="ensemble"))
    for _ in range(2):
        rose_accumulate(model, micro(data), optimizer, r_drop=0.3)
        optimizer.step()
        optimizer.zero_grad()
        rose_accumulate(other, micro(data), reference, r_drop=0.3)
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_with_lightning(model, data, tmp_path):
    lightning = pytest.importorskip("lightning")
    other = copy.deepcopy(model)
    reference = made(other, order="ensemble")

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, _: Any, __: int) -> None:
            optimizer = self.optimizers()
            rose_accumulate(self.model, micro(data), optimizer, r_drop=0.3)
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self) -> RoseFusedAdamW:
            return made(self.model, order="ensemble")

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, devices=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(range(8)))
    for _ in range(2):
        rose_accumulate(other, micro(data), reference, r_drop=0.3)
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
