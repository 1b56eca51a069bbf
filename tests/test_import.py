"""What ``import rose_ops`` does and does not do, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import rose_ops

PACKAGE = Path(rose_ops.__file__).parent
LIBRARY = PACKAGE / "_C.abi3.so"


# Imports PyTorch once, and then runs programs in children of its own, each of which is a new process as
# far as rose_ops is concerned.
SERVER = """
import importlib, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
while request := sys.stdin.readline():
    path, log, code = eval(request)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            os.chdir(path)  # not the source tree
            sys.path.insert(0, path)  # an editable install of the package must not win
            exec(code, {"sys": sys})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def serve(tmp_path_factory: pytest.TempPathFactory, *modules: str) -> Iterator[Callable[..., str]]:
    """A function that gives the output of ``code`` in a new process that finds rose_ops in ``path``."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipe, log = subprocess.PIPE, tmp_path_factory.mktemp("server") / "log"

    def run(code: str, path: Path = PACKAGE.parent) -> str:
        log.unlink(missing_ok=True)
        print(repr((str(path), str(log), code)), file=server.stdin, flush=True)
        status, said = server.stdout.readline().strip(), log.read_text()
        assert status == "0", said
        return said

    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *modules], env=environment, stdin=pipe, stdout=pipe, text=True,
        cwd=PACKAGE.parent.parent,
    ) as server:  # fmt: skip
        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    yield from serve(tmp_path_factory, "torch")


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """For optimizers, the first of which in a process imports what takes longer than all the rest."""
    yield from serve(tmp_path_factory, "torch", "torch._dynamo")


HEAVY = (
    "transformers", "datasets", "matplotlib", "triton", "pandas", "scipy", "sklearn", "tqdm", "PIL",
)  # fmt: skip


def test_nothing_heavy_is_imported(python):
    loaded = python(
        "import torch; before = set(sys.modules)\n"
        "import rose_ops; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "rose_ops.optim" in loaded
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]
    # All that comes on top of PyTorch is the optimizer itself and a few modules of Python's own.
    apart = ("backends.", "cli", "doctor", "finetune", "integrations")
    assert not [name for name in loaded if name.removeprefix("rose_ops.").startswith(apart)]
    others = {name.split(".")[0] for name in loaded} - {"rose_ops", "torch"}
    assert others <= sys.stdlib_module_names


def test_the_command_line_brings_nothing_heavy(python):
    """But tqdm, as torch does."""
    loaded = python("import rose_ops, rose_ops.cli; print(*sys.modules)").split()
    assert not ({"rich", *HEAVY} - {"tqdm"}) & {name.split(".")[0] for name in loaded}


def test_cuda_is_not_initialised(python):
    # Nor by a step: a process forked after it must still be able to use CUDA.
    code = """
import torch
calls = []
for name in ("is_available", "init", "_lazy_init", "device_count", "current_device"):
    original = getattr(torch.cuda, name)
    setattr(torch.cuda, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
import rose_ops
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
rose_ops.RoseFusedAdamW([p], weight_decay=0.1).step()
print(torch.cuda.is_initialized(), *calls)
"""
    initialized, *calls = python(code).split()
    assert initialized == "False"
    # "is_available" is what PyTorch's own Optimizer may ask; it does not initialise.
    assert set(calls) <= {"is_available", "device_count"}


def test_the_import_is_quick(python):
    """Beyond PyTorch's own import, in processor time, which other processes do not lengthen."""
    code = """
import torch, time
start = time.process_time()
import rose_ops
print(time.process_time() - start)
"""
    seconds = min(float(python(code)) for _ in range(3))
    assert seconds < 0.2


def test_every_public_name_is_there(python):
    out = python(
        "import rose_ops\n"
        "print(*(n for n in rose_ops.__all__ if not hasattr(rose_ops, n)), 'end')\n"
        "from rose_ops import *\n"
        "print(RoseFusedAdamW.__name__, rose_param_groups.__name__, symmetric_kl.__name__)"
    )
    assert out.split() == ["end", "RoseFusedAdamW", "rose_param_groups", "symmetric_kl"]
    assert all(getattr(rose_ops, name).__doc__ for name in rose_ops.__all__)


def test_the_cuda_stream_comes_from_pytorch():
    """The library also loads where there is no libtorch_cuda, so that the linker does not insist."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch was built without CUDA")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("rose_ops::rank_", "CUDA"):
        pytest.skip("the library was built without CUDA kernels")
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.ops.load_library({str(LIBRARY)!r})"],
        env={**os.environ, "LD_DEBUG": "bindings"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    stream = r"_C\.abi3\.so \S+ to \S+libtorch_cuda\.so \S+ normal symbol `aoti_torch_get_current_cuda"
    assert re.search(stream, done.stderr)


def test_without_triton(stepping):
    """An optional extra: everything but its kernels is there."""
    code = """
import sys
sys.modules["triton"] = None  # importing it fails, and it cannot be found
import torch
import rose_ops
p = torch.nn.Parameter(torch.linspace(-1, 1, 10)); p.grad = torch.linspace(0, 2, 10)
optimizer = rose_ops.RoseFusedAdamW([p], weight_decay=0.1)
optimizer.step(); p.grad = torch.linspace(2, 0, 10); optimizer.step()
assert 0 < optimizer.selection["second"].kept < 10
from rose_ops.cli import main
assert main(["doctor"]) == 0
"""
    assert "Triton is not installed; install it with `pip install triton`" in stepping(code)


# ------------------------------------------------------------------------- without the compiled library

STEP = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rose_ops
    assert not caught, caught
    def step(**options):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 10)); p.grad = torch.linspace(0, 2, 10)
        optimizer = rose_ops.RoseFusedAdamW([p], weight_decay=0.1, **options)
        optimizer.step(); p.grad = torch.linspace(2, 0, 10); optimizer.step()
        return p.tolist()
    auto = [step(), step()]
print(len(caught))
for warning in caught:
    print(warning.category.__name__, warning.message)
print(rose_ops.backends.resolve("auto", torch.device("cpu")).name, auto[0] == auto[1])
try:
    step(backend="cpu")
except RuntimeError as error:
    print("RuntimeError", error)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without its library."""
    shutil.copytree(
        PACKAGE, tmp_path / "rose_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__", "finetune")
    )
    return tmp_path


DAMAGES = {
    "missing": lambda library: None,
    "empty": Path.touch,
    "text": lambda library: library.write_text("not a library\n"),
    # One that loads and has none of the operators, as one left over from another version may.
    "another": lambda library: shutil.copy(
        Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so", library
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_library_the_reference_is_used_and_said_once(damage, package, stepping):
    DAMAGES[damage](package / "rose_ops" / LIBRARY.name)
    count, warning, auto, error = stepping(STEP, package).strip().splitlines()
    assert count == "1"
    says = "UserWarning rose_ops uses the slow backend 'reference': 'cpu': the compiled"
    assert warning.startswith(says)
    assert auto == "reference True"
    says = "RuntimeError backend='cpu' cannot be used: the compiled operators could not be"
    assert error.startswith(says)
    for message in (warning, error):
        built = "not built" if damage == "missing" else "built against another PyTorch than"
        assert f"it was {built}" in message
        assert "pip install --no-build-isolation ." in message


def test_with_a_library_there_is_nothing_to_say(package, stepping):
    if not LIBRARY.exists():
        pytest.skip("the library is not built")
    shutil.copy(LIBRARY, package / "rose_ops")
    assert stepping(STEP, package).split() == ["0", "cpu", "True"]
