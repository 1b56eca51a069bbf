"""`python -m rose_ops tune`: the search, the presets at equal cost, a study that survives a stop."""

from __future__ import annotations

import json
import os
import sys

import pytest
from forked import command
from tiny_tasks import save_tiny_bert, sentences, write_tsv

from rose_ops.cli import main
from rose_ops.finetune import UserError
from rose_ops.finetune.presets import PUBLISHED, candidates

for module in ("matplotlib", "tqdm", "rich", "scipy"):
    pytest.importorskip(module, reason="needs the demo extra")
optuna = pytest.importorskip("optuna", reason="needs the tune extra")

from rose_ops.finetune.search import Search, rungs, value_of  # noqa: E402

STEPS = 9


# ----------------------------------------------------------------------------------------- arguments


def test_presets_of_the_task_come_first():
    found = candidates("ensemble", "rte")
    assert found[:2] == [(4e-5, 0.8), (1e-5, 0.85)]
    assert set(found) == {x for of_task in PUBLISHED["ensemble"].values() for x in of_task}
    assert len(set(found)) == len(found)
    assert len(candidates("first", "movies")) == 6  # two tasks share presets


@pytest.mark.parametrize(
    ("steps", "reduction", "expected"),
    [(100, 3, (11, 33)), (9, 3, (1, 3)), (2, 3, (1,)), (1, 3, ()), (64, 4, (4, 16))],
)
def test_rungs(steps, reduction, expected):
    assert rungs(steps, reduction) == expected


