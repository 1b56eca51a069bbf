"""The command lines of `benchmarks.paper`: what they choose, and what they refuse before training."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import pytest
from forked import ROOT

sys.path.append(str(ROOT))
for module in ("jinja2", "matplotlib", "pandas", "scipy", "transformers", "tqdm", "psutil", "cpuinfo"):
    pytest.importorskip(module, reason="needs the paper extra")

from benchmarks.paper import landscape, probing, runner, runs, summary, upper  # noqa: E402
from rose_ops.finetune import UserError  # noqa: E402


def arguments(*given: str):
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args(given)


def test_settings_are_replaced_and_swept_over():
    given = ["--tasks", "sst2", "--models", "minilm", "--methods", "rose-second", "--seeds", "0"]
    given += ["--granularities", "tensor"]
    (run,) = runner.chosen(arguments(*given, "--set", "lr=3e-5", "steps=7"))
    assert (run.lr, run.steps) == (3e-5, 7)
    grid = runner.chosen(arguments(*given, "--sweep"))
    assert {(one.lr, one.upper) for one in grid} == {
        (float(f"{i}e-5"), j / 10) for i in range(1, 11) for j in range(1, 10)
    }
    given[given.index("rose-second")] = "rose-ensemble"
    some = runner.chosen(arguments(*given, "--sweep", "gamma=0.1,0.9"))
    assert [one.gamma for one in some] == [0.1, 0.9]
    with pytest.raises(UserError, match="'speed=3' is no setting of a run"):
        runner.chosen(arguments(*given, "--set", "speed=3"))
    with pytest.raises(UserError, match="'steps=x': expected a value of type int"):
        runner.chosen(arguments(*given, "--set", "steps=x"))


def test_a_sweep_is_over_what_a_method_has():
    given = ["--tasks", "sst2", "--models", "minilm", "--seeds", "0", "--granularities", "tensor"]
    swept = ["--sweep", "lower=0,0.1", "upper=0.2,0.3", "gamma=0.1,0.9", "r_drop=1,2", "lr=1e-4,2e-4"]
    counts = Counter(one.method for one in runner.chosen(arguments(*given, *swept)))
    lr, upper, lower, gamma, r_drop = [2] * 5
    expected = {
        "adamw": lr, "smart": lr, "magma": lr, "r-drop": lr * r_drop,
        "random-mask": lr * upper, "inverted-mask": lr * upper, "child-tuning-d": lr * upper,
        "rose-first": lr * upper * lower, "rose-ensemble": lr * upper * lower * gamma,
        "r-drop+rose-ensemble": lr * upper * lower * gamma * r_drop,
    }  # fmt: skip
    assert {x: counts[x] for x in expected} == expected
    assert {x.preset for x in runner.chosen(arguments(*given, "--sweep", "gamma=0.1"))} == {"sweep"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=0", "steps=0: expected a number of at least 1"),
        ("batch_size=0", "batch_size=0: expected a number of at least 1"),
        ("perturbed=0", "perturbed=0: expected a number of at least 1"),
        ("lr=nan", "lr=nan: expected a number of at least 0"),
        ("warmup=1.5", "warmup=1.5: expected a share of the steps"),
        ("selection=foo", "selection=foo: expected one of exact, bracket, approx"),
        ("precision=float16", "precision=float16: expected one of auto, float32, bfloat16"),
        ("upper=5", r"upper=5.0 .* expected 0 < upper <= 1"),
        ("upper=1", "inverted-mask updates what is above; expected less than 1"),
        ("gamma=0", r"gamma=0.0 .* expected 0 < gamma < 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(setting, message):
    given = ["--tasks", "sst2", "--methods", "rose-ensemble", "inverted-mask", "--seeds", "0"]
    for option in ("--set", "--sweep"):
        with pytest.raises(UserError, match=message):
            runner.chosen(arguments(*given, option, setting))


@pytest.mark.parametrize("task", runs.TASKS)
def test_tasks_that_are_offered_have_settings(task):
    assert runner.chosen(arguments("--tasks", task, "--seeds", "0"))


ADD_ARGUMENTS = {
    "run": runner.add_arguments,
    "surfaces": landscape.add_surfaces,
    "interpolate": landscape.add_interpolation,
    "probe": probing.add_probing,
    "dropout": probing.add_dropout,
    "upper": upper.add_arguments_of_upper,
    "summary": summary.add_arguments,
}


NUMBERS = {
    "run": ("--tasks mnli", "--threads -1", "--jobs 0", "--minutes -1", "--minutes nan"),
    "surfaces": (
        "--examples 0",
        "--points 0",
        "--points 1",
        "--reach 0",
        "--threads 0",
        "--tasks mnli",
    ),
    "interpolate": ("--examples 0", "--points 0"),
    "probe": ("--examples -3",),
    "dropout": ("--examples 0",),
    "upper": ("--grid 0.5 2", "--grid 0", "--look 1", "--look 0", "--examples 0"),
    "summary": ("--fewest 0",),
}


@pytest.mark.parametrize(
    ("command", "given"), [(x, given) for x, several in NUMBERS.items() for given in several]
)
def test_numbers_that_make_no_sense_are_refused(command, given, capsys):
    parser = argparse.ArgumentParser()
    ADD_ARGUMENTS[command](parser)
    with pytest.raises(SystemExit):
        parser.parse_args(given.split())
    said = capsys.readouterr().err
    assert "invalid choice: 'mnli'" in said or "expected a number" in said
    assert given.split()[0] in said
