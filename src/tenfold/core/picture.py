"""A picture as one plain array with its metadata beside it, and its sample types. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as an array.

    Attributes:
        pixels: HxW grey, HxWx2 grey + alpha, HxWx3 RGB or HxWx4 RGB + alpha (not premultiplied), upright;
            uint8, uint16, or float32 (white is 1).
        icc: colour profile that the values are meant in; None means sRGB.
        exif: EXIF block ("Exif" header included) with the orientation set to upright.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None

    @property
    def height(self) -> int:
        """Rows."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.pixels.shape[1]

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is transparency."""
        return self.pixels.ndim == 3 and self.pixels.shape[2] in (2, 4)

    @property
    def color(self) -> np.ndarray:
        """HxW or HxWx3: the picture without alpha."""
        if not self.has_alpha:
            return self.pixels
        return self.pixels[..., 0] if self.pixels.shape[2] == 2 else self.pixels[..., :3]

    @property
    def alpha(self) -> np.ndarray | None:
        """HxW alpha, or None."""
        return self.pixels[..., -1] if self.has_alpha else None

    def with_pixels(self, pixels: np.ndarray) -> Picture:
        """The same metadata around other pixels."""
        return replace(self, pixels=pixels)


def convert_depth(pixels: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Change the sample type: uint8, uint16 or float32, white staying white.

    Integers are rounded half to even; floats beyond 0..1 are clipped when they become integers.
    """
    dtype = np.dtype(dtype)
    if pixels.dtype == dtype:
        return pixels
    if dtype == np.float32:
        return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint16) * np.uint16(257)
    if pixels.dtype == np.uint16:
        return np.rint(pixels / 257.0).astype(np.uint8)
    # In float32, as the published evaluation code does: 64-bit arithmetic would decide some halves otherwise.
    return np.rint(pixels.clip(0, 1).astype(np.float32) * np.float32(np.iinfo(dtype).max)).astype(dtype)


def to_rgb8(picture: Picture) -> np.ndarray:
    """HxWx3 uint8: grey replicated, alpha dropped."""
    color = convert_depth(picture.color, np.uint8)
    return np.ascontiguousarray(color if color.ndim == 3 else np.repeat(color[..., None], 3, axis=2))
