"""Draw the pictures of the planner's README with the planner itself: `python scripts/planner_pictures.py`."""

from __future__ import annotations

from pathlib import Path

from tenfold.planner import plots, simulation
from tenfold.planner.reproduce import pangu
from tenfold.planner.simulation import Slice, StageTimes

ASSETS = Path(__file__).parents[1] / "src" / "tenfold" / "planner" / "assets"
RANKS, MICROBATCHES = 4, 8


def bars(schedule: str, chunks: int, heavy: float = 1.0) -> list[Slice]:
    """A small timeline: the work of a rank is 1 forward and 2 backward, half of that for the weights.

    Args:
        schedule: of `tenfold.planner.config.SCHEDULES`.
        chunks: chunks a rank.
        heavy: the last chunk over the others; its rank's other chunks are lighter by as much.
    """
    stages = RANKS * chunks
    forward = [1.0 / chunks] * stages
    forward[-1] *= heavy
    for stage in range(RANKS - 1, stages - 1, RANKS):
        forward[stage] -= (heavy - 1.0) / chunks / (chunks - 1)
    times = StageTimes(forward, [2.0 * f for f in forward], forward)
    return simulation.timeline(schedule, RANKS, chunks, MICROBATCHES, times)


def main() -> None:
    """Draw and write every picture."""
    panels = {
        "schedules.png": [
            ("GPipe", bars("gpipe", 1)),
            ("1F1B", bars("1f1b", 1)),
            ("interleaved", bars("interleaved", 2)),
        ],
        "zero_bubble.png": [
            ("ZB-H1", bars("zb-h1", 1)),
            ("ZB-V", bars("zb-v", 2)),
            ("DualPipeV", bars("dualpipev", 2)),
            ("adaptive pipe overlap", bars("adaptive", 2)),
        ],
        "heavy_chunk.png": [
            ("interleaved, last chunk 1.6 times as heavy", bars("interleaved", 2, 1.6)),
            ("adaptive, the same chunks", bars("adaptive", 2, 1.6)),
        ],
    }
    for name, rows in panels.items():
        plots.save_figure(plots.timeline_figure(rows), str(ASSETS / name))
    answer = pangu()
    plots.save_figure(
        plots.timeline_figure(
            [
                ("baseline: interleaved, exposed all-to-all, full recompute", answer.baseline.timeline()),
                ("optimised: joined passes, fine-grained recompute, swap", answer.optimised.timeline()),
            ]
        ),
        str(ASSETS / "pangu.png"),
    )
    plots.save_figure(
        plots.breakdown_figure([(name, estimate.breakdown) for name, estimate in answer.steps]),
        str(ASSETS / "pangu_breakdown.png"),
    )
    plots.save_figure(
        plots.memory_figure(answer.optimised.memory, answer.optimised.memory_limit_gib, "memory of the optimised run"),
        str(ASSETS / "pangu_memory.png"),
    )


if __name__ == "__main__":
    main()
