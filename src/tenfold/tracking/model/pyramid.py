"""Feature pyramids: the FPN with BatchNorm over maps of several strides, and SimpleFPN over one ViT's maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

LEVELS = 5


class ConvNorm(nn.Module):
    """A convolution and, where asked for, BatchNorm; a bias only without it.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel.
        norm: with BatchNorm.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to B x C' x H x W."""
        return self.norm(self.conv(x))


class TopDown(nn.Module):
    """Lateral 1x1 convolutions, nearest-neighbour upsampling and addition, 3x3 convolutions, coarser extra levels.

    Source: Lin et al., Feature Pyramid Networks (CVPR 2017), without activations, as in mmdet.

    Args:
        in_channels: channels of each map, fine to coarse.
        width: channels of the pyramid.
        norm: with BatchNorm behind each convolution.
    """

    def __init__(self, in_channels: Sequence[int], width: int, norm: bool) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvNorm(channels, width, 1, norm) for channels in in_channels)
        self.output = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse to five levels of `width` channels."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(levels) - 1, 0, -1):
            finer = levels[level - 1]
            levels[level - 1] = finer + functional.interpolate(levels[level], size=finer.shape[2:], mode="nearest")
        levels = [output(x) for output, x in zip(self.output, levels, strict=True)]
        while len(levels) < LEVELS:
            levels.append(functional.max_pool2d(levels[-1], 1, stride=2))
        return levels


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map, eps 1e-6.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """Four maps of one stride (16) become strides 4, 8, 16, 32, then the top-down path without normalisation.

    Source: the release's SimpleFPN, after Li et al., ViTDet (ECCV 2022).

    Args:
        channels: of the ViT's maps.
        width: channels of the pyramid.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            ChannelNorm(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.top_down = TopDown([channels] * 4, width, norm=False)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps B x C x H x W, shallow to deep, to five levels of `width` channels."""
        first, second, third, fourth = maps
        return self.top_down([self.up4(first), self.up2(second), third, functional.max_pool2d(fourth, 2)])
