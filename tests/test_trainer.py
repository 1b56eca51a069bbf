"""RoseTrainer: what the Trainer says is honoured, and what is trained is what a plain loop trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW, rose_accumulate, rose_backward, symmetric_kl, token_kl
from rose_ops.divergence import _TokenKL

transformers = pytest.importorskip("transformers")

from rose_ops.integrations.transformers import (  # noqa: E402
    RoseCallback,
    RoseTrainer,
    _predicts_next_token,
)

SIZE = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
STEPS, BATCH = 3, 4


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZE, num_labels=3))


def sentences(n: int = 22) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(99, (9,), generator=g),
            "labels": torch.randint(3, (), generator=g),
        }
        for _ in range(n)
    ]


def arguments(path: Path, **options: Any) -> Any:
    options = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, **options,
    }  # fmt: skip
    return transformers.TrainingArguments(str(path), **options)


class Recorder(RoseTrainer):
    """Notes what its steps were given, and random numbers before the first one."""

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        if not hasattr(self, "batches"):
            self.batches, self.random = [], torch.get_rng_state()
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, *rest)


def trained(
    path: Path, model: nn.Module, data: Any = None, kind: Any = Recorder, **options: Any
) -> Any:
    own = {k: options.pop(k) for k in ("rose", "r_drop", "compute_loss_func") if k in options}
    data = sentences() if data is None else data
    trainer = kind(model, arguments(path, **options), train_dataset=data, **own)
    trainer.train()
    return trainer


def by_hand(
    trainer: Any, model: nn.Module, weight_decay: float, **options: Any
) -> tuple[RoseFusedAdamW, list[tuple[dict[str, Tensor], Tensor]]]:
    """For a plain loop from where ``trainer`` began: an optimizer of its groups, and its batches."""
    names = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in names) == decays],
         "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
    ]  # fmt: skip
    batches = [
        ({k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
        for batch in trainer.batches
    ]
    model.train()
    torch.set_rng_state(trainer.random)
    return RoseFusedAdamW(groups, lr=1e-2, **options), batches


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def rose_of(trainer: Any) -> RoseFusedAdamW:
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def loss_by_items(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """(Trainer does not divide BERT's own by the number of micro-batches.)"""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("order", "accumulation", "r_drop"),
    [("first", 1, 0.0), ("first", 2, 0.5), ("second", 1, 0.5), ("second", 2, 0.0), ("ensemble", 1, 0.5),
     ("ensemble", 2, 0.5)],
)  # fmt: skip
def test_as_a_plain_loop(tmp_path, order, r_drop, accumulation):
    rose = {"order": order, "upper": 0.7, "lower": 0.1, "granularity": "tensor"}
    model = classifier()
    other = copy.deepcopy(model)
    trainer = trained(
        tmp_path, model, rose=rose, r_drop=r_drop, gradient_accumulation_steps=accumulation,
        max_grad_norm=0.05, weight_decay=0.1, adam_beta2=0.98, lr_scheduler_type="constant",
        compute_loss_func=loss_by_items,
    )  # fmt: skip
    optimizer, batches = by_hand(trainer, other, 0.1, betas=(0.9, 0.98), max_grad_norm=0.05, **rose)
    assert len(batches) == STEPS * accumulation
    for step in range(STEPS):
        part = batches[step * accumulation : (step + 1) * accumulation]
        if accumulation == 1:
            rose_backward(other, *part[0], optimizer, r_drop=r_drop)
        else:
            rose_accumulate(other, part, optimizer, r_drop=r_drop)
        optimizer.step()
        optimizer.zero_grad()
    assert_alike(model, other)
    # Of gradients that nobody has clipped before.
    torch.testing.assert_close(rose_of(trainer).grad_norm, optimizer.grad_norm, rtol=1e-4, atol=0)


def test_arguments_are_honoured(tmp_path):
    trainer = trained(
        tmp_path, classifier(), rose={"selective": "encoder-weights", "seed": 5}, learning_rate=3e-3,
        lr_scheduler_type="constant", adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-6,
        weight_decay=0.2, max_grad_norm=0.7,
    )  # fmt: skip
    optimizer = rose_of(trainer)
    assert isinstance(optimizer, RoseFusedAdamW)
    assert optimizer.settings.max_grad_norm == 0.7
    assert optimizer.settings.seed == 5
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.97), 1e-6)
        for p in group["params"]:
            name = names[id(p)]
            seen.append(name)
            plain = name.endswith("bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if plain else 0.2), name
            assert group.get("selective", True) == ("layer" in name and "weight" in name), name
    assert sorted(seen) == sorted(names.values())
    assert trainer.args.max_grad_norm == 0.7  # whoever takes them again gets what they say


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "max_grad_norm"])
def test_what_arguments_say_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"rose has '{name}', which is for TrainingArguments"):
        RoseTrainer(classifier(), arguments(tmp_path), rose={name: 1})


