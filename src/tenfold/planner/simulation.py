"""Event simulation of a pipeline schedule: an action starts when its rank is free and its inputs have arrived.

The order of a schedule is compiled once into a topological list; a run is then one pass over it, or, where many ranks
act at once, one array operation for all that can. `steady.py` plays long steps by their repetition.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner import schedules
from tenfold.planner.adaptive import Cycle, adaptive_order
from tenfold.planner.schedules import Action, Entry

T = TypeVar("T")
_WIDE = 20  # entries of a mean group from which on arrays are faster than a loop


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on every stage.

    Attributes:
        forward: F of every stage [stages].
        backward: B of every stage (input and weight part together) [stages].
        weight: the part of B that only makes weight gradients [stages].
        send: seconds that an activation or gradient needs to the neighbour rank.
        pair_forward, pair_backward: F and B where both run as a joined pair [stages]; None: the same as alone.
        order_key: from `order_key` of other times, whose order an adaptive schedule shall keep; None: its own.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    send: float = 0.0
    pair_forward: Sequence[float] | None = None
    pair_backward: Sequence[float] | None = None
    order_key: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slice:
    """One bar of the timeline; times in seconds."""

    rank: int
    start: float
    end: float
    actions: Entry

    @property
    def name(self) -> str:
        """`<stage>F<micro-batch>`, joined by + for a pair."""
        return "+".join(f"{stage}{kind}{mb}" for kind, stage, mb in self.actions)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A schedule laid out so that every input of an entry comes before it.

    Attributes:
        schedule, pp, vpp, microbatches: what was laid out.
        stages: stages of the pipeline.
        rank, slot: of every entry [entries]; a slot is a kind (or pair of kinds) of action on its stage.
        first, second: entries that an entry waits for, -1 for none [entries].
        first_far, second_far: whether those come from another rank [entries].
        before: the entry before on the same rank, -1 for none [entries].
        entries: their actions.
        slots: kind and stage of the actions of every slot.
        levels: places where the entries divide into groups that wait only for groups before.
        waits: per group, indices of what its entries wait for [2 or 3, entries of the group] into the ends followed by
            a zero, and then the same with a send; empty where groups are too small to gain by arrays.
        in_flight: chunks held at some moment, every distinct state once, per rank [states, stages on rank].
        local_stages: stages of every rank.
        cycle: what the scheduler found to repeat (adaptive only).
    """

    schedule: str
    pp: int
    vpp: int
    microbatches: int
    stages: int
    rank: np.ndarray
    slot: np.ndarray
    first: list[int]
    first_far: list[bool]
    second: list[int]
    second_far: list[bool]
    before: list[int]
    entries: list[Entry]
    slots: list[tuple[tuple[str, int], ...]]
    levels: list[int]
    waits: list[np.ndarray]
    in_flight: list[np.ndarray]
    local_stages: tuple[tuple[int, ...], ...]
    cycle: Cycle | None


def _input_of(action: Action, last: set[int], chain_start: set[int]) -> tuple[str, int, int] | None:
    kind, stage, mb = action
    if kind == "F":
        return None if stage in chain_start else ("F", stage - 1, mb)
    if kind in "BI":
        return ("F", stage, mb) if stage in last else ("b", stage + 1, mb)
    return ("b", stage, mb)


def order_key(times: StageTimes) -> tuple[int, ...]:
    """Stage times in hundredths of the mean pair: what the adaptive order is chosen from (and cached by)."""
    columns = (
        times.forward,
        times.backward,
        times.weight,
        times.pair_forward or times.forward,
        times.pair_backward or times.backward,
        (times.send,),
    )
    unit = 0.01 * (sum(columns[3]) + sum(columns[4])) / len(times.forward) or 1.0
    return tuple(round(value / unit) for column in columns for value in column)


def compile_schedule(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None) -> Compiled:
    """Lay a schedule's entries in an order in which every input comes first.

    Args:
        schedule, pp, vpp, microbatches: as in `schedules.generate`.
        times: stage times, from which the adaptive schedule chooses its order (None: equal stages, B twice F).

    Raises:
        UserError: the schedule deadlocks (a hand-made order may).
    """
    if schedule != "adaptive":
        return _compile(schedule, pp, vpp, microbatches, ())
    if times is None:
        one = [1.0] * (pp * vpp)
        times = StageTimes(one, [2.0] * (pp * vpp), one)
    return _compile(schedule, pp, vpp, microbatches, times.order_key or order_key(times))


