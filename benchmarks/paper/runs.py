"""What a run is, the published settings, and the list of runs in the order of their use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args, get_type_hints

import torch

from benchmarks.paper.methods import METHODS, InvertedMask, has_granularity
from rose_ops import RoseFusedAdamW
from rose_ops.finetune import UserError
from rose_ops.finetune.models import MODELS
from rose_ops.finetune.presets import PUBLISHED
from rose_ops.finetune.recipes import Settings


@dataclass(frozen=True)
class Run:
    """One fine-tuning run: everything that its result depends on but the software and the machine.

    The defaults are those of the small study; see `published` for the authors'.

    Attributes:
        method: One of `methods.METHODS`.
        task, model: `rose_ops.finetune.data.GLUE` and `models.MODELS`.
        granularity: Of the masks; `"none"` for methods without.
        seed: Of classifier, order of examples, dropout and drawn masks.
        preset: Which table the settings came from.
        eval_every: Steps between evaluations.
        perturbed: How many perturbed examples of each kind are evaluated, at most.

    The others are as in `rose_ops.finetune.recipes.Settings`.
    """

    method: str
    task: str
    model: str = "minilm"
    granularity: Literal["element", "tensor", "none"] = "element"
    seed: int = 0
    preset: str = "small"
    lr: float = 1e-4
    upper: float = 0.6
    lower: float = 0.0
    gamma: float = 0.5
    r_drop: float = 0.25
    batch_size: int = 32
    max_length: int = 128
    steps: int = 150
    warmup: float = 0.0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    eps_placement: Literal["after", "before"] = "after"
    selective: Literal["all", "encoder-weights"] = "encoder-weights"
    inactive: Literal["update", "rank"] = "update"
    selection: Literal["exact", "bracket", "approx"] = "bracket"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_every: int = 25
    perturbed: int = 200

    @property
    def id(self) -> str:
        """Of all the fields: another one for whatever would give another result."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def settings(self) -> Settings:
        """As the training loop takes them."""
        return Settings(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            max_grad_norm=self.max_grad_norm,
            r_drop=self.r_drop,
            upper=self.upper,
            lower=self.lower,
            gamma=self.gamma,
            granularity="tensor" if self.granularity == "tensor" else "element",
            selection=self.selection,
            inactive=self.inactive,
            selective=self.selective,
            selection_warmup_steps=0,
            backend="auto",
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            eps_placement=self.eps_placement,
        )


GRID_LR = tuple(float(f"{i}e-5") for i in range(1, 11))
GRID_UPPER = tuple(i / 10 for i in range(1, 10))
# R-Drop's own code adds 0.7 of the KL summed over the batch and halved, and symmetric_kl is a mean.
R_DROP_PER_EXAMPLE = 0.35
_EPOCHS = 10
TASKS = tuple(PUBLISHED["second"])
"""The tasks of the study: those that settings were published for."""
_AT_LEAST = {
    "steps": 1, "batch_size": 1, "max_length": 3, "eval_every": 1, "perturbed": 1, "lr": 0, "r_drop": 0,
    "warmup": 0, "weight_decay": 0,
}  # fmt: skip
LARGER = ("adamw", "random-mask", "rose-second", "rose-first", "rose-ensemble", "r-drop")


def checked(run: Run) -> Run:
    """`run` itself.

    Raises:
        UserError: A setting is out of its range, and would fail in training or measure nothing.
    """
    for name, low in _AT_LEAST.items():
        if not low <= (value := getattr(run, name)) < math.inf:
            raise UserError(f"{name}={value}: expected a number of at least {low}")
    for name, hint in get_type_hints(Run).items():
        if (allowed := get_args(hint)) and getattr(run, name) not in allowed:
            raise UserError(f"{name}={getattr(run, name)}: expected one of {', '.join(allowed)}")
    if run.warmup >= 1:
        raise UserError(f"warmup={run.warmup}: expected a share of the steps, from 0 to below 1")
    try:  # what the optimizer asks of its settings, whatever the method has of them
        RoseFusedAdamW(
            [torch.zeros(1, requires_grad=True)], lr=run.lr, betas=(run.beta1, run.beta2), eps=run.eps,
            weight_decay=run.weight_decay, max_grad_norm=run.max_grad_norm, order="ensemble",
            upper=run.upper, lower=run.lower, gamma=run.gamma,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"settings of a run: {error}") from error
    if METHODS[run.method].recipe is InvertedMask and run.upper == 1:
        raise UserError(f"upper={run.upper}: {run.method} updates what is above; expected less than 1")
    return run


