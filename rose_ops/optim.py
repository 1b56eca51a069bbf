"""``RoseFusedAdamW``: parameter groups, state and the order of things. The arithmetic is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, compress
from numbers import Real
from operator import is_
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rose_ops import backends, memory
from rose_ops.flat import FlatParameter, members
from rose_ops.functional import (
    GRANULARITIES,
    INACTIVE,
    ROUNDINGS,
    SELECTIONS,
    Selection,
    UpdateCounts,
    check_fractions,
    choice,
)
from rose_ops.layout import empty_masks, memory_order, overlaps_itself
from rose_ops.reference import (
    FRACTION_UNIT,
    Field,
)

ORDERS = {"first": ("first",), "second": ("second",), "ensemble": ("first", "second")}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE_DTYPES = (torch.float32, torch.bfloat16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Keys of torch.optim.AdamW's groups that mean nothing here, in the only setting that can be honoured.
_ADAMW_ONLY = {
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "foreach": None,
    "fused": None,
}


def _mask_key(kind: str) -> str:
    return f"{kind}_mask"


@dataclass(frozen=True)
class Settings:
    """What one ranking over all groups needs to agree on: the selection's settings.

    Raises:
        ValueError, TypeError: a setting out of its range. NotImplementedError: not there yet.
    """

    order: str = "second"
    upper: float | tuple[float, float] = 0.6
    lower: float | tuple[float, float] = 0.0
    gamma: float = 0.5
    granularity: str = "element"
    selection: str = "bracket"
    inactive: str = "update"
    selection_warmup_steps: int = 0
    max_grad_norm: float | None = None
    error_if_nonfinite: bool = False
    state_dtype: torch.dtype | None = None
    param_rounding: str = "nearest"
    backend: str = "auto"
    process_group: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        choice("order", self.order, tuple(ORDERS))
        choice("granularity", self.granularity, GRANULARITIES)
        choice("selection", self.selection, SELECTIONS)
        choice("inactive", self.inactive, INACTIVE)
        choice("param_rounding", self.param_rounding, ROUNDINGS)
        choice("backend", self.backend, backends.NAMES)
        for kind in ("first", "second"):
            self.fractions(kind)
        if not _is_number(self.gamma) or not 0 < self.gamma < 1:
            raise ValueError(f"gamma={self.gamma}; expected 0 < gamma < 1, the first-order weight")
        for name, limit in (("selection_warmup_steps", math.inf), ("seed", 2**32)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
                below = "" if limit == math.inf else f" and < {limit}"
                raise ValueError(f"{name}={value}; expected an integer >= 0{below}")
        if self.state_dtype not in (None, *_STATE_DTYPES):
            raise ValueError(
                f"state_dtype={self.state_dtype}; expected None (float32), torch.float32 or "
                "torch.bfloat16"
            )
        norm = self.max_grad_norm
        if norm is not None and (not isinstance(norm, Real) or isinstance(norm, bool) or not norm > 0):
            raise ValueError(f"max_grad_norm={norm}; expected None (no clipping) or a number > 0")
        if not isinstance(self.error_if_nonfinite, bool):
            raise ValueError(f"error_if_nonfinite={self.error_if_nonfinite}; expected True or False")
        if self.process_group is not None:
            raise NotImplementedError(
                "process_group is not there yet: rankings over several processes are not there"
            )

    @cached_property
    def _fractions(self) -> dict[str, tuple[int, int]]:
        return {kind: self._fractions_of(kind) for kind in ("first", "second")}

    def fractions(self, kind: str) -> tuple[int, int]:
        """(c_h, c_l) of the ``"first"`` or ``"second"`` mask, in units of 1e-9."""
        return self._fractions[kind]

    def _fractions_of(self, kind: str) -> tuple[int, int]:
        def pick(name: str, value: float | tuple[float, float]) -> float:
            if not isinstance(value, (tuple, list)):
                return value
            if len(value) != 2:
                raise ValueError(f"{name}={value}; expected a number or a pair (first, second)")
            return value[kind == "second"]

        pairs = isinstance(self.upper, (tuple, list)) or isinstance(self.lower, (tuple, list))
        suffix = f" ({kind})" if pairs else ""
        return check_fractions(pick("upper", self.upper), pick("lower", self.lower), suffix)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The masks that ``order`` needs."""
        return ORDERS[self.order]

    @cached_property
    def is_adamw(self) -> bool:
        """Whether everything is kept, so that there is nothing to select."""
        return all(self.fractions(kind) == (FRACTION_UNIT, 0) for kind in self.kinds)

    @property
    def moment_dtype(self) -> torch.dtype:
        return self.state_dtype or torch.float32


@dataclass
class _Layout:
    """Parameters that have a gradient, in index-space order. Kept as long as nothing about them
    changes, so that what follows from them is found once."""

    params: list[Tensor]
    rows: list[int]  # of the group table
    offsets: list[int]
    states: list[dict[str, Tensor]] = field(default_factory=list)  # from _init_state() on
    masks: dict[str, list[Tensor]] = field(default_factory=dict)  # by kind, to be written again
    _selective: tuple[list[bool], _Layout] | None = None

    @cached_property
    def group(self) -> Tensor:
        return torch.tensor(self.rows)

    @cached_property
    def offset(self) -> Tensor:
        return torch.tensor(self.offsets)

    @cached_property
    def members(self) -> list[Tensor]:
        """The model's parameters."""
        return [m for p in self.params for m in members(p)]

    def subset(self, keep: list[bool]) -> _Layout:
        if self._selective is None or self._selective[0] != keep:
            part = _Layout(
                list(compress(self.params, keep)),
                list(compress(self.rows, keep)),
                list(compress(self.offsets, keep)),
                list(compress(self.states, keep)),
            )
            self._selective = keep, part
        return self._selective[1]


