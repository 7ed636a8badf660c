"""One self-contained HTML page from what the rooms show: stations, their figures, pictures and plots.

A page makes no request at all: pictures, videos, styles and scripts are in the file, and its content security policy
forbids the rest, so that a station cannot break this by accident. Imports neither torch nor matplotlib.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tenfold.core.plots import plot_bars, plot_html, plot_lines, plot_to_data_uri, save_plot

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure as Plot
    from PIL import Image

__all__ = [
    "Failure",
    "Figure",
    "Panel",
    "Station",
    "Tile",
    "format_seconds",
    "image_to_data_uri",
    "interactive_panel",
    "picture_panel",
    "plot_bars",
    "plot_lines",
    "plot_panel",
    "plot_to_data_uri",
    "render_page",
    "save_plot",
    "slider_panel",
    "table_panel",
    "tiles_panel",
    "video_panel",
]

Pixels: TypeAlias = "np.ndarray | Image.Image"

# Everything is in the file: data URIs, inline styles and scripts. Interactive panels may make blobs for themselves.
_POLICY = (
    "default-src 'none'; img-src data: blob:; media-src data: blob:; font-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect width='16' height='16' rx='4' fill='%230b6b62'/%3E"
    "%3Cpath d='M4 12V4m4 8V4h4v8H8' stroke='white' stroke-width='1.6' fill='none'/%3E%3C/svg%3E"
)


@dataclass(frozen=True)
class Figure:
    """One number that a station shows.

    Args:
        label: what was measured.
        value: the number as a person should read it ("29.41", "+1.3").
        unit: its unit ("dB", "s"), or nothing.
        detail: what to compare it with ("bicubic: 28.43 dB").
    """

    label: str
    value: str
    unit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Panel:
    """One thing to look at: trusted HTML made by a `*_panel` function (which see to alt texts), and its caption.

    Args:
        html: the content, without any reference to another file.
        caption: plain text below it.
        wide: takes the whole width; two narrow panels share a row on a wide screen.
    """

    html: str
    caption: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Tile:
    """A small picture of `tiles_panel`: pixels as in `image_to_data_uri`, a label, a second line, and its alt text."""

    image: Pixels
    label: str
    detail: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Station:
    """What one room shows on the tour.

    Args:
        room: the room's name.
        title: the system, in a few words.
        paper: authors or name, venue, year, arXiv number.
        claim: what the paper says, in a sentence or two.
        command: what the reader types to do this with an input of their own.
        panels: the pictures and plots, in reading order.
        figures: the numbers, the most telling first.
        notes: remarks on what is shown: data, limits, origin of the input.
        seconds: how long the station took; the tour fills it in.
    """

    room: str
    title: str
    paper: str
    claim: str
    command: str
    panels: Sequence[Panel] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A station that did not run: its room, one line that says why, the traceback, and the seconds until it failed."""

    room: str
    error: str
    traceback: str
    seconds: float = 0.0


def format_seconds(seconds: float) -> str:
    """A duration for people: `0.34 s`, `12.4 s`, `3 min 05 s`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def image_to_data_uri(image: Pixels, quality: int | None = None) -> str:
    """Pixels as a WebP data URI: lossless, or lossy at a `quality` of 1 to 100.

    Args:
        image: (H, W), (H, W, 3) or (H, W, 4) uint8, or a Pillow image.
        quality: None keeps every pixel as it is, which comparisons of image quality need.
    """
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    if quality is None:
        picture.save(buffer, "WEBP", lossless=True, quality=60, exact=True)
    else:
        picture.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _size(image: Pixels) -> tuple[int, int]:
    """Width and height of pixels in either form."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.size
    return int(image.shape[1]), int(image.shape[0])


def _img(image: Pixels, alt: str, quality: int | None = None, kind: str = "") -> str:
    width, height = _size(image)
    css = f' class="{kind}"' if kind else ""
    uri = image_to_data_uri(image, quality)
    return f'<img{css} src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'


def picture_panel(image: Pixels, alt: str, caption: str = "", quality: int | None = 90, wide: bool = True) -> Panel:
    """One picture. `alt` says what is on it to those who cannot see it."""
    return Panel(_img(image, alt, quality), caption, wide)


def slider_panel(
    before: Pixels, after: Pixels, before_label: str, after_label: str, alt: str, caption: str = ""
) -> Panel:
    """Two pictures of equal size, one over the other, with a divider to drag or to move with the arrow keys."""
    if _size(before) != _size(after):
        raise ValueError(f"a slider needs two pictures of one size, got {_size(before)} and {_size(after)}")
    left, right = escape(before_label), escape(after_label)
    tags = (("left", left), ("right", right))
    labels = "".join(f'<span class="tag {side}" aria-hidden="true">{text}</span>' for side, text in tags)
    return Panel(
        f'<div class="slider" style="--split:50%">{_img(after, f"{alt}, {after_label}")}'
        f"{_img(before, f'{alt}, {before_label}', kind='before')}"
        f"{labels}"
        f'<input type="range" min="0" max="100" step="0.5" value="50" data-left="{left}" data-right="{right}"'
        f' aria-label="Divider between {left} and {right}"><span class="handle" aria-hidden="true"></span></div>',
        caption,
    )


def tiles_panel(tiles: Sequence[Tile], caption: str = "", columns: int = 4, zoomed: bool = False) -> Panel:
    """Small pictures side by side with labels; `zoomed` shows their single pixels instead of smoothing them."""
    kind = "pixelated" if zoomed else ""
    cells = "".join(
        f"<div>{_img(tile.image, tile.alt or tile.label, kind=kind)}<p><b>{escape(tile.label)}</b>"
        f"{f' <span>{escape(tile.detail)}</span>' if tile.detail else ''}</p></div>"
        for tile in tiles
    )
    return Panel(f'<div class="tiles" style="--columns:{columns}">{cells}</div>', caption)


