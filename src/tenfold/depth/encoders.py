"""The two image encoders: DINOv2's vision transformer and ConvNeXt. Both give every block's output."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.depth.config import PATCH, ConvNeXtConfig, ViTConfig

BLOCK_EPS = 1e-6  # of the norms in blocks; other norms have PyTorch's 1e-5


class Block(nn.Module):
    """A pre-norm transformer block with a gain per channel on both branches."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.gain1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.expand = nn.Linear(dim, 4 * dim)
        self.reduce = nn.Linear(4 * dim, dim)
        self.gain2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """B x N x dim -> the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.gain1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.gain2 * self.reduce(F.gelu(self.expand(self.norm2(x))))


class ViT(nn.Module):
    """DINOv2's transformer with patches of 14 pixels.

    Args:
        config: sizes.
        position_by: how the stored position embedding is resized. `size` names the wanted size. `scale` passes
            (wanted + 0.1) / stored as the factor, from which PyTorch then samples: other places, as in V1.
    """

    def __init__(self, config: ViTConfig, position_by: Literal["size", "scale"] = "size") -> None:
        super().__init__()
        self.config, self.position_by = config, position_by
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + config.grid**2, config.dim) * 0.02)
        # Stored in the checkpoints, used by neither version.
        self.register_tokens = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))
        self.patches = nn.Conv2d(3, config.dim, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Every block's output, without the final norm.

        Args:
            image: B x 3 x H x W, normalised; H and W multiples of 14.

        Returns:
            depth tensors, B x (1 + hw) x dim, class token first.
        """
        patches = self.patches(image)
        tokens = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        x = x + self.positions(patches.shape[2], patches.shape[3])
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding for so many patches: 1 x (1 + hw) x dim, resized in float32."""
        side = self.config.grid
        if isinstance(height, int) and height == width == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.position_by == "scale":
            factor = ((height + 0.1) / side, (width + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
        else:
            grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        resized = grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], resized], dim=1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of B x C x H x W."""

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, two linear layers, gain; residual. Maps are channels-last in memory."""

    def __init__(self, dim: int, eps: float, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.expand = nn.Linear(dim, expansion * dim)
        self.reduce = nn.Linear(expansion * dim, dim)
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> the same."""
        moved = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        moved = self.gain * self.reduce(F.gelu(self.expand(moved)))
        return x + moved.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A stage of ConvNeXt: all but the first halve the map first, dropping an odd last row or column."""

    downsample: nn.Sequential | None
    blocks: nn.ModuleList

    def __init__(self, before: int | None, dim: int, depth: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Sequential(ChannelNorm(before, eps=BLOCK_EPS), nn.Conv2d(before, dim, 2, 2)) if before else None
        )
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, BLOCK_EPS) for _ in range(depth))


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al., CVPR 2022), without its head."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_token = nn.Parameter(torch.zeros(1, config.dims[0], 1, 1))  # stored, not used
        self.stem = nn.Sequential(nn.Conv2d(3, config.dims[0], 4, 4), ChannelNorm(config.dims[0], eps=BLOCK_EPS))
        widths = (None, *config.dims[:-1])
        self.stages = nn.ModuleList(
            Stage(before, dim, depth) for before, dim, depth in zip(widths, config.dims, config.depths, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """Every block's output: B x C x h x w with growing C and shrinking h, w."""
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        outputs = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = x if stage.downsample is None else stage.downsample(x)
            for block in stage.blocks:
                x = block(x)
                outputs.append(x)
        return outputs
