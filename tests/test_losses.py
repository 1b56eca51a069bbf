"""Losses of ROSE: the symmetric KL, and what `rose_backward` captures and leaves in `.grad`."""

import dataclasses
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils.checkpoint import checkpoint

from rose_ops import RoseFusedAdamW, rose_backward, symmetric_kl, unwrap
from rose_ops.definitions import rank_of, unpack
from rose_ops.finetune import recipes
from rose_ops.finetune.runtime import Runtime
from rose_ops.finetune.train import train

SEED = 0  # of the model, the data and the dropout: drawn anew for every test


@pytest.fixture(autouse=True)
def fresh_seed(generator, monkeypatch):
    seed = int(torch.randint(2**31, (), generator=generator))
    monkeypatch.setitem(globals(), "SEED", seed)
    torch.manual_seed(seed)


def reference_kl(p, q):
    """Eq. 1 in float64, from torch's own divergence."""
    p, q = (Categorical(logits=x.double()) for x in (p, q))
    return (kl_divergence(p, q) + kl_divergence(q, p)).mean()


# ------------------------------------------------------------------------------------ symmetric_kl


@pytest.mark.parametrize("classes", [2, 3, 1000])
@pytest.mark.parametrize(
    ("scale", "rtol"),
    [
        # log p - log q is of the size of `scale` and as exact as the float32 logarithms
        pytest.param(1e-3, 1e-3, id="close"),
        pytest.param(1.0, 1e-5, id="usual"),
        pytest.param(50.0, 1e-5, id="confident"),
    ],
)
def test_kl_is_eq_1(classes, scale, rtol):
    p, q = (torch.randn(16, classes) * scale for _ in range(2))
    torch.testing.assert_close(symmetric_kl(p, q).double(), reference_kl(p, q), rtol=rtol, atol=0)


def test_kl_reductions():
    p, q = torch.randn(2, 5, 3)
    each = symmetric_kl(p, q, reduction="none")
    assert each.shape == (5,)
    torch.testing.assert_close(symmetric_kl(p, q, reduction="sum"), each.sum())
    torch.testing.assert_close(symmetric_kl(p, q), each.mean())


def test_kl_is_symmetric_zero_on_the_diagonal_and_positive_elsewhere():
    p, q = torch.randn(2, 8, 4)
    assert symmetric_kl(p, q) == symmetric_kl(q, p) > 0
    assert symmetric_kl(p, p) == 0


def test_kl_gradient():
    p, q = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(symmetric_kl, (p.requires_grad_(), q.requires_grad_()))


def test_kl_of_extreme_logits_is_finite():
    p = torch.tensor([[1e4, -1e4], [0.0, 80.0]], requires_grad=True)
    q = torch.tensor([[-1e4, 1e4], [0.0, 80.0]])
    kl = symmetric_kl(p, q)
    kl.backward()
    assert kl == 2e4  # (1 - 0) * 2e4 for both classes, averaged with an example of 0
    assert p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kl_widens_half_precision(dtype):
    p, q = torch.randn(2, 64, 2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl = symmetric_kl(p, q)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), reference_kl(p, q), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("p", "q", "error", "message"),
    [
        pytest.param((4, 2), (3, 2), ValueError, "same shape", id="batch differs"),
        pytest.param((4, 3), (4, 2), ValueError, "same shape", id="classes differ"),
        pytest.param((4,), (4,), ValueError, r"\[batch, classes\]", id="one dimension"),
        pytest.param((4, 5, 2), (4, 5, 2), ValueError, "flatten", id="three dimensions"),
        pytest.param((4, 1), (4, 1), ValueError, "two classes", id="one class"),
        pytest.param((0, 2), (0, 2), ValueError, "at least one example", id="empty"),
    ],
)
def test_kl_refuses_shapes(p, q, error, message):
    with pytest.raises(error, match=message):
        symmetric_kl(torch.zeros(p), torch.zeros(q))


def test_kl_refuses_integers_and_unknown_reductions():
    logits = torch.zeros(4, 2)
    with pytest.raises(TypeError, match="floating-point"):
        symmetric_kl(logits.long(), logits.long())
    with pytest.raises(ValueError, match="batchmean"):
        symmetric_kl(logits, logits, reduction="mean")


# ----------------------------------------------------------------------------------- rose_backward


class Recorder(RoseFusedAdamW):
    """Notes what `.grad` held at each capture, and the scale it was said to have."""

    def __init__(self, params, **options):
        super().__init__(params, lr=1e-2, weight_decay=1e-2, backend="reference", **options)
        self.captures = []

    def capture(self, kind="first", *, clear=True, grad_scale=None, max_grad_norm=None):
        grads = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]
        self.captures.append((kind, grads, grad_scale))
        super().capture(kind, clear=clear, grad_scale=grad_scale, max_grad_norm=max_grad_norm)


