from pathlib import Path

import pytest

from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import DiskError
from tenfold.core.sources import Job, Source, find_sources
from tenfold.superres.batch import Outcome, plan, run, take_shard


@pytest.fixture
def folder(tmp_path):
    """Pictures, a film, hidden and other files, a sub-folder; nothing in them is looked into."""
    for name in ("b.png", "a.JPG", "film.mp4", ".hidden.png", "notes.txt", "deep/c.webp", "deep/deeper/d.tif"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def names(sources):
    return [source.path.name for source in sources]


def png(source):
    return ".png"


def test_a_folder_gives_its_visible_pictures_and_films_in_order(folder, tmp_path):
    assert names(find_sources([folder], tmp_path / "out")) == ["a.JPG", "b.png", "film.mp4"]
    assert names(find_sources([folder], tmp_path / "out", films=False)) == ["a.JPG", "b.png"]


def test_recursion_keeps_the_structure(folder, tmp_path):
    sources = find_sources([folder], tmp_path / "out", recursive=True)
    assert names(sources) == ["a.JPG", "b.png", "c.webp", "d.tif", "film.mp4"]
    targets = [job.target.relative_to(tmp_path / "out") for job in plan(sources, tmp_path / "out", png, "-x2")]
    assert targets[2:4] == [Path("deep/c.png"), Path("deep/deeper/d.png")]


def test_patterns_are_expanded(folder, tmp_path):
    assert names(find_sources([f"{folder}/*.png"], tmp_path / "out")) == ["b.png"]
    assert names(find_sources([str(folder / "**" / "*.[tw]*")], tmp_path / "out")) == ["c.webp", "d.tif"]


def test_a_file_named_twice_is_done_once(folder, tmp_path):
    assert names(find_sources([folder / "b.png", folder, f"{folder}/b*"], tmp_path / "out")) == [
        "b.png",
        "a.JPG",
        "film.mp4",
    ]


def test_results_inside_the_input_folder_are_no_inputs(folder):
    output = folder / "deep"
    assert names(find_sources([folder], output, recursive=True)) == ["a.JPG", "b.png", "film.mp4"]
    assert names(find_sources([str(folder / "**/*.*")], output)) == ["a.JPG", "b.png", "film.mp4"]
    assert names(find_sources([output], output, recursive=True)) == ["c.webp", "d.tif"], "unless they are asked for"


@pytest.mark.parametrize(
    ("path", "words"), [("none.png", "no such file"), ("*.bmp", "matches no"), ("empty", "no pictures")]
)
def test_a_path_that_stands_for_nothing_is_refused(folder, path, words):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find_sources([folder / path], folder / "out")


def test_nothing_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        find_sources([], tmp_path)
    with pytest.raises(UserError, match="empty name"):
        find_sources([""], tmp_path)  # an empty variable of a shell does not stand for the present folder
    assert run([], work, "test", skip_existing=False).files == ()


def test_beside_its_source_a_result_gets_the_tag_and_is_no_source_of_the_next_run(tmp_path):
    for name in ("a.png", "a-x2.png", "b-x2.png"):
        (tmp_path / name).touch()
    jobs = plan(find_sources([tmp_path], tmp_path), tmp_path, png, "-x2")
    assert [(job.source.path.name, job.target.name) for job in jobs] == [
        ("a.png", "a-x2.png"),
        ("b-x2.png", "b-x2-x2.png"),  # there is no b.png, so this is a picture of that name
    ]


def test_results_of_colliding_names_beside_their_sources_are_no_sources_of_the_next_run(tmp_path):
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).touch()
    for _ in range(2):
        jobs = plan(find_sources([tmp_path], tmp_path), tmp_path, png, "-x2")
        assert [job.target.name for job in jobs] == ["a_jpg-x2.png", "a_png-x2.png"]
        for job in jobs:
            job.target.touch()


def test_without_a_tag_nothing_is_taken_for_an_earlier_result(tmp_path):
    (tmp_path / "a.png").touch()
    jobs = plan(find_sources([tmp_path], tmp_path), tmp_path, lambda source: "x2.png", "")
    assert [job.target.name for job in jobs] == ["ax2.png"]


def test_names_that_would_collide_are_told_apart(tmp_path):
    sources = [Source(tmp_path / name) for name in ("a.png", "a.jpg", "x/b.png", "y/b.png", "B.png")]
    jobs = plan(sources, tmp_path / "out", png, "-x2")
    assert [job.target.name for job in jobs] == ["a_png.png", "a_jpg.png", "b_png.png", "b_png-2.png", "B_png-3.png"]
    assert len({str(job.target).casefold() for job in jobs}) == 5


