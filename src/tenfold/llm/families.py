"""What a config.json says, family by family: theirs to ModelConfig and back. Imports no torch.

A family is a row of `FAMILIES`. What all share is in `SIZES`; what needs a formula is a small function beside the row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.core.config import near
from tenfold.core.console import UserError
from tenfold.llm.config import ModelConfig, RopeScaling

Raw = Mapping[str, Any]

# (their key, our field), the same in every family.
SIZES = (
    ("vocab_size", "vocabulary"),
    ("hidden_size", "width"),
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "kv_heads"),
    ("intermediate_size", "ffn"),
    ("head_dim", "head_dim"),
    ("max_position_embeddings", "context"),
    ("rms_norm_eps", "norm_eps"),
    ("tie_word_embeddings", "tied"),
)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}

# Fields of ModelConfig that say how training starts and not what the network computes.
_START_ONLY = {"c_attention", "c_mlp", "sandwich_gamma", "init", "embedding_std", "eod", "context"}


@dataclass(frozen=True)
class Family:
    """How one family's config.json describes a decoder.

    Attributes:
        name: what the user types.
        model_types: their `model_type`; the first one is written.
        architecture: their class.
        layout: key layout, a name in `key_tables.LAYOUTS`.
        defaults: values of keys that their files may leave out.
        fixed: fields of ModelConfig that are the same in the whole family.
        switches: (their key, our fields that it turns on).
        activation_key: their name for the gate's activation.
        read: further fields of ModelConfig, from their configuration.
        write: further keys of theirs, from ModelConfig.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    layout: str
    defaults: Raw = field(default_factory=dict)
    fixed: Raw = field(default_factory=dict)
    switches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    activation_key: str = "hidden_act"
    read: Callable[[Raw], dict[str, Any]] = lambda raw: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


# --- what needs a formula ---------------------------------------------------------------------------------------------


def _kinds(types: list[str], window: Any) -> dict[str, Any]:
    """`layer_kinds` and `sliding_window` from names of layer types."""
    unknown = sorted(set(types) - set(LAYER_TYPES))
    if unknown:
        raise UserError(f"layer_types: {unknown[0]!r} is not supported ({' and '.join(LAYER_TYPES)} are)")
    if "sliding_attention" not in types:
        return {}
    return {"layer_kinds": tuple(LAYER_TYPES[name] for name in types), "sliding_window": window or 0}


def _every(count: int, period: int) -> list[str]:
    """Every `period`-th layer full, the others sliding."""
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


def _write_kinds(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return {
        "layer_types": [names[config.kind(layer)] for layer in range(config.layers)],
        "sliding_window": config.sliding_window or None,
    }


def _read_mistral(raw: Raw) -> dict[str, Any]:
    window = raw.get("sliding_window", 4096)
    return _kinds(["sliding_attention"] * raw["num_hidden_layers"], window) if window else {}


def _read_qwen2(raw: Raw) -> dict[str, Any]:
    if not raw.get("use_sliding_window"):
        return {}
    count, first = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
    types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    return _kinds(raw.get("layer_types") or types, raw.get("sliding_window"))


def _read_pangu(raw: Raw) -> dict[str, Any]:
    biased = bool(raw.get("bias", raw.get("attention_bias", False)))
    norm = "dssn" if raw.get("sandwich_norm") else "pre"
    return {"attention_bias": biased, "output_bias": biased, "norm": norm}


def _read_gemma(raw: Raw) -> dict[str, Any]:
    scalar = raw["query_pre_attn_scalar"]
    if raw.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention: only causal models are supported")
    types = raw.get("layer_types") or _every(raw["num_hidden_layers"], raw["sliding_window_pattern"])
    return {
        "embedding_scale": math.sqrt(raw["hidden_size"]),
        "attention_scale": 0.0 if scalar == raw["head_dim"] else scalar**-0.5,
        "attention_softcap": raw.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": raw.get("final_logit_softcapping") or 0.0,
        **_kinds(types, raw.get("sliding_window")),
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": round(config.attention_scale**-2) if config.attention_scale else config.head_dim,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
        **_write_kinds(config),
    }


def _read_afmoe(raw: Raw) -> dict[str, Any]:
    if raw["num_dense_layers"] < raw["num_hidden_layers"]:
        raise UserError(
            f"{raw['num_hidden_layers'] - raw['num_dense_layers']} of {raw['num_hidden_layers']} layers are mixtures "
            "of experts, which are not supported yet: only AFMoE models whose layers are all dense can be loaded"
        )
    types = raw.get("layer_types") or _every(raw["num_hidden_layers"], raw["global_attn_every_n_layers"])
    scale = math.sqrt(raw["hidden_size"]) if raw.get("mup_enabled") else 1.0
    return {"embedding_scale": scale, **_kinds(types, raw.get("sliding_window"))}


def _write_afmoe(config: ModelConfig) -> dict[str, Any]:
    scaled = config.embedding_scale != 1.0
    return {"num_dense_layers": config.layers, "mup_enabled": scaled, **_write_kinds(config)}


# Fields that only our own configuration names: all that neither `SIZES` nor the rotary keys nor the layer types hold.
_OWN = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in {ours for _, ours in SIZES}
    and f.name
    not in {"rope_base", "rope_scaling", "rotary_fraction", "layer_kinds", "sliding_window", "eod", "activation"}
)


