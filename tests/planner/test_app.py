"""The room's tab: its handler answers with pictures, and refuses in one sentence."""

from __future__ import annotations

import pytest

from tenfold.core.console import UserError
from tenfold.planner.app import simulate_plan

SMALL = ("llama3-8b", "h100", 64, False, "interleaved", "fine-grained", False, "flat")


def test_a_plan_is_answered_with_a_summary_and_three_pictures() -> None:
    summary, *figures = simulate_plan(*SMALL, 2, 4, 2, 1, 1, 1, 128, 4096)
    assert "tokens/s/device" in summary and "fits" in summary
    timeline, breakdown, memory = figures
    assert "of 16 micro-batches" in timeline.axes[0].get_title(loc="left")
    assert breakdown.axes and memory.axes


@pytest.mark.parametrize(
    ("changed", "words"),
    [({0: 3}, "tp: 3|devices: 64"), ({6: None}, "Global batch: give a whole number"), ({4: 2}, "without experts")],
)
def test_a_plan_that_cannot_run_is_refused_in_a_sentence(changed: dict, words: str) -> None:
    counts: list = [2, 4, 2, 1, 1, 1, 128, 4096]
    for place, value in changed.items():
        counts[place] = value
    with pytest.raises(UserError, match=words):
        simulate_plan(*SMALL, *counts)


def test_a_cluster_beyond_reason_is_refused() -> None:
    with pytest.raises(UserError, match="Devices: found"):
        simulate_plan(SMALL[0], SMALL[1], 10**9, *SMALL[3:], 2, 4, 2, 1, 1, 1, 128, 4096)


def test_the_tab_can_be_built_and_starts_from_the_published_plan() -> None:
    gradio = pytest.importorskip("gradio")
    from tenfold.planner.app import tab

    with gradio.Blocks(analytics_enabled=False) as page:
        tab()
    values = [getattr(block, "value", None) for block in page.blocks.values()]
    assert "pangu-ultra-moe" in values and 6144 in values
