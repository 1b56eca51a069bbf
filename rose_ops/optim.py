"""``RoseFusedAdamW``: parameter groups, state and the order of things. The arithmetic is elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rose_ops import backends
from rose_ops.batch import Batch, Collector, init_state, inside_backward_of
from rose_ops.checkpoint import MASKS, Kept, Loader, saved
from rose_ops.checks import check_given, check_together, has_memory, is_complete, is_sharded
from rose_ops.flat import members
from rose_ops.layout import empty_masks
from rose_ops.memory import with_own_storage
from rose_ops.reference import Field
from rose_ops.results import Selection, UpdateCounts
from rose_ops.settings import (
    ADAMW_ONLY,
    Settings,
    beta_values,
    check_group,
    check_limit,
    choice,
    is_number,
    is_selective,
    plain,
)


class _Clip(NamedTuple):
    """What gradients are multiplied by, and the sums of squares behind it; None without clipping."""

    factors: Tensor | None = None
    sums: Tensor | None = None


_CHECKED = (
    "eps", "weight_decay", "maximize", "selective", "capturable", "amsgrad", "differentiable",
    "decoupled_weight_decay",
)  # fmt: skip

# All there are, for those who are given a wrapper and do not find what it wraps.
_live: WeakSet[RoseFusedAdamW] = WeakSet()


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

        with opt.capturing("first"):
            kl.backward()
        ce.backward()
        opt.step()

    :func:`rose_ops.rose_backward` does that for any classifier. (``DistributedDataParallel`` averages
    gradients in the first backward after a forward only: there, use that function, or give each
    backward a forward of its own.)

    Args:
        params: parameters or groups. Float32, bfloat16 or float16. Groups may set ``lr``,
            ``betas``, ``eps``, ``weight_decay``, ``maximize`` and ``selective``; ``selective=False``
            means plain AdamW, outside the ranking. See :func:`rose_param_groups`.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; ``lr`` and ``betas`` may be
            tensors. What schedules, or anybody, write into groups counts from the next step on.
        amsgrad, differentiable: False, as nothing else can be honoured. foreach, fused: taken and
            without effect: there is one implementation here.
        order: ``"first"``, ``"second"`` or ``"ensemble"``.
        upper, lower: fractions of the ranking between which elements are kept, ``0 <= lower < upper
            <= 1``, rounded to 1e-9; a pair (first, second) sets the two masks of an ensemble apart.
        gamma: weight of the first-order mask in the ensemble, in (0, 1).
        granularity: ``"element"``, or ``"tensor"``: whole tensors are ranked by their Frobenius
            norms, as in the authors' code.
        selection: ``"bracket"``: the k-th smallest risk, found in the pass that updates. A sample
            brackets it; a step's brackets miss with a probability below 1e-9 (see
            :func:`rose_ops.reference.bracket_adamw_`), which shows in ``selection["second"].misses``:
            then the nearest end of the bracket is the threshold. ``"exact"``: the same masks without
            luck, by a pass of its own. ``"approx"``, the cheapest: the threshold is the quantile of a
            sample of lines of 16 elements, drawn anew in every step (keyed on ``seed`` and the step).
            The kept fraction of n elements is off by ``sqrt(c*(1-c)/(16*L))`` (a standard deviation;
            L lines: 2^13 at 1Mi elements, 2^15 at 64Mi, 2^16 from 128Mi on) if risks are independent,
            and by no more than 4 times that however alike those of a line are: 0.07% to 0.27% at 64Mi.
            What was kept is counted exactly. Below 1Mi elements it is exact. (A CUDA graph replays with
            the sample it was recorded with.)
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
        local_ranking: rank, and clip, what this process has by itself, where it is a part of the
            parameters (FSDP1, ZeRO and the like) or a part of the gradients (inside the backward). Such
            use is refused otherwise: a part is not what the whole would be.
        amp_scaling: False: leave unscaling and the skipping of steps to ``GradScaler``, as optimizers
            that are not fused do, for trainers that clip in between.
        seed: of the stochastic rounding, the only thing that is random here.

    Raises:
        ValueError, TypeError: an argument out of its range, said with what was expected.
        NotImplementedError: what is not there yet.

    Source: Jiang et al., *ROSE: Robust Selective Fine-tuning for Pre-trained Language Models*, EMNLP
    2022, Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        param_rounding: str = "nearest",
        backend: str = "auto",
        process_group: Any = None,
        local_ranking: bool = False,
        amp_scaling: bool = True,
        seed: int = 0,
    ) -> None:
        self.settings = Settings(
            order, upper, lower, gamma, granularity, selection, inactive, selection_warmup_steps,
            max_grad_norm, error_if_nonfinite, state_dtype, param_rounding, backend, process_group,
            seed, local_ranking, amp_scaling,
        )  # fmt: skip
        _check_maker(self.settings)
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            **ADAMW_ONLY,
            "amsgrad": amsgrad,
            "differentiable": differentiable,
            "foreach": foreach,
            "fused": fused,
        }
        self._is_made = False
        super().__init__(params, {key: plain(value) for key, value in defaults.items()})
        check_together(p for p in self._parameters() if p.requires_grad)  # once, for all groups
        self._is_made = True

    def _reset(self) -> None:
        """What is derived from the state, and statistics."""
        _live.add(self)
        self._is_made = True
        self._steps_done = 0
        self._captured: set[str] = set()
        self._averaged = False  # whether rose_backward averages gradients over processes by itself
        self._stepped: list[ref[Tensor]] = []  # gradients that the latest step used
        self._records: dict[str, Tensor] = {}
        groups = self.__dict__.get("param_groups", [])
        before = self.__dict__.get("_collector")
        self._collector = Collector(self.settings, [p for group in groups for p in group["params"]])
        if before is not None:  # loading a state is not giving parameters
            self._collector.given = before.given
        self._options: list[Any] = []
        self._hyper: tuple[list[Any], Tensor] | None = None
        self._lrs: tuple[list[Any], Tensor] | None = None
        self._loaded: tuple[torch.device, backends.Backend] | None = None
        self.grad_norm: Tensor | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` is to hand over ``grad_scale`` and ``found_inf``, instead of
        unscaling in a pass of its own and leaving out steps that overflowed.

        Not to accelerate: it learns whether a step was left out from whether ``step`` was called, which
        it puts a function of its own around for that.
        """
        step = self.__dict__.get("step")
        watched = getattr(step, "__module__", "").partition(".")[0] == "accelerate"
        return self.settings.amp_scaling and not watched

    # ------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for example ones unfrozen later; see ``torch.optim.Optimizer``.

        Raises:
            ValueError, TypeError: an option or parameter that cannot work; nothing was added.
        """
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            param_group = {**{key: plain(x) for key, x in param_group.items()}, "params": params}
            merged = {**self.defaults, **param_group}
            check_group(merged, given=True)
            if is_selective(param_group):
                param_group.pop("selective", None)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            # Sets and what is no tensor are refused below, in PyTorch's words.
            self._check_params([p for p in tensors if isinstance(p, Tensor)], merged["capturable"])
        super().add_param_group(param_group)
        self._collector.add(self.param_groups[-1]["params"])

    def _check_params(self, params: list[Tensor], capturable: bool) -> None:
        check_given(params, self.settings)
        there = self._parameters() if self._is_made else []
        first = next((p for p in [*there, *params] if p.requires_grad), None)
        if first is None:
            return  # the device is that of the first to be trained
        if self._is_made:
            check_together(p for p in [*there, *params] if p.requires_grad)
        self._resolve(first)
        if capturable and first.device.type == "cpu":
            raise ValueError(
                "capturable=True is for CUDA graphs; expected False for parameters on the CPU"
            )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim.Optimizer``."""
        super().zero_grad(set_to_none)
        self._stepped = []

    # --------------------------------------------------------------------------------------- step

    def _collect(self, known: bool = True) -> Batch:
        """All parameters that have a gradient. Raises before anything is changed."""
        self._check_groups()
        if self._is_selecting() or self.settings.max_grad_norm is not None:
            local = self.settings.local_ranking
            if not local and inside_backward_of(self._parameters()):
                raise RuntimeError(
                    "RoseFusedAdamW was called inside a backward pass that makes its gradients "
                    "(optimizer-in-backward); a ranking or clipping is global and needs all gradients: "
                    "call it after backward(), or pass local_ranking=True to rank what is there"
                )
        # The reference leaves nothing to its operators: it checks no shapes.
        known = known and (self._loaded is None or self._loaded[1].name != "reference")
        batch = self._collector.collect(self.param_groups, self.state, known=known)
        if not batch.states and not any(map(is_complete, self.state.values())):
            # Somebody cleared the state: the moments begin anew, so the warm-up does.
            self._steps_done = 0
            self._captured.clear()
        if batch.params and not batch.params[0].is_cpu:
            _check_graph(self, batch)
        return batch

    def _check_groups(self) -> None:
        """Raise where a group was given what cannot work since the latest step."""
        found = []
        for group in self.param_groups:
            betas, lr = group.get("betas"), group.get("lr")
            # What is in tensors and lists may change in place.
            if not isinstance(betas, (tuple, list)):
                betas = None  # refused below
            elif any(isinstance(beta, Tensor) for beta in betas):
                betas = beta_values(betas)
            right = lr.numel() == 1 if isinstance(lr, Tensor) else is_number(lr)
            options = map(group.get, _CHECKED)
            found.append((*group, *(betas or ()), right, *options))
        if found != self._options:
            for group in self.param_groups:
                check_group(group, given=False)
            self._options = found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where an operator refuses tensors that were not looked at: say what is wrong in the user's
        terms, if it is that."""
        try:
            yield
        except Exception:
            self._collect(known=False)
            raise

    def _lr_table(self) -> Tensor:
        """Learning rates ``[G]``, where tensors of the user's are."""
        lrs = [group["lr"] for group in self.param_groups]
        if not any(isinstance(lr, Tensor) for lr in lrs):
            if self._lrs is None or self._lrs[0] != lrs:
                self._lrs = lrs, torch.tensor(lrs, dtype=torch.float64, device="cpu")
            return self._lrs[1]
        cpu = torch.device("cpu")  # whatever torch.set_default_device() says
        device = next((x.device for x in lrs if isinstance(x, Tensor) and not x.is_cpu), cpu)
        columns = [
            x.detach().to(device, torch.float64).reshape(1)
            if isinstance(x, Tensor) and x.device == device
            # Filled where it is needed: a copy from the CPU would wait for the device.
            else torch.full((1,), float(x), dtype=torch.float64, device=device)
            for x in lrs
        ]
        return torch.cat(columns) if len(columns) > 1 else columns[0]

    def _hyper_table(self, selecting: bool = True) -> Tensor:
        """The other hyperparameters ``[G, 6]``, on the CPU."""
        values = [
            (
                *beta_values(group["betas"]),
                float(group["eps"]),
                float(group["weight_decay"]),
                -1.0 if group["maximize"] else 1.0,
                float(is_selective(group) and selecting),
            )
            for group in self.param_groups
        ]
        if self._hyper is None or self._hyper[0] != values:
            self._hyper = values, torch.tensor(values, dtype=torch.float64, device="cpu")
        return self._hyper[1]

    def _is_selecting(self) -> bool:
        """Whether the coming step selects at all."""
        settings = self.settings
        return not settings.is_adamw and self._steps_done >= settings.selection_warmup_steps

    def _resolve(self, p: Tensor) -> backends.Backend:
        fake = isinstance(p, FakeTensor) and _is_faking()
        return backends.resolve(self.settings.backend, p.device, fake=fake)

    def _ops(self, batch: Batch) -> Any:
        if self._loaded is None or self._loaded[0] != batch.device:
            self._loaded = batch.device, self._resolve(batch.params[0])
        return self._loaded[1].ops

    def _selective(self, batch: Batch) -> Batch:
        flags = [is_selective(group) for group in self.param_groups]
        return batch if all(flags) else batch.subset([flags[row] for row in batch.layout.rows])

    def _has_selective(self, batch: Batch) -> bool:
        flags = [is_selective(group) for group in self.param_groups]
        return any(flags[row] for row in batch.layout.rows)

    def _masks_of(self, kind: str, batch: Batch, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Where masks go: again where the latest were, which are used up, or about to be replaced. A
        graph owns its masks."""
        if _is_recording(batch):
            return make()
        masks = batch.layout.masks
        if kind not in masks or masks[kind][0].device != batch.device:
            masks[kind] = make()
        return masks[kind]

    def _clip(self, batch: Batch, inv_scale: Tensor | None, limit: float | None = None) -> _Clip:
        """Of the gradients of all parameters: to the optimizer's norm, or for once to ``limit``."""
        settings = self.settings
        if settings.max_grad_norm is None and limit is None:
            return _Clip()
        sums = self._ops(batch).sums_of_squares(batch.grads, inv_scale)
        if limit is not None:
            return _Clip(self._ops(batch).clip_factors(sums, limit)[1:], sums)
        factors = self._ops(batch).clip_factors(sums, settings.max_grad_norm)
        self.grad_norm = norm = factors[0]
        if settings.error_if_nonfinite and not norm.is_meta and not norm.isfinite():
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or found_inf.item() == 0:  # else the step is skipped
                raise RuntimeError(
                    f"the norm of all gradients is {norm.item()}, so they cannot be clipped to "
                    f"max_grad_norm={settings.max_grad_norm}; nothing was changed (with "
                    "error_if_nonfinite=False such a step leaves selective parameters alone)"
                )
        return _Clip(factors[1:], sums)

    def _tensor_masks(
        self, kind: str, batch: Batch, inv_scale: Tensor | None, clip: _Clip
    ) -> list[Tensor]:
        """Rank the tensors of ``batch`` by their norms."""
        sums = clip.sums
        if sums is None or len(sums) != len(batch.params):
            sums = self._ops(batch).sums_of_squares(batch.grads, inv_scale)
        moments = batch.state("exp_avg") if kind == "second" else None
        exp_avg_sums = None if moments is None else self._ops(batch).sums_of_squares(moments, None)
        # The whole first, then its parts.
        mask, *masks = self._masks_of(
            f"{kind} of tensors",
            batch,
            lambda: [
                whole := torch.empty(len(sums), dtype=torch.bool, device=sums.device),
                *(with_own_storage(one) for one in whole.unbind()),
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

    @_disable_dynamo
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

        ``.grad`` has to be of this one loss; :meth:`capturing` makes sure of that. Nothing is captured
        where the next step does not select (warm-up, ``upper=1``).

        Args:
            kind: ``"first"`` (``.grad`` is that of the KL loss) or ``"second"``. Without a captured
                second-order mask, ``step()`` finds it from the gradient that it updates with.
            clear: set ``.grad`` to None afterwards, as ``zero_grad()`` does.
            grad_scale: loss scale of the gradients (``GradScaler.scale``'s), if they are scaled.
            max_grad_norm: rank gradients as if they were clipped to this norm, for a second-order mask
                and a loop that clips what ``step()`` gets. (Not where the optimizer clips.)

        Raises:
            ValueError: ``order`` does not use such a mask, or ``max_grad_norm`` is no number > 0 or
                given to an optimizer that has its own.
            RuntimeError: no parameter has a gradient, or one that cannot be used, or one that the
                latest step has used already and that was not cleared since.
        """
        if DistributedDataParallel._active_ddp_module is not None and not self._averaged:
            raise RuntimeError(
                f"capture({kind!r}) inside the forward of DistributedDataParallel (as Lightning's "
                "training_step is): gradients that are made there are not averaged over processes, so "
                "each would have another mask; use rose_ops.rose_backward, which averages them (in "
                "Lightning, with manual optimization)"
            )
        self._check_kind(kind)
        check_limit(max_grad_norm, self.settings.max_grad_norm)
        batch = self._collect()
        if not batch.params:
            raise RuntimeError(f"capture({kind!r}): no parameter has a gradient; call backward() first")
        self._refuse_used(kind, batch)
        if self._is_selecting():
            inv_scale = _reciprocal(grad_scale)
            with self._explained():
                # The gradient to update with is clipped; ranks of the other do not depend on it.
                clip = self._clip(batch, inv_scale, max_grad_norm) if kind == "second" else _Clip()
                batch = self._with_state(batch)
                batch = self._selective(batch)
                masks = self._capture(kind, batch, inv_scale, clip) if batch.params else []
            self._drop_masks(kind)  # a second capture replaces the first
            for state, mask in zip(batch.states, masks, strict=True):
                state[MASKS[kind]] = mask
            self._captured.add(kind)
        if clear:
            self.zero_grad(set_to_none=True)

    @_disable_dynamo
    def capturing(
        self,
        kind: str = "first",
        *,
        set_aside: bool = False,
        grad_scale: Tensor | None = None,
        max_grad_norm: float | None = None,
    ) -> AbstractContextManager[None]:
        """Capture a mask from the gradients that are made inside, and from no others::

            with optimizer.capturing("first"):
                kl.backward()
            ce.backward()
            optimizer.step()

        Afterwards ``.grad`` is as it was before: None, or what was set aside.

        Args:
            kind, grad_scale, max_grad_norm: as in :meth:`capture`.
            set_aside: what to do about gradients that are there before: False refuses them, True keeps
                them out of the mask and puts them back afterwards.

        Raises:
            RuntimeError: there are gradients already.
            ValueError, RuntimeError: as in :meth:`capture`.
        """
        self._check_kind(kind)
        capture = partial(self.capture, kind, grad_scale=grad_scale, max_grad_norm=max_grad_norm)
        return _Capturing(self, capture, set_aside)

    def _check_kind(self, kind: str) -> None:
        if kind not in self.settings.kinds:
            raise ValueError(
                f"capture({kind!r}): order={self.settings.order!r} has no such mask; expected "
                + " or ".join(map(repr, self.settings.kinds))
            )

    def _refuse_used(self, kind: str, batch: Batch) -> None:
        """Gradients of the latest step's loss, into which another backward has been adding, are no
        gradients of one loss."""
        used = {id(grad) for one in self._stepped if (grad := one()) is not None}
        if used and (count := sum(id(m.grad) in used for m in batch.members)):
            raise RuntimeError(
                f"capture({kind!r}): {count} gradients were there at the latest step already and have "
                "not been cleared since, so the mask would be of both losses together; call "
                "optimizer.zero_grad() between step() and this backward, or use "
                f"optimizer.capturing({kind!r}, set_aside=True)"
            )

    def _with_state(self, batch: Batch) -> Batch:
        return init_state(batch, self.state, self.settings.moment_dtype)

    def _capture(self, kind: str, batch: Batch, inv_scale: Tensor | None, clip: _Clip) -> list[Tensor]:
        settings = self.settings
        if settings.granularity == "tensor":
            return self._tensor_masks(kind, batch, inv_scale, clip)
        ops, fractions = self._ops(batch), settings.fractions(kind)
        masks = self._masks_of(
            kind,
            batch,
            lambda: empty_masks([view.numel() for view in batch.views], batch.views[0].device),
        )
        tensors = (batch.grads, batch.state("exp_avg") if kind == "second" else [])
        table = (self._hyper_table(), batch.layout.group, inv_scale, clip.factors)
        if settings.selection != "exact":
            self._records[kind] = ops.bracket_capture_(
                masks, *tensors, *table, *fractions, self._rank_inactive, self._draw, 1.0,
                settings.selection == "approx",
            )  # fmt: skip
            return masks
        record = ops.select(*tensors, *table, *fractions, self._rank_inactive, False, self._draw)
        ops.capture_(masks, *tensors, *table, record, self._rank_inactive)
        self._records[kind] = record
        return masks

    @_disable_dynamo
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
            selects = not self._only_makes_state(batch)
        if selects and "first" in self.settings.kinds and "first" not in self._captured:
            raise RuntimeError(
                f"order={self.settings.order!r} needs a first-order mask: call kl.backward() and "
                'optimizer.capture("first") before step() (rose_ops.rose_backward does both)'
            )
        if batch.params:
            with self._explained():
                self._update(batch, selects)
        self._stepped = [
            ref(grad)
            for p in (batch.params if "first" in self.settings.kinds or self._captured else ())
            for m in members(p)
            # DistributedDataParallel gives out the same view of a bucket in every backward.
            if (grad := m.grad) is not None and (m is not p or _has_own_storage(grad))
        ]
        for kind in tuple(self._captured):
            self._drop_masks(kind)
        return loss

    def _only_makes_state(self, batch: Batch) -> bool:
        """Whether a step is that of ``torch.distributed.checkpoint``, which makes state to load into by
        a first step with a learning rate and gradients of 0."""
        return (
            not batch.states
            and not any(map(is_complete, self.state.values()))
            and all(float(group["lr"]) == 0 for group in self.param_groups)
            and not any(bool(grad.any()) for grad in batch.grads)
        )

    @property
    def _draw(self) -> int:
        """Which sample a selection takes: another one in every step, and for every seed."""
        return (self.settings.seed * 0x9E3779B1 + self._steps_done) & 0xFFFFFFFF

    def _drop_masks(self, kind: str) -> None:
        for state in self.state.values():
            state.pop(MASKS[kind], None)
        self._captured.discard(kind)

    def _update(self, batch: Batch, selects: bool) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return  # nothing to read back here; on a GPU the kernels look
        inv_scale = _reciprocal(getattr(self, "grad_scale", None))
        clip = self._clip(batch, inv_scale)
        batch = self._with_state(batch)
        layout = batch.layout
        lr, hyper = self._lr_table(), self._hyper_table(selects)
        ops = self._ops(batch)
        settings = self.settings
        masks: dict[str, list[Tensor]] = {"first": [], "second": []}
        ranks = False  # whether the second-order mask is found on the way
        selective = self._selective(batch)
        for kind in settings.kinds if selects else ():
            if kind in self._captured:
                found = [state.get(MASKS[kind]) for state in batch.states]
            elif settings.granularity == "tensor":
                bools = self._tensor_masks(kind, selective, inv_scale, clip)
                # Hashing a tensor takes a call in Python.
                by_id = dict(zip(map(id, selective.params), bools, strict=True))
                found = [by_id.get(id(p)) for p in batch.params]
            else:
                ranks = True
                continue
            # A parameter that had no gradient at the capture is outside that ranking: selected.
            none = torch.empty(0, dtype=torch.uint8, device=batch.device)
            masks[kind] = [none if mask is None else mask for mask in found]
        fractions = settings.fractions("second")
        tensors = (
            batch.views, batch.grads, batch.state("exp_avg"), batch.state("exp_avg_sq"),
            batch.state("step"), masks["first"],
        )  # fmt: skip
        tables = (lr, hyper, layout.group, layout.offset, inv_scale, clip.factors, found_inf)
        stochastic = settings.param_rounding == "stochastic"
        if ranks and settings.selection != "exact":
            result = ops.bracket_adamw_(
                *tensors, *tables, settings.gamma, *fractions, self._rank_inactive, settings.seed,
                stochastic, self._draw, 1.0, settings.selection == "approx",
            )  # fmt: skip
            self._records["second"], self._records["update"] = result.split([Field.SIZE, 2])
        else:
            record = None
            if ranks:
                self._records["second"] = record = ops.select(
                    selective.grads, selective.state("exp_avg"), hyper, selective.layout.group,
                    inv_scale, clip.factors, *fractions, self._rank_inactive, False, self._draw,
                )  # fmt: skip
            self._records["update"] = ops.adamw_(
                *tensors, masks["second"], record, *tables, settings.gamma, self._rank_inactive,
                settings.seed, stochastic,
            )  # fmt: skip
        # As after any in-place operation: a backward that still needs the old values is an error.
        torch.autograd.graph.increment_version(batch.members)
        self._steps_done += 1

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Settings.__dataclass_fields__:
            raise AttributeError(
                f"{name!r} cannot be changed: make a new optimizer with {name}=..., and load the "
                "state_dict() of this one into it"
            )
        super().__setattr__(name, value)

    @property
    @_disable_dynamo
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

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.AdamW``, whose keys it has, and beside them, under ``"rose"``, the
        settings of the ranking. A captured mask is in its parameter's state. Groups have a key more,
        ``selective``, where it is False.

        (``torch.distributed.checkpoint`` keeps states and groups alone, so with it a difference of
        settings is not noticed.)

        As with PyTorch's optimizers, moments are not copied.
        """
        return saved(super().state_dict(), self.settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of ``torch.optim.AdamW`` returned.

        Moments keep their precision whatever the parameters' dtype (they are cast to
        ``state_dtype`` only), so training resumes as if it had not stopped. Where the checkpoint was
        trained with other settings, the optimizer's stay, and a warning says which differ.

        They are copied, once: unlike with PyTorch's optimizers, the next steps do not write into the
        state dict, nor those of another optimizer that it came from into this one.

        Raises:
            ValueError: the state does not fit the parameters, or needs what is not here (amsgrad);
                nothing was changed.
        """

        # Registered now, it runs after the user's own hooks, on what they made of the dict.
        loader = Loader(self.settings, self.param_groups, self.defaults)
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loader.checked(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if loader.differences:
            warnings.warn(
                "the optimizer goes on with other settings than the checkpoint was trained with: "
                + ", ".join(loader.differences),
                stacklevel=2,
            )

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
                key: value.value if isinstance(value, Kept) else value for key, value in values.items()
            }
        # An older or an AdamW state lacks some of these.
        for key, value in {
            "maximize": False, "capturable": False, **ADAMW_ONLY,
        }.items():  # fmt: skip
            self.defaults.setdefault(key, value)
        for group in self.param_groups:
            for key in self.defaults:
                group.setdefault(key, self.defaults[key])
            if is_selective(group):
                group.pop("selective", None)
        self._reset()
        steps = [
            int(values["step"])
            for values in self.state.values()
            if "step" in values and has_memory(values["step"])
        ]
        self._steps_done = state.get("_steps_done", max(steps, default=0))
        self._captured = {
            kind for kind, key in MASKS.items() for values in self.state.values() if key in values
        }

    def __repr__(self) -> str:
        selective = [is_selective(group) for group in self.param_groups]
        return f"{super().__repr__()[:-1]}\nselective: {selective}\n{self.settings}\n)"


class _Capturing(AbstractContextManager[None]):
    """What :meth:`RoseFusedAdamW.capturing` returns. (A class, whose methods torch.compile can leave
    out of graphs.)"""

    def __init__(self, optimizer: RoseFusedAdamW, capture: Callable[[], None], set_aside: bool) -> None:
        self._optimizer = optimizer
        self._members = [m for p in optimizer._parameters() for m in members(p)]
        self._capture, self._set_aside = capture, set_aside
        self._before: list[tuple[Tensor | None, Tensor | None]] = []

    @_disable_dynamo
    def __enter__(self) -> None:
        before = [m.grad for m in self._members]
        count = sum(grad is not None for grad in before)
        if count and not self._set_aside:
            raise RuntimeError(
                f"capturing(): {count} of {len(before)} parameters have a gradient already (zeros "
                "count), which would be in the mask; call zero_grad() before, or pass set_aside=True "
                "to have it put aside and back"
            )
        # Views of a buffer (of flat parameters, of DistributedDataParallel) are written to again by the
        # next backward: of these, the values are put aside, too.
        self._before = [(grad, _copy_of_view(grad)) for grad in before]
        for m in self._members:
            m.grad = None
        self._optimizer._stepped = []

    @_disable_dynamo
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._capture()
        finally:
            for m, (grad, values) in zip(self._members, self._before, strict=True):
                if grad is not None and values is not None:
                    with torch.no_grad():
                        grad.copy_(values)
                m.grad = grad
            self._before = []


def _copy_of_view(grad: Tensor | None) -> Tensor | None:
    if grad is None or grad.layout != torch.strided or not has_memory(grad):
        return None
    return None if _has_own_storage(grad) else grad.detach().clone()


def _has_own_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


_SHARDERS = ("ZeroRedundancyOptimizer", "OSS")  # of PyTorch, of fairscale


def _check_maker(settings: Settings) -> None:
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


def _is_faking() -> bool:
    """Whether a FakeTensorMode is on, without which nothing can be computed with fake tensors."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _is_recording(batch: Batch) -> bool:
    """Whether a CUDA graph is being recorded."""
    on_gpu = batch.device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _check_graph(optimizer: Optimizer, batch: Batch) -> None:
    """Raise if a graph is being recorded that would not do what it should."""
    # Where there are both names, the older one warns.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if check := getattr(optimizer, name, None):
            check()  # that capturable is set
            break
    if not batch.states and _is_recording(batch):
        raise RuntimeError(
            "a CUDA graph is being recorded and some parameters have no state yet; every replay would "
            "start from zero again: call step() once before recording"
        )


def _reciprocal(grad_scale: Tensor | None) -> Tensor | None:
    """What gradients are multiplied by, as ``GradScaler.unscale_`` rounds it."""
    if grad_scale is None:
        return None
    return grad_scale.double().reciprocal().float().reshape(())


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
