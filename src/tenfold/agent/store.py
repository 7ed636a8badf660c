"""The documents of a local index in one SQLite file: their texts, their passages, and which files they came from."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tenfold.agent.passages import split_spans
from tenfold.core.console import UserError

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, read INTEGER, complete INTEGER, problem TEXT);
CREATE TABLE IF NOT EXISTS documents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT, url TEXT, title TEXT, text TEXT, date TEXT, sha256 TEXT,
  indexed_at TEXT, in_words INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS passages (
  id INTEGER PRIMARY KEY AUTOINCREMENT, document INTEGER, start INTEGER, end INTEGER);
CREATE TABLE IF NOT EXISTS removed (document INTEGER PRIMARY KEY);
CREATE INDEX IF NOT EXISTS documents_of_file ON documents (file);
CREATE INDEX IF NOT EXISTS documents_by_url ON documents (url);
CREATE INDEX IF NOT EXISTS documents_not_in_words ON documents (id) WHERE in_words = 0;
CREATE INDEX IF NOT EXISTS passages_of_document ON passages (document);
"""


@dataclass(frozen=True)
class Stored:
    """A document of the index: `spans` are its passages in characters of `text`, numbered by `numbers`."""

    id: int
    url: str
    title: str
    text: str
    date: str | None
    sha256: str
    indexed_at: str
    spans: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class FileState:
    """What is known of a file that was read: how many documents of it, whether to its end, and what was wrong."""

    size: int
    mtime_ns: int
    read: int
    complete: bool
    problem: str | None


class Store:
    """The SQLite file of an index. Raises UserError where it is damaged or of another version."""

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        try:
            # Read-only readers of one process may live in several threads; they share nothing that changes.
            where = path.resolve().as_uri() + ("" if writable else "?mode=ro")
            self._database = sqlite3.connect(where, uri=True, timeout=5, check_same_thread=False)
            if writable:
                # A killed build loses at most its last batch and never leaves a half-written one.
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=NORMAL")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise UserError(
                    f"{path}: written by another version of tenfold: delete the folder and run `tenfold agent index`"
                )
            if writable:
                self._database.executescript(_SCHEMA)
                self._database.execute(f"PRAGMA user_version={VERSION}")
            self._database.execute("SELECT count(*) FROM files").fetchone()
        except sqlite3.Error as error:
            raise UserError(
                f"{path}: cannot be opened ({error}): delete the folder and run `tenfold agent index` again"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def commit(self) -> None:
        """Make all changes since the last commit lasting, in one step."""
        self._database.commit()

    def files(self) -> dict[str, FileState]:
        """All files that were read."""
        rows = self._database.execute("SELECT path, size, mtime_ns, read, complete, problem FROM files")
        return {
            path: FileState(size, mtime, read, bool(done), problem) for path, size, mtime, read, done, problem in rows
        }

    def set_file(self, path: str, state: FileState) -> None:
        """Remember how far a file has been read."""
        self._database.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
            (path, state.size, state.mtime_ns, state.read, int(state.complete), state.problem),
        )

    def forget_file(self, path: str) -> None:
        """Remove a file and its documents; the words follow when `removed` is worked off."""
        run = self._database.execute
        run("INSERT OR IGNORE INTO removed SELECT id FROM documents WHERE file = ?", (path,))
        run("DELETE FROM passages WHERE document IN (SELECT id FROM documents WHERE file = ?)", (path,))
        run("DELETE FROM documents WHERE file = ?", (path,))
        run("DELETE FROM files WHERE path = ?", (path,))

    def add(self, file: str, url: str, title: str, text: str, date: str | None, indexed_at: str) -> None:
        """Add one document and cut it into passages."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        row = self._database.execute(
            "INSERT INTO documents (file, url, title, text, date, sha256, indexed_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (file, url, title, text, date, digest, indexed_at),
        )
        self._database.executemany(
            "INSERT INTO passages (document, start, end) VALUES (?, ?, ?)",
            [(row.lastrowid, start, end) for start, end in split_spans(text)],
        )

    def without_words(self) -> Iterator[Stored]:
        """Documents that the word index does not hold yet."""
        numbers = [row[0] for row in self._database.execute("SELECT id FROM documents WHERE in_words = 0")]
        return (self.document(number) for number in numbers)

    def all(self) -> Iterator[Stored]:
        """Every document, by its number."""
        numbers = [row[0] for row in self._database.execute("SELECT id FROM documents ORDER BY id")]
        return (self.document(number) for number in numbers)

    def removed(self) -> list[int]:
        """Documents that are gone here and may still be in the word index."""
        return [row[0] for row in self._database.execute("SELECT document FROM removed")]

    def words_are_done(self, added: Iterable[int], removed: Iterable[int]) -> None:
        """Remember what the word index has taken in and given up."""
        self._database.executemany("UPDATE documents SET in_words = 1 WHERE id = ?", [(n,) for n in added])
        self._database.executemany("DELETE FROM removed WHERE document = ?", [(n,) for n in removed])

    def words_are_lost(self) -> None:
        """The word index is empty: every document has to go in again."""
        self._database.execute("UPDATE documents SET in_words = 0")

    def document(self, number: int) -> Stored:
        """A document by its number; KeyError where there is none."""
        row = self._database.execute(
            "SELECT id, url, title, text, date, sha256, indexed_at FROM documents WHERE id = ?", (number,)
        ).fetchone()
        if row is None:
            raise KeyError(number)
        spans = self._database.execute(
            "SELECT id, start, end FROM passages WHERE document = ? ORDER BY start", (number,)
        ).fetchall()
        identifier, url, title, text, date, digest, indexed_at = row
        where, numbers = tuple((start, end) for _, start, end in spans), tuple(item[0] for item in spans)
        return Stored(identifier, url, title, text, date, digest, indexed_at, where, numbers)

    def by_url(self, url: str) -> Stored | None:
        """A document by its address."""
        row = self._database.execute("SELECT id FROM documents WHERE url = ? ORDER BY id", (url,)).fetchone()
        return None if row is None else self.document(row[0])

    def document_of(self, passage: int) -> int | None:
        """The document that a passage belongs to."""
        row = self._database.execute("SELECT document FROM passages WHERE id = ?", (passage,)).fetchone()
        return None if row is None else row[0]

    def passages(self) -> Iterator[tuple[int, str]]:
        """Number and text of every passage, each headed by its document's title."""
        rows = self._database.execute(
            "SELECT passages.id, title, substr(text, start + 1, end - start) FROM passages "
            "JOIN documents ON documents.id = document ORDER BY passages.id"
        )
        return ((number, f"{title}\n{text}") for number, title, text in rows)

    def counts(self) -> tuple[int, int]:
        """Number of documents and of passages."""
        run = self._database.execute
        return run("SELECT count(*) FROM documents").fetchone()[0], run("SELECT count(*) FROM passages").fetchone()[0]
