"""The loop: a turn of the model, what it asks for, the next turn; its budgets, its record, its token masks.

The same loop serves `ask`, evaluation and training. It gives the model nothing but results of searches and pages among
them, and stops at the first of five limits: rounds, tokens, seconds, turns that keep to no form, searches in a circle.
At a limit the model gets one final turn without tools.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tenfold.agent.addresses import is_web
from tenfold.agent.config import Budget
from tenfold.agent.instructions import Wording, wording
from tenfold.agent.outcome import OnEvent, Rollout, Sources, Status, page_event, page_key, source_event
from tenfold.agent.passages import TOKENS_PER_ROUND, best_passages, joined
from tenfold.agent.policies import Conversation, OnText, Policy, PolicyError, Reply
from tenfold.agent.protocol import Found, Limits, Message, Protocol, Shown, ToolCall, Turn, escape, new_delimiter
from tenfold.agent.search import EmptyIndex, Engine, KeyMissing, Reader, Result, fit, fit_round, normalise_query
from tenfold.core.console import UserError

# Turns in a row that keep to no form, and rounds in a row that search for nothing new, before the final turn.
_INVALID_TURNS, _REPEATED_ROUNDS = 2, 2
# The part of the time after which no further round begins.
_SOFT = 0.8
# What frames a result (delimiters, title, address), in tokens; the least room in which showing one makes sense.
_FRAME_TOKENS, _LEAST_ROOM = 120, 60
_PAGE_TOKENS = 3_000


class Environment:
    """Runs questions. One object serves many at a time.

    Args:
        policy: who writes the turns.
        engine: who searches.
        protocol: how turns are read and results shown.
        budget: what one question may cost.
        reader: who opens pages; None offers no pages.
        open_any_url: let the model open addresses that are not among the results.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        protocol: Protocol,
        budget: Budget | None = None,
        reader: Reader | None = None,
        open_any_url: bool = False,
    ) -> None:
        self.policy, self.engine, self.protocol = policy, engine, protocol
        self.budget = budget or Budget()
        self.reader, self.open_any_url = reader, open_any_url

    def within(self, budget: Budget) -> Environment:
        """The same one with another budget."""
        return Environment(self.policy, self.engine, self.protocol, budget, self.reader, self.open_any_url)

    async def run(
        self,
        question: str,
        history: Sequence[Message] = (),
        seed: int | None = None,
        delimiter: str | None = None,
        on_event: OnEvent | None = None,
        on_text: OnText | None = None,
    ) -> Rollout:
        """Answer one question.

        Args:
            question: the question.
            history: earlier questions and answers, as messages of the roles user and assistant.
            seed: for policies that sample.
            delimiter: stands around the text of pages; None draws one that no page can know.
            on_event: is told everything as it happens: the kind and a dictionary that JSON can hold.
            on_text: is told the model's words as they are written.

        Raises:
            UserError: the question does not fit the budget; no engine can work as it is set up.
        """
        run = _Run(self, question, delimiter or new_delimiter(), on_event or _nobody)
        return await run.play(history, seed, on_text)


def _nobody(kind: str, data: dict[str, Any]) -> None:
    """Is told what nobody listens to."""


