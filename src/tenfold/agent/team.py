"""A planner and researchers, in the spirit of DeepDiver V2: findings are shared, contexts are not.

The planner runs in the same loop as a single agent. Its searches are tasks: each starts a researcher, an agent with a
conversation of its own, and what comes back is the researcher's finding instead of pages. The budget's rounds are those
of all researchers together. The planner cites findings; in the answer these marks become the researchers' sources.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tenfold.agent.citations import cited, renumber_marks
from tenfold.agent.environment import Environment
from tenfold.agent.instructions import Wording, wording
from tenfold.agent.outcome import OnEvent, Rollout, Sources
from tenfold.agent.parts import merged, record_end, taken
from tenfold.agent.protocol import Found, Limits, Message, Protocol, ToolCall, Turn
from tenfold.agent.search import Result, SearchError
from tenfold.agent.trace import Trace
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent, Answer

# Searches of one researcher at the most, and the part of the time left that it may take.
ROUNDS_OF_A_TASK = 3
_SHARE_OF_TIME = 0.7


class _Planning:
    """A protocol that tells its model to plan."""

    def __init__(self, protocol: Protocol, rounds: int) -> None:
        self._protocol, self._rounds, self.name = protocol, rounds, protocol.name

    def first(self, question: str, limits: Limits) -> list[Message]:
        """The messages that begin a conversation, with the planner's part before the last one."""
        messages = self._protocol.first(question, limits)
        told = wording(question).planner.format(rounds=self._rounds)
        return [*messages[:-1], {**messages[-1], "content": f"{told}\n\n{messages[-1]['content']}"}]

    def tools(self, limits: Limits) -> list[dict[str, Any]]:
        """As the protocol has them."""
        return self._protocol.tools(limits)

    def parse(self, text: str, reasoning: str, calls: Sequence[ToolCall], limits: Limits) -> Turn:
        """As the protocol reads it."""
        return self._protocol.parse(text, reasoning, calls, limits)

    def results(self, turn: Turn, found: Sequence[Found], note: str, words: Wording, delimiter: str) -> list[Message]:
        """As the protocol shows them."""
        return self._protocol.results(turn, found, note, words, delimiter)


@dataclass
class _Researchers:
    """An engine whose searches are tasks."""

    agent: Agent
    seed: int | None
    tell: OnEvent
    left: int
    until: float
    name: str = "researcher"
    runs: list[Rollout] = field(default_factory=list)
    # The runs behind findings, by the findings' addresses.
    findings: dict[str, Rollout] = field(default_factory=dict)

    async def search(self, query: str, count: int) -> list[Result]:
        """Let a researcher work on a task; its finding as the only result. Raises SearchError."""
        rounds = min(ROUNDS_OF_A_TASK, self.left)
        seconds = _SHARE_OF_TIME * (self.until - time.monotonic())
        if rounds < 1 or seconds <= 0:
            what = "searches" if rounds < 1 else "time"
            raise SearchError(self.name, f"the team has no {what} left: answer with what was found")
        # Tasks of one turn run at the same time: what one may use is taken off at once, what is left of it given back.
        self.left -= rounds
        budget = dataclasses.replace(self.agent.budget, rounds=rounds, seconds=seconds)
        run = await self.agent.environment.within(budget).run(query, (), self.seed, on_event=self._pass_on)
        self.left += rounds - run.rounds
        self.runs.append(run)
        if run.status == "failed":
            raise SearchError(self.name, run.stopped_by)
        plain = renumber_marks(run.answer, {})
        url = f"finding:{len(self.findings) + 1}"
        self.findings[url] = run
        about = {"task": query, "finding": plain, "url": url, "rounds": run.rounds, "tokens": run.tokens}
        self.tell("finding", about)
        digest = hashlib.sha256(plain.encode()).hexdigest()
        return [Result(url, query, plain, None, 1.0, (plain,) if plain else (), self.name, digest, "")]

    def _pass_on(self, kind: str, data: dict[str, Any]) -> None:
        if kind in ("turn", "fetch", "error"):
            self.tell(f"researcher {kind}", data)


async def ask_team(
    agent: Agent,
    question: str,
    history: Sequence[Message] = (),
    seed: int | None = None,
    delimiter: str | None = None,
    on_event: OnEvent | None = None,
) -> Answer:
    """Answer a question with a planner and researchers.

    The planner has as many turns with tasks as the budget has rounds, and each conversation may be as long as the
    budget's tokens; `tokens` of the answer counts all of them.

    Raises:
        UserError: as `Agent.ask`.
    """
    started = time.monotonic()
    trace = Trace(secrets=agent.secrets)

    def tell(kind: str, data: dict[str, Any]) -> None:
        # The planner's sources are findings, and its last words cite them: the record has the real sources in the end.
        if kind not in ("source", "final", "usage"):
            trace.record(kind, {**data, "mode": "team"} if kind == "run_start" else data)
        if on_event is not None:
            on_event(kind.removeprefix("researcher "), data)

    budget = agent.budget
    team = _Researchers(agent, seed, tell, budget.rounds, started + budget.seconds)
    planning = _Planning(agent.environment.protocol, budget.rounds)
    planner = Environment(agent.policy, team, planning, dataclasses.replace(budget, results=1))
    plan = await planner.run(question, history, seed, delimiter, tell)
    if plan.status == "failed" and not plan.replies:
        raise UserError(plan.stopped_by)
    sources = Sources()
    numbers = {
        mark: taken(team.findings[plan.sources[mark - 1].url], sources)[1]
        for mark in cited(plan.answer)
        if 1 <= mark <= len(plan.sources)
    }
    answer = renumber_marks(plan.answer, numbers)
    rollout = merged(
        question,
        answer,
        plan.status,
        plan.stopped_by,
        sources.pages,
        team.runs,
        [plan],
        time.monotonic() - started,
    )
    record_end(trace, rollout)
    return await agent.checked(rollout, trace, tell)
