"""What bytes and instructions say of the kernels' speed; see roofline.py."""

from __future__ import annotations

import pytest
import roofline
from instructions import Gate
from test_instructions import LOOP

# Where instructions, not bytes, are the limit: of the boards, and kernels there. Everywhere else memory
# is; a change of this list is a change of what README.md may say. (A B200, whose bytes are the fastest,
# is bound by them in bfloat16.)
BOUND_BY_ISSUE: dict[str, set[str]] = {}


def test_times_of_an_element():
    kernels = (roofline.Kernel("AdamW", 28), roofline.Kernel("ours", 8, Gate("kernel", 4, 4, 0)))
    adamw, ours = (
        row for row in roofline.rows({"90": LOOP}, kernels) if row.board.name == "H100"
    )  # fmt: skip
    assert adamw.memory == pytest.approx(28 / 3.35 / 0.9, rel=1e-3)  # TB/s: bytes in a picosecond
    assert (adamw.count, adamw.issue, adamw.bound) == (None, 0, "memory")
    assert ours.count == 2.5
    assert ours.issue == pytest.approx(2.5 / (132 * 128 * 1.98e-3) / 0.75, rel=1e-3)
    assert ours.bound == "memory"
    lines = roofline.table([adamw, ours]).splitlines()
    assert lines[2] == "| H100 | AdamW | 28 | ? | 0.623 | ? | ? | 1.00 |"
    assert lines[3].endswith("| memory | 0.29 |")


@pytest.mark.slow
def test_what_is_bound_by_what():
    code = roofline.compiled("90")
    if code is None:
        pytest.skip("needs nvcc and nvdisasm")
    rows = roofline.rows({"90": code})
    print(roofline.table(rows))
    bound: dict[str, set[str]] = {}
    for row in rows:
        if row.bound == "issue":
            bound.setdefault(row.board.name, set()).add(row.kernel.name)
    assert bound == BOUND_BY_ISSUE
    # What a step of the default takes, at best: the pass in float32 waits for memory.
    for row in rows:
        if row.kernel.name == "pass, float32":
            adamw = row.board.memory_ps(28)
            assert max(row.memory, row.issue) <= 1.10 * adamw
