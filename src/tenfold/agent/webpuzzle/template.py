"""Puzzles without a language model: chains of relations between the pages of a pool, put into a fixed wording.

A step leads from one page to the next: to the page of a name that the first one gives (the director of a film), back
from it (the film of 1951 that somebody directed), or to a page that shares a name with it (the film of 1951 with the
same director). A step counts only if exactly one page of the pool fits it. A chain is kept if none of its pages names
a later one but the next, and if the question names none but the first.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tenfold.agent.webpuzzle.pool import Pool, PoolPage, bare
from tenfold.agent.webpuzzle.relations import Fact, date_of, is_sole, is_whole, is_work, supporting_span, year_of
from tenfold.agent.webpuzzle.writing import contains

NOUN = {
    "director": "director",
    "producer": "producer",
    "writer": "writer",
    "composer": "composer",
    "star": "first-named star",
    "parent": "first-named parent",
    "spouse": "spouse",
    "sibling": "sibling",
    "child": "child",
}
_BACK_FILM = {
    "director": "directed by",
    "producer": "produced by",
    "writer": "written by",
    "composer": "with music by",
    "star": "with, as its first-named star,",
}
_BACK_KIN = {"parent": "child", "spouse": "spouse", "sibling": "sibling", "child": "parent"}
_SHARED = ("director", "producer", "writer", "composer", "star")
_ASK = {
    "born": "On what date was {} born?",
    "died": "On what date did {} die?",
    "director": "Who directed {}?",
    "producer": "Who produced {}?",
    "writer": "Who wrote {}?",
    "composer": "Who composed the music of {}?",
    "star": "Who is the first-named star of {}?",
    "parent": "Who is the first-named parent of {}?",
    "spouse": "Who is the spouse of {}?",
}
# Relations of which a page may name several, so that "the" one is told by nothing but a list without a second name.
_ONE = ("director", "producer", "writer", "composer", "spouse", "sibling", "child")
_CHILD = re.compile(r"\b(?:son|daughter|child|children)\s+of\b")
# How often one page may begin chains of one length, and end them.
_STARTS, _ENDS = 12, 40
LEVELS = (1, 2, 3, 4, 5)
# Chains looked at from one first page.
_CHAINS = 400


@dataclass(frozen=True)
class Step:
    """One way from a page to the next.

    Args:
        kind: `to` (the page names it), `back` (it names the page) or `shared` (both name the same).
        relation: by which.
        target: the next page's number.
        spans: (page, sentence) of the sentences that say it.
        year: of the film, where the wording needs it.
    """

    kind: str
    relation: str
    target: int
    spans: tuple[tuple[int, str], ...]
    year: int | None = None

    def words(self, subject: str) -> str:
        """The next page's subject in words, from the words for this one's."""
        if self.kind == "to":
            return f"the {NOUN[self.relation]} of {subject}"
        if self.kind == "back" and self.relation in _BACK_KIN:
            return f"the {_BACK_KIN[self.relation]} (the only one with a page) of {subject}"
        if self.kind == "back":
            return f"the {self.year} film {_BACK_FILM[self.relation]} {subject}"
        return f"the {self.year} film that has the same {NOUN[self.relation]} as {subject}"

    @property
    def name(self) -> str:
        """The relation as it stands in a puzzle."""
        return self.relation if self.kind == "to" else f"{self.kind} {self.relation}"


# Numbers of the pages of a chain, and the steps between them.
Chain = tuple[tuple[int, ...], tuple[Step, ...]]


class Chains:
    """All steps between the pages of a pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.steps: dict[int, list[Step]] = defaultdict(list)
        self._children = [page for page in pool.pages if _CHILD.search(page.text)]
        self._of_year: dict[int, list[PoolPage]] = defaultdict(list)
        for page in pool.pages:
            if (year := year_of(list(page.facts))) is not None:
                self._of_year[year].append(page)
        self._forward()
        self._shared()
        self.near: dict[int, set[int]] = defaultdict(set)
        for number, steps in self.steps.items():
            for step in steps:
                self.near[number].add(step.target)
                self.near[step.target].add(number)

    def _forward(self) -> None:
        """Steps to the page of a name, and back from it."""
        back: dict[tuple[int, str], list[tuple[PoolPage, Step]]] = defaultdict(list)
        for page in self.pool.pages:
            for fact in page.facts:
                if fact.relation not in NOUN or (fact.relation in _ONE and not is_sole(page.text, fact)):
                    continue
                other = self.pool.target(page, fact)
                if other is None or not plausible(page, fact, other):
                    continue
                spans = ((page.number, supporting_span(page.text, fact.start, fact.end)),)
                self._add(page.number, Step("to", fact.relation, other.number, spans))
                year = year_of(list(page.facts))
                back[other.number, fact.relation].append((page, Step("back", fact.relation, page.number, spans, year)))
        for (number, relation), found in back.items():
            page = self.pool.pages[number]
            for _, step in found:
                if relation in _BACK_KIN:
                    if len(found) == 1 and self._only_kin(page, relation, step.target):
                        self._add(number, step)
                elif step.year is not None and self.films(bare(page.title), step.year) == [step.target]:
                    self._add(number, step)

    def _only_kin(self, page: PoolPage, relation: str, target: int) -> bool:
        """Whether no other page can be meant by "the child of somebody" and its like."""
        if page.fact(_BACK_KIN[relation]) is not None:
            return False  # the page itself says who that is, and it may be another
        name = bare(page.title)
        return all(other.number in (page.number, target) or name not in other.text for other in self._children)

    def films(self, name: str, year: int) -> list[int]:
        """Films of a year whose pages have a name in them, in whatever part: more than one, and the step is no step."""
        return [page.number for page in self._of_year[year] if name in page.text]

    def _shared(self) -> None:
        """Steps between films that share a name, one film a year."""
        for relation in _SHARED:
            films: dict[str, list[tuple[PoolPage, Fact]]] = defaultdict(list)
            for page in self.pool.pages:
                fact = page.fact(relation)
                if fact is None or (relation in _ONE and not is_sole(page.text, fact)):
                    continue
                if year_of(list(page.facts)) is not None:
                    films[fact.value].append((page, fact))
            for name, shared in films.items():
                for page, fact in shared:
                    for other, same in shared:
                        year = year_of(list(other.facts))
                        if other is page or year is None or self.films(name, year) != [other.number]:
                            continue
                        spans = (
                            (page.number, supporting_span(page.text, fact.start, fact.end)),
                            (other.number, supporting_span(other.text, same.start, same.end)),
                        )
                        self._add(page.number, Step("shared", relation, other.number, spans, year))

    def _add(self, number: int, step: Step) -> None:
        if all(known.target != step.target for known in self.steps[number]):
            self.steps[number].append(step)

    def walk(self, start: int, hops: int) -> Iterator[Chain]:
        """Every chain of `hops` pages from one page, without short cuts."""

        def further(path: tuple[int, ...], steps: tuple[Step, ...]) -> Iterator[Chain]:
            if len(path) == hops:
                yield path, steps
                return
            for step in self.steps.get(path[-1], ()):
                if step.target in path or any(step.target in self.near[page] for page in path[:-1]):
                    continue
                if steps and steps[-1].kind == "back" and step.kind == "shared" and steps[-1].relation == step.relation:
                    continue  # both films hang on the same name: the first one is not needed
                pages = self.pool.pages
                if any(self.pool.mentions(pages[page], pages[step.target]) for page in path[:-1]):
                    continue
                if contains(pages[start].title, bare(pages[step.target].title)):
                    continue
                yield from further((*path, step.target), (*steps, step))

        return further((start,), ())

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Pages whose title alone says what they are about."""
        return tuple(page.number for page in self.pool.pages if not self.pool.ambiguous(page))


def plausible(page: PoolPage, fact: Fact, other: PoolPage) -> bool:
    """Whether a name and a page of that name can be the same person, by the dates that are known of both."""
    if is_work(other.text):
        return False
    facts, theirs = list(page.facts), list(other.facts)
    born, died = date_of(theirs, "born"), date_of(theirs, "died")
    year, own = year_of(facts), date_of(facts, "born")
    if year is not None:
        return (born is None or born.year + 10 <= year) and (died is None or year <= died.year + 5)
    if born is None or own is None:
        return True
    older = own.year - born.year  # how much older the named person is
    return {"parent": 12 <= older <= 80, "child": -80 <= older <= -12}.get(fact.relation, abs(older) <= 60)


def templates(pool: Pool, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Puzzles of each number of hops, up to `count` of each, as rows of the stage `make`.

    Pages, starts and ends are spread: no page begins more than 12 puzzles of a length, or ends more than 40.
    """
    chains = Chains(pool)
    for hops in LEVELS:
        draw = random.Random(f"{seed}/{hops}")
        starts = list(chains.starts)
        draw.shuffle(starts)
        waiting: list[list[Chain]] = []
        for start in starts:
            found = [chain for chain, _ in zip(chains.walk(start, hops), range(_CHAINS), strict=False)]
            draw.shuffle(found)
            if found:
                waiting.append(found)
        starts_used: Counter[int] = Counter()
        ends_used: Counter[int] = Counter()
        made = 0
        # Every start gives one chain before any gives its second.
        while waiting and made < count:
            for found in list(waiting):
                row = _next(pool, found, starts_used, ends_used, draw)
                if row is None:
                    waiting.remove(found)
                else:
                    made += 1
                    yield row
                if made >= count:
                    break


