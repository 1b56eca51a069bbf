"""``python -m benchmarks.record``: what AdamW meets in a real fine-tuning run, kept for the benchmarks.

Fine-tunes the demo's encoder on the demo's task for some steps, and keeps what the next step would
find: parameters, gradient, moments, and the gradient of the KL divergence between two passes. Unlike
random numbers these are correlated within rows and tensors, many are zero (words that no batch had),
and scales differ between layers. Needs the extra ``demo`` and takes a minute; made when first needed,
in a folder that git ignores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rose_ops import rose_backward, symmetric_kl

STEPS = 30
PATH = Path(__file__).parent / "recorded" / f"minilm-{STEPS}.pt"
_LR = 1e-4
_BATCH = 32
_MAX_LENGTH = 128


class NoRecording(Exception):
    """It is not there and could not be made; the message says why."""


def load() -> dict[str, Tensor]:
    """Parameters and so on (the roles of work.py), each as one flat float32 tensor.

    Raises:
        NoRecording: the run failed.
    """
    if not PATH.exists():
        print("recording a fine-tuning run (a minute or two, only once)", file=sys.stderr)
        # A process of its own: it sets the floating-point mode, and needs memory.
        process = subprocess.run(
            [sys.executable, "-m", __name__], cwd=Path(__file__).parent.parent,
            capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise NoRecording(f"could not record a fine-tuning run: {last[0]}")
    return torch.load(PATH, weights_only=True)


def record(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], lr: float
) -> dict[str, list[Tensor]]:
    """Train ``model`` with AdamW on all batches but the last, and keep what the last one brings.

    Args:
        model: a classifier with dropout, as ``rose_backward`` takes it. Parameters without a gradient
            are left out.
        batches: inputs and labels.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    *training, (inputs, labels) = batches
    for batch in training:
        rose_backward(model, *batch, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    passes = [_logits(model(**inputs) if isinstance(inputs, dict) else model(inputs)) for _ in "pq"]
    params = list(optimizer.state)
    kl = torch.autograd.grad(symmetric_kl(*passes), params, retain_graph=True)
    ce = torch.autograd.grad(sum(F.cross_entropy(logits, labels) for logits in passes) / 2, params)
    return {
        "params": [p.detach() for p in params],
        "grads": list(ce),
        "kl_grads": list(kl),
        "exp_avgs": [optimizer.state[p]["exp_avg"] for p in params],
        "exp_avg_sqs": [optimizer.state[p]["exp_avg_sq"] for p in params],
    }


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_flush_denormal(True)  # as the demo does: they cost about as much as the rest
    from rose_ops.finetune import UserError
    from rose_ops.finetune.classifier import load_model
    from rose_ops.finetune.data import load_task
    from rose_ops.finetune.models import bundled_model
    from rose_ops.finetune.runtime import Runtime
    from rose_ops.finetune.train import batches

    try:
        task = load_task("movies")
        # In float32, so that a recording does not depend on what the processor multiplies fast.
        runtime = Runtime(torch.device("cpu"), "float32")
        model, encoder = load_model(bundled_model(), task, _MAX_LENGTH, 0, runtime)
    except UserError as error:
        sys.exit(str(error))
    data = encoder(task.train)
    order = batches(data.lengths, _BATCH, STEPS + 1, seed=0)
    recorded = record(model, [(dict(inputs), y) for inputs, y in map(data.batch, order)], _LR)
    PATH.parent.mkdir(exist_ok=True)
    unfinished = PATH.with_suffix(".part")
    torch.save(
        {role: torch.cat([t.reshape(-1) for t in ts]) for role, ts in recorded.items()}, unfinished
    )
    unfinished.replace(PATH)
    print(f"{len(recorded['params'])} tensors, written to {PATH}")


if __name__ == "__main__":
    main()
