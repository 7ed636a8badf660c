"""The training losses of UniDepth V1 and V2, each a pure function, in two recipes.

`paper` is what the papers print: V1 (arXiv 2403.18913) eq. 3-5 and V2 (arXiv 2502.20110) eq. 2-6. `release` is what the
released configurations train with, which differs in every term. Where the released code mixes images of a batch by
accident, the functions take `mixed=True` to do the same; the default is what was meant.

Two views of one scene follow each other in a batch: images 0 and 1 are the first pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Literal["paper", "release"]
WEIGHTS: dict[Recipe, dict[str, float]] = {
    "paper": {"depth": 1.0, "camera": 1.0, "invariance": 0.1, "edges": 1.0, "uncertainty": 0.1},
    "release": {"depth": 1.0, "camera": 0.25, "invariance": 0.1, "edges": 1.0, "uncertainty": 0.1},
}
MEAN_WEIGHT = 0.15  # of the squared mean in the depth term, both recipes
EPSILON = 1e-4  # under square roots, in logarithms and in divisions of the release
CELL = 14  # pixels of a cell of the edge map, the encoder's patch


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each image's valid pixels: B x C x H x W and B x 1 x H x W -> B; zero where nothing is valid."""
    mask = mask.to(values.dtype).expand_as(values)
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)


def ray_angles(rays: Tensor) -> Tensor:
    """Azimuth atan2(x, z) and polar angle acos(y) of unit rays, rad: B x 3 x H x W to B x 2 x H x W (V1 3.1)."""
    x, y, z = rays.unbind(1)
    return torch.stack([torch.atan2(x, z), torch.acos(y.clamp(-1 + 1e-6, 1 - 1e-6))], dim=1)


def lambda_mse(error: Tensor, mask: Tensor, mean_weights: Sequence[float] = (1.0, 1.0, MEAN_WEIGHT)) -> Tensor:
    """Variance plus weighted squared mean of each output dimension, summed: B (V1 eq. 3).

    Args:
        error: B x D x H x W, prediction minus truth in (azimuth, polar angle, log depth).
        mask: B x 1 x H x W, which pixels count.
        mean_weights: of each dimension's squared mean.
    """
    total = torch.zeros(error.shape[0], device=error.device)
    for dimension, weight in enumerate(mean_weights):
        values = error[:, dimension : dimension + 1]
        mean, square = masked_mean(values, mask), masked_mean(values**2, mask)
        total = total + (square - mean**2) + weight * mean**2
    return total


def silog(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    scale_invariant: Tensor | None = None,
    mixed: bool = False,
) -> Tensor:
    """Scale-invariant logarithmic error under a root, the release's depth term.

    Args:
        prediction: B x 1 x H x W, m.
        target: the same.
        mask: B x 1 x H x W.
        scale_invariant: B, true for images whose scale is unknown: their mean is left out.
        mixed: combine each image's mean with every image's variance, as the released code does: B x B.

    Returns:
        B, or B x B with `mixed`, of which entry (i, j) has the mean of i and the variance of j.
    """
    error = (prediction + EPSILON).log() - (target + EPSILON).log()
    mean = masked_mean(error, mask)
    variance = masked_mean((error - mean[:, None, None, None]) ** 2, mask)
    weight = torch.full_like(mean, MEAN_WEIGHT)
    if scale_invariant is not None:
        weight = weight * (~scale_invariant.bool())
    mean_square = mean[:, None] ** 2 if mixed else mean**2
    return (variance + weight * mean_square + EPSILON).sqrt()


def ray_regression(prediction: Tensor, target: Tensor, by_row: bool = True) -> Tensor:
    """Root of the mean squared difference of unit rays, the release's camera term.

    Args:
        prediction: B x 3 x H x W.
        target: the same.
        by_row: take the root row by row, as the released code does: B x H; otherwise over the image: B.
    """
    square = ((prediction - target) ** 2).mean(1)
    return (square.mean(-1 if by_row else (1, 2)) + EPSILON).sqrt()


