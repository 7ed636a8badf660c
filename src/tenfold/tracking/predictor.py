"""The user-level object: frames and boxes in, identities out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from tenfold.core import devices
from tenfold.core.config import near
from tenfold.core.console import UserError
from tenfold.core.foundation import Detector, require_rgb, supervision
from tenfold.tracking import checkpoint
from tenfold.tracking.association import Associator
from tenfold.tracking.boxes import usable
from tenfold.tracking.config import MATCHERS, MatcherConfig
from tenfold.tracking.detection import Detect, load_detector, tidy
from tenfold.tracking.foundation_backbones import open_backbone
from tenfold.tracking.model import Masa
from tenfold.tracking.model.masa import MEAN, STD

if TYPE_CHECKING:
    from supervision import Detections

PROPOSALS: Literal["proposals"] = "proposals"
SAM_SIDE, STRIDE = 1024, 32
# Boxes that are embedded at a time: a bound on memory, whatever a detector comes up with.
_BOXES_AT_ONCE = 512


class Embedder:
    """The appearance network on a device: frames and boxes to embeddings.

    Args:
        loaded: the network and what came with it.
        device: where it is to run.
    """

    def __init__(self, loaded: checkpoint.Loaded, device: torch.device) -> None:
        self.model: Masa = loaded.model.to(device)
        self.origin = loaded.origin
        self.device = device
        self._backbone = open_backbone(self.model.config, loaded.foundation, device)

    @property
    def length(self) -> int:
        """Length of an embedding."""
        return self.model.config.embedding

    @torch.inference_mode()
    def features(self, frame: np.ndarray) -> tuple[list[Tensor], float]:
        """The heavy part, once a frame: feature maps, and the factor from the frame's pixels to the network's.

        Args:
            frame: H x W x 3 uint8, RGB.
        """
        config = self.model.config
        height, width = frame.shape[:2]
        scale = min(config.long_side / max(height, width), config.short_side / min(height, width))
        if config.backbone == "tiny":
            scale = min(scale, 1.0)  # enlarging adds nothing for it but time
        size = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
        resized = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) if size != (width, height) else frame
        side = SAM_SIDE if config.backbone == "sam" else STRIDE
        padded = np.zeros((-(-size[1] // side) * side, -(-size[0] // side) * side, 3), np.float32)
        np.subtract(resized, np.array(MEAN, np.float32), out=padded[: size[1], : size[0]])
        padded[: size[1], : size[0]] /= np.array(STD, np.float32)
        image = torch.from_numpy(padded).permute(2, 0, 1)[None].to(self.device)
        if self.device.type == "cpu":
            image = image.contiguous(memory_format=torch.channels_last)  # how convolutions run fastest there
        return self.model.features(image if self._backbone is None else self._backbone(image)), size[0] / width

    @torch.inference_mode()
    def propose(self, features: tuple[list[Tensor], float], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of anything (K x 4, the frame's pixels) and scores, of a frame of (width, height) `size`."""
        maps, scale = features
        boxes, scores = self.model.propose(maps, (round(size[1] * scale), round(size[0] * scale)))
        return (boxes / scale).float().cpu().numpy(), scores.float().cpu().numpy()

    @torch.inference_mode()
    def embed(self, features: tuple[list[Tensor], float], boxes_xyxy: np.ndarray) -> np.ndarray:
        """The cheap part: embeddings of boxes (N x 4, the frame's pixels) as N x E float32."""
        maps, scale = features
        boxes = torch.from_numpy(np.asarray(boxes_xyxy, np.float32) * scale).to(self.device)
        rois = torch.cat((boxes.new_zeros(len(boxes), 1), boxes), dim=1)
        parts = [self.model.embed(maps, part) for part in rois.split(_BOXES_AT_ONCE)]
        return torch.cat(parts).float().cpu().numpy()


