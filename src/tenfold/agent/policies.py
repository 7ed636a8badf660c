"""Who writes the turns: the interface of a policy, and one that follows a script."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from typing import Protocol as Interface

from tenfold.agent.passages import estimate_tokens
from tenfold.agent.protocol import Message, ToolCall
from tenfold.core.console import UserError

# Tokens that a chat template adds to a message, about.
MESSAGE_TOKENS = 6

Problem = Literal["unreachable", "timeout", "refused", "no model", "context", "overloaded", "bad answer"]
# Called with each piece of a turn as it is written: the piece, and whether it is reasoning.
OnText = Callable[[str, bool], None]


class PolicyError(UserError):
    """A turn that was not written; `problem` says what kind of failure it was."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class Reply:
    """One turn as it was written.

    Args:
        text: what was said, without reasoning that was given apart.
        reasoning: reasoning that was given apart.
        calls: native tool calls.
        finish: why it ended: by itself, at the limit of tokens, or because time ran out.
        prompt_tokens: tokens that were read for it.
        completion_tokens: tokens that were written.
        retries: failed tries before it.
    """

    text: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish: Literal["stop", "length", "time"] = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


class Conversation(Interface):
    """One conversation with a policy. It owns its history, so that a local model's token ids are made once.

    `ids` and `mask` hold the whole conversation as token ids and, for each, 1 where the model chose it and 0 where it
    was given; both stay empty where a policy does not show its tokens.
    """

    ids: list[int]
    mask: list[int]

    def add(self, messages: Sequence[Message]) -> None:
        """Put messages before the model."""
        ...

    def length(self) -> int:
        """Tokens of the conversation so far, exact where the policy knows them."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text."""
        ...

    async def reply(self, max_tokens: int, seconds: float, on_text: OnText | None = None) -> Reply:
        """Let the model write its turn. Raises PolicyError."""
        ...


class Policy(Interface):
    """Whatever writes turns."""

    @property
    def name(self) -> str:
        """As it stands in traces; it holds no key."""
        ...

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> Conversation:
        """Begin a conversation in which these tools are offered."""
        ...

    async def close(self) -> None:
        """Give back what is held open."""
        ...


# What a scripted turn is made of: the messages so far to the text of the turn.
Script = Callable[[Sequence[Message]], str | Reply]


class Scripted:
    """A policy that writes what a function says: for oracles, replays and tests.

    Args:
        script: from all messages so far (roles user, assistant, tool) to the next turn; may be a list of turns, the
            last of which is repeated.
        name: as it stands in traces.
    """

    def __init__(self, script: Script | Sequence[str | Reply], name: str = "scripted") -> None:
        self.script, self.name = script, name

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> ScriptedConversation:
        """Begin a conversation."""
        return ScriptedConversation(self.script)

    async def close(self) -> None:
        """Nothing is open."""


@dataclass
class ScriptedConversation:
    """A conversation with a script; its tokens are estimated."""

    script: Script | Sequence[str | Reply]
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    _length: int = 0
    _turns: int = 0

    def add(self, messages: Sequence[Message]) -> None:
        """Put messages before the script."""
        self.messages += messages
        self._length += sum(estimate_tokens(message_text(message)) + MESSAGE_TOKENS for message in messages)

    def length(self) -> int:
        """Estimated tokens so far."""
        return self._length

    def count(self, text: str) -> int:
        """Estimated tokens of a text."""
        return estimate_tokens(text)

    async def reply(self, max_tokens: int, seconds: float, on_text: OnText | None = None) -> Reply:
        """The script's next turn; its length is not cut."""
        if callable(self.script):
            said = self.script(tuple(self.messages))
        else:
            said = self.script[min(self._turns, len(self.script) - 1)]
        self._turns += 1
        reply = said if isinstance(said, Reply) else Reply(said)
        written = estimate_tokens(reply.text) + estimate_tokens(reply.reasoning)
        prompt = self._length
        self.messages.append(assistant_message(reply))
        self._length += written + MESSAGE_TOKENS
        if on_text is not None:
            on_text(reply.text, False)
        return Reply(reply.text, reply.reasoning, reply.calls, reply.finish, prompt, written)


def assistant_message(reply: Reply) -> Message:
    """A turn as the message that stands in the history from then on: without reasoning that was given apart."""
    message: Message = {"role": "assistant", "content": reply.text}
    named = [call for call in reply.calls if call.id]
    if named:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in named
        ]
    return message


def message_text(message: Message) -> str:
    """What counts of a message: its content and the arguments of its calls."""
    calls = message.get("tool_calls") or ()
    return str(message.get("content") or "") + "".join(call["function"]["arguments"] for call in calls)


async def complete(
    policy: Policy, prompt: str, max_tokens: int = 1_500, seconds: float = 180.0, seed: int | None = None
) -> str:
    """One answer to one prompt, without tools and without a history. Raises PolicyError."""
    conversation = policy.start((), seed)
    conversation.add([{"role": "user", "content": prompt}])
    return (await conversation.reply(max_tokens, seconds)).text


def read_object(text: str) -> dict[str, Any] | None:
    """The last dictionary in a text, in JSON or in Python's notation; None where there is none.

    Models reason first and give their result in the end. It is read as data and never run.
    """
    found = None
    position = 0
    decoder = json.JSONDecoder()
    while (position := text.find("{", position)) >= 0:
        end = position + 1
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            literal = _FLAT.match(text, position)
            try:
                value = ast.literal_eval(literal[0]) if literal else None
                end = literal.end() if literal and isinstance(value, dict) else end
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
        found = value if isinstance(value, dict) else found
        position = end
    return found


_FLAT = re.compile(r"\{[^{}]{0,4000}\}")