def test_two_optimizers_are_refused(tmp_path):
    model = classifier()
    own = RoseFusedAdamW(model.parameters())
    with pytest.raises(ValueError, match="both rose and optimizers"):
        RoseTrainer(model, arguments(tmp_path), rose={}, optimizers=(own, None))
    with pytest.raises(ValueError, match="both rose and optimizer_cls_and_kwargs"):
        RoseTrainer(
            model, arguments(tmp_path), rose={}, optimizer_cls_and_kwargs=(RoseFusedAdamW, {"lr": 1.0})
        )
    with pytest.raises(ValueError, match="r_drop=-1"):
        RoseTrainer(model, arguments(tmp_path), r_drop=-1)
    with pytest.raises(ValueError, match="selective='none'"):
        RoseTrainer(model, arguments(tmp_path), rose={"selective": "none"})


def test_an_optimizer_of_ones_own(tmp_path):
    model = classifier()
    own = RoseFusedAdamW(model.parameters(), order="ensemble")
    trainer = RoseTrainer(
        model, arguments(tmp_path, max_grad_norm=0.3), train_dataset=sentences(), optimizers=(own, None)
    )
    trainer.train()
    assert rose_of(trainer) is own
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["rose_first_kept"] > 0 and log["grad_norm"] > 0 for log in logged)


@pytest.mark.parametrize("order", ["first", "second", "ensemble"])
def test_logs(tmp_path, order):
    trainer = trained(tmp_path, classifier(), rose={"order": order, "upper": 0.6})
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == STEPS
    for log in logged:
        for kind in {"first": ["first"], "second": ["second"], "ensemble": ["first", "second"]}[order]:
            assert log[f"rose_{kind}_threshold"] > 0 or log["step"] == 1
            assert 0 <= log[f"rose_{kind}_kept"] <= 1
        assert 0 < log["rose_updated"] <= sum(p.numel() for p in trainer.model.parameters())
        assert log["rose_nonfinite"] == log["rose_misses"] == 0
        assert log["grad_norm"] > 0
        assert ("rose_kl" in log) == (order != "second")
        assert log.get("rose_kl", 1) > 0


@pytest.mark.parametrize("put", ["in callbacks", "in front"])
def test_callback_of_a_plain_trainer(tmp_path, put):
    model, seen = classifier(), []

    class Reports(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **rest: Any) -> None:
            seen.append(dict(logs))

    callbacks = [Reports(), RoseCallback()] if put == "in callbacks" else [Reports()]
    trainer = transformers.Trainer(
        model, arguments(tmp_path, max_grad_norm=0), train_dataset=sentences(), callbacks=callbacks,
        optimizers=(RoseFusedAdamW(model.parameters(), max_grad_norm=1.0), None),
    )  # fmt: skip
    if put == "in front":
        RoseCallback.add_to(trainer)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == STEPS
    assert all(log["rose_second_kept"] <= 1 and log["rose_updated"] > 0 for log in logged)
    reported = [log for log in seen if "loss" in log]
    assert all(("rose_updated" in log) == (put == "in front") for log in reported)


def test_label_smoothing_and_losses_of_ones_own(tmp_path):
    """Both passes go through the Trainer's own loss."""
    calls = []

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        calls.append(num_items_in_batch)
        return F.cross_entropy(outputs.logits, labels)

    trained(tmp_path, classifier(), rose={"order": "ensemble"}, compute_loss_func=loss_of)
    assert len(calls) == 2 * STEPS
    smooth = trained(
        tmp_path, classifier(), rose={"order": "ensemble"}, label_smoothing_factor=0.5
    ).state.log_history[0]["loss"]
    sharp = trained(tmp_path, classifier(), rose={"order": "ensemble"}).state.log_history[0]["loss"]
    assert smooth != sharp


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_tokens(tmp_path, kind):
    """Token classification and causal language models, of which some tokens do not count."""
    torch.manual_seed(0)
    if kind.startswith("Bert"):
        model = getattr(transformers, kind)(transformers.BertConfig(**SIZE, num_labels=5))
    elif kind.startswith("GPT2"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=99, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZE, num_key_value_heads=2, attention_dropout=0.1)
        )
    data = []
    for _ in range(24):
        ids = torch.randint(99, (9,))
        labels = ids % 5 if kind.startswith("Bert") else ids.clone()
        labels[6:] = -100
        data.append({"input_ids": ids, "labels": labels})
    trainer = trained(tmp_path, model, data, rose={"order": "ensemble"}, gradient_accumulation_steps=2)
    logged = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == STEPS
    assert all(log["rose_kl"] > 0 for log in logged)


