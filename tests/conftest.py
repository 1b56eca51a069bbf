"""Fixtures of all tests. Data is fresh on every run; the header says how to get the same again."""

from __future__ import annotations

import gc
import itertools
import operator
import os
import secrets
import sys
import zlib
from pathlib import Path
from typing import Any

# Threads that wait must not keep other processes from the cores. To be said before PyTorch starts any.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Without a GPU, Triton's kernels are interpreted, on the CPU: to be said before they are imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# --import-mode=importlib leaves the path alone, and the tests share support.py.
sys.path.insert(0, str(Path(__file__).parent))

from gpu_support import generator_on  # noqa: E402
from support import OnDevice  # noqa: E402

import rose_ops  # noqa: E402
from rose_ops import backends  # noqa: E402

# All processes of a run use the same.
SEED = int(
    os.environ.get("ROSE_TEST_SEED")
    or os.environ.setdefault("ROSE_TEST_SEED_OF_RUN", str(secrets.randbits(31)))
)

# print_blob: a failure prints the line that reproduces it.
hypothesis.settings.register_profile("rose_ops", deadline=None, print_blob=True)
hypothesis.settings.load_profile("rose_ops")


def pytest_report_header() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}",
        f"rose_ops {rose_ops.__version__} from {Path(rose_ops.__file__).parent}",
        f"random data from ROSE_TEST_SEED={SEED}",
        *([] if HAS_GPU else ["no GPU: tests that need one are left out"]),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have measured, and recorded as a property "table"."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(value)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of this test: fresh, unless ROSE_TEST_SEED says which."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(request.node.name.encode()))


@pytest.fixture
def on_device(generator: torch.Generator) -> torch.Generator:
    """Random numbers of a GPU."""
    return generator_on("cuda", generator)


def pytest_configure(config: pytest.Config) -> None:
    """ROSE_TEST_AT_ONCE=1 says at once why a test failed: the end may never come."""

    class AtOnce:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            if report.failed:
                config.get_terminal_writer().line(f"\n{report.longreprtext}\n")

    if "ROSE_TEST_AT_ONCE" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(AtOnce())


# The topics of files, which are markers, too: `pytest -m optimizer`.
TOPICS = {
    "kernels": "approx arguments arm bracket failure_bound huge instructions mutants one_pass "
    "one_pass_ties ops parity properties roofline simt threshold triton",
    "optimizer": "checkpoints clipping determinism errors flat given kill leaks masks memory "
    "memory_order optimizer optimizer_corners optimizer_kept reuse state steps surroundings "
    "tensor_granularity torch_optim_table",
    "stacks": "accumulate ddp distributed losses reshard sharded stacks stacks_amp stacks_torch "
    "trainer trainer_fsdp2 wrappers",
    "package": "cli doctor examples habits hub import readme setup tune wheel",
    "bench": "benchmarks paper paper_analyses paper_arguments paper_geometry paper_methods "
    "paper_report paper_results paper_rows paper_stats profile_gpu",
    "device": "gpu gpu_binaries gpu_graphs gpu_large gpu_profile gpu_run gpu_sync",
}
TOPIC_OF = {f"test_{name}": topic for topic, names in TOPICS.items() for name in names.split()}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, tests of one are left out. Of tests marked thin(n), one case in n is run: which,
    the seed says, so that in the long run all are. ROSE_TEST_ALL=1 runs all. ROSE_TEST_SHARE=0.1 runs
    a tenth of the tests, in every process the same; others with another ROSE_TEST_SEED.
    """
    for item in items:
        if topic := TOPIC_OF.get(item.path.stem):  # as every file has: a test sees to it
            item.add_marker(topic)
    share, seed = float(os.environ.get("ROSE_TEST_SHARE", "1")), os.environ.get("ROSE_TEST_SEED", "")

    def is_chosen(item: pytest.Item) -> bool:
        thin = None if "ROSE_TEST_ALL" in os.environ else item.get_closest_marker("thin")
        return (
            (HAS_GPU or item.get_closest_marker("gpu") is None)
            and (thin is None or zlib.crc32(f"{SEED} {item.nodeid}".encode()) % thin.args[0] == 0)
            and (share >= 1 or zlib.crc32((seed + item.nodeid).encode()) < share * 2**32)
        )

    chosen = [*map(is_chosen, items)]
    if not all(chosen):
        config.hook.pytest_deselected(items=[*itertools.compress(items, map(operator.not_, chosen))])
        items[:] = itertools.compress(items, chosen)


def pytest_collection_finish() -> None:
    """What was imported stays: tests that collect garbage need not look through all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions complain of what is left at the end


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """A kernel that fails leaves a process whose device is lost. One of several ends then, and tests go
    on in a new one, rather than fail for what another did."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def _namespace(name: str):
    if name == "simt":
        from simt import build

        return build.load()
    backend = backends.BACKENDS[name]
    if (reason := backend.why_not()) is not None:
        pytest.skip(f"backend {name!r} cannot be used: {reason}")
    return backend.ops if "cpu" in backend.devices else OnDevice(backend.ops, "cuda")


# The CUDA kernels run on a simulated device ("simt"), and on a GPU where there is one. Triton's do so,
# too, or are interpreted, which is slow: `make verify-gpu` runs a part.
GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else []
TRITON = [pytest.param("triton", marks=pytest.mark.gpu if HAS_GPU else pytest.mark.slow)]


def _of_backends(doc: str, *names: Any):
    def operators(request: pytest.FixtureRequest):
        return _namespace(request.param)

    operators.__doc__ = doc
    return pytest.fixture(scope="session", params=names)(operators)


ops = _of_backends("Operators that are compared with the reference.", "cpu", "simt", *GPU, *TRITON)
any_ops = _of_backends(
    "Those of the reference, too: for what the definitions imply.", "cpu", "simt", *GPU, "reference"
)
every_ops = _of_backends("All.", "cpu", "simt", *GPU, *TRITON, "reference")
triton_ops = _of_backends("Triton's.", *TRITON)
real_ops = _of_backends("Those of devices that are not simulated, which takes long.", "cpu", *GPU)
