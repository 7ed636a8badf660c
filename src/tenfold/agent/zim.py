"""ZIM archives (Wikipedia and others, offline): their articles, read straight from the file.

The format is that of the openZIM wiki, "ZIM file format": a header, lists of positions, directory entries, and clusters
of contents, plain or compressed by LZMA or Zstandard. The usual library for it is under the GPL, which is why this
small reader is here. Sizes come from the file and are not believed: every one is checked against a limit.
"""

from __future__ import annotations

import bisect
import lzma
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenfold.core.console import UserError

_MAGIC = 0x044D495A
_HEADER = struct.Struct("<IHH16sIIQQQQIIQ")
_REDIRECT, _LINK_TARGET, _DELETED = 0xFFFF, 0xFFFE, 0xFFFD
_LARGEST_CLUSTER = 128_000_000
_TEXT_TYPES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown", "application/pdf")


@dataclass(frozen=True)
class Article:
    """An entry of the archive with text in it: its path, title, media type and bytes."""

    path: str
    title: str
    kind: str
    content: bytes


class ZimError(UserError):
    """The file is no ZIM archive, or a damaged one."""


def read_articles(path: Path) -> Iterator[Article]:
    """The text entries of an archive, in the order in which their contents lie in the file.

    Raises:
        ZimError: not a ZIM file, truncated, damaged, or packed to exhaust memory.
    """
    if path.stat().st_size < _HEADER.size:
        raise ZimError(f"{path}: not a ZIM file (too short)")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            yield from _Archive(path, content).articles()
        except (struct.error, IndexError, ValueError, lzma.LZMAError, EOFError) as error:
            raise ZimError(f"{path}: the ZIM file is damaged or cut off ({error}): fetch it again") from None


class _Archive:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        header = _HEADER.unpack_from(content, 0)
        magic, major, _, _, entries, clusters, path_list, _, cluster_list, type_list, _, _, _ = header
        if magic != _MAGIC:
            raise ZimError(f"{path}: not a ZIM file (it begins with {content[:4].hex(' ')})")
        if major not in (5, 6):
            raise ZimError(f"{path}: ZIM format {major} is not known here (5 and 6 are)")
        if path_list + 8 * entries > len(content) or cluster_list + 8 * clusters > len(content):
            raise ZimError(
                f"{path}: the ZIM file is damaged or cut off (its lists end beyond the file): fetch it again"
            )
        self._entries = struct.unpack_from(f"<{entries}Q", content, path_list)
        self._clusters = struct.unpack_from(f"<{clusters}Q", content, cluster_list)
        self._in_order = sorted(self._clusters)
        self._types = self._read_types(type_list)
        self._opened: tuple[int, bytes, int, int] | None = None
        # Before 6.1 articles lie in namespace A, since then in C.
        self._namespaces = (b"A", b"C")

    def _read_types(self, position: int) -> list[str]:
        types = []
        while text := self._string(position):
            types.append(text)
            position += len(text.encode()) + 1
            if len(types) > 10_000:
                raise ValueError("too many media types")
        return types

    def _string(self, position: int) -> str:
        end = self._content.find(b"\x00", position, position + 65_536)
        if end < 0:
            raise ValueError("a string without an end")
        return self._content[position:end].decode("utf-8", "replace")

    def articles(self) -> Iterator[Article]:
        found = []
        for position in self._entries:
            kind, _, namespace = struct.unpack_from("<HBc", self._content, position)
            if kind in (_REDIRECT, _LINK_TARGET, _DELETED) or namespace not in self._namespaces:
                continue
            if kind >= len(self._types) or not self._types[kind].lower().startswith(_TEXT_TYPES):
                continue
            cluster, blob = struct.unpack_from("<II", self._content, position + 8)
            found.append((cluster, blob, position, self._types[kind]))
        # Cluster by cluster, so that each is unpacked once.
        for cluster, blob, position, kind_name in sorted(found):
            path = self._string(position + 16)
            title = self._string(position + 16 + len(path.encode()) + 1) or path
            yield Article(path, title, kind_name, self._blob(cluster, blob))

    def _blob(self, cluster: int, blob: int) -> bytes:
        if self._opened is None or self._opened[0] != cluster:
            self._opened = (cluster, *self._open(cluster))
        _, data, width, number = self._opened
        if blob >= number:
            raise ValueError(f"no content {blob} in cluster {cluster}")
        start, end = struct.unpack_from("<2Q" if width == 8 else "<2I", data, blob * width)
        if not start <= end <= len(data):
            raise ValueError(f"content {blob} of cluster {cluster} ends beyond it")
        return data[start:end]

    def _open(self, cluster: int) -> tuple[bytes, int, int]:
        """Unpacked bytes of a cluster, the width of its offsets, and the number of its contents."""
        if cluster >= len(self._clusters):
            raise ValueError(f"no cluster {cluster}")
        start = self._clusters[cluster]
        information = self._content[start]
        packed = self._packed(start + 1)
        data = self._unpack(packed, information & 0x0F)
        width = 8 if information & 0x10 else 4
        (first,) = struct.unpack_from("<Q" if width == 8 else "<I", data, 0)
        if first % width or not width <= first <= len(data):
            raise ValueError(f"cluster {cluster} has no list of contents")
        return data, width, first // width - 1

    def _packed(self, start: int) -> bytes:
        """A cluster's bytes: up to the next thing in the file, whose place is only known for another cluster."""
        following = bisect.bisect_left(self._in_order, start)
        end = self._in_order[following] if following < len(self._in_order) else len(self._content)
        return self._content[start : min(end, start + _LARGEST_CLUSTER)]

    def _unpack(self, packed: bytes, compression: int) -> bytes:
        if compression in (0, 1):
            return packed
        if compression == 4:
            data = lzma.LZMADecompressor(memlimit=_LARGEST_CLUSTER).decompress(packed, _LARGEST_CLUSTER)
        elif compression == 5:
            import zstandard

            try:
                reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
                data = reader.read(_LARGEST_CLUSTER)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
        else:
            raise ValueError(f"compression {compression} is not known")
        if len(data) >= _LARGEST_CLUSTER:
            raise ZimError(f"{self._path}: refused, because one cluster unpacks to more than {_LARGEST_CLUSTER} bytes")
        return data
