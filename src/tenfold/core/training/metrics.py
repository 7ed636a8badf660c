"""What a run reports: means since the last row, and the rows of `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from tenfold.core.console import to_jsonable
from tenfold.core.files import disk_error, write_bytes


class Averages:
    """Sums of what is reported, until the next row is written. Tensors are summed on their device, without waiting."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Take one set of values in."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name, as plain numbers."""
        return {name: (float(total), self.counts[name]) for name, total in self.sums.items()}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Replace everything by `state`; `restore({})` starts anew."""
        self.sums = {name: total for name, (total, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}


def merge(states: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """The means over several processes' sums and counts."""
    names = dict.fromkeys(name for state in states for name in state)
    return {
        name: sum(state[name][0] for state in states if name in state)
        / sum(state[name][1] for state in states if name in state)
        for name in names
    }


class MetricsFile:
    """Appends rows to a JSON-lines file, each complete on the disk when `write` returns.

    Args:
        path: of the file.
        step: the step to go on from: rows beyond it, which a killed run left behind, are dropped, as is a torn last
            line.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.last: dict[str, Any] = {}
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= step:
                kept.append(line)
                self.last |= row
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
        try:
            self.file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise disk_error(path, error) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Raises UserError where the disk refuses."""
        self.last |= row
        try:
            self.file.write(json.dumps(to_jsonable(row), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self.file.close()