def classifier(dropout=0.3):
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))


def batch(n=12):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def two_passes(model, inputs, labels):
    """The losses by hand, with the dropout that a `rose_backward` after the same seed sees."""
    torch.manual_seed(SEED)
    p, q = model(inputs), model(inputs)
    ce = (F.cross_entropy(p, labels) + F.cross_entropy(q, labels)) / 2
    return ce, reference_kl(p, q).float()


def grads(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_grads(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("order", "r_drop", "captured"),
    [
        pytest.param("first", 0.0, ["first"], id="first"),
        pytest.param("ensemble", 0.0, ["first"], id="ensemble"),
        pytest.param("first", 0.7, ["first"], id="first with R-Drop"),
        pytest.param("second", 0.7, ["second"], id="second with R-Drop"),
        pytest.param("ensemble", 0.7, ["first", "second"], id="ensemble with R-Drop"),
    ],
)
def test_masks_come_from_their_losses_and_the_update_from_the_aggregate(order, r_drop, captured):
    model, (inputs, labels) = classifier(), batch()
    ce, kl = two_passes(model, inputs, labels)
    optimizer = Recorder(model.parameters(), order=order)
    torch.manual_seed(SEED)
    losses = rose_backward(model, inputs, labels, optimizer, r_drop=r_drop)

    assert [kind for kind, *_ in optimizer.captures] == captured
    for kind, at_capture, _ in optimizer.captures:
        assert_grads(at_capture, grads(kl if kind == "first" else ce, model))
    assert_grads([p.grad for p in model.parameters()], grads(ce + r_drop * kl, model))
    torch.testing.assert_close(
        losses[:3], (ce + r_drop * kl, ce, kl), check_dtype=False, rtol=1e-5, atol=0
    )
    assert not any(loss.requires_grad for loss in losses[:3])
    assert losses.grad_norm is None

    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_second_order_needs_one_pass_and_no_capture():
    model, (inputs, labels) = classifier(), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = Recorder(model.parameters(), order="second")
    torch.manual_seed(SEED)
    losses = rose_backward(model, inputs, labels, optimizer)
    torch.manual_seed(SEED)
    ce = F.cross_entropy(model(inputs), labels)
    assert len(calls) == 2  # one of them here
    assert optimizer.captures == []
    assert losses.kl is None
    assert losses.loss == losses.ce == ce
    assert_grads([p.grad for p in model.parameters()], grads(ce, model))


@pytest.mark.parametrize("r_drop", [0.0, 0.7], ids=["plain", "R-Drop"])
def test_other_optimizers_get_the_gradient_and_no_masks(r_drop):
    model, (inputs, labels) = classifier(), batch()
    ce, kl = two_passes(model, inputs, labels)
    torch.manual_seed(SEED)
    expected = ce + r_drop * kl if r_drop else F.cross_entropy(model(inputs), labels)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(SEED)
    rose_backward(model, inputs, labels, optimizer, r_drop=r_drop)
    assert_grads([p.grad for p in model.parameters()], grads(expected, model))


def test_parameters_of_another_optimizer_get_no_kl_gradient():
    model, (inputs, labels) = classifier(), batch()
    ce, _ = two_passes(model, inputs, labels)
    optimizer = Recorder(model[0].parameters(), order="first")
    torch.manual_seed(SEED)
    rose_backward(model, inputs, labels, optimizer)
    assert_grads([p.grad for p in model.parameters()], grads(ce, model))


def test_unused_and_frozen_parameters_are_left_out():
    model, (inputs, labels) = classifier(), batch()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.zeros(3))
    optimizer = Recorder([*model.parameters(), unused], order="first")
    rose_backward(model, inputs, labels, optimizer)
    assert model[0].bias.grad is None
    assert unused.grad is None
    optimizer.step()


def test_training_learns():
    model, (inputs, labels) = classifier(), batch()
    optimizer = RoseFusedAdamW(model.parameters(), lr=5e-2, order="ensemble", backend="reference")
    history = []
    for _ in range(60):
        history.append(rose_backward(model, inputs, labels, optimizer).ce.item())
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < 0.5 * history[0]


# ------------------------------------------------------------------------- models, inputs, outputs


class Keywords(nn.Module):
    """Called like a Hugging Face model, and answers like one."""

    def __init__(self):
        super().__init__()
        self.layers = classifier()

    def forward(self, inputs, extra=None):
        return types.SimpleNamespace(logits=self.layers(inputs), extra=extra)


