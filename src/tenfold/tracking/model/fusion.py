"""Dynamic fusion of pyramid levels: DeformFusion, and the DyHead of the SAM variants (Dai et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.tracking.model.deform import TAPS, coarse_view, modulated_deform_conv


class DeformBranch(nn.Module):
    """A modulated deformable 3x3 convolution and GroupNorm.

    Args:
        width: channels.
        groups: of the GroupNorm.
        stride: 2 where the finer level is taken.
    """

    def __init__(self, width: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.norm = nn.GroupNorm(groups, width)
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """B x C x H x W; offsets and masks as `modulated_deform_conv`."""
        return self.norm(modulated_deform_conv(x, offset, mask, self.weight, self.stride))


class TaskAttention(nn.Module):
    """DyReLU: a piecewise linear activation whose slopes depend on the whole map (DyHead, section 3.2).

    Args:
        width: channels; a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.expand = nn.Conv2d(width // 4, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to the same."""
        slopes = functional.hardsigmoid(self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu())) - 0.5
        slope1, shift1, slope2, shift2 = slopes.chunk(4, dim=1)
        return torch.maximum(x * (2 * slope1 + 1) + shift1, x * (2 * slope2) + shift2)


class FusionBlock(nn.Module):
    """One block over all levels. Each level takes from itself, the finer and the coarser one; one set of weights.

    Args:
        width: channels.
        groups: of the GroupNorms.
        attention: DyHead: one set of offsets for all three, scale and task attention. Else three sets of offsets.
    """

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.sets = 1 if attention else 3
        self.offset = nn.Conv2d(width, 3 * TAPS * self.sets, 3, padding=1)
        self.high = DeformBranch(width, groups)
        self.mid = DeformBranch(width, groups)
        self.low = DeformBranch(width, groups, stride=2)
        self.scale_attention = nn.Conv2d(width, 1, 1) if attention else None
        self.task_attention = TaskAttention(width) if attention else None
        nn.init.normal_(self.offset.weight, 0, 0.01)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels from fine to coarse, each B x C x H x W, to the same."""
        return [self._level(levels, level) for level in range(len(levels))]

    def _level(self, levels: Sequence[Tensor], level: int) -> Tensor:
        x = levels[level]
        fields = self.offset(x)
        offsets = fields[:, : 2 * TAPS * self.sets].chunk(self.sets, dim=1)
        masks = fields[:, 2 * TAPS * self.sets :].sigmoid().chunk(self.sets, dim=1)
        mid, low, high = ((offsets[s], masks[s]) for s in ((0, 1, 2) if self.sets == 3 else (0, 0, 0)))
        total, terms = self._scaled(self.mid(x, *mid)), 1
        if level > 0:
            total, terms = total + self._scaled(self.low(levels[level - 1], *low)), terms + 1
        if level < len(levels) - 1:
            coarse = levels[level + 1]
            offset, mask = (coarse_view(field, coarse.shape[2:]) for field in high)
            up = functional.interpolate(
                self.high(coarse, offset, mask), size=x.shape[2:], mode="bilinear", align_corners=True
            )
            total, terms = total + self._scaled(up), terms + 1
        fused = total / terms
        return fused if self.task_attention is None else self.task_attention(fused)

    def _scaled(self, branch: Tensor) -> Tensor:
        if self.scale_attention is None:
            return branch
        return branch * functional.hardsigmoid(self.scale_attention(branch.mean((2, 3), keepdim=True)).relu())


class Fusion(nn.Module):
    """A stack of fusion blocks.

    Args:
        width: channels.
        blocks: number of blocks.
        groups: of the GroupNorms.
        attention: DyHead (True) or DeformFusion.
    """

    def __init__(self, width: int, blocks: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(width, groups, attention) for _ in range(blocks))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels from fine to coarse, each B x C x H x W, to the same."""
        found = list(levels)
        for block in self.blocks:
            found = block(found)
        return found
