"""Whether parameters, gradients and state can be used: when they are given, and when they are. And
whether what surrounds the optimizer lets it do what it should."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rose_ops.flat import FlatParameter
from rose_ops.layout import overlaps_itself, sharing_memory
from rose_ops.settings import Settings
from rose_ops.shards import has_placement_of, is_spread, local, unplaceable

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("step", *MOMENTS)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOCAL = (
    "A ranking and a clipping norm are over all parameters, and from a part of them something else "
    "would be trained without a word. Use DistributedDataParallel or FSDP2 (fully_shard), pass "
    "process_group= (the ranks that have the other parts) for one ranking over all of them, or "
    "local_ranking=True to rank and clip each rank's part by itself"
)


def is_sharded(settings: Settings) -> bool:
    """Whether a part of the parameters would be taken for the whole."""
    return (
        settings.is_global
        and not settings.local_ranking
        and settings.process_group is None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def is_complete(state: dict[str, Any]) -> bool:
    return "step" in state and "exp_avg" in state and "exp_avg_sq" in state


def has_memory(tensor: Tensor) -> bool:
    tensor = local(tensor)
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_params(params: list[Tensor], settings: Settings) -> None:
    """Raise unless ``params`` can be a group.

    Only parameters that are trained need to fit: others may be anything (quantized, complex, on "meta",
    not yet materialized) and are looked at when they have a gradient.
    """
    if len(set(params)) < len(params):
        raise ValueError(
            "a parameter is more than once in a group; expected once, as one ranking counts every "
            "element once"
        )
    trained = [p for p in params if p.requires_grad and not is_lazy(p)]
    for param in trained:
        check_param(param)
        check_shard(param, settings)
        if settings.granularity == "tensor" and isinstance(param, FlatParameter):
            raise ValueError(
                "granularity='tensor' ranks whole tensors, and a flat parameter has none; expected the "
                "parameters as they were before flatten_parameters()"
            )


def check_together(params: Iterable[Tensor]) -> None:
    """Raise unless parameters are on one device and share no elements."""
    # One that is in two groups is refused in PyTorch's words.
    params = [p for p in dict.fromkeys(params) if not is_lazy(p)]
    for param in params:
        if param.device != params[0].device:
            raise ValueError(
                f"a parameter is on {param.device} and others are on {params[0].device}; expected all "
                "on one device: use one optimizer for each (each with its own ranking)"
            )
    if pair := sharing_memory(list(map(local, params))):
        i, j = pair
        raise ValueError(
            f"two parameters, of shapes {tuple(params[i].shape)} and {tuple(params[j].shape)}, share "
            "memory: each would update the other's elements at the same time. Tie them as one "
            "parameter (module.weight = other.weight), or give the optimizer one of them"
        )


# How parameters are marked by what splits them.
_SPLITTERS = {
    "_fsdp_flattened": "FullyShardedDataParallel (FSDP1)",
    "tensor_model_parallel": "Megatron's tensor parallelism",
    "ds_tensor": "DeepSpeed's ZeRO-3",
}


def check_shard(p: Tensor, settings: Settings) -> None:
    for mark, splitter in _SPLITTERS.items():
        found = getattr(p, mark, None)
        if found is not None and found is not False and is_sharded(settings):
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} is this rank's part of one that {splitter} has "
                f"split. {LOCAL}"
            )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its memory: no subclass that stands for other tensors or computes itself."""
    kind = type(tensor)
    return (
        kind in (Tensor, torch.nn.Parameter, FlatParameter)
        or issubclass(kind, FakeTensor)
        or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def check_param(p: Tensor) -> None:
    if is_spread(p):
        if problem := unplaceable(p):
            raise ValueError(f"a DTensor of shape {tuple(p.shape)} cannot be a parameter: {problem}")
        p = local(p)
    if not is_plain(p):
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} is a {type(p).__name__}, a tensor subclass whose "
            "elements are not simply in memory; expected plain parameters (freeze it, or leave it out)"
        )
    if torch.is_complex(p):
        raise TypeError("complex parameters cannot be ranked; expected float32, bfloat16 or float16")
    if p.dtype not in _DTYPES:
        raise TypeError(f"parameters of {p.dtype} are not supported; expected one of {_DTYPES}")
    if p.layout != torch.strided:
        raise TypeError(f"parameters of layout {p.layout} are not supported; expected dense ones")
    if p.is_neg():
        raise ValueError(
            "a parameter is a lazily negated view (its negative bit is set); use .resolve_neg()"
        )
    if overlaps_itself(p):
        raise ValueError(
            "a parameter is an expanded tensor, whose elements share memory; use .contiguous()"
        )