def _read_tenfold(raw: Raw) -> dict[str, Any]:
    return {
        **{name: raw[name] for name in _OWN if name in raw},
        **_kinds(raw.get("layer_types") or [], raw.get("sliding_window")),
    }


def _write_tenfold(config: ModelConfig) -> dict[str, Any]:
    return {**{name: getattr(config, name) for name in _OWN}, **_write_kinds(config)}


# --- the table --------------------------------------------------------------------------------------------------------

_BIASES = (("attention_bias", ("attention_bias", "output_bias")),)
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}
_GEMMA = {"norm": "sandwich", "activation": "gelu_tanh", "unit_offset_norms": True}
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("tenfold", ("tenfold_llm",), "TenfoldForCausalLM", "tenfold", read=_read_tenfold, write=_write_tenfold),
        Family(
            "llama",
            ("llama",),
            "LlamaForCausalLM",
            "pre",
            fixed={"norm": "pre"},
            switches=(*_BIASES, ("mlp_bias", ("mlp_bias",))),
        ),
        Family(
            "mistral",
            ("mistral",),
            "MistralForCausalLM",
            "pre",
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
            fixed={"norm": "pre"},
            read=_read_mistral,
            write=lambda config: {"sliding_window": config.sliding_window or None},
        ),
        Family(
            "qwen2",
            ("qwen2",),
            "Qwen2ForCausalLM",
            "pre",
            defaults=_QWEN_DEFAULTS,
            fixed={"norm": "pre", "attention_bias": True},
            read=_read_qwen2,
            write=lambda config: {"use_sliding_window": bool(config.sliding_window), **_write_kinds(config)},
        ),
        Family(
            "qwen3",
            ("qwen3",),
            "Qwen3ForCausalLM",
            "pre",
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            fixed={"norm": "pre", "qk_norm": True},
            switches=_BIASES,
            read=_read_qwen2,
            write=lambda config: {"use_sliding_window": bool(config.sliding_window), **_write_kinds(config)},
        ),
        # openPangu-Embedded, and Pangu's dense sandwich under the same class with `sandwich_norm: true`.
        Family(
            "pangu",
            ("PanguEmbedded", "pangu"),
            "PanguEmbeddedForCausalLM",
            "pre",
            read=_read_pangu,
            write=lambda config: {"bias": config.attention_bias, "sandwich_norm": config.has_post_norms},
        ),
        Family(
            "glm4",
            ("glm4",),
            "Glm4ForCausalLM",
            "glm4",
            defaults={
                "partial_rotary_factor": 0.5,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rms_norm_eps": 1.5625e-7,
                "attention_bias": True,
                "max_position_embeddings": 131_072,
            },
            fixed={"norm": "sandwich", "rotation": "interleaved"},
            switches=(("attention_bias", ("attention_bias",)),),
        ),
        Family(
            "gemma2",
            ("gemma2",),
            "Gemma2ForCausalLM",
            "gemma",
            defaults={
                **_GEMMA_DEFAULTS,
                "max_position_embeddings": 8192,
                "sliding_window_pattern": 2,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            fixed=_GEMMA,
            switches=_BIASES,
            activation_key="hidden_activation",
            read=_read_gemma,
            write=_write_gemma,
        ),
        Family(
            "gemma3",
            ("gemma3_text",),
            "Gemma3ForCausalLM",
            "gemma",
            defaults={
                **_GEMMA_DEFAULTS,
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "sliding_window_pattern": 6,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
            },
            fixed={**_GEMMA, "qk_norm": True},
            switches=_BIASES,
            activation_key="hidden_activation",
            read=_read_gemma,
            write=_write_gemma,
        ),
        # Arcee Trinity; its norms after sub-layers start at 1 / sqrt(L).
        Family(
            "afmoe",
            ("afmoe",),
            "AfmoeForCausalLM",
            "afmoe",
            defaults={
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 16_384,
                "num_dense_layers": 1,
                "global_attn_every_n_layers": 4,
                "sliding_window": 1024,
            },
            fixed={
                "norm": "dssn",
                "c_attention": 1.0,
                "c_mlp": 1.0,
                "qk_norm": True,
                "attention_gate": True,
                "rope_in_full_layers": False,
            },
            switches=_BIASES,
            read=_read_afmoe,
            write=_write_afmoe,
        ),
    )
}


