"""The user-level object: a model and a cluster in, typed estimates out."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner import simulation, steady
from tenfold.planner.coefficients import Calibration, attention_unfused, default_stack, load_calibration
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.memory import StageMemory, inferred_recompute, stage_memory, usable_gib
from tenfold.planner.operators import UnitSeconds, hardware_vector, plan_vector, unit_seconds
from tenfold.planner.pipeline import Stage, partition, stage_times
from tenfold.planner.shapes import flops_per_token, parameters, shape_vector
from tenfold.planner.simulation import Slice, StageTimes
from tenfold.planner.validity import check_plan


@dataclass(frozen=True)
class Estimate:
    """What one plan is predicted to do.

    Attributes:
        model, hardware, devices, plan: what was simulated; the plan with everything resolved.
        step_seconds: one optimizer step.
        tokens_per_s_per_device: throughput; `low` and `high` bound its 80% interval.
        tflops_per_device: model TFLOP/s (causal attention, recompute not counted).
        mfu: those FLOPs over the dense peak of the plan's dtype; `mfu_convention` says so in words.
        mfu_noncausal: the same with full attention counted, as PaLM and Megatron 2021 quote it.
        bubble: idle share of the pipeline's time.
        breakdown: seconds of a step by cause, mean over ranks; they add up to step_seconds.
        memory: per pipeline rank.
        memory_limit_gib: usable memory.
        fits: whether every rank stays under it.
        parameters, active_parameters: of the model, without multi-token prediction.
        all_to_all_hidden: share of the expert all-to-all that runs beside compute.
        stages: what each stage holds.
        times: seconds of every stage, for the timeline.
    """

    model: Model
    hardware: str
    devices: int
    plan: Plan
    step_seconds: float
    tokens_per_s_per_device: float
    low: float
    high: float
    tflops_per_device: float
    mfu: float
    mfu_noncausal: float
    mfu_convention: str
    bubble: float
    breakdown: dict[str, float]
    memory: tuple[StageMemory, ...]
    memory_limit_gib: float
    fits: bool
    parameters: int
    active_parameters: int
    all_to_all_hidden: float
    stages: tuple[Stage, ...]
    times: StageTimes

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step and pipeline."""
        return self.plan.microbatches(self.devices)

    @property
    def peak_memory_gib(self) -> float:
        """Memory of the fullest rank."""
        return max(memory.total for memory in self.memory)

    def timeline(self, microbatches: int | None = None) -> list[Slice]:
        """Every action of one step (or of its first `microbatches`)."""
        return simulation.timeline(
            self.plan.schedule, self.plan.pp, self.plan.vpp, microbatches or self.microbatches, self.times
        )

    def summary(self) -> dict[str, Any]:
        """The figures for JSON, without the timeline's inputs."""
        keep = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("times", "stages", "model")
        }
        keep["model"] = self.model.name
        keep["peak_memory_gib"] = self.peak_memory_gib
        keep["microbatches"] = self.microbatches
        return keep


