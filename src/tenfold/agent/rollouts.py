"""Many runs of the environment at once with one local model: turns are written in batches, or taken from a teacher.

The runs are those of `ask` and `evaluate`: the same environment, conversations and protocols. What is added here is
who writes: `Batched` collects the turns that are due and samples them together; `Taught` writes what a script says,
tokenised once, as if it had sampled it. Each run of either has ids, and a mask that is 1 where the policy wrote.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tenfold.agent.agent import run
from tenfold.agent.config import Budget, Sampling
from tenfold.agent.data import Question
from tenfold.agent.environment import Environment
from tenfold.agent.local_model import LocalConversation, LocalModel
from tenfold.agent.outcome import Rollout
from tenfold.agent.policies import Policy, Scripted, assistant_message
from tenfold.agent.protocol import Message, Protocol
from tenfold.agent.search import Engine, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Passes of the event loop without a new request after which all runs are taken to wait for their turns.
_QUIET_PASSES = 24
# Stands around the text of pages in training: a fixed one makes runs repeatable.
_DELIMITER = "0123456789abcdef"


@dataclass(frozen=True)
class Setting:
    """Where runs take place: who searches, in which form, for how much, and who opens pages."""

    engine: Engine
    protocol: Protocol
    budget: Budget
    reader: Reader | None = None

    def environment(self, policy: Policy) -> Environment:
        """The environment of `ask` and `evaluate`, for this policy."""
        return Environment(policy, self.engine, self.protocol, self.budget, self.reader)


def play(setting: Setting, policy: Policy, questions: Sequence[Question], seeds: Sequence[int]) -> list[Rollout]:
    """Run each question once, all at the same time.

    Args:
        setting: engine, protocol, budget.
        policy: who writes; a `Batched` one writes all turns that are due together.
        questions: one for each run; the same one several times makes a group.
        seeds: of the sampling, one for each run.

    Raises:
        UserError: a question that does not fit the budget, an engine that cannot work.
    """
    environment = setting.environment(policy)

    async def all_of_them() -> list[Rollout]:
        runs = [
            environment.run(question.question, (), seed, _DELIMITER)
            for question, seed in zip(questions, seeds, strict=True)
        ]
        return list(await asyncio.gather(*runs))

    return run(all_of_them())


@dataclass
class _Request:
    ids: list[int]
    max_tokens: int
    seconds: float
    seed: int | None
    done: asyncio.Future[tuple[list[int], bool]]


class Batched(LocalModel):
    """A local model that writes the turns of many conversations at once.

    Each conversation draws from its own random numbers, so that what it samples does not hang on which others run
    beside it (but for the last bits of the logits). Of the sampling it knows the temperature only: training needs the
    probabilities of the whole distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        name: str = "",
    ) -> None:
        super().__init__(model, tokenizer, sampling or Sampling(temperature=0.0, top_p=1.0), name)
        self._waiting: list[_Request] = []

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> _BatchedConversation:
        """Begin a conversation."""
        return _BatchedConversation(self, list(tools), self.sampling.seed if seed is None else seed)

    def request(
        self, ids: list[int], max_tokens: int, seconds: float, seed: int | None
    ) -> asyncio.Future[tuple[list[int], bool]]:
        """Ask for a turn; it is sampled with all others that are due."""
        loop = asyncio.get_running_loop()
        request = _Request(ids, max_tokens, seconds, seed, loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) == 1:
            loop.call_soon(self._look, loop, 1, 0)
        return request.done

    def _look(self, loop: asyncio.AbstractEventLoop, known: int, quiet: int) -> None:
        """Sample once no request has come for a while."""
        quiet = quiet + 1 if len(self._waiting) == known else 0
        if quiet < _QUIET_PASSES:
            loop.call_soon(self._look, loop, len(self._waiting), quiet)
            return
        requests, self._waiting = self._waiting, []
        try:
            written = self._write(requests)
        except Exception as error:  # it belongs to those who wait
            for request in requests:
                if not request.done.done():
                    request.done.set_exception(error)
            return
        for request, outcome in zip(requests, written, strict=True):
            if not request.done.done():
                request.done.set_result(outcome)

    def _write(self, requests: list[_Request]) -> list[tuple[list[int], bool]]:
        return sample_turns(
            self.model,
            [request.ids for request in requests],
            [request.max_tokens for request in requests],
            [request.seed for request in requests],
            self.sampling.temperature,
            self.ends,
            min(request.seconds for request in requests),
        )


