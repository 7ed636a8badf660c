"""DeepDiver: an agent that searches, doubts, verifies and cites, over local documents or the web.

The names below are imported when they are first used: `import tenfold.agent` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tenfold.agent.config import Budget, Sampling

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent, Answer
    from tenfold.agent.endpoint import Endpoint
    from tenfold.agent.evaluation import evaluate
    from tenfold.agent.index import LocalIndex
    from tenfold.agent.local_model import LocalModel
    from tenfold.agent.policies import Scripted

__all__ = ["Agent", "Answer", "Budget", "Endpoint", "LocalIndex", "LocalModel", "Sampling", "Scripted", "evaluate"]

_MODULE_OF = {
    "Agent": "agent",
    "Answer": "agent",
    "Endpoint": "endpoint",
    "LocalIndex": "index",
    "LocalModel": "local_model",
    "Scripted": "policies",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"tenfold.agent.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
