"""Gradient accumulation: `rose_accumulate` makes the masks and the gradient of all micro-batches, as if
they were one batch. (Micro-batches may differ in length: each counts by its number of labels.)

    python examples/accumulate.py --micro-batches 4
"""

import argparse

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_accumulate, rose_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="samples of a micro-batch")
    parser.add_argument("--bf16", action="store_true", help="forwards under autocast")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = RoseFusedAdamW(
        rose_param_groups(model), lr=1e-2, order="ensemble", upper=0.6, max_grad_norm=1.0
    )
    for step in range(args.steps):
        micro_batches = []
        for _ in range(args.micro_batches):
            inputs = torch.randn(args.batch, 16)
            micro_batches.append((inputs, (inputs[:, 0] > 0).long()))
        losses = rose_accumulate(
            model,
            micro_batches,
            optimizer,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=args.bf16),
        )
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {losses.loss.item():.3f}, kl {losses.kl.item():.2e}")


if __name__ == "__main__":
    main()