def test_rows_of_next_tokens(tmp_path):
    """A position counts if the next one has a label."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    trainer = RoseTrainer(model, arguments(tmp_path))
    p, q = torch.randn(2, 2, 4, 9)
    labels = torch.tensor([[-100, -100, 1, 2], [3, 4, -100, -100]])
    kl, count = trainer._divergence(model, p, q, labels)
    rows = [(0, 1), (0, 2), (1, 0)]
    assert count == 3
    expected = sum(symmetric_kl(p[i : i + 1, t], q[i : i + 1, t]) for i, t in rows)
    torch.testing.assert_close(kl, expected)
    with pytest.raises(ValueError, match=r"expected logits \[batch, classes\]"):
        trainer._divergence(model, p, q, labels[0])


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": 9, "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 16, "d_kv": 8}
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    elif kind == "BertLMHeadModel":
        config = transformers.BertConfig(**{**SIZE, "vocab_size": 9}, is_decoder=True)
    elif kind == "BartForCausalLM":
        config = transformers.BartConfig(
            vocab_size=9, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16
        )
    elif kind == "T5ForConditionalGeneration":
        config = transformers.T5Config(**size, decoder_start_token_id=0)
    else:
        config = transformers.XLNetConfig(vocab_size=9, d_model=16, n_layer=1, n_head=2, d_inner=16)
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize(
    "kind",
    ["GPT2LMHeadModel", "BertLMHeadModel", "BartForCausalLM", "XLNetLMHeadModel",
     "T5ForConditionalGeneration"],
)  # fmt: skip
def test_the_kl_is_of_the_rows_that_the_loss_is_of(tmp_path, kind):
    """Some models compare a label with its own position's logits, others with those before it."""
    model = tiny(kind).eval()
    ids = torch.randint(1, 9, (2, 6), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :3] = labels[1, 4:] = -100
    output = model(input_ids=ids, labels=labels)
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    rows = (gradient != 0).any(-1)
    trainer = RoseTrainer(model, arguments(tmp_path))
    p = torch.randn(2, 6, 9)
    for row in torch.ones(2, 6).nonzero().tolist():
        q = p.clone()
        q[tuple(row)] += torch.randn(9)
        kl, count = trainer._divergence(model, p, q, labels)
        assert (kl != 0) == rows[tuple(row)], row
        assert count == rows.sum()


def test_image_text_models_predict_the_next_token():
    class LlavaForConditionalGeneration(nn.Module):
        pass

    model = LlavaForConditionalGeneration()
    assert _predicts_next_token(model)
    model.config = transformers.T5Config()
    assert not _predicts_next_token(model)
    assert not _predicts_next_token(nn.Linear(1, 1))


