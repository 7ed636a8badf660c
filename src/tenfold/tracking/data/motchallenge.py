"""MOTChallenge and DanceTrack: text files of boxes, and the folder of a sequence with its `seqinfo.ini`.

Frames and pixels are counted from 1 in these files and from 0 here. A row is `frame, id, left, top, width, height,
confidence, class, visibility` in ground truth since MOT16, and ends in world coordinates x, y, z in MOT15, detections
and results, which then stand where the class would be.
"""

from __future__ import annotations

import configparser
import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TextIO

import numpy as np

from tenfold.core.console import UserError
from tenfold.core.files import write_bytes
from tenfold.tracking.data.table import BoxTable, number_of, read_rows

CLASSES = (
    "unknown",
    "pedestrian",
    "person on vehicle",
    "car",
    "bicycle",
    "motorbike",
    "non-motorised vehicle",
    "static person",
    "distractor",
    "occluder",
    "occluder on ground",
    "occluder full",
    "reflection",
    "crowd",
)


@dataclass(frozen=True)
class Sequence:
    """A sequence's folder: its pictures in order, frames a second, and (width, height)."""

    name: str
    frames: tuple[Path, ...]
    fps: Fraction
    size: tuple[int, int]


def read(path: Path | str, truth: bool = False) -> BoxTable:
    """Read a text file of MOTChallenge or DanceTrack.

    Args:
        path: `gt.txt`, `det.txt` or a result.
        truth: the file is ground truth with a class column (9 fields): confidence 0 then marks rows to be ignored, and
            labels index `CLASSES`.

    Raises:
        UserError: no such file, a line with too few fields or something that is not a number.
    """
    path = Path(path)
    rows = read_rows(path, 6, ",")
    values = np.full((len(rows), 9), np.nan)
    for index, (line, fields) in enumerate(rows):
        for column, field in enumerate(fields[:9]):
            values[index, column] = number_of(path, line, field)
    if len(values) and not (values[:, 0] >= 1).all():
        raise UserError(f"{path}, line {rows[int(np.argmax(~(values[:, 0] >= 1)))][0]}: frames are counted from 1")
    with_class = truth and bool(len(rows)) and all(len(fields) == 9 for _, fields in rows)
    boxes = np.concatenate((values[:, 2:4] - 1, values[:, 2:4] - 1 + values[:, 4:6]), axis=1)
    scores = np.nan_to_num(values[:, 6], nan=1.0)
    labels = np.zeros(len(rows), np.int64)
    if with_class:
        labels = values[:, 7].astype(np.int64)
        if labels.size and not (labels.min() >= 0 and labels.max() < len(CLASSES)):
            raise UserError(f"{path}: holds a class outside of 0..{len(CLASSES) - 1}")
    return BoxTable.of(
        values[:, 0].astype(np.int64) - 1,
        values[:, 1].astype(np.int64),
        boxes,
        np.ones(len(rows)) if truth else scores,
        labels,
        CLASSES if with_class else ("object",),
        ignored=scores == 0 if truth else None,
    )


def row(frame: int, identity: int, box: np.ndarray, score: float) -> str:
    """One line of a result, without its end; `frame` and `identity` are counted from 0 here, from 1 in the file."""
    left, top, right, bottom = (float(edge) for edge in box)
    sides = f"{left + 1:.3f},{top + 1:.3f},{right - left:.3f},{bottom - top:.3f}"
    return f"{frame + 1},{identity + 1},{sides},{score:.4f},-1,-1,-1"


def write(path: Path | str, table: BoxTable) -> None:
    """Write a result; identities are counted from 1 there."""
    text = io.StringIO()
    write_rows(text, zip(table.frames, table.ids, table.boxes_xyxy, table.scores, strict=True))
    write_bytes(path, text.getvalue().encode())


def write_rows(file: TextIO, rows: Iterable[tuple[int, int, np.ndarray, float]]) -> None:
    """Append (frame, identity, box, score) to an open result."""
    for frame, identity, box, score in rows:
        file.write(row(int(frame), int(identity), box, float(score)) + "\n")


def read_sequence(folder: Path | str) -> Sequence:
    """The pictures of a sequence by its `seqinfo.ini`.

    Raises:
        UserError: no such file, a field that is missing or wrong, or fewer pictures than it says.
    """
    folder = Path(folder)
    path = folder / "seqinfo.ini"
    if not path.is_file():
        raise UserError(f"{folder}: no seqinfo.ini there, so it is no MOTChallenge sequence")
    parser = configparser.ConfigParser()
    try:
        parser.read(path, encoding="utf-8")
        section = parser["Sequence"]
        length = section.getint("seqLength")
        frames = sorted((folder / section.get("imDir", "img1")).glob(f"*{section.get('imExt', '.jpg')}"))
        size = section.getint("imWidth"), section.getint("imHeight")
        fps = Fraction(section.get("frameRate", "30"))
        name = section.get("name", folder.name)
    except (configparser.Error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a MOTChallenge description ({type(error).__name__}: {error})") from None
    if not length or len(frames) < length or not all(size):
        raise UserError(f"{path}: says {length} frames of {size[0]}x{size[1]}, and {len(frames)} pictures are there")
    return Sequence(name, tuple(frames[:length]), fps, (int(size[0] or 0), int(size[1] or 0)))
