"""Instructions that a loop over tensors issues, counted in machine code.

An iteration is the cheapest way around the loop that makes its accesses of 16 bytes to global memory:
the path of ordinary numbers in full vectors, with every instruction on it, predicated off or not, since
that takes an issue slot all the same. Out of line are what a division does with denormals (a subroutine,
counted in full where a path calls it), what is done with elements that are logged, and so on.

    python tests/instructions.py kernels.cubin     (or what nvdisasm -c or cuobjdump -sass made of it)
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

WIDE = 16  # bytes of an access that counts as one to a tensor
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w*|\$\S+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)|\b0x([0-9a-f]+)\s*$")
_ACCESS = re.compile(r"(LDG|LD|LDGSTS|STG|ST)\.E\b\S*?\.(64|128|256)\b")
Moved = tuple[int, int]  # bytes: loaded, stored


@dataclass
class Block:
    """Instructions that are executed one after the other; ``cost`` counts them."""

    cost: int = 0
    moved: Moved = (0, 0)
    successors: set[int] = field(default_factory=set)


@dataclass
class Loop:
    """
    Attributes:
        header: number of the block that an iteration begins with.
        ways: instructions of the cheapest iteration, by the bytes that it moves.
        everything: instructions of all its blocks.
        moves: whether a wide load is in it and in no loop within.
    """

    header: int
    address: str
    ways: dict[Moved, int]
    everything: int
    moves: bool

    @property
    def full(self) -> tuple[Moved, int]:
        """Of the iterations that load most, the one that stores most: its bytes and instructions."""
        moved = max(self.ways)
        return moved, self.ways[moved]

    def per_element(self, read: int, written: int) -> float | None:
        """Instructions per element, of as many elements as possible.

        Args:
            read, written: bytes of an element. None if no iteration moves a multiple of both.
        """
        elements = {
            loaded // read: cost
            for (loaded, stored), cost in self.ways.items()
            if loaded and loaded % read == 0 and stored == loaded // read * written
        }
        return elements[max(elements)] / max(elements) if elements else None


def kernels(sass: str, wide: int = WIDE) -> dict[str, list[Loop]]:
    """The loops that load from tensors, by kernel."""
    parts = re.split(r"\.section\s+\.text\.([^\s,]+).*|^\s*Function : (\S+)\s*$", sass, flags=re.M)[1:]
    return {
        (first or second).strip('"'): [loop for loop in _loops(code, wide) if loop.moves]
        for first, second, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def _blocks(code: str, wide: int) -> tuple[list[Block], list[str]]:
    """Blocks, in the order of the code, and their addresses."""
    lines: list[tuple[str, str, str, str]] = []
    labels: dict[str, int] = {}
    subroutines: list[int] = []
    for line in code.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(lines)
            if found[1].startswith("$"):
                subroutines.append(len(lines))
        elif found := _INSTRUCTION.match(line):
            address = found[1].lstrip("0") or "0"
            labels[address] = len(lines)
            lines.append((address, (found[2] or "").strip(), found[3], found[4].strip()))
    subroutines.append(len(lines))

    def target(operands: str) -> int | None:
        found = _TARGET.search(operands)
        return found and labels.get(found[1] or found[2].lstrip("0") or "0")

    leaders = {0, *subroutines}
    for i, (_, _, name, operands) in enumerate(lines):
        if re.match(r"BRA|BRX|JMP|EXIT|RET|CALL", name):
            leaders.add(i + 1)
            if name.startswith(("BRA", "JMP")) and (to := target(operands)) is not None:
                leaders.add(to)
    starts = sorted(i for i in leaders if i < len(lines))
    number = {start: k for k, start in enumerate(starts)}
    blocks = []
    for k, start in enumerate(starts):
        end = starts[k + 1] if k + 1 < len(starts) else len(lines)
        block = Block(end - start)
        loaded = stored = 0
        for _, _, name, _ in lines[start:end]:
            if (access := _ACCESS.match(name)) and (size := int(access[2]) // 8) >= wide:
                loaded, stored = (
                    loaded + size * ("L" in access[1]),
                    stored + size * ("S" == access[1][0]),
                )
        block.moved = loaded, stored
        _, predicate, name, operands = lines[end - 1]
        always = not predicate and name.split(".")[0] in {"BRA", "BRX", "JMP", "EXIT", "RET"}
        # The condition of a branch can be an operand, too. Lanes of a warp stay together (BRA.DIV is for
        # those that do not).
        if name.startswith(("BRA", "JMP")):
            always = always and operands.startswith(("`", "0x"))
            if ".DIV" not in name and (to := target(operands)) is not None:
                block.successors.add(number[to])
        if name.startswith("CALL") and (to := target(operands)) is not None:
            block.cost += next((after for after in subroutines if after > to), to) - to
        if not always and end < len(lines):
            block.successors.add(number[end])
        blocks.append(block)
    return blocks, [lines[start][0] for start in starts]


def _loops(code: str, wide: int) -> Iterator[Loop]:
    blocks, addresses = _blocks(code, wide)
    found: list[tuple[int, set[int]]] = []
    back: set[tuple[int, int]] = set()  # edges to headers, from within

    def search(nodes: set[int]) -> None:
        for part in components(nodes, lambda k: blocks[k].successors - {h for u, h in back if u == k}):
            if len(part) == 1 and not part & blocks[min(part)].successors:
                continue
            entries = {
                k
                for k in part
                if any(k in blocks[u].successors for u in range(len(blocks)) if u not in part)
            }
            header = min(entries or part)
            back.update((u, header) for u in part if header in blocks[u].successors)
            found.append((header, part))
            search(part - {header})

    search(set(range(len(blocks))))
    for header, part in found:
        within = set().union(*(p for _, p in found if p < part))
        moves = any(blocks[k].moved[0] for k in part - within)
        ways = _ways(blocks, part, header, back) if moves else {}
        everything = sum(blocks[k].cost for k in part)
        yield Loop(header, f"0x{addresses[header]}", ways, everything, moves and bool(ways))


def _ways(
    blocks: Sequence[Block], part: set[int], header: int, back: set[tuple[int, int]]
) -> dict[Moved, int]:
    """Fewest instructions once around, by the bytes moved. Loops within are passed once, or not at all."""
    edges = {k: {s for s in blocks[k].successors & part if (k, s) not in back} for k in part}
    order = [min(c) for c in components(part, edges.__getitem__)][::-1]
    at: dict[int, dict[Moved, int]] = {header: {(0, 0): 0}}
    ways: dict[Moved, int] = {}
    for k in order:
        block = blocks[k]
        here = {
            (moved[0] + block.moved[0], moved[1] + block.moved[1]): cost + block.cost
            for moved, cost in at.pop(k, {}).items()
        }
        into = [at.setdefault(s, {}) for s in edges[k]]
        into += [ways] * ((k, header) in back)
        for there in into:
            for moved, cost in here.items():
                there[moved] = min(cost, there.get(moved, cost))
    return ways


def components(nodes: set[int], successors: Callable[[int], Iterable[int]]) -> list[set[int]]:
    """Strongly connected ones (Tarjan), those that come last first."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    inside: set[int] = set()
    found = []
    for root in sorted(nodes):
        if root in index:
            continue
        work = [(root, iter(sorted(successors(root))))]
        index[root] = low[root] = len(index)
        stack.append(root)
        inside.add(root)
        while work:
            node, rest = work[-1]
            for k in rest:
                if k not in nodes:
                    continue
                if k not in index:
                    index[k] = low[k] = len(index)
                    stack.append(k)
                    inside.add(k)
                    work.append((k, iter(sorted(successors(k)))))
                    break
                if k in inside:
                    low[node] = min(low[node], index[k])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = set()
                    while node not in part:
                        part.add(k := stack.pop())
                        inside.discard(k)
                    found.append(part)
    return found