@dataclass
class _Run:
    """The state of one question."""

    environment: Environment
    question: str
    delimiter: str
    tell: OnEvent
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    sources: Sources = field(default_factory=Sources)
    shown: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)
    asked: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    rounds: int = 0
    queries: int = 0
    repeated: int = 0
    opened: int = 0
    fresh: list[bool] = field(default_factory=list)
    calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        budget = self.environment.budget
        self.budget = budget
        self.words: Wording = wording(self.question)
        self.limits = Limits(budget.rounds, budget.queries, budget.results, self.environment.reader is not None)

    async def play(self, history: Sequence[Message], seed: int | None, on_text: OnText | None) -> Rollout:
        protocol, budget = self.environment.protocol, self.budget
        conversation = self.environment.policy.start(protocol.tools(self.limits) if budget.rounds else (), seed)
        first = protocol.first(self.question, self.limits)
        if budget.rounds == 0:
            first[-1] = {**first[-1], "content": f"{first[-1]['content']}\n\n{self.words.final}"}
        conversation.add([*history, *first])
        if conversation.length() + budget.final_tokens + (_LEAST_ROOM if budget.rounds else 0) > budget.tokens:
            raise UserError(
                f"the instruction and the question take {conversation.length()} tokens, and the budget is "
                f"{budget.tokens}: allow more, or ask a shorter question"
            )
        self.tell(
            "run_start",
            {
                "question": self.question,
                "policy": self.environment.policy.name,
                "protocol": protocol.name,
                "budget": dataclasses.asdict(budget),
                "delimiter": self.delimiter,
                "seed": seed,
                "history": list(history),
            },
        )
        stopped_by = "rounds" if budget.rounds == 0 else ""
        try:
            while not stopped_by:
                turn = await self._turn(conversation, on_text)
                if turn is None:
                    conversation.add([{"role": "user", "content": self.words.final}])
                    stopped_by = "seconds"
                elif turn.action == "answer":
                    cut = "length of a turn" if self.replies[-1].finish != "stop" else ""
                    return self._end(conversation, turn.answer, "answered", cut)
                else:
                    stopped_by = await self._act(conversation, turn)
            return await self._final(conversation, stopped_by, on_text)
        except PolicyError as error:
            self.tell("error", {"problem": error.problem, "message": str(error)})
            return self._end(conversation, "", "failed", str(error))

    def _left(self) -> float:
        """Seconds until the end."""
        return self.budget.seconds - (time.monotonic() - self.started)

    def _late(self) -> bool:
        return self._left() <= (1 - _SOFT) * self.budget.seconds

    def _room(self, conversation: Conversation) -> int:
        """Tokens that a round may still add, with the final turn kept free."""
        return self.budget.tokens - conversation.length() - self.budget.final_tokens

    async def _turn(self, conversation: Conversation, on_text: OnText | None) -> Turn | None:
        """The model's next turn; None where it took so long that there is time for a final one only."""
        room = min(self.budget.turn_tokens, self._room(conversation))
        seconds = max(0.01, self._left() - (1 - _SOFT) * self.budget.seconds)
        try:
            return self._read(await conversation.reply(room, seconds, on_text))
        except PolicyError as error:
            if error.problem != "timeout" or not self._late():
                raise
            self.tell("error", {"problem": error.problem, "message": str(error)})
            return None

    def _read(self, reply: Reply) -> Turn:
        turn = self.environment.protocol.parse(reply.text, reply.reasoning, reply.calls, self.limits)
        if turn.action == "invalid" and reply.finish == "length":
            turn = dataclasses.replace(turn, problem=self.words.too_long.format(tokens=reply.completion_tokens))
        self.replies.append(reply)
        self.turns.append(turn)
        self.calls = turn.calls
        if self.tell is not _nobody:
            self.tell(
                "turn",
                {
                    "action": turn.action,
                    "thinking": turn.thinking,
                    "queries": list(turn.queries),
                    "pages": list(turn.pages),
                    "format_ok": turn.format_ok,
                    "problem": turn.problem,
                    "dropped": turn.dropped,
                    "reply": dataclasses.asdict(reply),
                },
            )
        return turn

    async def _act(self, conversation: Conversation, turn: Turn) -> str:
        """Do what a turn asks for and show what came of it; the limit that is met by it, if one is."""
        if turn.action == "invalid":
            bad = itertools.takewhile(lambda item: item.action == "invalid", reversed(self.turns))
            stopped_by = "turns that keep to no form" if sum(1 for _ in bad) >= _INVALID_TURNS else ""
            return self._inject(conversation, turn, [], [self.words.invalid.format(problem=turn.problem)], stopped_by)
        self.rounds += 1
        found, fresh = await self._search(conversation, turn)
        self.fresh.append(fresh)
        notes = []
        if turn.dropped:
            notes.append(self.words.dropped.format(count=turn.dropped, limit=self.budget.queries))
        if not fresh:
            notes.append(self.words.loop)
        stopped_by = ""
        if self.rounds >= self.budget.rounds:
            stopped_by = "rounds"
        elif len(self.fresh) >= _REPEATED_ROUNDS and not any(self.fresh[-_REPEATED_ROUNDS:]):
            stopped_by = "searches in a circle"
        return self._inject(conversation, turn, found, notes, stopped_by)

    def _inject(
        self, conversation: Conversation, turn: Turn, found: Sequence[Found], notes: list[str], stopped_by: str
    ) -> str:
        """Put what was found before the model, with the call for a final turn where a limit is met; that limit."""

        def messages(more: Sequence[str]) -> list[Message]:
            shown = dataclasses.replace(turn, calls=self.calls)
            note = "\n".join([*notes, *more])
            return self.environment.protocol.results(shown, found, note, self.words, self.delimiter)

        added = messages([])
        if not stopped_by:
            cost = sum(conversation.count(str(message["content"])) for message in added)
            if self._room(conversation) - cost < _LEAST_ROOM:
                stopped_by = "tokens"
            elif self._late():
                stopped_by = "seconds"
        if stopped_by:
            notes = [] if turn.action != "invalid" else notes
            added = messages([self.words.final])
        before = conversation.length()
        conversation.add(added)
        if self.tell is not _nobody:
            self.tell(
                "inject",
                {
                    "found": [dataclasses.asdict(item) for item in found],
                    "note": "\n".join([*notes, *([self.words.final] if stopped_by else [])]),
                    "tokens": conversation.length() - before,
                },
            )
        return stopped_by

    async def _search(self, conversation: Conversation, turn: Turn) -> tuple[list[Found], bool]:
        """What came of a turn's queries and pages, and whether any of them was new."""
        room = min(TOKENS_PER_ROUND, self._room(conversation))
        new = [query for query in turn.queries if normalise_query(query) not in self.asked]
        self.queries += len(turn.queries)
        self.repeated += len(turn.queries) - len(new)
        time_left = max(0.05, self._left() - (1 - _SOFT) * self.budget.seconds)
        answers = dict(zip(new, await asyncio.gather(*(self._ask(query, time_left) for query in new)), strict=True))
        pages = [await self._open(page, time_left) for page in turn.pages]
        count = sum(len(answer) for answer in answers.values() if not isinstance(answer, str)) + len(pages)
        room -= _FRAME_TOKENS * max(1, count)
        lists = [answer if not isinstance(answer, str) else [] for answer in answers.values()]
        fitted = dict(zip(answers, fit_round(lists, max(0, room), conversation.count), strict=True))
        found = []
        for query in turn.queries:
            if query in answers:
                answer = answers[query]
                found.append(
                    Found(query, note=answer) if isinstance(answer, str) else self._show(query, answer, fitted[query])
                )
            else:
                marks = "".join(f"[{number}]" for number in self.asked[normalise_query(query)]) or "-"
                found.append(Found(query, note=self.words.asked_before.format(numbers=marks)))
        # What the results take is counted only where pages follow them.
        used = sum(conversation.count(shown.text) for item in found for shown in item.results) if turn.pages else 0
        for page, text in zip(turn.pages, pages, strict=True):
            found.append(self._show_page(page, text, max(0, room - used), conversation))
            used += sum(conversation.count(shown.text) for shown in found[-1].results)
        return found, bool(new) or any(not isinstance(page, str) for page in pages)

    async def _ask(self, query: str, seconds: float) -> list[Result] | str:
        """Results of a query, or the note that says why there are none."""
        started = time.monotonic()
        problem = ""
        results: list[Result] = []
        try:
            async with asyncio.timeout(seconds):
                results = await self.environment.engine.search(query, self.budget.results)
        except (KeyMissing, EmptyIndex):
            raise  # no search of this run can work
        except UserError as error:
            problem = str(error)
        except TimeoutError:
            problem = f"no results within {seconds:.0f} s"
        self.tell(
            "search",
            {
                "query": query,
                "results": [[self._keep(result), list(result.passages)] for result in results],
                "problem": problem,
                "seconds": round(time.monotonic() - started, 4),
            },
        )
        if problem:
            self.problems.append(f"{query}: {problem}")
            return self.words.search_failed.format(reason=escape(problem))
        self.asked[normalise_query(query)] = []
        return results or self.words.nothing_found

    def _show(self, query: str, results: Sequence[Result], fitted: Sequence[Result]) -> Found:
        texts = {result.url: result for result in fitted}
        shown = []
        for result in results:
            if result.url not in texts:
                continue
            number = self._number(result)
            self.asked[normalise_query(query)].append(number)
            passages = texts[result.url].passages
            again = (number, passages) in self.shown
            self.shown.add((number, passages))
            text = f"({self.words.shown_before})" if again else joined(passages)
            shown.append(Shown(number, result.title, result.url, result.date, text))
        return Found(query, tuple(shown), "" if shown else self.words.no_room)

    def _number(self, result: Result) -> int:
        """The number of a source, given when it is first shown."""
        number, new = self.sources.number(result)
        if new:
            self._keep(result)
            self.tell("source", source_event(number, result))
        return number

    def _keep(self, page: Result) -> str:
        """The key of a page in the record, into which its text goes once."""
        key = page_key(page)
        if key not in self.kept:
            self.kept.add(key)
            if self.tell is not _nobody:
                self.tell("page", page_event(page))
        return key

    async def _open(self, page: str, seconds: float) -> Result | str:
        """A page as a result, or the note that says why not."""
        reader = self.environment.reader
        assert reader is not None
        named = page.strip("[] ")
        sources = self.sources.pages
        if named.isdigit() and 1 <= int(named) <= len(sources):
            url = sources[int(named) - 1].url
        elif any(source.url == page for source in sources) or (self.environment.open_any_url and is_web(page)):
            url = page
        else:
            self.tell("fetch", {"url": page[:300], "bytes": 0, "page": "", "blocked": "not among the results"})
            return self.words.page_unknown
        try:
            async with asyncio.timeout(seconds):
                read = await reader.open_page(url)
        except UserError as error:
            problem = str(error)
        except TimeoutError:
            problem = f"not read within {seconds:.0f} s"
        else:
            self.opened += 1
            engine = next((source.engine for source in sources if source.url == url), "page")
            result = Result(read.url, read.title, read.text, read.date, 0.0, (), engine, read.sha256, read.fetched_at)
            self.tell("fetch", {"url": url, "bytes": read.bytes, "page": self._keep(result), "blocked": ""})
            return result
        self.tell("fetch", {"url": url, "bytes": 0, "page": "", "blocked": problem})
        self.problems.append(problem)
        return self.words.search_failed.format(reason=escape(problem))

    def _show_page(self, asked: str, page: Result | str, room: int, conversation: Conversation) -> Found:
        if isinstance(page, str):
            return Found(asked, note=page)
        if room < _LEAST_ROOM:
            return Found(asked, note=self.words.no_room)
        allowed = min(room, _PAGE_TOKENS)
        page = dataclasses.replace(page, passages=best_passages(page.text, self.question, page.title, allowed))
        page = fit([page], allowed, allowed, conversation.count)[0]
        shown = Shown(self._number(page), page.title, page.url, page.date, joined(page.passages))
        return Found(asked, (shown,))

    async def _final(self, conversation: Conversation, stopped_by: str, on_text: OnText | None) -> Rollout:
        """One last turn, in which tool calls lead nowhere."""
        room = min(self.budget.turn_tokens, self.budget.tokens - conversation.length())
        if room < 1 or self._left() <= 0:
            return self._end(conversation, "", "no answer", stopped_by)
        turn = self._read(await conversation.reply(room, self._left(), on_text))
        if turn.action == "answer":
            return self._end(conversation, turn.answer, "forced", stopped_by)
        text = "" if turn.action in ("search", "open") else _bare(self.replies[-1].text)
        return self._end(conversation, text, "unformatted" if text else "no answer", stopped_by)

    def _end(self, conversation: Conversation, answer: str, status: Status, stopped_by: str) -> Rollout:
        rollout = Rollout(
            question=self.question,
            answer=answer,
            status=status,
            stopped_by=stopped_by,
            turns=tuple(self.turns),
            replies=tuple(self.replies),
            sources=tuple(self.sources.pages),
            rounds=self.rounds,
            queries=self.queries,
            repeated=self.repeated,
            opened=self.opened,
            format_ok=bool(self.turns) and all(turn.format_ok for turn in self.turns),
            ids=tuple(conversation.ids),
            mask=tuple(conversation.mask),
            tokens=conversation.length(),
            prompt_tokens=sum(reply.prompt_tokens for reply in self.replies),
            completion_tokens=sum(reply.completion_tokens for reply in self.replies),
            seconds=time.monotonic() - self.started,
            problems=tuple(self.problems),
        )
        for kind, data in rollout.last_events():
            self.tell(kind, data)
        return rollout


def _bare(text: str) -> str:
    """The words of a turn that kept to no form: what follows its thinking part, or all of it, without tags."""
    rest = text.rpartition("</thinking>")[2].strip() or text
    return rest.replace("<thinking>", "").replace("</thinking>", "").strip()
