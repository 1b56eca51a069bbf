"""How a batch becomes a step: the recipe behind every method, and the settings it reads.

A recipe owns its optimizer and says how gradients are made; the loop of `train.train` knows none of
them. Others than these few, from the paper's comparison, are in the repository's
`benchmarks/paper/methods.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rose_ops import RoseFusedAdamW, rose_param_groups
from rose_ops.finetune.classifier import Encoded
from rose_ops.finetune.runtime import Runtime
from rose_ops.losses import RoseLosses, rose_backward


@dataclass(frozen=True)
class Settings:
    """Hyperparameters that every method of a run shares; `RoseFusedAdamW` explains its own."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    max_grad_norm: float
    r_drop: float
    upper: float | tuple[float, float]
    lower: float | tuple[float, float]
    gamma: float
    granularity: Literal["element", "tensor"]
    selection: Literal["exact", "bracket", "approx"]
    inactive: Literal["update", "rank"]
    selective: Literal["all", "encoder-weights"]
    selection_warmup_steps: int
    backend: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_placement: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Context:
    """What a recipe may look at besides the model.

    Attributes:
        method: The method that the recipe belongs to.
        settings: Of the run.
        data: The training examples.
        runtime: Device and precision.
        seed: For what a recipe draws by itself.
    """

    method: "Method"
    settings: Settings
    data: Encoded | None
    runtime: Runtime
    seed: int


class Recipe:
    """ROSE, AdamW and R-Drop: `rose_backward`, then the optimizer's step.

    Gradients are clipped to `max_grad_norm` inside the step where the optimizer can do that. With
    `eps_placement="before"`, `eps` is added before the bias correction of the second moment, as in the
    authors' optimizer: `m / (sqrt(v) + eps)` times `sqrt(1 - beta2^t) / (1 - beta1^t)` is
    `mhat / (sqrt(vhat) + eps_t)` with `eps_t = eps / sqrt(1 - beta2^t)`, so `eps` is set to that before
    every step.

    Attributes:
        forwards: Forward passes (each with a backward) of one step, for an estimate of its cost.
    """

    forwards = 1.0

    def __init__(self, model: nn.Module, context: Context) -> None:
        self.model, self.context, self.settings = model, context, context.settings
        self.optimizer = make_optimizer(model, context.method, context.settings)
        self._step = 0

    def backward(self, inputs: Mapping[str, Tensor], labels: Tensor) -> RoseLosses:
        """Leave the gradient to update with in `.grad`, and the masks of the step in the optimizer."""
        is_rose = isinstance(self.optimizer, RoseFusedAdamW)
        return rose_backward(
            self.model,
            inputs,
            labels,
            self.optimizer,
            r_drop=self.settings.r_drop if self.context.method.r_drop else 0.0,
            max_grad_norm=None if is_rose else self.settings.max_grad_norm,
        )

    def step(self) -> None:
        """Update the model by what `backward` left, and clear the gradients."""
        self._step += 1
        if self.settings.eps_placement == "before":
            for group in self.optimizer.param_groups:
                group["eps"] = self.settings.eps * (1 - group["betas"][1] ** self._step) ** -0.5
        self.optimizer.step()
        self.optimizer.zero_grad()

    def selective(self) -> list[Tensor]:
        """The parameters that ROSE would rank, in the model's order."""
        groups = rose_param_groups(self.model, selective=self.settings.selective)
        chosen = {id(p) for group in groups if group["selective"] for p in group["params"]}
        return [p for p in self.model.parameters() if id(p) in chosen]


class RandomMask(Recipe):
    """A control: a mask of ROSE's size, drawn at random anew for every step.

    Each element (or, at tensor granularity, tensor) is kept with probability `upper - lower`; what
    ROSE's masks leave to plain AdamW is left to it here, too.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        super().__init__(model, context)
        self._generators: dict[torch.device, torch.Generator] = {}

    def step(self) -> None:
        assert isinstance(self.optimizer, RoseFusedAdamW)
        self.optimizer.set_masks(self.draw())
        super().step()

    def draw(self) -> dict[Tensor, Tensor]:
        """A mask for each selective parameter."""
        ends = (self.settings.upper, self.settings.lower)
        upper, lower = (x[1] if isinstance(x, tuple) else x for x in ends)  # of second order
        kept = upper - lower
        whole = self.settings.granularity == "tensor"
        return {p: self._uniform(p, () if whole else p.shape) < kept for p in self.selective()}

    def _uniform(self, p: Tensor, shape: tuple[int, ...]) -> Tensor:
        if p.device not in self._generators:  # of their own: dropout stays as in other methods
            self._generators[p.device] = torch.Generator(p.device).manual_seed(self.context.seed)
        return torch.rand(shape, device=p.device, generator=self._generators[p.device])


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        order: Of the masks of `RoseFusedAdamW`; None is plain AdamW.
        r_drop: Whether the KL of two passes is in the loss.
        recipe: What it does with a batch.
        options: Of the recipe.
    """

    order: Literal["first", "second", "ensemble"] | None
    r_drop: bool = False
    recipe: type[Recipe] = Recipe
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forwards(self) -> float:
        """Forward and backward passes of one step, for an estimate of its cost."""
        return self.recipe.forwards * (2.0 if self.r_drop or self.order in ("first", "ensemble") else 1)


METHODS = {
    "adamw": Method(None),
    "first": Method("first"),
    "second": Method("second"),
    "ensemble": Method("ensemble"),
    "rdrop": Method(None, r_drop=True),
    "rdrop-first": Method("first", r_drop=True),
    "rdrop-second": Method("second", r_drop=True),
    "rdrop-ensemble": Method("ensemble", r_drop=True),
    "random": Method("second", recipe=RandomMask),
}


def make_optimizer(model: nn.Module, method: Method, settings: Settings) -> torch.optim.Optimizer:
    """`RoseFusedAdamW`, or the AdamW it is compared with; no weight decay on biases and norms."""
    groups = rose_param_groups(model, settings.weight_decay, selective=settings.selective)
    common: dict[str, Any] = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    if method.order is None:
        for group in groups:
            group.pop("selective", None)
        return torch.optim.AdamW(groups, fused=True, **common)
    return RoseFusedAdamW(
        groups,
        order=method.order,
        upper=settings.upper,
        lower=settings.lower,
        gamma=settings.gamma,
        granularity=settings.granularity,
        selection=settings.selection,
        inactive=settings.inactive,
        selection_warmup_steps=settings.selection_warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        backend=settings.backend,
        **common,
    )
