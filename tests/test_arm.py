"""The CPU's loops compute the same bits with every set of instructions: those of x86-64 here (a part of
`make verify-gpu`), and those of aarch64 by a cross compiler and an emulator, where there are any (`make
verify-arm`)."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutant_build import CSRC, ROOT, setup_flags
from torch.utils.cpp_extension import include_paths

LOOPS = ROOT / "tests" / "loops"
NATIVE = shlex.split(os.environ.get("CXX", "g++"))
CROSS = shlex.split(os.environ.get("CROSS_CXX") or "aarch64-linux-gnu-g++")
EMULATOR = shlex.split(os.environ.get("EMULATOR", "qemu-aarch64"))
INCLUDES = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}"]
MISSING = [tool for tool in (CROSS[0], *EMULATOR[:1]) if shutil.which(tool) is None]

FOR_AARCH64 = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)}"),
]


def for_aarch64(test):
    for mark in FOR_AARCH64:
        test = mark(test)
    return test


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout


def build(folder: Path, compiler: list[str], *flags: str, of_loops: tuple[str, ...] = ()) -> Path:
    """The program that prints digests, as setup.py would compile it; with more flags, of the loops."""
    folder.mkdir(parents=True, exist_ok=True)
    setup = setup_flags()
    sources = [LOOPS / "digest.cpp", CSRC / "cpu" / "dispatch.cpp", *CSRC.glob("cpu/loops_*.cpp")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        own = of_loops if CSRC in source.parents else ("-O1",)
        run(*compiler, *setup, "-w", *flags, *own, *INCLUDES, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [*pool.map(compile_one, sources)]
    run(*compiler, *flags, *objects, "-o", folder / "digest")
    return folder / "digest"


def digests(*command: str | Path, isa: str = "default") -> tuple[str, dict[str, str]]:
    """Which set of instructions it was, and digests by what they are of."""
    name, *lines = run(*command, ATEN_CPU_CAPABILITY=isa).splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return name, {what: digest for digest, what in pairs}


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    assert found.keys() == expected.keys()
    return [what for what in expected if found[what] != expected[what]]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), NATIVE)


@pytest.fixture(scope="module")
def expected(native: Path) -> dict[str, str]:
    name, found = digests(native)
    assert name == "default"
    return found


@pytest.mark.slow
def test_every_function_has_digests(expected):
    table = (CSRC / "cpu" / "loops.h").read_text().partition("struct Loops {")[2]
    assert {what.split()[0] for what in expected} == {*re.findall(r"\(\*(\w+)\)\(", table)}
    assert len({*expected.values()}) == len(expected)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_x86(native, expected, isa):
    name, found = digests(native, isa=isa)
    if name != isa:
        pytest.skip(f"this CPU has no {isa}")
    assert differing(found, expected) == []


@for_aarch64
def test_aarch64(tmp_path, expected):
    name, found = digests(*EMULATOR, build(tmp_path, CROSS, "-static"))
    assert name == "default"
    assert differing(found, expected) == []


@for_aarch64
def test_contraction_would_be_noticed(tmp_path, expected):
    """aarch64 always has a fused product and sum, which compilers use unless they are told not to."""
    program = build(tmp_path, CROSS, "-static", of_loops=("-ffp-contract=fast",))
    changed = {what.split()[0] for what in differing(digests(*EMULATOR, program)[1], expected)}
    assert changed >= {"masked", "adamw", "decay"}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="where nothing is set")
@pytest.mark.parametrize("where", ["here", pytest.param("aarch64", marks=FOR_AARCH64)])
def test_mode_of_floating_point(tmp_path, where):
    compiler, emulator, link = (NATIVE, [], []) if where == "here" else (CROSS, EMULATOR, ["-static"])
    includes = [*INCLUDES, *(f"-I{path}" for path in include_paths())]
    program = tmp_path / "fp_mode"
    source = LOOPS / "fp_mode.cpp"
    run(*compiler, *setup_flags(), "-w", *link, *includes, source, "-o", program)
    assert run(*emulator, program) == "right\n"


@for_aarch64
@pytest.mark.parametrize(
    "source", [*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp"))], ids=lambda path: path.stem
)
def test_compiles(source):
    """With PyTorch's headers, up to the linker, which would need its libraries for aarch64."""
    includes = [*INCLUDES, *(f"-I{path}" for path in include_paths())]
    run(*CROSS, *setup_flags(), *includes, "-fsyntax-only", source)
