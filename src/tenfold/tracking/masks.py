"""The job that makes training data of a folder of pictures: every segment of each, as one COCO json of instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core import console, images
from tenfold.core.console import UserError, warn
from tenfold.core.files import make_folder, read_json, write_json
from tenfold.core.foundation import MaskGenerator
from tenfold.tracking.boxes import suppress

# A segment is kept when it is larger than noise and smaller than half of the picture (spec, prototype on BSDS).
MIN_AREA, MIN_SIDE, MAX_SHARE = 120, 8, 0.5
# Two boxes that overlap by more cannot be told apart by the rule that makes a proposal a positive (IoU of 0.7).
MAX_OVERLAP = 0.7


@dataclass(frozen=True)
class MasksResult:
    """What the job wrote: the file, pictures, instances, pictures that could not be read, the generator's name."""

    path: str
    pictures: int
    instances: int
    unreadable: tuple[str, ...]
    generator: str


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and its sub-folders, in order.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.READABLE_SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no picture")
    return found


def segment_folder(
    folder: Path, output: Path, generator: MaskGenerator, share: tuple[int, int] = (0, 1), rle: bool = False
) -> MasksResult:
    """Segment every picture of a folder; a job that was stopped goes on where it was.

    Args:
        folder: of pictures.
        output: the .json to write; pieces lie in a folder beside it until all pictures are done.
        generator: what segments.
        share: this process's number and the number of processes that split the pictures (i, n); each writes its own
            pieces, and the one that finds all of them there writes the json.
        rle: also keep the masks (COCO's compressed runs), not the boxes alone.

    Raises:
        UserError: nothing to segment, or the disk refuses.
    """
    paths = find_pictures(folder)
    pieces = make_folder(output.with_suffix(".parts"))
    with console.progress("segments", len(paths[share[0] :: share[1]])) as bar:
        for number in range(share[0], len(paths), share[1]):
            piece = pieces / f"{number:08d}.json"
            if not piece.is_file():
                try:
                    picture = images.to_rgb8(images.read(paths[number]))
                    write_json(piece, _piece(picture, paths[number].relative_to(folder), generator, rle))
                except UserError as error:
                    write_json(piece, {"unreadable": str(paths[number])})
                    warn(f"left out: {error}")
            bar.advance()
    files = sorted(pieces.glob("*.json"))
    contents = [read_json(path) for path in files]
    unreadable = tuple(content["unreadable"] for content in contents if "unreadable" in content)
    done = [content for content in contents if "unreadable" not in content]
    if len(files) < len(paths):
        return MasksResult(str(output), len(done), 0, unreadable, generator.name)
    if not done:
        raise UserError(f"{folder}: not one picture could be read")
    instances = _join(done, output, generator.name)
    for path in files:
        path.unlink()
    pieces.rmdir()
    return MasksResult(str(output), len(done), instances, unreadable, generator.name)


def _piece(picture: np.ndarray, name: Path, generator: MaskGenerator, rle: bool) -> dict[str, Any]:
    height, width = picture.shape[:2]
    found = generator.masks(picture)
    area = found.masks.sum((1, 2))
    sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
    keep = (area > MIN_AREA) & (sides > MIN_SIDE).all(1) & (area < MAX_SHARE * width * height)
    rows: list[dict[str, Any]] = []
    kept = np.flatnonzero(keep)
    # The generator gives its best first; suppression keeps that order.
    for index in kept[suppress(found.boxes_xyxy[kept], -np.arange(len(kept), dtype=np.float32), MAX_OVERLAP)]:
        left, top, right, bottom = (float(edge) for edge in found.boxes_xyxy[index])
        row: dict[str, Any] = {"bbox": [left, top, right - left, bottom - top], "area": int(area[index])}
        if rle:
            row["segmentation"] = encode_mask(found.masks[index])
        rows.append(row)
    return {"file_name": name.as_posix(), "width": width, "height": height, "rows": rows}


def _join(pieces: Sequence[dict[str, Any]], output: Path, generator: str) -> int:
    pictures: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces, start=1):
        pictures.append({"id": number, **{key: piece[key] for key in ("file_name", "width", "height")}})
        for row in piece["rows"]:
            rows.append({"id": len(rows) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, **row})
    write_json(
        output,
        {
            "info": {"description": f"segments by {generator}"},
            "images": pictures,
            "annotations": rows,
            "categories": [{"id": 1, "name": "object"}],
        },
    )
    return len(rows)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H x W bool) as COCO's compressed runs."""
    from pycocotools import mask as runs

    encoded = runs.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def decode_mask(encoded: dict[str, Any]) -> np.ndarray:
    """The inverse of `encode_mask`: H x W bool."""
    from pycocotools import mask as runs

    counts = encoded["counts"]
    return runs.decode({"size": encoded["size"], "counts": counts.encode() if isinstance(counts, str) else counts}) > 0
