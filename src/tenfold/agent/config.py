"""Budgets and sampling of the agent, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tenfold.core.config import ModelEntry
from tenfold.core.console import UserError

# The room works with whatever language model the user has; its own policy knows nothing but a closed world.
MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        name="tenfold-seeker",
        room="agent",
        summary="small policy that searches a closed world of people and relations, trained by this project",
        source="embedded",
        location="tenfold-seeker.safetensors",
        parameters=154_816,
        licence="Apache-2.0",
        bytes=622_392,
        card="README.md#model-card",
    ),
)


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


@dataclass(frozen=True)
class SftConfig:
    """A cold start. The paper (section 3.2) gives none of these values; the defaults are ours, for a 7B model.

    Args:
        steps: optimiser steps.
        batch: examples in a step.
        learning_rate: peak, after a warm-up over 3 % of the steps; then it falls along a cosine to a tenth.
        clip_norm: largest gradient norm.
        checkpoint_every: steps between checkpoints.
        seed: of the order of the examples.
    """

    steps: int = 200
    batch: int = 64
    learning_rate: float = 1e-5
    clip_norm: float = 1.0
    checkpoint_every: int = 50
    seed: int = 0


@dataclass(frozen=True)
class GrpoConfig:
    """Reinforcement learning. Values are the paper's (sections 5.4 and E.8) where it gives them.

    Args:
        steps: optimiser steps; each uses its rollouts once.
        questions: in a step.
        group: rollouts of a question.
        temperature: of their sampling.
        learning_rate: constant after the warm-up.
        warmup: steps (not given by the paper).
        beta: weight of the KL penalty.
        epsilon: clip range (not given by the paper).
        epsilon_high: clip range above 1; None takes `epsilon`.
        loss_type: how token losses become one number, see `grpo_loss`.
        scale: advantages in standard deviations of their group, or as they are.
        strict_after: step from which the strict grader decides.
        extra: give the extra search reward.
        mask_truncated: leave rollouts that end without an answer out of the loss.
        clip_norm: largest gradient norm (not given by the paper).
        entropy_floor: mean entropy of the policy's tokens below which it counts as collapsing.
        checkpoint_every: steps between checkpoints.
        seed: of questions and sampling.
    """

    steps: int = 120
    questions: int = 32
    group: int = 14
    temperature: float = 0.9
    learning_rate: float = 1e-6
    warmup: int = 10
    beta: float = 0.001
    epsilon: float = 0.2
    epsilon_high: float | None = None
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    scale: Literal["group", "none"] = "group"
    strict_after: int = 80
    extra: bool = True
    mask_truncated: bool = False
    clip_norm: float = 1.0
    entropy_floor: float = 0.05
    checkpoint_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"grpo: a group needs at least 2 rollouts, not {self.group}")
        if not 0 < self.temperature <= 2:
            raise UserError(f"grpo: temperature is {self.temperature:g}, and has to be above 0 and at most 2")
        for name in ("steps", "questions"):
            if getattr(self, name) < 1:
                raise UserError(f"grpo: {name} must be at least 1, not {getattr(self, name)}")
