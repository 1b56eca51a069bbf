"""What the optimizer promises where other software drives it: see STACKS.md, which lists these tests.

Nearly all of them train twice, once under the other software and once in a plain loop, and compare
parameters and state bit for bit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context
from stacks_support import (
    BATCH,
    EPOCHS,
    OPTIONS,
    STEPS,
    assert_same_models,
    batches,
    classifier,
    optimizer_of,
    package,
    plain_loop,
    train_ddp,
)
from stacks_support import accelerator as accelerator
from stacks_support import data as data
from stacks_support import seed as seed
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, SequentialSampler
from training import assert_same_training
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, rose_backward

TABLE = Path(__file__).with_name("STACKS.md")


# ------------------------------------------------------------------------------------- the table


def test_every_row_names_a_test_and_every_test_has_a_row(request):
    rows = [r for r in TABLE.read_text(encoding="utf-8").splitlines() if r.startswith("| ")][2:]
    named = [re.findall(r"`(test_\w+\.py::\w+)`", row) for row in rows]
    assert all(named)
    wanted = set().union(*named)
    found = names(item.nodeid for item in request.session.items)
    if others := {name.partition("::")[0] for name in wanted - found}:  # where only some files are run
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
            + [f"{TABLE.parent.name}/{name}" for name in sorted(others)],
            cwd=TABLE.parents[1], capture_output=True, text=True,
            env={**os.environ, "ROSE_TEST_ALL": "1"},
        )  # fmt: skip
        found |= names(line for line in done.stdout.splitlines() if "::" in line)
        assert wanted <= found, done.stdout + done.stderr
    here = {name for name in found if name.startswith("test_stacks")}
    assert {name.partition("::")[2] for name in here - wanted} == {request.node.name}


def names(ids: Iterable[str]) -> set[str]:
    """Files and functions of tests, without folders and parameters."""
    return {i.partition("[")[0].rpartition("/")[2] for i in ids}


# -------------------------------------------------------------------------- Hugging Face Trainer


def hugging_face(folder: Path, model: nn.Module, data, arguments: dict[str, Any], **options: Any):
    """A Trainer that takes the examples in order and saves nothing, unless it is told to."""
    transformers = package("transformers")
    package("accelerate")
    base, shuffles = options.pop("base", transformers.Trainer), options.pop("shuffles", False)

    class Trainer(base):
        def _get_train_sampler(self, *given):
            return super()._get_train_sampler(*given) if shuffles else SequentialSampler(data)

    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, use_cpu=True,
        learning_rate=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"], report_to=[],
        disable_tqdm=True, logging_strategy="no", **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, **options)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_trainer_is_the_plain_loop(data, seed, tmp_path, accumulate):
    """With its default clipping and schedule."""
    model, other = classifier(seed), classifier(seed)
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    hugging_face(
        tmp_path, model, data, {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.1},
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    steps = STEPS // accumulate
    schedule = lr_scheduler.LambdaLR(other_optimizer, lambda step: (steps - step) / steps)
    plain_loop(
        other, other_optimizer, batches(data), clip=0.1, accumulate=accumulate, each_step=schedule.step
    )
    assert_same_models(model, optimizer, other, other_optimizer)


def test_trainer_makes_the_optimizer(data, seed, tmp_path):
    """As it makes others: with groups of its own."""
    model, other = classifier(seed), classifier(seed)
    how = (RoseFusedAdamW, {"lr": OPTIONS["lr"], "upper": OPTIONS["upper"]})
    arguments = {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    trainer = hugging_face(tmp_path, model, data, arguments, optimizer_cls_and_kwargs=how)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert [g["weight_decay"] for g in optimizer.param_groups] == [OPTIONS["weight_decay"], 0]
    other_optimizer = optimizer_of(other)
    plain_loop(other, other_optimizer, batches(data))
    assert_same_models(model, optimizer, other, other_optimizer)


@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_trainer_resumes_bit_for_bit(data, seed, tmp_path, order):
    """From a checkpoint that the interrupted run has gone past; with dropout and shuffled data."""
    transformers = package("transformers")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 7

    class Rose(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            labels = inputs.pop("labels")
            return rose_backward(model, inputs, labels, self.optimizer.optimizer).loss

    def run(folder: str, resume: str | None = None, **options: Any):
        model = classifier(seed, dropout=0.2)
        optimizer = optimizer_of(model, order=order)
        trainer = hugging_face(
            tmp_path / folder, model, data,
            {"save_strategy": "steps", "save_steps": 4, "seed": seed}, shuffles=True,
            optimizers=(optimizer, None), base=transformers.Trainer if order == "second" else Rose,
            **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, optimizer

    whole = run("whole")
    run("parts", callbacks=[Stop()])
    assert_same_models(*whole, *run("parts", resume=str(tmp_path / "parts" / "checkpoint-4")))


# ------------------------------------------------------------------------------------- accelerate


def test_accelerate(accelerator, data, seed, tmp_path):
    """prepare, accumulate, clip_grad_norm_; save_state and load_state in the middle."""
    other = classifier(seed)
    other_optimizer = optimizer_of(other)
    steps = STEPS // 2
    schedule = lr_scheduler.OneCycleLR(other_optimizer, 0.05, total_steps=steps + 1)
    plain_loop(other, other_optimizer, batches(data), clip=0.1, accumulate=2, each_step=schedule.step)

    def prepared():
        made = accelerator(gradient_accumulation_steps=2)
        model = classifier(seed)
        optimizer = optimizer_of(model)
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps + 1)
        loader = DataLoader(data, batch_size=BATCH)
        return made, optimizer, *made.prepare(model, optimizer, schedule, loader)

    def epoch(made, _, model, optimizer, schedule, loader) -> None:
        for batch in loader:
            with made.accumulate(model):
                made.backward(model(**batch)["loss"])
                if made.sync_gradients:
                    made.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    first = prepared()
    epoch(*first)
    first[0].save_state(tmp_path)
    epoch(*first)
    second = prepared()
    second[0].load_state(tmp_path)
    epoch(*second)
    for _, optimizer, model, *_ in (first, second):
        assert_same_models(model, optimizer, other, other_optimizer)


# -------------------------------------------------------------------------------------- Lightning


@pytest.mark.filterwarnings("ignore")  # of loaders without workers, and of Lightning's own imports
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_lightning(data, seed, tmp_path, automatic):
    """In automatic optimization with gradient_clip_val."""
    lightning = package("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier(seed)
            self.automatic_optimization = automatic

        def training_step(self, batch, _):
            loss = self.model(**batch)["loss"]
            if automatic:
                return loss
            optimizer = self.optimizers()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
            return None

        def configure_optimizers(self):
            self.optimizer = RoseFusedAdamW(self.model.parameters(), **OPTIONS)
            return self.optimizer

    def fit(module, epochs: int, **options: Any):
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            gradient_clip_val=0.1 if automatic else None,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=BATCH), **options)
        return trainer

    other = classifier(seed)
    # One group: Lightning clips in the order of groups, and a sum in another order is another.
    other_optimizer = RoseFusedAdamW(other.parameters(), **OPTIONS)
    plain_loop(other, other_optimizer, batches(data), clip=0.1)
    fit(module := Module(), EPOCHS)
    assert_same_models(module.model, module.optimizer, other, other_optimizer)
    fit(Module(), 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(module := Module(), EPOCHS, ckpt_path=tmp_path / "half.ckpt")
    assert_same_models(module.model, module.optimizer, other, other_optimizer)


# ------------------------------------------------------------------------------------ PEFT: LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora(data, seed, dtype):
    """Adapters are trained and ranked, as if the frozen base were not there, whatever its dtype."""
    peft = package("peft")

    def adapted(parameters):
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            classifier(seed).to(dtype), peft.LoraConfig(r=4, target_modules=["first", "last"])
        )
        optimizer = RoseFusedAdamW(parameters(model), **OPTIONS)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        plain_loop(model, optimizer, batches(data))
        for name, p in model.named_parameters():
            assert p.dtype == (torch.float32 if "lora_" in name else dtype)
            assert torch.equal(p, before[name]) == ("lora_" not in name), name
        return model, optimizer

    model, optimizer = adapted(lambda model: model.parameters())
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(adapters)
    assert optimizer.selection["second"].ranked <= sum(p.numel() for p in adapters)
    others = adapted(lambda model: [p for p in model.parameters() if p.requires_grad])
    assert_same_models(model, optimizer, *others)


# ---------------------------------------------------------------------------- several processes


def test_ddp_is_one_process(data, seed, tmp_path):
    """Second order: two processes with half a batch each have what one has from the mean gradient."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    context()  # whose server it takes
    given = 2, str(tmp_path), seed, data
    torch.multiprocessing.start_processes(train_ddp, given, nprocs=2, start_method="forkserver")
    model = classifier(seed)
    optimizer = optimizer_of(model)
    for batch in batches(data):
        for rank in range(2):
            half = {key: value[rank::2] for key, value in batch.items()}
            (model(**half)["loss"] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        weights, state = torch.load(tmp_path / f"{rank}.pt")
        (other := classifier(seed)).load_state_dict(weights)
        (other_optimizer := optimizer_of(other)).load_state_dict(state)
        assert_same_training(optimizer, model.parameters(), other_optimizer, other.parameters())
