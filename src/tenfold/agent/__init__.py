"""DeepDiver and WebPuzzle: an agent that searches, doubts, verifies and cites, over local documents or the web."""

from __future__ import annotations

__all__ = ["Agent"]


def __getattr__(name: str) -> object:
    # Imported on first use: `import tenfold.agent` stays light.
    if name == "Agent":
        from tenfold.agent.agent import Agent

        return Agent
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
