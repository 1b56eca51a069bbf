"""Losses of ROSE: the symmetric KL, and what `rose_backward` captures and leaves in `.grad`."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils.checkpoint import checkpoint

from rose_ops import RoseFusedAdamW, rose_backward, symmetric_kl

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
