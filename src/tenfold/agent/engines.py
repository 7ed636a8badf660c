"""The engines: a local index, Brave, Serper, SearXNG, LangSearch, and DuckDuckGo and others through ddgs.

Each turns one service's answer into `Result`s and its refusals into `SearchError`s, and does nothing else: pauses,
second tries, fusion and caching are `Search`'s. Services: the pages api-dashboard.search.brave.com/app/documentation,
serper.dev, docs.searxng.org/dev/search_api.html, docs.langsearch.com/api/web-search-api.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tenfold.agent.addresses import is_web
from tenfold.agent.extract import clean
from tenfold.agent.search import (
    Engine,
    KeyMissing,
    Page,
    RateLimited,
    Result,
    SearchError,
    Unreachable,
    retry_after,
)
from tenfold.core.config import near
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from tenfold.agent.index import LocalIndex

_TIMEOUT_S = 10.0
_LARGEST_ANSWER_BYTES = 5_000_000
_EMPHASIS = re.compile(r"</?(?:strong|b|em|mark)>")


class Local:
    """An index on disk. Opens no connection.

    Args:
        index: the folder of an index, or an index.
    """

    def __init__(self, index: Path | str | LocalIndex) -> None:
        from tenfold.agent.index import LocalIndex

        self.index = index if isinstance(index, LocalIndex) else LocalIndex.load(index)
        self.name = "local"

    async def search(self, query: str, count: int) -> list[Result]:
        """The best documents. Raises EmptyIndex."""
        # A millisecond: cheaper done here than handed to a thread.
        return self.index.search(query, count)

    async def open_page(self, url: str) -> Page:
        """A whole document of the index. Raises UserError where there is none of that address."""
        return self.index.page(url)


class WebEngine:
    """A service that answers a query with JSON over HTTP: what is the same for all of them.

    Args:
        name: as it stands in results and messages.
        base: the address of the service.
        key: the key, taken from the environment if None.
        variable: the environment variable that holds it; empty for a service without keys.
    """

    def __init__(self, name: str, base: str, key: str | None = None, variable: str = "") -> None:
        self.name, self.base, self.variable = name, base, variable
        self._key = key or (os.environ.get(variable, "") if variable else "")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"  # without the key

    async def ask(
        self,
        method: str,
        headers: Mapping[str, str] | None = None,
        parameters: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Send one request and return the JSON object of the answer. Raises SearchError."""
        import httpx

        if self.variable and not self._key:
            raise KeyMissing(self.name, self.variable)
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as client,
                client.stream(method, self.base, headers=headers, params=parameters, json=body) as response,
            ):
                self._refuse(response.status_code, response.headers)
                content = bytearray()
                async for chunk in response.aiter_bytes(65_536):
                    content += chunk
                    if len(content) > _LARGEST_ANSWER_BYTES:
                        raise Unreachable(self.name, "the answer is too large to be one")
            answer = json.loads(bytes(content))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            raise Unreachable(self.name, f"no answer ({type(error).__name__}): check the connection") from None
        except ValueError:
            raise Unreachable(self.name, "the answer is not JSON: is this the right address?") from None
        if not isinstance(answer, dict):
            raise Unreachable(self.name, "the answer is not a JSON object: is this the right address?")
        return answer

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        if status == 429:
            raise RateLimited(self.name, retry_after(headers.get("retry-after", "")))
        if status in (401, 403) and self.variable:
            raise KeyMissing(self.name, self.variable, refused=True)
        if status == 402:
            raise SearchError(self.name, "the account has no credit left")
        if status in (400, 403, 404, 405, 422):
            raise SearchError(self.name, f"the request was refused ({status}): is the address right, is JSON allowed?")
        if status >= 300:
            raise Unreachable(self.name, f"the server answered {status}")

    def results(self, rows: object, count: int, url: str, title: str, text: Sequence[str], date: str) -> list[Result]:
        """Rows of an answer as results; rows without an address are passed over.

        Args:
            rows: the list in the answer.
            count: how many at most.
            url: the key of the address.
            title: of the title.
            text: keys of the text, the first one that is filled counts.
            date: of the date.
        """
        if not isinstance(rows, list):
            return []
        found: list[Result] = []
        for row in rows:
            if not isinstance(row, dict) or not is_web(str(row.get(url) or "")):
                continue
            words = next((row[key] for key in text if row.get(key)), "")
            words = "\n".join(map(str, words)) if isinstance(words, list) else str(words)
            found.append(as_result(self.name, row[url], str(row.get(title) or ""), words, row.get(date), len(found)))
            if len(found) == count:
                break
        return found


