"""The tour goes on past a failure, says so, and never leaves a half-made page."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from browser import chromium, console_errors, requested_urls, set_viewport
from tenfold import cli
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.report import Figure, Station
from tenfold.tour import run_tour

TOUR_SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "schemas" / "tour.json").read_text())


def good(workdir: Path) -> Station:
    assert workdir.is_dir()
    (workdir / "scratch").write_text("thrown away with the folder")
    return Station("good", "A good station", "A paper", "A claim.", "tenfold good", figures=[Figure("n", "3")])


def bad(workdir: Path) -> Station:
    raise RuntimeError("the weights\nare missing")


def interrupted(workdir: Path) -> Station:
    raise KeyboardInterrupt


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replace the house's rooms by these: `install(good=station, ...)`."""

    def install(**stations: Callable[[Path], Station]) -> None:
        monkeypatch.setattr(cli, "ROOMS", dict.fromkeys(stations, "a room of this test"))
        for room, station in stations.items():
            module = types.ModuleType(f"tenfold.{room}.tour")
            module.tour = station  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, f"tenfold.{room}", types.ModuleType(f"tenfold.{room}"))
            monkeypatch.setitem(sys.modules, f"tenfold.{room}.tour", module)

    return install


def test_failing_station_does_not_stop_the_tour(install: Install, tmp_path: Path) -> None:
    install(bad=bad, good=good)
    with pytest.raises(PartialFailure, match="1 of 2 stations failed: bad") as caught:
        run_tour(output=tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert "RuntimeError: the weights are missing" in html
    assert "A good station" in html
    assert [station.status for station in caught.value.result.stations] == ["failed", "ok"]  # type: ignore[attr-defined]


def test_failing_station_gives_exit_status_1_and_json_all_the_same(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(bad=bad, good=good)
    assert cli.main(["tour", "--output", str(tmp_path), "--json"]) == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    jsonschema.validate(result, TOUR_SCHEMA)
    assert result["status"] == "partial"
    assert "[2/2] good" in output.err


def test_only_the_rooms_asked_for_are_visited(install: Install, tmp_path: Path) -> None:
    install(bad=bad, good=good)
    result = run_tour(rooms=("good", "good"), output=tmp_path / "new" / "folder")
    assert [station.room for station in result.stations] == ["good"]
    assert result.status == "ok"
    assert result.path == tmp_path / "new" / "folder" / "index.html"
    assert result.stations[0].figures[0].value == "3"


def test_unknown_room_is_named_with_its_likeliest_meaning(install: Install, tmp_path: Path) -> None:
    install(good=good)
    with pytest.raises(UserError, match=r"'goodd'.*good"):
        run_tour(rooms=("goodd",), output=tmp_path / "tour")
    assert not (tmp_path / "tour").exists()


def test_room_whose_requirement_is_missing_is_one_failed_station(install: Install, tmp_path: Path) -> None:
    def needs_more(workdir: Path) -> Station:
        raise UserError("soccer needs mujoco: pip install 'tenfold[soccer]'")

    install(soccer=needs_more, good=good)
    with pytest.raises(PartialFailure) as caught:
        run_tour(output=tmp_path)
    stations = caught.value.result.stations  # type: ignore[attr-defined]
    assert stations[0].error == "soccer needs mujoco: pip install 'tenfold[soccer]'"


def test_interrupted_tour_keeps_the_page_of_the_last_one(install: Install, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("the last tour")
    install(good=good, slow=interrupted)
    assert cli.main(["tour", "--output", str(tmp_path)]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "the last tour"


def test_output_that_is_a_file_is_refused_before_any_station_runs(install: Install, tmp_path: Path) -> None:
    install(slow=interrupted)
    (tmp_path / "tour").write_text("a file of mine")
    with pytest.raises(UserError, match="cannot write"):
        run_tour(output=tmp_path / "tour")
    assert (tmp_path / "tour").read_text() == "a file of mine"


@pytest.mark.browser
def test_failed_station_is_red_and_reads_on_a_phone(install: Install, tmp_path: Path) -> None:
    install(bad=bad, good=good)
    with pytest.raises(PartialFailure):
        run_tour(output=tmp_path)
    with chromium(tmp_path) as browser:
        set_viewport(browser, 360, 740)
        browser.get((tmp_path / "index.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        red = browser.find_element("css selector", "#bad .error").value_of_css_property("color")
        assert red == "rgba(168, 32, 26, 1)"
        assert not browser.find_element("css selector", "#bad details pre").is_displayed()
        browser.find_element("css selector", "#bad summary").click()
        assert "RuntimeError: the weights" in browser.find_element("css selector", "#bad details pre").text
        assert console_errors(browser) == []
        assert requested_urls(browser) == [(tmp_path / "index.html").as_uri()]
