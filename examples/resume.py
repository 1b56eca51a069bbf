"""A run that stops, and goes on from its checkpoint in a new process: bit for bit the same.

python examples/resume.py run.pt --stop-after 20    # stops, and leaves run.pt
python examples/resume.py run.pt                    # goes on from there to the end
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import nn

from rose_ops import RoseFusedAdamW, rose_backward, rose_param_groups


def digest(model: nn.Module) -> str:
    """Of every bit of the parameters."""
    flat = torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])
    return hashlib.sha1(flat.numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stop-after", type=int, help="so many steps, as if interrupted")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)).bfloat16()
    optimizer = RoseFusedAdamW(
        rose_param_groups(model),
        lr=1e-2,
        order="ensemble",
        state_dtype=torch.bfloat16,
        param_rounding="stochastic",  # keyed by seed, step and element, so that it can be repeated
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=arguments.steps)

    done = 0
    if arguments.checkpoint.exists():
        # Nothing in it is code.
        saved = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"])  # of dropout and batches
        done = saved["done"]
        print(f"goes on after step {done}")

    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for _ in range(done, last):
        batch = torch.randint(len(inputs), (64,))
        rose_backward(model, inputs[batch].bfloat16(), labels[batch], optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "random": torch.get_rng_state(),
            "done": last,
        },
        arguments.checkpoint,
    )
    print(f"step {last}  parameters {digest(model)}")


if __name__ == "__main__":
    main()
