"""ROSE in the Hugging Face Trainer: all orders, in one line.

    trainer = RoseTrainer(model, arguments, train_dataset=data, rose={"order": "ensemble"})
    trainer.train()

Second order also works in a plain ``Trainer`` (``optimizers=(RoseFusedAdamW(...), None)``), where
:class:`RoseCallback` adds its statistics to the logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rose_ops.accumulate import Accumulation
from rose_ops.divergence import symmetric_kl, token_kl
from rose_ops.groups import is_encoder_weight
from rose_ops.losses import check_dropout, check_r_drop, logits_in
from rose_ops.optim import RoseFusedAdamW
from rose_ops.settings import choice
from rose_ops.wrappers import unwrap

# Of the language models that take labels and compare each with the logits of the position before it, by
# their classes' names; and which of them compare it with those of its own position.
_LANGUAGE_MODELS = {
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}
_UNSHIFTED = {
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM"),
    *("BlenderbotSmallForCausalLM", "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM"),
    *("MvpForCausalLM", "PLBartForCausalLM", "PegasusForCausalLM", "ProphetNetForCausalLM"),
    *("TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel"),
}
# What TrainingArguments say, and whose word counts.
_OF_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}


class RoseTrainer(Trainer):
    """A ``transformers.Trainer`` that trains with :class:`rose_ops.RoseFusedAdamW`.

    Learning rate, betas, eps, weight decay (not on biases and norms, as in Trainer) and
    ``max_grad_norm`` are those of ``TrainingArguments``; gradients are clipped inside the step. First
    order and the ensemble take two passes over every batch; the kl is that of all logits that have a
    label: of sequences, tokens, or next tokens. With ``gradient_accumulation_steps`` masks come from
    the gradients of all micro-batches, as if they were one batch; one copy of the gradients is kept
    meanwhile. The logs have threshold, kept fraction and so on beside the loss; see :func:`statistics`.

    Args:
        rose: settings of ``RoseFusedAdamW`` (``order``, ``upper``, ``gamma``, ...), and ``selective``:
            which parameters are ranked, as in :func:`rose_ops.rose_param_groups`. With
            ``first_order_every=K`` the two passes are taken in every K-th step only, and those in
            between use its first-order mask again; ``rose_kl`` and ``rose_first_...`` in the logs are
            those of the latest such step.
        r_drop: weight of the kl in the update's loss: R-Drop + ROSE.
        others: as in ``Trainer``. With ``optimizers=``, that optimizer is taken as it is, and ``rose``
            has to be left out.

    Raises:
        ValueError: a setting that ``TrainingArguments`` have, or two optimizers.
    """

    def __init__(
        self, *args: Any, rose: Mapping[str, Any] | None = None, r_drop: float = 0.0, **options: Any
    ) -> None:
        self.r_drop = check_r_drop(r_drop)
        self._rose_settings = dict(rose or {})
        for name in self._rose_settings.keys() & _OF_ARGUMENTS.keys():
            raise ValueError(
                f"rose has {name!r}, which is for TrainingArguments({_OF_ARGUMENTS[name]}=...) to say"
            )
        choice("selective", self._rose_settings.get("selective", "all"), ("all", "encoder-weights"))
        self._step: Accumulation | None = None
        self._kl: Tensor | None = None
        super().__init__(*args, **options)
        if rose is not None and self.optimizer is not None:
            raise ValueError("both rose and optimizers are given; expected one of them")
        if rose is not None and self.optimizer_cls_and_kwargs is not None:
            raise ValueError("both rose and optimizer_cls_and_kwargs are given; expected one of them")

    def create_optimizer(self, *model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, made of ``rose`` unless there is one."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(*model)
        trained: Any = model[0] if model and model[0] is not None else self.model
        decays = set(self.get_decay_parameter_names(trained))
        settings, args = dict(self._rose_settings), self.args
        selects_all = settings.pop("selective", "all") == "all"
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, p in trained.named_parameters():
            if p.requires_grad:
                key = name in decays, selects_all or is_encoder_weight(name)
                groups.setdefault(key, []).append(p)
        if not any(selective for _, selective in groups):
            raise ValueError(
                f"rose has selective={self._rose_settings['selective']!r}, which matches no trainable "
                "parameter of the model, so nothing would be ranked"
            )
        self.optimizer = RoseFusedAdamW(
            [
                {
                    "params": params,
                    "weight_decay": args.weight_decay if decays else 0.0,
                    "selective": selective,
                }
                for (decays, selective), params in groups.items()
            ],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm or None,
            **settings,
        )
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def unless_inside(*args: Any, **options: Any) -> Any:
            rose = unwrap(self.optimizer)
            if rose is not None and rose.settings.max_grad_norm is not None:
                return None  # the step clips, and log() has the norm
            return clip(*args, **options)

        self.accelerator.clip_grad_norm_ = unless_inside

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forwards and backwards of a micro-batch; with the last one, the masks."""
        rose = unwrap(self.optimizer)
        needs_kl = self.r_drop > 0.0 or (rose is not None and rose.needs_first_mask)
        if not needs_kl:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        try:
            return self._two_passes(model, self._prepare_inputs(inputs), num_items_in_batch)
        except BaseException:
            self._step = None
            raise

    def _two_passes(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        if self._step is None:
            self._step, self._kl = Accumulation(model, self.optimizer, r_drop=self.r_drop), None
        step = self._step
        losses, logits = [], []
        for _ in range(2):
            with step.forward(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(
                    model, dict(inputs), return_outputs=True, num_items_in_batch=num_items
                )
            losses.append(loss.mean())  # of several devices
            logits.append(logits_in(output))
        ce = torch.stack(losses).mean()
        micro_batches = self.current_gradient_accumulation_steps
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:  # as in Trainer
            by_items = self.model_accepts_loss_kwargs and num_items is not None
            is_scaled = by_items or self.compute_loss_func is not None
        if not is_scaled:
            ce = ce / micro_batches
        labels = inputs.get("labels")
        kl, count = self._divergence(model, logits[0], logits[1], labels)
        if num_items is not None and logits[0].dim() == 2 and labels is not None and labels.dim() == 2:
            num_items = num_items / labels.shape[1]  # several labels of one example
        kl = kl / (count * micro_batches if num_items is None else num_items)
        if num_items is not None and self.args.average_tokens_across_devices:
            kl = kl * self.accelerator.num_processes  # the items are those of all processes
        check_dropout(model, kl)
        step.backward(ce, kl)
        self._kl = kl.detach() if self._kl is None else self._kl + kl.detach()
        if self.accelerator.sync_gradients:
            step.finish()
            self._step = None
        return (ce + self.r_drop * kl).detach()

    def _divergence(
        self, model: nn.Module, first: Tensor, second: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, int]:
        """The kl of two passes, summed, and of how many outputs it is."""
        if first.dim() == 2:
            return symmetric_kl(first, second, reduction="sum"), len(first)
        if labels is None or first.dim() != 3 or first.shape[:2] != labels.shape:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"logits of shape {tuple(first.shape)} and labels of shape {found}; expected logits "
                "[batch, classes], or [batch, tokens, classes] with labels [batch, tokens]"
            )
        counts = labels != -100
        inner = self.accelerator.unwrap_model(model)
        inner = getattr(inner, "base_model", inner) if hasattr(inner, "peft_config") else inner
        inner = getattr(inner, "model", inner) if hasattr(inner, "peft_config") else inner
        if _predicts_next_token(inner):
            # A position's logits are for the next one's label.
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
        rows = counts.flatten().nonzero().squeeze(1)
        return token_kl(first.flatten(0, 1), second.flatten(0, 1), rows), max(len(rows), 1)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """With the statistics of ROSE where the loss is logged."""
        rose = unwrap(self.optimizer) if self.optimizer is not None else None
        if rose is not None and "loss" in logs:
            logs.update(statistics(rose))
            if self._kl is not None:
                logs["rose_kl"] = self._kl.item()
        super().log(logs, *args, **options)


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether a model compares a position's logits with the next position's label."""
    names = {x.__name__ for x in type(model).__mro__}  # a subclass is one, too
    is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return is_decoder and not names.isdisjoint(_LANGUAGE_MODELS) and names.isdisjoint(_UNSHIFTED)


class RoseCallback(TrainerCallback):
    """Adds :func:`statistics` to what a plain ``Trainer`` logs.

    As one of ``callbacks=[RoseCallback()]`` it comes after those that report to TensorBoard and the
    like: then the log history and the progress have them. ``RoseCallback.add_to(trainer)`` puts it in
    front of all.
    """

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        trainer.callback_handler.callbacks.insert(0, cls())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any
    ) -> None:
        optimizer = rest.get("optimizer")
        rose = None if optimizer is None else unwrap(optimizer)
        if rose is None or logs is None or "loss" not in logs:
            return
        found = statistics(rose)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


def statistics(optimizer: RoseFusedAdamW) -> dict[str, float]:
    """Of the latest step, as numbers, which waits for the device.

    Returns:
        ``rose_first_threshold`` and ``rose_first_kept`` (a fraction of what is ranked), likewise
        second; ``rose_updated`` and ``rose_nonfinite``: elements, of this process; ``rose_misses``:
        thresholds; ``grad_norm``: before clipping, where the optimizer clips.
    """
    found: dict[str, float] = {}
    misses = 0
    latest = optimizer.selection
    for kind, selection in (("first", latest.get("first")), ("second", latest.get("second"))):
        if selection is not None:
            found[f"rose_{kind}_threshold"] = selection.threshold.item()
            found[f"rose_{kind}_kept"] = selection.kept.item() / max(selection.ranked.item(), 1)
            misses += int(selection.misses)
    if "update" in latest:
        found["rose_updated"] = latest["update"].updated.item()
        found["rose_nonfinite"] = latest["update"].nonfinite.item()
    if found:
        found["rose_misses"] = misses
    if optimizer.grad_norm is not None:
        found["grad_norm"] = optimizer.grad_norm.item()
    return found
