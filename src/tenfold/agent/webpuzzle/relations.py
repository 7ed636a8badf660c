"""What a page says of its subject in words that rules can read: who directed a film, whose child somebody is, when.

The rules are narrow on purpose. A fact is the value as the page has it, with the span of the sentence that says it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tenfold.agent.citations import sentences
from tenfold.agent.rewards import dates

# A name: capitalised words, with particles and initials between them.
_WORD = r"[A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪİŁĹĽŃŇŌŐŒŘŚŞŠŢŤŪŮŰŹŻŽ][\w'’\-]+"
_PARTICLE = r"(?:[A-Z]\.|de|del|della|von|van|der|den|la|le|di|da|dos|bin|ibn|al|of|the|[IVX]+)"
NAME = re.compile(rf"{_WORD}(?:\s+(?:{_PARTICLE}\s+){{0,2}}{_WORD}){{1,4}}(?:\s+[IVX]+\b)?")
_TITLE_WORDS = r"(?:(?:Sir|Dame|Lord|Lady|King|Queen|Prince|Princess|Emperor|Count|Duke|Baron|Dr\.)\s+)?"
_DESCRIBED = r"(?:(?:the|a|an|his|her|fellow|former|late)\s+)?(?:[a-z][\w\-]*\s+){0,3}"

# Relation to the words before a name. Roles are of works, the rest of people.
ROLES = {
    "director": r"\bdirected(?:\s+and\s+\w+|\s*,\s*\w+\s+and\s+\w+)?\s+by\s+",
    "producer": r"\bproduced\s+by\s+",
    "writer": r"\b(?:written|screenplay)\s+by\s+",
    "composer": r"\b(?:composed|music|score)\s+by\s+",
    "star": r"\b(?:starring|stars)\s+",
}
KIN = {
    "parent": rf"\b(?:son|daughter)\s+of\s+{_TITLE_WORDS}{_DESCRIBED}",
    "spouse": rf"\b(?:married(?:\s+to)?|wife\s+of|husband\s+of|widow\s+of)\s+{_TITLE_WORDS}{_DESCRIBED}",
    "sibling": rf"\b(?:brother|sister)\s+of\s+{_TITLE_WORDS}{_DESCRIBED}",
    "child": rf"\b(?:father|mother)\s+of\s+{_TITLE_WORDS}{_DESCRIBED}",
}
_ROLE_RULES = {name: re.compile(rule) for name, rule in ROLES.items()}
_KIN_RULES = {name: re.compile(rule) for name, rule in KIN.items()}
# Words that, earlier in the sentence, tell of somebody else: "he married Ann, daughter of John" is no parent of his.
_OF_ANOTHER = re.compile(r"\b(?:married|wife|husband|widow|son|daughter|mother|father|brother|sister|whose|heir)\b")
_SENTENCE = re.compile(r"[.;](?=\s)")
_MORE = re.compile(
    r"\s*,\s*(?:the\s+)?(?:\d+\w*\s+)?(?:Duke|Duchess|Count|Earl|King|Queen|Prince|Princess|Lord|Lady|Baron|Margrave|Elector|"
    r"Landgrave|Marquess|Viscount|Emperor|Jr|Sr)|\s+(?:of|von|van|de|the|[IVX]+)\b|\s*\("
)
_CAST = re.compile(r"\b(?:starring|stars)\s+([^.;]*)")
_IS = re.compile(r"\b(?:is|was|are)\s+(?:an?|the)\b([^.]{0,140})")
_WORK = re.compile(
    r"\b(?:film|movie|serial|series|miniseries|song|single|album|opera|play|musical|novel)\b", re.IGNORECASE
)
_PERSON = re.compile(
    r"\b(?:act(?:or|ress)|director|producer|film-?\s?maker|screenwriter|writer|author|singer|composer|critic|editor|"
    r"politician|cinematographer|comedian|star|player|musician|personality|presenter|company|studio|festival|theater)\b",
    re.IGNORECASE,
)
_FILM = re.compile(r"\bis an?\b[^.]{0,40}?\b(1[89]\d\d|20[0-3]\d)\b[^.]{0,80}?\b(?:film|movie)\b")
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = rf"(?:\d{{1,2}}\s+(?:{_MONTH}),?\s+\d{{4}}|(?:{_MONTH})\s+\d{{1,2}},?\s+\d{{4}})"
_LIFE = re.compile(rf"\(\s*(?:[^()]{{0,80}}?[;,]\s*)?(?P<born>{_DATE})[^()\d]{{0,60}}[–—-]\s*(?P<died>{_DATE})")
_BORN = re.compile(rf"\(\s*(?:[^()]{{0,80}}?[;,]\s*)?born\s*:?\s+(?:[^()\d]{{0,60}}?)(?P<born>{_DATE})")
# Life spans stand at the head of a biography.
_HEAD = 300


@dataclass(frozen=True)
class Fact:
    """One thing that a page says.

    Args:
        relation: such as `director`, `parent`, `born`, `cast`, `year`.
        value: as the page has it.
        start: where the value begins in the page's text.
        end: where it ends.
    """

    relation: str
    value: str
    start: int
    end: int


def is_work(text: str) -> bool:
    """Whether a page is about a film, a song or the like, and not about who makes them."""
    said = _IS.search(text[:400])
    work = _WORK.search(said[1]) if said is not None else None
    if said is None or work is None or _life(text) is not None:
        return False
    # "is a film director" and "is a Danish actor in film" are people.
    person = _PERSON.search(said[1])
    return person is None or person.start() > work.end() + 30 or " by " in said[1][work.end() : person.start()]


def read_facts(text: str) -> list[Fact]:
    """Everything that the rules find in a page: the first value of each relation, and all names of a cast."""
    found = []
    if is_work(text):
        year = _FILM.search(text[:250])
        if year is not None:
            found.append(Fact("year", year[1], year.start(1), year.end(1)))
        found += _first_names(text, _ROLE_RULES, None)
        cast = _CAST.search(text)
        if cast is not None:
            found += [
                Fact("cast", name[0], cast.start(1) + name.start(), cast.start(1) + name.end())
                for name in NAME.finditer(cast[1])
            ]
    else:
        life = _life(text)
        if life is not None:
            found += [
                Fact(name, life[name], life.start(name), life.end(name))
                for name in ("born", "died")
                if life.groupdict().get(name)
            ]
        found += _first_names(text, _KIN_RULES, _OF_ANOTHER)
    return found


def is_sole(text: str, fact: Fact) -> bool:
    """Whether a name stands alone, and no second one is listed beside it."""
    beside = re.compile(rf"\s*(?:,\s*(?:and\s+)?|(?:and|&|or|with)\s+){NAME.pattern}")
    return beside.match(text, fact.end) is None


def is_whole(text: str, fact: Fact) -> bool:
    """Whether a name is not the first part of a longer one, such as `William II` of `William II, Duke of Jülich`."""
    return _MORE.match(text, fact.end) is None


def _life(text: str) -> re.Match[str] | None:
    head = text[:_HEAD]
    return _LIFE.search(head) or _BORN.search(head)


def _first_names(text: str, rules: dict[str, re.Pattern[str]], spoilt_by: re.Pattern[str] | None) -> Iterator[Fact]:
    """The first name that each rule finds; not where the sentence has turned to somebody else before."""
    for relation, rule in rules.items():
        for found in rule.finditer(text):
            begin = max((end.end() for end in _SENTENCE.finditer(text, 0, found.start())), default=0)
            spoilt = spoilt_by is not None and spoilt_by.search(text, begin, found.start())
            name = NAME.match(text, found.end())
            if name is not None and not spoilt:
                yield Fact(relation, name[0], name.start(), name.end())
                break


def value_of(text: str, relation: str) -> str | None:
    """The value of a relation in a text; None where the rules find none."""
    return next((fact.value for fact in read_facts(text) if fact.relation == relation), None)


def supporting_span(text: str, start: int, end: int) -> str:
    """The sentence in which text[start:end] stands."""
    for first, last in sentences(text):
        if first <= start and end <= last:
            return text[first:last]
    return text[max(0, start - 100) : end + 20].strip()


def date_of(facts: list[Fact], relation: str) -> datetime.date | None:
    """The date of birth or death among facts."""
    said = next((fact.value for fact in facts if fact.relation == relation), None)
    return next(iter(dates(said)), None) if said else None


def year_of(facts: list[Fact]) -> int | None:
    """The year of a film among its facts."""
    said = next((fact.value for fact in facts if fact.relation == "year"), None)
    return int(said) if said else None
