"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable

from tenfold.llm.model_verbs import convert, evaluate, export, extend_context, generate, inspect
from tenfold.llm.training_verbs import post_train, pretrain, reproduce, tokenizer

VERBS: dict[str, Callable[..., object]] = {
    "pretrain": pretrain,
    "generate": generate,
    "evaluate": evaluate,
    "extend-context": extend_context,
    "inspect": inspect,
    "reproduce": reproduce,
    "tokenizer": tokenizer,
    "convert": convert,
    "export": export,
    "post-train": post_train,
}
