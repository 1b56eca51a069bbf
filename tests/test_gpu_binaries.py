"""What nvcc makes of the CUDA kernels: registers, spills, occupancy, vector width, arithmetic."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import instructions
import pytest
import sass
from instructions import Gate

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
# Of their multiprocessor, for three blocks of whose threads there are 80 registers (kBlocks in
# csrc/cuda/table.h): they do with fewer warps, which have more loads under way each.
THREE_BLOCKS = re.compile("update_kernel|step_pass_kernel|step_finish_kernel|sample_kernel")
# Bytes of stack, of spill stores and of spill loads: what is left now, most of it on sm_80 and sm_90,
# to be lowered where there is less.
SPILLS = {
    "update_kernel": (40, 56, 112), "step_finish_kernel": (48, 120, 176),
    "step_pass_kernel": (96, 284, 388), "capture_pass_kernel": (64, 76, 124),
    "count_kernel": (32, 28, 88), "squares_kernel": (8, 4, 4),
}  # fmt: skip
# The kernels that walk tensors, and whether they store to them 16 bytes at a time, too.
STREAMS = {
    "count_kernel": False, "narrow_kernel": False, "capture_kernel": False, "squares_kernel": False,
    "histogram_kernel": False,
    "update_kernel": True, "step_pass_kernel": True, "step_finish_kernel": True,
    "capture_pass_kernel": False, "capture_finish_kernel": False,
}  # fmt: skip

# Instructions per element of their loops, where no element is unsure: bytes read and written, limit,
# divisions. Of a pass the cheapest loop is that of tensors that are not ranked, then comes that of
# ranked ones (place=1); the dearest is for any dtypes, two factors, two thresholds. In bfloat16 there
# is no such. A count has loops of 4, 8 and 16 elements that read as much: of 4 bytes each in a gate for
# 8, as if they had 4.
GATES = (
    Gate("step_pass_kernelILb0E", 16, 12, 70, divisions=1, place=1),
    Gate("step_pass_kernelILb0E", 16, 12, 124, divisions=1),
    Gate("step_pass_kernelILb0E", 8, 6, 87, divisions=1),
    Gate("step_pass_kernelILb1E", 16, 12, 86, divisions=1, place=1),
    Gate("step_pass_kernelILb1E", 8, 6, 105, divisions=1),
    Gate("step_finish_kernelILb0E", 16, 12, 68, divisions=1, place=1),
    Gate("step_finish_kernelILb0E", 8, 6, 87, divisions=1),
    Gate("update_kernelILb0E", 16, 12, 60, divisions=1, place=0),
    Gate("update_kernelILb0E", 8, 6, 74, divisions=1),
    Gate("update_kernelILb1E", 16, 12, 75, divisions=1, place=0),
    Gate("update_kernelILb1E", 8, 6, 91, divisions=1),
    Gate("count_kernel", 8, 0, 21, divisions=0, place=0),
    Gate("count_kernel", 8, 0, 67, divisions=0),
    Gate("capture_kernel", 8, 0, 22, divisions=0, place=0),
    Gate("squares_kernel", 4, 0, 20),
    Gate("histogram_kernel", 8, 0, 36, divisions=0),
)

# PTX in single precision that is not one IEEE operation, rounded once, denormals kept. (Double
# precision is only used for constants of a step, and its division is a sequence with rcp.approx.)
FORBIDDEN = re.compile(
    r"\.ftz(\.sat)?\.f32|\.approx\.f32|\.full\.f32|\bfma\.\w+\.f32|\bmad\.f32"
    r"|\b(add|sub|mul)\.f32|\bdiv\.(?!rn)\w+\.f32|\bsqrt\.(?!rn)\w+\.f32"
    r"|cvt\.(?!rn\.bf16x2\.f32\b)\w*\.?(bf16|f16)"
)


def disassembler() -> str:
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = shutil.which("nvdisasm", path=str(folder)) or shutil.which("nvdisasm")
    return found or pytest.skip(
        "there is no nvdisasm (the triton package and the CUDA toolkit have it)"
    )


def problems(
    source: Path, arch: str, folder: Path, flags=FLAGS, streams=STREAMS, gates=GATES
) -> list[str]:
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
        spills = next((SPILLS[kernel] for kernel in SPILLS if kernel in name), (0, 0, 0))
        if any(x > limit for x, limit in zip((stack, stores, loads), spills, strict=True)):
            wrong.append(f"{name}: {stack} bytes of stack, {stores} of spill stores, {loads} of loads")
        has_three = THREE_BLOCKS.search(name) is not None
        if registers > (80 if has_three else 64):
            wrong.append(f"{name}: {registers} registers")
        # Registers are given out to warps in units of 256, shared memory has 1 KiB of its own a block.
        of_block = -(-registers * 32 // 256) * 256 * (THREADS // 32)
        blocks = min(
            limits.threads // THREADS, limits.registers // of_block, limits.shared // (shared + 1024)
        )
        if blocks * THREADS < limits.threads * (0.375 if has_three else 0.5):
            wrong.append(f"{name}: occupancy {blocks * THREADS / limits.threads:.0%}")
    wrong += [
        f"PTX: {match[0]} in {line.strip()}"
        for line in ptx.read_text().splitlines()
        if (match := FORBIDDEN.search(line))
    ]

    def disassemble(cubin: Path) -> str:
        command = [disassembler(), "-c", cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def assembled(text: str) -> str:
        (folder / "probe.ptx").write_text(text)
        probe = folder / "probe.cubin"
        command = [nvcc, f"-arch=sm_{arch}", "-cubin", folder / "probe.ptx", "-o", probe]
        subprocess.run(command, check=True)
        return disassemble(probe)

    code = disassemble(cubin)
    wrong += sass.problems(code, ptx.read_text(), assembled)
    sections = re.split(r"\.section\s+\.text\.", code)[1:]
    for section in sections:
        name = section.split(",")[0]
        for kernel in streams.keys() & set(re.findall("|".join(streams), name)):
            accesses = ("LDG.E.128", "STG.E.128")[: 1 + streams[kernel]]
            wrong += [f"{name}: no {access}" for access in accesses if access not in section]
    names = " ".join(name for name, *_ in found)
    wrong += [f"{kernel} is missing" for kernel in streams if kernel not in names]
    return wrong + instructions.problems(code, gates)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_as_compiled(arch, tmp_path):
    """No more spills and registers than there were, 50% occupancy (37.5% of updates), 128-bit accesses,
    IEEE arithmetic, and no more instructions than there were."""
    assert problems(CSRC / "cuda" / "launch.cu", arch, tmp_path) == []


GOOD = """
#include <cuda_bf16.h>
extern "C" __global__ void __launch_bounds__(256) good(float4* x, float a) {
  float4 v = x[threadIdx.x];
  v.x = __fadd_rn(__fmul_rn(v.x, a), v.y);
  v.z = __fdiv_rn(v.z, __fsqrt_rn(v.w));
  v.y = -v.y;
  v.w = -v.w;
  x[threadIdx.x] = v;
}
"""
# mul.f32 and add.f32 without a rounding, which ptxas may join.
PTXAS_MAY_FUSE = """0;
  asm("{.reg .f32 t; mul.f32 t, %1, %2; add.f32 %0, t, %3;}" : "=f"(v.x) : "f"(v.x), "f"(a), "f"(v.y))
