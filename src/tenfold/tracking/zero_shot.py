"""How well appearance alone finds things again over gaps in time, and the colour histogram that is to be beaten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from tenfold.tracking.data.table import BoxTable
from tenfold.tracking.matching import open_world_scores

Describe = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From a frame (H x W x 3 uint8, RGB) and boxes (N x 4) to N x E float32."""

STRIPES, HUE_BINS, SATURATION_BINS, VALUE_BINS = 4, 12, 4, 4


def colour_histogram(frame: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Hue, saturation and value of each box in four stripes from top to bottom: no learning at all.

    Roots of shares, so that the inner product is the Bhattacharyya coefficient; scaled for the softmax.

    Args:
        frame: H x W x 3 uint8, RGB.
        boxes_xyxy: N x 4.

    Returns:
        N x 768 float32.
    """
    hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
    height, width = frame.shape[:2]
    described = np.zeros((len(boxes_xyxy), STRIPES, HUE_BINS * SATURATION_BINS * VALUE_BINS), np.float32)
    for number, box in enumerate(np.asarray(boxes_xyxy, np.float64)):
        left, right = (int(np.clip(round(edge), 0, width)) for edge in box[[0, 2]])
        edges = np.clip(np.round(np.linspace(box[1], box[3], STRIPES + 1)), 0, height).astype(int)
        for stripe in range(STRIPES):
            part = np.ascontiguousarray(hsv[edges[stripe] : edges[stripe + 1], left:right])
            if part.size:
                counts = cv2.calcHist(
                    [part], [0, 1, 2], None, [HUE_BINS, SATURATION_BINS, VALUE_BINS], [0, 180, 0, 256, 0, 256]
                )
                described[number, stripe] = np.sqrt(counts.ravel() / counts.sum())
    return 4 * described.reshape(len(described), -1)


def describe_frames(
    frames: Iterable[np.ndarray], truth: BoxTable, describe: Describe, numbers: Sequence[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Identities and descriptions of the true boxes of some frames of a video, by number of the frame."""
    wanted, found = set(numbers), {}
    for number, frame in enumerate(frames):
        if number > max(wanted, default=-1):
            break
        if number in wanted:
            rows = truth.rows(number)
            found[number] = truth.ids[rows], describe(frame, truth.boxes_xyxy[rows])
    return found


def matching_accuracy(described: dict[int, tuple[np.ndarray, np.ndarray]], gap: int) -> float:
    """Share of the boxes seen at t and at t + gap that the best pairing of all boxes of the two frames brings together.

    Args:
        described: see `describe_frames`.
        gap: frames between the two.
    """
    right = total = 0
    for number, (ids, embeds) in described.items():
        if number + gap not in described:
            continue
        later_ids, later = described[number + gap]
        both = np.intersect1d(ids, later_ids)
        if not len(both):
            continue
        rows, columns = linear_sum_assignment(open_world_scores(embeds, later), maximize=True)
        right += int((ids[rows] == later_ids[columns]).sum())
        total += len(both)
    return right / max(total, 1)
