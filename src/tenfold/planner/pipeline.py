"""Layers to stages, and building blocks to stage times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenfold.planner import schedules
from tenfold.planner.config import Model, Plan
from tenfold.planner.operators import UnitSeconds
from tenfold.planner.simulation import StageTimes


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage (chunk) holds."""

    dense: int
    moe: int
    noop: int
    mtp: int
    head: bool
    embedding: bool

    @property
    def layers(self) -> int:
        """Decoder layers of the stage, without multi-token-prediction layers."""
        return self.dense + self.moe


def partition(model: Model, plan: Plan, head_weight: float = 1.0, mtp_weight: float = 2.0) -> list[Stage]:
    """Spread the layers over the stages, in order; the no-op slots go where the head, the MTP layers and the
    embedding already weigh.

    Args:
        model: the shape.
        plan: its schedule, pp and vpp give the stages.
        head_weight, mtp_weight: cost of head and MTP layers in layers, which the emptying weighs.

    Returns:
        One `Stage` per stage of the schedule, in stage order (for dualpipe the second direction repeats the first).
    """
    schedule = plan.resolved_schedule()
    home = schedules.placement(schedule, plan.pp, plan.vpp)
    parts = plan.pp if schedule == "dualpipe" else len(home)
    capacity = -(-model.layers // parts)
    counts = [capacity] * parts
    extra = [0.0] * plan.pp
    extra[home[parts - 1]] += head_weight + model.mtp * mtp_weight
    extra[home[0]] += 0.1
    load = list(extra)
    for stage, rank in enumerate(home[:parts]):
        load[rank] += counts[stage]
    for _ in range(capacity * parts - model.layers):
        rank = max(
            (r for r in range(plan.pp) if any(counts[s] for s in range(parts) if home[s] == r)),
            key=lambda r: (load[r], r),
        )
        stage = max(s for s in range(parts) if home[s] == rank and counts[s])
        counts[stage] -= 1
        load[rank] -= 1
    stages = []
    first = 0
    dense_left = model.layers - model.moe_layers
    for index, count in enumerate(counts):
        dense = max(0, min(count, dense_left - first))
        first += count
        last = index == parts - 1
        stages.append(Stage(dense, count - dense, capacity - count, model.mtp if last else 0, last, index == 0))
    return stages * 2 if schedule == "dualpipe" else stages


def stage_times(stages: list[Stage], u: UnitSeconds, plan: Plan) -> StageTimes:
    """Forward, backward and weight seconds of every stage.

    Args:
        stages: from `partition`.
        u: scalar unit seconds.
        plan: whether sends run beside compute (chunked schedules) or hold the stage.
    """

    def total(stage: Stage, dense: Any, moe: Any, mtp: Any, head: Any, embed: Any) -> float:
        return float(
            stage.dense * dense
            + stage.moe * moe
            + stage.mtp * mtp
            + (head if stage.head else 0.0)
            + (embed if stage.embedding else 0.0)
        )

    chunked = plan.vpp > 1 or plan.resolved_schedule() in ("zb-v", "dualpipe", "dualpipev")
    hold = 0.0 if chunked or plan.pp == 1 else float(u.send)
    forward = [
        total(s, u.dense_forward, u.moe_forward, u.mtp_forward, u.head_forward, u.embed_forward) + hold for s in stages
    ]
    backward = [
        total(s, u.dense_backward, u.moe_backward, u.mtp_backward, u.head_backward, u.embed_backward) + hold
        for s in stages
    ]
    weight = [total(s, u.dense_weight, u.moe_weight, u.mtp_weight, u.head_weight, 0.0) for s in stages]
    # The MTP layer's experts pair as well; its head does not change.
    moe = any(stage.moe for stage in stages)
    mtp_f = u.mtp_forward + (u.moe_pair_forward - u.moe_forward if moe else 0.0)
    mtp_b = u.mtp_backward + (u.moe_pair_backward - u.moe_backward if moe else 0.0)
    pair_f = [
        total(s, u.dense_forward, u.moe_pair_forward, mtp_f, u.head_forward, u.embed_forward) + hold for s in stages
    ]
    pair_b = [
        total(s, u.dense_backward, u.moe_pair_backward, mtp_b, u.head_backward, u.embed_backward) + hold for s in stages
    ]
    return StageTimes(forward, backward, weight, float(u.send), pair_f, pair_b)
