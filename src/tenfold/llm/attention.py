"""Causal attention over packed documents: which keys a query sees, and the kernels that compute it.

Packed rows are described by the lengths of their documents in reading order, so that no mask of T x T entries is ever
made: each document is a causal attention of its own (paper section 4.3.1).

Shapes: B rows, T queries, S keys, H query heads, G key/value heads of c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Documents:
    """Lengths, in tokens, of the documents in packed rows (B, T), row after row; their sum is B * T.

    A document never crosses a row: what is cut at the end of a row goes on as a document of its own in the next.
    """

    lengths: tuple[int, ...]

    @staticmethod
    def of(tokens: Tensor, eod: int) -> Documents:
        """The documents of packed rows (B, T) of token ids; `eod` belongs to the document that it ends."""
        ends = tokens == eod
        ends[:, -1] = True
        marks = ends.flatten().nonzero().flatten().tolist()
        return Documents(tuple(b - a for a, b in pairwise([-1, *marks])))

    @property
    def offsets(self) -> list[int]:
        """Where each document begins in the flattened rows, and where the last ends."""
        return list(accumulate(self.lengths, initial=0))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    documents: Documents | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention, reset where a document ends.

    Memory beside inputs and output grows with the longest document, and not with its square: masks, where there must be
    one (windows, bounded scores, a cached past), are made for blocks of queries.

    Args:
        q: queries (B, H, T, c) of the last T of S positions.
        k: keys (B, G, S, c); head h uses key head h // (H / G).
        v: values (B, G, S, c).
        scale: factor on q . k.
        documents: those of the rows (S = T then); None takes each row as one.
        window: keys that a query sees, itself included; 0 sees all before.
        softcap: bound s of the scores, s tanh(x / s); 0 has none.

    Returns:
        (B, H, T, c).
    """
    batch, heads, length, channels = q.shape
    if documents is None or documents.lengths == (length,) * batch:
        return causal_attention(q, k, v, scale, window, softcap)
    # (1, H, B * T, c): the rows one after the other, so that a document is one slice.
    flat = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v)]
    parts = []
    for start, end in pairwise(documents.offsets):
        q_part, k_part, v_part = (x[:, :, start:end] for x in flat)
        parts.append(causal_attention(q_part, k_part, v_part, scale, window, softcap))
    return torch.cat(parts, 2).view(heads, batch, length, channels).transpose(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
    """One document's attention; arguments as in `attend`."""
    length, total = q.shape[2], k.shape[2]
    if window >= total:
        window = 0
    if length == total and not window and not softcap:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    if length == 1 and not window:
        return _masked(q, k, v, None, scale, softcap)
    # A graph that is traced for every length has one mask; the number of its blocks could not depend on the length.
    if torch.compiler.is_compiling() or length * total <= _PAIRS:
        return _masked(q, k, v, _mask(length, total, window, q), scale, softcap)
    return _by_blocks(q, k, v, scale, window, softcap)


_PAIRS = 2**20  # queries x keys of a mask; longer texts are taken block by block


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Attention in blocks of queries, each with the keys that any of them sees, so that masks stay small."""
    length, total = q.shape[2], k.shape[2]
    size = min(max(window, 256), max(1, _PAIRS // (window + 256))) if window else max(1, _PAIRS // total)
    masks: dict[tuple[int, int], Tensor] = {}

    def one(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        shape = queries.shape[2], keys.shape[2]
        mask = masks[shape] if shape in masks else _mask(*shape, window, q)
        if window:  # all blocks inside a text share one
            masks[shape] = mask
        return _masked(queries, keys, values, mask, scale, softcap)

    # Bounded scores are composed: what they keep for the backward pass would be all pairs after all.
    recompute = bool(softcap) and torch.is_grad_enabled()
    parts, past = [], total - length
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = slice(max(0, past + start - window + 1) if window else 0, past + stop)
        block = q[:, :, start:stop], k[:, :, seen], v[:, :, seen]
        parts.append(checkpoint(one, *block, use_reentrant=False) if recompute else one(*block))
    return torch.cat(parts, 2)


def _mask(length: int, total: int, window: int, like: Tensor) -> Tensor:
    """To be added to scores (length, total) of the last `length` queries: 0 where a key is seen, -inf elsewhere."""
    seen = torch.ones(length, total, dtype=torch.bool, device=like.device).tril(total - length)
    if window:
        seen = seen.triu(total - length - window + 1)
    return torch.zeros(length, total, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with a mask from `_mask`; None sees all."""
    if not softcap:
        # With a cached past, is_causal would align the first query with the first key, and not the last with the last.
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    # Bounded scores, which the fused kernels do not know.
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
