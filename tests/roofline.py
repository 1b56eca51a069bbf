"""Static roofline: the time that a kernel's bytes and its instructions take, by datasheets.

An estimate, until a measurement replaces it: bytes are those that the simulated device counts
(tests/test_simt.py bounds them), instructions those of the shortest way through the machine code
(instructions.py; lanes that part ways issue more), and a kernel is taken to reach a share of what a
board is sold for. Launches, the sample, the log's search and atomics are not in it.

    python tests/roofline.py [nvcc's output for one architecture]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import instructions
from instructions import Gate

CSRC = Path(__file__).parents[1] / "csrc"
BANDWIDTH = 0.9  # of the datasheet's, that a copy reaches
ISSUE = 0.75  # of the issue slots at the boost clock, that a kernel uses which is bound by them


@dataclass(frozen=True)
class Board:
    """Of NVIDIA's datasheets of the SXM boards, and architecture whitepapers for multiprocessors and
    clocks. A multiprocessor of all of them issues four warps' instructions a cycle.

    Attributes:
        gb_per_s: of memory. mhz: boost clock.
    """

    name: str
    arch: str
    gb_per_s: float
    multiprocessors: int
    mhz: float

    def memory_ps(self, bytes_: float) -> float:
        """Picoseconds that an element's bytes take."""
        return bytes_ / (self.gb_per_s * BANDWIDTH) * 1e3

    def issue_ps(self, count: float) -> float:
        """Picoseconds that an element's instructions take."""
        return count / (self.multiprocessors * 4 * 32 * self.mhz * ISSUE) * 1e6


BOARDS = (
    Board("A100", "80", 2039, 108, 1410),
    Board("H100", "90", 3350, 132, 1980),
    Board("H200", "90", 4800, 132, 1980),
    Board("B200", "100", 7700, 148, 1965),
)


@dataclass(frozen=True)
class Kernel:
    """
    Attributes:
        bytes_: read and written, of an element.
        gate: names its loop; None: its code is not ours (AdamW's, which PyTorch compiles).
    """

    name: str
    bytes_: float
    gate: Gate | None = None


# Of the loops of a pass, the cheapest is that of tensors that are not ranked; those for any dtypes are
# the dearest. Of a count, those of other dtypes and in first order have more elements at once.
KERNELS = (
    Kernel("AdamW, float32", 28),
    # 28, and the log.
    Kernel("pass, float32", 30, Gate("step_pass_kernelILb0E", 16, 12, 0, divisions=1, place=1)),
    Kernel("count, float32", 8.2, Gate("count_kernel", 8, 0, 0, divisions=0, place=0)),
    # And two bits of masks.
    Kernel("update, float32", 28.25, Gate("update_kernelILb0E", 16, 12, 0, divisions=1, place=0)),
    Kernel("squares, float32", 4, Gate("squares_kernel", 4, 0, 0)),
    Kernel("AdamW, bfloat16", 14),
    Kernel("pass, bfloat16", 16, Gate("step_pass_kernelILb0E", 8, 6, 0, divisions=1)),
    Kernel("count, bfloat16", 4.2, Gate("count_kernel", 4, 0, 0, divisions=0, place=4)),
    Kernel("update, bfloat16", 14.25, Gate("update_kernelILb0E", 8, 6, 0, divisions=1)),
)


@dataclass(frozen=True)
class Row:
    """An element's time, in picoseconds."""

    board: Board
    kernel: Kernel
    count: float | None
    memory: float
    issue: float

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.issue else "issue"


def rows(sass: dict[str, str], kernels: tuple[Kernel, ...] = KERNELS) -> list[Row]:
    """For the boards whose architecture is there.

    Args:
        sass: by architecture.
    """
    found = []
    for board in BOARDS:
        if board.arch not in sass:
            continue
        loops = instructions.kernels(sass[board.arch])
        for kernel in kernels:
            count = None if kernel.gate is None else _count(loops, kernel.gate)
            issue = board.issue_ps(count or 0)
            found.append(Row(board, kernel, count, board.memory_ps(kernel.bytes_), issue))
    return found


def _count(kernels: dict[str, list[instructions.Loop]], gate: Gate) -> float:
    named = [loop for name in kernels for loop in kernels[name] if instructions.matches(gate, name)]
    count = instructions.counted(named, gate)
    assert count is not None, f"no loop of {gate.kernel} moves {gate.read} + {gate.written} bytes"
    return count


def table(found: list[Row]) -> str:
    """In Markdown. Times in ms of 64Mi elements; a ratio to what AdamW's bytes take."""
    lines = [
        "| board | kernel | bytes | instructions | ms by bytes | by instructions | bound | of AdamW |",
        "| --- | --- | --: | --: | --: | --: | --- | --: |",
    ]
    for row in found:
        times = [ps * (1 << 26) / 1e9 for ps in (row.memory, row.issue)]
        ratio = max(row.memory, row.issue) / row.board.memory_ps(KERNELS[0].bytes_)
        issued = ("?", "?") if row.count is None else (f"{row.count:.0f}", f"{times[1]:.3f}")
        lines.append(
            f"| {row.board.name} | {row.kernel.name} | {row.kernel.bytes_:g} | {issued[0]} | "
            f"{times[0]:.3f} | {issued[1]} | {row.bound if row.count else '?'} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def compiled(arch: str) -> str | None:
    """Machine code of the kernels, disassembled; None without the tools."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or instructions.tool("nvdisasm") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
        command = [nvcc, *flags, f"-arch=sm_{arch}", "-cubin", CSRC / "cuda" / "launch.cu", "-o", cubin]
        subprocess.run(command, check=True)
        return instructions.read(cubin)


if __name__ == "__main__":
    given = [instructions.read(Path(path)) for path in sys.argv[1:]]
    archs = {board.arch for board in BOARDS}
    code = {arch: given[0] if given else compiled(arch) for arch in archs}
    print(table(rows({arch: sass for arch, sass in code.items() if sass is not None})))
