"""What a ranking is asked for: ranges, and what is said where one is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from numbers import Integral, Rational, Real
from typing import Any, TypeGuard

import torch
import torch.distributed as dist

from rose_ops import backends
from rose_ops.definitions import FRACTION_UNIT

ORDERS = {"first": ("first",), "second": ("second",), "ensemble": ("first", "second")}
SELECTIONS = ("exact", "bracket", "approx")
INACTIVE = ("update", "rank")
GRANULARITIES = ("element", "tensor")
ROUNDINGS = ("nearest", "stochastic")
STATE_DTYPES = (torch.float32, torch.bfloat16)


def shown(value: object) -> str:
    """A value as messages show it: with its type, as ``'0.6'`` and ``0.6`` are easily taken for each
    other."""
    return f"{value!r} ({type(value).__name__})"


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{name}={shown(value)}; expected one of {expected}")


def is_number(x: object) -> TypeGuard[float]:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _is_count(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 0


def fraction_units(name: str, value: object) -> int:
    """A fraction in units of 1e-9, rounded: 0.6 is 600000000, exactly, and so is 0.1 + 0.5.

    Args:
        name: for messages.
        value: any real number (of Python, NumPy, ``fractions`` or ``decimal``): its exact value counts.

    Raises:
        TypeError: not a real number. ValueError: not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{name}={shown(value)}; expected a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={shown(value)}; expected a finite number")
    exact = Fraction(value) if isinstance(value, (Rational, Decimal)) else Fraction(float(value))
    return round(Fraction(int(exact.numerator), int(exact.denominator)) * FRACTION_UNIT)  # not NumPy's


def check_fractions(upper: object, lower: object, suffix: str = "") -> tuple[int, int]:
    """c_h and c_l in units of 1e-9.

    Raises:
        TypeError: no numbers. ValueError: unless ``0 <= lower < upper <= 1``.
    """
    high, low = fraction_units("upper" + suffix, upper), fraction_units("lower" + suffix, lower)
    if not 0 < high <= FRACTION_UNIT:
        raise ValueError(
            f"upper{suffix}={shown(upper)}; expected 0 < upper <= 1, the fraction to keep (it counts "
            "in units of 1e-9)"
        )
    if not 0 <= low < high:
        raise ValueError(f"lower{suffix}={shown(lower)}; expected 0 <= lower < upper ({upper})")
    return high, low


def check_limit(limit: float | None, own: float | None = None) -> None:
    """Raise unless gradients can be clipped to ``limit`` (None: not) outside of an optimizer whose
    ``max_grad_norm`` is ``own``."""
    if limit is None:
        return
    if not isinstance(limit, Real) or isinstance(limit, bool) or not limit > 0:
        raise ValueError(f"max_grad_norm={shown(limit)}; expected None (no clipping) or a number > 0")
    if own is not None:
        raise ValueError(
            f"max_grad_norm={limit!r}, and the optimizer has its own max_grad_norm={own!r}; expected "
            "one of them"
        )


def check_gamma(gamma: object) -> None:
    if not is_number(gamma) or not 0 < gamma < 1:
        raise ValueError(f"gamma={shown(gamma)}; expected 0 < gamma < 1, the first-order weight")


def check_count(name: str, value: Any, below: int | None = None) -> int:
    if not _is_count(value) or (below is not None and not value < below):
        limit = "" if below is None else f" and < {below}"
        raise ValueError(f"{name}={shown(value)}; expected an integer >= 0{limit}")
    return int(value)


