"""What several verbs take: a language model, where to search, the form of the turns; and the agent that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tenfold.agent.config import Budget, Sampling

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent

# Where vLLM and llama.cpp's server listen by default, or nearly.
DEFAULT_LLM = "http://localhost:8000/v1"
ProtocolName = Literal["deepdiver", "brief", "search-r1", "native"]


def agent_of(
    llm: str,
    model: str,
    engine: tuple[str, ...],
    protocol: str,
    budget: Budget,
    sampling: Sampling,
    cache: Path | None,
    offline: bool,
    device: str,
    open_urls: bool = False,
) -> Agent:
    """The agent that the options of a verb name."""
    from tenfold.agent.agent import Agent

    return Agent.from_pretrained(
        llm,
        engine,
        model=model,
        budget=budget,
        sampling=sampling,
        protocol=protocol,
        cache=cache,
        offline=offline,
        device=device,
        open_any_url=open_urls,
    )
