"""The counter of instructions, on code whose counts are known."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import instructions
import pytest
from instructions import Gate, Way

# Blocks: header 4 (a load), rare 3 (a store of 4 bytes), usual 2, division 2 with its call 1, end 4.
LOOP = """
	.section	.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   ISETP.NE.AND P0, PT, R4, RZ, PT ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   MOV R1, R2 ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0080*/                   ISETP.NE.AND P0, PT, R5, RZ, PT ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   FCHK P0, R4, R5 ;
        /*00b0*/              @!P0 BRA `(.L_x_2) ;
        /*00c0*/                   CALL.REL.NOINC `($__internal_0_$division) ;
.L_x_2:
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*00f0*/                   ISETP.NE.AND P0, PT, R6, RZ, PT ;
        /*0100*/                   BRA.U UP0, `(.L_x_0) ;
.L_x_3:
        /*0110*/                   EXIT ;
$__internal_0_$division:
        /*0120*/                   MUFU.RCP R4, R5 ;
        /*0130*/                   RET.REL.NODEC R2 `(kernel) ;
.L_x_9:
        /*0140*/                   BRA `(.L_x_9) ;
"""


def test_ways_around_a_loop():
    ((name, (loop,)),) = instructions.kernels(LOOP).items()
    assert (name, loop.address) == ("kernel", "0x10")
    # Around everything: 4 + 2 + 4. With the division 2 more, and never the call (1, and 2 of the rest).
    assert loop.least == {Way(16, 16, 0): 10, Way(16, 16, 1): 12}
    assert loop.most == {Way(16, 16, 0): 10, Way(16, 16, 1): 12}
    assert loop.everything == 4 + 3 + 2 + 2 + 1 + 3 + 4  # with the subroutine, 3 to the end
    usual = instructions.kernels(LOOP.replace("STG.E desc", "STS R4,"))["kernel"][0]
    assert usual.least == loop.least
    assert usual.most == {Way(16, 16, 0): 13, Way(16, 16, 1): 15}


def test_gates():
    def problems(*gate, **how) -> list[str]:
        return instructions.problems(LOOP, [Gate(*gate, **how)])

    assert problems("kern", 4, 4, 2.5) == []
    assert problems("kern", 4, 4, 2.4) == ["kernel: 2.5 instructions an element, limit 2.4"]
    assert problems("kern", 2, 2, 1.3) == []  # 8 elements
    assert problems("kern", 4, 4, 3, divisions=0.25) == []
    assert problems("kern", 4, 4, 2.9, divisions=0.25) != []
    assert problems("kern", 4, 4, 2.9, longest=True) != []
    assert problems("kern", 8, 4, 99) == ["kernel: no loop moves 8 + 4 bytes an element"]
    assert problems("other", 4, 4, 99) == ["other: no such kernel"]


def test_components():
    edges = {0: {1}, 1: {2, 3}, 2: {1}, 3: {4}, 4: {3, 5}, 5: set()}
    assert instructions.components(set(edges), edges.__getitem__) == [{5}, {3, 4}, {1, 2}, {0}]


SOURCE = """
extern "C" __global__ void copies(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i];
    y += n;
  }
}
extern "C" __global__ void twice(const float4* x, float4* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    const float4 a = x[i], b = x[i + 256];
    y[i] = a;
    y[i + 256] = b;
  }
}
extern "C" __global__ void divides(const float4* x, float4* y, float a, int n, unsigned* count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    float4 v = x[i];
    v.x = __fdiv_rn(v.x, a);
    v.y = __fdiv_rn(v.y, a);
    if (v.z > a) atomicAdd(count, 1u);
    y[i] = v;
  }
}
extern "C" __global__ void scalars(const float* x, float* y, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i];
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_compiled_loops(arch, tmp_path, capsys):
    nvcc = shutil.which("nvcc") or pytest.skip("there is no nvcc")
    if instructions.tool("nvdisasm") is None:
        pytest.skip("there is no nvdisasm (the triton package and the CUDA toolkit have it)")
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(SOURCE)
    subprocess.run([nvcc, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin], check=True)
    found = instructions.kernels(instructions.read(cubin))
    assert found.pop("scalars") == []
    loops = {}
    for name, of_kernel in found.items():
        (loops[name],) = of_kernel  # the inner one alone
    assert list(loops["copies"].least) == [Way(16, 16)]
    assert list(loops["twice"].least) == [Way(32, 32)]
    for name in ("copies", "twice"):
        (least,) = loops[name].least.values()
        assert least == loops[name].everything < 20
    gate = Gate("twice", 4, 4, 2.5)
    assert 1 <= (loops["twice"].per_element(gate) or 0) < (loops["copies"].per_element(gate) or 0)
    divides, way = loops["divides"], Way(16, 16, 2)
    assert list(divides.least) == [way]
    assert divides.least[way] < divides.everything
    assert divides.least[way] <= divides.most.get(way, divides.least[way])
    assert divides.least[way] >= 2 * 8

    instructions.main([str(cubin), "--only", "div"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "divides"
    assert f"{divides.least[way]}" in lines[3]

    text = tmp_path / "kernels.sass"
    if cuobjdump := instructions.tool("cuobjdump"):
        run = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True)
        text.write_text(run.stdout)
        again = instructions.kernels(instructions.read(Path(text)))
        assert {name: [loop.least for loop in of] for name, of in again.items() if of} == {
            name: [loop.least] for name, loop in loops.items()
        }
