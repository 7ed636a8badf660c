"""Feature maps, channels last (B x H x W x C): views for convolutions, windows, padding, rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def to_image(features: Tensor) -> Tensor:
    """B x H x W x C map -> B x C x H x W view of the same memory."""
    return features.permute(0, 3, 1, 2)


def to_map(image: Tensor) -> Tensor:
    """B x C x H x W -> contiguous B x H x W x C."""
    return image.permute(0, 2, 3, 1).contiguous()


def convolve(convolution: nn.Module, features: Tensor) -> Tensor:
    """Apply a convolution to a B x H x W x C map."""
    return to_map(convolution(to_image(features)))


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a B x H' x W' x C map into its N windows of L tokens, N x L x C."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def from_windows(windows: Tensor, window: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Put N x L x C windows together into a map of shape B x H' x W' x C."""
    batch, height, width, channels = shape
    x = windows.view(batch, height // window[0], width // window[1], window[0], window[1], channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def pad_by_reflection(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Pad a B x H x W x C map at the bottom and right to multiples, reflecting without repeating the edge.

    Where the padding is longer than the map, it bounces back and forth, which the official code cannot do.
    """
    if torch.compiler.is_exporting():
        return _pad_any_size(x, multiple)
    for axis, factor in zip((1, 2), multiple, strict=True):
        size = x.shape[axis]
        extra = -size % factor
        if extra:
            x = torch.cat((x, x.index_select(axis, reflected_indices(size, extra, x.device))), dim=axis)
    return x


def reflected_indices(size: int, extra: int, device: torch.device) -> Tensor:
    """Source indices of the `extra` positions after the end: a triangle wave of period 2 (size - 1), int64."""
    if size == 1:
        return torch.zeros(extra, dtype=torch.long, device=device)
    position = torch.arange(size, size + extra, device=device) % (2 * (size - 1))
    return torch.minimum(position, 2 * (size - 1) - position)


def _pad_any_size(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """`pad_by_reflection` without a branch on the size, for a graph that serves every size."""
    for axis, factor in zip((1, 2), multiple, strict=True):
        size = x.shape[axis]
        # Tensors, since the ONNX exporter takes no symbolic number as the divisor of a remainder.
        period = torch.full((1,), 2 * (size - 1), dtype=torch.long, device=x.device).clamp(min=1)
        position = torch.arange((size + factor - 1) // factor * factor, device=x.device) % period
        x = x.index_select(axis, torch.minimum(position, period - position))
    return x
