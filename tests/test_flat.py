"""flatten_parameters: what a flat optimizer computes, and what it survives or refuses."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate

import pytest
import torch
from support import BF16, FLOAT, assert_all_same_bits, assert_same_bits
from torch import Tensor, nn
from training import (
    ORDERS,
    clones,
    each_order,
    give,
    gradients,
    masked_step,
    one_thread,  # noqa: F401
    parameters,
)

from rose_ops import FlatParameter, RoseFusedAdamW, flatten_parameters, rose_backward, rose_param_groups
from rose_ops.layout import memory_order

_seed = 0


@pytest.fixture(autouse=True)
def fresh(generator) -> None:
    """Models, batches and dropout of this test come from its generator."""
    global _seed
    _seed = generator.initial_seed()
    torch.manual_seed(_seed)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.1), nn.Linear(7, 3))


def twins(make: Callable[[], nn.Module] = network, **options):
    """A model and its optimizer, twice: flat and scattered."""
    scattered = make()
    flat = copy.deepcopy(scattered)
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return (
        (flat, RoseFusedAdamW(flatten_parameters(flat.parameters()), **options)),
        (scattered, RoseFusedAdamW(scattered.parameters(), **options)),
    )


def only(optimizer) -> FlatParameter:
    [flat] = optimizer.param_groups[0]["params"]
    assert isinstance(flat, FlatParameter)
    return flat


def backward(model: nn.Module, seed: int) -> None:
    """The same batch and the same dropout for both twins."""
    torch.manual_seed(_seed + seed)
    dtype = next(model.parameters()).dtype
    model(torch.randn(5, 6).to(dtype)).square().sum().backward()


def assert_flat(optimizer) -> None:
    """Members and their gradients are views of the vectors."""
    for group in optimizer.param_groups:
        for flat in group["params"]:
            begins = accumulate((p.numel() * p.element_size() for p in flat.members), initial=0)
            for p, begin in zip(flat.members, begins, strict=False):
                assert p.data_ptr() == flat.data_ptr() + begin
                assert p.grad is None or p.grad.data_ptr() == flat.grad.data_ptr() + begin


def assert_same_models(one: nn.Module, other: nn.Module, what: str = "") -> None:
    assert_all_same_bits([*one.parameters()], [*other.parameters()], f"{what} parameters")


# --------------------------------------------------------------------------- what is computed


def channels_last(generator: torch.Generator) -> nn.Parameter:
    data = torch.randn(3, 4, 5, 2, generator=generator)
    return nn.Parameter(data.to(memory_format=torch.channels_last))


STORED = {  # parameters, their rounding, moments
    "float32": (FLOAT, "nearest", FLOAT),
    "bf16 states": (FLOAT, "nearest", BF16),
    "bf16 parameters": (BF16, "nearest", FLOAT),
    "bf16, stochastic": (BF16, "stochastic", BF16),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("selection", ["exact", "bracket"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "rounding", "state_dtype"), STORED.values(), ids=STORED)
@each_order
def test_same_bits_as_scattered(order, dtype, rounding, state_dtype, backend, selection, generator):
    # No empty tensor among them: a flat parameter has no place for one.
    scattered = [p for p in parameters(generator, dtype) if p.numel()]
    scattered.append(nn.Parameter(channels_last(generator).to(dtype)))
    members = clones(scattered)
    options = {
        "order": order,
        "param_rounding": rounding,
        "state_dtype": state_dtype,
        "backend": backend,
        "selection": selection,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "seed": 3,
    }
    flat = RoseFusedAdamW(flatten_parameters(members), **options)
    other = RoseFusedAdamW(scattered, **options)
    for step in range(4):
        grads, kl = gradients(members, generator), gradients(members, generator)
        masked_step(flat, members, grads, kl)
        masked_step(other, scattered, grads, kl)
        for kind in other.settings.kinds:
            mine, theirs = flat.selection[kind], other.selection[kind]
            assert_all_same_bits([*mine], [*theirs], f"step {step}, {kind}")
            assert 0 < int(theirs.kept) < int(theirs.ranked) or step == 0
        assert_all_same_bits(members, scattered, f"step {step}")
    flat_state = flat.state[only(flat)]
    for moment in ("exp_avg", "exp_avg_sq"):
        theirs = [other.state[p][moment] for p in scattered]
        assert_all_same_bits(only(flat).views(flat_state[moment]), theirs, moment)
    assert_flat(flat)
    assert [p.stride() for p in members] == [p.stride() for p in scattered]


@each_order
def test_captured_masks_equal_those_of_scattered_tensors(order, generator):
    # Sizes of whole bytes of mask bits, so that a flat mask is the scattered ones in a row.
    scattered = [nn.Parameter(torch.randn(n, generator=generator)) for n in (8, 24, 160)]
    members = clones(scattered)
    flat = RoseFusedAdamW(flatten_parameters(members), order=order)
    other = RoseFusedAdamW(scattered, order=order)
    kind = other.settings.kinds[-1]
    for _ in range(3):
        grads, kl = gradients(members, generator), gradients(members, generator)
        for optimizer, params in ((flat, members), (other, scattered)):
            give(params, grads)
            optimizer.capture(kind)
        mask = flat.state[only(flat)][f"{kind}_mask"]
        assert_same_bits(mask, torch.cat([other.state[p][f"{kind}_mask"] for p in scattered]))
        for optimizer, params in ((flat, members), (other, scattered)):
            masked_step(optimizer, params, grads, kl)


@pytest.mark.parametrize("order", ORDERS)
def test_training_a_model(order):
    pair = twins(order=order)
    for step in range(4):
        for model, optimizer in pair:
            torch.manual_seed(_seed + step)
            rose_backward(model, torch.randn(9, 6), torch.randint(3, (9,)), optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(pair[0][0], pair[1][0])
    assert_flat(pair[0][1])


def test_one_segment_per_group_and_dtype():
    model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3).bfloat16())
    groups = rose_param_groups(model, weight_decay=0.1)
    groups[1]["lr"] = 0.5
    scattered = [[*group["params"]] for group in groups]
    flat = flatten_parameters(groups)
    assert [g["weight_decay"] for g in flat] == [0.1, 0.0]
    assert "lr" not in flat[0]
    assert flat[1]["lr"] == 0.5
    assert [[p.dtype for p in g["params"]] for g in flat] == [[FLOAT, BF16]] * 2
    for group, params in zip(flat, scattered, strict=True):
        vectors = group["params"]
        assert sorted(map(id, params)) == sorted(id(p) for v in vectors for p in v.members)
        assert sum(v.numel() for v in vectors) == sum(p.numel() for p in params)  # no padding
        for vector in vectors:
            assert vector.dim() == 1
            parts = [memory_order(p, (p.detach(),))[0].reshape(-1) for p in vector.members]
            assert_same_bits(vector.detach(), torch.cat(parts))
    assert [group["params"] for group in groups] == scattered  # what was given is as it was
    assert flatten_parameters([{"params": nn.Parameter(torch.ones(3))}])[0]["params"][0].numel() == 3


def test_groups_train_alike():
    scattered = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    flat = copy.deepcopy(scattered)
    one = RoseFusedAdamW(flatten_parameters(rose_param_groups(flat, weight_decay=0.1)), lr=1e-2)
    other = RoseFusedAdamW(rose_param_groups(scattered, weight_decay=0.1), lr=1e-2)
    for step in range(4):
        for model, optimizer in ((flat, one), (scattered, other)):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(flat, scattered)


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"foreach": True}, {"foreach": False}],
    ids=["fused", "foreach", "single"],
)
def test_with_optimizers_of_torch(options):
    flat, scattered = network(), network()
    scattered.load_state_dict(flat.state_dict())
    one = torch.optim.AdamW(flatten_parameters(flat.parameters()), lr=1e-2, **options)
    other = torch.optim.AdamW(scattered.parameters(), lr=1e-2, **options)
    for step in range(4):
        for model, optimizer in ((flat, one), (scattered, other)):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    for p, q in zip(flat.parameters(), scattered.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert_flat(one)


# --------------------------------------------------------------------------- gradients


ZEROING = {
    "optimizer, None": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model, None": lambda model, optimizer: model.zero_grad(),
    "model, zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "one by one": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


@pytest.mark.parametrize("zero", ZEROING.values(), ids=ZEROING)
def test_zero_grad(zero):
    pair = twins()
    for step in range(4):
        for model, optimizer in pair:
            zero(model, optimizer)
            backward(model, step)
            optimizer.step()
        for p, q in zip(pair[0][0].parameters(), pair[1][0].parameters(), strict=True):
            assert_same_bits(p.grad, q.grad, f"step {step}")
    assert_same_models(pair[0][0], pair[1][0])
    assert_flat(pair[0][1])
    pair[0][1].zero_grad()
    assert all(p.grad is None for p in pair[0][0].parameters())
    assert only(pair[0][1]).grad is None


def test_backward_moves_gradients_before_anyone_asks():
    # Or all fresh gradients would be there at once, next to the buffer.
    (model, optimizer), _ = twins()
    backward(model, 0)
    homes = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
    assert homes == {only(optimizer).grad.data_ptr()}


def test_gradients_accumulate():
    pair = twins()
    for step in range(3):
        for model, optimizer in pair:
            for micro in range(3):
                backward(model, 10 * step + micro)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(pair[0][0], pair[1][0])


@pytest.mark.parametrize("where", ["members", "vector"])
def test_clipping(where):
    pair = twins()
    for step in range(3):
        for model, optimizer in pair:
            backward(model, step)
            if where == "members" or optimizer is pair[1][1]:
                clipped = [*model.parameters()]
            else:
                clipped = [only(optimizer)]
            nn.utils.clip_grad_norm_(clipped, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(pair[0][0].parameters(), pair[1][0].parameters(), strict=True):
        # The norm of one vector is summed in another order than that of several.
        if where == "members":
            assert_same_bits(p, q)
        else:
            torch.testing.assert_close(p, q)


def test_clipping_inside_the_step():
    pair = twins(max_grad_norm=0.1)
    for step in range(3):
        for model, optimizer in pair:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        (_, one), (_, other) = pair
        torch.testing.assert_close(one.grad_norm, other.grad_norm)
    for p, q in zip(pair[0][0].parameters(), pair[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q)  # the norm's sum is in another order


def test_gradients_put_there_by_hand():
    pair = twins()
    for step in range(3):
        for model, optimizer in pair:
            backward(model, step)
            for p in model.parameters():
                p.grad = p.grad * 0.5  # a new tensor
            optimizer.step()
    assert_same_models(pair[0][0], pair[1][0])
    assert_flat(pair[0][1])

    (model, optimizer), _ = pair
    flat = only(optimizer)
    flat.grad = None
    flat.grad = torch.arange(flat.numel()).float()
    assert_same_bits(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), flat.grad)
    with pytest.raises(RuntimeError, match=r"gradient of shape \(2,\).*flat parameter of shape"):
        flat.grad = torch.ones(2)


def test_gradients_that_were_there_before():
    scattered = network()
    backward(scattered, 0)
    grads = [p.grad.clone() for p in scattered.parameters()]
    [flat] = flatten_parameters(scattered.parameters())
    assert_all_same_bits(flat.views(flat.grad), grads, "gradients")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_double_backward():
    (flat, optimizer), (scattered, _) = twins(lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh()))
    for model in (flat, scattered):
        torch.manual_seed(_seed)
        model(torch.randn(5, 6)).square().sum().backward(create_graph=True)
        penalty = sum(p.grad.square().sum() for p in model.parameters())
        penalty.backward()
    flat_grads = [p.grad for p in flat.parameters()]
    assert_all_same_bits(flat_grads, [p.grad for p in scattered.parameters()], "gradients")
    optimizer.step()
    assert_flat(optimizer)


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    pair = twins()
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in pair]
    before = copy.deepcopy(pair[0][0])
    for step in range(3):
        for (model, optimizer), scaler in zip(pair, scalers, strict=True):
            torch.manual_seed(_seed + step)
            scaler.scale(model(torch.randn(5, 6)).square().sum()).backward()
            if overflow:
                next(model.parameters()).grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_models(pair[0][0], pair[1][0])
    assert scalers[0].get_scale() == scalers[1].get_scale() == (8.0 if overflow else 64.0)
    if overflow:
        assert_same_models(pair[0][0], before)


def test_unscaled_and_clipped():
    pair = twins()
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in pair]
    for step in range(3):
        for (model, optimizer), scaler in zip(pair, scalers, strict=True):
            torch.manual_seed(_seed + step)
            scaler.scale(model(torch.randn(5, 6)).square().sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_models(pair[0][0], pair[1][0])


@pytest.mark.parametrize("as_view", [False, True], ids=["copied", "gradient_as_bucket_view"])
def test_distributed_data_parallel(as_view):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    pair = twins()
    # It hung once, on a busy machine: whatever waits then says so in a minute, not in half an hour.
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1)
    )
    try:
        wrapped = [
            nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
            for model, _ in pair
        ]
        for step in range(3):
            for model, (_, optimizer) in zip(wrapped, pair, strict=True):
                backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
        # What reduces gradients goes before the group that it does so with, and not whenever garbage is
        # collected.
        del wrapped, model
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_models(pair[0][0], pair[1][0])


def test_a_missing_gradient_is_refused():
    (model, optimizer), (scattered, other) = twins()
    for step in range(2):
        for m, o in ((model, optimizer), (scattered, other)):
            backward(m, step)
            o.step()
            o.zero_grad()
    for m in (model, scattered):
        backward(m, 2)
        m[3].weight.grad = m[3].bias.grad = None
    before = copy.deepcopy((model, optimizer.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"no gradient for parameter 2 of group 0, parameter 3 of group 0, where"
    ):
        optimizer.step()
    assert_same_models(model, before[0])
    assert_same_bits(optimizer.state_dict()["state"][0]["exp_avg"], before[1]["state"][0]["exp_avg"])
    # What the message offers: a gradient of zeros is ranked, and m decays.
    for m, o in ((model, optimizer), (scattered, other)):
        for p in m[3].parameters():
            p.grad = torch.zeros_like(p)
        o.step()
    assert_same_models(model, scattered)


def test_names_in_messages():
    model = network()
    [flat] = flatten_parameters(model.named_parameters())
    backward(model, 0)
    model[3].bias.grad = None
    with pytest.raises(RuntimeError, match=r"no gradient for 3\.bias, where"):
        _ = flat.grad


@pytest.mark.parametrize("touched", ["sparse", "shape"])
def test_gradients_that_do_not_fit(touched):
    model = nn.Embedding(5, 3, sparse=touched == "sparse")
    [flat] = flatten_parameters(model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    if touched == "sparse":
        assert model.weight.grad.is_sparse
        with pytest.raises(RuntimeError, match=r"gradient of weight has the layout torch.sparse_coo"):
            _ = flat.grad
    else:
        model.weight.grad.data = torch.ones(2, 3)
        with pytest.raises(RuntimeError, match=r"gradient of weight has shape \(2, 3\)"):
            _ = flat.grad


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    address = model[0].weight.data_ptr()
    optimizer = RoseFusedAdamW(flatten_parameters(model.parameters()), lr=1e-2)
    assert model[0].weight not in set(only(optimizer).members)
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(model[0].weight.detach(), before)
    assert model[0].weight.data_ptr() == address
    # Frozen later, it has no gradient any more.
    model[3].bias.requires_grad_(False)
    backward(model, 2)
    with pytest.raises(RuntimeError, match=r"parameter 3 of group 0, where.*freeze nothing after"):
        optimizer.step()


def test_unfrozen_later():
    model = network()
    model[0].requires_grad_(False)
    optimizer = RoseFusedAdamW(flatten_parameters(model.parameters()), lr=1e-2)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": flatten_parameters(model[0].parameters())})
    before = copy.deepcopy(model)
    backward(model, 0)
    optimizer.step()
    assert not any(
        torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert_flat(optimizer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).relu())


def test_tied_weights():
    pair = twins(Tied)
    assert only(pair[0][1]).numel() == 42
    for step in range(3):
        for model, optimizer in pair:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_models(pair[0][0], pair[1][0])
    assert pair[0][0].head.weight is pair[0][0].embed.weight


# --------------------------------------------------------------------------- state


def trained(steps: int = 3, **options):
    (model, optimizer), _ = twins(**options)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def go_on(model: nn.Module, optimizer: RoseFusedAdamW) -> None:
    for step in range(100, 103):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("state_dtype", [FLOAT, BF16], ids=str)
def test_checkpoint_resumes_bit_for_bit(state_dtype):
    model, optimizer = trained(state_dtype=state_dtype)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    again = RoseFusedAdamW(
        flatten_parameters(resumed.parameters()), lr=1e-2, weight_decay=0.1, state_dtype=state_dtype
    )
    resumed.load_state_dict(saved["model"])  # after flattening: into the vector
    again.load_state_dict(saved["optimizer"])
    go_on(model, optimizer)
    go_on(resumed, again)
    assert_same_models(model, resumed)
    assert_flat(again)


def test_model_state_dict_is_as_before():
    model, _ = trained()
    ordinary = network()
    ordinary.load_state_dict(model.state_dict())
    assert_same_models(model, ordinary)
    assert list(model.state_dict()) == list(ordinary.state_dict())


def test_loading_a_model_reaches_the_optimizer():
    model, optimizer = trained()
    other = network()
    model.load_state_dict(other.state_dict())
    assert_same_bits(
        only(optimizer).detach(), torch.cat([p.detach().reshape(-1) for p in other.parameters()])
    )
    assert_flat(optimizer)


MOVES = {
    "to(dtype)": lambda model: model.bfloat16(),
    "to(dtype) and back": lambda model: model.double().float(),
    "data": lambda model: setattr(model[3].bias, "data", model[3].bias.data.clone()),
    "flattened again": lambda model: flatten_parameters(model.parameters()),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_moved_parameters_are_refused(move, when):
    model, optimizer = trained()
    if when == "after backward":
        backward(model, 9)
    kept = move(model)
    if when == "before backward":
        backward(model, 9)
    before = copy.deepcopy((model, optimizer.state_dict()))
    with pytest.raises(
        RuntimeError, match=r"of group 0 is no longer a view of its flat parameter.*call flatten_param"
    ):
        optimizer.step()
    assert_same_models(model, before[0])
    assert_same_bits(optimizer.state_dict()["state"][0]["exp_avg"], before[1]["state"][0]["exp_avg"])
    # What the message says helps.
    again = RoseFusedAdamW(flatten_parameters(model.parameters()), lr=1e-2, weight_decay=0.1)
    again.load_state_dict(optimizer.state_dict())
    model.zero_grad()
    scattered = copy.deepcopy(model)
    other = RoseFusedAdamW(scattered.parameters(), lr=1e-2, weight_decay=0.1)
    moments = {
        key: only(again).views(value) if value.dim() else [value] * len(only(again).members)
        for key, value in again.state[only(again)].items()
    }
    parts = {i: {key: values[i] for key, values in moments.items()} for i in range(4)}
    other.load_state_dict({"state": parts, "param_groups": other.state_dict()["param_groups"]})
    go_on(model, again)
    go_on(scattered, other)
    assert_same_models(model, scattered)
    del kept


def test_a_move_to_where_it_is_changes_nothing():
    pair = twins()
    for step in range(2):
        for model, optimizer in pair:
            model.to(FLOAT).to("cpu")
            backward(model, step)
            optimizer.step()
    assert_same_models(pair[0][0], pair[1][0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer(how):
    model, optimizer = trained()
    if how == "deepcopy":
        other, again = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other, again = torch.load(file, weights_only=False)
    assert [id(p) for p in other.parameters()] == [id(p) for p in only(again).members]
    assert only(again).data_ptr() != only(optimizer).data_ptr()
    go_on(model, optimizer)
    go_on(other, again)
    assert_same_models(model, other)
    assert_flat(again)
    assert_flat(optimizer)


def test_a_copy_of_the_model_alone_is_ordinary():
    model, optimizer = trained()
    other = copy.deepcopy(model)
    before = copy.deepcopy(other)
    go_on(model, optimizer)
    assert_same_models(other, before)
    backward(other, 0)
    assert len({p.grad.untyped_storage().data_ptr() for p in other.parameters()}) == 4
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in other.parameters())


def test_nothing_is_left_when_the_optimizer_is_gone():
    model, optimizer = trained()
    reference = weakref.ref(only(optimizer))
    del optimizer
    gc.collect()
    assert reference() is None
    backward(model, 0)
    assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == 4


def test_backward_through_an_old_graph_is_refused():
    (model, optimizer), _ = twins()
    loss = model(torch.randn(5, 6)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --------------------------------------------------------------------------- refusals


def shared() -> list[nn.Parameter]:
    whole = torch.randn(6, 4)
    return [nn.Parameter(torch.randn(3)), nn.Parameter(whole), nn.Parameter(whole[2:3])]


def twice() -> list[nn.Parameter]:
    p = nn.Parameter(torch.randn(3))
    return [p, nn.Parameter(torch.randn(2)), p]


REFUSED = {
    "twice": (twice, ValueError, "parameter 2 of group 0 is there twice"),
    "shared memory": (shared, ValueError, "parameter 1 of group 0 and parameter 2 of .* share memory"),
    "a dtype": (lambda: [torch.float32], TypeError, "parameter 0 of group 0 is a dtype"),
    "a set": (lambda: [{"params": {nn.Parameter(torch.ones(2))}}], TypeError, "have no order"),
    "no leaf": (lambda: [nn.Parameter(torch.ones(2)) * 2], ValueError, "computed from other tensors"),
    "meta": (lambda: [nn.Parameter(torch.ones(2, device="meta"))], ValueError, "no memory yet"),
    "lazy": (lambda: nn.LazyLinear(3).parameters(), ValueError, "no memory yet"),
    "expanded": (lambda: [nn.Parameter(torch.ones(1).expand(4))], ValueError, r"use \.contiguous\(\)"),
    "flat": (lambda: flatten_parameters([nn.Parameter(torch.ones(2))]), TypeError, "is flat already"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, error, message):
    params = [*make()]
    first = nn.Parameter(torch.randn(5))
    address = first.data_ptr()
    if isinstance(params[0], dict):
        given = [{"params": [first]}, *params]
    else:
        given = [{"params": params}, {"params": [first]}]
    with pytest.raises(error, match=message):
        flatten_parameters(given)
    assert first.data_ptr() == address  # nothing was changed


def test_a_model_is_not_a_list_of_parameters():
    with pytest.raises(TypeError, match="parameter 0 of group 0 is a Linear; expected a parameter"):
        flatten_parameters(network())
    with pytest.raises(ValueError, match="empty parameter list"):
        RoseFusedAdamW(flatten_parameters(network().requires_grad_(False).parameters()))


def test_tensor_granularity_has_no_tensors():
    flat = flatten_parameters(network().parameters())
    with pytest.raises(ValueError, match=r"granularity='tensor'.*before flatten_parameters"):
        RoseFusedAdamW(flat, granularity="tensor")
