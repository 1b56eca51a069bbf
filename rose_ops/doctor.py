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


def _tensors(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Three tensors with ties, zeros, denormals and what is not finite among ordinary numbers."""
    special = torch.tensor([0.0, 1.0, 0.5, 1e-40, torch.nan, torch.inf])
    tensors = []
    for n in (20_011, 7, 300):
        values = torch.randn(n, generator=generator)
        which = torch.randint(0, 4 * len(special), (n,), generator=generator)
        values = torch.where(which < len(special), special[which % len(special)], values)
        tensors.append(values.to(dtype))
    return tensors


def check(ops: Any, device: str) -> list[str]:
    """What differs between ``ops`` on ``device`` and the reference, on fresh random data."""
    wrong: list[str] = []
    generator = torch.Generator()
    generator.seed()
    for dtype in (torch.float32, torch.bfloat16):
        p, g, m, v = (_tensors(generator, dtype) for _ in range(4))
        v = [t.abs() for t in v]
        hyper = torch.tensor([[0.9, 0.999, 1e-8, 1e-2, 1.0, 1.0]], dtype=torch.float64)
        group = torch.zeros(len(p), dtype=torch.int64)
        sizes = torch.tensor([t.numel() for t in p])
        offsets, lr = sizes.cumsum(0) - sizes, torch.full((1,), 1e-3, dtype=torch.float64)

        def run(ops: Any, device: str, data=(p, g, m, v), tables=(hyper, group), rest=(lr, offsets)):
            p, g, m, v = ([t.to(device, copy=True) for t in tensors] for tensors in data)
            steps = [torch.zeros((), device=device) for _ in p]
            found: dict[str, list[Tensor]] = {}
            masks = {}
            for kind, moments in (("first", []), ("second", m)):
                record = ops.select(
                    g, moments, *tables, None, None, 600_000_000, 100_000_000, False, False
                )
                masks[kind] = [
                    torch.zeros((t.numel() + 7) // 8, dtype=torch.uint8, device=device) for t in g
                ]
                ops.capture_(masks[kind], g, moments, *tables, None, None, record, False)
                found[f"{kind}-order selection"] = [record]
                found[f"{kind}-order mask"] = masks[kind]
            counts = ops.adamw_(
                p, g, m, v, steps, masks["first"], [], record, rest[0], *tables, rest[1], None, None,
                None, 0.5, False, 1, False,
            )  # fmt: skip
            found.update(counts=[counts], steps=steps, exp_avg=m, exp_avg_sq=v, parameters=p)
            return {name: [t.cpu() for t in tensors] for name, tensors in found.items()}

        expected, actual = run(reference, "cpu"), run(ops, device)
        for name, tensors in expected.items():
            for i, (a, b) in enumerate(zip(tensors, actual[name], strict=True)):
                same = (a == b) | (a.isnan() & b.isnan())
                if name == "parameters":  # promised to a few roundings of what they are the sum of
                    size = p[i].double().abs() + (a.double() - p[i]).abs()
                    off = (a.double() - b).abs()
                    same |= a.isfinite() & (off <= 4 * torch.finfo(dtype).eps * size)
                if not same.all():
                    wrong.append(f"{name} ({device}, {dtype})")
                    break
    return wrong
