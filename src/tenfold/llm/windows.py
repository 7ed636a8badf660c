"""Windows of one text: at random places to train on, side by side to score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.core.console import UserError
from tenfold.llm.tokenizer import Tokenizer


class Windows:
    """Windows of one long text at random places; sample i is a pure function of i.

    Args:
        tokens: ids (N,), N > length.
        length: tokens of a window.
        seed: of the places.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int = 0) -> None:
        if len(tokens) <= length:
            raise UserError(f"the text has {len(tokens)} tokens, fewer than one sequence of {length} and its target")
        self.tokens, self.length, self.seed = tokens, length, seed

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`tokens` and `targets` (B, T), int64."""
        generator = torch.Generator()
        starts = []
        for index in indices:
            generator.manual_seed(self.seed * 1_000_003 + index)
            starts.append(int(torch.randint(len(self.tokens) - self.length, (), generator=generator)))
        rows = torch.stack([self.tokens[start : start + self.length + 1] for start in starts]).long()
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


class Validation:
    """Loss on the beginning of a text that is not trained on.

    Args:
        ids: of the text.
        length: tokens of a window; windows do not overlap, and what is left over is dropped.
        tokenizer: counts the bytes that the targets stand for.
        limit: most windows.
        batch: windows at a time.

    Raises:
        UserError: the text is shorter than one window.
    """

    def __init__(self, ids: Sequence[int], length: int, tokenizer: Tokenizer, limit: int = 64, batch: int = 8) -> None:
        count = min(limit, (len(ids) - 1) // length)
        if count < 1:
            raise UserError(f"the validation text has {len(ids)} tokens, fewer than one sequence of {length}")
        rows = torch.tensor(ids[: count * length + 1])
        self.inputs, self.targets = rows[:-1].view(count, length), rows[1:].view(count, length)
        self.batch = batch
        self.bytes = sum(len(tokenizer.token_bytes(token)) for token in rows[1:].tolist())

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`loss` in nats a token, `nats_per_byte`, `bits_per_byte`."""
        device, total = next(model.parameters()).device, 0.0
        for inputs, targets in zip(self.inputs.split(self.batch), self.targets.split(self.batch), strict=True):
            logits = model(inputs.to(device)).flatten(0, 1).float()
            total += F.cross_entropy(logits, targets.to(device).flatten(), reduction="sum").item()
        nats = total / self.bytes
        return {"loss": total / self.targets.numel(), "nats_per_byte": nats, "bits_per_byte": nats / math.log(2)}
