"""What Triton makes of its kernels: registers, spills, vector width, arithmetic. No GPU is needed.

Parity is in test_parity.py, with the kernels interpreted, or on a GPU. The interpreter's arithmetic is
NumPy's, so what the compiler makes of it is read here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

I64, I32, F32, F64 = "*i64", "*i32", "*fp32", "*fp64"
WALK = {"rows": I64, "tile_rows": I32, "tiles": "i32", "dims": I64}
RISK = {**WALK, "hyper": F64, "inv_scale": F32, "clip": F32}
SELECT = {**RISK, "state": I64, "selection": I64, "upper": "i32", "lower": "i32", "programs": "i32"}
BASE = {"LINEAR": True, "ALIGNED": True, "SCALED": True, "CLIPPED": True, "BLOCK": 512}
SECOND = {**BASE, "D0": 0, "D1": 0, "SECOND": True, "RANK_INACTIVE": False}
DIGIT = {**SECOND, "BLOCK": 1024, "APPROX": False}
UPDATE = {
    **RISK, "found_inf": F32, "selection": I64, "prepared": F32, "keys": I32, "counts": I64,
    "first_weight": "i32", "second_weight": "i32",
}  # fmt: skip
OPTIONS = {
    **BASE, "D0": 0, "D1": 0, "D2": 0, "D3": 0, "FRACTIONAL": True, "FROM_RISK": True,
    "HAS_FIRST": True, "HAS_SECOND": False, "RULES_OUT": False, "RANK_INACTIVE": False,
    "STOCHASTIC": True, "FOUND": True,
}  # fmt: skip
# kernel, signature, constants, 16-byte loads and stores expected
CASES = {
    "select-1": ("_select_kernel", SELECT, {**DIGIT, "PASS": 0, "LAST": False}, 2, 0),
    "select-3": ("_select_kernel", SELECT, {**DIGIT, "PASS": 2, "LAST": True}, 2, 0),
    "capture": ("_capture_kernel", {**RISK, "selection": I64}, {**SECOND, "SECOND": False}, 1, 0),
    "update": ("_update_kernel", UPDATE, OPTIONS, 4, 3),
    "update-masks": (
        "_update_kernel", UPDATE,
        {**OPTIONS, "FROM_RISK": False, "HAS_SECOND": True, "RULES_OUT": True}, 4, 3,
    ),
    "update-bf16": ("_update_kernel", UPDATE, {**OPTIONS, "D0": 1, "D1": 1, "D2": 1, "D3": 1}, 0, 0),
    "squares": (
        "_squares_kernel", {**WALK, "inv_scale": F32, "partial": F64, "base": "i32"},
        {k: v for k, v in BASE.items() if k != "CLIPPED"} | {"D0": 0}, 1, 0,
    ),
}  # fmt: skip
FORBIDDEN = re.compile(r"\S*\.ftz\S*|\S*\.approx\S*|\S*\.full\.f32|(?:fma|mad)\.\S*f32")
# A histogram's programs keep their counts in registers: its occupancy is below 50%.
MOST_REGISTERS = {"update": 64, "update-bf16": 64, "select-1": 168, "select-3": 168}
MOST_STACK = {("update-bf16", 80): 8}  # bytes; spills nothing else


def compile_case(name: str, arch: int) -> None:
    """Prints what is wrong. Runs in a process of its own, in which kernels are not interpreted."""
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rose_ops.backends.triton import kernels

    kernel, signature, constants, loads, stores = CASES[name]
    function = getattr(kernels, kernel)
    names = function.arg_names
    compiled = triton.compile(
        ASTSource(
            function,
            {n: signature.get(n, "constexpr") for n in names},
            constexprs=constants,
            attrs={
                (names.index(n),): [["tt.divisibility", 16]]
                for n, kind in signature.items()
                if kind.startswith("*")
            },
        ),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": 4,
            "enable_fp_fusion": False,
            "maxnreg": 64 if "update" in name else None,
        },
    )
    ptx = compiled.asm["ptx"]
    for found in sorted(set(FORBIDDEN.findall(ptx))):
        print("forbidden:", found)
    for access, wanted in (("ld", loads), ("st", stores)):
        count = len(re.findall(rf"{access}\.global\S*\.v4\.b32", ptx))
        if count < wanted:
            print(f"{count} {access}.global.v4, expected {wanted}")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    print(f"# {registers} registers")
    if registers > MOST_REGISTERS.get(name, 64) or stack > MOST_STACK.get((name, arch), 0) or local:
        print(f"{registers} registers, {stack} bytes of stack, {local} of local memory")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("name", CASES)
def test_kernels_as_compiled(name, arch, monkeypatch, tmp_path):
    """At most 64 registers (168 in a histogram), no local memory, 16-byte accesses, IEEE."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, __file__, name, str(arch)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if not line.startswith("#")] == []


if __name__ == "__main__":
    compile_case(sys.argv[1], int(sys.argv[2]))
