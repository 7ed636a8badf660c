"""A generated clip: striped figures that walk, cross and hide each other, with true boxes and imperfect detections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from tenfold.tracking.data.table import BoxTable

LEAST_VISIBLE = 0.4  # of a figure: below it nobody would have drawn its box


@dataclass(frozen=True)
class ClipConfig:
    """What the clip shows.

    Attributes:
        frames: number of frames.
        size: (width, height) in pixels.
        figures: number of figures.
        speed: pixels a frame, about.
        miss: share of boxes that the detector misses.
        noise: shift of a detected edge as a share of the figure's sides, one standard deviation.
        seed: of all draws.
    """

    frames: int = 60
    size: tuple[int, int] = (384, 288)
    figures: int = 10
    speed: float = 10.0
    miss: float = 0.1
    noise: float = 0.03
    seed: int = 0


class Clip:
    """Frames, true boxes and detections of one generated clip; frame number i is a pure function of i."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        rng = np.random.default_rng(config.seed)
        width, height = config.size
        self._sizes = np.stack((rng.integers(18, 28, config.figures), rng.integers(48, 72, config.figures)), axis=1)
        self._start = rng.uniform(0, 1, (config.figures, 2)) * (np.array([width, height]) - self._sizes)
        angle = rng.uniform(0, 2 * np.pi, config.figures)
        self._step = np.stack((np.cos(angle), 0.4 * np.sin(angle)), axis=1)
        self._step *= config.speed * rng.uniform(0.7, 1.3, (config.figures, 1))
        self._sprites = [_sprite(rng, int(w), int(h)) for w, h in self._sizes]
        small = rng.integers(70, 170, (height // 16, width // 16, 3)).astype(np.uint8)
        self._ground = cv2.resize(small, config.size, interpolation=cv2.INTER_CUBIC)

    def boxes(self, number: int) -> np.ndarray:
        """Where all figures are in a frame, figures x 4; they turn round at the borders."""
        room = np.array(self.config.size) - self._sizes
        folded = np.mod(self._start + number * self._step, 2 * room)
        corner = np.round(np.where(folded > room, 2 * room - folded, folded))
        return np.concatenate((corner, corner + self._sizes), axis=1)

    def frame(self, number: int) -> np.ndarray:
        """H x W x 3 uint8, RGB; later figures hide earlier ones."""
        image = self._ground.copy()
        for sprite, box in zip(self._sprites, self.boxes(number).astype(int), strict=True):
            image[box[1] : box[3], box[0] : box[2]] = sprite
        rng = np.random.default_rng((self.config.seed, number))
        return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)

    def frames(self) -> Iterator[np.ndarray]:
        """All frames in order."""
        return (self.frame(number) for number in range(self.config.frames))

    def visible(self, number: int) -> np.ndarray:
        """Which figures can be seen well enough in a frame."""
        owner = np.full(self.config.size[::-1], -1)
        boxes = self.boxes(number).astype(int)
        for figure, box in enumerate(boxes):
            owner[box[1] : box[3], box[0] : box[2]] = figure
        seen = np.bincount(owner[owner >= 0], minlength=len(boxes))
        return seen >= LEAST_VISIBLE * self._sizes.prod(1)

    def truth(self) -> BoxTable:
        """True boxes of the visible figures; the identity is the figure's number."""
        rows = [
            (number, figure, self.boxes(number)[figure])
            for number in range(self.config.frames)
            for figure in np.flatnonzero(self.visible(number))
        ]
        frames, ids, boxes = zip(*rows, strict=True)
        return BoxTable.of(frames, ids, np.stack(boxes), np.ones(len(rows)))

    def detections(self) -> BoxTable:
        """The truth as a detector would see it: some boxes missed, edges shaken. The identity is still the figure's."""
        truth = self.truth()
        rng = np.random.default_rng((self.config.seed, 1))
        sides = np.tile(truth.boxes_xyxy[:, 2:] - truth.boxes_xyxy[:, :2], 2)
        boxes = truth.boxes_xyxy + rng.normal(0, self.config.noise, truth.boxes_xyxy.shape) * sides
        seen = rng.random(len(truth)) >= self.config.miss
        found = BoxTable.of(truth.frames, truth.ids, boxes, rng.uniform(0.6, 1, len(truth)))
        return found.select(seen)


def _sprite(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Head, shirt and trousers of random colours, the shirt with a pattern."""
    sprite = np.zeros((height, width, 3), np.float64)
    head, waist = height // 5, height // 2
    sprite[:head], sprite[head:waist], sprite[waist:] = rng.uniform(20, 235, (3, 3))
    pattern = np.sin(np.arange(waist - head) * rng.uniform(0.3, 1.2))[:, None, None]
    sprite[head:waist] += pattern * rng.uniform(10, 50)
    return np.clip(sprite, 0, 255).astype(np.uint8)
