"""Pangu Ultra: pre-train, extend, inspect and run deep dense language models with depth-scaled sandwich norm.

The names below are imported when they are first used, so that `tenfold llm --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.llm.attention import Documents
    from tenfold.llm.config import ModelConfig
    from tenfold.llm.generation import LanguageModel
    from tenfold.llm.model import Decoder, initialise
    from tenfold.llm.tokenizer import Tokenizer
    from tenfold.llm.training import pretrain

__all__ = ["Decoder", "Documents", "LanguageModel", "ModelConfig", "Tokenizer", "initialise", "pretrain"]

_MODULE_OF = {
    "Decoder": "model",
    "Documents": "attention",
    "LanguageModel": "generation",
    "ModelConfig": "config",
    "Tokenizer": "tokenizer",
    "initialise": "model",
    "pretrain": "training",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"tenfold.llm.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
