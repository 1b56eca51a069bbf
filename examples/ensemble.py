"""First order, the ensemble and R-Drop: masks that come from two passes with different dropout.

python examples/ensemble.py --order ensemble --r-drop 1.0
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_backward, rose_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--order", choices=("first", "second", "ensemble"), default="ensemble")
    parser.add_argument("--upper", type=float, nargs="+", default=[0.6], help="one, or one per mask")
    parser.add_argument("--gamma", type=float, default=0.5, help="weight of the first-order mask")
    parser.add_argument("--r-drop", type=float, default=0.0, help="weight of the KL in the loss")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    inputs = torch.randn(512, 16)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))

    upper = arguments.upper[0] if len(arguments.upper) == 1 else tuple(arguments.upper)
    optimizer = RoseFusedAdamW(
        rose_param_groups(model, weight_decay=0.01),
        lr=1e-2,
        order=arguments.order,
        upper=upper,
        gamma=arguments.gamma,
        max_grad_norm=1.0 if arguments.r_drop == 0 else None,
    )
    for step in range(arguments.steps):
        batch = torch.randint(len(inputs), (64,))
        # The passes, the capture of the first-order mask and the backward of the loss. Clipping is the
        # optimizer's; with R-Drop it is done here, where the second-order mask is ranked, too.
        losses = rose_backward(
            model,
            inputs[batch],
            labels[batch],
            optimizer,
            r_drop=arguments.r_drop,
            max_grad_norm=1.0 if arguments.r_drop > 0 else None,
        )
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            kl = "" if losses.kl is None else f"  kl {losses.kl.item():.4f}"
            kept = "  ".join(
                f"{kind} {found.kept / found.ranked:.1%}"
                for kind, found in optimizer.selection.items()
                if kind != "update"
            )
            print(f"step {step + 1:4d}  loss {losses.loss.item():.3f}{kl}  kept: {kept}")

    model.eval()
    accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
