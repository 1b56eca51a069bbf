"""What differs between measuring on the CPU and on a GPU: clocks, caches, memory, graphs."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

Call = Callable[[], Any]


class Clock:
    """Adds up the time spent in its ``with`` blocks."""

    def __init__(self) -> None:
        self.host_seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.host_seconds += time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        return self.host_seconds


class CudaClock(Clock):
    """The device's time between events at the ends of each block; ``host_seconds`` is the time until
    the host had handed the work over."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        super().__enter__()
        self._events.append(
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        )
        self._events[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self._events[-1][1].record()
        super().__exit__()

    @property
    def seconds(self) -> float:
        self._events[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events) / 1e3


class Device(ABC):
    """Where contenders run.

    Attributes:
        place: where tensors are.
        backends: what RoseFusedAdamW is compared on, side by side.
        slow_share: slow contenders take part in every so many rounds.
        rounds, inputs: of each case, unless the command line says otherwise: how often, and on how
            many sets of tensors in turn.
        chunk: elements that the parity check looks at together.
        isolated: whether :meth:`temporaries` needs a process of its own.
        asynchronous: whether the host runs ahead, so that its own time is worth a column.
    """

    name: str
    place: torch.device
    backends: tuple[str, ...]
    slow_share: int
    rounds: int
    inputs: int
    chunk: int
    isolated: bool
    asynchronous: bool

    @abstractmethod
    def clock(self) -> Clock:
        """A new one."""

    @abstractmethod
    def cool(self, head_start: float = 0.0) -> None:
        """Leave nothing of use in the caches. Work that is handed over in the next ``head_start``
        seconds waits for all of it, as it does in training where the host is ahead of the device."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that can be allocated."""

    @abstractmethod
    def temporaries(self, call: Call) -> int:
        """Bytes that ``call`` needs for a while, beyond what is there before it."""

    @abstractmethod
    def graph(self, call: Call) -> Call:
        """``call`` recorded as a graph, and what replays it."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Columns of every row of a result."""

    def release(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()


class Cpu(Device):
    name, place, backends = "cpu", torch.device("cpu"), ("cpu",)
    slow_share, rounds, inputs = 4, 5, 1
    chunk = 1 << 15  # in cache, and too small for torch to start threads
    isolated, asynchronous = True, False
    _CACHE = 128 << 20  # no less than the last-level cache that a core reaches

    def clock(self) -> Clock:
        return Clock()

    def cool(self, head_start: float = 0.0) -> None:
        _buffer(self._CACHE, self.place).zero_()

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def temporaries(self, call: Call) -> int:
        """From the resident set at its highest, which Linux keeps (``VmHWM``, reset through
        ``clear_refs``): for a process that does nothing else."""
        self.release()
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)

    def graph(self, call: Call) -> Call:
        raise NotImplementedError("CUDA graphs are for GPUs")

    def describe(self) -> dict[str, object]:
        return {}


class Cuda(Device):
    """NVIDIA GPUs; with Triton's kernels, those of other vendors that PyTorch calls cuda, too."""

    name, backends = "cuda", ("cuda", "triton")
    slow_share, rounds, inputs = 1, 20, 3
    chunk = 1 << 22
    isolated, asynchronous = False, True
    _SLEEP = 10_000_000  # cycles; the clock's rate is what the driver pleases

    def __init__(self, place: str = "cuda") -> None:
        self.place = torch.device(place)
        self.properties = torch.cuda.get_device_properties(self.place)
        torch.cuda._sleep(self._SLEEP)  # the first one loads the kernel
        clock = CudaClock()
        with clock:
            torch.cuda._sleep(self._SLEEP)
        self._cycles_per_second = self._SLEEP / clock.seconds

    @staticmethod
    def why_not() -> str | None:
        """Why there is none, or None."""
        if torch.cuda.is_available():
            return None
        built = torch.version.cuda or torch.version.hip
        return (
            f"PyTorch {torch.__version__} finds no GPU ("
            + ("no driver, or no device" if built else "it was built without CUDA")
            + "); expected one. `python -m rose_ops doctor` says more"
        )

    def clock(self) -> Clock:
        return CudaClock()

    def cool(self, head_start: float = 0.0) -> None:
        _buffer(2 * self.properties.L2_cache_size, self.place).zero_()
        torch.cuda.synchronize()
        if head_start:
            torch.cuda._sleep(int(head_start * self._cycles_per_second))

    def cooling(self) -> str:
        """Whether :meth:`cool` does what it says: reading half of L2, warm and afterwards."""
        tensor = torch.ones(max(1, self.properties.L2_cache_size // 8), device=self.place)
        times: dict[bool, list[float]] = {True: [], False: []}
        for cold in [False, True] * 10:
            tensor.sum()
            if cold:
                self.cool(1e-4)
            else:
                torch.cuda.synchronize()
                torch.cuda._sleep(int(1e-4 * self._cycles_per_second))
            clock = self.clock()
            with clock:
                tensor.sum()
            times[cold].append(clock.seconds * 1e6)
        warm, cold_ = (sorted(times[cold])[5] for cold in (False, True))
        says = "cold" if cold_ > 1.2 * warm else "NOT COLD, or not larger than what a launch takes"
        return f"caches: {says} (reading half of L2: {warm:.1f} us warm, {cold_:.1f} us after)"

    def free_bytes(self) -> int:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch's allocator
        return torch.cuda.mem_get_info()[0] + kept

    def temporaries(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, call: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up lazily must not be part of the graph
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def describe(self) -> dict[str, object]:
        p = self.properties
        return {
            "gpu": f"{p.name} ({p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} "
            f"multiprocessors, {p.L2_cache_size / 2**20:.0f} MiB of L2)",
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "triton": version("triton"),
            "apex": version("apex"),
        }

    def release(self) -> None:
        super().release()
        torch.cuda.empty_cache()


def version(package: str) -> str:
    """Of an installed package; empty if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _buffer(size: int, place: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=place)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
