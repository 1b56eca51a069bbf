"""Tensors whose memory is not what their shapes say: a storage that was freed or made smaller since, as
FSDP does, and lazy negation. An operator asks for every pointer through what checks that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    BF16,
    FLOAT,
    HALF,
    ROSE,
    Problem,
    assert_all_same_bits,
    assert_same_bits,
    bits,
    place,
    random_masks,
    values,
)
from torch import Tensor

from rose_ops import reference
from rose_ops._ops import OPERATORS
from rose_ops.definitions import Mode

ROOT = Path(__file__).parents[1]
SHAPE = (4, 10)


def problem() -> Problem:
    """Two tensors, of all dtypes and a layout that is not contiguous; everything optional is there."""
    generator = torch.Generator().manual_seed(3)

    def tensors(dtype: torch.dtype, layout: str) -> list[Tensor]:
        flat = [values(40, ("normal",), dtype, generator) for _ in range(2)]
        return [flat[0], place(flat[1].view(SHAPE), layout, offset=3)]

    p, g = tensors(FLOAT, "transposed"), tensors(HALF, "strided")
    m, v = tensors(BF16, "padded"), tensors(BF16, "transposed")
    return Problem.of(
        g, m, ROSE, params=p, exp_avg_sqs=[x.abs_() for x in v], inv_scale=torch.tensor(0.5),
        clip=torch.tensor([0.7, 0.9]), found_inf=torch.tensor(0.0), stochastic=True,
    )  # fmt: skip


def masks() -> list[Tensor]:
    """Bits for the first tensor, one answer for the whole of the second."""
    generator = torch.Generator().manual_seed(4)
    bits = torch.randint(0, 256, (5,), dtype=torch.uint8, generator=generator)
    return [bits, torch.ones(1, dtype=torch.bool)]


def _update(p: Problem) -> list[Any]:
    return [p.params, p.grads, p.exp_avgs, p.exp_avg_sqs, p.steps]


def _factors(p: Problem) -> list[Any]:
    return [p.hyper, p.group, p.inv_scale, p.clip]


def _scalars(p: Problem) -> list[Any]:
    return [p.lr, p.hyper, p.group, p.offsets, p.inv_scale, p.clip, p.found_inf, 0.3]


def ranking(mode: Mode) -> list[int]:
    return [int(mode), 600_000_000, 100_000_000, 0, 1]


def _capture(p: Problem, record: Tensor | None, mode: Mode) -> list[Any]:
    return [random_masks(p.numels), p.grads, p.exp_avgs, *_factors(p), record, ranking(mode)]


def _step(p: Problem, second: list[Tensor], record: Tensor | None, ranking: list[int]) -> list[Any]:
    return [*_update(p), masks(), second, record, *_scalars(p), ranking, [7, 1]]


def _sums(seed: int) -> Tensor:
    return torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _record(p: Problem) -> Tensor:
    return p.select(reference, 600_000_000)


CALLS: dict[str, Callable[[Problem], list[Any]]] = {
    "rank_": lambda p: [[], p.grads, p.exp_avgs, *_factors(p), None, ranking(Mode.EXACT)],
    "rank_-exact": lambda p: _capture(p, None, Mode.EXACT),
    "rank_-bracket": lambda p: _capture(p, None, Mode.BRACKET),
    "rank_-given": lambda p: _capture(p, _record(p), Mode.GIVEN),
    "step_": lambda p: _step(p, masks(), None, []),
    "step_-exact": lambda p: _step(p, [], None, ranking(Mode.EXACT)),
    "step_-bracket": lambda p: _step(p, [], None, ranking(Mode.BRACKET)),
    "step_-given": lambda p: _step(p, [], _record(p), ranking(Mode.GIVEN)),
    "count_keys": lambda p: [p.grads, p.exp_avgs, *_factors(p), False, torch.tensor([3, 32000])],
    "sums_of_squares": lambda p: [p.grads, p.inv_scale],
    "clip_factors": lambda p: [_sums(1), 1.0],
    "select_tensors_": lambda p: [
        torch.zeros(9, dtype=torch.bool), _sums(1), _sums(2), p.hyper,
        torch.zeros(9, dtype=torch.int64), p.clip, 600_000_000, 100_000_000, False,
    ],
}  # fmt: skip
WRITTEN = {"params", "exp_avgs", "exp_avg_sqs", "steps", "masks", "mask"}


def names_of(call: str) -> list[str]:
    function = getattr(reference, call.partition("-")[0])
    return [name for name in inspect.signature(function).parameters if name != "dtype"]


def is_written(call: str, name: str) -> bool:
    reads = name == "exp_avgs" and "step_" not in call
    return name in WRITTEN and not reads


def places(call: str) -> Iterator[tuple[str, str, int]]:
    """Of each tensor among its arguments: the call, the argument, and where in its list, or -1."""
    arguments = CALLS[call](problem())
    for name, value in zip(names_of(call), arguments, strict=True):
        if isinstance(value, Tensor):
            yield call, name, -1
        elif isinstance(value, list):
            yield from ((call, name, i) for i, t in enumerate(value) if isinstance(t, Tensor))


PLACES = [place for call in CALLS for place in places(call)]
IDS = ["-".join(map(str, place)).replace("--1", "") for place in PLACES]


def test_every_operator_and_every_tensor_is_there():
    assert {call.partition("-")[0] for call in CALLS} == set(OPERATORS)
    for name in OPERATORS:
        schema = getattr(torch.ops.rose_ops, name).default._schema
        tensors = {a.name for a in schema.arguments if "Tensor" in str(a.type)}
        assert tensors == {n for call, n, _ in PLACES if call.partition("-")[0] == name}
        written = {a.name for a in schema.arguments if a.is_write}
        assert written == {n for n in tensors if is_written(name, n)}


def run(ops, call: str, arguments: list[Any]) -> Any:
    return getattr(ops, call.partition("-")[0])(*arguments)


def change(call: str, name: str, index: int, to: Callable[[Tensor], Tensor]) -> list[Any]:
    """The arguments of a call, with another tensor for one of them."""
    arguments = CALLS[call](problem())
    at = names_of(call).index(name)
    if index < 0:
        arguments[at] = to(arguments[at])
    else:
        arguments[at] = [*arguments[at]]
        arguments[at][index] = to(arguments[at][index])
    return arguments


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    lists = [x if isinstance(x, list) else [x] for x in arguments]
    return [t for tensors in lists for t in tensors if isinstance(t, Tensor)]


def bytes_needed(t: Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size()


def resized(t: Tensor, nbytes: int) -> Tensor:
    """The same tensor, in a storage of its own of so many bytes."""
    storage = t.untyped_storage().clone()
    alone = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())
    storage.resize_(nbytes)
    return alone


@pytest.mark.thin(3)
@pytest.mark.parametrize("size", ["freed", "a byte short"])
@pytest.mark.parametrize(("call", "name", "index"), PLACES, ids=IDS)
def test_refuses_a_storage_that_is_too_small(every_ops, call, name, index, size):
    """And says which, and changes nothing. Before it was looked at, this killed the process."""
    damaged: list[Tensor] = []

    def damage(t: Tensor) -> Tensor:
        damaged.append(resized(t, 0 if size == "freed" else bytes_needed(t) - 1))
        return damaged[0]

    arguments = change(call, name, index, damage)
    others = [t for t in tensors_of(arguments) if t is not damaged[0]]
    before = [bits(t).clone() for t in others]
    with pytest.raises(RuntimeError) as caught:
        run(every_ops, call, arguments)
    what = name if index < 0 else f"{name}[{index}]"
    needed = bytes_needed(damaged[0])
    has = 0 if size == "freed" else needed - 1
    message = str(caught.value)
    assert message.startswith(f"{what} has a storage of {has} bytes and needs {needed}: "), message
    assert "as FSDP does with resize_(0); step where" in message
    for old, t in zip(before, others, strict=True):
        assert torch.equal(old, bits(t))


@pytest.mark.parametrize("call", CALLS)
def test_takes_storages_that_are_just_large_enough(every_ops, call):
    arguments, plain = CALLS[call](problem()), CALLS[call](problem())
    arguments = [
        [resized(t, bytes_needed(t)) if isinstance(t, Tensor) else t for t in x]
        if isinstance(x, list)
        else resized(x, bytes_needed(x)) if isinstance(x, Tensor) else x
        for x in arguments
    ]  # fmt: skip
    result, expected = run(every_ops, call, arguments), run(every_ops, call, plain)
    assert_all_same_bits(tensors_of(arguments), tensors_of(plain), "arguments")
    assert_same_bits(result, expected)


def test_an_empty_tensor_needs_no_storage(every_ops):
    empty = torch.zeros(0, 3)
    empty.untyped_storage().resize_(0)
    whole = Problem.of([empty, torch.ones(3)], [empty.clone(), torch.ones(3)])
    assert whole.update(every_ops, [torch.empty(0, dtype=torch.uint8)] * 2)[0] == 3


def negated(t: Tensor) -> Tensor:
    """The same values, of a tensor whose memory holds the negated ones (``imag`` of a conjugate)."""
    lazy = (-t)._neg_view()
    assert lazy.is_neg()
    assert_same_bits(lazy, t)
    return lazy


def of_numbers(call: str, name: str, index: int) -> bool:
    """Whether such a tensor can be negated at all."""
    values = dict(zip(names_of(call), CALLS[call](problem()), strict=True))[name]
    return (values if index < 0 else values[index]).dtype != torch.bool


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("call", "name", "index"), [p for p in PLACES if of_numbers(*p)],
    ids=[i for i, p in zip(IDS, PLACES, strict=True) if of_numbers(*p)],
)  # fmt: skip
def test_lazy_negation(any_ops, call, name, index):
    """The right values are read, and what is written is refused by its name, or written right."""
    check_negation(any_ops, call, name, index)


# Interpreted, an operator takes seconds, and all its arguments go the same way.
@pytest.mark.parametrize("call", CALLS)
def test_lazy_negation_by_triton(triton_ops, call):
    mine = [place for place in PLACES if place[0] == call and of_numbers(*place)]
    for writes in (False, True):
        place = next((p for p in mine if is_written(call, p[1]) == writes), None)
        if place:
            check_negation(triton_ops, *place)


def check_negation(every_ops, call: str, name: str, index: int) -> None:
    torch.manual_seed(0)  # of random_masks
    arguments = change(call, name, index, negated)
    torch.manual_seed(0)
    plain = CALLS[call](problem())
    if is_written(call, name) and every_ops is not reference:
        what = name if index < 0 else f"{name}[{index}]"
        before = [bits(t).clone() for t in tensors_of(arguments)]
        with pytest.raises(RuntimeError, match=rf"^{re.escape(what)} is lazily negated .*resolve_neg"):
            run(every_ops, call, arguments)
        for old, t in zip(before, tensors_of(arguments), strict=True):
            assert torch.equal(old, bits(t))
        return
    result, expected = run(every_ops, call, arguments), run(every_ops, call, plain)
    assert_all_same_bits(tensors_of(arguments), tensors_of(plain), "arguments")
    assert_same_bits(result, expected)


def test_pointers_are_asked_for_in_one_place():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and re.search(r"data_ptr\b", path.read_text())
    }
    assert found == {"csrc/data.cpp"}


def test_the_library_names_no_path_of_the_machine_it_was_built_on():
    """Of sources and of PyTorch's headers, that errors name."""
    data = (ROOT / "rose_ops" / "_C.abi3.so").read_bytes()
    named = re.findall(rb"[\x20-\x7e]*\bcsrc/[\x20-\x7e]+", data)
    assert named  # those of the headers
    assert [name for name in named if not name.startswith((b"csrc/", b"torch/csrc/"))] == []
    assert b"site-packages/" not in data
    assert str(ROOT).encode() not in data
