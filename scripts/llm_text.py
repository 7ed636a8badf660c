"""Fetch and prepare the public-domain novels that `tenfold-tiny` and its vocabulary are trained on.

    python scripts/llm_text.py OUTPUT_FOLDER            # download from GitHub
    python scripts/llm_text.py OUTPUT_FOLDER --books F  # or take the books, under the names below, from folder F

The books are Project Gutenberg's, as GITenberg keeps them in one repository a book. All were published before 1929, so
that their texts are in the public domain in the United States; the header and footer, which hold Project Gutenberg's
trademark, are removed, so that the text may be redistributed. Line breaks inside paragraphs are removed. Of the four
training books the last 4 % of the paragraphs are for validation; the fifth book is for testing alone.

OUTPUT_FOLDER then holds novels.train.txt, novels.valid.txt and novels.test.txt. Whether they are, byte for byte, the
files that the embedded weights were trained on is printed: their SHA-256 are below. Several editions of these books are
around which differ in quotation marks, dashes and the table of contents; another edition gives another digest and, in
all likelihood, as good a model.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

SOURCE = "https://raw.githubusercontent.com/GITenberg"
TRAINED_ON = {
    "novels.train.txt": "a1bd65b231a8dfa5ef93ec37c7b8768640223a51ae4ac3d71c20b0ffd70e992c",
    "novels.valid.txt": "87f2e6f35db5f83e0cc983f8306540d17769057487a47466ee2256d3be93e438",
    "novels.test.txt": "ba09919dfe448d2dddf8f0f730b8063720452b78d1fb756a8f03589a35c00b8b",
}
VALIDATION_SHARE = 0.04
TIMEOUT_S = 60


@dataclass(frozen=True)
class Book:
    """A book: GITenberg's repository, and the names under which its plain text may lie there, the best first."""

    repository: str
    files: tuple[str, ...]


TRAINING_BOOKS = (
    Book("War-and-Peace_2600", ("2600-0.txt", "2600-8.txt", "2600.txt")),
    Book("Moby-Dick--Or-The-Whale_2701", ("2701-0.txt", "2701.txt")),
    Book("Great-Expectations_1400", ("1400-0.txt", "1400-8.txt", "1400.txt")),
    Book("A-Tale-of-Two-Cities_98", ("98-0.txt", "98-8.txt", "98.txt")),
)
TEST_BOOK = Book("The-Adventures-of-Sherlock-Holmes_1661", ("1661-0.txt", "1661.txt", "1661-8.txt", "old/advsh11.txt"))


def fetch(book: Book, folder: Path | None) -> str:
    """The raw text of a book, from a folder (REPOSITORY.txt or one of the file names) or from GitHub."""
    for name in (f"{book.repository}.txt", *book.files):
        if folder is not None:
            path = folder / Path(name).name
            if path.is_file():
                return decode(path.read_bytes())
            continue
        try:
            with urllib.request.urlopen(f"{SOURCE}/{book.repository}/master/{name}", timeout=TIMEOUT_S) as answer:
                return decode(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise SystemExit(f"{book.repository}: GitHub answered with status {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{book.repository}: cannot be downloaded ({error}); give a folder with --books") from None
    where = folder or f"github.com/GITenberg/{book.repository}"
    raise SystemExit(f"{where}: has none of {', '.join(book.files)}")


def decode(content: bytes) -> str:
    """Project Gutenberg's older files are Latin-1, the newer ones UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def paragraphs(raw: str) -> list[str]:
    """The book's paragraphs, one line each, without Project Gutenberg's header, notes and footer."""
    text = raw.replace("\r\n", "\n")
    start = re.search(r"^\*\*\* ?START OF .*\*\*\*$|^\*END[* ]*THE SMALL PRINT.*$", text, re.MULTILINE)
    end = re.search(r"^(\*\*\* ?)?END OF (THIS|THE) PROJECT GUTENBERG.*$", text, re.MULTILINE | re.IGNORECASE)
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    parts = (part.strip() for part in re.split(r"\n[ \t]*\n", text))
    lines = (re.sub(r"\s*\n\s*", " ", part) for part in parts)
    return [
        line for line in lines if line and not re.match(r"(Produced by|\[Project Gutenberg|End of.*Gutenberg)", line)
    ]


def main() -> None:
    """Write the three texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--books", type=Path, help="folder with the books, or with the prepared novels.*.txt")
    options = parser.parse_args()
    ready = {name: options.books / name for name in TRAINED_ON} if options.books else {}
    if ready and all(path.is_file() for path in ready.values()):
        texts = {name: path.read_text(encoding="utf-8") for name, path in ready.items()}
    else:
        train, valid = [], []
        for book in TRAINING_BOOKS:
            lines = paragraphs(fetch(book, options.books))
            cut = round(len(lines) * (1 - VALIDATION_SHARE))
            train.append("\n\n".join(lines[:cut]))
            valid.append("\n\n".join(lines[cut:]))
            print(f"{book.repository}: {len(lines)} paragraphs", file=sys.stderr)
        texts = {
            "novels.train.txt": "\n\n\n".join(train) + "\n",
            "novels.valid.txt": "\n\n\n".join(valid) + "\n",
            "novels.test.txt": "\n\n".join(paragraphs(fetch(TEST_BOOK, options.books))) + "\n",
        }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        content = text.encode()
        (options.output / name).write_bytes(content)
        same = hashlib.sha256(content).hexdigest() == TRAINED_ON[name]
        print(f"{name}: {len(content)} bytes, {'the text' if same else 'not the very text'} of the embedded weights")


if __name__ == "__main__":
    main()
