"""Losses of ROSE: the symmetric KL of two dropout passes, and the two-pass training step."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rose_ops.optim import RoseFusedAdamW

_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class RoseLosses(NamedTuple):
    """What one call of `rose_backward` computed: detached 0-dim tensors.

    Attributes:
        loss: The loss whose gradient is left in `.grad`: `ce + r_drop * kl`.
        ce: Classification loss, the mean of both passes where there were two.
        kl: Symmetric KL between the two passes; None where one pass was enough.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None


def symmetric_kl(
    logits_p: Tensor,
    logits_q: Tensor,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
) -> Tensor:
    """Symmetric Kullback-Leibler divergence of two classifiers' outputs.

    `KL(P||Q) + KL(Q||P) = sum_c (p_c - q_c) * (log p_c - log q_c)`, with P and Q the softmax of
    the logits. Every term of this form is at least 0, so nothing cancels in the sum. Evaluated in
    float32 (float64 for float64 logits) whatever the logits' dtype and under autocast.

    Source: ROSE (Jiang et al., EMNLP 2022), Eq. 1.

    Args:
        logits_p: `[batch, classes]`, the logits of one pass; all finite, at least two classes.
        logits_q: The same shape, the logits of the other pass.
        reduction: `"batchmean"` sums over classes and averages over the batch, `"sum"` sums over
            both, `"none"` keeps `[batch]`.

    Returns:
        A 0-dim tensor, or `[batch]` for `reduction="none"`, in nats.

    Raises:
        ValueError: Shapes that are no two equal `[batch, classes]`, an empty batch, fewer than two
            classes, or an unknown reduction.
        TypeError: Logits that are not floating point.
    """
    if logits_p.shape != logits_q.shape:
        raise ValueError(
            "symmetric_kl compares two passes over one batch, so the logits must have the same "
            f"shape; got {tuple(logits_p.shape)} and {tuple(logits_q.shape)}"
        )
    if logits_p.dim() != 2:
        raise ValueError(
            f"symmetric_kl expects logits of shape [batch, classes], got {tuple(logits_p.shape)}; "
            "flatten other dimensions into the batch first and leave padded positions out"
        )
    if logits_p.shape[0] == 0 or logits_p.shape[1] < 2:
        raise ValueError(
            "symmetric_kl needs at least one example and two classes (the softmax of a single "
            f"logit is always 1, so its KL is always 0); got {tuple(logits_p.shape)}"
        )
    if not (logits_p.is_floating_point() and logits_q.is_floating_point()):
        raise TypeError(
            f"symmetric_kl expects floating-point logits, got {logits_p.dtype} and {logits_q.dtype}"
        )
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p = F.log_softmax(logits_p, dim=-1, dtype=dtype)
    log_q = F.log_softmax(logits_q, dim=-1, dtype=dtype)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)
    if reduction == "batchmean":
        return kl.mean()
    if reduction == "sum":
        return kl.sum()
    if reduction == "none":
        return kl
    raise ValueError(f"reduction must be 'batchmean', 'sum' or 'none', got {reduction!r}")


