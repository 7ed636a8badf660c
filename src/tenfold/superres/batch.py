"""Many files: which of them a run takes, what each becomes, and getting through them all. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from tenfold.core import console, images, video
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import DiskError, check_writable

Report = Callable[[float], None]
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


@dataclass(frozen=True)
class Outcome:
    """What was made of a file: size of the result in pixels, seconds that it took, and how it was run."""

    width: int
    height: int
    seconds: float
    method: str


@dataclass(frozen=True)
class FileReport:
    """One line of a batch's report; the outcome is there when the file was done, the error when it failed."""

    source: Path
    target: Path
    status: Literal["done", "skipped", "failed"]
    outcome: Outcome | None = None
    error: str | None = None


@dataclass(frozen=True)
class BatchReport:
    """What became of every file of a run."""

    files: tuple[FileReport, ...]
    done: int
    skipped: int
    failed: int


def find_sources(
    paths: Sequence[Path | str], output: Path, recursive: bool = False, films: bool = True
) -> list[Source]:
    """The files that paths stand for: files themselves, folders, and patterns such as `photos/*.jpg`.

    Folders and patterns give pictures (and films) by their suffix, without hidden files and without what lies in the
    output folder; files that are named are taken as they are.

    Args:
        paths: what the user wrote.
        output: the output folder.
        recursive: enter sub-folders; their structure is kept below the output folder.
        films: whether videos are taken as well.

    Raises:
        UserError: a path or pattern that stands for nothing.
    """
    suffixes = images.READABLE_SUFFIXES | (video.READABLE_SUFFIXES if films else frozenset())
    if not paths:
        raise UserError("give at least one file, folder or pattern")
    output = _real(output)
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
            place = _real(source.path)
            if source.named or place not in found:
                found[place] = source
    return list(found.values())


def plan(sources: Sequence[Source], output: Path, suffix_of: Callable[[Source], str], tag: str) -> list[Job]:
    """Give every source a target of its own.

    A target has its source's name. Sources that would share a target (`a.png` and `a.jpg`) get their old suffix into
    the name (`a_png.png`, `a_jpg.png`), then numbers. In the folder where the source itself lies, `tag` is added last,
    and results of earlier runs are no sources.

    Args:
        sources: the files.
        output: folder of the results; or, for a single source, a file name with a suffix that can be written.
        suffix_of: suffix of a source's target.
        tag: such as `-x2`.

    Raises:
        UserError: a target that is one of the sources; one file name for several sources, or one of another kind.
    """
    suffix = output.suffix.lower()
    if suffix in _FILE_SUFFIXES and not output.is_dir():
        if len(sources) != 1:
            raise UserError(f"{output}: names one file, but there are {len(sources)} inputs; give a folder")
        kind, writable = ("film", _FILM_SUFFIXES) if sources[0].is_video else ("picture", _PICTURE_SUFFIXES)
        if suffix not in writable:
            raise UserError(f"{output}: a {kind} is not written as {suffix}; use {', '.join(sorted(writable))}")
        jobs = [Job(sources[0], output)]
    else:
        jobs = _plan_folder(sources, output, suffix_of, tag)
    own = {_real(job.source.path) for job in jobs}
    for job in jobs:
        if _real(job.target) in own:
            raise UserError(f"{job.target}: is an input and would be overwritten; choose another output folder")
    return jobs


_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
_FILM_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm"})
# An output that ends so is meant as a file, whether or not it can be written.
_FILE_SUFFIXES = _PICTURE_SUFFIXES | _FILM_SUFFIXES | images.READABLE_SUFFIXES | video.READABLE_SUFFIXES


def _plan_folder(sources: Sequence[Source], output: Path, suffix_of: Callable[[Source], str], tag: str) -> list[Job]:
    # Names that results of an earlier run carry before their tag.
    names = {
        (_real(source.path.parent), name)
        for source in sources
        for name in (source.path.stem, f"{source.path.stem}_{source.path.suffix[1:]}")
    }
    kept, stems = [], []
    for source in sources:
        folder, stem, place = output / source.below, source.path.stem, _real(source.path.parent)
        beside = place == _real(folder)
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


