"""A policy without a language model that follows the known path of a question: it proves the loop, not a method.

It searches for each title of the path in turn, tries again with other words where a search misses, reads the date or
the name in the last page as it was shown, and cites that page. It does not look at the right answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tenfold.agent.data import Question
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import QUERIES, SEARCH, Message
from tenfold.agent.rewards import DATE
from tenfold.agent.webpuzzle.relations import value_of

_SHOWN = re.compile(
    r"<<data (?P<delimiter>\w+)>>\n\[(?P<number>\d+)\] page title: (?P<title>[^\n]*)\n[^\n]*\n(?P<text>.*?)\n"
    r"<<end (?P=delimiter)>>",
    re.DOTALL,
)
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
_BEFORE = {
    "born": re.compile(r"\b(?:born|birth|b\.)\W*(?:\w+\W+){0,6}?$", re.IGNORECASE),
    "died": re.compile(
        r"(?:\b(?:died|death|d\.|assassinated|killed)\W*(?:\w+\W+){0,4}?|[–—-]\s*(?:c\.\s*)?)$", re.IGNORECASE
    ),
}


def oracle(questions: Sequence[Question]) -> Scripted:
    """The policy for these questions, in the form of `deepdiver`."""
    known = {question.question: question for question in questions}

    def script(messages: Sequence[Message]) -> str:
        question = _asked(known, messages)
        return _UNKNOWN if question is None else _turn(question, messages)

    return Scripted(script, "scripted oracle")


_UNKNOWN = "<thinking>This question is not in my script.</thinking>I do not know."
_TASK = re.compile(r"\nWhat does the page of (?P<title>.+) say\?\n")
_FINDING_END = re.compile(r"\n\[\.\.\.\]\n")
_FINDING = re.compile(r"The page of (?P<title>.+?) says: (?P<text>.*)", re.DOTALL)


def _asked(known: dict[str, Question], messages: Sequence[Message]) -> Question | None:
    told = str(messages[0]["content"])
    return next((item for text, item in known.items() if f"\n{text}\n" in told), None)


def team_oracle(questions: Sequence[Question]) -> Scripted:
    """The same for a planner and its researchers: a task for each page of the path, and its text as the finding."""
    known = {question.question: question for question in questions}

    def script(messages: Sequence[Message]) -> str:
        task = _TASK.search(str(messages[0]["content"]))
        if task is not None:
            page = Question("task", task[0].strip(), (), path=(task["title"],), relations=("page",))
            return _turn(page, messages)
        question = _asked(known, messages)
        if question is None:
            return _UNKNOWN
        findings = {}
        for text, number in _shown(messages):
            found = _FINDING.search(text)
            if found is not None:
                findings[found["title"]] = (number, found["text"])
        for title in question.path:
            task_words = f"What does the page of {title} say?"
            if title not in findings:
                if any(repr(task_words) in str(message["content"]) for message in messages[1:]):
                    return f"<thinking>Nobody finds the page.</thinking>I could not find {title}."
                return f"<thinking>The page of {title} comes next.</thinking>{SEARCH}|{{'{QUERIES}': [{task_words!r}]}}"
        number, text = findings[question.path[-1]]
        return _answer(question, number, text)

    return Scripted(script, "scripted team")


def _shown(messages: Sequence[Message]) -> Iterator[tuple[str, int]]:
    """The texts of the results in a conversation, and their numbers."""
    for message in messages[1:]:
        if message["role"] == "user":
            for found in _SHOWN.finditer(str(message["content"])):
                yield found["text"], int(found["number"])


def _turn(question: Question, messages: Sequence[Message]) -> str:
    pages: dict[str, tuple[int, str]] = {}
    for message in messages[1:]:
        if message["role"] == "user":
            for found in _SHOWN.finditer(str(message["content"])):
                number, text = int(found["number"]), found["text"]
                if found["title"] not in pages or len(text) > len(pages[found["title"]][1]):
                    pages[found["title"]] = (number, text)
    asked = " ".join(str(message["content"]) for message in messages if message["role"] == "assistant")
    for step, title in enumerate(question.path):
        # A page that a search for another one has found as well is searched for all the same: one round for each step.
        if _heading(title) not in pages or repr(title) not in asked:
            for words in (title, f"{title} {question.relations[step]}", title.partition(" (")[0]):
                if repr(words) not in asked:
                    return f"<thinking>I need the page of {title}.</thinking>{SEARCH}|{{'{QUERIES}': [{words!r}]}}"
            return f"<thinking>The page of {title} is not found.</thinking>I could not find {title}."
    return _answer(question, *pages[_heading(question.path[-1])])


def _answer(question: Question, number: int, text: str) -> str:
    """The last turn: what the last page says."""
    relation = question.relations[-1]
    said = (
        text if relation == "page" else read_date(text, relation) if relation in _BEFORE else value_of(text, relation)
    )
    if said is None:
        return "<thinking>The page does not say it.</thinking>The page does not say it."
    if relation == "page":
        words = " ".join(_FINDING_END.split(text, maxsplit=1)[0].split())
        return f"<thinking>That is the page.</thinking>The page of {question.path[-1]} says: {words} [{number}]."
    subject = question.path[-1].partition(" (")[0]
    return f"<thinking>The page says it.</thinking>{subject} {_VERBS[relation]} {said} [{number}]."


def _heading(title: str) -> str:
    return " ".join(title.split())


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
