"""The contract of ``RoseFusedAdamW`` as a ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from support import assert_all_same_bits, assert_same_bits, tensor_norms
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from training import (
    GRANULARITIES,
    ORDERS,
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

from rose_ops import (
    RoseFusedAdamW,
    Selection,
    UpdateCounts,
    definitions,
    portable,
    reference,
    rose_param_groups,
)
from rose_ops.definitions import Field

each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def assert_same_selection(one: RoseFusedAdamW, other: RoseFusedAdamW, *kinds: str) -> None:
    for kind in kinds or (*one.settings.kinds, "update"):
        for a, b in zip(one.selection[kind], other.selection[kind], strict=True):
            assert_same_bits(a, b, f"selection[{kind!r}]")  # a threshold may be NaN


class ByHand:
    """ROSE put together from the functions of reference.py, one call after the other.

    Args:
        params: start values. groups: of each parameter, the row in ``options``.
        options: of each group. settings: as those of the optimizer.
    """

    def __init__(self, params, groups=None, options=({},), **settings: Any) -> None:
        self.params = [p.detach().clone() for p in params]
        self.groups = [0] * len(self.params) if groups is None else groups
        defaults = {
            "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01,
            "maximize": False, "selective": True,
        }  # fmt: skip
        self.options = [{**defaults, **option} for option in options]
        self.settings = {
            "order": "second", "upper": 0.6, "lower": 0.0, "gamma": 0.5, "granularity": "element",
            "inactive": "update", **settings,
        }  # fmt: skip
        zeros = [torch.zeros(p.shape) for p in self.params]
        self.exp_avgs, self.exp_avg_sqs = zeros, [z.clone() for z in zeros]
        self.steps = [torch.zeros(()) for _ in self.params]
        self.records: dict[str, Tensor] = {}

    def hyper(self) -> Tensor:
        return torch.tensor(
            [
                [
                    *o["betas"],
                    o["eps"],
                    o["weight_decay"],
                    -1.0 if o["maximize"] else 1.0,
                    o["selective"],
                ]
                for o in self.options
            ],
            dtype=torch.float64,
        )

    def masks(self, kind: str, grads: list[Tensor | None]) -> list[Tensor]:
        """Of every parameter; empty (everything) where there is none."""
        masks = [torch.empty(0, dtype=torch.uint8) for _ in grads]
        ranked = [
            i
            for i, g in enumerate(grads)
            if g is not None and self.options[self.groups[i]]["selective"]
        ]

        def fraction(name: str) -> int:
            value = self.settings[name]
            if isinstance(value, tuple):
                value = value[kind == "second"]
            return round(value * definitions.FRACTION_UNIT)

        rank_inactive = self.settings["inactive"] == "rank"
        gs = [grads[i] for i in ranked]
        ms = [self.exp_avgs[i] for i in ranked] if kind == "second" else []
        rows = torch.tensor([self.groups[i] for i in ranked])
        if self.settings["granularity"] == "tensor":
            alpha = (1.0 - self.hyper()[rows, 0]).float()
            norms = tensor_norms(reference, gs, None)
            m_norms = tensor_norms(reference, ms, None) if kind == "second" else None
            chosen, record = portable.select_tensors(
                norms, m_norms, alpha, fraction("upper"), fraction("lower"), rank_inactive
            )
            found = list(chosen.unbind())
        else:
            found = [torch.empty((g.numel() + 7) // 8, dtype=torch.uint8) for g in gs]
            ranking = [reference.Mode.EXACT, fraction("upper"), fraction("lower"), rank_inactive, 0]
            record = reference.rank_(found, gs, ms, self.hyper(), rows, None, None, None, ranking)
        self.records[kind] = record
        for i, mask in zip(ranked, found, strict=True):
            masks[i] = mask
        return masks

    def step(self, grads: list[Tensor | None], masks: dict[str, list[Tensor]] | None) -> Tensor:
        """``masks=None``: plain AdamW."""
        here = [i for i, g in enumerate(grads) if g is not None]

        def of(tensors: list[Any]) -> list[Any]:
            return [tensors[i] for i in here]

        hyper = self.hyper()
        if masks is None:
            hyper[:, reference.Hyper.SELECTIVE] = 0
            masks = {}
        sizes = torch.tensor([p.numel() for p in self.params])
        result = reference.step_(
            of(self.params), of(grads), of(self.exp_avgs), of(self.exp_avg_sqs), of(self.steps),
            of(masks["first"]) if "first" in masks else [],
            of(masks["second"]) if "second" in masks else [], None,
            torch.tensor([float(o["lr"]) for o in self.options], dtype=torch.float64), hyper,
            torch.tensor(of(self.groups)), (sizes.cumsum(0) - sizes)[here], None, None,
            None, self.settings["gamma"], [], [0, False],
        )  # fmt: skip
        return result[reference.Field.SIZE :]

    def rose(self, grads: list[Tensor | None], kl_grads: list[Tensor | None]) -> Tensor:
        """One step of the order."""
        masks = {}
        if self.settings["order"] != "second":
            masks["first"] = self.masks("first", kl_grads)
        if self.settings["order"] != "first":
            masks["second"] = self.masks("second", grads)
        return self.step(grads, masks)

    def assert_equals(self, optimizer: RoseFusedAdamW, params: list[nn.Parameter]) -> None:
        """Moments bit for bit; parameters too, if the optimizer runs the same code."""
        for i, p in enumerate(params):
            state = optimizer.state.get(p)
            if state is None:
                assert self.steps[i] == 0
                assert_same_bits(p.detach(), self.params[i], f"params[{i}]")
                continue
            assert_same_bits(state["step"], self.steps[i], f"step[{i}]")
            assert_same_bits(state["exp_avg"], self.exp_avgs[i], f"exp_avg[{i}]")
            assert_same_bits(state["exp_avg_sq"], self.exp_avg_sqs[i], f"exp_avg_sq[{i}]")
            if optimizer.settings.backend == "reference":
                assert_same_bits(p.detach(), self.params[i], f"params[{i}]")
            else:
                torch.testing.assert_close(p.detach(), self.params[i])


# ---------------------------------------------------------------------------- what a step computes

GROUPS = (
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.3},
    {"betas": (0.95, 0.99), "weight_decay": 0.2, "selective": False, "maximize": True},
)
ROWS = [0, 0, 1, 1, 2, 2]


@pytest.mark.thin(3)
@each_backend
@each_granularity
@each_order
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"upper": 0.7, "lower": 0.2, "gamma": 0.3}, id="lower-gamma"),
        pytest.param({"upper": (0.3, 0.8), "lower": (0.1, 0.0)}, id="pairs"),
        pytest.param({"upper": (1.0, 0.5)}, id="first-keeps-all"),
        pytest.param({"inactive": "rank"}, id="rank-inactive"),
    ],
)
def test_steps_are_those_of_the_reference(order, granularity, settings, backend, generator):
    """Parameter groups with options of their own, in every order, over seven steps."""
    settings = {"order": order, "granularity": granularity, **settings}
    params = parameters(generator)
    expected = ByHand(params, ROWS, GROUPS, **settings)
    groups = [
        {"params": [p for p, r in zip(params, ROWS, strict=True) if r == row], **options}
        for row, options in enumerate(GROUPS)
    ]
    optimizer = RoseFusedAdamW(groups, backend=backend, **settings)
    for step in range(7):
        kl = gradients(params, generator)
        grads: list[Tensor | None] = list(gradients(params, generator))
        grads[1] = None if step in (0, 5) else grads[1]
        kl_grads = [None if g is None else k for g, k in zip(grads, kl, strict=True)]
        counts = expected.rose(grads, kl_grads)
        masked_step(optimizer, params, grads, kl_grads)
        expected.assert_equals(optimizer, params)

        kinds = () if optimizer.settings.is_adamw else optimizer.settings.kinds
        assert set(optimizer.selection) == {*kinds, "update"}
        for kind in kinds:
            found, record = optimizer.selection[kind], expected.records[kind]
            assert isinstance(found, Selection)
            high = record[Field.HIGH].to(torch.int32).view(torch.float32)
            assert_same_bits(found.threshold, high, "threshold")
            for name in ("kept", "ranked", "inactive", "nonfinite", "misses"):
                value = getattr(found, name)
                assert value.shape == ()
                assert value == record[Field[name.upper()]], name
        assert optimizer.selection["update"] == UpdateCounts(*counts)


@each_backend
def test_an_r_drop_step_captures_both_masks_and_updates_with_another_gradient(backend, generator):
    params = parameters(generator)
    expected = ByHand(params, order="ensemble", gamma=0.3)
    optimizer = RoseFusedAdamW(params, order="ensemble", gamma=0.3, backend=backend)
    for _ in range(5):
        kl, ce = gradients(params, generator), gradients(params, generator)
        aggregate = [c + 0.5 * k for c, k in zip(ce, kl, strict=True)]
        masks = {"first": expected.masks("first", kl), "second": expected.masks("second", ce)}
        expected.step(aggregate, masks)

        give(params, kl)
        optimizer.capture("first")
        give(params, ce)
        optimizer.capture("second", clear=False)
        assert all(p.grad is not None for p in params)
        give(params, aggregate)
        optimizer.step()
        expected.assert_equals(optimizer, params)


@each_granularity
def test_a_second_order_mask_captured_beforehand_is_the_one_that_step_finds(granularity, generator):
    params = parameters(generator)
    other_params = clones(params)
    kwargs = {"granularity": granularity, "weight_decay": 0.1}
    optimizer, other = RoseFusedAdamW(params, **kwargs), RoseFusedAdamW(other_params, **kwargs)
    for _ in range(6):
        grads = gradients(params, generator)
        give(params, grads)
        optimizer.step()
        give(other_params, grads)
        other.capture("second", clear=False)
        other.step()
        assert_same_training(optimizer, params, other, other_params)
        assert_same_selection(optimizer, other)


@each_order
def test_groups_that_are_not_selective_are_plain_adamw(order, generator):
    """Bit for bit the run with upper=1, whatever the selective groups do beside it."""
    params = parameters(generator)
    plain = clones(params[3:])
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = RoseFusedAdamW(
        [{"params": params[:3]}, {"params": params[3:], "selective": False}], order=order, **options
    )
    adamw = RoseFusedAdamW(plain, upper=1, **options)
    for _ in range(10):
        grads = gradients(params, generator)
        masked_step(optimizer, params, grads, gradients(params, generator))
        give(plain, grads[3:])
        adamw.step()
        assert_same_training(optimizer, params[3:], adamw, plain)
        assert optimizer.selection[order if order == "first" else "second"].ranked <= 7 * 5 + 5 + 24


@each_order
def test_selective_groups_do_not_see_the_others(order, generator):
    """The ranking is that of an optimizer without the groups that are not selective."""
    params = parameters(generator)
    alone_params = clones(params[:3])
    optimizer = RoseFusedAdamW(
        [{"params": params[:3]}, {"params": params[3:], "selective": False}],
        order=order,
        weight_decay=0.1,
    )
    alone = RoseFusedAdamW(alone_params, order=order, weight_decay=0.1)
    for _ in range(5):
        grads, kl = gradients(params, generator), gradients(params, generator)
        masked_step(optimizer, params, grads, kl)
        masked_step(alone, alone_params, grads[:3], kl[:3])
        assert_same_training(optimizer, params[:3], alone, alone_params)
        assert_same_selection(optimizer, alone, *alone.settings.kinds)


@each_order
def test_an_optimizer_without_selective_groups_needs_no_masks(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW([{"params": params, "selective": False}], order=order)
    before = [p.detach().clone() for p in params]
    give(params, gradients(params, generator))
    optimizer.step()
    assert optimizer.selection["update"].updated == sum(p.numel() for p in params)
    assert not torch.equal(before[5], params[5])
    # A training loop that captures all the same is no error.
    train(optimizer, params, 2, generator)


def test_upper_1_is_the_same_in_every_order_and_granularity(generator):
    start = parameters(generator)
    runs = []
    for order in ORDERS:
        for granularity in GRANULARITIES:
            params = clones(start)
            optimizer = RoseFusedAdamW(
                params, upper=1, order=order, granularity=granularity, weight_decay=0.1
            )
            same = torch.Generator().manual_seed(7)
            for _ in range(4):
                give(params, gradients(params, same))
                optimizer.step()
            assert set(optimizer.selection) == {"update"}
            runs.append((optimizer, params))
    for optimizer, params in runs[1:]:
        assert_same_training(optimizer, params, *runs[0])


@pytest.mark.parametrize(
    ("order", "upper", "lower"),
    [("first", (1.0, 0.5), (0.0, 0.1)), ("second", (0.5, 1), 0.0), ("ensemble", (1, 1.0), (0, 0.0))],
)
def test_of_a_pair_only_what_the_order_uses_counts(order, upper, lower, generator):
    """So this keeps everything: it is AdamW, and a mask is not asked for."""
    params = parameters(generator)
    plain = clones(params)
    optimizer = RoseFusedAdamW(params, order=order, upper=upper, lower=lower, weight_decay=0.1)
    adamw = RoseFusedAdamW(plain, upper=1, weight_decay=0.1)
    for _ in range(3):
        grads = gradients(params, generator)
        for optim, own in ((optimizer, params), (adamw, plain)):
            give(own, grads)
            optim.step()
        assert_same_training(optimizer, params, adamw, plain)
    assert set(optimizer.selection) == {"update"}


@each_order
def test_warm_up_is_adamw_and_ignores_captures(order, generator):
    params = parameters(generator)
    plain = clones(params)
    optimizer = RoseFusedAdamW(params, order=order, selection_warmup_steps=3, weight_decay=0.1)
    adamw = RoseFusedAdamW(plain, upper=1, weight_decay=0.1)
    for step in range(3):
        grads = gradients(params, generator)
        if step != 1:  # captured or not
            give(params, gradients(params, generator))
            optimizer.capture("second" if order == "second" else "first")
            assert all(p.grad is None for p in params)
            assert not any(key.endswith("_mask") for s in optimizer.state.values() for key in s)
        give(params, grads)
        optimizer.step()
        give(plain, grads)
        adamw.step()
        assert_same_training(optimizer, params, adamw, plain, f"step {step}")
        assert set(optimizer.selection) == {"update"}
        # Steps without any gradient are none.
        optimizer.zero_grad()
        optimizer.step()

    give(params, gradients(params, generator))
    if order != "second":
        with pytest.raises(RuntimeError, match="first-order mask"):
            optimizer.step()
        optimizer.capture("first")
        give(params, gradients(params, generator))
    optimizer.step()
    assert set(optimizer.settings.kinds) < set(optimizer.selection)


@pytest.mark.parametrize("selection", ["exact", "bracket", "approx"])
def test_a_small_ranking_is_exact(selection, generator):
    p = nn.Parameter(torch.randn(4096, generator=generator))
    optimizer = RoseFusedAdamW([p], order="first", upper=0.25, selection=selection, weight_decay=0.1)
    p.grad = torch.randn(4096, generator=generator)
    magnitudes = p.grad.abs().sort().values
    optimizer.capture("first")
    found = optimizer.selection["first"]
    kth = magnitudes[1023]
    assert found.threshold == kth
    assert found.kept == (magnitudes <= kth).sum() == 1024


# --------------------------------------------------------------------------------- capturing masks


@pytest.mark.parametrize("order", ["first", "ensemble"])
def test_a_mask_serves_one_step(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order)
    train(optimizer, params, 2, generator)
    assert not any(key.endswith("_mask") for s in optimizer.state.values() for key in s)
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match=r'optimizer\.capture\("first"\)'):
        optimizer.step()


def test_a_step_without_gradients_uses_the_mask_up(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first")
    give(params, gradients(params, generator))
    optimizer.capture("first")
    optimizer.step()
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="first-order mask"):
        optimizer.step()


def test_a_second_capture_replaces_the_first(generator):
    params = parameters(generator)
    once = clones(params)
    optimizer, other = RoseFusedAdamW(params, order="first"), RoseFusedAdamW(once, order="first")
    give(params, gradients(params, generator))
    optimizer.capture("first")
    kl = gradients(params, generator)
    kl_of_some = [k if i != 2 else None for i, k in enumerate(kl)]  # its old mask must not stay
    grads = gradients(params, generator)
    masked_step(optimizer, params, grads, kl_of_some)
    masked_step(other, once, grads, kl_of_some)
    assert_same_training(optimizer, params, other, once)


def test_a_parameter_that_the_capture_did_not_see_is_updated(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", upper=0.2, lr=0.1)
    kl = gradients(params, generator)
    before = params[5].detach().clone()
    masked_step(optimizer, params, gradients(params, generator), [*kl[:5], None])
    assert (params[5] != before).all()
    assert optimizer.selection["first"].ranked + optimizer.selection["first"].inactive == sum(
        p.numel() for p in params[:5]
    )


def test_a_capture_that_saw_no_selective_parameter_is_one(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(
        [{"params": params[:3]}, {"params": params[3:], "selective": False}],
        order="first", upper=0.2, lr=0.1, weight_decay=0.1,
    )  # fmt: skip
    kl = [None if i < 3 else k for i, k in enumerate(gradients(params, generator))]
    masked_step(optimizer, params, gradients(params, generator), kl)
    assert "first" not in optimizer.selection
    assert optimizer.selection["update"].updated == sum(p.numel() for p in params)


def test_capture_clears_the_gradients_of_all_groups_unless_told_not_to(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(
        [{"params": params[:2]}, {"params": params[2:], "selective": False}], order="first"
    )
    grads = gradients(params, generator)
    give(params, grads)
    optimizer.capture("first", clear=False)
    assert_all_same_bits([p.grad for p in params], grads, "gradients")
    optimizer.capture("first")
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("kind", ["first", "second"])
@pytest.mark.parametrize("scale", [1024.0, 1000.0, 3.0])
@each_granularity
def test_a_capture_of_scaled_gradients_is_told_the_scale(granularity, scale, kind, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="ensemble", granularity=granularity)
    train(optimizer, params, 2, generator)
    other = copy.deepcopy(optimizer)
    other_params = [p for group in other.param_groups for p in group["params"]]
    scaled = [g * scale for g in gradients(params, generator)]
    inverse = torch.tensor(scale).double().reciprocal().float()
    give(params, scaled)
    optimizer.capture(kind, grad_scale=torch.tensor(scale))
    give(other_params, [g * inverse for g in scaled])
    other.capture(kind)
    assert_same_selection(optimizer, other, kind)
    key = f"{kind}_mask"
    assert_all_same_bits(
        [optimizer.state[p][key] for p in params], [other.state[p][key] for p in other_params], key
    )


def test_a_mask_takes_one_bit_per_element(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="ensemble")
    for kind in ("first", "second"):
        give(params, gradients(params, generator))
        optimizer.capture(kind)
        masks = [optimizer.state[p][f"{kind}_mask"] for p in params]
        assert [m.numel() for m in masks] == [(p.numel() + 7) // 8 for p in params]
        assert {m.dtype for m in masks} == {torch.uint8}
        # They lie in one allocation, and each is saved by itself.
        starts = [m.data_ptr() - masks[0].data_ptr() for m in masks if m.numel()]
        assert starts == list(accumulate((m.numel() for m in masks if m.numel()), initial=0))[:-1]
        assert [m.untyped_storage().nbytes() for m in masks] == [m.numel() for m in masks]


# --------------------------------------------------------------------------- which parameters step


@each_order
@each_granularity
def test_a_parameter_without_gradient_is_out_of_the_ranking_and_untouched(
    order, granularity, generator
):
    params = parameters(generator)
    others = clones(p for i, p in enumerate(params) if i != 2)
    kwargs = {"order": order, "granularity": granularity, "weight_decay": 0.1}
    optimizer, without = RoseFusedAdamW(params, **kwargs), RoseFusedAdamW(others, **kwargs)
    before = params[2].detach().clone()
    for _ in range(5):
        grads, kl = gradients(params, generator), gradients(params, generator)
        grads[2] = kl[2] = None
        masked_step(optimizer, params, grads, kl)
        masked_step(
            without, others, [g for g in grads if g is not None], [k for k in kl if k is not None]
        )
    assert_same_bits(params[2].detach(), before)
    assert params[2] not in optimizer.state
    kept = [p for i, p in enumerate(params) if i != 2]
    assert_same_training(optimizer, kept, without, others)
    assert_same_selection(optimizer, without)


def test_steps_are_counted_for_each_parameter(generator):
    params = parameters(generator)
    expected = ByHand(params)
    optimizer = RoseFusedAdamW(params)
    for step in range(6):
        grads = [g if step >= i else None for i, g in enumerate(gradients(params, generator))]
        expected.rose(grads, grads)
        give(params, grads)
        optimizer.step()
        expected.assert_equals(optimizer, params)
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 5, 4, 3, 2, 1]


def test_frozen_and_later_unfrozen(generator):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = RoseFusedAdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    first, last = model[0].weight, model[2].weight

    def step() -> None:
        model(torch.randn(9, 5, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model[0].requires_grad_(False)
    frozen = first.detach().clone()
    state = copy.deepcopy(optimizer.state[first])
    moving = last.detach().clone()
    step()
    step()
    assert_same_bits(first.detach(), frozen)
    assert state.keys() == optimizer.state[first].keys()
    assert_all_same_bits([*optimizer.state[first].values()], [*state.values()], "state")
    assert not torch.equal(last, moving)
    model[0].requires_grad_(True)
    step()
    assert not torch.equal(first, frozen)
    assert optimizer.state[first]["step"] == 2
    assert optimizer.state[last]["step"] == 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, generator):
    """A zero gradient takes part (its risk is 1), a gradient of None does not."""
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, weight_decay=0.1)
    expected = ByHand(params, options=({"weight_decay": 0.1},))
    for step in range(4):
        grads: list[Tensor | None] = list(gradients(params, generator))
        optimizer.zero_grad(set_to_none=set_to_none)
        if step % 2:
            grads[0] = None if set_to_none else torch.zeros_like(params[0])
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if p.grad is None:
                p.grad = None if g is None else g.clone()
            elif not (step % 2 and i == 0):
                p.grad += g  # into what zero_grad left
        expected.rose(grads, grads)
        optimizer.step()
        expected.assert_equals(optimizer, params)
    assert optimizer.state[params[0]]["step"] == (2 if set_to_none else 4)


def test_add_param_group_in_the_middle_of_training(generator):
    params = parameters(generator)
    expected = ByHand(params, [0, 0, 0, 1, 1, 1], ({}, {"lr": 0.1, "weight_decay": 0.2}))
    optimizer = RoseFusedAdamW(params[:3])
    for step in range(6):
        grads = gradients(params, generator)
        if step < 3:
            grads[3:] = [None] * 3
        if step == 3:
            optimizer.add_param_group({"params": iter(params[3:]), "lr": 0.1, "weight_decay": 0.2})
        expected.rose(grads, grads)
        give(params, grads)
        optimizer.step()
        expected.assert_equals(optimizer, params)
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 6, 6, 3, 3, 3]


def test_parameters_added_after_a_capture_are_updated(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params[:3], order="first", upper=0.1, weight_decay=0.1)
    give(params, gradients(params, generator))
    optimizer.capture("first")
    optimizer.add_param_group({"params": params[3:]})
    before = params[5].detach().clone()
    give(params, gradients(params, generator))
    optimizer.step()
    assert (params[5] != before).all()


def _new_data(optimizer, params):
    for p in params:
        p.data = p.data.clone()


def _transposed_data(optimizer, params):
    for p in params:
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


def _new_state(optimizer, params):
    p = params[0]
    optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}


def _new_moment(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"] * 2


def _no_state(optimizer, params):
    optimizer.state[params[1]].clear()


def _swapped(optimizer, params):
    group = optimizer.param_groups[0]["params"]
    group[0], group[1] = group[1], group[0]


def _moved_to_the_other_group(optimizer, params):
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())


def _without_a_parameter(optimizer, params):
    del optimizer.param_groups[0]["params"][1]


def _reloaded(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def _set(**options):
    return lambda optimizer, params: optimizer.param_groups[1].update(options)


CHANGES = {
    "lr": _set(lr=0.3),
    "tensor-lr": _set(lr=torch.tensor(0.2)),
    "betas": _set(betas=(0.5, 0.9)),
    "eps": _set(eps=0.1),
    "weight_decay": _set(weight_decay=0.5),
    "maximize": _set(maximize=True),
    "selective": _set(selective=False),
    "data": _new_data,
    "layout": _transposed_data,
    "state": _new_state,
    "moment": _new_moment,
    "no-state": _no_state,
    "order": _swapped,
    "group": _moved_to_the_other_group,
    "parameter": _without_a_parameter,
    "state-dict": _reloaded,
}


# Each change in two orders, by elements in one of them and by tensors in the other.
ORDERS_AND_GRANULARITIES = [*zip(ORDERS * 2, GRANULARITIES * 3, strict=True)]


@pytest.mark.parametrize(
    ("change", "order", "granularity"),
    [
        (change, *ORDERS_AND_GRANULARITIES[(i + j) % 6])
        for i, change in enumerate(CHANGES)
        for j in (0, 1)
    ],
)
def test_a_change_between_steps_is_seen(change, order, granularity, generator):
    """What is kept from step to step is right for the next one: the reference keeps nothing. Stochastic
    rounding shows where in the index space each tensor is taken to be."""
    ours = parameters(generator)
    theirs = clones(ours)
    optimizers = [
        RoseFusedAdamW(
            [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}], lr=0.01, order=order,
            granularity=granularity, state_dtype=torch.bfloat16, backend=backend,
        )
        for params, backend in ((ours, "auto"), (theirs, "reference"))
    ]  # fmt: skip
    for step in range(6):
        kl, grads = gradients(ours, generator), gradients(ours, generator)
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            if step in (2, 4):
                CHANGES[change](optimizer, params)
            masked_step(optimizer, params, grads, kl)
        for a, b in zip(ours, theirs, strict=True):
            assert optimizers[0].state[a].keys() == optimizers[1].state[b].keys()
            for key, moment in optimizers[0].state[a].items():
                assert_same_bits(moment, optimizers[1].state[b][key])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", ["shape", "sparse"])
def test_what_goes_wrong_after_some_steps_is_said_and_changes_nothing(wrong, backend, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, backend=backend)
    for _ in range(3):
        give(params, gradients(params, generator))
        optimizer.step()
    give(params, gradients(params, generator))
    p = params[0]
    if wrong == "shape":
        p.data = p.data.t()
        message = r"has shape \(7, 5\); expected the parameter's"
    else:
        p.grad = p.grad.to_sparse()
        message = "is sparse"
    before = [q.detach().clone() for q in params[1:]]
    moments = [optimizer.state[q]["exp_avg"].clone() for q in params]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_all_same_bits([q.detach() for q in params[1:]], before, "params")
    assert_all_same_bits([optimizer.state[q]["exp_avg"] for q in params], moments, "exp_avg")


def test_tied_parameters_count_once(generator):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 5)
            self.output = nn.Linear(5, 11, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.output(self.embedding(ids))

    model = Tied()
    optimizer = RoseFusedAdamW(model.parameters(), lr=0.1, inactive="rank", weight_decay=0.1)
    model(torch.randint(0, 11, (4,), generator=generator)).square().sum().backward()
    optimizer.step()
    assert optimizer.selection["second"].ranked == 55
    assert model.output.weight is model.embedding.weight
    assert len(optimizer.state) == 1


@each_order
def test_no_gradient_at_all_is_no_step(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order, selection_warmup_steps=1)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        assert optimizer.step() is None
    assert_all_same_bits([p.detach() for p in params], before, "params")
    assert not optimizer.state
    assert optimizer.selection == {}
    # They did not count as warm-up either.
    give(params, gradients(params, generator))
    optimizer.step()
    assert set(optimizer.selection) == {"update"}


def test_only_scalar_and_empty_parameters(generator):
    params = [nn.Parameter(torch.randn((), generator=generator)), nn.Parameter(torch.empty(0, 3))]
    expected = ByHand(params, upper=1.0, options=({"lr": 0.1},))
    optimizer = RoseFusedAdamW(params, lr=0.1, upper=0.5)
    for _ in range(3):
        grads = [torch.randn((), generator=generator), torch.empty(0, 3)]
        expected.step(grads, None)
        give(params, grads)
        optimizer.step()
    # floor(0.5 * 1) is 0: after the first step, which finds it inactive, the scalar is never kept.
    assert optimizer.state[params[0]]["step"] == 3
    assert optimizer.selection["second"].ranked == 1
    assert optimizer.selection["second"].kept == 0
    assert optimizer.selection["second"].threshold.isnan()
    assert optimizer.selection["update"].updated == 0
    assert not torch.equal(params[0], expected.params[0])


def test_only_empty_parameters(generator):
    p = nn.Parameter(torch.empty(0, 3))
    for order in ORDERS:
        for granularity in GRANULARITIES:
            optimizer = RoseFusedAdamW([p], order=order, granularity=granularity)
            train(optimizer, [p], 2, generator)
            assert optimizer.state[p]["step"] == 2


# ------------------------------------------------------------------------------ layouts and dtypes


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    wide[..., 1::2] = x
    return wide[..., 1::2]


@pytest.mark.parametrize("layout", [channels_last, transposed, strided])
@each_order
@each_granularity
def test_the_layout_of_parameters_and_gradients_changes_nothing(order, granularity, layout, generator):
    shapes = [(4, 3, 5, 2), (6, 2, 1, 1), (3, 1, 2, 7)]
    plain = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    params = [nn.Parameter(layout(p.detach())) for p in plain]
    assert not params[0].is_contiguous()
    kwargs = {"order": order, "granularity": granularity, "weight_decay": 0.1}
    optimizer, other = RoseFusedAdamW(params, **kwargs), RoseFusedAdamW(plain, **kwargs)
    for step in range(5):
        grads, kl = gradients(plain, generator), gradients(plain, generator)
        masked_step(other, plain, grads, kl)
        # The gradients have the layout of the parameters, or not.
        placed = [layout(g) if step % 2 else g for g in grads]
        masked_step(optimizer, params, placed, [layout(k) for k in kl])
        assert_same_training(optimizer, params, other, plain)
    if layout is not strided:
        assert [optimizer.state[p]["exp_avg"].stride() for p in params] == [p.stride() for p in params]


def test_a_channels_last_model_trains_as_its_contiguous_twin(generator):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2))
    twin = copy.deepcopy(model)
    model = model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    kwargs = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = RoseFusedAdamW(model.parameters(), **kwargs)
    other = RoseFusedAdamW(twin.parameters(), **kwargs)
    for _ in range(4):
        x = torch.randn(2, 3, 9, 9, generator=generator)
        twin(x).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad.to(memory_format=torch.channels_last) if q.dim() == 4 else q.grad.clone()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert_same_training(optimizer, [*model.parameters()], other, [*twin.parameters()])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_order
def test_half_precision_parameters_have_float32_moments(order, dtype, generator):
    params = parameters(generator, dtype)
    expected = ByHand(params, order=order, options=({"lr": 0.1},))
    optimizer = RoseFusedAdamW(params, order=order, lr=0.1)
    for _ in range(5):
        grads, kl = gradients(params, generator), gradients(params, generator)
        expected.rose(grads, kl)
        masked_step(optimizer, params, grads, kl)
    for i, p in enumerate(params):
        assert p.dtype == dtype
        state = optimizer.state[p]
        assert {state[key].dtype for key in ("step", "exp_avg", "exp_avg_sq")} == {torch.float32}
        assert_same_bits(state["exp_avg"], expected.exp_avgs[i])
        assert_same_bits(state["exp_avg_sq"], expected.exp_avg_sqs[i])
        # Rounded to the half precision in every step, so that neighbours may differ.
        torch.testing.assert_close(p.detach(), expected.params[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_dtype_bfloat16(dtype, generator):
    params = parameters(generator, dtype)
    optimizer = RoseFusedAdamW(params, state_dtype=torch.bfloat16, weight_decay=0.1)
    train(optimizer, params, 3, generator)
    for p in params:
        state = optimizer.state[p]
        assert state["step"].dtype == torch.float32
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_parameters_of_several_dtypes_share_one_ranking(generator):
    params = [
        nn.Parameter(torch.randn(50, generator=generator).to(dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    expected = ByHand(params)
    optimizer = RoseFusedAdamW(params)
    for _ in range(3):
        grads = gradients(params, generator)
        expected.rose(grads, grads)
        give(params, grads)
        optimizer.step()
    assert optimizer.selection["second"].ranked + optimizer.selection["second"].inactive == 150
    for i, p in enumerate(params):
        assert_same_bits(optimizer.state[p]["exp_avg"], expected.exp_avgs[i])


# --------------------------------------------------------------------------------- hyperparameters


def test_maximize_is_the_step_on_the_negated_gradient(generator):
    params = parameters(generator)
    negated = clones(params)
    optimizer = RoseFusedAdamW(params, maximize=True, weight_decay=0.1)
    other = RoseFusedAdamW(negated, weight_decay=0.1)
    for _ in range(5):
        grads = gradients(params, generator)
        give(params, grads)
        optimizer.step()
        give(negated, [-g for g in grads])
        other.step()
        assert_same_training(optimizer, params, other, negated)


@pytest.mark.parametrize(
    "lr",
    [torch.tensor(0.05), torch.tensor([0.05]), torch.tensor(0.05, dtype=torch.float64)],
    ids=["0-dim", "1-dim", "float64"],
)
def test_tensor_lr_is_read_in_every_step(lr, generator):
    params = parameters(generator)
    numbers = clones(params)
    optimizer = RoseFusedAdamW(params, lr=lr, weight_decay=0.1)
    other = RoseFusedAdamW(numbers, lr=lr.item(), weight_decay=0.1)
    for _ in range(4):
        grads = gradients(params, generator)
        give(params, grads)
        optimizer.step()
        give(numbers, grads)
        other.step()
        assert_same_training(optimizer, params, other, numbers)
        lr.mul_(0.5)  # the user's own tensor
        other.param_groups[0]["lr"] = lr.item()
    assert optimizer.param_groups[0]["lr"] is lr


def test_seed_is_the_only_thing_random(generator):
    start = parameters(generator)
    grads = [gradients(start, generator) for _ in range(4)]

    def run(seed: int) -> list[Tensor]:
        params = clones(start)
        optimizer = RoseFusedAdamW(params, state_dtype=torch.bfloat16, seed=seed, weight_decay=0.1)
        for g in grads:
            give(params, g)
            optimizer.step()
        return [optimizer.state[p]["exp_avg_sq"] for p in params]

    assert_all_same_bits(run(5), run(5), "exp_avg_sq")
    assert not all(map(torch.equal, run(5), run(6)))


@pytest.mark.parametrize("group", ["with", "without", "behind"])
def test_rounding_depends_on_the_place_in_the_optimizer_alone(group, generator):
    """Not on which other parameters happen to have a gradient, so that a resume cannot change it."""
    p = nn.Parameter(torch.randn(1000, generator=generator))
    other = nn.Parameter(torch.randn(37, generator=generator))
    grads = [torch.randn(1000, generator=generator) for _ in range(3)]

    def run(other_gradient: bool, behind: bool = False) -> Tensor:
        mine, beside = clones([p, other])
        optimizer = RoseFusedAdamW(
            [mine, beside] if behind else [beside, mine],
            upper=1, state_dtype=torch.bfloat16, weight_decay=0.1,
        )  # fmt: skip
        for g in grads:
            mine.grad = g.clone()
            beside.grad = torch.ones(37) if other_gradient else None
            optimizer.step()
        return optimizer.state[mine]["exp_avg_sq"]

    expected = run(other_gradient=True)
    if group == "behind":
        assert not torch.equal(run(other_gradient=True, behind=True), expected)
    else:
        assert_same_bits(run(other_gradient=group == "with"), expected)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.4, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, base_momentum=0.5, max_momentum=0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=5),
}


def test_every_scheduler_of_pytorch_is_listed():
    bases = {"LRScheduler"}
    assert set(lr_scheduler.__all__) - bases == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, lr, generator):
    """They set what they set in AdamW, and the step uses it: as if it were set by hand."""
    params = parameters(generator)
    by_hand, of_adamw = clones(params), clones(params)
    optimizer = RoseFusedAdamW(params, lr=copy.deepcopy(lr), weight_decay=0.1)
    other = RoseFusedAdamW(by_hand, lr=0.05, weight_decay=0.1)
    adamw = torch.optim.AdamW(of_adamw, lr=copy.deepcopy(lr), weight_decay=0.1, foreach=False)
    scheduler, twin = SCHEDULERS[name](optimizer), SCHEDULERS[name](adamw)
    seen = set()
    for step in range(11):
        group = optimizer.param_groups[0]
        assert float(group["lr"]) == float(adamw.param_groups[0]["lr"])
        assert tuple(group["betas"]) == tuple(adamw.param_groups[0]["betas"])
        seen.add((float(group["lr"]), tuple(group["betas"])))
        other.param_groups[0].update(lr=float(group["lr"]), betas=tuple(group["betas"]))
        grads = gradients(params, generator)
        for optim, own in ((optimizer, params), (other, by_hand), (adamw, of_adamw)):
            give(own, grads)
            optim.step()
        assert_same_training(optimizer, params, other, by_hand, f"step {step}")
        loss = [1.0] if name == "ReduceLROnPlateau" else []
        scheduler.step(*loss)
        twin.step(*loss)
    assert len(seen) > 1
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({betas for _, betas in seen}) > 1


# ------------------------------------------------------------------------ the rest of the protocol


def test_step_hooks(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, weight_decay=0.1)
    calls: list[str] = []
    before = params[0].detach().clone()

    def note(name: str, changed: bool) -> Callable[..., None]:
        def hook(optim, args, kwargs) -> None:
            assert optim is optimizer
            assert torch.equal(params[0], before) is not changed
            calls.append(name)

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre", False)),
        register_optimizer_step_pre_hook(note("global pre", False)),
        optimizer.register_step_post_hook(note("post", True)),
        register_optimizer_step_post_hook(note("global post", True)),
    ]
    give(params, gradients(params, generator))
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]
    optimizer.step()
    assert len(calls) == 4


def test_a_pre_hook_can_make_the_gradients(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="first", weight_decay=0.1)

    def backward(optim, args, kwargs) -> None:
        give(params, gradients(params, generator))
        optim.capture("first")
        give(params, gradients(params, generator))

    optimizer.register_step_pre_hook(backward)
    optimizer.step()
    assert optimizer.selection["update"].updated > 0


@each_order
def test_closure(order, generator):
    """It reevaluates the model with gradients on, captures what the order needs, gives the loss."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    optimizer = RoseFusedAdamW(model.parameters(), order=order, lr=0.05, weight_decay=0.1)
    x = torch.randn(9, 5, generator=generator)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        if order != "second":
            (model(x) - model(x)).square().sum().backward()
            optimizer.capture("first")
        loss = model(x).square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():  # the step turns gradients on
        returned = [optimizer.step(closure) for _ in range(3)]
    assert returned == losses
    assert optimizer.state[model[0].weight]["step"] == 3


