"""How well a model predicts text: bits per byte, perplexity, last words.

**Perplexity.** A window of `context` tokens begins at every multiple of `stride`. In each, the tokens that no earlier
window has scored are scored, save the window's first, which nothing stands before. With `stride` equal to `context`
windows lie side by side and context - 1 of their tokens count; with a smaller one every token but the text's first
counts, and sees at least context - stride tokens. Nothing is put before the text.

**Bits per byte.** The same sum, divided by the UTF-8 bytes of the tokens that were scored: comparable between models
with different vocabularies, which perplexity is not.

**Last words.** A passage without its last word is given, and the model is right if the likeliest tokens are those of
the word, as in LAMBADA (Paperno et al. 2016). Passages are cut from any text and, unlike LAMBADA's, not filtered by
people, so that figures compare models and not papers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.llm.generation import LanguageModel
from tenfold.llm.model import Decoder

# Most scores that are held at a time: 256 MB in float32.
_MAX_SCORES = 1 << 26
_MAX_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class TextScore:
    """How well a text was predicted.

    Attributes:
        tokens: that were scored.
        bytes: UTF-8 bytes that they stand for.
        nats: sum of their negative log-likelihoods.
        context: tokens of a window.
        stride: between windows.
        perplexity: exp(nats / tokens).
        bits_per_byte: nats / bytes / ln 2.
    """

    tokens: int
    bytes: int
    nats: float
    context: int
    stride: int
    perplexity: float
    bits_per_byte: float


def score_text(
    model: LanguageModel,
    text: str,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> TextScore:
    """Score a text by the protocol above.

    Args:
        model: a language model.
        text: to be predicted.
        context: tokens of a window; by default the model's own, at most 2,048.
        stride: between windows; by default half a window.
        limit: most tokens of the text.
        batch: windows at a time.

    Raises:
        UserError: a window beyond the model's context, a stride beyond the window, fewer than two tokens.
    """
    context = min(model.context, _MAX_DEFAULT_CONTEXT) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if not 2 <= context <= model.context:
        raise UserError(f"context {context}: give 2 to {model.context} tokens, which is the model's own")
    if not 1 <= stride <= context:
        raise UserError(f"stride {stride}: give 1 to {context} tokens, the length of a window")
    if batch < 1 or (limit is not None and limit < 1):
        raise UserError(f"batch {batch}, limit {limit}: give numbers from 1 on")
    ids = model.tokenizer.encode(text)[:limit]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} token(s): at least 2 are needed to predict one from another")
    nats = token_nats(model.model, torch.tensor(ids), context, stride, batch)
    scored = nats.isfinite()
    total, tokens = nats[scored].sum().item(), int(scored.sum())
    size = sum(len(model.tokenizer.token_bytes(token)) for token, counts in zip(ids, scored, strict=True) if counts)
    return TextScore(tokens, size, total, context, stride, math.exp(total / tokens), total / size / math.log(2))


def bits_per_byte(model: LanguageModel, text: str, context: int | None = None, stride: int | None = None) -> float:
    """Bits per byte of a text; arguments as in `score_text`."""
    return score_text(model, text, context, stride).bits_per_byte


def token_nats(model: Decoder, ids: Tensor, context: int, stride: int, batch: int = 8) -> Tensor:
    """Negative log-likelihood of each token of a text.

    Args:
        model: a decoder.
        ids: of the text (N,).
        context: tokens of a window.
        stride: between windows.
        batch: windows at a time.

    Returns:
        Nats (N,), float64; NaN for tokens that are not scored.
    """
    nats = torch.full((len(ids),), math.nan, dtype=torch.float64)
    # The last window is the first that reaches the end of the text; one of a single token has nothing to score.
    starts = range(0, min(max(1, len(ids) - context + stride), len(ids) - 1), stride)
    with console.progress("windows", len(starts)) as bar:
        for group in (starts[i : i + batch] for i in range(0, len(starts), batch)):
            windows = [ids[start : start + context] for start in group]
            reached = [0 if start == 0 else start - stride + context for start in group]
            # Of each window, the places whose next token is new.
            first = [max(0, end - start - 1) for start, end in zip(group, reached, strict=True)]
            for start, begin, (found, _) in zip(group, first, next_token_scores(model, windows, first), strict=True):
                nats[start + begin + 1 : start + begin + 1 + len(found)] = found
            bar.advance(len(group))
    return nats


@torch.inference_mode()
def next_token_scores(model: Decoder, rows: Sequence[Tensor], first: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Score tokens of several sequences by what stands before them.

    Args:
        model: a decoder.
        rows: ids of each sequence (T_i,).
        first: the place from which on each one's next tokens are scored, at least 0.

    Returns:
        For each row, nats (T_i - 1 - first_i,) in float64 and whether each token was the likeliest.

    Raises:
        UserError: the scores are not finite.
    """
    device = model.embed.weight.device
    # Padding stands after the tokens, which do not see it; the longest row's last token is only predicted.
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    hidden = model.hidden(padded[:, :-1])
    places = [(row, slice(begin, len(ids) - 1)) for row, (ids, begin) in enumerate(zip(rows, first, strict=True))]
    chosen = torch.cat([hidden[row, place] for row, place in places])
    targets = torch.cat([ids[begin + 1 :] for ids, begin in zip(rows, first, strict=True)]).to(device)
    nats, likeliest = [], []
    size = max(1, _MAX_SCORES // model.config.vocabulary)
    for part, wanted in zip(chosen.split(size), targets.split(size), strict=True):
        logits = model.logits(part).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu())
        likeliest.append((logits.argmax(-1) == wanted).cpu())
    if not torch.cat(nats).isfinite().all():
        raise UserError("the model's scores are not finite: its weights are damaged, or the precision too low")
    lengths = [place.stop - place.start for _, place in places]
    return list(zip(torch.cat(nats).split(lengths), torch.cat(likeliest).split(lengths), strict=True))


