"""First order and the ensemble: `rose_backward` does the two dropout passes, the capture, and R-Drop.

python examples/ensemble.py --order first
python examples/ensemble.py --order ensemble --r-drop 0.5
"""

import argparse

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_backward, rose_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--order", choices=("first", "second", "ensemble"), default="ensemble")
    parser.add_argument(
        "--upper", type=float, default=0.6, help="fraction of the elements that is kept"
    )
    parser.add_argument("--gamma", type=float, default=0.5, help="weight of the first-order mask")
    parser.add_argument("--r-drop", type=float, default=0.0, help="weight of the kl in the loss")
    args = parser.parse_args()

    torch.manual_seed(0)
    # First order needs dropout: without it, both passes are the same and there is nothing to rank.
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))
    optimizer = RoseFusedAdamW(
        rose_param_groups(model, weight_decay=0.01),
        lr=1e-2,
        order=args.order,
        upper=args.upper,
        gamma=args.gamma,
    )
    for step in range(args.steps):
        inputs = torch.randn(64, 16)
        labels = (inputs[:, 0] > 0).long()
        losses = rose_backward(model, inputs, labels, optimizer, r_drop=args.r_drop)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            kept = ", ".join(
                f"{kind} {selection.kept.item() / max(selection.ranked.item(), 1):.0%}"
                for kind, selection in optimizer.selection.items()
                if kind != "update"
            )
            print(f"step {step + 1}: loss {losses.loss.item():.3f}, kept: {kept}")


if __name__ == "__main__":
    main()
