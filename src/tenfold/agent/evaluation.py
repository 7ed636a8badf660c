"""Scores of an agent on a set of questions: metrics that need no judge, their intervals, and how search grows with
difficulty.

Every finished question is a line of `rows.jsonl`, so that a run that was stopped goes on where it was. Rows hold
nothing that changes from run to run: the same turns and results give the same bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.agent.agent import Agent, Answer, run
from tenfold.agent.data import Question, cut_last_line, json_line, read_rows
from tenfold.agent.rewards import exact_match, f1, same_value, sub_exact_match, without_marks
from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.files import make_folder, read_json, write_bytes, write_json

if TYPE_CHECKING:
    from tenfold.agent.judges import Judge
    from tenfold.agent.judges import Kind as JudgeKind
    from tenfold.agent.judging import Judged

_RESAMPLES = 1_000
# Failures in a row after which the endpoint is taken to be gone.
_FAILURES = 5


@dataclass(frozen=True)
class Row:
    """One question, answered once.

    Args:
        id: the question's name.
        repeat: which of the repeats, from 0.
        difficulty: its hops, where they are known.
        answer: what the agent said.
        status: how it ended (see `Outcome`).
        correct: 1 where a right answer stands in it, dates and numbers however they are written.
        em: exact match.
        sub_em: a right answer stands in it, by the letter.
        f1: overlap of words.
        value: its first date or number is the right one; for other answers exact match.
        format_ok: whether every turn kept to the form.
        rounds: turns that searched.
        queries: searches.
        repeated: searches that had been asked before.
        opened: pages opened.
        tokens: length of the conversation.
        prompt_tokens: tokens read over all turns.
        completion_tokens: tokens written over all turns.
        citations: cited sentences.
        supported: those that their source carries.
    """

    id: str
    repeat: int
    difficulty: int | None
    answer: str
    status: str
    correct: float
    em: float
    sub_em: float
    f1: float
    value: float
    format_ok: bool
    rounds: int
    queries: int
    repeated: int
    opened: int
    tokens: int
    prompt_tokens: int
    completion_tokens: int
    citations: int
    supported: int


@dataclass(frozen=True)
class Metric:
    """A mean with its 95% bootstrap interval over questions."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Level:
    """The questions of one difficulty: how many, and means over them."""

    difficulty: int
    questions: int
    correct: Metric
    rounds: Metric
    queries: float
    pages: float
    tokens: float


@dataclass(frozen=True)
class Report:
    """What came of an evaluation.

    Args:
        questions: how many.
        repeats: how often each was asked.
        policy: the language model.
        metrics: name to mean and interval: correct, em, sub_em, f1, value, format, supported (of the citations).
        rounds: mean rounds of search.
        queries: mean searches.
        tokens: mean length of a conversation.
        repeated_queries: share of runs that searched for the same thing twice.
        statuses: how many runs ended in which way.
        levels: by difficulty, where it is known.
        spearman: rank correlation of rounds and difficulty over all rows; None where difficulty does not vary.
        spearman_p: its two-sided permutation p-value.
        failed: questions that have no row because the model or a search gave out.
        seconds: of this run of the evaluation.
        judged: what judges said, where any was asked.
    """

    questions: int
    repeats: int
    policy: str
    metrics: dict[str, Metric]
    rounds: float
    queries: float
    tokens: float
    repeated_queries: float
    statuses: dict[str, int]
    levels: tuple[Level, ...]
    spearman: float | None
    spearman_p: float | None
    failed: tuple[str, ...]
    seconds: float
    judged: tuple[Judged, ...] = ()


