"""One question to several engines: their results fused, cached, trimmed to a budget, and their failures typed.

An engine is any object with a name and `async search(query, count)`. `Search` is one too: it asks its engines, waits
and tries again where that helps, and leaves an engine that refuses alone until its pause is over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from tenfold.agent.addresses import is_web
from tenfold.agent.passages import (
    TOKENS_PER_QUERY,
    TOKENS_PER_RESULT,
    TOKENS_PER_ROUND,
    CountTokens,
    best_passages,
    cut_to_tokens,
    estimate_tokens,
)
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.cache import Cache

# Cormack, Clarke and Buettcher, SIGIR 2009: 1 / (60 + rank).
_RANK_OFFSET = 60
Key = TypeVar("Key", bound=Hashable)
# An engine's pause where it names none, and the longest that a search waits for it.
_PAUSE_S, _LONGEST_WAIT_S = 30.0, 5.0
_TRIES = 3


@dataclass(frozen=True)
class Result:
    """One page that was found, with what was read of it.

    Args:
        url: where it is; for local documents a `file:`, `zim:` or other URI.
        title: the page's title.
        text: all that is known of its text: the page, or the engine's summary.
        date: publication or change date, ISO 8601, where it is known.
        score: the higher the better; comparable within one answer of one engine only.
        passages: what to show: the parts of `text` that fit the query, within the budget.
        engine: name of the engine (`a+b` where several found it).
        sha256: of `text` (hexadecimal), so that a citation can be checked later.
        fetched_at: when the text was read, ISO 8601 UTC; for local documents when they were indexed.
    """

    url: str
    title: str
    text: str
    date: str | None
    score: float
    passages: tuple[str, ...]
    engine: str
    sha256: str
    fetched_at: str


@dataclass(frozen=True)
class Page:
    """A whole page as text.

    Args:
        url: where it was found in the end, after redirects.
        title: its title.
        text: its readable text, without hidden elements and control characters.
        date: as in `Result`.
        sha256: of `text`.
        fetched_at: ISO 8601 UTC.
        content_type: media type.
        bytes: length of the body as it was sent.
    """

    url: str
    title: str
    text: str
    date: str | None
    sha256: str
    fetched_at: str
    content_type: str
    bytes: int


class SearchError(UserError):
    """A search that gave no answer; its message says which engine, why, and what to do."""

    def __init__(self, engine: str, message: str) -> None:
        super().__init__(f"{engine}: {message}")
        self.engine = engine


class RateLimited(SearchError):
    """The engine asks for patience (429, or 202 of DuckDuckGo). `wait_s` is how long, in seconds."""

    def __init__(self, engine: str, wait_s: float | None = None) -> None:
        self.wait_s = _PAUSE_S if wait_s is None else wait_s
        super().__init__(engine, f"too many requests: wait {self.wait_s:.0f} s, or add another engine")


class KeyMissing(SearchError):
    """The engine needs a key that was not given. `variable` is the environment variable that holds it."""

    def __init__(self, engine: str, variable: str, refused: bool = False) -> None:
        self.variable = variable
        what = "the key was refused: check" if refused else "needs a key: set"
        super().__init__(engine, f"{what} the environment variable {variable}")


class Unreachable(SearchError):
    """The engine did not answer, or answered with something that is not a result."""


class EmptyIndex(SearchError):
    """The local index holds no document."""


class Engine(Protocol):
    """Whatever can search."""

    @property
    def name(self) -> str:
        """As it stands in results and messages."""
        ...

    async def search(self, query: str, count: int) -> list[Result]:
        """The best `count` results for a query, best first. Raises SearchError."""
        ...


class Reader(Protocol):
    """Whatever can open a page, for results that come with a summary only."""

    async def open_page(self, url: str) -> Page:
        """The page as text. Raises UserError."""
        ...


@dataclass(frozen=True)
class SearchEvent:
    """What happened on the way to an answer, for traces.

    Args:
        engine: which engine.
        query: the query as asked.
        outcome: what became of it.
        results: how many results came.
        seconds: how long it took.
        message: the error, if there was one; it never holds a key.
    """

    engine: str
    query: str
    outcome: Literal["found", "cached", "failed", "paused"]
    results: int
    seconds: float
    message: str = ""


def normalise_query(query: str) -> str:
    """A query without what does not change its meaning: case, width of characters, white space, end punctuation."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split()).rstrip(" .?!。？！")


