"""The scripted oracle as a planner and its researchers: what a team costs beside one agent."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tenfold.agent.data import Question
from tenfold.agent.oracle import answer, results_in, squeezed
from tenfold.agent.passages import GAP
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import QUERIES, SEARCH, Message

_TASK = re.compile(r"\nWhat does the page of (?P<title>.+) say\?\n")
_FINDING = re.compile(r"The page of (?P<title>.+?) says: (?P<text>.*)", re.DOTALL)


def team_oracle(questions: Sequence[Question]) -> Scripted:
    """A planner that gives the task of finding each page of a question's path, and researchers who give its text."""
    known = {question.question: question for question in questions}

    def script(messages: Sequence[Message]) -> str:
        told = str(messages[0]["content"])
        task = _TASK.search(told)
        if task is not None:
            return _research(task["title"], messages)
        question = next((item for text, item in known.items() if f"\n{text}\n" in told), None)
        return "<thinking>Not in my script.</thinking>I do not know." if question is None else _plan(question, messages)

    return Scripted(script, "scripted team")


def _plan(question: Question, messages: Sequence[Message]) -> str:
    findings = {}
    for number, _, text in results_in(messages):
        found = _FINDING.search(text)
        if found is not None:
            findings[squeezed(found["title"])] = (number, found["text"])
    for title in question.path:
        if squeezed(title) not in findings:
            task = f"What does the page of {title} say?"
            if any(repr(task) in str(message["content"]) for message in messages[1:]):
                return f"<thinking>Nobody finds the page.</thinking>I could not find {title}."
            return f"<thinking>The page of {title} comes next.</thinking>{SEARCH}|{{'{QUERIES}': [{task!r}]}}"
    return answer(question, *findings[squeezed(question.path[-1])])


def _research(title: str, messages: Sequence[Message]) -> str:
    for number, heading, text in results_in(messages):
        if heading == squeezed(title):
            words = squeezed(text.partition(GAP)[0])
            return f"<thinking>That is the page.</thinking>The page of {title} says: {words} [{number}]."
    asked = " ".join(str(message["content"]) for message in messages if message["role"] == "assistant")
    for words in (title, title.partition(" (")[0]):
        if repr(words) not in asked:
            return f"<thinking>I look for {title}.</thinking>{SEARCH}|{{'{QUERIES}': [{words!r}]}}"
    return f"<thinking>It is not found.</thinking>I could not find {title}."
