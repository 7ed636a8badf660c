"""What is read off the pyramid: embeddings of boxes, and boxes of anything (the distilled detection head)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, roi_align

ROI_SIDE = 7
FINEST_SCALE = 56  # pixels: boxes of this scale and less are read from the finest level


def roi_features(levels: Sequence[Tensor], rois: Tensor, strides: Sequence[int]) -> Tensor:
    """RoIAlign of each box on the level that fits its size.

    Args:
        levels: maps from fine to coarse, B x C x H x W; as many as `strides`.
        rois: N x 5: image number, left, top, right, bottom in pixels of the network's input.
        strides: pixels of the input for a pixel of each map.

    Returns:
        N x C x 7 x 7.
    """
    scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp_min(0).sqrt()
    number = torch.log2(scale / FINEST_SCALE + 1e-6).floor().clamp(0, len(strides) - 1).long()
    if torch.compiler.is_exporting():  # a graph of fixed shapes reads every level and picks
        read = [
            roi_align(levels[level], rois, ROI_SIDE, 1 / stride, sampling_ratio=-1, aligned=True)
            for level, stride in enumerate(strides)
        ]
        features = read[0]
        for level, more in enumerate(read[1:], start=1):
            features = torch.where((number == level)[:, None, None, None], more, features)
        return features
    parts, order = [], []
    for level, stride in enumerate(strides):
        chosen = (number == level).nonzero().squeeze(1)
        order.append(chosen)
        parts.append(roi_align(levels[level], rois[chosen], ROI_SIDE, 1 / stride, sampling_ratio=-1, aligned=True))
    return torch.cat(parts)[torch.cat(order).argsort()]


class HeadConv(nn.Module):
    """3x3 convolution without bias, normalisation, ReLU.

    Args:
        inputs: input channels.
        width: output channels.
        norm: the normalisation.
    """

    def __init__(self, inputs: int, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """N x C x 7 x 7 to N x width x 7 x 7."""
        return self.norm(self.conv(x)).relu()


class EmbedHead(nn.Module):
    """Features of boxes to embeddings, which are not normalised: their length is the temperature of the softmax.

    Args:
        inputs: channels of the features.
        width: channels of the convolutions.
        convolutions: their number.
        groups: of their GroupNorm.
        hidden: width of the fully connected layer.
        embedding: length of an embedding.
    """

    def __init__(self, inputs: int, width: int, convolutions: int, groups: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            HeadConv(inputs if index == 0 else width, width, nn.GroupNorm(groups, width))
            for index in range(convolutions)
        )
        self.hidden = nn.Linear(width * ROI_SIDE**2, hidden)
        self.embed = nn.Linear(hidden, embedding)

    def forward(self, features: Tensor) -> Tensor:
        """N x C x 7 x 7 to N x E."""
        for conv in self.convs:
            features = conv(features)
        return self.embed(self.hidden(features.flatten(1)).relu())


class RpnHead(nn.Module):
    """Objectness and box shifts of three anchors (scale 8, ratios 1/2, 1, 2) at each place of each level.

    Args:
        width: channels of the pyramid.
    """

    scale = 8
    ratios = (0.5, 1.0, 2.0)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, 3, 1)
        self.shift = nn.Conv2d(width, 12, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level, logits B x 3 x H x W and shifts B x 12 x H x W."""
        hidden = [self.conv(level).relu() for level in levels]
        return [self.objectness(x) for x in hidden], [self.shift(x) for x in hidden]

    def propose(
        self, levels: Sequence[Tensor], strides: Sequence[int], size: tuple[int, int], kept: int = 1000
    ) -> Tensor:
        """The best boxes of one image after non-maximum suppression at 0.7 within each level: K x 4, best first.

        Args:
            levels: five levels, 1 x C x H x W.
            strides: of each.
            size: (height, width) of the input, to which boxes are clipped.
            kept: boxes before suppression a level, and after it in all.
        """
        logits, shifts = self(levels)
        boxes, scores, numbers = [], [], []
        for level, stride in enumerate(strides):
            score = logits[level][0].permute(1, 2, 0).flatten().sigmoid()
            shift = shifts[level][0].permute(1, 2, 0).reshape(-1, 4)
            best = score.topk(min(kept, len(score))).indices
            anchors = self._anchors(levels[level].shape[2:], stride, levels[level])[best]
            boxes.append(shift_boxes(anchors, shift[best], size))
            scores.append(score[best])
            numbers.append(torch.full_like(best, level))
        found = torch.cat(boxes)
        return found[batched_nms(found, torch.cat(scores), torch.cat(numbers), 0.7)[:kept]]

    def _anchors(self, size: torch.Size, stride: int, like: Tensor) -> Tensor:
        """(H W 3) x 4 anchors, centred on multiples of the stride, as mmdet's generator makes them."""
        root = like.new_tensor(self.ratios).sqrt()  # height over width
        side = self.scale * stride
        half = torch.stack((side / root, side * root), dim=1) / 2  # 3 x (w, h)
        y, x = torch.meshgrid(
            torch.arange(size[0], device=like.device) * stride,
            torch.arange(size[1], device=like.device) * stride,
            indexing="ij",
        )
        centre = torch.stack((x, y), dim=-1).to(like.dtype).view(-1, 1, 2)
        return torch.cat((centre - half, centre + half), dim=-1).view(-1, 4)


