"""Token files on disk: Megatron's `.bin` + `.idx`, memory-mapped `.npy`, and text that is split into them once.

Layout of an `.idx` (Megatron-LM, `megatron/core/datasets/indexed_dataset.py`), little-endian: the nine bytes
`MMIDIDX\\0\\0`, version 1 (uint64), code of the ids' type (uint8), number S of sequences (uint64), number D + 1 of
document marks (uint64), lengths of the sequences (S int32), their byte offsets in the `.bin` (S int64), and the
sequences at which documents begin, with S at the end (D + 1 int64).
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tenfold.core.console import UserError, progress
from tenfold.core.files import atomic_write

if TYPE_CHECKING:
    from tenfold.llm.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# The integer types of Megatron's codes; it has no uint32, so that ids beyond 65535 are int32.
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SMALL_VOCABULARY = 65_500  # Megatron writes uint16 below this size

LABELS = ("score", "difficulty")  # numbers that documents may carry: fields of a JSON line, PREFIX.NAME.npy of a shard


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Write documents one after the other; the files appear, complete, when the context ends without an error.

    Args:
        prefix: path without `.bin` and `.idx`.
        eod: id that ends each document; added where it is missing.
        vocabulary: number of ids, which decides between uint16 and int32.
    """

    def __init__(self, prefix: Path | str, eod: int, vocabulary: int) -> None:
        self.prefix = shard_prefix(prefix)
        self.eod = eod
        self.vocabulary = vocabulary
        self.code = 8 if vocabulary < _SMALL_VOCABULARY else 4
        self._lengths = array("q")
        self._length = 0
        self._last = -1
        self._stack = ExitStack()
        if not 0 <= eod < vocabulary:
            raise UserError(f"{self.prefix}: the end of documents ({eod}) is not in the vocabulary of {vocabulary}")

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            # Contexts end inside out: the .idx, whose presence means a complete pair, comes last.
            self._index = stack.enter_context(atomic_write(_with(self.prefix, ".idx")))
            self._bin = stack.enter_context(stack.enter_context(atomic_write(_with(self.prefix, ".bin"))).open("wb"))
            self._stack = stack.pop_all()
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Go on with the current document.

        Raises:
            UserError: an id beyond the vocabulary.
        """
        values = np.asarray(ids, np.int64)
        if not values.size:
            return
        if values.min() < 0 or values.max() >= self.vocabulary:
            wrong = int(values.min() if values.min() < 0 else values.max())
            raise UserError(f"{self.prefix}: token id {wrong} is not in the vocabulary of {self.vocabulary}")
        self._bin.write(values.astype(_TYPES[self.code]).tobytes())
        self._length += values.size
        self._last = int(values[-1])

    def end_document(self) -> None:
        """End the current document."""
        if self._last != self.eod:
            self.add([self.eod])
        if self._length >= 2**31:
            raise UserError(f"{self.prefix}: a document of {self._length} tokens is longer than the format allows")
        self._lengths.append(self._length)
        self._length, self._last = 0, -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            if not self._lengths:
                raise UserError(f"{self.prefix}: no document to write")
            lengths = np.frombuffer(self._lengths, np.int64)
            offsets = (np.cumsum(lengths) - lengths) * np.dtype(_TYPES[self.code]).itemsize
            with self._index.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, 1, self.code, lengths.size, lengths.size + 1))
                file.write(lengths.astype("<i4").tobytes())
                file.write(offsets.astype("<i8").tobytes())
                file.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())


def write_shard(
    prefix: Path | str, documents: Iterable[Sequence[int] | np.ndarray], eod: int, vocabulary: int = 2**31 - 1
) -> Path:
    """Write documents of token ids as `PREFIX.bin` and `PREFIX.idx`, which Megatron reads too.

    Args:
        prefix: path without the suffixes.
        documents: ids of each; `eod` is added where it does not end them.
        eod: id that ends a document.
        vocabulary: number of ids; below 65,500 a token takes two bytes, else four.

    Returns:
        The prefix.

    Raises:
        UserError: no document, an id beyond the vocabulary, a full disk.
    """
    with ShardWriter(prefix, eod, vocabulary) as writer:
        for document in documents:
            writer.add(document)
            writer.end_document()
    return writer.prefix


def write_labels(prefix: Path | str, label: str, values: Sequence[float] | np.ndarray) -> None:
    """Write a number for each document of a shard: `PREFIX.score.npy` or `PREFIX.difficulty.npy`."""
    with atomic_write(_with(shard_prefix(prefix), f".{label}.npy")) as temporary:
        np.save(temporary, np.asarray(values, np.float32))


def shard_prefix(path: Path | str) -> Path:
    """The path without `.bin` or `.idx`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # not with_suffix: a prefix may hold dots


# --- reading ----------------------------------------------------------------------------------------------------------


