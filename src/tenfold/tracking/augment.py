"""Two views of one still image, and where its boxes went: the training pairs of MASA (spec section 1).

The published chain is affine map, mixup, colour, resize, crop, flip, pad. All that moves pixels is linear here, so that
each source picture is warped once, by the product of its maps; colour acts on single pixels and comes last. Coordinates
are continuous, pixel (0, 0) covers the square from (0, 0) to (1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tenfold.tracking.boxes import reaching, with_area
from tenfold.tracking.config import AugmentConfig

PAD = 114
_HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])


@dataclass(frozen=True, eq=False)
class Still:
    """A picture with its instances.

    Attributes:
        image: H x W x 3 uint8, RGB.
        boxes_xyxy: N x 4 float, pixels.
        ids: N int, above 0, different for each instance of the whole set.
    """

    image: np.ndarray
    boxes_xyxy: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class View:
    """One view.

    Attributes:
        image: size x size x 3 uint8, RGB.
        boxes_xyxy: K x 4 float32; they may reach out of the view.
        ids: K int64.
        sources: K int64, 0 for boxes of the first picture and 1 for the mixed-in one.
        homographies: 2 x 3 x 3, from each source picture to the view.
        canvas: the first picture's frame in the view, (left, top, right, bottom); grey lies outside of it.
    """

    image: np.ndarray
    boxes_xyxy: np.ndarray
    ids: np.ndarray
    sources: np.ndarray
    homographies: np.ndarray
    canvas: np.ndarray


def make_view(first: Still, second: Still | None, config: AugmentConfig, rng: np.random.Generator) -> View:
    """Draw one view.

    Args:
        first: the picture.
        second: what is mixed in, or None.
        config: ranges of all draws.
        rng: their source.
    """
    height, width = first.image.shape[:2]
    affine = draw_affine(config, (width, height), rng)
    placed = draw_mixup(second.image.shape, config, (width, height), rng) if second is not None else None
    gains = rng.uniform(-1, 1, 3) * (config.hue, config.saturation, config.value) * rng.integers(0, 2, 3)
    frame = draw_frame(config, (width, height), rng)

    to_view = [frame @ affine, frame @ placed if placed is not None else np.eye(3)]
    corners = project(frame, np.array([[0.0, 0, width, height]]))[0]
    image = warp(first.image, to_view[0], config.size)
    boxes = clip(project(affine, first.boxes_xyxy), width, height)
    ids, sources = [first.ids], [np.zeros(len(first.ids), np.int64)]
    kept = [(boxes, with_area(boxes))]
    if second is not None and placed is not None:
        image = mix(image, warp(second.image, to_view[1], config.size))
        other = project(placed, second.boxes_xyxy)
        kept.append((other, reaching(other, width, height)))
        ids.append(second.ids)
        sources.append(np.ones(len(second.ids), np.int64))
    image = shift_colour(image, gains)
    paint_outside(image, corners)

    found, origin = np.concatenate([b for b, _ in kept]), np.concatenate(sources)
    keep = np.concatenate([k for _, k in kept])
    found = project(frame, found)
    sides = found[:, 2:] - found[:, :2]
    keep &= reaching(found, config.size, config.size) & (sides > 1).all(1)
    return View(
        image=image,
        boxes_xyxy=found[keep].astype(np.float32),
        ids=np.concatenate(ids)[keep].astype(np.int64),
        sources=origin[keep],
        homographies=np.stack(to_view),
        canvas=corners,
    )


def draw_affine(config: AugmentConfig, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Translation, shear, rotation, scale about the top-left corner (YOLOX's random affine), 3 x 3."""
    angle = np.deg2rad(rng.uniform(-config.rotate_deg, config.rotate_deg))
    scale = rng.uniform(*config.scale)
    shear = np.tan(np.deg2rad(rng.uniform(-config.shear_deg, config.shear_deg, 2)))
    shift = rng.uniform(-config.translate, config.translate, 2) * size
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    shearing = np.array([[1, shear[0], 0], [shear[1], 1, 0], [0, 0, 1]])
    moving = np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1.0]])
    return moving @ shearing @ rotation @ np.diag([scale, scale, 1])


