"""A policy without a language model that follows the known path of a question: it proves the loop, not a method.

It searches for each title of the path in turn, tries again with other words where a search misses, reads the date or
the name in the last page as it was shown, and cites that page. It does not look at the right answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tenfold.agent.data import Question
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import QUERIES, SEARCH, Message, escape
from tenfold.agent.rewards import DATE
from tenfold.agent.webpuzzle.relations import value_of

SHOWN = re.compile(
    r"<<data (?P<delimiter>\w+)>>\n\[(?P<number>\d+)\] page title: (?P<title>[^\n]*)\n[^\n]*\n(?P<text>.*?)\n"
    r"<<end (?P=delimiter)>>",
    re.DOTALL,
)
_SHOWN_BARE = re.compile(r"^found \[(?P<number>\d+)\] (?P<title>.*?): (?P<text>.*)$", re.MULTILINE)
_BEFORE = {
    "born": re.compile(r"\b(?:born|birth|b\.)\W*(?:\w+\W+){0,6}?$", re.IGNORECASE),
    "died": re.compile(
        r"(?:\b(?:died|death|d\.|assassinated|killed)\W*(?:\w+\W+){0,4}?|[–—-]\s*(?:c\.\s*)?)$", re.IGNORECASE
    ),
}


def oracle(questions: Sequence[Question], bare: bool = False) -> Scripted:
    """The policy for these questions.

    Args:
        questions: with their paths.
        bare: read results as the protocol `brief` shows them, instead of as `deepdiver` does.
    """
    known = {escape(question.question): question for question in questions}

    def script(messages: Sequence[Message]) -> str:
        told = str(messages[0]["content"])
        if bare:
            question = known.get(told)
        else:
            question = next((item for item in known.values() if f"\n{item.question}\n" in told), None)
        if question is None:
            return "<thinking>This question is not in my script.</thinking>I do not know."
        return _turn(question, messages, _SHOWN_BARE if bare else SHOWN)

    return Scripted(script, "scripted oracle")


def _turn(question: Question, messages: Sequence[Message], shown: re.Pattern[str]) -> str:
    pages: dict[str, tuple[int, str]] = {}
    for number, title, text in results_in(messages, shown):
        if title not in pages or len(text) > len(pages[title][1]):
            pages[title] = (number, text)
    asked = " ".join(str(message["content"]) for message in messages if message["role"] == "assistant")
    for step, title in enumerate(question.path):
        # A page that a search for another one has found as well is searched for all the same: one round for each step.
        if squeezed(title) not in pages or repr(title) not in asked:
            for words in (title, f"{title} {question.relations[step]}", title.partition(" (")[0]):
                if repr(words) not in asked:
                    return f"<thinking>I need the page of {title}.</thinking>{SEARCH}|{{'{QUERIES}': [{words!r}]}}"
            return f"<thinking>The page of {title} is not found.</thinking>I could not find {title}."
    number, text = pages[squeezed(question.path[-1])]
    return answer(question, number, text)


def results_in(messages: Sequence[Message], shown: re.Pattern[str] = SHOWN) -> Iterator[tuple[int, str, str]]:
    """Number, title and text of the results in a conversation."""
    for message in messages[1:]:
        if message["role"] == "user":
            for found in shown.finditer(str(message["content"])):
                yield int(found["number"]), found["title"], found["text"]


_VERBS = {
    "born": "was born on",
    "died": "died on",
    "director": "was directed by",
    "producer": "was produced by",
    "writer": "was written by",
    "composer": "has music composed by",
    "star": "stars",
    "parent": "is the child of",
    "spouse": "is married to",
}


def answer(question: Question, number: int, text: str) -> str:
    """The last turn: what the text of the last page says, and its number."""
    relation = question.relations[-1]
    said = read_date(text, relation) if relation in _BEFORE else value_of(text, relation)
    if said is None:
        return "<thinking>The page does not say it.</thinking>The page does not say it."
    subject = question.path[-1].partition(" (")[0]
    return f"<thinking>The page says it.</thinking>{subject} {_VERBS[relation]} {said} [{number}]."


def squeezed(text: str) -> str:
    """A text on one line, as results show titles."""
    return " ".join(text.split())


def read_date(text: str, relation: str) -> str | None:
    """The date of birth or death in the first paragraph of a biography, as it is written there."""
    spans = sorted({(found.start(), found.end()) for pattern in DATE for found in pattern.finditer(text)})
    for start, end in spans:
        if _BEFORE[relation].search(text[:start]):
            return text[start:end]
    if not spans:
        return None
    start, end = spans[0] if relation == "born" else spans[min(1, len(spans) - 1)]
    return text[start:end]