class _Batch(NamedTuple):
    """One step's tensors, in memory order."""

    layout: _Layout
    views: list[Tensor]  # of parameters
    grads: list[Tensor]
    scattered: list[int]  # parameters that are not contiguous

    @classmethod
    def of(cls, layout: _Layout, grads: list[Tensor]) -> _Batch:
        scattered = [i for i, p in enumerate(layout.params) if not p.is_contiguous()]
        batch = cls(layout, [], [], scattered)
        return cls(layout, batch.ordered(layout.params), batch.ordered(grads), scattered)

    def ordered(self, tensors: list[Tensor]) -> list[Tensor]:
        """What belongs to the parameters, in the order of their memory."""
        if self.scattered:
            tensors = list(tensors)
            for i in self.scattered:
                (tensors[i],) = memory_order(self.params[i], (tensors[i],))
        return tensors

    @property
    def params(self) -> list[Tensor]:
        return self.layout.params

    def states(self, key: str) -> list[Tensor]:
        values = [state[key] for state in self.layout.states]
        return self.ordered(values) if key in _MOMENTS else values

    def subset(self, keep: list[bool]) -> _Batch:
        if all(keep):
            return self
        layout = self.layout.subset(keep)
        views, grads = (list(compress(x, keep)) for x in (self.views, self.grads))
        scattered = [i for i, p in enumerate(layout.params) if not p.is_contiguous()]
        return _Batch(layout, views, grads, scattered)


class _Seen(NamedTuple):
    """A layout, and what it was made from."""

    layout: _Layout
    every: list[Tensor]  # parameters
    groups: list[int]  # their lengths
    numels: list[int]
    present: list[bool]  # gradients
    dtypes: list[torch.dtype]
    states: list[dict[str, Tensor]]  # those of other parameters, too


class _Clip(NamedTuple):
    """What gradients are multiplied by, and the sums of squares behind it; None without clipping."""

    factors: Tensor | None = None
    sums: Tensor | None = None


