"""Builds the operator library from broken sources: what has not changed is compiled once."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from gpu_machine import load_setup
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "mutants"
SOURCES = sorted(
    path.relative_to(CSRC) for pattern in ("*.cpp", "cpu/*.cpp") for path in CSRC.glob(pattern)
)
# Of the loops, which are compiled for each instruction set, those that this CPU runs are enough.
ISAS = {"avx512", "avx2", "default"}
ISA = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")


@functools.cache
def setup_flags() -> list[str]:
    """What setup.py tells the compiler."""
    return load_setup().compile_args


def _flags() -> list[str]:
    return [*(flag for flag in setup_flags() if flag != "-O3"), "-O1", "-w", "-fPIC"]  # quicker


def _run(*command: str | Path) -> None:
    found = subprocess.run([os.environ.get("CXX", "g++"), *command], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]


def _compile(csrc: Path, source: Path, target: Path) -> None:
    includes = [f"-I{path}" for path in (csrc / "include", csrc / "cpu", *include_paths())]
    target.parent.mkdir(parents=True, exist_ok=True)
    _run(*_flags(), *includes, "-c", csrc / source, "-o", target)


def _object(source: Path) -> Path:
    return (FOLDER / source).with_suffix(".o")


@functools.cache
def baseline() -> None:
    """Objects of the sources as they are; kept between runs."""
    digest = hashlib.sha1(repr(_flags()).encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    stamp = FOLDER / "digest"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    for source in SOURCES:
        _compile(CSRC, source, _object(source))
    stamp.write_text(digest.hexdigest())


@functools.cache
def _included(source: Path) -> frozenset[Path]:
    """The files of ours that a source is compiled from, itself among them."""
    found: set[Path] = set()
    waiting = [CSRC / source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'#include "(.+)"', path.read_text()):
            places = (path.parent / name, CSRC / "include" / name, CSRC / "cpu" / name)
            waiting += [place.resolve() for place in places if place.exists()]
    return frozenset(path.relative_to(CSRC) for path in found)


def copy_package(folder: Path) -> Path:
    """A copy of the package to break, with the library that was built, and its sources beside it."""
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "rose_ops", folder / "rose_ops", ignore=skip)
    shutil.copytree(CSRC, folder / "csrc")
    for library in (ROOT / "rose_ops").glob("*.so"):
        (folder / "rose_ops" / library.name).symlink_to(library)
    return folder


def build_library(folder: Path, changed: set[Path]) -> None:
    """Into the package in ``folder``, of its sources, of which those in ``changed`` are others."""
    baseline()
    objects = []
    for source in SOURCES:
        is_other_isa = source.stem.rpartition("_")[2] in ISAS - {ISA}
        if changed & _included(source) and not is_other_isa:
            target = (folder / "objects" / source).with_suffix(".o")
            _compile(folder / "csrc", source, target)
            objects.append(target)
        else:
            objects.append(_object(source))
    lib = Path(torch.__file__).parent / "lib"
    library = folder / "rose_ops" / "_C.abi3.so"
    library.unlink(missing_ok=True)
    _run("-shared", *objects, f"-L{lib}", "-ltorch_cpu", "-ltorch", "-lc10", "-o", library)


def run_tests(folder: Path, tests: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Of the package in ``folder``: the first failure ends them. Data is the same in every run."""
    # Processes that tests start import the tests, too: from here, but the package from ``folder``.
    path = os.pathsep.join(map(str, (folder, ROOT)))
    environment = {
        **os.environ, "PYTHONPATH": path, "ROSE_TEST_SEED": "0", "ROSE_TEST_ALL": "1",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    paths = [str(ROOT / test) for test in tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
         "--rootdir", ROOT, "-m", "not slow and not gpu", "-k", "not simt", *paths],
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=folder,
    )  # fmt: skip
