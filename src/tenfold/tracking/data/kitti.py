"""KITTI tracking labels: `frame id type truncated occluded alpha x1 y1 x2 y2 h w l x y z ry [score]`, from 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tenfold.core.console import UserError
from tenfold.core.files import write_bytes
from tenfold.tracking.data.table import BoxTable, number_of, read_rows

CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person", "Cyclist", "Tram", "Misc", "DontCare")
_OTHER_NAMES = {"Person_sitting": "Person"}
_NO_SPACE = "-1 -1 -10 {} {} {} {} -1 -1 -1 -1000 -1000 -1000 -10"  # what the benchmark wants where 3D is unknown


def read(path: Path | str) -> BoxTable:
    """Read a label or result file; `DontCare` rows are marked as ignored.

    Raises:
        UserError: no such file, a line with too few fields, or an unknown type.
    """
    path = Path(path)
    frames, ids, boxes, scores, labels = [], [], [], [], []
    for line, fields in read_rows(path, 17, None):
        name = _OTHER_NAMES.get(fields[2], fields[2])
        if name not in CLASSES:
            raise UserError(f"{path}, line {line}: unknown type {fields[2]!r} (KITTI knows {', '.join(CLASSES)})")
        frames.append(int(number_of(path, line, fields[0])))
        ids.append(int(number_of(path, line, fields[1])))
        boxes.append([number_of(path, line, field) for field in fields[6:10]])
        scores.append(number_of(path, line, fields[17]) if len(fields) > 17 else 1.0)
        labels.append(CLASSES.index(name))
    ignored = np.array([CLASSES[label] == "DontCare" for label in labels], bool)
    return BoxTable.of(frames, ids, boxes, scores, labels, CLASSES, ignored)


def write(path: Path | str, table: BoxTable) -> None:
    """Write a result. A class that KITTI does not know becomes `Misc`."""
    lines = []
    known = {name.lower(): name for name in CLASSES} | {"person": "Pedestrian", "bicycle": "Cyclist"}
    for index in range(len(table)):
        name = known.get(table.class_names[int(table.labels[index])].lower(), "Misc")
        box = [f"{edge:.2f}" for edge in table.boxes_xyxy[index]]
        space = _NO_SPACE.format(*box)
        lines.append(f"{table.frames[index]} {table.ids[index]} {name} {space} {table.scores[index]:.4f}\n")
    write_bytes(path, "".join(lines).encode())
