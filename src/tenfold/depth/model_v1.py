"""UniDepthV1 (Piccinelli et al., CVPR 2024; arXiv 2403.18913): the whole network.

It follows the released code where that differs from the paper: maxima over the layers of a group instead of means, a
principal point by a sigmoid, the mean of three depths instead of the mean of their logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.depth.blocks import (
    AttentionBlock,
    FeedForward,
    interpolate,
    interpolate_rays,
    sine_positions,
    spherical_harmonics,
    to_image,
    to_tokens,
)
from tenfold.depth.cameras import intrinsics_of, pinhole_rays
from tenfold.depth.config import UniDepthV1Config, ViTConfig
from tenfold.depth.encoders import ConvNeXt, ConvNeXtBlock, ViT

HARMONICS = 81  # spherical harmonics to degree 8
LOG_BOUND = 10.0


@dataclass(frozen=True)
class PredictionV1:
    """What a network says of an image, at the size of the network's image.

    Attributes:
        depth: B x 1 x H x W, metres along z.
        scales: depth at strides 8, 4 and 2 of the encoder's grid, of which `depth` is the mean.
        rays: B x 3 x H x W, unit: those that the decoder was told.
        intrinsics: B x 3 x 3, of the predicted pinhole camera.
        features: B x C x h x w, the map that the camera has conditioned.
    """

    depth: Tensor
    scales: tuple[Tensor, Tensor, Tensor]
    rays: Tensor
    intrinsics: Tensor
    features: Tensor


class UniDepthV1(nn.Module):
    """The network."""

    def __init__(self, config: UniDepthV1Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.encoder: ViT | ConvNeXt
        if isinstance(config.encoder, ViTConfig):
            self.encoder = ViT(config.encoder, "scale")
            widths, token_widths = [config.encoder.dim] * 4, [config.encoder.dim] * 4
        else:
            self.encoder = ConvNeXt(config.encoder)
            of_block = [
                dim for dim, depth in zip(config.encoder.dims, config.encoder.depths, strict=True) for _ in range(depth)
            ]
            widths, token_widths = [of_block[end - 1] for end in config.encoder.ends], of_block[:-5:-1]
        self.adapters = nn.ModuleList(_adapter(width, hidden) for width in widths)
        self.token_adapters = nn.ModuleList(_adapter(width, hidden) for width in token_widths)
        self.level_embeds = nn.Parameter(torch.randn(4, hidden) * 0.02)
        self.level_embed = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        )
        self.camera = CameraHead(config)
        self.depth = DepthHead(config)

    def forward(self, image: Tensor, rays: Tensor | None = None) -> PredictionV1:
        """Predict.

        Args:
            image: B x 3 x H x W, normalised and padded to the network's shape.
            rays: B x 3 x H x W unit rays of the true camera; None prompts with the predicted one.
        """
        height, width = image.shape[-2:]
        maps, tokens = self.encode(image)
        height_16, width_16 = sorted(each.shape[-2:] for each in maps)[1]
        grid = (height_16, width_16)
        levels = [
            adapter(to_tokens(interpolate(each, grid))) for adapter, each in zip(self.adapters, maps, strict=True)
        ]
        tokens = [adapter(token) for adapter, token in zip(self.token_adapters, tokens, strict=True)]
        positions = sine_positions(*grid, self.config.hidden, image.device).flatten(1).T[None]
        by_level = self.level_embed(self.level_embeds)
        positions = torch.cat([positions + level for level in by_level], dim=1)
        intrinsics = self.camera(torch.cat(levels, dim=1) + positions, torch.cat(tokens, dim=1).detach(), height, width)
        if rays is None:
            rays = pinhole_rays(intrinsics, height, width)
        scales, features = self.depth(levels, positions, rays.detach(), grid)
        depth = torch.stack([interpolate(scale, (height, width)) for scale in scales]).mean(0)
        return PredictionV1(depth, scales, rays, intrinsics, features)

    def encode(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Four maps B x D x h x w, shallow to deep, and four tokens B x 1 x D of the last blocks, deep to shallow."""
        outputs = self.encoder(image)
        if isinstance(self.encoder, ViT):
            height, width = (side // self.encoder.patches.kernel_size[0] for side in image.shape[-2:])
            tokens = [output[:, :1] for output in outputs]
            outputs = [to_image(output[:, 1:] + output[:, :1], height, width) for output in outputs]
        else:
            tokens = [output.mean(dim=(2, 3))[:, None] for output in outputs]
        ends = self.config.encoder.ends
        starts = (0, *ends[:-1])
        maps = [torch.stack(outputs[start:end]).amax(0) for start, end in zip(starts, ends, strict=True)]
        return maps, tokens[:-5:-1]


def _adapter(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(before), nn.Linear(before, after), nn.GELU())


class CameraHead(nn.Module):
    """Features of four levels and four tokens -> a pinhole camera."""

    def __init__(self, config: UniDepthV1Config) -> None:
        super().__init__()
        hidden = config.hidden
        self.positions = nn.Parameter(torch.randn(1, 4, hidden) * 0.02)
        self.features = FeedForward(hidden, 2)
        self.tokens = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, hidden)
        )
        self.gather = AttentionBlock(hidden, 1, config.expansion, gain=True, bias=True)
        self.blocks = nn.ModuleList(
            AttentionBlock(hidden, config.heads, config.expansion, gain=True, bias=True) for _ in range(2)
        )
        self.out = FeedForward(hidden, 2, 1)

    def forward(self, features: Tensor, tokens: Tensor, height: int, width: int) -> Tensor:
        """B x M x hidden, B x 4 x hidden and the image's size -> intrinsics B x 3 x 3."""
        tokens = self.tokens(tokens)
        context = torch.cat([self.features(features), tokens], dim=1)
        x = self.gather(tokens, context=context, position=self.positions)
        for block in self.blocks:
            x = block(x, position=self.positions)
        raw = self.out(x)[..., 0]
        focal = raw[:, :2].exp() * max(height, width) / 2
        centre = raw[:, 2:].sigmoid() * raw.new_tensor([float(width), float(height)])
        return intrinsics_of(torch.cat([focal, centre], dim=1))


