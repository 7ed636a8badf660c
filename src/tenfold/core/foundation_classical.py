"""Stand-ins for foundation models that need no weights and no network: OpenCV and a graph, no learning.

They let every pipeline run offline and be tested; none of them knows what an object is, and each says so in its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from tenfold.core.console import UserError
from tenfold.core.foundation import Detections, Masks, require_rgb


class MotionDetector:
    """Moving things in a video from a still camera: what differs from an adaptive background (Zivkovic's MOG2).

    It has a memory: give it the frames of one video in order. The first frame, and one that differs from the background
    in most of its area (a cut), only teach it the background. A score is the share of moving pixels in its box.
    """

    name = "motion (classical stand-in: background subtraction)"
    is_stand_in = True

    # Less than 1/2000 of the frame is noise of sensor and compression; more than 3/4 at once is a cut, not an object.
    min_area = 1 / 2000
    max_moving = 0.75
    # MOG2's own rate is 1 / (2 x frames seen) at first: it would swallow a slow object within a few frames.
    learning_rate = 1 / 500

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the background, before another video."""
        self._background = cv2.createBackgroundSubtractorMOG2(detectShadows=True)
        self._shape: tuple[int, ...] | None = None

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> Detections:
        """Boxes of moving regions in the next frame.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: must be None: motion has no name.
        """
        require_rgb(image)
        if prompts is not None:
            raise UserError(
                "the motion stand-in cannot look for named things: leave the prompts out, or load a detector"
            )
        is_first = image.shape != self._shape
        if is_first:
            self.reset()
            self._shape = image.shape
        rate = 1.0 if is_first else self.learning_rate
        moving = (self._background.apply(image, learningRate=rate) == 255).astype(np.uint8)  # 127 marks shadows
        if is_first or moving.mean() > self.max_moving:
            return Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), ("moving",))
        side = max(3, round(min(image.shape[:2]) / 100) | 1)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
        joined = cv2.morphologyEx(cv2.morphologyEx(moving, cv2.MORPH_OPEN, disc), cv2.MORPH_CLOSE, disc, iterations=2)
        _, _, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
        stats = stats[1:][stats[1:, cv2.CC_STAT_AREA] >= self.min_area * moving.size]
        left, top, width, height, area = stats.T.astype(np.float32)
        scores = area / (width * height)
        order = np.argsort(-scores, kind="stable")
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        return Detections(boxes, scores, np.zeros(len(boxes)), ("moving",)).select(order)


