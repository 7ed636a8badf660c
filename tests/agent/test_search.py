from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.agent.cache import Cache
from tenfold.agent.engines import Brave, Ddgs, LangSearch, Local, SearXNG, Serper, WebEngine, engine
from tenfold.agent.index import LocalIndex
from tenfold.agent.passages import TOKENS_PER_QUERY, TOKENS_PER_RESULT, TOKENS_PER_ROUND, estimate_tokens
from tenfold.agent.search import (
    KeyMissing,
    Page,
    RateLimited,
    Result,
    Search,
    SearchError,
    SearchEvent,
    Unreachable,
    fit,
    fit_round,
    fuse,
    normalise_query,
)
from tenfold.core.console import UserError

KEY = "sk-this-is-a-secret-key"


def result(url: str, text: str = "words", engine_name: str = "one", passages: Sequence[str] | None = None) -> Result:
    shown = (text,) if passages is None else tuple(passages)
    return Result(
        url, url[-5:], text, None, 1.0, shown, engine_name, hashlib.sha256(text.encode()).hexdigest(), "2025-01-01"
    )


class Scripted:
    """An engine that answers from a list: results, or errors to raise."""

    def __init__(self, name: str, *answers: Sequence[Result] | SearchError) -> None:
        self.name = name
        self.answers = list(answers)
        self.asked: list[str] = []

    async def search(self, query: str, count: int) -> list[Result]:
        self.asked.append(query)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, SearchError):
            raise answer
        return list(answer)[:count]


def ask(search: Search, query: str = "lamp", count: int = 2) -> list[Result]:
    return asyncio.run(search.search(query, count))


# --- Fusion and budgets -------------------------------------------------------------------------------------------


def test_a_page_that_two_engines_find_comes_first() -> None:
    one = [result("http://a.test/1"), result("http://www.b.test/x/")]
    two = [result("http://c.test/", engine_name="two"), result("https://b.test/x#part", "longer words", "two")]
    fused = fuse([one, two], 3)
    assert [item.url for item in fused] == ["https://b.test/x#part", "http://a.test/1", "http://c.test/"]
    assert fused[0].engine == "one+two"
    assert fused[0].score == pytest.approx(2 / 62)


def test_local_pages_that_differ_in_their_fragment_are_different_pages() -> None:
    assert len(fuse([[result("file:///c.jsonl#1"), result("file:///c.jsonl#2")]], 5)) == 2


passage_lists = st.lists(st.lists(st.text("ab 中.", min_size=1, max_size=3000), max_size=4), max_size=6)


@settings(deadline=None, max_examples=40)
@given(passage_lists, st.sampled_from([estimate_tokens, len, lambda text: len(text.encode())]))
def test_budgets_hold_by_any_count_of_tokens(passages: list[list[str]], count_tokens: Callable[[str], int]) -> None:
    fitted = fit(
        [result(f"http://a.test/{n}", passages=shown) for n, shown in enumerate(passages)], count_tokens=count_tokens
    )
    sums = [sum(map(count_tokens, item.passages)) for item in fitted]
    assert all(0 < cost <= TOKENS_PER_RESULT for cost in sums)
    assert sum(sums) <= TOKENS_PER_QUERY


def test_a_round_of_five_long_answers_is_cut_fairly() -> None:
    long = [result(f"http://a.test/{n}", "word " * 2000) for n in range(5)]
    fitted = fit_round([long] * 5)
    sums = [sum(estimate_tokens(text) for item in answer for text in item.passages) for answer in fitted]
    assert sum(sums) <= TOKENS_PER_ROUND
    assert min(sums) > 700
    short = fit_round([[result("http://a.test/", "word")], long, long])
    assert sum(estimate_tokens(text) for item in short[2] for text in item.passages) > 1500


def test_queries_that_mean_the_same_are_the_same() -> None:
    assert normalise_query("  Who  LIT the Tower?? ") == normalise_query("who lit the tower") == "who lit the tower"
    assert normalise_query("ＡＢＣ") == "abc"


# --- Failures -----------------------------------------------------------------------------------------------------


