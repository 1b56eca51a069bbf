"""Tensors as rows of int64 that the Triton kernels read: what is where, of which dtype and strides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COLUMNS = 17  # see kernels.py
_GROUP = 13
_DIM = 5  # size, strides of up to 4 operands
NO_MASK, BITS, WHOLE, ALL = range(4)
_KEPT = 32


class Role(NamedTuple):
    """A list of tensors that makes up one operand of every segment."""

    name: str
    tensors: Sequence[Tensor]
    written: bool = False


class Class(NamedTuple):
    """Segments that one launch can walk."""

    dtypes: tuple[int, ...]
    linear: bool
    aligned: bool
    rows: Tensor  # [count, COLUMNS]
    tile_rows: Tensor  # int32: row of each tile
    base: int  # tiles of the classes before
    selective: int  # tiles of selective segments, which are the first ones

    @property
    def tiles(self) -> int:
        return len(self.tile_rows)


@dataclass(frozen=True)
class Table:
    """Device memory; the same object for the same tensors, as long as it is among the latest."""

    classes: tuple[Class, ...]
    rows: Tensor
    dims: Tensor
    hyper: Tensor
    extra: Tensor  # float64

    @property
    def tiles(self) -> int:
        return sum(c.tiles for c in self.classes)


def check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    """Raise RuntimeError unless ``tensor`` is contiguous, of ``dtype`` with ``numel`` elements."""
    if (
        tensor.device != device
        or not tensor.is_contiguous()
        or tensor.dtype != dtype
        or tensor.numel() != numel
    ):
        raise RuntimeError(
            f"{name} must be a contiguous tensor of {dtype} with {numel} elements, on {device}"
        )


def check_counts(roles: Sequence[Role]) -> None:
    """Raise RuntimeError unless all lists are equally long."""
    first, count = roles[0], len(roles[0].tensors)
    for role in roles:
        if len(role.tensors) != count:
            raise RuntimeError(
                f"{role.name} has {len(role.tensors)} tensors and {first.name} has {count}; expected "
                "one for each"
            )


def check_groups(hyper: Tensor, group: Tensor, count: int) -> None:
    """Raise RuntimeError unless these are the hyperparameters of ``count`` tensors."""
    cpu = torch.device("cpu")
    check("hyper", hyper, torch.float64, hyper.numel() // 6 * 6, cpu)
    check("group", group, torch.int64, count, cpu)


def _dims(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Sizes and strides, with neighbours merged that every operand walks as one; none: linear."""
    if all(t.is_contiguous() for t in tensors):
        return []
    dims: list[list[int]] = []
    for d, size in enumerate(tensors[0].shape):
        if size == 1:
            continue
        strides = [t.stride(d) for t in tensors]
        if dims and all(a == b * size for a, b in zip(dims[-1][1:], strides, strict=True)):
            dims[-1] = [dims[-1][0] * size, *strides]
        else:
            dims.append([size, *strides])
    expected = 1
    for size, *strides in reversed(dims):
        if any(stride != expected for stride in strides):
            return dims
        expected *= size
    return []


