"""TAO and other COCO-style video annotations: `videos`, `images`, `annotations` with `track_id`, `categories`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.core.files import read_json, write_json
from tenfold.tracking.data.table import BoxTable


def read(path: Path | str) -> dict[str, BoxTable]:
    """Read a file; a table for each video, by name. Only frames that are listed count as annotated.

    Raises:
        UserError: no such file, not json, or not this layout.
    """
    path = Path(path)
    content = read_json(path)
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list):
            raise UserError(f"{path}: has no list `{part}`, so it is no COCO-style video file")
    try:
        categories = sorted(content["categories"], key=lambda row: int(row["id"]))
        names = tuple(str(row["name"]) for row in categories)
        label_of = {row["id"]: index for index, row in enumerate(categories)}
        videos = {row["id"]: str(row.get("name", row["id"])) for row in content.get("videos", ())}
        place: dict[Any, tuple[str, int]] = {}
        for image in content["images"]:
            video = videos.get(image.get("video_id"), str(image.get("video_id", "")))
            number = next((image[key] for key in ("frame_index", "frame_id") if key in image), None)
            place[image["id"]] = (video, int(number if number is not None else image["id"]))
        rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        listed: dict[str, set[int]] = {}
        for video, frame in place.values():
            rows.setdefault(video, [])
            listed.setdefault(video, set()).add(frame)
        for annotation in content["annotations"]:
            video, frame = place[annotation["image_id"]]
            rows[video].append((frame, annotation))
        return {
            video: BoxTable.of(
                [frame for frame, _ in found],
                [int(row.get("track_id", row.get("instance_id", -1))) for _, row in found],
                [_xyxy(row["bbox"]) for _, row in found],
                [float(row.get("score", 1.0)) for _, row in found],
                [label_of[row["category_id"]] for _, row in found],
                names,
                [bool(row.get("iscrowd", 0) or row.get("ignore", 0)) for _, row in found],
                frozenset(listed[video]),
            )
            for video, found in rows.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a COCO-style video file ({type(error).__name__}: {error})") from None


def _xyxy(box: list[float]) -> list[float]:
    left, top, width, height = map(float, box)
    return [left, top, left + width, top + height]


def write(path: Path | str, tables: dict[str, BoxTable], frames: dict[str, int]) -> None:
    """Write results as one file; arguments as `scalabel.write`. Identities are unique over the whole file."""
    names = tuple(dict.fromkeys(name for table in tables.values() for name in table.class_names))
    videos: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    first_track = 1
    for number, (video, table) in enumerate(tables.items(), start=1):
        videos.append({"id": number, "name": video})
        count = max(frames.get(video, 0), table.last_frame + 1)
        start = len(images) + 1
        images += [
            {"id": start + frame, "video_id": number, "frame_index": frame, "file_name": f"{video}/{frame:06d}.jpg"}
            for frame in range(count)
        ]
        for index in range(len(table)):
            left, top, right, bottom = (float(edge) for edge in np.round(table.boxes_xyxy[index].astype(float), 3))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": start + int(table.frames[index]),
                    "video_id": number,
                    "track_id": first_track + int(table.ids[index]),
                    "category_id": names.index(table.class_names[int(table.labels[index])]) + 1,
                    "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)],
                    "area": round((right - left) * (bottom - top), 3),
                    "score": round(float(table.scores[index]), 5),
                }
            )
        first_track += int(table.ids.max(initial=-1)) + 1
    categories = [{"id": index, "name": name} for index, name in enumerate(names, start=1)]
    write_json(path, {"videos": videos, "images": images, "annotations": annotations, "categories": categories})
