"""Modulated deformable 3x3 convolution: torchvision's result, several times faster on processors.

torchvision's kernel for processors samples element by element. Here the map lies channels last, so that a sample is a
weighted sum of four rows, which is what `embedding_bag` computes, with a vectorised kernel. Samples are taken in blocks
that stay in the cache and go from there into a matrix product. Accelerators keep torchvision's kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import deform_conv2d

TAPS = 9
# Rows of samples in one block: 9 x 256 channels x 256 rows of float32 are 2.4 MB, which fits a second-level cache.
_BLOCK_ELEMENTS = 9 * 256 * 256


def modulated_deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A 3x3 deformable convolution with modulation, padding 1, no bias (Zhu et al., Deformable ConvNets v2, eq. 1).

    Args:
        x: B x C x H x W.
        offset: B x 18 x H' x W', (y, x) of each of the nine taps.
        mask: B x 9 x H' x W', the factor on each tap.
        weight: C' x C x 3 x 3.
        stride: 1 or 2; H' = ceil(H / stride), or what the offsets have.

    Returns:
        B x C' x H' x W'.
    """
    if torch.compiler.is_exporting():
        return _by_grid_sample(x, offset, mask, weight, stride)
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return deform_conv2d(x, offset.to(x.dtype), weight, None, stride=stride, padding=1, mask=mask.to(x.dtype))
    batch, channels = x.shape[:2]
    height, width = offset.shape[2:]
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # B HW x C
    matrix = weight.permute(2, 3, 1, 0).reshape(TAPS * channels, -1)  # (9 C) x C'
    index, factor = _corners(offset, mask, x.shape[2:], stride)  # (B H'W' 9) x 4
    output = _gather_and_multiply(rows, index, factor, matrix)
    return output.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _gather_and_multiply(rows: Tensor, index: Tensor, factor: Tensor, matrix: Tensor) -> Tensor:
    """Sample rows (HW x C) at (N 9) x 4 weighted corners and multiply by the kernel: N x C'."""
    # With gradients every sample is kept anyhow, and each block would cost a gradient map of its own.
    keeps = torch.is_grad_enabled() and (rows.requires_grad or factor.requires_grad)
    block = len(index) if keeps else max(1, _BLOCK_ELEMENTS // matrix.shape[0]) * TAPS
    parts = []
    for start in range(0, len(index), block):
        samples = functional.embedding_bag(
            index[start : start + block], rows, mode="sum", per_sample_weights=factor[start : start + block]
        )
        parts.append(samples.view(-1, matrix.shape[0]) @ matrix)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _corners(offset: Tensor, mask: Tensor, size: torch.Size, stride: int) -> tuple[Tensor, Tensor]:
    """Where each sample lies among the rows of the maps, and how much of each row it takes.

    Args:
        offset: B x 18 x H' x W'.
        mask: B x 9 x H' x W'.
        size: (H, W) of the maps.
        stride: of the convolution.

    Returns:
        (B H'W' 9) x 4 int64 rows; (B H'W' 9) x 4 factors, zero outside of the map.
    """
    height, width = size
    batch, _, rows, columns = offset.shape
    count = rows * columns
    moved = offset.reshape(batch, TAPS, 2, count).permute(2, 0, 3, 1)  # 2 x B x H'W' x 9
    steps = torch.arange(3, dtype=offset.dtype) - 1
    y = torch.arange(rows, dtype=offset.dtype).mul_(stride).repeat_interleave(columns)[:, None]
    x = torch.arange(columns, dtype=offset.dtype).mul_(stride).repeat(rows)[:, None]
    y = moved[0] + (y + steps.repeat_interleave(3))  # B x H'W' x 9
    x = moved[1] + (x + steps.repeat(3))
    # Clamping first keeps huge offsets within the range of integers; what lies that far outside is zero anyhow.
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)
    top, left = y.floor().detach(), x.floor().detach()
    below, right = y - top, x - left
    amount = mask.reshape(batch, TAPS, count).transpose(1, 2)
    y_index, y_factor = _line(top, below, height)
    x_index, x_factor = _line(left, right, width)
    upper, lower = y_factor[0] * amount, y_factor[1] * amount
    factor = torch.stack((upper * x_factor[0], upper * x_factor[1], lower * x_factor[0], lower * x_factor[1]), dim=-1)
    # Whole numbers up to 2^24 are exact in float32; the number of the image is added behind the cast.
    first, second = y_index[0] * width, y_index[1] * width
    index = torch.stack((first + x_index[0], first + x_index[1], second + x_index[0], second + x_index[1]), dim=-1)
    index = index.long() + (torch.arange(batch) * (height * width))[:, None, None, None]
    return index.view(-1, 4), factor.view(-1, 4)


def _line(low: Tensor, share: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both neighbours along an axis as (clamped index, factor); the factor is zero outside."""
    high = low + 1
    low_factor = (1 - share) * ((low >= 0) & (low < size))
    high_factor = share * ((high >= 0) & (high < size))
    return (low.clamp(0, size - 1), high.clamp(0, size - 1)), (low_factor, high_factor)


def _by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The same by operators that every ONNX runtime has; for export only."""
    batch, channels = x.shape[:2]
    height, width = x.shape[2:]
    rows, columns = offset.shape[2:]
    moved = offset.reshape(batch, TAPS, 2, rows, columns)
    steps = torch.arange(3, dtype=x.dtype) - 1
    y = torch.arange(rows, dtype=x.dtype)[:, None] * stride + steps.repeat_interleave(3)[:, None, None]
    x_places = torch.arange(columns, dtype=x.dtype)[None, :] * stride + steps.repeat(3)[:, None, None]
    place = torch.stack(
        ((2 * (moved[:, :, 1] + x_places) + 1) / width - 1, (2 * (moved[:, :, 0] + y) + 1) / height - 1), dim=-1
    )  # B x 9 x H' x W' x 2
    grid = place.reshape(batch, TAPS * rows, columns, 2)
    samples = functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    samples = samples.reshape(batch, channels, TAPS, rows, columns) * mask[:, None]
    flat = samples.reshape(batch, channels * TAPS, rows * columns)
    return (weight.reshape(weight.shape[0], -1) @ flat).reshape(batch, -1, rows, columns)


def coarse_view(field: Tensor, size: torch.Size) -> Tensor:
    """A field of the finer level read as mmcv's kernel reads it when it convolves the coarser one.

    The kernel does not check shapes: it takes the first values of each sample's contiguous memory as if the field had
    the coarser size. The released weights were trained with that, so it belongs to the method.

    Args:
        field: B x K x H x W.
        size: (H', W') of the coarser level, H'W' <= HW.

    Returns:
        B x K x H' x W'.
    """
    batch, channels = field.shape[:2]
    height, width = size
    return field.reshape(batch, -1)[:, : channels * height * width].view(batch, channels, height, width)
