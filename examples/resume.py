"""Checkpoints: a run that is interrupted and resumed is, bit for bit, the one that was not.

python examples/resume.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_backward, rose_param_groups


def make() -> tuple[nn.Module, RoseFusedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)).bfloat16()
    # Stochastic rounding is keyed by seed and step, so that it can be repeated, too.
    optimizer = RoseFusedAdamW(
        rose_param_groups(model),
        lr=1e-2,
        order="ensemble",
        upper=0.6,
        state_dtype=torch.bfloat16,
        param_rounding="stochastic",
    )
    return model, optimizer


def train(model: nn.Module, optimizer: RoseFusedAdamW, steps: int) -> None:
    for _ in range(steps):
        inputs = torch.randn(64, 16)
        labels = (inputs[:, 0] > 0).long()
        rose_backward(model, inputs.bfloat16(), labels, optimizer)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--at", type=int, default=8, help="the step after which the run is interrupted")
    args = parser.parse_args()

    model, optimizer = make()
    train(model, optimizer, args.steps)

    interrupted, its_optimizer = make()
    train(interrupted, its_optimizer, args.at)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        checkpoint = {
            "model": interrupted.state_dict(),
            "optimizer": its_optimizer.state_dict(),
            "random": torch.get_rng_state(),  # of dropout, and of this example's data
        }
        torch.save(checkpoint, path)
        resumed, its_optimizer = make()
        checkpoint = torch.load(path, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    its_optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["random"])
    train(resumed, its_optimizer, args.steps - args.at)

    same = all(map(torch.equal, model.parameters(), resumed.parameters()))
    print(f"interrupted after {args.at} of {args.steps} steps, resumed: {same = }")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
