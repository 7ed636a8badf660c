"""MASA as its official code runs it, written anew from its description: the yardstick of speed and of results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_iou, deform_conv2d


class TaoTracker:
    """Open-world association with a dictionary of tensors for each track, and a loop over boxes."""

    def __init__(self, init: float, obj: float, match: float, frames: int = 10, momentum: float = 0.8) -> None:
        self.init, self.obj, self.match, self.frames, self.momentum = init, obj, match, frames, momentum
        self.tracks: dict[int, dict] = {}
        self.count = 0

    def update(self, boxes: Tensor, labels: Tensor, scores: Tensor, embeds: Tensor, frame: int) -> Tensor:
        """Identities of the boxes that are kept, best score first."""
        scores, order = scores.sort(descending=True)
        boxes, labels, embeds = boxes[order], labels[order], embeds[order]
        valid = torch.ones(len(boxes), dtype=torch.bool)
        overlaps = box_iou(boxes, boxes)
        for i in range(1, len(boxes)):
            if scores[i] < 0.5 and (overlaps[i, :i] > 0.3).any():
                valid[i] = False
        boxes, labels, scores, embeds = boxes[valid], labels[valid], scores[valid], embeds[valid]
        ids = torch.full((len(boxes),), -1, dtype=torch.long)
        if len(boxes) and self.tracks:
            memory_ids = torch.tensor(list(self.tracks))
            memory = torch.cat([track["embed"][None] for track in self.tracks.values()])
            products = embeds @ memory.t()
            both = (products.softmax(1) + products.softmax(0)) / 2
            cosine = functional.normalize(embeds, dim=1) @ functional.normalize(memory, dim=1).t()
            worth = (both + cosine) / 2
            for i in range(len(boxes)):
                confidence, column = worth[i].max(dim=0)
                if confidence > self.match and scores[i] > self.obj:
                    ids[i] = memory_ids[column]
                    worth[:i, column] = 0
                    worth[i + 1 :, column] = 0
        new = (ids == -1) & (scores > self.init)
        ids[new] = torch.arange(self.count, self.count + int(new.sum()))
        self.count += int(new.sum())
        kept = ids > -1
        for identity, box, embed, label in zip(ids[kept], boxes[kept], embeds[kept], labels[kept], strict=True):
            number = int(identity)
            if number in self.tracks:
                track = self.tracks[number]
                track["embed"] = (1 - self.momentum) * track["embed"] + self.momentum * embed
                track.update(box=box, label=label, frame=frame)
            else:
                self.tracks[number] = {"box": box, "embed": embed, "label": label, "frame": frame}
        for number in [n for n, track in self.tracks.items() if frame - track["frame"] >= self.frames]:
            del self.tracks[number]
        return ids[kept]


class BddTracker:
    """Association for fixed classes, with backdrops and velocities, as QDTrack."""

    def __init__(self, init: float = 0.5, obj: float = 0.3, match: float = 0.6) -> None:
        self.init, self.obj, self.match = init, obj, match
        self.tracks: dict[int, dict] = {}
        self.backdrops: list[dict] = []
        self.count = 0

    def update(self, boxes: Tensor, labels: Tensor, scores: Tensor, embeds: Tensor, frame: int) -> Tensor:
        """Identities of the boxes that have one, best score first."""
        scores, order = scores.sort(descending=True)
        boxes, labels, embeds = boxes[order], labels[order], embeds[order]
        valid = torch.ones(len(boxes), dtype=torch.bool)
        overlaps = box_iou(boxes, boxes)
        for i in range(1, len(boxes)):
            limit = 0.3 if scores[i] < self.obj else 0.7
            if (overlaps[i, :i] > limit).any():
                valid[i] = False
        boxes, labels, scores, embeds = boxes[valid], labels[valid], scores[valid], embeds[valid]
        ids = torch.full((len(boxes),), -1, dtype=torch.long)
        if len(boxes) and self.tracks:
            rows = [track["embed"][None] for track in self.tracks.values()]
            numbers = list(self.tracks)
            for backdrop in self.backdrops:
                rows.append(backdrop["embeds"])
                numbers += [-1] * len(backdrop["embeds"])
            memory, memory_ids = torch.cat(rows), torch.tensor(numbers)
            products = embeds @ memory.t()
            worth = (products.softmax(1) + products.softmax(0)) / 2
            for i in range(len(boxes)):
                confidence, column = worth[i].max(dim=0)
                number = memory_ids[column]
                if confidence > self.match and number > -1:
                    if scores[i] > self.obj:
                        ids[i] = number
                        worth[:i, column] = 0
                        worth[i + 1 :, column] = 0
                    elif confidence > 0.5:
                        ids[i] = -2
        new = (ids == -1) & (scores > self.init)
        ids[new] = torch.arange(self.count, self.count + int(new.sum()))
        self.count += int(new.sum())
        kept = ids > -1
        for identity, box, embed in zip(ids[kept], boxes[kept], embeds[kept], strict=True):
            key = int(identity)
            if key in self.tracks:
                track = self.tracks[key]
                velocity = (box - track["box"]) / (frame - track["frame"])
                track["velocity"] = (track["velocity"] * track["seen"] + velocity) / (track["seen"] + 1)
                track["embed"] = 0.2 * track["embed"] + 0.8 * embed
                track.update(box=box, frame=frame, seen=track["seen"] + 1)
            else:
                zero = torch.zeros_like(box)
                self.tracks[key] = {"box": box, "embed": embed, "frame": frame, "velocity": zero, "seen": 0}
        rest = torch.nonzero(ids == -1).squeeze(1)
        overlaps = box_iou(boxes[rest], boxes)
        for i, index in enumerate(rest.clone()):
            if (overlaps[i, :index] > 0.3).any():
                rest[i] = -1
        rest = rest[rest > -1]
        self.backdrops = [{"embeds": embeds[rest]}]
        for key in [n for n, track in self.tracks.items() if frame - track["frame"] >= 10]:
            del self.tracks[key]
        return ids[kept]


def plain_deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The convolution by torchvision's own kernel: what `modulated_deform_conv` is measured against."""
    return deform_conv2d(x, offset, weight, None, stride=stride, padding=1, mask=mask)
