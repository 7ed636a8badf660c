"""Whether a plan can run at all: every refusal names the field, its value and the nearest values that work."""

from __future__ import annotations

import difflib
import math

from tenfold.core.console import UserError
from tenfold.planner import schedules
from tenfold.planner.config import DISPATCH, PRECISIONS, RECOMPUTE, SCHEDULES, Cluster, Model, Plan
from tenfold.planner.data import check_model

_LIMIT = 1 << 24


def near_divisors(number: int, value: int, count: int = 4) -> str:
    """The divisors of `number` nearest to `value`, as text."""
    found = set()
    for small in range(1, math.isqrt(max(number, 1)) + 1):
        if number % small == 0:
            found |= {small, number // small}
    return ", ".join(map(str, sorted(sorted(found, key=lambda d: (abs(math.log(d / max(value, 1))), d))[:count])))


def near_multiples(step: int, value: int) -> str:
    """The multiples of `step` around `value`, as text."""
    below = value // step * step
    return ", ".join(str(n) for n in (below, below + step) if n > 0)


def check_plan(model: Model, cluster: Cluster, plan: Plan) -> Plan:
    """Refuse a plan that cannot run; fill in the no-op slots.

    Returns:
        The plan with `schedule` and `noop_slots` resolved.

    Raises:
        UserError: with field, value and the nearest valid values.
    """
    check_model(model)
    for field in ("tp", "cp", "pp", "vpp", "ep", "etp", "mbs", "gbs", "seq"):
        value = getattr(plan, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMIT:
            raise UserError(f"{field}: found {value!r}, expected a whole number from 1 to {_LIMIT}")
    if not 1 <= cluster.devices <= _LIMIT:
        raise UserError(f"devices: found {cluster.devices}, expected 1 to {_LIMIT}")
    for field, allowed in (
        ("schedule", ("auto", *SCHEDULES)),
        ("recompute", (*RECOMPUTE, "unstated")),
        ("dispatch", DISPATCH),
        ("precision", PRECISIONS),
    ):
        value = getattr(plan, field)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=2, cutoff=0.3)
            shown = [name for name in allowed if name != "unstated"]
            raise UserError(
                f"{field}: found {value!r}"
                + (f", nearest: {', '.join(near)}" if near else "")
                + f"; choose one of {', '.join(shown)}"
            )
    if plan.fsdp not in (0, 1, 2, 3):
        raise UserError(f"fsdp: found {plan.fsdp}, choose 0, 1, 2 or 3")
    if plan.gradient_bytes not in (2, 4):
        raise UserError(f"gradient_bytes: found {plan.gradient_bytes}, choose 2 or 4")
    if plan.imbalance is not None and not (math.isfinite(plan.imbalance) and 1.0 <= plan.imbalance <= 1000.0):
        raise UserError(f"imbalance: found {plan.imbalance}, expected 1 (balanced) to 1000")
    if plan.memory_limit_gib is not None and not (math.isfinite(plan.memory_limit_gib) and plan.memory_limit_gib > 0):
        raise UserError(f"memory_limit_gib: found {plan.memory_limit_gib}, expected a positive number of GiB")
    cluster.hardware.peak(plan.precision)
    devices = cluster.devices
    slice_size = plan.tp * plan.cp * plan.pp
    if devices % slice_size:
        raise UserError(
            f"devices: {devices} is not divisible by tp*cp*pp = {plan.tp}*{plan.cp}*{plan.pp} = {slice_size}: "
            f"nearest devices {near_multiples(slice_size, devices)}; or tp*cp*pp from "
            f"{near_divisors(devices, slice_size)}"
        )
    if model.heads % plan.tp:
        raise UserError(
            f"tp: {plan.tp} does not divide heads = {model.heads}: nearest {near_divisors(model.heads, plan.tp)}"
        )
    if plan.seq % plan.cp:
        raise UserError(f"cp: {plan.cp} does not divide seq = {plan.seq}: nearest {near_divisors(plan.seq, plan.cp)}")
    buckets = plan.expert_buckets
    if model.experts:
        label = f"tp*ep = {plan.tp}*{plan.ep} = {buckets}" if plan.tp_extend_ep else f"ep = {plan.ep}"
        if model.experts % buckets:
            raise UserError(
                f"ep: {model.experts} experts are not divisible by {label}: nearest "
                f"{near_divisors(model.experts, buckets)}"
            )
        if model.moe_ffn % plan.etp:
            raise UserError(
                f"etp: {plan.etp} does not divide moe_ffn = {model.moe_ffn}: nearest "
                f"{near_divisors(model.moe_ffn, plan.etp)}"
            )
        if plan.tp_extend_ep and plan.etp > 1:
            raise UserError(f"etp: found {plan.etp} with tp_extend_ep: whole experts are not sliced, use etp 1")
        grid = plan.pp * buckets * plan.etp
        if devices % grid:
            raise UserError(
                f"ep: the expert grid pp*ep*etp = {plan.pp}*{buckets}*{plan.etp} = {grid} does not divide "
                f"devices = {devices}: "
                f"nearest ep*etp {near_divisors(devices // plan.pp, buckets * plan.etp)}"
            )
    elif plan.ep > 1 or plan.etp > 1 or plan.tp_extend_ep:
        raise UserError(f"ep: found {plan.ep} for a model without experts: use ep 1, etp 1 and no tp_extend_ep")
    if (
        plan.fsdp >= 2
        and plan.pp > 1
        and plan.fsdp == 3
        and plan.vpp == 1
        and plan.gbs // max(1, plan.data_parallel(devices) * plan.mbs) > 4096
    ):
        raise UserError(
            f"fsdp: 3 gathers parameters for each of more than 4096 micro-batches (gbs {plan.gbs}): use fsdp 1, "
            f"or a larger mbs"
        )
    dp = plan.data_parallel(devices)
    if plan.gbs % (dp * plan.mbs):
        raise UserError(
            f"gbs: {plan.gbs} is not divisible by dp*mbs = {dp}*{plan.mbs} = {dp * plan.mbs}: nearest "
            f"{near_multiples(dp * plan.mbs, plan.gbs)}"
        )
    plan = plan.replace(schedule=plan.resolved_schedule())
    if plan.vpp > 1 and plan.pp == 1:
        raise UserError(f"vpp: found {plan.vpp} with pp = 1: chunks need a pipeline, use vpp 1")
    parts = plan.pp * plan.vpp
    missing = -model.layers % parts
    if plan.noop_slots is None:
        fits_last_chunk = missing < plan.pp and (plan.vpp > 1 or plan.schedule in ("zb-v", "dualpipev"))
        if missing and not fits_last_chunk:
            raise UserError(
                f"layers: {model.layers} layers do not divide over pp*vpp = {plan.pp}*{plan.vpp} = {parts} stages: "
                f"set noop_slots = {missing} ({model.layers + missing} slots), or pp*vpp from "
                f"{near_divisors(model.layers, parts)}"
            )
        plan = plan.replace(noop_slots=missing)
    elif plan.noop_slots < 0 or (model.layers + plan.noop_slots) % parts or plan.noop_slots >= parts:
        raise UserError(
            f"noop_slots: {model.layers} layers + {plan.noop_slots} slots do not fill pp*vpp = {parts} stages "
            f"evenly: use {missing}"
        )
    if parts > model.layers + (plan.noop_slots or 0) or -(-model.layers // parts) * (parts - 1) >= model.layers + parts:
        raise UserError(f"pp: {parts} stages for {model.layers} layers: use pp*vpp of at most {model.layers}")
    count = plan.microbatches(devices)
    if count > 1 << 16:
        raise UserError(
            f"gbs: {plan.gbs} makes {count} micro-batches of a pipeline: raise mbs or dp (at most {1 << 16})"
        )
    if count * parts > 1 << 19 and plan.schedule in ("gpipe", "zb-v", "dualpipev", "adaptive"):
        raise UserError(
            f"gbs: {count} micro-batches on {parts} stages are too many for schedule {plan.schedule!r}: raise "
            f"mbs, or use interleaved"
        )
    schedules.check_schedule(plan.schedule, plan.pp, plan.vpp, count)
    return plan
