"""Instructions that a loop over tensors issues, counted in machine code.

Of the ways around a loop that make its accesses of 16 bytes to global memory: the shortest one, and the
longest that leaves out what few elements need (a subroutine, which divides denormals; atomics; writes
that are not 16 bytes wide, of a log). Instructions that are predicated off count: they take an issue
slot all the same. What the shortest way leaves out can be usual, too, such as everything about risks
where a tensor may be plain AdamW: the divisions on the way tell, and a gate may ask for them.

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
from typing import NamedTuple

WIDE = 16  # bytes of an access that counts as one to a tensor
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w*|\$\S+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)|\b0x([0-9a-f]+)\s*$")
_ACCESS = re.compile(r"(LDG|LD|LDGSTS|STG|ST)\.E\b\S*?\.(64|128|256)\b")
_RARE = re.compile(r"CALL|ATOM|RED\b|(STG|ST)\.E(?!\S*\.(U8|S8|128|256)\b)")


class Way(NamedTuple):
    """What an iteration does that tells it from others: bytes loaded and stored, divisions."""

    loaded: int = 0
    stored: int = 0
    divisions: int = 0

    def then(self, other: Way) -> Way:
        return Way(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Block:
    """Instructions that are executed one after the other; ``cost`` counts them."""

    cost: int = 0
    way: Way = field(default_factory=Way)
    rare: bool = False
    successors: set[int] = field(default_factory=set)


@dataclass
class Loop:
    """
    Attributes:
        least: instructions of the shortest iteration of every kind.
        most: of the longest without anything rare.
        everything: of all blocks.
        moves: whether a wide load is in it and in no loop within.
    """

    address: str
    least: dict[Way, int]
    most: dict[Way, int]
    everything: int
    moves: bool

    def full(self) -> list[tuple[Way, int, int | None]]:
        """Of those that load most, and of these store most, the ones with the fewest and with the most
        divisions, where nothing is rare: least and most instructions."""
        _, loaded, stored = max((w.stored > 0, w.loaded, w.stored) for w in self.least)
        ways = [w for w in sorted(self.least) if w[:2] == (loaded, stored)]
        usual = [w for w in ways if w in self.most] or ways
        return [(w, self.least[w], self.most.get(w)) for w in dict.fromkeys((usual[0], usual[-1]))]

    def per_element(self, gate: Gate) -> float | None:
        """Instructions per element, of as many elements as possible; None if no way is as the gate
        says."""
        counts: dict[int, list[int]] = {}
        for way, cost in (self.most if gate.longest else self.least).items():
            elements, rest = divmod(way.loaded, gate.read)
            alike = gate.divisions in (None, way.divisions / elements if elements else 0)
            if elements and not rest and way.stored == elements * gate.written and alike:
                counts.setdefault(elements, []).append(cost)
        if not counts:
            return None
        elements = max(counts)
        return (max if gate.longest else min)(counts[elements]) / elements


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
        # Of older architectures, a call that does not come back.
        if "CALL" in line and ("`(.L" in line or re.search(r"@!?U?P\w+ +CALL", line)):
            line = re.sub(r"CALL\S*", "BRA", line)
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
        divisions = 0
        loaded = stored = 0
        for _, _, name, _ in lines[start:end]:
            access = _ACCESS.match(name)
            size = int(access[2]) // 8 if access else 0
            if access and size >= wide:
                loaded += size * access[1].startswith("LD")
                stored += size * access[1].startswith("ST")
            else:
                block.rare = block.rare or bool(_RARE.match(name))
            divisions += name == "FCHK"
        block.way = Way(loaded, stored, divisions)
        _, predicate, name, operands = lines[end - 1]
        always = not predicate and name.split(".")[0] in {"BRA", "BRX", "JMP", "EXIT", "RET"}
        # The condition of a branch can be an operand, too. Lanes of a warp stay together (BRA.DIV is
        # for those that do not).
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
        moves = any(blocks[k].way.loaded for k in part - within)
        usual = {k for k in part if not blocks[k].rare}
        yield Loop(
            f"0x{addresses[header]}",
            _ways(blocks, part, header, back, min) if moves else {},
            _ways(blocks, usual, header, back, max) if moves else {},
            sum(blocks[k].cost for k in part),
            moves,
        )


def _ways(
    blocks: Sequence[Block],
    part: set[int],
    header: int,
    back: set[tuple[int, int]],
    better: Callable[[int, int], int],
) -> dict[Way, int]:
    """Instructions once around, by the kind of way. Loops within are passed once, or not at all."""
    edges = {k: {s for s in blocks[k].successors & part if (k, s) not in back} for k in part}
    order = [min(c) for c in components(part, edges.__getitem__)][::-1]
    at: dict[int, dict[Way, int]] = {header: {Way(): 0}}
    ways: dict[Way, int] = {}
    for k in order:
        block = blocks[k]
        here = {w.then(block.way): cost + block.cost for w, cost in at.pop(k, {}).items()}
        into = [at.setdefault(s, {}) for s in edges[k]]
        into += [ways] * ((k, header) in back)
        for there in into:
            for way, cost in here.items():
                there[way] = better(cost, there.get(way, cost))
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
        divisions: on the way, per element; None: any number.
        longest: of the ways without anything rare the longest, not the shortest of all.
        place: of the kernel's loops that do so, from the cheapest on, the one that counts: -1, the
            dearest.
    """

    kernel: str
    read: int
    written: int
    limit: float
    divisions: float | None = None
    longest: bool = False
    place: int = -1