def plot_panel(figure: Plot, alt: str, caption: str = "", wide: bool = True) -> Panel:
    """A Matplotlib figure (see `core.plots`) as SVG that follows the reader's light or dark scheme."""
    return Panel(plot_html(figure, alt), caption, wide)


def table_panel(
    columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", best: int | None = None
) -> Panel:
    """A table whose first column names the rows; row `best` is set off."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f"<tr{' class=best' if index == best else ''}>"
        + f'<th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for index, row in enumerate(rows)
    )
    name = escape(caption or columns[0])
    return Panel(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
        caption,
    )


def video_panel(path: Path, alt: str, caption: str = "", wide: bool = True) -> Panel:
    """A short video file (.mp4 with H.264, or .webm), embedded; muted and looping once the reader starts it."""
    kind = "video/webm" if path.suffix.lower() == ".webm" else "video/mp4"
    uri = f"data:{kind};base64," + base64.b64encode(path.read_bytes()).decode()
    return Panel(
        f'<video controls loop muted playsinline src="{uri}" aria-label="{escape(alt)}"></video>', caption, wide
    )


def interactive_panel(document: str, title: str, caption: str = "", height_px: int = 420, wide: bool = True) -> Panel:
    """A self-contained HTML document (a viewer with its data and script) in a frame of its own.

    The frame is sandboxed: the document's scripts run, but cannot touch the page, and cannot load anything.

    Args:
        document: HTML with inline styles and scripts only.
        title: what a screen reader calls the frame.
        caption: plain text below it.
        height_px: height of the frame; its width is the panel's.
        wide: as in `Panel`.
    """
    frame = (
        f'<iframe sandbox="allow-scripts" title="{escape(title)}" style="height:{height_px}px"'
        f' srcdoc="{escape(document)}"></iframe>'
    )
    return Panel(frame, caption, wide)


def render_page(
    title: str,
    stations: Sequence[Station | Failure],
    facts: Mapping[str, str] | None = None,
    introduction: str = "",
) -> str:
    """The whole page.

    Args:
        title: the page's heading.
        stations: what ran, and what failed, in the order of the page.
        facts: the machine and the versions, name -> value, shown at the foot of the heading.
        introduction: plain text below the heading.

    Returns:
        HTML that needs no other file and makes no request.
    """
    failed = [
        f'<a href="#{escape(item.room)}">{escape(item.room)}</a>' for item in stations if isinstance(item, Failure)
    ]
    total = format_seconds(sum(station.seconds for station in stations))
    done = f"{len(stations) - len(failed)} of {len(stations)} station{'' if len(stations) == 1 else 's'}"
    summary = f"{done} ran, in {total}"
    alarm = f'<p class="alarm">Failed: {", ".join(failed)}.</p>' if failed else ""
    facts_html = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in (facts or {}).items()
    )
    assets = resources.files("tenfold.core") / "assets"
    body = "".join(_failure(item) if isinstance(item, Failure) else _station(item) for item in stations)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="{_ICON}">
<style>{(assets / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#stations">Skip to the stations</a>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(introduction)}</p>
<p class="summary">{summary}</p>{alarm}
<dl class="facts">{facts_html}</dl>
</header>
<div class="columns">
<nav aria-label="Stations"><h2>Stations</h2><ol>{"".join(_contents_line(item) for item in stations)}</ol></nav>
<main id="stations">{body}</main>
</div>
<script>{(assets / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _contents_line(item: Station | Failure) -> str:
    name = escape(item.room)
    if isinstance(item, Failure):
        return f'<li class="failed"><a href="#{name}">{name} <small>failed</small></a></li>'
    return f'<li><a href="#{name}">{name} <small>{format_seconds(item.seconds)}</small></a></li>'


def _station(station: Station) -> str:
    room = escape(station.room)
    figures = "".join(
        f"<div><dt>{escape(figure.label)}</dt><dd>{escape(figure.value)}"
        f"{f'<small>{escape(figure.unit)}</small>' if figure.unit else ''}</dd>"
        f"{f'<dd class=detail>{escape(figure.detail)}</dd>' if figure.detail else ''}</div>"
        for figure in station.figures
    )
    panels = "".join(
        f'<figure class="{"wide" if panel.wide else "narrow"}">{panel.html}'
        f"{f'<figcaption>{escape(panel.caption)}</figcaption>' if panel.caption else ''}</figure>"
        for panel in station.panels
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in station.notes)
    return f"""
<section id="{room}" aria-labelledby="{room}-title">
<p class="room"><span>{room}</span><span>{format_seconds(station.seconds)}</span></p>
<h2 id="{room}-title">{escape(station.title)}</h2>
<p class="paper">{escape(station.paper)}</p>
<p class="claim">{escape(station.claim)}</p>
{f'<dl class="figures">{figures}</dl>' if figures else ""}
<div class="panels">{panels}</div>
<div class="command"><h3>On your own input</h3><pre tabindex="0"><code>{escape(station.command)}</code></pre>
<button type="button" hidden>Copy</button></div>
{f'<div class="notes"><h3>Notes</h3><ul>{notes}</ul></div>' if notes else ""}
</section>"""


def _failure(failure: Failure) -> str:
    room = escape(failure.room)
    return f"""
<section id="{room}" class="failed" aria-labelledby="{room}-title">
<p class="room"><span>{room}</span><span>failed after {format_seconds(failure.seconds)}</span></p>
<h2 id="{room}-title">This station failed</h2>
<p class="error">{escape(failure.error)}</p>
<details><summary>Traceback</summary><pre tabindex="0">{escape(failure.traceback)}</pre></details>
</section>"""
