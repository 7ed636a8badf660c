"""Adaptive pipe overlap: the order of every rank chosen by list scheduling from the seconds of its stages.

The paper (2505.04519) pairs the forward of one micro-batch with the backward of another on plain interleaved chunks and
chooses the order from measured times; its rule is not published. Ours is greedy. A free rank runs a pair if a forward
and a backward are ready (or will be in a moment); else a backward, whose weight part is detached and fills later waits;
else a forward, as long as it holds no more chunks than interleaving would plus one; else a detached weight part. So a
heavy last chunk (head, multi-token prediction) delays mostly its own rank, where a fixed order makes every rank wait
for its turn.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from tenfold.planner.schedules import Entry, Order

_NEVER = float("inf")
# Chosen on a handful of layouts of 2 to 16 ranks for short makespans at few chunks held.
_PATIENCE = 0.1  # mean pairs that a rank waits for a partner that is on its way
_DETACHED = 8  # weight parts that may wait, for they keep their activations


class _Lane:
    """Work of one kind on one stage: micro-batches arrive and are taken in order."""

    __slots__ = ("arrivals", "offset", "stage", "taken")

    def __init__(self, stage: int, offset: int, arrivals: list[float]) -> None:
        self.stage = stage
        self.offset = offset  # place of the stage's chunk in a round
        self.arrivals = arrivals
        self.taken = 0


def _first(lanes: list[_Lane], now: float, pp: int, span: int) -> tuple[_Lane | None, float]:
    """The ready lane whose micro-batch comes first in Megatron's order (rounds of pp, chunk by chunk), and the next
    arrival among the others."""
    best, least, wake = None, 0, _NEVER
    for lane in lanes:
        taken = lane.taken
        if taken == len(lane.arrivals):
            continue
        arrival = lane.arrivals[taken]
        if arrival > now:
            if arrival < wake:
                wake = arrival
            continue
        place = taken // pp * span + lane.offset + taken % pp
        if best is None or place < least:
            best, least = lane, place
    return best, wake


def _due(lanes: list[_Lane], ready: _Lane, pp: int, span: int, microbatches: int) -> bool:
    """Whether Megatron's fixed order would run `ready` next on this rank."""
    open_lanes = [lane for lane in lanes if lane.taken < microbatches]
    return ready is min(open_lanes, key=lambda lane: lane.taken // pp * span + lane.offset + lane.taken % pp)


def adaptive_order(
    pp: int,
    vpp: int,
    microbatches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    weight: Sequence[float],
    pair_forward: Sequence[float],
    pair_backward: Sequence[float],
    send: float,
) -> Order:
    """The order of every rank.

    Args:
        pp: pipeline ranks.
        vpp: chunks per rank.
        microbatches: micro-batches of a step.
        forward, backward, weight: seconds of a pass that runs alone [stages]; weight is a part of backward.
        pair_forward, pair_backward: seconds of the two halves of a pair [stages].
        send: seconds to the neighbour rank.

    Returns:
        One list of entries per rank, as `schedules.generate` gives it. No order waits for itself: a rank at its limit
        with nothing else to do may still run the forward that Megatron's fixed order would run next.
    """
    last = pp * vpp - 1
    span = vpp * pp
    total = vpp * microbatches
    forwards = [_Lane(stage, stage // pp * pp, []) for stage in range(last + 1)]
    backwards = [_Lane(stage, (vpp - 1 - stage // pp) * pp, []) for stage in range(last + 1)]
    forwards[0].arrivals = [0.0] * microbatches
    mine_forward = [[forwards[stage] for stage in range(rank, span, pp)] for rank in range(pp)]
    mine_backward = [[backwards[stage] for stage in range(rank, span, pp)] for rank in range(pp)]
    limit = [min((vpp - 1) * pp + (1 if vpp == 1 else 2) * (pp - 1 - rank) + 1, total) for rank in range(pp)]
    patience = _PATIENCE * (sum(pair_forward) + sum(pair_backward)) / (last + 1)
    held = [0] * pp
    free = [0.0] * pp
    detached: list[deque[tuple[int, int]]] = [deque() for _ in range(pp)]
    order: list[list[Entry]] = [[] for _ in range(pp)]
    events = [(0.0, rank) for rank in range(pp)]
    while events:
        now, rank = heapq.heappop(events)
        if free[rank] > now:
            continue
        ahead, wake_forward = _first(mine_forward[rank], now, pp, span)
        back, wake_backward = _first(mine_backward[rank], now, pp, span)
        deep = mine_forward[rank][-1]
        if len(detached[rank]) > _DETACHED:
            ahead = back = None
        elif ahead and not back and held[rank] >= limit[rank]:
            # Past the limit only what is soon backward again: the deepest chunk.
            if (
                held[rank] < limit[rank] + pp // 2
                and deep.taken < len(deep.arrivals)
                and deep.arrivals[deep.taken] <= now
            ):
                ahead = deep
        elif back and not ahead and held[rank] <= limit[rank] and wake_forward - now <= patience:
            heapq.heappush(events, (wake_forward, rank))
            continue
        elif ahead and not back and held[rank] > 2 * (pp - 1 - rank) and wake_backward - now <= patience:
            heapq.heappush(events, (wake_backward, rank))
            continue
        if ahead and back and held[rank] <= limit[rank]:
            order[rank].append((("F", ahead.stage, ahead.taken), ("B", back.stage, back.taken)))
            seconds = pair_forward[ahead.stage] + pair_backward[back.stage]
        elif back:
            ahead = None
            order[rank].append((("I", back.stage, back.taken),))
            detached[rank].append((back.stage, back.taken))
            held[rank] -= 1
            seconds = backward[back.stage] - weight[back.stage]
        elif ahead and (
            held[rank] < limit[rank]
            or (ahead is deep and held[rank] < limit[rank] + pp // 2)
            or (wake_backward == _NEVER and _due(mine_forward[rank], ahead, pp, span, microbatches))
        ):
            order[rank].append((("F", ahead.stage, ahead.taken),))
            seconds = forward[ahead.stage]
            held[rank] += 1
        elif detached[rank]:
            stage, microbatch = detached[rank].popleft()
            order[rank].append((("W", stage, microbatch),))
            free[rank] = now + weight[stage]
            heapq.heappush(events, (free[rank], rank))
            continue
        else:
            wake = min(wake_forward, wake_backward)
            if wake < _NEVER:
                heapq.heappush(events, (wake, rank))
            continue
        end = now + seconds
        free[rank] = end
        heapq.heappush(events, (end, rank))
        if ahead:
            ahead.taken += 1
            if ahead.stage < last:
                forwards[ahead.stage + 1].arrivals.append(end + send)
                heapq.heappush(events, (end + send, (ahead.stage + 1) % pp))
            else:
                backwards[last].arrivals.append(end)
        if back:
            back.taken += 1
            if back.stage > 0:
                backwards[back.stage - 1].arrivals.append(end + send)
                heapq.heappush(events, (end + send, (back.stage - 1) % pp))
    return order