class Tracker:
    """Track whatever a detector sees.

    Args:
        embedder: the appearance network.
        matcher: the rules of association.
        detector: makes the boxes of a frame for which none are given; `proposals` is the network's own head.

    Raises:
        UserError: `proposals` from a network without that head.

    Example:
        >>> tracker = Tracker.from_pretrained("masa-tiny")  # doctest: +SKIP
        >>> for frame in video:  # doctest: +SKIP
        ...     detections = tracker.update(frame, detector(frame))
        ...     print(detections.tracker_id)
    """

    def __init__(
        self, embedder: Embedder, matcher: MatcherConfig, detector: Detect | Literal["proposals"] | None = None
    ) -> None:
        if detector == PROPOSALS and embedder.model.rcnn is None:
            raise UserError(
                f"{embedder.origin} has no head that proposes boxes: use a detector or segments, or an official file"
            )
        self.embedder = embedder
        self.detector = detector
        self._associator = Associator(matcher)
        self._size: tuple[int, int] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "masa-tiny",
        detector: str | Detector | Detect | None = None,
        matcher: str | MatcherConfig = "video",
        device: str = "auto",
    ) -> Tracker:
        """Load a network: embedded (`masa-tiny`), official (`masa-r50`), hub id, or a .safetensors / .pth file.

        Args:
            name_or_path: the network.
            detector: see `detection.load_detector`; `proposals`: the network's own head for anything; None: boxes are
                given with each frame.
            matcher: `video`, `tao`, `bdd`, `demo`, or rules of your own.
            device: where to compute.

        Raises:
            UserError: an unknown name, a file that is no MASA checkpoint, a device that is not there.
        """
        supervision()
        place = devices.resolve_device(device)
        loaded = checkpoint.load(str(name_or_path), proposals=detector == PROPOSALS)
        detect: Any = detector
        if detector is not None and detector != PROPOSALS:
            detect = load_detector(detector, device=device)
        return cls(Embedder(loaded, place), find_matcher(matcher), detect)

    def reset(self) -> None:
        """Forget all tracks, before another video."""
        self._associator.reset()
        self._size = None

    def update(self, frame: np.ndarray, detections: Detections | None = None) -> Detections:
        """Take the next frame.

        Args:
            frame: H x W x 3 uint8, RGB.
            detections: `supervision.Detections` of this frame; None asks the detector. Without confidences all count as
                1, without classes as one class. Boxes that are not finite, empty or outside of the frame are left out.

        Returns:
            Those detections that belong to a track, in the order given, with `tracker_id` (from 0) and all that came
            with them: masks, classes, data. An embedding under `data["embedding"]` is used in place of our own.

        Raises:
            UserError: the frame is no RGB picture, its size is not that of the frames before, or nothing makes boxes.
        """
        require_rgb(frame)
        size = frame.shape[1], frame.shape[0]
        if self._size is not None and size != self._size:
            raise UserError(
                f"the frame size changed from {self._size[0]}x{self._size[1]} to {size[0]}x{size[1]}: tracks do not go "
                "over; call reset() first, or split the video there"
            )
        self._size = size
        features = None
        if detections is None:
            if self.detector is None:
                raise UserError("no detections and no detector: give one of both")
            if self.detector == PROPOSALS:
                features = self.embedder.features(frame)
                boxes, confidence = self.embedder.propose(features, size)
                detections = supervision().Detections(
                    xyxy=boxes, confidence=confidence, class_id=np.zeros(len(boxes), int)
                )
            else:
                detections = self.detector(frame)
        chosen: Any = detections[tidy(detections, size)]
        count = len(chosen)
        scores = np.ones(count, np.float32) if chosen.confidence is None else chosen.confidence
        labels = np.zeros(count, np.int64) if chosen.class_id is None else chosen.class_id
        embeds = self._embeddings(frame, chosen, features)
        found = self._associator.update(chosen.xyxy, scores, labels, embeds)
        order = np.argsort(found.kept)
        tracked = chosen[found.kept[order]]
        tracked.tracker_id = found.ids[order].astype(int)
        return tracked

    def _embeddings(self, frame: np.ndarray, chosen: Any, features: tuple[list[Tensor], float] | None) -> np.ndarray:
        if not len(chosen):
            return np.zeros((0, self.embedder.length), np.float32)
        given = chosen.data.get("embedding")
        if given is not None:
            given = np.asarray(given, np.float32)
            if given.ndim != 2 or not np.isfinite(given).all():
                raise UserError(f"the given embeddings should be finite numbers, N x E, found shape {given.shape}")
            return given
        return self.embedder.embed(features or self.embedder.features(frame), chosen.xyxy)

    def embed(self, frame: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Embeddings of boxes.

        Args:
            frame: H x W x 3 uint8, RGB.
            boxes_xyxy: N x 4, pixels.

        Returns:
            N x E float32; not normalised.

        Raises:
            UserError: the frame is no RGB picture, or a box is not finite, empty or outside of the frame.
        """
        require_rgb(frame)
        boxes = np.asarray(boxes_xyxy, np.float32)
        if boxes.size == 0:
            return np.zeros((0, self.embedder.length), np.float32)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise UserError(f"boxes should be N x 4, found shape {boxes.shape}")
        good = usable(boxes, (frame.shape[1], frame.shape[0]))
        if not good.all():
            number = int(np.argmin(good))
            edges = ", ".join(f"{edge:g}" for edge in boxes[number])
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            raise UserError(f"box {number} ({edges}) is not finite, empty or outside of the frame of {size}")
        return self.embedder.embed(self.embedder.features(frame), boxes)


def find_matcher(matcher: str | MatcherConfig) -> MatcherConfig:
    """Rules by name, or as they are given.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(matcher, MatcherConfig):
        return matcher
    if matcher not in MATCHERS:
        raise UserError(f"unknown matcher {matcher!r}: {near(matcher, list(MATCHERS))}")
    return MATCHERS[matcher]
