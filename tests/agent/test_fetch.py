from __future__ import annotations

import asyncio
import gzip
import http.server
import ipaddress
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tenfold.agent.addresses import BlockedError, check_address, parse_target
from tenfold.agent.cache import Cache
from tenfold.agent.fetch import (
    Blocked,
    Fetcher,
    FetchError,
    Forbidden,
    Limits,
    NoAnswer,
    NotText,
    TooLarge,
    open_page,
)
from tenfold.agent.search import Page
from tenfold.core.console import UserError

# "The internet" of these tests is one loopback address, and what must not be reached is another.
PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"
STORY = "<title>Tower</title><p>The tower at Grey Point was lit in 1871. " + "It stands on granite above the sea. " * 10

Handler = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site:
    """A web server on a thread: `pages` maps a path to what answers it; `asked` lists what it was asked for."""

    def __init__(self, address: str, port: int = 0) -> None:
        self.pages: dict[str, Handler] = {}
        self.asked: list[tuple[str, str]] = []
        self.times: list[float] = []
        site = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, self.headers.get("Host", "")))
                site.times.append(time.monotonic())
                site.pages.get(self.path, lambda request: send(request, b"", 404))(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients of these tests hang up

        self.server = Server((address, port), Answer)
        self.port = self.server.server_address[1]
        self.paths = lambda: [path for path, _ in self.asked]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def send(
    request: http.server.BaseHTTPRequestHandler,
    body: bytes,
    status: int = 200,
    kind: str = "text/html; charset=utf-8",
    **headers: str,
) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    if "Content_Length" not in headers:
        request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def text(body: str = STORY, **headers: str) -> Handler:
    return lambda request: send(request, body.encode(), **headers)


def redirect(where: str, status: int = 302) -> Handler:
    return lambda request: send(request, b"", status, Location=where)


@pytest.fixture
def sites() -> Iterator[tuple[Site, Site]]:
    """A public and a private server on the same port."""
    public = Site(PUBLIC)
    private = Site(PRIVATE, public.port)
    public.pages["/"] = private.pages["/"] = text()
    yield public, private
    public.close()
    private.close()


def fetcher(
    site: Site, answers: Sequence[Sequence[str]] = ((PUBLIC,),), limits: dict | None = None, **options: object
) -> Fetcher:
    """A fetcher for which PUBLIC is public; its resolver gives each of `answers` in turn, the last one for ever."""
    waiting = list(answers)

    async def resolver(host: str, port: int) -> Sequence[str]:
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    settings = {"ports": (80, 443, site.port), "networks": (f"{PUBLIC}/32",), "host_interval_s": 0.0, "seconds": 60.0}
    settings |= limits or {}
    return Fetcher(Limits(**settings), resolver=resolver, **{"obey_robots": False, **options})  # type: ignore[arg-type]


def read(reader: Fetcher, url: str) -> Page:
    return asyncio.run(reader.open_page(url))


# --- Addresses ----------------------------------------------------------------------------------------------------

# {p} is the port of a private server that listens on 127.0.0.1 and would answer.
FORMS = [
    "http://127.0.0.1:{p}/",
    "http://localhost:{p}/",
    "http://LOCALHOST.:{p}/",
    "http://sub.localhost:{p}/",
    "http://printer.local:{p}/",
    "http://db.internal:{p}/",
    "http://127.1:{p}/",
    "http://127.0.1:{p}/",
    "http://0:{p}/",
    "http://0.0.0.0:{p}/",
    "http://2130706433:{p}/",
    "http://0x7f000001:{p}/",
    "http://0x7f.0.0.1:{p}/",
    "http://0x7f.1:{p}/",
    "http://017700000001:{p}/",
    "http://0177.0.0.1:{p}/",
    "http://127.0.0.01:{p}/",
    "http://127.0.0.0x1:{p}/",
    "http://127.0.0.1.:{p}/",
    "http://１２７.０.０.１:{p}/",
    "http://①②⑦.⓪.⓪.①:{p}/",
    "http://127。0。0。1:{p}/",
    "http://ⓛocalhost:{p}/",
    "http://[::1]:{p}/",
    "http://[0:0:0:0:0:0:0:1]:{p}/",
    "http://[::]:{p}/",
    "http://[::ffff:127.0.0.1]:{p}/",
    "http://[::ffff:7f00:1]:{p}/",
    "http://[::127.0.0.1]:{p}/",
    "http://[64:ff9b::127.0.0.1]:{p}/",
    "http://[64:ff9b:1::7f00:1]:{p}/",
    "http://[2002:7f00:1::]:{p}/",
    "http://[2001:0:7f00:1::1]:{p}/",
    "http://[::ffff:0:127.0.0.1]:{p}/",
    "http://[fe80::1]:{p}/",
    "http://[fe80::1%25eth0]:{p}/",
    "http://[fec0::1]:{p}/",
    "http://[fc00::1]:{p}/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[ff02::1]:{p}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/",
    "http://2852039166/",
    "http://100.100.100.200/",
    "http://100.64.0.1/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
    "http://198.18.0.1/",
    "http://192.0.2.1/",
    "http://224.0.0.1/",
    "http://239.255.255.250/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://user@127.0.0.1:{p}/",
    "http://example.com@127.0.0.1:{p}/",
    "http://127.0.0.1:{p}@example.com/",
    "http://127.0.0.1:{p}\\@example.com/",
    "http://example.com:22/",
    "http://example.com:6379/",
    "http://example.com:99999/",
    "http://exa mple.com/",
    "http://example.com\r\nHost: x/",
    "http:///",
    "http://%6c%6f%63alhost:{p}/",
    "http://[::1/",
    "file:///etc/passwd",
    "ftp://example.com/",
    "gopher://127.0.0.1:{p}/_x",
    "data:text/html,x",
    "javascript:alert(1)",
    "//127.0.0.1:{p}/",
    "127.0.0.1:{p}",
    "https://127.0.0.1:{p}/",
]


@pytest.mark.parametrize("form", FORMS)
def test_no_spelling_of_a_private_address_is_opened(form: str, sites: tuple[Site, Site]) -> None:
    public, private = sites
    url = form.format(p=public.port)
    # The resolver is the system's: it must not matter what it makes of odd spellings.
    limits = Limits(ports=(80, 443, public.port), host_interval_s=0.0)
    with pytest.raises(Blocked) as error:
        asyncio.run(Fetcher(limits, obey_robots=False).open_page(url))
    assert "\n" not in str(error.value)
    assert private.asked == []


@pytest.mark.parametrize("form", FORMS)
def test_no_redirect_leads_to_a_private_address(form: str, sites: tuple[Site, Site]) -> None:
    public, private = sites
    location = form.format(p=public.port).replace("\r\n", "%0d%0a ")
    public.pages["/go"] = lambda request: send(request, b"", 302, Location=location.encode().decode("latin-1"))
    with pytest.raises((Blocked, NoAnswer)) as error:
        read(fetcher(public, ((PUBLIC,), (PRIVATE,))), f"http://site.test:{public.port}/go")
    assert isinstance(error.value, Blocked) or "404" in error.value.reason or "redirects" in error.value.reason
    assert private.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_checked_whatever_its_kind(status: int, sites: tuple[Site, Site]) -> None:
    public, private = sites
    public.pages["/go"] = redirect(f"http://{PRIVATE}:{public.port}/", status)
    with pytest.raises(Blocked, match="redirects to"):
        read(fetcher(public), f"http://site.test:{public.port}/go")
    assert private.asked == []


def test_a_name_that_changes_its_address_after_the_check_gains_nothing(sites: tuple[Site, Site]) -> None:
    public, private = sites
    # Looked up once per request: the connection goes to the address that was checked.
    assert read(fetcher(public, ((PUBLIC,), (PRIVATE,))), f"http://trap.test:{public.port}/").title == "Tower"
    assert private.asked == []
    # Looked up anew for the page after robots.txt, and checked anew.
    public.asked.clear()
    with pytest.raises(Blocked, match="not an address of the public internet"):
        read(fetcher(public, ((PUBLIC,), (PRIVATE,)), obey_robots=True), f"http://trap.test:{public.port}/")
    assert public.paths() == ["/robots.txt"]
    assert private.asked == []


@pytest.mark.parametrize(
    "answer", [(PUBLIC, PRIVATE), (PRIVATE, PUBLIC), ("::1",), ("::ffff:127.0.0.1",), ("10.0.0.1",)]
)
def test_a_name_with_one_private_address_is_not_opened(answer: Sequence[str], sites: tuple[Site, Site]) -> None:
    public, private = sites
    with pytest.raises(Blocked):
        read(fetcher(public, (answer,)), f"http://mixed.test:{public.port}/")
    assert public.asked == private.asked == []


def test_the_host_of_the_page_is_what_the_server_is_told(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    page = read(fetcher(public), f"http://Site.Test:{public.port}/#part")
    assert public.asked == [("/", f"site.test:{public.port}")]
    assert page.url == f"http://Site.Test:{public.port}/"


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::101:101", "::ffff:1.1.1.1"]
)
def test_public_addresses_pass(address: str) -> None:
    assert check_address(address) == ipaddress.ip_address(address)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://Example.COM/x", "example.com", 443),
        ("http://example.com.:80/", "example.com", 80),
        ("http://bücher.example/", "xn--bcher-kva.example", 80),
        ("http://[2606:2800:220:1:248:1893:25c8:1946]/", "2606:2800:220:1:248:1893:25c8:1946", 80),
        ("http://a_b.example.org/", "a_b.example.org", 80),
    ],
)
def test_public_names_pass(url: str, host: str, port: int) -> None:
    target = parse_target(url, (80, 443))
    assert (target.host, target.port) == (host, port)


