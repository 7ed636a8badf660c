"""The decoder of Pangu Ultra (paper section 2): RMSNorm, rotary grouped-query attention, SwiGLU, four norm placements.

Shapes: B rows, T tokens, d hidden channels, H query heads and G key/value heads of c channels, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.llm.attention import Documents, attend
from tenfold.llm.cache import Cache, LayerCache
from tenfold.llm.config import ModelConfig, RopeScaling
from tenfold.llm.kernels import rms_norm

Turn = tuple[Tensor, Tensor] | None
"""Cosines and sines (..., T, r / 2) that turn the first r channels of a head; None leaves heads as they are."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis.

    Args:
        channels: size of the last axis.
        eps: added to the mean square.
        offset: what is added to the stored gain (Gemma stores gamma - 1).
    """

    def __init__(self, channels: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same."""
        gain = self.weight + self.offset if self.offset else self.weight
        return rms_norm(x, gain, self.eps)


class Rotary(nn.Module):
    """Angles of a rotary position embedding.

    Args:
        channels: channels r of a head that turn.
        base: of the geometric series of frequencies.
        scaling: stretch of the frequencies.
    """

    def __init__(self, channels: int, base: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.channels, self.base, self.scaling = channels, base, scaling

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., T, r / 2), float32, of positions (..., T)."""
        # Computed anew: a buffer would follow the model to half precision and to the meta device.
        angles = positions[..., None] * rope_frequencies(self.channels, self.base, self.scaling, positions.device)
        return angles.cos(), angles.sin()


def rope_frequencies(
    channels: int, base: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians per position (channels / 2,), float32: base^(-2i / channels), stretched by `scaling`."""
    frequencies = 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: short wavelengths are kept, long ones stretched, those between blended.
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def turns_at(config: ModelConfig, rotary: Rotary, local_rotary: Rotary, positions: Tensor) -> dict[str, Turn]:
    """The turn of heads in each kind of layer, at positions (..., T)."""
    full = rotary(positions) if config.rope_in_full_layers else None
    if "sliding" not in config.layer_kinds:
        return {"full": full}
    scaled_alike = not config.local_rope_base
    return {"full": full, "sliding": rotary(positions) if scaled_alike else local_rotary(positions)}


def turn_halves(x: Tensor, turn: Turn) -> Tensor:
    """Turn channel i with channel i + r/2 of heads (..., T, c): Llama's convention."""
    if turn is None:
        return x
    cosines, sines = torch.cat([turn[0], turn[0]], -1), torch.cat([-turn[1], turn[1]], -1)
    channels = cosines.shape[-1]
    turning = x if channels == x.shape[-1] else x[..., :channels]
    turned = torch.addcmul(turning * cosines, turning.roll(channels // 2, -1), sines).to(x.dtype)
    return turned if turning is x else torch.cat([turned, x[..., channels:]], -1)


def turn_pairs(x: Tensor, turn: Turn) -> Tensor:
    """Turn channel 2i with channel 2i + 1 of heads (..., T, c): GLM's convention."""
    if turn is None:
        return x
    cosines, sines = turn
    channels = 2 * cosines.shape[-1]
    even, odd, rest = x[..., 0:channels:2], x[..., 1:channels:2], x[..., channels:]
    turned = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], -1).flatten(-2)
    return torch.cat([turned, rest], -1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    `attend` may be replaced from outside, say by one whose keys live on several devices.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, c = config.width, config.head_dim
        self.head_dim = c
        self.scale = config.attention_scale or c**-0.5
        self.q = nn.Linear(d, config.heads * c, bias=config.attention_bias)
        self.k = nn.Linear(d, config.kv_heads * c, bias=config.attention_bias)
        self.v = nn.Linear(d, config.kv_heads * c, bias=config.attention_bias)
        self.o = nn.Linear(config.heads * c, d, bias=config.output_bias)
        offset = 1.0 if config.unit_offset_norms else 0.0
        self.q_norm = RMSNorm(c, config.norm_eps, offset) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c, config.norm_eps, offset) if config.qk_norm else nn.Identity()
        self.gate = nn.Linear(d, config.heads * c, bias=False) if config.attention_gate else None
        self.turn = turn_halves if config.rotation == "half" else turn_pairs
        window = config.sliding_window if config.kind(layer) == "sliding" else 0
        self.attend = partial(attend, window=window, softcap=config.attention_softcap)

    def forward(
        self, x: Tensor, turn: Turn, documents: Documents | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Mix positions of (B, T, d).

        Args:
            x: hidden states (B, T, d).
            turn: cosines and sines of the positions.
            documents: those of the rows; None takes each row as one.
            cache: the past, which the new positions join.
        """
        # -1 heads: under tensor parallelism a process has a part of them.
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = self.turn(self.q_norm(q), turn), self.turn(self.k_norm(k), turn)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = self.attend(q, k, v, self.scale, documents).transpose(1, 2).flatten(2)
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        return self.o(mixed)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to the same."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Two residual sub-layers with a norm before each and, in sandwiches, one after it (Eq. 1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        offset = 1.0 if config.unit_offset_norms else 0.0
        before = partial(RMSNorm, config.width, config.norm_eps, offset)
        after = partial(RMSNorm, config.width, config.post_norm_eps or config.norm_eps, offset)
        self.pre_attention_norm = before()
        self.attention = Attention(config, layer)
        self.post_attention_norm = after() if config.has_post_norms else nn.Identity()
        self.pre_mlp_norm = before()
        self.mlp = FeedForward(config)
        self.post_mlp_norm = after() if config.has_post_norms else nn.Identity()

    def forward(
        self, h: Tensor, turn: Turn, documents: Documents | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, d) to the same."""
        h = h + self.post_attention_norm(self.attention(self.pre_attention_norm(h), turn, documents, cache))
        return h + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(h)))


