"""Mixed precision and several losses under accelerate and Lightning: see STACKS.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stacks_support import (
    BATCH,
    EPOCHS,
    OPTIONS,
    assert_same_models,
    batches,
    classifier,
    optimizer_of,
    package,
    plain_loop,
)
from stacks_support import accelerator as accelerator
from stacks_support import data as data
from stacks_support import seed as seed
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from training import assert_same_training
from training import one_thread as one_thread

import rose_ops
from rose_ops import RoseFusedAdamW, rose_backward, symmetric_kl


def scaler() -> torch.amp.GradScaler:
    """With a power of two: nothing is rounded by scaling."""
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_grad_scaler_unscales_itself_where_the_optimizer_is_told_not_to(data, seed):
    """So that gradients can be clipped between unscale_ and step; here unscale_ is left to the step."""
    model, other = classifier(seed), classifier(seed)
    optimizer, other_optimizer = optimizer_of(model, amp_scaling=False), optimizer_of(other)
    assert other_optimizer._step_supports_amp_scaling
    assert not optimizer._step_supports_amp_scaling
    scales = scaler()
    for batch in batches(data):
        scales.scale(model(**batch)["loss"]).backward()
        scales.step(optimizer)
        scales.update()
        optimizer.zero_grad()
    plain_loop(other, other_optimizer, batches(data))
    assert_same_models(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("amp_scaling", [True, False])
def test_accelerate_is_told_of_an_overflow(accelerator, data, seed, amp_scaling):
    """It leaves out that step, and so do the schedules that it has prepared."""
    accelerated = package("accelerate.optimizer").AcceleratedOptimizer
    scheduled = package("accelerate.scheduler").AcceleratedScheduler
    accelerator()  # makes the state that those share
    model, other = classifier(seed), classifier(seed)
    optimizer = optimizer_of(model, amp_scaling=amp_scaling)
    other_optimizer = optimizer_of(other)
    wrapped = accelerated(optimizer, scaler=scaler())
    schedule = scheduled(lr_scheduler.ExponentialLR(optimizer, 0.9), wrapped)
    other_schedule = lr_scheduler.ExponentialLR(other_optimizer, 0.9)
    for i, batch in enumerate(batches(data)):
        loss = wrapped.scaler.scale(model(**batch)["loss"])
        (loss * torch.inf if i in (0, 4) else loss).backward()
        wrapped.step()
        schedule.step()
        wrapped.zero_grad()
        assert wrapped.step_was_skipped == (i in (0, 4))
        if i not in (0, 4):
            plain_loop(other, other_optimizer, [batch], each_step=other_schedule.step)
        assert schedule.get_last_lr() == other_schedule.get_last_lr()
    assert_same_models(model, optimizer, other, other_optimizer)


# ------------------------------------------------------------------------------------- Lightning


def fit(lightning: Any, module: Any, data: Any, folder: Any, **options: Any) -> None:
    lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    ).fit(module, DataLoader(data, batch_size=BATCH))  # fmt: skip


def module_of(
    lightning: Any, model: nn.Module, optimizer: RoseFusedAdamW, step: Callable[..., Any]
) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, i):
            return step(self, batch, i)

        def configure_optimizers(self):
            return optimizer

    return Module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_clips_in_mixed_precision(data, seed, tmp_path, precision):
    """Where the optimizer says that it does not unscale; else Lightning refuses to, in bfloat16, too,
    although nothing is scaled there."""
    lightning = package("lightning")
    plugin = package("lightning.pytorch.plugins.precision").MixedPrecision
    half = precision == "16-mixed"

    def run(amp_scaling: bool):
        model = classifier(seed)
        optimizer = RoseFusedAdamW(model.parameters(), amp_scaling=amp_scaling, **OPTIONS)
        module = module_of(lightning, model, optimizer, lambda self, b, _: self.model(**b)["loss"])
        fit(
            lightning, module, data, tmp_path, gradient_clip_val=0.1,
            plugins=[plugin(precision, "cpu", scaler() if half else None)],
        )  # fmt: skip
        return model, optimizer

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run(True)
    other = classifier(seed)
    other_optimizer = RoseFusedAdamW(other.parameters(), **OPTIONS)
    for batch in batches(data):
        with torch.autocast("cpu", torch.half if half else torch.bfloat16):
            loss = other(**batch)["loss"]
        (loss * 1024).backward()  # which rounds nothing in bfloat16
        for p in other.parameters():
            p.grad /= 1024
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        other_optimizer.step()
        other_optimizer.zero_grad()
    assert_same_models(*run(False), other, other_optimizer)


@pytest.mark.filterwarnings("ignore")
def test_lightning_automatic_ensemble(data, seed, tmp_path):
    """Lightning clears gradients after training_step, just before its own backward: those of the step
    before are still there when a mask is captured, and refused."""
    lightning = package("lightning")

    def losses(model, batch, i):
        torch.manual_seed(i)
        one, two = model(batch["x"]), model(batch["x"])
        ce = (F.cross_entropy(one, batch["labels"]) + F.cross_entropy(two, batch["labels"])) / 2
        return symmetric_kl(one, two), ce

    def run(clears: bool):
        def step(module, batch, i):
            kl, ce = losses(module.model, batch, i)
            optimizer = rose_ops.unwrap(module.optimizers())
            if clears:
                optimizer.zero_grad()
            with optimizer.capturing("first"):
                kl.backward(retain_graph=True)
            return ce

        model = classifier(seed, dropout=0.3)
        optimizer = optimizer_of(model, order="ensemble")
        fit(lightning, module_of(lightning, model, optimizer, step), data, tmp_path)
        return model, optimizer

    with pytest.raises(RuntimeError, match="have a gradient already"):
        run(clears=False)
    other = classifier(seed, dropout=0.3)
    other_optimizer = optimizer_of(other, order="ensemble")
    for i, batch in enumerate(batches(data)):
        kl, ce = losses(other, batch, i % (len(data) // BATCH))
        kl.backward(retain_graph=True)
        other_optimizer.capture("first")
        ce.backward()
        other_optimizer.step()
        other_optimizer.zero_grad()
    assert_same_models(*run(clears=True), other, other_optimizer)


# -------------------------------------------------------------------------- unwrap, rose_backward


def test_unwrap(accelerator, seed):
    optimizer = optimizer_of(classifier(seed))
    assert rose_ops.unwrap(optimizer) is optimizer
    assert rose_ops.unwrap(accelerator().prepare(optimizer)) is optimizer
    wrapper = package("lightning.pytorch.core.optimizer").LightningOptimizer
    assert rose_ops.unwrap(wrapper(optimizer)) is optimizer


@pytest.mark.parametrize("order", ["second", "first", "ensemble"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_rose_backward_clips(data, seed, order, scaled):
    """As clip_grad_norm_ between it and the step, of unscaled gradients."""
    runs = []
    for inside in (True, False):
        model = classifier(seed, dropout=0.3)
        optimizer = optimizer_of(model, order=order)
        scales = scaler() if scaled and inside else None
        for i, batch in enumerate(batches(data)):
            torch.manual_seed(i)
            options: dict[str, Any] = {"max_grad_norm": 0.1} if inside else {}
            rose_backward(model, batch["x"], batch["labels"], optimizer, scaler=scales, **options)
            if not inside:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(params, 0.1)
            if scales is None:
                optimizer.step()
            else:
                scales.step(optimizer)
                scales.update()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    (model, optimizer), (other, other_optimizer) = runs
    assert_same_training(optimizer, model.parameters(), other_optimizer, other.parameters())