def retry_after(header: str) -> float | None:
    """Seconds to wait as a server says it; Retry-After also comes as a date, which is passed over."""
    return min(float(header), 3_600.0) if re.fullmatch(r"\d+(\.\d+)?", header) else None


def reciprocal_ranks(rankings: Iterable[Sequence[Key]]) -> dict[Key, float]:
    """Scores of what several rankings name, best first in each: the sum of 1 / (60 + rank), the first rank of each."""
    scores: dict[Key, float] = {}
    for ranking in rankings:
        seen = set()
        for rank, key in enumerate(ranking, start=1):
            if key not in seen:
                seen.add(key)
                scores[key] = scores.get(key, 0.0) + 1 / (_RANK_OFFSET + rank)
    return scores


def fuse(lists: Sequence[Sequence[Result]], count: int) -> list[Result]:
    """Reciprocal rank fusion of several engines' results; pages are the same if their URLs are.

    Args:
        lists: one list per engine, best first.
        count: how many to return.
    """
    scores = reciprocal_ranks([_same_page(result.url) for result in results] for results in lists)
    best: dict[str, Result] = {}
    engines: dict[str, list[str]] = {}
    for results in lists:
        # A page that an engine gives twice counts as it was given first.
        for key, result in {_same_page(result.url): result for result in reversed(results)}.items():
            if key not in best or len(result.text) > len(best[key].text):
                best[key] = result
            engines.setdefault(key, []).append(result.engine)
    order = sorted(scores, key=lambda key: -scores[key])[:count]
    return [
        dataclasses.replace(best[key], score=scores[key], engine="+".join(dict.fromkeys(engines[key]))) for key in order
    ]


def _same_page(url: str) -> str:
    return re.sub(r"^https?://(www\.)?", "//", url.partition("#")[0]).rstrip("/") if url.startswith("http") else url


def fit(
    results: Sequence[Result],
    per_result: int = TOKENS_PER_RESULT,
    total: int = TOKENS_PER_QUERY,
    count_tokens: CountTokens = estimate_tokens,
) -> list[Result]:
    """Trim passages so that each result, and all of them together, keep to a number of tokens.

    A result of which nothing would be left is dropped.
    """
    kept = []
    left = total
    for result in results:
        allowed = min(per_result, left)
        passages = []
        for passage in result.passages:
            cost = count_tokens(passage)
            if cost > allowed:
                passage = _cut(passage, allowed, count_tokens)
                cost = count_tokens(passage)
            if passage.strip():
                passages.append(passage)
                allowed -= cost
                left -= cost
        if passages:
            kept.append(dataclasses.replace(result, passages=tuple(passages)))
    return kept


