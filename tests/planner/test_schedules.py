"""Orders and times of pipeline schedules, against recorded ones, a brute-force twin and closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.planner import schedules, simulation
from tenfold.planner.simulation import StageTimes

OUR_NAME = {"zbv": "zb-v", "interleaved_zb": "interleaved-zb"}
CASES = json.loads((Path(__file__).parents[1] / "data" / "planner" / "pipeline_timelines.json").read_text())


def unit_times(stages: int, chunks: int) -> StageTimes:
    unit = 1 / chunks
    return StageTimes([unit] * stages, [2 * unit] * stages, [unit] * stages)


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['schedule']}-{case['pp']}-{case['v']}-{case['microbatches']}"
)
def test_recorded_timelines_are_reproduced(case: dict) -> None:
    name, pp, v, count = OUR_NAME.get(case["schedule"], case["schedule"]), case["pp"], case["v"], case["microbatches"]
    order = schedules.generate(name, pp, v, count)
    words = {str(r): ["+".join(f"{s}{k}{m}" for k, s, m in entry) for entry in line] for r, line in enumerate(order)}
    assert words == case["order"]
    times = unit_times(pp * v, v)
    bars = simulation.timeline(name, pp, v, count, times)
    makespan = max(bar.end for bar in bars)
    assert makespan == pytest.approx(case["makespan"], abs=1e-6)
    assert simulation.makespan(name, pp, v, count, times) == pytest.approx(makespan, abs=1e-6)
    busy = simulation.busy_seconds(name, pp, v, count, times)
    assert 1 - sum(busy) / pp / makespan == pytest.approx(case["bubble_ratio"], abs=1e-6)
    assert simulation.peak_in_flight(name, pp, v, count) == case["peak_in_flight_chunks"]
    for rank, recorded in (case["timeline"] or {}).items():
        ours = [(bar.start, bar.end, bar.name) for bar in bars if bar.rank == int(rank)]
        assert [o[2] for o in ours] == [r[2] for r in recorded]
        assert [x for o in ours for x in o[:2]] == pytest.approx([x for r in recorded for x in r[:2]], abs=1e-6)


def chosen_order(pp: int, v: int, count: int, times: StageTimes) -> schedules.Order:
    """The adaptive schedule's order for these times, read off its timeline."""
    bars = simulation.timeline("adaptive", pp, v, count, times)
    return [[bar.actions for bar in bars if bar.rank == rank] for rank in range(pp)]


def brute_force(name: str, pp: int, v: int, count: int, times: StageTimes) -> float:
    """Relax all start times until nothing moves: no topological order, no cleverness."""
    home = schedules.placement(name, pp, v)
    order = chosen_order(pp, v, count, times) if name == "adaptive" else schedules.generate(name, pp, v, count)
    last = {pp - 1, 2 * pp - 1} if name == "dualpipe" else {len(home) - 1}
    first = {0, pp} if name == "dualpipe" else {0}
    end: dict[tuple[str, int, int], float] = {}
    length = {"F": times.forward, "B": times.backward, "W": times.weight}
    for _ in range(4 * len(home) * count + 10):
        before = dict(end)
        for rank, line in enumerate(order):
            free = 0.0
            for entry in line:
                start, duration = free, 0.0
                for kind, stage, mb in entry:
                    duration += times.backward[stage] - times.weight[stage] if kind == "I" else length[kind][stage]
                    source = None
                    if kind == "F" and stage not in first:
                        source = ("F", stage - 1, mb)
                    elif kind in "BI":
                        source = ("F", stage, mb) if stage in last else ("b", stage + 1, mb)
                    if source:
                        start = max(start, end.get(source, 0.0) + (times.send if home[source[1]] != rank else 0.0))
                free = start + duration
                for kind, stage, mb in entry:
                    if kind != "W":
                        end[("F" if kind == "F" else "b", stage, mb)] = free
            end[("free", rank, 0)] = free
        if end == before:
            break
    return max(value for key, value in end.items() if key[0] == "free")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zb-v", "dualpipev", "dualpipe", "adaptive"]
    ),
    half=st.integers(1, 2),
    extra=st.integers(0, 2),
    data=st.data(),
)
def test_event_simulation_equals_the_brute_force_twin(name: str, half: int, extra: int, data: st.DataObject) -> None:
    pp = 2 * half
    v = 2 if name in ("interleaved", "interleaved-zb", "zb-v", "dualpipev", "adaptive") else 1
    count = pp * (2 + extra)
    stages = len(schedules.placement(name, pp, v))
    number = st.floats(0.1, 4.0)
    forward = data.draw(st.lists(number, min_size=stages, max_size=stages))
    weight = data.draw(st.lists(number, min_size=stages, max_size=stages))
    backward = [w + data.draw(number) for w in weight]
    times = StageTimes(forward, backward, weight, send=data.draw(st.floats(0, 0.5)))
    assert simulation.makespan(name, pp, v, count, times) == pytest.approx(brute_force(name, pp, v, count, times))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["1f1b", "interleaved", "zb-v", "dualpipev", "interleaved-zb"]),
    rounds=st.integers(8, 14),
    data=st.data(),
)
def test_long_runs_are_extended_exactly(name: str, rounds: int, data: st.DataObject) -> None:
    assert_extended(name, rounds, data, rel=2e-3)


