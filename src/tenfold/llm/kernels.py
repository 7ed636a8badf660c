"""RMSNorm and cross-entropy with their gradients written out, where composed ones cost more time or memory.

On processors torch composes both. Its RMSNorm then takes twice as long as this one, forward and backward together, and
its cross-entropy holds two tensors as large as the logits where one is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis: (..., d) and (d,) to (..., d)."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype == gain.dtype == torch.float32
    if plain and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, gain, eps)
    return F.rms_norm(x, gain.shape, gain, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = (torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gain, inverse = ctx.saved_tensors
        normed = x * inverse
        for_x = for_gain = None
        if ctx.needs_input_grad[0]:
            scaled = grad * gain
            along = torch.linalg.vecdot(scaled, normed)[..., None] / -x.shape[-1]
            for_x = torch.addcmul(scaled, normed, along).mul_(inverse)
        if ctx.needs_input_grad[1]:
            for_gain = normed.mul_(grad).flatten(0, -2).sum(0)
        return for_x, for_gain, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, in float32. The logits are used up: their memory becomes their gradient's.

    Args:
        logits: scores (..., V), which nothing else may read afterwards.
        targets: ids (...).
    """
    scores, wanted = logits.flatten(0, -2).float(), targets.flatten()
    if type(scores) is Tensor and scores.requires_grad and scores.is_cpu:
        return _CrossEntropy.apply(scores, wanted)
    return F.cross_entropy(scores, wanted)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets[:, None]
        wanted = logits.gather(1, targets)
        largest, place = logits.max(-1, keepdim=True)
        torch.softmax(logits, -1, out=logits)
        ctx.save_for_backward(logits, targets)
        # log sum exp from the largest score, whose probability is at least 1 / V and does not underflow.
        return (largest - logits.gather(1, place).log() - wanted).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probabilities, targets = ctx.saved_tensors
        probabilities.scatter_add_(1, targets, probabilities.new_full((), -1.0).expand(targets.shape))
        return probabilities.mul_(grad / len(targets)), None
