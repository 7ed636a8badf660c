"""Words to passages by BM25: tantivy's index on disk or in memory, with a split of words that also serves Chinese."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tenfold.core.console import UserError
from tenfold.core.files import make_folder

# Han, kana and Hangul are written without spaces: they are indexed as overlapping pairs.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af]+")
_NOT_WORDS = re.compile(r"[\W_]+")
# The title of a page says what it is about: in the shared corpus a weight of 2 finds the page of a title that is named
# in the question more often than 1 does; more than 3 lets a single title word win over a whole matching text.
TITLE_WEIGHT = 2.0
_MEMORY_BYTES = 50_000_000
_LONGEST_QUERY_WORDS = 64


def words(text: str) -> str:
    """Text as the index takes it: runs of Han, kana or Hangul as overlapping pairs between spaces."""
    return _UNSPACED.sub(_pairs, text)


def _pairs(found: re.Match[str]) -> str:
    run = found[0]
    pairs = [run] if len(run) < 3 else [run[start : start + 2] for start in range(len(run) - 1)]
    return f" {' '.join(pairs)} "


class Lexical:
    """A BM25 index of numbered passages, each of which belongs to a numbered document.

    Args:
        folder: where the index lives; None keeps it in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        import tantivy

        self._folder = folder
        schema = tantivy.SchemaBuilder()
        # Signed: tantivy 0.27 removes nothing, and says nothing, when asked to by the value of an unsigned field.
        schema.add_integer_field("passage", fast=True)
        schema.add_integer_field("document", indexed=True, fast=True)
        schema.add_text_field("title", tokenizer_name="words", index_option="freq")
        schema.add_text_field("body", tokenizer_name="words", index_option="freq")
        try:
            if folder is not None:
                make_folder(folder)
            self._index = tantivy.Index(schema.build(), path=None if folder is None else str(folder))
        except (ValueError, OSError) as error:
            raise UserError(
                f"{folder}: the word index is damaged ({_first_line(error)}): delete the folder and run "
                "`tenfold agent index` again"
            ) from None
        analyzer = (
            tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
            .filter(tantivy.Filter.remove_long(80))
            .filter(tantivy.Filter.lowercase())
            .filter(tantivy.Filter.ascii_fold())
            .filter(tantivy.Filter.stemmer("english"))
            .build()
        )
        self._index.register_tokenizer("words", analyzer)
        self._writer: Any = None

    def __len__(self) -> int:
        return self._index.searcher().num_docs

    def open_writer(self) -> None:
        """Take the right to write, which one process at a time has. Raises UserError where another holds it."""
        if self._writer is not None:
            return
        try:
            self._writer = self._index.writer(heap_size=_MEMORY_BYTES, num_threads=1)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self._folder}: the index is being written by another process ({_first_line(error)}): wait for it"
            ) from None

    def add(self, passages: Iterable[tuple[int, int, str, str]]) -> None:
        """Add (passage, document, title, body); seen by `search` after `commit`."""
        import tantivy

        self.open_writer()
        for passage, document, title, body in passages:
            row = tantivy.Document()
            row.add_integer("passage", passage)
            row.add_integer("document", document)
            row.add_text("title", words(title))
            row.add_text("body", words(body))
            self._writer.add_document(row)

    def remove(self, documents: Iterable[int]) -> None:
        """Remove all passages of these documents; those that are not there are passed over."""
        self.open_writer()
        for document in documents:
            self._writer.delete_documents_by_term("document", document)

    def commit(self) -> None:
        """Make what was added and removed lasting and visible, in one step."""
        if self._writer is not None:
            self._writer.commit()
            self._index.reload()

    def close(self) -> None:
        """Give the right to write back, after merges in the background have ended."""
        if self._writer is not None:
            self._writer.wait_merging_threads()
            self._writer = None
            self._index.reload()

    def search(self, query: str, count: int) -> list[tuple[int, int, float]]:
        """The best passages for a query.

        Returns:
            (passage, document, BM25 score), best first; empty for a query without words.
        """
        # Lower case, so that AND, OR and NOT are words and not operators.
        terms = list(dict.fromkeys(_NOT_WORDS.sub(" ", words(query)).lower().split()))[:_LONGEST_QUERY_WORDS]
        if not terms:
            return []
        parsed, _ = self._index.parse_query_lenient(" ".join(terms), ["title", "body"], {"title": TITLE_WEIGHT})
        searcher = self._index.searcher()
        hits = searcher.search(parsed, count, count=False).hits
        addresses = [address for _, address in hits]
        passages = searcher.fast_field_values("passage", addresses)
        documents = searcher.fast_field_values("document", addresses)
        found = [
            (int(passage), int(document), float(score))
            for passage, document, (score, _) in zip(passages, documents, hits, strict=True)
            if passage is not None and document is not None
        ]
        # Equal scores in a fixed order, whatever the order in which segments were merged.
        return sorted(found, key=lambda hit: (-hit[2], hit[0]))


def rank_in_memory(query: str, title: str, bodies: Sequence[str]) -> list[int]:
    """The positions of a few texts by BM25 for a query, best first; texts that share no word with it are left out."""
    index = Lexical()
    index.add((position, position, title, body) for position, body in enumerate(bodies))
    index.commit()
    return [passage for passage, _, _ in index.search(query, len(bodies))] if bodies else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
