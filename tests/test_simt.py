"""The CUDA kernels on the simulated device: any order of threads, counted bytes and launches, races.

The parity suite runs on that device, too (``ops`` in conftest.py); here is what only it can show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt import build
from simt.check import overflowing
from support import (
    BF16,
    FLOAT,
    ONE,
    Problem,
    assert_consistent,
    bits,
    compare_bracket,
    compare_update,
    place,
    tensor_norms,
    values,
)

from rose_ops import reference
from rose_ops.reference import Field

MIX = ("normal", "zero", "ties", "nan", "denormal", "inf")


@pytest.fixture
def simt():
    module = build.module()
    module.forget_uploads()
    yield module
    module.configure()


@pytest.fixture
def ops(simt):
    return build.load()


def problem_of(generator, n: int, mix=("normal",), pieces: int = 1, moment=FLOAT) -> Problem:
    """``pieces`` tensors of n elements together, every third of them a view that is not contiguous."""
    cuts = torch.randint(0, n, (pieces - 1,), generator=generator).sort().values
    layouts = ("contiguous", "offset", "strided")

    def tensors(dtype, sign=1):
        split = values(n, mix, dtype, generator).tensor_split(cuts)
        split = [t.abs() if sign == 0 else t for t in split]
        return [
            place(t, layouts[i % 3 if pieces > 1 else 0], offset=i % 2) for i, t in enumerate(split)
        ]

    p, g, m, v = tensors(FLOAT), tensors(FLOAT), tensors(moment), tensors(moment, 0)
    return Problem.of(g, m, params=p, exp_avg_sqs=v)


# ------------------------------------------------------------------------------------------- order

CONFIGURATIONS = {
    "reverse": {"order": "reverse"},
    "random": {"order": "random"},
    "one-block": {"order": "random", "resident": 1},
    "many-blocks": {"order": "random", "resident": 61},
    "two-threads": {"order": "random", "os_threads": 2, "resident": 16},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("pieces", [1, 40], ids=["flat", "scattered"])
def test_any_order_of_threads_and_blocks(simt, ops, generator, name, pieces):
    for seed, mix in enumerate((("normal",), MIX, ("ties",), ("zero", "one"))):
        problem = problem_of(generator, 30_011, mix, pieces, (FLOAT, BF16)[seed % 2])
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        for kept in ((600_000_000, 0), (ONE, 1), (500_000_000, 499_000_000)):
            for first in (True, False):
                record = problem.select(ops, *kept, first=first)
                assert record.tolist() == problem.select(reference, *kept, first=first).tolist()
            masks = problem.capture(ops, record)
            for mask, expected in zip(masks, problem.capture(reference, record), strict=True):
                assert torch.equal(mask, expected)
        norms = tensor_norms(ops, problem.grads, None)
        simt.configure()
        assert torch.equal(bits(norms), bits(tensor_norms(ops, problem.grads, None)))
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        compare_update(ops, problem, masks, selection=record)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("pieces", [1, 40], ids=["flat", "scattered"])
def test_brackets_in_any_order_of_threads_and_blocks(simt, ops, generator, name, pieces):
    for seed, mix in enumerate((("normal",), MIX)):
        problem = problem_of(generator, 150_011, mix, pieces, (FLOAT, BF16)[seed % 2])
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        for width in (1.0, 0.0):
            first, record = problem.bracket_capture(ops, 600_000_000, first=True, width=width)
            assert_consistent(problem, record, first=True)
            for mask, expected in zip(
                first, problem.capture(reference, record, first=True), strict=True
            ):
                assert torch.equal(mask, expected)
            compare_bracket(ops, problem.copy(), 700_000_000, 300_000_000, first, width=width)


def test_a_log_that_overflows(simt, ops, generator):
    """The estimate stays the threshold, a miss; draws that sample other lines see it coming."""
    problem = overflowing(generator)
    exact = problem.select(reference, 600_000_000)
    result = compare_bracket(ops, problem.copy(), 600_000_000)
    assert result[Field.MISSES] == 1
    assert result[Field.HIGH] != exact[Field.HIGH]
    assert compare_bracket(ops, problem, 600_000_000, draw=1)[Field.MISSES] == 0


def test_a_barrier_that_not_all_threads_reach_is_an_error(tmp_path):
    """The simulated device itself: it must not hang, nor let it pass."""
    source = tmp_path / "bad.cpp"
    source.write_text("""
        #include "cuda_runtime.h"
        #include <cstdio>
        int main() {
          simt::launch(1, 64, [] { if (threadIdx.x < 40) __syncthreads(); });
          const char* barrier = simt::take_error();
          simt::launch(1, 64, [] { if (threadIdx.x % 2) __ballot_sync(0xFFFFFFFFu, true); });
          const char* lanes = simt::take_error();
          simt::launch(1, 64, [] { __ballot_sync(1u, true); });
          const char* mask = simt::take_error();
          static char data[32];
          simt::launch(1, 1, [] { ROSE_GLOBAL_READ(data + 1, 16); });
          const char* access = simt::take_error();
          simt::launch(1, 64, [] { __syncthreads(); });
          return barrier && lanes && mask && access && !simt::take_error() ? 0 : 1;
        }
    """)
    binary = tmp_path / "bad"
    includes = [f"-I{path}" for path in build.include_paths()]
    subprocess.run(
        ["g++", "-std=c++17", *includes, source, build.HERE / "simt.cpp", "-o", binary, "-lpthread"],
        check=True,
    )
    assert subprocess.run([binary], timeout=60).returncode == 0


# ---------------------------------------------------------------------------------- bytes and launches


def counted(simt, call) -> tuple[int, int, int]:
    simt.take_counters()
    call()
    counters = simt.take_counters()
    return counters["launches"], counters["bytes_read"], counters["bytes_written"]


N = 1 << 22


@pytest.mark.parametrize(("mix", "unsure"), [("normal", 0.0), ("ties", 0.25)])
def test_bytes_of_an_exact_second_order_step(simt, ops, generator, mix, unsure):
    """fp32: AdamW's own 28 bytes per element, and what finding the threshold reads and writes.

    g and m of elements that no comparison settles are read again, in the count and in the update: those
    close to the threshold, which are few, or the quarter of the elements that has it for its risk.
    """
    problem = problem_of(generator, N, (mix,))
    record = problem.select(ops, 600_000_000)
    # A sample must leave nothing behind that would mislead the next one.
    Problem.of([g * 1e-20 for g in problem.grads], problem.exp_avgs).select(ops, 600_000_000)
    _, read, written = counted(simt, lambda: problem.select(ops, 600_000_000))
    assert 8 * N < read <= (8.31 + 8 * unsure) * N
    assert written <= (0.07 + 2 * unsure) * N  # of the log, which has room for a part of the ties
    _, read, written = counted(simt, lambda: problem.update(ops, selection=record))
    assert 16 * N < read <= (16.001 + 8.01 * unsure) * N
    assert written == 12 * N


def test_bytes_of_a_first_order_capture(simt, ops, generator):
    """The gradient twice, a bit for each element, and the log around the threshold: 1.2% of all keys are
    read again and logged."""
    problem = problem_of(generator, 2 * N)
    _, read, written = counted(simt, lambda: problem.masks(ops, 600_000_000, first=True))
    assert 8 * 2 * N < read <= 8.15 * 2 * N
    assert 2 * N / 8 <= written <= (1 / 8 + 0.05) * 2 * N


@pytest.mark.parametrize(
    ("mix", "width", "limit"),
    [("normal", 1.0, 30.0), ("ties", 1.0, 33.6), ("normal", 1e9, 36.8), ("ties", 1e9, 42.5)],
    ids=["normal", "ties", "normal-no-bracket", "ties-no-bracket"],
)
def test_bytes_of_a_bracketed_second_order_step(simt, ops, generator, mix, width, limit):
    """AdamW's own 28 bytes, the sample, the log; without a bracket, an exact step and the sample.

    Of the ties, one class of equal risks has the ranks from 3/8 to 5/8. At 0.6, near its end, one pilot
    in eight takes the next class for the threshold's, and the step is an exact one. All of a class, a
    quarter of the elements, is read again, by key and with its old values: 20 bytes each.
    """
    problem = problem_of(generator, N, (mix,))
    upper = 500_000_000 if mix == "ties" else 600_000_000
    problem.copy().bracket_update(ops, upper)
    launches, read, written = counted(simt, lambda: problem.bracket_update(ops, upper, width=width))
    assert launches == 6
    assert read > 16 * N
    assert written >= 12 * N
    assert read + written <= limit * N


def test_bytes_of_a_bracketed_first_order_capture(simt, ops, generator):
    """The gradient once, the sample, and the log: 12 bytes written and 8 read for 1.9% of the elements."""
    problem = problem_of(generator, 2 * N)
    launches, read, written = counted(
        simt, lambda: problem.bracket_capture(ops, 600_000_000, first=True)
    )
    assert launches == 6
    assert 4 * 2 * N < read <= 4.5 * 2 * N
    assert 2 * N / 8 <= written <= (1 / 8 + 0.23) * 2 * N


def test_bytes_of_tensors_that_are_ruled_out(simt, ops, generator):
    """Reads m and v, writes v."""
    problem = problem_of(generator, N)
    none = [torch.zeros(1, dtype=torch.bool)]
    assert counted(simt, lambda: problem.update(ops, none)) == (2, 8 * N, 4 * N)
    # Bits might select an element.
    bits = [torch.zeros(N // 8, dtype=torch.uint8)]
    assert counted(simt, lambda: problem.update(ops, none, bits))[2] == 12 * N


def test_bytes_of_bf16_moments(simt, ops, generator):
    problem = problem_of(generator, N, moment=BF16)
    problem.hyper[:, reference.Hyper.SELECTIVE] = 0
    assert counted(simt, lambda: problem.update(ops)) == (2, 12 * N, 8 * N)


@pytest.mark.parametrize("pieces", [1, 2, 500])
def test_launches_of_a_step(simt, ops, generator, pieces):
    """Whatever the number of tensors. A pass that finds nothing to do is launched all the same: only the
    device knows."""
    problem = problem_of(generator, 40_000, pieces=pieces)

    def step():
        problem.update(ops, selection=problem.select(ops, 600_000_000))

    assert counted(simt, step)[0] == 7
    assert counted(simt, lambda: problem.masks(ops, 600_000_000))[0] == 6
    assert counted(simt, lambda: problem.select(ops, 600_000_000, approx=True))[0] == 2
    assert counted(simt, lambda: tensor_norms(ops, problem.grads, None))[0] == 2
    assert counted(simt, lambda: problem.bracket_capture(ops, 600_000_000, first=True))[0] == 6
    assert counted(simt, lambda: problem.bracket_update(ops, 600_000_000))[0] == 6


def test_bin_of_a_rank_that_is_out_of_range(tmp_path):
    """Nothing of what the block found before."""
    source = tmp_path / "bins.cpp"
    source.write_text("""
        #include "cuda_runtime.h"
        #include "cuda/select.cuh"
        using namespace rose::cuda;
        static Count histogram[kBins];
        static Bin bins[4];
        int main() {
          histogram[3] = 10;
          histogram[2000] = 5;
          simt::launch(1, kThreads, [] {
            const Count ranks[4] = {12, 16, 0, ~0ull};
            for (int i = 0; i < 4; ++i) {
              Bin bin;
              find_bin<kBins>(histogram, ranks[i], bin);
              if (threadIdx.x == 0) bins[i] = bin;
            }
          });
          bool right = bins[0].index == 2000 && bins[0].below == 10 && bins[0].inside == 5;
          for (int i = 1; i < 4; ++i) {
            right = right && bins[i].index == 0 && bins[i].below == 0 && bins[i].inside == 0;
          }
          return right ? 0 : 1;
        }
    """)
    binary = tmp_path / "bins"
    build._compile(build.CSRC, source, build.HERE / "simt.cpp", "-o", binary, "-lpthread")
    assert subprocess.run([binary], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Count dc_dc[2], dc_dr[2];", "Count dc_dr[2], dc_dc[2];"),
        ("Count ranked, dr_dr;", "Count dr_dr, ranked;"),
        ("Count ranked, dr_dr;", "Count ranked, dr_dr; uint32_t another[2];"),
    ],
    ids=["order", "order-of-two", "size"],
)
def test_counters_that_are_no_array_do_not_compile(tmp_path, old, new):
    """Those that a kernel adds up as one."""
    csrc = build.copy_sources(tmp_path)
    table = csrc / "cuda" / "table.h"
    source = table.read_text()
    assert source.count(old) == 1
    compile_it = ["-fsyntax-only", "-x", "c++", table]
    build._compile(csrc, *compile_it)
    table.write_text(source.replace(old, new))
    with pytest.raises(AssertionError, match=r"an array of counts|by their numbers"):
        build._compile(csrc, *compile_it)


def test_the_current_device_is_given_back_if_there_is_no_stream(simt, ops, generator):
    problem = problem_of(generator, 300)
    simt.configure(no_stream=True)
    with pytest.raises(RuntimeError, match="gives no CUDA stream"):
        problem.select(ops, 600_000_000)
    simt.configure()
    problem.select(ops, 600_000_000)
    assert simt.guards() == 0


# ------------------------------------------------------------------------------------- CUDA graphs


def renewed(problem: Problem, generator) -> None:
    """Other gradients, where the old ones were."""
    for g in problem.grads:
        g.copy_(torch.randn(g.shape, generator=generator))


def captured(simt, ops, problem: Problem, bracketed: bool = True):
    """A graph of a step, and where its replays put the results."""
    graph = simt.Graph()
    with graph:
        if bracketed:
            return graph, [problem.bracket_update(ops, 600_000_000)]
        record = problem.select(ops, 600_000_000)
        return graph, [record, problem.update(ops, selection=record)]


def compare_replay(graph, result, problem: Problem) -> None:
    expected = problem.copy()
    graph.replay()
    assert torch.equal(torch.cat(result), expected.bracket_update(reference, 600_000_000))
    for a, b in zip(problem.exp_avgs, expected.exp_avgs, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("bracketed", [True, False], ids=["bracket", "exact"])
@pytest.mark.parametrize("before", [True, False], ids=["after-a-step", "at-once"])
def test_a_graph_owns_what_it_reads(simt, ops, generator, bracketed, before):
    """Nothing that later steps upload, drop or overwrite is part of it."""
    problem = problem_of(generator, 3000, pieces=90)
    if before:
        problem.bracket_update(ops, 600_000_000)
    kept = simt.kept_uploads()
    graph, result = captured(simt, ops, problem, bracketed)
    assert simt.kept_uploads() == kept
    simt.forget_uploads()
    compare_replay(graph, result, problem)
    for _ in range(40):
        problem_of(generator, 3000, pieces=90).select(ops, 600_000_000)
    renewed(problem, generator)
    compare_replay(graph, result, problem)


@pytest.mark.parametrize("eager", [True, False], ids=["a-step-before-each", "none"])
def test_any_number_of_graphs(simt, ops, generator, eager):
    """Of tensors that the steps before have, and of others, as where gradients are a graph's own."""
    problem = problem_of(generator, 3000, pieces=5)
    problem.bracket_update(ops, 600_000_000)
    simt.take_counters()
    captures = []
    for i in range(50):
        if eager:
            problem.bracket_update(ops, 600_000_000)
        own = problem if i % 2 else problem_of(generator, 3000, pieces=5)
        captures.append((*captured(simt, ops, own), own))
    assert simt.kept_uploads() == 1
    assert simt.take_counters()["uploads"] == 0
    for graph, result, own in captures:
        renewed(own, generator)
        compare_replay(graph, result, own)