def family_of(raw: Raw, where: str = "config.json") -> Family:
    """The family that a config.json is of.

    Raises:
        UserError: an unknown family, a mixture of experts, or a model with more than text in it.
    """
    model_type = raw.get("model_type")
    if raw.get("sandwich_norm") and model_type in (None, "llama", *FAMILIES["pangu"].model_types):
        return FAMILIES["pangu"]
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    if any(raw.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"{where}: {model_type!r} is a mixture of experts, which is not supported yet")
    if isinstance(raw.get("text_config"), Mapping):
        raise UserError(f"{where}: {model_type!r} holds more than a text model: save its language model alone")
    if model_type is None and "vocabulary" in raw:
        raise UserError(f"{where}: a configuration of this library belongs in the weights file's header")
    known = [name for family in FAMILIES.values() for name in family.model_types]
    raise UserError(f"{where}: model_type {model_type!r} is not supported: {near(str(model_type), known)}")


def config_from_hf(raw: Raw, where: str = "config.json") -> ModelConfig:
    """A decoder's configuration from a Hugging Face config.json, of transformers 4 or 5.

    Raises:
        UserError: an unknown family, a missing or impossible value, or a feature that the decoder lacks.
    """
    family = family_of(raw, where)
    raw = {**family.defaults, **{key: value for key, value in raw.items() if value is not None}, **_nulls(raw)}
    missing = [key for key, _ in SIZES[:4] if not _is_count(raw.get(key))]
    if missing or not _is_count(raw.get("intermediate_size")):
        raise UserError(f"{where}: {(missing or ['intermediate_size'])[0]} is missing or not a positive whole number")
    fields = {ours: raw[theirs] for theirs, ours in SIZES if raw.get(theirs) is not None}
    fields = {"kv_heads": fields["heads"], "norm_eps": 1e-6, "context": 2048, **fields}
    activation = raw.get(family.activation_key, "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: {family.activation_key} {activation!r} is not supported ({', '.join(ACTIVATIONS)})")
    fields |= {"activation": ACTIVATIONS[activation], "eod": _eod(raw, fields["vocabulary"])}
    for theirs, ours in family.switches:
        fields |= dict.fromkeys(ours, bool(raw.get(theirs, False)))
    try:
        fields |= {**_read_rope(raw), **family.fixed, **family.read(raw)}
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{where}: {error}") from None


def config_to_hf(config: ModelConfig, family: str = "tenfold") -> dict[str, Any]:
    """A decoder's configuration as a family's config.json, for transformers 4 and 5.

    Raises:
        UserError: the family is unknown, or cannot hold what this decoder has.
    """
    if family not in FAMILIES:
        raise UserError(f"no checkpoint family {family!r}: {near(family, list(FAMILIES))}")
    row = FAMILIES[family]
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    raw: dict[str, Any] = {
        "model_type": row.model_types[0],
        "architectures": [row.architecture],
        **{theirs: getattr(config, ours) for theirs, ours in SIZES},
        row.activation_key: activation,
        **_write_rope(config, family),
        **{theirs: getattr(config, ours[0]) for theirs, ours in row.switches},
        "eos_token_id": config.eod,
        "bos_token_id": None,
        "pad_token_id": None,  # some families' default is beyond a small vocabulary
        **row.write(config),
    }
    read_back = config_from_hf(raw)
    lost = [name for name in _computing(config) if _computing(config)[name] != _computing(read_back)[name]]
    if lost:
        values = ", ".join(f"{name} = {getattr(config, name)}" for name in lost)
        raise UserError(f"the {family} layout cannot hold this model ({values}): use --to tenfold")
    return raw