class DepthHead(nn.Module):
    """Features of four levels, told the rays, -> depth at three scales."""

    def __init__(self, config: UniDepthV1Config) -> None:
        super().__init__()
        hidden, heads, expansion = config.hidden, config.heads, config.expansion
        widths = [hidden, hidden // 2, hidden // 4]
        self.project_rays = nn.ModuleList(FeedForward(HARMONICS, expansion, width) for width in widths)
        self.merge = nn.Linear(4 * hidden, hidden)
        self.to_latents = FeedForward(hidden, 2)
        self.gather = AttentionBlock(hidden, 1, expansion, gain=True, bias=True)
        self.prompt = AttentionBlock(hidden, 1, expansion, gain=True, bias=True)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                AttentionBlock(width, heads // 2**step, expansion, gain=True, bias=True, within_pixel=step > 0)
                for _ in range(count)
            )
            for step, (width, count) in enumerate(zip(widths, config.blocks, strict=True))
        )
        self.ups = nn.ModuleList(UpStage(width, expansion) for width in widths)
        self.outs = nn.ModuleList(nn.Conv2d(width // 2, 1, 3, padding=1) for width in widths)

    def forward(
        self, levels: list[Tensor], positions: Tensor, rays: Tensor, grid: tuple[int, int]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Depth at two, four and eight times the grid, each B x 1 x h x w, and the conditioned map B x C x h x w."""
        height, width = grid
        latents = self.to_latents(self.merge(torch.cat(levels, dim=-1)))
        latents = self.gather(latents, context=torch.cat(levels, dim=1), context_position=positions)
        scales, features = [], latents
        for step, project in enumerate(self.project_rays):
            at_step = interpolate_rays(rays, (height << step, width << step))
            told = project(spherical_harmonics(to_tokens(at_step)))
            if step == 0:
                latents = self.prompt(latents, context=told)
            blocks = self.blocks[step]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                latents = block(latents, position=told)
            if step == 0:
                features = latents
            up = self.ups[step](to_image(latents + told, height << step, width << step))
            scales.append(self.outs[step](up).clamp(-LOG_BOUND, LOG_BOUND).exp())
            latents = to_tokens(up)
        return (scales[0], scales[1], scales[2]), to_image(features, height, width)


class UpStage(nn.Module):
    """Two ConvNeXt blocks, then half the channels at twice the size."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, 1e-5, expansion) for _ in range(2))
        self.project = nn.Conv2d(dim, dim // 2, 1)
        self.smooth = nn.Conv2d(dim // 2, dim // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x C / 2 x 2H x 2W."""
        for block in self.blocks:
            x = block(x)
        return self.smooth(F.interpolate(self.project(x), scale_factor=2, mode="bilinear", align_corners=True))
