"""Boxes over time as one table: what every reader returns and every writer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenfold.core.console import UserError


@dataclass(frozen=True, eq=False)
class BoxTable:
    """Boxes of one video, sorted by frame; the order within a frame is the file's.

    Attributes:
        frames: N int64, numbers from 0.
        ids: N int64; -1 for boxes without identity.
        boxes_xyxy: N x 4 float64, pixels, edges at whole numbers.
        scores: N float32.
        labels: N int64, indices into `class_names`.
        class_names: what the labels mean.
        ignored: N bool: regions to be left out of evaluation.
        annotated_frames: frames that somebody looked at (one without boxes is empty, one that is not listed is
            unknown); None: all.
    """

    frames: np.ndarray
    ids: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    ignored: np.ndarray
    annotated_frames: frozenset[int] | None

    @staticmethod
    def of(
        frames: Sequence[int] | np.ndarray,
        ids: Sequence[int] | np.ndarray,
        boxes_xyxy: Sequence[Sequence[float]] | np.ndarray,
        scores: Sequence[float] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: Sequence[str] = ("object",),
        ignored: Sequence[bool] | np.ndarray | None = None,
        annotated_frames: frozenset[int] | None = None,
    ) -> BoxTable:
        """A table from columns in any order of frames; see the attributes."""
        frames = np.asarray(frames, np.int64).reshape(-1)
        order = np.argsort(frames, kind="stable")
        count = len(frames)
        labels = np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)
        ignored = np.zeros(count, bool) if ignored is None else np.asarray(ignored, bool)
        return BoxTable(
            frames[order],
            np.asarray(ids, np.int64).reshape(-1)[order],
            np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)[order],
            np.asarray(scores, np.float32).reshape(-1)[order],
            labels[order],
            tuple(class_names),
            ignored[order],
            annotated_frames,
        )

    def __len__(self) -> int:
        return len(self.frames)

    def rows(self, frame: int) -> slice:
        """The rows of one frame."""
        first, last = np.searchsorted(self.frames, [frame, frame + 1])
        return slice(int(first), int(last))

    @property
    def last_frame(self) -> int:
        """Number of the last frame that has a box; -1 without boxes."""
        return int(self.frames[-1]) if len(self.frames) else -1

    def select(self, which: np.ndarray) -> BoxTable:
        """The rows that a boolean mask picks."""
        return BoxTable(
            self.frames[which],
            self.ids[which],
            self.boxes_xyxy[which],
            self.scores[which],
            self.labels[which],
            self.class_names,
            self.ignored[which],
            self.annotated_frames,
        )


def read_rows(path: Path, least: int, separator: str | None) -> list[tuple[int, list[str]]]:
    """The lines of a text file of boxes, cut into fields, with their numbers.

    Raises:
        UserError: no such file, not text, or a line with fewer fields than `least`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            fields = [field.strip() for field in line.split(separator)]
            if len(fields) < least:
                raise UserError(f"{path}, line {number}: {len(fields)} fields where at least {least} are needed")
            rows.append((number, fields))
    return rows


def number_of(path: Path, line: int, field: str) -> float:
    """A field as a number. Raises UserError that names the place."""
    try:
        return float(field)
    except ValueError:
        raise UserError(f"{path}, line {line}: {field!r} is not a number") from None