def rose_backward(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    r_drop: float = 0.0,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> RoseLosses:
    """One ROSE training step up to, and not including, `optimizer.step()`.

    Runs the forward passes and backward passes that the optimizer's `order` asks for, captures the
    masks and leaves the gradient of the update in `.grad`:

        for inputs, labels in batches:
            losses = rose_backward(model, inputs, labels, optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # if wanted
            optimizer.step()
            optimizer.zero_grad()

    With `ce` the classification loss and `kl` the `symmetric_kl` of two passes over the batch with
    different dropout:

    | order | forwards | masks captured here | backwards | gradient left in `.grad` |
    | --- | --- | --- | --- | --- |
    | second | 1 | none: `step()` takes it from `.grad` | 1 | ce |
    | first, ensemble | 2 | first, from kl | 2 | ce |
    | second, `r_drop` | 2 | second, from ce | 2 | ce + r_drop * kl |
    | first, `r_drop` | 2 | first, from kl | 2 | ce + r_drop * kl |
    | ensemble, `r_drop` | 2 | first, from kl; second, from ce | 3 | ce + r_drop * kl |

    Where there are two passes, `ce` is the mean of both cross-entropies, as in R-Drop and in the
    authors' code. No copy of the gradients is made; the third backward of the last row is the
    price of that. Any other optimizer gets the gradient and no masks, so baselines run in the same
    loop.

    Source: ROSE (Jiang et al., EMNLP 2022), Algorithm 1 lines 3-7, and section 3.5 for R-Drop,
    whose own paper (Liang et al., 2021) adds `a / 2` times the kl to the *sum* of both
    cross-entropies: its `a` is `4 * r_drop`.

    Mixed precision: call this inside `torch.autocast` (the backwards leave it again by
    themselves, `optimizer.step()` belongs outside), and with float16 pass the `scaler`, then
    `scaler.step(optimizer)` and `scaler.update()`. Masks are captured from unscaled gradients.

    Gradient accumulation: a mask must come from the gradients of all micro-batches, so where this
    function captures one, it refuses gradients that are there already. Accumulate in two phases:

        for inputs, _ in micro_batches:
            (symmetric_kl(model(inputs), model(inputs)) / len(micro_batches)).backward()
        optimizer.capture("first")
        for inputs, labels in micro_batches:
            (F.cross_entropy(model(inputs), labels) / len(micro_batches)).backward()
        optimizer.step()

    Args:
        model: Any classifier; in training mode, with dropout, where two passes are compared.
        inputs: What the model takes: a mapping (a Hugging Face batch without labels) becomes
            keyword arguments, a tuple or list positional ones, anything else the one argument.
        labels: `[batch]` class indices, or whatever else `criterion` takes.
        optimizer: A `RoseFusedAdamW`, or any optimizer for a baseline.
        r_drop: Weight of the kl in the update's loss; 0 is ROSE, above 0 is R-Drop + ROSE.
        criterion: `criterion(logits, labels)` gives the 0-dim classification loss.
        forward: `forward(model, inputs)` gives the logits `[batch, classes]`, for models that
            neither return a tensor nor an object with `.logits`.
        scaler: Scales the losses for float16 gradients.

    Returns:
        The losses, detached and unscaled.

    Raises:
        ValueError: `r_drop` below 0 or not finite, gradients left over from before, two passes
            that gave identical logits because no dropout is active, or (from `symmetric_kl`)
            logits of the wrong shape. Raised before any backward, with nothing changed.
        TypeError: An output in which the logits cannot be found.
    """
    if not 0.0 <= r_drop < float("inf"):
        raise ValueError(f"r_drop must be at least 0 and finite, got {r_drop}")
    rose = optimizer if isinstance(optimizer, RoseFusedAdamW) else None
    kinds = rose.settings.kinds if rose else ()
    first = "first" in kinds
    # Without R-Drop the update's gradient is that of ce, and step() takes the mask from it.
    second = "second" in kinds and r_drop > 0.0
    own = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = dict.fromkeys([*model.parameters(), *own])
    if (first or second) and any(p.grad is not None for p in parameters):
        raise ValueError(
            "some parameters already have a .grad, which would leak into the masks; call "
            "optimizer.zero_grad() before rose_backward (for gradient accumulation see its "
            "docstring)"
        )

    def backward(loss: Tensor, **options: Any) -> None:
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss), **options)

    run = forward or _forward
    passes = [run(model, inputs)]
    if first or r_drop > 0.0:
        passes.append(run(model, inputs))
    # A backward runs in the dtypes its forward chose; under autocast it would choose anew.
    with torch.autocast(passes[0].device.type, enabled=False):
        # Half precision would round the loss, and some criteria have no half-precision kernel.
        passes = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in passes]
        ce = torch.stack([criterion(logits, labels) for logits in passes]).mean()
        if len(passes) == 1:
            backward(ce)
            return RoseLosses(ce.detach(), ce.detach(), None)

        kl = symmetric_kl(passes[0], passes[1])
        _check_dropout(model, kl)
        loss = ce + r_drop * kl if r_drop > 0.0 else ce
        # A second-order risk is not the same for scaled gradients, so captures are told the scale.
        scale = None if scaler is None else scaler.scale(torch.ones_like(kl))
        if rose and first:
            backward(kl, retain_graph=True)
            rose.capture("first", grad_scale=scale)
            for p in parameters:  # those of another optimizer, too
                p.grad = None
        if rose and second:
            backward(ce, retain_graph=True)
            rose.capture("second", clear=False, grad_scale=scale)
            backward(r_drop * kl)
        else:
            backward(loss)
    return RoseLosses(loss.detach(), ce.detach(), kl.detach())


def _forward(model: nn.Module, inputs: Any) -> Tensor:
    """Logits of one pass, for the common ways to call a model and to return logits."""
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, which is neither a tensor nor an object "
            "with .logits; pass forward=lambda model, inputs: ... that returns the logits"
        )
    return logits


def _check_dropout(model: nn.Module, kl: Tensor) -> None:
    """Refuse two passes without dropout: kl and its gradient are 0, and every mask is all ones.

    Reading `kl` stops the host until the device is done, so it is read only where the model shows
    no active dropout module; functional dropout then still passes, because its kl is not 0.
    """
    if any(isinstance(m, _DROPOUT) and m.training and m.p > 0 for m in model.modules()):
        return
    if bool(kl == 0):
        why = "has no active dropout" if model.training else "is in eval mode: call model.train()"
        raise ValueError(
            "two passes over the batch gave identical outputs, so there is no KL gradient to rank "
            f"parameters by. The model {why}. The first order, the ensemble and R-Drop need "
            "dropout (the paper uses 0.1); order='second' does not"
        )
