"""The runs that ``test_kill.py`` kills: they save after every half of a step, and begin where the
latest complete checkpoint ends.

A step has two halves, so that checkpoints are taken with a captured mask, too: the first one captures,
the second one updates.
"""

from __future__ import annotations

import os
import shutil
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch._dynamo  # FSDP2 imports it, which takes seconds: now, before processes are forked
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from reshard_ranks import Run, make_state, whole
from torch import Tensor

HALVES = 7  # the last of them captures
OPTIONS = {
    "order": "ensemble",
    "dtype": torch.bfloat16,
    "state_dtype": torch.bfloat16,
    "param_rounding": "stochastic",
}


class Training:
    """A run, whose random numbers (of dropout and of the data) are those of its process."""

    def __init__(self, rank: int, sharded: bool) -> None:
        self.rank, self.run = rank, Run(1, sharded, **OPTIONS)
        self.done = 0  # halves
        torch.manual_seed(rank)

    def half(self) -> None:
        model, optimizer = self.run.model, self.run.optimizer
        x = torch.randn(8, 7, dtype=torch.bfloat16)
        if self.done % 2 == 0:
            with optimizer.capturing("first"):
                one, other = (model(F.dropout(x, 0.3)) for _ in range(2))
                (one - other).square().mean().backward()
        else:
            model(F.dropout(x, 0.3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1

    def state(self) -> dict[str, Any]:
        return {
            "model": self.run.model.state_dict(),
            "optimizer": self.run.optimizer.state_dict(),
            f"random{self.rank}": torch.get_rng_state(),
        }

    def go_on(self, state: dict[str, Any], done: int) -> None:
        self.run.model.load_state_dict(state["model"])
        self.run.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state[f"random{self.rank}"])
        self.done = done

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on: parameters, moments, masks and random numbers."""
        found = {f"random{self.rank}": torch.get_rng_state()}
        for i, state in self.run.optimizer.state_dict()["state"].items():
            found |= {f"{i}.{key}": value for key, value in state.items()}
        for name, p in self.run.model.named_parameters():
            found[name] = p.detach()
        return {name: whole(tensor) for name, tensor in found.items()}


class Store(Protocol):
    def load(self, training: Training) -> None:
        """The latest complete checkpoint, if there is one."""

    def save(self, training: Training) -> None: ...


class File:
    """One file of torch.save, which is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.path, self.partial = folder / "checkpoint.pt", folder / "checkpoint.partial"

    def load(self, training: Training) -> None:
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            training.go_on(state, state["done"])

    def save(self, training: Training) -> None:
        with self.partial.open("wb") as file:
            torch.save({**training.state(), "done": training.done}, file)
            file.flush()
            os.fsync(file.fileno())
        self.partial.rename(self.path)


class Folders:
    """A folder of torch.distributed.checkpoint for each, which is there whole or not at all. (It loads
    into a state as that which was saved: with masks, where there were some.)"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def complete(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.name.isdecimal())

    def load(self, training: Training) -> None:
        if dist.get_rank() == 0:
            for path in self.folder.glob("*.partial"):
                shutil.rmtree(path)
        dist.barrier()
        if not (found := self.complete()):
            return
        done = int(found[-1].name)
        make_state(training.run)
        if done % 2:
            training.run.capture(0, ["first"])
        state = training.state()
        dcp.load(state, checkpoint_id=found[-1])
        training.go_on(state, done)

    def save(self, training: Training) -> None:
        name = self.folder / f"{training.done:03}"
        partial = name.with_suffix(".partial")
        dcp.save(training.state(), checkpoint_id=partial)  # its files are synchronized
        dist.barrier()
        if dist.get_rank() == 0:
            before = self.complete()
            partial.rename(name)
            for path in before:
                shutil.rmtree(path)


def train(training: Training, store: Store, folder: Path, connection: Any) -> None:
    """To the end, from where it was; says when it begins. What came of it is in a file."""
    store.load(training)
    connection.send(training.done)
    while training.done < HALVES:
        training.half()
        store.save(training)
    torch.save(training.tensors(), folder / f"result{training.rank}.pt")


def alone(folder: Path, connection: Any) -> None:
    torch.set_num_threads(1)
    train(Training(0, sharded=False), File(folder), folder, connection)


def together(rank: int, size: int, meet: Path, folder: Path, connection: Any) -> None:
    """One of several processes."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=size,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
        train(Training(rank, sharded=True), Folders(folder), folder, connection)
    except BaseException:  # as where the other one was killed; those of checkpoints are no Exception
        traceback.print_exc()
        os._exit(1)  # without waiting for the other
    os._exit(0)
