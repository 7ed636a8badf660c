"""Seconds of operators and layers on one device: the equations, with every coefficient named.

All functions work on floats and, element by element, on NumPy arrays (rows of a table, or candidate plans of a
search), so that calibration,
search and a single estimate run the same lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.planner import collectives
from tenfold.planner.config import Hardware, Plan
from tenfold.planner.shapes import ShapeVector


@dataclass
class HardwareVector:
    """A hardware sheet as numbers in base units (FLOP/s, bytes/s)."""

    peak: Any  # of the plan's dtype, as quoted
    peak_bf16: Any
    fp8: Any  # 1 where GEMMs run in fp8
    memory: Any
    intra: Any
    inter: Any
    per_node: Any
    host: Any


@dataclass
class PlanVector:
    """A plan as numbers."""

    devices: Any
    tp: Any
    cp: Any
    pp: Any
    vpp: Any
    dp: Any
    ep: Any  # expert buckets
    etp: Any
    mbs: Any
    seq: Any
    microbatches: Any
    fsdp: Any
    gradient_bytes: Any
    sequence_parallel: Any
    full: Any  # recompute indicators
    selective: Any
    fine: Any
    moe_again: Any  # the MoE block is recomputed
    unstated: Any
    inferred: Any  # share of the forward that an unpublished recipe must repeat to fit
    dispatch: Any  # 0 flat, 1 dedup, 2 hierarchical
    overlap: Any
    imbalance: Any  # 0: natural routing, by the spread of loads over experts
    unfused: Any  # attention that writes its scores to memory
    paired: Any  # schedule with joined forward-backward pairs
    chunked: Any  # more than one chunk a stage: p2p runs beside compute


@dataclass
class Coefficients:
    """Calibrated numbers of one (hardware, stack, precision); see `calibration.PRIORS` for meaning, unit and source
    of each."""

    gemm_efficiency: Any
    fp8_gain: Any
    gemm_rows: Any
    gemm_width: Any
    expert_efficiency: Any
    attention_efficiency: Any
    attention_ramp: Any
    attention_width: Any
    attention_backward: Any
    memory_efficiency: Any
    layer_bytes: Any
    activation_bytes: Any
    routed_bytes: Any
    cast_bytes: Any
    logit_bytes: Any
    score_bytes: Any
    host_dense: Any
    host_moe: Any
    host_expert: Any
    host_backward: Any
    host_step: Any
    exposed_tp: Any
    exposed_cp: Any
    exposed_ep: Any
    exposed_dp: Any
    exposed_fsdp: Any
    exposed_paired: Any
    link_intra: Any
    link_inter: Any
    straggler: Any
    load_spread: Any
    selective_share: Any
    fine_share: Any
    unstated_share: Any
    optimizer_bytes: Any
    software: Any


@dataclass
class UnitSeconds:
    """Seconds of the building blocks of one micro-batch on one device.

    Forward and backward of a dense layer, a MoE layer, head with loss, embedding and a multi-token-prediction layer;
    the weight-gradient part of
    the backward; MoE layers inside a joined forward-backward pair; one p2p send; what a step adds once; the factor
    for large clusters.
    """

    dense_forward: Any
    dense_backward: Any
    dense_weight: Any
    moe_forward: Any
    moe_backward: Any
    moe_weight: Any
    moe_pair_forward: Any
    moe_pair_backward: Any
    head_forward: Any
    head_backward: Any
    head_weight: Any
    embed_forward: Any
    embed_backward: Any
    mtp_forward: Any
    mtp_backward: Any
    mtp_weight: Any
    send: Any
    step: Any
    factor: Any
    parts: dict[str, Any]


def hardware_vector(hardware: Hardware, precision: str) -> HardwareVector:
    """The sheet in base units. Raises UserError where the precision has no peak."""
    return HardwareVector(
        peak=hardware.peak(precision) * 1e12,
        peak_bf16=hardware.peak("bf16") * 1e12,
        fp8=float(precision.endswith("fp8")),
        memory=hardware.mem_bw * 1e12,
        intra=hardware.intra_gbs * 1e9,
        inter=hardware.inter_gbs * 1e9,
        per_node=float(hardware.per_node),
        host=hardware.host_gbs * 1e9,
    )


def plan_vector(plan: Plan, devices: int, unfused: bool) -> PlanVector:
    """The plan as numbers."""
    schedule = plan.resolved_schedule()
    return PlanVector(
        devices=float(devices),
        tp=float(plan.tp),
        cp=float(plan.cp),
        pp=float(plan.pp),
        vpp=float(plan.vpp),
        dp=float(max(1, plan.data_parallel(devices))),
        ep=float(plan.expert_buckets),
        etp=float(plan.etp),
        mbs=float(plan.mbs),
        seq=float(plan.seq),
        microbatches=float(max(1, plan.microbatches(devices))),
        fsdp=float(plan.fsdp),
        gradient_bytes=float(plan.gradient_bytes),
        sequence_parallel=float(plan.sequence_parallel),
        full=float(plan.recompute == "full"),
        selective=float(plan.recompute == "selective"),
        fine=float(plan.recompute in ("fine-grained", "moe")),
        moe_again=float(plan.recompute == "moe"),
        unstated=float(plan.recompute == "unstated"),
        inferred=0.0,
        dispatch=float(("flat", "dedup", "hierarchical").index(plan.dispatch)),
        overlap=float(plan.ep_overlap),
        imbalance=0.0 if plan.imbalance is None else float(plan.imbalance),
        unfused=float(unfused),
        paired=float(schedule in ("adaptive", "dualpipe", "dualpipev")),
        chunked=float(plan.vpp > 1 or schedule in ("zb-v", "dualpipe", "dualpipev")),
    )


def saturation(size: Any, half: Any) -> Any:
    """Share of the peak that a dimension of `size` reaches: one half at `half`."""
    return size / (size + half)


def soft_max(a: Any, b: Any) -> Any:
    """A maximum that stays smooth where the two meet (norm of order 4): two limits seldom overlap perfectly."""
    top = np.maximum(a, b) + 1e-30
    return top * ((a / top) ** 4 + (b / top) ** 4) ** 0.25


# Mean of the largest of n standard normal draws, for n = 1, 2, 4 ... 1024 (tables of normal order statistics).
_LARGEST = (0.0, 0.564, 1.029, 1.424, 1.766, 2.070, 2.344, 2.595, 2.827, 3.045, 3.251)
NATURAL_SPREAD = 0.3  # standard deviation over mean of expert loads under a balancing loss; prior of `load_spread`


def device_skew(stated: Any, spread: Any, experts: Any, buckets: Any) -> Any:
    """Load of the fullest device over the mean.

    Loads of single experts scatter by `spread`; a device that holds g experts averages over them, and the layer waits
    for the fullest of all devices: 1 + spread / sqrt(g) * (mean of the largest of n normal draws). So spreading
    experts thinner makes routing harder to balance.

    Args:
        stated: a stated value, or 0 for natural routing.
        spread: standard deviation over mean of the loads of single experts.
        experts: experts of a layer.
        buckets: devices over which they are spread.
    """
    held = np.maximum(experts / buckets, 1.0)
    largest = np.interp(np.log2(np.maximum(buckets, 1.0)), np.arange(len(_LARGEST)), _LARGEST)
    return np.where(stated > 0, stated, 1.0 + spread / np.sqrt(held) * largest)


def gemm_seconds(
    rows: Any,
    inner: Any,
    outer: Any,
    rate: Any,
    memory: Any,
    c: Coefficients,
    count: Any = 1.0,
    backward_bytes: bool = False,
) -> Any:
    """Seconds of `count` products [rows, inner] x [inner, outer].

    Args:
        rows, inner, outer: dimensions.
        rate: FLOP/s of a saturated product (peak times efficiency).
        memory: usable bytes/s.
        c: coefficients (half-saturation of rows and width).
        count: number of equal products.
        backward_bytes: the product accumulates into fp32 gradients (8 bytes a weight) instead of reading bf16 weights
            (2 bytes).
    """
    # Kernels work in whole tiles: 256 wide, 128 deep.
    work = 2.0 * count * rows * np.ceil(inner / 128.0) * 128.0 * np.ceil(outer / 256.0) * 256.0
    work = np.where(np.minimum(inner, outer) < 512, 2.0 * count * rows * inner * outer, work)
    slow = saturation(rows, c.gemm_rows) * saturation(np.maximum(np.minimum(inner, outer), 1.0), c.gemm_width)
    weights = count * inner * outer * (8.0 if backward_bytes else 2.0)
    moved = weights + count * 2.0 * rows * (inner + outer)
    return soft_max(work / (rate * slow), np.where(outer > 0, moved, 0.0) / memory)


def unit_seconds(s: ShapeVector, h: HardwareVector, p: PlanVector, c: Coefficients) -> UnitSeconds:
    """The cost of every building block. Equations: README of the room, section Equations."""
    tokens = p.mbs * p.seq / p.cp  # of one tensor-parallel group
    own = tokens / p.tp  # of one device under sequence parallelism
    memory = h.memory * c.memory_efficiency
    intra, inter = h.intra * c.link_intra, h.inter * c.link_inter
    rate16 = h.peak_bf16 * c.gemm_efficiency
    rate = np.where(h.fp8 > 0, h.peak * c.gemm_efficiency * c.fp8_gain, rate16)

    def products(gemms: list[tuple[Any, Any, Any]], speed: Any = rate) -> tuple[Any, Any, Any]:
        """Forward, input-gradient and weight-gradient seconds of (rows, inner, outer) products."""
        forward = inputs = weights = 0.0
        for rows, inner, outer in gemms:
            forward = forward + gemm_seconds(rows, inner, outer, speed, memory, c)
            inputs = inputs + gemm_seconds(rows, outer, inner, speed, memory, c)
            weights = weights + gemm_seconds(rows, inner, outer, speed, memory, c, backward_bytes=True)
        return forward, inputs, weights

    # Attention: projections and core.
    last = len(s.gemm_in) - 1
    attention_gemms = []
    for index, (inner, outer, split) in enumerate(zip(s.gemm_in, s.gemm_out, s.gemm_split, strict=True)):
        share = np.where(split > 0, p.tp, 1.0)
        rows = np.where(split > 0, tokens, own)
        # The output projection is split along its inner side, the others along their outer side.
        is_output = (index == last) | ((outer == s.hidden) & (index == 1))
        attention_gemms.append(
            (rows, np.where(is_output, inner / share, inner), np.where(is_output, outer, outer / share))
        )
    attn_f, attn_i, attn_w = products(attention_gemms)
    full_keys = p.seq / 2.0
    keys = s.window_share * np.minimum(s.window, full_keys) + (1 - s.window_share) * full_keys
    keys = np.where(p.unfused > 0, p.seq, keys)
    core_rate = (
        h.peak_bf16
        * c.attention_efficiency
        # A ring over context parallelism works on blocks: each rank holds two of 2*cp pieces of the sequence.
        * saturation(p.seq / np.where(p.cp > 1, 2.0 * p.cp, 1.0), c.attention_ramp)
        * saturation(s.head_dim, c.attention_width)
    )
    core_f = tokens / p.tp * s.core_flops * keys / core_rate
    score_f = p.unfused * tokens / p.tp * s.heads * p.seq * c.score_bytes / memory
    core_f, core_b = core_f + score_f, core_f * np.where(p.unfused > 0, 2.0, c.attention_backward) + 2.0 * score_f

    # Memory-bound work: norms, residuals, activation, rotary embedding; casts in fp8.
    layer_bytes = c.layer_bytes * (1.0 + 0.1 * s.sandwich) + h.fp8 * c.cast_bytes
    sharded = np.where(p.sequence_parallel > 0, own, 0.5 * (own + tokens))
    small_f = sharded * s.hidden * layer_bytes / 3.0 / memory
    act_dense = tokens / p.tp * (1.0 + s.up_factor) * s.ffn * c.activation_bytes / 3.0 / memory
    act_shared = tokens / p.tp * (1.0 + s.up_factor) * s.shared_ffn * c.activation_bytes / 3.0 / memory
    small_dense_f = small_f + act_dense
    small_b, small_dense_b = 2.0 * small_f, 2.0 * small_dense_f

    # Dense feed-forward.
    up = s.up_factor
    ffn_f, ffn_i, ffn_w = products([(tokens, s.hidden, up * s.ffn / p.tp), (tokens, s.ffn / p.tp, s.hidden)])

    # Routed experts: rows per local expert, grouped products, copies in and out.
    experts = np.maximum(s.experts, 1.0)
    skew = device_skew(p.imbalance, c.load_spread, experts, p.ep)
    copies = own * s.topk * p.etp * skew
    local_experts = np.maximum(experts / p.ep, 1.0)
    rows_per_expert = np.maximum(copies / local_experts, 1e-9)
    expert_rate = rate * c.expert_efficiency
    expert_f = expert_i = expert_w = 0.0
    for inner, outer in ((s.hidden, up * s.moe_ffn / p.etp), (s.moe_ffn / p.etp, s.hidden)):
        expert_f = expert_f + gemm_seconds(rows_per_expert, inner, outer, expert_rate, memory, c, local_experts)
        expert_i = expert_i + gemm_seconds(rows_per_expert, outer, inner, expert_rate, memory, c, local_experts)
        expert_w = expert_w + gemm_seconds(
            rows_per_expert, inner, outer, expert_rate, memory, c, local_experts, backward_bytes=True
        )
    shared_f, shared_i, shared_w = products(
        [(tokens, s.hidden, up * s.shared_ffn / p.tp), (tokens, s.shared_ffn / p.tp, s.hidden)]
    )
    router_f, router_i, router_w = products([(own, s.hidden, experts)], rate16)
    routed_f = copies * s.hidden * (c.routed_bytes + 0.5 * h.fp8 * c.cast_bytes) / 3.0 / memory
    routed_f = (
        routed_f + copies / p.etp * (1.0 + s.up_factor) * s.moe_ffn * c.activation_bytes / 3.0 / memory + act_shared
    )
    routed_b = 2.0 * routed_f

    # Communication of one layer.
    tensor_bytes = 2.0 * tokens * s.hidden
    crosses = np.where(p.tp > h.per_node, inter, intra)
    one_gather = collectives.ring_bytes(tensor_bytes, p.tp) / crosses
    tp_dense = 4.0 * one_gather * c.exposed_tp
    tp_moe = (2.0 + 2.0 * np.where(s.shared_ffn > 0, 1.0, 0.0)) * one_gather * c.exposed_tp
    regather = 1.0 + 0.5 * p.sequence_parallel
    ring = (p.cp - 1.0) * tokens * 2.0 * s.key_value_width / p.tp
    ring_rate = np.where(p.tp * p.cp > h.per_node, inter, intra)
    cp_f = soft_max(np.maximum(ring / ring_rate - core_f, 0.0), c.exposed_cp * ring / ring_rate) * np.where(
        p.cp > 1, 1.0, 0.0
    )
    cp_b = soft_max(np.maximum(2.0 * ring / ring_rate - core_b, 0.0), c.exposed_cp * 2.0 * ring / ring_rate) * np.where(
        p.cp > 1, 1.0, 0.0
    )
    span = p.ep * p.etp
    phase = collectives.expert_phase_seconds(
        own, 2.0 * s.hidden * skew, s.topk, span, h.per_node, p.dispatch, intra, inter
    )
    phase = (phase + 2e-5) * np.where(span > 1, 1.0, 0.0)
    ep_comm = 2.0 * phase

    # Libraries launch the grouped product (and its casts) expert by expert, so launch time grows with the experts a
    # device holds.
    host_moe = c.host_moe + c.host_expert * local_experts

    # Layers: compute, then exposed communication, then the host's launch time as a floor.
    dense_cf = attn_f + core_f + small_dense_f + ffn_f
    dense_cb = attn_i + attn_w + core_b + small_dense_b + ffn_i + ffn_w
    moe_cf = attn_f + core_f + small_f + expert_f + shared_f + router_f + routed_f
    moe_cb = (
        attn_i + attn_w + core_b + small_b + expert_i + expert_w + shared_i + shared_w + router_i + router_w + routed_b
    )
    # Schedules that pair passes detach weight gradients and the shared expert, which hide half of the all-to-all of a
    # pass without partner (MindSpeed's documentation of fb-overlap).
    alone = np.where(p.paired > 0, np.minimum(c.exposed_ep, 0.5), c.exposed_ep)
    ep_exposed = np.where(
        p.overlap > 0,
        # Each pass hides behind the other pass of another micro-batch.
        np.maximum(ep_comm - 0.45 * (moe_cf + moe_cb), c.exposed_paired * ep_comm),
        alone * ep_comm,
    )
    dense_f = soft_max((dense_cf + tp_dense + cp_f) * c.software, c.host_dense)
    moe_f = soft_max((moe_cf + tp_moe + cp_f + ep_exposed) * c.software, host_moe)
    share = (
        p.selective * (1 - p.unfused) * c.selective_share
        + p.fine * c.fine_share
        + p.unstated * (c.unstated_share + p.inferred)
    )
    core_again = p.selective * p.unfused * core_f
    dense_b = soft_max((dense_cb + tp_dense * regather + cp_b) * c.software, c.host_dense * c.host_backward)
    moe_b = soft_max((moe_cb + tp_moe * regather + cp_b + ep_exposed) * c.software, host_moe * c.host_backward)
    dense_again = p.full * dense_f + (share * (dense_cf + tp_dense) + core_again) * c.software
    block_again = p.moe_again * (expert_f + routed_f + router_f + shared_f + ep_exposed)
    moe_again = p.full * moe_f + (share * (moe_cf + tp_moe) + core_again + block_again) * c.software
    dense_w = (attn_w + ffn_w) * c.software
    moe_w = (attn_w + expert_w + shared_w + router_w) * c.software
    # A pair hides the all-to-all of each side under the compute of the other.
    pair_compute = moe_cf + moe_cb + tp_moe * (1 + regather)
    pair_hidden = soft_max(pair_compute, 2.0 * ep_comm) + c.exposed_paired * 2.0 * ep_comm
    pair_total = soft_max(pair_hidden * c.software, host_moe * (1.0 + c.host_backward))
    pair_share = (moe_cf + tp_moe) / pair_compute

    # Head with loss, embedding.
    head_f, head_i, head_w = products([(tokens, s.hidden, s.vocab / p.tp)], rate16)
    logits = tokens * s.vocab / p.tp * c.logit_bytes / memory
    head_fs, head_bs = (head_f + logits / 2) * c.software, (head_i + head_w + logits / 2) * c.software
    embed = own * s.hidden * 8.0 / memory
    join_f, join_i, join_w = products([(tokens, 2.0 * s.hidden, s.hidden / p.tp)])
    layer_f, layer_b, layer_w = (
        np.where(s.experts > 0, a, b)
        for a, b in ((moe_f, dense_f), (moe_b + moe_again, dense_b + dense_again), (moe_w, dense_w))
    )
    mtp_f = layer_f + head_fs + join_f
    mtp_b = layer_b + head_bs + join_i + join_w

    send = own * s.hidden * 2.0 / np.where(p.devices > h.per_node, inter, intra) + 1e-5

    # Once a step: gradients, parameters, optimizer.
    dense_params, expert_params = local_parameters(s, p)
    local_dense, local_expert = dense_params, expert_params
    dense_group = p.dp * p.cp
    expert_group = np.maximum(p.devices / (p.pp * p.ep * p.etp), 1.0)
    dense_local_ranks = np.clip(h.per_node / p.tp, 1.0, dense_group)
    expert_local_ranks = np.clip(h.per_node / (p.ep * p.etp), 1.0, expert_group)
    per_byte_dense = collectives.group_seconds(1.0, dense_group, dense_local_ranks, intra, inter)
    per_byte_expert = collectives.group_seconds(1.0, expert_group, expert_local_ranks, intra, inter)
    one_pass = local_dense * per_byte_dense + local_expert * per_byte_expert
    step_comm = (p.gradient_bytes + 2.0) * one_pass  # gradients in, bf16 parameters out
    layer_seconds = s.dense_layers * (dense_f + dense_b + dense_again) + s.moe_layers * (moe_f + moe_b + moe_again)
    compute_mb = layer_seconds / p.pp
    # Gradients of the last micro-batch's chunk and parameters of the first are all that can run beside compute.
    beside = compute_mb / p.vpp
    dp_exposed = np.where(p.fsdp >= 2, 0.0, soft_max(np.maximum(step_comm - beside, 0.0), step_comm * c.exposed_dp))
    gathers = np.where(p.fsdp >= 3, 4.0, 2.0)
    fsdp_mb = (gathers + 2.0) * one_pass
    fsdp_exposed = np.where(
        p.fsdp >= 2, p.microbatches * soft_max(np.maximum(fsdp_mb - compute_mb, 0.0), c.exposed_fsdp * fsdp_mb), 0.0
    )
    shards_dense, shards_expert = np.where(p.fsdp >= 1, dense_group, 1.0), np.where(p.fsdp >= 1, expert_group, 1.0)
    optimizer = (local_dense / shards_dense + local_expert / shards_expert) * c.optimizer_bytes / memory
    step = dp_exposed + fsdp_exposed + optimizer + c.host_step
    factor = 1.0 + c.straggler * np.log2(np.maximum(p.devices / h.per_node, 1.0) + 1.0)
    return UnitSeconds(
        dense_forward=dense_f,
        dense_backward=dense_b + dense_again,
        dense_weight=dense_w,
        moe_forward=moe_f,
        moe_backward=moe_b + moe_again,
        moe_weight=moe_w,
        moe_pair_forward=pair_total * pair_share,
        moe_pair_backward=pair_total * (1 - pair_share) + moe_again,
        head_forward=head_fs,
        head_backward=head_bs,
        head_weight=head_w * c.software,
        embed_forward=embed,
        embed_backward=2.0 * embed,
        mtp_forward=mtp_f,
        mtp_backward=mtp_b,
        mtp_weight=layer_w + (head_w + join_w) * c.software,
        send=send,
        step=step,
        factor=factor,
        parts={
            "dense": {
                "matmul": (attn_f + ffn_f + attn_i + attn_w + ffn_i + ffn_w),
                "attention": core_f + core_b,
                "memory-bound": small_dense_f + small_dense_b,
                "tensor parallel": tp_dense * (1 + regather),
                "context parallel": cp_f + cp_b,
                "recompute": dense_again / c.software,
                "host": (dense_f + dense_b) / c.software
                - (dense_cf + dense_cb + tp_dense * (1 + regather) + cp_f + cp_b),
            },
            "moe": {
                "matmul": attn_f + attn_i + attn_w + shared_f + shared_i + shared_w + router_f + router_i + router_w,
                "experts": expert_f + expert_i + expert_w,
                "attention": core_f + core_b,
                "memory-bound": small_f + small_b + routed_f + routed_b,
                "tensor parallel": tp_moe * (1 + regather),
                "context parallel": cp_f + cp_b,
                "expert all-to-all": 2 * ep_exposed,
                "recompute": moe_again / c.software,
                "host": (moe_f + moe_b) / c.software
                - (moe_cf + moe_cb + tp_moe * (1 + regather) + cp_f + cp_b + 2 * ep_exposed),
            },
            "step": {"data parallel": dp_exposed + fsdp_exposed, "optimizer": optimizer, "host": c.host_step},
            "operators": {
                "attention_forward": core_f,
                "attention_backward": core_b,
                "expert_gemm": expert_f,
                "expert_input": expert_i,
                "expert_weight": expert_w,
                "projections": attn_f,
                "ep_phase": phase,
                "shared": shared_f,
                "one_gather": one_gather,
            },
            "hidden": {"expert all-to-all": 2 * ep_comm},
        },
    )


def local_parameters(s: ShapeVector, p: PlanVector) -> tuple[Any, Any]:
    """Parameters on one device of a mean pipeline stage: dense part (sharded by tp) and experts (sharded by ep and
    etp)."""
    layers = s.dense_layers + s.moe_layers + s.mtp
    ffn = (s.up_factor + 1.0) * s.hidden
    dense = layers * s.attention_weight + s.dense_layers * ffn * s.ffn + (s.moe_layers + s.mtp) * ffn * s.shared_ffn
    dense = dense + s.vocab * s.hidden * (2.0 - s.tied)
    routed = (s.moe_layers + s.mtp * np.where(s.experts > 0, 1.0, 0.0)) * s.experts * ffn * s.moe_ffn
    return dense / (p.tp * p.pp), routed / (p.ep * p.etp * p.pp)
