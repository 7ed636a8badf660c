"""Judges over a whole evaluation: the share that passes, how it agrees with the rules, how often a judge was silent."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenfold.agent.data import Question, json_line
from tenfold.agent.evaluation import Metric, Row, bootstrap
from tenfold.agent.judges import Judge, Kind, Verdict, kappa, prompt_sha
from tenfold.core.files import write_bytes


@dataclass(frozen=True)
class Judged:
    """What a judge said of all answers.

    Args:
        kind: `loose` or `strict`.
        model: the judge.
        prompt_sha: of its prompts.
        passed: share of right answers.
        silent: verdicts that were asked for and not given; they count as votes against.
        alternatives: answers that failed because they name two alternatives.
        kappa: Cohen's kappa with the rule `correct`; None where chance alone explains all.
    """

    kind: str
    model: str
    prompt_sha: str
    passed: Metric
    silent: int
    alternatives: int
    kappa: float | None


async def judge_answers(
    judge: Judge,
    kinds: Sequence[Kind],
    questions: Sequence[Question],
    rows: Sequence[Row],
    output: Path | None,
    concurrency: int,
    seed: int,
) -> list[Judged]:
    """Let a judge read every answer. The raw votes go to `judged.jsonl`, what was judged before is in its cache."""
    asked = {question.id: question for question in questions}
    turn = asyncio.Semaphore(concurrency)
    found = []
    lines = []

    async def one(kind: Kind, row: Row) -> Verdict:
        question = asked[row.id]
        async with turn:
            return await judge.judge(kind, question.question, question.answers, row.answer, question.checklist)

    try:
        for kind in kinds:
            verdicts = await asyncio.gather(*(one(kind, row) for row in rows))
            passed: dict[str, list[float]] = {}
            for row, verdict in zip(rows, verdicts, strict=True):
                passed.setdefault(row.id, []).append(float(verdict.passed))
                lines.append({"id": row.id, "repeat": row.repeat, **dataclasses.asdict(verdict)})
            found.append(
                Judged(
                    kind,
                    judge.policy.name,
                    prompt_sha(kind),
                    bootstrap([sum(group) / len(group) for group in passed.values()], seed),
                    sum(verdict.silent for verdict in verdicts),
                    sum(verdict.reason == "names two alternatives" for verdict in verdicts),
                    kappa([row.correct > 0 for row in rows], [verdict.passed for verdict in verdicts]),
                )
            )
    finally:
        await judge.policy.close()
    if output is not None:
        write_bytes(output / "judged.jsonl", b"".join(map(json_line, lines)))
    return found