@lru_cache(maxsize=64)
def _compile(schedule: str, pp: int, vpp: int, microbatches: int, key: tuple[int, ...]) -> Compiled:
    cycle = None
    if schedule == "adaptive":
        forward, backward, weight, pair_f, pair_b = (key[i * pp * vpp : (i + 1) * pp * vpp] for i in range(5))
        order, cycle = adaptive_order(pp, vpp, microbatches, forward, backward, weight, pair_f, pair_b, key[-1])
    else:
        order = schedules.generate(schedule, pp, vpp, microbatches)
    home = schedules.placement(schedule, pp, vpp)
    stages = len(home)
    chains = [(0, pp - 1), (pp, 2 * pp - 1)] if schedule == "dualpipe" else [(0, stages - 1)]
    starts, ends = {chain[0] for chain in chains}, {chain[1] for chain in chains}
    made: dict[tuple[str, int, int], int] = {}
    rank_of: list[int] = []
    slot_of: list[int] = []
    firsts: list[int] = []
    first_far: list[bool] = []
    seconds: list[int] = []
    second_far: list[bool] = []
    before: list[int] = []
    level: list[int] = []
    latest = [-1] * len(order)
    entries: list[Entry] = []
    slots: dict[tuple[tuple[str, int], ...], int] = {}
    cursor = [0] * len(order)
    waiting: dict[tuple[str, int, int], list[int]] = {}
    ready = deque(range(len(order)))
    while ready:
        rank = ready.popleft()
        line = order[rank]
        while cursor[rank] < len(line):
            entry = line[cursor[rank]]
            inputs: list[tuple[int, bool]] = []
            blocked = None
            for action in entry:
                need = _input_of(action, ends, starts)
                if need is None or action[0] == "W":
                    continue
                if need not in made:
                    blocked = need
                    break
                inputs.append((made[need], home[need[1]] != rank))
            if blocked is not None:
                waiting.setdefault(blocked, []).append(rank)
                break
            index = len(entries)
            entries.append(entry)
            rank_of.append(rank)
            slot_of.append(slots.setdefault(tuple((a[0], a[1]) for a in entry), len(slots)))
            one = inputs[0] if inputs else (-1, False)
            two = inputs[1] if len(inputs) > 1 else (-1, False)
            firsts.append(one[0])
            first_far.append(one[1])
            seconds.append(two[0])
            second_far.append(two[1])
            before.append(latest[rank])
            latest[rank] = index
            level.append(1 + max((level[i] for i in (before[-1], one[0], two[0]) if i >= 0), default=-1))
            for kind, stage, mb in entry:
                if kind == "W":
                    continue
                output = ("F" if kind == "F" else "b", stage, mb)
                made[output] = index
                ready.extend(waiting.pop(output, []))
            cursor[rank] += 1
    stuck = [rank for rank, line in enumerate(order) if cursor[rank] < len(line)]
    if stuck:
        raise UserError(
            f"schedule: {schedule} with pp {pp}, vpp {vpp}, {microbatches} micro-batches waits for itself on "
            f"rank {stuck[0]}"
        )
    local = local_stages(schedule, pp, vpp)
    flights = []
    for rank, line in enumerate(order):
        where = {stage: i for i, stage in enumerate(local[rank])}
        steps = []
        for entry in line:
            change = [0] * len(local[rank])
            for kind, stage, _ in entry:
                if kind == "F":
                    change[where[stage]] += 1
            steps.append(change)
            release = [0] * len(local[rank])
            for kind, stage, _ in entry:
                if kind in "BW":
                    release[where[stage]] -= 1
            steps.append(release)
        held = np.cumsum(np.array(steps or [[0] * len(local[rank])], dtype=np.int32), axis=0)
        # What is held comes back again and again; each state once is enough, in the order of its first time.
        flights.append(held[np.sort(np.unique(held, axis=0, return_index=True)[1])])
    # Level by level: the same order for the loop, and groups for the arrays.
    by_level = np.argsort(level, kind="stable")
    place = np.empty(len(entries) + 1, dtype=np.int64)
    place[by_level], place[-1] = np.arange(len(entries)), -1

    def moved(sources: list[int]) -> list[int]:
        return [int(i) for i in place[np.array(sources, dtype=np.int64)[by_level]]]

    def sorted_by_level(values: list[T]) -> list[T]:
        return [values[i] for i in by_level]

    compiled = Compiled(
        schedule=schedule,
        pp=pp,
        vpp=vpp,
        microbatches=microbatches,
        stages=stages,
        rank=np.array(rank_of)[by_level],
        slot=np.array(slot_of)[by_level],
        first=moved(firsts),
        first_far=sorted_by_level(first_far),
        second=moved(seconds),
        second_far=sorted_by_level(second_far),
        before=moved(before),
        entries=sorted_by_level(entries),
        slots=list(slots),
        levels=np.searchsorted(np.sort(level), np.arange(max(level, default=-1) + 2)).tolist(),
        waits=[],
        in_flight=flights,
        local_stages=local,
        cycle=cycle,
    )
    return replace(compiled, waits=_waits(compiled))