def _real(path: Path) -> Path:
    """Absolute, without links. `Path.resolve` raises RuntimeError for links that lead in a circle."""
    return Path(os.path.realpath(path))


def _key(folder: Path, stem: str, ending: str) -> str:
    """Equal for names that a file system without upper and lower case takes for one."""
    return str(folder / (stem + ending)).casefold()


def take_shard(jobs: Sequence[Job], shard: str | None) -> list[Job]:
    """Every n-th job, for `i/n` with i = 1..n, so that n processes share a folder. Raises UserError for other text."""
    if shard is None:
        return list(jobs)
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {shard}: expected i/n with 1 <= i <= n, such as 1/4")
    return list(jobs[int(match[1]) - 1 :: int(match[2])])


def run(jobs: Sequence[Job], work: Callable[[Job, Report], Outcome], title: str, skip_existing: bool) -> BatchReport:
    """Work through the jobs; a bad file is reported and the rest is done, a disk that refuses ends the run.

    Args:
        jobs: what to do.
        work: makes a job's target; gets a function to report the fraction done.
        title: stands beside the progress bar.
        skip_existing: leave jobs whose target exists. Targets appear complete, so this resumes a run.

    Raises:
        UserError: nothing could be done; or a disk that refuses.
        PartialFailure: some files failed; it carries the report.
    """
    if not jobs:
        console.say(f"{title}: there is nothing to do")
    for folder in {job.target.parent for job in jobs}:
        check_writable(folder)
    reports = []
    single = len(jobs) == 1
    with console.progress(title, total=100 if single else len(jobs)) as bar:
        for job in jobs:
            name, shown = job.source.path.name, 0

            def report(fraction: float, name: str = name) -> None:
                nonlocal shown
                percent = int(100 * fraction)
                bar.advance(percent - shown if single else 0, note=name if single else f"{name} {percent} %")
                shown = percent

            reports.append(_run_one(job, work, report, skip_existing))
            bar.advance(100 - shown if single else 1)
    count = Counter(item.status for item in reports)
    result = BatchReport(tuple(reports), count["done"], count["skipped"], count["failed"])
    _complain(result)
    return result


def _run_one(job: Job, work: Callable[[Job, Report], Outcome], report: Report, skip_existing: bool) -> FileReport:
    source, target = job.source.path, job.target
    if skip_existing and target.exists():
        console.say(f"{source} is done already: {target}")
        return FileReport(source, target, "skipped")
    try:
        outcome = work(job, report)
    except DiskError:
        raise
    except UserError as error:
        text = str(error)
        if str(source) not in text and str(target) not in text:
            text = f"{source}: {text}"  # what looks at pixels does not know whose they are
        return FileReport(source, target, "failed", error=text)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        advice = "not enough memory; give --memory, or a --tile side such as 192"
        return FileReport(source, target, "failed", error=f"{source}: {advice}")
    details = f"{outcome.width}x{outcome.height}, {outcome.seconds:.2f} s, {outcome.method}"
    console.say(f"{source} -> {target} ({details})")
    return FileReport(source, target, "done", outcome)


def _complain(result: BatchReport) -> None:
    errors = [item.error for item in result.files if item.error]
    if not errors:
        return
    if len(result.files) == 1:
        raise UserError(errors[0])
    for error in errors:
        console.warn(error)
    if len(errors) == len(result.files):
        raise UserError(f"all {len(errors)} files failed (the first: {errors[0]})")
    message = f"{len(errors)} of {len(result.files)} files failed (the first: {errors[0]}); the rest is done"
    raise PartialFailure(message, result)


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
    inside = output in _real(path).parents
    return not inside or output == _real(root) or output in _real(root).parents