def counted(kernel: Iterable[Loop], gate: Gate) -> float | None:
    """Instructions per element of the loop that the gate is for; None if there is none."""
    counts = sorted(x for loop in kernel if (x := loop.per_element(gate)) is not None)
    there = -len(counts) <= gate.place < len(counts)
    return counts[gate.place] if there else None


def matches(gate: Gate, kernel: str) -> bool:
    return re.search(gate.kernel, kernel) is not None


def problems(sass: str, gates: Iterable[Gate], wide: int = WIDE) -> list[str]:
    """Kernels above their limit, and gates that nothing passes through."""
    found = kernels(sass, wide)
    wrong = []
    for gate in gates:
        names = [name for name in found if matches(gate, name)]
        if not names:
            wrong.append(f"{gate.kernel}: no such kernel")
        for name in names:
            count = counted(found[name], gate)
            if count is None:
                wrong.append(f"{name}: no loop moves {gate.read} + {gate.written} bytes an element")
            elif count > gate.limit:
                wrong.append(f"{name}: {count:.1f} instructions an element, limit {gate.limit:g}")
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
    parser.add_argument("--wide", type=int, default=WIDE, help="bytes of an access to a tensor")
    parser.add_argument("--only", default="", help="kernels, by a regular expression")
    parser.add_argument("--all", action="store_true", help="every kind of iteration")
    args = parser.parse_args(argv)
    print("bytes loaded and stored, divisions: instructions of the shortest and the longest iteration")
    print("and of all blocks; of the first two per element of 4 bytes [of 2 bytes]")
    for path in args.files:
        for name, loops in kernels(read(path), args.wide).items():
            if loops and re.search(args.only, name):
                print(name)
            for loop in loops * bool(re.search(args.only, name)):
                ways = loop.full()
                if args.all:
                    ways = [(w, loop.least[w], loop.most.get(w)) for w in sorted(loop.least)]
                for way, least, most in ways:
                    print(f"  {loop.address:>7}: {_line(name, way, least, most)} {loop.everything:>6}")


def _line(kernel: str, way: Way, least: int, most: int | None) -> str:
    operands = operands_of(kernel, way)
    each = [
        f"{count * operands * 4 / way.loaded:.1f} [{count * operands * 2 / way.loaded:.1f}]"
        if count and way.loaded
        else "-"
        for count in (least, most)
    ]
    return (
        f"{way.loaded:>4} {way.stored:>4} {way.divisions:>3}: {least:>5} {most or '-':>5}  "
        f"{operands} operands: {each[0]:>13} to {each[1]:>13}"
    )


def operands_of(kernel: str, way: Way) -> int:
    """How many tensors (of one dtype) a loop reads: by what it stores, or what there can be."""
    if way.stored:
        return 2 if way.loaded == way.stored * 2 else 4
    return 1 if "squares" in kernel else 2


if __name__ == "__main__":
    main()
