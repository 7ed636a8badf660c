"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds (FSDP2 shards are DTensors)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Ema:
    """Keeps `average <- decay * average + (1 - decay) * weight` of every trainable parameter of `model`.

    The average starts at the weights that the model has. Buffers and frozen parameters are not averaged.

    Args:
        model: the module that is trained, after it has been placed and sharded.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages = [local(parameter.detach()).clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average."""
        torch._foreach_lerp_(self.averages, [local(parameter) for parameter in self.parameters], 1 - self.decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Make the average equal to the present weights."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.copy_(local(parameter))

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            weight = local(parameter)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while; the weights come back bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
