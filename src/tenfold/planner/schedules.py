"""Pipeline schedules as generators: which action each pipeline rank runs, in which order.

An action is (kind, stage, micro-batch). Kinds: F forward, B full backward, I backward to the input, W backward to the
weights. An entry of a
rank's order is a tuple of one action, or of a forward and a backward that run together. Stage s of `chunks * pp`
lives on rank s mod pp
("loop") or on rank s / 2p-1-s ("v"). DualPipe runs two directions: stage s < pp is direction one on rank s, stage pp
+ s is the same
model part of direction two on rank pp-1-s.

Sources: GPipe (1811.06965), 1F1B and interleaved (2104.04473), zero bubble H1 and V (2401.10241), DualPipe
(2412.19437) and its V form. The orders agree with torch.distributed.pipelining 2.14.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import lru_cache

from tenfold.core.console import UserError

Action = tuple[str, int, int]
Entry = tuple[Action, ...]
Order = list[list[Entry]]


def placement(schedule: str, pp: int, vpp: int) -> list[int]:
    """Rank of every stage."""
    if schedule in ("zb-v", "dualpipev"):
        return [stage if stage < pp else 2 * pp - 1 - stage for stage in range(2 * pp)]
    if schedule == "dualpipe":
        return [stage if stage < pp else 2 * pp - 1 - stage for stage in range(2 * pp)]
    return [stage % pp for stage in range(pp * vpp)]


def chunks_per_rank(schedule: str, vpp: int) -> int:
    """Model chunks on a rank: fixed at 2 by the V-shaped and bidirectional schedules."""
    return 2 if schedule in ("zb-v", "dualpipev", "dualpipe") else vpp


def check_schedule(schedule: str, pp: int, vpp: int, microbatches: int) -> None:
    """Refuse a schedule that cannot run. Raises UserError with the field, the value and the nearest valid values."""
    if schedule in ("none", "gpipe", "1f1b", "zb-h1") and vpp != 1:
        raise UserError(
            f"vpp: schedule {schedule!r} has one chunk per stage, found vpp = {vpp}: use 1, or schedule interleaved"
        )
    if schedule == "none" and pp != 1:
        raise UserError(f"schedule: 'none' needs pp = 1, found pp = {pp}: use 1f1b or interleaved")
    if schedule in ("zb-v", "dualpipev") and vpp != 2:
        raise UserError(f"vpp: schedule {schedule!r} has exactly 2 chunks per stage, found vpp = {vpp}: use 2")
    if schedule == "dualpipe":
        if vpp != 1:
            raise UserError(f"vpp: schedule 'dualpipe' holds two whole directions, found vpp = {vpp}: use 1")
        if pp % 2:
            raise UserError(f"pp: schedule 'dualpipe' needs an even pp, found {pp}: nearest {pp - 1 or 2}, {pp + 1}")
        if microbatches % 2 or microbatches < 2 * pp:
            near = max(2 * pp, microbatches + microbatches % 2)
            raise UserError(
                f"microbatches: schedule 'dualpipe' needs an even number of at least 2*pp = {2 * pp}, found "
                f"{microbatches}: nearest {near}"
            )
    if schedule == "dualpipev" and microbatches < 2 * pp:
        raise UserError(
            f"microbatches: schedule 'dualpipev' needs at least 2*pp = {2 * pp}, found {microbatches}: raise "
            f"gbs or lower mbs, dp or pp"
        )
    if schedule in ("1f1b", "zb-h1", "interleaved", "interleaved-zb", "adaptive", "zb-v") and microbatches < pp:
        raise UserError(
            f"microbatches: schedule {schedule!r} needs at least pp = {pp}, found {microbatches}: raise gbs or "
            f"lower mbs, dp or pp"
        )
    if schedule in ("interleaved", "interleaved-zb", "adaptive") and vpp > 1 and microbatches % pp:
        below, above = microbatches // pp * pp, -(-microbatches // pp) * pp
        raise UserError(
            f"microbatches: schedule {schedule!r} needs a multiple of pp = {pp}, found {microbatches}: nearest "
            f"{below or above}, {above}"
        )
    if schedule == "adaptive" and microbatches <= pp:
        raise UserError(
            f"microbatches: schedule 'adaptive' needs more than pp = {pp} (gbs > dp*pp*mbs), found "
            f"{microbatches}: nearest {2 * pp}"
        )


class _Rank:
    """Builds one rank's order, counting micro-batches per (kind, stage)."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.counts: Counter[tuple[str, int]] = Counter()
        self.pending: deque[tuple[int, int]] = deque()

    def _take(self, kind: str, stage: int) -> Action:
        key = ("B" if kind in "BI" else kind, stage)
        index = self.counts[key]
        self.counts[key] += 1
        if kind == "I":
            self.pending.append((stage, index))
        return (kind, stage, index)

    def add(self, kind: str, stage: int) -> None:
        self.entries.append((self._take(kind, stage),))

    def pair(self, forward: int, backward: int) -> None:
        self.entries.append((self._take("F", forward), self._take("B", backward)))

    def weight(self) -> None:
        if self.pending:
            stage, index = self.pending.popleft()
            self.entries.append((("W", stage, index),))