def score_continuations(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int = 8, title: str = "texts"
) -> list[tuple[float, float]]:
    """Score what follows given contexts.

    Args:
        model: a language model.
        pairs: ids of a context (at least one) and of its continuation; the end of what is too long is taken.
        batch: pairs at a time.
        title: of the progress bar.

    Returns:
        For each pair, the log-likelihood in nats and the share of the continuation's tokens that were the likeliest.
    """
    results: dict[int, tuple[float, float]] = {}
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # like lengths together
    with console.progress(title, len(pairs)) as bar:
        for group in (order[i : i + batch] for i in range(0, len(order), batch)):
            # The last token is only predicted, so that a full context fits before it.
            rows = [torch.tensor([*pairs[i][0], *pairs[i][1]][-model.context - 1 :]) for i in group]
            first = [max(0, len(row) - len(pairs[i][1]) - 1) for i, row in zip(group, rows, strict=True)]
            for i, (nats, likeliest) in zip(group, next_token_scores(model.model, rows, first), strict=True):
                results[i] = -nats.sum().item(), likeliest.double().mean().item() if len(likeliest) else 1.0
            bar.advance(len(group))
    return [results[i] for i in range(len(pairs))]


# --- last words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastWords:
    """How often the last word of a passage was found.

    Attributes:
        passages: number of them.
        accuracy: share of passages whose last word was predicted in all its tokens.
        word_perplexity: exp of the mean negative log-likelihood of a word.
        least_words: a passage has at least so many words.
    """

    passages: int
    accuracy: float
    word_perplexity: float
    least_words: int


def passages_of(text: str, least_words: int = 60) -> list[tuple[str, str]]:
    """Cut a text into passages of whole sentences, each without its last word and the word.

    Headings and other paragraphs without a full stop are left out, and so are passages whose last word has fewer than
    three letters.
    """
    sentences = [
        sentence
        for paragraph in re.split(r"\n\s*\n", text)
        for sentence in re.findall(r"[^.!?]+[.!?]+[\"'”’)]*", " ".join(paragraph.split()))
    ]
    passages, gathered = [], ""
    for sentence in sentences:
        gathered = f"{gathered} {sentence.strip()}".strip()
        if len(gathered.split()) >= least_words:
            match = re.fullmatch(r"(.*\S)\s+([^\W\d_]{3,})\W*", gathered)
            if match:
                passages.append((match[1], match[2]))
            gathered = ""
    return passages


def last_words(
    model: LanguageModel, text: str, limit: int | None = 200, least_words: int = 60, batch: int = 8
) -> LastWords:
    """Predict last words; protocol above.

    Args:
        model: a language model.
        text: prose.
        limit: most passages, evenly spread over the text.
        least_words: of a passage.
        batch: passages at a time.

    Raises:
        UserError: the text is shorter than one passage.
    """
    found = passages_of(text, least_words)
    if not found:
        raise UserError(f"the text has no passage of {least_words} words that ends with a word: give a longer text")
    if limit and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    encode = model.tokenizer.encode
    pairs = []
    for before, word in found:
        whole, given = encode(f"{before} {word}"), encode(before)
        # A vocabulary may join the word to what stands before; then it is scored from where the two part.
        same = next((i for i, (a, b) in enumerate(zip(whole, given, strict=False)) if a != b), len(given))
        same = max(1, same)
        pairs.append((whole[:same], whole[same:]))
    scores = score_continuations(model, pairs, batch, "passages")
    right = sum(share == 1.0 for _, share in scores)
    mean = sum(nats for nats, _ in scores) / len(scores)
    return LastWords(len(scores), right / len(scores), math.exp(-mean), least_words)
