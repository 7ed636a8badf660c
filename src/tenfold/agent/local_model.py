"""A policy that is a local `transformers` model, with the token ids of the whole conversation.

Ids are made once: what the model writes stays as it was sampled, and what is put before it is tokenised alone and
appended. Nothing is decoded and tokenised again between turns, so that training sees the ids that the model saw.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.agent.config import Sampling
from tenfold.agent.policies import OnText, PolicyError, Reply
from tenfold.agent.protocol import Message
from tenfold.core.console import UserError
from tenfold.core.devices import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Stands for a turn of the model when the template is asked what follows one.
_STAND_IN = "aheadofthis"
# Texts up to this many characters are tokenised once and remembered.
_SHORT = 120


class LocalModel:
    """A causal language model in this process.

    Args:
        model: a `transformers` model; it is put into evaluation mode.
        tokenizer: its tokenizer, which needs a chat template.
        sampling: how tokens are chosen.
        name: as it stands in traces.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        name: str = "",
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{name or 'the model'}: its tokenizer has no chat template: take an instruct model, or set "
                "tokenizer.chat_template"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.sampling = sampling or Sampling()
        self.name = name or type(model).__name__
        self._lock = threading.Lock()  # one generation at a time
        self._special = sorted((str(token) for token in tokenizer.all_special_tokens), key=len, reverse=True)
        stop = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = stop if isinstance(stop, list) else [stop, tokenizer.eos_token_id]
        self.ends = sorted({int(end) for end in ends if end is not None})
        self._following: dict[str, list[int]] = {}
        self._ids_of_short = lru_cache(maxsize=20_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    @staticmethod
    def from_pretrained(
        name_or_path: str, device: str = "cpu", sampling: Sampling | None = None, offline: bool = False
    ) -> LocalModel:
        """Load a model by folder or hub name. Raises UserError where there is none, or it cannot be loaded."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        local = offline or Path(name_or_path).is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, local_files_only=local)
            model = AutoModelForCausalLM.from_pretrained(name_or_path, local_files_only=local)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UserError(f"hf:{name_or_path}: no model that can be loaded ({reason})") from None
        return LocalModel(torch.nn.Module.to(model, resolve_device(device)), tokenizer, sampling, name_or_path)

    def start(self, tools: Sequence[dict[str, Any]] = (), seed: int | None = None) -> LocalConversation:
        """Begin a conversation. `seed` stands in for that of the sampling."""
        return LocalConversation(self, list(tools), self.sampling.seed if seed is None else seed)

    async def close(self) -> None:
        """The model stays in memory as long as this object lives."""

    def opening_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of the first messages, up to where the model's turn begins."""
        return self._ids(self._apply([self._harmless(message) for message in messages], tools))

    def following_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of what follows a turn of the model: the end of that turn, the messages, the start of the next turn."""
        key = repr((messages, tools))
        if len(key) <= _SHORT:  # training sees the same few short messages over and over
            if key not in self._following:
                if len(self._following) >= 20_000:
                    self._following.clear()
                self._following[key] = self._following_ids(messages, tools)
            return list(self._following[key])
        return self._following_ids(messages, tools)

    def _following_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _STAND_IN}]
        whole = self._apply([*before, *(self._harmless(message) for message in messages)], tools)
        return self._ids(whole.rpartition(_STAND_IN)[2])

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise UserError(f"{self.name}: its chat template failed ({' '.join(str(error).split())[:160]})") from None
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        if len(text) <= _SHORT:
            return list(self._ids_of_short(text))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _harmless(self, message: Message) -> Message:
        """A message whose content holds none of the tokenizer's special tokens: those are the template's to write."""
        content = str(message["content"])
        for token in self._special:
            if len(token) > 1:
                content = content.replace(token, token[0] + " " + token[1:])
        return {**message, "content": content}

    def generate(self, ids: Sequence[int], max_tokens: int, seconds: float, seed: int | None) -> tuple[list[int], bool]:
        """Sample a turn: its ids, and whether time ran out."""
        import time

        import torch

        sampling = self.sampling
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        started = time.monotonic()
        with self._lock, torch.no_grad():
            left = seconds - (time.monotonic() - started)
            if seed is not None:
                torch.manual_seed(seed)
            prompt = torch.tensor([list(ids)], device=self.model.device)
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                max_time=max(left, 0.01),
                eos_token_id=self.ends or None,
                pad_token_id=self.ends[0] if self.ends else 0,
                **options,
            )
        new = output[0, len(ids) :].tolist()
        ended = bool(new) and new[-1] in self.ends
        return new, not ended and len(new) < max_tokens


class LocalConversation:
    """One conversation: `ids`, and in `mask` 1 for what the model sampled and 0 for what it was given."""

    def __init__(self, policy: LocalModel, tools: Sequence[dict[str, Any]], seed: int | None) -> None:
        self.policy, self.tools, self.seed = policy, tools, seed
        self.ids: list[int] = []
        self.mask: list[int] = []
        self._turns = 0

    def add(self, messages: Sequence[Message]) -> None:
        """Append the ids of messages, without those that the model has written itself at its turn's end."""
        if not self.ids:
            new = self.policy.opening_ids(messages, self.tools)
        else:
            new = self.policy.following_ids(messages, self.tools)
            if new and self.mask[-1] and new[0] == self.ids[-1] and new[0] in self.policy.ends:
                new = new[1:]
        self.ids += new
        self.mask += [0] * len(new)

    def length(self) -> int:
        """Tokens so far."""
        return len(self.ids)

    def count(self, text: str) -> int:
        """Tokens of a text, with a few to spare for where it is joined to others."""
        return len(self.policy._ids(text)) + 2

    async def reply(self, max_tokens: int, seconds: float, on_text: OnText | None = None) -> Reply:
        """Sample the next turn and append its ids. Raises PolicyError where the model cannot go on."""
        longest = getattr(self.policy.model.config, "max_position_embeddings", None)
        if longest is not None and len(self.ids) + max_tokens > longest:
            max_tokens = longest - len(self.ids)
            if max_tokens < 1:
                raise PolicyError(
                    "context", f"{self.policy.name} bears {longest} tokens, and the conversation has {len(self.ids)}"
                )
        prompt = len(self.ids)
        seed = None if self.seed is None else self.seed * 1_000 + self._turns
        self._turns += 1
        new, late = await self._sample(max_tokens, seconds, seed)
        self.ids += new
        self.mask += [1] * len(new)
        text = str(self.policy.tokenizer.decode(new, skip_special_tokens=True))
        if on_text is not None:
            on_text(text, False)
        ended = bool(new) and new[-1] in self.policy.ends
        return Reply(text, "", (), "stop" if ended else "time" if late else "length", prompt, len(new))

    async def _sample(self, max_tokens: int, seconds: float, seed: int | None) -> tuple[list[int], bool]:
        """Ids of the next turn, and whether time ran out."""
        return await asyncio.to_thread(self.policy.generate, list(self.ids), max_tokens, seconds, seed)
