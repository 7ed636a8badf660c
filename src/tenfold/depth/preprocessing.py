"""Which size a network sees, and the way there and back, as pure functions of sizes and tensors.

An image becomes a network's image in three steps: padded (V2: to a moderate aspect ratio), scaled, padded (V1: to the
one shape that it knows). `Fit` says by how much, and takes cameras and maps both ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.depth import cameras
from tenfold.depth.config import PATCH, SizePolicy

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's colours, which DINOv2 expects
DEVIATION = (0.229, 0.224, 0.225)
LEVELS = 10  # of resolution, from few pixels to many


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


@dataclass(frozen=True)
class Fit:
    """How an image of one size becomes a network's image.

    Args:
        size: height and width of the image.
        outer: padding before scaling.
        scaled: height and width after scaling.
        factor: the one number that the release scales a camera by; the axes' own factors differ a little.
        inner: padding after scaling.
    """

    size: tuple[int, int]
    outer: Padding
    scaled: tuple[int, int]
    factor: float
    inner: Padding = Padding()

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width before scaling."""
        return (
            self.size[0] + self.outer.top + self.outer.bottom,
            self.size[1] + self.outer.left + self.outer.right,
        )

    @property
    def network_size(self) -> tuple[int, int]:
        """Height and width of the network's image."""
        return (
            self.scaled[0] + self.inner.top + self.inner.bottom,
            self.scaled[1] + self.inner.left + self.inner.right,
        )

    def factors(self, exact: bool) -> tuple[float, float]:
        """Scale of x and of y; the true ones if `exact`, else the release's one number for both."""
        if not exact:
            return self.factor, self.factor
        return self.scaled[1] / self.padded[1], self.scaled[0] / self.padded[0]

    def camera_in(self, model: str, params: Tensor, exact: bool) -> Tensor:
        """A camera of the image -> of the network's image. The given tensor is left alone."""
        outer, inner = self.outer, self.inner
        params = cameras.crop(model, params, -outer.left, -outer.top, -outer.right, -outer.bottom)
        params = cameras.resize(model, params, *self.factors(exact))
        return cameras.crop(model, params, -inner.left, -inner.top, -inner.right, -inner.bottom)

    def camera_out(self, intrinsics: Tensor, exact: bool) -> Tensor:
        """Intrinsics B x 3 x 3 of the network's image -> of the image."""
        factor_x, factor_y = self.factors(exact)
        k = intrinsics.clone()
        k[:, 0, 2] -= self.inner.left
        k[:, 1, 2] -= self.inner.top
        k[:, 0] /= factor_x
        k[:, 1] /= factor_y
        k[:, 0, 2] -= self.outer.left
        k[:, 1, 2] -= self.outer.top
        return k

    def image_in(self, image: Tensor, antialias: bool) -> Tensor:
        """B x 3 x H x W, uint8 or float in [0, 1] -> normalised, B x 3 x network size; padding is the mean colour.

        One colour at a time, since of a large photograph the float copies are what costs memory.
        """
        planes = []
        for channel, (mean, deviation) in enumerate(zip(MEAN, DEVIATION, strict=True)):
            plane = image[:, channel : channel + 1]
            plane = plane.float() / 255 if plane.dtype == torch.uint8 else plane.float()
            plane = F.pad(plane, _sides(self.outer), value=mean)
            if tuple(plane.shape[-2:]) != self.scaled:
                plane = F.interpolate(plane, self.scaled, mode="bilinear", align_corners=False, antialias=antialias)
            planes.append(F.pad((plane - mean) / deviation, _sides(self.inner)))
        return torch.cat(planes, dim=1)

    def map_out(self, values: Tensor, antialias: bool) -> Tensor:
        """B x C x network size -> B x C x H x W."""
        inner, outer = self.inner, self.outer
        values = values[..., inner.top : inner.top + self.scaled[0], inner.left : inner.left + self.scaled[1]]
        if self.scaled != self.padded:
            values = F.interpolate(values, self.padded, mode="bilinear", align_corners=False, antialias=antialias)
        return values[..., outer.top : outer.top + self.size[0], outer.left : outer.left + self.size[1]]


def _sides(padding: Padding) -> tuple[int, int, int, int]:
    return padding.left, padding.right, padding.top, padding.bottom


def fit_v2(height: int, width: int, policy: SizePolicy, level: float | None = None) -> Fit:
    """The sizes of UniDepthV2: pad to the aspect ratio's bounds, scale into the pixel budget, round up to patches.

    Args:
        height: of the image in pixels.
        width: likewise.
        policy: bounds of aspect ratio and pixels.
        level: 0 to 9.99 narrows the budget to the tenth that begins there; None leaves it.
    """
    lowest, highest = policy.ratio_bounds
    ratio = width / height
    new_height, new_width = height, width
    if ratio > highest:
        new_height = int(width / highest)
    elif ratio < lowest:
        new_width = int(height * lowest)
    left, top = (new_width - width) // 2, (new_height - height) // 2
    outer = Padding(left, top, new_width - width - left, new_height - height - top)
    fewest, most = float(policy.pixels_min), float(policy.pixels_max)
    if level is not None:
        step = (most - fewest) / LEVELS
        fewest, most = fewest + step * level, fewest + step * (level + 1)
    pixels = new_height * new_width
    factor = math.sqrt(min(most, max(fewest, pixels)) / pixels)
    scaled = tuple(math.ceil(int(side * factor) / PATCH) * PATCH for side in (new_height, new_width))
    return Fit((height, width), outer, (scaled[0], scaled[1]), factor)


def fit_v1(height: int, width: int, shape: tuple[int, int]) -> Fit:
    """The sizes of UniDepthV1: scale to fit into the network's one shape, pad the rest evenly."""
    factor = min(shape[0] / height, shape[1] / width)
    scaled = (math.ceil(height * factor - 0.5), math.ceil(width * factor - 0.5))
    left, top = (shape[1] - scaled[1]) // 2, (shape[0] - scaled[0]) // 2
    inner = Padding(left, top, shape[1] - scaled[1] - left, shape[0] - scaled[0] - top)
    return Fit((height, width), Padding(), scaled, factor, inner)
