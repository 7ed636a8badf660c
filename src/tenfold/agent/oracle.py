"""A policy without a language model that follows the known path of a question: it proves the loop, not a method.

It searches for each title of the path in turn, tries again with other words where a search misses, reads the date in
the last page as it was shown, and cites that page. It does not look at the right answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tenfold.agent.data import Question
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import QUERIES, SEARCH, Message, escape
from tenfold.agent.rewards import DATE

_SHOWN = re.compile(
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
        return _turn(question, messages, _SHOWN_BARE if bare else _SHOWN)

    return Scripted(script, "scripted oracle")


def _turn(question: Question, messages: Sequence[Message], shown: re.Pattern[str]) -> str:
    pages: dict[str, tuple[int, str]] = {}
    for message in messages[1:]:
        if message["role"] == "user":
            for found in shown.finditer(str(message["content"])):
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
    number, text = pages[_heading(question.path[-1])]
    date = read_date(text, question.relations[-1])
    if date is None:
        return "<thinking>The page names no such date.</thinking>The page names no such date."
    verb = "was born on" if question.relations[-1] == "born" else "died on"
    return f"<thinking>The page says it.</thinking>{question.path[-1].partition(' (')[0]} {verb} {date} [{number}]."


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
