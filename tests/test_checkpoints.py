"""What leaves an optimizer and comes back: other stacks' checkpoints, settings, storages, memory."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from stacks_support import classifier, package
from torch import nn
from torch.optim import AdamW
from training import (
    Snapshot,
    assert_same_training,
    clones,
    each_order,
    give,
    gradients,
    parameters,
    train,
)
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW, flatten_parameters

# ------------------------------------------------------------------ torch.distributed.checkpoint

needs_dcp = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def groups_of(model: nn.Module, selective: bool = True) -> list[dict[str, Any]]:
    params = [*model.parameters()]
    return [
        {"params": [p for p in params if p.dim() > 1]},
        {
            "params": [p for p in params if p.dim() < 2],
            "weight_decay": 0.0,
            **({} if selective else {"selective": False}),
        },
    ]


def moved_by_dcp(model, optimizer, other, other_optimizer, folder, flatten: bool) -> None:
    """Save one through files, and load it into the other."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = states.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, no_dist=True)
    weights, state = states.get_state_dict(other, other_optimizer, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    states.set_state_dict(
        other, other_optimizer, model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"], options=options,
    )  # fmt: skip


@needs_dcp
@each_order
@pytest.mark.parametrize("selective", [True, False], ids=["", "not all selective"])
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_distributed_checkpoints_resume(order, selective, flatten, tmp_path, generator):
    """They make the state to load into by a step with zeros, without a mask."""
    model, other = classifier(0), classifier(1)
    make = functools.partial(RoseFusedAdamW, order=order, lr=0.1, selection_warmup_steps=1)
    optimizer = make(groups_of(model, selective))
    other_optimizer = make(groups_of(other, selective))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for group in other_optimizer.param_groups for p in group["params"]]
    train(optimizer, params, 3, generator)
    for p in params:
        p.grad = None
    moved_by_dcp(model, optimizer, other, other_optimizer, tmp_path, flatten)
    assert_same_training(optimizer, params, other_optimizer, others)
    state = generator.get_state()
    train(optimizer, params, 3, generator)
    generator.set_state(state)
    train(other_optimizer, others, 3, generator)
    assert_same_training(optimizer, params, other_optimizer, others)
    chosen = [group.get("selective", True) for group in other_optimizer.param_groups]
    assert chosen == [True, selective]


@needs_dcp
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("order", ["from AdamW", "to AdamW"])
def test_distributed_checkpoints_of_adamw(order, flatten, tmp_path, generator):
    kinds = [AdamW, functools.partial(RoseFusedAdamW, order="ensemble")]
    make, make_other = kinds if order == "from AdamW" else reversed(kinds)
    model, other = classifier(0), classifier(1)
    optimizer, other_optimizer = make(groups_of(model)), make_other(groups_of(other))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for group in other_optimizer.param_groups for p in group["params"]]
    for _ in range(2):
        grads = gradients(params, generator)
        if isinstance(optimizer, RoseFusedAdamW):
            give(params, grads)
            optimizer.capture("first")
        give(params, grads)
        optimizer.step()
        optimizer.zero_grad()
    moved_by_dcp(model, optimizer, other, other_optimizer, tmp_path, flatten)
    assert_same_training(optimizer, params, other_optimizer, others)