def invariance(
    values: Tensor,
    intrinsics: Tensor,
    mask: Tensor,
    flips: Tensor | None = None,
    recipe: Recipe = "release",
    mixed: bool = False,
) -> Tensor:
    """How far two views of a scene are from saying the same, once the first is brought onto the second.

    The views differ by a zoom, a shift and perhaps a mirror image, which the intrinsics tell. Each view is in turn the
    detached target of the other.

    Args:
        values: 2P x C x H x W, features or depth; views of a pair follow each other.
        intrinsics: 2P x 3 x 3, in pixels of `values`.
        mask: 2P x 1 x H x W.
        flips: 2P, whether the view is mirrored.
        recipe: `release` squares and takes the root; `paper` is half the sum of absolute differences (V1 eq. 4).
        mixed: average each pair's difference over every pair's mask, as the released code does: 2P x P.

    Returns:
        One value per pair and direction: P x 2 (or 2P x P with `mixed`).
    """
    moved, moved_mask = _onto_second_view(values, intrinsics, mask, flips)
    second, valid = values[1::2], moved_mask * mask[1::2].to(values.dtype)
    directions = []
    for one, other in ((moved, second.detach()), (moved.detach(), second)):
        difference = one - other
        by_pixel = (difference.abs() if recipe == "paper" else difference**2).mean(1)  # P x H x W
        if mixed:
            weight = valid[:, 0][:, None]  # of the row's pair, against the differences of all pairs
            count = weight.flatten(2).sum(2).clamp_min(1)
            directions.append(((by_pixel[None] * weight).flatten(2).sum(2) / count + 1.1 * EPSILON).sqrt())
        else:
            mean = masked_mean(by_pixel[:, None], valid)
            directions.append(0.5 * mean if recipe == "paper" else (mean + 1.1 * EPSILON).sqrt())
    return torch.cat(directions) if mixed else torch.stack(directions, dim=1)


def _onto_second_view(values: Tensor, intrinsics: Tensor, mask: Tensor, flips: Tensor | None) -> tuple[Tensor, Tensor]:
    """First views zoomed and shifted onto their second views, with their masks: P x C x H x W, P x 1 x H x W."""
    height, width = values.shape[-2:]
    moved, masks = [], []
    for first in range(0, values.shape[0], 2):
        view, valid = values[first : first + 1], mask[first : first + 1].to(values.dtype)
        before, after = intrinsics[first].tolist(), intrinsics[first + 1].tolist()
        if flips is not None and bool(flips[first] != flips[first + 1]):
            view, valid = view.flip(-1), valid.flip(-1)
            before[0][2] = width - before[0][2]
        zoom = after[0][0] / before[0][0]
        left, top = (int(after[axis][2] - (before[axis][2] - 0.5) * zoom - 0.5) for axis in (0, 1))
        view = F.interpolate(view, scale_factor=zoom, mode="bilinear", align_corners=False)
        valid = F.interpolate(valid, scale_factor=zoom, mode="nearest")
        room = (left, width - view.shape[-1] - left, top, height - view.shape[-2] - top)
        moved.append(F.pad(view, room))  # negative room crops
        masks.append(F.pad(valid, room))
    return torch.cat(moved), torch.cat(masks)


def edge_strength(image: Tensor, validity: Tensor) -> Tensor:
    """Sobel gradient of a picture, root mean square over its colours; zero at the border and beside invalid pixels.

    Args:
        image: B x 3 x H x W, normalised.
        validity: B x 1 x H x W, false where the picture was padded.

    Returns:
        B x 1 x H x W.
    """
    batch, channels, height, width = image.shape
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=image.device) / 8
    planes = image.reshape(batch * channels, 1, height, width)
    both = F.conv2d(planes, torch.stack([kernel, kernel.T])[:, None], padding=1)
    square = both.reshape(batch, channels, 2, height, width).square().mean(1).sum(1, keepdim=True)
    inside = torch.zeros_like(square)
    inside[..., 3:-3, 3:-3] = 1
    eroded = 1 - F.max_pool2d(1 - validity.to(square.dtype), 3, stride=1, padding=1)
    return square.sqrt() * inside * eroded


