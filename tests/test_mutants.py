"""Changes of the CPU's and the optimizer's code that some test must notice.

The tables are in ``mutants_cpu.py`` and ``mutants_python.py``: a file, text in it, what takes its
place, and the tests that should fail. All of them take half an hour: ``make verify-mutants``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import mutant_build as build
import pytest
from mutants_cpu import MUTANTS as CPU_MUTANTS
from mutants_python import MUTANTS as PYTHON_MUTANTS

TIMEOUT = 900  # seconds: a mutant may make tests never end
# Of each file some, that continuous integration takes: seen to be caught, in minutes.
FEW = {
    "margin, of the range", "collapse without its margin", "misses of the lower threshold",
    "what is done again, its rounding", "clipping of plain groups", "warm-up after unfreezing",
    "leftovers of parameters that only the optimizer has", "moments of a second flat group",
}  # fmt: skip


def marked(table: dict) -> list:
    return [pytest.param(name, marks=[pytest.mark.few] if name in FEW else []) for name in table]


def mutate(folder: Path, mutant: tuple[str, str, str, str]) -> None:
    file, text, replacement, _ = mutant
    path = folder / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: {text!r}: bring the table of mutants up to date"
    path.write_text(source.replace(text, replacement))


def is_caught(folder: Path, tests: str) -> bool:
    try:
        run = build.run_tests(folder, tests.split(), TIMEOUT)
    except subprocess.TimeoutExpired:
        return True
    said = run.stdout + run.stderr
    # What was not run, or not of this package, catches nothing. (A crash is no exit status of pytest.)
    assert run.returncode in (0, 1) or run.returncode < 0, said[-4000:]
    assert f"from {folder}" in said, said[-4000:]
    return run.returncode != 0


def test_mutants_are_of_these_sources():
    """So that the tables are known to be old where mutants, which take long, are not tried."""
    assert len(CPU_MUTANTS) + len(PYTHON_MUTANTS) >= 60
    assert CPU_MUTANTS.keys() | PYTHON_MUTANTS.keys() >= FEW
    for name, (file, text, replacement, tests) in {**CPU_MUTANTS, **PYTHON_MUTANTS}.items():
        source = (build.ROOT / file).read_text()
        assert source.count(text) == 1, f"{name}: {file} has {text!r} {source.count(text)} times"
        assert text != replacement
        for test in tests.split():
            path, _, function = test.partition("::")
            assert f"def {function.partition('[')[0]}" in (build.ROOT / path).read_text(), test


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(CPU_MUTANTS))
def test_every_mutant_of_the_cpu_is_caught(name, tmp_path):
    folder = build.copy_package(tmp_path)
    mutate(folder, CPU_MUTANTS[name])
    build.build_library(folder, {Path(CPU_MUTANTS[name][0]).relative_to("csrc")})
    assert is_caught(folder, CPU_MUTANTS[name][3])


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(PYTHON_MUTANTS))
def test_every_mutant_of_the_optimizer_is_caught(name, tmp_path):
    folder = build.copy_package(tmp_path)
    mutate(folder, PYTHON_MUTANTS[name])
    assert is_caught(folder, PYTHON_MUTANTS[name][3])


@pytest.mark.slow
@pytest.mark.few
def test_the_sources_as_they_are_pass(tmp_path):
    """What is said of mutants must not be true of the original, built the same way."""
    folder = build.copy_package(tmp_path)
    build.build_library(folder, {Path("cpu/bracket.cpp")})
    tests = {
        test
        for table in (CPU_MUTANTS, PYTHON_MUTANTS)
        for *_, tests in table.values()
        for test in tests.split()
    }
    assert not is_caught(folder, " ".join(sorted(tests)))
