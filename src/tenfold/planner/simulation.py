"""Event simulation of a pipeline schedule: an action starts when its rank is free and its inputs have arrived.

The order of a schedule is compiled once into a topological list; a run is then one pass over it. Long runs are
periodic (the recurrence
is linear in the max-plus algebra), so the time for many micro-batches is extended from two shorter runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner import schedules
from tenfold.planner.adaptive import adaptive_order
from tenfold.planner.schedules import Action, Entry


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


@dataclass(frozen=True)
class _Compiled:
    ranks: int
    stages: int
    rank: list[int]
    slot: list[int]
    first: list[int]
    first_far: list[bool]
    second: list[int]
    second_far: list[bool]
    entries: list[Entry]
    slots: list[tuple[tuple[str, int], ...]]
    in_flight: list[np.ndarray]  # per rank [events, stages on rank]
    joined: float  # share of the forwards that run in a pair
    local_stages: list[list[int]]


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


def compile_schedule(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None) -> _Compiled:
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


@lru_cache(maxsize=256)
def _compile(schedule: str, pp: int, vpp: int, microbatches: int, key: tuple[int, ...]) -> _Compiled:
    if schedule == "adaptive":
        forward, backward, weight, pair_f, pair_b = (key[i * pp * vpp : (i + 1) * pp * vpp] for i in range(5))
        order = adaptive_order(pp, vpp, microbatches, forward, backward, weight, pair_f, pair_b, key[-1])
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
    local = [[stage for stage in range(stages) if home[stage] == rank] for rank in range(len(order))]
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
        flights.append(np.cumsum(np.array(steps or [[0] * len(local[rank])], dtype=np.int32), axis=0))
    forwards = sum(1 for entry in entries for action in entry if action[0] == "F")
    joined = sum(len(entry) == 2 for entry in entries) / max(1, forwards)
    return _Compiled(
        len(order),
        stages,
        rank_of,
        slot_of,
        firsts,
        first_far,
        seconds,
        second_far,
        entries,
        list(slots),
        flights,
        joined,
        local,
    )


def _slot_seconds(compiled: _Compiled, times: StageTimes) -> list[float]:
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
    return seconds


def _run(compiled: _Compiled, times: StageTimes) -> tuple[list[float], list[float]]:
    """End of every entry and busy seconds of every rank."""
    seconds = _slot_seconds(compiled, times)
    send = times.send
    free = [0.0] * compiled.ranks
    busy = [0.0] * compiled.ranks
    end = [0.0] * (len(compiled.entries) + 1)  # the last element stands for "no input"
    columns = zip(
        compiled.rank,
        compiled.slot,
        compiled.first,
        compiled.first_far,
        compiled.second,
        compiled.second_far,
        strict=True,
    )
    for index, (rank, slot, first, far, second, second_far) in enumerate(columns):
        start = free[rank]
        arrival = end[first] + send if far else end[first]
        if arrival > start:
            start = arrival
        if second >= 0:
            arrival = end[second] + send if second_far else end[second]
            if arrival > start:
                start = arrival
        length = seconds[slot]
        busy[rank] += length
        free[rank] = end[index] = start + length
    return end[:-1], busy


def _runs(schedule: str, pp: int, vpp: int, microbatches: int) -> list[tuple[int, float]]:
    """The runs whose makespans, weighed, give that of `microbatches`: long runs are extended from two shorter ones, a
    period apart, because the steady state repeats."""
    # With one chunk a rank, every micro-batch repeats the one before; with several, every round of pp.
    single = schedule in ("1f1b", "zb-h1")
    period = max(1, pp // 2) if single else (2 * pp if schedule == "dualpipe" else pp)
    warm = 4 * pp if single else 5 * period
    if schedule == "adaptive":
        # A chosen order repeats only nearly: its pace is measured over several rounds.
        period *= 4
    if microbatches <= warm + 2 * period or microbatches * vpp < 64:
        return [(microbatches, 1.0)]
    short = warm + (microbatches - warm) % period
    rest = (microbatches - short - period) / period
    return [(short, -rest), (short + period, 1.0 + rest)]


@dataclass(frozen=True)
class Played:
    """A step played through: seconds from the first action to the last, busy seconds of every rank, and the share of
    the forwards that run joined with a backward."""

    makespan: float
    busy: list[float]
    joined: float


def play(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> Played:
    """Play a step; long ones are extended from two shorter runs."""
    whole, busy, joined = 0.0, [0.0] * pp, 0.0
    for count, share in _runs(schedule, pp, vpp, microbatches):
        compiled = compile_schedule(schedule, pp, vpp, count, times)
        end, worked = _run(compiled, times)
        whole += share * max(end)
        busy = [one + share * two for one, two in zip(busy, worked, strict=True)]
        joined = compiled.joined
    return Played(whole, busy, joined)


def makespan(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> float:
    """Seconds from the first action to the last."""
    return play(schedule, pp, vpp, microbatches, times).makespan


@dataclass(frozen=True)
class Slopes:
    """How often every stage's seconds lie on the critical path: derivatives of the makespan, with the fields of
    `StageTimes` [stages]."""

    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray
    send: float
    pair_forward: np.ndarray
    pair_backward: np.ndarray


def makespan_slopes(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> Slopes:
    """Derivatives of `makespan` at fixed order: the makespan is the sum of what lies on its critical path."""
    columns = {name: np.zeros(len(times.forward)) for name in ("F", "B", "W", "PF", "PB")}
    sends = 0.0
    for count, share in _runs(schedule, pp, vpp, microbatches):
        compiled = compile_schedule(schedule, pp, vpp, count, times)
        seconds = _slot_seconds(compiled, times)
        end, _ = _run(compiled, times)
        before = [-1] * len(end)  # the entry before on the same rank
        latest = [-1] * compiled.ranks
        for index, rank in enumerate(compiled.rank):
            before[index], latest[rank] = latest[rank], index
        index = max(range(len(end)), key=end.__getitem__)
        while index >= 0:
            slot = compiled.slots[compiled.slot[index]]
            if len(slot) == 2:
                columns["PF"][slot[0][1]] += share
                columns["PB"][slot[1][1]] += share
            else:
                kind, stage = slot[0]
                columns["B" if kind == "I" else kind][stage] += share
                if kind == "I":
                    columns["W"][stage] -= share
            start = end[index] - seconds[compiled.slot[index]]
            sources = [(end[before[index]] if before[index] >= 0 else 0.0, before[index], 0.0)]
            for source, far in (
                (compiled.first[index], compiled.first_far[index]),
                (compiled.second[index], compiled.second_far[index]),
            ):
                if source >= 0:
                    sources.append((end[source] + (times.send if far else 0.0), source, 1.0 if far else 0.0))
            _, index, sent = min(sources, key=lambda one: abs(one[0] - start))
            sends += sent * share
    return Slopes(columns["F"], columns["B"], columns["W"], sends, columns["PF"], columns["PB"])


def timeline(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> list[Slice]:
    """Every action with its start and end, sorted by rank and start."""
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    seconds = _slot_seconds(compiled, times)
    end, _ = _run(compiled, times)
    bars = [
        Slice(rank, stop - seconds[slot], stop, entry)
        for rank, slot, stop, entry in zip(compiled.rank, compiled.slot, end, compiled.entries, strict=True)
    ]
    return sorted(bars, key=lambda bar: (bar.rank, bar.start))


def peak_in_flight(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None) -> list[int]:
    """Chunk activations held at the worst moment of every rank (I frees nothing, B and W free the chunk)."""
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    return [int(flight.sum(axis=1).max()) for flight in compiled.in_flight]


def flight_profile(
    schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None
) -> list[tuple[list[int], np.ndarray]]:
    """Per rank: its stages, and the chunk activations of each that are held after every event [events, stages]."""
    if schedule == "adaptive":
        # The run that the makespan compiles as well.
        microbatches = _runs(schedule, pp, vpp, microbatches)[-1][0]
    # Every other schedule has filled up after three rounds of pp.
    cap = 3 * pp + microbatches % pp
    if schedule not in ("gpipe", "adaptive") and microbatches > cap:
        microbatches = cap + (cap % 2 if schedule == "dualpipe" else 0)
        microbatches = max(microbatches, 2 * pp)
    compiled = compile_schedule(schedule, pp, vpp, microbatches, times)
    return [(compiled.local_stages[rank], compiled.in_flight[rank]) for rank in range(compiled.ranks)]


def local_stages(schedule: str, pp: int, vpp: int) -> list[list[int]]:
    """Stages of every rank."""
    home = schedules.placement(schedule, pp, vpp)
    return [[stage for stage, rank in enumerate(home) if rank == mine] for mine in range(pp)]


def busy_seconds(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> list[float]:
    """Seconds that every rank works."""
    return _run(compile_schedule(schedule, pp, vpp, microbatches, times), times)[1]