"""
LOCAL_MEMORY = """float y[99] = {};
  for (int i = 0; i < 99; ++i) y[(int)x[i].y] += x[i].x;
  v.y = y[(int)v.x];
  v.z ="""
SUM, QUOTIENT = "__fadd_rn(__fmul_rn(v.x, a), v.y)", "__fdiv_rn(v.z, __fsqrt_rn(v.w))"
# What is replaced in it by what, flags, and all that must be said of it.
BAD = {
    "fused multiply-add": (SUM, "fmaf(v.x, a, v.y)", [], ["PTX: fma", "SASS.* FFMA"]),
    "contraction": (SUM, "v.x * a + v.y", ["-fmad=true"], ["PTX: fma", "SASS.* FFMA"]),
    "contraction by ptxas": (SUM, PTXAS_MAY_FUSE, ["-fmad=true"], ["PTX: mul.f32", "SASS.* FFMA"]),
    "another rounding": (SUM, "__fadd_rz(v.x, v.y)", [], ["SASS.* FADD.RZ"]),
    "flushed denormals": (SUM, "v.x + v.y", ["-ftz=true"], ["PTX: .ftz", "SASS.* FADD.FTZ"]),
    "fast math": (
        QUOTIENT, "v.z / sqrtf(v.w)", ["-use_fast_math"],
        ["PTX: .*ftz", "PTX: .*approx", "SASS.* MUFU.RCP", r"SASS.*\.FTZ"],
    ),
    "approximate quotient": (QUOTIENT, "__fdividef(v.z, v.w)", [], ["approx", "SASS.* MUFU.RCP"]),
    "quotient that is nearly right": (QUOTIENT, "v.z / v.w", ["-prec-div=false"], ["full", "MUFU.RCP"]),
    "approximate root": (
        QUOTIENT, "sqrtf(v.w)", ["-prec-sqrt=false"], ["approx", "SASS.* MUFU.(RSQ|SQRT)"],
    ),
    "exponential": (QUOTIENT, "__expf(v.w)", [], ["approx", "SASS.* MUFU.EX2"]),
    "narrowing by the hardware": (
        QUOTIENT, "__ushort_as_bfloat16(__bfloat16_as_ushort(__float2bfloat16_rn(v.w)))", [],
        ["PTX: cvt.*bf16", "SASS.* F2F"],
    ),
    "scalar accesses": ("v = x[threadIdx.x];", "v = {x->x, 1, 1, 1};", [], ["no LDG.E.128"]),
    "local memory": ("v.z =", LOCAL_MEMORY, [], ["stack"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "120"])
@pytest.mark.parametrize("name", [None, *BAD], ids=str)
def test_the_gate_refuses(name, arch, tmp_path):
    """A kernel with one fault each; without a fault it passes."""
    text, replacement, flags, expected = BAD[name] if name else ("", "", [], [])
    assert text in GOOD
    source = tmp_path / "kernel.cu"
    source.write_text(GOOD.replace(text, replacement) if text else GOOD)
    fmad = [] if "-fmad=true" in flags or "-use_fast_math" in flags else ["-fmad=false"]
    wrong = problems(source, arch, tmp_path, ["-std=c++17", *fmad, *flags], {"good": True}, ())
    if name is None:
        assert wrong == []
    for pattern in expected:
        assert any(re.search(pattern, line) for line in wrong), (pattern, wrong)
