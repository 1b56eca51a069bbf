"""What other packages wrap around optimizers and models, and what a training step must know of it.

None of those packages is imported here: they are recognised by what their wrappers hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rose_ops.optim import RoseFusedAdamW, _live

# Engines that do work of their own in a backward, which several backwards through one forward break.
_ENGINES = {
    "FullyShardedDataParallel": (
        "FSDP1 (FullyShardedDataParallel) frees and reduces its shards in the first backward of a "
        "forward, so a mask cannot be captured from a backward before the last; expected "
        "DistributedDataParallel, or order='second' without r_drop, which takes one backward"
    ),
    "torch.distributed._composable.replicate": (
        "replicate() averages gradients in the first backward of a forward only; expected "
        "DistributedDataParallel, for which rose_backward averages them itself"
    ),
    "DeepSpeedEngine": (
        "a DeepSpeed engine scales losses and reduces gradients in its own backward(), which "
        "rose_backward does not call; expected DistributedDataParallel"
    ),
}
_TWO_PHASES = (
    "a mask must come from the gradients of all micro-batches: accumulate in two phases, first the kl "
    "of all of them and capture(), then their losses (see the docstring of rose_backward)"
)


# ------------------------------------------------------------------------------------- optimizers


def unwrap(optimizer: Any) -> RoseFusedAdamW | None:
    """The `RoseFusedAdamW` inside any number of wrappers; what `capture()` is to be called on.

    Wrappers of optimizers (those of accelerate, Lightning, Fabric, DeepSpeed, torch's
    `PostLocalSGDOptimizer` and the like) keep what they wrap in an attribute, whatever its name. Some
    pretend to be of its class, so that `isinstance` says nothing.

    Args:
        optimizer: Any optimizer, wrapped or not.

    Returns:
        The innermost one that updates by masks, `optimizer` itself if nothing is wrapped; None where
        there is none, as for a baseline.

    Raises:
        ValueError: There are several, so it is not clear which is meant; or one that has the parameter
            groups of `optimizer` is not found in it.
    """
    found = [
        x
        for x in layers(optimizer)
        if isinstance(x, RoseFusedAdamW)
        and not any(isinstance(y, RoseFusedAdamW) for y in layers(x)[1:])
    ]
    if len(found) > 1:
        raise ValueError(
            f"{type(optimizer).__name__} holds {len(found)} RoseFusedAdamW; expected one: make one "
            "optimizer with parameter groups, as one ranking spans all of them, or pass each by itself"
        )
    if not found:
        groups = {id(group) for group in getattr(optimizer, "param_groups", ())}
        if any(id(group) in groups for rose in list(_live) for group in rose.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} has the parameter groups of a RoseFusedAdamW, which is "
                "not found in its attributes; expected the RoseFusedAdamW itself"
            )
    return found[0] if found else None


def layers(optimizer: Any) -> list[Any]:
    """An optimizer and all that it wraps, from the outside in."""
    found: list[Any] = []

    def visit(x: Any) -> None:
        found.append(x)
        for held in _held(x):
            if all(held is not y for y in found):
                visit(held)

    visit(optimizer)
    return found


def _held(x: Any) -> Iterator[Any]:
    """Optimizers in the attributes of `x`, in lists and dicts there, or whose methods are."""
    slots = (name for kind in type(x).__mro__ for name in _names(kind.__dict__.get("__slots__", ())))
    for value in (*getattr(x, "__dict__", {}).values(), *(_attribute(x, name) for name in slots)):
        # By type(): of a weak reference, isinstance() asks what may be gone.
        items: Iterable[Any] = (value,)
        if issubclass(type(value), (list, tuple)):
            items = value
        elif issubclass(type(value), dict):
            items = [*value.values()]
        for item in map(_behind, items):
            # What is a RoseFusedAdamW may know others, but wraps those of its own parameters only.
            if _is_optimizer(item) and (not isinstance(x, RoseFusedAdamW) or _same_params(x, item)):
                yield item


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _behind(item: Any) -> Any:
    """What a bound method is of, and a weak reference to."""
    if type(item) is MethodType:
        return item.__self__
    return item() if type(item) is weakref.ref else item


def _attribute(x: Any, name: str) -> Any:
    try:
        return getattr(x, name, None)
    except Exception:  # a weak reference to what is gone, or an attribute that cannot be read
        return None


def _is_optimizer(x: Any) -> bool:
    return issubclass(type(x), Optimizer) or all(
        _attribute(x, name) is not None for name in ("param_groups", "step")
    )


def _same_params(one: Any, other: Any) -> bool:
    mine, theirs = ({id(p) for g in x.param_groups for p in g["params"]} for x in (one, other))
    return not mine.isdisjoint(theirs)


class Precision(NamedTuple):
    """What the wrapper of an optimizer would do to a loss before its backward.

    Attributes:
        scaler: Scales it.
        accumulation: The number of micro-batches it is divided by.
        steps: Whether this micro-batch is the last before a step.
    """

    scaler: torch.amp.GradScaler | None = None
    accumulation: int = 1
    steps: bool = True

    @classmethod
    def of(cls, optimizer: Any, scaler: torch.amp.GradScaler | None) -> Precision:
        """What accelerate's or Lightning's wrapper says, and the user.

        Raises:
            ValueError: The user's scaler is another than the wrapper's.
        """
        found = cls(scaler)
        for x in layers(optimizer):
            state = _attribute(x, "gradient_state")  # accelerate's
            if state is not None:
                found = found._replace(accumulation=state.num_steps, steps=state.sync_gradients)
            strategy = _attribute(x, "_strategy")  # Lightning's
            plugins = (_attribute(strategy, name) for name in ("precision_plugin", "precision"))
            for owner in (x, *plugins):
                theirs = _attribute(owner, "scaler")
                if not isinstance(theirs, torch.amp.GradScaler) or theirs is found.scaler:
                    continue
                if found.scaler is not None:
                    raise ValueError(
                        f"scaler= is another than the one that {type(x).__name__} has; expected no "
                        "scaler, as that one is used"
                    )
                found = found._replace(scaler=theirs)
        return found

    def accumulating(self, steps: Any) -> Precision:
        """With a number of micro-batches that the caller accumulates.

        Raises:
            ValueError: It is none, or accelerate accumulates, too.
        """
        if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
            kind = type(steps).__name__
            raise ValueError(
                f"gradient_accumulation_steps={steps!r} ({kind}); expected an integer >= 1"
            )
        if self.accumulation > 1:
            raise ValueError(
                f"gradient_accumulation_steps={steps}, and accelerate's is {self.accumulation}; "
                "expected one of both"
            )
        return self._replace(accumulation=int(steps))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as it is backpropagated: divided for accumulation, and scaled."""
        if self.accumulation > 1:
            loss = loss / self.accumulation
        return loss if self.scaler is None else self.scaler.scale(loss)

    def scale_on(self, device: torch.device) -> Tensor | None:
        """What gradients are multiplied by: None without a scaler."""
        if self.scaler is None:
            return None
        return self.scaler.scale(torch.ones((), dtype=torch.float32, device=device))

    def check_captures(self) -> None:
        """Raise where a mask would come from one of several micro-batches."""
        if self.accumulation > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.accumulation} where rose_backward captures masks; "
                f"{_TWO_PHASES}, on rose_ops.unwrap(optimizer)"
            )


