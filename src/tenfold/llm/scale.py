"""How large a model is, what a token costs, what each device holds: counted, not run. Imports no torch.

Conventions, in one place:

- FLOPs of a token in training are 6 N + attention: two per multiply-add, one forward and two backward passes. N is the
  weights of all matrices that multiply, the output matrix among them, the embedding (a look-up) and gains left out.
- Attention is 12 x heads x channels x visible keys a layer. By default only visible keys count (causal: on average half
  the sequence); `causal=False` counts the whole square, as PaLM's MFU and most published figures do. Resets at document
  ends are not counted off.
- Recomputed work never counts (that would be HFU).
- A device holds per weight 2 bytes that compute (bf16), 4 of gradient and 12 of optimiser state (fp32 weight and two
  moments of AdamW).
"""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.llm.config import LayerKind, Layout, ModelConfig

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
ACTIVATION_BYTES = 2  # bf16
LOGIT_BYTES = 2 + 4 + 4  # of one score: in bf16, in fp32 for the loss, and its gradient


@dataclass(frozen=True)
class Share:
    """Parameters by what tensor parallelism does to them.

    Args:
        split: those that `tp` devices share.
        whole: those that each of them holds: gains, and biases of outputs.
        matrices: those of `split` that multiply (all but biases and the embedding).
    """

    split: int
    whole: int
    matrices: int

    @property
    def total(self) -> int:
        """Parameters on one device without tensor parallelism."""
        return self.split + self.whole

    def on(self, tp: int) -> int:
        """Parameters on each of `tp` devices."""
        return -(-self.split // tp) + self.whole


def block_share(config: ModelConfig) -> Share:
    """Parameters of one layer."""
    d, f = config.width, config.ffn
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    matrices = d * (2 * queries + 2 * keys) + 3 * d * f + (d * queries if config.attention_gate else 0)
    biases = (queries + 2 * keys if config.attention_bias else 0) + (2 * f if config.mlp_bias else 0)
    whole = (4 if config.has_post_norms else 2) * d + (2 * config.head_dim if config.qk_norm else 0)
    whole += (d if config.output_bias else 0) + (d if config.mlp_bias else 0)
    return Share(matrices + biases, whole, matrices)


def parameters(config: ModelConfig) -> int:
    """Parameters of the model, exactly; a tied matrix counts once."""
    table = config.vocabulary * config.width
    return config.layers * block_share(config).total + table * (1 if config.tied else 2) + config.width


def multiplying_parameters(config: ModelConfig) -> int:
    """N of 6 N: weights of the matrices, the output matrix among them, without embedding, gains and biases."""
    return config.layers * block_share(config).matrices + config.vocabulary * config.width


def visible_keys(length: int, window: int = 0, causal: bool = True) -> float:
    """Keys that a query meets, averaged over a sequence of `length`; `window` 0 sees all before."""
    reach = min(window, length) if window else length
    if not causal:
        return float(reach)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def attention_flops_per_token(config: ModelConfig, length: int, causal: bool = True) -> float:
    """Training FLOPs of scores and weighted sums for one token of sequences of `length`."""

    def keys(kind: LayerKind) -> float:
        return visible_keys(length, config.sliding_window if kind == "sliding" else 0, causal)

    return sum(12.0 * config.heads * config.head_dim * keys(config.kind(layer)) for layer in range(config.layers))


def flops_per_token(config: ModelConfig, length: int, causal: bool = True) -> float:
    """FLOPs of forward and backward for one token: 6 N + attention, by the conventions at the top of this file.

    Args:
        config: of the model.
        length: tokens of a sequence.
        causal: count visible keys only; False counts the whole square.
    """
    return 6.0 * multiplying_parameters(config) + attention_flops_per_token(config, length, causal)


def mfu(
    config: ModelConfig, length: int, tokens_per_second: float, peak_flops: float, devices: int = 1, causal: bool = True
) -> float:
    """Share of the devices' peak that the model's own arithmetic takes (model FLOPs utilisation).

    Args:
        config: of the model.
        length: tokens of a sequence.
        tokens_per_second: of the whole run.
        peak_flops: of one device in the precision that is used, dense, FLOP/s. State it beside the result.
        devices: of the run.
        causal: convention, as in `flops_per_token`.
    """
    return tokens_per_second * flops_per_token(config, length, causal) / (peak_flops * devices)


# --- Pipelines --------------------------------------------------------------------------------------------------------


def pieces(layers: int, count: int) -> list[range]:
    """Cut the layers into `count` pieces; where they do not divide, the ends, with embedding and head, get fewer.

    Example:
        >>> [len(piece) for piece in pieces(94, 48)][:3], sum(map(len, pieces(94, 48)))
        ([1, 2, 2], 94)
    """
    few, more = divmod(layers, count)
    cuts, start = [], 0
    for number in range(count):
        size = few + (1 <= number <= more)
        cuts.append(range(start, start + size))
        start += size
    return cuts


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step in which a pipeline stage waits: (p - 1) / (p - 1 + n v) (paper section 4.2)."""
    return (layout.pp - 1) / (layout.pp - 1 + micro_batches * layout.chunks)


def pieces_in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Most forward passes of a piece that a stage keeps for their backward: (interleaved) 1F1B's warm-up, and one."""
    if layout.chunks == 1:
        return min(layout.pp - stage, micro_batches)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.chunks)


