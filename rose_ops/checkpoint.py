"""What goes out of an optimizer and what comes in: state dicts, those of ``torch.optim.AdamW`` too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rose_ops import memory
from rose_ops.captures import Captures
from rose_ops.checks import MOMENTS, STATE, has_memory
from rose_ops.groups import ADAMW_ONLY, check_group, is_selective
from rose_ops.masks import MASKS, OwnMasks, from_saved, to_saved
from rose_ops.settings import Settings, is_number, shown
from rose_ops.shards import is_cast_mask, loaded_mask, local, part_of, saved_mask, spread_like

# Beside "state" and "param_groups", where torch.optim.AdamW ignores it.
ROSE = "rose"
# Of what is under that key, and of masks. It is counted up when an older rose_ops would take a
# checkpoint for something else than it is; all up to this one can be read. 2 is written only where
# there are masks of set_masks(), which 1 would leave out. See docs/checkpoints.md.
FORMAT = 2
# Settings that came later, and what an older rose_ops did.
ADDED = {"first_order_every": 1}


class Kept:
    """Carries a state tensor through ``Optimizer.load_state_dict``, which would cast it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def saved(
    state_dict: dict[str, Any],
    states: dict[Tensor, dict[str, Any]],
    settings: Settings,
    steps: int,
    masks: dict[str, Any],
) -> dict[str, Any]:
    """What ``state_dict()`` returns, of what ``Optimizer.state_dict()`` does.

    Groups and states have the keys that ``torch.optim.AdamW``'s have (a checkpoint is read by its
    keys) and ``selective`` where it is False; the settings are beside them, and how many steps were
    taken, which may be more than any parameter had a gradient in. Masks are copies: the next capture
    writes where they are.
    """
    # By identity: hooks may have given the states other names.
    owners = {id(s[key]): p for p, s in states.items() for key in MASKS.values() if key in s}
    state_dict["state"] = {
        i: {k: saved_mask(v, owners[id(v)]) if id(v) in owners else v for k, v in state.items()}
        for i, state in state_dict["state"].items()
    }
    state_dict[ROSE] = {"format": 1, "settings": settings.to_saved(), "steps": steps}
    if masks:
        state_dict[ROSE] |= {"format": FORMAT, "masks": masks}
    return state_dict


