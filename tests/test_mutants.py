"""Changes of the code that some test must notice.

The tables are in ``mutants_python.py`` and the like, for each part of the code: a file, text in it,
what takes its place, and the tests that should fail. ``make verify-mutants`` tries all of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import mutant_build as build
import pytest
from mutants_cpu import MUTANTS as OF_CPU
from mutants_distributed import MUTANTS as OF_DISTRIBUTED
from mutants_loops import MUTANTS as OF_LOOPS
from mutants_python import MUTANTS as OF_PYTHON

# Of sources in csrc/, too: their mutants are compiled.
TABLES = (OF_CPU, OF_LOOPS, OF_PYTHON, OF_DISTRIBUTED)
MUTANTS = {name: mutant for table in TABLES for name, mutant in table.items()}
TIMEOUT = 900  # seconds: a mutant may make tests never end
# Some that continuous integration takes: seen to be caught, in a minute.
FEW = {
    "clipping to the norm of selective parameters", "warm-up after unfreezing",
    "leftovers of parameters that only the optimizer has", "moments of a second flat group",
}  # fmt: skip
MARKED = [pytest.param(name, marks=[pytest.mark.few] if name in FEW else []) for name in MUTANTS]


def mutate(folder: Path, mutant: tuple[str, str, str, str]) -> None:
    file, text, replacement, _ = mutant
    path = folder / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: {text!r}: bring the table of mutants up to date"
    path.write_text(source.replace(text, replacement))
    if Path(file).is_relative_to("csrc"):
        build.build_library(folder, {Path(file).relative_to("csrc")})


def failures(folder: Path, tests: str, timeout: int = TIMEOUT) -> str:
    """What pytest says of the first test that the package in ``folder`` fails; "" if there is none."""
    try:
        run = build.run_tests(folder, tests.split(), timeout)
    except subprocess.TimeoutExpired:
        return "the tests never end"
    said = run.stdout + run.stderr
    # What was not run, or not of this package, catches nothing. (A crash is no exit status of pytest.)
    assert run.returncode in (0, 1) or run.returncode < 0, said[-4000:]
    assert f"from {folder}" in said, said[-4000:]
    return said[-4000:] if run.returncode else ""


def test_mutants_are_of_these_sources():
    """So that the tables are known to be old where mutants, which take long, are not tried."""
    assert len(MUTANTS) == sum(map(len, TABLES)), "two mutants have one name"
    assert min(map(len, TABLES)) >= 25
    assert MUTANTS.keys() >= FEW
    for name, (file, text, replacement, tests) in MUTANTS.items():
        source = (build.ROOT / file).read_text()
        assert source.count(text) == 1, f"{name}: {file} has {text!r} {source.count(text)} times"
        assert text != replacement
        for test in tests.split():
            path, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}" in (build.ROOT / path).read_text(), test


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_every_mutant_is_caught(name, tmp_path):
    folder = build.copy_package(tmp_path)
    mutate(folder, MUTANTS[name])
    assert failures(folder, MUTANTS[name][3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [pytest.param(FEW, marks=pytest.mark.few, id="few"), pytest.param(MUTANTS, id="all")]
)
def test_the_sources_as_they_are_pass(names, tmp_path):
    """What is said of mutants must not be true of the original, built the same way."""
    folder = build.copy_package(tmp_path)
    build.build_library(folder, {Path("operators.cpp")})
    found = {test for name in names for test in MUTANTS[name][3].split()}
    said = failures(folder, " ".join(sorted(found)), 4 * TIMEOUT)  # all of them, one after the other
    assert not said, said
