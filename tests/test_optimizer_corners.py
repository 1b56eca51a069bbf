"""Corners of the optimizer that only mutants of its code have shown to be untested."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from seeded import changed, parameters, set_gradients, train
from support import assert_all_same_bits, assert_same_bits
from torch import nn

from rose_ops import RoseFusedAdamW, flatten_parameters, memory, reference, rose_backward, wrappers

# ------------------------------------------------------------------------------------ the warm-up


def test_unfreezing_does_not_begin_the_warm_up_anew():
    """A parameter without state, among others that have some, is new; the training is not."""
    p, late = parameters((300,), (200,))
    optimizer = RoseFusedAdamW([p, late], lr=0.1, selection_warmup_steps=3)
    train(optimizer, [p], 4)
    assert changed(optimizer, [p, late], 4) == 180 + 200  # of p, 0.6; late has no history: all


def test_clearing_the_state_begins_the_warm_up_anew():
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1, selection_warmup_steps=2)
    train(optimizer, [p], 3)
    assert changed(optimizer, [p], 3) == 180
    optimizer.state.clear()
    assert changed(optimizer, [p], 4) == 300
    assert changed(optimizer, [p], 5) == 300
    assert changed(optimizer, [p], 6) == 180


def test_a_loaded_optimizer_is_past_its_warm_up():
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1, selection_warmup_steps=2)
    train(optimizer, [p], 3)
    other = RoseFusedAdamW([p], lr=0.1, selection_warmup_steps=2)
    other.load_state_dict(optimizer.state_dict())
    assert changed(other, [p], 3) == 180


# ----------------------------------------------------------------------------------- masks, draws


def test_a_second_capture_drops_masks_of_the_first():
    """Of a parameter that the second one does not see, there is no mask: it is updated whole."""
    p, q = parameters((300,), (200,))
    optimizer = RoseFusedAdamW([p, q], lr=0.1, order="first")
    set_gradients([p, q], 0)
    optimizer.capture("first")
    set_gradients([p], 1)
    optimizer.capture("first")
    assert changed(optimizer, [p, q], 2) == 180 + 200


def test_a_loaded_mask_is_a_copy():
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1, order="first")
    set_gradients([p], 0)
    optimizer.capture("first")
    saved = optimizer.state_dict()
    other = RoseFusedAdamW([p], lr=0.1, order="first")
    other.load_state_dict(saved)
    saved["state"][0]["first_mask"].zero_()
    assert changed(other, [p], 1) == 180


@pytest.mark.parametrize("selection", ["bracket", "approx"])
def test_every_step_has_a_draw_of_its_own(monkeypatch, selection):
    """Brackets of two steps, or of two runs, that missed for one sample would be no accident."""
    draws = {"step_": [], "rank_": []}
    for name, found in draws.items():
        original = getattr(reference, name)
        arguments = [*inspect.signature(original).parameters]

        def recording(*args, original=original, found=found, arguments=arguments):
            named = dict(zip(arguments, args, strict=False))  # dtype is left out
            mode, *_, draw = named["ranking"]
            found.append(draw)
            assert mode == reference.Mode[selection.upper()]
            return original(*args)

        monkeypatch.setattr(reference, name, recording)
    for seed in (0, 1):
        (p,) = parameters((300,))
        options = {"selection": selection, "order": "ensemble", "backend": "reference"}
        optimizer = RoseFusedAdamW([p], lr=0.1, seed=seed, **options)
        for step in range(3):
            set_gradients([p], step)
            optimizer.capture("first")
            train(optimizer, [p], 1, step + 10)
    for found in draws.values():
        assert len(found) == len(set(found)) == 6


def test_the_threshold_is_a_risk():
    """The largest that is kept, as a number, not as the bits that operators speak of."""
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1, order="first", selection="exact")
    set_gradients([p], 0)
    kth = p.grad.abs().sort().values[179]
    optimizer.capture("first")
    assert_same_bits(optimizer.selection["first"].threshold, kth)


def test_a_first_order_mask_of_scaled_gradients():
    """What is scaled out of the range of floats is unscaled before it is ranked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = RoseFusedAdamW(model.parameters(), order="first")
    told = []
    capture = optimizer.capture
    optimizer.capture = lambda *args, **options: (told.append(options), capture(*args, **options))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    rose_backward(model, x, y, optimizer, scaler=scaler)
    assert [options["grad_scale"].item() for options in told] == [8.0]


def test_zeros_at_a_learning_rate_make_no_state():
    """A first step without a mask is an error, unless nothing at all would be changed by it."""
    (p,) = parameters((300,))
    optimizer = RoseFusedAdamW([p], lr=0.1, order="first")
    p.grad = torch.zeros(300)
    with pytest.raises(RuntimeError, match="needs a first-order mask"):
        optimizer.step()


# ----------------------------------------------------------------------------- groups and layouts