def test_a_target_that_is_an_input_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "a.png"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="would be overwritten"):
        plan([Source(tmp_path / "in/a.png"), Source(tmp_path / "a.png")], tmp_path, png, "-x2")
    with pytest.raises(UserError, match="would be overwritten"):
        plan([Source(tmp_path / "a.png")], tmp_path / "a.png", png, "-x2")
    (tmp_path / "a-x2.png").touch()
    with pytest.raises(UserError, match="would be overwritten"):
        plan(find_sources([tmp_path / "a.png", tmp_path / "a-x2.png"], tmp_path), tmp_path, png, "-x2")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match="would be overwritten"):
        plan([Source(tmp_path / "in/a.png")], tmp_path / "link" / "a.png", png, "-x2")


def test_a_single_input_may_be_given_an_output_file(tmp_path):
    (job,) = plan([Source(tmp_path / "a.png")], tmp_path / "large.webp", png, "-x2")
    assert job.target == tmp_path / "large.webp"
    with pytest.raises(UserError, match="one file"):
        plan([Source(tmp_path / "a.png"), Source(tmp_path / "b.png")], tmp_path / "large.webp", png, "-x2")


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("a.png", "a.gif", "a picture is not written as .gif; use .jpeg, .jpg, .png"),
        ("a.png", "a.mp4", "a picture is not written as .mp4"),
        ("a.mp4", "a.png", "a film is not written as .png; use .mkv, .mov, .mp4, .webm"),
        ("a.mp4", "a.avi", "a film is not written as .avi"),
    ],
)
def test_an_output_file_of_another_kind_is_refused(tmp_path, source, output, words):
    with pytest.raises(UserError, match=words):
        plan([Source(tmp_path / source)], tmp_path / output, png, "-x2")
    (tmp_path / output).mkdir()
    (job,) = plan([Source(tmp_path / source)], tmp_path / output, png, "-x2")
    assert job.target.parent == tmp_path / output, "a folder may have any name"


def test_shards_are_disjoint_and_complete():
    jobs = [Job(Source(Path(str(number))), Path(str(number))) for number in range(10)]
    shards = [take_shard(jobs, f"{number}/3") for number in (1, 2, 3)]
    assert sorted((job.target.name for shard in shards for job in shard), key=int) == [str(n) for n in range(10)]
    assert take_shard(jobs, None) == jobs
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="i/n"):
            take_shard(jobs, wrong)


# ---------------------------------------------------------------- getting through


@pytest.fixture
def jobs(tmp_path):
    return [Job(Source(tmp_path / f"{name}.png"), tmp_path / "out" / f"{name}.png") for name in "abc"]


def work(job, report):
    if job.source.path.stem == "b":
        raise UserError("b.png: damaged")
    report(0.5)
    job.target.touch()
    return Outcome(2, 2, 0.0, "whole")


def test_a_bad_file_is_reported_and_the_rest_is_done(jobs, capsys):
    with pytest.raises(PartialFailure, match=r"1 of 3 files failed.*b\.png: damaged") as failure:
        run(jobs, work, "test", skip_existing=False)
    report = failure.value.result
    assert (report.done, report.skipped, report.failed) == (2, 0, 1)
    assert [item.status for item in report.files] == ["done", "failed", "done"]
    assert "b.png: damaged" in capsys.readouterr().err


def test_if_nothing_could_be_done_it_is_plain_wrong_input(jobs):
    for some in (jobs[1:2], [jobs[1]] * 2):
        with pytest.raises(UserError, match="damaged") as error:
            run(some, work, "test", skip_existing=False)
        assert error.value.exit_status == 2


def test_existing_results_are_skipped_on_request(jobs):
    jobs = [jobs[0], jobs[2]]
    jobs[0].target.parent.mkdir()
    jobs[0].target.write_text("of an earlier run")
    report = run(jobs, work, "test", skip_existing=True)
    assert [item.status for item in report.files] == ["skipped", "done"]
    assert jobs[0].target.read_text() == "of an earlier run"


def test_a_disk_that_refuses_ends_the_run(jobs):
    seen = []

    def refuse(job, report):
        seen.append(job)
        raise DiskError("cannot write: no space is left")

    with pytest.raises(DiskError):
        run(jobs, refuse, "test", skip_existing=False)
    assert len(seen) == 1


def test_an_output_folder_that_cannot_be_is_found_out_before_the_work(jobs, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(DiskError, match="cannot write"):
        run(jobs, lambda job, report: pytest.fail("it should not have begun"), "test", skip_existing=False)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_is_too_large_for_memory_gets_advice(jobs, error):
    def fail(job, report):
        raise error

    with pytest.raises(UserError, match="--memory"):
        run(jobs[:1], fail, "test", skip_existing=False)


def test_a_bug_is_not_hidden_among_bad_files(jobs):
    def fail(job, report):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        run(jobs, fail, "test", skip_existing=False)
