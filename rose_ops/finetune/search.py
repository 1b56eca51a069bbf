"""Trials of settings: one training each, in a study that survives a stop."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rose_ops.finetune import UserError, require
from rose_ops.finetune.classifier import correct, load_model
from rose_ops.finetune.data import Examples, Task
from rose_ops.finetune.recipes import Method, Settings
from rose_ops.finetune.run import progress
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.train import train

Choice = dict[str, float]  # lr, upper and, for an ensemble, gamma
Scores = dict[str, float]  # accuracy by set of examples


@dataclass(frozen=True)
class Trainer:
    """Trains settings from the same beginning, and measures them.

    Attributes:
        task: Gives the training examples.
        model: Folder or name of the pre-trained model.
        method: What is trained.
        settings: All but the choice.
        max_length: Longer inputs are cut.
        runtime: Device and precision.
    """

    task: Task
    model: str
    method: Method
    settings: Settings
    max_length: int
    runtime: Runtime

    def __call__(
        self,
        choice: Choice,
        seed: int,
        sets: dict[str, Examples],
        at: Callable[[int, Scores], None] = lambda step, scores: None,
        steps: tuple[int, ...] = (),
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Scores:
        """Accuracies after training with a choice.

        Args:
            choice: Goes into the settings.
            seed: Of the classifier's weights, the order of the examples, and dropout.
            sets: What is measured.
            at: Called with the step and the accuracies after each of `steps`, and after the last.
            steps: Where to measure on the way.
            on_step: Called after every step.
        """
        settings = replace(self.settings, **choice)  # type: ignore[arg-type]
        model, encoder = load_model(self.model, self.task, self.max_length, seed, self.runtime)
        tests = {name: encoder(examples) for name, examples in sets.items()}
        scores: Scores = {}

        def evaluate(step: int) -> None:
            if step in steps or step == settings.steps:
                for name, data in tests.items():
                    scores[name] = statistics.fmean(correct(model, data, self.runtime))
                at(step, scores)

        with progress(_shown(choice), settings.steps) as show:

            def count(record: dict[str, Any]) -> None:
                on_step(record["step"])
                show(record)

            data = encoder(self.task.train)
            train(model, data, self.method, settings, self.runtime, seed, count, evaluate, 1)
        return scores


def value_of(scores: Scores) -> float:
    """What is maximised: the mean of clean accuracy and of the mean over the perturbed copies."""
    perturbed = [accuracy for name, accuracy in scores.items() if name != "clean"]
    return (scores["clean"] + statistics.fmean(perturbed)) / 2


def rungs(steps: int, reduction: int) -> tuple[int, ...]:
    """Where trials are stopped: after about 1/9 and 1/3 of the steps, for a reduction of 3."""
    first = max(1, steps // reduction**2)
    return tuple(x for x in (first, first * reduction) if x < steps)


class Search:
    """A study in a journal, which a run that was stopped goes on with.

    Args:
        name: Of the study; a journal may hold several.
        journal: The file.
        asked: What its values depend on.
        sampler: Makes optuna's sampler from a seed, anew for each trial: so that what a stopped run
            has drawn is not drawn again.
        pruner: optuna's, which decides who goes on.

    Raises:
        UserError: The journal's study was asked for with something else, so that its values could not
            be compared.
    """

    def __init__(
        self,
        name: str,
        journal: Path,
        asked: dict[str, str],
        sampler: Callable[[int], Any],
        pruner: Any,
    ):
        self._optuna = optuna = require("optuna", extra="tune")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
        self._sampler = sampler
        there = self.study.user_attrs.get("asked", asked)
        for key in (x for x in asked if asked[x] != there.get(x)):
            raise UserError(
                f"{journal.parent} holds a study with {key} = {there.get(key)}, not {asked[key]}; "
                "repeat its arguments to go on with it, or choose another --output"
            )
        self.study.set_user_attr("asked", asked)
        for trial in self.study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    @property
    def spent(self) -> int:
        """Training steps of all trials, but for those that were killed."""
        return sum(x.user_attrs.get("steps", 0) for x in self.study.get_trials(deepcopy=False))

    @property
    def finished(self) -> list[Choice]:
        """What has been trained to the end, or has diverged."""
        ended = [self._optuna.trial.TrialState.COMPLETE, self._optuna.trial.TrialState.FAIL]
        trials = self.study.get_trials(deepcopy=False, states=ended)
        return [x.user_attrs["choice"] for x in trials if x.user_attrs.get("ended")]

    @property
    def best(self) -> tuple[Choice, float]:
        """The best choice that was trained to the end, and its value.

        Raises:
            UserError: There is none.
        """
        try:
            trial = self.study.best_trial
        except ValueError as error:
            raise UserError(
                f"none of {len(self.study.get_trials(deepcopy=False))} settings was trained to the "
                "end; choose a larger --budget, or lower values for --lr"
            ) from error
        return trial.user_attrs["choice"], trial.value

    def run(
        self,
        trainer: Trainer,
        choose: Callable[[Any], Choice],
        sets: dict[str, Examples],
        seed: int,
        steps: tuple[int, ...] = (),
    ) -> None:
        """Train one choice, to the end unless the pruner stops it. One that diverges has failed.

        Args:
            trainer: Trains it.
            choose: Draws it from optuna's trial.
            sets: What its value is measured on.
            seed: For `trainer`, in every trial the same: they differ by their choice only.
            steps: Where the pruner may stop it.

        Raises:
            UserError: Training did not begin: the model cannot be loaded, or the data do not fit.
        """

        def objective(trial: Any) -> float:
            choice, done = choose(trial), 0
            trial.set_user_attr("choice", choice)

            def on_step(step: int) -> None:
                nonlocal done
                done = step

            def at(step: int, scores: Scores) -> None:
                trial.set_user_attr("scores", scores)
                trial.report(value_of(scores), step)
                if step in steps and trial.should_prune():
                    raise self._optuna.TrialPruned

            try:
                value = value_of(trainer(choice, seed, sets, at, steps, on_step))
            except UserError as error:
                if done == 0:  # that is not of this choice, and would come again and again
                    raise
                trial.set_user_attr("ended", str(error))
                raise _Diverged(str(error)) from error
            finally:
                trial.set_user_attr("steps", done)
            trial.set_user_attr("ended", "trained")
            return value

        self.study.sampler = self._sampler(len(self.study.get_trials(deepcopy=False)))
        self.study.optimize(objective, n_trials=1, catch=(_Diverged,))


class _Diverged(Exception):
    """A choice with which training could not go on."""


def _shown(choice: Choice) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in choice.items())