def draw_mixup(
    shape: tuple[int, ...], config: AugmentConfig, size: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Where the second picture lands in the frame of the first, whose (width, height) is `size`; 3 x 3."""
    height, width = shape[:2]
    jitter = rng.uniform(*config.mixup_scale)
    scale = min(config.size / height, config.size / width) * jitter
    canvas = config.size * jitter
    placed = np.diag([scale, scale, 1.0])
    if rng.uniform() > 0.5:
        placed = np.array([[-1, 0, canvas], [0, 1, 0], [0, 0, 1.0]]) @ placed
    offset = [int(rng.integers(0, max(int(canvas) - side, 0) + 1)) for side in size]
    return np.array([[1, 0, -offset[0]], [0, 1, -offset[1]], [0, 0, 1.0]]) @ placed


def draw_frame(config: AugmentConfig, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Resize (ratio kept), crop, flip: from the first picture's frame to the view; 3 x 3."""
    width, height = size
    target = config.size * rng.uniform(*config.resize)
    scale = target / max(width, height)
    resized = width * scale, height * scale
    offset = [rng.integers(0, max(int(side - config.size), 0) + 1) for side in resized]
    frame = np.array([[scale, 0, -offset[0]], [0, scale, -offset[1]], [0, 0, 1.0]])
    if rng.uniform() < 0.5:
        # What is flipped is the cropped picture, before it is padded on the right.
        frame = np.array([[-1, 0, min(resized[0], config.size)], [0, 1, 0], [0, 0, 1.0]]) @ frame
    return frame


def warp(image: np.ndarray, homography: np.ndarray, size: int) -> np.ndarray:
    """`image` under a map of continuous coordinates, bilinear, on a size x size canvas of grey 114."""
    shrink = np.sqrt(abs(np.linalg.det(homography[:2, :2])))
    if shrink < 0.5:  # bilinear interpolation would skip pixels
        small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        ratio = np.diag([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0], 1.0])
        return warp(small, homography @ ratio, size)
    by_index = np.linalg.inv(_HALF) @ homography @ _HALF
    return cv2.warpAffine(image, by_index[:2], (size, size), flags=cv2.INTER_LINEAR, borderValue=(PAD, PAD, PAD))


def mix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean of two pictures, uint8."""
    return cv2.addWeighted(first, 0.5, second, 0.5, 0)


def shift_colour(image: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Add to hue (of 180, around the circle), saturation and value (clipped to 0..255) (YOLOX's HSV jitter)."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    levels = np.arange(256, dtype=np.int16)
    steps = gains.astype(np.int16)
    tables = [
        ((levels + steps[0]) % 180).astype(np.uint8),
        np.clip(levels + steps[1], 0, 255).astype(np.uint8),
        np.clip(levels + steps[2], 0, 255).astype(np.uint8),
    ]
    shifted = [cv2.LUT(plane, table) for plane, table in zip((hue, saturation, value), tables, strict=True)]
    return cv2.cvtColor(cv2.merge(shifted), cv2.COLOR_HSV2RGB)


def paint_outside(image: np.ndarray, frame: np.ndarray) -> None:
    """Grey where the view shows nothing of the first picture's frame (left, top, right, bottom); in place."""
    side = image.shape[0]
    left, top, right, bottom = (int(np.clip(round(edge), 0, side)) for edge in frame)
    image[:top] = image[bottom:] = PAD
    image[:, :left] = image[:, right:] = PAD


def project(homography: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The upright hull of each box (N x 4) under an affine map."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    moved_x = homography[0, 0] * x + homography[0, 1] * y + homography[0, 2]
    moved_y = homography[1, 0] * x + homography[1, 1] * y + homography[1, 2]
    return np.stack((moved_x.min(1), moved_y.min(1), moved_x.max(1), moved_y.max(1)), axis=1)


def clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes cut to a picture."""
    return np.clip(boxes, 0, [width, height, width, height])
