"""The user-level object: any picture in, the same kind of picture out, larger."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tenfold.core import devices, images
from tenfold.core.console import UserError, warn
from tenfold.superres import checkpoint
from tenfold.superres.model import HiT
from tenfold.superres.pixels import ImageLike, to_picture, to_planes

try:
    from tenfold.superres import tiling  # type: ignore
except ImportError:

    class tiling:  # type: ignore # until tiling.py is there
        @staticmethod
        def upscale_tensor(model, image, tile="auto", memory_budget=None, progress=None):
            return model(image), "whole"


Precision = Literal["fp32", "bf16", "fp16"]
Tile = Literal["auto", "none", "strips"] | int
Progress = Callable[[float], None]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class UpscaleResult:
    """An upscaled picture.

    Attributes:
        image: the family, layout and sample type of the input: Pillow image, NumPy HW(C), torch (B)CHW; a path and a
            `Picture` give a `Picture`, which carries profile and EXIF.
        scale: upscaling factor.
        seconds: wall-clock time of the upscaling, without loading the network.
        method: how it was run: whole, in exact strips, or in tiles.
    """

    image: Any
    scale: int
    seconds: float
    method: str

    def save(self, path: Path | str, quality: int = images.DEFAULT_QUALITY) -> None:
        """Write the picture; the suffix names the format. Raises UserError as `images.write`, or for a batch."""
        images.write(path, to_picture(self.image), quality)


class Upscaler:
    """A network on a device, ready to upscale.

    Args:
        model: the network, in evaluation mode, on its device.
        precision: `fp32`; `bf16` or `fp16` autocast, for GPUs. Correlations accumulate in fp32 in any case.

    Example:
        >>> upscaler = Upscaler.from_pretrained("tenfold-x2")  # doctest: +SKIP
        >>> upscaler.upscale("cat.jpg").save("cat-x2.png")  # doctest: +SKIP
    """

    def __init__(self, model: HiT, precision: Precision = "fp32") -> None:
        if precision not in get_args(Precision):
            raise UserError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
        self.model = model
        self.precision = precision
        self.device = next(model.parameters()).device
        if precision != "fp32" and self.device.type == "cpu":
            warn(f"{precision} is slower than fp32 on most processors; it is meant for GPUs")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path = "tenfold-x2", device: str = "auto", precision: Precision = "fp32"
    ) -> Upscaler:
        """Load a network: embedded (`tenfold-x2`), official (`hit-srf-x4`), hub id, or a .safetensors / .pth file.

        Raises:
            UserError: an unknown name, a file that is no HiT-SR checkpoint, a device that is not there.
        """
        return cls(checkpoint.load_model(str(name_or_path), devices.resolve_device(device)), precision)

    @property
    def scale(self) -> int:
        """Upscaling factor of the network."""
        return self.model.config.scale

    def upscale(
        self,
        image: ImageLike,
        tile: Tile = "auto",
        self_ensemble: bool = False,
        memory_budget: int | None = None,
        progress: Progress | None = None,
    ) -> UpscaleResult:
        """Upscale one picture, or a batch of equal-size ones.

        Transparency is upscaled by the same network, as a grey picture: interpolating it would leave soft edges around
        sharp colour. What lies under full transparency is first replaced by neighbouring colour, so that no fringe of
        hidden colour is drawn into view. Grey stays grey.

        Args:
            image: a path; a `Picture`; a Pillow image; NumPy HxW or HxWxC (C = 1, 2, 3, 4; uint8, uint16, or float in
                [0, 1]); torch CxHxW or BxCxHxW, float in [0, 1]. Two and four channels have alpha last.
            tile: `auto` runs whole or in exact strips, and in tiles of an aligned grid only when memory demands it;
                `none`, `strips`, or a tile side in pixels force one way.
            self_ensemble: average over the 8 flips and transposes (8 times the work; a little better).
            memory_budget: bytes to stay within, or None for what is free.
            progress: called with the fraction done, 0..1.

        Returns:
            The picture s times larger. Integer samples are rounded half to even; all are clipped to the valid range.

        Raises:
            UserError: unreadable file, unsupported shape or dtype, values beyond [0, 1], NaN.
        """
        start = time.perf_counter()
        planes, restore = to_planes(image)
        options = {"tile": tile, "memory_budget": memory_budget}
        steps = _Steps(
            progress, planes.shape[0] * (2 if planes.shape[1] in (2, 4) else 1) * (8 if self_ensemble else 1)
        )
        outputs, method = [], ""
        for item in planes.split(1):
            enlarged, method = self._upscale_planes(item, self_ensemble, options, steps)
            outputs.append(enlarged)
        seconds = time.perf_counter() - start
        return UpscaleResult(restore(torch.cat(outputs)), self.scale, seconds, method)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """`upscale` for one array, with default settings: what `evaluate_pairs` calls."""
        return self.upscale(image).image

    def _upscale_planes(self, planes: Tensor, self_ensemble: bool, options: dict, steps: _Steps) -> tuple[Tensor, str]:
        """1 x C x H x W in [0, 1], C = 1..4 -> 1 x C x sH x sW in [0, 1], on the CPU."""
        channels = planes.shape[1]
        if channels in (1, 3):
            return self._upscale_color(planes, self_ensemble, options, steps)
        color, alpha = planes[:, :-1], planes[:, -1:]
        enlarged, method = self._upscale_color(fill_hidden_color(color, alpha), self_ensemble, options, steps)
        if alpha.min() == alpha.max():
            coverage = alpha.new_full((1, 1, *enlarged.shape[2:]), float(alpha.max()))
        else:
            coverage, _ = self._upscale_color(alpha, self_ensemble, options, steps)
        return torch.cat((enlarged, coverage), dim=1), method

    def _upscale_color(self, color: Tensor, self_ensemble: bool, options: dict, steps: _Steps) -> tuple[Tensor, str]:
        """1 x 1 or 3 x H x W -> the same, s times larger: adapts the colours to those that the network takes."""
        wanted, given = self.model.config.channels, color.shape[1]
        if wanted == given:
            return self._run(color, self_ensemble, options, steps)
        if wanted == 3:
            enlarged, method = self._run(color.expand(-1, 3, -1, -1), self_ensemble, options, steps)
            return enlarged.mean(1, keepdim=True), method
        parts = [self._run(plane, self_ensemble, options, steps) for plane in color.split(1, dim=1)]
        return torch.cat([enlarged for enlarged, _ in parts], dim=1), parts[0][1]

    @torch.no_grad()
    def _run(self, image: Tensor, self_ensemble: bool, options: dict, steps: _Steps) -> tuple[Tensor, str]:
        """The network on 1 x channels x H x W; the sum over views if asked for; clipped, on the CPU."""
        image = image.to(self.device)
        half = _HALF.get(self.precision)
        total, method = None, ""
        with torch.autocast(self.device.type, dtype=half) if half else contextlib.nullcontext():
            for view in range(8 if self_ensemble else 1):
                enlarged, method = tiling.upscale_tensor(
                    self.model, _see(image, view).contiguous(), progress=steps.inner, **options
                )
                steps.advance()
                enlarged = _unsee(enlarged.float(), view)
                total = enlarged if total is None else total + enlarged
        assert total is not None
        return (total / (8 if self_ensemble else 1)).clamp(0, 1).cpu(), method


def fill_hidden_color(color: Tensor, alpha: Tensor) -> Tensor:
    """Replace colour under zero alpha by that of the nearest visible surroundings.

    A pyramid of alpha-weighted averages is built until every cell sees something; then coarse colour is handed down to
    the cells that saw nothing.

    Args:
        color: 1 x C x H x W.
        alpha: 1 x 1 x H x W; zero means hidden.

    Returns:
        1 x C x H x W; visible pixels are unchanged, bit for bit.
    """
    visible = alpha > 0
    if visible.all() or not visible.any():
        return color
    height, width = alpha.shape[2:]
    padding = (0, width % 2, 0, height % 2)
    weight = torch.nn.functional.pad(alpha, padding)
    coarse_weight = torch.nn.functional.avg_pool2d(weight, 2)
    coarse = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(color, padding) * weight, 2)
    coarse = torch.where(coarse_weight > 0, coarse / coarse_weight.clamp_min(1e-20), coarse)
    filled = fill_hidden_color(coarse, coarse_weight)
    filled = filled.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]
    return torch.where(visible, color, filled)


def _see(image: Tensor, view: int) -> Tensor:
    """One of the 8 symmetries of the square: bit 0 transposes, then bit 1 flips rows, bit 2 flips columns."""
    if view & 1:
        image = image.transpose(2, 3)
    axes = [axis for bit, axis in ((2, 2), (4, 3)) if view & bit]
    return image.flip(axes) if axes else image


def _unsee(image: Tensor, view: int) -> Tensor:
    """The inverse of `_see`."""
    axes = [axis for bit, axis in ((2, 2), (4, 3)) if view & bit]
    image = image.flip(axes) if axes else image
    return image.transpose(2, 3) if view & 1 else image


class _Steps:
    """Fraction done, over several runs of the network that each report their own."""

    def __init__(self, report: Progress | None, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def inner(self, fraction: float) -> None:
        if self._report is not None:
            self._report(min(1.0, (self._done + fraction) / self._total))

    def advance(self) -> None:
        self._done += 1
        self.inner(0.0)
