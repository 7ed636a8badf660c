"""Plots in the house style: quiet axes, colours that colour-blind readers can tell apart, light and dark in one go.

Matplotlib is imported inside the functions, without pyplot: no global state, no window, no display needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (on light paper, on dark paper). A plot is drawn with the first; `plot_html` repaints it with the second.
INK = ("#1d1c1a", "#ecebe6")
MUTED = ("#6b675f", "#a8a49a")
GRID = ("#e2ded6", "#3a3935")
# Okabe and Ito's colour-blind safe hues, each moved in lightness until it has 3:1 contrast on its paper.
SERIES = (
    ("#0b6b62", "#4fc3b4"),
    ("#c2410c", "#f5935a"),
    ("#3b5bb5", "#8aa8f5"),
    ("#96406f", "#e08fbd"),
    ("#7a6a10", "#d8c34a"),
    ("#4d4d4d", "#bdbdbd"),
)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@contextmanager
def house_style() -> Iterator[None]:
    """Within this context figures are made and saved in the house style."""
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.edgecolor": MUTED[0],
        "axes.labelcolor": INK[0],
        "axes.titlecolor": INK[0],
        "text.color": INK[0],
        "xtick.color": MUTED[0],
        "ytick.color": MUTED[0],
        "axes.grid": True,
        "grid.color": GRID[0],
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[light for light, _ in SERIES]),
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 6,
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": "tenfold",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width_in: float = 4.8, height_in: float = 3.2) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, in the house style. Sizes in inches."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.add_subplot()


def plot_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    spread: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """One line with markers per series.

    Args:
        series: name -> (x values, y values).
        x_label: what the horizontal axis measures, with its unit.
        y_label: what the vertical axis measures, with its unit.
        title: a sentence above the plot, or nothing.
        log_x: logarithmic (base 2) horizontal axis, ticks at the given x values.
        log_y: logarithmic vertical axis.
        spread: name -> (lower, upper) y values of a band around that line (seeds, repeats).
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure, axes = new_figure()
    with house_style():
        for name, (x, y) in series.items():
            (line,) = axes.plot(x, y, marker="o", label=name)
            if spread and name in spread:
                axes.fill_between(x, *spread[name], color=line.get_color(), alpha=0.15, linewidth=0)
        if log_x:
            ticks = sorted({value for x, _ in series.values() for value in x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        _finish(figure, axes, x_label, y_label, title, legend=len(series) > 1)
    return figure


def plot_bars(
    values: Mapping[str, float],
    y_label: str,
    title: str = "",
    spread: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """One horizontal bar per name, first on top, each with its number.

    Args:
        values: name -> length of the bar.
        y_label: what the bars measure, with its unit.
        title: a sentence above the plot, or nothing.
        spread: name -> (lowest, highest), drawn as a whisker.
    """
    names = list(values)
    figure, axes = new_figure(height_in=0.8 + 0.36 * len(names))
    with house_style():
        lengths = [values[name] for name in names]
        axes.barh(names, lengths, height=0.62, color=[SERIES[index % len(SERIES)][0] for index in range(len(names))])
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            reach = length
            if spread and name in spread:
                low, high = spread[name]
                axes.plot([low, high], [row, row], color=INK[0], linewidth=1.2)
                reach = max(length, high)
            axes.annotate(f"{length:.3g}", (reach, row), (6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK[0])
        _finish(figure, axes, y_label, "", title, legend=False)
    return figure


def _finish(figure: Figure, axes: Axes, x_label: str, y_label: str, title: str, legend: bool) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if legend:
        labels = axes.get_legend_handles_labels()[1]
        figure.legend(loc="outside upper left", ncols=3 if max(map(len, labels)) < 20 else 2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def save_plot(figure: Figure, path: Path | str) -> None:
    """Write a figure to a .png (on white) or .svg file, atomically; the suffix chooses.

    Raises:
        UserError: the disk refuses.
    """
    path = Path(path)
    with atomic_write(path) as temporary, house_style():
        figure.savefig(temporary, dpi=160, facecolor="white", metadata=_without_date(path.suffix))


def _without_date(suffix: str) -> dict[str, None] | None:
    """SVG metadata without a date: the same plot gives the same bytes."""
    return {"Date": None} if suffix.lower() == ".svg" else None


def _plot_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", metadata=_without_date(".svg"))
    # Text stays text: give it the reader's own interface font instead of the one that matplotlib measured with.
    return buffer.getvalue().replace("'DejaVu Sans'", _FONT)


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def plot_to_data_uri(figure: Figure) -> str:
    """A figure as an SVG data URI, in its light colours, transparent."""
    return _svg_uri(_plot_svg(figure))


def plot_html(figure: Figure, alt: str) -> str:
    """A `<picture>` of a figure that follows the reader's light or dark scheme; every house colour is repainted."""
    from html import escape

    light = _plot_svg(figure)
    dark = light
    for on_light, on_dark in (INK, MUTED, GRID, *SERIES):
        dark = dark.replace(on_light, on_dark)
    return (
        f'<picture class="plot"><source media="(prefers-color-scheme: dark)" srcset="{_svg_uri(dark)}">'
        f'<img src="{_svg_uri(light)}" alt="{escape(alt)}"></picture>'
    )
