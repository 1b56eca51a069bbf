"""What Triton makes of its kernels: registers, spills, vector width, arithmetic. No GPU is needed.

Parity is in test_parity.py, with the kernels interpreted, or on a GPU. The interpreter's arithmetic is
NumPy's, so what the compiler makes of it is read here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from support import (
    FLOAT,
    ROSE,
    Problem,
    assert_consistent,
    assert_same_bits,
    compare_bracket,
    compare_update,
    values,
)

import rose_ops
from rose_ops import backends, reference

triton = pytest.importorskip("triton")

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
# Of what kernels are given; the rest are "i32".
TYPES = {
    **dict.fromkeys(("rows", "all_rows", "dims", "state", "record", "selection", "counts"), "*i64"),
    **dict.fromkeys(("tile_rows", "sample", "keys", "log_keys"), "*i32"),
    **dict.fromkeys(("inv_scale", "clip", "found_inf", "prepared", "log_old", "data"), "*fp32"),
    **dict.fromkeys(("hyper", "lr", "gamma", "seed", "partial", "sums"), "*fp64"),
    "log_places": "*i64", "first_place": "i64", "width": "fp32",
}  # fmt: skip
BASE = {"LINEAR": True, "ALIGNED": True, "BLOCK": 512, "D0": 0}
RISK = {**BASE, "D1": 0, "SECOND": True}
FIRST = {**RISK, "SECOND": False}
SAMPLE = {"D0": 0, "D1": 0, "LINEAR": True, "SECOND": True, "LINES": 32}
ADAMW = {**BASE, "D1": 0, "D2": 0, "D3": 0, "FRACTIONAL": True, "STOCHASTIC": False}
UPDATE = {**ADAMW, "FROM_RISK": True}
BF16 = {"D0": 1, "D1": 1, "D2": 1, "D3": 1, "STOCHASTIC": True}
PASS = {**ADAMW, "TWO": False}
# kernel, constants, 16-byte loads and stores expected
CASES = {
    "select": ("select_kernel", {**RISK, "BLOCK": 1024}, 4, 0),
    "select-sample": ("select_kernel", {**RISK, "D0": 3, "BLOCK": 1024}, 0, 0),
    "capture": ("capture_kernel", FIRST, 1, 0),
    "update": ("update_kernel", UPDATE, 4, 3),
    "update-masks": ("update_kernel", {**UPDATE, "FROM_RISK": False}, 4, 3),
    "update-bf16": ("update_kernel", {**UPDATE, **BF16}, 0, 0),
    "update-fp16": ("update_kernel", {**UPDATE, "D0": 2, "D1": 2}, 2, 2),
    "prepare": ("prepare_kernel", {}, 0, 0),
    "squares": ("squares_kernel", BASE, 1, 0),
    "sample": ("sample_kernel", SAMPLE, 0, 0),
    "sample-strided": ("sample_kernel", {**SAMPLE, "LINEAR": False}, 0, 0),
    "bracket": ("bracket_kernel", {"LINES": 64}, 0, 0),
    "pass-capture": ("capture_pass_kernel", {**FIRST, "TWO": True}, 1, 0),
    "pass": ("update_pass_kernel", {**PASS, "FRACTIONAL": False}, 6, 3),
    "pass-bf16": ("update_pass_kernel", {**PASS, **BF16, "FRACTIONAL": False}, 0, 0),
    "pass-ensemble": ("update_pass_kernel", PASS, 6, 3),
    "pass-ensemble-lower": ("update_pass_kernel", {**PASS, "TWO": True}, 6, 3),
    "resolve": ("resolve_kernel", RISK, 2, 0),
    "fix-capture": ("capture_fix_kernel", FIRST, 1, 0),
    "fix": ("update_fix_kernel", ADAMW, 4, 3),
    "fix-bf16": ("update_fix_kernel", {**ADAMW, **BF16}, 0, 0),
}
# In double precision, IEEE division begins with an approximate reciprocal.
FORBIDDEN = re.compile(
    r"(?<![\w.])(?!rcp\.approx\.ftz\.f64)"
    r"(?:[\w.]+\.(?:ftz|approx|full)\b[\w.]*|(?:fma|mad)\.[\w.]*f32|cvt\.[\w.]*bf16[\w.]*)"
)
# The exponential of double precision in libdevice compares the upper word of its argument, as if it
# were a float, with two limits. Flushed to zero, it is as far below them.
UPPER_WORD = re.compile(r"mov\.b64 \{tmp, (%r\d+)\}, %rd\d+; \}\n\tabs\.ftz\.f32 \t(%r\d+), \1;")
PREPARING = ("prepare", "sample", "sample-strided")
# Where the last program goes on, one atomic waits for the others' memory accesses.
LAST_GOES_ON = ("select", "select-sample", "bracket", "resolve")


def without_comparisons(ptx: str) -> tuple[str, int]:
    """PTX without the upper words that are compared and nothing else, and their number."""
    count = 0
    for found in UPPER_WORD.finditer(ptx):
        word = re.escape(found[2])
        rest = re.sub(rf"setp\.(?:lt|geu)\.f32 \t%p\d+, {word}, 0f408\w{{5}};", "", ptx)
        if len(re.findall(rf"{word}\b", rest)) == 1:  # where it is made
            ptx = rest.replace(found[0], "")
            count += 1
    return ptx, count


def compile_case(name: str, arch: int) -> None:
    """Prints what is wrong. Runs in a process of its own, in which kernels are not interpreted."""
    import tempfile

    import sass
    import triton_faults
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from rose_ops.backends.triton.access import KERNELS

    if name in CASES:
        kernel, constants, loads, stores = CASES[name]
        function, options = KERNELS[kernel]
    else:
        function, constants, loads, stores = triton_faults.kernel, {"FAULT": name}, 1, 1
        options = {"enable_fp_fusion": name == "contraction"}
    names = function.arg_names
    types = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    attributes = {}
    if name not in CASES:
        attributes = {(0,): [["tt.divisibility", 16]]}
    compiled = triton.compile(
        ASTSource(function, types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    to_read, compared = without_comparisons(ptx) if name in PREPARING else (ptx, 0)
    for found in sorted(set(FORBIDDEN.findall(to_read))):
        print("PTX:", found)
    ordered = len(re.findall(r"atom\S*\.acq_rel", ptx))
    if ordered != (name in LAST_GOES_ON):
        print(f"{ordered} atomics that wait, expected {int(name in LAST_GOES_ON)}")
    for access, wanted in (("ld", loads), ("st", stores)):
        count = len(re.findall(rf"{access}\.global\S*\.v4\.b32", ptx))
        if count < wanted:
            print(f"{count} {access}.global.v4, expected {wanted}")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(*command: object) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        cubin, probe, text = (Path(folder, f) for f in ("kernel.cubin", "probe.cubin", "probe.ptx"))
        cubin.write_bytes(compiled.asm["cubin"])

        def assembled(source: str) -> str:
            text.write_text(source)
            target = re.search(r"^\.target (\w+)", source, re.M)
            run(get_ptxas(arch).path, f"--gpu-name={target[1]}", text, "-o", probe)
            return run(tools / "nvdisasm", "-c", probe)

        code = run(tools / "nvdisasm", "-c", cubin)
        print(*sass.problems(code, ptx, assembled, {"FADD.FTZ": compared}), sep="\n")
        usage = run(tools / "cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    print(f"# {registers} registers")
    if registers > options.get("maxnreg", 64) or stack or local:
        print(f"{registers} registers, {stack} bytes of stack, {local} of local memory")


def compiled(name: str, arch: int, monkeypatch, folder: Path) -> list[str]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    # This process may have been told where the package is, and the other has to find the same one.
    paths = [str(Path(rose_ops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    done = subprocess.run(
        [sys.executable, __file__, name, str(arch)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "# " in done.stdout
    return [line for line in done.stdout.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("name", CASES)
def test_kernels_as_compiled(name, arch, monkeypatch, tmp_path):
    """As they are launched: at most so many registers, no local memory, 16-byte accesses, IEEE."""
    if arch >= 100 and RELEASE < (3, 7):
        pytest.skip("the backend refuses this Triton there: it fuses products and sums")
    assert compiled(name, arch, monkeypatch, tmp_path) == []


# What must be said of the kernel in triton_faults.py.
FAULTS = {
    "none": [],
    "fused": ["PTX: fma", "SASS: .* FFMA"],
    "contraction": ["PTX: fma", "SASS: .* FFMA"],
    "quotient": ["PTX: div.full", "SASS: .* MUFU.RCP"],
    "root": ["PTX: sqrt.approx", "SASS: .* MUFU.RSQ|SASS: .* MUFU.SQRT"],
    "exponential": ["PTX: ex2.approx", "SASS: .* MUFU.EX2"],
    "flushed": ["PTX: add.ftz", r"SASS: .* FADD\.FTZ"],
    "upper word": ["PTX: abs.ftz", r"SASS: .* FADD\.FTZ"],
    "narrowing": ["PTX: cvt.*bf16", "SASS: .* F2FP?.BF16"],
    "ordered": ["atomics that wait"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_refuses(name, monkeypatch, tmp_path):
    wrong = compiled(name, 90, monkeypatch, tmp_path)
    assert (wrong == []) == (name == "none")
    for pattern in FAULTS[name]:
        assert any(re.search(pattern, line) for line in wrong), (pattern, wrong)


def launches(monkeypatch, ops, generator, pieces: int, **changes: float) -> list:
    """Those of a second-order step: kernel, programs, and all that a kernel is compiled for."""
    made: list = []

    def record(kernel, programs, *args, **constants) -> None:
        seen = [(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in args]
        made.append((kernel.fn.__name__, programs, seen, constants))

    grads, moments = (list(torch.randn(64 * pieces, generator=generator).split(64)) for _ in range(2))
    row = [changes.get(name, ROSE[i]) for i, name in enumerate(("beta1", "beta2", "eps", "decay"))]
    options = {"inv_scale": torch.tensor(changes.get("scale", 1.0)), "gamma": changes.get("gamma", 0.5)}
    problem = Problem.of(grads, moments, (*row, 1.0, 1.0), changes.get("lr", 1e-3), **options)
    problem.steps = [torch.tensor(changes.get("step", 0.0)) for _ in grads]
    record_of = problem.select(reference, 600_000_000)
    monkeypatch.setattr(ops.passes, "launch", record)
    problem.select(ops, 600_000_000)
    problem.update(ops, selection=record_of)
    monkeypatch.undo()
    return made


def test_launches_have_the_options_that_are_compiled_here(triton_ops):
    from rose_ops.backends.triton import passes
    from rose_ops.backends.triton.access import KERNELS

    seen: dict = {}

    class Kernel:
        def __init__(self, kernel):
            self.fn = kernel.fn

        def __getitem__(self, grid):
            return lambda **options: seen.update({self.fn.__name__: options})

    for kernel, _ in KERNELS.values():
        passes.launch(Kernel(kernel), 1)
    limits = torch.version.cuda is not None
    assert seen == {
        name: {k: v for k, v in options.items() if limits or k != "maxnreg"}
        for name, (_, options) in KERNELS.items()
    }
    assert {name for name, *_ in CASES.values()} == {*KERNELS} - {"sums_kernel"}


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.5.1", (9, 0), "is not tested"), ("3.6.0", (9, 0), None), ("3.6.0", (10, 0), "Blackwell"),
        ("3.6.0+git1", (12, 0), "Blackwell"), ("3.7.1", (10, 0), None), ("4.0.0", (12, 0), None),
    ],
)  # fmt: skip
def test_releases_that_are_refused(monkeypatch, version, capability, reason):
    from rose_ops.backends import triton as ops

    monkeypatch.setattr(ops, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    said = backends.BACKENDS["triton"].why_not()
    assert said is None if reason is None else reason in said


def test_nothing_is_compiled_again_for_other_hyperparameters(monkeypatch, generator):
    from rose_ops.backends import triton as ops

    if not ops.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    first = launches(monkeypatch, ops, generator, 3)
    changes = {"lr": 0.3, "beta1": 0.5, "beta2": 0.99, "eps": 1e-3, "decay": 0.3, "step": 16.0}
    assert launches(monkeypatch, ops, generator, 3, **changes, scale=0.5, gamma=0.25) == first


@pytest.mark.parametrize("pieces", [1, 40])
def test_launches_of_a_step(monkeypatch, generator, pieces):
    """Whatever the number of tensors of the same kind."""
    from rose_ops.backends import triton as ops

    if not ops.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    names = [name for name, *_ in launches(monkeypatch, ops, generator, pieces)]
    assert names == [*["select_kernel"] * 4, "prepare_kernel", "update_kernel"]


@pytest.fixture
def fresh_tables(monkeypatch):
    """As in a new process, with a list of the words that were uploaded."""
    from rose_ops.backends.triton import table

    uploaded: list[int] = []
    original = table._upload
    monkeypatch.setattr(table, "_recent", OrderedDict())
    monkeypatch.setattr(
        table, "_upload", lambda words, device: uploaded.append(len(words)) or original(words, device)
    )
    return table, uploaded


def test_a_schedule_uploads_its_rates_alone(triton_ops, generator, fresh_tables):
    _, uploaded = fresh_tables
    problem = _problem(generator, 300, 7).copy()
    for i in range(4):
        problem.lr = torch.full_like(problem.lr, 0.1 * 0.5 ** (i // 2))
        compare_update(triton_ops, problem, selection=problem.select(reference, 600_000_000))
    table, *rates = uploaded
    assert table > 7 * 17
    assert rates == [1, 1]  # two in four steps


def test_tables_of_tensors_that_differ(generator, fresh_tables):
    """By any one thing that a table says or checks."""
    table, _ = fresh_tables
    hyper, group = torch.rand(2, 6, dtype=torch.float64), torch.tensor([0, 1])
    p, g = (list(torch.randn(2, 6, 4, generator=generator)) for _ in range(2))

    def made(p=p, g=g, hyper=hyper, group=group, block=512, extra=(0.5,), column=(1, 2)):
        roles = [table.Role("params", p, True), table.Role("grads", g)]
        return table.make(roles, hyper, group, block, extra, {2: column})

    first = made()
    assert made() is first
    assert made(p=[t.detach() for t in p], hyper=hyper.clone(), group=group.clone()) is first
    others = [
        made(p=p[::-1], g=g[::-1]), made(hyper=hyper * 2), made(group=group.flip(0)), made(block=256),
        made(extra=(0.25,)), made(column=(1, 3)), made(p=[t[:3] for t in p], g=[t[:3] for t in g]),
        made(g=[t.view(torch.bfloat16)[:, :4] for t in g]),
        made(p=[t.view(4, 6).t() for t in p]), made(p=[t.clone() for t in p]),
    ]  # fmt: skip
    assert len({id(t) for t in [first, *others]}) == len(others) + 1
    for wrong in ({"p": p[:1]}, {"g": [t.t() for t in g]}, {"p": [t.view(3, 8) for t in p]}):
        with pytest.raises(RuntimeError):
            made(**wrong)
    assert made() is first


def test_tables_by_value(generator):
    from rose_ops.backends.triton import table

    words = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=generator)
    words[::3] = 0
    words[:3] = torch.tensor([-1, -(2**63), 2**63 - 1])
    there = table._by_value(words, torch.device("cpu"))
    assert torch.equal(there, words)


@pytest.mark.parametrize(
    "selection", ["exact", "bracket", pytest.param("approx", marks=pytest.mark.slow)]
)
def test_any_number_of_graphs(triton_ops, generator, fresh_tables, monkeypatch, selection):
    """A capture keeps nothing and takes nothing that is kept: what a graph reads is its own."""
    table, _ = fresh_tables
    if not triton_ops.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    n = reference.APPROX_FEWEST if selection == "approx" else 300
    problem = _problem(generator, n, 3).copy()
    compare_update(triton_ops, problem, selection=problem.select(triton_ops, 600_000_000))
    kept, made = dict(table._recent), []
    by_value = table._by_value
    monkeypatch.setattr(table, "_capturing", lambda device: True)
    monkeypatch.setattr(table, "_pinned", None)  # memory of the host, which must not be allocated
    monkeypatch.setattr(table, "_by_value", lambda *args: made.append(args) or by_value(*args))
    for i in range(3 if selection == "exact" else 1):
        if selection == "bracket":
            compare_bracket(triton_ops, problem, 600_000_000)
            assert len(made) == 2  # a table and the learning rates
        elif selection == "approx":
            problem.bracket_update(triton_ops, 600_000_000, approx=True)
            assert len(made) == 2
        else:
            compare_update(triton_ops, problem, selection=problem.select(triton_ops, 600_000_000))
            assert len(made) == 3 * (i + 1)
    assert dict(table._recent) == kept


# ---------------------------------------------------------------------------- bytes, launches, memory

N = 1 << 22


@pytest.fixture
def triton_ops():
    if (reason := backends.BACKENDS["triton"].why_not()) is not None:
        pytest.skip(reason)
    return backends.BACKENDS["triton"].ops


@pytest.fixture
def counted(triton_ops, monkeypatch):
    """Launches, and bytes that interpreted kernels read and write in tensors given and in logs."""
    if not triton_ops.INTERPRETED:
        pytest.skip("accesses are counted where kernels are interpreted")
    from triton.runtime import interpreter

    from rose_ops.backends.triton import passes

    counts = {"launches": 0, "read": 0, "written": 0}
    ranges: list[tuple[int, int]] = []

    def watch(tensors) -> None:
        storages = [t.untyped_storage() for t in tensors]
        ranges.extend((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)

    def count(kind: str, pointers, mask) -> None:
        at = np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data)) != 0]
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        counts[kind] += size * sum(int(((at >= a) & (at < b)).sum()) for a, b in ranges)

    def wrapped(name: str, kind: str, position: int):
        original = getattr(interpreter.InterpreterBuilder, name)

        def call(self, pointers, *args, **options):
            count(kind, pointers, args[position])
            return original(self, pointers, *args, **options)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, call)

    wrapped("create_masked_load", "read", 0)
    wrapped("create_masked_store", "written", 1)
    launch, of = passes.launch, passes.Bracket.of

    def counted_launch(*args, **options):
        counts["launches"] += 1
        launch(*args, **options)

    def watched(*args):
        bracket = of(*args)
        watch([bracket.sample])
        return bracket

    monkeypatch.setattr(passes, "launch", counted_launch)
    monkeypatch.setattr(passes.Bracket, "of", watched)

    def measure(tensors, call) -> dict[str, int]:
        ranges.clear()
        watch(tensors)
        counts.update(launches=0, read=0, written=0)
        call()
        return dict(counts)

    return measure


def _problem(generator, n: int, pieces: int = 1):
    p, g, m, v = (values(n, ("normal",), FLOAT, generator).tensor_split(pieces) for _ in range(4))
    return Problem.of(list(g), list(m), params=list(p), exp_avg_sqs=[x.abs() for x in v])


@pytest.mark.slow
@pytest.mark.parametrize("approx", [False, True], ids=["bracket", "approx"])
def test_bytes_of_a_bracketed_step(triton_ops, counted, generator, approx):
    """fp32: AdamW's own 28 bytes per element, and 2 for the sample and the log."""
    problem = _problem(generator, N)
    tensors = [*problem.written, *problem.grads]
    found = counted(tensors, lambda: problem.bracket_update(triton_ops, 600_000_000, approx=approx))
    assert found["launches"] == (7 if approx else 5)
    assert 28 * N < found["read"] + found["written"] <= 30 * N, found