def _waits(compiled: Compiled) -> list[np.ndarray]:
    count, edges = len(compiled.entries), compiled.levels
    if count < _WIDE * len(edges):
        return []
    columns = [np.array(compiled.before)]
    for source, far in ((compiled.first, compiled.first_far), (compiled.second, compiled.second_far)):
        if max(source) >= 0:
            columns.append(np.array(source) + np.where(far, count + 1, 0))
    table = np.stack([np.where(column < 0, count, column) for column in columns])
    return [np.ascontiguousarray(table[:, one:two]) for one, two in itertools.pairwise(edges)]


def seconds_of_entries(compiled: Compiled, times: StageTimes) -> np.ndarray:
    """Seconds of every entry [entries]."""
    forward, backward, weight = times.forward, times.backward, times.weight
    seconds = []
    for slot in compiled.slots:
        if len(slot) == 2:
            fwd = (times.pair_forward or forward)[slot[0][1]]
            bwd = (times.pair_backward or backward)[slot[1][1]]
            seconds.append(fwd + bwd)
            continue
        kind, stage = slot[0]
        if kind == "F":
            seconds.append(forward[stage])
        elif kind == "B":
            seconds.append(backward[stage])
        else:
            seconds.append(weight[stage] if kind == "W" else backward[stage] - weight[stage])
    return np.array(seconds, dtype=float)[compiled.slot]


def run(compiled: Compiled, seconds: np.ndarray, send: float) -> np.ndarray:
    """End of every entry [entries], from their seconds and those of a send."""
    if compiled.waits:
        return _run_by_levels(compiled, seconds, send)
    free = [0.0] * compiled.pp
    end = [0.0] * (len(compiled.entries) + 1)  # the last element stands for "no input"
    columns = zip(
        compiled.rank.tolist(),
        seconds.tolist(),
        compiled.first,
        compiled.first_far,
        compiled.second,
        compiled.second_far,
        strict=True,
    )
    for index, (rank, length, first, far, second, second_far) in enumerate(columns):
        start = free[rank]
        arrival = end[first] + send if far else end[first]
        if arrival > start:
            start = arrival
        if second >= 0:
            arrival = end[second] + send if second_far else end[second]
            if arrival > start:
                start = arrival
        free[rank] = end[index] = start + length
    return np.array(end[:-1])


def _run_by_levels(compiled: Compiled, seconds: np.ndarray, send: float) -> np.ndarray:
    count = len(seconds)
    both = np.zeros(2 * (count + 1))
    end, sent = both[: count + 1], both[count + 1 :]
    for waits, one, two in zip(compiled.waits, compiled.levels, compiled.levels[1:], strict=False):
        arrived = both.take(waits)
        stop = end[one:two]
        np.maximum(arrived[0], arrived[1], out=stop)
        if len(arrived) > 2:
            np.maximum(stop, arrived[2], out=stop)
        stop += seconds[one:two]
        np.add(stop, send, out=sent[one:two])
    return end[:-1]


def timeline(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> list[Slice]:
    """Every action with its start and end, sorted by rank and start."""
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    seconds = seconds_of_entries(compiled, times)
    end = run(compiled, seconds, times.send)
    bars = [
        Slice(rank, stop - length, stop, entry)
        for rank, length, stop, entry in zip(
            compiled.rank.tolist(), seconds.tolist(), end.tolist(), compiled.entries, strict=True
        )
    ]
    return sorted(bars, key=lambda bar: (bar.rank, bar.start))


def peak_in_flight(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None) -> list[int]:
    """Chunk activations held at the worst moment of every rank (I frees nothing, B and W free the chunk)."""
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    return [int(flight.sum(axis=1).max()) for flight in compiled.in_flight]


@lru_cache(maxsize=1024)
def local_stages(schedule: str, pp: int, vpp: int) -> tuple[tuple[int, ...], ...]:
    """Stages of every rank."""
    mine: list[list[int]] = [[] for _ in range(pp)]
    for stage, rank in enumerate(schedules.placement(schedule, pp, vpp)):
        mine[rank].append(stage)
    return tuple(map(tuple, mine))


def busy_seconds(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> list[float]:
    """Seconds that every rank works."""
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    worked: list[float] = np.bincount(compiled.rank, seconds_of_entries(compiled, times), pp).tolist()
    return worked
