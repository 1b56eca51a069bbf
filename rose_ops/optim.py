"""``RoseFusedAdamW``: parameter groups, captures, steps and the order of things. What is computed, and
by whom, is decided in :mod:`rose_ops.engine`.

(Longer than other files by what the arguments mean, which belongs where users look for it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from rose_ops.batch import Batch, Collector, init_state, inside_backward_of
from rose_ops.captures import Captures, Capturing
from rose_ops.checkpoint import Checkpointed, steps_of
from rose_ops.checks import (
    check_graph,
    check_maker,
    check_params,
    check_together,
    is_complete,
    is_recording,
)
from rose_ops.engine import Engine
from rose_ops.groups import ADAMW_ONLY, GroupTables, check_group, is_selective, plain
from rose_ops.masks import MASKS, OwnMasks, check_masks
from rose_ops.meeting import agreed, meet, say_place
from rose_ops.operands import Scaling, Tables
from rose_ops.ranks import Ranks
from rose_ops.results import Selection, Selections, UpdateCounts
from rose_ops.settings import Settings, check_limit, check_scale

# All there are, for those who are given a wrapper and do not find what it wraps.
_live: WeakSet[RoseFusedAdamW] = WeakSet()


class RoseFusedAdamW(Checkpointed):
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
            :func:`rose_ops.reference.step_`), which shows in ``selection["second"].misses``:
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
        first_order_every: a first-order mask is used in so many steps, then captured anew: in between,
            a step takes one pass and one backward. It is due at the first step that selects and
            ``first_order_every`` steps after that, again and again, and whenever there is none; see
            :attr:`needs_first_mask`. It is part of the state, so a resumed run goes on with it. (In a
            CUDA graph only calls count, not replays.)
        selection_warmup_steps: so many first steps are plain AdamW. (On a GPU a step that
            ``GradScaler`` skips counts, too: whether it does is not read back.)
        max_grad_norm: clip the gradients to this norm, over all parameters of the optimizer, as
            ``torch.nn.utils.clip_grad_norm_`` before the step would (``.grad`` itself is not written).
            The norm before clipping is :attr:`grad_norm`. Gradients are unscaled, clipped and then
            ranked; at ``granularity="tensor"`` norms are clipped. If the norm is not finite, selective
            parameters stay as they are, and at ``granularity="element"`` all are counted in
            ``selection["update"].nonfinite``.
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
        process_group: ranks of ``torch.distributed`` that share one ranking, and one clipping norm,
            where parameters are plain tensors and each rank has a part of them (ZeRO-1, pipeline
            stages, shards of one's own). None: this process has all of them, or they are DTensors
            (FSDP2, tensor parallelism), of which each element counts once, wherever its copies are.
            All ranks make the same calls; see :mod:`rose_ops.distributed`.
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
        first_order_every: int = 1,
        seed: int = 0,
    ) -> None:
        self.settings = Settings(
            order, upper, lower, gamma, granularity, selection, inactive, selection_warmup_steps,
            max_grad_norm, error_if_nonfinite, state_dtype, param_rounding, backend, process_group,
            seed, local_ranking, amp_scaling, first_order_every,
        )  # fmt: skip
        check_maker(self.settings)
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
        states = self.__dict__.get("state", {})
        # Loading a state takes away no masks of set_masks(), nor is it handing over parameters.
        captures, collector = self.__dict__.get("_captures"), self.__dict__.get("_collector")
        self._captures = Captures(states, {} if captures is None else captures.own)
        self._had_state = any(map(is_complete, states.values()))
        self._averaged = False  # whether rose_backward averages gradients over processes by itself
        groups = self.__dict__.get("param_groups", [])
        self._collector = Collector(self.settings, [p for group in groups for p in group["params"]])
        if collector is not None:
            self._collector.original = collector.original
        self._tables = GroupTables()
        self._engine = Engine(self.settings)
        self._met = False  # whether it is known who shares the ranking
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
            check_group(merged, is_new=True)
            if is_selective(param_group):
                param_group.pop("selective", None)
            tensors = [item[1] if isinstance(item, tuple) else item for item in params]
            # Sets and what is no tensor are refused below, in PyTorch's words.
            self._check_params([p for p in tensors if isinstance(p, Tensor)], merged["capturable"])
        super().add_param_group(param_group)
        self._collector.add(self.param_groups[-1]["params"])
        self._met = False

    def _check_params(self, params: list[Tensor], capturable: bool) -> None:
        check_params(params, self.settings)
        there = self._parameters() if self._is_made else []
        first = next((p for p in [*there, *params] if p.requires_grad), None)
        if first is None:
            return  # the device is that of the first to be trained
        if self._is_made:
            check_together(p for p in [*there, *params] if p.requires_grad)
        self._engine.resolve(first)
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
        self._captures.forget_used()

    # --------------------------------------------------------------------------------------- step

    @property
    def _hyper(self) -> Tensor:
        return self._tables.hyper(self.param_groups)

    def _meet(self) -> Ranks | None:
        """Who shares the ranking; asked once, as the groups' parameters are."""
        if not self._met:
            steps = self._steps_done if self._had_state else None
            ranks = meet(self._parameters(), self.param_groups, self._hyper, self.settings, steps)
            if ranks is not None:
                # A process whose parameters were frozen so far has no state to know it from.
                self._steps_done = max(self._steps_done, ranks.steps)
                self._collector.begin = ranks.begin
            self._engine.ranks, self._met = ranks, True
        return self._engine.ranks

    def _begin(self, what: str) -> tuple[Ranks | None, Batch]:
        """Of a call that all ranks make: who they are, and the parameters that have a gradient."""
        self._tables.check(self.param_groups)
        self._notice_state()
        ranks = self._meet()
        batch = self._collect()
        if ranks is not None:
            say_place(ranks, what, self._steps_done, self._captures, self._hyper, batch)
        return ranks, batch

    def _notice_state(self) -> None:
        """How many steps were taken, if somebody else has filled the state, as
        ``ZeroRedundancyOptimizer`` does when it loads one."""
        if not self._had_state and any(map(is_complete, self.state.values())):
            self._steps_done, self._had_state = max(self._steps_done, steps_of(self.state)), True

    def _collect(self, known: bool = True) -> Batch:
        """All parameters that have a gradient. Raises before anything is changed."""
        if self._is_selecting() or self.settings.max_grad_norm is not None:
            local = self.settings.local_ranking
            if not local and inside_backward_of(self._parameters()):
                raise RuntimeError(
                    "RoseFusedAdamW was called inside a backward pass that makes its gradients "
                    "(optimizer-in-backward); a ranking or clipping is global and needs all gradients: "
                    "call it after backward(), or pass local_ranking=True to rank what is there"
                )
        known = known and self._engine.checks_shapes
        batch = self._collector.collect(self.param_groups, self.state, known=known)
        has_state = bool(batch.states) or any(map(is_complete, self.state.values()))
        if self._had_state and not has_state:
            # Somebody cleared the state: the moments begin anew, so the warm-up does.
            self._steps_done = 0
            self._captures.kinds.clear()
        self._had_state = has_state
        if batch.params and not batch.params[0].is_cpu:
            check_graph(self, batch.device, has_state=bool(batch.states))
        return batch

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where an operator refuses tensors that were not looked at: say what is wrong in the user's
        terms, if it is that."""
        try:
            yield
        except Exception:
            self._collect(known=False)
            raise

    def _is_selecting(self) -> bool:
        """Whether the coming step selects at all."""
        settings = self.settings
        selects = bool(self._captures.own) or not settings.is_adamw
        return selects and self._steps_done >= settings.selection_warmup_steps

    def _selective(self, batch: Batch) -> Batch:
        flags = [is_selective(group) for group in self.param_groups]
        return batch if all(flags) else batch.subset([flags[row] for row in batch.layout.rows])

    def _with_state(self, batch: Batch) -> Batch:
        return init_state(batch, self.state, self.settings.moment_dtype)

    def _clip(self, batch: Batch, inv_scale: Tensor | None) -> Scaling:
        """Of the gradients of all parameters, to the optimizer's norm."""
        norm, scaling = self._engine.clip(batch, inv_scale, self.settings.max_grad_norm)
        if norm is None:
            return scaling
        self.grad_norm = norm
        if self.settings.error_if_nonfinite and not norm.is_meta and not norm.isfinite():
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or found_inf.item() == 0:  # else the step is skipped
                raise RuntimeError(
                    f"the norm of all gradients is {norm.item()}, so they cannot be clipped to "
                    f"max_grad_norm={self.settings.max_grad_norm}; nothing was changed (with "
                    "error_if_nonfinite=False such a step leaves selective parameters alone)"
                )
        return scaling

    @_disable_dynamo
    @torch.no_grad()
    def capture(
        self,
        kind: str = "first",
        *,
        clear: bool = True,
        grad_scale: Tensor | float | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Make a mask from what ``.grad`` holds now, for the next :meth:`step` to use (for several of
        them, where ``first_order_every`` says so).

        ``.grad`` has to be of this one loss; :meth:`capturing` makes sure of that. Nothing is captured
        where the next step does not select (warm-up, ``upper=1``).

        Args:
            kind: ``"first"`` (``.grad`` is that of the KL loss) or ``"second"``. Without a captured
                second-order mask, ``step()`` finds it from the gradient that it updates with.
            clear: set ``.grad`` to None afterwards, as ``zero_grad()`` does.
            grad_scale: loss scale of the gradients (``GradScaler.get_scale()``, or a tensor, which is
                not read back), if they are scaled.
            max_grad_norm: rank gradients as if they were clipped to this norm, for a second-order mask
                and a loop that clips what ``step()`` gets. (Not where the optimizer clips.)

        Raises:
            ValueError: ``order`` does not use such a mask, ``grad_scale`` is no number > 0, or
                ``max_grad_norm`` is none or given to an optimizer that has its own.
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
        self._captures.refuse_own(kind)
        check_limit(max_grad_norm, self.settings.max_grad_norm)
        check_scale(grad_scale)
        ranks, batch = self._begin(kind)
        if ranks is None and not batch.params:
            raise RuntimeError(f"capture({kind!r}): no parameter has a gradient; call backward() first")
        self._captures.refuse_used(kind, batch)
        if self._is_selecting():
            device = batch.device if batch.params else ranks.device  # type: ignore[union-attr]
            scaling = Scaling(_reciprocal(grad_scale, device))
            with self._explained():
                # The gradient to update with is clipped; ranks of the other do not depend on it.
                if kind == "second":
                    if max_grad_norm is None:
                        scaling = self._clip(batch, scaling.inv_scale)
                    else:
                        _, scaling = self._engine.clip(batch, scaling.inv_scale, max_grad_norm)
                batch = self._selective(self._with_state(batch))
                masks: list[Tensor] = []
                if batch.params or ranks is not None:
                    limit = self._captures.limits.get(kind)
                    masks = self._engine.capture(kind, batch, self._hyper, scaling, self._draw, limit)
            self._captures.drop(kind, self.state.values())  # a second capture replaces the first
            self._captures.put(kind, batch, masks)
        if clear:
            self.zero_grad(set_to_none=True)

    @_disable_dynamo
    def capturing(
        self,
        kind: str = "first",
        *,
        set_aside: bool = False,
        grad_scale: Tensor | float | None = None,
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
        return Capturing(self._parameters(), self._captures, capture, set_aside)

    def set_masks(
        self,
        masks: Mapping[Tensor, Tensor],
        kind: str = "second",
        *,
        keep: bool = False,
        limit: bool = False,
    ) -> None:
        """Masks of one's own, in the place of a ranking or as a limit to one::

            optimizer.set_masks({p: torch.rand_like(p) < 0.3 for p in model.parameters()})
            optimizer.step()

        A step by given masks costs what one by captured masks does. They replace earlier ones of the
        kind, and a captured one.

        Args:
            masks: of some or all selective parameters: bool, of the parameter's shape and device, or
                0-dim for the whole tensor. They are copied. Where it is False nothing is updated, where
                it is True, as the kind's mask says (with ``order="ensemble"``: weighted by gamma).
                Parameters that are not in it are updated as by AdamW, or, with ``limit``, ranked.
            kind: ``"first"`` or ``"second"``, one that ``order`` uses.
            keep: False: for the next step, of the warm-up, too (one that overflowed, or for which
                there were no gradients, is none); True: until :meth:`clear_masks`.
            limit: True: the kind is ranked, but only what is in the masks; the rest is neither counted
                nor updated (``selection`` counts it as not finite). The ranking is a pass of its own
                then, over copies of the gradients. At ``granularity="tensor"``, 0-dim masks only.

        They are in :meth:`state_dict`, under ``"rose"`` (which ``torch.distributed.checkpoint`` leaves
        out). CUDA graphs cannot be recorded with them.

        Raises:
            ValueError, TypeError, NotImplementedError: a mask that cannot be used, said with its
                parameter; nothing was changed.
        """
        self._check_kind(kind, "set_masks")
        check_masks(masks, self.param_groups, limit, self.settings.granularity)
        self._captures.own = {**self._captures.own, kind: OwnMasks.of(masks, keep, limit)}
        self._captures.drop(kind, self.state.values())

    def clear_masks(self, kind: str | None = None) -> None:
        """Take away the masks of :meth:`set_masks`, of one kind or of all.

        Raises:
            ValueError: ``order`` does not use such a mask.
        """
        if kind is not None:
            self._check_kind(kind, "clear_masks")
        own = self._captures.own
        self._captures.own = {k: masks for k, masks in own.items() if kind not in (None, k)}

    def _check_kind(self, kind: str, what: str = "capture") -> None:
        if kind not in self.settings.kinds:
            raise ValueError(
                f"{what}({kind!r}): order={self.settings.order!r} has no such mask; expected "
                + " or ".join(map(repr, self.settings.kinds))
            )

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Select and update; captured masks are consumed, unless ``first_order_every`` keeps them.

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
        ranks, batch = self._begin("step")
        there = self._captures.there
        selects = self._is_selecting() and self._ranks_something(ranks, batch)
        if selects and "first" in self.settings.kinds and "first" not in there:
            if not self._only_makes_state(batch):
                raise RuntimeError(
                    f"order={self.settings.order!r} needs a first-order mask: call kl.backward() and "
                    'optimizer.capture("first") before step() (rose_ops.rose_backward does both)'
                )
            selects = False
        steps = False
        if batch.params or ranks is not None:
            with self._explained():
                steps = self._update(batch, selects)
        once = "first" in self.settings.kinds or there  # gradients that captures must not see again
        self._captures.note_used(batch.params if once else ())
        self._captures.consume(self._reuses_first, self.state.values(), keeps_own=not steps)
        return loss

    def _ranks_something(self, ranks: Ranks | None, batch: Batch) -> bool:
        """Whether there is something selective: here, or (all processes say the same) anywhere."""
        if ranks is None:
            return bool(self._selective(batch).params)
        return not ranks.is_uniform or any(map(is_selective, self.param_groups))

    @property
    def _reuses_first(self) -> bool:
        """Whether the coming step is to use the first-order mask of the one before."""
        settings = self.settings
        return (self._steps_done - settings.selection_warmup_steps) % settings.first_order_every != 0

    @property
    @_disable_dynamo
    def needs_first_mask(self) -> bool:
        """Whether a first-order mask is to be captured for the coming step: the order has one, the step
        selects (it is no warm-up, and not everything is kept), and neither has :meth:`set_masks` given
        it, nor is there one that ``first_order_every`` uses again.
        In a loop by hand::

            if optimizer.needs_first_mask:
                with optimizer.capturing("first"):
                    kl_of(model, batch).backward()

        (:func:`rose_backward`, :func:`rose_accumulate` and the Trainer leave the pass and the backward
        out by themselves.)
        """
        self._notice_state()
        there = "first" in self._captures.kinds and self._reuses_first
        if there:  # and not cleared by somebody
            there = any(MASKS["first"] in state for state in self.state.values())
        needed = "first" in self.settings.kinds and not self._captures.is_own("first")
        ranks = self._engine.ranks
        ranks_something = any(map(is_selective, self.param_groups)) or (
            ranks is not None and not ranks.is_uniform  # others may
        )
        return needed and ranks_something and self._is_selecting() and not there

    def _only_makes_state(self, batch: Batch) -> bool:
        """Whether a step is that of ``torch.distributed.checkpoint``, which makes state to load into by
        a first step with a learning rate and gradients of 0."""
        ranks = self._engine.ranks
        begins = not batch.states and not any(map(is_complete, self.state.values()))
        if ranks is not None:  # some may never have a state
            begins = self._steps_done == 0
        if not begins or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        some = any(bool(grad.any()) for grad in batch.grads)
        if ranks is not None:
            some = bool(ranks.any(torch.full((), float(some), device=ranks.device)))
        return not some

    @property
    def _draw(self) -> int:
        """Which sample a selection takes: another one in every step, and for every seed."""
        return (self.settings.seed * 0x9E3779B1 + self._steps_done) & 0xFFFFFFFF

    def _update(self, batch: Batch, selects: bool) -> bool:
        """Whether there was a step, as far as is known here: on a GPU, kernels leave out those of
        gradients that overflowed."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and self._engine.ranks is not None:
            found_inf = self.found_inf = agreed(found_inf, self._engine.ranks)
        # On a GPU the kernels look; but masks of one's own are for a step that takes place.
        if found_inf is not None and (found_inf.is_cpu or self._captures.own):
            recording = is_recording(found_inf.device)
            if not recording and found_inf.item() != 0:
                return False
        scaling = self._clip(batch, _reciprocal(getattr(self, "grad_scale", None)))
        batch = self._with_state(batch)
        groups, layout = self.param_groups, batch.layout
        tables = Tables(
            self._tables.hyper(groups, selects), layout.group, self._tables.lr(groups), layout.offset
        )
        selective = self._selective(batch) if selects else None
        masks, limits = (self._captures.of(batch), self._captures.limits) if selects else ({}, {})
        try:
            self._engine.step(batch, selective, masks, tables, scaling, self._draw, found_inf, limits)
        except BaseException:
            if self._engine.ranks is not None:  # a process that is lost after the pass leaves a step
                self._steps_done = max(self._steps_done, steps_of(self.state))
                torch.autograd.graph.increment_version(batch.members)
            raise
        # As after any in-place operation: a backward that still needs the old values is an error.
        torch.autograd.graph.increment_version(batch.members)
        self._steps_done += 1
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Settings.__dataclass_fields__ or (name == "settings" and name in self.__dict__):
            setting = "upper" if name == "settings" else name
            raise AttributeError(
                f"{name!r} cannot be changed: make a new optimizer with {setting}=..., and load the "
                "state_dict() of this one into it"
            )
        super().__setattr__(name, value)

    @property
    @_disable_dynamo
    def selection(self) -> Selections:
        """Statistics of the latest step: ``"first"`` and ``"second"`` (a :class:`Selection` each, if
        that mask was ever made) and ``"update"`` (:class:`UpdateCounts`), as 0-dim tensors."""
        found: Selections = {}
        for kind, record in self._engine.records.items():
            if kind == "update":
                found["update"] = UpdateCounts(*record.unbind())
            elif kind == "first":
                found["first"] = Selection.from_record(record)
            else:
                found["second"] = Selection.from_record(record)
        return found

    def __repr__(self) -> str:
        selective = [is_selective(group) for group in self.param_groups]
        return f"{super().__repr__()[:-1]}\nselective: {selective}\n{self.settings}\n)"


def _reciprocal(grad_scale: Tensor | float | None, device: torch.device | None = None) -> Tensor | None:
    """What gradients are multiplied by, as ``GradScaler.unscale_`` rounds it."""
    if grad_scale is None:
        return None
    if not isinstance(grad_scale, Tensor):
        grad_scale = torch.tensor(float(grad_scale), device=device)
    return grad_scale.double().reciprocal().float().reshape(())
