"""The user-level object: a question in, an answer with checked citations out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tenfold.agent.addresses import is_web
from tenfold.agent.citations import Citation, Entails, check_citations, uncited_sentences
from tenfold.agent.config import MODELS, Budget, Sampling
from tenfold.agent.environment import Environment
from tenfold.agent.outcome import OnEvent, Outcome, Rollout
from tenfold.agent.policies import OnText, Policy
from tenfold.agent.protocol import Message
from tenfold.agent.protocol import protocol as protocol_named
from tenfold.agent.search import Engine, Page, Reader, Search, SearchEvent
from tenfold.agent.trace import Trace
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.engines import Local
    from tenfold.agent.fetch import Fetcher

T = TypeVar("T")
Mode = Literal["answer", "report", "team"]

# Searches of many questions run through one `Search`; this says to which question an engine's event belongs.
_events: ContextVar[OnEvent | None] = ContextVar("events", default=None)


@dataclass(frozen=True, kw_only=True)
class Answer(Outcome):
    """What came of a question. What is not named here is in `Outcome`.

    Args:
        citations: every cited sentence with the words of the source that come closest, and whether they carry it.
        uncited: sentences that cite nothing.
        rollout: the run, with token ids where the model is local.
        trace: its record.
    """

    citations: tuple[Citation, ...]
    uncited: tuple[str, ...]
    rollout: Rollout = field(repr=False)
    trace: Trace = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether the model answered by its own decision, within all limits."""
        return self.status == "answered" and not self.stopped_by

    def summary(self) -> dict[str, Any]:
        """What a program wants of it: everything but the texts of the sources and the record."""
        names = "question answer status stopped_by uncited rounds queries opened tokens seconds problems"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "complete": self.complete,
            "citations": [asdict(citation) for citation in self.citations],
            "sources": [
                {
                    "number": number,
                    "url": source.url,
                    "title": source.title,
                    "date": source.date,
                    "engine": source.engine,
                    "sha256": source.sha256,
                    "fetched_at": source.fetched_at,
                }
                for number, source in enumerate(self.sources, start=1)
            ],
        }