def test_an_engine_out_of_reach_is_asked_again() -> None:
    flaky = Scripted("flaky", Unreachable("flaky", "no answer"), [result("http://a.test/")])
    assert len(ask(Search([flaky]))) == 1
    assert len(flaky.asked) == 2


def test_one_working_engine_is_enough_and_the_others_are_told() -> None:
    events: list[SearchEvent] = []
    dead = Scripted("dead", KeyMissing("dead", "DEAD_KEY"))
    live = Scripted("live", [result("http://a.test/")])
    assert len(ask(Search([dead, live], on_event=events.append))) == 1
    assert {event.engine: event.outcome for event in events} == {"dead": "failed", "live": "found"}
    assert "DEAD_KEY" in next(event.message for event in events if event.engine == "dead")


def test_when_all_fail_the_first_error_is_raised() -> None:
    with pytest.raises(KeyMissing) as error:
        ask(Search([Scripted("one", KeyMissing("one", "ONE_KEY")), Scripted("two", SearchError("two", "x"))]))
    assert error.value.variable == "ONE_KEY"


def test_a_rate_limited_engine_rests_and_the_next_one_answers() -> None:
    limited = Scripted("limited", RateLimited("limited", 60))
    other = Scripted("other", [result("http://a.test/")])
    events: list[SearchEvent] = []
    search = Search([limited, other], mode="first", on_event=events.append)

    async def run() -> None:
        for query in ("one", "two", "three"):
            assert len(await search.search(query, 2)) == 1

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started < 60
    assert limited.asked == ["one"]
    assert [event.outcome for event in events if event.engine == "limited"] == ["failed", "paused", "paused"]


def test_a_short_pause_is_waited_for() -> None:
    limited = Scripted("limited", RateLimited("limited", 0.05), [result("http://a.test/")])
    assert len(ask(Search([limited]))) == 1


def test_the_first_engine_that_finds_something_is_the_last_one_asked() -> None:
    empty, full, spare = Scripted("empty", []), Scripted("full", [result("http://a.test/")]), Scripted("spare", [])
    assert len(ask(Search([empty, full, spare], mode="first"))) == 1
    assert spare.asked == []


def test_a_query_without_words_finds_nothing_and_asks_nobody() -> None:
    one = Scripted("one", [result("http://a.test/")])
    assert ask(Search([one]), "  ?? ") == []
    assert one.asked == []
    with pytest.raises(UserError, match="no search engine"):
        Search([])


# --- Cache and pages ----------------------------------------------------------------------------------------------


def test_the_same_question_is_asked_once_and_the_answer_stays_the_same(tmp_path: Path) -> None:
    one = Scripted("one", [result("http://a.test/", passages=("a", "b"))])
    first = ask(Search([one], Cache(tmp_path / "c.sqlite")), "Who lit it?")
    again = ask(Search([one], Cache(tmp_path / "c.sqlite")), "who lit  it")
    assert first == again
    assert one.asked == ["Who lit it?"]
    assert ask(Search([one], Cache(tmp_path / "c.sqlite")), "who lit it", 1) and len(one.asked) == 2
    assert Cache(tmp_path / "c.sqlite", longest_age_s=0.0).results("one", "who lit it", 2) is None


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    one = Scripted("one", SearchError("one", "x"), [result("http://a.test/")])
    search = Search([one], Cache(tmp_path / "c.sqlite"))
    with pytest.raises(SearchError):
        ask(search)
    assert len(ask(search)) == 1


def test_a_damaged_cache_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"garbage" * 500)
    with pytest.raises(UserError, match="delete it"):
        Cache(tmp_path / "c.sqlite")


class Library:
    """A reader of pages that knows one."""

    async def open_page(self, url: str) -> Page:
        if url != "http://a.test/long":
            raise UserError("not here")
        text = "\n\n".join([f"Paragraph {n} is about ropes and herring. " * 10 for n in range(60)])
        text += "\n\nThe tower was lit in 1871 by Ada Brook."
        return Page(url, "Tower", text, "2024-05-01", "0" * 64, "2025-01-01", "text/html", 10)


