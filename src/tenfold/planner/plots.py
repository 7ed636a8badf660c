"""Pictures: the timeline of a pipeline, the memory of its ranks, where the step goes. Matplotlib is imported when a
picture is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenfold.planner.memory import StageMemory
from tenfold.planner.simulation import Slice
from tenfold.planner.trace import category

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "input gradient": "#ffbf79",
    "weight gradient": "#54a24b",
    "joined forward and backward": "#b279a2",
}


def _figure(rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=(width, height), squeeze=False)
    return figure, [axis[0] for axis in axes]


def draw_timeline(axis: Axes, bars: list[Slice], title: str, labels: bool | None = None) -> None:
    """Draw bars on an axis: one line a rank, a colour a kind, later chunks paler."""
    ranks = sorted({bar.rank for bar in bars})
    stages = 1 + max(action[1] for bar in bars for action in bar.actions)
    labels = len(bars) <= 200 if labels is None else labels
    groups: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for bar in bars:
        chunk = bar.actions[0][1] // max(1, len(ranks))
        groups.setdefault((bar.rank, category(bar), chunk), []).append((bar.start, bar.end - bar.start))
        if labels and len(bar.actions) == 1:
            axis.text(
                (bar.start + bar.end) / 2,
                bar.rank,
                str(bar.actions[0][2]),
                ha="center",
                va="center",
                fontsize=6,
                color="white",
            )
    many = len(bars) > 400
    for (rank, kind, chunk), spans in groups.items():
        shade = 1.0 - 0.5 * chunk / max(1, stages // max(1, len(ranks)))
        axis.broken_barh(
            spans,
            (rank - 0.43, 0.86),
            facecolors=COLOURS[kind],
            alpha=shade,
            edgecolors="white",
            linewidth=0.1 if many else 0.3,
            rasterized=many,
        )
    axis.set_yticks(ranks[:: max(1, len(ranks) // 16)])
    axis.set_ylim(max(ranks) + 0.6, -0.6)
    axis.set_ylabel("pipeline rank")
    axis.set_xlabel("seconds")
    axis.set_title(title, fontsize=9, loc="left")
    from matplotlib.patches import Patch

    kinds = [kind for kind in COLOURS if any(category(bar) == kind for bar in bars)]
    axis.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds],
        fontsize=6,
        ncol=len(kinds),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )


def timeline_figure(panels: list[tuple[str, list[Slice]]]) -> Figure:
    """Timelines one below the other, on one time axis."""
    figure, axes = _figure(
        len(panels), 10.0, 0.6 + sum(0.9 + 0.13 * (1 + max(b.rank for b in bars)) for _, bars in panels)
    )
    end = max(bar.end for _, bars in panels for bar in bars)
    for axis, (title, bars) in zip(axes, panels, strict=True):
        draw_timeline(axis, bars, title)
        axis.set_xlim(0, end * 1.01)
    figure.tight_layout()
    return figure


def memory_figure(
    memory: tuple[StageMemory, ...] | list[StageMemory], limit_gib: float, title: str = "memory per pipeline rank"
) -> Figure:
    """Stacked memory of every rank beside the limit."""
    figure, (axis,) = _figure(1, 8.0, 3.0)
    base = [0.0] * len(memory)
    for name, colour in zip(memory[0].items(), ("#4c78a8", "#72b7b2", "#54a24b", "#f58518", "#bab0ac"), strict=True):
        sizes = [rank.items()[name] for rank in memory]
        axis.bar([rank.rank for rank in memory], sizes, bottom=base, color=colour, label=name)
        base = [b + s for b, s in zip(base, sizes, strict=True)]
    axis.axhline(limit_gib, color="#e45756", linewidth=1, label="usable")
    axis.set_xlabel("pipeline rank")
    axis.set_ylabel("GiB")
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=6, ncol=6)
    figure.tight_layout()
    return figure


def breakdown_figure(panels: list[tuple[str, dict[str, float]]]) -> Figure:
    """Where the seconds of a step go, a bar a plan."""
    figure, (axis,) = _figure(1, 9.0, 0.9 + 0.6 * len(panels))
    names = list(dict.fromkeys(name for _, parts in panels for name in parts))
    import matplotlib

    palette = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined,unused-ignore]
    for row, (_, parts) in enumerate(panels):
        left = 0.0
        for name in names:
            seconds = max(0.0, parts.get(name, 0.0))
            axis.barh(
                row,
                seconds,
                left=left,
                color=palette[names.index(name) % 20],
                label=name if row == 0 or not panels[0][1].get(name) else None,
                height=0.7,
            )
            left += seconds
    axis.set_yticks(range(len(panels)), [label for label, _ in panels], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step, mean over ranks")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=6, ncol=6, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, path: str) -> None:
    """Write PNG or SVG by suffix, atomically, and close the figure."""
    from matplotlib import pyplot

    from tenfold.core.files import atomic_write

    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None} if str(path).endswith(".png") else None)
    pyplot.close(figure)
