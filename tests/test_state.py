"""State dicts: from and to AdamW, resumed training, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from training import (
    Snapshot,
    assert_same,
    assert_same_training,
    clones,
    each_granularity,
    each_order,
    give,
    gradients,
    masked_step,
    parameters,
    train,
)
from training import one_thread as one_thread

from rose_ops import RoseFusedAdamW

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
FLAGS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "unset": {},
}
each_adamw = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adamw_steps(optimizer: torch.optim.Optimizer, params, grads: list[list[Tensor]]) -> None:
    for step_grads in grads:
        give(params, step_grads)
        optimizer.step()


# ---------------------------------------------------------------- AdamW's state dicts


@each_adamw
def test_training_moves_from_adamw_to_rose(flags, generator):
    params = parameters(generator)
    adamw = AdamW(params, **OPTIONS, **flags)
    adamw_steps(adamw, params, [gradients(params, generator) for _ in range(5)])

    plain, rose = clones(params), clones(params)
    given = saved_and_loaded(adamw.state_dict())
    before = copy.deepcopy(given)
    # Made with other options: those of the state dict count, as in PyTorch.
    all_kept = RoseFusedAdamW(plain, upper=1, lr=1.0)
    all_kept.load_state_dict(given)
    assert_same(given, before, "the state dict that was loaded")
    group = all_kept.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.8, 0.99), 0.1)
    assert group.keys() == RoseFusedAdamW(clones(params)).param_groups[0].keys()
    for p, q in zip(params, plain, strict=True):
        assert all_kept.state[q].keys() == adamw.state[p].keys()
        for key, value in adamw.state[p].items():
            assert_same_bits(all_kept.state[q][key], value, key)

    more = [gradients(params, generator) for _ in range(5)]
    adamw_steps(adamw, params, more)
    adamw_steps(all_kept, plain, more)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(q, p)
        torch.testing.assert_close(all_kept.state[q]["exp_avg_sq"], adamw.state[p]["exp_avg_sq"])
        assert all_kept.state[q]["step"] == adamw.state[p]["step"] == 10

    # AdamW's steps count as warm-up, and its moments as history.
    selecting = RoseFusedAdamW(rose, selection_warmup_steps=5, inactive="update")
    selecting.load_state_dict(given)
    give(rose, more[0])
    selecting.step()
    assert_same(given, before, "the state dict after training")
    found = selecting.selection["second"]
    history = sum(int((s["exp_avg"] != 0).sum()) for s in before["state"].values())
    assert found.ranked == history > 100
    assert found.kept < found.ranked


@each_adamw
def test_training_moves_from_rose_to_adamw(flags, generator):
    params = parameters(generator)
    rose = RoseFusedAdamW(params, upper=1, **OPTIONS)
    adamw_steps(rose, params, [gradients(params, generator) for _ in range(5)])
    state_dict = saved_and_loaded(rose.state_dict())
    assert {frozenset(values) for values in state_dict["state"].values()} == {
        frozenset({"step", "exp_avg", "exp_avg_sq"})
    }

    others = clones(params)
    adamw = AdamW(others, lr=1.0, **flags)
    adamw.load_state_dict(state_dict)
    more = [gradients(params, generator) for _ in range(5)]
    adamw_steps(rose, params, more)
    adamw_steps(adamw, others, more)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(rose.state[p]["exp_avg"], adamw.state[q]["exp_avg"])
        assert rose.state[p]["step"] == adamw.state[q]["step"] == 10

    # And back again, as often as one likes.
    back = RoseFusedAdamW(clones(others), upper=1)
    back.load_state_dict(saved_and_loaded(adamw.state_dict()))
    assert back.param_groups[0].keys() == rose.param_groups[0].keys()


def test_adamw_s_state_dict_leaves_selective_as_it_is(generator):
    """It says nothing of that, and a default would silently rank what the user left out."""
    params = parameters(generator)
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    adamw = AdamW(copy.deepcopy(groups), **OPTIONS)
    optimizer = RoseFusedAdamW([groups[0], {**groups[1], "selective": False}])
    optimizer.load_state_dict(adamw.state_dict())
    assert [group.get("selective", True) for group in optimizer.param_groups] == [True, False]
    # A state dict that does say it, counts.
    other = RoseFusedAdamW([{"params": clones(params[:3])}, {"params": clones(params[3:])}])
    other.load_state_dict(optimizer.state_dict())
    assert [group.get("selective", True) for group in other.param_groups] == [True, False]


@pytest.mark.parametrize("named", ["saved", "loading", "both"])
def test_named_parameters(named, generator):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    saving = RoseFusedAdamW(model.parameters() if named == "loading" else model.named_parameters())
    loading = RoseFusedAdamW(model.parameters() if named == "saved" else model.named_parameters())
    train(saving, list(model.parameters()), 2, generator)
    loading.load_state_dict(saving.state_dict())
    assert loading.param_groups[0]["param_names"] == names
    assert loading.state_dict()["param_groups"][0]["params"] == [0, 1, 2, 3]


# ---------------------------------------------------------------- dtypes of state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_moments_keep_their_dtype(dtype, state_dtype, generator):
    """PyTorch casts state to the parameters' dtype, which would lose what a resume needs."""
    params = parameters(generator, dtype)
    optimizer = RoseFusedAdamW(params, state_dtype=state_dtype, **OPTIONS)
    train(optimizer, params, 3, generator)
    others = clones(params)
    other = RoseFusedAdamW(others, state_dtype=state_dtype)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_training(optimizer, params, other, others)
    for q in others:
        assert other.state[q]["exp_avg"].dtype == (state_dtype or torch.float32)
        assert other.state[q]["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_moments_of_a_half_precision_adamw_become_float32(dtype, generator):
    params = parameters(generator, dtype)
    adamw = AdamW(params, **OPTIONS)
    adamw_steps(adamw, params, [gradients(params, generator) for _ in range(3)])
    others = clones(params)
    optimizer = RoseFusedAdamW(others)
    optimizer.load_state_dict(adamw.state_dict())
    for p, q in zip(params, others, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert adamw.state[p][key].dtype == dtype
            assert_same_bits(optimizer.state[q][key], adamw.state[p][key].float(), key)


def test_state_dtype_of_the_optimizer_counts_not_that_of_the_state_dict(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    train(optimizer, params, 2, generator)
    others = clones(params)
    other = RoseFusedAdamW(others, state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        assert_same_bits(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"].bfloat16())


# ---------------------------------------------------------------- resume


def noise(params: list[nn.Parameter], step: int, what: int, seed: int) -> list[Tensor]:
    """Gradients that depend on the step and on the parameters, so that no difference stays hidden."""
    generator = torch.Generator().manual_seed(seed + 2 * step + what)
    return [
        g + (0.1 * p.detach().float()).to(g.dtype).masked_fill(g == 0, 0.0)
        for p, g in zip(params, gradients(params, generator), strict=True)
    ]


def run(optimizer, params: list[nn.Parameter], steps: range, seed: int) -> list[int]:
    """How many elements each step updated."""
    updated = []
    for step in steps:
        masked_step(optimizer, params, noise(params, step, 0, seed), noise(params, step, 1, seed))
        updated.append(int(optimizer.selection["update"].updated))
    return updated


@pytest.mark.thin(3)
@each_order
@each_granularity
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        pytest.param(torch.float32, {}, id="float32"),
        pytest.param(torch.bfloat16, {}, id="bfloat16"),
        pytest.param(torch.float16, {"selection": "approx"}, id="float16-approx"),
        pytest.param(torch.float32, {"state_dtype": torch.bfloat16, "seed": 9}, id="bfloat16-state"),
        pytest.param(torch.float32, {"selection_warmup_steps": 30}, id="in-warm-up"),
        pytest.param(torch.float32, {"inactive": "rank", "lower": 0.1}, id="rank-lower"),
    ],
)
def test_a_resume_is_as_if_training_had_not_stopped(order, granularity, dtype, settings, generator):
    # A fraction so small that the two tensor masks of an ensemble cannot be everything together.
    settings = {
        "order": order, "granularity": granularity, "backend": "cpu", "upper": 0.3, **settings
    }  # fmt: skip
    seed = int(torch.randint(1 << 31, (), generator=generator))
    params = parameters(generator, dtype)
    optimizer = RoseFusedAdamW(params, **OPTIONS, **settings)
    run(optimizer, params, range(23), seed)
    checkpoint = {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
    checkpoint = saved_and_loaded(checkpoint)
    updated = run(optimizer, params, range(23, 50), seed)

    resumed_params = clones(checkpoint["params"])
    resumed = RoseFusedAdamW(resumed_params, lr=1.0, **settings)
    resumed.load_state_dict(checkpoint["optimizer"])
    assert run(resumed, resumed_params, range(23, 50), seed) == updated
    assert_same_training(optimizer, params, resumed, resumed_params)
    # The run did select, or it would show nothing.
    assert min(updated) < sum(p.numel() for p in params)


@each_granularity
@pytest.mark.parametrize(
    ("order", "kinds"),
    [("first", ["first"]), ("ensemble", ["first"]), ("ensemble", ["first", "second"])],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
@pytest.mark.parametrize("steps", [0, 3], ids=["first-step", "later"])
def test_a_captured_mask_travels(order, kinds, steps, granularity, generator):
    params = parameters(generator, torch.bfloat16)
    kwargs = {"order": order, "granularity": granularity, **OPTIONS}
    optimizer = RoseFusedAdamW(params, **kwargs)
    train(optimizer, params, steps, generator)
    for kind in kinds:
        give(params, gradients(params, generator))
        optimizer.capture(kind)
    others = clones(params)
    other = RoseFusedAdamW(others, **kwargs)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_training(optimizer, params, other, others, "loaded")
    assert f"{kinds[-1]}_mask" in other.state[others[0]]
    grads = gradients(params, generator)
    for optim, own in ((optimizer, params), (other, others)):
        give(own, grads)
        optim.step()
    assert_same_training(optimizer, params, other, others, "after the step")
    # And it is used up there, too.
    give(others, grads)
    with pytest.raises(RuntimeError, match="first-order mask"):
        other.step()


def test_loading_replaces_what_was_captured(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first")
    train(optimizer, params, 1, generator)
    state_dict = copy.deepcopy(optimizer.state_dict())
    give(params, gradients(params, generator))
    optimizer.capture("first")
    optimizer.load_state_dict(state_dict)
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="first-order mask"):
        optimizer.step()


def test_parameters_without_state_stay_without(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    give(params, [g if i % 2 else None for i, g in enumerate(gradients(params, generator))])
    optimizer.step()
    others = clones(params)
    other = RoseFusedAdamW(others)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert [q in other.state for q in others] == [False, True] * 3
    grads = gradients(params, generator)
    for optim, own in ((optimizer, params), (other, others)):
        give(own, grads)
        optim.step()
    assert_same_training(optimizer, params, other, others)


# ---------------------------------------------------------------- hooks and pickles


def test_state_dict_hooks(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    calls = []

    def pre(optim):
        calls.append("pre")
        optim.param_groups[0]["note"] = "from the pre-hook"

    def post(optim, state_dict):
        calls.append("post")
        return {**state_dict, "epoch": 3}

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    state_dict = optimizer.state_dict()
    assert calls == ["pre", "post"]
    assert state_dict["epoch"] == 3
    assert state_dict["param_groups"][0]["note"] == "from the pre-hook"
    # What is added to it does not keep it from being loaded, and groups keep what they are told.
    other = RoseFusedAdamW(clones(params))
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["note"] == "from the pre-hook"


def test_load_state_dict_hooks(generator):
    """Pre-hooks see the dict as given and may replace it, one after the other; post-hooks see the
    loaded optimizer."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, **OPTIONS)
    train(optimizer, params, 2, generator)
    given = copy.deepcopy(optimizer.state_dict())
    others = clones(params)
    other = RoseFusedAdamW(others, lr=1.0)
    calls = []

    def replace(optim, state_dict):
        calls.append("replace")
        assert optim is other
        assert_same(state_dict, given, "the dict that the hook sees")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        state = copy.deepcopy(state_dict["state"])
        for values in state.values():
            values["exp_avg"] *= 2
        return {"state": state, "param_groups": groups}

    def change(optim, state_dict):
        calls.append("change")
        state_dict["param_groups"][0]["weight_decay"] = 0.25

    def post(optim):
        calls.append("post")
        assert optim.param_groups[0]["lr"] == 0.5
        assert torch.equal(optim.state[others[0]]["exp_avg"], 2 * optimizer.state[params[0]]["exp_avg"])
        optim.param_groups[0]["lr"] = 0.75

    other.register_load_state_dict_pre_hook(change)
    other.register_load_state_dict_pre_hook(replace, prepend=True)
    other.register_load_state_dict_post_hook(post)
    other.load_state_dict(given)
    assert calls == ["replace", "change", "post"]
    assert other.param_groups[0]["lr"] == 0.75
    assert other.param_groups[0]["weight_decay"] == 0.25
    # What the hooks make of it is checked as any state dict is.
    other.register_load_state_dict_pre_hook(lambda _, d: {**d, "state": {0: {"step": 1.0}}})
    snapshot = Snapshot(other, others)
    with pytest.raises(ValueError, match="'exp_avg' is missing"):
        other.load_state_dict(given)
    snapshot.assert_unchanged()


def test_what_users_keep_in_the_state_travels(generator):
    """As in PyTorch: cast to the parameter's dtype, unlike the moments."""
    params = parameters(generator, torch.bfloat16)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 1, generator)
    optimizer.state[params[0]]["ema"] = torch.ones(3)
    others = clones(params)
    other = RoseFusedAdamW(others)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_bits(other.state[others[0]]["ema"], torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("missing", ["maximize", "capturable"])
def test_setstate_fills_in_what_an_older_pickle_lacks(missing, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", upper=0.7, **OPTIONS)
    train(optimizer, params, 2, generator)
    older = copy.deepcopy(optimizer.__getstate__())
    del older["defaults"][missing]
    for group in older["param_groups"]:
        del group[missing]
    del older["settings"]["seed"]
    del older["_steps_done"]
    other = RoseFusedAdamW.__new__(RoseFusedAdamW)
    other.__setstate__(older)
    assert other.settings == optimizer.settings
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert other.param_groups[0][missing] is False
    others = other.param_groups[0]["params"]
    grads, kl = gradients(params, generator), gradients(params, generator)
    masked_step(optimizer, params, grads, kl)
    masked_step(other, others, grads, kl)
    assert_same_training(optimizer, params, other, others)
    other.add_param_group({"params": [nn.Parameter(torch.randn(2))]})
    assert other.param_groups[1][missing] is False


@each_adamw
def test_setstate_takes_a_pickled_adamw(flags, generator):
    params = parameters(generator)
    adamw = AdamW(params, **OPTIONS, **flags)
    adamw_steps(adamw, params, [gradients(params, generator) for _ in range(3)])
    optimizer = RoseFusedAdamW.__new__(RoseFusedAdamW)
    optimizer.__setstate__(copy.deepcopy(adamw.__getstate__()))
    others = optimizer.param_groups[0]["params"]
    give(others, gradients(others, generator))
    optimizer.step()
    assert optimizer.state[others[0]]["step"] == 4
    assert optimizer.selection["second"].ranked > 100
    optimizer.load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------- corrupted state dicts


def of_state(i: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda d: change(d["state"][i])


def of_group(i: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda d: change(d["param_groups"][i])


def put(key: Any, value: Any) -> Callable[[dict[Any, Any]], None]:
    return lambda d: d.update({key: value})


def drop(key: Any) -> Callable[[dict[Any, Any]], Any]:
    return lambda d: d.pop(key)


CORRUPTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (drop("state"), "has no 'state' and 'param_groups'; expected what state_dict"),
    "no groups": (drop("param_groups"), "has no 'state' and 'param_groups'"),
    "state is a list": (put("state", []), "has no 'state'"),
    "groups are a dict": (put("param_groups", {}), "has no 'state' and 'param_groups'"),
    "group is a list": (put("param_groups", [[], []]), "a parameter group without 'params'"),
    "group without params": (of_group(1, drop("params")), "a parameter group without 'params'"),
    "a group too few": (
        lambda d: d["param_groups"].pop(),
        r"has groups of \[4\] parameters and the optimizer has groups of \[4, 2\]",
    ),
    "a group too many": (
        lambda d: d["param_groups"].append({"params": []}),
        r"groups of \[4, 2, 0\].*of \[4, 2\]",
    ),
    "a parameter too few": (of_group(0, lambda g: g["params"].pop()), r"groups of \[3, 2\].*\[4, 2\]"),
    "a parameter too many": (of_group(0, lambda g: g["params"].append(9)), r"of \[5, 2\].*\[4, 2\]"),
    "unknown parameter": (
        lambda d: d["state"].update({7: d["state"][1]}),
        r"state of parameters \['7'\] that are in no group",
    ),
    "lr": (of_group(1, put("lr", float("nan"))), r"lr=nan \(float\); expected a finite number"),
    "betas": (of_group(0, put("betas", (0.9,))), r"betas=\(0\.9,\) \(tuple\); expected a pair"),
    "betas missing one": (of_group(0, put("betas", 0.9)), r"betas=0\.9 \(float\); expected a pair"),
    "amsgrad": (
        of_group(0, put("amsgrad", True)),
        r"amsgrad=True \(bool\) is not supported; expected False",
    ),
    "state is a tensor": (lambda d: d["state"].update({2: torch.ones(3)}), "a Tensor; expected a dict"),
    "no step": (of_state(1, drop("step")), "'step' is missing; expected step, exp_avg and"),
    "no exp_avg": (of_state(1, drop("exp_avg")), "'exp_avg' is missing"),
    "no exp_avg_sq": (of_state(5, drop("exp_avg_sq")), "'exp_avg_sq' is missing"),
    "step is NaN": (of_state(1, put("step", torch.tensor(torch.nan))), "'step' is nan; expected a"),
    "step is inf": (of_state(1, put("step", torch.inf)), "'step' is inf; expected a number >= 0"),
    "step is negative": (of_state(1, put("step", torch.tensor(-1.0))), r"'step' is -1\.0"),
    "step is complex": (of_state(1, put("step", torch.tensor(1j))), "'step' is 1j"),
    "step is None": (of_state(1, put("step", None)), "'step' is None"),
    "step is text": (of_state(1, put("step", "ten")), "'step' is ten"),
    "two steps": (of_state(1, put("step", torch.ones(2))), r"'step' is tensor\(\[1\., 1\.\]\)"),
    "moment of another shape": (
        of_state(0, put("exp_avg", torch.ones(5, 7))),
        r"state of parameter 0 \(shape \(7, 5\)\): 'exp_avg' has shape \(5, 7\)",
    ),
    "moment of integers": (
        of_state(0, put("exp_avg_sq", torch.ones(7, 5, dtype=torch.int64))),
        "'exp_avg_sq' is not a floating-point tensor",
    ),
    "moment is a list": (of_state(5, put("exp_avg", [1.0])), "'exp_avg' is not a floating-point"),
    "mask too short": (
        of_state(0, put("first_mask", torch.zeros(4, dtype=torch.uint8))),
        "'first_mask' is not a mask of this parameter",
    ),
    "mask of floats": (
        of_state(0, put("first_mask", torch.zeros(6))),
        "'first_mask' is not a mask of this parameter",
    ),
    "mask is a list": (of_state(0, put("second_mask", [1])), "'second_mask' is not a mask"),
    "mask is None": (of_state(0, put("first_mask", None)), "'first_mask' is not a mask"),
}


@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_state_dict_is_refused_and_changes_nothing(name, captured, generator):
    corrupt, message = CORRUPTIONS[name]
    params = parameters(generator)

    def make(params: list[nn.Parameter]) -> RoseFusedAdamW:
        groups = [{"params": params[:4], "selective": False}, {"params": params[4:], "lr": 0.5}]
        return RoseFusedAdamW(groups, order="first", **OPTIONS)

    optimizer = make(params)
    train(optimizer, params, 3, generator)
    others = clones(params)
    other = make(others)
    train(other, others, 2, generator)
    if captured:
        give(others, gradients(others, generator))
        other.capture("first")
    give(others, gradients(others, generator))

    state_dict = copy.deepcopy(optimizer.state_dict())
    corrupt(state_dict)
    snapshot = Snapshot(other, others)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state_dict)
    snapshot.assert_unchanged()
    # It is as usable as before, and the state dict as it was is fine.
    if captured:
        other.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_all_same_bits(
        [other.state[q]["exp_avg"] for q in others],
        [optimizer.state[p]["exp_avg"] for p in params],
        "exp_avg",
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda p: AdamW(p, amsgrad=True),
            r"amsgrad=True \(bool\) is not supported; expected False",
            id="amsgrad",
        ),
        pytest.param(
            lambda p: Adam(p, weight_decay=0.1),
            r"decoupled_weight_decay=False \(bool\) is not supported; expected True",
            id="Adam",
        ),
        pytest.param(
            lambda p: torch.optim.SGD(p, momentum=0.9),
            "'step' is missing; expected step, exp_avg",
            id="SGD",
        ),
    ],
)
def test_the_state_of_another_algorithm_is_refused(make, message, generator):
    params = parameters(generator)
    another = make(params)
    adamw_steps(another, params, [gradients(params, generator)])
    others = clones(params)
    optimizer = RoseFusedAdamW(others)
    snapshot = Snapshot(optimizer, others)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(another.state_dict())
    snapshot.assert_unchanged()


# ------------------------------------------------------------------- what only some optimizers use


@each_granularity
@pytest.mark.parametrize(
    ("before", "after"),
    [("ensemble", "second"), ("ensemble", "first"), ("first", "second"), ("second", "ensemble")],
)
def test_masks_of_another_order_are_left_out(before, after, granularity, generator):
    """The optimizer's settings stay: a mask that its order has not selects nothing."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=before, upper=0.3, granularity=granularity)
    for kind in optimizer.settings.kinds:
        give(params, gradients(params, generator))
        optimizer.capture(kind)
    others = clones(params)
    options = {"order": after, "upper": 0.5, "granularity": granularity}
    other = RoseFusedAdamW(others, **options)
    with pytest.warns(UserWarning, match="order="):
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    shared = set(optimizer.settings.kinds) & set(other.settings.kinds)
    assert other._captures.kinds == shared
    names = {key for state in other.state.values() for key in state if key.endswith("_mask")}
    assert names == {f"{kind}_mask" for kind in shared}


@each_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_masks_do_not_come_back_from_adamw(granularity, dtype, generator):
    """AdamW makes numbers of them, and has trained since."""
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(generator)]
    optimizer = RoseFusedAdamW(params, order="ensemble", granularity=granularity)
    for kind in ("first", "second"):
        give(params, gradients(params, generator))
        optimizer.capture(kind)
    adamw = AdamW(params)
    adamw.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    adamw_steps(adamw, params, [gradients(params, generator)])
    back = RoseFusedAdamW(params, order="ensemble", granularity=granularity)
    back.load_state_dict(saved_and_loaded(adamw.state_dict()))
    assert not back._captures.kinds
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        back.step()


def test_steps_that_no_parameter_took_all_of_count_after_a_resume(generator):
    """Gradients come in turns: the warm-up is over, and no parameter has taken as many steps."""
    params = parameters(generator)
    options = {"order": "first", "selection_warmup_steps": 6, "first_order_every": 3, "upper": 0.5}
    optimizer = RoseFusedAdamW(params, **options)
    needed = []
    for number in range(14):
        others = clones(params)
        resumed = RoseFusedAdamW(others, **options)
        resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
        needed.append(optimizer.needs_first_mask)
        assert resumed.needs_first_mask == needed[-1]
        for one, its in ((resumed, others), (optimizer, params)):
            grads = gradients(its, torch.Generator().manual_seed(number))
            mine = [i for i in range(len(its)) if i % 4 == number % 4]
            for kind in ["first"] * needed[-1] + [""]:
                one.zero_grad()
                for i in mine:
                    its[i].grad = grads[i]
                if kind:
                    one.capture(kind)
            one.step()
        assert_same_training(optimizer, params, resumed, others)
    assert any(needed)
    assert not any(needed[:6])


@pytest.mark.parametrize("steps", [-1, 2.0, True, "3", torch.tensor(3)])
def test_a_number_of_steps_that_is_none_is_refused(steps, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params)
    train(optimizer, params, 2, generator)
    state_dict = saved_and_loaded(optimizer.state_dict())
    state_dict["rose"]["steps"] = steps
    snapshot = Snapshot(optimizer, params)
    with pytest.raises(ValueError, match="steps; expected an integer >= 0; nothing was loaded"):
        optimizer.load_state_dict(state_dict)
    snapshot.assert_unchanged()


def test_settings_cannot_be_replaced(generator):
    optimizer = RoseFusedAdamW(parameters(generator))
    with pytest.raises(AttributeError, match="'settings' cannot be changed: make a new optimizer"):
        optimizer.settings = optimizer.settings
