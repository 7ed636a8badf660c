"""Context parallelism: the tokens of one batch lie on several devices, and keys and values travel.

Pangu Ultra cuts every document, not the sequence, in 2 CP chunks, and gives each device the two chunks of it that
together cost the mean (paper section 4.3.1): with attention reset at document ends, work is then equal for every
packing.

Shapes: N tokens of all rows, n = N / CP of them here, H query heads and G key/value heads of c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.attention.bias import causal_lower_right

from tenfold.llm.attention import Documents, causal_attention
from tenfold.llm.model import Attention

# --- Who takes what ---------------------------------------------------------------------------------------------------


def split_documents(lengths: Sequence[int], cp: int) -> list[list[range]]:
    """Which tokens each of `cp` devices takes: chunks r and 2 CP - 1 - r of every document.

    Where a document does not divide, its last tokens go to the devices that have fewest, so that the devices' totals
    differ by one token at most, and not at all where CP divides their sum.

    Args:
        lengths: tokens of the documents, in reading order.
        cp: devices.

    Returns:
        For each device, ranges of token numbers, ascending: two for every document, which may be empty.

    Example:
        >>> split_documents([8], 2)
        [[range(0, 2), range(6, 8)], [range(2, 4), range(4, 6)]]
    """
    taken: list[list[range]] = [[] for _ in range(cp)]
    totals = [0] * cp
    start = 0
    for length in lengths:
        size, rest = divmod(length, 2 * cp)
        sizes = [size] * (2 * cp)
        fewest = min(totals)
        # One token for those that are behind, then for all, then for the others: no device gets more than two.
        behind = [rank for rank in range(cp) if totals[rank] == fewest]
        ahead = [rank for rank in range(cp) if totals[rank] > fewest]
        for rank in [*behind, *range(cp), *ahead][:rest]:
            early = sizes[rank] == size
            sizes[rank if early else 2 * cp - 1 - rank] += 1
            totals[rank] += 1
        bounds = list(accumulate(sizes, initial=start))
        for rank in range(cp):
            totals[rank] += 2 * size
            for chunk in (rank, 2 * cp - 1 - rank):
                taken[rank].append(range(bounds[chunk], bounds[chunk + 1]))
        start += length
    return taken


def split_sequence(lengths: Sequence[int], cp: int) -> list[list[range]]:
    """Megatron's head-tail split, for comparison: the sequence, not its documents, is cut in 2 CP chunks."""
    return split_documents([sum(lengths)], cp)


def work(lengths: Sequence[int], taken: list[list[range]]) -> list[int]:
    """Keys that each device's queries see, in all: its work in attention."""
    offsets = list(accumulate(lengths, initial=0))
    sums = []
    for ranges in taken:
        total, document = 0, 0
        for span in ranges:
            start = span.start
            while start < span.stop:
                while offsets[document + 1] <= start:
                    document += 1
                stop = min(span.stop, offsets[document + 1])
                first, last = start - offsets[document] + 1, stop - offsets[document]
                total += (first + last) * (last - first + 1) // 2
                start = stop
        sums.append(total)
    return sums


# --- Attention over what others hold ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedDocuments(Documents):
    """Documents of rows whose tokens lie on several devices; marks a forward pass as one of them all.

    Attributes:
        lengths: of the whole documents.
        taken: what each device has, as `split_documents` says.
        rank: this device's place among them.
    """

    taken: tuple[tuple[range, ...], ...] = ()
    rank: int = 0


def indices(taken: Sequence[range], device: torch.device | None = None) -> Tensor:
    """Token numbers (n,), int64, of ranges."""
    return torch.cat([torch.arange(span.start, span.stop, device=device) for span in taken])


def share_batch(batch: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """This device's part of a batch that all devices of `mesh` have.

    Args:
        batch: `tokens` and `targets` (B, T), and `documents` or None.
        mesh: devices among which the tokens are shared, one-dimensional.

    Returns:
        `tokens` and `targets` (1, B * T / CP), `positions` (B * T / CP,) in their rows, `documents`.

    Raises:
        ValueError: the tokens cannot be shared equally.
    """
    tokens, cp = batch["tokens"], mesh.size()
    rows, length = tokens.shape
    if tokens.numel() % cp:
        raise ValueError(f"cp: {rows} rows of {length} tokens cannot be shared equally by {cp} devices")
    documents: Documents | None = batch.get("documents")
    lengths = documents.lengths if documents else (length,) * rows
    taken = tuple(tuple(ranges) for ranges in split_documents(lengths, cp))
    rank = mesh.get_local_rank()
    own = indices(taken[rank], tokens.device)
    return {
        **batch,
        "tokens": tokens.flatten()[None, own],
        "targets": batch["targets"].flatten()[None, own],
        "positions": own % length,
        "documents": SharedDocuments(lengths, taken, rank),
    }


def gather(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Tensors (1, ...) of all devices as one (CP, ...); gradients of what all made of a tensor sum up where it is."""
    whole = DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def attend_shared(
    alone: partial[Tensor],
    mesh: DeviceMesh,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """Causal attention of the queries here to the keys and values of all devices.

    Args:
        alone: attention of a pass that is not shared (evaluation, generation), with its window and bound of scores.
        mesh: devices that share the tokens, one-dimensional.
        q: queries (1, H, n, c).
        k: keys (1, G, n, c).
        v: values (1, G, n, c).
        scale: factor on q . k.
        documents: `SharedDocuments`, or what `alone` takes.

    Returns:
        (1, H, n, c). Beside inputs and outputs it holds the keys and values of all documents, and at most a mask of
        one chunk by its document where the kernel knows no causal attention to a longer past.
    """
    if not isinstance(documents, SharedDocuments):
        return alone(q, k, v, scale, documents)
    window, softcap = alone.keywords.get("window", 0), alone.keywords.get("softcap", 0.0)
    gathered = gather(torch.cat([k, v], -1), mesh)  # (CP, G, n, 2c)
    held = torch.cat([indices(ranges, q.device) for ranges in documents.taken])
    order = torch.empty_like(held).index_copy_(0, held, torch.arange(len(held), device=q.device))
    everything = gathered.transpose(0, 1).flatten(1, 2).index_select(1, order)[None]  # (1, G, N, 2c), in reading order
    keys, values = everything.split((k.shape[-1], v.shape[-1]), -1)
    own = documents.taken[documents.rank]
    parts, done = [], 0
    for number, start in enumerate(documents.offsets[:-1]):
        for chunk in own[2 * number : 2 * number + 2]:
            if chunk:
                first = max(start, chunk.start - window + 1) if window else start
                queries = q[:, :, done : done + len(chunk)]
                past = slice(first, chunk.stop)
                parts.append(_attend_past(queries, keys[:, :, past], values[:, :, past], scale, window, softcap))
                done += len(chunk)
    return torch.cat(parts, 2)


def _attend_past(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Attention of the last positions of a document to all of it, the last query aligned with the last key."""
    length, total = q.shape[2], k.shape[2]
    if softcap or window or length == total:
        return causal_attention(q, k, v, scale, window, softcap)
    # Fused kernels of accelerators need no mask for this; the CPU makes one.
    bias = causal_lower_right(length, total)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let a decoder's attention take batches of `share_batch`; other batches go on as before.

    The loss of each device is the mean over its own tokens; the mean over the devices is the loss of the batch, and the
    mean of the devices' gradients its gradient (FSDP over them takes it).
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = partial(attend_shared, module.attend, mesh)