class _BatchedConversation(LocalConversation):
    """A conversation whose turns are sampled with those of others."""

    policy: Batched

    async def _sample(self, max_tokens: int, seconds: float, seed: int | None) -> tuple[list[int], bool]:
        return await self.policy.request(list(self.ids), max_tokens, seconds, seed)


@torch.no_grad()
def sample_turns(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    seeds: Sequence[int | None],
    temperature: float,
    ends: Sequence[int],
    seconds: float = 3_600.0,
) -> list[tuple[list[int], bool]]:
    """Continue all prompts at once, each to the end of its turn.

    Args:
        model: a causal language model of `transformers`.
        prompts: ids.
        max_tokens: longest continuation of each.
        seeds: of each one's random numbers; None draws new ones.
        temperature: 0 takes the likeliest token.
        ends: ids that end a turn; they are part of it.
        seconds: time for all of them.

    Returns:
        The new ids of each, and whether time ran out before its end.
    """
    started = time.monotonic()
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention[row, longest - len(prompt) :] = 1
    ids, attention = ids.to(device), attention.to(device)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    most = max(max_tokens)
    # Inverse transform sampling with one row of numbers a conversation: no batch changes another one's luck.
    luck = np.stack([np.random.default_rng(seed).random(most) for seed in seeds])
    chance = torch.from_numpy(luck).to(device)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    past = None
    # transformers has given the cache another name; the old one still works there, with a warning at every call.
    past_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    stop = set(ends)
    for step in range(most):
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{past_name: past},
        )
        past = output[past_name]
        logits = output.logits[:, -1].float()
        if temperature > 0:
            heights = (logits / temperature).softmax(-1).double().cumsum(-1)
            chosen = (heights < chance[:, step : step + 1] * heights[:, -1:]).sum(-1)
        else:
            chosen = logits.argmax(-1)
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            written[row].append(token)
            if token not in stop and len(written[row]) < max_tokens[row]:
                going.append(place)
        if not going or time.monotonic() - started > seconds:
            rows = [rows[place] for place in going]
            break
        ids = chosen.unsqueeze(1)
        positions = positions[:, -1:] + 1
        if len(going) < len(rows):  # what has ended costs nothing more
            rows = [rows[place] for place in going]
            keep = torch.tensor(going, device=device)
            ids, attention, positions, chance = ids[keep], attention[keep], positions[keep], chance[keep]
            past.batch_select_indices(keep)
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
    late = set(rows)
    return [(new, row in late and len(new) < max_tokens[row]) for row, new in enumerate(written)]


class Taught(LocalModel):
    """A policy that writes what a script says in the tokens of a model: where the examples of a cold start come from.

    Args:
        model: the model that is to learn; it is not run.
        tokenizer: its tokenizer.
        script: a function of the conversation, or turns, as for `Scripted`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, script: Scripted) -> None:
        super().__init__(model, tokenizer, name=script.name)
        self.script = script.script
        following = self.following_ids([{"role": "user", "content": "."}], [])
        self.end = following[0] if following and following[0] in self.ends else self.ends[0]

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> _TaughtConversation:
        """Begin a conversation."""
        return _TaughtConversation(self, list(tools), seed)


class _TaughtConversation(LocalConversation):
    """A conversation whose turns are given, and count as the policy's own."""

    policy: Taught

    def __init__(self, policy: Taught, tools: Sequence[dict[str, Any]], seed: int | None) -> None:
        super().__init__(policy, tools, seed)
        self._script = Scripted(policy.script).start()

    def add(self, messages: Sequence[Message]) -> None:
        """Append messages, and tell the script."""
        super().add(messages)
        self._script.add(messages)

    async def _sample(self, max_tokens: int, seconds: float, seed: int | None) -> tuple[list[int], bool]:
        reply = await self._script.reply(max_tokens, seconds)
        text = str(assistant_message(reply)["content"])
        if reply.reasoning:  # what an endpoint gives apart is a turn's first part
            text = f"<thinking>{reply.reasoning}</thinking>{text}"
        return [*self.policy._ids(text), self.policy.end], False


@dataclass(frozen=True)
class Example:
    """A run as training sees it: token ids, and a mask that is 1 where the policy wrote."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]
    question: str = field(default="", compare=False)


def example(rollout: Rollout) -> Example:
    """The ids and the mask of a run of a local model."""
    return Example(rollout.ids, rollout.mask, rollout.question)


def taught(
    setting: Setting, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, script: Scripted
) -> Rollout:
    """One run in which a script answers in a model's tokens."""
    return play(setting, Taught(model, tokenizer, script), [question], [0])[0]


QuestionOf = Callable[[int], Question]
"""Question number n of an endless stream: a pure function of n, so that a run can go on where it was stopped."""
