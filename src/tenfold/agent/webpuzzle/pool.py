"""The pool: pages of an index, what rules read in them, and which page speaks of which other one."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.agent.webpuzzle.relations import KIN, NAME, Fact, is_whole, read_facts

_LONGEST_TITLE = 100
# An entity that stands on more pages than this joins what has nothing to do with each other.
_PAGES_OF_ENTITY = 8


@dataclass(frozen=True)
class PoolPage:
    """A page of the pool.

    Args:
        number: its position in the pool.
        url: its address in the index.
        title: its title.
        text: its text.
        sha256: of the text.
        date: when it was published or changed, ISO 8601, where known.
        facts: what the rules read in it.
    """

    number: int
    url: str
    title: str
    text: str
    sha256: str
    date: str | None
    facts: tuple[Fact, ...]

    def fact(self, relation: str) -> Fact | None:
        """The fact of a relation, if the page has one."""
        return next((fact for fact in self.facts if fact.relation == relation), None)

    def row(self) -> dict[str, Any]:
        """The page as a line of the pool's file. The text stays in the index; its digest is kept."""
        row = {name: getattr(self, name) for name in ("number", "url", "title", "sha256", "date")}
        return {**row, "facts": [dataclasses.astuple(fact) for fact in self.facts]}


def read_page(number: int, url: str, title: str, text: str, sha256: str, date: str | None) -> PoolPage:
    """A page with what the rules read in it."""
    return PoolPage(number, url, title, text, sha256, date, tuple(read_facts(text)))


def page_of_row(row: dict[str, Any], text: str) -> PoolPage:
    """A page of a line of the pool's file and its text."""
    facts = tuple(Fact(*fact) for fact in row["facts"])
    return PoolPage(row["number"], row["url"], row["title"], text, row["sha256"], row["date"], facts)


def bare(title: str) -> str:
    """A title without what stands in brackets behind it: `Mr. Ace` of `Mr. Ace (film)`."""
    return re.sub(r"\s*\([^()]*\)$", "", " ".join(title.split()))


class Pool:
    """Pages and the links between them."""

    def __init__(self, pages: Iterable[PoolPage]) -> None:
        self.pages = tuple(pages)
        self._named: dict[str, list[int]] = defaultdict(list)
        for page in self.pages:
            self._named[bare(page.title).casefold()].append(page.number)

    def __len__(self) -> int:
        return len(self.pages)

    def named(self, name: str) -> PoolPage | None:
        """The one page whose title is a name; None where there is none or more than one."""
        numbers = self._named.get(" ".join(name.split()).casefold(), [])
        return self.pages[numbers[0]] if len(numbers) == 1 else None

    def titled(self, name: str) -> list[PoolPage]:
        """Every page whose title, without brackets, is a name."""
        return [self.pages[number] for number in self._named.get(" ".join(name.split()).casefold(), [])]

    @functools.cached_property
    def with_fact(self) -> dict[str, list[PoolPage]]:
        """Relations to the pages that have a fact of them; years of films to the films."""
        found: dict[str, list[PoolPage]] = defaultdict(list)
        for page in self.pages:
            for name in {fact.value if fact.relation == "year" else fact.relation for fact in page.facts}:
                found[name].append(page)
        return found

    def ambiguous(self, page: PoolPage) -> bool:
        """Whether another page has the same title but for what stands in brackets."""
        return len(self._named[bare(page.title).casefold()]) > 1

    def target(self, page: PoolPage, fact: Fact) -> PoolPage | None:
        """The page that the value of a fact names, by the longest title that stands there."""
        words = page.text[fact.start : fact.start + _LONGEST_TITLE]
        ends = [found.start() for found in re.finditer(r"(?=[\s,.;:()\"]|$)", words)]
        for end in reversed(ends[:12]):
            if end >= fact.end - fact.start and (found := self.named(words[:end])) is not None:
                # "Allan Gilmour, Sr" need not be who the page "Allan Gilmour" is about.
                named = Fact(fact.relation, words[:end], fact.start, fact.start + end)
                sure = fact.relation not in KIN or is_whole(page.text, named)
                return found if sure and found.number != page.number else None
        return None

    def target_of(self, page: PoolPage, relation: str) -> PoolPage | None:
        """The page that a page's fact of a relation names, if it has one."""
        fact = page.fact(relation)
        return None if fact is None else self.target(page, fact)

    @functools.cached_property
    def entities(self) -> dict[str, tuple[int, ...]]:
        """Names that stand on two to eight pages, and on which."""
        pages: dict[str, set[int]] = defaultdict(set)
        for page in self.pages:
            for name in {" ".join(found[0].split()) for found in NAME.finditer(page.text)} | {bare(page.title)}:
                if len(name) > 4:
                    pages[name].add(page.number)
        return {
            name: tuple(sorted(numbers)) for name, numbers in pages.items() if 2 <= len(numbers) <= _PAGES_OF_ENTITY
        }

    def groups(self, largest: int = 4) -> list[tuple[str, tuple[PoolPage, ...]]]:
        """Two to four pages that share an entity, each group of pages once, in a fixed order."""
        seen: set[tuple[int, ...]] = set()
        found = []
        for name in sorted(self.entities):
            numbers = self.entities[name][:largest]
            if numbers not in seen:
                seen.add(numbers)
                found.append((name, tuple(self.pages[number] for number in numbers)))
        return found

    def mentions(self, page: PoolPage, other: PoolPage) -> bool:
        """Whether a page names the subject of another one."""
        return bare(other.title).casefold() in page.text.casefold()


def names_of(pages: Sequence[PoolPage]) -> tuple[str, ...]:
    """The titles of pages, with and without brackets."""
    return tuple(dict.fromkeys(name for page in pages for name in (page.title, bare(page.title))))
