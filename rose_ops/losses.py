"""The two-pass training step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rose_ops.divergence import check_logits, symmetric_kl
from rose_ops.optim import RoseFusedAdamW
from rose_ops.settings import check_limit
from rose_ops.wrappers import Precision, Replicas, unwrap

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
        grad_norm: Norm of that gradient before it was clipped; None where it was not, or where the
            optimizer does so itself (`optimizer.grad_norm`).
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor | None
    grad_norm: Tensor | None = None


def rose_backward(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    optimizer: torch.optim.Optimizer,
    *,
    r_drop: float = 0.0,
    max_grad_norm: float | None = None,
    gradient_accumulation_steps: int = 1,
    criterion: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> RoseLosses:
    """One ROSE training step up to, and not including, `optimizer.step()`.

    Runs the forward passes and backward passes that the optimizer's `order` asks for, captures the
    masks and leaves the gradient of the update in `.grad`:

        for inputs, labels in batches:
            losses = rose_backward(model, inputs, labels, optimizer, max_grad_norm=1.0)
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

    A step that selects nothing (warm-up, `upper=1`) needs no mask and takes what AdamW's does; one that
    uses a first-order mask again (`first_order_every`) captures none.

    Where there are two passes, `ce` is the mean of both cross-entropies, as in R-Drop and in the
    authors' code. No copy of the gradients is made; the third backward of the last row is the
    price of that. Any other optimizer gets the gradient and no masks, so baselines run in the same
    loop.

    Source: ROSE (Jiang et al., EMNLP 2022), Algorithm 1 lines 3-7, and section 3.5 for R-Drop,
    whose own paper (Liang et al., 2021) adds `a / 2` times the kl to the *sum* of both
    cross-entropies: its `a` is `4 * r_drop`.

    Clipping: pass `max_grad_norm` here, or to `RoseFusedAdamW`, rather than clip after the call. A
    second-order mask that is captured here compares the gradient with an average of clipped ones, so
    it must be clipped before it is ranked.

    Mixed precision: call this inside `torch.autocast` (the backwards leave it again by
    themselves, `optimizer.step()` belongs outside), and with float16 pass the `scaler`, then
    `scaler.step(optimizer)` and `scaler.update()`. Masks are captured from unscaled gradients, and
    `max_grad_norm` is of them; those in `.grad` stay scaled until `scaler.step()`.

    Several processes: `DistributedDataParallel` averages gradients in the first backward of a
    forward only. Where several run (all rows but the first), this function averages them instead,
    before every capture, so masks are those of the whole batch, and the same in every process. Where
    one runs, DDP does its own work, and its `no_sync()` accumulates gradients.

    Wrapped optimizers: with that of accelerate, losses are scaled and divided for accumulation as by
    `accelerator.backward()`, and gradients clipped with the last micro-batch only; with Lightning's,
    losses are scaled by the trainer's scaler.

    Other leaves: gradients of tensors that are neither the model's parameters nor the optimizer's, such
    as inputs of adversarial training, get what every backward adds, that of the kl included.

    Gradient accumulation: a mask must come from the gradients of all micro-batches, so where this
    function captures one, it refuses gradients that are there already: `rose_accumulate` takes them
    all. (Or accumulate in two phases, first the kl of all of them and `optimizer.capture("first")`,
    then their losses: four forwards of each instead of two, and no copy of the gradients.)

    Args:
        model: Any classifier; in training mode, with dropout, where two passes are compared.
        inputs: What the model takes: a mapping (a Hugging Face batch without labels) becomes
            keyword arguments, a tuple or list positional ones, anything else the one argument.
        labels: `[batch]` class indices, or whatever else `criterion` takes.
        optimizer: A `RoseFusedAdamW`, or any optimizer for a baseline; wrapped or not.
        r_drop: Weight of the kl in the update's loss; 0 is ROSE, above 0 is R-Drop + ROSE.
        max_grad_norm: Clip the gradient that is left in `.grad` to this norm, over all parameters of
            the optimizer, as `torch.nn.utils.clip_grad_norm_` does, and that of a second-order
            mask likewise. With gradient accumulation, pass it with the last micro-batch.
        gradient_accumulation_steps: Divide the loss that is backpropagated by it, where micro-batches
            are accumulated by whoever calls this. (accelerate's own is known from its wrapper.)
        criterion: `criterion(logits, labels)` gives the 0-dim classification loss.
        forward: `forward(model, inputs)` gives the logits `[batch, classes]`, for models that
            return neither a tensor, nor an object or mapping with `logits`, nor a tuple that begins
            with them.
        scaler: Scales the losses for float16 gradients.

    Returns:
        The losses, detached, unscaled and not divided for accumulation.

    Raises:
        ValueError: An argument out of its range, gradients left over from before, two passes that
            gave identical logits because no dropout is active, logits of the wrong shape, a loss
            that is not 0-dim, or wrappers that several backwards do not work with. Raised before
            any backward, with nothing changed.
        TypeError: An output in which the logits cannot be found.
    """
    r_drop = check_r_drop(r_drop)
    rose = unwrap(optimizer)
    check_limit(max_grad_norm, rose.settings.max_grad_norm if rose else None)
    first, second = masks_to_capture(rose, r_drop)
    own = [p for group in (rose or optimizer).param_groups for p in group["params"]]
    parameters = dict.fromkeys([*model.parameters(), *own])
    precision = Precision.of(optimizer, scaler)
    if gradient_accumulation_steps != 1:
        precision = precision.accumulating(gradient_accumulation_steps)
    if second or (rose and "first" in rose.settings.kinds):
        precision.check_captures()
        check_no_gradients(model, parameters)
    clips = max_grad_norm is not None and precision.steps
    replicas = Replicas(model, parameters, several=first or second, clips=clips)

    def run() -> Tensor:
        replicas.before_forward()
        with replicas.watched():
            return logits_of(model, inputs, forward)

    def backward(loss: Tensor, **options: Any) -> None:
        torch.autograd.backward(precision.scaled(loss), **options)
        replicas.average_()

    with replicas.quiet(rose):
        passes = [run()]
        if first or r_drop > 0.0:
            passes.append(run())
            check_logits(*passes)
        with without_autocast(passes[0]):
            ce, kl = ce_and_kl(model, passes, labels, criterion)
            loss = ce + r_drop * kl if r_drop > 0.0 else ce
            # A second-order risk is not the same for scaled gradients, so captures are told the
            # scale; the norm to clip to is of unscaled ones, too.
            scale = precision.scale_on(ce.device)
            if rose and first:
                backward(kl, retain_graph=True)
                rose.capture("first", grad_scale=scale)
                for p in parameters:  # those of another optimizer, too
                    p.grad = None
            if rose and second:
                backward(ce, retain_graph=True)
                rose.capture("second", clear=False, grad_scale=scale, max_grad_norm=max_grad_norm)
                backward(kl * r_drop)
            else:
                backward(loss)
    norm = clip_(own, max_grad_norm, scale) if clips else None
    return RoseLosses(loss.detach(), ce.detach(), None if kl is None else kl.detach(), norm)


def check_r_drop(r_drop: object) -> float:
    if not isinstance(r_drop, Real) or isinstance(r_drop, bool) or not 0.0 <= float(r_drop) < math.inf:
        kind = type(r_drop).__name__
        raise ValueError(f"r_drop={r_drop!r} ({kind}); expected a finite number >= 0")
    return float(r_drop)


def masks_to_capture(rose: RoseFusedAdamW | None, r_drop: float) -> tuple[bool, bool]:
    """Whether the coming step needs a first-order and a second-order mask that `step()` cannot make.

    Without R-Drop the update's gradient is that of ce, and `step()` ranks it itself.
    """
    if rose is None:
        return False, False
    second = "second" in rose.settings.kinds and not rose._captures.is_own("second")
    return rose.needs_first_mask, second and r_drop > 0.0 and rose._is_selecting()


def without_autocast(logits: Tensor) -> AbstractContextManager[Any]:
    """Around losses and backwards: a backward runs in the dtypes that its forward chose, and under
    autocast it would choose anew."""
    device = logits.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def ce_and_kl(
    model: nn.Module,
    passes: Sequence[Tensor],
    labels: Any,
    criterion: Callable[[Tensor, Any], Tensor],
) -> tuple[Tensor, Any]:
    """The mean of the classification losses of one or two passes, and the KL between two, or None.

    Raises:
        ValueError: No dropout is active in two passes, or a loss is not 0-dim.
    """
    # Half precision would round the loss, and some criteria have no half-precision kernel.
    passes = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in passes]
    ce = torch.stack([loss_of(criterion, logits, labels) for logits in passes]).mean()
    if len(passes) == 1:
        return ce, None
    kl = symmetric_kl(passes[0], passes[1])
    check_dropout(model, kl)
    return ce, kl


def logits_of(model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any] | None) -> Tensor:
    """One pass."""
    return logits_in(forward(model, inputs) if forward else _call(model, inputs))


def _call(model: nn.Module, inputs: Any) -> Any:
    """One pass, for the common ways to call a model."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def logits_in(output: Any) -> Tensor:
    """Logits, for the common ways to return them."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    elif logits is None and isinstance(output, (tuple, list)) and output:
        # As of Hugging Face models with return_dict=False: behind the loss, if they were given labels.
        has_loss = len(output) > 1 and isinstance(output[0], Tensor) and output[0].dim() == 0
        logits = output[1 if has_loss else 0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, which is neither a tensor, nor an object or "
            "mapping with logits, nor a tuple that begins with them; pass forward=lambda model, "
            "inputs: ... that returns the logits"
        )
    if logits.dim() == 0:
        raise ValueError(
            "the model returned a 0-dim tensor, which seems to be a loss; expected logits [batch, "
            "classes]: leave the labels out of inputs, or pass forward=lambda model, inputs: ..."
        )
    return logits


def loss_of(criterion: Callable[[Tensor, Any], Tensor], logits: Tensor, labels: Any) -> Tensor:
    loss = criterion(logits, labels)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"criterion returned {got}; expected a 0-dim tensor, the loss of the batch (for PyTorch's "
            "criteria, reduction='mean')"
        )
    return loss


def clip_(parameters: Iterable[Tensor], max_norm: Any, scale: Tensor | None) -> Tensor:
    """`clip_grad_norm_` of what may be scaled gradients, and stay so; returns the unscaled norm.

    Not by `GradScaler.unscale_`: that can be called once for a step, which wrappers do themselves,
    and it takes no float16 gradients.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm(
        [
            # A norm is of its gradient's dtype, and float16 may not hold it.
            torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype == torch.float16 else g
            for p in parameters
            if (g := p.grad) is not None
        ]
    )
    if scale is not None:
        norm = norm / scale
    torch.nn.utils.clip_grads_with_norm_(parameters, float(max_norm), norm)
    return norm


def check_no_gradients(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Refuse gradients that would leak into the masks."""
    parameters = list(parameters)
    left = [(p, g) for p in parameters if (g := p.grad) is not None]
    if left:
        first = left[0][0]
        outside = f"one of shape {tuple(first.shape)} outside of the model"
        name = next((repr(n) for n, p in model.named_parameters() if p is first), outside)
        raise ValueError(
            f"{len(left)} of {len(parameters)} parameters have a .grad already (the first is {name}"
            f"{', and all are zeros' if not any(g.any() for _, g in left) else ''}), which would leak "
            "into the masks; expected None, as zeros count, too: call "
            "optimizer.zero_grad(set_to_none=True) before rose_backward (for gradient accumulation see "
            "its docstring, and rose_ops.rose_accumulate)"
        )


def check_dropout(model: nn.Module, kl: Tensor) -> None:
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
