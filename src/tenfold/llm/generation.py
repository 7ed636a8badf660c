"""The user-level object: a prompt in, its continuation out, whole or as it is written."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tenfold.core.console import UserError, warn
from tenfold.core.devices import resolve_device
from tenfold.llm import checkpoint
from tenfold.llm.decoding import Decoding, join_weights
from tenfold.llm.model import Decoder
from tenfold.llm.tokenizer import Tokenizer

Precision = Literal["fp32", "bf16", "fp16"]
Finish = Literal["eos", "stop", "length", "context"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the scores; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from so many likeliest tokens; 0 from all.
        repetition_penalty: positive scores of tokens that the text has already are divided by it, negative ones
            multiplied (Keskar et al. 2019, CTRL); 1 has none.
        seed: of the draws. Row i of a batch draws as a single prompt does under seed + i.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: give 0 for the likeliest token, or a number above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a probability above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: give a number of tokens, or 0 for all")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty {self.repetition_penalty}: give a number above 0; 1 has no effect")


class Sampler:
    """Draws one row's tokens, the same ones for the same seed and scores on every device.

    Args:
        sampling: how.
        prompt: ids that the repetition penalty counts as seen.
        row: number of the row.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), row: int = 0) -> None:
        self.sampling = sampling
        self.seen = set(prompt)
        self.generator = torch.Generator().manual_seed(sampling.seed + row)

    def draw(self, logits: Tensor) -> int:
        """The next token by its scores (V,).

        Raises:
            UserError: the scores are not finite.
        """
        logits = logits.float()
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            ids = torch.tensor(sorted(self.seen), dtype=torch.long, device=logits.device)
            scores = logits[ids]
            logits = logits.index_copy(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))
        token = int(logits.argmax())
        if not math.isfinite(logits[token]):
            raise UserError("the model's scores are not finite: its weights are damaged, or the precision too low")
        if self.sampling.temperature > 0:
            probabilities = (logits.cpu() / self.sampling.temperature).softmax(-1)
            values, ids = _likeliest(probabilities, self.sampling.top_k, self.sampling.top_p)
            token = int(ids[torch.multinomial(values, 1, generator=self.generator)])
        self.seen.add(token)
        return token


