"""More than 2^31 elements: in one tensor, and in an index space made of one tensor many times."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support import (
    BF16,
    FLOAT,
    ONE,
    Problem,
    assert_all_same_bits,
    assert_same_bits,
    hyper_table,
    values,
)

from rose_ops import reference

GIB = 1 << 30


def need_memory(bytes_needed: int) -> None:
    """Skip, and say so, where that much is not free."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        pytest.skip("cannot tell how much memory is free")
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024
    if free < bytes_needed:
        pytest.skip(f"needs {bytes_needed / GIB:.1f} GiB of memory, {free / GIB:.1f} are free")


# ------------------------------------------------------------------------------- one tensor

N = 2**31 + 12_347
PERIOD = 8 * 1_000_003  # a prime number of mask bytes: an index that wrapped at 2^31 shows


@pytest.fixture(scope="module")
def huge():
    """A bfloat16 gradient of N elements: a pattern over and over, and special values in a few
    places around and beyond 2^31."""
    need_memory(7 * GIB)
    generator = torch.Generator().manual_seed(torch.seed())
    pattern = values(PERIOD, ("normal", "normal", "ties", "zero"), BF16, generator)
    pattern[:3] = torch.tensor([torch.nan, torch.inf, 0.0])
    g = torch.empty(N, dtype=BF16)
    for start in range(0, N, PERIOD):
        g[start : start + PERIOD] = pattern[: N - start]
    special = {
        2**31 - 1: 0.0, 2**31: 1e-30, 2**31 + 1: 1e30, 2**31 + 2: torch.nan, 2**31 + 4095: -1e-30,
        2**31 + 4096: -torch.inf, N - 2: 0.0, N - 1: 1e30,
    }  # fmt: skip
    for index, value in special.items():
        g[index] = value
    return g, pattern, special, counts_of_keys(g, pattern, special)


