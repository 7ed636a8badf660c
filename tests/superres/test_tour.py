"""The room's station shows what it claims, on a picture that the weights have not seen."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from browser import chromium, console_errors, set_viewport
from tenfold import cli
from tenfold.core.report import Station, render_page
from tenfold.superres import tour
from tenfold.superres.resize import imresize_matlab


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Station:
    return tour.tour(tmp_path_factory.mktemp("station"))


@pytest.mark.parametrize("scale", [2, 4])
def test_built_in_network_beats_bicubic_on_the_photograph(scale: int) -> None:
    run = tour.run(tour.photograph(), scale)
    assert run.ours.shape == run.bicubic.shape == tour.photograph().shape
    assert run.gain_db > 0
    assert run.our_score.ssim_y > run.bicubic_score.ssim_y


def test_small_picture_is_the_benchmarks_own() -> None:
    run = tour.run(tour.photograph(), 4)
    np.testing.assert_array_equal(run.low_res, imresize_matlab(tour.photograph(), 0.25))


def test_compared_attention_is_softmax_attention_inside_windows() -> None:
    torch.manual_seed(0)
    layer = tour.WindowSelfAttention(width=12, heads=3, window=4)
    features = torch.randn(2, 8, 12, 12)
    expected = torch.zeros_like(features)
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            tokens = features[:, top : top + 4, left : left + 4].reshape(2, 16, 12)
            q, k, v = layer.qkv(tokens).view(2, 16, 3, 3, 4).permute(2, 0, 3, 1, 4)
            heads = torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, dim=-1) @ v
            y = layer.proj(heads.permute(0, 2, 1, 3).reshape(2, 16, 12))
            expected[:, top : top + 4, left : left + 4] = y.view(2, 4, 4, 12)
    torch.testing.assert_close(layer(features), expected)


def test_correlation_is_cheaper_than_attention_in_a_large_window() -> None:
    threads = torch.get_num_threads()
    correlation_ms, attention_ms = tour.layer_costs()
    # By the paper's reckoning a factor of tens; a factor of two leaves room for any machine.
    assert attention_ms[-1] > 2 * correlation_ms[-1] > 0
    assert torch.get_num_threads() == threads


def test_command_on_the_page_is_one_that_the_program_understands(station: Station) -> None:
    program, room, verb, *arguments = shlex.split(station.command)
    assert (program, room) == ("tenfold", "superres")
    cli.parse(station.command, cli.room_verbs(room)[verb], arguments)


def test_station_says_what_a_reader_needs(station: Station) -> None:
    assert station.room == "superres"
    assert "CC0" in station.notes[0]
    assert len(station.figures) == 4
    assert all(figure.value and figure.label for figure in station.figures)


@pytest.mark.browser
def test_station_renders_on_desk_and_phone(station: Station, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(render_page("A page", [station]))
    with chromium(tmp_path) as browser:
        for width in (1280, 360):
            set_viewport(browser, width, 800)
            browser.get((tmp_path / "index.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert console_errors(browser) == []
        broken = "return [...document.images].filter(image => !image.naturalWidth).length"
        assert browser.execute_script(broken) == 0
