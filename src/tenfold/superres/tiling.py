"""How a picture is run in the memory that there is: whole, in exact strips, or in tiles whose seams are blended.

Whole and strips give the same picture. Tiles do not quite: the context of a layer ends at the tile's border. Their
origins lie on the grid of the windows, or every window would see another part of the picture; each reads at least 64
pixels beyond what it gives, and neighbours are blended over 64 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tenfold.core.console import UserError
from tenfold.core.devices import memory_bytes
from tenfold.superres import strips
from tenfold.superres.config import HiTConfig
from tenfold.superres.model import HiT

CONTEXT = 64  # low-res pixels that a tile reads beyond its own, at least
FEATHER = 32  # low-res pixels on either side of a seam that are blended
FREE_SHARE = 0.7  # of the free memory that is used unasked


@torch.no_grad()
def upscale_tensor(
    model: HiT,
    image: Tensor,
    tile: Literal["auto", "none", "strips"] | int = "auto",
    memory_budget: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, str]:
    """Upscale one picture without gradients.

    Args:
        model: the network, in evaluation mode.
        image: 1 x channels x H x W, float, in [0, 1], on the network's device.
        tile: `auto` takes the exact way that fits into the memory and tiles where none does; `none` runs every
            operator on the whole picture; `strips` one strip of windows after the other; a number makes tiles of this
            side in low-res pixels, rounded up to 64 and to the grid of the windows.
        memory_budget: bytes beside what is in use already; None takes a share of what is free.
        progress: called with the fraction done.

    Returns:
        1 x channels x sH x sW, not clamped, and how it was done: `whole`, `strips`, or `tiles of N px`.

    Raises:
        UserError: not even the result fits into the memory.
    """
    height, width = image.shape[2:]
    if tile == "none":
        return model.upscale_whole(image), "whole"
    if isinstance(tile, int):
        side = round_up(max(tile, 2 * FEATHER), grid(model.config))
        return _tiles(model, image, side, progress), f"tiles of {side} px"
    budget = memory_budget if memory_budget is not None else free_memory(image.device)
    if tile == "strips" or strips_bytes(model.config, height, width) <= budget:
        if tile == "auto" and image.device.type != "cpu" and whole_bytes(model.config, height, width) <= budget:
            return model.upscale_whole(image), "whole"
        return strips.upscale(model, image, progress), "strips"
    side = largest_tile(model.config, height, width, budget)
    return _tiles(model, image, side, progress), f"tiles of {side} px"


def free_memory(device: torch.device) -> int:
    """Bytes on `device` that a run may take unasked."""
    if device.type == "cuda":
        return int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(FREE_SHARE * memory_bytes()[1])


def grid(config: HiTConfig) -> int:
    """Side in pixels at which the windows of all layers begin together; 192 for the released networks."""
    return math.lcm(*(side for window in config.windows for side in window))


def whole_bytes(config: HiTConfig, height: int, width: int) -> int:
    """Estimate of the plain run's memory: about 27 maps of `width` channels at its worst, in the feed-forward part."""
    return 27 * 4 * height * width * config.width + result_bytes(config, height, width)


def strips_bytes(config: HiTConfig, height: int, width: int) -> int:
    """Estimate of the strips' memory: two maps, the picture, the result, and a strip with its temporaries."""
    rows = min(height, 2 * max(window[0] for window in config.windows))
    maps = 4 * height * width * (2 * config.width + 2 * config.channels)
    strip = 4 * rows * width * config.width * 8
    return maps + strip + 64 * 2**20 + result_bytes(config, height, width)


def result_bytes(config: HiTConfig, height: int, width: int) -> int:
    """Bytes of the upscaled picture in float32."""
    return 4 * config.channels * height * width * config.scale**2


def largest_tile(config: HiTConfig, height: int, width: int, budget: int) -> int:
    """Side of the largest tiles, in low-res pixels, with which a run stays within `budget` bytes.

    Raises:
        UserError: the result alone is larger than the budget.
    """
    free = budget - result_bytes(config, height, width)
    if free <= 0:
        raise UserError(
            f"the {config.scale * width}x{config.scale * height} result takes "
            f"{result_bytes(config, height, width) / 1e6:,.3f} MB and {budget / 1e6:,.3f} MB are allowed: raise "
            "--memory, or cut the picture"
        )
    step = grid(config)
    reach = 2 * round_up(CONTEXT, step)
    side = round_up(2 * FEATHER, step)  # narrower tiles would blend with more than one neighbour
    while side < max(height, width) and strips_bytes(config, side + step + reach, side + step + reach) <= free:
        side += step
    return side


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def _tiles(model: HiT, image: Tensor, side: int, progress: Callable[[float], None] | None) -> Tensor:
    scale = model.config.scale
    _, channels, height, width = image.shape
    reach = round_up(CONTEXT, grid(model.config))
    result = image.new_zeros(1, channels, scale * height, scale * width)
    tops, lefts = range(0, height, side), range(0, width, side)
    done = 0
    for top in tops:
        for left in lefts:
            y, x = _span(top, side, height, reach), _span(left, side, width, reach)
            part = strips.upscale(model, image[:, :, slice(*y), slice(*x)])
            # Of what a tile computes, it gives its own pixels and the blended border.
            rows, columns = _span(top, side, height, FEATHER), _span(left, side, width, FEATHER)
            part = part[:, :, _scaled(rows, scale, y[0]), _scaled(columns, scale, x[0])]
            weight_y = _ramp(rows, top, top + side, height, scale).to(part)
            weight_x = _ramp(columns, left, left + side, width, scale).to(part)
            result[:, :, _scaled(rows, scale), _scaled(columns, scale)] += part * weight_y[:, None] * weight_x
            done += 1
            if progress:
                progress(done / (len(tops) * len(lefts)))
    return result


def _span(start: int, side: int, length: int, reach: int) -> tuple[int, int]:
    """A tile's own pixels and `reach` more on both sides, within the picture."""
    return max(0, start - reach), min(length, start + side + reach)


def _scaled(span: tuple[int, int], scale: int, origin: int = 0) -> slice:
    return slice(scale * (span[0] - origin), scale * (span[1] - origin))


def _ramp(span: tuple[int, int], start: int, stop: int, length: int, scale: int) -> Tensor:
    """Weights of a tile along one axis: 1 inside, linear over FEATHER pixels on either side of a seam.

    Those of neighbouring tiles add up to 1.
    """
    position = (torch.arange(scale * span[0], scale * span[1]) + 0.5) / scale
    weight = torch.ones_like(position)
    if start > 0:
        weight *= ((position - (start - FEATHER)) / (2 * FEATHER)).clamp(0, 1)
    if stop < length:
        weight *= (((stop + FEATHER) - position) / (2 * FEATHER)).clamp(0, 1)
    return weight
