"""How hard a puzzle is: four trials of an agent, and how many of them are right (section 3.1 of the paper).

The paper's thresholds are in a formula that is not in its text. Ours: 4 of 4 easy, 2 or 3 medium, 1 hard, 0 outlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tenfold.agent.evaluation import chance
from tenfold.agent.webpuzzle.checks import is_right
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent
    from tenfold.agent.judges import Judge

Difficulty = Literal["easy", "medium", "hard", "outlier"]
DIFFICULTIES: tuple[Difficulty, ...] = ("easy", "medium", "hard", "outlier")


@dataclass(frozen=True)
class Thresholds:
    """Right trials from which a puzzle is easy, medium, hard; below the last one it is an outlier."""

    easy: int = 4
    medium: int = 2
    hard: int = 1

    def __post_init__(self) -> None:
        if not self.easy > self.medium > self.hard >= 1:
            raise UserError(
                f"thresholds are {self.easy}, {self.medium}, {self.hard}: they have to fall, down to 1 at the least"
            )

    def difficulty(self, correct: int) -> Difficulty:
        """The tag of a puzzle of which so many trials were right."""
        for name in ("easy", "medium", "hard"):
            if correct >= getattr(self, name):
                return name
        return "outlier"


async def try_once(row: dict[str, Any], trial: int, agent: Agent, judge: Judge | None, seed: int) -> dict[str, Any]:
    """One trial: what the agent said, and whether it is right by the strict judge, or by the rules without one.

    Raises:
        UserError: the agent's or the judge's endpoint is gone.
    """
    answer = await agent.ask_async(row["question"], (), *chance(seed, trial, row["id"]))
    if answer.status == "failed":
        raise UserError(answer.stopped_by)
    if judge is not None:
        verdict = await judge.judge("strict", row["question"], row["answers"], answer.answer, row["checklist"])
        correct, votes = verdict.passed, list(verdict.votes)
    else:
        correct, votes = is_right(answer.answer, row["answers"]), []
    return {
        "id": row["id"],
        "trial": trial,
        "correct": correct,
        "votes": votes,
        "answer": answer.answer,
        "status": answer.status,
        "rounds": answer.rounds,
        "queries": answer.queries,
    }