class PostNormBlock(nn.Module):
    """Two residual sub-layers with a norm on each sum: the original Transformer's order."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.post_attention_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config)
        self.post_mlp_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, h: Tensor, turn: Turn, documents: Documents | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """Hidden states (B, T, d) to the same."""
        h = self.post_attention_norm(h + self.attention(h, turn, documents, cache))
        return self.post_mlp_norm(h + self.mlp(h))


class Decoder(nn.Module):
    """A causal language model.

    Args:
        config: sizes, norm placement and the rest.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        block = PostNormBlock if config.norm == "post" else Block
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps, 1.0 if config.unit_offset_norms else 0.0)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        self.rotary = Rotary(config.rotary_channels, config.rope_base, config.rope_scaling)
        # Only full layers are stretched to longer contexts; a window is as long as it was.
        self.local_rotary = Rotary(config.rotary_channels, config.local_rope_base or config.rope_base)

    def turns(self, positions: Tensor) -> dict[str, Turn]:
        """The turn of heads in each kind of layer, at positions (..., T)."""
        return turns_at(self.config, self.rotary, self.local_rotary, positions)

    def hidden(
        self,
        tokens: Tensor,
        documents: Documents | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Normalised output of the last layer (B, T, d); arguments as in `forward`."""
        if positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        turns = self.turns(positions)
        h = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            h = h * torch.tensor(self.config.embedding_scale, dtype=h.dtype)  # rounded like the weights, as in Gemma
        for number, layer in enumerate(self.layers):
            h = layer(h, turns[self.config.kind(number)], documents, cache.layers[number] if cache else None)
        return self.final_norm(h)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token (..., V) from `hidden` (..., d)."""
        scores = self.lm_head(hidden)
        cap = self.config.logit_softcap
        return cap * torch.tanh(scores / cap) if cap else scores

    def forward(
        self,
        tokens: Tensor,
        documents: Documents | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Scores of the next token at every position.

        Args:
            tokens: ids (B, T), int64, in [0, V).
            documents: documents of packed rows, which do not see each other; None takes each row as one.
            cache: the past, which the tokens go on from and join; not together with `documents`.
            positions: of the tokens, (T,) or (B, 1, T); None counts on from the cache.

        Returns:
            Logits (B, T, V).
        """
        return self.logits(self.hidden(tokens, documents, cache, positions))


# --- Initialisation ---------------------------------------------------------------------------------------------------


def initialise(model: Decoder, seed: int = 0) -> None:
    """Draw all weights as `model.config` says, the same for a seed on every device and in every order of modules.

    Source: paper section 2.2 (TinyInit, and small initialisation as its baseline) and Eq. 1 (gains of the norms).
    """
    config = model.config
    tiny = math.sqrt(1 / (2 * config.width * config.layers))
    small = math.sqrt(2 / (5 * config.width))
    inner, outer = (tiny, tiny) if config.init == "tiny" else (small, small / math.sqrt(config.layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not (name == "lm_head" and config.tied):
                _draw(module.weight, outer if name.endswith((".o", ".down")) else inner, generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                _draw(module.weight, config.embedding_std, generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0 - module.offset)
        if config.has_post_norms:
            attention_gain, mlp_gain = post_norm_gains(config, seed)
            for name, module in model.named_modules():
                if isinstance(module, RMSNorm) and "post_" in name:
                    gain = attention_gain if "attention" in name else mlp_gain
                    module.weight.fill_(gain - module.offset)


def _draw(weight: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Fill with N(0, sigma^2); drawn on the CPU, so that a seed means the same on every device."""
    if weight.device.type != "meta":
        weight.copy_(torch.empty(weight.shape).normal_(0, sigma, generator=generator))


def post_norm_gains(config: ModelConfig, seed: int = 0) -> tuple[float, float]:
    """Initial gains of the norms after attention and after the feed-forward network (Eq. 1)."""
    if config.norm == "sandwich":
        return config.sandwich_gamma, config.sandwich_gamma
    c_attention, c_mlp = config.c_attention, config.c_mlp
    if c_attention == "measure" or c_mlp == "measure":
        attention_rms, mlp_rms = measure_outputs(config, seed)
        c_attention = attention_rms if c_attention == "measure" else c_attention
        c_mlp = mlp_rms if c_mlp == "measure" else c_mlp
    return float(c_attention) / math.sqrt(config.layers), float(c_mlp) / math.sqrt(config.layers)


def measure_outputs(config: ModelConfig, seed: int = 0, tokens: int = 128) -> tuple[float, float]:
    """Root mean square of attention and feed-forward outputs under small initialisation without residual scaling.

    What the paper calls the standard deviations of the sub-layers' outputs at initialisation; measured on random tokens
    in the first layer, where the residual stream is the embedding.
    """
    probe = Decoder(replace(config, layers=1, layer_kinds=(), norm="pre", init="small"))
    initialise(probe, seed)
    ids = torch.randint(config.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    outputs: list[float] = []
    block: Block = probe.layers[0]  # type: ignore[assignment]
    for module in (block.attention, block.mlp):
        module.register_forward_hook(lambda _m, _i, output: outputs.append(output.square().mean().sqrt().item()))
    with torch.no_grad():
        probe(ids)
    return outputs[0], outputs[1]


def groups_for_decay(model: nn.Module, weight_decay: float, decay_norms: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: with and without weight decay.

    The paper's runs decay the gains of the norms too (section 5.4.3); `decay_norms` False leaves out all vectors.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if decay_norms or parameter.dim() > 1 else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
