"""One door to the five formats: the content of a file tells which it is."""

from __future__ import annotations

from pathlib import Path

from tenfold.core.console import UserError
from tenfold.tracking.data import coco_video, kitti, motchallenge, scalabel
from tenfold.tracking.data.table import BoxTable


def read(path: Path, truth: bool = False) -> BoxTable:
    """A file of boxes of one video.

    Args:
        path: MOTChallenge, DanceTrack, KITTI, BDD100K or COCO-video.
        truth: see `motchallenge.read`; the other formats say it themselves.

    Raises:
        UserError: no such file, an unknown format, or several videos in one file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() != ".json":
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
        return motchallenge.read(path, truth) if "," in first or not first else kitti.read(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    is_coco = '"annotations"' in text or '"videos"' in text
    tables = coco_video.read(path) if is_coco else scalabel.read(path)
    if len(tables) != 1:
        raise UserError(f"{path}: holds {len(tables)} videos ({', '.join(list(tables)[:3])} ...): give a file with one")
    return next(iter(tables.values()))
