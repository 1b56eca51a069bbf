"""The methods of the paper's comparison, its controls and its neighbours: each a recipe over one loop.

ROSE, AdamW, R-Drop and the random mask are `rose_ops.finetune`'s own; here are the others. What a
recipe takes besides the settings of the run is in its method's `options`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rose_ops import RoseFusedAdamW, symmetric_kl
from rose_ops.finetune.recipes import Context, Method, RandomMask, Recipe
from rose_ops.finetune.train import batches
from rose_ops.losses import RoseLosses


class FixedRandomMask(RandomMask):
    """A control: one random mask for the whole run, of the size that `RandomMask` draws."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        assert isinstance(self.optimizer, RoseFusedAdamW)
        self.optimizer.set_masks(self.draw(), keep=True)

    def step(self) -> None:
        Recipe.step(self)


class InvertedMask(Recipe):
    """A control: what second-order ROSE with the same `upper` leaves alone is updated, and nothing else
    of what is ranked.

    So a fraction of `1 - upper`, those with the highest risks: `lower=upper, upper=1`. (Elements
    without history are updated in both: without a first step nothing would ever be ranked.)
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        settings = replace(context.settings, lower=context.settings.upper, upper=1.0)
        super().__init__(model, replace(context, settings=settings))


class SmallerRate(Recipe):
    """A control: AdamW with the learning rate times `lr_scale`."""

    def __init__(self, model: nn.Module, context: Context) -> None:
        lr = context.settings.lr * context.method.options["lr_scale"]
        super().__init__(model, replace(context, settings=replace(context.settings, lr=lr)))


class ChildTuning(Recipe):
    """CHILD-TUNING_D: only the parameters with the largest Fisher information are trained.

    Their diagonal empirical Fisher information is the mean, over `fisher_batches` training batches, of
    the squared gradient of the loss before training; the largest `upper` fraction of all ranked
    elements (at tensor granularity, of tensors by their mean) is the mask, for the whole run. As a mask
    of `RoseFusedAdamW` it keeps moments and values of the rest as they are; their code sets gradients
    to zero instead, so that there weight decay still acts on the rest, and it takes all batches of an
    epoch.

    Source: Xu et al., EMNLP 2021.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        assert isinstance(self.optimizer, RoseFusedAdamW)
        self.optimizer.set_masks(self._masks(self._fisher()), keep=True)

    def _fisher(self) -> dict[Tensor, Tensor]:
        data, runtime = self.context.data, self.context.runtime
        assert data is not None
        count = self.context.method.options["fisher_batches"]
        params = self.selective()
        fisher = {p: torch.zeros_like(p) for p in params}
        self.model.train()
        for indices in batches(data.lengths, self.settings.batch_size, count, self.context.seed):
            inputs, labels = data.batch(indices)
            with runtime.autocast():
                loss = F.cross_entropy(self.model(**inputs).logits.float(), labels)
            grads = torch.autograd.grad(loss, params)
            for total, grad in zip(fisher.values(), grads, strict=True):
                total.addcmul_(grad, grad, value=1 / count)
        return fisher

    def _masks(self, fisher: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        upper = self.settings.upper
        kept = upper[1] if isinstance(upper, tuple) else upper
        if self.settings.granularity == "tensor":
            fisher = {p: values.mean() for p, values in fisher.items()}
        every = torch.cat([values.reshape(-1) for values in fisher.values()])
        threshold = every.topk(max(1, round(kept * every.numel()))).values[-1]
        return {p: values >= threshold for p, values in fisher.items()}


@contextmanager
def perturbed(model: nn.Module, delta: Tensor) -> Iterator[None]:
    """Passes inside see `delta` added to the word embeddings, `[batch, length, width]`."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: output + delta)
    try:
        yield
    finally:
        handle.remove()


def embedded(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """An empty tensor of the shape of the inputs' word embeddings."""
    mask = inputs["attention_mask"]
    width = model.get_input_embeddings().weight.shape[1]
    return torch.empty(*mask.shape, width, device=mask.device)


class Smart(Recipe):
    """SMART: smoothness-inducing regularisation, and Bregman proximal point updates with momentum.

    The loss is `ce + smoothness * sKL(f(x), f(x + d)) + proximal * sKL(f(x), f_before(x))`, with sKL
    the symmetric KL divergence (a mean over the batch), d what is added to the word embeddings, and
    `f_before` the exponential average (`momentum`) of earlier weights, in evaluation mode. All other
    passes have dropout. From Gaussian noise of deviation `noise`, d takes one ascent step on sKL, by
    its gradient divided by the largest component of the sentence and times `ascent_rate`, and is cut
    to the box of radius `radius` (in embedding units).

    The authors' code (namisan/mt-dnn, `perturbation.py`) also makes one step, with dropout, and differs
    in this: what it ascends is one-sided, KL(f(x) || f(x + noise)); it divides by the largest component
    of each *token*, so that every token moves as far, where here tokens with small gradients move less;
    it adds the step to the embeddings without the noise, and cuts nothing; and in the loss the
    distribution that each KL is relative to, and the embeddings of the perturbed pass, are constants.

    Source: Jiang et al., ACL 2020, Algorithm 1.
    """

    forwards = 3.3

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self._average = {n: p.detach().clone() for n, p in model.named_parameters()}

    def backward(self, inputs: Mapping[str, Tensor], labels: Tensor) -> RoseLosses:
        options = self.context.method.options
        logits = self.model(**inputs).logits.float()
        ce = F.cross_entropy(logits, labels)
        delta = self._ascend(inputs, logits.detach(), options)
        with perturbed(self.model, delta):
            smooth = symmetric_kl(logits, self.model(**inputs).logits)
        near = symmetric_kl(logits, self._before(inputs))
        loss = ce + options["smoothness"] * smooth + options["proximal"] * near
        loss.backward()
        norm = clip(self.optimizer, self.settings)
        return RoseLosses(loss.detach(), ce.detach(), smooth.detach(), norm)

    def _ascend(
        self, inputs: Mapping[str, Tensor], logits: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        delta = embedded(self.model, inputs).normal_() * options["noise"] * mask
        delta.requires_grad_()
        with perturbed(self.model, delta):
            kl = symmetric_kl(logits, self.model(**inputs).logits)
        (grad,) = torch.autograd.grad(kl, delta)
        length = grad.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        moved = delta.detach() + options["ascent_rate"] * grad / length
        return moved.clamp(-options["radius"], options["radius"]) * mask

    @torch.no_grad()
    def _before(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.model.eval()
        output = torch.func.functional_call(self.model, self._average, args=(), kwargs=dict(inputs))
        self.model.train()
        return output.logits

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        current = [p.detach() for p in self.model.parameters()]
        weight = 1 - self.context.method.options["momentum"]
        torch._foreach_lerp_(list(self._average.values()), current, weight)


class FreeLB(Recipe):
    """FreeLB: the gradient is the mean over the steps of an ascent on the word embeddings.

    The perturbation d begins uniform, of length about `magnitude` per sentence, and takes
    `ascent_steps - 1` normalised steps of length `ascent_rate` (per sentence, L2); the same gradients
    are accumulated for the parameters, with one dropout mask for all ascent steps. There is no
    projection (their `adv_max_norm` of 0).

    Source: Zhu et al., ICLR 2020, Algorithm 1.
    """

    forwards = 2.0

    def backward(self, inputs: Mapping[str, Tensor], labels: Tensor) -> RoseLosses:
        options = self.context.method.options
        count = options["ascent_steps"]
        mask = inputs["attention_mask"].unsqueeze(-1)
        delta = embedded(self.model, inputs).uniform_(-1, 1) * mask
        delta *= options["magnitude"] / (mask.sum(1, keepdim=True) * delta.shape[2]).sqrt()
        mean = torch.zeros((), device=delta.device)
        devices = [delta.device] if delta.device.type == "cuda" else []
        for i in range(count):
            delta.requires_grad_()
            # Dropout is the same in every pass: random numbers move on in the last one only.
            repeat = torch.random.fork_rng(devices) if i < count - 1 else nullcontext()
            with repeat, perturbed(self.model, delta):
                loss = F.cross_entropy(self.model(**inputs).logits.float(), labels) / count
            loss.backward()
            assert delta.grad is not None
            norm = delta.grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1)
            delta = delta.detach() + options["ascent_rate"] * delta.grad / norm
            mean += loss.detach()
        return RoseLosses(mean, mean, None, clip(self.optimizer, self.settings))


def clip(optimizer: torch.optim.Optimizer, settings: Any) -> Tensor:
    """Clip the gradients of all parameters together; returns their norm before."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm)


class SkipUpdate(Recipe):
    """SkipUpdate: AdamW with dense moments, of whose update random blocks are left out.

    A block is a tensor of the ranked ones; it is updated with probability `survival`, by the update
    (weight decay included) divided by `survival`, so that its mean stays. Other parameters are plain
    AdamW's. The paper's base optimizer is RMSProp and Adam; the division follows secondary
    descriptions of it.

    Source: Joo et al., arXiv 2602.15322.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self._blocks = self.selective()
        self._generator = torch.Generator().manual_seed(context.seed)

    @torch.no_grad()
    def step(self) -> None:
        before = [p.detach().clone() for p in self._blocks]
        survival = self.context.method.options["survival"]
        kept = (torch.rand(len(before), generator=self._generator) < survival).tolist()
        grads = [p.grad for p in self._blocks]
        super().step()
        factors = self._factors(kept, grads)
        for p, old, factor in zip(self._blocks, before, factors, strict=True):
            p.copy_(torch.lerp(old, p, factor) if factor else old)

    def _factors(self, kept: list[bool], grads: list[Tensor | None]) -> list[float]:
        return [float(k) / self.context.method.options["survival"] for k in kept]


class Magma(SkipUpdate):
    """Magma: SkipUpdate whose surviving updates are scaled by how well momentum and gradient agree.

    The update of a surviving block is multiplied by `s_t = smoothing * s_(t-1) + (1 - smoothing) *
    sigmoid(cos(m_t, g_t) / temperature)`, with m_t AdamW's first moment after the step and no division
    by the survival probability. `s_0 = 0.5`, the score of a gradient across the momentum, is ours.

    Source: Joo et al., arXiv 2602.15322.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self._scores = torch.full((len(self._blocks),), 0.5)

    def _factors(self, kept: list[bool], grads: list[Tensor | None]) -> list[float]:
        options = self.context.method.options
        moments = [self.optimizer.state[p]["exp_avg"] for p in self._blocks]
        cosines = [
            F.cosine_similarity(m.flatten(), g.flatten(), dim=0) if g is not None else m.new_zeros(())
            for m, g in zip(moments, grads, strict=True)
        ]
        found = torch.sigmoid(torch.stack(cosines).cpu() / options["temperature"])
        self._scores.lerp_(found, 1 - options["smoothing"])
        return (self._scores * torch.tensor(kept)).tolist()


_SMART = {
    "smoothness": 1.0, "proximal": 1.0, "noise": 1e-5, "ascent_rate": 1e-3, "radius": 1e-3,
    "momentum": 0.99,
}  # fmt: skip
_FREELB = {"ascent_steps": 2, "ascent_rate": 0.1, "magnitude": 0.1}
_MAGMA = {"survival": 0.5, "temperature": 2.0, "smoothing": 0.9}

METHODS: dict[str, Method] = {
    "adamw": Method(None),
    "r-drop": Method(None, r_drop=True),
    "child-tuning-d": Method("second", recipe=ChildTuning, options={"fisher_batches": 25}),
    "smart": Method(None, recipe=Smart, options=_SMART),
    "freelb": Method(None, recipe=FreeLB, options=_FREELB),
    "rose-first": Method("first"),
    "rose-second": Method("second"),
    "rose-ensemble": Method("ensemble"),
    "r-drop+rose-first": Method("first", r_drop=True),
    "r-drop+rose-second": Method("second", r_drop=True),
    "r-drop+rose-ensemble": Method("ensemble", r_drop=True),
    "random-mask": Method("second", recipe=RandomMask),
    "fixed-random-mask": Method("second", recipe=FixedRandomMask),
    "inverted-mask": Method("second", recipe=InvertedMask),
    "adamw-small-lr": Method(None, recipe=SmallerRate, options={"lr_scale": 0.3}),
    "skipupdate": Method(None, recipe=SkipUpdate, options={"survival": 0.5}),
    "magma": Method(None, recipe=Magma, options=_MAGMA),
}
CONTROLS = ("random-mask", "fixed-random-mask", "inverted-mask", "adamw-small-lr")
NEIGHBOURS = ("skipupdate", "magma")


def has_setting(name: str, setting: str) -> bool:
    """Whether a method has a use for a setting of runs: without, its results are the same for all."""
    method = METHODS[name]
    if setting in ("upper", "granularity"):
        return method.order is not None
    if setting == "lower":  # masks that are drawn, or made once, have an upper only
        return method.order is not None and method.recipe is Recipe
    if setting == "gamma":
        return method.order == "ensemble"
    return method.r_drop if setting == "r_drop" else True


def has_granularity(name: str) -> bool:
    """Whether a method's masks are of elements or of tensors; if not, it is run once for both."""
    return METHODS[name].order is not None