class Shard:
    """Documents of token ids on disk; of the ids, only what is read comes into memory.

    Args:
        path: prefix of a `.bin` and `.idx` pair (or one of the two), or a one-dimensional `.npy` of ids.
        eod: id that ends a document; only a `.npy`, which has no index, needs it.

    Attributes:
        tokens: all ids (N,).
        starts: where documents begin in `tokens`, and N (D + 1,), int64.
        labels: `score` and `difficulty` of each document (D,), float32, where there are such.

    Raises:
        UserError: a missing, truncated or foreign file.
    """

    def __init__(self, path: Path | str, eod: int | None = None) -> None:
        self.path = Path(path)
        self._eod = eod
        if self.path.suffix == ".npy":
            self.prefix = self.path.with_suffix("")
            self.tokens = _open_npy(self.path)
            self.starts = _split_at(self.tokens, eod, self.path)
        else:
            self.prefix = shard_prefix(self.path)
            self.tokens, self.starts = _open_indexed(self.prefix)
        self.labels = {label: values for label in LABELS if (values := self._label(label)) is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        return Shard, (self.path, self._eod)  # workers map the files anew: a pickled map would be a copy

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        """Ids of one document, its end included."""
        return self.tokens[self.starts[document] : self.starts[document + 1]]

    def check_ends(self, eod: int, looked_at: int = 1000) -> None:
        """See that documents end with `eod`; in large shards, the first ones.

        Raises:
            UserError: one does not, so that it would run on in the next one.
        """
        some = self.starts[: looked_at + 1]
        some = some[1:][np.diff(some) > 0]
        wrong = np.flatnonzero(self.tokens[some - 1] != eod)
        if wrong.size:
            found = int(self.tokens[some[wrong[0]] - 1])
            raise UserError(
                f"{self.prefix}: document {wrong[0]} ends with id {found}, not with the end of documents {eod}: "
                "write it with that id at the end (Megatron: --append-eod) and take the tokenizer that it was made with"
            )

    def _label(self, label: str) -> np.ndarray | None:
        path = _with(self.prefix, f".{label}.npy")
        if not path.is_file():
            return None
        values = _open_npy(path, np.floating)
        if values.shape != (len(self),) or not np.isfinite(values).all():
            raise UserError(f"{path}: should hold {len(self)} finite numbers, one for each document")
        return values


def _open_indexed(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    index, content = _with(prefix, ".idx"), _with(prefix, ".bin")
    for path in (index, content):
        if not path.is_file():
            raise UserError(f"{path}: no such file (a shard is a pair of .bin and .idx)")
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{index}: not an index of Megatron's format (or it is truncated)")
        _, version, code, sequences, marks = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            raise UserError(f"{index}: version {version} with type code {code} is not supported")
        if index.stat().st_size < _HEADER.size + sequences * 12 + marks * 8:
            raise UserError(f"{index}: truncated ({sequences} sequences announced)")
        lengths = np.fromfile(file, "<i4", sequences)
        offsets = np.fromfile(file, "<i8", sequences)
        documents = np.fromfile(file, "<i8", marks)
    kind = np.dtype(_TYPES[code])
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ordered = marks > 1 and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    if not ordered or (lengths < 0).any() or not np.array_equal(offsets, bounds[:-1] * kind.itemsize):
        raise UserError(f"{index}: damaged (sequences do not follow each other)")
    if content.stat().st_size != bounds[-1] * kind.itemsize:
        raise UserError(
            f"{content}: has {content.stat().st_size} bytes where its index announces {bounds[-1] * kind.itemsize}: "
            "truncated, or not the pair"
        )
    if not bounds[-1]:
        raise UserError(f"{content}: holds no tokens")
    return np.memmap(content, kind, "r"), bounds[documents]


def _open_npy(path: Path, kind: type = np.integer) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy file ({' '.join(str(error).split())})") from None
    if values.ndim != 1 or not values.size or not np.issubdtype(values.dtype, kind):
        raise UserError(f"{path}: should be a list of numbers, found {values.dtype} of shape {values.shape}")
    return values


def _split_at(tokens: np.ndarray, eod: int | None, path: Path, step: int = 2**24) -> np.ndarray:
    """Where documents begin, found by the ids that end them; what follows the last one is left out."""
    if eod is None:
        raise UserError(f"{path}: has no index, so the id that ends a document must be given")
    ends = [np.flatnonzero(tokens[at : at + step] == eod) + at + 1 for at in range(0, len(tokens), step)]
    found = np.concatenate(ends).astype(np.int64)
    if not found.size:
        raise UserError(f"{path}: no document ends in it (id {eod})")
    return np.concatenate([[0], found])


# --- text -------------------------------------------------------------------------------------------------------------

TEXT_SUFFIXES = (".txt", ".jsonl")
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PIECE = 2**20  # characters that are split into tokens as one text


@dataclass(frozen=True)
class TextDocument:
    """A document that is read while its pieces are taken.

    Attributes:
        pieces: its text in parts of about a million characters.
        labels: `score` and `difficulty`, where its line gives them.
    """

    pieces: Iterator[str]
    labels: dict[str, float]


class TextFiles:
    """Text as people have it: `.txt` (a document each) and `.jsonl` (a line each), also `.gz`, `.bz2`, `.xz`; UTF-8.

    A line of a `.jsonl` is an object with `text`, and perhaps the numbers `score` and `difficulty`.

    Args:
        paths: files, or folders of such.

    Raises:
        UserError: nothing there, or a file of another kind.
    """

    def __init__(self, paths: Path | str | Sequence[Path | str]) -> None:
        given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        self.paths = [file for path in given for file in _text_files(path)]

    def documents(self) -> Iterator[TextDocument]:
        """The documents, file by file.

        Raises:
            UserError: an empty file, one that is not UTF-8, a line that is no such object.
        """
        for path in self.paths:
            if _plain_suffix(path) == ".jsonl":
                yield from _json_documents(path)
            else:
                yield TextDocument(_text_pieces(path), {})

    def pieces(self) -> Iterator[str]:
        """All text, in parts of at most about a million characters."""
        for document in self.documents():
            yield from document.pieces

    def shard(self, tokenizer: Tokenizer, cache: Path | str) -> Shard:
        """The tokens of these texts; split once for the content and the tokenizer, and then kept in `cache`."""
        digest = hashlib.sha256(tokenizer.digest.encode())
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest() + _plain_suffix(path).encode())
        prefix = Path(cache) / f"{self.paths[0].name.partition('.')[0]}-{digest.hexdigest()[:16]}"
        if not _with(prefix, ".idx").is_file():
            self._split(tokenizer, prefix)
        return Shard(prefix)

    def _split(self, tokenizer: Tokenizer, prefix: Path) -> None:
        labels: list[dict[str, float]] = []
        title = f"tokens of {self.paths[0].name}" + (f" and {len(self.paths) - 1} more" if self.paths[1:] else "")
        with ShardWriter(prefix, tokenizer.eod, tokenizer.size) as writer, progress(title, None) as bar:
            for parts in _together(self._parts(labels)):
                for ids, (_, ends) in zip(tokenizer.encode_batch([text for text, _ in parts]), parts, strict=True):
                    writer.add(ids)
                    if ends:
                        writer.end_document()
                        bar.advance()
            for label in LABELS:
                values = [found[label] for found in labels if label in found]
                if values and len(values) != len(labels):
                    raise UserError(
                        f"{self.paths[0]}: {len(values)} of {len(labels)} documents have a {label}: all or none should"
                    )
                if values:
                    write_labels(prefix, label, values)

    def _parts(self, labels: list[dict[str, float]]) -> Iterator[tuple[str, bool]]:
        """All pieces, each with whether it ends its document, whose labels are noted then."""
        for document in self.documents():
            held = ""
            for piece in document.pieces:
                if held:
                    yield held, False
                held = piece
            yield held, True
            labels.append(document.labels)


def _together(parts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in groups that are large enough for all processors and small enough for memory."""
    group: list[tuple[str, bool]] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part[0])
        if size >= 8 * _PIECE or len(group) >= 4096:
            yield group
            group, size = [], 0
    if group:
        yield group


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _plain_suffix(file) in TEXT_SUFFIXES)
        if not found:
            raise UserError(f"{path}: holds no text ({', '.join(TEXT_SUFFIXES)}, also .gz, .bz2, .xz)")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if _plain_suffix(path) not in TEXT_SUFFIXES:
        hint = "unpack it first" if path.suffix == ".zst" else f"give {' or '.join(TEXT_SUFFIXES)}, also .gz, .bz2, .xz"
        raise UserError(f"{path}: not a kind of text that is read here: {hint}")
    return [path]


def _plain_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert it first (iconv -t utf-8)") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def _text_pieces(path: Path) -> Iterator[str]:
    """A text in parts, each cut before a line break between two words: no token of our vocabularies spans it."""
    rest, empty = "", True
    with _opened(path) as file:
        while part := file.read(_PIECE):
            rest += part
            if len(rest) < _PIECE:
                continue
            cut = rest.rfind("\n", 0, len(rest) - 1)
            while cut > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
                cut = rest.rfind("\n", 0, cut)
            if cut <= 0 and len(rest) >= 8 * _PIECE:
                cut = len(rest)
            if cut > 0:
                yield rest[:cut]
                rest, empty = rest[cut:], False
    if empty and not rest.strip():
        raise UserError(f"{path}: holds no text")
    if rest:
        yield rest


def _json_documents(path: Path) -> Iterator[TextDocument]:
    found = False
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found = True
                yield _json_document(line, f"{path}: line {number}")
    if not found:
        raise UserError(f"{path}: holds no text")


def _json_document(line: str, where: str) -> TextDocument:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise UserError(f"{where} is no object with a `text`")
    labels = {label: entry[label] for label in LABELS if entry.get(label) is not None}
    for label, value in labels.items():
        if not isinstance(value, int | float):
            raise UserError(f"{where}: its {label} is not a number")
    return TextDocument(iter([entry["text"]]), {label: float(value) for label, value in labels.items()})