def _likeliest(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens to draw from, likeliest first where there is a bound."""
    size = len(probabilities)
    if not top_k and top_p == 1:
        return probabilities, torch.arange(size)
    # Sorting the whole vocabulary takes longer than many a model's step, and the few likeliest mostly suffice.
    count = min(top_k or 256, size)
    values, ids = probabilities.topk(count)
    if not top_k and values.sum() < top_p:
        values, ids = probabilities.sort(descending=True)
    total = values.sum() if top_k else 1.0
    before = values.cumsum(0) - values  # of all tokens that are likelier
    kept = before < top_p * total
    kept[0] = True
    return values[kept], ids[kept]


@dataclass(frozen=True)
class Generation:
    """What a model wrote on.

    Attributes:
        text: the continuation, without the prompt and without the stop string.
        tokens: its ids.
        prompt_tokens: ids of the prompt.
        finish: why it ended: `eos` at the end of the text, `stop` at a stop string, `length` after `max_new_tokens`,
            `context` where the model's context is full.
        seconds: for all rows of the batch, prompt included.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: Finish
    seconds: float


@dataclass
class TextStream:
    """Text of tokens as they come: only whole characters, and nothing that may become a stop string.

    Attributes:
        tokenizer: tells the bytes of each token.
        stop: strings that end the text.
        ended: whether one of them has come.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    ended: bool = False
    _held: str = ""
    _bytes: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: int) -> str:
        """The text that a further token makes certain; may be empty."""
        text = self._held + self._bytes.decode(self.tokenizer.token_bytes(token))
        found = [place for word in self.stop if (place := text.find(word)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that a stop string begins with is held back.
        longest = max((len(word) - 1 for word in self.stop), default=0)
        ends = (n for n in range(min(longest, len(text)), 0, -1) if any(w.startswith(text[-n:]) for w in self.stop))
        keep = len(text) - next(ends, 0)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back. Bytes that are no whole character are dropped."""
        held, self._held = self._held, ""
        return held


@dataclass
class _Row:
    """One prompt and what is written on."""

    prompt: list[int]
    sampler: Sampler
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


class LanguageModel:
    """A decoder with its tokenizer.

    Args:
        model: the decoder, on its device.
        tokenizer: that goes with it.
        eos_ids: ids that end a text; by default the tokenizer's end of documents.
        origin: where the model came from, for a person.
        family: layout of its checkpoint, in which a copy is written.

    Example:
        >>> model = LanguageModel.from_pretrained("tenfold-tiny")  # doctest: +SKIP
        >>> model.generate("It was a dark night, and", max_new_tokens=40, seed=1).text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int] = (),
        origin: str = "given",
        family: str = "tenfold",
    ) -> None:
        checkpoint.check_tokenizer(tokenizer, model.config, origin)
        self.model = model.eval()
        join_weights(model)
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids or (tokenizer.eod,))
        self.origin = origin
        self.family = "tenfold" if family == "native" else family

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path = "tenfold-tiny", device: str = "auto", precision: Precision = "fp32"
    ) -> LanguageModel:
        """Load a model: a name of `tenfold models`, a folder, a file, or `owner/name` on the Hub.

        Args:
            name_or_path: see `checkpoint.load_model`.
            device: see `core.devices.resolve_device`.
            precision: of weights and arithmetic.

        Raises:
            UserError: no such model, one without a tokenizer, a device that is not there, an unknown precision.
        """
        if precision not in _DTYPES:
            raise UserError(f"precision must be one of {', '.join(_DTYPES)}, not {precision!r}")
        loaded = checkpoint.load_model(name_or_path, resolve_device(device), _DTYPES[precision])
        if loaded.tokenizer is None:
            raise UserError(f"{loaded.origin}: has no tokenizer: put its tokenizer.json beside the weights")
        return cls(loaded.model, loaded.tokenizer, loaded.eos_ids, loaded.origin, loaded.family)

    @property
    def context(self) -> int:
        """Tokens that the model was trained to see."""
        return self.model.config.context

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed.weight.device

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Write on.

        Args:
            prompt: a text; what the model's tokenizer puts before texts (Llama 3, Gemma) stands before it. An empty one
                begins a document.
            max_new_tokens: most tokens of the continuation.
            temperature: see `Sampling`, as for the next four.
            top_p: see `Sampling`.
            top_k: see `Sampling`.
            repetition_penalty: see `Sampling`.
            seed: see `Sampling`; the same seed writes the same text.
            stop: one or more strings that end the text.
            on_text: called with the text as it is written, in pieces of whole characters.

        Raises:
            UserError: a setting outside its range; a prompt that fills the model's context.
        """
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        return self.continue_ids([self._read(prompt)], max_new_tokens, sampling, stop, on_text)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] | str = (),
    ) -> list[Generation]:
        """Write several texts on together, each as `generate` would alone; arguments and errors as there."""
        return self.continue_ids(
            [self._read(prompt) for prompt in prompts], max_new_tokens, sampling or Sampling(), stop
        )

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] | str = (),
        on_text: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """Write on from token ids; arguments and errors as in `generate`."""
        start = time.perf_counter()
        if not prompts:
            return []
        rows = self._rows(prompts, sampling, stop)
        for _, text in self._write(rows, max_new_tokens):
            if on_text is not None:
                on_text(text)
        seconds = time.perf_counter() - start
        return [
            Generation(row.text, tuple(row.tokens), len(row.prompt), row.finish or "length", seconds) for row in rows
        ]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        top_p: float = 0.95,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
    ) -> Iterator[str]:
        """Yield `generate`'s text as it is written, in pieces of whole characters; arguments and errors as there."""
        rows = self._rows([self._read(prompt)], Sampling(temperature, top_p, top_k, repetition_penalty, seed), stop)
        return (piece for _, piece in self._write(rows, max_new_tokens))

    def _read(self, prompt: str) -> list[int]:
        return [*self.tokenizer.opening, *self.tokenizer.encode(prompt)]

    def _rows(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: Sequence[str] | str) -> list[_Row]:
        words = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
        rows = []
        for number, prompt in enumerate(prompts):
            ids = list(prompt) or [self.tokenizer.eod]
            if len(ids) >= self.context:
                raise UserError(
                    f"the prompt has {len(ids)} tokens, and the model's context holds {self.context} with what is "
                    "written: shorten it, or see `tenfold llm extend-context`"
                )
            rows.append(_Row(ids, Sampler(sampling, ids, number), TextStream(self.tokenizer, words)))
        return rows

    def _write(self, rows: list[_Row], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Yield (number of a row, further text) until all rows have ended."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens}: give a number of tokens from 1 on")
        longest = max(len(row.prompt) for row in rows)
        capacity = longest + max(min(max_new_tokens, self.context - len(row.prompt)) for row in rows)
        decoding = Decoding(self.model, [row.prompt for row in rows], capacity)
        while True:
            logits = decoding.logits
            for number, row in enumerate(rows):
                if row.finish is None:
                    text = self._advance(row, logits[number], max_new_tokens)
                    row.text += text
                    if text:
                        yield number, text
            if all(row.finish for row in rows):
                return
            decoding.feed([row.tokens[-1] for row in rows])

    def _advance(self, row: _Row, logits: Tensor, max_new_tokens: int) -> str:
        """Draw a row's next token; the text that it makes certain."""
        # A vocabulary may be padded with ids that stand for nothing.
        token = row.sampler.draw(logits[: self.tokenizer.size])
        row.tokens.append(token)
        if token in self.eos_ids:
            row.finish = "eos"
            return row.stream.finish()
        text = row.stream.add(token)
        if row.stream.ended:
            row.finish = "stop"
        elif len(row.tokens) == max_new_tokens:
            row.finish = "length"
        elif len(row.prompt) + len(row.tokens) >= self.context:
            row.finish = "context"
            warn(f"the model's context of {self.context} tokens is full: the text ends here")
        return text + row.stream.finish() if row.finish in ("length", "context") else text

    def perplexity(self, text: str, context: int | None = None, stride: int | None = None) -> float:
        """Perplexity of a text by token; protocol and arguments in `evaluation.score_text`."""
        from tenfold.llm.evaluation import score_text

        return score_text(self, text, context, stride).perplexity

    def to_hf(self, folder: str | Path, family: str | None = None) -> None:
        """Write the model and its tokenizer as a Hugging Face folder, by default in the layout that it came in.

        Raises:
            UserError: see `checkpoint.save_hf`.
        """
        checkpoint.save_hf(
            self.model, folder, self.tokenizer, family=family or self.family, eos=tuple(sorted(self.eos_ids))
        )