def test_only_a_step_that_makes_state_needs_no_mask(generator):
    """Not the first one of a schedule that starts at 0, with a gradient, nor a later one without."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, lr=0.0, order="first")
    give(params, gradients(params, generator))
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()
    snapshot.assert_unchanged()
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(not optimizer.state[p]["exp_avg"].any() for p in params)
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()


# ---------------------------------------------------------------------------------------- settings

SETTINGS: dict[str, tuple[Any, Any]] = {
    "order": ("second", "ensemble"),
    "upper": (0.6, 0.5),
    "lower": (0.0, 0.1),
    "granularity": ("element", "tensor"),
    "selection": ("bracket", "approx"),
    "inactive": ("update", "rank"),
    "selection_warmup_steps": (0, 3),
    "max_grad_norm": (None, 1.0),
    "param_rounding": ("nearest", "stochastic"),
    "state_dtype": (None, torch.bfloat16),
    "seed": (0, 7),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_of_other_settings_is_said(name, generator):
    saved, here = SETTINGS[name]
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **{name: saved})
    train(optimizer, params, 2, generator)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    state_dict = torch.load(buffer, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoseFusedAdamW(clones(params), **{name: saved}).load_state_dict(state_dict)
    other = RoseFusedAdamW(clones(params), **{name: here})
    with pytest.warns(UserWarning, match=f"other settings than the checkpoint.*{name}=") as said:
        other.load_state_dict(state_dict)
    assert said[0].filename == __file__
    assert getattr(other.settings, name) == here  # the optimizer's stay
    # AdamW does not mind what is beside its own.
    AdamW(clones(params)).load_state_dict(state_dict)


@pytest.mark.parametrize("order", ["first", "second"])
def test_settings_that_mean_the_same_are_no_others(order, generator):
    """Such as those of a mask that the order has not."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order, upper=0.5, gamma=0.3)
    train(optimizer, params, 1, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upper = (0.5, 0.9) if order == "first" else (0.9, 0.5)
        other = RoseFusedAdamW(clones(params), order=order, upper=upper, gamma=0.7, backend="cpu")
        other.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_says_its_format(generator):
    """What is promised of it is in docs/checkpoints.md: these are its keys."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="ensemble")
    train(optimizer, params, 1, generator)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups", "rose"}
    assert saved["rose"].keys() == {"format", "settings", "steps"}
    assert saved["rose"]["format"] == 1
    assert {key for state in saved["state"].values() for key in state} == {
        "step", "exp_avg", "exp_avg_sq", "first_mask",
    }  # fmt: skip


def test_a_checkpoint_without_a_format_is_of_the_first(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 2, generator)
    state_dict = copy.deepcopy(optimizer.state_dict())
    del state_dict["rose"]["format"]
    others = clones(params)
    other = RoseFusedAdamW(others)
    other.load_state_dict(state_dict)
    assert_same_training(optimizer, params, other, others)


NEWER = r"is of format 3, which a newer rose_ops made, and this one reads formats up to 2"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"format": 3, "settings": {}}, NEWER),
        ({"format": 0, "settings": {}}, r"has a format 0 \(int\); expected an integer from 1 to 2"),
        ({"format": "1", "settings": {}}, r"has a format '1' \(str\); expected an integer"),
        ({"format": True, "settings": {}}, r"has a format True \(bool\); expected an integer"),
        ({"format": 1}, "has a 'rose' that state_dict"),
        ([], "has a 'rose' that state_dict"),
    ],
    ids=["newer", "0", "text", "bool", "without settings", "no dict"],
)
def test_a_format_that_cannot_be_read_is_refused(broken, message, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    state_dict = {**optimizer.state_dict(), "rose": broken}
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    snapshot.assert_unchanged()


WRITTEN = [
    ("upper", 0.1, r"'upper' in a parameter group: one ranking spans all groups"),
    ("order", "first", r"'order' in a parameter group"),
    ("seed", 1, r"'seed' in a parameter group"),
    ("lr", float("inf"), r"lr=inf \(float\); expected a finite number"),
    ("lr", "0.1", r"lr='0.1' \(str\); expected a finite number"),
    ("betas", (0.9, 1.0), r"betas=\(0.9, 1.0\) \(tuple\); expected two numbers in"),
    ("betas", None, r"betas=None \(NoneType\); expected a pair"),
    ("eps", -1.0, r"eps=-1.0 \(float\); expected a number >= 0"),
    ("weight_decay", "0", r"weight_decay='0' \(str\); expected"),
    ("selective", "no", r"selective='no' \(str\); expected True or False"),
    ("maximize", 1.5, r"maximize=1.5 \(float\); expected True or False"),
    ("amsgrad", True, r"amsgrad=True \(bool\) is not supported"),
    ("differentiable", True, r"differentiable=True \(bool\) is not supported"),
    ("decoupled_weight_decay", False, r"decoupled_weight_decay=False \(bool\) is not supported"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRITTEN, ids=lambda x: str(x)[:20])
@each_order
def test_what_is_written_into_a_group_is_refused_at_the_next_step(
    key, value, message, order, generator
):
    """Not ignored until a checkpoint of it cannot be loaded."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order)
    train(optimizer, params, 2, generator)
    give(params, gradients(params, generator))
    if order != "second":
        optimizer.capture("first")
        give(params, gradients(params, generator))
    group = optimizer.param_groups[0]
    before = dict(group)
    group[key] = value
    snapshot = Snapshot(optimizer, params)
    for call in (optimizer.step, lambda: optimizer.capture(optimizer.settings.kinds[0])):
        with pytest.raises(ValueError, match=message):
            call()
        snapshot.assert_unchanged()
    group.clear()
    group.update(before)
    optimizer.step()


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1e-20), ("lr", 0.5), ("betas", (0.5, 0.9)), ("selective", False), ("maximize", True),
     ("eps", 1e-3), ("weight_decay", 0.3), ("name", "head"), ("initial_lr", 0.1)],
)  # fmt: skip
def test_what_is_written_into_a_group_is_honoured(key, value, generator):
    """By the next step, and by a checkpoint of it."""
    params = parameters(generator)
    others = clones(params)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    optimizer.param_groups[0][key] = value
    new = RoseFusedAdamW([{"params": others, **({key: value} if value != -1e-20 else {})}])
    new.load_state_dict(optimizer.state_dict())
    assert new.param_groups[0][key] == value
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    grads = gradients(params, generator)
    for one, own in ((optimizer, params), (new, others)):
        give(own, grads)
        one.step()
    assert_same_training(optimizer, params, new, others)


