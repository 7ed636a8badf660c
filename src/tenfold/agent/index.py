"""A folder of documents made searchable: built in steps that can be interrupted, brought up to date, and asked."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.agent.data import SUFFIXES, read_documents
from tenfold.agent.dense import Dense, Embed
from tenfold.agent.lexical import Lexical
from tenfold.agent.passages import TOKENS_PER_RESULT, take_passages
from tenfold.agent.search import EmptyIndex, Page, Result, reciprocal_ranks
from tenfold.agent.store import FileState, Store, Stored
from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.files import check_writable, read_json, write_json

# Documents of one container between two commits: what a killed build may have to read again.
_BATCH_DOCUMENTS = 500
_BATCH_SECONDS = 1.0
_BATCH_WORDS = 20_000
# Passages looked at per wanted document: several may belong to the same one.
_DEPTH, _LEAST_DEPTH = 10, 40


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        folder: where the index is.
        documents: documents in the index now.
        passages: passages in the index now.
        read: files read in this run, new or changed.
        unchanged: files that were up to date.
        removed: files that are gone.
        passed_over: files in the folders that are of another kind.
        problems: file and reason for every file that could not be read.
        seconds: how long it took.
    """

    folder: str
    documents: int
    passages: int
    read: int
    unchanged: int
    removed: int
    passed_over: int
    problems: tuple[tuple[str, str], ...]
    seconds: float


class LocalIndex:
    """An index on disk. `build` makes it or brings it up to date, `load` opens it.

    Args:
        folder: where it is.
        embed: the embedding function that it was built with, if it was; None searches by words only.
    """

    def __init__(self, folder: Path, embed: Embed | None = None) -> None:
        self.folder = folder
        self._store = Store(folder / "documents.sqlite", writable=False)
        self._words = Lexical(folder / "words")
        self._dense = Dense(folder / "vectors.usearch", embed) if embed is not None else None

    @staticmethod
    def load(folder: Path | str, embed: Embed | None = None) -> LocalIndex:
        """Open an index.

        Raises:
            UserError: there is none, or it is damaged, or its first build never ended.
        """
        folder = Path(folder)
        if not (folder / "index.json").exists():
            unfinished = (folder / "documents.sqlite").exists()
            reason = "the build of this index did not end" if unfinished else "no index is here"
            raise UserError(f"{folder}: {reason}: run `tenfold agent index DOCUMENTS --output {folder}`")
        about = read_json(folder / "index.json")
        if embed is None and about.get("embedding"):
            from tenfold.agent.dense import sentence_embedder

            embed = sentence_embedder(about["embedding"])
        return LocalIndex(folder, embed)

    @staticmethod
    def build(
        paths: Sequence[Path | str],
        folder: Path | str,
        embed: Embed | None = None,
        embedding: str | None = None,
    ) -> BuildReport:
        """Read files and folders into an index, or bring an index up to date with them.

        Files that have not changed since the last run are not read again, and what a killed run had done is kept. Files
        that are gone from the given folders leave the index; documents from other paths stay.

        Args:
            paths: files and folders.
            folder: where the index is, or will be.
            embed: makes vectors of passages; None indexes words only.
            embedding: name of the model behind `embed`, so that `load` can find it again.

        Raises:
            UserError: nothing to read; a file named by itself cannot be read; the disk refuses; another build runs.
        """
        started = time.monotonic()
        folder = Path(folder)
        named, found, passed_over = _find_files([Path(path) for path in paths], folder)
        check_writable(folder)
        words = Lexical(folder / "words")
        words.open_writer()
        store = Store(folder / "documents.sqlite", writable=True)
        try:
            removed = _forget_vanished(store, paths, found)
            read, unchanged, problems = _read_files(store, found)
            _write_words(store, words)
            if embed is not None:
                Dense(folder / "vectors.usearch", embed).update(store.passages())
            documents, passages = store.counts()
        finally:
            words.close()
            store.close()
        for path, problem in problems:
            if path in named:
                raise UserError(problem)
        if documents == 0:
            raise UserError(
                problems[0][1] if problems else f"{', '.join(map(str, paths))}: no text was found in these files"
            )
        report = BuildReport(
            str(folder),
            documents,
            passages,
            read,
            unchanged,
            removed,
            passed_over,
            tuple(problems),
            time.monotonic() - started,
        )
        write_json(folder / "index.json", {"documents": documents, "passages": passages, "embedding": embedding})
        return report

    def __len__(self) -> int:
        """Number of documents."""
        return self._store.counts()[0]

    def search(self, query: str, count: int) -> list[Result]:
        """The documents whose passages fit a query best, best first, each once.

        By words (BM25), and by meaning where the index has vectors; the two ranks are fused.

        Args:
            query: words or a question.
            count: how many documents.

        Raises:
            EmptyIndex: there is no document.
        """
        depth = max(_LEAST_DEPTH, _DEPTH * count)
        hits = self._words.search(query, depth)
        if not hits and len(self._words) == 0:
            raise EmptyIndex("local", f"{self.folder} holds no document: run `tenfold agent index` on some")
        scores = {passage: score for passage, _, score in hits}
        owner = {passage: document for passage, document, _ in hits}
        if self._dense is not None:
            near = self._dense.search(query, depth)
            scores = reciprocal_ranks([[passage for passage, _, _ in hits], [number for number, _ in near]])
            for passage in scores:
                if passage not in owner and (number := self._store.document_of(passage)) is not None:
                    owner[passage] = number
        merits: dict[int, list[int]] = {}
        for passage in sorted(scores, key=lambda number: (-scores[number], number)):
            if passage in owner:
                merits.setdefault(owner[passage], []).append(passage)
        results: list[Result] = []
        for number, passages in merits.items():
            document = self._store.document(number)
            # The same page often lies in a documentation set twice.
            if all(document.sha256 != result.sha256 for result in results):
                results.append(_as_result(document, passages, scores[passages[0]]))
            if len(results) == count:
                break
        return results

    def documents(self) -> Iterator[Stored]:
        """Every document, in the order in which they were read."""
        return self._store.all()

    def page(self, url: str) -> Page:
        """A whole document by its address. Raises UserError where the index has none of that address."""
        document = self._store.by_url(url)
        if document is None:
            raise UserError(f"{url}: not in the index {self.folder}: only pages that a search found can be opened")
        return Page(
            url=document.url,
            title=document.title,
            text=document.text,
            date=document.date,
            sha256=document.sha256,
            fetched_at=document.indexed_at,
            content_type="text/plain",
            bytes=len(document.text.encode("utf-8", "surrogatepass")),
        )


