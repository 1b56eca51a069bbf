"""Tensors as rows of int64 that the Triton kernels read: what is where, of which dtype and strides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rose_ops.backends.triton import words
from rose_ops.definitions import LINE, Hyper

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CPU = torch.device("cpu")
_COLUMNS, _DIM = words.COLUMNS.value, words.DIM.value
_KEPT = 32
T = TypeVar("T")


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
    rows: Tensor  # [count, COLUMNS], see words.py
    tile_rows: Tensor  # int32: row of each tile
    base: int  # tiles of the classes before
    ranked: int  # segments that are ranked, which are the first ones, in the order of the lists
    ranked_tiles: int

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
    ones: Tensor  # two float32
    zero: Tensor
    elements: int  # that are ranked
    lines: int  # that those are in, see reference.sampled

    @property
    def tiles(self) -> int:
        return sum(c.tiles for c in self.classes)


def device_of(tensors: Sequence[Tensor]) -> torch.device:
    """That of the first one."""
    return tensors[0].device if tensors else CPU


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
    check("hyper", hyper, torch.float64, hyper.numel() // len(Hyper) * len(Hyper), CPU)
    check("group", group, torch.int64, count, CPU)


def check_rows(hyper: Tensor, groups: Sequence[int]) -> None:
    """Raise RuntimeError unless these are rows of ``hyper``."""
    count = hyper.numel() // len(Hyper)
    for i, row in enumerate(groups):
        if not 0 <= row < count:
            raise RuntimeError(f"group[{i}] is {row}; expected a row of hyper")


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
    check_counts(roles)
    check_groups(hyper, group, len(roles[0].tensors))
    device = device_of(roles[0].tensors)
    # All that the table depends on, and all that is checked.
    key = (
        block, hyper.numpy().tobytes(), group.numpy().tobytes(), *extra,
        *((role.name, role.written) for role in roles),
        *((number, *values) for number, values in (columns or {}).items()),
        *(t.data_ptr() for role in roles for t in role.tensors),
        *(t.shape for role in roles for t in role.tensors),
        *(t.dtype for role in roles for t in role.tensors),
        *(t.is_contiguous() or t.stride() for role in roles for t in role.tensors),
        *(t.get_device() for role in roles for t in role.tensors),
    )  # fmt: skip
    return _kept(device, key, lambda: _make(roles, hyper, group, block, extra, columns or {}))


def _check_segment(i: int, roles: Sequence[Role], device: torch.device) -> None:
    """Raise RuntimeError unless the ``i``-th tensors of the lists fit together."""
    first = roles[0]
    for role in roles:
        t, what = role.tensors[i], f"{role.name}[{i}]"
        if t.device != device:
            raise RuntimeError(f"{what} is on another device than {first.name}[0]; expected all on one")
        if t.dtype not in DTYPES:
            raise RuntimeError(f"{what} has dtype {t.dtype}; expected float32, bfloat16 or float16")
        if t.shape != first.tensors[i].shape:
            raise RuntimeError(f"{what} and {first.name}[{i}] have different shapes; expected the same")
        is_shared = any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))
        if role.written and t.numel() and is_shared:
            raise RuntimeError(
                f"{what} is an expanded tensor, whose elements share memory; it cannot be updated in "
                "place (use .contiguous())"
            )


class _Rows:
    """The rows of a table, class by class, with the dims that they point to."""

    def __init__(self, roles: Sequence[Role], hyper: Tensor, groups: list[int], block: int) -> None:
        self._roles, self._groups, self._block = roles, groups, block
        # An update ranks selective tensors only.
        updates = any(role.written for role in roles)
        selective = hyper.reshape(-1, len(Hyper))[:, Hyper.SELECTIVE].tolist()
        self._is_ranked = [selective[group] != 0 or not updates for group in groups]
        self.members: dict[tuple[tuple[int, ...], bool, bool], list[list[int]]] = {}
        self.dims: list[list[int]] = []
        self.elements = self.lines = 0

    def add(self, i: int, columns: Mapping[int, Sequence[int]]) -> None:
        """The ``i``-th segment."""
        tensors = [role.tensors[i] for role in self._roles]
        n = tensors[0].numel()
        dims = _dims(tensors) if n else []
        pointers = [t.data_ptr() for t in tensors]
        row = [0] * _COLUMNS
        row[words.N] = n
        row[words.DATA : words.DATA + len(pointers)] = pointers
        row[words.GROUP] = self._groups[i]
        row[words.DIMS], row[words.FIRST_DIM] = len(dims), len(self.dims)
        row[words.INDEX], row[words.FIRST_LINE] = i, self.lines
        for column, values in columns.items():
            row[column] = values[i]
        if self._is_ranked[i]:
            self.elements += n
            self.lines += -(-n // LINE)
        self.dims += [[*dim, *[0] * (_DIM - len(dim))] for dim in dims]
        # What 16-byte accesses take; the number of elements, so that a mask has whole vectors.
        aligned = not dims and n % 16 == 0 and all(pointer % 16 == 0 for pointer in pointers)
        dtypes = tuple(DTYPES[t.dtype] for t in tensors)
        self.members.setdefault((dtypes, not dims, aligned), []).append(row)

    def finish(self) -> list[list[int]]:
        """All rows, once each class has its ranked segments first, and tiles."""
        if not self.members:
            self.members = {((0,) * len(self._roles), True, True): []}
        for rows in self.members.values():
            rows.sort(key=lambda row: not self._is_ranked[row[words.INDEX]])
            tiles = 0
            for row in rows:
                row[words.FIRST_TILE] = tiles
                tiles += self.tiles([row])
        return [*chain(*self.members.values())] or [[0] * _COLUMNS]

    def ranked(self, rows: Sequence[list[int]]) -> list[list[int]]:
        return [row for row in rows if self._is_ranked[row[words.INDEX]]]

    def tiles(self, rows: Sequence[list[int]]) -> int:
        return sum(-(-row[words.N] // self._block) for row in rows)


def _make(
    roles: Sequence[Role],
    hyper: Tensor,
    group: Tensor,
    block: int,
    extra: Sequence[float],
    columns: Mapping[int, Sequence[int]],
) -> Table:
    device, groups = device_of(roles[0].tensors), group.tolist()
    check_rows(hyper, groups)
    rows = _Rows(roles, hyper, groups, block)
    for i in range(len(groups)):
        _check_segment(i, roles, device)
        rows.add(i, columns)
    parts = [
        torch.tensor(rows.finish(), dtype=torch.int64, device="cpu").reshape(-1),
        torch.tensor(rows.dims or [[0] * _DIM], dtype=torch.int64, device="cpu").reshape(-1),
        hyper.reshape(-1).view(torch.int64),
        torch.tensor([*extra, 0.0], dtype=torch.float64, device="cpu").view(torch.int64),
        torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float32, device="cpu").view(torch.int64),
    ]
    blob = _upload(torch.cat(parts), device)
    rows_, dims_, hyper_, extra_, constants = blob.split([len(part) for part in parts])
    rows_ = rows_.view(-1, _COLUMNS)
    ones, zero = constants.view(torch.float32).split(2)
    classes, at, base = [], 0, 0
    for key, members in rows.members.items():
        its_rows, tiles = rows_[at : at + max(len(members), 1)], rows.tiles(members)
        # The last row that starts at or before a tile: never an empty one.
        of_tiles = torch.searchsorted(
            its_rows[:, words.FIRST_TILE.value].contiguous(), torch.arange(tiles, device=device),
            right=True, out_int32=True,
        ).sub_(1)  # fmt: skip
        ranked = rows.ranked(members)
        classes.append(Class(*key, its_rows, of_tiles, base, len(ranked), rows.tiles(ranked)))
        at, base = at + len(members), base + tiles
    return Table(
        tuple(classes), rows_, dims_, hyper_.view(torch.float64), extra_.view(torch.float64), ones,
        zero, rows.elements, rows.lines,
    )  # fmt: skip


_recent: OrderedDict[tuple, Any] = OrderedDict()


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _kept(device: torch.device, key: tuple, make: Callable[[], T]) -> T:
    """What ``make`` returned for this key on the current stream, if that was lately.

    A graph must own what it reads, so nothing is kept or taken during a capture.
    """
    if _capturing(device):
        return make()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, *key)
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    _recent[key] = made = make()
    if len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return made


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy of float64 numbers on ``device``, not to be written."""
    return _kept(
        device,
        (numbers.numpy().tobytes(),),
        lambda: _upload(numbers.clone().view(torch.int64), device).view(torch.float64),
    )


def _upload(words: Tensor, device: torch.device) -> Tensor:
    """int64 words on ``device``, without waiting."""
    if _capturing(device):
        return _by_value(words, device)
    return words if device.type == "cpu" else _pinned(words).to(device, non_blocking=True)


def _pinned(words: Tensor) -> Tensor:
    return words.pin_memory()


def _by_value(words: Tensor, device: torch.device) -> Tensor:
    """As arguments of launches, 96 words each: a graph has copies of those, and would otherwise read
    memory that must be there as long as itself, which nobody can know."""
    there = torch.zeros(len(words), dtype=torch.int64, device=device)
    nonzero = {i: word for i, word in enumerate(words.tolist()) if word != 0}
    places = there.unbind()
    torch._foreach_add_([places[i] for i in nonzero], [*nonzero.values()])
    return there
