"""MASA put together: backbone, adapter (pyramid and fusion), track head, and the head that proposes boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tenfold.tracking.config import MasaConfig
from tenfold.tracking.model.backbones import ResNet50, SmallResNet
from tenfold.tracking.model.fusion import Fusion
from tenfold.tracking.model.heads import ColourBranch, EmbedHead, RcnnHead, RpnHead, StripeHistogram, roi_features
from tenfold.tracking.model.pyramid import LEVELS, SimplePyramid, TopDown

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
COLOUR_STRIDE = 4


class Masa(nn.Module):
    """The appearance network.

    `features` is the heavy part, once a frame; `embed` the cheap one, for any boxes.

    Args:
        config: the architecture. Foundation backbones (`swin-b`, `sam`) are run outside: `features` then takes their
            maps in place of the picture.
    """

    def __init__(self, config: MasaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: nn.Module | None = None
        if config.backbone == "resnet50":
            self.backbone = ResNet50()
        elif config.backbone == "tiny":
            self.backbone = SmallResNet(config.backbone_width, config.in_channels)
        self.pyramid: nn.Module = (
            TopDown(config.in_channels, config.width, norm=True)
            if config.pyramid == "fpn"
            else SimplePyramid(config.in_channels[0], config.width)
        )
        self.fusion = Fusion(config.width, config.fusion_blocks, config.fusion_groups, config.fusion == "dyhead")
        self.colour = ColourBranch(config.colours, COLOUR_STRIDE) if config.colours else None
        # The small network's boxes are also read from its finest map and its colours, at stride 4.
        extra = config.colours + config.backbone_width if config.colours else 0
        self.track_head = EmbedHead(
            config.width + extra,
            config.width,
            config.head_convolutions,
            config.head_groups,
            config.head_hidden,
            config.embedding,
        )
        self.histogram = StripeHistogram(config.colours, config.embedding) if config.colours else None
        if self.histogram is not None:
            # Begin as the histogram alone; the rest is learned as what is to be added to it.
            nn.init.zeros_(self.track_head.embed.weight)
            nn.init.zeros_(self.track_head.embed.bias)
        self.rpn = RpnHead(config.width) if config.rcnn_layers else None
        self.rcnn = RcnnHead(config.width, config.rcnn_convolutions, config.rcnn_layers) if config.rcnn_layers else None

    def features(self, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The fused pyramid.

        Args:
            inputs: B x 3 x H x W, RGB less `MEAN` over `STD`, sides multiples of 32; or the maps of a foundation
                backbone, fine to coarse (SAM: shallow to deep).

        Returns:
            Five levels B x width x H/s x W/s; the small network adds its stride-4 map as the last.
        """
        if isinstance(inputs, Tensor):
            if self.backbone is None:
                raise ValueError("this network has no backbone of its own: give it the maps of its foundation model")
            maps = self.backbone(inputs)
        else:
            maps = list(inputs)
        if self.colour is None:
            return self.fusion(self.pyramid(maps))
        assert isinstance(inputs, Tensor)
        fine, *coarser = maps
        return [*self.fusion(self.pyramid(coarser)), torch.cat((fine, self.colour(inputs)), dim=1)]

    def embed(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Embeddings of boxes.

        Args:
            features: what `features` returned.
            rois: N x 5: image number, left, top, right, bottom in pixels of the network's input.

        Returns:
            N x E.
        """
        strides = self.config.strides
        found = roi_features(features[: len(strides)], rois, strides)
        if self.histogram is None:
            return self.track_head(found)
        fine = roi_features(features[-1:], rois, (COLOUR_STRIDE,))
        bins = fine[:, -self.config.colours :]  # N x K x 7 x 7
        return self.track_head(torch.cat((found, fine), dim=1)) + self.histogram(bins)

    def propose(self, features: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes of anything in the first image, by the distilled head: K x 4 and K scores, at most 50.

        Args:
            features: what `features` returned.
            size: (height, width) of the picture within the network's input.
        """
        if self.rpn is None or self.rcnn is None:
            raise ValueError("this network has no head that proposes boxes")
        strides = self.config.strides
        all_strides = [strides[0] * 2**level for level in range(LEVELS)]
        boxes = self.rpn.propose([level[:1] for level in features[:LEVELS]], all_strides, size)
        rois = torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)
        return self.rcnn.detect(roi_features(features[: len(strides)], rois, strides), boxes, size)

    def forward(self, image: Tensor, rois: Tensor) -> Tensor:
        """`features` and `embed` in one: B x 3 x H x W and N x 5 to N x E."""
        return self.embed(self.features(image), rois)