@settings(max_examples=30, deadline=None)
@given(rounds=st.integers(8, 14), data=st.data())
def test_long_adaptive_runs_are_extended_within_a_percent(rounds: int, data: st.DataObject) -> None:
    # The list scheduler has no period: which ready piece comes first may differ from round to round.
    assert_extended("adaptive", rounds, data, rel=1e-2)


def assert_extended(name: str, rounds: int, data: st.DataObject, rel: float) -> None:
    pp, v = 4, 1 if name == "1f1b" else 2
    stages = pp * v
    # One slow stage decides the period; the others differ a little.
    forward = [1.0 + 0.1 * data.draw(st.integers(0, 3)) for _ in range(stages)]
    times = StageTimes(forward, [2 * f for f in forward], [0.8 * f for f in forward], send=0.05)
    count = rounds * pp
    whole = max(bar.end for bar in simulation.timeline(name, pp, v, count, times))
    assert simulation.makespan(name, pp, v, count, times) == pytest.approx(whole, rel=rel)


@settings(max_examples=40, deadline=None)
@given(pp=st.integers(1, 8), rounds=st.integers(1, 4), v=st.integers(1, 4))
def test_every_action_runs_once_and_bubbles_meet_the_closed_forms(pp: int, rounds: int, v: int) -> None:
    count = pp * rounds
    name = "1f1b" if v == 1 else "interleaved"
    order = schedules.generate(name, pp, v, count)
    seen = [action for line in order for entry in line for action in entry]
    assert len(seen) == len(set(seen)) == 2 * pp * v * count
    makespan = simulation.makespan(name, pp, v, count, unit_times(pp * v, v))
    assert makespan == pytest.approx(3 * count + 3 * (pp - 1) / v)


def test_zero_bubble_and_dual_forms_meet_the_closed_forms() -> None:
    # F = I = W: ZB-H1 leaves (p-1)(F+B-2W), DualPipe (p/2-1)(F+B+B-3W) with the pair costing the sum of its parts.
    assert simulation.makespan("zb-h1", 8, 1, 16, unit_times(8, 1)) == pytest.approx(3 * 16 + 7 * 1)
    assert simulation.makespan("dualpipe", 8, 1, 20, unit_times(16, 1)) == pytest.approx(3 * 20 + 3 * 2)


STAGE_SECONDS = st.sampled_from([0.1, 0.9, 1.0, 1.0, 1.1, 3.0])


@settings(max_examples=60, deadline=None)
@given(
    pp=st.integers(1, 6),
    v=st.integers(1, 4),
    rounds=st.integers(2, 4),
    send=st.sampled_from([0.0, 0.1, 1.0]),
    data=st.data(),
)
def test_the_adaptive_order_runs_everything_once_for_any_stage_times(
    pp: int, v: int, rounds: int, send: float, data: st.DataObject
) -> None:
    stages, count = pp * v, pp * rounds
    forward, weight, rest, pair_f, pair_b = (
        data.draw(st.lists(STAGE_SECONDS, min_size=stages, max_size=stages)) for _ in range(5)
    )
    times = StageTimes(forward, [w + r for w, r in zip(weight, rest, strict=True)], weight, send, pair_f, pair_b)
    order = chosen_order(pp, v, count, times)  # an order that waits for itself would be refused here
    done = [action for line in order for entry in line for action in entry]
    assert len(done) == len(set(done))
    for kinds in ("F", "BI"):
        assert {a[1:] for a in done if a[0] in kinds} == {(s, m) for s in range(stages) for m in range(count)}
    assert {a[1:] for a in done if a[0] == "I"} == {a[1:] for a in done if a[0] == "W"}


