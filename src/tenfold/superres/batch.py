"""Many files: the file or folder that they become, and getting through them all. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenfold.core import console, images, video
from tenfold.core.console import UserError
from tenfold.core.files import check_writable
from tenfold.core.sources import Job, Source, complain, failure, jobs_in_folder, real_path

Report = Callable[[float], None]


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


def plan(sources: Sequence[Source], output: Path, suffix_of: Callable[[Source], str], tag: str) -> list[Job]:
    """Give every source a target of its own.

    In a folder it is named by `core.sources.jobs_in_folder`.

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
        jobs = jobs_in_folder(sources, output, suffix_of, tag)
    own = {real_path(job.source.path) for job in jobs}
    for job in jobs:
        if real_path(job.target) in own:
            raise UserError(f"{job.target}: is an input and would be overwritten; choose another output folder")
    return jobs


_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
_FILM_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm"})
# An output that ends so is meant as a file, whether or not it can be written.
_FILE_SUFFIXES = _PICTURE_SUFFIXES | _FILM_SUFFIXES | images.READABLE_SUFFIXES | video.READABLE_SUFFIXES


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
    complain([item.error for item in result.files if item.error], len(result.files), result)
    return result


def _run_one(job: Job, work: Callable[[Job, Report], Outcome], report: Report, skip_existing: bool) -> FileReport:
    source, target = job.source.path, job.target
    if skip_existing and target.exists():
        console.say(f"{source} is done already: {target}")
        return FileReport(source, target, "skipped")
    try:
        outcome = work(job, report)
    except Exception as error:
        advice = "give --memory, or a --tile side such as 192"
        return FileReport(source, target, "failed", error=failure(error, job, advice))
    details = f"{outcome.width}x{outcome.height}, {outcome.seconds:.2f} s, {outcome.method}"
    console.say(f"{source} -> {target} ({details})")
    return FileReport(source, target, "done", outcome)