class RcnnHead(nn.Module):
    """Class-agnostic second stage: is the box an object, and where exactly.

    Args:
        width: channels of the features.
        convolutions: 3x3 convolutions with BatchNorm (4 with ResNet-50, else 0).
        layers: fully connected layers of 1024 (1 with convolutions, else 2).
        hidden: their width.
    """

    stds = (0.1, 0.1, 0.2, 0.2)

    def __init__(self, width: int, convolutions: int, layers: int, hidden: int = 1024) -> None:
        super().__init__()
        self.convs = nn.ModuleList(HeadConv(width, width, nn.BatchNorm2d(width)) for _ in range(convolutions))
        sizes = [width * ROI_SIDE**2, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.classify = nn.Linear(hidden, 2)
        self.shift = nn.Linear(hidden, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """N x C x 7 x 7 to logits N x 2 (object, background) and shifts N x 4."""
        for conv in self.convs:
            features = conv(features)
        x = features.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.classify(x), self.shift(x)

    def detect(
        self, features: Tensor, rois: Tensor, size: tuple[int, int], score: float = 0.02, overlap: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """Refined boxes (K x 4) and scores of one image: above `score`, suppressed at `overlap`, best 50."""
        logits, shifts = self(features)
        scores = logits.softmax(1)[:, 0]
        boxes = shift_boxes(rois, shifts * shifts.new_tensor(self.stds), size)
        keep = scores > score
        boxes, scores = boxes[keep], scores[keep]
        best = batched_nms(boxes, scores, torch.zeros_like(scores), overlap)[:50]
        return boxes[best], scores[best]


def shift_boxes(boxes: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply (dx, dy, log dw, log dh) to N x 4 boxes and clip them to (height, width), as R-CNN does."""
    limit = abs(math.log(16 / 1000))
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + sides * shifts[:, :2]
    half = sides * shifts[:, 2:].clamp(-limit, limit).exp() / 2
    moved = torch.cat((centre - half, centre + half), dim=1)
    bound = moved.new_tensor([size[1], size[0], size[1], size[0]])
    return moved.clamp_min(0).minimum(bound)


class ColourBranch(nn.Module):
    """Soft colour bins of the picture itself, for the small network: what a histogram sees, and where.

    A softmax over a linear map of the colour is a soft assignment to prototypes, which is how it begins: logit k is
    (c_k x - |c_k|^2 / 2) / s^2. Pooled over a box, the bins are its colour histogram.

    Args:
        bins: number of prototypes.
        stride: of the result. Two by two pixels are averaged before they are assigned, for speed.
    """

    spread = 0.25  # s, in units of the normalised picture

    def __init__(self, bins: int, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        self.assign = nn.Conv2d(3, bins, 1)
        self.start_from(torch.randn(bins, 3))

    @torch.no_grad()
    def start_from(self, prototypes: Tensor) -> None:
        """Begin with these colours: bins x 3, normalised."""
        assert self.assign.bias is not None
        self.assign.weight.copy_((prototypes / self.spread**2)[:, :, None, None])
        self.assign.bias.copy_(-(prototypes**2).sum(1) / 2 / self.spread**2)

    def forward(self, image: Tensor) -> Tensor:
        """B x 3 x H x W, normalised, to B x bins x H/4 x W/4."""
        return functional.avg_pool2d(self.assign(functional.avg_pool2d(image, 2)).softmax(1), self.stride // 2)


class StripeHistogram(nn.Module):
    """Colours of a box in four stripes from top to bottom, as a part of its embedding.

    It begins as a comparison of histograms: roots of shares, whose product is the Bhattacharyya coefficient, under a
    random orthogonal map, with more weight on the middle of the box than on its sides, where the background is.

    Args:
        bins: colours.
        embedding: length of an embedding.
    """

    stripes = 4
    gain = 4.0  # the squared length of an embedding is about stripes x gain^2, which the softmax takes for certain

    def __init__(self, bins: int, embedding: int) -> None:
        super().__init__()
        cells = torch.arange(ROI_SIDE) - (ROI_SIDE - 1) / 2
        centres = (torch.arange(self.stripes) + 0.5) * ROI_SIDE / self.stripes - ROI_SIDE / 2
        down = -((cells - centres[:, None]) ** 2) / 2  # stripes x 7
        across = -((cells / 2) ** 2) / 2  # 7
        self.window = nn.Parameter((down[:, :, None] + across).flatten(1))  # stripes x 49 logits
        self.project = nn.Linear(self.stripes * bins, embedding)
        nn.init.orthogonal_(self.project.weight, gain=self.gain)
        nn.init.zeros_(self.project.bias)

    def forward(self, bins: Tensor) -> Tensor:
        """N x K x 7 x 7 shares to N x E."""
        stripes = bins.flatten(2) @ self.window.softmax(1).t()  # N x K x stripes
        return self.project(stripes.transpose(1, 2).flatten(1).clamp_min(1e-6).sqrt())