def as_result(engine: str, url: str, title: str, text: str, date: object, rank: int) -> Result:
    """A service's row as a result; marks of emphasis and invisible characters are taken out."""
    text = clean(_EMPHASIS.sub("", text))
    return Result(
        url=url,
        title=clean(_EMPHASIS.sub("", title)),
        text=text,
        date=_iso_date(date),
        score=1 / (rank + 1),
        passages=(text,) if text else (),
        engine=engine,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        fetched_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


class Brave(WebEngine):
    """Brave's web search; the key is in BRAVE_API_KEY."""

    def __init__(self, key: str | None = None, base: str = "https://api.search.brave.com/res/v1/web/search") -> None:
        super().__init__("brave", base, key, "BRAVE_API_KEY")

    async def search(self, query: str, count: int) -> list[Result]:
        """Pages of Brave's index. Raises SearchError."""
        answer = await self.ask(
            "GET",
            {"X-Subscription-Token": self._key, "Accept": "application/json"},
            {"q": query[:400], "count": str(min(count, 20)), "extra_snippets": "true"},
        )
        rows = _get(answer, "web", "results")
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                row["snippets"] = [row.get("description") or "", *(row.get("extra_snippets") or [])]
        return self.results(rows, count, "url", "title", ("snippets",), "page_age")


class Serper(WebEngine):
    """Google's results through serper.dev; the key is in SERPER_API_KEY."""

    def __init__(self, key: str | None = None, base: str = "https://google.serper.dev/search") -> None:
        super().__init__("serper", base, key, "SERPER_API_KEY")

    async def search(self, query: str, count: int) -> list[Result]:
        """Google's pages. Raises SearchError."""
        answer = await self.ask("POST", {"X-API-KEY": self._key}, body={"q": query, "num": min(max(count, 10), 100)})
        return self.results(answer.get("organic"), count, "link", "title", ("snippet",), "date")


class LangSearch(WebEngine):
    """LangSearch, the paper's engine for English; the key is in LANGSEARCH_API_KEY."""

    def __init__(self, key: str | None = None, base: str = "https://api.langsearch.com/v1/web-search") -> None:
        super().__init__("langsearch", base, key, "LANGSEARCH_API_KEY")

    async def search(self, query: str, count: int) -> list[Result]:
        """Pages with long summaries. Raises SearchError."""
        body = {"query": query, "count": min(count, 10), "summary": True, "freshness": "noLimit"}
        answer = await self.ask("POST", {"Authorization": f"Bearer {self._key}"}, body=body)
        rows = _get(answer, "data", "webPages", "value")
        return self.results(rows, count, "url", "name", ("summary", "snippet"), "datePublished")


class SearXNG(WebEngine):
    """A SearXNG of one's own; its settings must list `json` among search.formats.

    Args:
        base: its address, such as http://localhost:8888.
    """

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"searxng:{base}: not an address: for example searxng:http://localhost:8888")
        super().__init__("searxng", base.rstrip("/") + "/search")

    async def search(self, query: str, count: int) -> list[Result]:
        """Pages of the engines that the instance asks. Raises SearchError."""
        answer = await self.ask("GET", parameters={"q": query, "format": "json"})
        return self.results(answer.get("results"), count, "url", "title", ("content",), "publishedDate")


class Ddgs:
    """DuckDuckGo and others without a key, through the package ddgs. They limit how often they may be asked."""

    name = "ddgs"

    async def search(self, query: str, count: int) -> list[Result]:
        """Pages of whichever engine answers. Raises SearchError."""
        return await asyncio.to_thread(self._search, query, count)

    def _search(self, query: str, count: int) -> list[Result]:
        from ddgs import DDGS
        from ddgs.exceptions import DDGSException, RatelimitException

        try:
            rows = DDGS(timeout=int(_TIMEOUT_S)).text(query, max_results=count)
        except RatelimitException:
            raise RateLimited(self.name) from None
        except DDGSException as error:
            message = str(error)
            if "no results" in message.lower():
                return []
            if "202" in message or "429" in message:
                raise RateLimited(self.name) from None
            raise Unreachable(self.name, f"no answer ({type(error).__name__}): check the connection") from None
        return [
            as_result(self.name, row["href"], row.get("title", ""), row.get("body", ""), None, rank)
            for rank, row in enumerate(rows[:count])
            if is_web(str(row.get("href", "")))
        ]


def builtin_index() -> Path:
    """The index of the corpus that comes with tenfold, made when it is first asked for, in the user's cache folder."""
    from tenfold import __version__
    from tenfold.agent.data import embedded_corpus
    from tenfold.agent.index import LocalIndex

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tenfold" / f"agent-builtin-{__version__}"
    if not (folder / "index.json").exists():
        LocalIndex.build([embedded_corpus()], folder)
    return folder


# Names on the command line; `local:` and `searxng:` take what follows the colon.
NAMES = ("local:FOLDER", "local:builtin", "world", "searxng:URL", "brave", "serper", "langsearch", "ddgs")


def engine(name: str, offline: bool = False) -> Engine:
    """The engine that a name on the command line stands for, such as `local:index` or `brave`.

    Args:
        name: one of NAMES.
        offline: refuse every engine that would open a connection.

    Raises:
        UserError: an unknown name, a folder without an index, an engine of the web in an offline run.
    """
    kind, _, rest = name.partition(":")
    if kind == "local":
        if not rest:
            raise UserError("local: names no folder: for example local:index")
        return Local(builtin_index() if rest == "builtin" else Path(rest))
    if name == "world":
        from tenfold.agent.world import World

        return World()
    web: dict[str, type[Brave] | type[Serper] | type[LangSearch] | type[Ddgs]] = {
        "brave": Brave,
        "serper": Serper,
        "langsearch": LangSearch,
        "ddgs": Ddgs,
    }
    if kind not in web and kind != "searxng":
        raise UserError(
            f"unknown search engine {name!r}: {near(kind, [*web, 'local', 'searxng', 'world'])} ({', '.join(NAMES)})"
        )
    if offline:
        raise UserError(f"{name}: needs a connection, and the run is offline: use local:FOLDER")
    if kind == "searxng":
        return SearXNG(rest)
    if rest:
        raise UserError(f"{name}: takes nothing after the colon")
    return web[kind]()


def _get(value: object, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _iso_date(value: object) -> str | None:
    found = re.match(r"\d{4}-\d{2}-\d{2}", str(value or ""))
    return found[0] if found else None