def test_every_special_network_is_refused() -> None:
    special = "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.2.0/24 192.168.0.0/16 "
    special += (
        "198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 ::1/128 fc00::/7 fe80::/10 ff00::/8"
    )
    for name in special.split():
        network = ipaddress.ip_network(name)
        for address in (network[0], network[-1], network[network.num_addresses // 2]):
            with pytest.raises(BlockedError):
                check_address(str(address))
            if isinstance(address, ipaddress.IPv4Address):
                six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))
                for form in (f"::ffff:{address}", f"64:ff9b::{address}", str(six_to_four)):
                    with pytest.raises(BlockedError):
                        check_address(form)


def test_domains_can_be_allowed_and_denied(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    url = f"http://docs.site.test:{public.port}/"
    assert read(fetcher(public, limits={"allow_domains": ("site.test",)}), url).title == "Tower"
    for limits in ({"allow_domains": ("other.test", "cs.site.test")}, {"deny_domains": ("site.test",)}):
        with pytest.raises(Blocked, match=r"docs\.site\.test"):
            read(fetcher(public, limits=limits), url)


# --- Servers that mean no good ------------------------------------------------------------------------------------


def test_redirects_end(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    public.pages["/loop"] = redirect("/loop")
    public.pages["/a"] = redirect("/b")
    public.pages["/b"] = redirect("/a")
    for path in ("/loop", "/a"):
        public.asked.clear()
        with pytest.raises(NoAnswer, match="more than 5 redirects"):
            read(fetcher(public), f"http://site.test:{public.port}{path}")
        assert len(public.asked) == 6
    public.pages["/5"] = text()
    for number in range(5):
        public.pages[f"/{number}"] = redirect(f"{number + 1}")
    assert read(fetcher(public), f"http://site.test:{public.port}/0").url.endswith("/5")


def endless(request: http.server.BaseHTTPRequestHandler) -> None:
    """A page without an end and without an announced length."""
    request.send_response(200)
    request.send_header("Content-Type", "text/html")
    request.end_headers()
    chunk = b"<p>more</p>" * 6000
    while True:
        request.wfile.write(chunk)


def dripping(request: http.server.BaseHTTPRequestHandler) -> None:
    """A byte now and then: every single read is in time, and the whole never comes."""
    request.send_response(200)
    request.send_header("Content-Type", "text/html")
    request.end_headers()
    for _ in range(10_000):
        request.wfile.write(b"x")
        request.wfile.flush()
        time.sleep(0.02)


def dripping_header(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000):
        request.wfile.write(f"X-{number}: y\r\n".encode())
        request.wfile.flush()
        time.sleep(0.02)


def gzip_bomb(request: http.server.BaseHTTPRequestHandler) -> None:
    send(request, gzip.compress(bytes(50_000_000), 9), Content_Encoding="gzip")


def test_a_page_of_a_gigabyte_is_refused_before_it_is_read(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    public.pages["/huge"] = lambda request: send(request, b"<p>x", Content_Length="1000000000")
    public.pages["/endless"] = endless
    public.pages["/bomb"] = gzip_bomb
    for path, message in [("/huge", "1000 MB"), ("/endless", "more than 5 MB"), ("/bomb", "more than 5 MB")]:
        with pytest.raises(TooLarge, match=message):
            read(fetcher(public), f"http://site.test:{public.port}{path}")


def test_a_bomb_in_the_robots_file_is_no_way_in(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    public.pages["/robots.txt"] = gzip_bomb
    assert read(fetcher(public, obey_robots=True), f"http://site.test:{public.port}/").title == "Tower"


@pytest.mark.parametrize("drip", [dripping, dripping_header])
def test_a_server_that_drips_is_left(drip: Handler, sites: tuple[Site, Site]) -> None:
    public, _ = sites
    public.pages["/drip"] = drip
    started = time.monotonic()
    with pytest.raises(NoAnswer, match=r"longer than 0\.4 s"):
        read(fetcher(public, limits={"seconds": 0.4}), f"http://site.test:{public.port}/drip")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("pack", "coding"),
    [
        (gzip.compress, "gzip"),
        (zlib.compress, "deflate"),
        (lambda body: zlib.compress(body)[2:-4], "deflate"),
        (lambda body: body, "identity"),
    ],
)
def test_packed_pages_are_unpacked(pack: Callable[[bytes], bytes], coding: str, sites: tuple[Site, Site]) -> None:
    public, _ = sites
    body = pack(STORY.encode())
    public.pages["/packed"] = lambda request: send(request, body, Content_Encoding=coding)
    page = read(fetcher(public), f"http://site.test:{public.port}/packed")
    assert "lit in 1871" in page.text
    assert page.bytes == len(body)


def not_http(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"SSH-2.0-nothing\r\n\x00\xff\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda r: send(r, b"x", kind="image/png"), NotText, "image/png"),
        (lambda r: send(r, b"x", kind=""), NotText, "not stated"),
        (lambda r: send(r, b"MZ\x00\x01\x02" * 99, kind="text/plain"), NotText, "not text"),
        (lambda r: send(r, b"%PDF-1.4 x", kind="application/pdf"), NotText, "damaged PDF"),
        (lambda r: send(r, b"<script>x</script>"), NotText, "no text"),
        (lambda r: send(r, b"abc", Content_Encoding="br"), NotText, "packed as br"),
        (lambda r: send(r, b"no gzip", Content_Encoding="gzip"), NoAnswer, "packed badly"),
        (lambda r: send(r, b"", 404), NoAnswer, "404"),
        (lambda r: send(r, b"", 500), NoAnswer, "500"),
        (lambda r: send(r, b"", 302), NoAnswer, "302"),
        (lambda r: send(r, b"x" * 10, Content_Length="99"), NoAnswer, "."),
        (not_http, NoAnswer, "."),
        (lambda r: r.connection.shutdown(socket.SHUT_RDWR), NoAnswer, "."),
        (lambda r: send(r, b"", 302, Location="http://[::1"), Blocked, "."),
    ],
)
def test_bad_answers_are_told_apart(
    answer: Handler, kind: type[FetchError], message: str, sites: tuple[Site, Site]
) -> None:
    public, _ = sites
    public.pages["/bad"] = answer
    with pytest.raises(kind, match=message) as error:
        read(fetcher(public), f"http://site.test:{public.port}/bad")
    assert "\n" not in str(error.value)


def test_a_host_that_is_not_there_is_no_answer(sites: tuple[Site, Site]) -> None:
    public, _ = sites

    async def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(NoAnswer, match=r"the name nowhere\.test is not known"):
        read(Fetcher(obey_robots=False, resolver=unknown), "http://nowhere.test/")
    public.close()
    with pytest.raises(NoAnswer, match="cannot connect"):
        read(fetcher(public), f"http://site.test:{public.port}/")


# --- Manners ------------------------------------------------------------------------------------------------------


def test_robots_are_obeyed_and_asked_once(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    public.pages["/robots.txt"] = text("User-agent: *\nDisallow: /private\n", kind="text/plain")
    public.pages["/private/a"] = text()
    reader = fetcher(public, obey_robots=True)

    async def run() -> None:
        with pytest.raises(Forbidden, match=r"robots\.txt"):
            await reader.open_page(f"http://site.test:{public.port}/private/a")
        assert (await reader.open_page(f"http://site.test:{public.port}/")).title == "Tower"

    asyncio.run(run())
    assert public.paths() == ["/robots.txt", "/"]


def test_a_failing_robots_file_forbids_and_a_missing_one_allows(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    assert read(fetcher(public, obey_robots=True), f"http://site.test:{public.port}/").title == "Tower"
    public.pages["/robots.txt"] = lambda request: send(request, b"", 503)
    with pytest.raises(Forbidden):
        read(fetcher(public, obey_robots=True), f"http://site.test:{public.port}/")


def test_a_host_is_asked_no_faster_than_its_pace(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    reader = fetcher(public, limits={"host_interval_s": 0.15})
    urls = [f"http://site.test:{public.port}/?{number}" for number in range(4)]
    for number in range(4):
        public.pages[f"/?{number}"] = text()

    async def run() -> None:
        await asyncio.gather(*(reader.open_page(url) for url in urls))

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started >= 0.44


def test_no_cookie_goes_back(sites: tuple[Site, Site]) -> None:
    public, _ = sites
    seen: list[str | None] = []

    def page(request: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(request.headers.get("Cookie"))
        send(request, STORY.encode(), Set_Cookie="id=1")

    public.pages["/c"] = page
    reader = fetcher(public)

    async def run() -> None:
        await reader.open_page(f"http://site.test:{public.port}/c")
        await reader.open_page(f"http://site.test:{public.port}/c")

    asyncio.run(run())
    assert seen == [None, None]


def test_a_page_that_was_read_is_not_asked_for_again_and_offline_opens_nothing(
    sites: tuple[Site, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, _ = sites
    cache = Cache(tmp_path / "cache.sqlite")
    url = f"http://site.test:{public.port}/"
    first = read(fetcher(public, cache=cache), url)
    assert read(fetcher(public, cache=cache), url) == first
    assert public.paths() == ["/"]

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert read(Fetcher(cache=cache, offline=True), url) == first
    with pytest.raises(NoAnswer, match="offline"):
        read(Fetcher(cache=cache, offline=True), "http://other.test/")


def test_the_shortcut_and_the_verb_refuse_the_same(tmp_path: Path, run_tenfold: Callable) -> None:
    from tenfold.agent.cli import VERBS

    with pytest.raises(Blocked):
        asyncio.run(open_page("http://127.0.0.1/"))
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*not an address of the public internet"):
        VERBS["fetch"](("http://127.0.0.1/",))
    with pytest.raises(UserError, match=r"10\.1\.0\.0/16"):
        VERBS["fetch"](("http://127.0.0.1/",), allow_network=("nonsense",))


def test_the_verb_shows_passages(sites: tuple[Site, Site], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tenfold.agent.cli import VERBS

    public, _ = sites
    cache = tmp_path / "cache.sqlite"
    url = f"http://site.test:{public.port}/"
    read(fetcher(public, cache=Cache(cache)), url)
    VERBS["fetch"]((url,), query="tower", cache=cache, offline=True)
    assert "lit in 1871" in capsys.readouterr().out