def _next(
    pool: Pool,
    chains: list[Chain],
    starts: Counter[int],
    ends: Counter[int],
    draw: random.Random,
) -> dict[str, Any] | None:
    while chains:
        path, steps = chains.pop()
        if starts[path[0]] >= _STARTS or ends[path[-1]] >= _ENDS:
            continue
        last = pool.pages[path[-1]]
        asked = [relation for relation in _ASK if last.fact(relation) and _can_ask(pool, path, steps, relation)]
        if not asked:
            continue
        row = puzzle(pool, path, steps, draw.choice(asked))
        starts[path[0]] += 1
        ends[path[-1]] += 1
        return row
    return None


def _can_ask(pool: Pool, path: tuple[int, ...], steps: tuple[Step, ...], relation: str) -> bool:
    """Whether the answer is not given away by the step that leads to the page, nor by an earlier page."""
    if steps and steps[-1].kind != "to" and steps[-1].relation == relation:
        return False
    page = pool.pages[path[-1]]
    fact = page.fact(relation)
    assert fact is not None
    if not is_whole(page.text, fact) and relation not in ("born", "died"):
        return False
    if relation in _ONE and not is_sole(page.text, fact):
        return False
    if contains(pool.pages[path[0]].title, fact.value):
        return False
    return all(fact.value.casefold() not in pool.pages[page].text.casefold() for page in path[:-1])


