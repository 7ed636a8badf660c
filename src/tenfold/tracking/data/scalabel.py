"""BDD100K tracking in the Scalabel layout: a json list of frames with labels, for one video or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.core.files import write_json
from tenfold.tracking.data.table import BoxTable

CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def read(path: Path | str) -> dict[str, BoxTable]:
    """Read a file; a table for each video. Crowds, and classes outside of the eight, are marked as ignored.

    Raises:
        UserError: no such file, not json, or not this layout.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as json ({error})") from None
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list):
        raise UserError(f"{path}: expected a list of frames (Scalabel)")
    videos: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    seen: dict[str, set[int]] = {}
    try:
        for frame in frames:
            name = str(frame.get("videoName") or frame.get("video_name") or "")
            number = int(frame["frameIndex"] if "frameIndex" in frame else frame["index"])
            seen.setdefault(name, set()).add(number)
            videos.setdefault(name, []).extend((number, label) for label in frame.get("labels") or ())
        return {name: _table(rows, frozenset(seen[name])) for name, rows in videos.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the Scalabel layout ({type(error).__name__}: {error})") from None


def _table(rows: list[tuple[int, dict[str, Any]]], annotated: frozenset[int]) -> BoxTable:
    rows = [(number, label) for number, label in rows if label.get("box2d")]
    names = dict.fromkeys([*CLASSES, *(str(label["category"]) for _, label in rows)])
    class_names = tuple(names)
    identities = {text: index for index, text in enumerate(dict.fromkeys(str(label["id"]) for _, label in rows))}
    ignored = [
        str(label["category"]) not in CLASSES or bool((label.get("attributes") or {}).get("crowd")) for _, label in rows
    ]
    return BoxTable.of(
        [number for number, _ in rows],
        [identities[str(label["id"])] for _, label in rows],
        [[float(label["box2d"][edge]) for edge in ("x1", "y1", "x2", "y2")] for _, label in rows],
        [float(label.get("score", 1.0)) for _, label in rows],
        [class_names.index(str(label["category"])) for _, label in rows],
        class_names,
        ignored,
        annotated,
    )


def write(path: Path | str, tables: dict[str, BoxTable], frames: dict[str, int]) -> None:
    """Write results.

    Args:
        path: the .json file.
        tables: for each video.
        frames: number of frames of each video; frames without boxes are listed too.
    """
    content = []
    for video, table in tables.items():
        for frame in range(max(frames.get(video, 0), table.last_frame + 1)):
            rows = table.rows(frame)
            labels = [
                {
                    "id": str(int(identity)),
                    "category": table.class_names[int(label)],
                    "score": round(float(score), 5),
                    "box2d": dict(zip(("x1", "y1", "x2", "y2"), np.round(box.astype(float), 3).tolist(), strict=True)),
                }
                for identity, label, score, box in zip(
                    table.ids[rows], table.labels[rows], table.scores[rows], table.boxes_xyxy[rows], strict=True
                )
            ]
            content.append(
                {"name": f"{video}-{frame:07d}.jpg", "videoName": video, "frameIndex": frame, "labels": labels}
            )
    write_json(path, content)
