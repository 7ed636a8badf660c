"""The page: complete in one file, escaped, honest about failures, usable by keyboard and on a phone."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import chromium, console_errors, requested_urls, set_viewport
from tenfold.core import plots, report
from tenfold.core.report import Failure, Figure, Panel, Station, Tile


class References(HTMLParser):
    """Collects what a page could load, and what its elements are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data", "action", "background") and value:
                self.urls.append(value)
        if dict(attrs).get("srcdoc"):
            self.urls += References(str(dict(attrs)["srcdoc"])).urls


def gradient(width: int = 96, height: int = 64) -> np.ndarray:
    """H x W x 3 uint8 with a ramp along each axis."""
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 255 // width, y * 255 // height, np.full_like(x, 90)), axis=2).astype(np.uint8)


def every_kind_of_panel(folder: Path) -> list[Panel]:
    clip = folder / "clip.webm"
    clip.write_bytes(b"\x1aE\xdf\xa3not played here")
    lines = plots.plot_lines({"ours": ([8, 16, 32], [1, 2, 4]), "theirs": ([8, 16, 32], [1, 8, 70])}, "window", "ms")
    bars = plots.plot_bars({"ours": 2.0, "theirs": 5.0}, "ms")
    viewer = "<!doctype html><body><p id=said></p><script>said.textContent = 6 * 7</script>"
    return [
        report.picture_panel(gradient(), alt="a ramp", caption="A ramp"),
        report.slider_panel(gradient(), gradient()[::-1], "before", "after", alt="a ramp"),
        report.tiles_panel([Tile(gradient(8, 8), f"crop {index}", "8 x 8") for index in range(4)], zoomed=True),
        report.table_panel(["method", "a rather long column name", "another long name"], [["ours", 1, 2]] * 2, best=0),
        report.plot_panel(lines, alt="two lines", wide=False),
        report.plot_panel(bars, alt="two bars", wide=False),
        report.video_panel(clip, alt="a clip"),
        report.interactive_panel(viewer, title="a viewer", height_px=120),
    ]


def page(panels: list[Panel]) -> str:
    station = Station(
        room="superres",
        title="A station",
        paper="Somebody et al., ECCV 2024",
        claim="It is better.",
        command="tenfold superres upscale a-photograph-with-a-long-name.png --scale 4 --output somewhere/else/",
        panels=panels,
        figures=[Figure("Y-PSNR", "29.70", "dB", "bicubic: 28.41 dB"), Figure("Images", "5")],
        notes=["A note."],
        seconds=1.5,
    )
    failure = Failure("depth", "the weights are missing", "Traceback\n  line " + "x" * 300, 0.2)
    return report.render_page("The tour", [station, failure], {"Machine": "2 cores"}, "Hello.")


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    found = References(page(every_kind_of_panel(tmp_path)))
    outside = [url for url in found.urls if not url.startswith(("data:", "#"))]
    assert outside == []
    assert len(found.urls) > 10
    assert not [tag for tag, _ in found.elements if tag in ("base", "object", "embed", "form")]


def test_every_picture_has_alt_text(tmp_path: Path) -> None:
    images = [
        attributes for tag, attributes in References(page(every_kind_of_panel(tmp_path))).elements if tag == "img"
    ]
    assert len(images) >= 9
    assert all(image.get("alt") for image in images)


def test_text_from_a_station_cannot_become_markup() -> None:
    attack = '<script>alert(1)</script>" onload="alert(2)'
    station = Station(
        attack, attack, attack, attack, attack, (), [Figure(attack, attack, attack, attack)], [attack], 1.0
    )
    html = report.render_page(attack, [station, Failure(attack, attack, attack)], {attack: attack}, attack)
    found = References(html)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert not [attributes for _, attributes in found.elements if "onload" in attributes]


def test_failed_station_shows_its_error_and_keeps_its_traceback_folded() -> None:
    html = page([])
    assert "1 of 2 stations ran" in html
    assert 'Failed: <a href="#depth">depth</a>.' in html
    assert '<section id="depth" class="failed"' in html
    assert '<p class="error">the weights are missing</p>' in html
    assert "<details><summary>Traceback" in html