def edge_cells(
    image: Tensor, validity: Tensor, quantile: float, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Where the patches of the edge-guided loss are: pixels (row, column) for each image, as many for all.

    Cells of 14 x 14 pixels whose edges are above the quantile; where some image has fewer than ten of them, further
    ones come in at random, one in ten. All images keep the first in raster order, up to the smallest number found.
    """
    edges = edge_strength(image, validity)
    if min(edges.shape[-2:]) < CELL:
        return [torch.zeros(1, 2, dtype=torch.long)] * image.shape[0]
    small = F.interpolate(edges, scale_factor=1 / CELL, mode="bilinear", align_corners=False)[:, 0]
    strong = small > torch.quantile(small.flatten(1), quantile, dim=1)[:, None, None]
    if int(strong.flatten(1).sum(1).min()) < 10:
        strong = strong | (torch.rand(strong.shape, generator=generator) < 0.1).to(strong.device)
    found = [cells.nonzero() * CELL for cells in strong]
    kept = max(1, min(map(len, found)))
    return [cells[:kept] for cells in found]


def patch_side(short_side: int, generator: torch.Generator | None = None, training: bool = True) -> int:
    """Odd side of the patches in pixels: 4 to 8 percent of the image's short side at random, 5 outside training."""
    share = 0.04 + 0.04 * float(torch.rand((), generator=generator)) if training else 0.05
    return max(3, int(share * short_side) // 2 * 2 + 1)


def local_ssi(
    prediction: Tensor, target: Tensor, mask: Tensor, cells: Sequence[Tensor], side: int, recipe: Recipe = "release"
) -> Tensor:
    """Shape of the depth inside small patches, whatever its scale and shift there: B (V2 eq. 5).

    Args:
        prediction: B x 1 x H x W, m.
        target: the same.
        mask: B x 1 x H x W.
        cells: centres of the patches, (row, column), for each image.
        side: of a patch, odd, pixels.
        recipe: `paper` compares inverse depth standardised by median and mean absolute deviation; `release` compares
            log(1 + 50/depth) standardised by mean and deviation without outliers, under a root, and averages the
            patches with the whole image.
    """
    if recipe == "paper":
        one, two, compare = 1 / prediction.clamp_min(EPSILON), 1 / target.clamp_min(EPSILON), _robust_difference
    else:
        one, two = ((1 + 50 / (EPSILON + depth)).log() for depth in (prediction, target))
        compare = _trimmed_difference
    reach = side // 2
    patches = []
    for image, centres in enumerate(cells):
        p, t, m = (_patches(maps[image, 0], centres, reach, side) for maps in (one, two, mask.to(one.dtype)))
        patches.append(_mean_over_patches(compare, p, t, m))
    local = torch.stack(patches)
    if recipe == "paper":
        return local
    whole = [
        compare(*(maps[image].flatten()[None] for maps in (one, two, mask.to(one.dtype))))
        for image in range(len(cells))
    ]
    return 0.5 * (local + torch.cat(whole))


def _patches(plane: Tensor, centres: Tensor, reach: int, side: int) -> Tensor:
    """N x side*side: squares around the centres, zero beyond the image."""
    offsets = torch.arange(side, device=plane.device)
    rows = centres[:, 0, None, None].to(plane.device) + offsets[:, None]
    columns = centres[:, 1, None, None].to(plane.device) + offsets
    return F.pad(plane, (reach,) * 4)[rows, columns].flatten(1)


def _mean_over_patches(
    compare: Callable[[Tensor, Tensor, Tensor], Tensor], one: Tensor, two: Tensor, mask: Tensor, least: int = 6
) -> Tensor:
    enough = (mask.sum(1) >= least).to(one.dtype)
    return (compare(one, two, mask) * enough).sum() / enough.sum().clamp_min(1)


def _trimmed_difference(one: Tensor, two: Tensor, mask: Tensor) -> Tensor:
    """Root of the mean difference of N x K values, each standardised without what lies beyond 1.96 deviations."""
    kept = mask
    for values in (one, two):
        mean, variance = _moments(values, mask)
        kept = kept * ((values - mean).abs() <= 1.96 * variance.sqrt())
    kept = kept.detach()
    scaled = []
    for values in (one, two):
        mean, variance = _moments(values, kept)
        scaled.append((values - mean) / (variance + EPSILON).sqrt())
    difference = ((scaled[0] - scaled[1]).abs() * kept).sum(1) / kept.sum(1).clamp_min(1)
    return (difference + EPSILON).sqrt()


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum(1, keepdim=True).clamp_min(1)
    mean = (values * mask).sum(1, keepdim=True) / count
    return mean, ((values - mean) ** 2 * mask).sum(1, keepdim=True) / count


def _robust_difference(one: Tensor, two: Tensor, mask: Tensor) -> Tensor:
    """Mean difference of N x K values, each less its median and over its mean absolute deviation."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    scaled = []
    for values in (one, two):
        hidden = torch.where(mask > 0, values, torch.full_like(values, math.nan))
        median = torch.nan_to_num(hidden.nanmedian(1, keepdim=True).values)
        deviation = ((values - median).abs() * mask).sum(1, keepdim=True) / count
        scaled.append((values - median) / (deviation + EPSILON))
    return ((scaled[0] - scaled[1]).abs() * mask).sum(1) / count[:, 0]


def uncertainty(
    log_uncertainty: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, recipe: Recipe = "release"
) -> Tensor:
    """How far the predicted error is from the error that was made: B (V2 eq. 6). Larger means worse, in both recipes.

    Args:
        log_uncertainty: B x 1 x H x W, logarithm of the network's confidence output.
        prediction: B x 1 x H x W, m.
        target: the same.
        mask: B x 1 x H x W.
        recipe: `paper` asks exp(log_uncertainty) to be the error in log depth; `release` asks log_uncertainty to be
            the error in metres, once medians are equal, and takes the root.
    """
    if recipe == "paper":
        made = (prediction.clamp_min(EPSILON).log() - target.clamp_min(EPSILON).log()).abs().detach()
        return masked_mean((log_uncertainty.exp() - made).abs(), mask)
    values = []
    for guess, depth, truth, valid in zip(log_uncertainty, prediction, target, mask.bool(), strict=True):
        if not bool(valid.any()):
            values.append(guess.sum() * 0)
            continue
        p, t = depth[valid], truth[valid]
        made = (p * (t.median() / p.median()) - t).abs().detach()
        values.append((guess[valid] - made).abs().mean())
    return (torch.stack(values) + EPSILON).sqrt()
