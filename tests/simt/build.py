"""Compiles the CUDA sources for the host, over the simulated device of ``cuda_runtime.h``."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.cpp_extension import include_paths as include_paths_of_torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
EXTRA = os.environ.get("ROSE_CXXFLAGS", "").split()  # such as sanitizers
FOLDER = CSRC.parent / "build" / ("simt-flags" if EXTRA else "simt")
BINDINGS = [
    CSRC / "data.cpp", CSRC / "segments.cpp", CSRC / "arguments.cpp", CSRC / "update_plan.cpp",
    CSRC / "cuda" / "upload.cpp", CSRC / "cuda" / "ops_cuda.cpp", HERE / "simt.cpp",
    HERE / "module.cpp",
]  # fmt: skip
# As setup.py has it: no path of this machine is to be in an error.
HIDDEN = [CSRC.parent, *include_paths_of_torch()]
# With -O2 kernels are no faster, for it is the switching of fibers that takes time.
FLAGS = ["-O1", "-g1", "-fvisibility=hidden", "-std=c++17", "-ffp-contract=off", "-DROSE_SIMT",
         "-DTORCH_TARGET_VERSION=0x020a000000000000",
         *(f"-ffile-prefix-map={folder}/=" for folder in HIDDEN)]  # fmt: skip


def include_paths(csrc: Path = CSRC) -> list[Path]:
    return [HERE, csrc, csrc / "include", csrc / "cuda"]


def _compile(csrc: Path, *arguments: str | Path) -> None:
    includes = [f"-I{path}" for path in include_paths(csrc)]
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, *FLAGS, *includes, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]


@functools.cache
def module() -> ModuleType:
    """The test-only extension: ``configure`` and ``take_counters``; loads ``torch.ops.rose_simt``."""
    from torch.utils.cpp_extension import load

    FOLDER.mkdir(parents=True, exist_ok=True)
    # ninja is where Python is, in a virtual environment that need not be active. A sanitizer's runtime
    # that is loaded into Python would slow the compiler down.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with patch.dict(os.environ, PATH=path):
        os.environ.pop("LD_PRELOAD", None)
        return load(
            "rose_simt",
            [str(path) for path in (*BINDINGS, HERE / "kernels.cpp")],
            extra_cflags=[*FLAGS, *EXTRA],
            extra_ldflags=os.environ.get("ROSE_LDFLAGS", "").split(),
            extra_include_paths=[str(path) for path in include_paths()],
            build_directory=str(FOLDER),
        )


@functools.cache
def load() -> Any:
    """The operators of the simulated device."""
    from rose_ops import _ops, reference

    module()
    torch.library.impl("rose_simt::count_keys", "CPU", reference.count_keys)  # as on a GPU
    _ops.register("rose_simt")
    return torch.ops.rose_simt


def copy_sources(folder: Path) -> Path:
    """A copy of ``csrc`` to break."""
    return Path(shutil.copytree(CSRC, folder / "csrc"))


def build_mutant(folder: Path, csrc: Path) -> Path:
    """The extension with the kernels of ``csrc``, and all else as it is."""
    kernels = folder / "kernels.o"
    _compile(csrc, "-fPIC", "-c", HERE / "kernels.cpp", "-o", kernels)
    others = [FOLDER / f"{path.stem}.o" for path in BINDINGS]
    library = folder / "rose_simt.so"
    lib = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-lc10"]
    _compile(csrc, "-shared", *others, kernels, *libraries, "-o", library)
    return library


def build_races(
    folder: Path, csrc: Path, sanitizers: Sequence[str] = ("-fsanitize=thread", "-DROSE_TSAN")
) -> Path:
    """The driver ``races.cpp`` over the kernels of ``csrc``, under a sanitizer."""
    device, binary = folder / "simt.o", folder / "races"
    # ThreadSanitizer must not see the device itself switch fibers.
    own = sanitizers if "-DROSE_TSAN" not in sanitizers else ["-DROSE_TSAN"]
    _compile(csrc, *own, "-c", HERE / "simt.cpp", "-o", device)
    sources = [HERE / "races.cpp", HERE / "kernels.cpp"]
    _compile(csrc, *sanitizers, *sources, device, "-o", binary, "-lpthread")
    return binary


def link_races(folder: Path) -> Path:
    """The same of the kernels that the extension has, without a sanitizer."""
    binary = folder / "races"
    objects = [FOLDER / "kernels.o", FOLDER / "simt.o"]
    _compile(CSRC, *EXTRA, HERE / "races.cpp", *objects, "-o", binary, "-lpthread")
    return binary
