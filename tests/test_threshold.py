"""The statistics of a threshold (``csrc/include/rose/threshold.h``), against the reference, the
derivation in it, and what Triton's kernels, which cannot include them, have in their place."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_failure_bound import half_width

from rose_ops import definitions, reference

CSRC = Path(__file__).parents[1] / "csrc"
U = (0.0, 1.0, 1e4, 1e9)
LINES = (0, 1, 7, 8, 1000, 1 << 16, 3 << 20, 1 << 22, 1 << 25)
SAMPLED = (0, 1, 1000, 1 << 20)
PRINTS = """
#include <initializer_list>
#include <stdio.h>
#include "rose/threshold.h"
using namespace rose;
int main() {
  printf("%d %u %g %lld\\n", kLine, kSampleKey, kLogOfFailure, (long long)kFewestOfApprox);
  for (double u : {U}) printf("%.17g ", half_width(u, kLogOfFailure));
  for (int64_t lines : {LINES}) {
    const Strata strata = strata_of(lines, lines_of_approx(lines));
    printf("%lld %lld ", (long long)strata.size, (long long)strata.count);
  }
  for (double sampled : {SAMPLED}) printf("%.17g %.17g ", at_most(sampled, 1), at_most(sampled, 10));
  const uint32_t key = random_key(9, kSampleKey);
  for (int i = 0; i < 100; ++i) printf("%lld ", (long long)drawn_line(key, i, 1000));
}
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("threshold")
    source = PRINTS
    for name, values in (("U", U), ("LINES", LINES), ("SAMPLED", SAMPLED)):
        source = source.replace(f"{{{name}}}", f"{{{', '.join(map(str, values))}}}")
    (folder / "prints.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-ffp-contract=off", f"-I{CSRC / 'include'}", "prints.cpp"]
    subprocess.run([*command, "-o", "prints"], check=True, cwd=folder)
    done = subprocess.run([folder / "prints"], check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def test_as_the_reference_has_them(numbers):
    mine = [
        definitions.LINE, definitions.SAMPLE_KEY, definitions.LOG_OF_FAILURE, reference.APPROX_FEWEST,
    ]  # fmt: skip
    assert numbers[:4] == mine
    widths = half_width(torch.tensor(U, dtype=torch.float64))
    assert numbers[4:8] == pytest.approx(widths.tolist(), rel=1e-12)
    strata = numbers[8 : 8 + 2 * len(LINES)]
    for lines, size, count in zip(LINES, strata[::2], strata[1::2], strict=True):
        # One line of each stratum, but where the last is shorter and its line not there.
        drawn = len(reference.sampled([lines * definitions.LINE], 3)) // definitions.LINE
        assert count - 1 <= drawn <= count
        assert size == max(1, lines // max(1, wanted_of_approx(lines)))
    rest = numbers[8 + 2 * len(LINES) :]
    for sampled, of_all, of_some in zip(SAMPLED, rest[:8:2], rest[1:8:2], strict=True):
        assert of_all == sampled
        half = definitions.LINE / 2 * definitions.LOG_OF_FAILURE
        root = math.sqrt(sampled + half) + math.sqrt(half)
        assert of_some == pytest.approx(10 * root**2, rel=1e-12)
    strata_numbers = torch.arange(100)
    random = reference.hash_u32(strata_numbers, 9, definitions.SAMPLE_KEY)
    assert rest[8:] == (strata_numbers * 1000 + (random * 1000 >> 32)).tolist()


def wanted_of_approx(lines: int) -> int:
    return min(max(lines // 128, min(lines // 8, 1 << 14)), 1 << 16)


def test_a_constant_is_defined_once():
    sources = {path: path.read_text() for path in CSRC.rglob("*") if path.is_file()}
    text = "".join(sources.values())
    for name in ("kLine", "kSampleKey", "kLogOfFailure", "kLogOfFailureIfCounted", "kFewestOfApprox"):
        assert len(re.findall(rf"\b{name} = ", text)) == 1, name
    phases = re.findall(r"kPhases = (\d+);", sources[CSRC / "cpu" / "sample.h"])
    assert phases == ["16"]


def test_triton_has_the_same(numbers):
    triton = pytest.importorskip("rose_ops.backends.triton.sample")
    assert triton.LOG.value == numbers[2]
    assert triton.LINE.value == numbers[0]
    for u, width in zip(U, numbers[4:8], strict=True):
        r = triton.HALF_R.value
        mine = triton.ERRORS.value * (r + math.sqrt(r * r + u)) + triton.OF_RANGE.value
        assert mine == pytest.approx(width, rel=1e-12)
    # Of at_most(): 8 * LOG is kLine / 2 * LOG.
    for sampled, most in zip(SAMPLED, numbers[9 + 2 * len(LINES) :: 2], strict=False):
        root = math.sqrt(sampled + 8.0 * triton.LOG.value) + triton.ROOT.value
        assert 10 * root**2 == pytest.approx(most, rel=1e-12)
