"""Device memory: itemised per stage, and the exact choice of what to recompute or swap.

Activation bytes follow the tensors that autograd keeps. For a dense layer with four-fold feed-forward, dropout and
unfused attention they
sum to s*b*h/t * (34 + 5*a*s/h), the closed form of Korthikanti et al. (2205.05198, equation 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.operators import NATURAL_SPREAD, PlanVector, UnitSeconds, device_skew
from tenfold.planner.pipeline import Stage, partition
from tenfold.planner.shapes import ShapeVector, attention_weights, ffn_weights, norm_weights, shape_vector
from tenfold.planner.simulation import StageTimes
from tenfold.planner.steady import flight_profile

GIB = 2.0**30
BUCKET = 16 * 2**20  # bytes; resolution of the knapsack
CONTEXT_GIB = 2.0  # runtime context, communication buffers and workspaces
USABLE = 0.94  # share of the device's memory that the allocator can hand out


@dataclass(frozen=True)
class Item:
    """One group of saved tensors of a layer.

    Attributes:
        name: what it is.
        size: bytes per layer and micro-batch on one device.
        seconds: forward time to make it again.
        swappable: large and used late, so it may move to the host.
    """

    name: str
    size: float
    seconds: float
    swappable: bool = True


def layer_items(s: ShapeVector, p: PlanVector, fp8: Any = 0.0) -> dict[str, dict[str, Any]]:
    """Bytes that one layer keeps for its backward, per micro-batch and device, by item.

    Args:
        s: shape.
        p: plan; floats or arrays.
        fp8: 1 where matmul inputs are kept in fp8.

    Returns:
        {"dense": {item: bytes}, "moe": {item: bytes}}.
    """
    tokens = p.mbs * p.seq / p.cp
    own = tokens / p.tp
    # Without sequence parallelism norms, residuals and their inputs are kept whole on every tensor rank.
    wide = np.where(p.sequence_parallel > 0, own, tokens)
    kept = 2.0 - fp8
    mla = s.latent > 0
    head_width = s.core_flops / 2.0  # heads * (d_qk + d_v)
    queries = np.where(
        mla,
        2.0 * own * (2.0 * s.heads * s.head_dim + head_width - s.heads * s.head_dim),
        2.0 * own * (s.heads * s.head_dim + s.key_value_width),
    )
    value = head_width - s.heads * s.head_dim
    masks = 2.0 * own * s.hidden * p.unfused
    # Megatron's sequence-parallel norm outputs are sharded and gathered again in the backward.
    attention = {
        "residual": 4.0 * wide * s.hidden + masks * np.where(p.sequence_parallel > 0, 1.0, p.tp),
        "norms": 2.0 * kept * wide * s.hidden + 4.0 * wide * s.hidden * s.sandwich,
        "latent": 2.0 * own * s.latent,
        "query-key-value": queries,
        "attention output": 2.0 * own * value + 4.0 * own * s.heads * (1 - p.unfused),
        "scores": 5.0 * own * s.heads * p.seq * p.unfused,
    }
    up = s.up_factor
    dense = {
        **attention,
        "up projection": 2.0 * own * up * s.ffn,
        "activation": kept * own * s.ffn,
    }
    skew = device_skew(p.imbalance, NATURAL_SPREAD, np.maximum(s.experts, 1.0), p.ep)
    copies = own * s.topk * skew
    moe = {
        **attention,
        "router": 8.0 * own * s.experts,
        "dispatched tokens": kept * copies * s.hidden * p.etp,
        "up projection": 2.0 * copies * up * s.moe_ffn + 2.0 * own * up * s.shared_ffn,
        "activation": kept * (copies * s.moe_ffn + own * s.shared_ffn),
        "combine input": 2.0 * copies * s.hidden,
    }
    return {"dense": dense, "moe": moe}


def recompute_drops(policy: str) -> tuple[str, ...]:
    """Items that a named policy never keeps ("full" is handled apart: only the layer's input stays)."""
    return {
        "selective": ("scores",),
        "moe": ("norms", "dispatched tokens", "up projection", "activation", "combine input"),
    }.get(policy, ())


def activation_bytes(s: ShapeVector, p: PlanVector, policy: str, fp8: Any = 0.0) -> tuple[Any, Any]:
    """Kept bytes of a dense and of a MoE layer under a policy of `RECOMPUTE` (fine-grained before its choice:
    everything)."""
    if policy == "full":
        tokens = p.mbs * p.seq / p.cp
        kept = 2.0 * tokens * s.hidden / np.where(p.sequence_parallel > 0, p.tp, 1.0)
        return kept, kept
    items = layer_items(s, p, fp8)
    drop = recompute_drops(policy)
    return (
        sum(size for name, size in items["dense"].items() if name not in drop),
        sum(size for name, size in items["moe"].items() if name not in drop),
    )


@dataclass(frozen=True)
class StageMemory:
    """Memory of one pipeline rank in GiB.

    Attributes:
        rank: pipeline rank.
        weights, gradients, optimizer: parameter state.
        activations: kept for the backward at the worst moment.
        working: the largest transient (logits, the layer under recomputation, gathered parameters) and the runtime.
        in_flight: micro-batch chunks held at the worst moment.
        recomputed, swapped: items chosen, with the number of layers each.
        saved: GiB that they free.
        extra_seconds: time that they add to one micro-batch of the rank.
    """

    rank: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    in_flight: int
    recomputed: dict[str, int] = field(default_factory=dict)
    swapped: dict[str, int] = field(default_factory=dict)
    saved: float = 0.0
    extra_seconds: float = 0.0

    @property
    def total(self) -> float:
        """GiB in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def items(self) -> dict[str, float]:
        """GiB by item."""
        names = ("weights", "gradients", "optimizer", "activations", "working")
        return {name: getattr(self, name) for name in names}


def stage_parameters(model: Model, stage: Stage, plan: Plan) -> tuple[float, float]:
    """Parameters of one stage on one device: dense part (over tp) and routed experts (over ep and etp)."""
    layer = attention_weights(model) + norm_weights(model)
    moe_shared = ffn_weights(model, model.shared_ffn) + model.hidden * model.experts
    dense = stage.dense * (layer + ffn_weights(model, model.ffn)) + stage.moe * (layer + moe_shared)
    expert = stage.moe * model.experts * ffn_weights(model, model.moe_ffn)
    if stage.mtp:
        dense += stage.mtp * (
            layer + 2 * model.hidden**2 + (moe_shared if model.experts else ffn_weights(model, model.ffn))
        )
        expert += stage.mtp * model.experts * ffn_weights(model, model.moe_ffn)
    table = model.vocab * model.hidden
    # Tied weights are held on the first and the last stage, which exchange their gradients.
    dense += table * (int(stage.embedding) + int(stage.head and not (model.tied and stage.embedding)))
    # The MTP layer embeds its tokens itself.
    dense += table * (1 if stage.mtp and not stage.embedding else 0)
    return dense / plan.tp, expert / (plan.expert_buckets * plan.etp)


def usable_gib(cluster: Cluster, plan: Plan) -> float:
    """GiB that a plan may fill: stated in the plan, or 94% of the sheet."""
    return plan.memory_limit_gib if plan.memory_limit_gib is not None else USABLE * cluster.hardware.mem_gib


def parameter_state(dense: float, expert: float, plan: Plan, cluster: Cluster) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer on one device (2 + 4 + 12 bytes a parameter with fp32 gradients,
    sharded as the ZeRO stage says)."""
    group = plan.data_parallel(cluster.devices) * plan.cp
    expert_group = max(1, cluster.devices // (plan.pp * plan.expert_buckets * plan.etp))

    def sharded(size: float, stage: int) -> float:
        if plan.fsdp < stage:
            return size * (dense + expert)
        return size * (dense / max(1, group) + expert / expert_group)

    return sharded(2.0, 3), sharded(float(plan.gradient_bytes), 2), sharded(12.0, 1)


def recompute_items(model: Model, p: PlanVector, u: UnitSeconds, fp8: float, kind: str) -> list[Item]:
    """What may be recomputed or swapped in a layer of a kind, with the seconds to make it again."""
    s = shape_vector(model)
    sizes = layer_items(s, p, fp8)[kind]
    parts, operators = u.parts[kind], u.parts["operators"]
    memory_bound = float(parts["memory-bound"]) / 3.0
    projections = float(operators["projections"])
    latent = s.latent > 0
    up = (
        float(operators["expert_gemm"] + operators["shared"])
        if kind == "moe"
        else float(parts["matmul"]) / 3.0 - projections
    )
    seconds = {
        "norms": 0.35 * memory_bound,
        "query-key-value": projections * (0.6 if latent else 0.55),
        "attention output": float(operators["attention_forward"]),
        "scores": float(operators["attention_forward"]),
        "up projection": up * (s.up_factor / (s.up_factor + 1.0)),
        "activation": 0.3 * memory_bound,
        # Permuting again also sends again.
        "dispatched tokens": 0.2 * memory_bound + float(operators["ep_phase"]),
        # Gates multiplied in before the down projection leave nothing to keep.
        "combine input": 0.02 * memory_bound,
    }
    return [Item(name, float(sizes[name]), cost) for name, cost in seconds.items() if float(sizes.get(name, 0.0)) > 0]


@dataclass(frozen=True)
class Choice:
    """Answer of the knapsack: how many layers recompute or swap each item, what it saves (bytes) and costs
    (seconds)."""

    recompute: tuple[int, ...]
    swap: tuple[int, ...]
    saved: float
    seconds: float
    swap_bytes: float


def _swap_only(sizes: tuple[float, ...], counts: tuple[int, ...], need: float, swap_budget: float) -> Choice | None:
    """A set that frees enough by swaps alone, which cost nothing, large items first; None where this finds none."""
    if swap_budget < need:
        return None
    swapped = [0] * len(sizes)
    moved = 0.0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        wanted = min(counts[index], math.ceil((need - moved) / size), int((swap_budget - moved) / size))
        swapped[index] = max(wanted, 0)
        moved += size * swapped[index]
        if moved >= need:
            return Choice((0,) * len(sizes), tuple(swapped), moved, 0.0, moved)
    return None


def _pieces(count: int, ways: int) -> list[int]:
    """Numbers that sum to `count` and that can be dealt so that each of `ways` heaps gets any share: the largest piece
    never exceeds the largest heap, which is at least the mean."""
    pieces = []
    while count:
        pieces.append(-(-count // ways))
        count -= pieces[-1]
    return pieces


@lru_cache(maxsize=4096)
def choose_items(
    sizes: tuple[float, ...], costs: tuple[float, ...], counts: tuple[int, ...], need: float, swap_budget: float
) -> Choice | None:
    """The cheapest set of items that frees `need` bytes, exactly (to 16 MiB, above 32 GiB to a 2048th of `need`; what
    moves to the host to a 24th of its budget).

    Args:
        sizes: bytes that one layer's item frees, in-flight copies included.
        costs: seconds to make one layer's item again.
        counts: layers that have the item.
        need: bytes to free.
        swap_budget: bytes that may move to the host for free, because the transfer hides under the stage's compute.

    Returns:
        The choice, or None when everything together frees too little. Freed bytes are rounded down and `need` up, so
        the answer always fits.
    """
    if need <= 0:
        return Choice((0,) * len(sizes), (0,) * len(sizes), 0.0, 0.0, 0.0)
    if free := _swap_only(sizes, counts, need, swap_budget):
        return free
    bucket = max(float(BUCKET), need / 2048.0)
    target = int(np.ceil(need / bucket))
    lanes = 24 if swap_budget > 0 else 1
    lane = swap_budget / lanes if swap_budget > 0 else 1.0
    best = np.full((target + 1, lanes + (swap_budget > 0)), np.inf)
    best[0, :] = 0.0
    # One decision per piece of an item (some of its layers): 0 keep, 1 recompute, 2 swap, for every state.
    decisions: list[tuple[int, int, np.ndarray]] = []
    rows = np.arange(target + 1)
    for index, (size, cost, count) in enumerate(zip(sizes, costs, counts, strict=True)):
        for take in _pieces(count, 3 if swap_budget > 0 else 2):
            gain = int(size * take / bucket)
            if gain == 0:
                continue
            before = best[np.maximum(rows - gain, 0)]
            choice = np.zeros(best.shape, dtype=np.int8)
            result = best
            for kind in (1, 2) if swap_budget > 0 else (1,):
                lane_use = int(np.ceil(size * take / lane)) if kind == 2 else 0
                if lane_use >= best.shape[1]:
                    continue
                candidate = np.full_like(best, np.inf)
                candidate[:, lane_use:] = before[:, : best.shape[1] - lane_use] + (cost * take if kind == 1 else 0.0)
                candidate[0] = np.inf
                better = candidate < result - 1e-15
                result = np.where(better, candidate, result)
                choice[better] = kind
            best = result
            decisions.append((index, take, choice))
    if not np.isfinite(best[target]).any():
        return None
    recompute, swapped = [0] * len(sizes), [0] * len(sizes)
    state, use = target, int(np.argmin(best[target]))
    total = float(best[target, use])
    for index, take, choice in reversed(decisions):
        kind = int(choice[state, use])
        if kind == 0:
            continue
        (recompute if kind == 1 else swapped)[index] += take
        use -= int(np.ceil(sizes[index] * take / lane)) if kind == 2 else 0
        state = max(state - int(sizes[index] * take / bucket), 0)
    saved = sum(size * (r + w) for size, r, w in zip(sizes, recompute, swapped, strict=True))
    return Choice(
        tuple(recompute), tuple(swapped), saved, total, sum(size * w for size, w in zip(sizes, swapped, strict=True))
    )


def stage_memory(
    model: Model,
    cluster: Cluster,
    plan: Plan,
    stages: list[Stage],
    p: PlanVector,
    u: UnitSeconds | None,
    microbatch_seconds: list[float],
    times: StageTimes | None = None,
) -> list[StageMemory]:
    """Memory of every pipeline rank.

    Args:
        model, cluster, plan: what is simulated.
        stages: from `pipeline.partition`.
        p, u: plan vector and unit seconds (recompute costs; None chooses nothing).
        microbatch_seconds: forward and backward seconds of one micro-batch on every rank; bounds what a swap can hide.
        times: stage times, which order an adaptive schedule (None: equal stages).

    Returns:
        One entry per rank; with `fine-grained` recompute the items chosen so that the rank fits, if it can.
    """
    s = shape_vector(model)
    fp8 = float(plan.precision.endswith("fp8"))
    dense_act, moe_act = (float(value) for value in activation_bytes(s, p, plan.recompute, fp8))
    tokens = plan.mbs * plan.seq / plan.cp
    limit = usable_gib(cluster, plan) * GIB
    profile = flight_profile(plan.resolved_schedule(), plan.pp, plan.vpp, plan.microbatches(cluster.devices), times)
    again = plan.recompute in ("full", "moe")  # whole blocks are there once more while their backward runs
    whole_dense, whole_moe = (float(v) for v in activation_bytes(s, p, "none", fp8)) if again else (0.0, 0.0)
    # Most stages are alike, and so are most ranks.
    parameters_of: dict[Stage, tuple[float, float]] = {}
    size_of: dict[Stage, float] = {}
    for held in set(stages):
        parameters_of[held] = stage_parameters(model, held, plan)
        size = held.dense * dense_act + (held.moe + (held.mtp if model.experts else 0)) * moe_act
        size_of[held] = size + held.mtp * (dense_act if not model.experts else 0.0)
    state_of: dict[tuple[float, float], tuple[float, float, float]] = {}
    memories = []
    for rank, (local, flight) in enumerate(profile):
        dense = sum(parameters_of[stages[stage]][0] for stage in local)
        expert = sum(parameters_of[stages[stage]][1] for stage in local)
        if (dense, expert) not in state_of:
            state_of[dense, expert] = parameter_state(dense, expert, plan, cluster)
        weights, gradients, optimizer = state_of[dense, expert]
        sizes = [size_of[stages[stage]] for stage in local]
        amounts = flight @ np.array(sizes)
        worst = int(amounts.argmax()) if len(amounts) else 0
        activations = float(amounts[worst]) if len(amounts) else 0.0
        held_layers = [stages[stage] for stage in local]
        head = any(stage.head for stage in held_layers)
        working = CONTEXT_GIB * GIB
        if head:
            working += tokens * model.vocab / plan.tp * 8.0
        if again:
            working += max(
                whole_moe if any(x.moe for x in held_layers) else 0.0,
                whole_dense if any(x.dense for x in held_layers) else 0.0,
            )
        if plan.fsdp >= 3:
            layer = max((sum(parameters_of[x]) / max(1, x.layers) for x in held_layers), default=0.0)
            working += 2.0 * 2.0 * layer
        static = weights + gradients + optimizer + working
        in_flight = int(flight[worst].sum()) if len(flight) else 0
        choice = None
        items: list[tuple[str, Item]] = []
        if u is not None and plan.recompute == "fine-grained" and static + activations > limit:
            counts: list[int] = []
            held_count: dict[str, float] = {}
            for kind in ("dense", "moe"):
                layers = [stages[x].dense if kind == "dense" else stages[x].moe + stages[x].mtp for x in local]
                if not sum(layers):
                    continue
                copies = float(np.dot(flight[worst], layers)) / sum(layers)
                for item in recompute_items(model, p, u, fp8, kind):
                    items.append((f"{kind}: {item.name}", Item(item.name, item.size * copies, item.seconds)))
                    counts.append(sum(layers))
                held_count[kind] = copies
            host = cluster.hardware.host_gbs * 1e9 * 0.8
            # One micro-batch moves out and back in while the rank computes; the steady state holds in_flight copies.
            per_copy = max(1.0, max(held_count.values(), default=1.0))
            budget = host * microbatch_seconds[rank] * 0.5 * per_copy if plan.swap else 0.0
            choice = choose_items(
                tuple(item.size for _, item in items),
                tuple(item.seconds for _, item in items),
                tuple(counts),
                static + activations - limit,
                budget,
            )
            if choice is None:
                # Even everything does not fit: show the best that can be done.
                everything = sum(item.size * count for (_, item), count in zip(items, counts, strict=True))
                cost = sum(item.seconds * count for (_, item), count in zip(items, counts, strict=True))
                choice = Choice(tuple(counts), (0,) * len(counts), everything, cost, 0.0)
        saved = choice.saved if choice else 0.0
        memories.append(
            StageMemory(
                rank=rank,
                weights=weights / GIB,
                gradients=gradients / GIB,
                optimizer=optimizer / GIB,
                activations=max(0.0, activations - saved) / GIB,
                working=working / GIB,
                in_flight=in_flight,
                recomputed={name: n for (name, _), n in zip(items, choice.recompute, strict=True) if n}
                if choice
                else {},
                swapped={name: n for (name, _), n in zip(items, choice.swap, strict=True) if n} if choice else {},
                saved=saved / GIB,
                extra_seconds=choice.seconds if choice else 0.0,
            )
        )
    return memories


# Share of a layer's forward that making an item again costs, for rows that do not say what they recompute.
_TYPICAL_COST = {
    "combine input": 0.01,
    "activation": 0.03,
    "norms": 0.03,
    "dispatched tokens": 0.12,
    "query-key-value": 0.2,
    "up projection": 0.3,
    "attention output": 0.15,
}


def inferred_recompute(model: Model, cluster: Cluster, plan: Plan, p: PlanVector) -> float:
    """Share of the forward that must be repeated for a plan to fit, cheapest items first; 0 when everything fits, 1
    for whole layers.

    For published rows that leave recomputation to an unpublished recipe: the recipe fitted, so this much was repeated
        at least.
    """
    plain = plan.replace(recompute="none", swap=False)
    try:
        memories = stage_memory(model, cluster, plain, partition(model, plain), p, None, [0.0] * plan.pp)
    except UserError:
        return 0.0  # a row whose batch does not suit its schedule: nothing can be inferred
    worst = max(memories, key=lambda memory: memory.total)
    excess = worst.total - usable_gib(cluster, plan)
    if excess <= 0 or worst.activations <= 0:
        return 0.0
    sizes = layer_items(shape_vector(model), p, float(plan.precision.endswith("fp8")))[
        "moe" if model.experts else "dense"
    ]
    whole = sum(float(size) for size in sizes.values())
    need, share = excess / worst.activations, 0.0
    for name, cost in sorted(
        _TYPICAL_COST.items(), key=lambda pair: pair[1] / max(float(sizes.get(pair[0], 0.0)), 1e-9)
    ):
        part = float(sizes.get(name, 0.0)) / whole
        if part <= 0:
            continue
        used = min(1.0, need / part)
        share += used * cost
        need -= used * part
        if need <= 1e-9:
            return share
    return 1.0


def check_memory(cluster: Cluster, plan: Plan, memories: list[StageMemory]) -> UserError | None:
    """The error for a plan that does not fit: which rank, which item, and by how much; None when it fits."""
    limit = usable_gib(cluster, plan)
    worst = max(memories, key=lambda memory: memory.total)
    if worst.total <= limit:
        return None
    item, size = max(worst.items().items(), key=lambda pair: pair[1])
    return UserError(
        f"memory: rank {worst.rank} needs {worst.total:.1f} GiB of {limit:.1f} GiB usable on {cluster.hardware.name}; "
        f"largest item: {item} {size:.1f} GiB ({worst.in_flight} chunks in flight)"
    )


def peak_chunks(schedule: Any, pp: Any, vpp: Any, microbatches: Any) -> Any:
    """Closed form of the chunks that the first rank holds (elementwise; schedule as index into `config.SCHEDULES`);
    the search's estimate."""
    looped = (vpp - 1) * pp + 2 * (pp - 1) + 1
    one = np.minimum(pp, microbatches)
    values = [
        np.ones_like(pp),
        microbatches,
        one,
        np.minimum(looped, microbatches * vpp),
        one,
        np.minimum(vpp * pp, microbatches * vpp),
        2.0 * pp,
        pp + 1.0,
        2.0 * pp + 1.0,
        np.minimum(np.where(vpp > 1, looped, pp) + 1, microbatches * vpp),
    ]
    return np.choose(np.asarray(schedule, dtype=int), values)
