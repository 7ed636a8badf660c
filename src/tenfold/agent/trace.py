"""What happened in a run, as events: written as JSON lines, read again, compared, and run again without a network.

Events have a kind and the seconds since the start. Kinds: run_start, turn (thinking, action, queries, the reply as it
was written), engine (who was asked, from the cache or not), search, page (a page's text, once), source (its number),
fetch, inject (what was put before the model), citations, final, usage, error. Keys and passwords are in none of them.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tenfold.agent.config import Budget
from tenfold.agent.data import read_rows
from tenfold.agent.environment import Environment
from tenfold.agent.outcome import OnEvent, Rollout
from tenfold.agent.policies import Reply, Scripted
from tenfold.agent.protocol import ToolCall, protocol
from tenfold.agent.search import Page, Result
from tenfold.core.config import from_mapping
from tenfold.core.console import UserError
from tenfold.core.files import write_bytes

_KINDS = {
    "run_start": {"question", "policy", "protocol", "budget", "delimiter"},
    "turn": {"action", "thinking", "queries", "reply"},
    "search": {"query", "results", "problem"},
    "page": {"key", "url", "title", "text", "sha256"},
    "source": {"number", "page"},
    "inject": {"found", "note", "tokens"},
    "final": {"answer", "status"},
}

_NO_LIMITS = {"tokens": 10_000_000, "seconds": 3_600.0}


@dataclass
class Trace:
    """The events of one run, in order.

    Args:
        events: dictionaries with `kind`, `t` and what belongs to the kind.
        secrets: strings that are replaced by *** wherever they would be recorded.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    secrets: tuple[str, ...] = ()
    _started: float = field(default_factory=time.monotonic)

    def record(self, kind: str, data: dict[str, Any]) -> None:
        """Append an event."""
        event = {"kind": kind, "t": round(time.monotonic() - self._started, 4), **data}
        self.events.append(_without(event, self.secrets))

    def recording(self, on_event: OnEvent | None) -> OnEvent:
        """An `on_event` that records, and passes on to another one where there is one."""

        def tell(kind: str, data: dict[str, Any]) -> None:
            self.record(kind, data)
            if on_event is not None:
                on_event(kind, data)

        return tell

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.events if event["kind"] == kind]

    def first(self, kind: str) -> dict[str, Any]:
        """The first event of a kind; empty where there is none."""
        return next(iter(self.of(kind)), {})

    def pages(self) -> dict[str, Result]:
        """Pages by their keys."""
        found = {}
        for event in self.of("page"):
            about: dict[str, Any] = {each.name: event.get(each.name) for each in fields(Result)}
            found[event["key"]] = Result(**{**about, "passages": ()})
        return found

    def sources(self) -> list[Result]:
        """What was shown: source n is sources()[n - 1]."""
        pages = self.pages()
        return [pages[event["page"]] for event in self.of("source")]

    def replies(self) -> list[Reply]:
        """The turns as the model wrote them."""
        return [
            Reply(**{**event["reply"], "calls": tuple(ToolCall(**call) for call in event["reply"]["calls"])})
            for event in self.of("turn")
        ]

    def lifted_budget(self) -> Budget:
        """The budget of the run without its limits of tokens and time, for a run that repeats it."""
        return from_mapping(Budget, {**self.first("run_start")["budget"], **_NO_LIMITS}, "budget")

    def save(self, path: Path | str) -> None:
        """Write the events as JSON lines, atomically."""
        lines = [json.dumps(event, ensure_ascii=False, default=str) for event in self.events]
        write_bytes(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))

    @staticmethod
    def load(path: Path | str) -> Trace:
        """Read a trace. Raises UserError for a missing file and for one that is no trace."""
        path = Path(path)
        events = []
        for number, event in read_rows(path):
            missing = _KINDS.get(event.get("kind", ""), set()) - set(event)
            if not isinstance(event.get("kind"), str) or missing:
                what = f"lacks {', '.join(sorted(missing))}" if missing else "has no kind"
                raise UserError(f"{path}, line {number}: not an event of a trace: {what}")
            events.append(event)
        trace = Trace(events)
        if not trace.first("run_start"):
            raise UserError(f"{path}: not a trace: it does not begin with a run_start event")
        known = set(trace.pages())
        used = {event["page"] for event in trace.of("source")}
        used |= {row[0] for event in trace.of("search") for row in event["results"]}
        if not used <= known:
            raise UserError(f"{path}: the trace is damaged: it lacks the text of {len(used - known)} pages")
        return trace


