"""What `make wheel` has made, in an environment that has PyTorch and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WHEELS = sorted((ROOT / "dist").glob("*/*.whl"))
each_wheel = pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.parent.name)
EXAMPLES = ("plain_loop", "ensemble", "accumulate", "resume")  # that need nothing else

BACKENDS = """
import sys, rose_ops
from rose_ops.backends import BACKENDS
assert rose_ops.__file__.startswith(sys.prefix), rose_ops.__file__
assert BACKENDS["cpu"].why_not() is None, BACKENDS["cpu"].why_not()
print(BACKENDS["cuda"].why_not())
"""


def run(*command: object, folder: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    venv = tmp_path_factory.mktemp("wheel") / "venv"
    run(sys.executable, "-m", "venv", venv)
    pip(venv / "bin" / "python", *os.environ.get("ROSE_TEST_TORCH", "torch>=2.10").split(), "numpy")
    return venv / "bin" / "python"


def pip(python: Path, *arguments: object) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "-q", "install", *arguments)


def test_there_is_one():
    assert WHEELS, "make wheel builds them"


@each_wheel
def test_what_is_in_it(wheel):
    assert re.search(r"-cp310-abi3-manylinux\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {"rose_ops/__init__.py", "rose_ops/py.typed", "rose_ops/_C.abi3.so"} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rose_ops").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    # Neither PyTorch's libraries nor others came along.
    assert [name for name in names if re.search(r"\.so(\.|$)", name)] == ["rose_ops/_C.abi3.so"]


@each_wheel
def test_it_installs_and_trains(wheel, python, tmp_path):
    pip(python, "--force-reinstall", "--no-deps", wheel)
    without_cuda = "built without CUDA kernels" in run(python, "-c", BACKENDS, folder=tmp_path)
    assert without_cuda == (wheel.parent.name == "cpu")
    out = run(python, "-m", "rose_ops", "doctor", folder=tmp_path)
    assert re.search(r"^cpu +equals the reference$", out, re.M), out
    for name in EXAMPLES:
        run(python, ROOT / "examples" / f"{name}.py", folder=tmp_path)
