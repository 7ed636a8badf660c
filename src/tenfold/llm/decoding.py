"""One more token for each row, in few and large operations.

A step of a small model costs reading its weights once and starting its operations. So matrices that read the same input
lie one behind the other in memory and act as one, the angles of all positions are computed once, query heads that
share a key head are rows of one product, and a norm is four operations. The weights are the model's own, not copies.

Shapes: B rows, d hidden channels, H query heads and G key/value heads of c channels, S positions so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.llm.attention import attend
from tenfold.llm.cache import Cache, LayerCache
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Attention, Block, Decoder, FeedForward, PostNormBlock, RMSNorm, Turn

Linear = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,) of a linear layer."""

Norm = Callable[[Tensor], Tensor]


class Decoding:
    """Prompts that have been read, and the tokens that follow them.

    Rows of different length end at the same position: rotary attention sees differences of positions only, so that a
    shorter row may begin later.

    Args:
        model: in evaluation mode.
        prompts: token ids of each row, none empty.
        capacity: most tokens of the longest row, prompt included.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        weight = model.embed.weight
        self.model = model
        self.cache = Cache(model.config, len(prompts), capacity, weight.device, weight.dtype)
        longest = max(map(len, prompts))
        self.starts = [longest - len(prompt) for prompt in prompts]
        self.logits = torch.cat([self._read(row, prompt) for row, prompt in enumerate(prompts)])
        for layer in self.cache.layers:
            layer.length = longest
        step = Step if can_step(model) else RowByRow
        self._step: Step | RowByRow = step(model, self.cache, self.starts)

    @torch.inference_mode()
    def _read(self, row: int, prompt: Sequence[int]) -> Tensor:
        """Scores (1, V) of what follows a prompt, whose keys and values are kept."""
        start, device = self.starts[row], self.model.embed.weight.device
        tokens = torch.tensor(prompt, device=device)[None]
        positions = torch.arange(start, start + len(prompt), device=device)
        hidden = self.model.hidden(tokens, cache=self.cache.row(row, start), positions=positions)
        return self.model.logits(hidden[:, -1])

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; return the scores (B, V) of what follows."""
        self.logits = self._step(torch.tensor(tokens, device=self.model.embed.weight.device))
        return self.logits


class RowByRow:
    """Steps through the model's own forward pass: for decoders with parts that `Step` does not know.

    Args:
        model: the decoder.
        cache: the past of all rows.
        starts: the position at which each row begins.
    """

    def __init__(self, model: Decoder, cache: Cache, starts: Sequence[int]) -> None:
        self.model, self.cache, self.starts = model, cache, starts

    def __call__(self, tokens: Tensor) -> Tensor:
        """Scores (B, V) of what follows tokens (B,)."""
        position = self.cache.length
        rows = []
        for row, start in enumerate(self.starts):
            past = self.cache.row(row, start, position - start)
            at = torch.tensor([position], device=tokens.device)
            rows.append(self.model(tokens[row].view(1, 1), cache=past, positions=at)[:, -1])
        for layer in self.cache.layers:
            layer.length = position + 1
        return torch.cat(rows)


class Step:
    """The decoder's forward pass for one token of each row; arguments as in `RowByRow`."""

    def __init__(self, model: Decoder, cache: Cache, starts: Sequence[int]) -> None:
        config, device = model.config, model.embed.weight.device
        self.model, self.cache = model, cache
        positions = torch.arange(cache.capacity, device=device)
        self.tables = {kind: _table(turn, config) for kind, turn in model.turns(positions).items()}
        partners = _partners(config).to(device)
        self.layers = [_LayerStep(block, cache.layers[i], partners) for i, block in enumerate(model.layers)]  # type: ignore[arg-type]
        self.kinds = [config.kind(i) for i in range(config.layers)]
        self.final_norm = _norm(model.final_norm)
        self.seen: Tensor | None = None
        if any(starts):
            self.seen = (positions >= torch.tensor(starts, device=device)[:, None])[:, None, None]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Scores (B, V) of what follows tokens (B,)."""
        model, position = self.model, self.cache.length
        h = F.embedding(tokens, model.embed.weight)
        if model.config.embedding_scale != 1.0:
            h = h * torch.tensor(model.config.embedding_scale, dtype=h.dtype)
        turns = {kind: table and (table[0][position], table[1][position]) for kind, table in self.tables.items()}
        seen = None if self.seen is None else self.seen[..., : position + 1]
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            h = layer(h, turns[kind], seen)
        return model.logits(self.final_norm(h))


def can_step(model: Decoder) -> bool:
    """Whether all parts are this library's own and unchanged, so that `Step` computes what the model would."""
    return all(
        type(layer) in (Block, PostNormBlock)
        and type(layer.attention) is Attention
        and type(layer.mlp) is FeedForward
        and isinstance(layer.attention.attend, partial)
        and layer.attention.attend.func is attend
        and all(type(part) is nn.Linear for part in _linears(layer))
        for layer in model.layers
    )


def _linears(layer: nn.Module) -> list[nn.Module]:
    parts = [*layer.attention.children(), *layer.mlp.children()]  # type: ignore[union-attr]
    return [part for part in parts if not isinstance(part, RMSNorm | nn.Identity)]


