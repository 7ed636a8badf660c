"""What a run leaves: its answer and its cost, its sources by number, and how all of it stands in a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.agent.policies import Reply
from tenfold.agent.protocol import Turn
from tenfold.agent.search import Result

Status = Literal["answered", "forced", "unformatted", "no answer", "failed"]
# Is told everything as it happens: the kind, and a dictionary that JSON can hold.
OnEvent = Callable[[str, dict[str, Any]], None]

_USAGE = ("rounds", "queries", "repeated", "opened", "tokens", "prompt_tokens", "completion_tokens", "seconds")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a question.

    Args:
        question: as it was asked.
        answer: the final answer, with marks such as [2]; empty where there is none.
        status: `answered` by the model's own decision; `forced` in the final turn at a limit; `unformatted`: the final
            turn kept to no form and its text was taken as it is; `no answer`; `failed`: the policy gave out.
        stopped_by: the limit that was met, or why it failed; empty where there was none.
        sources: what was shown: source n of the answer's marks is sources[n - 1].
        rounds: turns that searched or opened pages.
        queries: searches that were asked for, those asked before included.
        opened: pages that were opened.
        tokens: length of the conversation.
        seconds: from the question to the answer.
        problems: searches that failed, one line each.
    """

    question: str
    answer: str
    status: Status
    stopped_by: str
    sources: tuple[Result, ...]
    rounds: int
    queries: int
    opened: int
    tokens: int
    seconds: float
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollout(Outcome):
    """A finished run. What is not named here is in `Outcome`.

    Args:
        turns: the model's turns as they were read, in order.
        replies: the same turns as they were written.
        repeated: searches that had been asked before.
        format_ok: whether every turn kept to the form.
        ids: token ids of the conversation, where the policy shows them.
        mask: for each id 1 if the model sampled it, 0 if it was given.
        prompt_tokens: tokens read over all turns (what an endpoint charges for).
        completion_tokens: tokens written over all turns.
    """

    turns: tuple[Turn, ...]
    replies: tuple[Reply, ...]
    repeated: int
    format_ok: bool
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int

    def last_events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """How it ended and what it cost, as the last events of its record."""
        yield "final", {"answer": self.answer, "status": self.status, "stopped_by": self.stopped_by}
        yield "usage", {name: getattr(self, name) for name in _USAGE}


class Sources:
    """Pages by the numbers that answers cite: each once, numbered from 1 in the order in which they come."""

    def __init__(self) -> None:
        self.pages: list[Result] = []
        self._numbers: dict[str, int] = {}

    def number(self, page: Result) -> tuple[int, bool]:
        """The number of a page, and whether it was given just now."""
        key = f"{page.url} {page.sha256}"
        new = key not in self._numbers
        if new:
            self.pages.append(page)
            self._numbers[key] = len(self.pages)
        return self._numbers[key], new


def page_key(page: Result) -> str:
    """What stands for a page in a record, into which its text goes once."""
    return f"{page.sha256[:16]} {page.url}"


def page_event(page: Result) -> dict[str, Any]:
    """A page as an event."""
    return {"key": page_key(page), **dataclasses.asdict(page), "passages": []}


def source_event(number: int, page: Result) -> dict[str, Any]:
    """The number of a page as an event."""
    return {"number": number, "page": page_key(page), "title": page.title}