# ------------------------------------------------------------------------------------------------ gate


@dataclass(frozen=True)
class Gate:
    """What a kernel may issue.

    Attributes:
        kernel: of its (mangled) name, a regular expression.
        read, written: bytes of an element in its loop.
        limit: instructions per element.
    """

    kernel: str
    read: int
    written: int
    limit: float


def problems(sass: str, gates: Iterable[Gate], wide: int = WIDE) -> list[str]:
    """Kernels above their limit, and gates that nothing passes through. Of the loops of a kernel that
    move what the gate says, the dearest counts."""
    found = kernels(sass, wide)
    wrong = []
    for gate in gates:
        names = [name for name in found if re.search(gate.kernel, name)]
        if not names:
            wrong.append(f"{gate.kernel}: no such kernel")
        for name in names:
            counts = [x for loop in found[name] if (x := loop.per_element(gate.read, gate.written))]
            if not counts:
                wrong.append(f"{name}: no loop moves {gate.read} + {gate.written} bytes an element")
            elif max(counts) > gate.limit:
                wrong.append(f"{name}: {max(counts):.1f} instructions an element, limit {gate.limit:g}")
    return wrong


# ------------------------------------------------------------------------------------------------- CLI


def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump: the triton package and the CUDA toolkit have them."""
    spec = find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    found = [shutil.which(name, path=str(folder)) for folder in folders]
    return next(filter(None, found), None) or shutil.which(name)


def read(path: Path) -> str:
    if not path.read_bytes().startswith(b"\x7fELF"):
        return path.read_text()
    if (nvdisasm := tool("nvdisasm")) is None:
        sys.exit("there is no nvdisasm (the triton package and the CUDA toolkit have it)")
    return subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--wide", type=int, default=WIDE, help="bytes of an access to a tensor, at least"
    )
    parser.add_argument("--only", default="", help="kernels, by a regular expression")
    parser.add_argument("--ways", action="store_true", help="every kind of iteration, by what it moves")
    args = parser.parse_args(argv)
    print(
        f"{'loop at':>8} {'read':>5} {'written':>8} {'issued':>7} {'all':>6}   per 4 bytes of an operand"
    )
    for path in args.files:
        for name, loops in kernels(read(path), args.wide).items():
            if not loops or not re.search(args.only, name):
                continue
            print(name)
            for loop in loops:
                ways = sorted(loop.ways.items(), reverse=True) if args.ways else [loop.full]
                for (loaded, stored), cost in ways:
                    operands = operands_of(name, loaded, stored)
                    each = " or ".join(
                        f"{cost / (loaded / n / 4):.1f} ({n} read; {cost / (loaded / n / 2):.1f} if 2 bytes)"
                        for n in operands
                    )
                    print(
                        f"{loop.address:>8} {loaded:>5} {stored:>8} {cost:>7} {loop.everything:>6}   {each}"
                    )


def operands_of(kernel: str, loaded: int, stored: int) -> list[int]:
    """How many operands of equal size a loop reads: by what it stores, or what there can be."""
    if stored and loaded * 3 == stored * 4:
        return [4]
    if stored and loaded == stored * 2:
        return [2]
    return [1] if "squares" in kernel else [4] if stored else [2]


if __name__ == "__main__":
    main()
