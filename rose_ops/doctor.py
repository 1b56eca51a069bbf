"""``python -m rose_ops doctor``: what this installation is, and whether it computes what it should."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import torch
from torch import Tensor

import rose_ops
from rose_ops import _ops, backends, reference
from rose_ops._ops import bracket_width
from rose_ops.definitions import HIGH_DIGITS, Mode
from rose_ops.finetune import UserError


def doctor(_args: argparse.Namespace | None = None) -> None:
    """Print versions, devices and backends, and compare every usable backend with the reference.

    Raises:
        UserError: a backend is wrong.
    """
    rows = {"rose_ops": f"{rose_ops.__version__}, {_ops._LIBRARY}", "Python": platform.python_version()}
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    rows |= {"torch": torch.__version__, "triton": installed.get("triton", "not installed")}
    rows["CUDA of torch"] = torch.version.cuda or torch.version.hip or "none"
    rows["CPU"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):  # 0 without a driver
        properties = torch.cuda.get_device_properties(i)
        gib = properties.total_memory / 2**30
        rows[f"cuda:{i}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {gib:.0f} GiB"
    _print(rows)
    print()
    results, wrong = {}, []
    for name, backend in backends.BACKENDS.items():
        if name == "reference":
            continue
        if (reason := backend.why_not()) is not None:
            results[name] = f"not available: {reason}"
            continue
        devices = [d for d in sorted(backend.devices) if d == "cpu" or getattr(torch, d).is_available()]
        try:
            differences = [d for device in devices for d in check(backend.ops, device)]
        except Exception as error:  # a report is worth more than a traceback
            differences = [f"{type(error).__name__}: {error}"]
        results[name] = "wrong: " + ", ".join(differences) if differences else "equals the reference"
        if differences:
            wrong.append(name)
    results["reference"] = "available (plain PyTorch, slow)"
    _print(results)
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: results differ from rose_ops.reference; do not train with it, and "
            "please report this with the lines above"
        )


def _print(rows: dict[str, str]) -> None:
    for key, value in rows.items():
        print(f"{key:<15}{value}")


# Of rankings, in units of 1e-9.
_FRACTIONS = (600_000_000, 100_000_000)
# Next to 1: backends take their one pass however little data there is.
_WIDTH = 1.0 + 2.0**-20


def _tensors(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Three tensors with ties, zeros, denormals and what is not finite among ordinary numbers; so many
    that the kernels sample them."""
    special = torch.tensor([0.0, 1.0, 0.5, 1e-40, torch.nan, torch.inf])
    tensors = []
    for n in (100_003, 7, 300):
        values = torch.randn(n, generator=generator)
        which = torch.randint(0, 4 * len(special), (n,), generator=generator)
        values = torch.where(which < len(special), special[which % len(special)], values)
        tensors.append(values.to(dtype))
    return tensors


