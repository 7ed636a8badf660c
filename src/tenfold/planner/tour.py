"""The room's station: the published Pangu Ultra MoE layout on 6,144 devices, baseline against optimised, and the best
plan of a search."""

from __future__ import annotations

from pathlib import Path

from tenfold.core.report import Figure, Panel, Station, plot_panel, table_panel
from tenfold.planner import plots
from tenfold.planner.predictor import Estimate
from tenfold.planner.reproduce import PUBLISHED_RATIO, PUBLISHED_TOKENS, pangu, pangu_search

_SHOWN = 64  # micro-batches in the pictures: all of a step


def tour(workdir: Path) -> Station:
    """Run the station; it needs no files, so `workdir` stays empty."""
    answer = pangu()
    searched = pangu_search(simulate_best=60, sample=100)
    found = searched.found
    best = found.best[0]
    panels = [
        plot_panel(
            plots.timeline_figure(
                [
                    ("baseline: interleaved, exposed all-to-all, full recompute", answer.baseline.timeline(_SHOWN)),
                    (
                        "optimised: forward and backward joined, fine-grained recompute and swap",
                        answer.optimised.timeline(_SHOWN),
                    ),
                ]
            ),
            "Two pipeline timelines of sixteen ranks on one time axis; the optimised one is shorter.",
            "One step of the published layout, 64 micro-batches. White is idle time.",
        ),
        plot_panel(
            plots.breakdown_figure(
                [(name, estimate.breakdown) for name, estimate in answer.steps]
                + [("best of the search", best.breakdown)]
            ),
            "Stacked bars: where the seconds of a step go, technique by technique.",
            "Where a step's time goes as the paper's techniques are added one after the other.",
        ),
        plot_panel(
            plots.memory_figure(
                answer.optimised.memory, answer.optimised.memory_limit_gib, "memory of the optimised run"
            ),
            "Stacked bars: memory of every pipeline rank below the limit.",
            "Memory per pipeline rank; a knapsack per rank chose what is recomputed or moved to the host.",
        ),
        table_panel(
            ["best plans", "tokens/s/device", "MFU", "GiB"],
            [
                (
                    e.plan.describe(),
                    f"{e.tokens_per_s_per_device:.0f}",
                    f"{100 * e.mfu:.1f}%",
                    f"{e.peak_memory_gib:.0f}",
                )
                for e in found.best[:5]
            ],
            f"The best of {found.candidates} layouts. Of {searched.sample} drawn from those that fit, "
            f"{100 * searched.place:.0f}% are faster than the published one.",
            best=0,
        ),
    ]
    figures = [
        Figure("optimised over baseline, per device", f"{answer.ratio:.2f}", "x", f"published: {PUBLISHED_RATIO:.2f}x"),
        Figure(
            "optimised throughput",
            f"{answer.optimised.tokens_per_s_per_device:.0f}",
            "tokens/s/device",
            f"published: {PUBLISHED_TOKENS['optimised']:.0f}",
        ),
        Figure("61 layers in 64 slots over 66 layers", f"{100 * answer.slot_gain:+.0f}", "%", "published: about +15%"),
        Figure("plans scored", f"{found.candidates}", "", f"{found.plans_per_second:.0f} a second"),
    ]
    return Station(
        room="planner",
        title="Training-system simulator and search of Pangu Ultra MoE",
        paper="Pangu Ultra MoE: How to Train Your Big MoE on Ascend NPUs, 2025, arXiv 2505.04519",
        claim="A simulator that needs no cluster chooses model shape and layout; on 6K NPUs the optimised "
        "system trains the 718B model 1.6 times as "
        "fast per device as the baseline.",
        command="tenfold planner search --model pangu-ultra-moe --hardware ascend-800t-a2 --devices 6144 --gbs "
        "6144 --seq 8192",
        panels=panels,
        figures=figures,
        notes=(
            "Assumed, because it was not published: sequence length 8192, 64 micro-batches, the baseline in the "
            "same layout.",
            "No throughput of this hardware was in the calibration; its efficiencies are the priors.",
        ),
    )


def report_station(estimate: Estimate, microbatches: int | None = None) -> Station:
    """One estimate as a station, for `tenfold planner trace --output report.html`."""
    count = microbatches or min(
        estimate.microbatches,
        max(_SHOWN, 2 * estimate.plan.pp) // estimate.plan.pp * estimate.plan.pp or estimate.microbatches,
    )
    panels: list[Panel] = [
        plot_panel(
            plots.timeline_figure([(estimate.plan.describe(), estimate.timeline(count))]),
            "Timeline of the pipeline.",
            f"{count} micro-batches.",
        ),
        plot_panel(plots.breakdown_figure([("step", estimate.breakdown)]), "Where the seconds of a step go."),
        plot_panel(plots.memory_figure(estimate.memory, estimate.memory_limit_gib), "Memory of every pipeline rank."),
    ]
    return Station(
        room="planner",
        title=f"{estimate.model.name} on {estimate.devices} x {estimate.hardware}",
        paper=estimate.model.source or "a shape of your own",
        claim=estimate.plan.describe(),
        command="tenfold planner simulate",
        panels=panels,
        figures=[
            Figure(
                "throughput",
                f"{estimate.tokens_per_s_per_device:.0f}",
                "tokens/s/device",
                f"80% interval {estimate.low:.0f} to {estimate.high:.0f}",
            ),
            Figure("step", f"{estimate.step_seconds:.2f}", "s"),
            Figure("MFU", f"{100 * estimate.mfu:.1f}", "%", estimate.mfu_convention),
            Figure("memory", f"{estimate.peak_memory_gib:.1f}", "GiB", f"of {estimate.memory_limit_gib:.1f} usable"),
        ],
    )
