"""Counting: parameters, FLOPs, MFU conventions, and the numeric vector of a model that the cost equations read.

Formulas: specs of the models' papers; checked against the shipped table (40 models) in `tests/planner/test_shapes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np

from tenfold.planner.config import Model

Convention = Literal["causal", "noncausal"]
T = TypeVar("T")


def attention_gemms(model: Model) -> list[tuple[int, int, bool]]:
    """Weight matrices of one attention block as (inputs, outputs, split over tensor parallelism)."""
    h, heads = model.hidden, model.heads
    if model.attention == "mla":
        wide = heads * model.query_key_dim
        # Some shapes make queries without a latent: one matrix, and no second.
        query = (
            [(h, model.q_lora, False), (model.q_lora, wide, True)] if model.q_lora else [(h, wide, True), (1, 0, True)]
        )
        return [
            *query,
            (h, model.kv_lora + model.qk_rope, False),
            (model.kv_lora, heads * (model.qk_nope + model.v_head), True),
            (heads * model.v_head, h, True),
        ]
    return [
        (h, (heads + 2 * model.kv_heads) * model.head_dim, True),
        (heads * model.head_dim, h, True),
    ]


def attention_weights(model: Model) -> int:
    """Matrix elements of one attention block."""
    return sum(inputs * outputs for inputs, outputs, _ in attention_gemms(model))


def ffn_weights(model: Model, width: int) -> int:
    """Matrix elements of a feed-forward block of intermediate width `width`."""
    return (3 if model.gated else 2) * model.hidden * width


def norm_weights(model: Model) -> int:
    """Norm gains of one layer (with MLA's two latent norms)."""
    gains = (4 if model.sandwich_norm else 2) * model.hidden
    return gains + (model.q_lora + model.kv_lora if model.attention == "mla" else 0)


def layer_parameters(model: Model, moe: bool, active: bool = False) -> int:
    """Parameters of one decoder layer; `active` counts only the experts that a token visits."""
    total = attention_weights(model) + norm_weights(model)
    if not moe:
        return total + ffn_weights(model, model.ffn)
    routed = model.topk if active else model.experts
    return (
        total
        + routed * ffn_weights(model, model.moe_ffn)
        + ffn_weights(model, model.shared_ffn)
        + model.hidden * model.experts
    )


def mtp_parameters(model: Model, active: bool = False) -> int:
    """Parameters of one multi-token-prediction layer: a decoder layer, the joining projection, three norms; embedding
    and head shared."""
    return layer_parameters(model, bool(model.experts), active) + 2 * model.hidden**2 + 3 * model.hidden


def parameters(model: Model, active: bool = False, mtp: bool = False) -> int:
    """Parameters of the model.

    Args:
        model: the shape.
        active: count only what one token visits.
        mtp: count the multi-token-prediction layers too (papers quote without).
    """
    dense = model.layers - model.moe_layers
    total = dense * layer_parameters(model, False) + model.moe_layers * layer_parameters(model, True, active)
    total += model.vocab * model.hidden * (1 if model.tied else 2) + model.hidden
    return total + (model.mtp * mtp_parameters(model, active) if mtp else 0)


def attended_tokens(model: Model, seq: int, convention: Convention = "causal") -> float:
    """Mean keys that a query meets, averaged over layers: s/2 causal, s non-causal, about the window in windowed
    layers."""
    full = seq / 2 if convention == "causal" else float(seq)
    if not model.window or not model.window_every:
        return full
    windowed = float(min(model.window, full))
    share = (model.layers // model.window_every) / model.layers
    return share * windowed + (1 - share) * full


def flops_per_token(model: Model, seq: int, convention: Convention = "causal", recompute: bool = False) -> float:
    """FLOPs of forward and backward for one token; the embedding look-up is not counted.

    Args:
        model: the shape.
        seq: sequence length in tokens.
        convention: whether attention counts the masked half ("noncausal", as PaLM, Megatron 2021/22 and MPT do).
        recompute: add one more forward of every layer (HFU of full recomputation).
    """
    dense = model.layers - model.moe_layers
    layer_dense = attention_weights(model) + ffn_weights(model, model.ffn)
    layer_moe = (
        attention_weights(model)
        + model.topk * ffn_weights(model, model.moe_ffn)
        + ffn_weights(model, model.shared_ffn)
        + model.hidden * model.experts
    )
    core = 2 * model.heads * (model.query_key_dim + model.value_dim) * attended_tokens(model, seq, convention)
    layers = 2 * (dense * layer_dense + model.moe_layers * layer_moe) + model.layers * core
    head = 2 * model.vocab * model.hidden
    last = layer_moe if model.experts else layer_dense
    mtp = model.mtp * (2 * (last + 2 * model.hidden**2) + core + head)
    return (4.0 if recompute else 3.0) * (layers + mtp) + 3.0 * head - (model.mtp * head if recompute else 0)


@dataclass
class ShapeVector:
    """The numbers of a model that cost equations read; every field a float, or an array over rows after `stacked`."""

    dense_layers: Any
    moe_layers: Any
    mtp: Any
    hidden: Any
    vocab: Any
    tied: Any
    attention_weight: Any
    gemm_in: Any  # tuple of five
    gemm_out: Any
    gemm_split: Any
    core_flops: Any  # 2 * heads * (d_qk + d_v): FLOPs per query-key pair
    heads: Any
    key_value_width: Any
    ffn: Any
    up_factor: Any  # 2 for gated, 1 else
    experts: Any
    topk: Any
    moe_ffn: Any
    shared_ffn: Any
    window: Any
    window_share: Any
    head_dim: Any
    latent: Any  # MLA latent widths (q_lora + kv_lora + rope), 0 otherwise
    sandwich: Any


@lru_cache(maxsize=4096)
def shape_vector(model: Model) -> ShapeVector:
    """The model as numbers."""
    gemms = attention_gemms(model) + [(1, 0, True)] * (5 - len(attention_gemms(model)))
    mla = model.attention == "mla"
    width = model.heads * (model.query_key_dim + model.value_dim) if mla else 2 * model.kv_heads * model.head_dim
    return ShapeVector(
        dense_layers=float(model.layers - model.moe_layers),
        moe_layers=float(model.moe_layers),
        mtp=float(model.mtp),
        hidden=float(model.hidden),
        vocab=float(model.vocab),
        tied=float(model.tied),
        attention_weight=float(attention_weights(model)),
        gemm_in=tuple(float(gemm[0]) for gemm in gemms),
        gemm_out=tuple(float(gemm[1]) for gemm in gemms),
        gemm_split=tuple(float(gemm[2]) for gemm in gemms),
        core_flops=2.0 * model.heads * (model.query_key_dim + model.value_dim),
        heads=float(model.heads),
        key_value_width=float(width),
        ffn=float(model.ffn),
        up_factor=2.0 if model.gated else 1.0,
        experts=float(model.experts),
        topk=float(model.topk),
        moe_ffn=float(model.moe_ffn),
        shared_ffn=float(model.shared_ffn),
        window=float(model.window),
        window_share=(model.layers // model.window_every) / model.layers if model.window_every else 0.0,
        head_dim=float(model.query_key_dim),
        latent=float(model.q_lora + model.kv_lora + model.qk_rope) if mla else 0.0,
        sandwich=float(model.sandwich_norm),
    )


def stacked(items: list[T]) -> T:
    """Join equal dataclasses of floats into one dataclass of arrays [rows]; a tuple field becomes a tuple of arrays."""
    first = items[0]
    joined: dict[str, Any] = {}
    for field in fields(first):  # type: ignore[arg-type]
        values = [getattr(item, field.name) for item in items]
        if isinstance(values[0], tuple):
            joined[field.name] = tuple(np.array(column, dtype=float) for column in zip(*values, strict=True))
        else:
            joined[field.name] = np.array(values, dtype=float)
    return type(first)(**joined)
