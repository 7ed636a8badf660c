"""The command line of the agent: one thin function per verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import PartialFailure, UserError

if TYPE_CHECKING:
    from tenfold.agent.index import BuildReport
    from tenfold.agent.search import Page


def index(documents: Positional[tuple[Path, ...]], output: Path = Path("index"), embedding: str = "") -> BuildReport:
    """Make documents searchable: HTML, Markdown, text, PDF, ZIM archives and JSONL corpora.

    A second run with the same arguments reads what has changed since the first one, and a run that was stopped goes on
    where it was.

    Args:
        documents: files and folders.
        output: the folder of the index.
        embedding: a sentence encoder (folder or hub name), to search by meaning as well as by words.

    Example:
        tenfold agent index docs/ notes.md library.pdf --output index
        tenfold agent index wikipedia.zim --output wiki --embedding sentence-transformers/all-MiniLM-L6-v2
    """
    from tenfold.agent.index import LocalIndex

    embed = None
    if embedding:
        from tenfold.agent.dense import sentence_embedder

        embed = sentence_embedder(embedding)
    report = LocalIndex.build(documents, output, embed, embedding or None)
    console.say(
        f"{report.folder}: {report.documents} documents in {report.passages} passages "
        f"({report.read} files read, {report.unchanged} unchanged, {report.removed} gone, "
        f"{report.passed_over} of other kinds passed over) in {report.seconds:.1f} s"
    )
    for _, problem in report.problems:
        console.warn(problem)
    if report.problems:
        raise PartialFailure(f"{len(report.problems)} files could not be read; the others are indexed", report)
    return report


def fetch(
    urls: Positional[tuple[str, ...]],
    query: str = "",
    cache: Path | None = None,
    allow_network: tuple[str, ...] = (),
    offline: bool = False,
) -> dict[str, list[Page]]:
    """Read pages of the web as the agent reads them: checked addresses, small bodies, readable text.

    Args:
        urls: addresses that begin with http:// or https://.
        query: show the passages that fit this query instead of the whole text.
        cache: file in which pages are kept.
        allow_network: private networks that may be opened as well, such as 10.1.0.0/16.
        offline: read from the cache only.

    Example:
        tenfold agent fetch https://www.python.org/about/ --query "who keeps Python"
    """
    import asyncio

    from tenfold.agent.cache import Cache
    from tenfold.agent.fetch import Fetcher, Limits
    from tenfold.agent.passages import best_passages

    if not urls:
        raise UserError("no address was given: for example https://www.python.org/about/")
    fetcher = Fetcher(Limits(networks=allow_network), Cache(cache) if cache is not None else None, offline)

    async def read() -> list[Page | BaseException]:
        return await asyncio.gather(*(fetcher.open_page(url) for url in urls), return_exceptions=True)

    outcomes = asyncio.run(read())
    pages = []
    problems = []
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            problems.append(str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            pages.append(outcome)
            shown = best_passages(outcome.text, query, outcome.title) if query else (outcome.text,)
            console.say(f"{outcome.title}\n{outcome.url}\n")
            console.say("\n[...]\n".join(shown) + "\n")
    if problems and not pages:
        raise UserError("; ".join(problems))
    if problems:
        raise PartialFailure("; ".join(problems), {"pages": pages})
    return {"pages": pages}


VERBS: dict[str, Callable[..., object]] = {
    "index": index,
    "fetch": fetch,
}