@pytest.mark.slow
def test_bytes_of_a_bracketed_capture(triton_ops, counted, generator):
    """The gradient once, a bit for each element, the sample and the log."""
    problem = _problem(generator, N)
    call = lambda: problem.bracket_capture(triton_ops, 600_000_000, first=True)  # noqa: E731
    found = counted(problem.grads, call)
    assert found["launches"] == 5
    assert 4 * N < found["read"] <= 4.65 * N, found
    assert found["written"] <= 0.6 * N, found


@pytest.mark.slow
def test_bytes_of_an_approximate_selection(triton_ops, counted, generator):
    """The gradient once, and the sample, a sixteenth of it here, once and as keys four times."""
    problem = _problem(generator, N)
    call = lambda: problem.select(triton_ops, 600_000_000, first=True, approx=True)  # noqa: E731
    found = counted(problem.grads, call)
    assert found["launches"] == 7
    assert found["read"] == 4 * (N + 5 * N // 16), found
    assert found["written"] == 4 * N // 16, found


@pytest.mark.slow
def test_bytes_of_tensors_that_are_ruled_out(triton_ops, counted, generator):
    """Both moments are read, and the second one is written."""
    problem = _problem(generator, 1 << 16)
    tensors = [*problem.written, *problem.grads]
    mask = [torch.tensor(False)]
    found = counted(tensors, lambda: problem.update(triton_ops, mask))
    assert found == {"launches": 2, "read": 8 << 16, "written": 4 << 16}


@pytest.mark.slow
def test_launches_do_not_depend_on_the_number_of_tensors(triton_ops, counted, generator):
    problem = _problem(generator, 4096 * 16, pieces=256)
    found = counted([], lambda: problem.bracket_update(triton_ops, 600_000_000))
    assert found["launches"] == 5


@pytest.mark.parametrize("n", [0, 1, 1000, 1 << 20, 1 << 27, 1 << 30, 1 << 33])
@pytest.mark.parametrize("updates", [True, False])
def test_memory_of_a_bracketed_pass(triton_ops, n, updates):
    """At most a bit for each element and 16 MiB; of the sample alone, 8 MiB."""
    passes = triton_ops.passes
    for approx in (False, True) if n >= reference.APPROX_FEWEST else (False,):
        made = passes.Bracket.of(-(-n // 16), n, updates, approx, torch.device("meta"))
        tensors = (made.state, made.record, made.sample)
        most = 8 << 20 if approx else n // 8 + (16 << 20)
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= most


@pytest.mark.slow
def test_a_log_that_overflows_is_a_miss(triton_ops, monkeypatch, generator):
    """Which a sample makes next to impossible: the estimate is the threshold then, and is counted."""
    from rose_ops.backends.triton import passes

    launch, of = passes.launch, passes.Bracket.of
    position = passes.bracket_kernel.arg_names.index("capacity")

    def reckless(kernel, programs, *args, **options):
        if kernel is passes.bracket_kernel:
            args = (*args[:position], 1 << 30, *args[position + 1 :])
        launch(kernel, programs, *args, **options)

    def small(*args):
        made = of(*args)
        made.capacity = 100
        return made

    monkeypatch.setattr(passes, "launch", reckless)
    monkeypatch.setattr(passes.Bracket, "of", small)
    for kept in ((600_000_000, 0), (700_000_000, 200_000_000)):
        result = compare_bracket(triton_ops, _problem(generator, 100_003), *kept)
        assert result[reference.Field.MISSES] == 1
        problem = _problem(generator, 100_003)
        masks, record = problem.bracket_capture(triton_ops, *kept)
        assert record[reference.Field.MISSES] == 1
        assert_consistent(problem, record)
        assert_same_bits(masks[0], problem.capture(reference, record)[0])


if __name__ == "__main__":
    compile_case(sys.argv[1], int(sys.argv[2]))