def _without(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return value
    if isinstance(value, dict):
        return {key: _without(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, secrets) for item in value]
    return value


# --- Comparing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One place in which two runs differ: where, and what stands there in each."""

    where: str
    first: str
    second: str


def diff(first: Trace, second: Trace) -> list[Difference]:
    """Where two runs differ: settings, turn by turn, sources, answer. Times and delimiters do not count."""
    found = []
    for where, one, other in _pairs(first, second):
        if one != other:
            found.append(Difference(where, one, other))
    return found


def _pairs(first: Trace, second: Trace) -> Iterator[tuple[str, str, str]]:
    starts = first.first("run_start"), second.first("run_start")
    for name in ("question", "policy", "protocol", "budget"):
        yield name, _text(starts[0].get(name)), _text(starts[1].get(name))
    for number, (one, other) in enumerate(itertools.zip_longest(first.of("turn"), second.of("turn")), start=1):
        for name in ("action", "queries", "pages", "thinking"):
            yield f"turn {number}, {name}", _text((one or {}).get(name)), _text((other or {}).get(name))
    addresses = [[event["page"].partition(" ")[2] for event in trace.of("source")] for trace in (first, second)]
    for number, (one, other) in enumerate(itertools.zip_longest(*addresses), start=1):
        yield f"source {number}", _text(one), _text(other)
    ends = first.first("final"), second.first("final")
    for name in ("status", "answer"):
        yield name, _text(ends[0].get(name)), _text(ends[1].get(name))


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- Running again ------------------------------------------------------------------------------------------------


class Recorded:
    """An engine and a reader that know what was found in a run, and nothing else."""

    name = "recorded"

    def __init__(self, trace: Trace) -> None:
        pages = trace.pages()
        self._found: dict[str, list[Result] | str] = {}
        for event in trace.of("search"):
            self._found[event["query"]] = event["problem"] or [
                Result(**{**vars(pages[key]), "passages": tuple(passages)}) for key, passages in event["results"]
            ]
        self._pages = {event["url"]: pages[event["page"]] for event in trace.of("fetch") if event.get("page")}
        self._refused = {event["url"]: event["blocked"] for event in trace.of("fetch") if event.get("blocked")}

    async def search(self, query: str, count: int) -> list[Result]:
        """What was found then."""
        found = self._found.get(query, f"{query}: was not searched in this run")
        if isinstance(found, str):
            raise UserError(found)
        return found

    async def open_page(self, url: str) -> Page:
        """The page as it was then."""
        if url not in self._pages:
            raise UserError(self._refused.get(url, f"{url}: was not opened in this run"))
        page = self._pages[url]
        size = len(page.text.encode("utf-8", "replace"))
        return Page(page.url, page.title, page.text, page.date, page.sha256, page.fetched_at, "text/plain", size)


async def replay(trace: Trace) -> tuple[Rollout, Trace]:
    """Run the loop again with the turns and the results of a trace: no model, no network.

    Limits of tokens and time are lifted, because there is nothing to wait for and lengths are estimates here.

    Returns:
        The rollout, and its own trace, which `diff` can hold against the first one.
    """
    start = trace.first("run_start")
    if start.get("mode"):
        raise UserError(f"a run in the mode {start['mode']} is put together from several: it cannot be replayed")
    replies = trace.replies()
    if not replies:
        raise UserError("the trace holds no turn of the model: there is nothing to replay")
    recorded = Recorded(trace)
    again = Trace()
    rollout = await Environment(
        Scripted(replies, start["policy"]), recorded, protocol(start["protocol"]), trace.lifted_budget(), recorded
    ).run(
        start["question"],
        history=start.get("history") or (),
        delimiter=start["delimiter"],
        on_event=again.record,
    )
    return rollout, again
