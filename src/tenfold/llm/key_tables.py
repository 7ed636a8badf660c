"""Foreign checkpoint layouts: which of their keys is which of ours, as tables.

A layout names the modules of one layer, and those around the layers; weights and biases follow. The tables are read in
both directions. Imports no torch: tensors are only renamed, stacked and split here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Buffers that some checkpoints carry and that follow from the configuration.
IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Layout:
    """The key names of one kind of checkpoint.

    Attributes:
        summary: what its norms are, for messages.
        top: (theirs, ours) for modules outside the layers.
        layer: (theirs, ours) for modules of a layer, below `prefix` and below `layers.N.`.
        fused: (theirs, ours) where their tensor is several of ours, one below the other.
        prefix: what stands before the number of a layer.
    """

    summary: str
    top: tuple[tuple[str, str], ...]
    layer: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    prefix: str = "model.layers."

    @property
    def norms(self) -> frozenset[str]:
        """Their names of a layer's norms on the residual stream: what tells one layout from another."""
        return frozenset(theirs for theirs, _ in self.layer if _is_stream_norm(theirs))


_TOP = (("model.embed_tokens", "embed"), ("model.norm", "final_norm"), ("lm_head", "lm_head"))
_ATTENTION = (
    ("input_layernorm", "pre_attention_norm"),
    ("self_attn.q_proj", "attention.q"),
    ("self_attn.k_proj", "attention.k"),
    ("self_attn.v_proj", "attention.v"),
    ("self_attn.o_proj", "attention.o"),
    ("self_attn.q_norm", "attention.q_norm"),
    ("self_attn.k_norm", "attention.k_norm"),
)
_MLP = (("mlp.gate_proj", "mlp.gate"), ("mlp.up_proj", "mlp.up"), ("mlp.down_proj", "mlp.down"))
# The name that means two things: in pre-norm models the norm before the feed-forward network, in Pangu's sandwich the
# norm on the attention's output.
_PANGU_NORMS = (
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_mlp_layernorm", "pre_mlp_norm"),
    ("post_mlp_layernorm", "post_mlp_norm"),
)
_OURS = (
    *("pre_attention_norm", "attention.q", "attention.k", "attention.v", "attention.o"),
    *("attention.q_norm", "attention.k_norm", "attention.gate", "post_attention_norm"),
    *("pre_mlp_norm", "mlp.gate", "mlp.up", "mlp.down", "post_mlp_norm"),
)

LAYOUTS: dict[str, Layout] = {
    # Llama, SmolLM2, Mistral, Qwen, openPangu-Embedded.
    "pre": Layout(
        "a norm before each sub-layer",
        _TOP,
        (*_ATTENTION, ("post_attention_layernorm", "pre_mlp_norm"), *_MLP),
    ),
    # Pangu with `sandwich_norm: true`.
    "pangu": Layout(
        "a sandwich, post_attention_layernorm on the attention's output", _TOP, (*_ATTENTION, *_PANGU_NORMS, *_MLP)
    ),
    # AFMoE (Arcee Trinity): Pangu's names, and a gate on the heads' outputs.
    "afmoe": Layout(
        "a sandwich, post_attention_layernorm on the attention's output",
        _TOP,
        (*_ATTENTION, ("self_attn.gate_proj", "attention.gate"), *_PANGU_NORMS, *_MLP),
    ),
    # GLM-4-0414: post_attention_layernorm before the feed-forward network, though a sandwich.
    "glm4": Layout(
        "GLM-4's sandwich, post_self_attn_layernorm on the attention's output",
        _TOP,
        (
            *_ATTENTION,
            ("post_self_attn_layernorm", "post_attention_norm"),
            ("post_attention_layernorm", "pre_mlp_norm"),
            ("mlp.down_proj", "mlp.down"),
            ("post_mlp_layernorm", "post_mlp_norm"),
        ),
        fused=(("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),),
    ),
    # Gemma 2 and 3.
    "gemma": Layout(
        "Gemma's sandwich, pre_feedforward_layernorm before the feed-forward network",
        _TOP,
        (
            *_ATTENTION,
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "pre_mlp_norm"),
            ("post_feedforward_layernorm", "post_mlp_norm"),
            *_MLP,
        ),
    ),
    # Our class in transformers: our names below the attributes that its tools look for.
    "tenfold": Layout("this library's names", _TOP, tuple((name, name) for name in _OURS)),
    # The weights of a training run: `Decoder.state_dict()`.
    "native": Layout(
        "this library's own files",
        (("embed", "embed"), ("final_norm", "final_norm"), ("lm_head", "lm_head")),
        tuple((name, name) for name in _OURS),
        prefix="layers.",
    ),
}


def to_ours(layout: Layout, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, fused ones split; keys that the layout does not know are left out."""
    top, layer, fused = dict(layout.top), dict(layout.layer), dict(layout.fused)
    ours: dict[str, Tensor] = {}
    for key, tensor in theirs.items():
        prefix, module, kind = split_key(layout, key)
        if not prefix and module in top:
            ours[f"{top[module]}.{kind}"] = tensor
        elif prefix and module in layer:
            ours[f"layers.{prefix}.{layer[module]}.{kind}"] = tensor
        elif prefix and module in fused:
            names = fused[module]
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                ours[f"layers.{prefix}.{name}.{kind}"] = part
    return ours


def to_theirs(layout: Layout, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the layout's names, fused ones stacked; the inverse of `to_ours`.

    Raises:
        KeyError: the layout has no name for a tensor.
    """
    import torch

    top = {name: theirs for theirs, name in layout.top}
    layer = {name: theirs for theirs, name in layout.layer}
    fused = {names[0]: (theirs, names) for theirs, names in layout.fused}
    rest = {name for _, names in layout.fused for name in names[1:]}
    native = LAYOUTS["native"]
    theirs: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        number, module, kind = split_key(native, key)
        if not number:
            theirs[f"{top[module]}.{kind}"] = tensor
        elif module in fused:
            name, parts = fused[module]
            stacked = [ours[f"layers.{number}.{part}.{kind}"] for part in parts]
            theirs[f"{layout.prefix}{number}.{name}.{kind}"] = torch.cat(stacked)
        elif module not in rest:
            theirs[f"{layout.prefix}{number}.{layer[module]}.{kind}"] = tensor
    return theirs


def split_key(layout: Layout, key: str) -> tuple[str, str, str]:
    """A key as (number of the layer or '', module, weight or bias)."""
    found = re.match(re.escape(layout.prefix) + r"(\d+)\.", key)
    module, _, kind = key[found.end() if found else 0 :].rpartition(".")
    return (found[1] if found else ""), module, kind


def without_ignored(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are weights."""
    return {key: tensor for key, tensor in theirs.items() if not key.endswith(IGNORED)}


def norms_in(keys: Iterable[str]) -> frozenset[str]:
    """The names of the norms on the residual stream in layers of a foreign checkpoint."""
    layout = LAYOUTS["pre"]
    parts = (split_key(layout, key) for key in keys)
    return frozenset(module for number, module, _ in parts if number and _is_stream_norm(module))


def _is_stream_norm(module: str) -> bool:
    return module.endswith(("layernorm", "norm")) and "." not in module