@pytest.mark.parametrize(
    ("model", "pack", "options"),
    [
        pytest.param(Keywords, lambda x: {"inputs": x, "extra": 1}, {}, id="mapping and .logits"),
        pytest.param(Keywords, lambda x: (x, 1), {}, id="positional arguments"),
        pytest.param(classifier, lambda x: x, {}, id="tensor to tensor"),
        pytest.param(
            Keywords,
            lambda x: [x, x],
            {"forward": lambda model, inputs: model(inputs[0]).logits},
            id="forward callable",
        ),
    ],
)
def test_ways_to_call_a_model(model, pack, options):
    model, (inputs, labels) = model(), batch()
    optimizer = Recorder(model.parameters(), order="ensemble")
    torch.manual_seed(SEED)
    losses = rose_backward(model, pack(inputs), labels, optimizer, **options)
    plain = classifier()
    ce, kl = two_passes(plain, inputs, labels)
    torch.testing.assert_close(losses[:3], (ce, ce, kl), check_dtype=False, rtol=1e-5, atol=0)


def test_outputs_without_logits_are_refused():
    model = Keywords()
    model.forward = lambda inputs: {"scores": inputs}
    optimizer = Recorder(model.parameters(), order="second")
    with pytest.raises(TypeError, match=r"dict.*forward=lambda"):
        rose_backward(model, *batch(), optimizer)


def test_criterion():
    model, (inputs, labels) = classifier(), batch()
    optimizer = Recorder(model.parameters(), order="second")
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.manual_seed(SEED)
    losses = rose_backward(model, inputs, labels, optimizer, criterion=smooth)
    torch.manual_seed(SEED)
    assert losses.ce == smooth(model(inputs), labels)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(reentrant):
    model, (inputs, labels) = classifier(), batch()
    ce, kl = two_passes(model, inputs, labels)
    optimizer = Recorder(model.parameters(), order="first")
    torch.manual_seed(SEED)
    rose_backward(
        model,
        inputs,
        labels,
        optimizer,
        # a reentrant checkpoint needs an input that requires a gradient
        forward=lambda model, inputs: checkpoint(
            model, inputs.clone().requires_grad_(), use_reentrant=reentrant
        ),
    )
    assert_grads(optimizer.captures[0][1], grads(kl, model))
    assert_grads([p.grad for p in model.parameters()], grads(ce, model))


# --------------------------------------------------------------------------------- mixed precision


