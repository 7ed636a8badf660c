"""Still images with instances, for training: COCO json beside a folder of pictures, and pairs of views from it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.files import read_json
from tenfold.core.training import Shuffled
from tenfold.tracking.augment import Still, View, make_view
from tenfold.tracking.boxes import iou, suppress
from tenfold.tracking.config import TrainConfig

MIN_SIDE = 1.0  # pixels: smaller boxes are dropped, as are those without area (masa_dataset.py)
TRIES = 15  # to find a picture with boxes to mix in
CACHE_BYTES = 2**30  # of decoded pictures that are kept, in each process


@dataclass(frozen=True)
class StillSet:
    """Pictures with instances: `files[i]` has `boxes[i]` (N x 4, left top right bottom) and `ids[i]` (N, above 0)."""

    files: tuple[Path, ...]
    boxes: tuple[np.ndarray, ...]
    ids: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.files)

    def still(self, index: int) -> Still:
        """Picture number `index` with its instances."""
        picture = images.to_rgb8(images.read(self.files[index]))
        return Still(picture, self.boxes[index], self.ids[index])


def read_coco(annotations: Path, folder: Path) -> StillSet:
    """A COCO json of instances; its pictures lie in `folder`.

    Dropped are boxes to be ignored, without area, narrower than a pixel or outside of the picture, and pictures that
    then have none. An instance is its `instance_id`, else its `id`.

    Raises:
        UserError: no such file, not COCO's layout, a picture that is missing, or not one box.
    """
    content = read_json(annotations)
    for part in ("images", "annotations"):
        if not isinstance(content.get(part), list):
            raise UserError(f"{annotations}: has no list `{part}`, so it is no COCO json of instances")
    of_image: dict[Any, list[tuple[np.ndarray, int]]] = {}
    try:
        for row in content["annotations"]:
            left, top, width, height = map(float, row["bbox"])
            area = float(row.get("area", width * height))
            if row.get("ignore") or row.get("iscrowd") or area <= 0 or width < MIN_SIDE or height < MIN_SIDE:
                continue
            box = np.array([left, top, left + width, top + height])
            of_image.setdefault(row["image_id"], []).append((box, int(row.get("instance_id", row["id"]))))
        files, boxes, ids = [], [], []
        for picture in content["images"]:
            found = [
                (box, number)
                for box, number in of_image.get(picture["id"], [])
                if box[0] < picture["width"] and box[1] < picture["height"] and box[2] > 0 and box[3] > 0
            ]
            if found:
                files.append(folder / str(picture["file_name"]))
                boxes.append(np.stack([box for box, _ in found]))
                ids.append(np.array([number for _, number in found]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{annotations}: not a COCO json of instances ({type(error).__name__}: {error})") from None
    if not files:
        raise UserError(f"{annotations}: has no box to train on")
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{annotations}: names {missing[0]}, which is not there ({len(missing)} pictures are missing)")
    # Ids count across the whole set, and must be above 0: 0 and less never match.
    starts = np.cumsum([0, *[len(group) for group in ids]])
    numbers = np.unique(np.concatenate(ids), return_inverse=True)[1] + 1
    return StillSet(
        tuple(files),
        tuple(boxes),
        tuple(numbers[a:b] for a, b in itertools.pairwise(starts)),
    )


class ViewPairs:
    """Endless pairs of views; pair number i is a pure function of i.

    Args:
        stills: the pictures.
        config: how views and training boxes are drawn.
    """

    def __init__(self, stills: StillSet, config: TrainConfig) -> None:
        self.stills = stills
        self.config = config
        self._order = Shuffled(len(stills), config.seed)
        kept = max(1, CACHE_BYTES // stills.still(0).image.nbytes)
        self._read = functools.lru_cache(min(kept, len(stills)))(stills.still)

    def views(self, index: int) -> tuple[View, View]:
        """Key and reference view of pair `index`; every draw is made anew for each."""
        number = self._order(index)
        rng = np.random.default_rng((self.config.seed, index))
        first = self._still(number, rng)
        key = make_view(first, self._second(rng), self.config.augment, rng)
        return key, make_view(first, self._second(rng), self.config.augment, rng)

    def _second(self, rng: np.random.Generator) -> Still | None:
        if rng.random() >= self.config.augment.mixup:
            return None
        for _ in range(TRIES):
            number = int(rng.integers(len(self.stills)))
            if len(self.stills.ids[number]):
                return self._still(number, rng)
        return None

    def _still(self, number: int, rng: np.random.Generator) -> Still:
        """A picture with those of its instances that are shown together."""
        still = self._read(number)
        if self.config.apart >= 1:
            return still
        priority = rng.random(len(still.ids)).astype(np.float32)
        kept = suppress(still.boxes_xyxy, priority, self.config.apart)
        return Still(still.image, still.boxes_xyxy[kept], still.ids[kept])

    def sample(self, index: int) -> Mapping[str, np.ndarray]:
        """Pair `index` as equally shaped arrays.

        Returns:
            `images`, 2 x size x size x 3 uint8; `boxes`, 2 x (positives + negatives) x 4 float32; `ids`, 2 x the same,
            instance numbers, 0 for background and -1 for places that are not used.
        """
        rng = np.random.default_rng((self.config.seed, index, 1))
        pair = self.views(index)
        common = np.intersect1d(pair[0].ids, pair[1].ids)
        boxes, ids = zip(*(self._training_boxes(view, common, rng) for view in pair), strict=True)
        return {
            "images": np.stack([view.image for view in pair]),
            "boxes": np.stack(boxes),
            "ids": np.stack(ids),
        }

    def _training_boxes(
        self, view: View, common: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shaken boxes of a view, those of instances that both views show first, and background."""
        config = self.config
        total = config.positives + config.negatives
        boxes, ids = np.zeros((total, 4), np.float32), np.full(total, -1, np.int64)
        shown = np.isin(view.ids, common)
        large = (view.boxes_xyxy[:, 2:] - view.boxes_xyxy[:, :2] > config.least_side).all(1)
        order = np.lexsort((rng.random(len(view.ids)), ~shown))
        order = order[large[order]][: config.positives]
        count = len(order)
        boxes[:count] = shake(view.boxes_xyxy[order], config.jitter, rng)
        ids[:count] = view.ids[order]
        background = draw_background(view, config.negatives, rng)
        boxes[config.positives : config.positives + len(background)] = background
        ids[config.positives : config.positives + len(background)] = 0
        return boxes, ids


def shake(boxes: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """Move and resize boxes at random, keeping an overlap of at least 0.7, as proposals of a detector have.

    Args:
        boxes: N x 4.
        jitter: largest change of each edge as a share of the side; lessened where the overlap would fall below 0.7.
        rng: source of the draws.
    """
    sides = (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]]
    change = rng.uniform(-jitter, jitter, boxes.shape) * sides
    moved = boxes + change
    both = np.minimum(moved[:, 2:], boxes[:, 2:]) - np.maximum(moved[:, :2], boxes[:, :2])
    inter = both.clip(0).prod(1)
    union = (moved[:, 2:] - moved[:, :2]).prod(1) + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter
    fits = inter >= 0.7 * union
    return np.where(fits[:, None], moved, boxes).astype(np.float32)


def draw_background(view: View, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` random boxes of the view that overlap no instance by 0.3 or more (M x 4)."""
    side = view.image.shape[0]
    size = np.exp(rng.uniform(np.log(16), np.log(side / 2), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (side - size)
    boxes = np.concatenate((corner, corner + size), axis=1).astype(np.float32)
    if not len(view.boxes_xyxy):
        return boxes
    return boxes[(iou(boxes, view.boxes_xyxy) < 0.3).all(1)]