class _Kept:
    """Carries a state tensor through ``Optimizer.load_state_dict``, which would cast it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class RoseFusedAdamW(Optimizer):
    r"""AdamW that updates, at every step, only the parameters whose update is robust (ROSE).

    All parameters of the optimizer are ranked together by a risk, and the lowest ``upper`` fraction
    is updated (the mask M); the rest keeps its values and first moments::

        second order   r = | (1 - beta1) * |g| / |m| - 1 |       m: first moment before the step
        first order    r = |g_kl|                                 g_kl: gradient of a KL divergence
        ensemble       M = gamma * M_first + (1 - gamma) * M_second

        g' = M*g + (1 - M)*m
        m <- beta1*m + (1 - beta1)*g'
        v <- beta2*v + (1 - beta2)*g'^2
        p <- p - lr*M*( mhat/(sqrt(vhat) + eps) + weight_decay*p )

    Thresholds are exact and ties are all kept, so masks do not depend on threads, layout or order.
    An element whose gradient or moment is not finite is left alone. With ``upper=1`` this is
    ``torch.optim.AdamW``, with whose checkpoints it exchanges state both ways.

    First order and ensemble need the mask of the KL gradient before every step::

        kl.backward()
        opt.capture("first")
        ce.backward()
        opt.step()

    :func:`rose_ops.rose_backward` does that for any classifier.

    Args:
        params: parameters or groups. Float32, bfloat16 or float16. Groups may set ``lr``,
            ``betas``, ``eps``, ``weight_decay``, ``maximize`` and ``selective``; ``selective=False``
            means plain AdamW, outside the ranking. See :func:`rose_param_groups`.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; ``lr`` may be a tensor.
        order: ``"first"``, ``"second"`` or ``"ensemble"``.
        upper, lower: fractions of the ranking between which elements are kept, ``0 <= lower < upper
            <= 1``; a pair (first, second) sets the two masks of an ensemble apart.
        gamma: weight of the first-order mask in the ensemble, in (0, 1).
        granularity: ``"element"``, or ``"tensor"``: whole tensors are ranked by their Frobenius
            norms, as in the authors' code.
        selection: ``"bracket"``: the k-th smallest risk, found in the pass that updates. A sample
            brackets it; the bracket misses it with a probability below 1e-9 (see
            :func:`rose_ops.reference.bracket_adamw_`), which shows in ``selection["second"].misses``:
            then the nearest end of the bracket is the threshold. ``"exact"``: the same masks without
            luck, by a pass of its own. ``"approx"``: that pass only counts; the threshold is rounded up
            to 11 leading bits, so up to 12.5% too high in value, and what lies between is kept as well.
        inactive: what happens to elements without evidence to rank by (no gradient history in
            second order, zero gradient in first). ``"update"``: they are selected and stay out of the
            ranking; ``"rank"``: the formulas are taken literally.
        selection_warmup_steps: so many first steps are plain AdamW. (On a GPU a step that
            ``GradScaler`` skips counts, too: whether it does is not read back.)
        max_grad_norm: clip the gradients to this norm, over all parameters of the optimizer, as
            ``torch.nn.utils.clip_grad_norm_`` before the step would (``.grad`` itself is not written).
            The norm before clipping is :attr:`grad_norm`. Gradients are unscaled, clipped and then
            ranked; at ``granularity="tensor"`` norms are clipped. If the norm is not finite, selective
            parameters stay as they are, and all are counted in ``selection["update"].nonfinite``.
        error_if_nonfinite: raise a RuntimeError instead, which waits for the device.
        capturable: allows ``step()`` and ``capture()`` inside ``torch.cuda.graph``. As with PyTorch's
            optimizers, a learning rate that changes between replays must be a tensor on the device.
            Only calls of ``step()`` count for the selection warm-up, not replays: record graphs after
            the warm-up, and after a step outside of them, which makes the state. A graph owns all
            that it reads but the parameters, gradients and state.
        state_dtype: dtype of the moments. None: float32. With bfloat16, second moments are rounded
            stochastically (else they would never decay), keyed on ``seed``, step and element.
        param_rounding: of bfloat16 parameters. ``"stochastic"`` keeps, on average, updates that are
            smaller than half a unit in the last place, which ``"nearest"`` loses; keyed likewise, so
            that a run can be repeated and resumed bit for bit.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"`` (plain PyTorch on
            the CPU, slow). ``"auto"`` is ``"cuda"`` or else ``"triton"`` on a GPU.
        process_group: not there yet.
        seed: of the stochastic rounding, the only thing that is random here.

    Raises:
        ValueError, TypeError: an argument out of its range, said with what was expected.
        NotImplementedError: what is not there yet.

    Source: Jiang et al., *ROSE: Robust Selective Fine-tuning for Pre-trained Language Models*, EMNLP
    2022, Algorithm 1.
    """

    # torch.amp.GradScaler hands over grad_scale and found_inf instead of unscaling in a pass.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        order: str = "second",
        upper: float | tuple[float, float] = 0.6,
        lower: float | tuple[float, float] = 0.0,
        gamma: float = 0.5,
        granularity: str = "element",
        selection: str = "bracket",
        inactive: str = "update",
        selection_warmup_steps: int = 0,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        param_rounding: str = "nearest",
        backend: str = "auto",
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        self.settings = Settings(
            order, upper, lower, gamma, granularity, selection, inactive, selection_warmup_steps,
            max_grad_norm, error_if_nonfinite, state_dtype, param_rounding, backend, process_group,
            seed,
        )  # fmt: skip
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "selective": True,
        }
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """What is derived from the state, and statistics."""
        self._steps_done = 0
        self._captured: set[str] = set()
        self._dtypes: dict[Tensor, torch.dtype] = {}
        self._records: dict[str, Tensor] = {}
        self._sums: dict[Tensor, tuple[Tensor, int, float]] = {}  # see _exp_avg_sums
        self._seen: _Seen | None = None
        self._hyper: tuple[list[Any], Tensor] | None = None
        self._lrs: tuple[list[Any], Tensor] | None = None
        self._loaded: tuple[torch.device, backends.Backend] | None = None
        self.grad_norm: Tensor | None = None

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for example ones unfrozen later; see ``torch.optim.Optimizer``.

        Raises:
            ValueError, TypeError: an option or parameter that cannot work; nothing was added.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            params = param_group["params"]
            params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            merged = {**self.defaults, **param_group}
            _check_group(merged)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            # Sets and what is no tensor are refused below, in PyTorch's words.
            self._check_params([p for p in tensors if isinstance(p, Tensor)], merged["capturable"])
        super().add_param_group(param_group)

    def _check_params(self, params: list[Tensor], capturable: bool) -> None:
        """Raise unless ``params`` can be a group, next to those that are there."""
        if not params:
            return
        if len(set(params)) < len(params):
            raise ValueError(
                "a parameter is more than once in a group; expected once, as one ranking counts "
                "every element once"
            )
        for param in params:
            _check_param(param)
            if self.settings.granularity == "tensor" and isinstance(param, FlatParameter):
                raise ValueError(
                    "granularity='tensor' ranks whole tensors, and a flat parameter has none; expected "
                    "the parameters as they were before flatten_parameters()"
                )
        first = next((p for g in self.param_groups for p in g["params"]), params[0])
        for param in params:
            if param.device != first.device:
                raise ValueError(
                    f"a parameter is on {param.device} and others are on {first.device}; expected "
                    "all on one device: use one optimizer for each (each with its own ranking)"
                )
        backends.resolve(self.settings.backend, first.device)
        if capturable and first.device.type == "cpu":
            raise ValueError(
                "capturable=True is for CUDA graphs; expected False for parameters on the CPU"
            )

    # --------------------------------------------------------------------------------------- step

    def _collect(self, known: bool = True) -> _Batch:
        """All parameters that have a gradient. Raises before anything is changed.

        What is as in the latest step is not looked at again. Most of what then could be wrong is left
        to the operators, which check their arguments before they change any; see _explained().

        Args:
            known: False: look at everything.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "RoseFusedAdamW was called inside a backward pass (optimizer-in-backward); its "
                "ranking is global and needs all gradients: call it after backward()"
            )
        every = [p for group in self.param_groups for p in group["params"]]
        found = [p.grad for p in every]  # once: a flat parameter looks at all its members
        present = [grad is not None for grad in found]
        numels = [p.numel() for p in every]
        layout = self._known_layout(every, numels, present) if known else None
        grads = [grad for grad in found if grad is not None]
        if layout is None:
            self._seen = None
            groups = [len(group["params"]) for group in self.param_groups]
            rows = [row for row, count in enumerate(groups) for _ in range(count)]
            offsets = list(accumulate(numels, initial=0))[:-1]
            layout = _Layout(
                list(compress(every, present)),
                list(compress(rows, present)),
                list(compress(offsets, present)),
            )
            for p, grad, offset in zip(layout.params, grads, layout.offsets, strict=True):
                self._check_ready(p, grad, offset)
            dtypes = [p.dtype for p in layout.params]
            # Complete once there are states.
            self._seen = _Seen(layout, every, groups, numels, present, dtypes, [])
        if layout.params and not layout.params[0].is_cpu:
            _check_graph(self, not layout.states)
        return _Batch.of(layout, grads)

    def _known_layout(
        self, every: list[Tensor], numels: list[int], present: list[bool]
    ) -> _Layout | None:
        """That of the latest step, unless something about the parameters is not as it was there."""
        seen = self._seen
        if (
            seen is not None
            and seen.layout.states
            and _are(every, seen.every)
            and numels == seen.numels
            and present == seen.present
            and [len(group["params"]) for group in self.param_groups] == seen.groups
            and [p.dtype for p in seen.layout.params] == seen.dtypes
            and _are([*self.state.values()], seen.states)
            and all("step" in state for state in seen.layout.states)
            and self._backend(seen.layout).name != "reference"  # which checks nothing
        ):
            return seen.layout
        return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where an operator refuses tensors that were not looked at: say what is wrong in the user's
        terms, if it is that."""
        try:
            yield
        except Exception:
            self._collect(known=False)
            raise

    def _init_state(self, layout: _Layout) -> None:
        if layout.states:
            return
        new = [p for p in layout.params if "step" not in self.state[p]]
        for p in new:
            self._dtypes[p] = p.dtype
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for moment in _MOMENTS:
            for p, zeros in zip(new, memory.zeros_like(new, self.settings.moment_dtype), strict=True):
                self.state[p][moment] = zeros
        layout.states = [self.state[p] for p in layout.params]
        if self._seen is not None and self._seen.layout is layout:
            self._seen = self._seen._replace(states=[*self.state.values()])

    def _check_ready(self, p: Tensor, grad: Tensor, offset: int) -> None:
        state = self.state.get(p)
        moment = state.get("exp_avg") if state else None
        if (
            moment is not None
            and self._dtypes.get(p) == p.dtype
            and grad.dtype in _DTYPES
            and grad.layout == p.layout == torch.strided
            and grad.shape == p.shape == moment.shape
            and grad.device == p.device == moment.device
            and p.is_contiguous()
        ):
            return  # as in almost every step: the rest takes time
        what = f"the parameter of shape {tuple(p.shape)} (elements from {offset})"
        if grad.layout != torch.strided or torch.is_complex(grad):
            kind = "complex" if torch.is_complex(grad) else "sparse"
            raise RuntimeError(
                f"the gradient of {what} is {kind}; RoseFusedAdamW ranks dense real gradients "
                "(for an embedding, use sparse=False)"
            )
        if grad.device != p.device:
            raise RuntimeError(f"the gradient of {what} is on {grad.device}, expected {p.device}")
        if grad.shape != p.shape:
            raise RuntimeError(
                f"the gradient of {what} has shape {tuple(grad.shape)}; expected the parameter's"
            )
        _check_param(p)
        if grad.dtype not in _DTYPES:
            raise TypeError(f"the gradient of {what} is {grad.dtype}; expected one of {_DTYPES}")
        if moment is not None:
            if moment.shape != p.shape or moment.device != p.device:
                raise RuntimeError(
                    f"{what} has state of shape {tuple(moment.shape)} on {moment.device}: the "
                    "parameter changed its shape or device after a step; make a new optimizer for it"
                )
            if self._dtypes.setdefault(p, p.dtype) != p.dtype:
                raise RuntimeError(
                    f"{what} was {self._dtypes[p]} and is now {p.dtype}; make a new optimizer after "
                    "a change of dtype, and load the old one's state_dict() into it"
                )

    def _lr_table(self) -> Tensor:
        """Learning rates ``[G]``, where tensors of the user's are."""
        lrs = [group["lr"] for group in self.param_groups]
        if not any(isinstance(lr, Tensor) for lr in lrs):
            if self._lrs is None or self._lrs[0] != lrs:
                self._lrs = lrs, torch.tensor(lrs, dtype=torch.float64)
            return self._lrs[1]
        device = next((x.device for x in lrs if isinstance(x, Tensor) and not x.is_cpu), None)
        columns = [
            x.detach().to(device, torch.float64).reshape(1)
            if isinstance(x, Tensor) and x.device == device
            # Filled where it is needed: a copy from the CPU would wait for the device.
            else torch.full((1,), float(x), dtype=torch.float64, device=device)
            for x in lrs
        ]
        return torch.cat(columns) if len(columns) > 1 else columns[0]

    def _hyper_table(self) -> Tensor:
        """The other hyperparameters ``[G, 6]``, on the CPU."""
        selecting = self._is_selecting()
        values = [
            (
                group["betas"][0],
                group["betas"][1],
                group["eps"],
                group["weight_decay"],
                -1.0 if group["maximize"] else 1.0,
                float(group["selective"] and selecting),
            )
            for group in self.param_groups
        ]
        if self._hyper is None or self._hyper[0] != values:
            self._hyper = values, torch.tensor(values, dtype=torch.float64)
        return self._hyper[1]

    def _is_selecting(self) -> bool:
        """Whether the coming step selects at all."""
        settings = self.settings
        return not settings.is_adamw and self._steps_done >= settings.selection_warmup_steps

    def _backend(self, layout: _Layout) -> backends.Backend:
        device = layout.params[0].device
        if self._loaded is None or self._loaded[0] != device:
            self._loaded = device, backends.resolve(self.settings.backend, device)
        return self._loaded[1]

    def _ops(self, batch: _Batch) -> Any:
        return self._backend(batch.layout).ops

    def _selective(self, batch: _Batch) -> _Batch:
        flags = [group["selective"] for group in self.param_groups]
        return batch if all(flags) else batch.subset([flags[row] for row in batch.layout.rows])

    def _has_selective(self, batch: _Batch) -> bool:
        flags = [group["selective"] for group in self.param_groups]
        return any(flags[row] for row in batch.layout.rows)

    def _masks_of(self, kind: str, layout: _Layout, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Where masks go: again where the latest were, which are used up, or about to be replaced. A
        graph owns its masks."""
        if not layout.params[0].is_cpu and torch.cuda.is_current_stream_capturing():
            return make()
        device = layout.params[0].device
        if kind not in layout.masks or layout.masks[kind][0].device != device:
            layout.masks[kind] = make()
        return layout.masks[kind]

    def _clip(self, batch: _Batch, inv_scale: Tensor | None, limit: float | None = None) -> _Clip:
        """Of the gradients of all parameters: to the optimizer's norm, or for once to ``limit``."""
        settings = self.settings
        if settings.max_grad_norm is None and limit is None:
            return _Clip()
        sums = self._ops(batch).sums_of_squares(batch.grads, inv_scale)
        if limit is not None:
            return _Clip(self._ops(batch).clip_factors(sums, limit)[1:], sums)
        factors = self._ops(batch).clip_factors(sums, settings.max_grad_norm)
        self.grad_norm = norm = factors[0]
        if settings.error_if_nonfinite and not norm.isfinite():
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or found_inf.item() == 0:  # else the step is skipped
                raise RuntimeError(
                    f"the norm of all gradients is {norm.item()}, so they cannot be clipped to "
                    f"max_grad_norm={settings.max_grad_norm}; nothing was changed (with "
                    "error_if_nonfinite=False such a step leaves selective parameters alone)"
                )
        return _Clip(factors[1:], sums)

    def _exp_avg_sums(self, batch: _Batch) -> Tensor:
        """Sums of squares of first moments.

        On the CPU, those of tensors that the latest step left alone are remembered, with the version
        of the moment. (A GPU's masks are not read back.)
        """
        moments, sums_of_squares = batch.states("exp_avg"), self._ops(batch).sums_of_squares
        if not moments[0].is_cpu:
            return sums_of_squares(moments, None)
        keys = [(m := state["exp_avg"], m._version) for state in batch.layout.states]
        new = []
        for i, (p, (m, version)) in enumerate(zip(batch.params, keys, strict=True)):
            known = self._sums.get(p)
            if known is None or known[0] is not m or known[1] != version:
                new.append(i)
        if new:
            sums = sums_of_squares([moments[i] for i in new], None).tolist()
            for i, value in zip(new, sums, strict=True):
                self._sums[batch.params[i]] = (*keys[i], value)
        return torch.tensor([self._sums[p][2] for p in batch.params], dtype=torch.float64)

    def _tensor_masks(
        self, kind: str, batch: _Batch, inv_scale: Tensor | None, clip: _Clip
    ) -> list[Tensor]:
        """Rank the tensors of ``batch`` by their norms."""
        sums = clip.sums
        if sums is None or len(sums) != len(batch.params):
            sums = self._ops(batch).sums_of_squares(batch.grads, inv_scale)
        exp_avg_sums = self._exp_avg_sums(batch) if kind == "second" else None
        # The whole first, then its parts.
        mask, *masks = self._masks_of(
            f"{kind} of tensors",
            batch.layout,
            lambda: [
                whole := torch.empty(len(sums), dtype=torch.bool, device=sums.device),
                *whole.unbind(),
            ],
        )
        self._records[kind] = self._ops(batch).select_tensors_(
            mask, sums, exp_avg_sums, self._hyper_table(), batch.layout.group, clip.factors,
            *self.settings.fractions(kind), self._rank_inactive,
        )  # fmt: skip
        return masks

    @property
    def _rank_inactive(self) -> bool:
        return self.settings.inactive == "rank"

    @torch.no_grad()
    def capture(
        self,
        kind: str = "first",
        *,
        clear: bool = True,
        grad_scale: Tensor | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Make a mask from what ``.grad`` holds now, for the next :meth:`step` to use.

        Nothing is captured where the next step does not select (warm-up, ``upper=1``).

        Args:
            kind: ``"first"`` (``.grad`` is that of the KL loss) or ``"second"``. Without a captured
                second-order mask, ``step()`` finds it from the gradient that it updates with.
            clear: set ``.grad`` to None afterwards, as ``zero_grad()`` does.
            grad_scale: loss scale of the gradients (``GradScaler.scale``'s), if they are scaled.
            max_grad_norm: rank by gradients clipped to this norm (``.grad`` is not written), for steps
                before which they are clipped outside. First-order ranks do not depend on it.

        Raises:
            ValueError: ``order`` does not use such a mask, or ``max_grad_norm`` is no number > 0 or
                given to an optimizer that has its own.
            RuntimeError: no parameter has a gradient, or one that cannot be used.
        """
        if kind not in self.settings.kinds:
            raise ValueError(
                f"capture({kind!r}): order={self.settings.order!r} has no such mask; expected "
                + " or ".join(map(repr, self.settings.kinds))
            )
        check_limit(max_grad_norm, self.settings.max_grad_norm)
        batch = self._collect()
        if not batch.params:
            raise RuntimeError(f"capture({kind!r}): no parameter has a gradient; call backward() first")
        if self._is_selecting():
            inv_scale = _reciprocal(grad_scale)
            with self._explained():
                # The gradient to update with is clipped; ranks of the other do not depend on it.
                clip = self._clip(batch, inv_scale, max_grad_norm) if kind == "second" else _Clip()
                self._init_state(batch.layout)
                batch = self._selective(batch)
                masks = self._capture(kind, batch, inv_scale, clip) if batch.params else []
            self._drop_masks(kind)  # a second capture replaces the first
            key = _mask_key(kind)
            for state, mask in zip(batch.layout.states, masks, strict=True):
                state[key] = mask
            self._captured.add(kind)
        if clear:
            self.zero_grad(set_to_none=True)

    def _capture(self, kind: str, batch: _Batch, inv_scale: Tensor | None, clip: _Clip) -> list[Tensor]:
        settings = self.settings
        if settings.granularity == "tensor":
            return self._tensor_masks(kind, batch, inv_scale, clip)
        ops, fractions = self._ops(batch), settings.fractions(kind)
        masks = self._masks_of(
            kind,
            batch.layout,
            lambda: empty_masks([view.numel() for view in batch.views], batch.views[0].device),
        )
        tensors = (batch.grads, batch.states("exp_avg") if kind == "second" else [])
        table = (self._hyper_table(), batch.layout.group, inv_scale, clip.factors)
        if settings.selection == "bracket":
            self._records[kind] = ops.bracket_capture_(
                masks, *tensors, *table, *fractions, self._rank_inactive, self._steps_done, 1.0
            )
            return masks
        approx = settings.selection == "approx"
        record = ops.select(*tensors, *table, *fractions, self._rank_inactive, approx)
        ops.capture_(masks, *tensors, *table, record, self._rank_inactive)
        self._records[kind] = record
        return masks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Select and update; captured masks are consumed.

        Args:
            closure: reevaluates the model and returns the loss. With a first-order mask to capture,
                it does that, too.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a mask that the order needs was not captured, or a gradient cannot be used;
                parameters and moments stay as they were.
        """
        try:
            return self._step(closure)
        except BaseException:
            # GradScaler takes these back only after a step that went well, and would multiply the
            # next one's scale by what it finds.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batch = self._collect()
        selects = self._is_selecting() and self._has_selective(batch)
        if selects and "first" in self.settings.kinds and "first" not in self._captured:
            raise RuntimeError(
                f"order={self.settings.order!r} needs a first-order mask: call kl.backward() and "
                'optimizer.capture("first") before step() (rose_ops.rose_backward does both)'
            )
        if batch.params:
            with self._explained():
                self._update(batch, selects)
        for kind in tuple(self._captured):
            self._drop_masks(kind)
        return loss

    def _drop_masks(self, kind: str) -> None:
        key = _mask_key(kind)
        for state in self.state.values():
            state.pop(key, None)
        self._captured.discard(kind)

    def _update(self, batch: _Batch, selects: bool) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return  # nothing to read back here; on a GPU the kernels look
        inv_scale = _reciprocal(getattr(self, "grad_scale", None))
        clip = self._clip(batch, inv_scale)
        layout = batch.layout
        self._init_state(layout)
        lr, hyper = self._lr_table(), self._hyper_table()
        ops = self._ops(batch)
        settings = self.settings
        masks: dict[str, list[Tensor]] = {"first": [], "second": []}
        ranks = False  # whether the second-order mask is found on the way
        selective = self._selective(batch)
        for kind in settings.kinds if selects else ():
            if kind in self._captured:
                key = _mask_key(kind)
                found = [state.get(key) for state in layout.states]
            elif settings.granularity == "tensor":
                bools = self._tensor_masks(kind, selective, inv_scale, clip)
                # Hashing a tensor takes a call in Python.
                by_id = dict(zip(map(id, selective.params), bools, strict=True))
                found = [by_id.get(id(p)) for p in batch.params]
            else:
                ranks = True
                continue
            # A parameter that had no gradient at the capture is outside that ranking: selected.
            none = torch.empty(0, dtype=torch.uint8, device=batch.views[0].device)
            masks[kind] = [none if mask is None else mask for mask in found]
        fractions = settings.fractions("second")
        tensors = (
            batch.views, batch.grads, batch.states("exp_avg"), batch.states("exp_avg_sq"),
            batch.states("step"), masks["first"],
        )  # fmt: skip
        tables = (lr, hyper, layout.group, layout.offset, inv_scale, clip.factors, found_inf)
        stochastic = settings.param_rounding == "stochastic"
        if ranks and settings.selection == "bracket":
            result = ops.bracket_adamw_(
                *tensors, *tables, settings.gamma, *fractions, self._rank_inactive, settings.seed,
                stochastic, self._steps_done, 1.0,
            )  # fmt: skip
            self._records["second"], self._records["update"] = result.split([Field.SIZE, 2])
        else:
            record = None
            if ranks:
                self._records["second"] = record = ops.select(
                    selective.grads, selective.states("exp_avg"), hyper, selective.layout.group,
                    inv_scale, clip.factors, *fractions, self._rank_inactive,
                    settings.selection == "approx",
                )  # fmt: skip
            self._records["update"] = ops.adamw_(
                *tensors, masks["second"], record, *tables, settings.gamma, self._rank_inactive,
                settings.seed, stochastic,
            )  # fmt: skip
        for i, p in enumerate(batch.params if self._sums else ()):
            if not _rules_out([found[i] for found in masks.values() if found]):
                self._sums.pop(p, None)
        # As after any in-place operation: a backward that still needs the old values is an error.
        torch.autograd.graph.increment_version(layout.members)
        self._steps_done += 1

    @property
    def selection(self) -> dict[str, Selection | UpdateCounts]:
        """Statistics of the latest step: ``"first"`` and ``"second"`` (a :class:`Selection` each, if
        that mask was ever made) and ``"update"`` (:class:`UpdateCounts`), as 0-dim tensors."""
        found: dict[str, Selection | UpdateCounts] = {}
        for kind, record in self._records.items():
            found[kind] = (
                UpdateCounts(*record.unbind()) if kind == "update" else Selection.from_record(record)
            )
        return found

    # -------------------------------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of ``torch.optim.AdamW`` returned.

        Moments keep their precision whatever the parameters' dtype (they are cast to
        ``state_dtype`` only), so training resumes as if it had not stopped. They are copied: unlike
        with PyTorch's optimizers, the next steps do not write into the state dict.

        Raises:
            ValueError: the state does not fit the parameters, or needs what is not here (amsgrad);
                nothing was changed.
        """

        # Registered now, it runs after the user's own hooks, on what they made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._checked(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._gather_moments()

    def _gather_moments(self) -> None:
        """Put loaded moments where :meth:`_init_state` would have put them."""
        loaded = [state for state in self.state.values() if "exp_avg" in state]
        if not loaded or not loaded[0]["exp_avg"].is_cpu:
            return
        for moment in _MOMENTS:
            places = memory.zeros_like([s[moment] for s in loaded], self.settings.moment_dtype)
            for state, place in zip(loaded, places, strict=True):
                state[moment] = place.copy_(state[moment])

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        def fail(problem: str) -> ValueError:
            return ValueError(f"the state dict {problem}; nothing was loaded")

        state, groups = state_dict.get("state"), state_dict.get("param_groups")
        if not isinstance(state, dict) or not isinstance(groups, (list, tuple)):
            raise fail("has no 'state' and 'param_groups'; expected what state_dict() returns")
        if not all(isinstance(group, dict) and "params" in group for group in groups):
            raise fail("has a parameter group without 'params'")
        saved = [len(group["params"]) for group in groups]
        here = [len(group["params"]) for group in self.param_groups]
        if saved != here:
            raise fail(f"has groups of {saved} parameters and the optimizer has groups of {here}")
        ids = [i for group in groups for i in group["params"]]
        if unknown := state.keys() - set(ids):
            raise fail(f"has state of parameters {sorted(map(str, unknown))} that are in no group")
        for group in groups:
            _check_group({**self.defaults, **group})
        params = [p for group in self.param_groups for p in group["params"]]
        return {
            **state_dict,
            "state": {
                i: self._checked_state(i, p, state[i])
                for i, p in zip(ids, params, strict=True)
                if i in state
            },
            "param_groups": [
                # AdamW's groups do not say what is selective: that stays as it is.
                {"selective": here["selective"]}
                | {k: v for k, v in group.items() if k not in _ADAMW_ONLY}
                for here, group in zip(self.param_groups, groups, strict=True)
            ],
        }

    def _checked_state(self, i: int, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        def fail(problem: str) -> ValueError:
            return ValueError(
                f"state of parameter {i} (shape {tuple(p.shape)}): {problem}; nothing was loaded"
            )

        if not isinstance(state, dict):
            raise fail(f"it is a {type(state).__name__}; expected a dict")
        if not state:
            return state
        for key in ("step", *_MOMENTS):
            if key not in state:
                raise fail(f"{key!r} is missing; expected step, exp_avg and exp_avg_sq")
        kept = dict(state)
        step = state["step"]
        if isinstance(step, Tensor) and step.numel() == 1:
            step = step.item()
        if not _is_number(step) or step < 0:
            raise fail(f"'step' is {step}; expected a number >= 0")
        kept["step"] = _Kept(torch.tensor(step, dtype=torch.float32, device=p.device))
        for key in _MOMENTS:
            value = state[key]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise fail(f"{key!r} is not a floating-point tensor")
            if value.shape != p.shape:
                raise fail(f"{key!r} has shape {tuple(value.shape)}; expected the parameter's")
            kept[key] = _Kept(value.to(p.device, self.settings.moment_dtype, copy=True))
        for key in map(_mask_key, ("first", "second")):
            if key not in state:
                continue
            mask = state[key]
            if not isinstance(mask, Tensor) or (mask.dtype, mask.numel()) not in (
                (torch.bool, 1),
                (torch.uint8, (p.numel() + 7) // 8),
            ):
                raise fail(f"{key!r} is not a mask of this parameter")
            kept[key] = _Kept(mask.to(p.device, copy=True))
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "settings": asdict(self.settings),
            "_steps_done": self._steps_done,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        settings = state.pop("settings", None)
        super().__setstate__(state)
        if settings is not None or "settings" not in self.__dict__:
            self.settings = Settings(**(settings or {}))
        for p, values in self.state.items():
            self.state[p] = {
                key: value.value if isinstance(value, _Kept) else value for key, value in values.items()
            }
        # An older or an AdamW state lacks some of these.
        for key, value in {"maximize": False, "capturable": False, "selective": True}.items():
            self.defaults.setdefault(key, value)
        for group in self.param_groups:
            for key in self.defaults.keys() - _ADAMW_ONLY.keys():
                group.setdefault(key, self.defaults[key])
        self._reset()
        steps = [int(values["step"]) for values in self.state.values() if "step" in values]
        self._steps_done = state.get("_steps_done", max(steps, default=0))
        self._captured = {
            kind
            for kind in ("first", "second")
            for values in self.state.values()
            if _mask_key(kind) in values
        }

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\n{self.settings}\n)"


def _are(ones: list[Any], others: list[Any]) -> bool:
    """Whether these are the same objects."""
    return len(ones) == len(others) and all(map(is_, ones, others))


def _rules_out(masks: list[Tensor]) -> bool:
    """Whether a tensor's masks are for the whole of it and select nothing, so that m stays."""
    return bool(masks) and all(mask.dtype == torch.bool and not mask for mask in masks)


def _check_graph(optimizer: Optimizer, lacks_state: bool) -> None:
    """Raise if a graph is being recorded that would not do what it should."""
    # Where there are both names, the older one warns.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if check := getattr(optimizer, name, None):
            check()  # that capturable is set
            break
    if lacks_state and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being recorded and some parameters have no state yet; every replay would "
            "start from zero again: call step() once before recording"
        )


def _reciprocal(grad_scale: Tensor | None) -> Tensor | None:
    """What gradients are multiplied by, as ``GradScaler.unscale_`` rounds it."""
    if grad_scale is None:
        return None
    return grad_scale.double().reciprocal().float().reshape(())


def _is_number(x: object) -> TypeGuard[float]:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def check_limit(limit: float | None, own: float | None) -> None:
    """Raise unless gradients can be clipped to ``limit`` (None: not) outside of an optimizer whose
    ``max_grad_norm`` is ``own``."""
    if limit is None:
        return
    if not isinstance(limit, Real) or isinstance(limit, bool) or not limit > 0:
        kind = type(limit).__name__
        raise ValueError(
            f"max_grad_norm={limit!r} ({kind}); expected None (no clipping) or a number > 0"
        )
    if own is not None:
        raise ValueError(
            f"max_grad_norm={limit!r}, and the optimizer has its own max_grad_norm={own!r}; expected "
            "one of them"
        )


def _check_param(p: Tensor) -> None:
    if torch.is_complex(p):
        raise TypeError("complex parameters cannot be ranked; expected float32, bfloat16 or float16")
    if p.dtype not in _DTYPES:
        raise TypeError(f"parameters of {p.dtype} are not supported; expected one of {_DTYPES}")
    if p.layout != torch.strided:
        raise TypeError(f"parameters of layout {p.layout} are not supported; expected dense ones")
    if hasattr(p, "to_local"):
        raise NotImplementedError("DTensor parameters (FSDP2) are not there yet")
    if overlaps_itself(p):
        raise ValueError(
            "a parameter is an expanded tensor, whose elements share memory; use .contiguous()"
        )


def _check_group(group: dict[str, Any]) -> None:
    """Raise unless the options of a group (merged with the defaults) can work."""

    def bad(name: str, expected: str) -> ValueError:
        return ValueError(f"{name}={group[name]}; expected {expected}")

    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise bad("lr", "a number or a tensor of one element")
        lr = lr.item()
    if not _is_number(lr) or lr < 0:
        raise bad("lr", "a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise bad("betas", "a pair of numbers")
    if not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise bad("betas", "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not _is_number(group[name]) or group[name] < 0:
            raise bad(name, "a number >= 0")
    for name in ("maximize", "capturable", "selective"):
        if not isinstance(group[name], bool):
            raise bad(name, "True or False")
    for name in Settings.__dataclass_fields__.keys() & group.keys():
        raise ValueError(
            f"{name!r} in a parameter group: one ranking spans all groups, so it is an argument of "
            "RoseFusedAdamW; groups may set lr, betas, eps, weight_decay, maximize and selective"
        )
    for name, only in _ADAMW_ONLY.items():
        if group.get(name, only) != only and only is not None:
            raise ValueError(f"{name}={group[name]} is not supported; expected {only}")


def rose_param_groups(
    model: nn.Module, weight_decay: float = 1e-2, selective: str = "all"
) -> list[dict[str, Any]]:
    """The usual parameter groups of a model: no weight decay for biases and norms.

    Those are taken to be the parameters with fewer than two dimensions. Frozen parameters are left
    out.

    Args:
        model: whose parameters to group.
        weight_decay: of the other parameters.
        selective: which parameters ROSE ranks; the rest gets plain AdamW. ``"all"``, or
            ``"encoder-weights"``, the authors' rule: names that contain "layer" and "weight".

    Returns:
        Up to four groups for :class:`RoseFusedAdamW`; none is empty.

    Raises:
        ValueError: ``selective`` is neither, or selects nothing in this model.
    """
    choice("selective", selective, ("all", "encoder-weights"))
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            chosen = selective == "all" or ("layer" in name and "weight" in name)
            groups.setdefault((p.dim() >= 2, chosen), []).append(p)
    if not any(chosen for _, chosen in groups):
        raise ValueError(f"selective={selective!r} matches no trainable parameter of the model")
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "selective": chosen}
        for (decays, chosen), params in groups.items()
    ]