def test_autocast_covers_the_forwards_only():
    model, (inputs, labels) = classifier(), batch()
    torch.manual_seed(SEED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p, q = model(inputs), model(inputs)
    assert p.dtype == torch.bfloat16
    ce = (F.cross_entropy(p.float(), labels) + F.cross_entropy(q.float(), labels)) / 2
    kl = symmetric_kl(p, q)
    optimizer = Recorder(model.parameters(), order="first")
    torch.manual_seed(SEED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = rose_backward(model, inputs, labels, optimizer)
    assert losses[:3] == (ce, ce, kl)
    for actual, expected in zip(optimizer.captures[0][1], grads(kl, model), strict=True):
        assert torch.equal(actual, expected)
    for p, expected in zip(model.parameters(), grads(ce, model), strict=True):
        assert torch.equal(p.grad, expected)


@pytest.mark.parametrize("r_drop", [0.0, 0.5], ids=["plain", "R-Drop"])
@pytest.mark.parametrize("order", ["first", "second", "ensemble"])
def test_a_power_of_two_loss_scale_changes_nothing(order, r_drop):
    inputs, labels = batch()
    parameters = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = classifier()
        optimizer = Recorder(model.parameters(), order=order)
        torch.manual_seed(SEED)
        for _ in range(3):
            losses = rose_backward(model, inputs, labels, optimizer, r_drop=r_drop, scaler=scaler)
            assert losses.loss < 2  # unscaled
            if scaler is None:
                optimizer.step()
            else:
                assert all(scale == 2.0**10 for *_, scale in optimizer.captures)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        parameters.append([p.detach().clone() for p in model.parameters()])
    for plain, scaled in zip(*parameters, strict=True):
        assert torch.equal(plain, scaled)


# ---------------------------------------------------------------------------- accumulation, errors


def test_accumulation_recipe_of_the_docstring():
    model = classifier()
    micro_batches = [tuple(x[i::2] for x in batch()) for i in range(2)]
    torch.manual_seed(SEED)
    kl = sum(symmetric_kl(model(x), model(x)) for x, _ in micro_batches) / 2
    ce = sum(F.cross_entropy(model(x), y) for x, y in micro_batches) / 2

    optimizer = Recorder(model.parameters(), order="ensemble")
    torch.manual_seed(SEED)
    for inputs, _ in micro_batches:
        (symmetric_kl(model(inputs), model(inputs)) / len(micro_batches)).backward()
    optimizer.capture("first")
    for inputs, labels in micro_batches:
        (F.cross_entropy(model(inputs), labels) / len(micro_batches)).backward()
    assert_grads(optimizer.captures[0][1], grads(kl, model))
    assert_grads([p.grad for p in model.parameters()], grads(ce, model))
    optimizer.step()


@pytest.mark.parametrize(
    ("order", "r_drop", "refused"),
    [
        pytest.param("first", 0.0, True, id="first"),
        pytest.param("ensemble", 0.0, True, id="ensemble"),
        pytest.param("second", 0.5, True, id="second with R-Drop"),
        pytest.param("second", 0.0, False, id="second accumulates"),
    ],
)
def test_gradients_from_before(order, r_drop, refused):
    model, (inputs, labels) = classifier(dropout=0.3), batch()
    optimizer = Recorder(model.parameters(), order=order)
    F.cross_entropy(model(inputs), labels).backward()
    before = [p.grad.clone() for p in model.parameters()]
    if not refused:
        rose_backward(model, inputs, labels, optimizer, r_drop=r_drop)
        assert not any(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
        return
    with pytest.raises(ValueError, match="zero_grad"):
        rose_backward(model, inputs, labels, optimizer, r_drop=r_drop)
    assert optimizer.captures == []
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, b)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(lambda: classifier().eval(), r"eval mode: call model\.train", id="eval mode"),
        pytest.param(lambda: classifier(dropout=0.0), "no active dropout", id="dropout 0"),
        pytest.param(lambda: nn.Linear(6, 3), "no active dropout", id="no dropout module"),
    ],
)
@pytest.mark.parametrize(
    ("order", "r_drop"), [("first", 0.0), ("ensemble", 0.0), ("second", 0.5)], ids=str
)
def test_two_passes_without_dropout_are_refused(model, message, order, r_drop):
    model = model()
    optimizer = Recorder(model.parameters(), order=order)
    with pytest.raises(ValueError, match=message):
        rose_backward(model, *batch(), optimizer, r_drop=r_drop)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.captures == []


def test_second_order_needs_no_dropout():
    model = classifier().eval()
    optimizer = Recorder(model.parameters(), order="second")
    rose_backward(model, *batch(), optimizer)
    optimizer.step()


def test_functional_dropout_counts():
    model = nn.Linear(6, 3)
    optimizer = Recorder(model.parameters(), order="first")
    losses = rose_backward(
        model, *batch(), optimizer, forward=lambda model, x: model(F.dropout(x, 0.5))
    )
    assert losses.kl > 0


@pytest.mark.parametrize("r_drop", [-0.1, float("inf"), float("nan")], ids=str)
def test_r_drop_out_of_range(r_drop):
    model = classifier()
    optimizer = Recorder(model.parameters(), order="second")
    with pytest.raises(ValueError, match="r_drop"):
        rose_backward(model, *batch(), optimizer, r_drop=r_drop)


@pytest.mark.parametrize("value", ["2", None, True, torch.tensor(1.0)], ids=str)
def test_r_drop_of_another_type(value):
    model = classifier()
    with pytest.raises(ValueError, match=rf"r_drop=.* \({type(value).__name__}\); expected a finite"):
        rose_backward(model, *batch(), Recorder(model.parameters()), r_drop=value)


def refuses(message, error=ValueError, model=None, order="ensemble", data=None, **options):
    """`rose_backward` raises before any backward or capture."""
    model = model or classifier()
    optimizer = Recorder(model.parameters(), order=order)
    with pytest.raises(error, match=message):
        rose_backward(model, *(data or batch()), optimizer, **options)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.captures == []


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        pytest.param(lambda x: x[:, None].expand(-1, 4, -1), "flatten other dimensions", id="sequence"),
        pytest.param(lambda x: x[:, :1], "two classes", id="one class"),
        pytest.param(lambda x: x[:, 0], r"\[batch, classes\]", id="one dimension"),
        pytest.param(lambda x: x[:0], "at least one example", id="empty"),
    ],
)
@pytest.mark.parametrize(("order", "r_drop"), [("first", 0.0), ("second", 0.5)], ids=str)
def test_shapes_are_refused_before_the_criterion_sees_them(logits, message, order, r_drop):
    refuses(
        message,
        order=order,
        r_drop=r_drop,
        forward=lambda model, x: logits(model(x)),
        criterion=lambda *_: pytest.fail("the criterion has run"),
    )