def question_of(pool: Pool, path: tuple[int, ...], steps: tuple[Step, ...], relation: str) -> str:
    """The wording of a chain."""
    first = pool.pages[path[0]]
    words = f'the film "{bare(first.title)}"' if year_of(list(first.facts)) is not None else bare(first.title)
    for step in steps:
        words = step.words(words)
    return _ASK[relation].format(words)


def puzzle(pool: Pool, path: tuple[int, ...], steps: tuple[Step, ...], relation: str) -> dict[str, Any]:
    """A chain as a puzzle, with the sentence that carries each step."""
    pages = [pool.pages[number] for number in path]
    fact = pages[-1].fact(relation)
    assert fact is not None
    spans = [span for step in steps for span in step.spans]
    spans.append((path[-1], supporting_span(pages[-1].text, fact.start, fact.end)))
    relations = [*(step.name for step in steps), relation]
    name = hashlib.sha256("\n".join([*(page.url for page in pages), *relations]).encode()).hexdigest()[:12]
    return {
        "id": f"template-{len(path)}-{name}",
        "question": question_of(pool, path, steps, relation),
        "answers": [fact.value],
        "checklist": _CHECKLIST["date" if relation in ("born", "died") else "name"],
        "kind": "template",
        "hops": len(path),
        "path": [page.title for page in pages],
        "relations": relations,
        "pages": list(path),
        "sources": [
            {"url": pool.pages[number].url, "title": pool.pages[number].title, "span": span}
            for number, span in dict.fromkeys(spans)
        ],
        "lang": "en",
        "generator": {"model": "template", "prompt_sha": _WORDING},
    }


_WORDING = hashlib.sha256(repr((NOUN, _BACK_FILM, _BACK_KIN, _ASK)).encode()).hexdigest()[:16]
_CHECKLIST = {
    "date": "The day, the month and the year have to be right; how the date is written does not matter.",
    "name": "The person or company has to be the right one; titles and middle names may be left out.",
}
