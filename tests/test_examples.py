"""Every file of examples/ is short, says what it can do, and runs on a CPU as its docstring has it."""

from __future__ import annotations

import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stacks_support import accelerator as accelerator
from stacks_support import package
from training import one_thread as one_thread

import rose_ops

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))
# Arguments, and what the last lines must say.
RUNS = [
    ("plain_loop.py", "", r"kept 59\.9% up to risk .*\naccuracy 0\.\d+"),
    ("plain_loop.py", "--upper 0.3 --steps 25 --lr 0.001 --seed 1", r"kept 30\.0% .*\naccuracy"),
    ("ensemble.py", "", r"kl 0\.\d+  kept: first 59\.9%  second 59\.9%\naccuracy 0\.\d+"),
    ("ensemble.py", "--r-drop 1 --upper 0.6 0.5", r"kept: first 59\.9%  second 50\.0%\naccuracy"),
    ("ensemble.py", "--order first --steps 25", r"kl 0\.\d+  kept: first 59\.9%\naccuracy"),
    ("ensemble.py", "--order second --steps 25", r"loss 0\.\d+  kept: second 59\.9%\naccuracy"),
    ("trainer.py", "", r"accuracy 0\.\d+\nkept 60\.0% of \d+ parameters"),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example in this process, which has imported PyTorch already, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    states = random.getstate(), np.random.get_state()

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    random.setstate(states[0])
    np.random.set_state(states[1])


def run_alone(name: str, *arguments: str, folder: Path) -> str:
    """In a new process, as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rose_ops.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    assert {name for name, *_ in RUNS} | {"resume.py"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.count("\n") < 100
    assert f"python examples/{name}" in text.split('"""')[1]


@pytest.mark.parametrize(("name", "arguments", "expected"), RUNS, ids=lambda x: str(x)[:40])
def test_an_example_runs(name, arguments, expected, run, tmp_path, request):
    for other in re.findall(r"^import (transformers)", (FOLDER / name).read_text(), re.M):
        package(other)
        request.getfixturevalue("accelerator")  # what it shares is forgotten afterwards
    out = run(name, *arguments.split())
    assert re.search(expected, out), out
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_what_is_interrupted_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    stopped = run("resume.py", "one.pt", "--stop-after", "20")
    whole = run("resume.py", "two.pt")
    assert re.fullmatch(r"step 20  parameters \w{40}\n", stopped)
    assert re.fullmatch(r"step 60  parameters \w{40}\n", whole)
    assert stopped.split()[-1] != whole.split()[-1]
    resumed = run_alone("resume.py", "one.pt", folder=tmp_path)
    assert resumed == "goes on after step 20\n" + whole