def test_integer_logits_are_refused():
    refuses("floating-point", TypeError, forward=lambda model, x: model(x).long())


def test_a_loss_in_place_of_logits_is_refused():
    refuses("0-dim tensor.*leave the labels out", forward=lambda model, x: model(x).mean())


@pytest.mark.parametrize("order", ["second", "first"])
def test_a_loss_that_is_not_0_dim_is_refused(order):
    criterion = nn.CrossEntropyLoss(reduction="none")
    refuses(r"criterion returned shape \(12,\).*reduction='mean'", order=order, criterion=criterion)
    refuses("criterion returned float", order=order, criterion=lambda *_: 1.0)


def test_labels_of_another_batch_are_refused_by_the_criterion():
    inputs, labels = batch()
    refuses("batch_size", data=(inputs, labels[:5]))


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(lambda x: (x, "hidden states"), id="tuple that begins with logits"),
        pytest.param(lambda x: {"logits": x}, id="mapping"),
        pytest.param(lambda x: types.SimpleNamespace(logits=x), id="object"),
    ],
)
def test_ways_to_return_logits(pack):
    model, (inputs, labels) = classifier(), batch()
    layers = list(model)
    model.forward = lambda x: pack(nn.Sequential(*layers)(x))
    torch.manual_seed(SEED)
    losses = rose_backward(model, inputs, labels, Recorder(model.parameters()))
    torch.manual_seed(SEED)
    assert losses.ce == F.cross_entropy(nn.Sequential(*layers)(inputs), labels)


def test_leftover_gradients_are_named():
    model = classifier()
    optimizer = Recorder(model.parameters(), order="first")
    model[3].weight.grad = torch.ones_like(model[3].weight)
    with pytest.raises(ValueError, match=r"1 of 4 parameters .*'3\.weight'\), which would leak"):
        rose_backward(model, *batch(), optimizer)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match=r"'3\.weight', and all are zeros.*set_to_none=True"):
        rose_backward(model, *batch(), optimizer)
    optimizer.zero_grad()
    elsewhere = nn.Parameter(torch.ones(2, 5))
    elsewhere.grad = torch.ones(2, 5)
    optimizer.add_param_group({"params": [elsewhere]})
    with pytest.raises(ValueError, match=r"1 of 5 .*shape \(2, 5\) outside of the model"):
        rose_backward(model, *batch(), optimizer)


@pytest.mark.parametrize("order", ["first", "ensemble"])
def test_a_compiled_model(order):
    inputs, labels = batch()
    masks = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = classifier()
        torch.manual_seed(SEED)
        optimizer = Recorder(model.parameters(), order=order)
        rose_backward(wrap(model), inputs, labels, optimizer, r_drop=0.5)
        masks.append([p.grad for p in model.parameters()])
    assert_grads(*masks)


# ---------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("scale", [None, 2.0**10, 1000.0], ids=str)
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_masks_are_of_clipped_gradients(order, scale):
    """By the definition of Eq. 3 and 4 in float64, but for elements next to the threshold."""
    model, (inputs, labels), limit = classifier(), batch(), 0.05
    optimizer = Recorder(model.parameters(), order=order, upper=0.6)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    clipped = 0
    for step in range(4):
        optimizer.captures.clear()
        losses = rose_backward(
            model, inputs, labels, optimizer, r_drop=2.0, max_grad_norm=limit, scaler=scaler
        )
        (found,) = [grads for kind, grads, _ in optimizer.captures if kind == "second"]
        found = [g.double() / (scale or 1.0) for g in found]
        norm = torch.cat([g.flatten() for g in found]).norm()
        factor = min(1.0, limit / (norm + 1e-6))
        clipped += factor < 0.9
        if step > 0:  # in the first step there is no moment to rank by
            states = [optimizer.state[p] for p in model.parameters()]
            risks = torch.cat(
                [
                    (0.1 * factor * g.abs() / s["exp_avg"].double().abs() - 1).abs().flatten()
                    for g, s in zip(found, states, strict=True)
                ]
            )
            ranked = risks[risks.isfinite()].sort().values
            threshold = ranked[rank_of(600_000_000, ranked.numel()) - 1]
            mask = torch.cat([unpack(s["second_mask"], s["exp_avg"].numel()) for s in states])
            differ = mask != ((risks <= threshold) | ~risks.isfinite())
            assert (risks[differ] - threshold).abs().le(1e-5 * (1 + threshold)).all()
        left = [p.grad.double() / (scale or 1.0) for p in model.parameters()]
        left = torch.cat([g.flatten() for g in left]).norm()
        assert losses.grad_norm > limit
        torch.testing.assert_close(left, torch.tensor(limit).double(), rtol=1e-4, atol=0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    assert clipped == 4


@pytest.mark.parametrize("r_drop", [0.0, 0.5], ids=["plain", "R-Drop"])
@pytest.mark.parametrize("order", [None, "first", "second", "ensemble"], ids=str)
def test_gradients_are_clipped_as_by_clip_grad_norm_(order, r_drop):
    inputs, labels = batch()
    found = []
    for limit in (None, 0.05, 1e6, float("inf")):
        model = classifier()
        make = Recorder if order else torch.optim.AdamW
        optimizer = make(model.parameters(), **({"order": order} if order else {}))
        torch.manual_seed(SEED)
        losses = rose_backward(model, inputs, labels, optimizer, r_drop=r_drop, max_grad_norm=limit)
        norm = losses.grad_norm
        if limit is None:
            assert norm is None
            before = [p.grad.clone() for p in model.parameters()]
            continue
        params = [nn.Parameter(p.detach()) for p in model.parameters()]
        for p, g in zip(params, before, strict=True):
            p.grad = g.clone()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(params, limit))
        for p, q in zip(model.parameters(), params, strict=True):
            assert torch.equal(p.grad, q.grad)
        found.append(norm)
    assert found[0] == found[1] == found[2] > 0.05


