"""Second-order ROSE as one would write it in PyTorch. Fixed: results are compared over time."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def second_order_risk(grads: Tensor, exp_avgs: Tensor, beta1: float) -> Tensor:
    """Eq. 4."""
    return ((1 - beta1) * grads.abs() / exp_avgs.abs() - 1).abs()


def threshold(risk: Tensor, upper: float) -> Tensor:
    """Eq. 3."""
    return torch.kthvalue(risk, int(Fraction(str(upper)) * risk.numel())).values


@torch.no_grad()
def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    upper: float,
) -> None:
    """Algorithm 1 with the second-order mask, in place."""
    beta1, beta2 = betas
    risk = second_order_risk(flatten(grads), flatten(exp_avgs), beta1)
    mask = risk <= threshold(risk, upper)
    del risk
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    masks = mask.split([p.numel() for p in params])
    for p, g, m, v, flat_mask in zip(params, grads, exp_avgs, exp_avg_sqs, masks, strict=True):
        keep = flat_mask.view_as(p)
        g = torch.where(keep, g, m)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = v.sqrt().div_(bias2**0.5).add_(eps)
        update = (m / denom).div_(bias1).add_(p, alpha=weight_decay)
        p.sub_(update.mul_(keep), alpha=lr)


@torch.no_grad()
def tensor_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    upper: float,
) -> None:
    """The same at the granularity of the authors' code, which ranks whole tensors by their norms and
    steps one after the other; in place. (Theirs adds eps before the bias correction and decays last.)
    """
    beta1, beta2 = betas
    norms = [torch.stack([t.norm() for t in tensors]) for tensors in (grads, exp_avgs)]
    risk = second_order_risk(*norms, beta1)
    kept = (risk <= torch.quantile(risk, upper)).tolist()
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    for p, g, m, v, keep in zip(params, grads, exp_avgs, exp_avg_sqs, kept, strict=True):
        if not keep:
            g = m
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if keep:
            denom = v.sqrt().div_(bias2**0.5).add_(eps)
            p.mul_(1 - lr * weight_decay).addcdiv_(m, denom, value=-lr / bias1)