def test_contents_name_every_station() -> None:
    urls = References(page([])).urls
    assert {"#superres", "#depth"} <= set(urls)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4), (1, 1, 3)])
def test_lossless_picture_keeps_every_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    uri = report.image_to_data_uri(pixels)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    mode = {2: "RGB", 3: "RGB" if shape[-1] == 3 else "RGBA"}[len(shape)]
    expected = np.repeat(pixels[..., None], 3, axis=2) if len(shape) == 2 else pixels
    np.testing.assert_array_equal(np.array(decoded.convert(mode)), expected)


def test_slider_refuses_pictures_of_two_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        report.slider_panel(gradient(8, 8), gradient(8, 9), "a", "b", alt="x")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.344, "0.34 s"), (12.44, "12.4 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s")]
)
def test_seconds_read_well(seconds: float, text: str) -> None:
    assert report.format_seconds(seconds) == text


def test_plot_is_repainted_for_dark_paper() -> None:
    html = plots.plot_html(plots.plot_lines({"a": ([1, 2], [3, 4])}, "x", "y"), alt="a line")
    dark, light = (base64.b64decode(part.split('"')[0]).decode() for part in html.split("base64,")[1:])
    assert plots.SERIES[0][0] in light
    assert plots.SERIES[0][1] in dark
    assert plots.SERIES[0][0] not in dark
    assert plots.INK[0] not in dark


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saved_plot_is_the_same_file_every_time(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        plots.save_plot(plots.plot_bars({"a": 1.0, "b": 2.0}, "s", spread={"a": (0.5, 1.5)}), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.browser
def test_page_works_in_a_browser_on_desk_and_phone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(page(every_kind_of_panel(tmp_path)))
    address = (tmp_path / "index.html").as_uri()
    with chromium(tmp_path) as browser:
        for width, dark in ((1280, False), (360, True)):
            set_viewport(browser, width, 800, dark)
            browser.get(address)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        # The clip of this test is no video; nothing else may be wrong.
        assert [message for message in console_errors(browser) if "clip" not in message] == []
        assert set(requested_urls(browser)) == {address}

        loaded = "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
        assert browser.execute_script(loaded)

        slider = browser.find_element("css selector", ".slider input")
        slider.send_keys("\ue012" * 10)  # the left arrow key
        split = browser.execute_script("return arguments[0].parentElement.style.getPropertyValue('--split')", slider)
        assert split == "45%"
        assert slider.get_attribute("aria-valuetext") == "45 % before, 55 % after"

        browser.switch_to.frame(browser.find_element("css selector", "iframe"))
        assert browser.find_element("id", "said").text == "42"


@pytest.mark.browser
def test_page_policy_stops_a_station_that_loads_from_outside(tmp_path: Path) -> None:
    sneaky = Panel('<img src="http://127.0.0.1:9/pixel.png" alt="from outside">')
    (tmp_path / "index.html").write_text(page([sneaky]))
    with chromium(tmp_path) as browser:
        browser.get((tmp_path / "index.html").as_uri())
        assert any("Content Security Policy" in message for message in console_errors(browser))


@pytest.mark.browser
def test_text_has_enough_contrast_in_both_schemes(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(page(every_kind_of_panel(tmp_path)))
    script = """
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        const paper = (element) => {
          for (; element; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] > 0.5) return colour;
          }
        };
        const poor = [];
        for (const element of document.querySelectorAll("body *")) {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
          if (!own || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
          const [a, b] = [light(rgb(getComputedStyle(element).color)), light(paper(element))].sort((x, y) => y - x);
          const ratio = (a + 0.05) / (b + 0.05);
          if (ratio < 4.5) poor.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio}`);
        }
        return poor;"""
    with chromium(tmp_path) as browser:
        for dark in (False, True):
            set_viewport(browser, 1280, 800, dark)
            browser.get((tmp_path / "index.html").as_uri())
            assert browser.execute_script(script) == []
