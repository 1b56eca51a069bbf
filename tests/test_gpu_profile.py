"""Launches of a step on a GPU, and where its time goes: the summary of a run has the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain

import pytest
import torch
from gpu_support import WAYS, gradients, optimizer_of, parameters, passes_of, step
from support import BF16, FLOAT
from torch.autograd import DeviceType

from rose_ops import backends

NOT_BUILT = None if not torch.cuda.is_available() else backends.BACKENDS["cuda"].why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))]


@pytest.fixture(scope="module", autouse=True)
def warm_profiler() -> None:
    """The first recording of a process may miss what it begins with."""
    kernels_of(lambda: torch.ones(1, device="cuda"))


def kernels_of(*functions: Callable[[], object]) -> list[list[tuple[str, float]]]:
    """Names and microseconds of the kernels that each function launches, in one recording."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for function in functions:
            torch.cuda._sleep(1)  # its kernel tells functions apart
            function()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and "kernel" in event.name.lower()
        and not event.name.startswith(("Memcpy", "Memset"))
    ]  # fmt: skip
    found: list[list[tuple[str, float]]] = []
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        if "spin_kernel" in event.name:
            found.append([])
        else:
            found[-1].append((event.name, event.time_range.elapsed_us()))
    assert len(found) == len(functions), f"the profiler has seen {[event.name for event in kernels]}"
    return found


def is_ours(name: str) -> bool:
    return "rose::cuda" in name or "4rose4cuda" in name  # as it is called, or mangled


def short(name: str) -> str:
    """Without namespaces, arguments and what is returned."""
    for part in ("void ", "rose::cuda::", "(anonymous namespace)::"):
        name = name.split("(rose")[0].replace(part, "")
    return name


@pytest.mark.parametrize("way", WAYS)
def test_launches_do_not_depend_on_the_number_of_tensors(on_device, way):
    runs = []
    for tensors in (1, 300):
        shapes = [(70,)] * tensors
        optimizer = optimizer_of(parameters(on_device, FLOAT, shapes), WAYS[way], backend="cuda")
        passes = [gradients(on_device, FLOAT, shapes) for _ in range(passes_of(WAYS[way]))]
        step(optimizer, passes)
        runs.append(partial(step, optimizer, passes))
    one, many = kernels_of(*runs)
    ours = [Counter(short(name) for name, _ in kernels if is_ours(name)) for kernels in (one, many)]
    assert ours[0] == ours[1]
    assert sum(ours[0].values()) > 0, one
    if way in ("bracket", "exact"):
        assert len(one) == len(many) <= 8, (one, many)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_time_of_each_kernel(on_device, record_property, dtype):
    """At 16Mi elements. Fewer than 10 us would be more than 10 TB/s."""
    n, steps = 16 << 20, 5
    ways = ("bracket", "exact", "approx", "ensemble", "clipping", "tensor")
    runs = []
    for way in ways:
        options = {"state_dtype": dtype, "backend": "cuda"}
        optimizer = optimizer_of(parameters(on_device, dtype, [(n,)]), WAYS[way], **options)
        passes = [gradients(on_device, dtype, [(n,)]) for _ in range(passes_of(WAYS[way]))]
        for _ in range(2):
            step(optimizer, passes)
        runs += [partial(step, optimizer, passes)] * steps
    recorded = kernels_of(*runs)
    lines = []
    for i, way in enumerate(ways):
        times: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        for name, microseconds in chain(*recorded[i * steps : (i + 1) * steps]):
            kernel = short(name) if is_ours(name) else "(PyTorch's)"
            times[kernel] += microseconds
            launches[kernel] += 1
        lines.append(f"{way}, {n >> 20}Mi {dtype}: {sum(times.values()) / steps:.1f} us a step")
        lines += [
            f"  {microseconds / steps:8.1f} us  {launches[kernel] / steps:4.1f} x  {kernel}"
            for kernel, microseconds in times.most_common()
        ]
        ours = {kernel: time for kernel, time in times.items() if kernel != "(PyTorch's)"}
        assert all(time > 0 for time in ours.values()), (way, ours)
        assert sum(ours.values()) / steps > 10, (way, ours)
    record_property("table", "\n".join(lines))