def fit_round(
    answers: Sequence[Sequence[Result]],
    total: int = TOKENS_PER_ROUND,
    count_tokens: CountTokens = estimate_tokens,
) -> list[list[Result]]:
    """Trim the answers to the queries of one round, each to its fair share of `total` and none above a query's cap.

    What one query leaves over is there for those after it.
    """
    fitted = []
    left = total
    for position, results in enumerate(answers):
        share = min(TOKENS_PER_QUERY, left // (len(answers) - position))
        fitted.append(fit(results, total=share, count_tokens=count_tokens))
        left -= sum(count_tokens(passage) for result in fitted[-1] for passage in result.passages)
    return fitted


def _cut(text: str, tokens: int, count_tokens: CountTokens) -> str:
    """A start of `text` that `count_tokens` finds short enough."""
    allowed = tokens
    while allowed > 1:
        shorter = cut_to_tokens(text, allowed)
        counted = count_tokens(shorter)
        if counted <= tokens:
            return shorter
        allowed = min(allowed - 1, allowed * tokens // counted)
    return ""


class Search:
    """Several engines as one.

    Args:
        engines: asked together (`fuse`) or one after another until one finds something (`first`).
        cache: answers that were given before; None asks anew each time.
        mode: `fuse` or `first`.
        reader: opens the pages of results that have a summary only, so that passages can be chosen from the whole
            text; None leaves the summaries.
        on_event: called with a `SearchEvent` for every engine that was asked.
    """

    name = "search"

    def __init__(
        self,
        engines: Sequence[Engine],
        cache: Cache | None = None,
        mode: Literal["fuse", "first"] = "fuse",
        reader: Reader | None = None,
        on_event: Callable[[SearchEvent], None] | None = None,
    ) -> None:
        if not engines:
            raise UserError("no search engine was given: for example --engine local:FOLDER or --engine ddgs")
        self.engines = tuple(engines)
        self.cache = cache
        self.mode = mode
        self.reader = reader
        self.on_event = on_event
        self._paused_until: dict[str, float] = {}

    async def search(self, query: str, count: int) -> list[Result]:
        """The best results of all engines for a query, their passages within a query's budget.

        Engines that fail are passed over as long as one answers.

        Raises:
            SearchError: every engine failed; the error is that of the first one.
        """
        if not normalise_query(query):
            return []
        if self.mode == "fuse":
            outcomes = await asyncio.gather(*(self._ask(engine, query, count) for engine in self.engines))
        else:
            outcomes = []
            for engine in self.engines:
                outcomes.append(await self._ask(engine, query, count))
                if isinstance(outcomes[-1], list) and outcomes[-1]:
                    break
        errors = [outcome for outcome in outcomes if isinstance(outcome, SearchError)]
        lists = [outcome for outcome in outcomes if isinstance(outcome, list)]
        if errors and not lists:
            raise errors[0]
        results = fuse(lists, count) if len(lists) > 1 else lists[0][:count]
        return fit(results)

    async def _ask(self, engine: Engine, query: str, count: int) -> list[Result] | SearchError:
        started = time.monotonic()
        if self.cache is not None:
            stored = self.cache.results(engine.name, normalise_query(query), count)
            if stored is not None:
                self._tell(engine, query, "cached", started, len(stored))
                return stored
        if started < self._paused_until.get(engine.name, 0.0):
            refusal = RateLimited(engine.name, self._paused_until[engine.name] - started)
            self._tell(engine, query, "paused", started, 0, str(refusal))
            return refusal
        try:
            results = await self._try(engine, query, count)
        except SearchError as error:
            self._tell(engine, query, "failed", started, 0, str(error))
            return error
        if self.reader is not None:
            results = list(await asyncio.gather(*(self._read(result, query) for result in results)))
        if self.cache is not None:
            self.cache.store_results(engine.name, normalise_query(query), count, results)
        self._tell(engine, query, "found", started, len(results))
        return results

    async def _try(self, engine: Engine, query: str, count: int) -> list[Result]:
        """Ask an engine, and again after a pause where it was out of reach or its pause is short."""
        import tenacity

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, RateLimited):
                return error.wait_s
            return tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_S)(state)

        def again(error: BaseException) -> bool:
            return isinstance(error, Unreachable) or (
                isinstance(error, RateLimited) and error.wait_s <= _LONGEST_WAIT_S
            )

        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(_TRIES),
                wait=pause,
                retry=tenacity.retry_if_exception(again),
                reraise=True,
            ):
                with attempt:
                    return await engine.search(query, count)
        except RateLimited as error:
            self._paused_until[engine.name] = time.monotonic() + error.wait_s
            raise
        raise AssertionError("tenacity ends with a result or an error")

    async def _read(self, result: Result, query: str) -> Result:
        """A web result with passages of its page; as it was where the page cannot be read."""
        assert self.reader is not None
        if not is_web(result.url):
            return result
        try:
            page = await self.reader.open_page(result.url)
        except UserError:
            return result
        passages = await asyncio.to_thread(best_passages, page.text, query, page.title)
        if not passages:
            return result
        return dataclasses.replace(
            result,
            text=page.text,
            title=page.title or result.title,
            date=result.date or page.date,
            passages=passages,
            sha256=page.sha256,
            fetched_at=page.fetched_at,
        )

    def _tell(
        self,
        engine: Engine,
        query: str,
        outcome: Literal["found", "cached", "failed", "paused"],
        started: float,
        results: int,
        message: str = "",
    ) -> None:
        if self.on_event is not None:
            self.on_event(SearchEvent(engine.name, query, outcome, results, time.monotonic() - started, message))
