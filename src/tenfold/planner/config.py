"""What a user states: a model shape, a cluster, a plan. Frozen dataclasses; numbers only, no computation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tenfold.core.console import UserError

SCHEDULES = (
    "none",
    "gpipe",
    "1f1b",
    "interleaved",
    "zb-h1",
    "interleaved-zb",
    "zb-v",
    "dualpipe",
    "dualpipev",
    "adaptive",
)
RECOMPUTE = ("none", "selective", "fine-grained", "moe", "full")
DISPATCH = ("flat", "dedup", "hierarchical")
PRECISIONS = ("bf16", "fp16", "fp8", "mxfp8")

MODELS: tuple = ()  # the planner has no learned weights


@dataclass(frozen=True)
class Model:
    """Shape of a decoder-only transformer.

    Attributes:
        name: label only; no equation looks at it.
        layers: decoder layers, without multi-token-prediction layers.
        hidden: model width.
        ffn: intermediate width of a dense feed-forward layer (0 when every layer is MoE).
        heads: query heads.
        kv_heads: key/value heads (equal to heads for MHA and MLA).
        head_dim: width of a head (for MLA: qk_nope + qk_rope).
        vocab: rows of the embedding.
        gated: SwiGLU-like feed-forward (three matrices) instead of two.
        tied: the head shares the embedding's matrix.
        attention: "mha", "gqa" or "mla".
        experts: routed experts per MoE layer; 0 makes the model dense.
        topk: experts a token visits.
        moe_ffn: intermediate width of one routed expert.
        shared_experts: experts that every token visits.
        shared_ffn: intermediate width of all shared experts together.
        expert_groups: groups from which a grouped router takes equal shares of the top-k (0: no groups).
        first_dense: leading layers that are dense in a MoE model.
        mtp: multi-token-prediction layers.
        q_lora, kv_lora, qk_nope, qk_rope, v_head: MLA widths (q_lora 0: queries without a latent).
        window: sliding-window length in tokens (0: full causal attention).
        window_every: every how many layers one is windowed.
        sandwich_norm: two more norms a layer.
        source: where the shape was read.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    tied: bool = False
    attention: Literal["mha", "gqa", "mla"] = "gqa"
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_experts: int = 0
    shared_ffn: int = 0
    expert_groups: int = 0
    first_dense: int = 0
    mtp: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    qk_nope: int = 0
    qk_rope: int = 0
    v_head: int = 0
    window: int = 0
    window_every: int = 0
    sandwich_norm: bool = False
    source: str = ""

    @property
    def family(self) -> str:
        """`dense` or `moe`."""
        return "moe" if self.experts else "dense"

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts (without MTP)."""
        return self.layers - self.first_dense if self.experts else 0

    @property
    def query_key_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope + self.qk_rope if self.attention == "mla" else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.v_head if self.attention == "mla" else self.head_dim

    @classmethod
    def preset(cls, name: str) -> Model:
        """A model of the shipped table. Raises UserError with the nearest names for an unknown one."""
        from tenfold.planner.data import model_preset

        return model_preset(name)


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator and its links.

    Attributes:
        name: label.
        architecture: family whose measured efficiencies apply: ampere, hopper, blackwell, ascend, tpu, or your own.
        bf16, fp8: dense peak of the dtype in TFLOP/s (fp8 None: the device has none).
        mem_gib: device memory in GiB.
        mem_bw: memory bandwidth in TB/s.
        intra_gbs: link speed inside a node, GB/s per direction per device.
        inter_gbs: network speed between nodes, GB/s per direction per device.
        per_node: devices that share the fast link.
        host_gbs: device-host link, GB/s per direction.
        note: what is uncertain about the sheet.
    """

    name: str
    architecture: str
    bf16: float
    fp8: float | None
    mem_gib: float
    mem_bw: float
    intra_gbs: float
    inter_gbs: float
    per_node: int
    host_gbs: float = 25.0
    note: str = ""

    def peak(self, precision: str) -> float:
        """Dense peak in TFLOP/s for a precision of `PRECISIONS`.

        Raises:
            UserError: the hardware has no such peak.
        """
        peak = self.fp8 if precision in ("fp8", "mxfp8") else self.bf16
        if not peak:
            has = [name for name in ("bf16", "fp8") if getattr(self, name)]
            raise UserError(
                f"precision: {self.name} has no {precision} peak (it has {', '.join(has) or 'none'}): choose "
                f"one of these or set the peak in the hardware sheet"
            )
        return peak

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A sheet of the shipped table. Raises UserError with the nearest names for an unknown one."""
        from tenfold.planner.data import hardware_preset

        return hardware_preset(name)


@dataclass(frozen=True)
class Cluster:
    """A number of equal devices."""

    hardware: Hardware
    devices: int

    @classmethod
    def preset(cls, name: str, devices: int) -> Cluster:
        """`devices` of a shipped hardware sheet."""
        return cls(Hardware.preset(name), devices)


@dataclass(frozen=True)
class Plan:
    """How a model is laid over a cluster.

    Two grids share the devices: dense layers DP x TP x CP x PP = world, expert layers EDP x EP x ETP x PP = world.

    Attributes:
        tp: tensor parallelism of the dense part.
        cp: context parallelism.
        pp: pipeline stages.
        vpp: model chunks per stage.
        ep: expert parallelism. Under `tp_extend_ep` the expert buckets are tp * ep, else ep.
        etp: tensor parallelism inside an expert.
        tp_extend_ep: tensor ranks hold whole experts instead of slices.
        mbs: sequences of a micro-batch.
        gbs: sequences of a step over all devices.
        seq: tokens of a sequence.
        precision: "bf16", "fp16", "fp8" (scaled per tensor) or "mxfp8" (per block of 32).
        schedule: one of `SCHEDULES`.
        recompute: one of `RECOMPUTE`; `moe` repeats norms and the MoE block; `fine-grained` lets the memory model
            choose items per stage by a knapsack.
        swap: items may move to the host.
        dispatch: expert all-to-all: "flat", "dedup" (once per node) or "hierarchical" (outer all-gather).
        fsdp: ZeRO stage of the data-parallel group: 0 distributed optimizer off, 1 optimizer, 2 and gradients, 3 and
            parameters.
        gradient_bytes: bytes of a kept and reduced gradient element, 4 or 2.
        sequence_parallel: norms and residuals are sharded over tp.
        ep_overlap: expert all-to-all runs beside the other micro-batch's compute.
        imbalance: load of the fullest device over the mean (1: forced balance); None: natural routing, by the spread of
            the experts' loads and the experts that a device holds.
        stack: software generation, `family-release`; chooses calibrated terms.
        noop_slots: empty layer slots that fill the stages when layers do not divide (None: filled by themselves in a
            chunked schedule where
            they fit the last chunk of the ranks, else an error proposes the number).
        memory_limit_gib: usable device memory (None: 94% of the sheet).
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    tp_extend_ep: bool = False
    mbs: int = 1
    gbs: int = 1
    seq: int = 4096
    precision: str = "bf16"
    schedule: str = "auto"
    recompute: str = "none"
    swap: bool = False
    dispatch: str = "flat"
    fsdp: int = 1
    gradient_bytes: int = 4
    sequence_parallel: bool = True
    ep_overlap: bool = False
    imbalance: float | None = None
    stack: str = "auto"
    noop_slots: int | None = None
    memory_limit_gib: float | None = None

    def replace(self, **changes: object) -> Plan:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def expert_buckets(self) -> int:
        """Devices over which the experts of one layer are spread, not counting etp."""
        return self.ep * (self.tp if self.tp_extend_ep else 1)

    def resolved_schedule(self) -> str:
        """The schedule's name with `auto` replaced: none, 1f1b or interleaved."""
        if self.schedule != "auto":
            return self.schedule
        if self.pp == 1:
            return "none"
        return "interleaved" if self.vpp > 1 else "1f1b"

    def data_parallel(self, devices: int) -> int:
        """Replicas of the dense part."""
        return max(1, devices // (self.tp * self.cp * self.pp))

    def microbatches(self, devices: int) -> int:
        """Micro-batches of one step per pipeline."""
        return self.gbs // (self.data_parallel(devices) * self.mbs)

    def describe(self) -> str:
        """One line for tables."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        if self.vpp > 1:
            parts.append(f"VPP{self.vpp}")
        if self.cp > 1:
            parts.append(f"CP{self.cp}")
        if self.ep > 1:
            parts.append(f"EP{self.ep}" + ("xTP" if self.tp_extend_ep else ""))
        if self.etp > 1:
            parts.append(f"ETP{self.etp}")
        if self.fsdp > 1:
            parts.append(f"ZeRO-{self.fsdp}")
        parts += [f"mbs{self.mbs}", self.resolved_schedule(), f"recompute:{self.recompute}"]
        if self.swap:
            parts.append("swap")
        if self.ep_overlap:
            parts.append("overlap")
        if self.ep > 1:
            parts.append(self.dispatch)
        return " ".join(parts)