def test_passages_come_from_the_whole_page_and_a_page_that_fails_keeps_its_summary() -> None:
    one = Scripted("one", [result("http://a.test/long", "summary"), result("http://a.test/gone", "other summary")])
    first, second = ask(Search([one], reader=Library()), "who lit the tower")
    assert any("Ada Brook" in passage for passage in first.passages)
    assert (first.title, first.date) == ("Tower", "2024-05-01")
    assert second.passages == ("other summary",)


# --- Services -----------------------------------------------------------------------------------------------------

ROW = {"title": "A", "name": "A", "url": "http://a.test/", "link": "http://a.test/"}
BRAVE_ROW = {**ROW, "title": "<strong>A</strong>", "description": "d <b>e</b>", "extra_snippets": ["f"]}
ANSWERS: dict[str, Any] = {
    "brave": {"web": {"results": [{**BRAVE_ROW, "page_age": "2024-05-01T00:00:00"}]}},
    "serper": {"organic": [{**ROW, "snippet": "d e", "date": "May 1, 2024"}]},
    "langsearch": {"data": {"webPages": {"value": [{**ROW, "snippet": "s", "summary": "d e"}]}}},
    "searxng": {"results": [{**ROW, "content": "d e"}, {"url": "magnet:?x", "title": "B"}]},
}
ODD_ANSWERS: list[dict[str, Any]] = [
    {},
    {"web": None, "organic": {}, "data": [], "results": "x"},
    {
        "results": [None, 1, {"url": None}, {"url": 3}],
        "organic": [{}, {"link": ["x"]}],
        "web": {"results": [{"url": "ftp://x"}]},
        "data": {"webPages": {"value": [[]]}},
    },
]


