"""Long steps from short ones, exactly: what repeats is played once.

In the middle of a step every rank repeats a block of its order, the same but for the micro-batches' numbers. Once the
ends of a window of blocks all lie the same seconds behind those of some blocks before, every later block must follow
with the same delay, because an entry's end is made from earlier ends by maxima and sums alone. So a short step that
reached such a window gives the long one: its makespan plus the delay times the blocks that were left out. The window
must reach back as far as the entries after it do; this is checked on the laid-out order. A step that does not come to
repeat is played whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tenfold.planner import simulation
from tenfold.planner.adaptive import Cycle
from tenfold.planner.simulation import Compiled, StageTimes, compile_schedule

_SAME = 1e-10  # relative difference of seconds that counts as rounding


@dataclass(frozen=True)
class Played:
    """A step played through: seconds from the first action to the last, busy seconds of every rank, and the share of
    the forwards that run joined with a backward."""

    makespan: float
    busy: list[float]
    joined: float


@dataclass(frozen=True)
class _Middle:
    """The repeating part of a laid-out order.

    Attributes:
        unit: micro-batches of one block.
        line: entries rank by rank, in the order of each rank [entries].
        window: places in `line` of the entries that the rest of the step depends on.
        block: length of a block on the rank of each of them [window].
        last: entries of one block of every rank.
        blocks: how many blocks back the window can be compared.
    """

    unit: int
    line: np.ndarray
    window: np.ndarray
    block: np.ndarray
    last: np.ndarray
    blocks: int


def _block(compiled: Compiled) -> Cycle | None:
    """What every rank repeats in the middle, by the construction of the schedule."""
    name, pp, vpp = compiled.schedule, compiled.pp, compiled.vpp
    if name == "adaptive":
        return compiled.cycle
    unit = 2 if name == "dualpipe" else pp if vpp > 1 and name.startswith("interleaved") else 1
    per_chunk = 3 if name in ("zb-h1", "interleaved-zb", "zb-v") else 2
    length = {"gpipe": 0, "dualpipe": 2, "dualpipev": 2, "zb-v": 6}.get(name, per_chunk * vpp * unit)
    return Cycle(unit, (length,) * pp, (0,) * pp) if length else None


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Begin and end of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    best = int(lengths.argmax())
    return int(edges[2 * best]), int(edges[2 * best + 1])


@lru_cache(maxsize=64)
def _middle(compiled: Compiled) -> _Middle | None:
    found = _block(compiled)
    if found is None:
        return None
    rank, slot = compiled.rank, compiled.slot
    number = np.array([(entry[0][2], entry[-1][2]) for entry in compiled.entries])
    shift = found.microbatches // (2 if compiled.schedule == "dualpipe" else 1)
    line = np.argsort(rank, kind="stable")
    offset = np.searchsorted(rank[line], np.arange(compiled.pp + 1))
    begin, end = np.zeros(compiled.pp, dtype=np.int64), np.zeros(compiled.pp, dtype=np.int64)
    for r, length in enumerate(found.entries):
        mine = line[offset[r] : offset[r + 1]]
        if len(mine) <= length or length == 0:
            return None
        early, late = mine[:-length], mine[length:]
        same = (slot[early] == slot[late]) & (number[early] + shift == number[late]).all(axis=1)
        same[: found.begins[r]] = False
        begin[r], end[r] = _longest_run(same)
        end[r] += length
    block = np.array(found.entries)
    place = np.empty(len(line), dtype=np.int64)
    place[line] = np.arange(len(line)) - offset[rank[line]]
    first, second = np.array(compiled.first), np.array(compiled.second)

    def inputs(after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries at or after a place of their rank, and what they wait for."""
        chosen = np.flatnonzero(place >= after[rank])
        pairs = [(chosen[source[chosen] >= 0], source[chosen][source[chosen] >= 0]) for source in (first, second)]
        return np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])

    # What lies before the middle's end must not wait for what lies after it.
    while True:
        entry, source = inputs(np.zeros_like(end))
        bad = (place[entry] < end[rank[entry]]) & (place[source] >= end[rank[source]])
        if not bad.any():
            break
        np.minimum.at(end, rank[entry[bad]], place[entry[bad]])
    _, source = inputs(end - block)
    reach = int(np.ceil((end[rank[source]] - place[source]) / block[rank[source]]).max(initial=1))
    blocks = int(((end - begin) // block).min()) - reach
    if blocks < 1:
        return None
    window = [offset[r] + np.arange(end[r] - reach * block[r], end[r]) for r in range(compiled.pp)]
    last = [line[offset[r] + np.arange(end[r] - block[r], end[r])] for r in range(compiled.pp)]
    return _Middle(
        found.microbatches,
        line,
        np.concatenate(window),
        np.concatenate([np.full(reach * length, length) for length in found.entries]),
        np.concatenate(last),
        blocks,
    )


def _delay(middle: _Middle, end: np.ndarray) -> tuple[int, float] | None:
    """Blocks from one repetition of the window to the next, and its seconds; None where the window does not repeat."""
    now = end[middle.line[middle.window]]
    for blocks in range(1, middle.blocks + 1):
        gap = now - end[middle.line[middle.window - blocks * middle.block]]
        least, most = gap.min(), gap.max()
        if most - least <= _SAME * most:
            return blocks, float(gap.mean())
    return None


def _sizes(schedule: str, pp: int, vpp: int, microbatches: int) -> Iterator[int]:
    """Short steps to try, then the whole one: each about twice as long as the one before, and of equal remainder."""
    unit = 2 if schedule == "dualpipe" else pp if vpp > 1 else 1
    size = (2 * pp + 8 if vpp == 1 else 6 * pp) * (6 if schedule == "adaptive" else 1)
    while 1.5 * size < microbatches:
        yield size + (microbatches - size) % unit
        size *= 2
    yield microbatches


@dataclass(frozen=True)
class _Extension:
    """How a step is told by a short one: `blocks` repetitions of `seconds` are left out."""

    compiled: Compiled
    middle: _Middle | None
    lengths: np.ndarray  # seconds of every entry
    end: np.ndarray
    cycle: int = 0  # micro-batches of a repetition
    repeats: int = 0
    seconds: float = 0.0


def _extension(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> _Extension:
    for size in _sizes(schedule, pp, vpp, microbatches):
        compiled = compile_schedule(schedule, pp, vpp, size, times)
        lengths = simulation.seconds_of_entries(compiled, times)
        end = simulation.run(compiled, lengths, times.send)
        if size == microbatches:
            return _Extension(compiled, None, lengths, end)
        middle = _middle(compiled)
        found = _delay(middle, end) if middle else None
        if middle is None or found is None:
            continue
        cycle = found[0] * middle.unit
        missing = (microbatches - size) % cycle
        if missing:
            # What is left over does not divide: a slightly longer step, which repeats as this one does.
            compiled = compile_schedule(schedule, pp, vpp, size + missing, times)
            middle = _middle(compiled)
            lengths = simulation.seconds_of_entries(compiled, times)
            end = simulation.run(compiled, lengths, times.send)
        return _Extension(compiled, middle, lengths, end, cycle, (microbatches - size) // cycle, found[1])
    raise AssertionError("the whole step is among the sizes")


def play(schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes) -> Played:
    """Play a step."""
    it = _extension(schedule, pp, vpp, microbatches, times)
    rank = it.compiled.rank
    busy = np.bincount(rank, it.lengths, pp)
    pairs_of = np.array([len(slot) == 2 for slot in it.compiled.slots])[it.compiled.slot]
    pairs = float(pairs_of.sum())
    if it.middle is not None:
        blocks = it.repeats * it.cycle / it.middle.unit
        busy = busy + blocks * np.bincount(rank[it.middle.last], it.lengths[it.middle.last], pp)
        pairs += blocks * float(pairs_of[it.middle.last].sum())
    forwards = microbatches * it.compiled.stages / (2 if schedule == "dualpipe" else 1)
    return Played(float(it.end.max()) + it.repeats * it.seconds, busy.tolist(), pairs / forwards)


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
    it = _extension(schedule, pp, vpp, microbatches, times)
    runs = [(it.compiled, it.lengths, it.end, 1.0 - it.repeats)]
    if it.repeats:
        # One repetition's share is the difference of two steps that it sets apart.
        longer = compile_schedule(schedule, pp, vpp, it.compiled.microbatches + it.cycle, times)
        lengths = simulation.seconds_of_entries(longer, times)
        runs.append((longer, lengths, simulation.run(longer, lengths, times.send), float(it.repeats)))
    for compiled, lengths, ends, share in runs:
        end, seconds = ends.tolist(), lengths.tolist()
        index = int(ends.argmax())
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
            start = end[index] - seconds[index]
            previous = compiled.before[index]
            sources = [(end[previous] if previous >= 0 else 0.0, previous, 0.0)]
            for source, far in (
                (compiled.first[index], compiled.first_far[index]),
                (compiled.second[index], compiled.second_far[index]),
            ):
                if source >= 0:
                    sources.append((end[source] + (times.send if far else 0.0), source, 1.0 if far else 0.0))
            _, index, sent = min(sources, key=lambda one: abs(one[0] - start))
            sends += sent * share
    return Slopes(columns["F"], columns["B"], columns["W"], sends, columns["PF"], columns["PB"])


def flight_profile(
    schedule: str, pp: int, vpp: int, microbatches: int, times: StageTimes | None = None
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Per rank: its stages, and the chunk activations of each that are held at some moment, every
    distinct state once [states, stages].

    Those of a long step are those of a short one with at least one whole repetition, for it begins and ends alike.
    """
    for size in _sizes(schedule, pp, vpp, microbatches):
        compiled = compile_schedule(schedule, pp, vpp, size, times)
        if size == microbatches or _middle(compiled):
            break
    return [(compiled.local_stages[rank], compiled.in_flight[rank]) for rank in range(compiled.pp)]
