"""Between what people hold (files, Pillow, NumPy, torch) and what the network sees: float planes, and back again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.images import Picture, convert_depth

ImageLike = str | Path | Picture | Image.Image | np.ndarray | Tensor

# How far beyond 0..1 float pixels may lie: interpolation overshoots a little, a 0..255 image lies far beyond.
_FLOAT_MARGIN = 0.1
_CHANNEL_COUNTS = (1, 2, 3, 4)


def to_planes(image: ImageLike) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Float planes of an image, and the way back.

    Args:
        image: a path; a `Picture`; a Pillow image; NumPy HxW or HxWxC, uint8, uint16 or float; torch CxHxW or BxCxHxW
            float. C is 1, 2, 3 or 4, alpha last; floats lie in [0, 1].

    Returns:
        planes: B x C x H x W float32 on the CPU.
        restore: turns planes of any height and width into the family, layout and sample type that came in (for a path,
            into a `Picture`); integers are rounded half to even.

    Raises:
        UserError: unreadable file, other shape or dtype, floats beyond [0, 1], NaN.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        picture = images.from_pil(image)
        planes, restore_array = _from_array(picture.pixels)
        return planes, lambda enlarged: images.to_pil(picture.with_pixels(restore_array(enlarged)))
    if isinstance(image, str | Path):
        image = images.read(image)
    if not isinstance(image, Picture):
        raise UserError(f"expected a path, a Pillow image, a NumPy array or a torch tensor, not {type(image).__name__}")
    picture = image
    planes, restore_array = _from_array(picture.pixels)
    return planes, lambda enlarged: picture.with_pixels(restore_array(enlarged))


def to_picture(image: Any) -> Picture:
    """A `Picture` of any image that `to_planes` returns, for writing. Raises UserError for a batch."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return images.from_pil(image)
    if isinstance(image, Tensor):
        if image.dim() == 4 and image.shape[0] != 1:
            raise UserError(f"a batch of {image.shape[0]} images cannot be saved as one; save them one by one")
        image = image.reshape(image.shape[-3:]).permute(1, 2, 0).float().cpu().numpy()
    pixels = image if image.dtype in (np.uint8, np.uint16) else image.astype(np.float32)
    return Picture(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _from_array(array: np.ndarray) -> tuple[Tensor, Callable[[Tensor], np.ndarray]]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNEL_COUNTS):
        hint = "; transpose it to HxWxC" if array.ndim == 3 and array.shape[0] in _CHANNEL_COUNTS else ""
        raise UserError(f"expected an HxW or HxWxC array with 1 to 4 channels, found shape {array.shape}{hint}")
    if array.size == 0:
        raise UserError(f"the image is empty (shape {array.shape})")
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"expected uint8, uint16 or float pixels, found {array.dtype}")
    dtype, is_flat = array.dtype, array.ndim == 2
    is_float = np.issubdtype(dtype, np.floating)
    pixels = array.astype(np.float32) if is_float else convert_depth(array, np.float32)
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).reshape(*array.shape[:2], -1).permute(2, 0, 1)[None]
    if is_float:
        _check_range(planes)

    def restore(enlarged: Tensor) -> np.ndarray:
        pixels = enlarged[0].permute(1, 2, 0).contiguous().numpy()
        pixels = pixels.astype(dtype) if is_float else convert_depth(pixels, dtype)
        return pixels[..., 0] if is_flat else pixels

    return planes.contiguous(), restore


def _from_tensor(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if tensor.dim() not in (3, 4) or tensor.shape[-3] not in _CHANNEL_COUNTS:
        hint = "; permute it to CxHxW" if tensor.dim() == 3 and tensor.shape[-1] in _CHANNEL_COUNTS else ""
        shape = tuple(tensor.shape)
        raise UserError(f"expected a CxHxW or BxCxHxW tensor with 1 to 4 channels, found shape {shape}{hint}")
    if tensor.numel() == 0:
        raise UserError(f"the image is empty (shape {tuple(tensor.shape)})")
    if not tensor.is_floating_point():
        raise UserError(f"expected a float tensor in [0, 1], found {tensor.dtype}; divide by its largest value first")
    planes = tensor.detach().float().cpu()
    _check_range(planes)
    is_single, dtype, device = tensor.dim() == 3, tensor.dtype, tensor.device
    if is_single:
        planes = planes[None]
    return planes, lambda enlarged: (enlarged[0] if is_single else enlarged).to(device, dtype)


def _check_range(planes: Tensor) -> None:
    low, high = float(planes.min()), float(planes.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError("the image has NaN or infinite pixels; replace them first")
    if low < -_FLOAT_MARGIN or high > 1 + _FLOAT_MARGIN:
        raise UserError(f"float pixels must lie in [0, 1], found {low:.4g} to {high:.4g}; scale the image first")
