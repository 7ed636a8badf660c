"""Files that a run works on: which ones paths stand for, what each becomes, and what is said of those that fail."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tenfold.core import console, images, video
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import DiskError

_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Source:
    """A file to work on.

    Attributes:
        path: where it is.
        below: the folder below the output folder that its result belongs into.
        named: the user named this very file, rather than a folder or a pattern.
    """

    path: Path
    below: Path = Path()
    named: bool = False

    @property
    def is_video(self) -> bool:
        """Judged by the suffix."""
        return self.path.suffix.lower() in video.READABLE_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One file and the file that it becomes."""

    source: Source
    target: Path


def find_sources(
    paths: Sequence[Path | str],
    output: Path,
    recursive: bool = False,
    films: bool = True,
    pictures: frozenset[str] = images.READABLE_SUFFIXES,
) -> list[Source]:
    """The files that paths stand for: files themselves, folders, and patterns such as `photos/*.jpg`.

    Folders and patterns give pictures (and films) by their suffix, without hidden files and without what lies in the
    output folder; files that are named are taken as they are.

    Args:
        paths: what the user wrote.
        output: the output folder.
        recursive: enter sub-folders; their structure is kept below the output folder.
        films: whether videos are taken as well.
        pictures: suffixes of pictures.

    Raises:
        UserError: a path or pattern that stands for nothing.
    """
    suffixes = pictures | (video.READABLE_SUFFIXES if films else frozenset())
    if not paths:
        raise UserError("give at least one file, folder or pattern")
    output = real_path(output)
    found: dict[Path, Source] = {}
    for text in paths:
        if not str(text):
            raise UserError("an empty name stands for no file: give a file, a folder or a pattern")
        path = Path(text)
        if path.is_dir():
            members = _files_in(path, recursive)
            sources = [Source(member, member.parent.relative_to(path)) for member in members]
            sources = [source for source in sources if _is_wanted(source.path, suffixes, output, path)]
            if not sources:
                hint = "" if recursive else "; --recursive enters sub-folders"
                raise UserError(f"{path}: no pictures in this folder{hint}")
        elif path.exists():
            sources = [Source(path, named=True)]
        elif _MAGIC.search(str(text)):
            fixed = [*takewhile(lambda part: not _MAGIC.search(part), path.parts)]
            root = Path(*fixed)
            members = sorted(root.glob(str(Path(*path.parts[len(fixed) :]))))
            sources = [Source(member) for member in members if _is_wanted(member, suffixes, output, root)]
            if not sources:
                raise UserError(f"{text}: this pattern matches no pictures")
        else:
            raise UserError(f"{path}: no such file or folder")
        for source in sources:
            place = real_path(source.path)
            if source.named or place not in found:
                found[place] = source
    return list(found.values())


def jobs_in_folder(
    sources: Sequence[Source], output: Path, suffix_of: Callable[[Source], str], tag: str = ""
) -> list[Job]:
    """Give every source a target of its own in the output folder.

    A target has its source's name. Sources that would share a target (`a.png` and `a.jpg`) get their old suffix into
    the name (`a_png.png`, `a_jpg.png`), then numbers. In the folder where the source itself lies, `tag` is added last,
    and results of earlier runs are no sources.

    Args:
        sources: the files.
        output: folder of the results.
        suffix_of: suffix of a source's target.
        tag: such as `-x2`.
    """
    # Names that results of an earlier run carry before their tag.
    names = {
        (real_path(source.path.parent), name)
        for source in sources
        for name in (source.path.stem, f"{source.path.stem}_{source.path.suffix[1:]}")
    }
    kept, stems = [], []
    for source in sources:
        folder, stem, place = output / source.below, source.path.stem, real_path(source.path.parent)
        beside = place == real_path(folder)
        if beside and tag and not source.named and stem.endswith(tag) and (place, stem.removesuffix(tag)) in names:
            continue
        kept.append(source)
        stems.append((folder, stem, (tag if beside else "") + suffix_of(source)))
    shared = Counter(_key(*stem) for stem in stems)
    taken: set[str] = set()
    jobs = []
    for source, (folder, stem, ending) in zip(kept, stems, strict=True):
        if shared[_key(folder, stem, ending)] > 1:
            stem = f"{stem}_{source.path.suffix[1:]}"
        unique, number = stem, 2
        while _key(folder, unique, ending) in taken:
            unique, number = f"{stem}-{number}", number + 1
        taken.add(_key(folder, unique, ending))
        jobs.append(Job(source, folder / (unique + ending)))
    return jobs


def real_path(path: Path) -> Path:
    """Absolute, without links. `Path.resolve` raises RuntimeError for links that lead in a circle."""
    return Path(os.path.realpath(path))


def _key(folder: Path, stem: str, ending: str) -> str:
    """Equal for names that a file system without upper and lower case takes for one."""
    return str(folder / (stem + ending)).casefold()


def failure(error: Exception, job: Job, advice: str) -> str:
    """One line about a file that could not be worked on, for `except Exception`.

    Args:
        error: what went wrong.
        job: the file.
        advice: what takes less memory.

    Raises:
        Exception: `error` itself, where the file is not to blame: a disk that refuses, a fault of the program.
    """
    if isinstance(error, UserError) and not isinstance(error, DiskError):
        text = str(error)  # what looks at pixels does not know whose they are
        known = str(job.source.path) in text or str(job.target) in text
        return text if known else f"{job.source.path}: {text}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return f"{job.source.path}: not enough memory; {advice}"
    raise error


def complain(errors: Sequence[str], files: int, result: object) -> None:
    """Say at the end of a run which files failed.

    Args:
        errors: a line for each of them.
        files: how many there were in all.
        result: the report, for `PartialFailure`.

    Raises:
        UserError: all failed.
        PartialFailure: some did.
    """
    if not errors:
        return
    if files == 1:
        raise UserError(errors[0])
    for error in errors:
        console.warn(error)
    if len(errors) == files:
        raise UserError(f"all {files} files failed (the first: {errors[0]})")
    raise PartialFailure(f"{len(errors)} of {files} files failed (the first: {errors[0]}); the rest is done", result)


def _files_in(folder: Path, recursive: bool) -> Iterable[Path]:
    try:
        return sorted(path for path in (folder.rglob("*") if recursive else folder.iterdir()) if path.is_file())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_wanted(path: Path, suffixes: frozenset[str], output: Path, root: Path) -> bool:
    """A visible file of a known kind that is no earlier result of ours."""
    if path.suffix.lower() not in suffixes or not path.is_file():
        return False
    if any(part.startswith(".") and part not in (".", "..") for part in path.relative_to(root).parts):
        return False
    inside = output in real_path(path).parents
    return not inside or output == real_path(root) or output in real_path(root).parents