def _computing(config: ModelConfig) -> dict[str, Any]:
    """What the network computes, in one form for equal networks."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _START_ONLY}
    sliding = "sliding" in config.layer_kinds
    return values | {
        "norm": "sandwich" if config.has_post_norms else config.norm,
        "post_norm_eps": (config.post_norm_eps or config.norm_eps) if config.has_post_norms else 0.0,
        "layer_kinds": config.layer_kinds if sliding else (),
        "sliding_window": config.sliding_window if sliding else 0,
        "local_rope_base": (config.local_rope_base or (0.0 if config.rope_scaling else config.rope_base)) * sliding,
        "rope_in_full_layers": config.rope_in_full_layers or "full" not in map(config.kind, range(config.layers)),
        "attention_scale": config.attention_scale or config.head_dim**-0.5,
    }


def _nulls(raw: Raw) -> dict[str, Any]:
    """Keys that a file sets to null on purpose: no cap, no window, as many key heads as query heads."""
    names = ("num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    return {name: None for name in names if name in raw and raw[name] is None}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _eod(raw: Raw, vocabulary: int) -> int | None:
    ids = eos_ids(raw)
    return ids[0] if ids and ids[0] < vocabulary else None


def eos_ids(raw: Raw) -> tuple[int, ...]:
    """The ids that end a text, of a config.json or generation_config.json."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(number for number in ids if isinstance(number, int))


# --- rotary embedding -------------------------------------------------------------------------------------------------


def _read_rope(raw: Raw) -> dict[str, Any]:
    """Rotary fields from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    parameters = dict(raw.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if "full_attention" in parameters or "sliding_attention" in parameters:
        local = parameters.get("sliding_attention") or {}
        if _kind_of(local) != "default":
            raise UserError(f"rope_parameters: {_kind_of(local)!r} scaling of sliding layers is not supported")
        fields["local_rope_base"] = float({**raw, **local}.get("rope_theta", 1e4))
        parameters = dict(parameters.get("full_attention") or {})
    elif "rope_local_base_freq" in raw:
        fields["local_rope_base"] = float(raw["rope_local_base_freq"])
    parameters = {**parameters, **(raw.get("rope_scaling") or {})}
    named = {**raw, **{key: value for key, value in parameters.items() if value is not None}}
    fields["rope_base"] = float(named.get("rope_theta", 1e4))
    fields["rotary_fraction"] = float(named.get("partial_rotary_factor", 1.0))
    fields["rope_scaling"] = _read_scaling(parameters, raw)
    return fields


def _kind_of(parameters: Raw) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def _read_scaling(parameters: Raw, raw: Raw) -> RopeScaling | None:
    kind = _kind_of(parameters)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))),
        )
    raise UserError(f"rope_scaling: type {kind!r} is not supported (default, linear and llama3 are)")


def _write_rope(config: ModelConfig, family: str) -> dict[str, Any]:
    """Rotary keys of both generations of transformers."""
    scaling = config.rope_scaling
    stretch: dict[str, Any] = {}
    if scaling is not None:
        stretch = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        stretch |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    full = {"rope_type": "default", "rope_theta": config.rope_base, **stretch}
    raw: dict[str, Any] = {"rope_theta": config.rope_base, "rope_parameters": full}
    if stretch:
        raw["rope_scaling"] = stretch
    if config.rotary_fraction != 1.0 or family == "glm4":
        raw["partial_rotary_factor"] = full["partial_rotary_factor"] = config.rotary_fraction
    if family == "gemma3":
        local = config.local_rope_base or config.rope_base
        raw["rope_local_base_freq"] = local
        raw["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return raw
