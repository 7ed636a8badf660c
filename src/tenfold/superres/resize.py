"""MATLAB's bicubic `imresize`, bit for bit.

Super-resolution benchmarks define their low-resolution images by `imresize(image, 1/s, 'bicubic')`. Pillow, OpenCV and
torch differ from it by up to tens of grey levels, enough to put a good model below bicubic: hence the whole rule here.

Each axis is one sparse weight matrix: a row has the few taps of one output pixel. Two conventions for pixels beyond the
border exist in public test sets: `mirror` (edge pixel repeated, period 2n; Set5 as distributed with SwinIR) and `clamp`
(edge pixel extended; the files of RCAN and SelfExSR).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from tenfold.core.console import UserError

Border = Literal["mirror", "clamp"]

# Rows of float64 sums that are held at once; bounds the memory above input and output to about 64 MB.
_BLOCK_ELEMENTS = 4_000_000


def imresize_matlab(image: np.ndarray, scale: Fraction | float, border: Border = "mirror") -> np.ndarray:
    """Resize by a factor, as MATLAB `imresize(image, scale, 'bicubic')` does (antialiased when shrinking).

    Args:
        image: HxW or HxWxC, uint8, uint16, float32 or float64.
        scale: factor for both axes, > 0; pass `Fraction(1, 3)` rather than 0.333 for an exact output size.
        border: what lies beyond the edge, see the module's text.

    Returns:
        ceil(H*scale) x ceil(W*scale) [x C], dtype of the input. Integer images are rounded half up and clipped after
        each axis, as MATLAB does; float images are neither rounded nor clipped.

    Raises:
        UserError: another dtype or rank, an empty image, a scale that is not positive, an unknown border.
    """
    if not scale > 0 or not math.isfinite(scale):
        raise UserError(f"scale must be a positive number, not {scale}")
    size = (math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)) if image.ndim >= 2 else (0, 0)
    return _resize(image, size, (float(scale), float(scale)), border)


def resize_to(image: np.ndarray, size: tuple[int, int], border: Border = "mirror") -> np.ndarray:
    """Resize to a given size, as MATLAB `imresize(image, [height width], 'bicubic')` does.

    Args:
        image: HxW or HxWxC, uint8, uint16, float32 or float64.
        size: (height, width) in pixels, each >= 1.
        border: what lies beyond the edge, see the module's text.

    Returns:
        height x width [x C], dtype of the input.

    Raises:
        UserError: as `imresize_matlab`.
    """
    height, width = size
    if height < 1 or width < 1:
        raise UserError(f"the output size must be at least 1x1, not {width}x{height}")
    scales = (height / image.shape[0], width / image.shape[1]) if image.ndim >= 2 and image.size else (1.0, 1.0)
    return _resize(image, size, scales, border)


def axis_weights(in_length: int, out_length: int, scale: float, border: Border) -> tuple[np.ndarray, np.ndarray]:
    """The sparse weight matrix of one axis.

    Args:
        in_length: input pixels along the axis.
        out_length: output pixels along the axis.
        scale: output pixels per input pixel.
        border: what lies beyond the edge.

    Returns:
        indices: out_length x taps, int64, the input pixels that an output pixel is made of.
        weights: out_length x taps, float64, rows sum to 1.
    """
    stretch = max(1.0, 1.0 / scale)  # shrinking widens the kernel: that is the antialiasing
    support = 4.0 * stretch
    centre = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)  # in 1-based input pixels
    first = np.floor(centre - support / 2)
    indices = first[:, None] + np.arange(math.ceil(support) + 2)  # 1-based, may lie beyond the border
    weights = _cubic((centre[:, None] - indices) / stretch) / stretch
    weights /= weights.sum(axis=1, keepdims=True)

    position = indices.astype(np.int64) - 1
    if border == "mirror":
        position %= 2 * in_length
        position = np.minimum(position, 2 * in_length - 1 - position)
    else:
        position = position.clip(0, in_length - 1)
    used = weights.any(axis=0)
    return position[:, used], weights[:, used]


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (support -2..2)."""
    x = np.abs(x)
    x2, x3 = x**2, x**3
    inner = (1.5 * x3 - 2.5 * x2 + 1) * (x <= 1)
    outer = (-0.5 * x3 + 2.5 * x2 - 4 * x + 2) * ((x > 1) & (x <= 2))
    return inner + outer


def _resize(image: np.ndarray, size: tuple[int, int], scales: tuple[float, float], border: Border) -> np.ndarray:
    if image.ndim not in (2, 3) or image.size == 0:
        raise UserError(f"imresize needs a non-empty HxW or HxWxC image, not one of shape {image.shape}")
    if image.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise UserError(f"imresize needs uint8, uint16, float32 or float64 pixels, not {image.dtype}")
    if border not in get_args(Border):
        raise UserError(f"border must be one of {', '.join(get_args(Border))}, not {border!r}")
    # MATLAB resizes the axis with the smaller factor first; equal factors: height first.
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        indices, weights = axis_weights(image.shape[axis], size[axis], scales[axis], border)
        lines = np.ascontiguousarray(np.moveaxis(image, axis, 0))
        image = np.moveaxis(_combine_lines(lines, indices, weights), 0, axis)
    return np.ascontiguousarray(image)


def _combine_lines(lines: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of lines (n_in x ...): n_out x ..., same dtype, integers rounded half up and clipped."""
    shape = (len(indices), *lines.shape[1:])
    lines = lines.reshape(len(lines), -1)
    output = np.empty((len(indices), lines.shape[1]), lines.dtype)
    block = max(1, _BLOCK_ELEMENTS // lines.shape[1])
    for start in range(0, len(indices), block):
        rows = slice(start, start + block)
        total = np.zeros((len(indices[rows]), lines.shape[1]))
        for tap in range(indices.shape[1]):
            total += weights[rows, tap, None] * lines[indices[rows, tap]]
        if np.issubdtype(lines.dtype, np.integer):
            total = np.floor(total + 0.5).clip(0, np.iinfo(lines.dtype).max)
        output[rows] = total
    return output.reshape(shape)
