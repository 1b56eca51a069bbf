"""One ranking over every shard: FSDP2 and a model of Llama's shape, with checkpoints that any number of
processes can resume.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from rose_ops import RoseFusedAdamW, rose_backward, rose_param_groups


def make(args: argparse.Namespace) -> tuple[LlamaForCausalLM, RoseFusedAdamW]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=args.width, intermediate_size=3 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2,
        attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # Parameters are DTensors now: all ranks share one ranking and one norm, nothing needs to be said.
    optimizer = RoseFusedAdamW(
        rose_param_groups(model), lr=1e-3, order=args.order, upper=0.6, max_grad_norm=1.0
    )
    return model, optimizer


def next_tokens(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocabulary]`, which is how losses and the kl take them."""
    return model(tokens).logits[:, :-1].flatten(0, 1)


def train(model: LlamaForCausalLM, optimizer: RoseFusedAdamW, steps: range) -> None:
    for step in steps:
        torch.manual_seed(1000 * step + dist.get_rank())  # each rank has its own rows
        tokens = torch.randint(16, (4, 1)).repeat(1, 24) + torch.arange(24)
        labels = tokens[:, 1:].flatten()
        losses = rose_backward(model, tokens, labels, optimizer, forward=next_tokens)
        optimizer.step()
        optimizer.zero_grad()
        found = optimizer.selection["first" if optimizer.settings.order == "first" else "second"]
        if dist.get_rank() == 0:
            kept = found.kept / found.ranked.clamp(min=1)  # the first step has no history to rank by
            print(f"step {step}: loss {losses.loss:.3f}, kept {kept:.0%} of {found.ranked}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=["first", "second", "ensemble"], default="ensemble")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    dist.init_process_group("gloo")  # "nccl" on GPUs
    model, optimizer = make(args)
    train(model, optimizer, range(args.steps // 2))

    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)

    model, optimizer = make(args)  # as a new run would, of this or another number of processes
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    train(model, optimizer, range(args.steps // 2, args.steps))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
