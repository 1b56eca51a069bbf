"""The CUDA kernels on the simulated device: any order of threads, counted bytes and launches, races.

The parity suite runs on that device, too (``ops`` in conftest.py); here is what only it can show.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simt import build
from simt.check import overflowing, sampled
from support import (
    BF16,
    FLOAT,
    ONE,
    Problem,
    Truth,
    assert_all_same_bits,
    assert_consistent,
    bits,
    compare_bracket,
    compare_update,
    cut,
    tensor_norms,
    values,
)

from rose_ops import reference
from rose_ops.definitions import Field, alphas_of, risk_key

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
    """``pieces`` tensors of n elements together."""
    cuts = torch.randint(0, n, (pieces - 1,), generator=generator).sort().values
    p, g, m, v = (cut(values(n, mix, d, generator), cuts) for d in (FLOAT, FLOAT, moment, moment))
    return Problem.of(g, m, params=p, exp_avg_sqs=[x.abs_() for x in v])


# ------------------------------------------------------------------------------------------- order

CONFIGURATIONS = {
    "reverse": {"order": "reverse"},
    "random": {"order": "random"},
    "one-block": {"order": "random", "resident": 1},
    "many-blocks": {"order": "random", "resident": 61},
    "two-threads": {"order": "random", "os_threads": 2, "resident": 16},
}
# Of one tensor, or of many.
each_configuration = pytest.mark.parametrize(
    ("name", "pieces"),
    [("reverse", 40), ("random", 1), ("random", 40), ("one-block", 40), ("many-blocks", 1),
     ("two-threads", 40)],
)  # fmt: skip


@pytest.mark.thin(3)
@each_configuration
def test_any_order_of_threads_and_blocks(simt, ops, generator, name, pieces):
    for seed, mix in enumerate((("normal",), MIX, ("ties",), ("zero", "one"))):
        problem = problem_of(generator, 30_011, mix, pieces, (FLOAT, BF16)[seed % 2])
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        for first in (True, False):
            truth = Truth(problem, first=first)
            for kept in ((600_000_000, 0), (ONE, 1), (500_000_000, 499_000_000)):
                record = problem.select(ops, *kept, first=first)
                assert record.tolist() == truth.select(*kept)
            masks = problem.capture(ops, record, first=first)
            assert_all_same_bits(masks, truth.capture(record), "masks")
        norms = tensor_norms(ops, problem.grads, None)
        simt.configure()
        assert torch.equal(bits(norms), bits(tensor_norms(ops, problem.grads, None)))
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        compare_update(ops, problem, masks, selection=record)


@pytest.mark.thin(3)
@each_configuration
def test_brackets_in_any_order_of_threads_and_blocks(simt, ops, generator, name, pieces):
    for seed, mix in enumerate((("normal",), MIX)):
        problem = problem_of(generator, 80_011, mix, pieces, (FLOAT, BF16)[seed % 2])
        simt.configure(**{"seed": seed, **CONFIGURATIONS[name]})
        for width in (1.0, 0.0):
            first, record = problem.bracket_capture(ops, 600_000_000, first=True, width=width)
            assert_consistent(problem, record, first=True)
            assert_all_same_bits(first, problem.capture(reference, record, first=True), "masks")
            compare_bracket(ops, problem.copy(), 700_000_000, 300_000_000, first, width=width)


@pytest.mark.thin(3)
@pytest.mark.parametrize(("name", "pieces"), [("random", 1), ("one-block", 40), ("two-threads", 40)])
def test_samples_in_any_order_of_threads_and_blocks(simt, ops, generator, name, pieces):
    problem = problem_of(generator, reference.APPROX_FEWEST + 11, MIX, pieces, BF16)
    simt.configure(**CONFIGURATIONS[name])
    compare_bracket(ops, problem, 600_000_000, 1_000_000, draw=3, approx=True)


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


def test_what_is_made_of_norms_is_one_launch(simt, ops, generator):
    sums = torch.rand(300, generator=generator, dtype=torch.float64)
    mask, tables = torch.zeros(300, dtype=torch.bool), Problem.of([sums.float()] * 300, None)
    launches, *_ = counted(simt, lambda: ops.clip_factors(sums, 1.0))
    assert launches == 1
    select = (mask, sums, sums, tables.hyper, tables.group, None, 600_000_000, 0, False)
    launches, *_ = counted(simt, lambda: ops.select_tensors_(*select))
    assert launches == 1


@pytest.mark.thin(2)
@pytest.mark.parametrize(("mix", "share"), [("normal", 0.0), ("ties", 0.25)])
def test_bytes_of_an_exact_second_order_step(simt, ops, generator, mix, share):
    """fp32: AdamW's own 28 bytes per element, and what finding the threshold reads and writes.

    g and m of elements that no comparison settles are read again, in the count and in the update: those
    close to the threshold, which are few, or the quarter of the elements that has it for its risk.
    """
    problem = problem_of(generator, N, (mix,))
    record = problem.select(ops, 600_000_000)
    alphas = alphas_of(problem.hyper, problem.group)
    keys = map(risk_key, problem.grads, problem.exp_avgs, alphas, itertools.repeat(False))
    unsure = sum(int((key == record[Field.HIGH]).sum()) for key in keys) / N
    assert abs(unsure - share) < 0.005
    # A sample must leave nothing behind that would mislead the next one.
    Problem.of([g * 1e-20 for g in problem.grads], problem.exp_avgs).select(ops, 600_000_000)
    _, read, written = counted(simt, lambda: problem.select(ops, 600_000_000))
    assert 8 * N < read <= (8.31 + 8 * unsure) * N
    assert written <= (0.07 + 2 * unsure) * N  # of the log, which has room for a part of the ties
    _, read, written = counted(simt, lambda: problem.update(ops, selection=record))
    assert 16 * N < read <= (16.001 + 8.01 * unsure) * N
    assert written == 12 * N


def test_bytes_of_a_first_order_capture(simt, ops, generator):
    """The gradient twice, a bit for each element, and the log: 1.2% of all keys are read again."""
    problem = problem_of(generator, 2 * N)
    _, read, written = counted(simt, lambda: problem.masks(ops, 600_000_000, first=True))
    assert 8 * 2 * N < read <= 8.15 * 2 * N
    assert 2 * N / 8 <= written <= (1 / 8 + 0.06) * 2 * N


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("mix", "width", "limit"),
    [
        pytest.param("normal", 1.0, 30.0, id="normal"),
        pytest.param("ties", 1.0, 33.6, id="ties"),
        pytest.param("normal", 1e9, 36.8, id="normal-no-bracket"),
        pytest.param("ties", 1e9, 42.5, id="ties-no-bracket", marks=pytest.mark.slow),
    ],
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
    """The gradient once, a bit for each element, the sample, and the log.

    How wide the bracket is and how far from the threshold the estimate, which is the sample's, is luck;
    what these cost is not. Of each entry of the log 12 bytes are written, and its key is read by four
    kernels; an element between estimate and threshold is done again, with a place and 8 gradients.
    """
    problem, found = problem_of(generator, N), []
    launches, read, written = counted(
        simt, lambda: found.append(problem.bracket_capture(ops, 600_000_000, first=True)[1])
    )
    assert launches == 6
    g = problem.grads[0].abs()
    sample = g[sampled(N, True)].sort().values
    estimate = sample[reference.rank_of(600_000_000, len(sample)) - 1]
    again = abs(int((g <= estimate).sum()) - int(found[0][Field.KEPT]))
    logged = (written - N / 8 - 4 * len(sample) - again) / 12
    assert 0.005 * N < logged < 0.013 * N
    assert abs(read - (4 * N + 8 * len(sample) + 16 * logged + 40 * again)) < 0.05 * N


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


def test_bytes_and_launches_by_the_thresholds_of_a_sample(simt, ops, generator):
    """What the pass itself needs; and the sample, a line in 16, which is logged and searched twice."""
    problem = problem_of(generator, N)
    options = {"approx": True, "draw": 5}
    of_sample = N / 16 * 4
    for call, of_operands, read_by_pass, written in (
        (lambda: problem.select(ops, 600_000_000, first=True, **options), 1, 4 * N, 0),
        (lambda: problem.select(ops, 600_000_000, **options), 2, 8 * N, 0),
        (lambda: problem.bracket_capture(ops, 600_000_000, **options), 2, 8 * N, N // 8),
        (lambda: problem.bracket_update(ops, 600_000_000, **options), 2, 16 * N, 12 * N),
    ):
        launches, read, total = counted(simt, call)
        assert launches == 4
        assert read_by_pass < read <= 1.001 * read_by_pass + (of_operands + 2) * of_sample
        assert written < total <= written + 1.001 * of_sample


@pytest.mark.parametrize("pieces", [1, 2, 500])
def test_launches_of_a_step(simt, ops, generator, pieces):
    """Whatever the number of tensors. Passes with nothing to do are launched: only the device knows."""
    problem = problem_of(generator, 40_000, pieces=pieces)

    def step():
        problem.update(ops, selection=problem.select(ops, 600_000_000))

    assert counted(simt, step)[0] == 7
    assert counted(simt, lambda: problem.masks(ops, 600_000_000))[0] == 6
    assert counted(simt, lambda: problem.select(ops, 600_000_000, approx=True))[0] == 5
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


def captured(simt, ops, problem: Problem, way: str = "bracket"):
    """A graph of a step, and where its replays put the results."""
    graph = simt.Graph()
    with graph:
        if way != "exact":
            return graph, [problem.bracket_update(ops, 600_000_000, approx=way == "approx")]
        record = problem.select(ops, 600_000_000)
        return graph, [record, problem.update(ops, selection=record)]


def compare_replay(graph, result, problem: Problem, approx: bool = False) -> None:
    expected = problem.copy()
    graph.replay()
    wanted = expected.bracket_update(reference, 600_000_000, approx=approx)
    assert torch.equal(torch.cat(result), wanted)
    for a, b in zip(problem.exp_avgs, expected.exp_avgs, strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.thin(3)
@pytest.mark.parametrize("way", ["bracket", "exact", "approx"])
@pytest.mark.parametrize("before", [True, False], ids=["after-a-step", "at-once"])
def test_a_graph_owns_what_it_reads(simt, ops, generator, way, before):
    """Nothing that later steps upload, drop or overwrite is part of it."""
    approx = way == "approx"
    problem = problem_of(generator, reference.APPROX_FEWEST if approx else 3000, pieces=90)
    if before:
        problem.bracket_update(ops, 600_000_000, approx=approx)
    kept = simt.kept_uploads()
    graph, result = captured(simt, ops, problem, way)
    assert simt.kept_uploads() == kept
    simt.forget_uploads()
    compare_replay(graph, result, problem, approx)
    for _ in range(40):
        problem_of(generator, 3000, pieces=90).select(ops, 600_000_000)
    renewed(problem, generator)
    compare_replay(graph, result, problem, approx)


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


# ---------------------------------------------------------------------------------------- sanitizers


def test_the_program_for_sanitizers(tmp_path):
    """All kernels, on two OS threads: without sanitizers, in two orders, of what is built already.

    `make verify-gpu` runs it under them, with every mutant and with the sources as they are (below).
    """
    build.module()
    program = build.link_races(tmp_path)
    found = [
        subprocess.run([program, *seed], capture_output=True, text=True, timeout=60)
        for seed in ([], ["1"])
    ]
    assert all(run.returncode == 0 for run in found), found
    assert found[0].stdout == found[1].stdout != ""


# ------------------------------------------------------------------------------------------- mutants

SANITIZERS = {
    "TSAN_OPTIONS": f"suppressions={build.HERE / 'tsan.txt'}:halt_on_error=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=0",
}
SHORT_RUNS = ("access.cuh", "kMostTiles = 1 << 16;", "kMostTiles = 2;")

# What is broken: file, text (found there once), replacement; any number of them.
MUTANTS: dict[str, tuple[str, ...]] = {
    # ------------------------------------------------------------------- access.cuh
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
    "barrier before the next run": ("access.cuh", "    __syncthreads();  // of the last body\n", ""),
    "barrier after the next run is known": (
        "access.cuh", "    __syncthreads();\n    if (run.count == 0) return;",
        "    if (run.count == 0) return;",
    ),
    "atomic of the ticket": (
        "access.cuh", "last = atomicAdd(ticket, 1u) == gridDim.x - 1;",
        "last = (*ticket)++ == gridDim.x - 1;",
    ),
    "segment of a tile": ("access.cuh", "*kFirst <= tile) {", "*kFirst < tile) {"),
    "first element of a share": (
        "access.cuh", "(tile - segment.first_tile) * kTile;",
        "(tile - segment.first_tile) * (kTile - 1);",
    ),
    "last element of a run": (
        "access.cuh", "(rest < tiles * kTile ? rest : tiles * kTile)", "(tiles * kTile)",
    ),
    "tiles of a run": (
        "access.cuh", "tile += (run.count + kTile - 1) / kTile;", "tile += run.count / kTile + 1;",
    ),
    "tiles of a run, if it ends before its share": (
        "access.cuh", "tile += (run.count + kTile - 1) / kTile;", "tile += tiles;",
    ),
    "next segment": ("access.cuh", "          ++run.segment;", "          run.segment += 2;"),
    "stride of a dimension": (
        "access.cuh", "coordinate * dim.strides[operand + k];", "coordinate * dim.strides[operand];",
    ),
    "halves of a word": (
        "access.cuh", "j % 2 == 0 ? word << 16 : word & 0xFFFF0000u",
        "j % 2 != 0 ? word << 16 : word & 0xFFFF0000u",
    ),
    "halves of a pair": (
        "access.cuh", "float_to_bf16(first) | (uint32_t)float_to_bf16(second) << 16",
        "float_to_bf16(second) | (uint32_t)float_to_bf16(first) << 16",
    ),
    "halves of a pair, rounded randomly": (
        "access.cuh", "first >> 16 | (second & 0xFFFF0000u)", "second >> 16 | (first & 0xFFFF0000u)",
    ),
    "vector of 8 bytes": ("access.cuh", "make_uint2(w[0], w[1])", "make_uint2(w[1], w[0])"),
    "elements after the last vector": ("access.cuh", "      return eight;", "      return four;"),
    "vectors by whole warps": ("access.cuh", "kFour = 4 * kTimes * kWarp", "kFour = 4 * kTimes"),
    "vectors of bfloat16 by whole warps": (
        "access.cuh", "kEight = 8 * kTimes * kWarp", "kEight = 8 * kTimes",
    ),
    "size of an element": ("access.cuh", "begin * (dtype == Dtype::kFloat32 ? 4 : 2)", "begin * 4"),
    "elements that a thread has of mixed dtypes": (
        "select.cuh", "(Types::kIsUsual ? kTimes : 1) * Types::kCount", "kTimes * Types::kCount",
    ),
    # --------------------------------------------------------------------- keys.cuh
    "tensors that are not ranked": ("select.cuh", "    if (!segment.selective) return;\n", ""),
    "tensors that are not ranked, of all keys": (
        "keys.cuh", "    if (!segment.selective) return;\n", "",
    ),
    "factors of all keys": (
        "keys.cuh", "factors.scaled(get(raw_g, dtype[0], j))", "get(raw_g, dtype[0], j)",
    ),
    "fence below, relative": ("keys.cuh", "1.0f - 0x1p-21f", "1.0f"),
    "fence above, relative": ("keys.cuh", "1.0f + 0x1p-21f", "1.0f"),
    "fence of no threshold": ("keys.cuh", "if (low > kInfinityBits) return {-1.0f, -1.0f};\n", ""),
    "moments of zero": ("keys.cuh", "unit >= kSmallestMoment;", "unit >= 0.0f;"),
    "gradients of zero": ("keys.cuh", "bool is_settled = risk > 0.0f;", "bool is_settled = true;"),
    "infinite risks": ("keys.cuh", "& (risk < bits_float(kInfinityBits)) & is_settled", "& is_settled"),
    "unsure elements": (
        "keys.cuh", "(unsigned)!(is_below | is_above) << j",
        "(unsigned)!(is_below | is_above | is_settled) << j",
    ),
    "lower threshold, the side": (
        "keys.cuh", "(unsigned)(is_below & is_above_lower) << j",
        "(unsigned)(is_below & is_below_lower) << j",
    ),
    "lower threshold, the window": (
        "keys.cuh", "(is_below & (is_below_lower | is_above_lower))", "is_below",
    ),
    "lower threshold, the count": (
        "keys.cuh", "verdict.below_lower |= (unsigned)(is_below & is_below_lower) << j;", "",
    ),
    "inactive elements, selected": ("keys.cuh", "    verdict.selected |= verdict.inactive;\n", ""),
    "inactive elements, looked at again": ("keys.cuh", "    verdict.unsure ^= verdict.inactive;\n", ""),
    "inactive elements that are ranked": ("keys.cuh", "ranks_inactive || __ballot", "__ballot"),
    "inactive elements without a finite gradient": (
        "keys.cuh", "zero == 0 && abs_bits(gradient(j)) < kInfinityBits", "zero == 0",
    ),
    # ---------------------------------------------------------------------- log.cuh
    "barrier before the pass": (
        "log.cuh", "shared.chunks[warp()] = {0, 0};\n    __syncthreads();",
        "shared.chunks[warp()] = {0, 0};",
    ),
    "inactive elements, the count below": (
        "log.cuh", " - __popc(verdict.inactive) + lower", " + lower",
    ),
    "elements below the lower threshold, of the upper": (
        "log.cuh", " - __popc(verdict.inactive) + lower", " - __popc(verdict.inactive)",
    ),
    "elements below the lower threshold": ("log.cuh", "    below_[1] += (unsigned)lower;\n", ""),
    "atomic of inactive elements": (
        "log.cuh", "atomicAdd(&shared_.counts[kInactive], (unsigned)__popc(verdict.inactive));",
        "shared_.counts[kInactive] += (unsigned)__popc(verdict.inactive);",
    ),
    "atomic of elements that are not ranked": (
        "log.cuh", "atomicAdd(&shared_.counts[key == kInactiveKey ? kInactive : kNonfinite], 1u);",
        "shared_.counts[key == kInactiveKey ? kInactive : kNonfinite] += 1u;",
    ),
    "atomic of a block's count": (
        "log.cuh", "if (lane() == 0 && x != 0) atomicAdd(count, x);",
        "if (lane() == 0 && x != 0) *count += x;",
    ),
    "slot of an element that is not ranked": ("log.cuh", "      waiting.word[at] = kNoKey;\n", ""),
    "slot of an element": (
        "log.cuh", "size_ + __popc(takers & lanes_below());",
        "size_ + __popc(takers & lanes_below() / 2);",
    ),
    "slots that are taken": ("log.cuh", "    size_ += __popc(takers);", "    size_ = __popc(takers);"),
    "slots that are free again": ("log.cuh", "    size_ -= count;\n", ""),
    "how an entry was treated": ("log.cuh", "key | (uint32_t)is_selected << 31", "key"),
    "last elements of a run": ("log.cuh", "    if (size_ > 0) note(base);\n", ""),
    "barrier of a warp before it notes": (
        "log.cuh", "    __syncwarp();  // what the lanes wrote\n", "",
    ),
    "elements that wait, the last": ("log.cuh", "i = size_ - count + lane();", "i = lane();"),
    "sign of a key in a window": (
        "log.cuh", "is_in_window(word & ~kInactiveKey)", "is_in_window(word)",
    ),
    "entries without room": (
        "log.cuh", "      if (is_taker && at >= a_.log.capacity) atomicAdd(&shared_.lost, 1u);\n", "",
    ),
    "overflow that is not noticed": (
        "log.cuh", "if (threadIdx.x == 0 && shared_.lost != 0)", "if (false)",
    ),
    "log full by one": (
        "log.cuh", "if (is_taker && at < a_.log.capacity) {",
        "if (is_taker && at <= a_.log.capacity) {",
    ),
    "log full, the rest of a chunk": (
        "log.cuh", "if (lane() < chunk.left && chunk.next + lane() < a_.log.capacity) {",
        "if (lane() < chunk.left) {",
    ),
    "rest of a chunk": (
        "log.cuh", "      write<uint32_t>(a_.log.keys, chunk.next + lane(), kNoKey);\n", "",
    ),
    "rest of a chunk, its end": ("log.cuh", "if (lane() < chunk.left && chunk", "if (chunk"),
    "place of an entry": ("log.cuh", "base + waiting.element[i]", "base"),
    "old value": ("log.cuh", "3 * at + 1, waiting.m[i]", "3 * at + 1, waiting.p[i]"),
    "keys below a window": ("log.cuh", "        ++below_[t];\n", "        ++below_[0];\n"),
    "last key of a window": (
        "log.cuh", "} else if (above <= window.width) {", "} else if (above < window.width) {",
    ),
    "bin of a key": (
        "log.cuh", "atomicAdd(&shared_.of_windows[t][above >> window.shift], 1u);",
        "atomicAdd(&shared_.of_windows[t][(above + 1) >> window.shift], 1u);",
    ),
    "atomic of a window's histogram": (
        "log.cuh", "atomicAdd(&shared_.of_windows[t][above >> window.shift], 1u);",
        "shared_.of_windows[t][above >> window.shift] += 1u;",
    ),
    "atomic of the log": (
        "log.cuh", "if (lane() == 0) first = atomicAdd(&a_.state->log_size, (Count)kChunk);",
        "if (lane() == 0) { first = a_.state->log_size; a_.state->log_size += (Count)kChunk; }",
    ),
    "leader of a warp": ("log.cuh", "first = __shfl_sync(kFullWarp, first, 0);", ""),
    "next chunk, the entry before": ("log.cuh", "before >= left", "before > left"),
    "next chunk, its entries": (
        "log.cuh", "(int64_t)first + before - left;", "(int64_t)first + before;",
    ),
    "next chunk, what follows": (
        "log.cuh", "(int64_t)first + wanted - left;", "(int64_t)first + wanted;",
    ),
    "next chunk, what is left": ("log.cuh", "left - wanted + kChunk : left", "kChunk : left"),
    "barrier of a warp before it takes a chunk": (
        "log.cuh", "    __syncwarp();\n    if (lane() == 0) chunk =", "    if (lane() == 0) chunk =",
    ),
    "barrier before the counts of a pass": (
        "log.cuh", "below_[1]);\n    __syncthreads();", "below_[1]);",
    ),
    "bit of an element that is settled by its key": (
        "log.cuh", "selected |= (unsigned)is_selected << j;", "selected |= (unsigned)is_selected;",
    ),
    "bit of an element that is not finite": (
        "log.cuh", "(unsigned)(its_key == kNonfiniteKey) << j", "(unsigned)(its_key == kNonfiniteKey)",
    ),
    "elements that are not finite, the count": (
        "log.cuh", "if (nonfinite != nullptr && key == kNonfiniteKey) atomicAdd(nonfinite, 1u);", "",
    ),
    # ------------------------------------------------------------------- sample.cuh
    "rank within a bin, by one": (
        "sample.cuh", "if (below < rank && rank <= below + bins[i]) found",
        "if (below <= rank && rank < below + bins[i]) found",
    ),
    "barrier before the next bin is looked for": (
        "sample.cuh", "  __syncthreads();  // of the last use\n", "",
    ),
    "atomic of the global histogram": (
        "sample.cuh", "atomicAdd(all + i, (To)block[i]);", "all[i] += (To)block[i];",
    ),
    "factors of the sample": (
        "sample.cuh", "factors.scaled(from_bits(g[k], segments[k]->dtype[operand]))",
        "from_bits(g[k], segments[k]->dtype[operand])",
    ),
    "address of a line that ends early": ("sample.cuh", "    if (i >= segment.n) continue;\n", ""),
    "inactive elements of the sample": (
        "sample.cuh", "if (key < kInactiveKey) keys[k] = key;", "keys[k] = key;",
    ),
    "barrier between two steps of sorting": (
        "sample.cuh", "      __syncthreads();\n      const int i = 2", "      const int i = 2",
    ),
    "barrier after the size of the pilot": (
        "sample.cuh", "size = i + 1;\n  }\n  __syncthreads();", "size = i + 1;\n  }",
    ),
    "barrier after the views": (
        "sample.cuh", ": no_view();\n  }\n  __syncthreads();", ": no_view();\n  }",
    ),
    "bracket without width": ("sample.cuh", "? a.width * half", "? 0.0 * half"),
    "class of ties that is not surely the threshold": (
        "sample.cuh", "if (is_surely_between(below, upto, margin)) {", "if (upto > below) {",
    ),
    "room of the log": ("sample.cuh", "logged <= room;", "logged <= 1e300;"),
    "room of the log, what chunks leave unused": (
        "sample.cuh", "(double)(a.log.capacity - a.log.spare)", "(double)a.log.capacity",
    ),
    "room of the log, blocks": (
        "launch.cu", "select.log.spare = blocks * kThreads;", "select.log.spare = 0;",
    ),
    "order of the sample's sums": (
        "sample.cuh", "sums[6 + t] += __popc(votes(key < view.window.low));",
        "sums[8 + t] += __popc(votes(key < view.window.low));",
    ),
    "atomic of the sample's histogram": (
        "sample.cuh", "atomicAdd(&bins[t][above >> view.window.shift], 1u);",
        "bins[t][above >> view.window.shift] += 1u;",
    ),
    "atomic of the sample's sums": (
        "sample.cuh", "sums[i] != 0) atomicAdd(&of_block[i], sums[i]);",
        "sums[i] != 0) of_block[i] += sums[i];",
    ),
    "barrier after the sample": (
        "sample.cuh", "atomicAdd(&of_block[i], sums[i]);\n  }\n  __syncthreads();",
        "atomicAdd(&of_block[i], sums[i]);\n  }",
    ),
    "sample left behind": ("sample.cuh", "  clear<2 * kBins>(sample.bins[0]);\n", ""),
    "sums of the sample left behind": ("sample.cuh", "  clear<kSums>((Count*)&sample.sums);\n", ""),
    "ticket of the sample left behind": (
        "sample.cuh", "  if (threadIdx.x == 0) sample.ticket = 0;\n", "",
    ),
    # ------------------------------------------------------------------- select.cuh
    "two factors": (
        "select.cuh", "return fabsf(factors.inv_scale) == 1.0f || factors.clip == 1.0f;",
        "return true;",
    ),
    "two thresholds": (
        "select.cuh", "is_one_factor(factors) && notes.has_one_threshold();", "is_one_factor(factors);",
    ),
    "counts where an element is unsure": (
        "select.cuh", "              notes.count(verdict);\n              unsigned nonfinite = 0;",
        "              unsigned nonfinite = 0;",
    ),
    "counts where no element is unsure": (
        "select.cuh", "            } else {\n              notes.count(verdict);\n            }",
        "            }",
    ),
    "factors of an unsure element": (
        "select.cuh", "scaled(read_element(g_data, of_g, i + j))", "read_element(g_data, of_g, i + j)",
    ),
    "last element": (
        "select.cuh", "i < run.count, i, base, selected", "i < run.count - 1, i, base, selected",
    ),
    "last elements of a run, noted": ("select.cuh", "    notes.end_run(base);\n", ""),
    "elements that are not finite, of the ranked": (
        "select.cuh", "counts[kInactive]) - __ldcg(&state.counts[kNonfinite]);", "counts[kInactive]);",
    ),
    "window that missed": (
        "select.cuh", "const bool is_inside = below < rank && rank <= below + inside;",
        "const bool is_inside = inside > 0;",
    ),
    "window that missed, the flag": ("select.cuh", "      if (!is_inside) state.unlucky = true;\n", ""),
    "log that overflowed": (
        "select.cuh", "const bool logged = __ldcg(&state.overflowed) == 0;",
        "const bool logged = true;",
    ),
    "stale histogram between passes": (
        "select.cuh", "state.ranked = ranked;\n  clear<2 * kBins>(state.of_windows[0]);",
        "state.ranked = ranked;",
    ),
    "histogram of all keys": ("select.cuh", "  if (!state.unlucky) return;\n", "  return;\n"),
    "barrier after clearing the histogram": (
        "select.cuh", "  clear<kBins>(histogram);\n  __syncthreads();", "  clear<kBins>(histogram);",
    ),
    "barrier before flushing the histogram": (
        "select.cuh", "  __syncthreads();\n  flush<kBins>(histogram, state.histogram);",
        "  flush<kBins>(histogram, state.histogram);",
    ),
    "atomic of the shared histogram": (
        "select.cuh", "atomicAdd(&histogram[key >> kLeadingShift], 1u);",
        "histogram[key >> kLeadingShift] += 1u;",
    ),
    "log of a threshold outside of its window": (
        "select.cuh", "find_leading(a, state.histogram, false);",
        "find_leading(a, state.histogram, true);",
    ),
    "shift of the last digit": (
        "select.cuh", "shift[t] = threshold.bits > 11 ? threshold.bits - 11 : 0;",
        "shift[t] = threshold.bits > 10 ? threshold.bits - 10 : 0;",
    ),
    "sign of a logged key": (
        "select.cuh", "read<uint32_t>(a.log.keys, i) & ~kInactiveKey, of_log",
        "read<uint32_t>(a.log.keys, i), of_log",
    ),
    "barrier before a digit is counted": (
        "select.cuh", "    clear<2 * kBins>(histogram[0]);\n    __syncthreads();",
        "    clear<2 * kBins>(histogram[0]);",
    ),
    "barrier after a digit is counted": (
        "select.cuh", "    __syncthreads();\n#pragma unroll\n    for (int t = 0; t < 2; ++t) flush",
        "#pragma unroll\n    for (int t = 0; t < 2; ++t) flush",
    ),
    "atomic of a digit": (
        "select.cuh", "atomicAdd(&histogram[t][(key - low[t]) >> shift[t]], 1u);",
        "histogram[t][(key - low[t]) >> shift[t]] += 1u;",
    ),
    "stale histogram between digits": (
        "select.cuh", "if (!kLast || a.approx) clear<2", "if (a.approx) clear<2",
    ),
    "keys below a digit": ("select.cuh", "      threshold.below += bin.below;\n", ""),
    # Of a sample that gives the thresholds.
    "barrier before a sample is logged": (
        "select.cuh", "  clear<kBins>(bins);\n  __syncthreads();", "  clear<kBins>(bins);",
    ),
    "address of an entry after a sample's last": (
        "select.cuh", "if (strata[k] < a.strata.count) write", "write",
    ),
    "entries of a sample at once": (
        "select.cuh", "a.log.keys, first + k * stride, keys[k]", "a.log.keys, first, keys[k]",
    ),
    "elements of a line": ("select.cuh", "lane() % kLine, keys", "lane() % kLine / 2, keys"),
    "barrier after a sample is logged": (
        "select.cuh", "  __syncthreads();\n  Sample& sample", "  Sample& sample",
    ),
    "leading bits left behind": ("select.cuh", "  clear<kBins>(sample.bins[0]);\n", ""),
    "ticket of a logged sample left behind": ("select.cuh", "  sample.ticket = 0;\n", ""),
    "entries of a sample": ("select.cuh", "  a.state->log_size = (Count)size;\n", ""),
    "stale histogram before a pass by a sample": (
        "select.cuh", "if (!kLast || a.approx) clear<2", "if (!kLast) clear<2",
    ),
    "window of a sample's threshold": (
        "select.cuh", "(uint32_t)keys[t], 0, 0, false", "(uint32_t)keys[0], 0, 0, false",
    ),
    "estimate of a sample's threshold": (
        "select.cuh", "{(int32_t)keys[0], (int32_t)keys[1]}",
        "{(int32_t)keys[0], -1}",
    ),
    "sample without a threshold": ("select.cuh", "    if (a.record[t] < 0) continue;\n", ""),
    "elements at a sample's threshold": ("select.cuh", " + __ldcg(&state.of_windows[t][0]);", ";"),
    "atomic of the counts by a sample": (
        "select.cuh", "if (!is_last_block(&state.tickets[0]) || threadIdx.x != 0) return;",
        "if (threadIdx.x != 0) return;",
    ),
    "tie rule, high": ("../include/rose/element.h", "k <= bounds.high", "k < bounds.high"),
    "tie rule, low": ("../include/rose/element.h", "k > bounds.low", "k >= bounds.low"),
    # ------------------------------------------------------------------- update.cuh
    "second byte of a mask": (
        "capture.cuh", "      write<uint8_t>(bits, i / 8 + 1, (uint8_t)(selected >> 8));\n", "",
    ),
    "half of a byte": ("capture.cuh", "(selected | next << 4)", "(selected | next << 3)"),
    "byte beyond the mask": (
        "capture.cuh", "lane() % 8 == 0 && (there >> lane() & 1u) != 0", "lane() % 8 == 0",
    ),
    "byte of a mask": ("capture.cuh", "(uint8_t)(word >> lane())", "(uint8_t)word"),
    "sign of a gradient": (
        "update.cuh", "mul(segment.sign, scalar_or_one(a.inv_scale))", "scalar_or_one(a.inv_scale)",
    ),
    "clipping of tensors that are not selective": (
        "update.cuh", "a.clip[segment.selective ? 0 : 1]", "a.clip[0]",
    ),
    "learning rate of a group": ("update.cuh", "a.few_lrs[segment.group]", "a.few_lrs[0]"),
    "learning rate of a group, of many": ("update.cuh", "a.lrs[segment.group]", "a.lrs[0]"),
    "tensor that is ruled out": (
        "update.cuh", "prepared.base_weight == 0 && !has_bits && a.known == nullptr", "false",
    ),
    "tensor that bits may select": (
        "update.cuh", "prepared.base_weight == 0 && !has_bits &&", "prepared.base_weight == 0 &&",
    ),
    "infinity found, steps": (
        "update.cuh", "i < a.table.count && is_finite", "i < a.table.count",
    ),
    "infinity found, the record": (
        "update.cuh", "copy_record(is_finite ? a.known : nullptr, a.record);",
        "copy_record(a.known, a.record);",
    ),
    "record of a selection": ("capture.cuh", "from != nullptr ? from[i] :", "false ? 0 :"),
    "record of a capture": (
        "capture.cuh", "threadIdx.x == 0) copy_record(a.known, a.record);", "threadIdx.x == 0) {}",
    ),
    "infinity found": ("update.cuh", "if (!is_set(a.found_inf)) update<", "update<"),
    "infinity found, by thresholds": (
        "bracket.cuh", "  if (is_set(a.update.found_inf)) return;\n  const Course",
        "  const Course",
    ),
    "infinity found, bracketed": (
        "bracket.cuh", "  if (is_set(a.update.found_inf)) return;  // Course::kNothing\n", "",
    ),
    "product of the factors": ("update.cuh", "factor = mul(scale, clip);", "factor = scale;"),
    "two factors of an update": (
        "update.cuh", "has_one_factor = is_one_factor({scale, clip});", "has_one_factor = true;",
    ),
    "two factors of tensors that are not ranked": (
        "update.cuh", "u.has_one_factor && (!kRanked || u.has_one_threshold)",
        "(!kRanked || (u.has_one_factor && u.has_one_threshold))",
    ),
    "two thresholds of an update": (
        "update.cuh", "has_one_threshold = notes.has_one_threshold();", "has_one_threshold = true;",
    ),
    "bits of a mask": ("update.cuh", ">> (i % 8);", ">> (i % 4);"),
    "order of a mask": ("update.cuh", "2 * (int)(second & 1u)", "(int)(second & 1u)"),
    "bits of parameters' rounding": (
        "update.cuh", "operand == 0 ? Rounded::kParameter : Rounded::kSecondMoment",
        "Rounded::kSecondMoment",
    ),
    "bits of the second neighbour": (
        "../include/rose/element.h", "return word >> (16 * (low & 1u));", "return word;",
    ),
    "global index of a tensor": (
        "update.cuh", "(uint64_t)(offset + i), rounded", "(uint64_t)i, rounded",
    ),
    "global index of a tensor, in vectors": ("update.cuh", "(uint64_t)(u.offset + i);", "(uint64_t)i;"),
    "upper half of an index": (
        "update.cuh", "(its_high == high ? key : mix(its_high ^ u.random_key))", "key",
    ),
    "random bits from an odd index on": (
        "update.cuh", "    if (even == index) return;\n", "    return;\n",
    ),
    "random bits from an odd index on, the last": (
        "update.cuh", "const uint32_t last = word(kCount / 2);", "const uint32_t last = words[0];",
    ),
    "random bits of neighbours": (
        "update.cuh", "float_bits(x[0]) + (bits & 0xFFFFu), float_bits(x[1]) + (bits >> 16)",
        "float_bits(x[0]) + (bits >> 16), float_bits(x[1]) + (bits & 0xFFFFu)",
    ),
    "random bits of neighbours that are ruled out": ("update.cuh", "random.of(j)", "random.of(0)"),
    "NaN of bfloat16": ("update.cuh", "return (x[0] != x[0]) | (x[1] != x[1]);", "return false;"),
    "NaN of a second neighbour": (
        "update.cuh", "return (x[0] != x[0]) | (x[1] != x[1]);", "return x[0] != x[0];",
    ),
    "NaN of a second moment": ("update.cuh", "has_nan |= put_pair(raw_v", "put_pair(raw_v"),
    "neighbours of a NaN": (
        "update.cuh", "for (int j = 0; j < kCount; ++j) {\n              const int64_t at",
        "for (int j = 0; j < kCount - 1; ++j) {\n              const int64_t at",
    ),
    "neighbours of a NaN, their gradients": (
        "update.cuh", "u.gradient(u.load(1, at))", "u.load(1, at)",
    ),
    "last element of a tensor that is ruled out": (
        "update.cuh", "i < run.begin + run.count; i += kThreads) {",
        "i < run.begin + run.count - 1; i += kThreads) {",
    ),
    "moment that is not finite": (
        "update.cuh", "abs_bits(scaled) < kInfinityBits && abs_bits(m) < kInfinityBits",
        "abs_bits(scaled) < kInfinityBits",
    ),
    "non-finite elements of masks": (
        "update.cuh", "const bool is_checked = !kRanked && segment.selective;",
        "const bool is_checked = false;",
    ),
    "non-finite element": (
        "update.cuh", "(first | second) & kAll) & ~nonfinite;", "(first | second) & kAll);",
    ),
    "non-finite element, one at a time": ("update.cuh", "    if (nonfinite != 0) weight = 0;\n", ""),
    "elements that are updated": ("update.cuh", "(first | second) & kAll)", "(first | second))"),
    "elements that are settled by their keys": (
        "update.cuh", "        if (kRanked) second = selected;\n", "",
    ),
    "old value of a vector": (
        "update.cuh", "              v = read_element(v_data, of_v, i + j);",
        "              v = read_element(p_data, of_v, i + j);",
    ),
    "old value, one at a time": ("update.cuh", "old_m = m, old_v = v;", "old_m = v, old_v = m;"),
    "last element of an update": (
        "update.cuh", "const bool is_there = element < run.count;",
        "const bool is_there = element < run.count - 1;",
    ),
    "last elements of an update's run, noted": ("update.cuh", "  notes.end_run(base);\n", ""),
    "barrier before a run is updated": (
        "update.cuh", "u.fill(a, run.segment, notes);\n    __syncthreads();",
        "u.fill(a, run.segment, notes);",
    ),
    "barrier before an update's counts": (
        "update.cuh", "(a, notes, counts);\n  __syncthreads();", "(a, notes, counts);",
    ),
    "atomic of an update's count": (
        "update.cuh", "counts[kUpdated] != 0) atomicAdd(&a.counts[0], (Count)counts[kUpdated]);",
        "counts[kUpdated] != 0) a.counts[0] += (Count)counts[kUpdated];",
    ),
    # ------------------------------------------------------------------ bracket.cuh
    "keys below a bracket": (
        "bracket.cuh", "counts[kBelowUpper + t]), in_window", "counts[kBelowUpper]), in_window",
    ),
    "miss below, the threshold": (
        "bracket.cuh", "threshold.low = window.low - 1;", "threshold.low = window.low;",
    ),
    "miss above, the count": ("bracket.cuh", "    threshold.inside = (Count)inside;\n", ""),
    "miss that is not reported": ("bracket.cuh", "state.missed = true;", "state.missed = false;"),
    "overflow that is not reported": (
        "bracket.cuh", "if (overflowed || (missed && threshold.searching))",
        "if (missed && threshold.searching)",
    ),
    "overflow, the threshold": (
        "bracket.cuh", "if (overflowed || !window.logged) {", "if (!window.logged) {",
    ),
    "count after an overflow": ("bracket.cuh", "i <= last; i += kThreads", "i < last; i += kThreads"),
    "stale histogram after a pass": (
        "bracket.cuh", "  __syncthreads();\n  clear<2 * kBins>(state.of_windows[0]);\n", "",
    ),
    "entries of a log that overflowed": (
        "bracket.cuh", "(logged < capacity ? logged : capacity)", "logged",
    ),
    "entries of a log, at once": (
        "bracket.cuh", "i < size ? read<uint32_t>(a.log.keys, i) : kNoKey",
        "read<uint32_t>(a.log.keys, i)",
    ),
    "no entry": ("bracket.cuh", "words[k] != kNoKey && ", ""),
    "entry that is wrong": ("bracket.cuh", "(__ffs((int)wrong) - 1) * stride", "0 * stride"),
    "tile of a place": (
        "bracket.cuh", "find_segment(table, place / kTile)", "find_segment(table, place / (2 * kTile))",
    ),
    "element done again, its mask": (
        "bracket.cuh", "rest + (was_selected ? 0 : a.weights.second);",
        "rest + (was_selected ? a.weights.second : 0);",
    ),
    "element done again, its first mask": (
        "bracket.cuh", "!= 0 ? a.weights.first : 0);", "!= 0 ? 0 : 0);",
    ),
    "element done again, its count": (
        "bracket.cuh", "was_selected ? &less : &more", "was_selected ? &more : &less",
    ),
    "element done again, counted twice": ("bracket.cuh", "if (rest == 0) atomicAdd(", "atomicAdd("),
    "element done again, its gradient": (
        "bracket.cuh", "u.gradient(u.load(1, places[1]))", "u.load(1, places[1])",
    ),
    "barrier before elements are done again": (
        "bracket.cuh", "more = less = 0;\n  __syncthreads();", "more = less = 0;",
    ),
    "barrier after elements are done again": (
        "bracket.cuh", "  __syncthreads();\n  if (threadIdx.x == 0 && more",
        "  if (threadIdx.x == 0 && more",
    ),
    "atomic of elements done again": (
        "bracket.cuh", "if (rest == 0) atomicAdd(was_selected ? &less : &more, 1u);",
        "if (rest == 0) ++(was_selected ? less : more);",
    ),
    "byte done again, its first bit": ("bracket.cuh", "at.element / 8 * 8;", "at.element;"),
    "byte done again, its other bits": ("bracket.cuh", "byte |= (unsigned)if", "byte = (unsigned)if"),
    "addresses of a byte done again": ("bracket.cuh", "j < 8 && first + j < segment.n", "j < 8"),
    "sample's threshold, the record": (
        "bracket.cuh", "  if (a.approx) {\n    end_approx(a);\n    return;\n  }\n", "",
    ),
    "no bracket, no update": (
        "bracket.cuh", "  if (course == Course::kExact) update<kFractional, true>(a.update);\n", "",
    ),
    "no bracket, no count": (
        "bracket.cuh", "  if (course == Course::kExact) count(a.select, shared);\n", "",
    ),
    # ------------------------------------------------------------------------- rest
    "squares of a tensor that is not linear": (
        "squares.cuh", "segment, begin + j, place", "segment, j, place",
    ),
    "squares of a tile": (
        "squares.cuh", "segment.first_tile + (begin + start) / kTile",
        "segment.first_tile + begin / kTile",
    ),
    "barrier after a sum over tensors": (
        "norms.cuh", "total = sum;\n    __syncthreads();", "total = sum;",
    ),
    "threshold of tensors": ("norms.cuh", "<= quantile.index)", "< quantile.index)"),
    "threshold of tensors, two at once": (
        "norms.cuh", "Count(key < high_try) << 32", "Count(key < low_try) << 32",
    ),
    "factor of norms": ("norms.cuh", "mul(norm, a.clip[0])", "mul(norm, a.clip[1])"),
    "share of the ranked tiles": (
        "launch.cu", "((others.share = table.share), ...);", "((void)others, ...);",
    ),
    "sample's threshold, no log": (
        "launch.cu", "if (failed != nullptr || arguments.select.approx) return failed;",
        "if (failed != nullptr) return failed;",
    ),
    "place of a graph's words": ("launch.cu", "part.to = to + from;", "part.to = to;"),
    "last of a graph's words": ("launch.cu", "if (i < a.count) a.to", "if (i < a.count - 1) a.to"),
}  # fmt: skip


# Which check is likely to fail: it is made first.
LIKELY = {
    "barrier": "races", "atomic": "races", "room": "races", "byte beyond": "addresses",
    "log full": "addresses", "address": "addresses", "entries of a log": "addresses",
}  # fmt: skip


def failures(folder: Path, csrc: Path, likely: str = "results") -> list[str]:
    """Which checks the kernels in ``csrc`` fail: results, races, addresses. The first is enough.

    Races: ThreadSanitizer, each CUDA thread a fiber of its own. Addresses: AddressSanitizer and UBSan,
    every access within what the host allocated.
    """
    build.module()
    sanitized = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    checks = {
        "results": lambda: [sys.executable, build.HERE / "check.py", build.build_mutant(folder, csrc)],
        "races": lambda: [build.build_races(folder, csrc)],
        "addresses": lambda: [build.build_races(folder, csrc, sanitized)],
    }
    environment = {**os.environ, **SANITIZERS}
    for name in sorted(checks, key=lambda name: name != likely):
        command = checks[name]()
        for order in ([], ["1"]) if name == "races" else ([],):
            try:
                run = subprocess.run(
                    [*command, *order], capture_output=True, text=True, timeout=600, env=environment
                )
            except subprocess.TimeoutExpired:
                return [f"{name}, which never end"]
            if run.returncode != 0:
                return [f"{name}:\n{run.stderr[-6000:]}"]
    return []


def mutate(csrc: Path, mutant: tuple[str, ...]) -> None:
    for file, text, replacement in zip(mutant[::3], mutant[1::3], mutant[2::3], strict=True):
        path = csrc / "cuda" / file
        source = path.read_text()
        assert source.count(text) == 1, f"{file}: {text!r}: bring the table of mutants up to date"
        path.write_text(source.replace(text, replacement))


def test_mutants_are_of_these_sources(tmp_path):
    """So that the table is known to be old where mutants, which take long, are not tried."""
    csrc = build.copy_sources(tmp_path)
    for mutant in (*MUTANTS.values(), SHORT_RUNS):
        before = {path: path.read_text() for path in (csrc / "cuda" / file for file in mutant[::3])}
        mutate(csrc, mutant)
        for path, text in before.items():
            path.write_text(text)


# All of them take more than an hour. Continuous integration takes these: seen to be caught, in minutes.
FEW = {
    "barrier before the counts of a pass", "atomic of inactive elements", "leader of a warp",
    "entries of a log that overflowed", "tie rule, high", "non-finite element", "bin of a key",
    "lower threshold, the count", "inactive elements, selected", "inactive elements, looked at again",
    "inactive elements that are ranked", "factors of the sample", "elements that are updated",
    "neighbours of a NaN", "random bits of neighbours that are ruled out", "old value, one at a time",
    "last of a graph's words",
}  # fmt: skip
MARKED = [pytest.param(name, marks=[pytest.mark.few] if name in FEW else []) for name in MUTANTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_every_mutant_is_caught(name, tmp_path):
    csrc = build.copy_sources(tmp_path)
    mutate(csrc, MUTANTS[name])
    likely = [check for start, check in LIKELY.items() if name.startswith(start)]
    assert failures(tmp_path, csrc, *likely)


@pytest.mark.slow
@pytest.mark.few
def test_the_sources_as_they_are_pass(tmp_path):
    """What is said of mutants must not be true of the original."""
    assert failures(tmp_path, build.copy_sources(tmp_path)) == []


@pytest.mark.slow
def test_runs_that_a_block_walks_in_parts(tmp_path):
    """As of segments with more elements than an int counts, but of two tiles."""
    csrc = build.copy_sources(tmp_path)
    mutate(csrc, SHORT_RUNS)
    assert failures(tmp_path, csrc) == []