def check_ready(
    p: Tensor, grad: Tensor, state: dict[str, Any], offset: int, settings: Settings
) -> None:
    moment: Any = state.get("exp_avg")
    if (
        is_complete(state)
        and type(grad) is Tensor
        and grad.dtype in _DTYPES
        and p.dtype in _DTYPES
        and grad.layout == p.layout == torch.strided
        and grad.shape == p.shape == moment.shape
        and grad.device == p.device == moment.device
        and p.is_contiguous()
        and type(p) is torch.nn.Parameter
        and not p.is_neg()
        and not p.__dict__  # no marks
    ):
        return  # as in almost every step: the rest takes time
    what = f"the parameter of shape {tuple(p.shape)} (elements from {offset})"
    if grad.layout != torch.strided or torch.is_complex(grad):
        kind = "complex" if torch.is_complex(grad) else "sparse"
        raise RuntimeError(
            f"the gradient of {what} is {kind}; RoseFusedAdamW ranks dense real gradients "
            "(for an embedding, use sparse=False)"
        )
    if is_spread(grad) or is_spread(p):
        _check_placement(grad, p, "the gradient of " + what)
        grad = local(grad)
        if moment is not None:
            _check_placement(moment, p, "the state of " + what)
    if not is_plain(grad):
        raise TypeError(
            f"the gradient of {what} is a {type(grad).__name__}; expected a plain tensor, whose "
            "elements are in memory"
        )
    if grad.device != p.device:
        raise RuntimeError(f"the gradient of {what} is on {grad.device}, expected {p.device}")
    if grad.shape != local(p).shape:
        raise RuntimeError(
            f"the gradient of {what} has shape {tuple(grad.shape)}; expected the parameter's"
        )
    check_param(p)
    check_shard(p, settings)
    if grad.dtype not in _DTYPES:
        raise TypeError(f"the gradient of {what} is {grad.dtype}; expected one of {_DTYPES}")
    if missing := [key for key in STATE if key not in state]:
        if len(missing) < len(STATE):
            raise RuntimeError(
                f"the state of {what} has no {', '.join(map(repr, missing))}; expected "
                f"{', '.join(STATE)}, or none of them: load it by load_state_dict(), or clear it"
            )
        return
    if moment.shape != p.shape or moment.device != p.device:
        raise RuntimeError(
            f"{what} has state of shape {tuple(moment.shape)} on {moment.device}: the parameter "
            "changed its shape or device after a step; make a new optimizer for it"
        )


def _check_placement(tensor: Tensor, p: Tensor, what: str) -> None:
    """Raise unless both are plain tensors, or DTensors that are placed alike."""
    if not (is_spread(tensor) and is_spread(p)):
        kinds = [type(x).__name__ if is_spread(x) else "plain tensor" for x in (tensor, p)]
        if kinds[0] != kinds[1]:
            raise RuntimeError(
                f"{what} is a {kinds[0]}, and the parameter a {kinds[1]}; expected both alike"
            )
    elif not has_placement_of(tensor, p):
        here: tuple[Any, Any] = (tensor, p)
        raise RuntimeError(
            f"{what} is placed as {here[0].placements}, and the parameter as {here[1].placements}; "
            "expected the same (redistribute() it)"
        )


_SHARDERS = ("ZeroRedundancyOptimizer", "OSS")  # of PyTorch, of fairscale


def check_maker(settings: Settings) -> None:
    """Some wrappers give the optimizer that they make a part of the parameters, as if that were all of
    them: nothing but who is calling tells."""
    frame = sys._getframe(2) if is_sharded(settings) else None
    while frame is not None:
        kinds = type(frame.f_locals.get("self")).__mro__
        if name := next((kind.__name__ for kind in kinds if kind.__name__ in _SHARDERS), None):
            raise RuntimeError(
                f"{name} gives each rank's optimizer a part of the parameters, and a ranking and a "
                "clipping norm are over all of them: something else would be trained without a word. "
                "Use the optimizer itself, on every rank, or rank and clip each part by itself: "
                "optimizer_class=functools.partial(RoseFusedAdamW, local_ranking=True)"
            )
        frame = frame.f_back


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_current_stream_capturing()


def check_graph(optimizer: Optimizer, device: torch.device, has_state: bool) -> None:
    """Raise if a graph is being recorded that would not do what it should."""
    # Where there are both names, the older one warns.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if check := getattr(optimizer, name, None):
            check()  # that capturable is set
            break
    if not has_state and is_recording(device):
        raise RuntimeError(
            "a CUDA graph is being recorded and some parameters have no state yet; every replay would "
            "start from zero again: call step() once before recording"
        )
