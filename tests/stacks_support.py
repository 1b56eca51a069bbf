"""A model, its data and a plain training loop, which training under every stack is compared with."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import assert_same_training

from rose_ops import RoseFusedAdamW, rose_param_groups

BATCH, BATCHES, EPOCHS = 8, 6, 2
STEPS = BATCHES * EPOCHS
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "upper": 0.5}

Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """Returns logits; with labels, what the Hugging Face Trainer wants."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.last(self.dropout(self.first(x.to(self.first.weight.dtype)).relu()))
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def classifier(seed: int, dropout: float = 0.0) -> Classifier:
    """The same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(dropout)


def optimizer_of(model: nn.Module, **options: Any) -> RoseFusedAdamW:
    groups = rose_param_groups(model, weight_decay=OPTIONS["weight_decay"])
    return RoseFusedAdamW(groups, **{**OPTIONS, **options})


def examples(generator: torch.Generator) -> list[Batch]:
    x = torch.randn(BATCH * BATCHES, 8, generator=generator)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def batches(data: list[Batch], epochs: int = EPOCHS) -> Iterator[Batch]:
    """In order, as a loader that does not shuffle has them."""
    size = len(data)
    for i in itertools.chain.from_iterable([range(0, size, BATCH)] * epochs):
        yield {key: torch.stack([row[key] for row in data[i : i + BATCH]]) for key in data[0]}


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    clip: float | None = None,
    accumulate: int = 1,
    each_step: Callable[[], object] = lambda: None,
) -> None:
    """What every stack is to do.

    Args:
        model, optimizer: what to train.
        batches: of the whole run.
        clip: the norm to which gradients are clipped.
        accumulate: so many batches make a step.
        each_step: called after every step, a scheduler's `step` for example.
    """
    for i, batch in enumerate(batches, start=1):
        (model(**batch)["loss"] / accumulate).backward()
        if i % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            each_step()
            optimizer.zero_grad()


# --------------------------------------------------------------------------------- for tests


def package(name: str) -> ModuleType:
    """Or skip."""
    return pytest.importorskip(name, reason=f"{name} is not installed; the test extra brings it")


@pytest.fixture
def seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 31, (), generator=generator))


@pytest.fixture
def data(generator: torch.Generator) -> list[dict[str, Tensor]]:
    return examples(generator)


def assert_same_models(one, optimizer, other, other_optimizer) -> None:
    """And something has been trained, and selected."""
    assert_same_training(optimizer, one.parameters(), other_optimizer, other.parameters())
    assert optimizer.state
    assert 0 < optimizer.selection["second"].kept < optimizer.selection["second"].ranked


@pytest.fixture
def accelerator():
    """Makes them: what they share is forgotten afterwards."""
    state = package("accelerate.state")

    def forget() -> None:
        for cls in (state.AcceleratorState, state.GradientState):
            cls._reset_state()

    forget()
    yield functools.partial(package("accelerate").Accelerator, cpu=True)
    forget()


# ------------------------------------------------------------------------- several processes


def train_ddp(rank: int, world: int, folder: str, seed: int, data: list[Batch]) -> None:
    """One process of a run that leaves its model and optimizer in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    model = classifier(seed)
    optimizer = optimizer_of(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    mine = [{key: value[rank::world] for key, value in batch.items()} for batch in batches(data)]
    plain_loop(wrapped, optimizer, mine)
    torch.save((model.state_dict(), optimizer.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
