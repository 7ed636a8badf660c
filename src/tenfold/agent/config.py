"""Budgets and sampling of the agent, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError

# The room has no weights of its own: it works with whatever language model the user has.
MODELS: tuple[ModelEntry, ...] = ()


@dataclass(frozen=True)
class Budget:
    """What one question may cost. The defaults are the paper's, section E.8 and appendix C, where it gives them.

    Args:
        rounds: turns that search or open pages.
        queries: searches of one turn; more are not run.
        results: pages shown for each search.
        tokens: length of the whole conversation: instruction, turns and results.
        turn_tokens: length of one turn of the model (not given by the paper).
        seconds: from the question to the answer (not given by the paper). The last fifth is kept for the final turn.
    """

    rounds: int = 7
    queries: int = 5
    results: int = 2
    tokens: int = 20_000
    turn_tokens: int = 2_048
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("queries", 1), ("results", 1), ("tokens", 64), ("turn_tokens", 8)):
            if getattr(self, name) < least:
                raise UserError(f"budget: {name} is {getattr(self, name)}, and has to be at least {least}")
        if not self.seconds > 0:
            raise UserError(f"budget: seconds is {self.seconds:g}, and has to be above 0")

    @property
    def final_tokens(self) -> int:
        """Tokens that are kept free for the final turn."""
        return max(16, min(self.turn_tokens, self.tokens // 8))


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token. The paper does not say what it evaluates with.
        top_p: of the likeliest tokens, those that together have this probability.
        seed: for endpoints and models that take one; None leaves it to chance.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise UserError(f"temperature is {self.temperature:g}, and has to be between 0 and 2")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p:g}, and has to be above 0 and at most 1")