def simulate(model: Model, cluster: Cluster, plan: Plan, calibration: Calibration | None = None) -> Estimate:
    """Predict one plan.

    Args:
        model: shape.
        cluster: devices.
        plan: layout.
        calibration: coefficients; None takes the shipped ones.

    Raises:
        UserError: a plan that cannot run (a plan that does not fit the memory is answered, with `fits` False).
    """
    calibration = calibration or load_calibration()
    if plan.stack == "auto":
        plan = plan.replace(stack=default_stack(cluster.hardware))
    plan = check_plan(model, cluster, plan)
    p = plan_vector(plan, cluster.devices, attention_unfused(plan.stack))
    if plan.recompute == "unstated":
        p.inferred = inferred_recompute(model, cluster, plan, p)
    h = hardware_vector(cluster.hardware, plan.precision)
    c = calibration.resolve(cluster.hardware, model, plan)
    u = unit_seconds(shape_vector(model), h, p, c)
    head, mtp = stage_weights(model, plan, u)
    stages = partition(model, plan, head, mtp)
    times = stage_times(stages, u, plan)
    count = plan.microbatches(cluster.devices)
    local = simulation.local_stages(plan.schedule, plan.pp, plan.vpp)
    per_rank = [sum(times.forward[s] + times.backward[s] for s in owned) for owned in local]
    if plan.schedule == "adaptive":
        # The order is chosen once, before recomputation is: memory and makespan are those of the same order.
        times = replace(times, order_key=simulation.order_key(times))
    memory = stage_memory(model, cluster, plan, stages, p, u, per_rank, times)
    if any(rank.extra_seconds for rank in memory):
        times = _with_recompute(times, memory, local)
    played = steady.play(plan.schedule, plan.pp, plan.vpp, count, times)
    pipeline = played.makespan
    whole = (pipeline + float(u.step)) * float(u.factor)
    tokens = plan.gbs * plan.seq
    rate = tokens / whole / cluster.devices
    width = calibration.interval(cluster.hardware, model, plan)
    flops = flops_per_token(model, plan.seq)
    peak = cluster.hardware.peak(plan.precision) * 1e12
    busy = float(np.mean(played.busy))
    extra = sum(rank.extra_seconds for rank in memory) * count / plan.pp
    breakdown = _breakdown(u, stages, plan, count, pipeline, busy, extra, whole)
    limit = usable_gib(cluster, plan)
    hidden = float(u.parts["hidden"]["expert all-to-all"])
    exposed = played.joined * float(c.exposed_paired) * hidden
    exposed += (1.0 - played.joined) * float(u.parts["moe"]["expert all-to-all"])
    return Estimate(
        model=model,
        hardware=cluster.hardware.name,
        devices=cluster.devices,
        plan=plan,
        step_seconds=whole,
        tokens_per_s_per_device=rate,
        low=rate * math.exp(-width),
        high=rate * math.exp(width),
        tflops_per_device=rate * flops / 1e12,
        mfu=rate * flops / peak,
        mfu_noncausal=rate * flops_per_token(model, plan.seq, "noncausal") / peak,
        mfu_convention=f"causal attention, recompute not counted, {plan.precision} dense peak {peak / 1e12:.0f} "
        f"TFLOP/s",
        bubble=1.0 - busy / pipeline,
        breakdown=breakdown,
        memory=tuple(memory),
        memory_limit_gib=limit,
        fits=all(rank.total <= limit for rank in memory),
        parameters=parameters(model),
        active_parameters=parameters(model, active=True),
        all_to_all_hidden=1.0 - exposed / hidden if hidden > 0 else 1.0,
        stages=tuple(stages),
        times=times,
    )


def stage_weights(model: Model, plan: Plan, u: UnitSeconds) -> tuple[float, float]:
    """Cost of the head and of one MTP layer in layers, as `partition` weighs them."""
    paired = plan.schedule in ("adaptive", "dualpipe", "dualpipev")
    moe = u.moe_pair_forward + u.moe_pair_backward if paired else u.moe_forward + u.moe_backward
    layer = float(moe if model.experts else u.dense_forward + u.dense_backward)
    mtp = u.mtp_forward + u.mtp_backward - (u.moe_forward + u.moe_backward - moe if model.experts else 0.0)
    return float(u.head_forward + u.head_backward) / layer, float(mtp) / layer


def _with_recompute(times: StageTimes, memory: list[StageMemory], local: tuple[tuple[int, ...], ...]) -> StageTimes:
    backward = list(times.backward)
    pair = list(times.pair_backward or times.backward)
    for rank, owned in zip(memory, local, strict=True):
        for stage in owned:
            backward[stage] += rank.extra_seconds / len(owned)
            pair[stage] += rank.extra_seconds / len(owned)
    return replace(times, backward=backward, pair_backward=pair)


def _breakdown(
    u: UnitSeconds,
    stages: list[Stage],
    plan: Plan,
    count: int,
    pipeline: float,
    busy: float,
    extra: float,
    whole: float,
) -> dict[str, float]:
    """Seconds of a step by cause, mean over ranks; what pairs hide is taken off the all-to-all."""
    share = 0.5 if plan.schedule == "dualpipe" else 1.0
    scale = share * count / plan.pp
    total: dict[str, float] = {}
    for kind, layers in (("dense", sum(s.dense for s in stages)), ("moe", sum(s.moe for s in stages))):
        if layers:
            for name, seconds in u.parts[kind].items():
                total[name] = total.get(name, 0.0) + float(seconds) * layers * scale
    heads = sum(1 for s in stages if s.head) * float(u.head_forward + u.head_backward) + sum(
        1 for s in stages if s.embedding
    ) * float(u.embed_forward + u.embed_backward)
    total["head, loss, embedding"] = heads * scale
    mtp = sum(s.mtp for s in stages) * float(u.mtp_forward + u.mtp_backward)
    if mtp:
        total["multi-token prediction"] = mtp * scale
    if extra:
        total["recompute"] = total.get("recompute", 0.0) + extra
    # What the parts leave out of the busy time: software factor, soft maxima, sends, and what pairs hide. Pairs take it
    # off the all-to-all as far as there is any.
    rest = busy - sum(total.values())
    exchange = total.get("expert all-to-all", 0.0)
    if plan.schedule in ("adaptive", "dualpipe", "dualpipev") and exchange > 0:
        total["expert all-to-all"] = max(exchange + rest, 0.0)
        rest = min(exchange + rest, 0.0)
    if rest:
        total["software"] = rest
    total["bubble"] = pipeline - busy
    for name, seconds in u.parts["step"].items():
        total[name if name != "host" else "step launch"] = float(seconds)
    total["stragglers"] = whole - pipeline - float(u.step)
    return {name: seconds for name, seconds in total.items() if abs(seconds) > 1e-12}