class _LayerStep:
    """One block for one token of each row."""

    def __init__(self, block: Block | PostNormBlock, cache: LayerCache, partners: Tensor) -> None:
        attention, mlp = block.attention, block.mlp
        self.cache, self.partners = cache, partners
        self.groups, self.channels = cache.keys.shape[1], attention.head_dim
        self.scale, self.q_norm, self.k_norm = attention.scale, attention.q_norm, attention.k_norm
        self.normed_heads = isinstance(attention.q_norm, RMSNorm)
        self.window: int = attention.attend.keywords["window"]
        self.softcap: float = attention.attend.keywords["softcap"]
        self.qkv = joined(attention.q, attention.k, attention.v)
        self.gate = None if attention.gate is None else attention.gate.weight
        self.out: Linear = attention.o.weight, attention.o.bias
        self.gate_up = joined(mlp.gate, mlp.up)
        self.down: Linear = mlp.down.weight, mlp.down.bias
        self.activation = mlp.activation
        self.norms_sums = isinstance(block, PostNormBlock)
        names = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = (
            _norm(getattr(block, name, None)) for name in names
        )

    def __call__(self, h: Tensor, turn: Turn, seen: Tensor | None) -> Tensor:
        """Hidden states (B, d) to the same."""
        if self.norms_sums:
            h = self.after_attention(h + self.attention(h, turn, seen))
            return self.after_mlp(h + self.mlp(h))
        h = h + self.after_attention(self.attention(self.before_attention(h), turn, seen))
        return h + self.after_mlp(self.mlp(self.before_mlp(h)))

    def attention(self, x: Tensor, turn: Turn, seen: Tensor | None) -> Tensor:
        """Append the rows' keys and values, and mix all so far: (B, d) to the same."""
        heads = F.linear(x, *self.qkv).unflatten(-1, (-1, self.channels))
        q_and_k, v = heads[:, : -self.groups], heads[:, -self.groups :]
        if self.normed_heads:
            q_and_k = torch.cat([self.q_norm(q_and_k[:, : -self.groups]), self.k_norm(q_and_k[:, -self.groups :])], 1)
        if turn is not None:
            swapped = q_and_k.index_select(-1, self.partners)
            q_and_k = (q_and_k * turn[0]).addcmul_(swapped, turn[1]).to(x.dtype)
        keys, values = self.cache.extend(q_and_k[:, -self.groups :, None], v[:, :, None])
        # (B, G, H / G, c): the heads of a group are queries of one attention.
        q = q_and_k[:, : -self.groups].unflatten(1, (self.groups, -1))
        if self.window:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
            seen = None if seen is None else seen[..., -self.window :]
        mixed = _mix(q, keys, values, self.scale, seen, self.softcap).flatten(1)
        if self.gate is not None:
            mixed = mixed * F.linear(x, self.gate).sigmoid()
        return F.linear(mixed, *self.out)

    def mlp(self, x: Tensor) -> Tensor:
        """(B, d) to the same."""
        gate, up = F.linear(x, *self.gate_up).chunk(2, -1)
        return F.linear(self.activation(gate) * up, *self.down)


def _mix(q: Tensor, keys: Tensor, values: Tensor, scale: float, seen: Tensor | None, softcap: float) -> Tensor:
    """Attention of queries (B, G, H / G, c) to all keys (B, G, S, c) that the mask `seen` (B, 1, 1, S) leaves."""
    if not softcap:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)
    scores = softcap * torch.tanh(q @ keys.transpose(-1, -2) * (scale / softcap))
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values


def _norm(module: nn.Module | None) -> Norm:
    """What a norm does, for rows (B, d); the identity for none."""
    if not isinstance(module, RMSNorm):
        return lambda x: x
    if module.weight.dtype != torch.float32:
        return module
    # x / sqrt(|x|^2 / d + eps) = sqrt(d) x / hypot(|x|, sqrt(d eps))
    root = math.sqrt(module.weight.numel())
    gain = root * (module.weight.detach() + module.offset)
    floor = gain.new_full((), root * math.sqrt(module.eps))
    return lambda x: x.div(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(gain)


def _table(turn: Turn, config: ModelConfig) -> Turn:
    """Factors (S, c) of each channel and of its partner: x cos + partner (+-sin)."""
    if turn is None:
        return None
    cosines, sines = turn
    rest = config.head_dim - config.rotary_channels
    if config.rotation == "half":
        cosines, sines = torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)
    else:
        cosines, sines = cosines.repeat_interleave(2, -1), torch.stack([-sines, sines], -1).flatten(-2)
    return F.pad(cosines, (0, rest), value=1.0), F.pad(sines, (0, rest))


def _partners(config: ModelConfig) -> Tensor:
    """The channel (c,) that each channel of a head turns with."""
    channels = torch.arange(config.head_dim)
    turning = channels[: config.rotary_channels]
    half = config.rotary_channels // 2
    channels[: len(turning)] = (
        turning.roll(half) if config.rotation == "half" else turning.view(-1, 2).flip(1).flatten()
    )
    return channels


def join_weights(model: Decoder) -> None:
    """Lay the matrices of a model out as `Step` reads them, once and for all of its generations."""
    if can_step(model):
        for layer in model.layers:
            joined(layer.attention.q, layer.attention.k, layer.attention.v)  # type: ignore[union-attr, arg-type]
            joined(layer.mlp.gate, layer.mlp.up)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def joined(*layers: nn.Linear) -> Linear:
    """Several linear layers of the same input as one; their own weights become views of its."""
    weight = _adjacent([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return weight, _adjacent(biases) if biases else None


def _adjacent(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one behind the other along their first axis."""
    first, rows = parameters[0], [len(parameter) for parameter in parameters]
    starts = [first.storage_offset() + sum(rows[:i]) * first[0].numel() for i in range(len(rows))]
    memory = first.untyped_storage().data_ptr()
    if not all(
        p.is_contiguous() and p.storage_offset() == start and p.untyped_storage().data_ptr() == memory
        for p, start in zip(parameters, starts, strict=True)
    ):
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, whole.split(rows), strict=True):
            parameter.data = part
    return first.detach().as_strided((sum(rows), *first.shape[1:]), first.stride())
