"""What was searched and read before, in one SQLite file, so that a second run asks nobody.

Keys are the engine's name and the query, or the address of a page. Keys and passwords of services are no part of
either: an engine sends them in headers, and its name holds none.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.agent.search import Page, Result
from tenfold.core.console import UserError
from tenfold.core.files import make_folder


class Cache:
    """A cache in a file.

    Args:
        path: the file; it is made where there is none.
        longest_age_s: entries that are older are not used; None uses them for ever, which keeps a rerun the same.
    """

    def __init__(self, path: Path | str, longest_age_s: float | None = None) -> None:
        self.path = Path(path)
        self._longest_age_s = longest_age_s
        self._lock = threading.Lock()
        make_folder(self.path.parent)
        try:
            self._database = sqlite3.connect(self.path, timeout=30, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS entries (kind TEXT, key TEXT, stored REAL, content TEXT, "
                "PRIMARY KEY (kind, key))"
            )
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: not a usable cache ({error}): delete it") from None

    def results(self, engine: str, query: str, count: int) -> list[Result] | None:
        """What an engine answered to a normalised query; None where it was not asked."""
        found = self.get("search", _key(engine, query, count))
        return None if found is None else [Result(**{**row, "passages": tuple(row["passages"])}) for row in found]

    def store_results(self, engine: str, query: str, count: int, results: Sequence[Result]) -> None:
        """Remember an answer, an empty one too."""
        self.put("search", _key(engine, query, count), [dataclasses.asdict(result) for result in results])

    def page(self, url: str) -> Page | None:
        """A page that was read before."""
        found = self.get("page", url)
        return None if found is None else Page(**found)

    def store_page(self, url: str, page: Page) -> None:
        """Remember a page under the address that it was asked for by."""
        self.put("page", url, dataclasses.asdict(page))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def get(self, kind: str, key: str) -> Any:
        """What was stored, such as a judge's verdict; None where nothing was."""
        oldest = 0.0 if self._longest_age_s is None else time.time() - self._longest_age_s
        with self._lock:
            row = self._database.execute(
                "SELECT content FROM entries WHERE kind = ? AND key = ? AND stored >= ?", (kind, key, oldest)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, kind: str, key: str, value: object) -> None:
        """Store a value that JSON can hold."""
        content = json.dumps(value, ensure_ascii=True, allow_nan=False)
        try:
            with self._lock:
                self._database.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", (kind, key, time.time(), content)
                )
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error})") from None


def _key(engine: str, query: str, count: int) -> str:
    return json.dumps([engine, query, count])