def counts_of_keys(g: torch.Tensor, pattern: torch.Tensor, special) -> torch.Tensor:
    """How often each of the 65536 bfloat16 patterns occurs: int64, by exact multiplication."""

    def count(x: torch.Tensor) -> torch.Tensor:
        return torch.bincount(x.view(torch.int16).long() & 0xFFFF, minlength=1 << 16)

    counts = count(pattern) * (N // PERIOD) + count(pattern[: N % PERIOD])
    where = torch.tensor(list(special))
    return counts - count(pattern[where % PERIOD]) + count(g[where])


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("upper", "lower", "approx"),
    [
        pytest.param(600_000_000, 0, False, id="upper", marks=pytest.mark.slow),
        pytest.param(900_000_000, 100_000_001, False, id="between"),
        pytest.param(600_000_000, 0, True, id="approx", marks=pytest.mark.slow),
    ],
)
def test_one_tensor_beyond_2_31(real_ops, huge, upper, lower, approx):
    """Record from the counts of bit patterns, masks from the pattern's mask, bit for bit."""
    g, pattern, special, counts = huge
    every = torch.arange(1 << 16)
    every = ((every ^ 0x8000) - 0x8000).to(torch.int16).view(BF16)
    key = reference.risk_key(every.float(), None, 0.0, False)
    ranked = key < reference.INACTIVE_KEY
    order = key[ranked].argsort(stable=True)
    sorted_keys, cumulative = key[ranked][order], counts[ranked][order].cumsum(0)
    n_ranked = int(cumulative[-1])
    in_sample = reference.risk_key(g[reference.sampled([N], 0)].float(), None, 0.0, False)
    in_sample = in_sample[in_sample < reference.INACTIVE_KEY].sort().values
    assert n_ranked > 1.5e9
    assert int(counts.sum()) == N

    def threshold(fraction: int) -> int:
        k = reference.rank_of(fraction, len(in_sample) if approx else n_ranked)
        if k == 0:
            return -1
        return int(in_sample[k - 1] if approx else sorted_keys[torch.searchsorted(cumulative, k)])

    problem = Problem.of([g], [], params=[], exp_avg_sqs=[])
    record = problem.select(real_ops, upper, lower, first=True, approx=approx)
    high, low = threshold(upper), threshold(lower)
    inside = ranked & (key > low) & (key <= high)
    assert record.tolist() == [
        high, low, int(counts[inside].sum()), n_ranked,
        int(counts[key == reference.INACTIVE_KEY].sum()),
        int(counts[key == reference.NONFINITE_KEY].sum()), 0, 0,
    ]  # fmt: skip
    if approx:
        return

    (mask,) = problem.capture(real_ops, record, first=True)
    (expected,) = Problem.of([pattern]).capture(reference, record, first=True)
    values_ = torch.tensor(list(special.values()), dtype=BF16).float()
    key = reference.risk_key(values_, None, 0.0, False)
    selected = reference.is_selected(key, record)
    for index, on in zip(special, selected.tolist(), strict=True):
        assert int(mask[index // 8] >> index % 8) & 1 == on, index
    where = torch.tensor(list(special)) // 8
    step = PERIOD // 8
    for start in range(0, len(mask), step):
        chunk, wanted = mask[start : start + step], expected[: len(mask) - start].clone()
        if start + step >= len(mask):  # bits past the end are 0
            wanted[-1] &= (1 << (N - 1) % 8 + 1) - 1
        here = where[(where >= start) & (where < start + step)] - start
        wanted[here] = chunk[here]  # compared above, or neighbours of those
        assert torch.equal(chunk, wanted), f"bytes from {start}"
    # The neighbours of the special ones.
    for byte in where.unique().tolist():
        indices = [i for i in range(8 * byte, min(8 * byte + 8, N)) if i not in special]
        keys = reference.risk_key(g[indices].float(), None, 0.0, False)
        bits = [int(mask[byte] >> i % 8) & 1 for i in indices]
        assert bits == reference.is_selected(keys, record).tolist()


@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
def test_views_that_reach_beyond_2_31(real_ops, generator, dtype):
    """Few elements, far apart: every offset, in elements and in bytes, needs 64 bits. Only pages
    that are touched exist."""
    shape, strides, offset = (3, 35), (2**30 + 1, 3), 5

    def far(data: torch.Tensor) -> torch.Tensor:
        reach = offset + 2 * strides[0] + 34 * strides[1] + 1
        assert reach > 2**31
        view = torch.empty(reach, dtype=data.dtype).as_strided(shape, strides, offset)
        return view.copy_(data.view(shape))

    p, g, m = (values(105, ("normal",), dtype, generator) for _ in range(3))
    problem = Problem.of([far(g)], [far(m)], params=[far(p)], exp_avg_sqs=[far(m.abs())], lr=0.1)
    near = problem.copy()
    for first in (True, False):
        record = problem.select(real_ops, 600_000_000, first=first)
        assert_same_bits(record, near.select(real_ops, 600_000_000, first=first))
        masks = problem.capture(real_ops, record, first=first)
        assert_all_same_bits(masks, near.capture(real_ops, record, first=first), "masks")
    assert_same_bits(problem.update(real_ops, masks), near.update(real_ops, masks))
    assert_all_same_bits(problem.written, near.written, "written")


# ----------------------------------------------------------------------------- one index space

REPEATS = 1100
PIECE = 2_000_003


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("mix", "upper", "lower", "first"),
    [
        pytest.param(("normal",), 600_000_000, 0, False, id="distinct-second"),
        pytest.param(("normal", "zero", "nan"), 700_000_000, 200_000_000, True, id="classes-first"),
        pytest.param(
            ("normal", "zero", "nan"),
            700_000_000,
            200_000_000,
            False,
            id="classes-second",
            marks=pytest.mark.slow,
        ),
        pytest.param(("ties",), 600_000_000, 0, True, id="ties-first", marks=pytest.mark.slow),
        pytest.param(("ties", "one"), ONE, 999_999_999, False, id="all-second", marks=pytest.mark.slow),
    ],
)
def test_index_space_beyond_2_31(real_ops, generator, mix, upper, lower, first):
    """One tensor REPEATS times: counts multiply, and rank k is rank ceil(k / REPEATS) of one."""
    assert REPEATS * PIECE > 2**31
    g, m = (values(PIECE, mix, FLOAT, generator) for _ in range(2))
    key = reference.risk_key(g, None if first else m, reference.float32(1.0 - 0.9), False)
    ranked = key[key < reference.INACTIVE_KEY].sort().values
    n = len(ranked) * REPEATS

    def threshold(fraction: int) -> int:
        k = reference.rank_of(fraction, n)
        return int(ranked[-(-k // REPEATS) - 1]) if k else -1

    high, low = threshold(upper), threshold(lower)
    record = real_ops.rank_(
        [], [g] * REPEATS, [] if first else [m] * REPEATS, hyper_table((0.9, 0.999, 1e-8, 0.1, 1, 1)),
        torch.zeros(REPEATS, dtype=torch.int64), None, None, None,
        [reference.Mode.EXACT, upper, lower, False, 0],
    )  # fmt: skip
    kept = int(((ranked > low) & (ranked <= high)).sum())
    assert record.tolist() == [
        high, low, kept * REPEATS, n, int((key == reference.INACTIVE_KEY).sum()) * REPEATS,
        int((key == reference.NONFINITE_KEY).sum()) * REPEATS, 0, 0,
    ]  # fmt: skip


@pytest.mark.slow
def test_histogram_of_one_bin_beyond_2_31(real_ops):
    """All keys in one bin, on one thread: 32-bit counters, even four in turn, would wrap."""
    repeats = 8600
    g = torch.ones(PIECE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = real_ops.rank_(
            [], [g] * repeats, [], hyper_table((0.9, 0.999, 1e-8, 0.1, 1, 1)),
            torch.zeros(repeats, dtype=torch.int64), None, None, None,
            [reference.Mode.APPROX, 600_000_000, 0, False, 0],
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    n = repeats * PIECE
    assert n > 4 * 2**32
    assert record.tolist() == [0x3F800000, -1, n, n, 0, 0, 0, 0]
