"""The small networks that `reproduce` compares, and the rendered rooms that they learn from.

All arms are one network: a convolutional stem, three transformer blocks with four camera tokens, a decoder with skips,
0.4 M parameters. They differ in what the paper ablates (V1 table 5): whether the camera that the tokens predict prompts
the decoder, and whether the output is (azimuth, polar angle, log depth) or Cartesian points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.core.training import Shuffled
from tenfold.depth.cameras import intrinsics_of, pinhole_rays
from tenfold.depth.config import SceneConfig
from tenfold.depth.losses import invariance, lambda_mse, ray_angles
from tenfold.depth.simulate import add_noise, random_scenes, render

TRAIN_FOV_DEG = (35.0, 105.0)
MEAN_FOV_DEG = 70.0
WIDTHS = (24, 48, 72)
BANDS = 8  # of each angle in a ray's embedding


@dataclass(frozen=True)
class Arm:
    """What is ablated.

    Args:
        prompt: the decoder is told rays: the true ones in half of the steps, its own in the others; otherwise the mean
            camera's, always.
        output: what the decoder predicts.
        invariance: weight of the loss between two views of a scene.
    """

    prompt: bool
    output: Literal["spherical", "cartesian"] = "spherical"
    invariance: float = 0.0


ARMS: Mapping[str, Arm] = {
    "plain depth head": Arm(prompt=False),
    "camera + spherical": Arm(prompt=True),
    "camera + Cartesian": Arm(prompt=True, output="cartesian"),
    "camera + spherical + invariance": Arm(prompt=True, invariance=0.1),
}


def pinhole(fov_deg: Tensor, height: int, width: int, shift: Tensor | None = None) -> Tensor:
    """Intrinsics of square pixels: B x 3 x 3.

    Args:
        fov_deg: B, horizontal field of view of a centred camera with this focal length.
        height: of the image, pixels.
        width: likewise.
        shift: B x 2, of the principal point from the middle, in image widths and heights.
    """
    k = torch.eye(3).repeat(fov_deg.shape[0], 1, 1)
    k[:, 0, 0] = k[:, 1, 1] = 0.5 * width / torch.tan(torch.deg2rad(fov_deg) / 2)
    k[:, 0, 2], k[:, 1, 2] = 0.5 * width, 0.5 * height
    if shift is not None:
        k[:, :2, 2] += shift * torch.tensor([width, height])
    return k


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """B x N x C to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _convolutions(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1),
        nn.GroupNorm(8, out),
        nn.GELU(),
        nn.Conv2d(out, out, 3, 1, 1),
        nn.GroupNorm(8, out),
        nn.GELU(),
    )