class Service:
    """A search service on a thread that answers with whatever `answer` is and notes what it was asked."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes, dict[str, str]] = (200, b"{}", {})
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                service.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status, content, headers = service.answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.server.shutdown()
    running.server.server_close()


def made(name: str, service: Service, key: str | None = KEY) -> WebEngine:
    if name == "searxng":
        return SearXNG(service.url)
    kinds: dict[str, type[Brave] | type[Serper] | type[LangSearch]]
    kinds = {"brave": Brave, "serper": Serper, "langsearch": LangSearch}
    return kinds[name](key, service.url)


@pytest.mark.parametrize("name", list(ANSWERS))
def test_each_service_is_understood(name: str, service: Service) -> None:
    service.answer = (200, json.dumps(ANSWERS[name]).encode(), {})
    (found,) = ask(Search([made(name, service)]), "lamp? & co", 3)
    assert (found.url, found.title, found.engine) == ("http://a.test/", "A", name)
    assert found.text.startswith("d e")
    assert found.sha256 == hashlib.sha256(found.text.encode()).hexdigest()
    path, headers, body = service.asked[0]
    assert "lamp" in path or b"lamp" in body
    assert (KEY in str(headers)) == (name != "searxng")
    assert KEY not in path


@pytest.mark.parametrize("name", list(ANSWERS))
@pytest.mark.parametrize(
    ("status", "content", "headers", "kind"),
    [
        (429, b"", {"Retry-After": "90"}, RateLimited),
        (429, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, RateLimited),
        (400, b"", {}, SearchError),
        (302, b"", {"Location": "http://127.0.0.1/"}, Unreachable),
        (200, b"<html>", {}, Unreachable),
        (200, b"[1]", {}, Unreachable),
        (200, b'{"web": ', {}, Unreachable),
        (200, b"", {"Content-Length": "50"}, Unreachable),
    ],
)
def test_each_refusal_has_its_error(
    name: str, status: int, content: bytes, headers: dict[str, str], kind: type[SearchError], service: Service
) -> None:
    service.answer = (status, content, headers)
    with pytest.raises(kind) as error:
        asyncio.run(made(name, service).search("lamp", 2))  # type: ignore[attr-defined]
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)
    if headers.get("Retry-After") == "90":
        assert isinstance(error.value, RateLimited)
        assert error.value.wait_s == 90


@pytest.mark.parametrize("name", list(ANSWERS))
@pytest.mark.parametrize("answer", ODD_ANSWERS)
def test_an_answer_of_another_shape_is_an_empty_one(name: str, answer: dict, service: Service) -> None:
    service.answer = (200, json.dumps(answer).encode(), {})
    assert asyncio.run(made(name, service).search("lamp", 2)) == []  # type: ignore[attr-defined]


def test_a_missing_and_a_refused_key_name_their_variable(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    with pytest.raises(KeyMissing, match="set the environment variable BRAVE_API_KEY"):
        asyncio.run(Brave(base=service.url).search("lamp", 2))
    assert service.asked == []
    service.answer = (401, b"", {})
    with pytest.raises(KeyMissing, match="refused"):
        asyncio.run(Brave(KEY, service.url).search("lamp", 2))


def test_a_dead_service_is_unreachable(service: Service) -> None:
    service.server.server_close()
    with pytest.raises(Unreachable, match="check the connection"):
        asyncio.run(SearXNG("http://127.0.0.1:9").search("lamp", 2))


def test_keys_are_in_no_cache_no_event_and_no_message(service: Service, tmp_path: Path) -> None:
    events: list[SearchEvent] = []
    for name in ("brave", "serper", "langsearch"):
        search = Search([made(name, service)], Cache(tmp_path / "c.sqlite"), on_event=events.append)
        for status in (200, 401, 500):
            service.answer = (status, json.dumps(ANSWERS[name]).encode(), {})
            try:
                ask(search, f"lamp {status}")
            except SearchError as error:
                assert KEY not in str(error) + repr(error)
        assert KEY not in repr(search.engines)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"a.test" in stored
    assert KEY.encode() not in stored
    assert KEY not in repr([dataclasses.asdict(event) for event in events])


def test_ddgs_errors_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ddgs
    from ddgs.exceptions import DDGSException, RatelimitException, TimeoutException

    outcome: list[object] = []

    class Fake:
        def __init__(self, **options: object) -> None:
            pass

        def text(self, query: str, max_results: int) -> list[dict[str, str]]:
            if isinstance(outcome[0], Exception):
                raise outcome[0]
            return outcome[0]  # type: ignore[return-value]

    monkeypatch.setattr(ddgs, "DDGS", Fake)
    for raised, kind in [
        (RatelimitException("202 Ratelimit"), RateLimited),
        (TimeoutException("slow"), Unreachable),
        (DDGSException("https://x 202"), RateLimited),
    ]:
        outcome[:] = [raised]
        with pytest.raises(kind):
            asyncio.run(Ddgs().search("lamp", 2))
    outcome[:] = [DDGSException("No results found.")]
    assert asyncio.run(Ddgs().search("lamp", 2)) == []
    outcome[:] = [[{"href": "http://a.test/", "title": "A", "body": "d e"}, {"href": "x"}]]
    (found,) = asyncio.run(Ddgs().search("lamp", 2))
    assert (found.url, found.text) == ("http://a.test/", "d e")


# --- Names and the local engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    (folder / "a.txt").write_text("Grey Point\n\nThe tower was lit in 1871.")
    LocalIndex.build([folder / "a.txt"], folder / "index")
    return folder / "index"


def test_engines_have_names_on_the_command_line(index: Path) -> None:
    assert isinstance(engine(f"local:{index}"), Local)
    assert isinstance(engine("searxng:http://localhost:8888"), SearXNG)
    assert engine("brave").name == "brave"
    for name, message in [
        ("bravo", "did you mean brave|brave"),
        ("local", "names no folder"),
        ("local:nowhere", "no index is here"),
        ("searxng:localhost", "not an address"),
        ("ddgs:x", "nothing after the colon"),
    ]:
        with pytest.raises(UserError, match=message):
            engine(name)
    for name in ("brave", "ddgs", "searxng:http://localhost"):
        with pytest.raises(UserError, match="the run is offline"):
            engine(name, offline=True)


def test_a_local_search_opens_no_connection(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    local = engine(f"local:{index}", offline=True)
    (found,) = ask(Search([local], Cache(tmp_path / "c.sqlite")), "when was the tower lit")
    assert "1871" in found.passages[0]
    assert isinstance(local, Local)
    assert asyncio.run(local.open_page(found.url)).text == found.text
