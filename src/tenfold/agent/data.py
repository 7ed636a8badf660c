"""What is read from disk: documents of many kinds, one after another, and sets of questions."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tenfold.agent.extract import clean, extract
from tenfold.core.console import UserError
from tenfold.core.files import write_bytes

_PAGES = (".html", ".htm", ".xhtml", ".md", ".markdown", ".txt", ".rst", ".pdf")
_CONTAINERS = (".zim", ".jsonl", ".jsonl.gz")
SUFFIXES = (*_PAGES, *_CONTAINERS)

_LONGEST_LINE = 16_000_000
# Text packs to a third or a tenth of its size; what unpacks to 200 times its size was made to fill a disk.
_UNPACKED_FREELY, _LARGEST_RATIO = 50_000_000, 200


@dataclass(frozen=True)
class Document:
    """A text with its address and title. `date` is ISO 8601 where it is known."""

    url: str
    title: str
    text: str
    date: str | None = None


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Args:
        id: its name in its set.
        question: the question.
        answers: every wording that is right.
        hops: how many pages have to be found one after another; None where that is not known.
        path: titles of these pages, in order.
        relations: what leads from one to the next.
        source: the set that it comes from.
        checklist: what a right answer must have, for a judge.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    hops: int | None = None
    path: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    source: str = ""
    checklist: str = ""


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file: one of a page, many of a ZIM archive or of a JSONL corpus.

    Raises:
        UserError: missing, empty, encrypted, damaged, not text, of an unknown kind.
    """
    name = path.name.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        if name.endswith(".zim"):
            yield from _read_zim(path)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_corpus(path)
        elif name.endswith(_PAGES):
            found = extract(path.read_bytes(), path.suffix, str(path))
            if found.text:
                yield Document(path.resolve().as_uri(), found.title or path.stem, found.text, found.date)
        else:
            raise UserError(f"{path}: documents of this kind cannot be read (known: {', '.join(SUFFIXES)})")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_zim(path: Path) -> Iterator[Document]:
    from tenfold.agent.zim import read_articles

    for article in read_articles(path):
        try:
            found = extract(article.content, article.kind, f"{path}: {article.path}")
        except UserError:
            continue  # one unreadable article among many
        if found.text:
            url = f"zim://{quote(path.name)}/{quote(article.path)}"
            yield Document(url, found.title or clean(article.title), found.text, found.date)


def _read_corpus(path: Path) -> Iterator[Document]:
    for number, row in read_rows(path):
        text = row.get("text", row.get("contents", row.get("paragraphs")))
        if isinstance(text, list):
            text = "\n\n".join(map(str, text))
        if not isinstance(text, str):
            raise UserError(
                f"{path}, line {number}: has no text: expected the column text, contents or paragraphs, found "
                f"{', '.join(list(row)[:8]) or 'none'}"
            )
        title = str(row.get("title") or "")
        url = str(row.get("url") or f"{path.resolve().as_uri()}#{row.get('id', number)}")
        text = clean(text)
        if text:
            date = row.get("date")
            yield Document(url, clean(title), text, date if isinstance(date, str) else None)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, plain or packed by gzip, with their line numbers; empty lines are passed over.

    Raises:
        UserError: a line that is no JSON object, a damaged or a hostile archive.
    """
    packed_size = path.stat().st_size
    unpacked = 0
    try:
        with _open_text(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                unpacked += len(line)
                if len(line) == _LONGEST_LINE:
                    raise UserError(f"{path}, line {number}: longer than {_LONGEST_LINE // 1_000_000} MB")
                if path.suffix == ".gz" and unpacked > max(_UNPACKED_FREELY, _LARGEST_RATIO * packed_size):
                    raise UserError(
                        f"{path}: refused, because it unpacks to more than {_LARGEST_RATIO} times its size: no text "
                        "does that"
                    )
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
                yield number, row
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: a damaged gzip file ({error}): fetch it again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def json_line(row: dict[str, Any]) -> bytes:
    """A row as a line of a JSONL file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def cut_last_line(path: Path) -> None:
    """Take a last line without an end, as a killed run leaves it, out of a file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_bytes(path, whole)


def _open_text(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.GzipFile(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_questions(path: Path) -> list[Question]:
    """A set of questions: JSONL with question and answers, FRAMES as TSV or SimpleQA as CSV.

    The columns of FRAMES are Prompt and Answer, those of SimpleQA problem and answer.

    Raises:
        UserError: missing file, unknown columns, a row without a question or without an answer.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.name.lower().endswith((".csv", ".tsv")):
        rows = _read_table(path)
    else:
        rows = list(read_rows(path))
    questions = [_question(path, number, row) for number, row in rows]
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions


def _read_table(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    return [(number, dict(row)) for number, row in enumerate(reader, start=2)]


def _question(path: Path, number: int, row: dict[str, Any]) -> Question:
    text = _first(row, "question", "Prompt", "problem", "prompt")
    answers = _first(row, "answers", "answer", "Answer", "golden_answers")
    if answers is not None and not isinstance(answers, list | tuple):
        answers = [answers]
    if not isinstance(text, str) or not text.strip() or not answers:
        raise UserError(
            f"{path}, line {number}: needs a question and answers; its columns are {', '.join(map(str, list(row)[:8]))}"
        )
    hops = row.get("hops")
    return Question(
        id=str(row.get("id", f"{path.stem}-{number}")),
        question=text.strip(),
        answers=tuple(str(answer) for answer in answers),
        hops=hops if isinstance(hops, int) else None,
        path=tuple(row.get("path") or ()),
        relations=tuple(row.get("relations") or ()),
        source=str(row.get("source") or path.stem),
        checklist=str(row.get("checklist") or ""),
    )


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name)), None)


def embedded_corpus() -> Path:
    """The passages that come with tenfold: 6,119 first paragraphs of Wikipedia articles, CC BY-SA."""
    return Path(str(resources.files("tenfold.agent") / "assets" / "wiki2hop_passages.jsonl.gz"))


def embedded_questions() -> list[Question]:
    """Questions over `embedded_corpus` whose answer takes one, two or three pages in a row."""
    return read_questions(Path(str(resources.files("tenfold.agent") / "assets" / "hop_controlled.jsonl.gz")))