def published(run: Run, size: Literal["base", "large"], train_size: int) -> Run:
    """`run` with the authors' settings for RoBERTa of a size.

    Tensor granularity on names with "layer" and "weight", betas (0.9, 0.98), eps 1e-8 before the bias
    correction, weight decay 0.01, linear schedule without warm-up, clip 1, batch 32 (RTE 16), length
    128, 10 epochs; lr and upper from the table. Methods that are not ROSE's take the lr, and masks the
    upper, of the second order. (Their fine-tuning baselines were searched, and are not in the table.)

    Args:
        run: Whose method, task, model and seed.
        size: Of the model that the settings were searched with.
        train_size: Number of training examples, for the number of steps.

    Raises:
        UserError: The task is not in the table.
    """
    order = METHODS[run.method].order or "second"
    if run.task not in PUBLISHED[order]:
        raise UserError(
            f"no settings were published for {run.task}; choose from {', '.join(PUBLISHED[order])}"
        )
    lr, upper = PUBLISHED[order][run.task][size == "large"]
    batch_size = 16 if run.task == "rte" else 32
    steps = _EPOCHS * (train_size // batch_size)
    return replace(
        run,
        preset=f"published-{size}",
        granularity="tensor" if has_granularity(run.method) else "none",
        lr=lr,
        upper=upper,
        batch_size=batch_size,
        r_drop=R_DROP_PER_EXAMPLE * batch_size,
        steps=steps,
        eps_placement="before",
        eval_every=max(1, steps // 20),
    )


def small(method: str, task: str, model: str, granularity: str, seed: int) -> Run:
    """A run of the small study.

    `upper` is the published one for RoBERTa-base (CHILD-TUNING_D: 0.3, the largest of its paper's);
    masks that are drawn have the size of the second order's. R-Drop has the weight of its own code. The
    rest is the same for all methods of a task and model.
    """
    order = METHODS[method].order or "second"
    upper = 0.3 if method == "child-tuning-d" else PUBLISHED[order][task][0][1]
    run = Run(method, task, model, upper=upper, seed=seed)
    if task == "rte":
        run = replace(run, batch_size=16)
    if task in ("qnli", "qqp"):
        run = replace(run, eval_every=50)  # its dev set takes as long as that many steps
    if model == "mpnet":
        run = replace(run, lr=5e-5, steps=60, eval_every=20, perturbed=100)
    run = replace(run, r_drop=R_DROP_PER_EXAMPLE * run.batch_size)
    return replace(run, granularity=granularity if has_granularity(method) else "none")


def study(tasks: Iterable[str], seeds: Iterable[int], models: Iterable[str] = MODELS) -> list[Run]:
    """All runs of `make paper`, the most useful first, so that a stop leaves the most useful part.

    One seed of all methods on the first task, then round by round another seed of it and the first of
    the next task and model. MPNet is run with fewer methods, at the authors' granularity, for three
    seeds, on SST-2 and RTE. Models that are none of `models.MODELS` are treated as MiniLM.
    """
    tasks, seeds, models = list(tasks), list(seeds), list(models)
    found = []
    for i, model in enumerate(models):
        for j, task in enumerate(tasks):
            for k, seed in enumerate(seeds):
                if model == "mpnet" and (k >= 3 or task not in ("sst2", "rte")):
                    continue
                found.append((i + j + k, i, j, k, model, task, seed))
    runs = []
    for *_, model, task, seed in sorted(found):
        methods = LARGER if model == "mpnet" else (*LARGER, *METHODS)  # repeats go below
        for granularity in ("tensor",) if model == "mpnet" else ("tensor", "element"):
            runs += [small(method, task, model, granularity, seed) for method in methods]
    return list(dict.fromkeys(runs))