def evaluate(
    agent: Agent,
    questions: Sequence[Question],
    output: Path | None = None,
    repeats: int = 1,
    concurrency: int = 8,
    seed: int = 0,
    on_answer: Callable[[Question, Answer], None] | None = None,
    judge: Judge | None = None,
    judge_kinds: Sequence[JudgeKind] = (),
) -> tuple[Report, list[Row]]:
    """Ask all questions and score the answers.

    Args:
        agent: who answers.
        questions: the questions; their names have to differ.
        output: folder for `rows.jsonl` and `report.json`; a run that was stopped goes on there.
        repeats: how often each question is asked.
        concurrency: questions at the same time.
        seed: of the sampling, the intervals and the delimiters.
        on_answer: is given every new answer, for traces.
        judge: a language model that judges answers.
        judge_kinds: as which it is asked.

    Raises:
        UserError: no questions, names that repeat, a folder that holds another run, an endpoint that is gone.
    """
    if not questions:
        raise UserError("there are no questions to ask")
    names = [question.id for question in questions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two questions are called {twice!r}: names have to differ")
    if repeats < 1 or concurrency < 1:
        raise UserError("repeats and concurrency have to be at least 1")
    about = {
        "policy": agent.policy.name,
        "protocol": agent.environment.protocol.name,
        "budget": dataclasses.asdict(agent.budget),
        "engines": [engine.name for engine in agent.engines],
        "questions": hashlib.sha256(json.dumps([dataclasses.asdict(q) for q in questions]).encode()).hexdigest(),
        "repeats": repeats,
        "seed": seed,
    }
    done = _resume(output, about) if output is not None else {}
    todo = [(q, repeat) for repeat in range(repeats) for q in questions if (q.id, repeat) not in done]
    failed, seconds = run(_ask_all(agent, todo, done, output, concurrency, seed, on_answer))
    order = {name: position for position, name in enumerate(names)}
    rows = sorted(done.values(), key=lambda row: (row.repeat, order[row.id]))
    if not rows:
        raise UserError(failed[0] if failed else "no question was answered")
    report = summarise(rows, agent.policy.name, seed, failed, seconds)
    if judge is not None:
        from tenfold.agent.judging import judge_answers

        judged = run(judge_answers(judge, judge_kinds, questions, rows, output, concurrency, seed))
        report = dataclasses.replace(report, judged=tuple(judged))
    if output is not None:
        write_bytes(output / "rows.jsonl", b"".join(json_line(dataclasses.asdict(row)) for row in rows))
        write_json(output / "report.json", report)
    return report, rows


def chance(seed: int, repeat: int, name: str) -> tuple[int, str]:
    """What is drawn for one try of a question: a seed of the sampling, and a delimiter."""
    digest = hashlib.sha256(f"{seed}/{repeat}/{name}".encode()).hexdigest()
    return int(digest[:6], 16), digest[:16]


def _resume(output: Path, about: dict[str, Any]) -> dict[tuple[str, int], Row]:
    """The rows that a stopped run has left, without a last line that was cut."""
    make_folder(output)
    rows = output / "rows.jsonl"
    if (output / "run.json").exists():
        changed = [name for name, value in read_json(output / "run.json").items() if about.get(name) != value]
        if changed:
            raise UserError(f"{output}: holds an evaluation with another {', '.join(changed)}: choose another folder")
    elif rows.exists():
        raise UserError(f"{output}: holds rows of an unknown evaluation: choose another folder")
    write_json(output / "run.json", about)
    if not rows.exists():
        return {}
    cut_last_line(rows)
    fields = {field.name for field in dataclasses.fields(Row)}
    done = {}
    for number, row in read_rows(rows):
        if set(row) != fields:
            raise UserError(f"{rows}, line {number}: not a row of this version: choose another folder")
        done[row["id"], row["repeat"]] = Row(**row)
    return done


async def _ask_all(
    agent: Agent,
    todo: Sequence[tuple[Question, int]],
    done: dict[tuple[str, int], Row],
    output: Path | None,
    concurrency: int,
    seed: int,
    on_answer: Callable[[Question, Answer], None] | None,
) -> tuple[list[str], float]:
    loop = asyncio.get_running_loop()
    started = loop.time()
    waiting = list(reversed(todo))
    failed: list[str] = []
    in_a_row = 0
    file = (output / "rows.jsonl").open("ab") if output is not None else None
    with console.progress("asking", len(todo)) as bar:

        async def worker() -> None:
            nonlocal in_a_row
            while waiting and in_a_row < _FAILURES:
                question, repeat = waiting.pop()
                problem = ""
                try:
                    answer = await agent.ask_async(question.question, (), *chance(seed, repeat, question.id))
                    problem = answer.stopped_by if answer.status == "failed" else ""
                except UserError as error:
                    problem = str(error)
                if problem:
                    failed.append(f"{question.id}: {problem}")
                    in_a_row += 1
                    continue
                in_a_row = 0
                row = score(question, answer, repeat)
                done[question.id, repeat] = row
                if file is not None:
                    file.write(json_line(dataclasses.asdict(row)))
                    file.flush()
                if on_answer is not None:
                    on_answer(question, answer)
                bar.advance(note=question.id[:30])

        try:
            await asyncio.gather(*(worker() for _ in range(min(concurrency, len(todo)))))
        finally:
            if file is not None:
                file.close()
            await agent.policy.close()
    if in_a_row >= _FAILURES:
        again = "; run again with the same --output to go on" if output is not None else ""
        raise UserError(f"{_FAILURES} questions failed one after another, the last one with: {failed[-1]}{again}")
    return failed, loop.time() - started


def score(question: Question, answer: Answer, repeat: int = 0) -> Row:
    """The metrics of one answer; citation marks are no part of it."""
    said, golds = without_marks(answer.answer), question.answers
    covered, value = sub_exact_match(said, golds), same_value(said, golds)
    rollout = answer.rollout
    return Row(
        id=question.id,
        repeat=repeat,
        difficulty=question.hops,
        answer=answer.answer,
        status=answer.status,
        correct=max(covered, value),
        em=exact_match(said, golds),
        sub_em=covered,
        f1=f1(said, golds),
        value=value,
        format_ok=rollout.format_ok,
        rounds=rollout.rounds,
        queries=rollout.queries,
        repeated=rollout.repeated,
        opened=rollout.opened,
        tokens=rollout.tokens,
        prompt_tokens=rollout.prompt_tokens,
        completion_tokens=rollout.completion_tokens,
        citations=len(answer.citations),
        supported=sum(citation.supported for citation in answer.citations),
    )


def summarise(
    rows: Sequence[Row], policy: str = "", seed: int = 0, failed: Sequence[str] = (), seconds: float = 0.0
) -> Report:
    """Means, intervals and the search-intensity report of rows."""
    metrics = {
        name: bootstrap(_per_question(rows, name), seed)
        for name in ("correct", "em", "sub_em", "f1", "value", "format_ok")
    }
    cited = [row.supported / row.citations for row in rows if row.citations]
    if cited:
        metrics["supported"] = bootstrap(cited, seed)
    levels = []
    for difficulty in sorted({row.difficulty for row in rows if row.difficulty is not None}):
        at = [row for row in rows if row.difficulty == difficulty]
        levels.append(
            Level(
                difficulty,
                len({row.id for row in at}),
                bootstrap(_per_question(at, "correct"), seed),
                bootstrap(_per_question(at, "rounds"), seed),
                _mean([row.queries for row in at]),
                _mean([row.opened for row in at]),
                _mean([row.tokens for row in at]),
            )
        )
    known = [row for row in rows if row.difficulty is not None]
    correlation = spearman([float(row.difficulty or 0) for row in known], [float(row.rounds) for row in known], seed)
    return Report(
        questions=len({row.id for row in rows}),
        repeats=max(row.repeat for row in rows) + 1,
        policy=policy,
        metrics=metrics,
        rounds=_mean([row.rounds for row in rows]),
        queries=_mean([row.queries for row in rows]),
        tokens=_mean([row.tokens for row in rows]),
        repeated_queries=_mean([row.repeated > 0 for row in rows]),
        statuses={status: sum(row.status == status for row in rows) for status in sorted({row.status for row in rows})},
        levels=tuple(levels),
        spearman=correlation[0] if correlation else None,
        spearman_p=correlation[1] if correlation else None,
        failed=tuple(failed),
        seconds=seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _per_question(rows: Sequence[Row], name: str) -> list[float]:
    """The mean of each question over its repeats: questions are what is drawn at random, repeats are not."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.id, []).append(float(getattr(row, name)))
    return [_mean(group) for group in values.values()]


def bootstrap(values: Sequence[float], seed: int = 0) -> Metric:
    """The mean of values and its 95% percentile interval over 1,000 resamples."""
    draw = random.Random(seed)
    means = sorted(_mean(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return Metric(_mean(values), means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1])


def spearman(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Rank correlation, ties at their mean rank, and its two-sided p-value by 1,000 permutations.

    None where one side does not vary, or fewer than three pairs are given.
    """
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    one, other = _centred_ranks(first), _centred_ranks(second)
    scale = (sum(value * value for value in one) * sum(value * value for value in other)) ** 0.5
    correlation = sum(a * b for a, b in zip(one, other, strict=True)) / scale
    draw = random.Random(seed)
    shuffled = list(other)
    as_far = 0
    for _ in range(_RESAMPLES):
        draw.shuffle(shuffled)
        as_far += abs(sum(a * b for a, b in zip(one, shuffled, strict=True)) / scale) >= abs(correlation) - 1e-12
    return correlation, (as_far + 1) / (_RESAMPLES + 1)


def _centred_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for position in order[start:end]:
            ranks[position] = (start + end - 1) / 2 - (len(values) - 1) / 2
        start = end
    return ranks


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, as many of each difficulty as there can be, in their order; all where it is None."""
    if limit is None or limit >= len(questions):
        return list(questions)
    if limit < 1:
        raise UserError("limit has to be at least 1")
    levels: dict[int | None, list[int]] = {}
    for position, question in enumerate(questions):
        levels.setdefault(question.hops, []).append(position)
    waiting = [list(reversed(level)) for level in sorted(levels.values(), key=len)]
    taken: list[int] = []
    while len(taken) < limit:
        for level in waiting:
            if level and len(taken) < limit:
                taken.append(level.pop())
    return [questions[position] for position in sorted(taken)]


def tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """A report as tables for people: title, columns, rows."""
    times = f", {report.repeats} times each" if report.repeats > 1 else ""
    found = [
        (
            f"{report.policy}: {report.questions} questions{times}, {report.rounds:.2f} rounds and "
            f"{report.queries:.2f} queries a question",
            ["metric", "mean", "95% interval"],
            [
                [name, f"{metric.mean:.3f}", f"{metric.low:.3f} to {metric.high:.3f}"]
                for name, metric in report.metrics.items()
            ],
        )
    ]
    if report.judged:
        found.append(
            (
                f"Judged by {report.judged[0].model}",
                ["judge", "right", "95% interval", "kappa with the rule", "no verdict", "two alternatives"],
                [
                    [
                        judged.kind,
                        f"{judged.passed.mean:.3f}",
                        f"{judged.passed.low:.3f} to {judged.passed.high:.3f}",
                        "-" if judged.kappa is None else f"{judged.kappa:.3f}",
                        str(judged.silent),
                        str(judged.alternatives),
                    ]
                    for judged in report.judged
                ],
            )
        )
    if report.levels:
        grows = "searches do not vary" if report.spearman is None else f"Spearman {report.spearman:.2f}"
        chance = "" if report.spearman_p is None else f" (p = {report.spearman_p:.3g})"
        found.append(
            (
                f"Search by difficulty: rounds against hops, {grows}{chance}",
                ["hops", "questions", "correct", "rounds", "queries", "pages opened", "tokens"],
                [
                    [
                        str(level.difficulty),
                        str(level.questions),
                        f"{level.correct.mean:.3f}",
                        f"{level.rounds.mean:.2f}",
                        f"{level.queries:.2f}",
                        f"{level.pages:.2f}",
                        f"{level.tokens:.0f}",
                    ]
                    for level in report.levels
                ],
            )
        )
    return found