def check_scale(scale: object) -> None:
    """Raise unless ``scale`` is what gradients may be multiplied by (None: nothing, or a tensor that is
    not read)."""
    if scale is None or (isinstance(scale, torch.Tensor) and scale.numel() == 1):
        return
    if not is_number(scale) or not scale > 0:
        raise ValueError(
            f"grad_scale={shown(scale)}; expected None, a number > 0 or a tensor of one element"
        )


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
    local_ranking: bool = False
    amp_scaling: bool = True
    first_order_every: int = 1

    def __post_init__(self) -> None:
        choice("order", self.order, tuple(ORDERS))
        choice("granularity", self.granularity, GRANULARITIES)
        choice("selection", self.selection, SELECTIONS)
        choice("inactive", self.inactive, INACTIVE)
        choice("param_rounding", self.param_rounding, ROUNDINGS)
        choice("backend", self.backend, backends.NAMES)
        for kind in ("first", "second"):
            self.fractions(kind)
        check_gamma(self.gamma)
        for name, limit in (("selection_warmup_steps", None), ("seed", 2**32)):
            value = check_count(name, getattr(self, name), limit)
            object.__setattr__(self, name, value)  # NumPy's, too
        self._check_reuse()
        if self.state_dtype not in (None, *STATE_DTYPES):
            raise ValueError(
                f"state_dtype={shown(self.state_dtype)}; expected None (float32), torch.float32 or "
                "torch.bfloat16"
            )
        check_limit(self.max_grad_norm)
        for name in ("error_if_nonfinite", "local_ranking", "amp_scaling"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={shown(value)}; expected True or False")
        self._check_group()

    def _check_reuse(self) -> None:
        every = self.first_order_every
        if not _is_count(every) or every < 1:
            raise ValueError(f"first_order_every={shown(every)}; expected an integer >= 1")
        if every > 1 and "first" not in self.kinds:
            raise ValueError(
                f"first_order_every={shown(every)} with order={self.order!r}, which has no first-order "
                "mask to use again; expected 1, or order='first' or 'ensemble'"
            )
        object.__setattr__(self, "first_order_every", int(every))  # NumPy's, too

    def _check_group(self) -> None:
        if self.process_group is None:
            return
        if not dist.is_available() or not isinstance(self.process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={shown(self.process_group)}; expected None or a group of "
                "torch.distributed, as torch.distributed.group.WORLD after init_process_group()"
            )
        if self.local_ranking:
            raise ValueError(
                "process_group= is for one ranking over several processes, and local_ranking=True for "
                "one on each; expected one of them"
            )

    @cached_property
    def _fractions(self) -> dict[str, tuple[int, int]]:
        return {kind: self._fractions_of(kind) for kind in ("first", "second")}

    def fractions(self, kind: str) -> tuple[int, int]:
        """(c_h, c_l) of the ``"first"`` or ``"second"`` mask, in units of 1e-9."""
        return self._fractions[kind]

    def _fractions_of(self, kind: str) -> tuple[int, int]:
        def pick(name: str, value: object) -> object:
            if not isinstance(value, (tuple, list)):
                return value
            if len(value) != 2:
                raise ValueError(f"{name}={shown(value)}; expected a number or a pair (first, second)")
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
    def is_global(self) -> bool:
        """Whether a step needs something of all parameters together: a ranking, or a norm."""
        return not self.is_adamw or self.max_grad_norm is not None

    @property
    def moment_dtype(self) -> torch.dtype:
        return self.state_dtype or torch.float32

    def to_saved(self) -> dict[str, Any]:
        """What a checkpoint says of them, in types that ``torch.load(weights_only=True)`` knows: those
        that change what is trained."""
        fractions = {
            kind: tuple(units / FRACTION_UNIT for units in self.fractions(kind)) for kind in self.kinds
        }
        return {
            "order": self.order,
            "upper": {kind: high for kind, (high, _) in fractions.items()},
            "lower": {kind: low for kind, (_, low) in fractions.items()},
            **({"gamma": float(self.gamma)} if self.order == "ensemble" else {}),
            "first_order_every": self.first_order_every,
            "granularity": self.granularity,
            "selection": self.selection,
            "inactive": self.inactive,
            "selection_warmup_steps": self.selection_warmup_steps,
            "max_grad_norm": None if self.max_grad_norm is None else float(self.max_grad_norm),
            "param_rounding": self.param_rounding,
            "state_dtype": str(self.moment_dtype),
            "seed": self.seed,
        }