def _gpipe(pp: int, microbatches: int) -> Order:
    return [[((kind, rank, mb),) for kind in "FB" for mb in range(microbatches)] for rank in range(pp)]


def _looped(pp: int, vpp: int, microbatches: int, split: bool) -> Order:
    """1F1B (vpp = 1), interleaved, and their zero-bubble forms."""
    rounds = max(1, microbatches // pp)
    per_round = microbatches // rounds
    if vpp == 1:
        per_round = microbatches  # one chunk: rounds have no meaning
    elif microbatches % rounds:
        raise UserError(
            f"microbatches: {microbatches} do not split into {rounds} equal rounds: use a multiple of pp = {pp}"
        )
    total = vpp * microbatches
    order: Order = []
    for rank in range(pp):
        hops = pp - 1 - rank
        warmup = min((vpp - 1) * per_round + (1 if split or vpp == 1 else 2) * hops, total)
        build = _Rank()

        def forward_stage(step: int, rank: int = rank) -> int:
            return (step // per_round) % vpp * pp + rank

        def backward_stage(step: int, rank: int = rank) -> int:
            return (vpp - 1 - (step // per_round) % vpp) * pp + rank

        for step in range(warmup):
            build.add("F", forward_stage(step))
        for step in range(total):
            forward = step + warmup
            if forward < total:
                build.add("F", forward_stage(forward))
            build.add("I" if split else "B", backward_stage(step))
            if split and step >= rank:
                build.weight()
        while build.pending:
            build.weight()
        order.append(build.entries)
    return order


def _zbv(pp: int, microbatches: int) -> Order:
    """Zero bubble on a V of two chunks; each input-backward is followed by its weights until the cool-down."""
    padded = max(2 * pp - 1, microbatches)
    order: Order = []
    for rank in range(pp):
        first, second = rank, 2 * pp - 1 - rank
        entries: list[Entry] = []
        counts: Counter[str] = Counter()

        def add(
            kind: str,
            chunk: int,
            entries: list[Entry] = entries,
            counts: Counter[str] = counts,
            stages: tuple = (first, second),
        ) -> None:
            entries.append(((kind, stages[chunk], counts[f"{kind}{chunk}"]),))
            counts[f"{kind}{chunk}"] += 1

        for _ in range(2 * (pp - rank) - 1):
            add("F", 0)
        for _ in range(rank):
            add("F", 1)
            add("F", 0)
        for _ in range(pp - rank):
            for kind in "FIW":
                add(kind, 1)
        while counts["F1"] < counts["F0"] or counts["F0"] < padded:
            if counts["F0"] < padded:
                add("F", 0)
            add("I", 0)
            add("W", 0)
            for kind in "FIW":
                add(kind, 1)
        for _ in range(rank):
            add("I", 0)
            add("I", 1)
        for _ in range(pp - rank):
            add("I", 0)
            add("W", 0)
        while counts["W1"] < counts["I1"]:
            add("W", 1)
        while counts["W0"] < counts["I0"]:
            add("W", 0)
        order.append([entry for entry in entries if entry[0][2] < microbatches])
    return order


def _dual(
    depth: int,
    microbatches: int,
    stages_of: Callable[[int], tuple[int, int]],
    position_of: Callable[[int], int],
    ranks: int,
) -> Order:
    """The eight steps that DualPipe and DualPipeV share.

    Args:
        depth: ranks on the way of a micro-batch to its turning point (pp for the V, pp/2 for the bidirectional form).
        microbatches: micro-batches of one direction (V: all).
        stages_of: rank -> (stage that leads, stage that follows).
        position_of: rank -> distance from the entry, 0..depth-1.
        ranks: pipeline ranks.
    """
    order: Order = []
    for rank in range(ranks):
        position = position_of(rank)
        lead, follow = stages_of(rank)
        build = _Rank()
        for _ in range((depth - position - 1) * 2):
            build.add("F", lead)
        for _ in range(position + 1):
            build.add("F", lead)
            build.add("F", follow)
        for _ in range(depth - position - 1):
            build.add("I", follow)
            build.weight()
            build.add("F", follow)
        for step in range(microbatches - depth * 2 + position + 1):
            if step == 0 and position == depth - 1:
                build.add("F", lead)
                build.add("B", follow)
            else:
                build.pair(lead, follow)
            build.pair(follow, lead)
        for _ in range(depth - position - 1):
            build.add("B", follow)
            build.pair(follow, lead)
        split = False
        for step in range(position + 1):
            half = step == (position + 1) // 2
            split = split or (half and position % 2 == 1)
            build.add("I" if split else "B", follow)
            split = split or (half and position % 2 == 0)
            build.add("I" if split else "B", lead)
        for _ in range(depth - position - 1):
            build.weight()
            build.add("I" if split else "B", lead)
        while build.pending:
            build.weight()
        order.append(build.entries)
    return order


@lru_cache(maxsize=64)
def generate(schedule: str, pp: int, vpp: int, microbatches: int) -> Order:
    """The order of every rank.

    Args:
        schedule: a name of `tenfold.planner.config.SCHEDULES` other than auto and adaptive, whose order depends on the
            stages' seconds (`adaptive.adaptive_order`).
        pp: pipeline ranks.
        vpp: chunks per rank (2 for zb-v and dualpipev).
        microbatches: micro-batches of a step (both directions together for dualpipe).

    Returns:
        One list of entries per rank. It is cached: do not change it.

    Raises:
        UserError: unknown schedule, or micro-batches that it cannot lay out.
    """
    if schedule == "none" or schedule == "gpipe":
        if schedule == "none":
            return _looped(1, 1, microbatches, False)
        return _gpipe(pp, microbatches)
    if schedule in ("1f1b", "interleaved"):
        return _looped(pp, vpp, microbatches, False)
    if schedule in ("zb-h1", "interleaved-zb"):
        return _looped(pp, vpp, microbatches, True)
    if schedule == "zb-v":
        return _zbv(pp, microbatches)
    if schedule == "dualpipev":
        return _dual(pp, microbatches, lambda rank: (rank, 2 * pp - 1 - rank), lambda rank: rank, pp)
    if schedule == "dualpipe":
        half = pp // 2

        def stages_of(rank: int) -> tuple[int, int]:
            one, two = rank, 2 * pp - 1 - rank
            return (one, two) if rank < half else (two, one)

        return _dual(half, microbatches // 2, stages_of, lambda rank: min(rank, pp - 1 - rank), pp)
    raise UserError(
        f"schedule: unknown {schedule!r}: choose one of none, gpipe, 1f1b, interleaved, zb-h1, interleaved-zb, "
        f"zb-v, dualpipe, dualpipev"
    )
