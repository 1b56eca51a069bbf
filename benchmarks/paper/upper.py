"""`python -m benchmarks.paper upper`: is there a rule for `upper` that needs no search?

A rule reads `upper` off the distribution of the risks in the first steps of plain AdamW, which costs a
tenth of a training. It is compared with a search: one training for each `upper` of a grid, of which the
one with the best validation value (the mean of clean and perturbed accuracy, as in `python -m rose_ops
tune`) is taken. And with what looks at nothing: 0.6 whatever the risks are, and 1, which is AdamW.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.paper import rows
from benchmarks.paper.analyses import Place, add_arguments, analysis_id, runs_of
from benchmarks.paper.arguments import at_least, share
from benchmarks.paper.runs import Run
from benchmarks.paper.train import splits
from benchmarks.paper.vocabulary import prune
from rose_ops import RoseFusedAdamW
from rose_ops.finetune import UserError
from rose_ops.finetune.classifier import load_model
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.perturb import PERTURBATIONS, perturb
from rose_ops.finetune.recipes import Context, Method, Recipe
from rose_ops.finetune.train import train

RISKS, TRIALS = "risks", "uppers"
RISK_COLUMNS = ("step", "rule", "upper", "ranked")
TRIAL_COLUMNS = ("split", "accuracy", "n")
VALIDATION = "validation"
FIXED = 0.6
ROUNDED_TO = 0.05
# What tells trainings apart besides upper: of each there is a search of its own.
MEASURED_WITH = ("preset", "steps", "lr", "used_precision", "options")
_TRIMMED = 0.99  # the largest risks are divisions by almost nothing
_SAMPLE = 1 << 20


def below_one(risks: np.ndarray[Any, Any]) -> float:
    """Share of the risks below 1: where `(1 - beta1) |g| / |m|` is between 0 and 2."""
    return float(np.mean(risks < 1))


def below_mean(risks: np.ndarray[Any, Any]) -> float:
    """Share of the risks below their mean, the largest 1% left out of it."""
    return float(np.mean(risks < np.mean(risks[: math.ceil(_TRIMMED * len(risks))])))


def elbow(risks: np.ndarray[Any, Any]) -> float:
    """Where the sorted risks begin to rise steeply: the point farthest below the line from the lowest
    to the 99th percentile (Satopaa et al., 2011, without smoothing)."""
    trimmed = risks[: math.ceil(_TRIMMED * len(risks))]
    span = trimmed[-1] - trimmed[0]
    if span == 0:
        return 1.0  # all alike: none is riskier than another
    share = np.arange(1, len(trimmed) + 1) / len(trimmed)
    return float(_TRIMMED * share[np.argmax(share - (trimmed - trimmed[0]) / span)])


RULES: Mapping[str, Callable[[np.ndarray[Any, Any]], float]] = {
    "below one": below_one,
    "below mean": below_mean,
    "elbow": elbow,
}
"""Rules for second-order risks: from all of them, sorted, to the share that is kept."""


class Observed(Recipe):
    """AdamW that hands the second-order risks of each step, sorted, to `options["observe"]`.

    Of what second-order ROSE ranks: `r = |(1 - beta1) |g| / |m| - 1|` (Eq. 4) with g clipped and m not
    zero; at tensor granularity with norms. Of more than a million elements a random million.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        settings = replace(context.settings, upper=1.0, lower=0.0)  # that is AdamW
        super().__init__(model, replace(context, settings=settings))
        assert isinstance(self.optimizer, RoseFusedAdamW)
        self._generator = torch.Generator().manual_seed(context.seed)
        self._steps = 0

    def step(self) -> None:
        risks = [x for p in self.selective() for x in self._risks(p)]
        if risks:
            every = torch.cat(risks).cpu()
            if len(every) > _SAMPLE:
                every = every[torch.randint(len(every), (_SAMPLE,), generator=self._generator)]
            self.context.method.options["observe"](self._steps, np.sort(every.numpy()))
        self._steps += 1
        super().step()

    def _risks(self, p: Tensor) -> Iterator[Tensor]:
        moment = self.optimizer.state.get(p, {}).get("exp_avg")
        if p.grad is None or moment is None:
            return
        beta1 = self.settings.betas[0]
        g, m = self._clip() * p.grad.float().abs(), moment.float().abs()
        if self.settings.granularity == "tensor":
            g, m = g.norm(), m.norm()
        ranked = m != 0
        yield ((1 - beta1) * g[ranked] / m[ranked] - 1).abs().reshape(-1)

    def _clip(self) -> float:
        """What `max_grad_norm` will multiply the gradients of this step by."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item()
        return min(1.0, self.settings.max_grad_norm / (norm + 1e-6))


def add_arguments_of_upper(parser: argparse.ArgumentParser) -> None:
    """The options of `upper`."""
    add_arguments(parser, ["rose-second"])
    parser.set_defaults(seeds=[0, 1, 2])
    parser.add_argument("--grid", type=share, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument(
        "--look",
        type=at_least(2),
        help="steps of AdamW whose risks a rule sees; default: a tenth of the steps",
    )
    parser.add_argument("--examples", type=at_least(1), default=500, help="of the validation split")


def upper(args: argparse.Namespace) -> None:
    """Look at the risks, then train with each upper of the grid, of the rules and of the controls.

    Raises:
        UserError: A method without second-order masks, or fewer steps than are to be looked at.
    """
    place = Place.of(args)
    for run in runs_of(args):
        if run.method != "rose-second":
            raise UserError(f"the rules are for second-order risks; {run.method} has none to look at")
        look = args.look or max(2, run.steps // 10)
        if look > run.steps:
            raise UserError(f"--look {look}: expected at most the {run.steps} steps of a training")
        options = {"look": look}
        # Not of its upper: that is what is asked for.
        blank = replace(run, upper=1.0)
        if not place.is_done(RISKS, blank, options):
            with place.recording(RISKS, blank, options, RISK_COLUMNS) as found:
                found += _look(place, blank, look)
        for value in sorted({*args.grid, FIXED, 1.0, *_rules_of(place, blank, options)}):
            _try(place, replace(run, upper=value), args.examples)


def rounded(upper: float) -> float:
    """To steps of 0.05, so that rules share trainings; at least 0.05."""
    return round(max(1, round(upper / ROUNDED_TO)) * ROUNDED_TO, 2)


def _rules_of(place: Place, blank: Run, options: Mapping[str, Any]) -> list[float]:
    """What the rules say for a run, from the file."""
    said = rows.read(place.results.folder / f"{RISKS}.csv", ["analysis", *RISK_COLUMNS])
    said = said[said["analysis"] == analysis_id(RISKS, blank, options)]
    return [rounded(x) for x in said.groupby("rule")["upper"].mean()]


class _Enough(Exception):
    """The steps that were to be looked at are over."""


def _look(place: Place, run: Run, look: int) -> list[dict[str, Any]]:
    """What each rule says after each of the first steps, from the second on."""
    found: list[dict[str, Any]] = []

    def observe(step: int, risks: np.ndarray[Any, Any]) -> None:
        found.extend(
            {"step": step + 1, "rule": name, "upper": rule(risks), "ranked": len(risks)}
            for name, rule in RULES.items()
        )

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == look:  # with the learning rates of the whole run until here
            raise _Enough

    task, runtime = place.task(run), place.runtime(run)
    model, encoder = load_model(place.model_folder(run), task, run.max_length, run.seed, runtime)
    encoder = prune(model, encoder, [task.train])
    method = Method("second", recipe=Observed, options={"observe": observe})
    with suppress(_Enough):
        train(model, encoder(task.train), method, run.settings(), runtime, run.seed, on_step)
    return found


def _try(place: Place, run: Run, examples: int) -> None:
    """Train with one upper, and measure on the validation split, perturbed, and on the test splits."""
    options = {"examples": examples}
    if place.is_done(TRIALS, run, options):
        return
    task = place.task(run)
    with place.recording(TRIALS, run, options, TRIAL_COLUMNS) as found:
        tests = {**_validation(task, examples), **splits(task, run.perturbed)}
        trained = place.train(run, task, tests)
        found += [
            {"split": split, "accuracy": scores.accuracy, "n": scores.n}
            for split, scores in trained.scores.items()
        ]


def _validation(task: Task, examples: int) -> dict[str, Examples]:
    clean = task.validation[:examples]
    perturbed = {
        f"{VALIDATION}-{kind}": Examples(perturb(clean.texts, kind), clean.labels)
        for kind in PERTURBATIONS
    }
    return {VALIDATION: clean, **perturbed}


def _sources(look: pd.DataFrame, several: bool) -> list[tuple[str, float, float, float]]:
    """Name, what it said, what it took and what it costs of each rule after one look at the risks."""
    said, steps = look.groupby("rule", sort=False)["upper"].mean(), look["step"].max()
    suffix = f", {steps} steps" if several else ""
    cost = 1 + steps / look["steps"].max()
    return [(f"{rule}{suffix}", x, rounded(x), cost) for rule, x in said.items()]


def choices(risks: pd.DataFrame, trials: pd.DataFrame) -> pd.DataFrame:
    """What each rule, the search and the controls took, and what came of it.

    Args:
        risks: rows of `RISKS` with their entries in `analyses.csv`: what the rules said.
        trials: rows of `TRIALS` with their entries: what was trained.

    Returns:
        One row for each model, granularity, task, seed, setting of `MEASURED_WITH` and ``source`` whose
        training is there: ``said`` (the rule's upper before it is rounded), ``upper``, ``trainings``
        (how many it takes, in full trainings, to use it), ``validation`` (what the search maximises)
        and the accuracies of the test splits. A rule with several looks is a source for each.
    """
    alike = ["model", "granularity", "task", "seed", *(x for x in MEASURED_WITH if x != "options")]
    keys = [*alike, "options"]  # those of a training: a look at the risks has others
    columns = [*keys, "source", "said", "upper", "trainings", "validation", "clean", "adversarial"]
    if trials.empty:
        return pd.DataFrame(columns=columns)
    scores = trials.pivot_table(index=[*keys, "upper"], columns="split", values="accuracy")
    perturbed = [f"{VALIDATION}-{kind}" for kind in PERTURBATIONS]
    scores["validation"] = (scores[VALIDATION] + scores[perturbed].mean(axis=1)) / 2
    found = []
    for key, group in scores.groupby(keys, sort=False):
        by_upper = group.droplevel(keys)
        mine = risks[(risks[alike] == list(key[:-1])).all(axis=1)]
        looks = [look for _, look in mine.groupby("options", sort=False)]
        sources = [x for look in looks for x in _sources(look, len(looks) > 1)]
        sources += [
            ("search", math.nan, by_upper["validation"].idxmax(), len(by_upper)),
            (f"always {FIXED:g}", math.nan, FIXED, 1),
            ("AdamW", math.nan, 1.0, 1),
        ]
        for source, value, taken, cost in sources:
            if taken in by_upper.index:
                row = dict(zip(keys, key, strict=True))
                row |= {"source": source, "said": value, "upper": taken, "trainings": cost}
                found.append(row | by_upper.loc[taken].to_dict())
    return pd.DataFrame(found)
