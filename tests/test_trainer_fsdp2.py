"""RoseTrainer under FSDP2, by accelerate: it trains what it trains under DistributedDataParallel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from forked import torchrun

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
SCRIPT = str(Path(__file__).parent / "trainer_ranks.py")


@pytest.mark.thin(2)
@pytest.mark.parametrize("order", ["first", "second", "ensemble"])
def test_split_and_whole(order):
    """Gradients are added up in another order, so that an element at the threshold may change sides."""
    split, whole = (torchrun(SCRIPT, order, engine) for engine in ("fsdp2", "ddp"))
    found = []
    for said in (*split, *whole):
        (line,) = re.findall(r"kept (\d+) of (\d+), norm (\S+), sum (\S+)", said)
        kept, ranked, norm, total = map(float, line)
        assert 0.59 * ranked < kept < ranked  # with ties of the threshold
        found.append((kept, ranked, norm, total))
    assert found[0] == found[1]  # both ranks
    assert found[2] == found[3]
    assert found[0] == pytest.approx(found[2], rel=1e-4)
