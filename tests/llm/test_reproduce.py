"""The reproduction at the size of a test: arms, resumption, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.core.results import table_markdown
from tenfold.llm import experiments, reproduce
from tenfold.llm.experiments import Job, run_job, split_text
from tenfold.llm.reproduce import INITS, NORMS, Scale, jobs_of

TOY = Scale(seeds=(0, 1), steps=5, layers=2, width=16, rate=1e-2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 2500)
    return path


def test_the_built_in_text_is_there_and_is_split_nine_to_one() -> None:
    training, held_out = split_text(None)
    assert len(training) + len(held_out) == 1_115_394
    assert len(training) == 1_115_394 * 9 // 10
    assert bytes(training[:14].tolist()) == b"First Citizen:"


def test_the_full_run_has_the_arms_of_the_paper_at_depth_48_with_three_seeds() -> None:
    norms = jobs_of("norms", Scale())
    assert {(job.arm, job.seed, job.clip) for job in norms} == {
        (arm, seed, clip) for arm in NORMS for seed in (0, 1, 2) for clip in (0.0, 1.0)
    }
    assert {job.layers for job in norms} == {48}
    assert {job.model().init for job in norms} == {"small"}, "the arms differ in the norm only"
    epsilons = {(job.model().init, job.model().post_norm_eps) for job in jobs_of("init", Scale())}
    assert epsilons == {("small", 0.0), ("tiny", 0.0), ("tiny", 1e-8)}
    places = {(job.layers, job.width, job.rate, job.precision) for job in jobs_of("map", Scale())}
    assert len(places) == len(reproduce.map_places(Scale())) >= 8
    with pytest.raises(UserError, match="--parts speed"):
        jobs_of("speed", Scale())


def test_jobs_that_are_the_same_run_share_a_folder_and_others_do_not() -> None:
    jobs = [job for part in reproduce.PARTS for job in jobs_of(part, Scale())]
    by_name: dict[str, Job] = {}
    for job in jobs:
        same = by_name.setdefault(job.name, job)
        assert replace(same, arm="") == replace(job, arm="")
    assert len(by_name) < len(jobs)


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("DSSN", NORMS["DSSN"], steps=5, layers=2, width=16)
    first = run_job(job, tmp_path, text)
    assert len(first.losses) == len(first.norms) == 5
    assert first.initial_gains == pytest.approx(
        {"post_attention_norm": 0.283 / 2**0.5, "post_mlp_norm": 0.432 / 2**0.5}
    )
    assert len(first.gains["post_mlp_norm"]) == 2
    monkeypatch.setattr(experiments, "fit", None)
    again = run_job(job, tmp_path, text)
    assert again.losses == first.losses and again.validation == first.validation


def test_a_run_that_diverges_is_an_outcome_and_not_an_error(tmp_path: Path, text: Path) -> None:
    outcome = run_job(
        Job("pre-norm", NORMS["pre-norm"], steps=60, layers=2, width=16, rate=1e30, clip=0.0), tmp_path, text
    )
    assert outcome.diverged
    assert outcome.validation != outcome.validation
    again = run_job(
        Job("pre-norm", NORMS["pre-norm"], steps=60, layers=2, width=16, rate=1e30, clip=0.0), tmp_path, text
    )
    assert again.diverged == outcome.diverged


def test_the_whole_reproduction_writes_tables_curves_and_plots(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "results" / "llm.json"
    toy = replace(TOY, seeds=(0,))
    reproduce.reproduce(output, tmp_path / "runs", toy, ("norms", "init"), processes=1, text=text)
    written = json.loads(output.read_text())
    tables = {table["name"]: table for table in written["tables"]}
    assert set(tables) == {"norms_clipped", "norms_unclipped", "init", "paper"}
    assert [row[0] for row in tables["norms_clipped"]["rows"]] == list(NORMS)
    assert [row[0] for row in tables["init"]["rows"]] == list(INITS)
    assert "| DSSN |" in table_markdown(tables["norms_unclipped"])
    assert len(written["runs"]) == 2 * len(NORMS) + len(INITS)
    curves = written["curves"]
    assert list(curves["arms"]) == list(NORMS) and len(curves["arms"]["DSSN"]["grad_norm"]) == 5
    for name in ("stability", "gains"):
        assert (output.parent / f"llm_{name}.svg").read_text().count("<svg") == 1


def test_the_map_has_a_row_for_each_place(tmp_path: Path, text: Path) -> None:
    jobs = [job for job in jobs_of("map", replace(TOY, seeds=(0,))) if job.rate <= 1e-2 and job.arm == "DSSN"][:2]
    outcomes = {job: run_job(job, tmp_path, text) for job in jobs}
    table = reproduce.map_table(list(outcomes.items()))
    assert table.columns == ("layers x width", "rate", "precision", "DSSN")
    assert len(table.rows) == 2 and all("max/median" in str(row[3]) for row in table.rows)


def test_the_tour_shows_the_curves_of_the_committed_results() -> None:
    """When `reproduce` was run again, its `curves` belong into assets/stability.json as well."""
    committed = json.loads((Path(__file__).parents[2] / "results" / "reproduce" / "llm.json").read_text())
    shown = json.loads((resources.files("tenfold.llm") / "assets" / "stability.json").read_text())
    assert shown == committed["curves"]
