"""The scripts of examples/ run as they stand, in a process of their own, in another folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import command, torchrun
from stacks_support import package

EXAMPLES = Path(__file__).parents[1] / "examples"
# The arguments, and what is printed.
RUNS = [
    ("plain_loop.py", [], r"kept 60% of \d+"),
    ("plain_loop.py", ["--upper", "0.3"], r"kept 30% of \d+"),
    ("ensemble.py", [], r"kept: first \d+%, second \d+%"),
    ("ensemble.py", ["--order", "first", "--r-drop", "0.5"], r"kept: first \d+%$"),
    ("accumulate.py", [], r"loss 0\.\d+, kl \d"),
    ("accumulate.py", ["--bf16", "--micro-batches", "2"], r"loss 0\.\d+, kl \d"),
    ("resume.py", [], "same = True"),
    ("fsdp2.py", ["--order", "ensemble"], r"^step 5: loss \d\.\d+, kept 60% of 117440$"),
    ("trainer.py", ["--accumulate", "2"], "rose_first_kept.*rose_second_kept.*rose_kl"),
    ("trainer.py", ["--plain"], "rose_second_kept"),
]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {name for name, _, _ in RUNS}


def test_examples_are_short():
    assert all(len(path.read_text("utf-8").splitlines()) < 100 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize(("name", "options", "said"), RUNS)
def test_example(name: str, options: list[str], said: str, tmp_path: Path) -> None:
    if name in ("trainer.py", "fsdp2.py"):
        package("transformers")
        package("accelerate")
    script = str(EXAMPLES / name)
    if name == "fsdp2.py":
        printed = torchrun(script, *options, folder=tmp_path)[0]
    else:
        done = command(script, *options, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    assert re.search(said, printed, re.M), printed
    assert not list(tmp_path.iterdir()), "an example left something behind"
