"""Pages of the open web, read with care: checked addresses, few redirects, small bodies, patience with servers.

Every redirect is checked like the first address. A page is read as long as it is small and its server is quick; what
is packed is unpacked no further than the limit. Robots' rules are kept, and each host is asked once a second at most.
No cookies are kept, no script runs, and no proxy is used, since behind one nobody could say where a connection ends.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import re
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from tenfold import __version__
from tenfold.agent.addresses import BlockedError, Network, Target, check_address, parse_target
from tenfold.agent.search import Page
from tenfold.core.console import UserError

if TYPE_CHECKING:
    import httpx
    from protego import Protego

    from tenfold.agent.cache import Cache

# Host and port to IP addresses.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

USER_AGENT = f"tenfold/{__version__} (research agent; reads single pages; obeys robots.txt as 'tenfold')"
ROBOT_NAME = "tenfold"
KINDS = (
    "text/html",
    "application/xhtml+xml",
    "text/plain",
    "text/markdown",
    "application/pdf",
)
_LARGEST_ROBOTS_BYTES = 500_000  # RFC 9309, section 2.5
_LONGEST_CRAWL_DELAY_S = 30.0
_LONGEST_URL = 4_000


class FetchError(UserError):
    """A page that was not read. `url` is the address that was asked for, `reason` says why it was not read."""

    def __init__(self, url: str, reason: str) -> None:
        # Both may hold what a stranger wrote.
        self.url, self.reason = re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", url)[:200], " ".join(reason.split())[:400]
        super().__init__(f"{self.url}: {self.reason}")


class Blocked(FetchError):
    """The address is not one that may be opened."""


class Forbidden(FetchError):
    """The site's robots.txt asks not to read this page."""


class TooLarge(FetchError):
    """The page is larger than the limit, as sent or unpacked."""


class NotText(FetchError):
    """The page is of a kind that holds no text."""


class NoAnswer(FetchError):
    """The server was not reached, was too slow, or answered with an error."""