class Loader:
    """Checks a state dict against an optimizer, before anything is changed.

    Args:
        settings, groups, defaults: the optimizer's.

    Attributes:
        differences: of the settings that the checkpoint was trained with, in words.
        own: the masks of ``set_masks()`` in the checkpoint; None: it has none.
        steps: that were taken; None: the checkpoint does not say.
    """

    def __init__(
        self, settings: Settings, groups: list[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        self._settings, self._groups, self._defaults = settings, groups, defaults
        self.differences: list[str] = []
        self.own: dict[str, OwnMasks] | None = None
        self.steps: int | None = None

    def checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What ``Optimizer.load_state_dict`` is to load.

        Raises:
            ValueError: it does not fit.
        """

        def fail(problem: str) -> ValueError:
            return ValueError(f"the state dict {problem}; nothing was loaded")

        state, groups = state_dict.get("state"), state_dict.get("param_groups")
        if not isinstance(state, dict) or not isinstance(groups, (list, tuple)):
            raise fail("has no 'state' and 'param_groups'; expected what state_dict() returns")
        if not all(isinstance(group, dict) and "params" in group for group in groups):
            raise fail("has a parameter group without 'params'")
        theirs = [len(group["params"]) for group in groups]
        here = [len(group["params"]) for group in self._groups]
        if theirs != here:
            raise fail(f"has groups of {theirs} parameters and the optimizer has groups of {here}")
        ids = [i for group in groups for i in group["params"]]
        if unknown := state.keys() - set(ids):
            raise fail(f"has state of parameters {sorted(map(str, unknown))} that are in no group")
        ours = state_dict.get(ROSE)
        if ours is not None:
            self._check_ours(ours, fail)
        # AdamW's groups do not say what is selective: that stays as it is.
        groups = [
            {"selective": ours is not None or is_selective(here), **group}
            for here, group in zip(self._groups, groups, strict=True)
        ]
        flags = [[is_selective(group) for group in some] for some in (self._groups, groups)]
        if flags[0] != flags[1]:
            self.differences.append(
                f"selective={flags[1]} by groups, as in the checkpoint (was {flags[0]})"
            )
        for group in groups:
            check_group({**self._defaults, **group}, is_new=False)
        params = dict(zip(ids, (p for group in self._groups for p in group["params"]), strict=True))
        kept = {i: self._checked_state(i, p, state[i]) for i, p in params.items() if i in state}
        # All is checked: now the copies, where new moments would be, and none besides.
        of_moments = {i: values for i, values in kept.items() if values}
        for moment in MOMENTS:
            owners = [params[i] for i in of_moments]
            places = memory.empties(list(map(local, owners)), self._settings.moment_dtype)
            for p, values, place in zip(owners, of_moments.values(), places, strict=True):
                values[moment] = Kept(spread_like(place.copy_(part_of(values[moment], p)), p))
        return {
            **state_dict,
            "state": kept,
            "param_groups": [
                {**{key: self._defaults[key] for key in ADAMW_ONLY}, **_without_adamw_only(group)}
                for group in groups
            ],
        }

    def _check_ours(self, ours: Any, fail: Callable[[str], ValueError]) -> None:
        if not isinstance(ours, dict) or not isinstance(ours.get("settings"), dict):
            raise fail(f"has a {ROSE!r} that state_dict() does not make")
        number = ours.get("format", 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise fail(f"has a format {shown(number)}; expected an integer from 1 to {FORMAT}")
        if number > FORMAT:
            raise fail(
                f"is of format {number}, which a newer rose_ops made, and this one reads formats up to "
                f"{FORMAT}: load it with that one, or update this one"
            )
        self.steps = ours.get("steps")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 0):
            raise fail(f"has taken {shown(self.steps)} steps; expected an integer >= 0")
        here, there = self._settings.to_saved(), {**ADDED, **ours["settings"]}
        self.differences = [
            f"{name}={here.get(name)!r} (the checkpoint has {there.get(name)!r})"
            for name in sorted(here.keys() | there.keys(), key=str)
            if here.get(name) != there.get(name)
        ]
        if "masks" in ours:
            kinds, granularity = self._settings.kinds, self._settings.granularity
            self.own = from_saved(ours["masks"], self._groups, kinds, granularity)

    def _checked_state(self, i: int, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        def fail(problem: str) -> ValueError:
            return ValueError(
                f"state of parameter {i} (shape {tuple(p.shape)}): {problem}; nothing was loaded"
            )

        if not isinstance(state, dict):
            raise fail(f"it is a {type(state).__name__}; expected a dict")
        if not state:
            return state
        for key in STATE:
            if key not in state:
                raise fail(f"{key!r} is missing; expected step, exp_avg and exp_avg_sq")
        kept = dict(state)
        if is_lazy(p):
            raise ValueError(
                f"state of parameter {i}, which is not initialized yet: run a batch through the model "
                "first; nothing was loaded"
            )
        step = state["step"]
        if not isinstance(step, Tensor) or step.numel() != 1 or has_memory(step):
            if isinstance(step, Tensor) and step.numel() == 1:
                step = step.item()
            if not is_number(step) or step < 0:
                raise fail(f"'step' is {step}; expected a number >= 0")
            kept["step"] = Kept(torch.tensor(step, dtype=torch.float32, device=p.device))
        for key in MOMENTS:
            value = state[key]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise fail(f"{key!r} is not a floating-point tensor")
            if value.shape != p.shape:
                raise fail(f"{key!r} has shape {tuple(value.shape)}; expected the parameter's")
            try:
                part_of(value, p)
            except ValueError as error:
                raise fail(f"{key!r}: {error}") from None
        for kind, key in MASKS.items():
            if key not in state:
                continue
            mask = kept.pop(key)
            if is_cast_mask(mask, p):
                continue  # AdamW, which casts it, has trained since
            try:
                found = Kept(loaded_mask(mask, p))
            except ValueError as error:
                raise fail(f"{key!r} {error}") from None
            if kind in self._settings.kinds:
                kept[key] = found
        return kept


def _without_adamw_only(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ADAMW_ONLY}


def unpacked(states: dict[Tensor, dict[str, Any]]) -> None:
    """Take state tensors out of what carried them."""
    for p, values in states.items():
        states[p] = {
            key: value.value if isinstance(value, Kept) else value for key, value in values.items()
        }


def completed(groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Options that an older or an AdamW state lacks."""
    for key, value in {"maximize": False, "capturable": False, **ADAMW_ONLY}.items():
        defaults.setdefault(key, value)
    for group in groups:
        for key in defaults:
            group.setdefault(key, defaults[key])
        if is_selective(group):
            group.pop("selective", None)


def steps_of(states: dict[Tensor, dict[str, Any]]) -> int:
    """How many steps the parameter with the most has taken."""
    steps = [values["step"] for values in states.values() if "step" in values]
    return max((int(step) for step in steps if has_memory(step)), default=0)


class Checkpointed(Optimizer):
    """What goes out of a ``RoseFusedAdamW``, and what comes in."""

    settings: Settings
    _steps_done: int
    _captures: Captures
    _had_state: bool

    def _reset(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As of ``torch.optim.AdamW``, whose keys it has, and beside them, under ``"rose"``, the
        settings of the ranking, masks of ``set_masks()`` and how many steps were taken. A captured mask
        is in its parameter's state. Groups have a key more, ``selective``, where it is False.

        (``torch.distributed.checkpoint`` keeps states and groups alone, so with it a difference of
        settings is not noticed, such masks have to be set again, and the steps are those of the
        parameter with the most.)

        As with PyTorch's optimizers, moments are not copied.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._captures.put_in_order(self.state)
        own = to_saved(self._captures.own, params)
        return saved(super().state_dict(), self.state, self.settings, self._steps_done, own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of ``torch.optim.AdamW`` returned.

        Moments keep their precision whatever the parameters' dtype (they are cast to
        ``state_dtype`` only), so training resumes as if it had not stopped. Where the checkpoint was
        trained with other settings, the optimizer's stay, and a warning says which differ. Masks of
        ``set_masks()`` stay, too, unless the state has some.

        They are copied, once: unlike with PyTorch's optimizers, the next steps do not write into the
        state dict, nor those of another optimizer that it came from into this one.

        Raises:
            ValueError: the state does not fit the parameters, or needs what is not here (amsgrad);
                nothing was changed.
        """

        # Registered now, it runs after the user's own hooks, on what they made of the dict.
        loader = Loader(self.settings, self.param_groups, self.defaults)
        handle = self.register_load_state_dict_pre_hook(lambda _, found: loader.checked(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if loader.own is not None:
            self._captures.own = loader.own
        if loader.steps is not None and self._had_state:
            self._steps_done = loader.steps
        if loader.differences:
            warnings.warn(
                "the optimizer goes on with other settings than the checkpoint was trained with: "
                + ", ".join(loader.differences),
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        if self.settings.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be copied or pickled, as the group belongs "
                "to this process; expected its state_dict() instead"
            )
        self._captures.put_in_order(self.state)
        return {
            **super().__getstate__(),
            "settings": asdict(self.settings),
            "_steps_done": self._steps_done,
            "_own_masks": self._captures.own,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        settings, own = state.pop("settings", None), state.pop("_own_masks", None)
        super().__setstate__(state)
        if settings is not None or "settings" not in self.__dict__:
            self.settings = Settings(**(settings or {}))
        unpacked(self.state)
        completed(self.param_groups, self.defaults)
        self._reset()
        if own is not None:
            self._captures.own = own
        self._steps_done = state.get("_steps_done", steps_of(self.state))