def test_parameters_as_generator_names_and_dicts(generator):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    forms = {
        "generator": model.parameters(),
        "iterator": iter(list(model.parameters())),
        "named": model.named_parameters(),
        "generator in a group": [{"params": model.parameters(), "lr": 0.1}],
        "named in a group": [{"params": model.named_parameters(), "lr": 0.1}],
        "one tensor in a group": [{"params": p} for p in model.parameters()],
    }
    for what, form in forms.items():
        optimizer = RoseFusedAdamW(form)
        found = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(a is b for a, b in zip(found, model.parameters(), strict=True)), what
        named = optimizer.param_groups[0].get("param_names")
        expected = [n for n, _ in model.named_parameters()] if "named" in what else None
        assert named == expected, what


@each_order
@each_granularity
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_model_and_optimizer_continues_the_same_way(
    how, order, granularity, generator, tmp_path
):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = RoseFusedAdamW(
        model.parameters(), order=order, granularity=granularity, selection_warmup_steps=2,
        lr=0.05, weight_decay=0.1, upper=(0.5, 0.7), seed=3,
    )  # fmt: skip
    train(optimizer, list(model.parameters()), 3, generator)
    kl = gradients(model.parameters(), generator)
    if order != "second":  # the copies are made between the capture and the step
        give(model.parameters(), kl)
        optimizer.capture("first")
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        torch.save((model, optimizer), tmp_path / "both.pt")
        twin, other = torch.load(tmp_path / "both.pt", weights_only=False)

    assert other.settings == optimizer.settings
    mine, theirs = list(model.parameters()), list(twin.parameters())
    assert all(a is b for a, b in zip(other.param_groups[0]["params"], theirs, strict=True))
    assert_same_training(optimizer, mine, other, theirs, "at the copy")
    untouched = copy.deepcopy([p.detach() for p in theirs])
    grads = gradients(mine, generator)
    give(mine, grads)
    optimizer.step()
    assert_all_same_bits([p.detach() for p in theirs], untouched, "the copy after the original's step")
    give(theirs, grads)
    other.step()
    assert_same_training(optimizer, mine, other, theirs, "after a step")
    seed = int(torch.randint(1 << 31, (), generator=generator))
    train(optimizer, mine, 4, torch.Generator().manual_seed(seed))
    train(other, theirs, 4, torch.Generator().manual_seed(seed))
    assert_same_training(optimizer, mine, other, theirs, "after five steps")
    assert_same_selection(other, optimizer)


