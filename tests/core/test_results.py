from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.core.devices import memory_bytes, usable_cpus
from tenfold.core.results import Table, fill_markdown, installed_version, machine_facts, versions, write_results

SPEED = Table("speed", "Seconds a picture.", ("model", "seconds", "ratio"), [("a|b", 1.23456, "2x"), ("c", 3, None)])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with one file, `benchmarks/demo.json`."""
    write_results(
        tmp_path / "benchmarks" / "demo.json",
        room="demo",
        kind="benchmark",
        seconds=12.345,
        tables=[SPEED],
        config={"size": 3},
        seeds=[1, 2],
        packages=["pytest"],
        samples=[[0.5, float("nan")]],
    )
    return tmp_path


def test_a_result_file_says_what_ran_where_and_with_what(results: Path) -> None:
    content = json.loads((results / "benchmarks" / "demo.json").read_text())
    assert {key: content[key] for key in ("room", "kind", "seconds", "seeds", "config", "samples")} == {
        "room": "demo",
        "kind": "benchmark",
        "seconds": 12.3,
        "seeds": [1, 2],
        "config": {"size": 3},
        "samples": [[0.5, None]],
    }
    assert content["versions"]["torch"] == installed_version("torch")
    assert content["versions"]["pytest"] == pytest.__version__
    assert content["machine"]["cpus"] == usable_cpus()
    assert len(content["date"]) == len("2025-01-31")
    assert content["tables"] == [
        {
            "name": "speed",
            "caption": "Seconds a picture.",
            "columns": ["model", "seconds", "ratio"],
            "rows": [["a|b", 1.23456, "2x"], ["c", 3, None]],
        }
    ]


def test_a_marked_place_shows_the_table_and_where_it_is_from(results: Path) -> None:
    text = "before\n<!-- results: benchmarks/demo.json#speed -->old<!-- /results -->\nafter"
    filled = fill_markdown(text, results)
    assert "| model | seconds | ratio |\n| --- | ---: | ---: |\n| a\\|b | 1.235 | 2x |\n| c | 3 | - |" in filled
    assert "*Seconds a picture (measured on 2" in filled
    assert "`results/benchmarks/demo.json`" in filled
    assert "old" not in filled
    assert filled.startswith("before\n<!-- results: benchmarks/demo.json#speed -->")
    assert filled.endswith("<!-- /results -->\nafter")


def test_values_are_found_by_their_place_and_formatted(results: Path) -> None:
    place = "benchmarks/demo.json#"
    text = (
        f"took <!-- value: {place}seconds .0f -->?<!-- /value --> s, "
        f"row <!-- value: {place}tables.0.rows.1.0 --><!-- /value -->"
    )
    filled = fill_markdown(text, results)
    assert "-->12<!--" in filled
    assert "-->c<!--" in filled


def test_filling_twice_changes_nothing(results: Path) -> None:
    text = (
        "<!-- results: benchmarks/demo.json#speed --><!-- /results -->\n\n"
        "<!-- value: benchmarks/demo.json#room --><!-- /value --> and <!-- own: x --><!-- /own -->"
    )
    builders = {"own": lambda argument: f"\n{argument}!\n"}
    once = fill_markdown(text, results, builders)
    assert once != text
    assert fill_markdown(once, results, builders) == once


def test_a_marker_in_a_code_block_is_left_alone(results: Path) -> None:
    text = "```text\n<!-- value: benchmarks/demo.json#room -->?<!-- /value -->\n<!-- results: x -->\n```\n"
    assert fill_markdown(text, results) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- results: benchmarks/none.json#speed --><!-- /results -->", "results/benchmarks/none.json: no such file"),
        ("<!-- results: benchmarks/demo.json#size --><!-- /results -->", "no table 'size': it has speed"),
        ("<!-- value: benchmarks/demo.json#config.width --><!-- /value -->", "'width' is not there"),
        ("<!-- value: benchmarks/demo.json#seeds.7 --><!-- /value -->", "'7' is not there"),
        ("<!-- results: benchmarks/demo.json#speed -->", "1 markers `results` are opened and 0 closed"),
        (
            "<!-- value: benchmarks/demo.json#room --> <!-- value: benchmarks/demo.json#kind --><!-- /value -->",
            "has no end",
        ),
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(results: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        fill_markdown(text, results)
    assert words in str(raised.value)


def test_versions_leave_out_what_is_not_installed() -> None:
    assert "no-such-package-at-all" not in versions(["no-such-package-at-all"])
    assert installed_version("no-such-package-at-all") is None


def test_machine_facts_are_about_this_process() -> None:
    facts = machine_facts()
    assert facts["cpus"] >= 1
    total, available = memory_bytes()
    assert 0 <= available <= total
    assert facts["memory_gib"] == round(total / 2**30, 1)