def make(
    roles: Sequence[Role],
    hyper: Tensor,
    group: Tensor,
    block: int,
    extra: Sequence[float] = (),
    columns: Mapping[int, Sequence[int]] | None = None,
) -> Table:
    """The table of ``roles``.

    Args:
        hyper, group: see :mod:`rose_ops.reference`, on the CPU.
        block: elements of a tile.
        extra: numbers to go with it, as float64.
        columns: more columns of the rows, by number.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    first = roles[0]
    count = len(first.tensors)
    device = first.tensors[0].device if count else torch.device("cpu")
    check_counts(roles)
    check_groups(hyper, group, count)
    groups = group.tolist()
    members: dict[tuple[tuple[int, ...], bool, bool], list[list[int]]] = {}
    pool: list[list[int]] = []
    for i, tensors in enumerate(zip(*(role.tensors for role in roles), strict=True)):
        for role, t in zip(roles, tensors, strict=True):
            what = f"{role.name}[{i}]"
            if t.device != device:
                raise RuntimeError(
                    f"{what} is on another device than {first.name}[0]; expected all on one"
                )
            if t.dtype not in DTYPES:
                raise RuntimeError(f"{what} has dtype {t.dtype}; expected float32, bfloat16 or float16")
            if t.shape != tensors[0].shape:
                raise RuntimeError(
                    f"{what} and {first.name}[{i}] have different shapes; expected the same"
                )
            if (
                role.written
                and t.numel()
                and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
            ):
                raise RuntimeError(
                    f"{what} is an expanded tensor, whose elements share memory; it cannot be updated "
                    "in place (use .contiguous())"
                )
        if not 0 <= groups[i] < len(hyper.reshape(-1, 6)):
            raise RuntimeError(f"group[{i}] is {groups[i]}; expected a row of hyper")
        n = tensors[0].numel()
        dims = _dims(tensors) if n else []
        pointers = [t.data_ptr() for t in tensors]
        row = [
            n,
            0,
            0,
            *pointers,
            *[0] * (4 - len(pointers)),
            *[0] * 6,
            groups[i],
            len(dims),
            len(pool),
            i,
        ]
        for column, values in (columns or {}).items():
            row[column] = values[i]
        pool += [[*dim, *[0] * (_DIM - len(dim))] for dim in dims]
        # What 16-byte accesses take; the number of elements, so that a mask has whole vectors.
        aligned = not dims and n % 16 == 0 and all(pointer % 16 == 0 for pointer in pointers)
        dtypes = tuple(DTYPES[t.dtype] for t in tensors)
        members.setdefault((dtypes, not dims, aligned), []).append(row)
    members = members or {((0,) * len(roles), True, True): []}

    selective = hyper.reshape(-1, 6)[:, 5].tolist()
    tile_rows: list[Tensor] = []
    selective_tiles: list[int] = []
    for rows in members.values():
        rows.sort(key=lambda row: selective[row[_GROUP]] == 0)
        tiles = torch.tensor([-(-row[0] // block) for row in rows], dtype=torch.int64)
        for row, before in zip(rows, (tiles.cumsum(0) - tiles).tolist(), strict=True):
            row[1] = before
        tile_rows.append(torch.arange(len(rows), dtype=torch.int32).repeat_interleave(tiles))
        selective_tiles.append(sum(-(-row[0] // block) for row in rows if selective[row[_GROUP]]))
    all_rows = [*chain(*members.values())] or [[0] * COLUMNS]
    words = [
        torch.tensor(all_rows, dtype=torch.int64).reshape(-1),
        torch.tensor(pool or [[0] * _DIM], dtype=torch.int64).reshape(-1),
        hyper.reshape(-1).view(torch.int64),
        torch.tensor([*extra, 0.0], dtype=torch.float64).view(torch.int64),
    ]
    blob, tiles32 = _upload([torch.cat(words), torch.cat(tile_rows)], device)
    rows_, dims_, hyper_, extra_ = blob.split([len(w) for w in words])
    rows_ = rows_.view(-1, COLUMNS)
    classes, at, base = [], 0, 0
    for (dtypes, linear, aligned), rows, own, first_tiles in zip(
        members, members.values(), tile_rows, selective_tiles, strict=True
    ):
        mine = tiles32[base : base + len(own)]
        its_rows = rows_[at : at + max(len(rows), 1)]
        classes.append(Class(dtypes, linear, aligned, its_rows, mine, base, first_tiles))
        at, base = at + len(rows), base + len(own)
    return Table(tuple(classes), rows_, dims_, hyper_.view(torch.float64), extra_.view(torch.float64))


_uploads: OrderedDict[tuple, list[Tensor]] = OrderedDict()
_of_graphs: list[Tensor] = []  # what CUDA graphs read when they are replayed
_ahead = torch.empty(0, dtype=torch.int64)  # pinned memory for the tables of graphs to come
_TABLES_AHEAD = 8  # a step has fewer


def _stream(device: torch.device) -> tuple[int, bool]:
    """The current stream, and whether it is being captured."""
    if device.type != "cuda":
        return 0, False
    stream = torch.cuda.current_stream(device)
    return stream.cuda_stream, torch.cuda.is_current_stream_capturing()


def _pinned(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64, pin_memory=True)


def _staged(tensors: list[Tensor], capturing: bool) -> list[Tensor]:
    """Copies in pinned memory, which must not be allocated during a capture, and which a graph reads
    at every replay: so steps outside of graphs keep room ahead, and captured tables take theirs of it
    for ever."""
    global _ahead
    words = [-(-t.nbytes // 8) for t in tensors]
    size, room = sum(words), len(_ahead)
    if not capturing:
        if room < _TABLES_AHEAD * size:
            _ahead = _pinned(2 * _TABLES_AHEAD * size)
        staging = _pinned(size)
    elif size > room:
        raise RuntimeError(
            f"a CUDA graph is being captured, and of the pinned memory for tables {8 * room} bytes "
            f"are left of {8 * size} needed; expected the step to have run outside of a graph first: "
            "run it once, as it is captured, before each capture"
        )
    else:
        staging, _ahead = _ahead.split([size, room - size])
        _of_graphs.append(staging)
    return [
        part.view(torch.uint8)[: t.nbytes].view(t.dtype).copy_(t)
        for part, t in zip(staging.split(words), tensors, strict=True)
    ]


def _upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on ``device``, without waiting; those of late are reused if nothing has changed."""
    if device.type == "cpu":
        return tensors
    stream, capturing = _stream(device)
    content = tuple(t.numpy().tobytes() for t in tensors)
    for key in reversed(_uploads):
        # A graph has a stream of its own, and comes after the steps before it whatever theirs was.
        if key[0] == device and (capturing or key[1] == stream) and key[2] == content:
            _uploads.move_to_end(key)
            if capturing:
                _of_graphs.extend(_uploads[key])
            return _uploads[key]
    there = [t.to(device, non_blocking=True) for t in _staged(tensors, capturing)]
    if not capturing:
        _uploads[device, stream, content] = there
        if len(_uploads) > _KEPT:
            _uploads.popitem(last=False)
    return there