@pytest.mark.parametrize("order", ["first", "second"])
def test_models_that_return_tuples(tmp_path, order):
    """Behind the loss, as with ``return_dict=False``: the same is trained."""
    models = [classifier() for _ in range(2)]
    models[0].config.return_dict = False
    logs = []
    for model in models:
        transformers.set_seed(0)
        trainer = trained(tmp_path, model, rose={"order": order}, r_drop=0.2)
        logs.append([log["rose_kl"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1]
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_choice_of_nothing_is_refused(tmp_path):
    trainer = RoseTrainer(
        tiny("GPT2LMHeadModel"), arguments(tmp_path), rose={"selective": "encoder-weights"}
    )
    with pytest.raises(ValueError, match="matches no trainable parameter of the model"):
        trainer.create_optimizer()
    assert trainer.optimizer is None


def test_a_subclass_has_the_rows_of_its_model(tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        pass

    size = {"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    p, q = torch.randn(2, 2, 4, 9)
    labels = torch.tensor([[-100, -100, 1, 2], [3, 4, -100, -100]])
    found = [
        RoseTrainer(kind(transformers.GPT2Config(**size)), arguments(tmp_path))
        for kind in (Mine, transformers.GPT2LMHeadModel)
    ]
    mine, theirs = (trainer._divergence(trainer.model, p, q, labels) for trainer in found)
    assert mine == theirs


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_labels_of_one_example(tmp_path, accumulation):
    """The kl is a mean over examples, however many labels these have."""
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZE, num_labels=5, problem_type="multi_label_classification")
    model = transformers.BertForSequenceClassification(config)
    data = [
        {"input_ids": x["input_ids"], "labels": torch.randint(2, (5,)).float()} for x in sentences()
    ]
    seen: list[float] = []

    class Watched(Recorder):
        def _divergence(self, model: Any, first: Tensor, second: Tensor, labels: Any) -> Any:
            seen.append(symmetric_kl(first, second).item())
            return super()._divergence(model, first, second, labels)

    options = {"rose": {"order": "first"}, "gradient_accumulation_steps": accumulation}
    data *= 2  # so that all batches are full
    trainer = trained(tmp_path, model, data, kind=Watched, **options)
    logged = [log["rose_kl"] for log in trainer.state.log_history if "loss" in log]
    means = torch.tensor(seen).view(-1, accumulation).mean(1)
    torch.testing.assert_close(torch.tensor(logged), means, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_of_tokens_in_parts(monkeypatch, dtype):
    monkeypatch.setattr(_TokenKL, "PART", 20)  # two rows
    p, q = (torch.randn(13, 7, dtype=dtype, requires_grad=True) for _ in range(2))
    rows = torch.tensor([0, 3, 4, 7, 12])
    whole = [x.detach().clone().requires_grad_() for x in (p, q)]
    kl = token_kl(p, q, rows)
    expected = symmetric_kl(*(x[rows] for x in whole), reduction="sum")
    torch.testing.assert_close(kl, expected)
    (3 * kl).backward()
    (3 * expected).backward()
    for x, y in zip((p, q), whole, strict=True):
        torch.testing.assert_close(x.grad, y.grad)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda a, b: token_kl(a, b, rows), (p, q))


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    )
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    data = [{"input_ids": (ids := torch.randint(99, (9,))), "labels": ids} for _ in range(24)]
    trainer = trained(tmp_path, model, data, rose={"order": "first"})
    assert all(log["rose_kl"] > 0 for log in trainer.state.log_history if "loss" in log)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_resumed_in_the_middle_of_an_epoch(tmp_path):
    """Bit for bit, with evaluations in between."""
    options: dict[str, Any] = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 1, "gradient_accumulation_steps": 2, "bf16": False,
    }  # fmt: skip
    rose = {"order": "ensemble", "upper": 0.6}

    def run(path: Path, resume: str | None = None) -> Any:
        data = sentences()
        trainer = RoseTrainer(
            classifier(), arguments(path, **options), train_dataset=data, eval_dataset=data[:4],
            rose=rose, r_drop=0.25,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    logs = [
        [log for log in t.state.log_history if log["step"] > 2 and "loss" in log]
        for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]


class Passes(Recorder):
    """Notes how many passes each of its micro-batches took."""

    def training_step(self, *args: Any) -> Tensor:
        if not hasattr(self, "passes"):
            self.passes = []
        self.passes.append(0)
        return super().training_step(*args)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        self.passes[-1] += self.model.training
        return super().compute_loss(*args, **options)


@pytest.mark.parametrize("r_drop", [0.0, 0.5])
def test_first_order_masks_that_are_used_again(tmp_path, r_drop):
    """As a plain loop, within rounding, with one pass where one does."""
    rose = {"order": "ensemble", "upper": 0.7, "granularity": "tensor", "first_order_every": 2}
    model = classifier()
    other = copy.deepcopy(model)
    trainer = trained(
        tmp_path, model, kind=Passes, rose=rose, r_drop=r_drop, gradient_accumulation_steps=2,
        compute_loss_func=loss_by_items, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    assert trainer.passes == ([2, 2, 1, 1, 2, 2] if r_drop == 0 else [2] * 6)
    optimizer, batches = by_hand(trainer, other, 0.0, **rose)
    for step in range(STEPS):
        rose_accumulate(other, batches[2 * step : 2 * step + 2], optimizer, r_drop=r_drop)
        optimizer.step()
        optimizer.zero_grad()
    assert_alike(model, other)
    one, again, last = (log for log in trainer.state.log_history if "loss" in log)
    assert one["rose_first_threshold"] == again["rose_first_threshold"] != last["rose_first_threshold"]
    assert (one["rose_kl"] == again["rose_kl"]) == (r_drop == 0)
    assert again["rose_kl"] != last["rose_kl"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_between_two_first_order_masks(tmp_path, at):
    """Bit for bit: a mask that is used again is in the checkpoint."""
    options: dict[str, Any] = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": at, "gradient_accumulation_steps": 2,
    }  # fmt: skip

    def run(path: Path, resume: str | None = None) -> Any:
        trainer = Passes(
            classifier(), arguments(path, **options), train_dataset=sentences(),
            rose={"order": "ensemble", "first_order_every": 3},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{at}"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert whole.passes == [2, 2, 1, 1, 1, 1, 2, 2, 1, 1]
    assert resumed.passes == whole.passes[2 * at :]


def test_an_error_leaves_nothing_for_the_next_run(tmp_path):
    """Here, between two micro-batches."""
    calls = []

    def loss_of(*args: Any, **options: Any) -> Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return loss_by_items(*args, **options)

    trainer = RoseTrainer(
        classifier(), arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=sentences(),
        rose={"order": "first"}, compute_loss_func=loss_of,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert trainer._step is None
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_without_dropout(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZE,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    with pytest.raises(ValueError, match="identical outputs"):
        trained(
            tmp_path, transformers.BertForSequenceClassification(config), rose={"order": "first"},
        )  # fmt: skip
