"""An answer that is put together from several runs: one list of sources, one count of everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tenfold.agent.citations import cited, renumber_marks
from tenfold.agent.outcome import Rollout, Sources, Status, page_event, source_event
from tenfold.agent.search import Result
from tenfold.agent.trace import Trace


def taken(rollout: Rollout, sources: Sources) -> tuple[str, list[int]]:
    """The answer of a run with its marks in the numbers of `sources`, which grow by what it cites, and these numbers.

    A mark that no source has stands for nothing, and goes.
    """
    numbers = {
        mark: (sources.number(rollout.sources[mark - 1])[0],)
        for mark in cited(rollout.answer)
        if 1 <= mark <= len(rollout.sources)
    }
    return renumber_marks(rollout.answer, numbers), list(dict.fromkeys(number for (number,) in numbers.values()))


def merged(
    question: str,
    answer: str,
    status: Status,
    stopped_by: str,
    sources: Sequence[Result],
    searching: Sequence[Rollout],
    others: Sequence[Rollout] = (),
    seconds: float = 0.0,
) -> Rollout:
    """Several runs as one: sums of what they cost, the turns of all, no token ids.

    Args:
        question: as it was asked.
        answer: the whole answer.
        status: how it ended.
        stopped_by: the limit that was met.
        sources: of the answer's marks.
        searching: the runs that searched; their rounds, queries and pages count.
        others: runs that only planned; their tokens count.
        seconds: of all.
    """
    runs = [*searching, *others]
    first = runs[0]
    return dataclasses.replace(
        first,
        question=question,
        answer=answer,
        status=status,
        stopped_by=stopped_by,
        turns=tuple(turn for run in runs for turn in run.turns),
        replies=tuple(reply for run in runs for reply in run.replies),
        sources=tuple(sources),
        rounds=sum(run.rounds for run in searching),
        queries=sum(run.queries for run in searching),
        repeated=sum(run.repeated for run in searching),
        opened=sum(run.opened for run in searching),
        format_ok=all(run.format_ok for run in runs),
        ids=(),
        mask=(),
        tokens=sum(run.tokens for run in runs),
        prompt_tokens=sum(run.prompt_tokens for run in runs),
        completion_tokens=sum(run.completion_tokens for run in runs),
        seconds=seconds,
        problems=tuple(problem for run in runs for problem in run.problems),
    )


def record_end(trace: Trace, rollout: Rollout) -> None:
    """Put the sources, the answer and the cost of a merged run into its record."""
    for number, page in enumerate(rollout.sources, start=1):
        trace.record("page", page_event(page))
        trace.record("source", source_event(number, page))
    for kind, data in rollout.last_events():
        trace.record(kind, data)
