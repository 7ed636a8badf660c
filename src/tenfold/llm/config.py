"""What a decoder, its initialisation and its training phases are, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
        context=256,
        post_norm_eps=1e-8,
        eod=0,
    ),
}


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
