"""Tiny decoders with random weights, for the tests of this room."""

from __future__ import annotations

from typing import Any

import torch

from tenfold.llm.config import ModelConfig
from tenfold.llm.generation import LanguageModel
from tenfold.llm.model import Decoder
from tenfold.llm.tokenizer import ByteTokenizer

SIZES: dict[str, Any] = {
    "vocabulary": 257,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "ffn": 48,
    "norm": "pre",
    "context": 160,
    "eod": 256,
}


def decoder(seed: int = 0, **changes: Any) -> Decoder:
    """A decoder whose next tokens depend on all that it sees."""
    model = Decoder(ModelConfig(**(SIZES | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if gain else 0.3) + float(gain))
    return model


def language_model(seed: int = 0, **changes: Any) -> LanguageModel:
    """The same with the 256 bytes as its vocabulary; it writes for ever, since no token ends its texts."""
    return LanguageModel(decoder(seed, **changes), ByteTokenizer(), eos_ids=(1000,))
