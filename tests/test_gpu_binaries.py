"""What nvcc makes of the CUDA kernels: registers, spills, occupancy, vector width, arithmetic."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
THREADS = 256  # of a block, kThreads in csrc/cuda/table.h


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an architecture (CUDA programming guide, technical specifications)."""

    threads: int
    shared: int
    registers: int = 65536


ARCHS = {
    "80": Multiprocessor(2048, 164 << 10),
    "90": Multiprocessor(2048, 228 << 10),
    "100": Multiprocessor(2048, 228 << 10),
    "120": Multiprocessor(1536, 100 << 10),
}
KERNELS = (
    "sample_kernel", "count_kernel", "narrow_kernel", "capture_kernel", "prepare_kernel",
    "update_kernel", "squares_kernel", "norms_kernel",
)  # fmt: skip
# The kernels that walk tensors, and whether they store to them 16 bytes at a time, too.
STREAMS = {
    "count_kernel": False, "narrow_kernel": False, "capture_kernel": False, "squares_kernel": False,
    "update_kernel": True,
}  # fmt: skip

# PTX in single precision that is not one IEEE operation, rounded once, denormals kept. (Double
# precision is only used for constants of a step, and its division is a sequence with rcp.approx.)
FORBIDDEN = re.compile(
    r"\.ftz(\.sat)?\.f32|\.approx\.f32|\.full\.f32|\bfma\.\w+\.f32|\bmad\.f32"
    r"|\b(add|sub|mul)\.f32|\bdiv\.(?!rn)\w+\.f32|\bsqrt\.(?!rn)\w+\.f32"
    r"|cvt\.\w*\.?(bf16|f16)"
)


def disassembler() -> str:
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = shutil.which("nvdisasm", path=str(folder)) or shutil.which("nvdisasm")
    return found or pytest.skip(
        "there is no nvdisasm (the triton package and the CUDA toolkit have it)"
    )


def problems(source: Path, arch: str, folder: Path, flags=FLAGS, streams=STREAMS) -> list[str]:
    """What is wrong with the kernels of a file, compiled for an architecture."""
    nvcc = shutil.which("nvcc") or pytest.skip("there is no nvcc")
    wrong: list[str] = []
    cubin, ptx = folder / "kernels.cubin", folder / "kernels.ptx"
    compile_ = [nvcc, *flags, f"-arch=sm_{arch}", source]
    log = subprocess.run(
        [*compile_, "-cubin", "-Xptxas=-v", "-o", cubin], capture_output=True, text=True, check=True
    ).stderr
    subprocess.run([*compile_, "-ptx", "-o", ptx], check=True)

    found = re.findall(
        r"entry function '(\w+)'[^\n]*\n[^\n]*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n[^\n]*Used (\d+) registers([^\n]*)",
        log,
    )
    assert found, log
    limits = ARCHS[arch]
    for name, *numbers, rest in found:
        stack, stores, loads, registers = map(int, numbers)
        shared = int(match[1]) if (match := re.search(r"(\d+) bytes smem", rest)) else 0
        if stack or stores or loads:
            wrong.append(f"{name}: {stack} bytes of stack, {stores} of spill stores, {loads} of loads")
        if registers > 64:
            wrong.append(f"{name}: {registers} registers")
        # Registers are given out to warps in units of 256, shared memory has 1 KiB of its own a block.
        of_block = -(-registers * 32 // 256) * 256 * (THREADS // 32)
        blocks = min(
            limits.threads // THREADS, limits.registers // of_block, limits.shared // (shared + 1024)
        )
        if 2 * blocks * THREADS < limits.threads:
            wrong.append(f"{name}: occupancy {blocks * THREADS / limits.threads:.0%}")
    wrong += [
        f"PTX: {match[0]} in {line.strip()}"
        for line in ptx.read_text().splitlines()
        if (match := FORBIDDEN.search(line))
    ]

    sass = subprocess.run(
        [disassembler(), "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    sections = re.split(r"\.section\s+\.text\.", sass)[1:]
    for section in sections:
        name = section.split(",")[0]
        for kernel in streams.keys() & set(re.findall("|".join(streams), name)):
            accesses = ("LDG.E.128", "STG.E.128")[: 1 + streams[kernel]]
            wrong += [f"{name}: no {access}" for access in accesses if access not in section]
    names = " ".join(name for name, *_ in found)
    wrong += [f"{kernel} is missing" for kernel in streams if kernel not in names]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_as_compiled(arch, tmp_path):
    """No spills, at most 64 registers, 50% occupancy, 128-bit accesses, IEEE arithmetic."""
    assert problems(CSRC / "cuda" / "launch.cu", arch, tmp_path) == []


GOOD = """
extern "C" __global__ void __launch_bounds__(256) good(float4* x, float a) {
  float4 v = x[threadIdx.x];
  v.x = __fadd_rn(__fmul_rn(v.x, a), v.y);
  v.z = __fdiv_rn(v.z, __fsqrt_rn(v.w));
  x[threadIdx.x] = v;
}
"""
BAD = {
    "fused multiply-add": (
        ("v.x = __fadd_rn(__fmul_rn(v.x, a), v.y);", "v.x = fmaf(v.x, a, v.y);"), [], "fma",
    ),
    "fast math": (
        ("__fdiv_rn(v.z, __fsqrt_rn(v.w))", "v.z / sqrtf(v.w)"), ["-use_fast_math"], "ftz|approx",
    ),
    "contraction": (("__fadd_rn(__fmul_rn(v.x, a), v.y)", "v.x * a + v.y"), ["-fmad=true"], "fma"),
    "scalar accesses": (
        ("float4 v = x[threadIdx.x];", "float4 v = {x->x, 1, 1, 1};"), [], "no LDG.E.128",
    ),
    "local memory": (
        ("v.z =", "float y[99]; for (int i = 0; i < 99; ++i) y[i] = x[i].x; v.y = y[(int)v.x]; v.z ="),
        [], "stack",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *BAD], ids=str)
def test_the_gate_refuses(name, tmp_path):
    """A kernel with one fault each; without a fault it passes."""
    (text, replacement), flags, expected = BAD[name] if name else (("", ""), [], None)
    source = tmp_path / "kernel.cu"
    source.write_text(GOOD.replace(text, replacement) if text else GOOD)
    fmad = [] if "-fmad=true" in flags or "-use_fast_math" in flags else ["-fmad=false"]
    wrong = problems(source, "90", tmp_path, ["-std=c++17", *fmad, *flags], {"good": True})
    if expected is None:
        assert wrong == []
    else:
        assert re.search(expected, " ".join(wrong))
