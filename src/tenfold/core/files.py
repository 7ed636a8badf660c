"""Files that are either complete or not there: atomic writes, and disk errors said plainly. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenfold.core.console import UserError, to_jsonable

_DISK_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EEXIST: "a file, not a folder, has this name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
}


class DiskError(UserError):
    """The file system refused a write; in a batch, the files that follow would fare no better."""


def disk_error(path: Path, error: OSError) -> DiskError:
    """The one-line message for a write that the file system refused."""
    reason = _DISK_REASONS.get(error.errno or 0, error.strerror or str(error))
    return DiskError(f"cannot write {path}: {reason}")


def make_folder(path: Path) -> Path:
    """Create a folder and its parents; an existing one is fine. Raises UserError where the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    return path


def check_writable(folder: Path) -> None:
    """Create a folder where there is none, and see that files can be made in it: before long work, not after."""
    make_folder(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise disk_error(folder, error) from error


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on any failure it is removed.

    The temporary file keeps the suffix of `path`, so writers that choose a format by suffix work unchanged.

    Raises:
        UserError: the disk is full, read-only or otherwise refuses.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:80]}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: object) -> None:
    """Write a dataclass, dict or list as indented JSON, atomically."""
    write_bytes(path, (json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path | str) -> dict:
    """Read a JSON object. Raises UserError for a missing or broken file."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