def test_launches_of_a_graph(simt, ops, generator):
    """Its tables are arguments of launches of 4 KB each: 128 bytes for a tensor, 48 for a stride."""
    for pieces, tables in ((1, 1), (201, 8)):
        graph, _ = captured(simt, ops, problem_of(generator, 40_000, pieces=pieces))
        assert len(graph) == 6 + tables


# ------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("groups", [1, 16, 17, 40])
def test_a_schedule_uploads_nothing(simt, ops, generator, groups):
    """But for the rates themselves, where they are too many to be arguments."""
    problem = problem_of(generator, 3000, pieces=41)
    problem.hyper = problem.hyper[:1].repeat(groups, 1)
    problem.group = torch.arange(41) % groups
    uploads = []
    for _ in range(3):
        problem.lr = torch.rand(groups, dtype=torch.float64, generator=generator)
        simt.take_counters()
        compare_bracket(ops, problem, 600_000_000)
        uploads.append(simt.take_counters()["uploads"])
    assert uploads[1:] == [int(groups > 16)] * 2


# -------------------------------------------------------------------------------------------- races


def test_no_data_race(tmp_path):
    """ThreadSanitizer over every kernel, each CUDA thread a fiber of its own, two OS threads."""
    binary = build.build_races(tmp_path, build.CSRC)
    digests = set()
    for seed in ([], ["1"], ["2"]):
        found = subprocess.run([binary, *seed], capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, found.stderr[-6000:]
        digests.add(found.stdout)
    assert len(digests) == 1


# ---------------------------------------------------------------------------------------- sanitizers


def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    """The same driver under AddressSanitizer and UBSan: every access within what the host allocated."""
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    binary = build.build_races(tmp_path, build.CSRC, sanitizers)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    found = subprocess.run([binary], capture_output=True, text=True, timeout=600, env=environment)
    assert found.returncode == 0, found.stderr[-6000:]


# ------------------------------------------------------------------------------------------- mutants

SUMS_OF_PASS = """    for (int field = 1; field < kFields; ++field) {
      add_to(&state.nonfinite + (field - 1), counts[field], shared_.scratch);
    }
"""
FLUSH_OF_PASS = "    flush<2 * kBins>(shared_.of_windows[0], state.of_windows[0]);\n"

# What is broken: file, text, replacement, and which occurrence.
MUTANTS: dict[str, tuple[str, str, str]] = {
    "barrier after clearing the histogram": (
        "select.cuh", "  clear<2 * kBins>(of_windows[0]);\n  __syncthreads();",
        "  clear<2 * kBins>(of_windows[0]);",
    ),
    "barrier before flushing the histogram": (
        "select.cuh", "  __syncthreads();\n  flush<kBins>(histogram, state.histogram);",
        "  flush<kBins>(histogram, state.histogram);",
    ),
    "barrier in the sum of a block": (
        "access.cuh", "  if (lane() == 0) scratch[warp()] = x;\n  __syncthreads();",
        "  if (lane() == 0) scratch[warp()] = x;",
    ),
    "barrier between two sums of a block": (
        "access.cuh", "  __syncthreads();  // of the last use of scratch\n", "",
    ),
    "barrier of the last block": (
        "access.cuh", "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) last",
        "  __threadfence();\n  if (threadIdx.x == 0) last",
    ),
    "barrier after the ticket": (
        "access.cuh", "== gridDim.x - 1;\n  __syncthreads();", "== gridDim.x - 1;",
    ),
    "atomic of the shared histogram": (
        "select.cuh", "if (key < kInactiveKey) atomicAdd(&histogram[key >> kShift], 1u);",
        "if (key < kInactiveKey) histogram[key >> kShift] += 1u;",
    ),
    "atomic of the global histogram": (
        "select.cuh", "atomicAdd(all + i, (To)block[i]);", "all[i] += (To)block[i];",
    ),
    "atomic of a count": (
        "access.cuh", "if (threadIdx.x == 0 && sum != 0) atomicAdd(total, sum);",
        "if (threadIdx.x == 0 && sum != 0) *total += sum;",
    ),
    "atomic of the log": (
        "select.cuh", "if (lane() == leader) at = atomicAdd(size, (Count)__popc(takers));",
        "if (lane() == leader) { at = *size; *size += (Count)__popc(takers); }",
    ),
    "atomic of the ticket": (
        "access.cuh", "last = atomicAdd(ticket, 1u) == gridDim.x - 1;",
        "last = (*ticket)++ == gridDim.x - 1;",
    ),
    "position in the log": (
        "select.cuh", "((1u << lane()) - 1));", "((2u << lane()) - 1));",
    ),
    "leader of a warp": (
        "select.cuh",
        "__shfl_sync(kFullWarp, at, leader);",
        "__shfl_sync(kFullWarp, at, 0);",
    ),
    "warp mask of the ballot": (
        "select.cuh", "__ballot_sync(kFullWarp, take);", "__ballot_sync(0xFFFFu, take);",
    ),
    "log full by one": ("select.cuh", "at < (Count)capacity) write", "at <= (Count)capacity) write"),
    "log full by one, bracketed": (
        "bracket.cuh", "if (at < a_.brackets.capacity) {", "if (at <= a_.brackets.capacity) {",
    ),
    "log that overflowed": (
        "select.cuh", "__ldcg(&state.log_size[t]) <= (Count)a.log_capacity};", "true};",
    ),
    "window that missed": (
        "select.cuh", "if (below_window < rank && rank <= below_window + in_window) {",
        "if (in_window > 0) {",
    ),
    "stale histogram between passes": (
        "select.cuh", "  __syncthreads();\n  clear<2 * kBins>(state.of_windows[0]);\n}", "}",
    ),
    "rank within a bin, by one": (
        "select.cuh", "if (rank <= below + inside) {", "if (rank < below + inside) {",
    ),
    "rank between threads, by one": (
        "select.cuh", "if (below < rank && rank <= upto) {", "if (below <= rank && rank < upto) {",
    ),
    "shift of the last digit": (
        "select.cuh", "shift[t] = target.bits > 11 ? target.bits - 11 : 0;",
        "shift[t] = target.bits > 10 ? target.bits - 10 : 0;",
    ),
    "tie rule, high": ("../include/rose/element.h", "k <= bounds.high", "k < bounds.high"),
    "tie rule, low": ("../include/rose/element.h", "k > bounds.low", "k >= bounds.low"),
    "first element of a share": (
        "access.cuh", "(tile - table.segments[index].first_tile) * kTile;",
        "(tile - table.segments[index].first_tile) * (kTile - 1);",
    ),
    "next segment": (
        "access.cuh", "segments[index + 1].first_tile <= tile) ++index;",
        "segments[index + 1].first_tile < tile) ++index;",
    ),
    "last element": ("update.cuh", "is_there = i < count;", "is_there = i < count - 1;"),
    "last element of a tensor that is ruled out": (
        "update.cuh", "i < count; i += kThreads) {", "i < count - 1; i += kThreads) {",
    ),
    "bits of a mask": ("update.cuh", ">> (i % 8) : 0u", ">> (i % 4) : 0u"),
    "half of a byte": ("update.cuh", "half, 1) << kVector;", "half, 1) << (kVector - 1);"),
    "byte beyond the mask": (
        "update.cuh", "lane() < kWarp / 8 && first < count", "lane() < kWarp / 8",
    ),
    "infinity found": (
        "update.cuh", "  if (is_set(a.found_inf)) return;\n", "",
    ),
    "non-finite element": ("update.cuh", "kind = 0;\n", "\n"),
    "stride of a dimension": (
        "access.cuh", "coordinate * dim.strides[operand + k];", "coordinate * dim.strides[operand];",
    ),
    "global index of a tensor": ("update.cuh", "(segment.offset + i);", "i;"),
    "clipping of tensors that are not selective": (
        "update.cuh", "a.clip[segment.selective ? 0 : 1]", "a.clip[0]",
    ),
    "bits of parameters' rounding": (
        "update.cuh", "operand == 0 ? Rounded::kParameter : Rounded::kSecondMoment",
        "Rounded::kSecondMoment",
    ),
    "bits of the second neighbour": (
        "../include/rose/element.h", "return word >> (16 * (low & 1u));", "return word;",
    ),
    "learning rate of a group": ("update.cuh", "a.few_lrs[segment.group]", "a.few_lrs[0]"),
    "learning rate of a group, of many": ("update.cuh", "a.lrs[segment.group]", "a.lrs[0]"),
    "place of a graph's words": ("launch.cu", "part.to = to + from;", "part.to = to;"),
    "last of a graph's words": ("launch.cu", "if (i < a.count) a.to", "if (i < a.count - 1) a.to"),
    "tensor that is ruled out": (
        "update.cuh", "prepared.base_kind == 0 && !has_bits && !a.from_risk", "false",
    ),
    "tensor that bits may select": (
        "update.cuh", "prepared.base_kind == 0 && !has_bits &&", "prepared.base_kind == 0 &&",
    ),
    "tensors that are not ranked": ("keys.cuh", "    if (!segment.selective) return;\n", ""),
    "sample left behind": ("select.cuh", "  clear<2 * kBins>(sample.bins[0]);\n", ""),
    "sums of the sample left behind": ("select.cuh", "clear<kSums>((Count*)&sample.sums);", ""),
    "bracket without width": ("select.cuh", "a.brackets.width * (", "0.0 * ("),
    "class of ties that is not surely the threshold": (
        "select.cuh", "if (below < -1.0 - margin && upto > margin) {", "if (upto > below) {",
    ),
    "sign of a logged key": ("select.cuh", "word & ~kInactiveKey, low[t]", "word, low[t]"),
    "infinity found, bracketed": (
        "bracket.cuh", "  if (is_set(a.update.found_inf)) return;  // Mode::kNothing\n", "",
    ),
    "barrier before the pass": (
        "bracket.cuh",
        "shared.windows[threadIdx.x] = a.state->windows[threadIdx.x];\n    __syncthreads();",
        "shared.windows[threadIdx.x] = a.state->windows[threadIdx.x];",
    ),
    "flush before all have counted": (
        "bracket.cuh",
        "    __syncthreads();\n#pragma unroll 1\n" + SUMS_OF_PASS + FLUSH_OF_PASS,
        FLUSH_OF_PASS + SUMS_OF_PASS,
    ),
    "atomic of the bracket's histogram": (
        "bracket.cuh", "atomicAdd(&shared_.of_windows[t][(key - window.low) >> window.shift], 1u);",
        "shared_.of_windows[t][(key - window.low) >> window.shift] += 1u;",
    ),
    "atomic of the bracket's log": (
        "bracket.cuh", "first = atomicAdd(&a_.state->log_size[0], (Count)total);",
        "{ first = a_.state->log_size[0]; a_.state->log_size[0] += (Count)total; }",
    ),
    "entry of a lane": ("bracket.cuh", "votes & lanes_below());", "votes & lanes_below() / 2);"),
    "entries of a lane": ("bracket.cuh", "      ++at;\n", ""),
    "place of an entry": ("bracket.cuh", "at, place + j);", "at, place);"),
    "how an entry was treated": ("bracket.cuh", "entry.key | (uint32_t)selected << 31", "entry.key"),
    "old value": ("bracket.cuh", "+ 1, entry.m);", "+ 1, entry.p);"),
    "bin of a key in the bracket": (
        "bracket.cuh", "(key - window.low) >> window.shift", "(key - window.low + 1) >> window.shift",
    ),
    "keys below a bracket": (
        "bracket.cuh", "(kBelow + t, key < window.low)", "(kBelow, key < window.low)",
    ),
    "miss below, the threshold": (
        "bracket.cuh", "target.low = window.low - 1;", "target.low = window.low;",
    ),
    "miss above, the count": ("bracket.cuh", "      target.inside = (Count)inside;\n", ""),
    "miss that is not reported": ("bracket.cuh", "state.missed = true;", "state.missed = false;"),
    "overflow that is not noticed": (
        "bracket.cuh", "if (overflow || !window.logged) {", "if (!window.logged) {",
    ),
    "entries of a log that overflowed": (
        "bracket.cuh", "(logged < capacity ? logged : capacity)", "logged",
    ),
    "count after an overflow": ("bracket.cuh", "i <= last; i += kThreads", "i < last; i += kThreads"),
    "element done again, its mask": (
        "bracket.cuh", "rest + (was ? 0 : a.second_weight);", "rest + (was ? a.second_weight : 0);",
    ),
    "element done again, its count": (
        "bracket.cuh", " - (rest + (was ? a.second_weight : 0) != 0);", ";",
    ),
    "element done again, its first mask": (
        "bracket.cuh", "u.captured_kind(u.mask_bits(0, place.element), 0)", "u.captured_kind(0, 0)",
    ),
    "bits of a byte, twice": ("bracket.cuh", "      if (is_wrong(e - 1)) return;\n", ""),
    "bits of a byte, the first alone": (
        "bracket.cuh", "if (is_wrong(e)) flips |=", "if (false) flips |=",
    ),
    "no bracket, no update": ("bracket.cuh", "if (mode != Mode::kExact) return;", "return;"),
}  # fmt: skip


# Which check is likely to fail: it is made first.
LIKELY = {
    "barrier": "races", "atomic": "races", "byte beyond": "addresses", "log full": "addresses",
}  # fmt: skip


def failures(folder: Path, csrc: Path, likely: str = "results") -> list[str]:
    """Which checks the kernels in ``csrc`` fail: results, races, addresses. The first is enough."""
    build.module()
    sanitized = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    checks = {
        "results": lambda: [sys.executable, build.HERE / "check.py", build.build_mutant(folder, csrc)],
        "races": lambda: [build.build_races(folder, csrc)],
        "addresses": lambda: [build.build_races(folder, csrc, sanitized)],
    }
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    for name in sorted(checks, key=lambda name: name != likely):
        run = subprocess.run(checks[name](), capture_output=True, timeout=600, env=environment)
        if run.returncode != 0:
            return [name]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, tmp_path):
    csrc = build.copy_sources(tmp_path)
    file, text, replacement = MUTANTS[name]
    path = csrc / "cuda" / file
    source = path.read_text()
    assert text in source, f"{file} has no {text!r}: bring the table of mutants up to date"
    path.write_text(source.replace(text, replacement))
    likely = [check for start, check in LIKELY.items() if name.startswith(start)]
    assert failures(tmp_path, csrc, *likely)


@pytest.mark.slow
def test_the_sources_as_they_are_pass(tmp_path):
    """What is said of mutants must not be true of the original."""
    assert failures(tmp_path, build.copy_sources(tmp_path)) == []