# ---------------------------------------------------------------------------------------- storages


def large() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(700_000)) for _ in range(6)]


def captured(params: list[nn.Parameter], **options: Any) -> RoseFusedAdamW:
    """With moments and a mask in its state."""
    optimizer = RoseFusedAdamW(params, order="first", **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.capture("first", clear=False)
        if not optimizer.state[params[0]]["step"]:
            optimizer.step()
    optimizer.zero_grad()
    return optimizer


WAYS = {
    "pickle": pickle.dumps,
    "torch.save": lambda x: (torch.save(x, buffer := io.BytesIO()), buffer.getvalue())[1],
    "broadcast": lambda x: torch.distributed.distributed_c10d._object_to_tensor(
        x, torch.device("cpu"), None
    )[0].numpy(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_what_leaves_shares_no_storage(way, state_dtype):
    """Else each moment would be written as often as there are moments."""
    if way == "broadcast" and not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    params = large()
    optimizer = captured(params, state_dtype=state_dtype)
    state = optimizer.state_dict()["state"]
    size = 2 * (4 if state_dtype is None else 2) + 1 / 8  # bytes per element
    for copied in (optimizer.state_dict(), copy.deepcopy(optimizer).state_dict()):
        assert len(WAYS[way](copied)) < 1.01 * size * sum(p.numel() for p in params) + 20_000
        assert len(WAYS[way](copied["state"][0])) < 1.01 * size * params[0].numel() + 20_000
    storages = [t.untyped_storage().data_ptr() for values in state.values() for t in values.values()]
    assert len(set(storages)) == len(storages)


def test_a_saved_mask_is_a_copy(generator):
    """The next capture writes where the mask is."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first")
    train(optimizer, params, 2, generator)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    for mine, theirs in zip(saved["state"].values(), before["state"].values(), strict=True):
        assert torch.equal(mine["first_mask"], theirs["first_mask"])


def test_a_flattened_model_is_saved_whole(tmp_path):
    accelerate, safetensors = package("accelerate"), package("safetensors.torch")
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(3)))
    flatten_parameters(model.parameters())
    expected = copy.deepcopy(model.state_dict())
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    for path in (tmp_path / "accelerate" / "model.safetensors", tmp_path / "model.safetensors"):
        found = safetensors.load_file(str(path))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    torch.save(model[2].state_dict(), tmp_path / "head.pt")
    assert (tmp_path / "head.pt").stat().st_size < 1.05 * 4 * 300 * 301 + 20_000


# ------------------------------------------------------------------------------------------ memory

PEAK = """
import os, resource, torch
from torch import nn
from rose_ops import RoseFusedAdamW
torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # the first one imports for seconds
child = os.fork()
kind = RoseFusedAdamW if child == 0 else torch.optim.AdamW
params = [nn.Parameter(torch.ones(1 << 20)) for _ in range(8)]
moments = ("exp_avg", "exp_avg_sq")
state = {i: {"step": torch.tensor(1.0), **{key: torch.ones(1 << 20) for key in moments}}
         for i in range(8)}
optimizer = kind(params)
state_dict = {**optimizer.state_dict(), "state": state}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
optimizer.load_state_dict(state_dict)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (8 * 8 * 1024)
print(kind.__name__, peak, flush=True)
if child:
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="units of the peak are Linux's")
def test_peak_of_loading():
    """In sizes of the state: AdamW takes what it is given; here it is copied, once."""
    said = subprocess.check_output([sys.executable, "-c", PEAK], timeout=120, text=True).split()
    peaks = dict(zip(said[::2], map(float, said[1::2]), strict=True))
    assert peaks["AdamW"] < 0.1
    assert 0.5 < peaks["RoseFusedAdamW"] < 1.1
