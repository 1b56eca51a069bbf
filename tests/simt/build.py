"""Compiles the CUDA sources for the host, over the simulated device of ``cuda_runtime.h``."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BINDINGS = [
    CSRC / "segments.cpp", CSRC / "arguments.cpp", CSRC / "cuda" / "upload.cpp",
    CSRC / "cuda" / "ops_cuda.cpp", HERE / "simt.cpp", HERE / "module.cpp",
]  # fmt: skip
FLAGS = ["-O2", "-g1", "-fvisibility=hidden", "-std=c++17", "-ffp-contract=off", "-DROSE_SIMT",
         "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip


def include_paths() -> list[Path]:
    return [HERE, CSRC, CSRC / "include", CSRC / "cuda"]


@functools.cache
def module() -> ModuleType:
    """The test-only extension: ``configure`` and ``take_counters``; loads ``torch.ops.rose_simt``."""
    from torch.utils.cpp_extension import load

    folder = CSRC.parent / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    return load(
        "rose_simt",
        [str(path) for path in (*BINDINGS, HERE / "kernels.cpp")],
        extra_cflags=[*FLAGS, *os.environ.get("ROSE_CXXFLAGS", "").split()],
        extra_ldflags=os.environ.get("ROSE_LDFLAGS", "").split(),
        extra_include_paths=[str(path) for path in include_paths()],
        build_directory=str(folder),
    )


def load() -> Any:
    """The operators of the simulated device."""
    module()
    return torch.ops.rose_simt
