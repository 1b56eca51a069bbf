"""Second-order ROSE in a plain training loop: the optimizer stands where AdamW stood.

python examples/plain_loop.py --upper 0.6
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--upper", type=float, default=0.6, help="fraction of the parameters to update")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    inputs = torch.randn(512, 16)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))

    optimizer = RoseFusedAdamW(
        rose_param_groups(model, weight_decay=0.01),
        lr=arguments.lr,
        upper=arguments.upper,
        max_grad_norm=1.0,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.1, total_iters=arguments.steps
    )
    for step in range(arguments.steps):
        batch = torch.randint(len(inputs), (64,))
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            # Reading statistics waits for the device: do it when something is printed anyway.
            found, norm = optimizer.selection["second"], optimizer.grad_norm
            print(
                f"step {step + 1:4d}  loss {loss.item():.3f}  gradient {norm.item():.3f}  "
                f"kept {found.kept / found.ranked:.1%} up to risk {found.threshold.item():.3f}"
            )

    accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
