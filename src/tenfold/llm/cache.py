"""Keys and values of the past, written in place, so that a new token costs one step and no copy of what was."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from tenfold.llm.config import ModelConfig


class LayerCache:
    """The past of one layer.

    Args:
        keys: room for keys (B, G, capacity, c), filled from the front.
        values: the same for values.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions (B, G, T, c); return all keys and values so far, as views."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Cache:
    """The past of every layer.

    Args:
        config: the model's.
        batch: rows.
        capacity: positions that there is room for.
        device: of the model.
        dtype: of the model's activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.layers = [
            LayerCache(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))
            for _ in range(config.layers)
        ]

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.layers[0].length

    def row(self, index: int, start: int = 0, length: int = 0) -> Cache:
        """One row from position `start` on, as a cache over the same memory of which `length` positions are filled.

        What lies before `start` is set to zero, so that a mask can hide it.
        """
        row = copy(self)
        row.capacity = self.capacity - start
        row.layers = []
        for layer in self.layers:
            keys, values = layer.keys[index : index + 1], layer.values[index : index + 1]
            if start and not length:
                keys[:, :, :start] = values[:, :, :start] = 0
            row.layers.append(LayerCache(keys[:, :, start:], values[:, :, start:]))
            row.layers[-1].length = length
        return row

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
