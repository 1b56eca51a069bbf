"""Buffers of the optimizer's own: where huge pages are granted, they have them."""

from __future__ import annotations

import copy
import gc
import mmap
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import LAYOUTS, place
from torch import nn

from rose_ops import RoseFusedAdamW, flatten_parameters, memory

MIB = 1 << 20
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def why_no_huge_pages() -> str | None:
    if sys.platform != "linux" or not _SETTING.exists():
        return "this system has no transparent huge pages"
    if "[never]" in (setting := _SETTING.read_text()):
        return f"transparent huge pages are switched off: {setting.strip()}"
    return None


needs_huge_pages = pytest.mark.skipif(why_no_huge_pages() is not None, reason=str(why_no_huge_pages()))


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes on huge pages in the mappings that hold ``tensor``'s storage."""
    begin = tensor.untyped_storage().data_ptr()
    end, found, inside = begin + tensor.untyped_storage().nbytes(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low < end and begin < high
        elif inside and head == "AnonHugePages:":
            found += int(rest[0]) * 1024
    return found


def assert_huge(tensor: torch.Tensor, least: int) -> None:
    """More than so many bytes, unless a mapping that asks for them in the simplest way gets none now:
    they need free memory in one piece."""
    if (found := huge_bytes(tensor)) > least:
        return
    nbytes = 2 * least
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        plain = torch.frombuffer(mapping, dtype=torch.uint8).zero_()
        granted = huge_bytes(plain)
        del plain
    if granted <= least:
        pytest.skip(
            f"of {nbytes} bytes the kernel grants {granted} on huge pages: no memory in one piece"
        )
    raise AssertionError(f"{found} bytes on huge pages, expected more than {least}")


def is_mapped(address: int) -> bool:
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


@needs_huge_pages
def test_large_buffers_are_on_huge_pages():
    buffer = memory.empty(16 * MIB, torch.float32, torch.device("cpu"))
    before = huge_bytes(buffer)
    assert_huge(buffer.zero_(), before + 48 * MIB)


@needs_huge_pages
@pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
def test_moments_of_many_tensors_are_on_huge_pages(loaded):
    params = [nn.Parameter(torch.ones(MIB // 4)) for _ in range(48)]  # 1 MiB each
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = RoseFusedAdamW(params)
    optimizer.step()
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[p][moment] for p in params]
        # Next to each other, and yet each its own storage.
        steps = {b.data_ptr() - a.data_ptr() for a, b in pairwise(moments)}
        assert steps == {moments[0].untyped_storage().nbytes()}
        assert_huge(moments[0], 32 * MIB)


@needs_huge_pages
def test_flat_parameters_are_on_huge_pages():
    params = [nn.Parameter(torch.ones(MIB // 4)) for _ in range(48)]
    [flat] = flatten_parameters(params)
    sum(p.sum() for p in params).backward()
    assert_huge(flat.detach(), 32 * MIB)
    assert_huge(flat.grad, 32 * MIB)


@needs_huge_pages
def test_memory_that_was_touched_before_is_not_used_again():
    for _ in range(3):
        touched = [torch.ones(MIB // 4) for _ in range(64)]  # in the heap, which keeps it
        del touched
        buffer = memory.empty(12 * MIB, torch.float32, torch.device("cpu")).zero_()
        assert_huge(buffer, 32 * MIB)


def test_small_buffers_are_left_alone(monkeypatch):
    advised = []

    class Mapping(mmap.mmap):
        def madvise(self, *args):
            advised.append(len(self))

    monkeypatch.setattr(mmap, "mmap", Mapping)
    for nbytes in (0, 4, memory.MIN_BYTES - 4, memory.MIN_BYTES):
        memory.empty(nbytes // 4, torch.float32, torch.device("cpu"))
    memory.empty(memory.MIN_BYTES, torch.float32, torch.device("meta"))
    assert len(advised) == hasattr(mmap, "MADV_HUGEPAGE")


@pytest.mark.parametrize("advice", [None, 9999], ids=["no such advice", "refused"])
def test_without_huge_pages(advice, monkeypatch):
    monkeypatch.setattr(memory, "_ADVICE", advice)
    buffer = memory.empty(16 * MIB, torch.float32, torch.device("cpu"))
    assert not buffer.zero_().any()
    assert buffer.numel() == 16 * MIB


def test_nothing_but_the_buffer_is_saved():
    # Of the mapping, which is longer.
    buffer = memory.empty(3 * MIB + 5, torch.float32, torch.device("cpu")).zero_()
    assert buffer.untyped_storage().nbytes() == buffer.nbytes == 12 * MIB + 20
    assert torch.equal(copy.deepcopy(buffer), buffer)


def test_memory_is_given_back():
    buffer = memory.empty(16 * MIB, torch.float32, torch.device("cpu")).zero_()
    view = buffer[5:7]
    del buffer
    assert view.tolist() == [0.0, 0.0]  # a view keeps it
    if sys.platform == "linux":
        address = view.data_ptr()
        assert is_mapped(address)
        del view
        gc.collect()
        assert not is_mapped(address)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_copy():
    buffer = memory.empty(4 * MIB, torch.float32, torch.device("cpu")).zero_()
    if (child := os.fork()) == 0:
        memoryview(buffer[:1].numpy())[0] = 1.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert buffer[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_like(dtype, generator):
    shapes = [(3, 4, 5), (2, 3, 4, 2), (), (0, 4), (1,), (17, 1)]
    tensors = [
        place(torch.randn(shape, generator=generator), layout) for shape in shapes for layout in LAYOUTS
    ]
    made = memory.zeros_like(tensors, dtype)
    for tensor, zeros in zip(tensors, made, strict=True):
        expected = torch.zeros_like(tensor, dtype=dtype)
        assert (zeros.shape, zeros.dtype) == (expected.shape, dtype)
        assert not zeros.any()
        if zeros.numel():
            assert zeros.data_ptr() % 64 == 0
            sizes = zip(zeros.stride(), expected.stride(), zeros.shape, strict=True)
            assert all(mine == theirs for mine, theirs, size in sizes if size > 1)
    for i, zeros in enumerate(made):
        zeros.fill_(i + 1)
    for i, zeros in enumerate(made):  # none has written into another
        assert (zeros == i + 1).all()
    assert memory.zeros_like([], dtype) == []
