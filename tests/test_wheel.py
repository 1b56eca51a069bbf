"""What `make wheel` has made, in an empty environment: it installs, loads and trains."""

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
TORCH = os.environ.get("ROSE_TEST_TORCH", "torch>=2.10")

TRAIN = """
import sys, torch, rose_ops
from rose_ops import RoseFusedAdamW, backends, rose_backward

assert rose_ops.__file__.startswith(sys.prefix), rose_ops.__file__
assert backends.BACKENDS["cpu"].why_not() is None
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 2))
trained = {}
for backend in ("cpu", "reference"):
    torch.manual_seed(1)
    torch.nn.init.normal_(model[0].weight), torch.nn.init.normal_(model[2].weight)
    optimizer = RoseFusedAdamW(model.parameters(), lr=0.01, order="ensemble", backend=backend)
    for _ in range(5):
        rose_backward(model, torch.randn(32, 16), torch.randint(2, (32,)), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < optimizer.selection["second"].kept < optimizer.selection["second"].ranked
    trained[backend] = model[0].weight.detach().clone()
assert torch.allclose(trained["cpu"], trained["reference"], rtol=1e-5, atol=1e-7)
print("cuda:", backends.BACKENDS["cuda"].why_not())
"""

WITHOUT_CUDA = "built without CUDA kernels"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Of an environment that has PyTorch, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip(python, TORCH, "numpy")
    return python


def pip(python: Path, *arguments: object) -> None:
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", *map(str, arguments)],
        check=True,
    )


def test_there_is_one():
    assert WHEELS, "make wheel builds them"


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.parent.name)
def test_what_is_in_a_wheel(wheel):
    assert re.search(r"-cp310-abi3-manylinux\w+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {"rose_ops/__init__.py", "rose_ops/py.typed", "rose_ops/_C.abi3.so"} <= names
    packages = {name.partition("/")[0] for name in names}
    assert {name for name in packages if not name.endswith((".dist-info", ".libs"))} == {"rose_ops"}
    libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
    assert libraries == ["rose_ops/_C.abi3.so"], "libraries of PyTorch, or others, came along"


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.parent.name)
def test_a_wheel_installs_and_trains(wheel, python, tmp_path):
    pip(python, "--force-reinstall", "--no-deps", wheel)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-I", "-W", "error::UserWarning:rose_ops", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = run("-c", TRAIN)
    assert (WITHOUT_CUDA in out) == (wheel.parent.name == "cpu"), out
    assert re.search(r"^cpu +equals the reference$", run("-m", "rose_ops", "doctor"), re.M)