class GrabCutSegmenter:
    """The object in a box by colour: GrabCut (Rother, Kolmogorov, Blake 2004) in a margin around each box."""

    name = "grabcut (classical stand-in: colour models and graph cut)"
    is_stand_in = True

    def segment(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> Masks:
        """One mask for each box; a box without any background around it is taken whole. The score is the filled share.

        Args:
            image: H x W x 3 uint8, RGB.
            boxes_xyxy: N x 4, pixels.
        """
        require_rgb(image)
        boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
        masks = np.zeros((len(boxes), *image.shape[:2]), bool)
        scores = np.zeros(len(boxes), np.float32)
        for index, box in enumerate(boxes):
            self._cut(image, box, masks[index])
            area = max((box[2] - box[0]) * (box[3] - box[1]), 1.0)
            scores[index] = min(masks[index].sum() / area, 1.0)
        return Masks.of(masks, scores)

    def _cut(self, image: np.ndarray, box: np.ndarray, mask: np.ndarray) -> None:
        height, width = image.shape[:2]
        left, top = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
        right, bottom = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
        if right <= left or bottom <= top:
            return
        margin = max(8, (right - left + bottom - top) // 4)
        x0, y0 = max(left - margin, 0), max(top - margin, 0)
        crop = np.ascontiguousarray(image[y0 : bottom + margin, x0 : right + margin])
        inside = (slice(top - y0, bottom - y0), slice(left - x0, right - x0))
        state = np.full(crop.shape[:2], cv2.GC_BGD, np.uint8)
        state[inside] = cv2.GC_PR_FGD
        if (state == cv2.GC_BGD).any():
            cv2.setRNGSeed(0)  # GrabCut starts its colour models by k-means
            cv2.grabCut(crop, state, (0, 0, 1, 1), np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
        mask[top:bottom, left:right] = state[inside] == cv2.GC_PR_FGD


class RegionMaskGenerator:
    """Regions of even colour: graph-based merging (Felzenszwalb and Huttenlocher, IJCV 2004, section 3) at many scales.

    The graph's nodes are watershed basins instead of pixels, which makes it small enough for Python. A region's score
    is the share of the scales at which it appears: large where its border is strong.
    """

    name = "regions (classical stand-in: graph-based colour segmentation)"
    is_stand_in = True

    # Larger images are shrunk to this longer side for the segmentation: time and memory stay bounded, and borders of
    # regions are within a pixel or two of the full image's.
    max_side = 640
    # The scale k of the method as a share of the image's area, so that the regions do not depend on the resolution.
    scales = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
    # A region is at least this share of the image and, in a small image, at least so many pixels: less is noise.
    min_area = 1 / 1000
    min_pixels = 50
    max_area = 0.6
    # Two regions that overlap by more than this (intersection over union) are one region seen at two scales.
    same_region = 0.9

    def masks(self, image: np.ndarray) -> Masks:
        """Segment an image (H x W x 3 uint8, RGB); regions with the strongest borders first, larger before smaller."""
        require_rgb(image)
        height, width = image.shape[:2]
        shrink = min(1.0, self.max_side / max(height, width))
        small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        resized = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        lab = cv2.cvtColor(resized.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
        gradient = _gradient(cv2.GaussianBlur(lab, (0, 0), 0.6))
        basins = _basins(gradient)
        count = int(basins.max()) + 1
        area = np.bincount(basins.ravel(), minlength=count)
        edges = _edges(basins, lab, gradient, area)
        members = np.concatenate([self._merge(edges, area, scale * basins.size) for scale in self.scales])
        members = members.astype(np.float32)  # regions x basins, 0 or 1
        sizes = members @ area
        fits = (sizes >= self._smallest(basins.size)) & (sizes <= self.max_area * basins.size)
        members, sizes = members[fits], sizes[fits]
        shared = (members * area) @ members.T
        same = shared / (sizes[:, None] + sizes[None, :] - shared) > self.same_region
        stability = same.sum(1)
        order = np.lexsort((-sizes, -stability))
        kept: list[int] = []
        for index in order:
            if not same[index, kept].any():
                kept.append(int(index))
        full = cv2.resize(basins, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        masks = members[kept].astype(bool)[:, full] if kept else np.zeros((0, height, width), bool)
        return Masks.of(masks, np.minimum(stability[kept] / len(self.scales), 1.0))

    def _smallest(self, pixels: int) -> float:
        return max(self.min_area * pixels, self.min_pixels)

    def _merge(self, edges: tuple[list[int], list[int], list[float]], area: np.ndarray, k: float) -> np.ndarray:
        """Join basins along edges of rising weight, if no heavier than each side's inner variation plus k / size.

        Returns:
            regions x basins bool.
        """
        parent = list(range(len(area)))
        size = area.tolist()
        limit = [k / pixels for pixels in size]

        def root(node: int) -> int:
            while parent[node] != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        def join(first: int, second: int) -> None:
            parent[second] = first
            size[first] += size[second]

        for one, other, weight in zip(*edges, strict=True):
            first, second = root(one), root(other)
            if first != second and weight <= min(limit[first], limit[second]):
                join(first, second)
                limit[first] = weight + k / size[first]
        smallest = self._smallest(int(area.sum()))
        for one, other, _ in zip(*edges, strict=True):
            first, second = root(one), root(other)
            if first != second and min(size[first], size[second]) < smallest:
                join(first, second)
        roots = np.array([root(node) for node in range(len(area))])
        return np.unique(roots)[:, None] == roots[None, :]


def _gradient(lab: np.ndarray) -> np.ndarray:
    """Length of the colour gradient in CIE L*a*b* units for each pixel (H x W x 3 -> H x W float32)."""
    across = cv2.Sobel(lab, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(lab, cv2.CV_32F, 0, 1, scale=1 / 8)
    return np.sqrt((across**2 + down**2).sum(2))


def _basins(gradient: np.ndarray) -> np.ndarray:
    """Watershed basins of the gradient's local minima, numbered from 0 without gaps (H x W int32)."""
    minima = (gradient <= cv2.erode(gradient, np.ones((5, 5)))).astype(np.uint8)
    _, markers = cv2.connectedComponents(minima)
    relief = np.clip(gradient * 6, 0, 255).astype(np.uint8)
    # OpenCV's watershed gives no basin to the outermost pixels: let them be a frame that is cut off again.
    framed = cv2.merge([cv2.copyMakeBorder(relief, 1, 1, 1, 1, cv2.BORDER_REPLICATE)] * 3)
    labels = cv2.watershed(framed, cv2.copyMakeBorder(markers, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0))[1:-1, 1:-1]
    # It also leaves lines between basins (-1): give them to a neighbour.
    labels = np.maximum(labels, 0).astype(np.float32)
    while not labels.all():
        labels = np.where(labels == 0, cv2.dilate(labels, np.ones((3, 3))), labels)
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def _edges(
    basins: np.ndarray, lab: np.ndarray, gradient: np.ndarray, area: np.ndarray
) -> tuple[list[int], list[int], list[float]]:
    """Pairs of adjacent basins by rising weight: distance of the mean colours and gradient on the shared border."""
    count = len(area)
    mean = np.stack([np.bincount(basins.ravel(), lab[..., c].ravel(), count) for c in range(3)], 1) / area[:, None]
    one = np.concatenate([basins[:, :-1].ravel(), basins[:-1].ravel()])
    other = np.concatenate([basins[:, 1:].ravel(), basins[1:].ravel()])
    border = np.concatenate(
        [np.minimum(gradient[:, :-1], gradient[:, 1:]).ravel(), np.minimum(gradient[:-1], gradient[1:]).ravel()]
    )
    apart = one != other
    low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
    pairs, index = np.unique(low.astype(np.int64) * count + high, return_inverse=True)
    strength = np.bincount(index, border[apart], len(pairs)) / np.bincount(index, minlength=len(pairs))
    first, second = pairs // count, pairs % count
    # Weights of the mixture chosen on 15 photographs of BSDS500's training set by the mean best overlap.
    weight = 0.7 * np.linalg.norm(mean[first] - mean[second], axis=1) + 0.6 * strength
    order = np.argsort(weight, kind="stable")
    return first[order].tolist(), second[order].tolist(), weight[order].tolist()