def test_clipping_of_float16_parameters():
    """Their scaled norm is larger than float16's largest number, and `unscale_` refuses them."""
    inputs, labels = batch()
    inputs = inputs.repeat(1, 8)  # many elements of the same size
    model = nn.Linear(inputs.shape[1], 3)
    (weight, _) = grads(F.cross_entropy(model(inputs), labels), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4e4 / weight.abs().max().item())
    scale = scaler.get_scale()
    model.half()
    optimizer = Recorder(model.parameters(), order="second")
    rose_backward(model, inputs.half(), labels, optimizer, scaler=scaler)
    assert model.weight.grad.isfinite().all()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).isinf()
    optimizer.zero_grad()
    losses = rose_backward(model, inputs.half(), labels, optimizer, scaler=scaler, max_grad_norm=0.01)
    torch.testing.assert_close(losses.grad_norm, weight.norm(), rtol=0.3, atol=0)  # and the bias
    norm = torch.cat([p.grad.float().flatten() for p in model.parameters()]).norm() / scale
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-2, atol=0)
    scaler.step(optimizer)


def test_clipping_is_over_the_parameters_of_the_optimizer():
    model = classifier()
    optimizer = Recorder(model[0].parameters(), order="first")
    losses = rose_backward(model, *batch(), optimizer, max_grad_norm=1e-3)
    norm = nn.utils.get_total_norm([p.grad for p in model[0].parameters()])
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert nn.utils.get_total_norm([p.grad for p in model[3].parameters()]) > 1e-2
    assert losses.grad_norm > 1e-3


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "1", True], ids=str)
def test_max_grad_norm_out_of_range(value):
    kind = type(value).__name__
    refuses(rf"max_grad_norm={value!r} \({kind}\); expected None", max_grad_norm=value)
    model = classifier()
    optimizer = RoseFusedAdamW(model.parameters())
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(ValueError, match=rf"max_grad_norm={value!r} \({kind}\)"):
        optimizer.capture("second", max_grad_norm=value)


