"""What a training step must know of wrappers that hide what they wrap; see also test_losses.py."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support import assert_all_same_bits
from torch import Tensor, nn
from training import one_thread as one_thread
from training import process_group as process_group

from rose_ops import RoseFusedAdamW, rose_backward, unwrap


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.1), nn.Linear(9, 3))


class Base:
    """What optimizers' wrappers have at least."""

    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        raise NotImplementedError


class InDict(Base):
    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        super().__init__(optimizer)
        self.optimizers = {"a": optimizer}


class InSlots:
    __slots__ = ("_inner", "param_groups")

    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        self._inner, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self._inner.step()


class InMethods(Base):
    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        super().__init__(optimizer)
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


class ByReference(Base):
    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        super().__init__(optimizer)
        self.inner = weakref.ref(optimizer)


class InClosure(Base):
    def __init__(self, optimizer: RoseFusedAdamW) -> None:
        super().__init__(optimizer)
        self.step = lambda: optimizer.step()


@pytest.mark.parametrize("wrapper", [InDict, InSlots, InMethods, ByReference])
def test_wherever_it_is_it_is_found(wrapper):
    optimizer = RoseFusedAdamW(model_of().parameters())
    assert unwrap(wrapper(optimizer)) is optimizer
    assert unwrap(wrapper(wrapper(optimizer))) is optimizer


def test_where_it_is_not_found_it_is_not_taken_for_a_baseline():
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters())
    with pytest.raises(
        ValueError, match="InClosure has the parameter groups of a RoseFusedAdamW, which"
    ):
        unwrap(InClosure(optimizer))
    # A baseline over the same parameters is one.
    assert unwrap(torch.optim.AdamW(model.parameters())) is None


BATCH = torch.ones(4, 6), torch.tensor([0, 1, 2, 0])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_a_ddp_that_is_not_the_model(order):
    """It would average the first of several backwards only."""
    model = model_of()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = RoseFusedAdamW(model.parameters(), order=order)

    def run() -> Any:
        return rose_backward(model, *BATCH, optimizer, forward=lambda _, x: ddp(x))

    if order == "second":
        run()  # one backward, which it sees
        return
    with pytest.raises(
        ValueError, match=r"forward= runs a DistributedDataParallel.*expected it as the"
    ):
        run()
    assert all(p.grad is None for p in model.parameters())
    rose_backward(ddp, *BATCH, optimizer, forward=lambda model, x: model(x))


@pytest.mark.usefixtures("process_group")
def test_replicate():
    replicate = pytest.importorskip("torch.distributed._composable.replicate").replicate
    model = replicate(model_of())
    with pytest.raises(ValueError, match=r"replicate\(\) averages gradients in the first backward"):
        rose_backward(model, *BATCH, RoseFusedAdamW(model.parameters(), order="first"))
    rose_backward(model, *BATCH, RoseFusedAdamW(model.parameters()))


def test_micro_batches_of_the_caller():
    """As the Trainer's, which divides in the step that an override takes the place of."""
    halves = [(x, y) for x, y in zip(BATCH[0].split(2), BATCH[1].split(2), strict=True)]
    grads: list[list[Tensor]] = []
    for steps in (1, 2):
        model = model_of().eval()
        optimizer = RoseFusedAdamW(model.parameters())
        for x, y in [BATCH] if steps == 1 else halves:
            rose_backward(model, x, y, optimizer, gradient_accumulation_steps=steps)
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    model = model_of()
    optimizer = RoseFusedAdamW(model.parameters(), order="ensemble")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 where rose_backward captures"):
        rose_backward(model, *BATCH, optimizer, gradient_accumulation_steps=2)
    for wrong in (0, 1.5, "2"):
        with pytest.raises(
            ValueError, match=r"gradient_accumulation_steps=.* \(\w+\); expected an int"
        ):
            rose_backward(model, *BATCH, optimizer, gradient_accumulation_steps=wrong)
    assert all(p.grad is None for p in model.parameters())


def test_the_trainer_s_accumulation(tmp_path):
    """An override of the step by `rose_backward` trains as the Trainer without it does."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model_of().eval()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.layers.eval()(x)
            if labels is None:
                return {"logits": logits}
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    class RoseTrainer(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            labels = inputs.pop("labels")
            steps = self.current_gradient_accumulation_steps
            options = {"gradient_accumulation_steps": steps}
            return rose_backward(model, inputs, labels, self.optimizer, **options).loss

    generator = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 3)} for i in range(24)
    ]
    models = []
    for kind in (transformers.Trainer, RoseTrainer):
        model = Classifier()
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[],
            num_train_epochs=2, use_cpu=True, max_grad_norm=0, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        optimizer = RoseFusedAdamW(model.parameters(), lr=0.1)
        kind(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
        models.append([p.detach() for p in model.parameters()])
    assert_all_same_bits(*models, "parameters")
