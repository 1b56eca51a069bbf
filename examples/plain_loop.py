"""Second-order ROSE in a training loop: `RoseFusedAdamW` where `torch.optim.AdamW` was.

python examples/plain_loop.py --upper 0.6
"""

import argparse

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument(
        "--upper", type=float, default=0.6, help="fraction of the elements that is kept"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)).to(args.device)
    # Biases and norms are not decayed; the norm that clips is that of all gradients.
    optimizer = RoseFusedAdamW(
        rose_param_groups(model, weight_decay=0.01), lr=args.lr, upper=args.upper, max_grad_norm=1.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps)
    for step in range(args.steps):
        inputs = torch.randn(64, 16, device=args.device)
        labels = (inputs[:, 0] > 0).long()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            selection = optimizer.selection["second"]  # tensors: reading them waits for the device
            kept = selection.kept.item() / max(selection.ranked.item(), 1)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, "
                f"gradient norm {optimizer.grad_norm.item():.3f}, "
                f"kept {kept:.0%} of {selection.ranked.item()} ranked elements"
            )


if __name__ == "__main__":
    main()
