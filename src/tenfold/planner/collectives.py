"""Bytes that collectives move and the seconds they take; token copies of the expert all-to-all, counted and expected.

Every formula works on floats and on NumPy arrays. Rates are GB/s per direction per device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.core.console import UserError


@dataclass(frozen=True)
class TokenCopies:
    """Token copies of one dispatch, summed over ranks.

    Attributes:
        flat_inter, flat_intra, flat_local: one copy per selected expert, by where the expert's rank lives.
        rank_dedup, rank_dedup_inter: one copy per destination rank, the own rank included (all, and those to another
            node).
        node_dedup_inter: one copy per destination node.
        hierarchical_inter, hierarchical_intra: outer all-gather over ranks of equal local index, then all-to-all
            inside the node.
        max_receive_over_mean: fullest rank over the mean.
        send: copies from rank to rank, one per selected expert [ranks, ranks].
    """

    flat_inter: int
    flat_intra: int
    flat_local: int
    rank_dedup: int
    rank_dedup_inter: int
    node_dedup_inter: int
    hierarchical_inter: int
    hierarchical_intra: int
    max_receive_over_mean: float
    send: np.ndarray


def count_token_copies(routing: np.ndarray, experts: int, ranks_per_node: int) -> TokenCopies:
    """Count the copies that a recorded routing sends.

    Args:
        routing: chosen experts [ranks, tokens, k] integer.
        experts: experts in all; expert e lives on rank e // (experts / ranks).
        ranks_per_node: rank r lives on node r // ranks_per_node.

    Raises:
        UserError: sizes that do not divide, or an expert id outside the range.
    """
    routing = np.asarray(routing)
    if routing.ndim != 3 or routing.dtype.kind not in "iu":
        raise UserError(
            f"routing: expected integers [ranks, tokens, k], found shape {routing.shape} of {routing.dtype}"
        )
    ranks, tokens, _ = routing.shape
    if experts % ranks or ranks % ranks_per_node:
        raise UserError(f"routing: {experts} experts on {ranks} ranks with {ranks_per_node} ranks a node do not divide")
    if routing.size and (routing.min() < 0 or routing.max() >= experts):
        raise UserError(f"routing: expert ids run from {routing.min()} to {routing.max()}, expected 0 to {experts - 1}")
    nodes = ranks // ranks_per_node
    owner = routing.astype(np.int64) // (experts // ranks)
    send = np.zeros((ranks, ranks), dtype=np.int64)
    np.add.at(send, (np.arange(ranks)[:, None, None], owner), 1)
    node_of = np.arange(ranks) // ranks_per_node
    far = node_of[:, None] != node_of[None, :]
    to_rank = np.zeros((ranks, tokens, ranks), dtype=bool)
    np.put_along_axis(to_rank, owner, True, axis=-1)
    others = to_rank & ~np.eye(ranks, dtype=bool)[:, None, :]
    to_node = to_rank.reshape(ranks, tokens, nodes, ranks_per_node).any(axis=-1)
    away = to_node & (np.arange(nodes)[None, None, :] != node_of[:, None, None])
    # After the outer all-gather the rank of equal local index in the expert's node sends the copy, unless it owns the
    # expert.
    local = np.arange(ranks) % ranks_per_node
    inner = int((owner % ranks_per_node != local[:, None, None]).sum())
    received = send.sum(axis=0)
    return TokenCopies(
        flat_inter=int(send[far].sum()),
        flat_intra=int(send[~far].sum() - np.trace(send)),
        flat_local=int(np.trace(send)),
        rank_dedup=int(to_rank.sum()),
        rank_dedup_inter=int((others & far[:, None, :]).sum()),
        node_dedup_inter=int(away.sum()),
        hierarchical_inter=ranks * tokens * (nodes - 1),
        hierarchical_intra=inner,
        max_receive_over_mean=float(received.max() / received.mean()),
        send=send,
    )


def expected_copies_per_token(dispatch: str, topk: Any, nodes: Any) -> Any:
    """Expected copies of one token that leave its node when routing is uniform (flat k(1-1/N), hierarchical N-1,
    dedup (N-1)(1-(1-1/N)^k))."""
    if dispatch == "flat":
        return topk * (1 - 1 / nodes)
    if dispatch == "hierarchical":
        return nodes - 1.0
    return (nodes - 1) * (1 - (1 - 1 / nodes) ** topk)


def ring_bytes(payload: Any, group: Any) -> Any:
    """Bytes that a rank sends in a ring all-gather or reduce-scatter of `payload` bytes over `group` ranks."""
    return payload * (1 - 1 / group)


def group_seconds(payload: Any, group: Any, local: Any, intra: Any, inter: Any) -> Any:
    """Seconds of an all-gather or reduce-scatter.

    Args:
        payload: bytes of the gathered tensor.
        group: ranks of the group.
        local: ranks of the group inside one node; their networks work side by side.
        intra, inter: usable bytes/s inside and between nodes.
    """
    inside = payload * (1 - 1 / np.maximum(local, 1)) / intra
    outside = np.where(
        group > local, payload * (1 - local / np.maximum(group, local)) / (np.maximum(local, 1) * inter), 0.0
    )
    return np.maximum(inside, outside)


def expert_phase_seconds(
    tokens: Any, copy_bytes: Any, topk: Any, span: Any, per_node: Any, mode: Any, intra: Any, inter: Any
) -> Any:
    """Seconds of one expert all-to-all phase on one rank, routing balanced.

    Args:
        tokens: tokens that this rank holds before dispatch.
        copy_bytes: bytes of one copy.
        topk: experts of a token.
        span: consecutive devices over which the experts are spread.
        per_node: devices of a node.
        mode: 0 flat, 1 dedup, 2 hierarchical (may be an array).
        intra, inter: usable bytes/s inside and between nodes.
    """
    nodes = np.maximum(span / per_node, 1.0)
    inside = np.minimum(span, per_node)
    flat_far = topk * (1 - 1 / nodes)
    dedup_far = (nodes - 1) * (1 - (1 - 1 / nodes) ** topk)
    near_all = topk * (1 - 1 / inside)
    far = np.where(mode == 1, dedup_far, np.where(mode == 2, nodes - 1.0, flat_far))
    near = np.where(mode == 0, near_all / nodes, near_all)
    far_seconds = tokens * copy_bytes * far / inter
    near_seconds = tokens * copy_bytes * near / intra
    # The two-hop forms forward while they receive; the flat form shares the device's copy engines the same way.
    return np.maximum(far_seconds, near_seconds)