def smallest_change(
    model: Model, cluster: Cluster, plan: Plan, calibration: Calibration | None = None
) -> tuple[str, Estimate] | None:
    """The single change of a plan that makes it fit and costs least throughput; None when no single change does."""
    options: list[dict[str, Any]] = []
    if plan.recompute == "none":
        options.append({"recompute": "fine-grained"})
    if plan.recompute != "full":
        options.append({"recompute": "fine-grained", "swap": True})
        options.append({"recompute": "full"})
    if plan.fsdp < 1:
        options.append({"fsdp": 1})
    if plan.mbs > 1:
        options.append({"mbs": plan.mbs // 2})
    if plan.vpp > 1 and plan.schedule in ("interleaved", "adaptive", "auto"):
        options.append({"vpp": plan.vpp // 2, "schedule": "auto"})
    for field in ("ep", "tp", "pp", "cp"):
        options.append({field: getattr(plan, field) * 2, "noop_slots": None})
    if plan.fsdp < 3 and plan.pp == 1:
        options.append({"fsdp": 3})
    best: tuple[str, Estimate] | None = None
    for change in options:
        try:
            estimate = simulate(model, cluster, plan.replace(**change), calibration)
        except UserError:
            continue
        if estimate.fits and (best is None or estimate.tokens_per_s_per_device > best[1].tokens_per_s_per_device):
            words = ", ".join(
                f"{name} {value}" for name, value in change.items() if name != "noop_slots" and value != "auto"
            )
            best = (words, estimate)
    return best


def memory_error(estimate: Estimate, cluster: Cluster, calibration: Calibration | None = None) -> UserError:
    """The error for an estimate that does not fit: rank, item, and the smallest change that fits."""
    worst = max(estimate.memory, key=lambda rank: rank.total)
    item, size = max(worst.items().items(), key=lambda pair: pair[1])
    found = smallest_change(estimate.model, cluster, estimate.plan, calibration)
    advice = (
        f"smallest change that fits: {found[0]} ({found[1].peak_memory_gib:.1f} GiB, "
        f"{found[1].tokens_per_s_per_device:.0f} tokens/s/device)"
        if found
        else "no single change fits: use more devices, or search"
    )
    return UserError(
        f"memory: pipeline rank {worst.rank} needs {worst.total:.1f} GiB of {estimate.memory_limit_gib:.1f} GiB "
        f"usable on {estimate.hardware}; "
        f"largest item {item} {size:.1f} GiB ({worst.in_flight} chunks in flight); {advice}"
    )


class Planner:
    """Plans training of one model on one cluster.

    Example:
        >>> from tenfold.planner import Planner, Plan
        >>> planner = Planner.from_pretrained("pangu-ultra-moe", "ascend-800t-a2", devices=6144)
        >>> planner.simulate(Plan(tp=8, pp=16, vpp=2, ep=4, tp_extend_ep=True, mbs=2, gbs=6144, seq=8192,
        recompute="fine-grained")).mfu
    """

    def __init__(self, model: Model, cluster: Cluster, calibration: Calibration | None = None) -> None:
        self.model = model
        self.cluster = cluster
        self.calibration = calibration or load_calibration()

    @classmethod
    def from_pretrained(cls, model: str, hardware: str, devices: int, calibration: str | None = None) -> Planner:
        """A planner from names of presets or paths of files, and a calibration file (None: the shipped one)."""
        from tenfold.planner.data import load_hardware, load_model

        return cls(load_model(model), Cluster(load_hardware(hardware), devices), load_calibration(calibration))

    def simulate(self, plan: Plan) -> Estimate:
        """Predict one plan. Raises UserError for a plan that cannot run."""
        return simulate(self.model, self.cluster, plan, self.calibration)

    def search(self, plan: Plan, **options: Any) -> Any:
        """Search layouts around `plan`'s batch, sequence and precision; see `tenfold.planner.layout_search.search`."""
        from tenfold.planner.layout_search import search

        return search(self.model, self.cluster, plan, calibration=self.calibration, **options)
