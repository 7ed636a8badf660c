"""What the agent's tests share: a server that speaks as vLLM does, one that fails in every way, and small engines."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tenfold.agent.search import Page, Result
from tenfold.core.console import UserError

Turns = Callable[[list[dict[str, Any]]], str]


def result(title: str, text: str, url: str = "") -> Result:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Result(url or f"file:///{title}", title, text, None, 1.0, (text,), "shelf", digest, "2025-01-01T00:00:00Z")


class Shelf:
    """An engine and a reader over a few pages: a query finds the pages that share a word of its own with it."""

    name = "shelf"

    def __init__(self, *pages: Result) -> None:
        self.pages = pages
        self.asked: list[str] = []
        self.opened: list[str] = []

    async def search(self, query: str, count: int) -> list[Result]:
        self.asked.append(query)
        words = set(query.lower().split())
        return [page for page in self.pages if words & set(f"{page.title} {page.text}".lower().split())][:count]

    async def open_page(self, url: str) -> Page:
        self.opened.append(url)
        for page in self.pages:
            if page.url == url:
                return Page(url, page.title, page.text, None, page.sha256, page.fetched_at, "text/plain", 1)
        raise UserError(f"{url}: there is no such page")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/hang"):
            hang(self, 0)
            return
        self.whole({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        self.request_body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"headers": dict(self.headers), **self.request_body})
            number = len(self.server.requests)
        self.server.behave(self, number)

    def whole(self, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def events(self, *events: Any, done: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for event in events:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            self.wfile.write(text.encode())
            self.wfile.flush()
        if done:
            self.wfile.write(b"data: [DONE]\n\n")

    def say(self, text: str, latency_s: float = 0.0) -> None:
        """Answer as vLLM does: in pieces, the usage in an event of its own, or whole where no stream is asked for."""
        if latency_s:
            time.sleep(latency_s)
        usage = {"prompt_tokens": sum(len(str(m["content"])) for m in self.request_body["messages"]) // 4}
        usage["completion_tokens"] = max(1, len(text) // 4)
        if not self.request_body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.whole({"object": "chat.completion", "choices": [choice], "usage": usage})
            return
        pieces = [{"role": "assistant", "content": ""}] + [{"content": text[i : i + 9]} for i in range(0, len(text), 9)]
        chunks: list[Any] = [
            {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": piece, "finish_reason": None}]}
            for piece in pieces
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.events(": a comment\n\n", *chunks, {"choices": [], "usage": usage})


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what some tests are about."""


@contextmanager
def served(behave: Callable[[Handler, int], None]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on a free port: its address up to /v1, and the requests that it gets."""
    server = _Server(("127.0.0.1", 0), Handler)
    server.behave, server.requests, server.lock = behave, [], threading.Lock()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def follows(turns: Turns, latency_s: float = 0.0) -> Callable[[Handler, int], None]:
    """A server that answers with what `turns` says to the messages."""
    return lambda handler, number: handler.say(turns(handler.request_body["messages"]), latency_s)


def seeker(query: str, answer: str) -> Turns:
    """Searches once, then answers."""

    def turns(messages: Sequence[dict[str, Any]]) -> str:
        if any(message["role"] == "assistant" for message in messages):
            return f"<thinking>It is there.</thinking>{answer}"
        return f"<thinking>I look for it.</thinking>web_search|{{'search_queries': [{query!r}]}}"

    return turns


def hang(handler: Handler, number: int) -> None:
    """Say nothing until the client goes away."""
    handler.close_connection = True
    handler.connection.settimeout(20)
    with suppress(TimeoutError, OSError):
        handler.connection.recv(1)
