"""The same for what comes with PyTorch, and for safetensors: see STACKS.md."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from stacks_support import (
    BATCH,
    OPTIONS,
    STEPS,
    assert_same_models,
    batches,
    classifier,
    optimizer_of,
    package,
    plain_loop,
)
from stacks_support import data as data
from stacks_support import seed as seed
from support import assert_all_same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader
from training import clones, give
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, flatten_parameters


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoint_state_dict(data, seed, flatten):
    """Which makes the state of a new optimizer by a step with zeros for gradients."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    settings = {"selection_warmup_steps": 2}
    model, other = classifier(seed), classifier(seed + 1)
    optimizer, other_optimizer = optimizer_of(model, **settings), optimizer_of(other, **settings)
    plain_loop(model, optimizer, batches(data, 1))
    weights, state = dcp.get_state_dict(model, optimizer, options=options)
    dcp.set_state_dict(
        other,
        other_optimizer,
        model_state_dict=weights,
        optim_state_dict=copy.deepcopy(state),
        options=options,
    )
    for one, of_one in ((model, optimizer), (other, other_optimizer)):
        plain_loop(one, of_one, batches(data, 1))
    assert_same_models(model, optimizer, other, other_optimizer)


def test_a_schedule_that_starts_at_0(data, seed):
    """Warm-up: the step with lr=0 leaves parameters alone, and makes moments."""
    model = classifier(seed)
    optimizer = optimizer_of(model)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    before = clones(model.parameters())
    one, *rest = batches(data)
    plain_loop(model, optimizer, [one], each_step=schedule.step)
    assert_all_same_bits([*model.parameters()], before, "parameters")
    assert all(state["exp_avg"].any() for state in optimizer.state.values())
    plain_loop(model, optimizer, rest, each_step=schedule.step)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_swa_and_ema(data, seed):
    """They average what the optimizer has written, and change nothing about it."""
    model, other = classifier(seed), classifier(seed)
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    swa = swa_utils.AveragedModel(model)
    seen: list[list[Tensor]] = []

    def each_step() -> None:
        ema.update_parameters(model)
        swa.update_parameters(model)
        seen.append([p.detach().double() for p in model.parameters()])

    plain_loop(model, optimizer, batches(data), each_step=each_step)
    plain_loop(other, other_optimizer, batches(data))
    assert_same_models(model, optimizer, other, other_optimizer)
    weights = [0.5 ** min(i, STEPS - 1) for i in range(STEPS, 0, -1)]
    for averaged, share in ((ema, weights), (swa, [1 / STEPS] * STEPS)):
        for i, p in enumerate(averaged.module.parameters()):
            expected = sum(w * step[i] for w, step in zip(share, seen, strict=True))
            torch.testing.assert_close(p.detach().double(), expected)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization, as wrappers of base optimizers do it (Foret et al., 2021)."""

    def __init__(self, params, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        old = [p.detach().clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, before in zip(params, old, strict=True):
            p.copy_(before)
        self.base.step()


def test_sam(data, seed):
    """A two-step wrapper: settings of the ranking go into the base by functools.partial, as groups take
    what SAM is given."""
    model, other = classifier(seed), classifier(seed)
    base = functools.partial(RoseFusedAdamW, upper=OPTIONS["upper"])
    sam = Sam(model.parameters(), base, lr=0.02, weight_decay=0.1)
    by_hand = RoseFusedAdamW(other.parameters(), **OPTIONS)
    for batch in batches(data):
        model(**batch)["loss"].backward()
        other(**batch)["loss"].backward()

        def closure(batch=batch):
            model(**batch)["loss"].backward()

        grads = [p.grad for p in other.parameters()]
        norm = torch.stack([g.norm() for g in grads]).norm()
        moved = classifier(seed)
        for p, q, g in zip(moved.parameters(), other.parameters(), grads, strict=True):
            p.data = q.detach().add(g, alpha=float(0.05 / norm))
        moved(**batch)["loss"].backward()
        give(other.parameters(), [p.grad for p in moved.parameters()])
        sam.step(closure)
        by_hand.step()
        sam.zero_grad()
        by_hand.zero_grad()
    assert_same_models(model, sam.base, other, by_hand)
    with pytest.raises(ValueError, match="'upper' in a parameter group: one ranking spans all groups"):
        Sam(model.parameters(), RoseFusedAdamW, **OPTIONS)


@pytest.mark.parametrize(
    "reparametrize",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
)
def test_parametrizations(data, seed, reparametrize):
    """What is trained and ranked are the original parameters, as by an optimizer of their copies."""
    model = classifier(seed)
    for layer in (model.first, model.last):
        reparametrize(layer)
    copies, before = clones(model.parameters()), clones(model.parameters())
    optimizer, of_copies = (RoseFusedAdamW(p, **OPTIONS) for p in (model.parameters(), copies))
    for batch in batches(data):
        model(**batch)["loss"].backward()
        give(copies, [p.grad for p in model.parameters()])
        for either in (optimizer, of_copies):
            either.step()
            either.zero_grad()
        assert_all_same_bits([*model.parameters()], copies, "parameters")
    assert not any(torch.equal(p, q) for p, q in zip(copies, before, strict=True))


@pytest.mark.thin(2)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(data, seed, start):
    """Started after a step, when there are threads to inherit."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    model, other = classifier(seed), classifier(seed)
    optimizer, other_optimizer = optimizer_of(model), optimizer_of(other)
    plain_loop(model, optimizer, batches(data, 1))
    workers = DataLoader(data, batch_size=BATCH, num_workers=2, multiprocessing_context=start)
    plain_loop(model, optimizer, workers)
    plain_loop(other, other_optimizer, batches(data, 2))
    assert_same_models(model, optimizer, other, other_optimizer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("flat", [False, True], ids=["scattered", "flat"])
def test_safetensors_save_model(generator, tmp_path, flat):
    """Of tied and of flat weights: what is loaded is what was saved, and training goes on with it."""
    safetensors = package("safetensors.torch")

    def make() -> tuple[Tied, RoseFusedAdamW]:
        model = Tied()
        params = flatten_parameters(model.parameters()) if flat else model.parameters()
        return model, RoseFusedAdamW(params, **OPTIONS)

    tokens = torch.randint(11, (64,), generator=generator)

    def train(model: Tied, optimizer: RoseFusedAdamW) -> None:
        for _ in range(5):
            nn.functional.cross_entropy(model.head(model.embed(tokens)), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = make()
    train(model, optimizer)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other, other_optimizer = make()
    safetensors.load_model(other, tmp_path / "model.safetensors")
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_all_same_bits([*other.parameters()], [*model.parameters()], "loaded")
    train(model, optimizer)
    train(other, other_optimizer)
    assert_all_same_bits([*other.parameters()], [*model.parameters()], "trained")
