"""The agent behind an OpenAI-compatible endpoint, so that any chat program can use it.

`/v1/chat/completions` answers with or without a stream; in a stream, what the agent does comes as reasoning first.
`/v1/models` lists one model. The server is for one's own machine: it listens on the loopback address unless told
otherwise, and refuses requests that a web page elsewhere could have made it receive.
"""

from __future__ import annotations

import hmac
import http.server
import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from tenfold.agent.agent import Agent, Answer
from tenfold.core import console
from tenfold.core.console import UserError

MODEL = "tenfold-agent"
_LARGEST_REQUEST_BYTES = 2_000_000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Server:
    """A running server.

    Args:
        agent: who answers.
        host: address to listen on.
        port: 0 takes a free one; `port` then says which.
        key: bearer token that callers have to send; empty lets everybody in, and is refused beyond the loopback.
        at_once: questions that are answered at the same time; further ones are told to come again (429).

    Raises:
        UserError: an address beyond the loopback without a key; a port that is taken.
    """

    def __init__(
        self, agent: Agent, host: str = "127.0.0.1", port: int = 8080, key: str = "", at_once: int = 4
    ) -> None:
        if host not in _LOOPBACK and not key:
            raise UserError(
                f"{host}: others could reach this server: set TENFOLD_SERVE_KEY to a key that callers have to send"
            )
        self.agent, self.host, self.key = agent, host, key
        self.turns = threading.BoundedSemaphore(at_once)
        handler = type("Handler", (_Handler,), {"owner": self})
        try:
            self._server = http.server.ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --port") from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def serve(self) -> None:
        """Answer until interrupted."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def stop(self) -> None:
        """Let `serve` return."""
        self._server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: they hold people's questions."""

    def do_GET(self) -> None:
        """`/v1/models`, and `/health` for those who watch."""
        if not self._allowed():
            return
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path.rstrip("/") == "/v1/models":
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tenfold"}
            self._send(200, {"object": "list", "data": [model]})
        else:
            self._refuse(404, "there is /v1/chat/completions and /v1/models")

    def do_POST(self) -> None:
        """`/v1/chat/completions`."""
        if not self._allowed():
            return
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._refuse(404, "there is /v1/chat/completions and /v1/models")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _LARGEST_REQUEST_BYTES:
            self._refuse(413, f"a request has a length, and at most {_LARGEST_REQUEST_BYTES} bytes")
            return
        try:
            request = json.loads(self.rfile.read(int(length)))
            question, history = _question(request["messages"])
            stream = bool(request.get("stream"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._refuse(400, "expected JSON with messages, the last of which is the user's and is text")
            return
        if not self.owner.turns.acquire(blocking=False):
            self._refuse(429, "all places are taken: try again later")
            return
        try:
            (self._stream if stream else self._whole)(question, history)
        finally:
            self.owner.turns.release()

    def _allowed(self) -> bool:
        """Whether the caller may ask; the refusal is sent where not."""
        host = self.headers.get("Host", "").rpartition("]")[0].strip("[") or self.headers.get("Host", "").split(":")[0]
        if self.owner.host in _LOOPBACK and host not in _LOOPBACK:
            self._refuse(403, "this server answers to localhost only")
            return False
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.owner.key and not hmac.compare_digest(sent.encode(), self.owner.key.encode()):
            self._refuse(401, "the key is missing or wrong")
            return False
        # A page of another site may post text without asking first, but not JSON.
        kind = self.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        if self.command == "POST" and kind != "application/json":
            self._refuse(415, "the content has to be application/json")
            return False
        return True

    def _whole(self, question: str, history: list[dict[str, Any]]) -> None:
        try:
            answer = self.owner.agent.ask(question, history)
        except UserError as error:
            self._refuse(502, str(error))
            return
        message = {"role": "assistant", "content": answer_text(answer)}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if answer.complete else "length"}
        head = _head("chat.completion")
        self._send(200, {**head, "choices": [choice], "usage": _usage(answer), "tenfold": answer.summary()})

    def _stream(self, question: str, history: list[dict[str, Any]]) -> None:
        head = _head("chat.completion.chunk")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        lock = threading.Lock()

        def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            with lock:
                self.wfile.write(f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n".encode())
                self.wfile.flush()

        tell = progress(lambda text: event({"reasoning_content": text}))
        try:
            event({"role": "assistant", "content": ""})
            try:
                answer = self.owner.agent.ask(question, history, on_event=tell)
            except UserError as error:
                event({}, "stop", error={"message": str(error), "type": "agent_error"})
            else:
                event({"content": answer_text(answer)})
                event({}, "stop" if answer.complete else "length", usage=_usage(answer), tenfold=answer.summary())
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            console.warn("a caller left before its answer was finished")

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": status}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(console.to_jsonable(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _question(messages: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The last message of the user, and what was said before it. System messages of callers are passed over."""
    said = [
        {"role": message["role"], "content": _content(message["content"])}
        for message in messages
        if message["role"] in ("user", "assistant")
    ]
    if not said or said[-1]["role"] != "user" or not said[-1]["content"].strip():
        raise ValueError("the last message is not the user's")
    return said[-1]["content"], said[:-1]


def _content(content: object) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str):
        raise TypeError("the content is not text")
    return content


def progress(say: Callable[[str], None]) -> Callable[[str, dict[str, Any]], None]:
    """An `on_event` that says in a line what the agent does: its reasoning, its searches, what it opened."""

    def tell(kind: str, data: dict[str, Any]) -> None:
        if kind == "turn":
            if data["thinking"]:
                say(data["thinking"] + "\n")
            for query in data["queries"]:
                say(f"searching: {query}\n")
        elif kind == "source":
            say(f"[{data['number']}] {data['title']}\n")
        elif kind == "fetch":
            say(f"page {data['url']}{': ' + data['blocked'] if data['blocked'] else ''}\n")

    return tell


def answer_text(answer: Answer) -> str:
    """The answer with its sources below it, and what a reader has to know of it."""
    cited = sorted({citation.mark for citation in answer.citations if citation.url})
    lines = [answer.answer or "No answer was found."]
    lines += [f"\n[{mark}] {answer.sources[mark - 1].title}: {answer.sources[mark - 1].url}" for mark in cited]
    doubtful = sorted({citation.mark for citation in answer.citations if not citation.supported})
    if doubtful:
        lines.append("\nNot carried by its source: " + ", ".join(f"[{mark}]" for mark in doubtful))
    if not answer.complete:
        lines.append(f"\n(incomplete: {answer.stopped_by or answer.status})")
    return "\n".join(lines)


def _usage(answer: Answer) -> dict[str, int]:
    read, written = answer.rollout.prompt_tokens, answer.rollout.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _head(kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": MODEL}