def test_what_is_maximised():
    scores = {"clean": 0.9, "characters": 0.7, "words": 0.5}
    assert value_of(scores) == pytest.approx((0.9 + 0.6) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adamw"], "--method adamw has no masks to tune"),
        (
            ["--search-seed", "2", "--seeds", "1", "2"],
            "expected seeds for the comparison that had no part",
        ),
        (["--upper", "0.9", "0.1"], "--upper 0.9 0.1; expected the lower end first"),
        (["--upper", "0.5", "1.5"], "upper=1.5 (float); expected 0 < upper <= 1"),
        (["--method", "ensemble", "--gamma", "0.5", "1"], "gamma=1.0 (float); expected 0 < gamma < 1"),
    ],
)
def test_ranges_are_checked_before_anything_is_loaded(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.set_flush_denormal", lambda on: True)
    call = ["tune", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out"), *arguments]
    assert main(call) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_optuna_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.set_flush_denormal", lambda on: True)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "--output", str(tmp_path / "out")]) == 1
    assert "pip install 'rose_ops[tune]'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the studies


class Trainer:
    """Stands in for `search.Trainer`: accuracy is a function of the choice and the step."""

    def __init__(self, function, steps=STEPS):
        self.function, self.steps, self.trained = function, steps, []

    def __call__(self, choice, seed, sets, at=lambda *_: None, steps=(), on_step=lambda step: None):
        self.trained.append(choice)
        for step in range(1, self.steps + 1):
            on_step(step)
            if step in steps or step == self.steps:
                accuracy = self.function(choice, step)
                scores = {"clean": accuracy, "words": accuracy}
                at(step, scores)
        return scores


def search_in(folder, asked=None, pruner=None):
    def sampler(seed):
        return optuna.samplers.RandomSampler(seed=seed)

    asked = {"task": "sst2"} if asked is None else asked
    return Search("search", folder / "study.log", asked, sampler, pruner or optuna.pruners.NopPruner())


def draw(trial):
    return {"lr": trial.suggest_float("lr", 0.0, 1.0)}


def halving():
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)


def test_halving_stops_what_is_behind(tmp_path):
    search = search_in(tmp_path, pruner=halving())
    trainer = Trainer(lambda choice, step: choice["lr"])
    values = [0.9, 0.1, 0.5, 0.95, 0.2, 0.3, 0.99]
    for value in values:
        search.run(trainer, lambda trial, value=value: {"lr": value}, {}, seed=0, steps=(1, 3))
    steps = [trial.user_attrs["steps"] for trial in search.study.trials]
    # A third of the trials at a rung go on: the best of one, of four, and two of seven.
    assert steps == [9, 1, 1, 9, 1, 1, 9]
    assert search.spent == sum(steps)
    assert [x["lr"] for x in search.finished] == [0.9, 0.95, 0.99]
    assert search.best == ({"lr": 0.99}, pytest.approx(0.99))


def test_a_study_goes_on_and_draws_what_is_new(tmp_path):
    trainer = Trainer(lambda choice, step: choice["lr"])
    one = search_in(tmp_path)
    one.run(trainer, draw, {}, seed=0)
    again = search_in(tmp_path)
    assert again.spent == STEPS
    again.run(trainer, draw, {}, seed=0)
    assert len({x["lr"] for x in trainer.trained}) == 2
    # As if it had not been stopped.
    whole = Trainer(lambda choice, step: choice["lr"])
    (tmp_path / "whole").mkdir()
    search = search_in(tmp_path / "whole")
    for _ in range(2):
        search.run(whole, draw, {}, seed=0)
    assert whole.trained == trainer.trained


def test_a_trial_that_was_killed_has_failed_and_may_be_repeated(tmp_path):
    def killed(choice, step):
        os._exit(9)

    process = os.fork()
    if process == 0:
        try:
            search_in(tmp_path).run(Trainer(killed), lambda trial: {"lr": 0.5}, {}, seed=0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    search = search_in(tmp_path)
    assert [x.state.name for x in search.study.trials] == ["FAIL"]
    assert (search.finished, search.spent) == ([], 0)


def test_a_setting_that_diverges_is_not_the_end(tmp_path):
    def diverge(choice, step):
        if choice["lr"] > 0.5:
            raise UserError("the loss is nan at step 9; choose a smaller --lr")
        return 0.5

    search, trainer = search_in(tmp_path), Trainer(diverge)
    search.run(trainer, lambda trial: {"lr": 0.9}, {}, seed=0)
    with pytest.raises(UserError, match="none of 1 settings was trained to the end"):
        _ = search.best
    search.run(trainer, lambda trial: {"lr": 0.1}, {}, seed=0)
    assert search.best[0] == {"lr": 0.1}
    assert search.spent == 2 * STEPS
    assert search.finished == [{"lr": 0.9}, {"lr": 0.1}]  # which are not tried again


def test_what_no_choice_can_change_ends_the_search(tmp_path):
    def cannot_load(choice, seed, sets, *more):
        raise UserError("could not load the model")

    with pytest.raises(UserError, match="could not load the model"):
        search_in(tmp_path).run(cannot_load, draw, {}, seed=0)


def test_a_study_of_nothing_has_no_best(tmp_path):
    search = search_in(tmp_path, pruner=optuna.pruners.NopPruner())
    with pytest.raises(UserError, match="none of 0 settings was trained to the end; choose a larger"):
        _ = search.best


def test_a_study_of_something_else_is_refused(tmp_path):
    search_in(tmp_path, {"task": "sst2", "steps": "9"})
    with pytest.raises(UserError, match="a study with steps = 9, not 10; repeat its arguments"):
        search_in(tmp_path, {"task": "sst2", "steps": "10"})


# -------------------------------------------------------------------------------------- end to end


def write_task(folder, start=0):
    """A tiny task, whose training sentences begin with another one."""
    for name, n, first in (("train", 64, start), ("dev", 24, 100)):
        write_tsv(folder / "sst2" / f"{name}.tsv", ("label", "sentence"), sentences(n, first))


def arguments_of(data, folder):
    return (
        f"tune --task sst2 --data-dir {data} --model {folder / 'tiny'} --steps {STEPS} --method "
        f"ensemble --batch-size 8 --lr 1e-3 1e-2 --seeds 5 6 --output {folder / 'out'}"
    ).split()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a tiny study, and what two calls printed: the second has a larger budget."""
    folder = tmp_path_factory.mktemp("tuned")
    save_tiny_bert(folder / "tiny")
    write_task(folder)
    arguments = [*arguments_of(folder, folder), "--threads", "1"]
    results = [command("rose_ops", *arguments, "--budget", budget) for budget in ("2", "3")]
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder / "out", [result.stdout for result in results]


def test_a_study_of_other_data_is_refused(tuned, tmp_path, capsys, monkeypatch):
    """And the record of what was there stays."""
    monkeypatch.setattr("torch.set_flush_denormal", lambda on: True)
    folder, _ = tuned
    before = (folder / "tune.json").read_bytes()
    write_task(tmp_path, start=7)
    assert main([*arguments_of(tmp_path, folder.parent), "--budget", "3"]) == 1
    assert "holds a study with data = " in capsys.readouterr().err
    assert (folder / "tune.json").read_bytes() == before


def test_the_record_of_a_study(tuned):
    folder, _ = tuned
    record = json.loads((folder / "tune.json").read_text())
    assert record["arguments"]["budget"] == 3.0
    search, presets = (record["outcome"][x] for x in ("search", "presets"))
    assert set(search["choice"]) == {"lr", "upper", "gamma"}
    assert 1e-3 <= search["choice"]["lr"] <= 1e-2
    assert 0.1 <= search["choice"]["upper"] <= 0.9
    for kind, found in record["outcome"].items():
        trials = record["trials"][kind]
        assert found["trials"] == len(trials)
        assert found["steps"] == sum(x["steps"] for x in trials)
        complete = [x for x in trials if x["state"] == "COMPLETE"]
        assert found["validation"] == max(x["value"] for x in complete)
        assert found["choice"] in [x["choice"] for x in complete]
        assert [set(x) for x in found["test"]] == [{"clean", "characters", "words"}] * 2
    # The search ends with the trial that spends the budget, the presets before the one that would.
    assert 3 * STEPS <= search["steps"] < 4 * STEPS
    assert presets["steps"] == 3 * STEPS
    tried = [(x["choice"]["lr"], x["choice"]["upper"]) for x in record["trials"]["presets"]]
    assert tried == candidates("ensemble", "sst2")[:3]


def test_the_second_call_goes_on(tuned):
    _, (first, second) = tuned
    assert "presets: 9 steps" in first
    assert first.count("presets: 9 steps") == 2
    assert second.count("presets: 9 steps") == 1
    assert "; 27 of 27" in second
    for text in (first, second):
        assert "successive halving" in text
        assert "published presets" in text