# --- Memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankMemory:
    """What a device of a pipeline stage holds, in bytes.

    Args:
        stage: of the pipeline.
        layers: of the stage.
        parameters: of the stage on one tensor-parallel device, before sharding.
        weights: that compute; with FSDP those of two blocks, the one at work and the one on its way.
        gradients: accumulated in fp32.
        optimizer: fp32 weights and two moments.
        activations: kept for the backward pass, without recomputation.
        logits: of the last stage, with their fp32 copy and gradient.
    """

    stage: int
    layers: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes in all; fragments, communication buffers and the framework come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def activation_bytes_per_token(config: ModelConfig, bytes_each: int = ACTIVATION_BYTES) -> int:
    """Bytes of one layer that one token leaves for the backward pass, on one device.

    Kept are the inputs of norms, matrices and products, and of attention also the log-sum of its scores; attention is
    a fused kernel that keeps no scores.
    """
    d, f = config.width, config.ffn
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    stream = (6 if config.has_post_norms else 4) * d  # around two sub-layers: norms' inputs and outputs
    mixing = 2 * queries + 2 * keys  # q, k, v, and what the output matrix takes
    if config.qk_norm:
        mixing += queries + keys
    if config.attention_gate:
        mixing += 2 * queries
    return bytes_each * (stream + mixing + 4 * f) + 4 * config.heads