def _results(ops: Any, device: str, data: list[list[Tensor]]) -> dict[str, list[Tensor]]:
    """What every operator makes of parameters, gradients and moments, by a name for each result."""
    _, g, m, _ = ([t.to(device) for t in tensors] for tensors in data)
    hyper = torch.tensor([[0.9, 0.999, 1e-8, 1e-2, 1.0, 1.0]], dtype=torch.float64)
    tables = (hyper, torch.zeros(len(g), dtype=torch.int64))
    sizes = torch.tensor([t.numel() for t in g])
    lr, offsets = torch.full((1,), 1e-3, dtype=torch.float64), sizes.cumsum(0) - sizes
    rest = (lr, *tables, offsets, None, None, None, 0.5)  # of an update
    found: dict[str, list[Tensor]] = {}

    def updated(name: str, update: Any) -> None:
        p, g, m, v = ([t.to(device, copy=True) for t in tensors] for tensors in data)
        steps = [torch.zeros((), device=device) for _ in p]
        result = update(p, g, m, v, steps)
        parts = {"result": [result], "steps": steps, "exp_avg": m, "exp_avg_sq": v, "parameters": p}
        found.update({f"{name}: {part}": tensors for part, tensors in parts.items()})

    exact, bracket = ([int(mode), *_FRACTIONS, 0, 1] for mode in (Mode.EXACT, Mode.BRACKET))
    masks: dict[str, list[Tensor]] = {}
    for kind, moments in (("first", []), ("second", m)):
        for way, ranking in (("", exact), (", bracketed", bracket), (", given", [0] * 5)):
            written = [torch.zeros((t.numel() + 7) // 8, dtype=torch.uint8, device=device) for t in g]
            record = found[f"{kind}-order selection"][0] if way == ", given" else None
            record = ops.rank_(written, g, moments, *tables, None, None, record, ranking)
            found[f"{kind}-order selection{way}"], found[f"{kind}-order mask{way}"] = [record], written
        masks[kind] = written
    record, first = found["second-order selection"][0], masks["first"]
    updates: dict[str, tuple[Any, ...]] = {
        "update": (first, [], record, *rest, [0] * 5),
        "update by masks": (first, masks["second"], None, *rest, []),
        "exact update": (first, [], None, *rest, exact),
        "bracketed update": ([], [], None, *rest, bracket),
        "bracketed ensemble update": (first, [], None, *rest, bracket),
    }
    for name, given in updates.items():
        updated(name, lambda *t, given=given: ops.step_(*t, *given, [1, 0]))
    for kind, moments in (("first", []), ("second", m)):
        leading = ops.count_keys(g, moments, *tables, None, None, False, None)
        digit = leading[:HIGH_DIGITS].argmax().reshape(1)  # not of the counts of what is not ranked
        below = ops.count_keys(g, moments, *tables, None, None, False, digit)
        found[f"{kind}-order counts of keys"] = [leading, below]
    finite = [t.nan_to_num(0.0, 0.0, 0.0) for t in g]
    found["sums of squares"] = [ops.sums_of_squares(tensors, None) for tensors in (g, finite)]
    # Of sums that are the same everywhere, and exact in float64.
    sums = [torch.tensor(values, dtype=torch.float64) for values in ([9.0, 4.0, 3.0], [2.0, 0.0, 5.0])]
    of_g, of_m = (values.to(device) for values in sums)
    found["clipping"] = [ops.clip_factors(of_g, max_norm) for max_norm in (1.0, 5.0)]
    for kind, squares in (("first", None), ("second", of_m)):
        mask = torch.zeros(len(g), dtype=torch.bool, device=device)
        record = ops.select_tensors_(mask, of_g, squares, *tables, None, *_FRACTIONS, False)
        found[f"{kind}-order selection of tensors"] = [record, mask]
    return {name: [t.cpu() for t in tensors] for name, tensors in found.items()}


def check(ops: Any, device: str) -> list[str]:
    """What differs between ``ops`` on ``device`` and the reference, on fresh random data."""
    wrong: list[str] = []
    generator = torch.Generator()
    generator.seed()
    for dtype in (torch.float32, torch.bfloat16):
        data = [_tensors(generator, dtype) for _ in range(4)]
        data[3] = [t.abs() for t in data[3]]
        expected = _results(reference, "cpu", data)
        with bracket_width(ops, _WIDTH):
            actual = _results(ops, device, data)
        for name, tensors in expected.items():
            for i, (a, b) in enumerate(zip(tensors, actual[name], strict=True)):
                same = (a == b) | (a.isnan() & b.isnan())
                if name.endswith("parameters"):  # promised to a few roundings of what they sum up
                    size = data[0][i].double().abs() + (a.double() - data[0][i]).abs()
                    off = (a.double() - b).abs()
                    same |= a.isfinite() & (off <= 4 * torch.finfo(dtype).eps * size)
                if name == "sums of squares":  # in any order
                    same |= (a - b).abs() <= 1e-12 * a
                if not same.all():
                    wrong.append(f"{name} ({device}, {dtype})")
                    break
    return wrong
