"""Single-precision arithmetic in machine code, which PTX need not show: ptxas has the last word.

IEEE division and square root are themselves made of approximations and fused multiply-adds, inline and
in a subroutine for the rare cases. What one of them is made of is learnt from a kernel that has nothing
else (a probe, assembled by the same ptxas for the same architecture), so that whatever is left over in
a kernel is what the source did not ask for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

# Fused, approximate, flushing, rounding another way, or narrowing to bfloat16 (of which pairs are asked
# for: access.cuh; to float16, the hardware rounds as it should). In double precision, only constants of
# a step are computed.
WATCHED = re.compile(
    r"FFMA\S*|MUFU\.(?!\w+64H)\S+|\S*\.FTZ\S*|F(?:ADD|MUL)\S*\.R[MPZ]\S*|F2FP?\S*BF16\S*"
    r"|H(?:ADD|MUL|FMA)2\S*"
)
# Moves of constants, and exact widening.
HARMLESS = re.compile(r"HFMA2\S* \S+, -RZ, RZ, |HADD2\.F32 \S+, -RZ, ")

# Operation: what it is in PTX, and the instruction that every inline instance has exactly one of (None:
# there is no such, and instances are counted in PTX).
OPERATIONS = {
    "div.rn.f32": ("f32", "FCHK"),
    "sqrt.rn.f32": ("f32", "MUFU.RSQ"),
    "div.u32": ("u32", "I2F.U32.RP"),
    "div.rn.f64": ("f64", None),
    "div.u64": ("u64", None),
    "div.s64": ("s64", None),
    "cvt.rn.bf16x2.f32": ("f32", None),
}


def probes(ptx: str) -> str:
    """A kernel in PTX for each operation, with the header of ``ptx``."""
    header = "\n".join(re.findall(r"^\.(?:version|target|address_size).*", ptx, re.M)[:3])
    kernels = []
    for operation, (kind, _) in OPERATIONS.items():
        operands = "%x1" if "sqrt" in operation else "%x1, %x2"
        result, of_result = ("%pair", "b32") if "x2" in operation else ("%x0", kind)
        kernels.append(f"""
.visible .entry {operation.replace(".", "_")}(.param .u64 data) {{
  .reg .b64 %a;
  .reg .{kind} %x<3>;
  .reg .b32 %pair;
  ld.param.u64 %a, [data];
  cvta.to.global.u64 %a, %a;
  ld.global.{kind} %x1, [%a];
  ld.global.{kind} %x2, [%a+8];
  {operation} {result}, {operands};
  st.global.{of_result} [%a], {result};
  ret;
}}""")
    return header + "\n".join(kernels) + "\n"


def functions(sass: str) -> dict[str, dict[str, Counter[str]]]:
    """By kernel: watched instructions and markers, inline (under "") and of each of its subroutines."""
    markers = {marker for _, marker in OPERATIONS.values() if marker}
    found: dict[str, dict[str, Counter[str]]] = {}
    for section in re.split(r"\.section\s+\.text\.", sass)[1:]:
        parts = found.setdefault(section.split(",")[0].strip('"'), {"": Counter()})
        current = parts[""]
        for line in section.splitlines():
            if label := re.match(r"\$(?:__internal_\d+_\$)?(\S+):", line):
                current = parts.setdefault(label[1], Counter())
            elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?(\S+)([^;]*);", line):
                watched = WATCHED.fullmatch(code[1]) and not HARMLESS.match(code[1] + code[2])
                if watched or code[1] in markers:
                    current[code[1]] += 1
    return found


def _numbers(codes: Counter[str]) -> Counter[str]:
    """Those that make numbers: a comparison may be made again rather than kept."""
    return Counter({code: 1 if code.startswith("FSETP") else n for code, n in codes.items()})


def problems(
    sass: str, ptx: str, disassemble: Callable[[str], str], allowed: Mapping[str, int] | None = None
) -> list[str]:
    """What the kernels do that their operations do not explain.

    Args:
        sass: disassembled by ``nvdisasm -c``.
        ptx: what it was made from.
        disassemble: from PTX to SASS, by the same ptxas for the same architecture.
        allowed: instructions of each kernel that are explained already.
    """
    learnt = functions(disassemble(probes(ptx)))
    subroutines = {name: code for parts in learnt.values() for name, code in parts.items() if name}
    wrong = []
    for kernel, parts in functions(sass).items():
        inline = parts.pop("")
        source = re.search(rf"\.entry {re.escape(kernel)}\b.*?^}}", ptx, re.M | re.S)
        assert source, f"{kernel} is not in the PTX"
        explained = Counter(allowed)
        for operation, (_, marker) in OPERATIONS.items():
            one = learnt[operation.replace(".", "_")][""]
            in_ptx = len(re.findall(rf"\b{re.escape(operation)}\b", source[0]))
            for code, times in one.items():
                explained[code] += times * (inline[marker] if marker else in_ptx)
        wrong += [
            f"SASS: {kernel}: {inline[code]} {code}, {explained[code]} explained"
            for code in sorted(inline | explained)
            if inline[code] != explained[code]
        ]
        wrong += [
            f"SASS: {kernel}: {name} has {dict(codes)}"
            for name, codes in parts.items()
            if _numbers(codes) != _numbers(subroutines.get(name, Counter()))
        ]
    return wrong