def _as_result(document: Stored, passages: Sequence[int], score: float) -> Result:
    positions = {number: position for position, number in enumerate(document.numbers)}
    order = [positions[passage] for passage in passages]
    # The start of a page says what it is about: it fills what the passages that were found leave over.
    order += [position for position in range(min(3, len(document.spans))) if position not in order]
    return Result(
        url=document.url,
        title=document.title,
        text=document.text,
        date=document.date,
        score=score,
        passages=take_passages(document.text, document.spans, order, TOKENS_PER_RESULT),
        engine="local",
        sha256=document.sha256,
        fetched_at=document.indexed_at,
    )


def _find_files(paths: Sequence[Path], index: Path) -> tuple[set[str], list[Path], int]:
    """Files that were named by themselves, all files to read in a fixed order, and how many are of another kind."""
    named: set[str] = set()
    files: dict[str, Path] = {}
    passed_over = 0
    own = index.resolve()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file():
            named.add(str(path.resolve()))
            files[str(path.resolve())] = path.resolve()
            continue
        for file in sorted(path.resolve().rglob("*")):
            if not file.is_file() or own in file.parents or any(part.startswith(".") for part in file.parts[-1:]):
                continue
            if file.name.lower().endswith(SUFFIXES):
                # A page that is linked into a second place is one page.
                real = file.resolve()
                files.setdefault(str(real), real)
            else:
                passed_over += 1
    if not files:
        kinds = ", ".join(SUFFIXES)
        raise UserError(f"{', '.join(map(str, paths)) or 'no path'}: holds no document (looked for {kinds})")
    return named, list(files.values()), passed_over


def _forget_vanished(store: Store, paths: Sequence[Path | str], found: Iterable[Path]) -> int:
    """Take files out of the store that are under the given folders no more."""
    present = {str(path) for path in found}
    roots = [Path(path).resolve() for path in paths if Path(path).is_dir()]
    vanished = [
        path
        for path in store.files()
        if path not in present and (any(root in Path(path).parents for root in roots) or not Path(path).exists())
    ]
    for path in vanished:
        store.forget_file(path)
    store.commit()
    return len(vanished)


def _read_files(store: Store, files: Sequence[Path]) -> tuple[int, int, list[tuple[str, str]]]:
    """Bring the store up to date with the files: how many were read, how many were up to date, what went wrong."""
    known = store.files()
    read = unchanged = 0
    problems: list[tuple[str, str]] = []
    committed = time.monotonic()
    with console.progress("reading", total=len(files)) as bar:
        for path in files:
            name = str(path)
            status = path.stat()
            state = known.get(name)
            if state is not None and (state.size, state.mtime_ns) != (status.st_size, status.st_mtime_ns):
                store.forget_file(name)
                state = None
            if state is not None and state.complete:
                unchanged += 1
                problem = state.problem
            else:
                read += 1
                problem = _read_file(store, path, FileState(status.st_size, status.st_mtime_ns, 0, False, None), state)
            if problem:
                problems.append((name, problem))
            if time.monotonic() - committed > _BATCH_SECONDS:
                store.commit()
                committed = time.monotonic()
            bar.advance(note=path.name[:40])
    store.commit()
    return read, unchanged, problems


def _read_file(store: Store, path: Path, fresh: FileState, state: FileState | None) -> str | None:
    """Read the documents of one file that the store does not have yet; the reason where that fails."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    done = state.read if state is not None else 0
    problem = None
    count = 0
    try:
        for count, document in enumerate(read_documents(path), start=1):
            if count <= done:
                continue
            store.add(str(path), document.url, document.title, document.text, document.date, now)
            if count % _BATCH_DOCUMENTS == 0:
                store.set_file(str(path), FileState(fresh.size, fresh.mtime_ns, count, False, None))
                store.commit()
    except UserError as error:
        problem = str(error)
    store.set_file(str(path), FileState(fresh.size, fresh.mtime_ns, max(count, done), True, problem))
    return problem


def _write_words(store: Store, words: Lexical) -> None:
    """Bring the word index up to date with the store.

    The word index is committed first: should the process end before the store remembers it, the next run removes and
    adds the same documents again, which changes nothing.
    """
    if len(words) == 0:
        store.words_are_lost()
        store.commit()
    removed = store.removed()
    added = []
    with console.progress("indexing words", total=None) as bar:
        words.remove(removed)
        for document in store.without_words():
            words.remove([document.id])
            words.add(
                (number, document.id, document.title, document.text[start:end])
                for number, (start, end) in zip(document.numbers, document.spans, strict=True)
            )
            added.append(document.id)
            bar.advance()
            if len(added) % _BATCH_WORDS == 0:
                words.commit()
                store.words_are_done(added[-_BATCH_WORDS:], removed)
                store.commit()
    if removed or added:
        words.commit()
        store.words_are_done(added, removed)
        store.commit()
