"""The report on a run or a model: loss with spikes marked, gradient norm, gains and activations by layer, on one page.

The quantities of the paper's Figs. 6, 9 and 10; `stability` defines and records them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tenfold.core import report
from tenfold.core.console import UserError
from tenfold.core.files import write_bytes, write_json
from tenfold.core.plots import house_style, new_figure, plot_lines
from tenfold.llm import stability
from tenfold.llm.checkpoint import load_model
from tenfold.llm.stability import RunLog, Spike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "Pangu Team: Pangu Ultra. 2025, arXiv 2504.07866"
GAIN_NAMES = {
    "pre_attention_norm": "before attention",
    "post_attention_norm": "after attention",
    "pre_mlp_norm": "before feed-forward",
    "post_mlp_norm": "after feed-forward",
}


def draw_steps(
    axes: Axes,
    series: Mapping[str, Sequence[float]],
    y_label: str,
    log_y: bool = False,
    spikes: Mapping[str, Sequence[Spike]] | None = None,
) -> None:
    """A thin line per run over its steps, every step drawn, with a mark on each spike.

    Args:
        axes: to draw on.
        series: name -> values of steps 1, 2, ...
        y_label: what they are, with the unit.
        log_y: logarithmic axis.
        spikes: name -> spikes to mark.
    """
    for name, values in series.items():
        (line,) = axes.plot(range(1, len(values) + 1), values, linewidth=1.0, label=name)
        for spike in (spikes or {}).get(name, ()):
            place = min(spike.step, len(values)) - 1
            axes.plot(place + 1, values[place], "v", color=line.get_color(), markersize=7)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel("step (triangles: loss spikes)" if any((spikes or {}).values()) else "step")
    axes.set_ylabel(y_label)


def plot_steps(
    series: Mapping[str, Sequence[float]],
    y_label: str,
    log_y: bool = False,
    spikes: Mapping[str, Sequence[Spike]] | None = None,
) -> Figure:
    """`draw_steps` as a figure of its own."""
    figure, axes = new_figure(7.2, 3.4)
    with house_style():
        draw_steps(axes, series, y_label, log_y, spikes)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=4)
    return figure


def plot_stability(
    losses: Mapping[str, Sequence[float]],
    norms: Mapping[str, Sequence[float]],
    spikes: Mapping[str, Sequence[Spike]],
    loss_label: str,
) -> Figure:
    """Loss with spikes marked, and gradient norm, side by side (as the paper's Figs. 7 and 8)."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_steps(left, losses, loss_label, spikes=spikes)
        draw_steps(right, norms, "gradient norm", log_y=True)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def plot_layers(
    kinds: Mapping[str, Mapping[str, Sequence[float]]], statistic: str, y_label: str, log_y: bool
) -> Figure:
    """One line per kind over the layers."""
    series = {
        kind: (list(range(1, len(values[statistic]) + 1)), list(values[statistic]))
        for kind, values in kinds.items()
        if statistic in values
    }
    return plot_lines(series, "layer", y_label, log_y=log_y)


def run_panels(log: RunLog, spikes: Sequence[Spike]) -> list[report.Panel]:
    """Loss and gradient norm of a run (Fig. 6, Fig. 7)."""
    told = f"{len(log.losses)} steps, {len(spikes)} spikes, from {log.losses[0]:.2f} to {log.losses[-1]:.2f}"
    return [
        report.plot_panel(
            plot_steps({"loss": log.losses}, "loss, nats a token", spikes={"loss": spikes}),
            alt=f"Loss by step: {told}.",
            caption="Loss of every step, not smoothed. A spike stands above the median of the 50 steps before by more "
            "than 0.2 nat and by more than 6 robust standard deviations.",
        ),
        report.plot_panel(
            plot_steps({"gradient norm": log.norms}, "gradient norm", log_y=True),
            alt=f"Gradient norm by step, largest {max(log.norms):.3g}.",
            caption="Gradient norm of every step, before clipping.",
        ),
    ]


def look_panels(row: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[report.Panel]:
    """Gains and activations by layer (Figs. 10 and 9), of one look at a model.

    Args:
        row: the look.
        first: an earlier one, which the captions compare with.
    """
    gains = {GAIN_NAMES[kind]: values for kind, values in row["gains"].items()}
    acts = {kind: values for kind, values in row["activations"].items() if "std" in values}
    panels = []
    for kinds, what, statistic, y_label, log_y in (
        (gains, "Gains of the norms", "mean", "mean gain", False),
        (gains, "Gains of the norms", "std", "standard deviation of gains", False),
        (acts, "Activations", "mean", "mean activation", False),
        (acts, "Activations", "std", "standard deviation of activations", True),
        (acts, "Activations", "top", "largest activation", True),
    ):
        before = ""
        if first is not None:
            earlier = first["gains"] if kinds is gains else first["activations"]
            own = {GAIN_NAMES.get(kind, kind): values for kind, values in earlier.items()}
            parts = [f"{kind} {_mean(own[kind][statistic]):.3g}" for kind in kinds if statistic in own.get(kind, {})]
            before = f" At step {first['step']}, on average over layers: {', '.join(parts)}."
        told = ", ".join(f"{kind} {_mean(values[statistic]):.3g}" for kind, values in kinds.items())
        panels.append(
            report.plot_panel(
                plot_layers(kinds, statistic, y_label, log_y),
                alt=f"{y_label} by layer; averages: {told}.",
                caption=f"{what} by layer at step {row['step']}: {y_label}.{before}",
                wide=False,
            )
        )
    return panels


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def inspect(target: str, output: Path, text: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Write the report on a run's folder, or on any model that can be loaded.

    Args:
        target: folder of a run of `pretrain`, or a model's name or path.
        output: the page, .html; its figures as JSON go beside it.
        text: what activations of a model are taken on; by default a built-in excerpt.
        device: where a model runs.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: neither a run nor a model.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"target": target}
    panels: list[report.Panel] = []
    figures: list[report.Figure] = []
    if (Path(target) / "metrics.jsonl").is_file():
        log = stability.read_run(target)
        if not log.losses:
            raise UserError(f"{target}: no step of this run is recorded yet")
        found |= stability.summary(log)
        panels += run_panels(log, found["spike_list"])
        norms = found["gradient_norm"]
        figures = [
            report.Figure("Loss spikes", str(found["spikes"]), "", f"largest {found['largest_spike']:.2f} nat"),
            report.Figure("Last loss", f"{log.losses[-1]:.3f}", "nats a token"),
        ]
        if norms:
            figures.append(
                report.Figure(
                    "Gradient norm, largest over median",
                    f"{norms.ratio:.3g}",
                    "",
                    f"standard deviation of log10: {norms.spread:.3f}",
                )
            )
        looks, first = log.looks, log.looks[0] if len(log.looks) > 1 else None
        row = looks[-1] if looks else None
    else:
        row, first = look_at_model(target, text, device), None
    if row:
        panels += look_panels(row, first)
        found["look"] = row
    station = report.Station(
        room="llm",
        title=Path(target).name,
        paper=PAPER,
        claim="A stable run has no loss spikes, steady gradient norms and activations whose spread does not grow; the "
        "gains after sub-layers grow with depth.",
        command=f"tenfold llm inspect {target} -o {output.name}",
        panels=panels,
        figures=figures,
        seconds=time.perf_counter() - started,
    )
    write_bytes(output, report.render_page(f"Stability of {Path(target).name}", [station]).encode())
    write_json(output.with_suffix(".json"), found)
    return found


def look_at_model(name: str, text: Path | None, device: str, tokens: int = 512) -> dict[str, Any]:
    """Gains of a model, and its activations on the beginning of a text.

    Raises:
        UserError: no such model or text, or the text is empty.
    """
    from tenfold.llm.data import TextFiles

    loaded = load_model(name, device, torch.float32)
    with resources.as_file(resources.files("tenfold.llm") / "assets" / "sherlock.txt.gz") as built_in:
        piece = next(TextFiles(text or built_in).pieces())
    if loaded.tokenizer is None:
        raise UserError(f"{name}: has no tokenizer beside it, which is needed to run it on a text")
    ids = loaded.tokenizer.encode(piece[: 8 * tokens])[: min(tokens, loaded.model.config.context)]
    loaded.model.eval()
    return stability.look(loaded.model, torch.tensor([ids]), 0)
