"""Where boxes come from: the embedded NanoDet, any detector of `core.foundation`, any callable of supervision's.

Everything here speaks `supervision.Detections`; a frame is H x W x 3 uint8, RGB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from tenfold.core import foundation
from tenfold.core.config import near
from tenfold.core.console import UserError
from tenfold.tracking.boxes import suppress, usable
from tenfold.tracking.matching import softmax

if TYPE_CHECKING:
    from supervision import Detections

Detect = Callable[[np.ndarray], "Detections"]

EMBEDDED = "nanodet"
NANODET_FILE = "nanodet-g-416.onnx"
NANODET_SIDE = 416
NANODET_STRIDES = (8, 16, 32)
NANODET_OVERLAP = 0.5  # of two boxes of a class, above which the weaker is dropped
NANODET_MEAN = np.array([103.53, 116.28, 123.675], np.float32)  # BGR
NANODET_STD = np.array([57.375, 57.12, 58.395], np.float32)

COCO_CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)


class NanoDet:
    """NanoDet-g at 416 x 416: the 80 classes of COCO, small enough to be built in.

    Args:
        score_threshold: boxes below it are dropped.

    Raises:
        UserError: onnxruntime is not installed.
    """

    name = "nanodet (built in)"
    is_stand_in = False
    class_names = COCO_CLASSES

    def __init__(self, score_threshold: float = 0.35) -> None:
        import torch

        try:
            import onnxruntime
        except ImportError:
            raise UserError("onnxruntime is not installed: run pip install 'tenfold[tracking]'") from None
        options = onnxruntime.SessionOptions()
        # As many as torch has: the default pins one to each processor of the machine, which a container may not allow.
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        content = (resources.files("tenfold.tracking") / "weights" / NANODET_FILE).read_bytes()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.score_threshold = score_threshold

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> foundation.Detections:
        """Boxes of COCO's classes, best first.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: keep only these classes.

        Raises:
            UserError: a prompt that is no class of COCO.
        """
        foundation.require_rgb(image)
        small = cv2.resize(image, (NANODET_SIDE, NANODET_SIDE), interpolation=cv2.INTER_LINEAR)
        planes = (small[:, :, ::-1].astype(np.float32) - NANODET_MEAN) / NANODET_STD
        scores, sides = self._session.run(["scores", "boxes"], {"image": planes.transpose(2, 0, 1)[None]})
        boxes, scores, labels = decode(scores[0], sides[0], self.score_threshold)
        if prompts is not None:
            wanted = np.isin(labels, [self._label(prompt) for prompt in prompts])
            boxes, scores, labels = boxes[wanted], scores[wanted], labels[wanted]
        kept = suppress(boxes, scores, NANODET_OVERLAP, labels)
        bound = np.array([image.shape[1], image.shape[0]] * 2, np.float32)
        found = np.clip(boxes[kept] * (bound / NANODET_SIDE), 0, bound)
        return foundation.Detections(found, scores[kept], labels[kept], COCO_CLASSES)

    def _label(self, prompt: str) -> int:
        name = prompt.strip().lower()
        if name not in COCO_CLASSES:
            raise UserError(
                f"the built-in detector has no class {prompt!r}: {near(name, COCO_CLASSES)}; --detector owlv2 or "
                "grounding-dino finds anything that words describe"
            )
        return COCO_CLASSES.index(name)


@functools.lru_cache(maxsize=1)
def _centres() -> tuple[np.ndarray, np.ndarray]:
    """Centre (N x 2) and stride (N) of every place, in pixels of the network's input."""
    centres, strides = [], []
    for stride in NANODET_STRIDES:
        side = NANODET_SIDE // stride
        y, x = np.mgrid[:side, :side]
        centres.append((np.stack((x, y), axis=-1).reshape(-1, 2) + 0.5) * stride)
        strides.append(np.full(side * side, stride))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides).astype(np.float32)


def decode(scores: np.ndarray, sides: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes in pixels of the 416 x 416 input, scores and labels above a threshold.

    Each side's distance is the mean of 11 bins under a softmax, times the stride (generalised focal loss).

    Args:
        scores: N x 80 in 0..1.
        sides: N x 44 logits: left, top, right, bottom, 11 bins each.
        threshold: least score.
    """
    labels = scores.argmax(1)
    best = scores[np.arange(len(scores)), labels]
    chosen = np.flatnonzero(best > threshold)
    centres, strides = _centres()
    bins = sides[chosen].reshape(-1, 4, 11)
    distance = softmax(bins, 2) @ np.arange(11, dtype=np.float32) * strides[chosen, None]
    centre = centres[chosen]
    boxes = np.concatenate((centre - distance[:, :2], centre + distance[:, 2:]), axis=1)
    return boxes, best[chosen], labels[chosen]


def load_detector(
    detector: str | foundation.Detector | Detect,
    prompts: Sequence[str] | None = None,
    device: str = "auto",
    score_threshold: float | None = None,
) -> Detect:
    """A detector as a function from a frame to `supervision.Detections`.

    Args:
        detector: `nanodet` (built in); a name, folder or hub id of `core.foundation`; an object with `detect`; or a
            callable that returns `supervision.Detections` already.
        prompts: what to look for; open-vocabulary detectors need it.
        device: for those that run in torch.
        score_threshold: boxes below it are dropped; None is the detector's own.

    Raises:
        UserError: an unknown name, or a detector that needs prompts and has none.
    """
    foundation.supervision()
    if isinstance(detector, str | Path):
        if detector == EMBEDDED:
            found: Any = NanoDet() if score_threshold is None else NanoDet(score_threshold)
        elif score_threshold is None:
            found = foundation.load_detector(detector, device)
        else:
            found = foundation.load_detector(detector, device, score_threshold)
    else:
        found = detector
    if not hasattr(found, "detect"):
        return found

    def detect(frame: np.ndarray) -> Detections:
        return found.detect(frame, prompts).to_supervision()

    return detect


def parse_prompts(text: str) -> list[str]:
    """`red car . dog` as ["red car", "dog"].

    Raises:
        UserError: no word in it.
    """
    prompts = [part.strip() for part in text.split(".") if part.strip()]
    if not prompts:
        raise UserError(
            f"--text {text!r}: name what to look for, parts separated by full stops, such as 'red car . dog'"
        )
    return prompts


def tidy(detections: Detections, size: tuple[int, int], agnostic_overlap: float | None = None) -> np.ndarray:
    """Which detections can be tracked: usable boxes, and after class-agnostic suppression where asked for.

    Args:
        detections: of one frame.
        size: (width, height) of the frame.
        agnostic_overlap: suppress at this overlap whatever the class.

    Returns:
        Numbers of rows, rising.
    """
    rows = np.flatnonzero(usable(detections.xyxy, size))
    if detections.confidence is not None:
        rows = rows[np.isfinite(detections.confidence[rows])]
    if agnostic_overlap is not None and len(rows):
        scores = np.ones(len(rows)) if detections.confidence is None else detections.confidence[rows]
        rows = np.sort(rows[suppress(detections.xyxy[rows], scores, agnostic_overlap)])
    return rows