def test_two_norms_to_clip_to_are_refused():
    model, (inputs, labels) = classifier(), batch()
    optimizer = RoseFusedAdamW(model.parameters(), max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0.*its own max_grad_norm=0\.5"):
        rose_backward(model, inputs, labels, optimizer, max_grad_norm=1.0)
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(ValueError, match=r"its own max_grad_norm=0\.5; expected one"):
        optimizer.capture("second", max_grad_norm=1.0)
    optimizer.zero_grad()
    # What the optimizer does itself has nothing to be added.
    assert rose_backward(model, inputs, labels, optimizer, r_drop=1.0).grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm > 0


@pytest.mark.parametrize("method", ["adamw", "rdrop-second"])
def test_the_demo_clips_before_it_ranks(method, monkeypatch):
    """AdamW's gradients by rose_backward; ROSE's inside the step, masks that are captured included."""
    norms, optimizers = [], []

    def recorded(*args, **options):
        losses = rose_backward(*args, **options)
        after = nn.utils.get_total_norm([p.grad for p in args[0].parameters()])
        norms.append((losses.grad_norm, after))
        optimizers.append(args[3])
        return losses

    monkeypatch.setattr(recipes, "rose_backward", recorded)
    data = types.SimpleNamespace(lengths=[1] * 12, batch=lambda indices: batch())
    settings = recipes.Settings(
        steps=2, batch_size=4, lr=1e-2, weight_decay=0.1, warmup=0.1, max_grad_norm=0.02, r_drop=2.0,
        upper=0.6, lower=0.0, gamma=0.5, granularity="element", selection="bracket",
        inactive="update", selective="all", selection_warmup_steps=0, backend="auto",
    )  # fmt: skip
    runtime = Runtime(torch.device("cpu"), "float32")
    train(classifier(), data, recipes.METHODS[method], settings, runtime, seed=1)
    assert len(norms) == 2
    for (before, after), optimizer in zip(norms, optimizers, strict=True):
        if method == "adamw":
            assert before > 0.02
            torch.testing.assert_close(after, torch.tensor(0.02), rtol=1e-3, atol=0)
        else:
            assert optimizer.settings.max_grad_norm == 0.02
            assert optimizer.grad_norm > 0.02


# -------------------------------------------------------------------------------------- wrappers


class Plain:
    """Not an `Optimizer`, and keeps what it wraps where nobody would look."""

    def __init__(self, optimizer):
        self.whatever = [None, optimizer]

    def __getattr__(self, name):
        return getattr(self.__dict__["whatever"][1], name)


class Impostor:
    """As Lightning's: of the class of what it wraps, with copies of its attributes that get stale."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self._inner = optimizer
        self.settings = dataclasses.replace(optimizer.settings, order="second")
        self.__class__ = type("Like" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure=None):
        return self._inner.step(closure)


def local_sgd(optimizer):
    module = pytest.importorskip("torch.distributed.optim")
    averager = types.SimpleNamespace(average_parameters=lambda params: None)
    return module.PostLocalSGDOptimizer(optimizer, averager)


def lightning(optimizer):
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


def fabric(optimizer):
    module = pytest.importorskip("lightning.fabric")
    return module.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    yield module
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerated(optimizer):
    module = pytest.importorskip("accelerate")
    return module.Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = {
    "attribute": Plain,
    "impostor": Impostor,
    "PostLocalSGDOptimizer": local_sgd,
    "LightningOptimizer": lightning,
    "Fabric": fabric,
    "accelerate": accelerated,
    "two": lambda optimizer: Plain(Impostor(optimizer)),
    "three": lambda optimizer: Impostor(Plain(Impostor(optimizer))),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@each_wrapper
def test_unwrap(wrap, request):
    if wrap is accelerated:
        request.getfixturevalue("accelerate")
    optimizer = RoseFusedAdamW(classifier().parameters(), order="first")
    wrapped = wrap(optimizer)
    assert wrapped is not optimizer
    assert unwrap(wrapped) is optimizer
    assert unwrap(optimizer) is optimizer
    if wrap not in (WRAPPERS["impostor"], WRAPPERS["two"], WRAPPERS["three"]):
        assert unwrap(wrap(torch.optim.AdamW(classifier().parameters()))) is None


def test_unwrap_of_what_holds_several():
    model = classifier()
    one, other = (RoseFusedAdamW(part.parameters()) for part in (model[0], model[3]))
    with pytest.raises(ValueError, match="Plain holds 2 RoseFusedAdamW; expected one"):
        unwrap(Plain(types.SimpleNamespace(param_groups=[], step=print, optimizers=[one, other])))
    one.friend = other  # knows it, and does not wrap it
    assert unwrap(one) is one
    assert unwrap(Plain(one)) is one


def test_unwrap_of_none():
    assert unwrap(torch.optim.SGD(classifier().parameters())) is None
    assert unwrap(None) is None


def test_unwrap_passes_over_dead_references():
    optimizer = RoseFusedAdamW(classifier().parameters())
    wrapped = Plain(optimizer)
    wrapped._strategy = weakref.proxy(classifier())
    assert unwrap(wrapped) is optimizer
    rose_backward(classifier(), *batch(), wrapped)


@pytest.mark.thin(2)
@each_wrapper
@pytest.mark.parametrize(
    ("order", "r_drop"), [("second", 2.0), ("first", 0.0), ("ensemble", 2.0)], ids=str
)
def test_a_wrapped_optimizer_trains_as_itself(wrap, order, r_drop, request):
    if wrap is accelerated:
        request.getfixturevalue("accelerate")
    inputs, labels = batch()
    found = []
    for wrapper in (lambda optimizer: optimizer, wrap):
        model = classifier()
        optimizer = Recorder(model.parameters(), order=order)
        wrapped = wrapper(optimizer)
        torch.manual_seed(SEED)
        for _ in range(3):
            rose_backward(model, inputs, labels, wrapped, r_drop=r_drop)
            (optimizer if wrap is lightning else wrapped).step()
            optimizer.zero_grad()
        found.append([p.detach() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_accelerate_divides_for_accumulation_and_clips_at_the_end(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    for make in (RoseFusedAdamW, torch.optim.AdamW):
        model, (inputs, labels) = classifier(), batch()
        optimizer = accelerator.prepare(make(model.parameters()))
        expected = classifier()
        norms = []
        for i in range(2):
            with accelerator.accumulate(model):
                torch.manual_seed(i)
                losses = rose_backward(model, inputs[i::2], labels[i::2], optimizer, max_grad_norm=1e-2)
                torch.manual_seed(i)
                loss = F.cross_entropy(expected(inputs[i::2]), labels[i::2])
                accelerator.backward(loss)
                assert losses.loss == loss  # not divided
                norms.append(losses.grad_norm)
                optimizer.zero_grad() if i == 0 else None  # does nothing yet
        assert norms[0] is None
        assert torch.equal(norms[1], nn.utils.clip_grad_norm_(expected.parameters(), 1e-2))
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    model = classifier()
    optimizer = accelerator.prepare(RoseFusedAdamW(model.parameters(), order="first"))
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 where.*two phases"):
        rose_backward(model, *batch(), optimizer)
    assert all(p.grad is None for p in model.parameters())


def held_by(optimizer, scaler, name):
    wrapped = Plain(optimizer)
    if name == "scaler":
        wrapped.scaler = scaler
    else:
        plugin = types.SimpleNamespace(scaler=scaler)
        wrapped._strategy = types.SimpleNamespace(**{name: plugin})
    return wrapped


@pytest.mark.parametrize("name", ["scaler", "precision_plugin", "precision"])
@pytest.mark.parametrize(("order", "r_drop"), [("second", 0.0), ("ensemble", 2.0)], ids=str)
def test_the_scaler_of_a_wrapper_is_used(name, order, r_drop):
    model, (inputs, labels) = classifier(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inner = Recorder(model.parameters(), order=order)
    wrapped = held_by(inner, scaler, name)
    losses = rose_backward(model, inputs, labels, wrapped, r_drop=r_drop, max_grad_norm=0.05)
    assert losses.loss < 10
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(norm, torch.tensor(0.05 * 2.0**10), rtol=1e-3, atol=0)
    assert all(scale == 2.0**10 for *_, scale in inner.captures)
    inner.zero_grad()
    rose_backward(model, inputs, labels, wrapped, r_drop=r_drop, scaler=scaler)  # the same
    inner.zero_grad()
    with pytest.raises(ValueError, match="another than the one that Plain has"):
        rose_backward(model, inputs, labels, wrapped, scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("name", "order", "r_drop", "message"),
    [
        ("FullyShardedDataParallel", "first", 0.0, "FSDP1"),
        ("FullyShardedDataParallel", "second", 1.0, "FSDP1"),
        ("DeepSpeedEngine", "ensemble", 0.0, "DeepSpeed"),
        ("DeepSpeedEngine", "second", 0.0, "DeepSpeed"),
    ],
)
def test_engines_are_refused(name, order, r_drop, message):
    engine = type(name, (nn.Sequential,), {})
    refuses(f"{message}.*nothing was changed", model=engine(classifier()), order=order, r_drop=r_drop)


def test_fsdp_is_left_alone_where_one_backward_runs():
    model = type("FullyShardedDataParallel", (nn.Sequential,), {})(classifier())
    rose_backward(model, *batch(), Recorder(model.parameters(), order="second"))


@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("order", ["second", "ensemble"])
def test_r_drop_with_masks_of_ones_own(order, limit):
    """There is nothing to capture of a kind whose masks are given, and with a limit there is."""
    model, (inputs, labels) = classifier(), batch()
    optimizer = Recorder(model.parameters(), order=order)
    masks = {p: torch.arange(p.numel()).view(p.shape) % 2 == 0 for p in model.parameters()}
    optimizer.set_masks(masks, "second", limit=limit)
    if order == "ensemble":
        optimizer.set_masks(masks, "first", limit=limit)
    ce, kl = two_passes(model, inputs, labels)
    torch.manual_seed(SEED)
    rose_backward(model, inputs, labels, optimizer, r_drop=0.7)
    kinds = ["first", "second"] if order == "ensemble" else ["second"]
    assert [kind for kind, *_ in optimizer.captures] == (kinds if limit else [])
    assert_grads([p.grad for p in model.parameters()], grads(ce + 0.7 * kl, model))
    before = {p: p.detach().clone() for p in masks}
    optimizer.step()
    for p, mask in masks.items():
        assert (p != before[p])[~mask].sum() == 0