# ----------------------------------------------------------------------------------------- models


class Replicas:
    """`DistributedDataParallel` modules whose gradients this step averages itself.

    DDP averages gradients in the first backward after a forward and sees no other. Where a step runs
    several, or is itself inside the forward of DDP (as Lightning's `training_step` is), forwards and
    backwards run without it and `average_()` does what it would have done.

    Args:
        model: Where DDP is looked for, at any depth.
        parameters: Those that get gradients.
        several: Whether more than one backward runs.
        clips: Whether gradients are clipped at the end.
        accumulates: Whether this step takes all micro-batches, so that it may be inside of no_sync().

    Raises:
        ValueError: What wraps the model, or how, does not go with that.
    """

    def __init__(
        self, model: nn.Module, parameters: Iterable[Tensor], several: bool, clips: bool,
        accumulates: bool = False,
    ) -> None:  # fmt: skip
        modules = list(model.modules())
        kinds = {c for kind in set(map(type, modules)) for c in kind.__mro__}
        classes = {c.__name__ for c in kinds} | {c.__module__ for c in kinds}
        for name in _ENGINES.keys() & classes:
            if several or name == "DeepSpeedEngine":
                raise ValueError(f"{_ENGINES[name]}; nothing was changed")
        inside = [m for m in modules if isinstance(m, DistributedDataParallel)]
        around = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if around in inside or (around and set(parameters).isdisjoint(around.parameters())):
            around = None
        for ddp in inside if around is None else [around, *inside]:
            _check_ddp(ddp, several, clips, accumulates)
        # Without several backwards, those inside do their own work.
        self._ddp = ([] if around is None else [around]) + (inside if several else [])
        self._several = several

    @contextmanager
    def watched(self) -> Iterator[None]:
        """For a forward: one by a `DistributedDataParallel` that is not in the model is noticed.

        Raises:
            ValueError: There was one, which would average the first of several backwards only.
        """
        if not self._several or not dist.is_available() or not dist.is_initialized():
            yield
            return
        unknown: list[nn.Module] = []

        def note(module: nn.Module, _: Any) -> None:
            if isinstance(module, DistributedDataParallel) and module not in self._ddp:
                unknown.append(module)

        hook = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()
        if unknown:
            raise ValueError(
                "forward= runs a DistributedDataParallel that is not the model and not in it; expected "
                "it as the model, as its gradients have to be averaged; nothing was changed"
            )

    @contextmanager
    def quiet(self, rose: RoseFusedAdamW | None) -> Iterator[None]:
        """For forwards and backwards: DDP leaves gradients alone, and the optimizer knows that what it
        captures is averaged."""
        with ExitStack() as stack:
            if rose is not None:
                rose._averaged = True
                stack.callback(setattr, rose, "_averaged", False)
            for ddp in self._ddp if self._several else ():
                stack.enter_context(ddp.no_sync())
                # no_sync() stops the broadcast of buffers for the next forward, too, which is for
                # users who accumulate gradients.
                stack.callback(setattr, ddp, "require_forward_param_sync", True)
            yield

    def before_forward(self) -> None:
        """Let DDP broadcast buffers before each forward, as it does outside of `no_sync()`."""
        for ddp in self._ddp if self._several else ():
            ddp.require_forward_param_sync = True

    @torch.no_grad()
    def average_(self) -> None:
        """Average gradients over processes, in place. What is so already stays, up to rounding."""
        for ddp in self._ddp:
            if ddp.require_backward_grad_sync or self._several:  # else the user accumulates
                _average_(ddp)


