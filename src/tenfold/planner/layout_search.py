"""Search over layouts and over model shapes: score everything by closed forms, event-simulate the best, give a reason
for every rejected plan."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner.calibration import Calibration, attention_unfused, default_stack, load_calibration
from tenfold.planner.config import DISPATCH, RECOMPUTE, SCHEDULES, Cluster, Model, Plan
from tenfold.planner.memory import CONTEXT_GIB, GIB, layer_items, peak_chunks, recompute_drops, usable_gib
from tenfold.planner.operators import PlanVector, hardware_vector, unit_seconds
from tenfold.planner.predictor import Estimate, simulate
from tenfold.planner.shapes import flops_per_token, parameters, shape_vector

_REASONS = (
    "",
    "devices not divisible by tp*cp*pp",
    "expert grid pp*ep*etp does not divide devices",
    "gbs not divisible by dp*mbs",
    "too few micro-batches for the schedule",
    "micro-batches not a multiple of pp",
    "more stages than layers",
    "memory over the limit",
    "repeats a simpler plan: nothing needs to be recomputed or swapped",
)
_CHUNK = 1 << 16

_ADVICE = {
    1: "choose tp*cp*pp that divides the devices",
    2: "choose ep*etp that divides devices/pp",
    3: "change gbs to a multiple of dp*mbs, or mbs",
    4: "raise gbs, or lower mbs or pp",
    5: "change gbs so that micro-batches are a multiple of pp",
    6: "lower pp or vpp",
    8: "leave out what is not needed: swap, then recompute",
}


@dataclass(frozen=True)
class Space:
    """Values that the search combines; each field a tuple. Values that cannot suit model or cluster are left out by
    `space_for`."""

    tp: tuple[int, ...]
    pp: tuple[int, ...]
    vpp: tuple[int, ...]
    cp: tuple[int, ...]
    ep: tuple[int, ...]
    tp_extend_ep: tuple[bool, ...]
    mbs: tuple[int, ...]
    schedule: tuple[str, ...]
    recompute: tuple[str, ...]
    swap: tuple[bool, ...]
    dispatch: tuple[str, ...]
    fsdp: tuple[int, ...] = (1,)

    @property
    def size(self) -> int:
        """Number of combinations."""
        return int(np.prod([len(getattr(self, f.name)) for f in dataclasses.fields(self)]))


@dataclass(frozen=True)
class Rejected:
    """A plan that was not simulated, why, and what would make it work."""

    plan: Plan
    reason: str
    change: str


@dataclass(frozen=True)
class SearchResult:
    """Answer of a search.

    Attributes:
        best: event-simulated plans, best first.
        candidates: combinations looked at.
        feasible: of those, how many can run and fit.
        reasons: rejected plans by reason.
        score_seconds, simulate_seconds: time of the two phases.
        plans_per_second: speed of the pruned scoring.
        scores: closed-form tokens/s/device of the feasible plans, descending.
        threshold: closed-form score of the last simulated plan.
    """

    best: list[Estimate]
    candidates: int
    feasible: int
    reasons: dict[str, int]
    score_seconds: float
    simulate_seconds: float
    plans_per_second: float
    scores: np.ndarray = field(repr=False)
    simulated_from: int = 0
    _columns: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    _context: dict[str, Any] = field(repr=False, default_factory=dict)

    def rank_of(self, tokens_per_s: float) -> float:
        """Share of the feasible plans that score better than a closed-form throughput (0: the best)."""
        return float((self.scores > tokens_per_s).mean()) if len(self.scores) else 1.0

    def rank_among_all(self, tokens_per_s: float) -> float:
        """The same among all plans that were looked at; those that cannot run or do not fit count as worse."""
        return float((self.scores > tokens_per_s).sum() / self.candidates)

    def rejected(self, limit: int | None = None) -> Iterator[Rejected]:
        """Every rejected plan with its reason and the smallest change that makes it work."""
        code = self._columns["code"]
        for count, index in enumerate(np.flatnonzero(code)):
            if limit is not None and count >= limit:
                return
            yield _rejection(self._columns, int(index), self._context)


def _powers(limit: int, base: int = 2) -> tuple[int, ...]:
    values = []
    value = 1
    while value <= limit:
        values.append(value)
        value *= base
    return tuple(values)


def space_for(model: Model, cluster: Cluster, plan: Plan) -> Space:
    """The default space: sizes that suit the model and the cluster, all schedules and policies."""
    node = cluster.hardware.per_node
    tp = tuple(t for t in _powers(min(max(node, 8), 16)) if model.heads % t == 0)
    pp = tuple(
        n
        for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 64)
        if n <= min(model.layers, cluster.devices) and cluster.devices % n == 0
    )
    vpp = tuple(n for n in (1, 2, 3, 4, 5, 6, 8) if n == 1 or n * 2 <= model.layers)
    cp = (1,) if plan.seq <= 8192 else tuple(c for c in _powers(16) if plan.seq // c >= 2048)
    ep = (
        tuple(e for e in _powers(min(model.experts, cluster.devices)) if model.experts % e == 0)
        if model.experts
        else (1,)
    )
    # Kernels that send a token once per node and forward inside it (DeepEP and its kin) exist for NVLink systems.
    dispatch = DISPATCH if cluster.hardware.architecture in ("hopper", "blackwell") else ("flat", "hierarchical")
    return Space(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        ep=ep,
        # Whole experts on tensor ranks: MindSpeed's TP-extend-EP; Megatron says the same by a larger EP with ETP 1.
        tp_extend_ep=(False, True) if model.experts and cluster.hardware.architecture == "ascend" else (False,),
        mbs=(1, 2, 4),
        schedule=(
            "none",
            "1f1b",
            "interleaved",
            "zb-h1",
            "zb-v",
            "dualpipev",
            *(("adaptive",) if model.experts else ()),
        ),
        recompute=("none", "fine-grained", "full"),
        swap=(False, True),
        dispatch=dispatch if model.experts and max(ep) * max(tp) > node else ("flat",),
    )


def _grid(space: Space) -> Iterator[dict[str, np.ndarray]]:
    """The combinations in chunks of columns; strings as indices of their lists."""
    names = [f.name for f in dataclasses.fields(space)]
    lists: dict[str, np.ndarray] = {}
    for name in names:
        values: Sequence[Any] = getattr(space, name)
        if name == "schedule":
            values = [SCHEDULES.index(v) for v in values]
        elif name == "recompute":
            values = [RECOMPUTE.index(v) for v in values]
        elif name == "dispatch":
            values = [DISPATCH.index(v) for v in values]
        lists[name] = np.array([float(v) for v in values])
    shape = tuple(len(lists[name]) for name in names)
    total = int(np.prod(shape))
    for start in range(0, total, _CHUNK * 4):
        index = np.unravel_index(np.arange(start, min(start + _CHUNK * 4, total)), shape)
        yield {name: lists[name][i] for name, i in zip(names, index, strict=True)}


def _meaningless(g: dict[str, np.ndarray], model: Model, extended: bool) -> np.ndarray:
    """Combinations that only repeat another one (a swap without fine-grained choice, a dispatch without experts ...;
    with `extended`, experts spread over tensor ranks are asked for by `tp_extend_ep`)."""
    schedule = g["schedule"]
    index = SCHEDULES.index
    chunked = (schedule == index("interleaved")) | (schedule == index("adaptive"))
    vee = (schedule == index("zb-v")) | (schedule == index("dualpipev"))
    out = (schedule == index("none")) != (g["pp"] == 1)
    out |= np.where(chunked, g["vpp"] < 2, np.where(vee, g["vpp"] != 2, g["vpp"] != 1))
    out |= (g["swap"] > 0) & (g["recompute"] != RECOMPUTE.index("fine-grained"))
    buckets = g["ep"] * np.where(g["tp_extend_ep"] > 0, g["tp"], 1.0)
    out |= (g["tp_extend_ep"] > 0) & (g["tp"] == 1)
    if extended:
        out |= (g["tp_extend_ep"] == 0) & (g["tp"] > 1) & (np.mod(g["ep"], g["tp"]) == 0)
    out |= (buckets == 1) & (g["dispatch"] > 0)
    if model.experts:
        out |= model.experts % np.maximum(buckets, 1.0) != 0
    return out


def _vector(g: dict[str, np.ndarray], plan: Plan, cluster: Cluster, unfused: bool) -> PlanVector:
    world = float(cluster.devices)
    dp = np.maximum(np.floor(world / (g["tp"] * g["cp"] * g["pp"])), 1.0)
    policy = g["recompute"]
    index = SCHEDULES.index
    schedule = g["schedule"]
    paired = (schedule == index("adaptive")) | (schedule == index("dualpipev"))
    ones = np.ones_like(dp)
    return PlanVector(
        devices=world,
        tp=g["tp"],
        cp=g["cp"],
        pp=g["pp"],
        vpp=g["vpp"],
        dp=dp,
        ep=g["ep"] * np.where(g["tp_extend_ep"] > 0, g["tp"], 1.0),
        etp=ones,
        mbs=g["mbs"],
        seq=float(plan.seq),
        microbatches=np.maximum(np.floor(plan.gbs / (dp * g["mbs"])), 1.0),
        fsdp=g["fsdp"],
        gradient_bytes=float(plan.gradient_bytes),
        sequence_parallel=float(plan.sequence_parallel),
        full=(policy == RECOMPUTE.index("full")) * ones,
        selective=0.0,
        fine=0.0,  # the knapsack's own seconds are added, not a typical share
        moe_again=(policy == RECOMPUTE.index("moe")) * ones,
        unstated=0.0,
        inferred=0.0,
        dispatch=g["dispatch"],
        overlap=0.0,
        imbalance=0.0 if plan.imbalance is None else float(plan.imbalance),
        unfused=float(unfused),
        paired=paired * ones,
        chunked=(g["vpp"] > 1) * ones,
    )


# Share of a layer's forward that each item costs to make again; the closed form's stand-in for the knapsack.
_FREE_FIRST = (
    ("combine input", 0.01),
    ("activation", 0.03),
    ("norms", 0.03),
    ("dispatched tokens", 0.15),
    ("query-key-value", 0.2),
    ("up projection", 0.3),
    ("attention output", 0.2),
)


def score(
    model: Model, cluster: Cluster, plan: Plan, g: dict[str, np.ndarray], calibration: Calibration
) -> dict[str, np.ndarray]:
    """Closed-form throughput and memory of many plans at once.

    Args:
        model, cluster: what is trained where.
        plan: batch, sequence, precision and stack.
        g: columns of plans.
        calibration: coefficients.

    Returns:
        Columns: tokens (tokens/s/device, 0 where rejected), code (index of the reason), memory (GiB), and plain
            memory (GiB, nothing recomputed).
    """
    s = shape_vector(model)
    unfused = attention_unfused(plan.stack)
    p = _vector(g, plan, cluster, unfused)
    u = unit_seconds(
        s, hardware_vector(cluster.hardware, plan.precision), p, calibration.resolve(cluster.hardware, model, plan)
    )
    world = cluster.devices
    index = SCHEDULES.index
    schedule = g["schedule"]
    m, pp, vpp = p.microbatches, p.pp, p.vpp
    code = np.zeros(len(m), dtype=np.int8)

    def reject(mask: np.ndarray, reason: int) -> None:
        code[(code == 0) & mask] = reason

    reject(world % (p.tp * p.cp * pp) != 0, 1)
    if model.experts:
        reject(world % (pp * p.ep * p.etp) != 0, 2)
    reject(plan.gbs % (p.dp * p.mbs) != 0, 3)
    least = np.where(
        schedule == index("dualpipev"),
        2 * pp,
        np.where(schedule == index("adaptive"), pp + 1, np.where(schedule == 0, 1, pp)),
    )
    reject(m < least, 4)
    looped = (schedule == index("interleaved")) | (schedule == index("adaptive"))
    reject(looped & (np.mod(m, pp) != 0), 5)
    parts = pp * vpp
    reject(parts > model.layers, 6)

    # Time of the fullest rank, then the bubble of the schedule.
    layers = float(model.layers)
    capacity = np.ceil(layers / parts)
    missing = capacity * parts - layers
    paired = p.paired > 0
    moe_f, moe_b = (
        np.where(paired, u.moe_pair_forward, u.moe_forward),
        np.where(paired, u.moe_pair_backward, u.moe_backward),
    )
    layer = moe_f + moe_b if model.experts else u.dense_forward + u.dense_backward
    hold = np.where((p.chunked > 0) | (pp == 1), 0.0, 2.0 * u.send)
    total = s.moe_layers * (moe_f + moe_b) + s.dense_layers * (u.dense_forward + u.dense_backward)
    mtp = (
        u.mtp_forward + u.mtp_backward + ((moe_f + moe_b) - (u.moe_forward + u.moe_backward) if model.experts else 0.0)
    )
    total = total + s.mtp * mtp + u.head_forward + u.head_backward + u.embed_forward + u.embed_backward
    last = u.head_forward + u.head_backward + s.mtp * mtp
    # No-op slots are taken from the rank of the head first.
    taken = np.minimum(missing, np.minimum(capacity * vpp, np.ceil(last / layer)))
    full_rank = (capacity * vpp - np.floor(np.maximum(missing - taken, 0.0) / np.maximum(pp - 1, 1))) * layer
    last_rank = (capacity * vpp - taken) * layer + last
    rank_time = np.maximum(np.maximum(full_rank, last_rank), total / pp) + hold
    # Chunks of a rank take turns round by round, so a heavy last chunk holds up its round whatever the rank's other
    # chunks weigh: fully where
    # forward and backward are joined, by about two fifths where they alternate (seen in the event simulation).
    last_chunk = np.maximum(capacity - taken, 0.0) * layer + last
    rank_time = rank_time + np.where(looped, np.maximum(last_chunk - capacity * layer, 0.0), 0.0) * np.where(
        paired, 1.0, 0.4
    )
    mean_time = total / pp + hold
    weight = (s.moe_layers * u.moe_weight + s.dense_layers * u.dense_weight) / pp
    chunk = mean_time / vpp
    zero = np.maximum(mean_time - 2.0 * weight, 0.1 * mean_time)
    bubble = np.where(
        schedule == index("zb-h1"),
        (pp - 1) * zero,
        np.where(
            schedule == index("zb-v"),
            (pp - 1) * 0.25 * zero,
            np.where(schedule == index("dualpipev"), (pp - 1) * 0.5 * zero, (pp - 1) * chunk),
        ),
    )
    sends = np.where(pp > 1, 2.0 * (parts - 1) * u.send, 0.0)

    # Memory of the first rank.
    items = layer_items(s, p, float(plan.precision.endswith("fp8")))["moe" if model.experts else "dense"]
    whole = sum(items.values())
    chunks = peak_chunks(schedule, pp, vpp, m)
    held = chunks * layers / parts
    mean_layers = layers / pp
    tokens = p.mbs * p.seq / p.cp
    policy = g["recompute"]
    drop = recompute_drops("moe")
    kept_moe = whole - sum(items[name] for name in drop if name in items)
    full = 2.0 * tokens * s.hidden / np.where(p.sequence_parallel > 0, p.tp, 1.0)
    per_layer = np.where(
        policy == RECOMPUTE.index("full"), full, np.where(policy == RECOMPUTE.index("moe"), kept_moe, whole)
    )
    dense_params = (
        parameters(model)
        - model.vocab * model.hidden * (1 if model.tied else 2)
        - s.moe_layers * s.experts * (s.up_factor + 1) * s.hidden * s.moe_ffn
    ) / (pp * p.tp)
    expert_params = s.moe_layers * s.experts * (s.up_factor + 1) * s.hidden * s.moe_ffn / (pp * p.ep * p.etp)
    dense_params = dense_params + model.vocab * model.hidden / p.tp
    group = p.dp * p.cp
    expert_group = np.maximum(world / (pp * p.ep * p.etp), 1.0)
    everything = dense_params + expert_params
    shard = dense_params / group + expert_params / expert_group
    static = (
        np.where(p.fsdp >= 3, 2.0 * shard, 2.0 * everything)
        + np.where(p.fsdp >= 2, shard, everything) * plan.gradient_bytes
    )
    static = static + 12.0 * np.where(p.fsdp >= 1, shard, everything)
    static = static + CONTEXT_GIB * GIB + np.where(policy == RECOMPUTE.index("full"), whole, 0.0)
    limit = usable_gib(cluster, plan) * GIB
    need = np.maximum(static + held * per_layer - limit, 0.0)
    fine = policy == RECOMPUTE.index("fine-grained")
    again = np.zeros_like(need)
    saved = np.zeros_like(need)
    swapped = np.zeros_like(need)
    forward = mean_layers * (moe_f if model.experts else u.dense_forward)
    host = cluster.hardware.host_gbs * 1e9 * 0.8
    swap_room = np.where(g["swap"] > 0, host * mean_time * 0.5 * chunks / vpp, 0.0)
    left = need.copy()
    for name, cost in _FREE_FIRST:
        if name not in items:
            continue
        size = np.maximum(held * items[name], 1.0)
        used = np.where(fine, np.minimum(left, size), 0.0)
        free = np.minimum(used, swap_room) if cost > 0.02 else np.zeros_like(used)
        swap_room = swap_room - free
        again = again + cost * forward * (used - free) / size
        saved = saved + used
        swapped = swapped + free
        left = left - used
    memory = static + held * per_layer - saved
    reject(memory > limit * 1.0001, 7)
    reject((fine & (need <= 0)) | ((g["swap"] > 0) & (swapped <= 0)), 8)
    seconds = (
        m * (rank_time + again) + bubble * (1.0 + again / np.maximum(mean_time, 1e-12)) + sends + u.step
    ) * u.factor
    throughput = plan.gbs * plan.seq / seconds / world
    return {
        "tokens": np.where(code == 0, throughput, 0.0),
        "code": code,
        "memory": memory / GIB,
        "closed": throughput,
    }


def _plan_at(columns: dict[str, np.ndarray], index: int, plan: Plan) -> Plan:
    return plan.replace(
        tp=int(columns["tp"][index]),
        pp=int(columns["pp"][index]),
        vpp=int(columns["vpp"][index]),
        cp=int(columns["cp"][index]),
        ep=int(columns["ep"][index]),
        tp_extend_ep=bool(columns["tp_extend_ep"][index]),
        mbs=int(columns["mbs"][index]),
        schedule=SCHEDULES[int(columns["schedule"][index])],
        recompute=RECOMPUTE[int(columns["recompute"][index])],
        swap=bool(columns["swap"][index]),
        dispatch=DISPATCH[int(columns["dispatch"][index])],
        fsdp=int(columns["fsdp"][index]),
        noop_slots=None,
    )


def _with_slots(model: Model, plan: Plan) -> Plan:
    return plan.replace(noop_slots=-model.layers % (plan.pp * plan.vpp))


def _rejection(columns: dict[str, np.ndarray], index: int, context: dict[str, Any]) -> Rejected:
    code = int(columns["code"][index])
    plan = _plan_at(columns, index, context["plan"])
    if code != 7:
        return Rejected(plan, _REASONS[code], _ADVICE[code])
    reason = f"memory over the limit: {columns['memory'][index]:.0f} GiB of {context['limit']:.0f} GiB"
    return Rejected(plan, reason, _change_that_fits(columns, index, context))


def _change_that_fits(columns: dict[str, np.ndarray], index: int, context: dict[str, Any]) -> str:
    """The first single change, from mild to drastic, under which the closed form fits."""
    names = [f.name for f in dataclasses.fields(Space)]
    base = {name: float(columns[name][index]) for name in names}
    fine, full = float(RECOMPUTE.index("fine-grained")), float(RECOMPUTE.index("full"))
    changes: list[tuple[str, dict[str, float]]] = [
        ("recompute fine-grained", {"recompute": fine}),
        ("recompute fine-grained with swap", {"recompute": fine, "swap": 1.0}),
        ("recompute full", {"recompute": full, "swap": 0.0}),
        (f"mbs {int(base['mbs'] / 2)}", {"mbs": base["mbs"] / 2}),
        ("fsdp 1", {"fsdp": 1.0}),
        *(
            (f"{name} {int(base[name] * factor)}", {name: base[name] * factor})
            for factor in (2, 4, 8)
            for name in ("ep", "tp", "pp", "cp")
        ),
    ]
    usable = [
        (words, change)
        for words, change in changes
        if all(value >= 1 or name in ("swap", "recompute") for name, value in change.items())
    ]
    grid = {name: np.array([{**base, **change}[name] for _, change in usable]) for name in names}
    answer = score(context["model"], context["cluster"], context["plan"], grid, context["calibration"])
    fits = np.flatnonzero(answer["code"] == 0)
    if len(fits):
        return usable[int(fits[0])][0]
    return "no single change: more devices or several changes"


def _simulate_one(task: tuple[Model, Cluster, Plan, Calibration]) -> Estimate | str:
    model, cluster, plan, calibration = task
    try:
        return simulate(model, cluster, plan, calibration)
    except UserError as error:
        return str(error)


def run_tasks(
    function: Callable[[Any], Any], tasks: list[Any], processes: int | None = None, backend: str = "processes"
) -> list[Any]:
    """Map over tasks in this process (1), in several processes (default: all usable cores), or on a Ray cluster.

    Raises:
        UserError: backend "ray" without ray installed.
    """
    if backend == "ray":
        try:
            import ray  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise UserError("backend: ray is not installed: pip install 'ray', or use backend processes") from None
        if not ray.is_initialized():
            ray.init(ignore_reinit_error=True, logging_level="ERROR")
        remote = ray.remote(function)
        return list(ray.get([remote.remote(task) for task in tasks]))
    if backend != "processes":
        raise UserError(f"backend: unknown {backend!r}: choose processes or ray")
    workers = (
        processes or len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else processes or os.cpu_count() or 1
    )
    if workers <= 1 or len(tasks) < 64:
        return [function(task) for task in tasks]
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, tasks, chunksize=max(1, len(tasks) // (4 * workers))))


def search(
    model: Model,
    cluster: Cluster,
    plan: Plan,
    top: int = 10,
    simulate_best: int = 120,
    space: Space | None = None,
    calibration: Calibration | None = None,
    memory_limit_gib: float | None = None,
    processes: int | None = None,
    backend: str = "processes",
    progress: Callable[[int], None] | None = None,
) -> SearchResult:
    """Find the fastest layouts that fit.

    Args:
        model, cluster: what is trained where.
        plan: gives batch, sequence, precision, stack and imbalance; its layout is ignored.
        top: plans to return.
        simulate_best: plans to event-simulate after the closed-form scoring.
        space: values to combine; None for `space_for`.
        calibration: coefficients; None for the shipped ones.
        memory_limit_gib: usable memory per device; None for 94% of the sheet.
        processes: worker processes; None for all usable cores.
        backend: "processes" or "ray".
        progress: called with the number of combinations done.

    Raises:
        UserError: nothing fits; the message says what the nearest plan lacks.
    """
    calibration = calibration or load_calibration()
    if plan.stack == "auto":
        plan = plan.replace(stack=default_stack(cluster.hardware))
    if memory_limit_gib is not None:
        plan = plan.replace(memory_limit_gib=memory_limit_gib)
    space = space or space_for(model, cluster, plan)
    cluster.hardware.peak(plan.precision)
    start = time.perf_counter()
    kept: list[dict[str, np.ndarray]] = []
    looked = 0
    for grid in _grid(space):
        keep = ~_meaningless(grid, model, True in space.tp_extend_ep)
        grid = {name: column[keep].astype(np.float64) for name, column in grid.items()}
        for first in range(0, int(keep.sum()), _CHUNK):
            part = {name: column[first : first + _CHUNK] for name, column in grid.items()}
            answer = score(model, cluster, plan, part, calibration)
            kept.append({name: column.astype(np.float32) for name, column in part.items()} | answer)
            looked += len(answer["code"])
            if progress:
                progress(looked)
    columns = {name: np.concatenate([chunk[name] for chunk in kept]) for name in kept[0]} if kept else {}
    score_seconds = time.perf_counter() - start
    if not looked:
        raise UserError("space: no combination of the given values suits the model and the cluster: widen tp, pp or ep")
    tokens = columns["tokens"]
    feasible = int((columns["code"] == 0).sum())
    reasons = {_REASONS[code]: count for code, count in sorted(Counter(columns["code"].tolist()).items()) if code}
    context = {
        "model": model,
        "cluster": cluster,
        "plan": plan,
        "calibration": calibration,
        "limit": usable_gib(cluster, plan),
    }
    if not feasible:
        nearest = int(np.argmin(np.where(columns["code"] == 7, columns["memory"], np.inf)))
        words = _plan_at(columns, nearest, plan).describe()
        if (columns["code"] == 7).any():
            raise UserError(
                f"memory: no plan fits {context['limit']:.0f} GiB; the smallest needs "
                f"{columns['memory'][nearest]:.0f} GiB ({words}): "
                f"{_change_that_fits(columns, nearest, context)}"
            )
        raise UserError(f"gbs: no plan suits {cluster.devices} devices and gbs {plan.gbs}: {reasons}")
    order = np.argsort(-tokens, kind="stable")[: min(simulate_best, feasible)]
    plans = [_with_slots(model, _plan_at(columns, int(i), plan)) for i in order]
    start = time.perf_counter()
    answers = run_tasks(_simulate_one, [(model, cluster, one, calibration) for one in plans], processes, backend)
    estimates = [answer for answer in answers if isinstance(answer, Estimate) and answer.fits]
    for answer in answers:
        if isinstance(answer, str):
            reasons[answer.split(":")[0]] = reasons.get(answer.split(":")[0], 0) + 1
        elif not answer.fits:
            reasons["memory over the limit (event simulation)"] = (
                reasons.get("memory over the limit (event simulation)", 0) + 1
            )
    estimates.sort(key=lambda estimate: -estimate.tokens_per_s_per_device)
    return SearchResult(
        best=estimates[:top],
        candidates=looked,
        feasible=feasible,
        reasons=reasons,
        score_seconds=score_seconds,
        simulate_seconds=time.perf_counter() - start,
        plans_per_second=looked / score_seconds,
        scores=np.sort(tokens[tokens > 0])[::-1],
        simulated_from=len(order),
        _columns=columns,
        _context=context,
    )


def closed_form_score(model: Model, cluster: Cluster, plan: Plan, calibration: Calibration | None = None) -> float:
    """The closed-form throughput that the search gives one plan, for ranking it among the others."""
    calibration = calibration or load_calibration()
    if plan.stack == "auto":
        plan = plan.replace(stack=default_stack(cluster.hardware))
    values = {
        **{
            name: float(getattr(plan, name))
            for name in ("tp", "pp", "vpp", "cp", "ep", "tp_extend_ep", "mbs", "swap", "fsdp")
        },
        "schedule": float(SCHEDULES.index(plan.resolved_schedule())),
        "recompute": float(RECOMPUTE.index(plan.recompute)),
        "dispatch": float(DISPATCH.index(plan.dispatch)),
    }
    answer = score(model, cluster, plan, {name: np.array([value]) for name, value in values.items()}, calibration)
    return float(answer["closed"][0])


@dataclass(frozen=True)
class ShapeCandidate:
    """A model shape with its best layout."""

    model: Model
    parameters: int
    active_parameters: int
    estimate: Estimate


def shape_candidates(
    model: Model,
    tolerance: float = 0.03,
    hidden: Sequence[int] = (),
    layers: Sequence[int] = (),
    experts: Sequence[int] = (),
    topk: Sequence[int] = (),
) -> list[Model]:
    """Shapes with the total and active parameters of `model`, within `tolerance`.

    The expert width follows from the total, the top-k from the active parameters, so that each combination has at
    most one shape.
    """
    hiddens = list(hidden) or sorted(
        {round(model.hidden * f / 256) * 256 for f in (0.8, 0.9, 1.0, 1.1, 1.2)} | {model.hidden}
    )
    depths = list(layers) or sorted(
        {max(model.first_dense + 2, model.layers + d) for d in (-16, -8, -5, -3, -1, 0, 1, 3, 5, 8, 16)}
    )
    counts = list(experts) or ([model.experts // 2, model.experts, model.experts * 2] if model.experts else [0])
    tops = list(topk) or ([max(1, model.topk // 2), model.topk, model.topk * 2] if model.experts else [0])
    total, active = parameters(model), parameters(model, active=True)
    found = []
    for width, depth, count, k in itertools.product(hiddens, depths, counts, tops):
        base = dataclasses.replace(
            model, name=f"h{width}-L{depth}" + (f"-E{count}-k{k}" if count else ""), hidden=width, layers=depth
        )
        if model.experts:
            unit = dataclasses.replace(
                base, experts=count, topk=k, moe_ffn=128, shared_ffn=128 * max(model.shared_experts, 0)
            )
            flat = dataclasses.replace(unit, moe_ffn=0, shared_ffn=0)
            slope = (parameters(unit) - parameters(flat)) / 128
            ffn = round((total - parameters(flat)) / slope / 16) * 16 if slope else 0
            shape = dataclasses.replace(base, experts=count, topk=k, moe_ffn=ffn, shared_ffn=ffn * model.shared_experts)
        else:
            unit, flat = dataclasses.replace(base, ffn=128), dataclasses.replace(base, ffn=0)
            slope = (parameters(unit) - parameters(flat)) / 128
            ffn = round((total - parameters(flat)) / slope / 16) * 16
            shape = dataclasses.replace(base, ffn=ffn)
        if (
            ffn < 64
            or abs(parameters(shape) / total - 1) > tolerance
            or abs(parameters(shape, active=True) / active - 1) > max(tolerance, 0.1)
        ):
            continue
        found.append(shape)
    return found


def _best_layout(task: tuple[Model, Cluster, Plan, Calibration, Space | None]) -> Estimate | str:
    model, cluster, plan, calibration, space = task
    try:
        return search(
            model, cluster, plan, top=1, simulate_best=12, space=space, calibration=calibration, processes=1
        ).best[0]
    except (UserError, IndexError) as error:
        return str(error)


def search_shapes(
    shapes: list[Model],
    cluster: Cluster,
    plan: Plan,
    top: int = 10,
    space: Space | None = None,
    calibration: Calibration | None = None,
    processes: int | None = None,
    backend: str = "processes",
) -> list[ShapeCandidate]:
    """The best layout of every shape, fastest shape first (tokens/s; parameters are equal by construction)."""
    calibration = calibration or load_calibration()
    answers = run_tasks(
        _best_layout, [(shape, cluster, plan, calibration, space) for shape in shapes], processes, backend
    )
    found = [
        ShapeCandidate(shape, parameters(shape), parameters(shape, active=True), answer)
        for shape, answer in zip(shapes, answers, strict=True)
        if isinstance(answer, Estimate)
    ]
    return sorted(found, key=lambda candidate: -candidate.estimate.tokens_per_s_per_device)[:top]


def model_flops(model: Model, seq: int) -> float:
    """FLOPs per token, causal; for tables beside the candidates."""
    return flops_per_token(model, seq)


def narrow_space(model: Model, cluster: Cluster, plan: Plan) -> Space:
    """A smaller space for sweeps over model shapes: the policies that win the full search, every size that suits."""
    space = space_for(model, cluster, plan)
    return dataclasses.replace(
        space,
        pp=tuple(n for n in space.pp if n in (1, 2, 4, 8, 16, 32)),
        vpp=tuple(n for n in space.vpp if n in (1, 2, 4)),
        mbs=(1, 2),
        schedule=("none", "1f1b", "interleaved", *(("adaptive",) if model.experts else ())),
        recompute=("fine-grained",),
        dispatch=tuple(d for d in space.dispatch if d != "flat") or space.dispatch,
    )
