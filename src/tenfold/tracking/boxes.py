"""Boxes as N x 4 arrays, left, top, right, bottom in pixels: overlap, validity, suppression."""

from __future__ import annotations

import numpy as np


def iou(first: np.ndarray, second: np.ndarray, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Intersection over union of each pair.

    Args:
        first: N x 4.
        second: M x 4.
        dtype: in which it is computed; evaluation takes float64, as the reference does.

    Returns:
        N x M of `dtype`; 0 where a box has no area.
    """
    first, second = np.asarray(first, dtype), np.asarray(second, dtype)
    width = np.minimum(first[:, 2, None], second[:, 2]) - np.maximum(first[:, 0, None], second[:, 0])
    height = np.minimum(first[:, 3, None], second[:, 3]) - np.maximum(first[:, 1, None], second[:, 1])
    np.maximum(width, 0, out=width)
    np.maximum(height, 0, out=height)
    width *= height  # intersection
    union = areas(first)[:, None] + areas(second)
    union -= width
    np.maximum(union, 1e-6, out=union)
    width /= union
    return width


def areas(boxes: np.ndarray) -> np.ndarray:
    """Area of each box (N x 4 -> N)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def with_area(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (N x 4) have their edges the right way round and apart."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def reaching(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Which boxes (N x 4) have a part inside a picture of that size."""
    return (boxes[:, 0] < width) & (boxes[:, 1] < height) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)


def usable(boxes: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Which boxes can be looked at: finite, with an area and, where a size is given, with a part inside the picture.

    Args:
        boxes: N x 4.
        size: (width, height) of the picture.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    good = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        good &= with_area(boxes)
        if size is not None:
            good &= reaching(boxes, *size)
    return good


def suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float, labels: np.ndarray | None = None) -> np.ndarray:
    """Non-maximum suppression, within labels where they are given: the kept numbers, best first."""
    import torch
    from torchvision.ops import batched_nms

    groups = np.zeros(len(boxes), np.int64) if labels is None else labels
    kept = batched_nms(
        torch.from_numpy(np.ascontiguousarray(boxes, np.float32)),
        torch.from_numpy(np.ascontiguousarray(scores, np.float32)),
        torch.from_numpy(np.ascontiguousarray(groups, np.int64)),
        overlap,
    )
    return kept.numpy()