def _check_ddp(ddp: DistributedDataParallel, several: bool, clips: bool, accumulates: bool) -> None:
    def fail(problem: str) -> ValueError:
        return ValueError(f"{problem}; nothing was changed")

    if not ddp.require_backward_grad_sync and not accumulates:
        if several:
            raise fail(f"rose_backward captures masks here, inside no_sync(): {_TWO_PHASES}")
        if clips:
            raise fail(
                "max_grad_norm inside no_sync() of DistributedDataParallel would clip gradients that "
                "are not averaged yet; expected it with the last micro-batch only, outside no_sync()"
            )
    if not several:
        return
    why = "which rose_backward, running several backwards of one forward, has to average by itself"
    if ddp._comm_hooks or ddp._get_ddp_logging_data().get("comm_hook"):
        raise fail(
            "DistributedDataParallel has a communication hook (or mixed_precision) for gradients, "
            f"{why}; expected none"
        )
    if ddp._join_config.enable:
        raise fail(
            "join() of DistributedDataParallel mirrors the averaging of gradients on ranks without "
            f"data, {why}; expected as many batches on every rank (DistributedSampler)"
        )
    if ddp.static_graph:
        raise fail(
            "static_graph=True of DistributedDataParallel counts on one backward of each forward, and "
            "several run here; expected static_graph=False (unused parameters and activation "
            "checkpoints work without it)"
        )
    if getattr(ddp, "_delay_all_reduce_params", None):
        raise fail(
            "delay_all_reduce_named_params of DistributedDataParallel averages gradients in every "
            "backward, and several run here; expected none"
        )


def _average_(ddp: DistributedDataParallel) -> None:
    group = ddp.process_group
    size = dist.get_world_size(group)
    ignored = ddp.parameters_to_ignore
    named = ddp.module.named_parameters(remove_duplicate=False)
    params = list(dict.fromkeys(p for name, p in named if name not in ignored))
    if size == 1 or not params:
        return
    # A rank without a gradient that another has must take part and get it, too.
    here = [p.grad is not None for p in params]
    present = torch.tensor(here, dtype=torch.uint8, device=params[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    used = [p for p, somewhere in zip(params, present.tolist(), strict=True) if somewhere]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used], ddp.bucket_bytes_cap):
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if alone else torch.cat([g.reshape(-1) for g in bucket])
        flat.div_(size)  # before the sum, as DDP does: half precision overflows later
        dist.all_reduce(flat, group=group)
        if not alone:
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [x.view(g.shape) for x, g in zip(parts, bucket, strict=True)])


def _buckets(grads: list[Any], limit: int) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device each, of at most `limit` bytes or one of them."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    for same in kinds.values():
        bucket, size = [same[0]], same[0].nbytes
        for grad in same[1:]:
            if size + grad.nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket
