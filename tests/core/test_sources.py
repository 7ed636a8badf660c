"""Files of a run: names that never meet, and whose fault a failure is. What paths stand for is tested in superres."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.core.files import DiskError
from tenfold.core.sources import Job, Source, failure, find_sources, jobs_in_folder


def test_results_without_a_suffix_of_their_own_never_share_a_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a_png.jpg", "A.webp", "b.png"):
        (tmp_path / name).touch()
    jobs = jobs_in_folder(find_sources([tmp_path], tmp_path / "out"), tmp_path / "out", lambda source: "")
    names = [job.target.name.casefold() for job in jobs]
    assert len(set(names)) == len(names) == 5
    assert names[-1] == "b"


JOB = Job(Source(Path("in/photo.png")), Path("out/photo.png"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("is damaged"), "in/photo.png: is damaged"),
        (UserError("out/photo.png: is damaged"), "out/photo.png: is damaged"),
        (MemoryError(), "in/photo.png: not enough memory; take less"),
        (RuntimeError("cannot allocate memory"), "in/photo.png: not enough memory; take less"),
    ],
)
def test_a_file_that_fails_is_told_in_one_line(error: Exception, line: str) -> None:
    assert failure(error, JOB, "take less") == line


@pytest.mark.parametrize("error", [DiskError("the disk is full"), RuntimeError("shapes differ"), KeyError("x")])
def test_what_is_not_the_files_fault_ends_the_run(error: Exception) -> None:
    with pytest.raises(type(error)):
        failure(error, JOB, "take less")