def test_the_adaptive_order_holds_little_more_than_interleaving() -> None:
    for pp, v in ((4, 2), (8, 2), (8, 4)):
        plain = simulation.peak_in_flight("interleaved", pp, v, 4 * pp)
        chosen = simulation.peak_in_flight("adaptive", pp, v, 4 * pp)
        assert all(one < two <= one + pp // 2 + 3 for one, two in zip(plain, chosen, strict=True))


def test_a_heavy_last_chunk_costs_the_adaptive_order_less_than_a_fixed_one() -> None:
    pp, v, count = 8, 2, 64
    # The last rank has as much work as the others, but most of it in its last chunk.
    forward = [1.0] * (pp * v)
    forward[pp - 1], forward[-1] = 0.4, 1.6
    times = StageTimes(forward, [2 * f for f in forward], forward)
    work = 6.0 * count
    waits = {name: simulation.makespan(name, pp, v, count, times) - work for name in ("adaptive", "interleaved")}
    assert 0 < waits["adaptive"] < 0.7 * waits["interleaved"]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved", "zb-v", "dualpipev", "dualpipe", "adaptive"])
@pytest.mark.parametrize("rounds", [3, 40])
def test_slopes_are_the_derivatives_of_the_makespan(name: str, rounds: int) -> None:
    pp, v = 4, 1 if name in ("1f1b", "zb-h1", "dualpipe") else 2
    stages = len(schedules.placement(name, pp, v))
    forward = [1.0 + 0.01 * i * i for i in range(stages)]
    weight = [0.9 + 0.02 * i for i in range(stages)]
    times = StageTimes(forward, [2.1 * f for f in forward], weight, 0.05, [0.9 * f for f in forward], forward)
    times = replace(times, order_key=simulation.order_key(times))
    slopes = simulation.makespan_slopes(name, pp, v, pp * rounds, times)
    names = ("forward", "backward", "weight", "pair_forward", "pair_backward")
    whole = slopes.send * times.send + sum(float(getattr(slopes, n) @ np.array(getattr(times, n))) for n in names)
    base = simulation.makespan(name, pp, v, pp * rounds, times)
    assert whole == pytest.approx(base)
    for column in names:
        longer = [x * (1 + 1e-7) for x in getattr(times, column)]
        moved = simulation.makespan(name, pp, v, pp * rounds, replace(times, **{column: longer}))
        slope = float(getattr(slopes, column) @ np.array(getattr(times, column)))
        assert (moved - base) / 1e-7 == pytest.approx(slope, rel=1e-3, abs=1e-3 * base)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f1b", 8, 1, 4), "needs at least pp = 8, found 4"),
        (("interleaved", 8, 2, 12), "multiple of pp = 8, found 12: nearest 8, 16"),
        (("dualpipev", 8, 2, 12), "at least 2\\*pp = 16, found 12"),
        (("dualpipe", 3, 1, 12), "even pp, found 3"),
        (("zb-v", 4, 1, 8), "exactly 2 chunks"),
        (("1f1b", 4, 2, 8), "one chunk per stage"),
        (("adaptive", 4, 2, 4), "more than pp = 4"),
    ],
)
def test_schedules_that_cannot_run_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        schedules.check_schedule(*arguments)


def test_orders_agree_with_torch() -> None:
    from torch.distributed.pipelining import schedules as theirs

    for name, maker in (("zb-v", theirs.ScheduleZBVZeroBubble), ("dualpipev", theirs.ScheduleDualPipeV)):
        for pp, count in ((2, 4), (4, 8), (6, 13)):
            ours = schedules.generate(name, pp, 2, count)
            stub = maker.__new__(maker)
            stub.pp_group_size, stub.num_stages, stub._n_microbatches = pp, 2 * pp, count
            for rank in range(pp):
                stub.rank = rank
                actions = [a for a in stub._calculate_single_rank_operations(rank) if a is not None]
                parts = [a.sub_actions or (a,) for a in actions]
                words = [
                    tuple((_kind(str(x.computation_type)), x.stage_index, x.microbatch_index) for x in one)
                    for one in parts
                ]
                assert ours[rank] == words


def _kind(word: str) -> str:
    return {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}.get(
        word.split(".")[-1], word
    )
