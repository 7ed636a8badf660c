"""What the search combines, and the closed form that scores all combinations at once, on arrays of plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.planner.coefficients import Calibration, attention_unfused, default_stack, load_calibration
from tenfold.planner.config import DISPATCH, RECOMPUTE, SCHEDULES, Cluster, Model, Plan
from tenfold.planner.memory import CONTEXT_GIB, GIB, layer_items, peak_chunks, recompute_drops, usable_gib
from tenfold.planner.operators import PlanVector, hardware_vector, unit_seconds
from tenfold.planner.shapes import parameters, shape_vector

REASONS = (
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
CHUNK = 1 << 16  # plans scored at once


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


def grid(space: Space) -> Iterator[dict[str, np.ndarray]]:
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
    for start in range(0, total, 4 * CHUNK):
        index = np.unravel_index(np.arange(start, min(start + 4 * CHUNK, total)), shape)
        yield {name: lists[name][i] for name, i in zip(names, index, strict=True)}


def meaningless(g: dict[str, np.ndarray], model: Model, extended: bool) -> np.ndarray:
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
    # chunks weigh: by about two fifths where forward and backward alternate; where they are joined in a chosen order,
    # the more the less the other chunks can even out (shares seen in the event simulation).
    last_chunk = np.maximum(capacity - taken, 0.0) * layer + last
    rank_time = rank_time + np.where(looped, np.maximum(last_chunk - capacity * layer, 0.0), 0.0) * np.where(
        paired, 1.0 - 1.0 / vpp, 0.4
    )
    mean_time = total / pp + hold
    weight = (s.moe_layers * u.moe_weight + s.dense_layers * u.dense_weight) / pp
    chunk = mean_time / vpp
    # Filling and draining have no partner, and detached weight parts fill a little of it.
    alone = mean_time + (s.moe_layers + s.mtp) / pp * (u.moe_forward + u.moe_backward - moe_f - moe_b)
    zero = np.maximum(mean_time - 2.0 * weight, 0.1 * mean_time)
    bubble = np.where(
        schedule == index("zb-h1"),
        (pp - 1) * zero,
        np.where(
            schedule == index("zb-v"),
            (pp - 1) * 0.25 * zero,
            np.where(
                schedule == index("dualpipev"),
                (pp - 1) * 0.5 * zero,
                np.where(schedule == index("adaptive"), (pp - 1) * 0.86 * alone / vpp, (pp - 1) * chunk),
            ),
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
