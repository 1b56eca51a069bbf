"""Parameter groups: which options they have and in what range, the tables that operators read them
from, and the usual groups of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor, nn

from rose_ops.settings import Settings, choice, is_number, shown

# Keys of torch.optim.AdamW's groups that mean nothing here, with the one value that can be honoured
# (None: any). Groups have them, too, so that checkpoints have the same keys.
ADAMW_ONLY: dict[str, Any] = {
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "foreach": None,
    "fused": None,
}


def plain(value: Any) -> Any:
    """An option with Python's numbers in the place of NumPy's, which ``torch.load`` takes for code."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return value.item()  # a scalar, or an array of none
    kind: type[Any] = type(value)
    if isinstance(value, Real) and kind not in (bool, int, float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", "capturable")


def is_selective(group: Mapping[str, Any]) -> bool:
    """Groups say so only where they are not: ``torch.distributed.checkpoint`` loads by their keys, and
    ``torch.optim.AdamW``'s have no such key."""
    return group.get("selective", True)


def beta_values(betas: Sequence[object]) -> tuple[float, float]:
    """The numbers, of Python, NumPy or in tensors of one element."""
    first, second = (
        beta.item() if isinstance(beta, Tensor) else float(cast(SupportsFloat, beta)) for beta in betas
    )
    return first, second


def check_group(group: Mapping[str, Any], *, is_new: bool) -> None:
    """Raise unless the options of a group (merged with the defaults) can work.

    Args:
        group: a parameter group.
        is_new: whether a user makes it now. Else it is what a schedule, or a checkpoint of one, made of
            it: a learning rate below 0, which cosines round to, does what it does in AdamW; a learning
            rate in a tensor is not read.
    """

    def bad(name: str, expected: str) -> ValueError:
        return ValueError(f"{name}={shown(group[name])}; expected {expected}")

    for name in _OPTIONS:
        if name not in group:
            raise ValueError(f"a parameter group has no {name!r}; expected it, as in the others")
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise bad("lr", "a number or a tensor of one element")
        lr = lr.item() if is_new and not lr.is_meta else 0.0
    if not is_number(lr) or (is_new and lr < 0):
        raise bad("lr", "a number >= 0" if is_new else "a finite number")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise bad("betas", "a pair of numbers")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise bad("betas", "two numbers or two tensors, as AdamW does")
    for beta in betas:
        if isinstance(beta, Tensor):
            beta = beta.item() if beta.numel() == 1 and not beta.is_complex() else None
        if not is_number(beta) or not 0 <= beta < 1:
            raise bad("betas", "two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not is_number(group[name]) or group[name] < 0:
            raise bad(name, "a number >= 0")
    for name in ("maximize", "capturable", "selective"):
        if not isinstance(group.get(name, True), bool):
            raise bad(name, "True or False")
    for name in Settings.__dataclass_fields__.keys() & group.keys():
        raise ValueError(
            f"{name!r} in a parameter group: one ranking spans all groups, so it is an argument of "
            "RoseFusedAdamW; groups may set lr, betas, eps, weight_decay, maximize and selective. (For "
            "a wrapper that puts its own arguments into groups: "
            f"functools.partial(RoseFusedAdamW, {name}=...))"
        )
    for name, only in ADAMW_ONLY.items():
        if only is not None and group.get(name, only) != only:
            raise ValueError(f"{name}={shown(group[name])} is not supported; expected {only}")


Groups = Sequence[Mapping[str, Any]]

# What is looked at before every step.
_CHECKED = (
    "eps", "weight_decay", "maximize", "selective", "capturable", "amsgrad", "differentiable",
    "decoupled_weight_decay",
)  # fmt: skip


class GroupTables:
    """The options of an optimizer's groups, checked and as the tables that operators read; made again
    only where an option has changed."""

    def __init__(self) -> None:
        self._options: list[Any] = []
        self._hyper: tuple[list[Any], Tensor] | None = None
        self._lrs: tuple[list[Any], Tensor] | None = None

    def check(self, groups: Groups) -> None:
        """Raise where a group was given what cannot work since the latest step."""
        found = []
        for group in groups:
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
            for group in groups:
                check_group(group, is_new=False)
            self._options = found

    def lr(self, groups: Groups) -> Tensor:
        """Learning rates ``[G]``, where tensors of the user's are."""
        lrs = [group["lr"] for group in groups]
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

    def hyper(self, groups: Groups, selecting: bool = True) -> Tensor:
        """The other hyperparameters ``[G, 6]`` (:class:`rose_ops.definitions.Hyper`), on the CPU.

        Args:
            selecting: False: a step that selects nothing, for which every group is a plain one.
        """
        values = [
            (
                *beta_values(group["betas"]),
                float(group["eps"]),
                float(group["weight_decay"]),
                -1.0 if group["maximize"] else 1.0,
                float(is_selective(group) and selecting),
            )
            for group in groups
        ]
        if self._hyper is None or self._hyper[0] != values:
            self._hyper = values, torch.tensor(values, dtype=torch.float64, device="cpu")
        return self._hyper[1]


def is_encoder_weight(name: str) -> bool:
    """The authors' rule of what is ranked."""
    return "layer" in name and "weight" in name


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
            chosen = selective == "all" or is_encoder_weight(name)
            groups.setdefault((p.dim() >= 2, chosen), []).append(p)
    if not any(chosen for _, chosen in groups):
        raise ValueError(f"selective={selective!r} matches no trainable parameter of the model")
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "selective": chosen}
        for (decays, chosen), params in groups.items()
    ]