def test_nothing_keeps_the_optimizer_alive(generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order="ensemble")
    train(optimizer, params, 2, generator)
    optimizer.load_state_dict(optimizer.state_dict())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_repr_shows_groups_and_settings(generator):
    optimizer = RoseFusedAdamW(parameters(generator), lr=0.25, upper=0.75, order="ensemble")
    assert "lr: 0.25" in repr(optimizer)
    assert "upper=0.75" in repr(optimizer)
    assert "order='ensemble'" in repr(optimizer)


# --------------------------------------------------------------------------------- mixed precision


@each_order
@each_granularity
@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_grad_scaler_is_unscale_and_step(scale, granularity, order, generator):
    params = parameters(generator)
    plain = clones(params)
    kwargs = {"order": order, "granularity": granularity, "weight_decay": 0.1, "lr": 0.05}
    optimizer, other = RoseFusedAdamW(params, **kwargs), RoseFusedAdamW(plain, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    twin = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for _ in range(5):
        grads, kl = gradients(params, generator), gradients(params, generator)
        now = torch.tensor(scaler.get_scale())
        for own, optim, amp in ((params, optimizer, scaler), (plain, other, twin)):
            amp.scale(torch.ones(()))  # as for a loss; the scaler makes its state here
            if order != "second":
                give(own, [k * now for k in kl])
                optim.capture("first", grad_scale=now)
            give(own, [g * now for g in grads])
            if amp is twin:
                amp.unscale_(optim)
            amp.step(optim)
            amp.update()
        assert_same_training(optimizer, params, other, plain)
        assert not hasattr(optimizer, "grad_scale")
    assert scaler.get_scale() == twin.get_scale() > scale


@each_order
def test_an_overflow_changes_nothing_and_drops_the_mask(order, generator):
    params = parameters(generator)
    optimizer = RoseFusedAdamW(params, order=order, selection_warmup_steps=1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    # In the very first step, in warm-up, and in a later one.
    for steps_before in (0, 3):
        train(optimizer, params, steps_before, generator)
        if order != "second":
            give(params, gradients(params, generator))
            optimizer.capture("first")
        before = [p.detach().clone() for p in params]
        state = copy.deepcopy([dict(optimizer.state[p]) for p in params if p in optimizer.state])
        grads = gradients(params, generator)
        grads[5][17] = torch.inf
        give(params, grads)
        scaler.step(optimizer)
        scaler.update()
        assert_all_same_bits([p.detach() for p in params], before, "params")
        after = [dict(optimizer.state[p]) for p in params if p in optimizer.state]
        for old, new in zip(state, after, strict=True):
            old = {key: value for key, value in old.items() if not key.endswith("_mask")}
            assert old.keys() == new.keys()
            assert_all_same_bits([*new.values()], [*old.values()], "state")
        if not steps_before:  # it did not count as warm-up
            give(params, gradients(params, generator))
            optimizer.step()
            assert set(optimizer.selection) == {"update"}
    assert scaler.get_scale() == 256.0
    # The skipped step used the mask up.
    give(params, gradients(params, generator))
    if order != "second":
        with pytest.raises(RuntimeError, match="first-order mask"):
            scaler.step(optimizer)
        train(optimizer, params, 1, generator)
    else:
        scaler.step(optimizer)


def test_a_step_that_failed_under_grad_scaler_leaves_no_scale_behind(generator):
    params = parameters(generator)
    plain = clones(params)
    optimizer, other = RoseFusedAdamW(params, order="first"), RoseFusedAdamW(plain, order="first")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    give(params, gradients(params, generator))
    with pytest.raises(RuntimeError, match="first-order mask"):
        scaler.step(optimizer)
    grads, kl = gradients(params, generator), gradients(params, generator)
    give(params, kl)
    optimizer.capture("first")
    give(params, [g * 1024 for g in grads])
    scaler.step(optimizer)
    masked_step(other, plain, grads, kl)
    assert_same_training(optimizer, params, other, plain)


def test_float16_parameters_under_grad_scaler(generator):
    """PyTorch's unscale_ refuses float16 gradients; an optimizer that unscales by itself can."""
    params = parameters(generator, torch.float16)
    expected = ByHand(params)
    optimizer = RoseFusedAdamW(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.ones(()))
    for _ in range(3):
        grads = gradients(params, generator)
        expected.rose([g.float() for g in grads], grads)
        give(params, [g * 16 for g in grads])
        scaler.step(optimizer)
        scaler.update()
    for i, p in enumerate(params):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected.exp_avgs[i])
        torch.testing.assert_close(p.detach(), expected.params[i])


def test_autocast(generator):
    """Under it gradients of float32 parameters are float32, and the step is what it is outside."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    twin = copy.deepcopy(model)
    optimizer = RoseFusedAdamW(model.parameters(), weight_decay=0.1)
    other = RoseFusedAdamW(twin.parameters(), weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(9, 5, generator=generator)
        for net in (model, twin):
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).square().sum()
            loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert_same_training(optimizer, [*model.parameters()], other, [*twin.parameters()])


def test_clipping_before_the_step(generator):
    params = parameters(generator)
    plain = clones(params)
    optimizer = RoseFusedAdamW(params, weight_decay=0.1)
    other = RoseFusedAdamW(plain, weight_decay=0.1)
    for _ in range(4):
        grads = gradients(params, generator)
        norm = torch.cat([g.reshape(-1) for g in grads]).norm()
        give(params, grads)
        total = torch.nn.utils.clip_grad_norm_(params, 1.0)
        torch.testing.assert_close(total, norm)
        assert total > 1
        clipped = [p.grad.clone() for p in params]
        optimizer.step()
        assert_all_same_bits([p.grad for p in params], clipped, "gradients after the step")
        give(plain, clipped)
        other.step()
        assert_same_training(optimizer, params, other, plain)


@each_order
def test_flush_denormal_changes_no_bit(order, generator):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    torch.set_flush_denormal(False)
    start = parameters(generator)
    steps = [
        [[g * 10.0 ** -(36 + step) for g in gradients(start, generator)] for _ in range(2)]
        for step in range(5)
    ]
    assert any((g.abs() < torch.finfo(torch.float32).tiny).any() for g in steps[-1][0])

    def run(flush: bool) -> tuple[RoseFusedAdamW, list[nn.Parameter]]:
        params = clones(start)
        optimizer = RoseFusedAdamW(params, order=order, backend="cpu", weight_decay=0.1)
        for grads, kl in steps:
            torch.set_flush_denormal(flush)
            try:
                masked_step(optimizer, params, grads, kl)
                assert (torch.tensor(1e-40) * 1.0 == 0).item() is flush  # it is left as it was
            finally:
                torch.set_flush_denormal(False)
        return optimizer, params

    assert_same_training(*run(True), *run(False))


# ------------------------------------------------------------------------------- rose_param_groups


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.head = nn.Linear(4, 2)


def names_of(groups: list[dict[str, Any]], model: nn.Module) -> dict[tuple[float, bool], set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return {(g["weight_decay"], g["selective"]): {names[p] for p in g["params"]} for g in groups}


def test_rose_param_groups():
    model = Encoder()
    assert names_of(rose_param_groups(model, 0.1), model) == {
        (0.1, True): {"embedding.weight", "layer.0.weight", "head.weight"},
        (0.0, True): {"layer.0.bias", "layer.1.weight", "layer.1.bias", "head.bias"},
    }
    assert names_of(rose_param_groups(model, 0.1, "encoder-weights"), model) == {
        (0.1, True): {"layer.0.weight"},
        (0.0, True): {"layer.1.weight"},
        (0.1, False): {"embedding.weight", "head.weight"},
        (0.0, False): {"layer.0.bias", "layer.1.bias", "head.bias"},
    }
    model.embedding.requires_grad_(False)
    model.layer[1].requires_grad_(False)
    assert names_of(rose_param_groups(model, 0.1, "encoder-weights"), model) == {
        (0.1, True): {"layer.0.weight"},
        (0.1, False): {"head.weight"},
        (0.0, False): {"layer.0.bias", "head.bias"},
    }
    optimizer = RoseFusedAdamW(rose_param_groups(model, 0.1, "encoder-weights"), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        rose_param_groups(nn.Linear(2, 2), selective="encoder-weights")
    with pytest.raises(
        ValueError, match=r"selective='some' \(str\); expected one of 'all', 'encoder-weights'"
    ):
        rose_param_groups(model, selective="some")
