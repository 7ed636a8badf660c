"""Long answers: an outline, a run of search for each section, one list of sources, citations checked.

The sections are searched for at the same time, each with its share of the budget's rounds. What a section's run could
not finish is said in the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tenfold.agent.instructions import Wording, wording
from tenfold.agent.outcome import OnEvent, Rollout, Sources, Status
from tenfold.agent.parts import merged, record_end, taken
from tenfold.agent.policies import PolicyError, complete, read_object
from tenfold.agent.protocol import escape, framed, new_delimiter
from tenfold.agent.trace import Trace
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent, Answer

MOST_SECTIONS = 6
# Pages that the outline is made from, and how much of each.
_FIRST_PAGES, _FIRST_CHARACTERS = 8, 300
# Parts of the time that the outline and the sections may take.
_OUTLINE_SHARE, _SECTION_SHARE = 0.25, 0.95
_LEAST_OUTLINE_TOKENS = 1_000


@dataclass(frozen=True)
class Section:
    """A section as it was planned: its heading, and what has to be found out for it."""

    heading: str
    find: str


async def write_report(agent: Agent, question: str, seed: int | None = None, on_event: OnEvent | None = None) -> Answer:
    """Answer a question with a report.

    Args:
        agent: who plans, searches and writes. Its budget is that of the whole report: rounds are shared out over the
            sections, and each section's conversation may be as long as the budget's tokens.
        question: what the report is about.
        seed: of the sampling.
        on_event: is told what happens.

    Raises:
        UserError: as `Agent.ask`.
    """
    started = time.monotonic()
    trace = Trace(secrets=agent.secrets)
    tell = trace.recording(on_event)
    start = {"question": question, "policy": agent.policy.name, "protocol": agent.environment.protocol.name}
    tell("run_start", {**start, "budget": asdict(agent.budget), "delimiter": "", "seed": seed, "mode": "report"})
    words = wording(question)
    title, sections = await plan(agent, question, words, seed)
    tell("outline", {"title": title, "sections": [asdict(section) for section in sections]})
    rounds = _shares(agent.budget.rounds, len(sections))
    seconds = _SECTION_SHARE * (agent.budget.seconds - (time.monotonic() - started))
    if seconds <= 0:
        raise UserError(f"the outline took all of the {agent.budget.seconds:.0f} s: allow more")
    kept: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in sections]

    async def write(position: int) -> Rollout:
        section = sections[position]
        others = "; ".join(other.heading for other in sections if other is not section) or "-"
        asked = words.section.format(question=question, heading=section.heading, find=section.find, others=others)
        budget = dataclasses.replace(agent.budget, rounds=rounds[position], seconds=seconds)

        def hear(kind: str, data: dict[str, Any]) -> None:
            kept[position].append((kind, {**data, "section": section.heading}))
            if on_event is not None and kind != "run_start":
                on_event(kind, data)

        return await agent.environment.within(budget).run(asked, (), seed, on_event=hear)

    runs = await asyncio.gather(*(write(position) for position in range(len(sections))))
    if all(run.status == "failed" for run in runs):
        raise UserError(runs[0].stopped_by)
    sources = Sources()
    parts = [f"# {title}"] if title else []
    for section, run in zip(sections, runs, strict=True):
        text, _ = taken(run, sources)
        parts.append(f"## {section.heading}\n\n{text or f'({run.stopped_by or run.status})'}")
    for events in kept:
        for kind, data in events:
            if kind in ("turn", "engine", "fetch", "inject", "error"):
                trace.record(kind, data)
    status, stopped_by = _ending(sections, runs)
    report = "\n\n".join(parts)
    rollout = merged(question, report, status, stopped_by, sources.pages, runs, seconds=time.monotonic() - started)
    record_end(trace, rollout)
    return await agent.checked(rollout, trace, tell)


async def plan(agent: Agent, question: str, words: Wording, seed: int | None) -> tuple[str, list[Section]]:
    """Title and sections of a report; one section that is the whole question where the model gives no outline.

    Raises:
        UserError: the endpoint or every engine is gone.
    """
    found = await agent.search.search(question, _FIRST_PAGES)
    mark = new_delimiter()
    pages = "\n".join(
        framed(f"{escape(page.title)}: {escape(' '.join(page.passages)[:_FIRST_CHARACTERS])}", mark) for page in found
    )
    # A section without a search would be written from memory.
    most = max(1, min(MOST_SECTIONS, agent.budget.rounds))
    prompt = words.outline.format(question=question, pages=pages or "-", most=most)
    seconds = _OUTLINE_SHARE * agent.budget.seconds
    try:
        said = await complete(agent.policy, prompt, max(_LEAST_OUTLINE_TOKENS, agent.budget.turn_tokens), seconds, seed)
    except PolicyError as error:
        if error.problem in ("unreachable", "refused", "no model", "context"):
            raise
        said = ""
    outline = read_object(said) or {}
    listed = outline.get("sections")
    sections = [
        Section(" ".join(item["heading"].split()), str(item.get("find") or item["heading"]))
        for item in (listed if isinstance(listed, list) else [])
        if isinstance(item, dict) and isinstance(item.get("heading"), str) and item["heading"].strip()
    ]
    title = outline.get("title")
    return (
        " ".join(title.split()) if isinstance(title, str) else "",
        sections[:most] or [Section(question, question)],
    )


def _shares(rounds: int, parts: int) -> list[int]:
    """Rounds shared out as evenly as they go, the first parts getting what is left over."""
    whole, left = divmod(rounds, parts)
    return [whole + (part < left) for part in range(parts)]


def _ending(sections: list[Section], runs: list[Rollout]) -> tuple[Status, str]:
    """How the report ended: by itself only if every section did."""
    unfinished = [
        f"{section.heading}: {run.stopped_by or run.status}"
        for section, run in zip(sections, runs, strict=True)
        if run.status != "answered" or run.stopped_by
    ]
    return ("forced", "; ".join(unfinished)) if unfinished else ("answered", "")