@dataclass(frozen=True)
class Limits:
    """How much a fetch may cost.

    Args:
        bytes: of a body, as sent and unpacked.
        seconds: from the first look-up to the last byte, redirects included.
        redirects: that are followed.
        host_interval_s: between two requests to one host.
        ports: that are opened.
        networks: private networks that may be opened all the same (`10.1.0.0/16`), for a site of one's own.
        allow_domains: if there are any, only these domains and those below them.
        deny_domains: never these.
    """

    bytes: int = 5_000_000
    seconds: float = 10.0
    redirects: int = 5
    host_interval_s: float = 1.0
    ports: tuple[int, ...] = (80, 443)
    networks: tuple[str, ...] = ()
    allow_domains: tuple[str, ...] = ()
    deny_domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answer:
    url: str
    status: int
    kind: str
    body: bytes
    sent: int


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Opens pages. One object serves many at a time, and keeps the pace of each host over all of them.

    Args:
        limits: how much a fetch may cost.
        cache: pages that were read before are taken from here.
        offline: read from the cache only; no connection is made.
        obey_robots: keep the rules of robots.txt.
        resolver: names to addresses.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        cache: Cache | None = None,
        offline: bool = False,
        obey_robots: bool = True,
        resolver: Resolver = resolve,
    ) -> None:
        self.limits = limits or Limits()
        self.cache = cache
        self.offline = offline
        self.obey_robots = obey_robots
        self._resolver = resolver
        try:
            self._networks: tuple[Network, ...] = tuple(map(ipaddress.ip_network, self.limits.networks))
        except ValueError as error:
            raise UserError(f"allowed networks: {error}: give them as 10.1.0.0/16") from None
        self._next_turn: dict[str, float] = {}
        self._robots: dict[str, Protego | None] = {}
        self._delays: dict[str, float] = {}

    async def open_page(self, url: str) -> Page:
        """Read one page as text.

        Raises:
            FetchError: Blocked, Forbidden, TooLarge, NotText or NoAnswer.
        """
        url = url.strip().partition("#")[0]
        if self.cache is not None and (stored := self.cache.page(url)) is not None:
            return stored
        if self.offline:
            raise NoAnswer(url, "not in the cache, and the run is offline")
        try:
            async with asyncio.timeout(self.limits.seconds):
                answer = await self._follow(url, KINDS, self.limits.bytes, self.obey_robots)
        except TimeoutError:
            raise NoAnswer(url, f"took longer than {self.limits.seconds:g} s") from None
        if answer.status != 200:
            raise NoAnswer(url, f"the server answered {answer.status}")
        page = await asyncio.to_thread(_read_page, answer)
        if self.cache is not None:
            self.cache.store_page(url, page)
        return page

    async def _follow(self, url: str, kinds: Sequence[str], largest: int, obey: bool) -> _Answer:
        """The answer at the end of a chain of redirects, each link of which is checked like the first."""
        asked = url
        for _ in range(self.limits.redirects + 1):
            target = self._check(asked, url)
            if obey:
                await self._ask_robots(asked, url, target)
            await self._wait_for_turn(target.host)
            answer = await self._get(asked, url, target, kinds, largest)
            if not isinstance(answer, str):
                return answer
            try:
                asked = urljoin(asked, answer.strip()).partition("#")[0]
            except ValueError as error:
                raise Blocked(url, f"it redirects to what is no address ({error})") from None
        raise NoAnswer(url, f"more than {self.limits.redirects} redirects")

    def _check(self, asked: str, first: str) -> Target:
        """The target of an address that may be opened as far as its spelling tells."""
        if len(asked) > _LONGEST_URL:
            raise Blocked(first, f"the address is longer than {_LONGEST_URL} characters")
        try:
            target = parse_target(asked, self.limits.ports)
        except BlockedError as error:
            raise Blocked(first, _also(asked, first, str(error))) from None
        if _within(target.host, self.limits.deny_domains):
            raise Blocked(first, f"{target.host} is a domain that must not be opened")
        if self.limits.allow_domains and not _within(target.host, self.limits.allow_domains):
            raise Blocked(first, f"{target.host} is not one of the domains that may be opened")
        return target

    async def _addresses(self, asked: str, first: str, target: Target) -> list[str]:
        """The checked addresses of a host. One that must not be opened spoils all: such a name is a trap."""
        try:
            found = [target.host] if _is_address(target.host) else await self._resolver(target.host, target.port)
        except (OSError, UnicodeError) as error:
            raise NoAnswer(first, f"the name {target.host} is not known ({error})") from None
        if not found:
            raise NoAnswer(first, f"the name {target.host} has no address")
        try:
            return [str(check_address(address, self._networks)) for address in found]
        except BlockedError as error:
            raise Blocked(first, _also(asked, first, str(error))) from None

    async def _get(self, asked: str, first: str, target: Target, kinds: Sequence[str], largest: int) -> _Answer | str:
        """One request; the address of a redirect where it is one."""
        import httpx

        problem: Exception | None = None
        for address in (await self._addresses(asked, first, target))[:3]:
            try:
                return await self._get_from(address, asked, first, target, kinds, largest)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem = error
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                raise NoAnswer(first, _one_line(error)) from None
        raise NoAnswer(first, f"cannot connect to {target.host} ({_one_line(problem)})")

    async def _get_from(
        self, address: str, asked: str, first: str, target: Target, kinds: Sequence[str], largest: int
    ) -> _Answer | str:
        import httpx

        # The connection goes to the address that was checked; the host stands in the header, and its name is the one
        # that the certificate is held against. Nothing is kept alive: two hosts may share an address.
        parts = urlsplit(asked)
        host = f"[{address}]" if ":" in address else address
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        shown = f"[{target.host}]" if ":" in target.host else target.host
        usual = target.port == (443 if target.scheme == "https" else 80)
        headers = {
            "Host": shown if usual else f"{shown}:{target.port}",
            "User-Agent": USER_AGENT,
            "Accept": ", ".join(kinds),
            "Accept-Encoding": "gzip, deflate",
        }
        request = httpx.Request(
            "GET",
            f"{target.scheme}://{host}:{target.port}{path}",
            headers=headers,
            extensions={
                "sni_hostname": target.host,
                "timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.limits.seconds),
            },
        )
        async with httpx.AsyncHTTPTransport(trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            response.request = request
            try:
                return await _judge(response, asked, first, kinds, largest)
            finally:
                await response.aclose()

    async def _wait_for_turn(self, host: str) -> None:
        now = time.monotonic()
        turn = max(now, self._next_turn.get(host, 0.0))
        self._next_turn[host] = turn + max(self.limits.host_interval_s, self._delays.get(host, 0.0))
        if turn > now:
            await asyncio.sleep(turn - now)

    async def _ask_robots(self, asked: str, first: str, target: Target) -> None:
        """Raise Forbidden where the site's rules exclude this page (RFC 9309)."""
        from protego import Protego

        site = f"{target.scheme}://{urlsplit(asked).netloc}"
        if site not in self._robots:
            try:
                answer = await self._follow(f"{site}/robots.txt", ("text/plain", *KINDS), _LARGEST_ROBOTS_BYTES, False)
            except (NotText, TooLarge):
                rules = ""
            except Blocked as error:
                raise Blocked(first, error.reason) from None
            except NoAnswer as error:
                raise NoAnswer(first, error.reason) from None
            else:
                # Section 2.3.1: no rules where there is no file; all is forbidden where the server fails.
                rules = "User-agent: *\nDisallow: /" if answer.status >= 500 else ""
                if answer.status == 200:
                    rules = answer.body.decode("utf-8", "replace")
            parsed = Protego.parse(rules)
            self._robots[site] = parsed
            self._delays[target.host] = min(float(parsed.crawl_delay(ROBOT_NAME) or 0.0), _LONGEST_CRAWL_DELAY_S)
        parsed_rules = self._robots[site]
        if parsed_rules is not None and not parsed_rules.can_fetch(asked, ROBOT_NAME):
            raise Forbidden(first, "the site's robots.txt asks programs not to read this page")


async def open_page(url: str, fetcher: Fetcher | None = None) -> Page:
    """Read one page of the web as text, with the usual limits. Raises FetchError."""
    return await (fetcher or Fetcher()).open_page(url)


async def _judge(response: httpx.Response, asked: str, first: str, kinds: Sequence[str], largest: int) -> _Answer | str:
    """What came back: the address of a redirect, or an answer with its body if that is wanted."""
    location = response.headers.get("location")
    if response.status_code in (301, 302, 303, 307, 308) and location:
        return location
    kind = response.headers.get("content-type", "").strip()
    if response.status_code != 200:
        return _Answer(asked, response.status_code, kind, b"", 0)
    if kind.partition(";")[0].strip().lower() not in kinds:
        raise NotText(first, f"its kind is {kind.partition(';')[0][:60] or 'not stated'}, which is not read")
    body, sent = await _read_body(response, first, largest)
    return _Answer(asked, response.status_code, kind, body, sent)


async def _read_body(response: httpx.Response, url: str, largest: int) -> tuple[bytes, int]:
    """A body, unpacked, and how many bytes were sent for it; never more than `largest` of either in memory."""
    announced = response.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > largest:
        raise TooLarge(url, f"{int(announced) / 1e6:.0f} MB, and the limit is {largest / 1e6:g} MB")
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise NotText(url, f"packed as {coding[:40]}, which was not asked for")
    unpacker: Any = None if coding in ("identity", "") else zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    parts: list[bytes] = []
    sent = size = 0
    async for chunk in response.aiter_raw(65_536):
        sent += len(chunk)
        if unpacker is not None:
            try:
                part = unpacker.decompress(chunk, largest - size + 1)
            except zlib.error as error:
                if coding != "deflate" or size or parts:
                    raise NoAnswer(url, f"the page is packed badly ({error})") from None
                unpacker = zlib.decompressobj(wbits=-15)  # many servers send deflate without its frame
                try:
                    part = unpacker.decompress(chunk, largest - size + 1)
                except zlib.error:
                    raise NoAnswer(url, f"the page is packed badly ({error})") from None
        else:
            part = chunk
        size += len(part)
        parts.append(part)
        if size > largest or sent > largest:
            raise TooLarge(url, f"more than {largest / 1e6:g} MB")
    return b"".join(parts), sent


def _read_page(answer: _Answer) -> Page:
    from tenfold.agent.extract import extract

    try:
        found = extract(answer.body, answer.kind, answer.url, web=True)
    except FetchError:
        raise
    except UserError as error:
        raise NotText(answer.url, str(error).removeprefix(f"{answer.url}: ")) from None
    if not found.text:
        raise NotText(answer.url, "the page has no text that can be read without running its scripts")
    return Page(
        url=answer.url,
        title=found.title,
        text=found.text,
        date=found.date,
        sha256=hashlib.sha256(found.text.encode()).hexdigest(),
        fetched_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        content_type=answer.kind.partition(";")[0].strip().lower(),
        bytes=answer.sent,
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _within(host: str, domains: Sequence[str]) -> bool:
    return any(host == domain.lower() or host.endswith("." + domain.lower().lstrip(".")) for domain in domains)


def _also(asked: str, first: str, reason: str) -> str:
    return reason if asked == first else f"it redirects to {asked[:200]}: {reason}"


def _one_line(error: Exception | None) -> str:
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__