class Agent:
    """Answers questions by searching. One object answers many questions, also at the same time.

    Args:
        policy: the language model.
        engines: where it searches.
        budget: what one question may cost.
        protocol: `deepdiver`, `search-r1` or `native`.
        cache: file that keeps what was searched and read.
        offline: open no connection but the language model's.
        fetcher: reads pages of the web; None makes one where an engine of the web is among the engines.
        open_any_url: let the model open addresses that no search found.
        entails: decides whether a quote carries a sentence where words alone do not.

    Example:
        >>> agent = Agent.from_pretrained("http://localhost:8000/v1", engines=["local:index"])  # doctest: +SKIP
        >>> answer = agent.ask("Who directed the film that ...?")  # doctest: +SKIP
        >>> answer.answer, answer.citations[0].quote  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        engines: Sequence[Engine],
        budget: Budget | None = None,
        protocol: str = "deepdiver",
        cache: Path | str | None = None,
        offline: bool = False,
        fetcher: Fetcher | None = None,
        open_any_url: bool = False,
        entails: Entails | None = None,
    ) -> None:
        from tenfold.agent.engines import Local

        self.policy, self.engines, self.budget = policy, tuple(engines), budget or Budget()
        self.entails = entails
        self.local = [engine for engine in self.engines if isinstance(engine, Local)]
        store = None
        if cache is not None:
            from tenfold.agent.cache import Cache

            store = Cache(cache)
        web = len(self.local) < len(self.engines) or open_any_url
        if fetcher is None and web:
            from tenfold.agent.fetch import Fetcher

            fetcher = Fetcher(cache=store, offline=offline)
        # Local results carry their whole text; those of the web have a summary, and their pages are read for passages.
        self.search = Search(self.engines, store, reader=fetcher if web else None, on_event=_tell)
        reader = _Pages(self.local, fetcher) if self.local or fetcher is not None else None
        self.reader: Reader | None = reader
        self.environment = Environment(
            policy, self.search, protocol_named(protocol), self.budget, reader, open_any_url and not offline
        )

    @staticmethod
    def from_pretrained(
        llm: str,
        engines: Sequence[str | Engine] = ("local:index",),
        *,
        model: str = "",
        budget: Budget | None = None,
        sampling: Sampling | None = None,
        protocol: str = "deepdiver",
        cache: Path | str | None = None,
        offline: bool = False,
        device: str = "cpu",
        fetcher: Fetcher | None = None,
        open_any_url: bool = False,
    ) -> Agent:
        """An agent from names.

        Args:
            llm: the address of an OpenAI-compatible endpoint (http://localhost:8000/v1), or `hf:` and the folder or hub
                name of a `transformers` model.
            engines: names such as `local:index`, `brave`, `searxng:http://localhost:8888`, or engines.
            model: the model's name at the endpoint; empty takes the first one that it lists.
            budget: what one question may cost.
            sampling: how tokens are chosen.
            protocol: `deepdiver`, `search-r1` or `native`.
            cache: file that keeps what was searched and read.
            offline: open no connection but the endpoint's.
            device: for a local model: `cpu`, `cuda`, ...
            fetcher: reads pages of the web.
            open_any_url: let the model open addresses that no search found.

        Raises:
            UserError: an unknown name, an index that is not there, a model that cannot be loaded.
        """
        from tenfold.agent.engines import engine as engine_named

        protocol_named(protocol)
        made = [engine_named(engine, offline) if isinstance(engine, str) else engine for engine in engines]
        policy = policy_named(llm, model, sampling, offline, device)
        return Agent(policy, made, budget, protocol, cache, offline, fetcher, open_any_url)

    def ask(
        self,
        question: str,
        history: Sequence[Message] = (),
        seed: int | None = None,
        on_event: OnEvent | None = None,
        on_text: OnText | None = None,
        mode: Mode = "answer",
    ) -> Answer:
        """Answer one question. Works inside a running event loop (a notebook) as well.

        Args:
            question: the question.
            history: earlier questions and answers, as messages.
            seed: for a model that samples.
            on_event: is told of turns, searches and results as they happen.
            on_text: is told the model's words as they are written.
            mode: `answer` by one run; `team`: a planner gives tasks to researchers, who search; `report`: a long text
                in sections, each of which is searched for.

        Raises:
            UserError: an empty question, an endpoint that does not answer at all, an engine that cannot work.
        """

        async def once() -> Answer:
            try:
                return await self.ask_async(question, history, seed, None, on_event, on_text, mode)
            finally:
                await self.policy.close()

        return run(once())

    async def ask_async(
        self,
        question: str,
        history: Sequence[Message] = (),
        seed: int | None = None,
        delimiter: str | None = None,
        on_event: OnEvent | None = None,
        on_text: OnText | None = None,
        mode: Mode = "answer",
    ) -> Answer:
        """As `ask`, for asynchronous callers, who call `policy.close()` when they are done.

        Args:
            question: as in `ask`.
            history: as in `ask`.
            seed: as in `ask`.
            delimiter: stands around the text of pages; a fixed one makes runs repeatable.
            on_event: as in `ask`.
            on_text: as in `ask`.
            mode: as in `ask`; reports take no history.
        """
        question = question.strip()
        if not question:
            raise UserError("the question is empty")
        if mode == "team":
            from tenfold.agent.team import ask_team

            return await ask_team(self, question, history, seed, delimiter, on_event)
        if mode == "report":
            from tenfold.agent.report import write_report

            return await write_report(self, question, seed, on_event)
        trace = Trace(secrets=self.secrets)
        tell = trace.recording(on_event)
        with listening(tell):
            rollout = await self.environment.run(question, history, seed, delimiter, tell, on_text)
        if rollout.status == "failed" and not rollout.replies:
            raise UserError(rollout.stopped_by)
        return await self.checked(rollout, trace, tell)

    async def checked(self, rollout: Rollout, trace: Trace, tell: OnEvent) -> Answer:
        """A run as an answer, its citations held against their sources."""
        citations = await asyncio.to_thread(check_citations, rollout.answer, rollout.sources, self.entails)
        tell("citations", {"citations": [asdict(citation) for citation in citations]})
        return Answer(
            **{each.name: getattr(rollout, each.name) for each in fields(Outcome)},
            citations=tuple(citations),
            uncited=tuple(uncited_sentences(rollout.answer)),
            rollout=rollout,
            trace=trace,
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """Keys and passwords of the model and the engines: what no record may hold."""
        held = [*getattr(self.policy, "secrets", ())]
        held += [getattr(engine, "_key", "") for engine in self.engines]
        return tuple(secret for secret in held if isinstance(secret, str) and len(secret) > 3)


class _Pages:
    """Opens pages: those of the local indexes from there, others from the web where that is allowed."""

    def __init__(self, local: Sequence[Local], fetcher: Fetcher | None) -> None:
        self._local, self._fetcher = local, fetcher

    async def open_page(self, url: str) -> Page:
        """A page as text. Raises UserError."""
        problem = UserError(f"{url}: cannot be opened")
        for engine in self._local:
            try:
                return await engine.open_page(url)
            except UserError as error:
                problem = error
        if self._fetcher is not None and is_web(url):
            return await self._fetcher.open_page(url)
        raise problem


def policy_named(
    llm: str, model: str = "", sampling: Sampling | None = None, offline: bool = False, device: str = "cpu"
) -> Policy:
    """The language model that a name stands for: an endpoint's address, `hf:` and a folder or hub name, or the small
    policy of the closed world, which comes with tenfold."""
    if any(entry.name == llm for entry in MODELS):
        from tenfold.agent.seeker import load_seeker

        return load_seeker(llm, sampling)
    if llm.startswith("hf:"):
        from tenfold.agent.local_model import LocalModel

        return LocalModel.from_pretrained(llm.removeprefix("hf:"), device, sampling, offline)
    if is_web(llm):
        from tenfold.agent.endpoint import Endpoint

        return Endpoint(llm, model, sampling)
    raise UserError(
        f"unknown language model {llm!r}: give the address of an endpoint (http://localhost:8000/v1) or hf:FOLDER"
    )


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own where an event loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        return thread.submit(asyncio.run, work).result()
    finally:
        thread.shutdown(wait=False)


@contextmanager
def listening(tell: OnEvent) -> Iterator[None]:
    """Searches that are made within tell `tell` which engine was asked."""
    token = _events.set(tell)
    try:
        yield
    finally:
        _events.reset(token)


def _tell(event: SearchEvent) -> None:
    tell = _events.get()
    if tell is not None:
        tell("engine", {**asdict(event), "seconds": round(event.seconds, 4)})
