"""Masks and detections from models that others trained: one data type each, three narrow interfaces, loading by name.

    detector = load_detector("rt-detr")
    detections = detector.detect(image)                     # Detections
    masks = load_segmenter("sam2").segment(image, detections.boxes_xyxy)

The models come through `transformers` (the extra `foundation`) from a folder or the Hub. What needs no download is a
classical stand-in, and says so by `is_stand_in`. Boxes are in pixels, x to the right and y down, with pixel edges at
whole numbers: the box of one pixel in the corner is (0, 0, 1, 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tenfold.core import hub
from tenfold.core.console import UserError

# Short names for models that fit a small machine, Apache-2.0 by their model cards. Any folder or Hub id works too.
DETECTORS: Mapping[str, str] = {
    "rt-detr": "PekingU/rtdetr_r50vd",
    "d-fine": "ustc-community/dfine-small-coco",
    "yolos": "hustvl/yolos-tiny",
    "grounding-dino": "IDEA-Research/grounding-dino-tiny",
    "owlv2": "google/owlv2-base-patch16-ensemble",
}
SEGMENTERS: Mapping[str, str] = {
    "sam": "facebook/sam-vit-base",
    "sam2": "facebook/sam2.1-hiera-tiny",
}


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes in one image, best first.

    Attributes:
        boxes_xyxy: N x 4 float32, left, top, right, bottom in pixels.
        scores: N float32 in [0, 1].
        labels: N int64, indices into `class_names`.
        class_names: what the labels mean.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, np.float32).reshape(-1, 4)
        object.__setattr__(self, "boxes_xyxy", boxes)
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float32).reshape(-1))
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int64).reshape(-1))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if not len(boxes) == len(self.scores) == len(self.labels):
            raise ValueError(
                f"{len(boxes)} boxes, {len(self.scores)} scores and {len(self.labels)} labels do not match"
            )

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    @property
    def names(self) -> list[str]:
        """The class name of each box."""
        return [self.class_names[label] for label in self.labels]

    def select(self, which: np.ndarray) -> Detections:
        """The boxes that a boolean mask or an index array picks, in its order."""
        return Detections(self.boxes_xyxy[which], self.scores[which], self.labels[which], self.class_names)

    def to_supervision(self) -> Any:
        """The same as `supervision.Detections` (the package is needed), class names under `data["class_name"]`."""
        data = {"class_name": np.array(self.names, dtype=str)} if self.class_names else {}
        return supervision().Detections(
            xyxy=self.boxes_xyxy.copy(), confidence=self.scores.copy(), class_id=self.labels.copy(), data=data
        )

    @staticmethod
    def from_supervision(detections: Any) -> Detections:
        """Take over a `supervision.Detections`; what it does not know becomes score 1 and label 0."""
        count = len(detections.xyxy)
        scores = np.ones(count) if detections.confidence is None else detections.confidence
        names = [str(name) for name in detections.data.get("class_name", ())]
        if detections.class_id is not None:
            labels = np.asarray(detections.class_id, np.int64)
            known = dict(zip(labels.tolist(), names, strict=True)) if names else {}
            class_names = tuple(known.get(label, str(label)) for label in range(int(labels.max(initial=-1)) + 1))
        else:
            class_names = tuple(dict.fromkeys(names)) or ("object",)
            labels = np.array([class_names.index(name) for name in names] if names else np.zeros(count), np.int64)
        return Detections(detections.xyxy, scores, labels, class_names)


@dataclass(frozen=True, eq=False)
class Masks:
    """Segments of one image; they may overlap.

    Attributes:
        masks: N x H x W bool.
        scores: N float32, the method's own measure of quality, higher is better.
        boxes_xyxy: N x 4 float32, the tight box of each mask; all zero for an empty mask.
    """

    masks: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray

    @staticmethod
    def of(masks: np.ndarray, scores: np.ndarray) -> Masks:
        """Masks with their tight boxes computed.

        Args:
            masks: N x H x W, bool or anything that casts to it.
            scores: N.
        """
        masks = np.asarray(masks, bool)
        scores = np.asarray(scores, np.float32).reshape(-1)
        if masks.ndim != 3 or len(masks) != len(scores):
            raise ValueError(f"masks of shape {masks.shape} and {len(scores)} scores do not match")
        return Masks(masks, scores, boxes_of_masks(masks))

    def __len__(self) -> int:
        return len(self.masks)


class Detector(Protocol):
    """Finds objects in an image."""

    name: str
    is_stand_in: bool

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> Detections:
        """Detect objects.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: what to look for. An open-vocabulary detector needs them; another keeps only these of its classes.
        """


class MaskGenerator(Protocol):
    """Cuts a whole image into segments without being asked for any in particular."""

    name: str
    is_stand_in: bool

    def masks(self, image: np.ndarray) -> Masks:
        """Segment an image (H x W x 3 uint8, RGB); best masks first."""


class PromptableSegmenter(Protocol):
    """Segments the object in a box."""

    name: str
    is_stand_in: bool

    def segment(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> Masks:
        """One mask for each box.

        Args:
            image: H x W x 3 uint8, RGB.
            boxes_xyxy: N x 4, pixels.
        """


def load_detector(name_or_path: str | Path, device: str = "auto", score_threshold: float = 0.25) -> Detector:
    """A detector by short name (`DETECTORS`), folder or Hub id; `motion` is the classical stand-in for video.

    Args:
        name_or_path: closed-vocabulary (RT-DETR, D-FINE, YOLOS, DETR ...) or open-vocabulary (Grounding DINO, OWLv2).
        device: as for every model.
        score_threshold: boxes below it are dropped; the stand-in has no use for it.

    Raises:
        UserError: an unknown name, a folder that holds no such model, transformers missing, the Hub out of reach.
    """
    if str(name_or_path) == "motion":
        from tenfold.core.foundation_classical import MotionDetector

        return MotionDetector()
    from tenfold.core.foundation_transformers import open_detector

    name = str(name_or_path)
    return open_detector(_folder(name, DETECTORS, "motion"), _title(name, DETECTORS), device, score_threshold)


def load_mask_generator(name_or_path: str | Path, device: str = "auto") -> MaskGenerator:
    """A mask generator by short name (`SEGMENTERS`), folder or Hub id; `regions` is the classical stand-in.

    Raises:
        UserError: as for `load_detector`.
    """
    if str(name_or_path) == "regions":
        from tenfold.core.foundation_classical import RegionMaskGenerator

        return RegionMaskGenerator()
    from tenfold.core.foundation_transformers import SamMaskGenerator

    name = str(name_or_path)
    return SamMaskGenerator(_folder(name, SEGMENTERS, "regions"), _title(name, SEGMENTERS), device)


def load_segmenter(name_or_path: str | Path, device: str = "auto") -> PromptableSegmenter:
    """A segmenter for boxes by short name (`SEGMENTERS`), folder or Hub id; `grabcut` is the classical stand-in.

    Raises:
        UserError: as for `load_detector`.
    """
    if str(name_or_path) == "grabcut":
        from tenfold.core.foundation_classical import GrabCutSegmenter

        return GrabCutSegmenter()
    from tenfold.core.foundation_transformers import SamSegmenter

    name = str(name_or_path)
    return SamSegmenter(_folder(name, SEGMENTERS, "grabcut"), _title(name, SEGMENTERS), device)


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """The tight box of each mask.

    Args:
        masks: N x H x W bool.

    Returns:
        N x 4 float32, left, top, right, bottom; all zero for an empty mask.
    """
    height, width = masks.shape[1:]
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)  # N x W, N x H
    boxes = np.zeros((len(masks), 4), np.float32)
    filled = rows.any(1)
    boxes[filled, 0] = columns[filled].argmax(1)
    boxes[filled, 1] = rows[filled].argmax(1)
    boxes[filled, 2] = width - columns[filled, ::-1].argmax(1)
    boxes[filled, 3] = height - rows[filled, ::-1].argmax(1)
    return boxes


def require_rgb(image: np.ndarray) -> None:
    """Refuse what is not an H x W x 3 uint8 image with at least one pixel."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise UserError(
            f"expected an RGB image, height x width x 3 of uint8, found shape {image.shape} of {image.dtype}"
        )


def _folder(name: str, table: Mapping[str, str], stand_in: str) -> Path:
    """The local folder of a model: the path itself, or the downloaded Hub repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repo_id = table.get(name, name)
    if hub.is_repo_id(repo_id):
        return hub.fetch_folder(repo_id)
    names = [*table, stand_in]
    near = difflib.get_close_matches(name, names, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}, a folder or a Hub id"
    raise UserError(f"no model {name!r}: it is no folder here and no known name; {hint}")


def _title(name: str, table: Mapping[str, str]) -> str:
    return f"{name} ({table[name]})" if name in table else name


def supervision() -> Any:
    """The package of that name, or a `UserError` that says how to get it."""
    try:
        import supervision as package
    except ImportError:
        raise UserError("supervision is not installed: run pip install 'tenfold[tracking]'") from None
    return package
