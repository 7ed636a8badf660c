"""A file of JSON lines that a stage writes, is killed over, and goes on with."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tenfold.agent.data import cut_last_line, json_line, read_rows
from tenfold.core.console import UserError
from tenfold.core.files import make_folder, read_json, write_bytes, write_json


class Lines:
    """The file of a stage.

    Args:
        folder: of the puzzles.
        name: of the file, without its ending.
        about: what the stage was asked to do; another run may go on with the file only if that is the same.
        key: what tells lines apart.

    Raises:
        UserError: the file was made with other arguments, or is no file of this stage.
    """

    def __init__(self, folder: Path, name: str, about: dict[str, Any], key: Callable[[dict[str, Any]], str]) -> None:
        make_folder(folder)
        self.path, self._run = folder / f"{name}.jsonl", folder / f"{name}.run.json"
        self._key, self._about = key, json.loads(json.dumps(about))
        known = read_json(self._run) if self._run.exists() else None
        if known is not None and known["about"] != self._about:
            changed = [item for item in self._about if known["about"].get(item) != self._about[item]]
            raise UserError(
                f"{self.path}: was made with another {', '.join(changed)}: choose another folder, or delete this "
                f"file and {self._run.name}"
            )
        if known is None and self.path.exists():
            raise UserError(f"{self.path}: nothing says how this file was made: choose another folder, or delete it")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.created: str = known["created"] if known is not None else today
        self.complete: bool = known is not None and known["complete"]
        self._write_run(self.complete)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            cut_last_line(self.path)
            self.rows = {key(row): row for _, row in read_rows(self.path)}
        self._file = self.path.open("ab")

    def _write_run(self, complete: bool) -> None:
        write_json(self._run, {"about": self._about, "created": self.created, "complete": complete})

    def add(self, row: dict[str, Any]) -> None:
        """Write a line, unless it is there."""
        name = self._key(row)
        if name not in self.rows:
            self.rows[name] = row
            self._file.write(json_line(row))
            self._file.flush()

    def finish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put the file in its final order, and say that it is whole."""
        self.close()
        write_bytes(self.path, b"".join(map(json_line, rows)))
        self._write_run(True)
        self.complete = True

    def close(self) -> None:
        """Close the file; what is in it stays."""
        self._file.close()


def read_stage(folder: Path, name: str, verb: str) -> list[dict[str, Any]]:
    """The lines of a stage that has ended.

    Raises:
        UserError: it has not been run, or was stopped.
    """
    run = folder / f"{name}.run.json"
    if not run.exists() or not read_json(run)["complete"]:
        state = "has not been run" if not run.exists() else "was stopped"
        raise UserError(f"{folder}: the stage {verb} {state}: run `tenfold agent webpuzzle {verb} {folder}`")
    return [row for _, row in read_rows(folder / f"{name}.jsonl")]


def digest(folder: Path, name: str) -> str:
    """What identifies the content of a stage's file."""
    return hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