def memory_per_rank(
    config: ModelConfig,
    layout: Layout,
    length: int,
    rows: int = 1,
    micro_batches: int = 1,
    shared_optimizer: bool = True,
) -> tuple[RankMemory, ...]:
    """What a device of each pipeline stage holds, by the conventions at the top of this file: an estimate.

    Args:
        config: of the model.
        layout: devices.
        length: tokens of a row.
        rows: of a micro-batch.
        micro_batches: of a step, in each data-parallel group.
        shared_optimizer: whether the `dp` groups share the optimiser state (ZeRO-1, as in the paper); FSDP does anyway.

    Raises:
        ValueError: the model cannot be spread like this.
    """
    layout.check(config)
    block, table = block_share(config), -(-config.vocabulary // layout.tp) * config.width
    tokens = rows * -(-length // (layout.cp * layout.tp))
    # Tensor-parallel devices share positions between matrices and heads or channels inside: all of it is divided.
    per_layer = activation_bytes_per_token(config) * tokens
    cuts = pieces(config.layers, layout.pp * layout.chunks)
    memories = []
    for stage in range(layout.pp):
        first, last = stage == 0, stage == layout.pp - 1
        own = cuts[stage :: layout.pp]
        layers = sum(len(piece) for piece in own)
        held = layers * block.on(layout.tp)
        if first or (last and not config.tied):
            held += table * (2 if first and last and not config.tied else 1)
        held += config.width if last else 0
        # The gradients and the state of FSDP lie in shards over all devices that hold the same weights but for `dp`.
        shards = layout.fsdp * layout.cp
        working = min(2 * block.on(layout.tp) + table, held) if shards > 1 else held
        in_flight = pieces_in_flight(layout, stage, micro_batches)
        memories.append(
            RankMemory(
                stage=stage,
                layers=layers,
                parameters=held,
                weights=WEIGHT_BYTES * working,
                gradients=GRADIENT_BYTES * -(-held // shards),
                optimizer=OPTIMIZER_BYTES * -(-held // (shards * (layout.dp if shared_optimizer else 1))),
                activations=in_flight * max(len(piece) for piece in own) * per_layer,
                logits=LOGIT_BYTES * -(-config.vocabulary // layout.tp) * rows * -(-length // layout.cp) * last,
            )
        )
    return tuple(memories)


# --- Report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleReport:
    """Size and cost of a model on a layout.

    Args:
        parameters: of the model.
        multiplying_parameters: N of 6 N.
        length: tokens of a sequence.
        flops_per_token: of training, visible keys only.
        flops_per_token_square: the same with the whole square of attention.
        attention_share: of `flops_per_token`.
        layout: devices.
        devices: number of them.
        rows: of a micro-batch.
        micro_batches: of a step, in each data-parallel group.
        bubble: share of a step in which a pipeline stage waits.
        memory: of a device of each pipeline stage.
    """

    parameters: int
    multiplying_parameters: int
    length: int
    flops_per_token: float
    flops_per_token_square: float
    attention_share: float
    layout: Layout
    devices: int
    rows: int
    micro_batches: int
    bubble: float
    memory: tuple[RankMemory, ...]


def report(
    config: ModelConfig,
    layout: Layout | None = None,
    length: int = 4096,
    rows: int = 1,
    micro_batches: int = 1,
    shared_optimizer: bool = True,
) -> ScaleReport:
    """Parameters, FLOPs and memory in one; arguments as in `memory_per_rank`.

    Example:
        >>> from tenfold.llm.config import PANGU_ULTRA_LAYOUT, PRESETS
        >>> pangu = report(PRESETS["pangu-ultra-135b"], PANGU_ULTRA_LAYOUT, micro_batches=2048 // 128)
        >>> round(pangu.parameters / 1e9, 1), round(pangu.bubble, 3)
        (133.9, 0.068)
    """
    layout = layout or Layout()
    flops = flops_per_token(config, length)
    return ScaleReport(
        parameters=parameters(config),
        multiplying_parameters=multiplying_parameters(config),
        length=length,
        flops_per_token=flops,
        flops_per_token_square=flops_per_token(config, length, causal=False),
        attention_share=attention_flops_per_token(config, length) / flops,
        layout=layout,
        devices=layout.devices,
        rows=rows,
        micro_batches=micro_batches,
        bubble=bubble(layout, micro_batches),
        memory=memory_per_rank(config, layout, length, rows, micro_batches, shared_optimizer),
    )


def show(report: ScaleReport) -> None:
    """Print a report for a person."""
    from tenfold.core.console import say, table

    layout = report.layout
    say(
        f"{report.parameters / 1e9:.4g} B parameters; {report.multiplying_parameters / 1e9:.4g} B multiply (N: all "
        "matrices with the output matrix, without the embedding)"
    )
    say(
        f"{report.flops_per_token / 1e9:.4g} GFLOP a token in training at {report.length} tokens: 6 N + attention over "
        f"visible keys ({report.attention_share:.1%}); {report.flops_per_token_square / 1e9:.4g} with the whole square"
    )
    say(
        f"{report.devices} devices: dp {layout.dp} x fsdp {layout.fsdp} x tp {layout.tp} x pp {layout.pp} x cp "
        f"{layout.cp}, {layout.chunks} piece(s) a stage, {report.micro_batches} micro-batch(es) of {report.rows} "
        f"row(s): the pipeline waits {report.bubble:.1%} of a step"
    )
    columns = ("stage", "layers", "size", "weights", "grads", "AdamW", "kept", "logits", "all")
    rows = []
    for memory in report.memory:
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.total)
        size = f"{memory.parameters / 1e9:.3f}"
        rows.append((memory.stage, memory.layers, size, *(f"{part / 2**30:.2f}" for part in sizes)))
    table(columns, rows, title="GiB on one device of a stage; size in billion parameters, kept for the backward pass")
    say("an estimate: nothing recomputed, and no buffers of kernels, of communication or of the framework")