class AblationNetwork(nn.Module):
    """One arm's network."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.arm = arm
        first, second, third = WIDTHS
        self.stem = nn.ModuleList(
            [_convolutions(3, first, 2), _convolutions(first, second, 2), _convolutions(second, third, 1)]
        )
        self.camera_tokens = nn.Parameter(0.02 * torch.randn(1, 4, third))
        self.position = nn.Linear(4, third)
        self.blocks = nn.ModuleList(Block(third, 3) for _ in range(3))
        self.camera_head = nn.Sequential(nn.LayerNorm(third), nn.Linear(third, third), nn.GELU(), nn.Linear(third, 1))
        channels = 4 * BANDS
        self.prompts = nn.ModuleList(nn.Conv2d(channels, width, 1) for width in (third, second, first))
        self.decoder = nn.ModuleList(
            [_convolutions(third, second, 1), _convolutions(second, first, 1), _convolutions(first, first, 1)]
        )
        self.head = nn.Conv2d(first, 1 if arm.output == "spherical" else 3, 3, 1, 1)

    def forward(self, image: Tensor, rays: Tensor | None = None, given: Tensor | None = None) -> dict[str, Tensor]:
        """Depth and camera.

        Args:
            image: B x 3 x H x W in [0, 1]; sides are multiples of 4.
            rays: B x 3 x H x W, the true camera; None prompts with the predicted one.
            given: B, which images of the batch are prompted with `rays`; all by default.

        Returns:
            `points` B x 3 x H x W, m; `rays` that they lie on; `predicted_rays` of the camera head.
        """
        batch, _, height, width = image.shape
        features, maps = 2 * image - 1, []
        for stage in self.stem:
            features = stage(features)
            maps.append(features)
        grid = features.shape[-2:]
        tokens = features.flatten(2).transpose(1, 2) + self.position(_grid_coordinates(*grid))
        tokens = torch.cat([self.camera_tokens.expand(batch, -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        predicted = self._rays(self.camera_head(tokens[:, :4])[..., 0], height, width)
        prompt = self._prompt(predicted, rays, given)
        x = tokens[:, 4:].transpose(1, 2).unflatten(2, grid)
        for level, (prompting, stage) in enumerate(zip(self.prompts, self.decoder, strict=True)):
            x = x + prompting(_embed(F.adaptive_avg_pool2d(prompt, x.shape[-2:])))
            x = stage(x)
            size = maps[1 - level].shape[-2:] if level < 2 else (height, width)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            if level < 2:
                x = x + maps[1 - level]
        return {**self._points(self.head(x), prompt), "predicted_rays": predicted}

    def _prompt(self, predicted: Tensor, rays: Tensor | None, given: Tensor | None) -> Tensor:
        if not self.arm.prompt:
            height, width = predicted.shape[-2:]
            mean = pinhole_rays(pinhole(torch.tensor([MEAN_FOV_DEG]), height, width), height, width)
            return mean.expand_as(predicted)
        own = predicted.detach()
        if rays is None:
            return own
        return rays if given is None else torch.where(given[:, None, None, None], rays, own)

    def _rays(self, raw: Tensor, height: int, width: int) -> Tensor:
        """Camera from four scalars, as V2 reads them."""
        focal = 0.7 * math.hypot(height, width) * raw[:, :2].exp()
        centre = raw.new_tensor([width, height]) * raw[:, 2:].sigmoid()
        return pinhole_rays(intrinsics_of(torch.cat([focal, centre], dim=1)), height, width)

    def _points(self, raw: Tensor, rays: Tensor) -> dict[str, Tensor]:
        if self.arm.output == "cartesian":
            z = F.softplus(raw[:, 2:] + 2)
            points = torch.cat([raw[:, :2], z], dim=1)
            return {"points": points, "rays": rays}
        z = (raw.clamp(-8, 8) + 1).exp()
        return {"points": z * rays / rays[:, 2:].clamp_min(1e-3), "rays": rays}


def _grid_coordinates(height: int, width: int) -> Tensor:
    """1 x HW x 4: places of the tokens, relative to the image, and their squares."""
    v, u = torch.meshgrid(
        (torch.arange(height) + 0.5) / height - 0.5, (torch.arange(width) + 0.5) / width - 0.5, indexing="ij"
    )
    place = torch.stack([u, v], dim=-1).reshape(1, -1, 2)
    return torch.cat([place, place**2], dim=-1)


def _embed(rays: Tensor) -> Tensor:
    """Sines and cosines of a ray's two angles from the optical axis' directions: B x 4*BANDS x H x W."""
    x, y, z = F.normalize(rays, dim=1).unbind(1)
    angles = torch.stack([torch.atan2(x, z), torch.atan2(y, z)], dim=1)
    scale = 2.0 ** torch.linspace(-1, 3, BANDS)
    phases = (angles[:, :, None] * scale[:, None, None]).flatten(1, 2)
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def arm_loss(arm: Arm) -> Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of one arm on a batch of `RenderedPairs`."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(batch["image"], batch["rays"], batch["given"])
        truth, mask = batch["points"], torch.ones_like(batch["points"][:, :1])
        depth, true_depth = output["points"][:, 2:].clamp_min(1e-3), truth[:, 2:]
        terms: dict[str, Tensor] = {}
        if arm.output == "cartesian":
            terms["points"] = lambda_mse(output["points"] - truth, mask).mean()
        else:
            terms["depth"] = lambda_mse(depth.log() - true_depth.log(), mask, (0.15,)).mean()
        if arm.prompt:
            angles = ray_angles(output["predicted_rays"]) - ray_angles(batch["rays"])
            terms["camera"] = lambda_mse(angles, mask, (1.0, 1.0)).mean()
        if arm.invariance:
            views = invariance(depth, batch["intrinsics"], mask, recipe="paper")
            terms["invariance"] = arm.invariance * views.mean()
        return torch.stack(list(terms.values())).sum(), terms

    return loss


class RenderedPairs:
    """Pairs of views of rendered rooms: one place and direction, two focal lengths.

    Image 2i and 2i + 1 of the stream are the views of pair i; the pictures are rendered once and kept, noise and
    exposure are drawn anew each time.

    Args:
        pairs: how many are rendered.
        size: height and width of the pictures.
        seed: of the rooms, the cameras, the order and the noise.
    """

    def __init__(self, pairs: int, size: tuple[int, int], seed: int) -> None:
        self.size = size
        self.seed = seed
        self._order = Shuffled(pairs, seed)
        height, width = size
        self.images = np.empty((pairs, 2, 3, height, width), np.float16)
        self.radius = np.empty((pairs, 2, 1, height, width), np.float16)
        fov = np.stack([pair_of_views(np.random.default_rng((seed, pair, 2))) for pair in range(pairs)])
        self.intrinsics = pinhole(torch.from_numpy(fov).float().flatten(), height, width).unflatten(0, (pairs, 2))
        for start in range(0, pairs, 32):
            numbers = range(start, min(start + 32, pairs))
            scenes = random_scenes(SceneConfig(), seed, numbers)
            for view in range(2):
                rays = pinhole_rays(self.intrinsics[numbers.start : numbers.stop, view], height, width)
                rendering = render(scenes, rays)
                self.images[numbers.start : numbers.stop, view] = rendering.image.numpy()
                self.radius[numbers.start : numbers.stop, view] = rendering.radius_m.numpy()

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The pictures, `points` in metres, `rays`, `intrinsics`, and which of them are `given` their camera."""
        places = [(self._order(index // 2), index % 2) for index in indices]
        image = torch.from_numpy(np.stack([self.images[place] for place in places])).float()
        radius = torch.from_numpy(np.stack([self.radius[place] for place in places])).float()
        intrinsics = torch.stack([self.intrinsics[place] for place in places])
        rays = pinhole_rays(intrinsics, *self.size)
        return {
            "image": add_noise(image, SceneConfig().noise, self.seed, indices),
            "points": radius * rays,
            "rays": rays,
            "intrinsics": intrinsics,
            "given": torch.tensor([index // 2 % 2 == 0 for index in indices]),
        }


def pair_of_views(random: np.random.Generator) -> np.ndarray:
    """Fields of view of two views, deg: the first uniform in the training range, the second zoomed by 2^U[-1, 1]."""
    first = float(random.uniform(*TRAIN_FOV_DEG))
    zoom = 2 ** float(random.uniform(-1, 1))
    second = 2 * math.degrees(math.atan(math.tan(math.radians(first) / 2) / zoom))
    return np.array([first, min(max(second, TRAIN_FOV_DEG[0]), TRAIN_FOV_DEG[1])])
