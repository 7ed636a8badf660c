"""A policy behind an OpenAI-compatible endpoint: vLLM, Ollama, llama.cpp's server, or a service.

Plain HTTP is enough: one request per turn, streamed, tried again where that can help, and never beyond the time that is
left. A stream that breaks off, a half answer and a page of HTML count as failures, not as turns.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from tenfold.agent.config import Sampling
from tenfold.agent.passages import estimate_tokens
from tenfold.agent.policies import (
    MESSAGE_TOKENS,
    OnText,
    PolicyError,
    Problem,
    Reply,
    assistant_message,
    message_text,
)
from tenfold.agent.protocol import Message, ToolCall
from tenfold.agent.search import retry_after
from tenfold.core.console import UserError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "TENFOLD_LLM_KEY"
_TRIES = 4
# How long to wait for a stream to end after its last event.
_DRAIN_S = 0.2
_LONGEST_PAUSE_S = 20.0
_LARGEST_ANSWER_BYTES = 8_000_000
_CONNECTIONS = 128


class Endpoint:
    """A language model behind an OpenAI-compatible endpoint.

    Args:
        base: its address up to and including /v1.
        model: the model's name there; empty takes the first one that the endpoint lists.
        sampling: how tokens are chosen.
        key: a bearer token; None takes the environment variable TENFOLD_LLM_KEY, and OPENAI_API_KEY for
            api.openai.com alone, so that no key goes to a server that it is not for.
        stream: ask for the answer piece by piece.
        silence_s: longest silence of the server before a try counts as failed.

    Raises:
        UserError: `base` is no address.
    """

    def __init__(
        self,
        base: str,
        model: str = "",
        sampling: Sampling | None = None,
        key: str | None = None,
        stream: bool = True,
        silence_s: float = 120.0,
    ) -> None:
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{base}: not the address of an endpoint: for example http://localhost:8000/v1")
        self.base = base.rstrip("/").removesuffix("/chat/completions")
        self.model = model
        self.sampling = sampling or Sampling()
        self.stream, self.silence_s = stream, silence_s
        openai = os.environ.get("OPENAI_API_KEY", "") if parts.hostname == "api.openai.com" else ""
        self._key = key if key is not None else (os.environ.get(KEY_VARIABLE, "") or openai)
        host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
        # Without a user name, a password or parameters: this is what traces and messages show.
        self.shown = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        # For each event loop all clients, and those that nobody uses at the moment.
        self._clients: dict[int, list[httpx.AsyncClient]] = {}
        self._idle: dict[int, list[httpx.AsyncClient]] = {}
        self._context: ssl.SSLContext | bool | None = None

    @property
    def name(self) -> str:
        """The model and where it is, without a key."""
        return f"{self.model or 'the first model'} at {self.shown}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be written down: the key, and the password of the address."""
        return tuple(secret for secret in (self._key, urlsplit(self.base).password) if secret)

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r}, {self.model!r})"  # without the key

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> EndpointConversation:
        """Begin a conversation. `seed` stands in for that of the sampling."""
        return EndpointConversation(self, tuple(tools), self.sampling.seed if seed is None else seed)

    async def close(self) -> None:
        """Close the connections of this event loop."""
        loop = id(asyncio.get_running_loop())
        self._idle.pop(loop, None)
        for client in self._clients.pop(loop, ()):
            await client.aclose()

    @contextmanager
    def _client(self) -> Iterator[httpx.AsyncClient]:
        """A client of this event loop that nobody else uses, so that its one connection is there for the next turn.

        One client for all would do, but what its pool costs grows with the square of the connections.
        """
        import httpx

        loop = id(asyncio.get_running_loop())
        everyone, idle = self._clients.setdefault(loop, []), self._idle.setdefault(loop, [])
        if idle:
            client = idle.pop()
        elif len(everyone) >= _CONNECTIONS:
            client = random.choice(everyone)
        else:
            if self._context is None:  # to read the certificates takes a while
                self._context = ssl.create_default_context() if self.base.startswith("https:") else False
            client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                verify=self._context,
                timeout=httpx.Timeout(self.silence_s, connect=10.0, pool=None),
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
                trust_env=False,
                follow_redirects=False,
            )
            everyone.append(client)
        try:
            yield client
        finally:
            if client not in idle:
                idle.append(client)

    async def find_model(self) -> str:
        """The model's name, asked of the endpoint if none was given. Raises PolicyError."""
        if not self.model:
            try:
                with self._client() as client:
                    answer = await client.get(f"{self.base}/models", timeout=10.0)
                names = [row["id"] for row in answer.json()["data"]]
            except Exception as error:
                raise _connection_problem(error, self.shown, 10.0) or PolicyError(
                    "no model", f"{self.shown} does not list its models: name one with --model"
                ) from None
            if not names:
                raise PolicyError("no model", f"{self.shown} lists no model: load one, or name it with --model")
            self.model = str(names[0])
        return self.model

    async def send(self, body: Mapping[str, Any], seconds: float, on_text: OnText | None) -> Reply:
        """One turn: tried up to four times within `seconds`. Raises PolicyError."""
        deadline = time.monotonic() + seconds
        for attempt in range(_TRIES):
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(left, 0.001)):
                    reply = await self._try(body, on_text)
                return dataclasses.replace(reply, retries=attempt)
            except TimeoutError:
                raise PolicyError("timeout", f"{self.shown} gave no answer within {seconds:.0f} s") from None
            except _TryAgainError as failure:
                pause = failure.wait_s
                if pause is None:
                    pause = min(_LONGEST_PAUSE_S, 0.25 * 2**attempt * (1 + random.random()))
                if attempt + 1 == _TRIES or time.monotonic() + pause >= deadline:
                    raise failure.error from None
                await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _try(self, body: Mapping[str, Any], on_text: OnText | None) -> Reply:
        try:
            with self._client() as client:
                return await self._answer(client, body, on_text)
        except (_TryAgainError, PolicyError):
            raise
        except Exception as error:
            problem = _connection_problem(error, self.shown, self.silence_s)
            if problem is None:
                raise
            raise _TryAgainError(problem) from None

    async def _answer(self, client: httpx.AsyncClient, body: Mapping[str, Any], on_text: OnText | None) -> Reply:
        async with client.stream("POST", f"{self.base}/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await _read(response))[:4_000].decode("utf-8", "replace")
                raise self._refusal(response.status_code, text, response.headers.get("retry-after", ""))
            kind = response.headers.get("content-type", "")
            if kind.startswith("text/event-stream"):
                return await self._read_stream(response, on_text)
            return self._read_whole(await _read(response), on_text)

    def _refusal(self, status: int, text: str, wait: str) -> Exception:
        said = self._without_secrets(_error_text(text))
        if status in (401, 403):
            return PolicyError("refused", f"{self.shown} refused the key ({status}): set {KEY_VARIABLE}")
        if status in (400, 413, 422) and re.search(r"context|maximum.{0,30}(token|length)|too long", said, re.I):
            return PolicyError("context", f"{self.shown}: the conversation is longer than the model bears: {said}")
        if status == 404:
            return PolicyError(
                "no model", f"{self.shown} has no model {self.model!r}, or is no endpoint (404): {said}".rstrip(": ")
            )
        if status == 429 or status in (408, 425) or status >= 500:
            kind: Problem = "overloaded" if status in (429, 503) else "bad answer"
            error = PolicyError(kind, f"{self.shown} answered {status} {_TRIES} times: {said}".rstrip(": "))
            return _TryAgainError(error, retry_after(wait))
        return PolicyError("bad answer", f"{self.shown} refused the request ({status}): {said}".rstrip(": "))

    def _without_secrets(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def _garbage(self, what: str) -> _TryAgainError:
        return _TryAgainError(
            PolicyError(
                "bad answer", f"{self.shown} {what}: is it an OpenAI-compatible endpoint (an address ending in /v1)?"
            )
        )

    def _read_whole(self, content: bytes, on_text: OnText | None) -> Reply:
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            parts = _Parts()
            parts.add(choice["message"])
            parts.finish = choice.get("finish_reason") or "stop"
            parts.usage = answer.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise self._garbage("answered with something that is not a chat completion") from None
        reply = parts.reply()
        if on_text is not None:
            on_text(reply.text, False)
        return reply

    async def _read_stream(self, response: httpx.Response, on_text: OnText | None) -> Reply:
        parts = _Parts()
        events = _events(response)
        try:
            async for data in events:
                if data == "[DONE]":
                    parts.finish = parts.finish or "stop"
                    break
                event = json.loads(data)
                if event.get("error"):
                    raise _TryAgainError(
                        PolicyError("bad answer", f"{self.shown}: {self._without_secrets(_error_text(data))}")
                    )
                parts.usage = event.get("usage") or parts.usage
                for choice in event.get("choices") or ():
                    parts.finish = choice.get("finish_reason") or parts.finish
                    piece, thought = parts.add(choice.get("delta") or {})
                    if on_text is not None and (piece or thought):
                        on_text(piece or thought, not piece)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise self._garbage("sent a stream that cannot be read") from None
        if not parts.finish:
            raise _TryAgainError(PolicyError("bad answer", f"{self.shown} broke off in the middle of an answer"))
        await _drain(events)
        return parts.reply()


class _TryAgainError(Exception):
    """A failure after which another try can help; `error` is what it becomes if none does."""

    def __init__(self, error: PolicyError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait_s = error, wait_s


class _Parts:
    """A message as it is put together from one or many pieces."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, dict[str, str]] = {}
        self.finish = ""
        self.usage: dict[str, Any] = {}

    def add(self, piece: Mapping[str, Any]) -> tuple[str, str]:
        text = piece.get("content") or ""
        thought = piece.get("reasoning_content") or piece.get("reasoning") or ""
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError("the content is not text")
        self.text.append(text)
        self.reasoning.append(thought)
        for position, call in enumerate(piece.get("tool_calls") or ()):
            index = call.get("index")
            known = self.calls.setdefault(
                index if isinstance(index, int) else position, {"id": "", "name": "", "arguments": ""}
            )
            known["id"] = call.get("id") or known["id"]
            function = call.get("function") or {}
            known["name"] += function.get("name") or ""
            arguments = function.get("arguments") or ""
            known["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments)
        return text, thought

    def reply(self) -> Reply:
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        # Servers without a parser for reasoning leave it in the text.
        found = re.match(r"\s*<think>(.*?)</think>", text, re.DOTALL)
        if found and not re.search(r"<(?:search|answer)>", text):
            text, reasoning = text[found.end() :].strip(), reasoning or found[1].strip()
        calls = tuple(
            ToolCall(call["id"] or f"call_{index}", call["name"], call["arguments"])
            for index, call in sorted(self.calls.items())
        )
        finish: Literal["stop", "length"] = "length" if self.finish == "length" else "stop"
        return Reply(
            text, reasoning, calls, finish, _whole(self.usage, "prompt_tokens"), _whole(self.usage, "completion_tokens")
        )


@dataclass
class EndpointConversation:
    """The messages of one conversation with an endpoint; lengths are the server's where it tells them."""

    endpoint: Endpoint
    tools: tuple[dict[str, Any], ...]
    seed: int | None
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    _length: int = 0

    def __post_init__(self) -> None:
        self._length = estimate_tokens(json.dumps(self.tools)) if self.tools else 0

    def add(self, messages: Sequence[Message]) -> None:
        """Put messages before the model with the next request."""
        for message in messages:
            if self.messages and self.messages[-1]["role"] == message["role"] == "user":
                # Many chat templates want the roles to take turns.
                self.messages[-1] = {
                    **message,
                    "content": f"{self.messages[-1]['content']}\n\n{message['content']}",
                }
            else:
                self.messages.append(message)
        self._length += sum(estimate_tokens(message_text(message)) + MESSAGE_TOKENS for message in messages)

    def length(self) -> int:
        """Tokens so far: what the server counted, plus an estimate of what was added since."""
        return self._length

    def count(self, text: str) -> int:
        """Estimated tokens of a text, rather too many than too few."""
        return estimate_tokens(text)

    async def reply(self, max_tokens: int, seconds: float, on_text: OnText | None = None) -> Reply:
        """Ask for the next turn. Raises PolicyError."""
        started = time.monotonic()
        sampling = self.endpoint.sampling
        try:
            async with asyncio.timeout(max(seconds, 0.001)):
                model = await self.endpoint.find_model()
        except TimeoutError:
            raise PolicyError("timeout", f"{self.endpoint.shown} gave no answer within {seconds:.0f} s") from None
        body: dict[str, Any] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.tools:
            body["tools"] = list(self.tools)
        if self.endpoint.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = await self.endpoint.send(body, seconds - (time.monotonic() - started), on_text)
        said = estimate_tokens(reply.text) + estimate_tokens(reply.reasoning)
        written = reply.completion_tokens or said
        self.messages.append(assistant_message(reply))
        # Reasoning that was given apart is not sent again.
        kept = estimate_tokens(message_text(self.messages[-1])) if reply.reasoning else written
        prompt = reply.prompt_tokens or self._length
        self._length = prompt + kept + MESSAGE_TOKENS
        return dataclasses.replace(reply, prompt_tokens=prompt, completion_tokens=written)


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of server-sent events, one after another; comments and other fields are passed over."""
    size = 0
    async for line in response.aiter_lines():
        size += len(line)
        if size > _LARGEST_ANSWER_BYTES:
            raise ValueError("the stream does not end")
        if line.startswith("data:"):
            yield line[5:].strip()


async def _drain(events: AsyncIterator[str]) -> None:
    """Read what stands behind the end of an answer, if it comes at once: a connection that was read to its end serves
    the next turn, and any other is thrown away."""
    import httpx

    with suppress(TimeoutError, ValueError, httpx.HTTPError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in events:
                pass


async def _read(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes(65_536):
        content += chunk
        if len(content) > _LARGEST_ANSWER_BYTES:
            break
    return bytes(content)


def _connection_problem(error: Exception, shown: str, silence_s: float) -> PolicyError | None:
    import httpx

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return PolicyError("unreachable", f"{shown} is not reached: is the server running, is the address right?")
    if isinstance(error, httpx.TimeoutException):
        return PolicyError("timeout", f"{shown} was silent for {silence_s:.0f} s")
    if isinstance(error, httpx.HTTPError | httpx.InvalidURL | OSError):
        return PolicyError("bad answer", f"{shown} broke off the connection ({type(error).__name__})")
    return None


def _error_text(text: str) -> str:
    """The sentence in an error answer, on one line."""
    try:
        value = json.loads(text)
        value = value.get("error", value) if isinstance(value, dict) else value
        text = str(value.get("message", value)) if isinstance(value, dict) else str(value)
    except (ValueError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.split())[:300]


def _whole(usage: Mapping[str, Any], key: str) -> int:
    value = usage.get(key)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else 0