def test_a_gradient_that_only_another_process_has(monkeypatch):
    """Counts as zero here, and half of the sum of two processes is the average."""

    def all_reduce(x, op=None, group=None):
        if x.dtype == torch.uint8:  # which gradients there are: the other process has all
            x.fill_(1)

    monkeypatch.setattr(wrappers.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(wrappers.dist, "all_reduce", all_reduce)
    module = nn.Linear(4, 3)
    module.weight.grad = torch.full((3, 4), 6.0)
    wrappers._average_(
        SimpleNamespace(
            process_group=None, parameters_to_ignore=(), module=module, bucket_bytes_cap=1 << 20
        )
    )
    assert module.weight.grad.eq(3).all()
    assert module.bias.grad.eq(0).all()


def test_elements_are_counted_in_memory_order():
    """Stochastic rounding of a transposed view is that of the vector that it shows."""
    generator = torch.Generator().manual_seed(3)
    data, grads = (torch.randn(6 * 5 * 4, generator=generator).bfloat16() for _ in range(2))
    results = []
    for view in (lambda x: x, lambda x: x.view(6, 5, 4).permute(2, 0, 1)):
        memory_of_p = data.clone()
        p = nn.Parameter(view(memory_of_p))
        optimizer = RoseFusedAdamW([p], lr=0.1, param_rounding="stochastic", upper=1.0, seed=5)
        for _ in range(3):
            p.grad = view(grads.clone())
            optimizer.step()
        results.append(memory_of_p)
    assert_same_bits(*results, "memory of the parameters")


def test_moments_in_one_buffer():
    """Large ones lie in one, each in a place of its own, from a cache line on, in its memory order."""
    shapes = [(1 << 20, 3), (5,), (7, 3, 5, 2)]
    tensors = [torch.empty(shape) for shape in shapes]
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    found = memory.zeros_like(tensors, torch.float32)
    for i, x in enumerate(found):
        x.fill_(i + 1)
    for i, (x, like) in enumerate(zip(found, tensors, strict=True)):
        assert x.eq(i + 1).all()
        assert x.data_ptr() % 64 == 0
        assert x.stride() == like.stride()


def test_the_norm_to_clip_to_is_of_unscaled_gradients():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer = torch.optim.SGD(model.parameters())
        losses = rose_backward(model, x, y, optimizer, scaler=scaler, max_grad_norm=0.01)
        factor = 1.0 if scaler is None else 0.125
        results.append([losses.grad_norm, *(p.grad * factor for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_a_dimension_of_size_1_may_have_any_stride():
    """A stride of 0 shares nothing where there is one element."""
    data = torch.randn(4, 6)[:, ::2]
    p = nn.Parameter(data.as_strided((1, 4, 3), (0, 6, 2)))
    optimizer = RoseFusedAdamW([p], lr=0.1)
    train(optimizer, [p], 2)


def test_neighbours_of_two_dtypes():
    """In one buffer, one right after the other: they share nothing."""
    buffer = torch.randn(40)
    params = [nn.Parameter(buffer[:16]), nn.Parameter(buffer[16:28].view(torch.bfloat16))]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    for its in (params, others):
        train(RoseFusedAdamW(its, lr=0.1), its, 2)
    assert_all_same_bits(params, others, "params")


def test_moments_of_a_second_flat_group():
    """Also of moments that are a part of something: by their place in the storage."""
    a, b, c = parameters((7, 3), (5,), (4, 2))
    flat = flatten_parameters([{"params": [a]}, {"params": [b, c]}])
    optimizer = RoseFusedAdamW(flat, lr=0.1)
    train(optimizer, [a, b, c], 3)
    second = flat[1]["params"][0]
    moments = torch.cat([optimizer.state[f["params"][0]]["exp_avg"] for f in flat])
    whole = second.views(optimizer.state[second]["exp_avg"])
    part = second.views(moments[a.numel() :])
    assert_all_same_bits(part, whole, "views of moments")
    other = parameters((7, 3), (5,), (4, 2))
    plain = RoseFusedAdamW(other, lr=0.1)
    train(plain, other, 3)
    assert_all_same_bits(whole, [plain.state[p]["exp_avg"] for p in other[1:]], "moments")


@pytest.mark.parametrize("order", ["first", "second"])
def test_whole_tensors_behind_plain_ones_by_scaled_and_clipped_norms(order):
    """A scale of the gradients is not one of the moments, and norms are those of what is ranked."""
    shapes = [(20,), (30,), (7, 5), (11,), (40,), (13,), (17,)]
    results = []
    for scale in (None, 8.0):
        params = parameters(*shapes)
        groups = [{"params": params[:2], "selective": False}, {"params": params[2:]}]
        optimizer = RoseFusedAdamW(groups, lr=0.1, order=order, granularity="tensor", max_grad_norm=3.0)
        for step in range(6):
            if order == "first":
                set_gradients(params, 100 + step)
                optimizer.capture("first")
            set_gradients(params, step)
            if scale is not None:
                for p in params:
                    p.grad *= scale
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            before = [p.detach().clone() for p in params]
            optimizer.step()
            updated = [bool((p != q).any()) for p, q in zip(params, before, strict=True)]
            assert updated[:2] == [True, True]
            if step > 0 or order == "first":
                assert sum(updated[2:]) == 3
        results.append([p.detach() for p in params])
    assert_all_same_bits(*results, "params")


# --------------------------------------------------------------------------------------- the loss


def test_leftovers_of_parameters_that_only_the_optimizer_has():
    """Such as a head that the forward function calls: its gradients would be in the masks, too."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3))
    head = nn.Linear(16, 3)
    optimizer = RoseFusedAdamW([*body.parameters(), *head.parameters()], order="first")
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def forward(model, inputs):
        return head(model(inputs))

    head.weight.grad = torch.ones_like(head.weight)
    with pytest.raises(ValueError, match=r"have a \.grad already"):
        rose_backward(body, x, y, optimizer, forward=forward)
    head.weight.grad = None
    torch.manual_seed(1)
    rose_backward(body, x, y, optimizer, forward=forward)
    # What is left is of the loss alone: the KL gradient is gone from the head, too.
    torch.manual_seed(1)
    expected = torch.stack([F.cross_entropy(head(body(x)), y) for _ in range(2)]).mean()
    (gradient,) = torch.autograd.grad(expected, [head.weight])
    assert_same_bits(head.weight.grad, gradient, "gradient of the head")
