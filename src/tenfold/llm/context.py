"""Longer contexts: which rotary base lets a trained model find what stands far back (paper section 3.2).

A checkpoint is run, untrained, at the target length with several bases. Needles - sentences with a number - are put
into a haystack at several depths, and the model is asked for each number. The base that finds most is taken; of equals,
the one with the lowest loss on the haystack. Training at the target length then goes on from there.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.llm.evaluation import next_token_scores
from tenfold.llm.generation import LanguageModel

NEEDLE = " The secret number of {name} is {number}."
QUESTION = " The secret number of {name} is"
ANSWER = " {number}"
NAMES = ("London", "Paris", "Rome", "Moscow", "Boston", "Vienna", "Madrid", "Dublin", "Cairo", "Athens")


@dataclass(frozen=True)
class BaseScore:
    """What a model found with one rotary base.

    Attributes:
        rope_base: the base.
        found: share of the answers' tokens that were the likeliest, over all needles.
        by_depth: the same for each depth, from the haystack's beginning to its end.
        answer_nats: mean negative log-likelihood of an answer's token.
        loss: on the haystack at the target length, in nats a token: what training at that length would start from.
    """

    rope_base: float
    found: float
    by_depth: tuple[float, ...]
    answer_nats: float
    loss: float


@dataclass(frozen=True)
class Sweep:
    """Rotary bases at a target length.

    Attributes:
        target: tokens of the haystack with its needle and question.
        trained_base: the checkpoint's own base.
        trained_context: and its context.
        depths: where the needles stood, 0 at the beginning and 1 at the end.
        scores: of the bases, in the order in which they were given.
        best: the base to take.
    """

    target: int
    trained_base: float
    trained_context: int
    depths: tuple[float, ...]
    scores: tuple[BaseScore, ...]
    best: float


@dataclass(frozen=True)
class Haystack:
    """One question to a model.

    Attributes:
        ids: haystack, needle, question and answer (target + 1,).
        answer: number of tokens of the answer, at the end.
    """

    ids: torch.Tensor
    answer: int


def built_in_text() -> str:
    """Shakespeare's plays, for want of a text of one's own; see assets/ORIGIN.md."""
    return lzma.decompress((resources.files("tenfold.llm") / "assets" / "tinyshakespeare.txt.xz").read_bytes()).decode()


def haystack(
    encode: Callable[[str], Sequence[int]], hay: Sequence[int], target: int, depth: float, draw: random.Random
) -> Haystack:
    """Hide a needle.

    Args:
        encode: text to ids.
        hay: ids of the text around it, at least `target`.
        target: tokens that the model sees.
        depth: 0 puts the needle before the text, 1 right before the question.
        draw: names the needle, and where in `hay` the text begins.

    Raises:
        UserError: the target leaves no room for needle and question.
    """
    name, number = draw.choice(NAMES), draw.randrange(1000, 10000)
    needle, question, answer = (
        list(encode(part.format(name=name, number=number))) for part in (NEEDLE, QUESTION, ANSWER)
    )
    # The answer's last token is only predicted.
    room = target + 1 - len(needle) - len(question) - len(answer)
    if room < 0:
        raise UserError(f"target {target}: needle, question and answer alone have {target + 1 - room} tokens")
    start = draw.randrange(len(hay) - room + 1)
    place = round(depth * room)
    text = list(hay[start : start + room])
    return Haystack(torch.tensor([*text[:place], *needle, *text[place:], *question, *answer]), len(answer))


def sweep(
    model: LanguageModel,
    text: str,
    target: int,
    bases: Sequence[float],
    depths: int = 5,
    needles: int = 2,
    seed: int = 0,
) -> Sweep:
    """Run a model at a target length with several rotary bases. The model is as before afterwards.

    Args:
        model: a language model; its weights are not changed.
        text: of the haystack, longer than `target`.
        target: context length, in tokens.
        bases: rotary bases to try.
        depths: places of the needle, evenly from the beginning to the end.
        needles: at each depth.
        seed: of needles and texts, the same for all bases.

    Raises:
        UserError: a base that is not positive, a text that is too short, a target without room for a needle.
    """
    wrong = next((base for base in bases if not 0 < base < float("inf")), None)
    if wrong is not None or not bases:
        raise UserError(f"bases: {wrong if bases else 'none'}: give one or more positive numbers, such as 1e5,1e6")
    if depths < 1 or needles < 1:
        raise UserError(f"depths {depths}, needles {needles}: give at least 1 of each")
    hay = model.tokenizer.encode(text)
    if len(hay) <= target:
        raise UserError(f"the haystack has {len(hay)} tokens, and the target is {target}: give a longer --text")
    places = tuple(i / max(1, depths - 1) for i in range(depths))
    draw = random.Random(seed)
    questions = [
        [haystack(model.tokenizer.encode, hay, target, depth, draw) for _ in range(needles)] for depth in places
    ]
    rotary, config = model.model.rotary, model.model.config
    trained = rotary.base
    scores = []
    try:
        with console.progress("bases", len(bases) * depths * needles) as bar:
            for base in bases:
                rotary.base = base
                scores.append(_score(model, base, questions, torch.tensor(hay[: target + 1]), bar))
    finally:
        rotary.base = trained
    best = max(scores, key=lambda score: (score.found, -score.loss))
    return Sweep(target, config.rope_base, config.context, places, tuple(scores), best.rope_base)


def _score(
    model: LanguageModel,
    base: float,
    questions: Sequence[Sequence[Haystack]],
    text: torch.Tensor,
    bar: console.ProgressBar,
) -> BaseScore:
    by_depth, right, nats = [], [], []
    for row in questions:
        hits = []
        for question in row:
            first = len(question.ids) - question.answer - 1
            [(found, likeliest)] = next_token_scores(model.model, [question.ids], [first])
            hits.append(likeliest.double())
            nats.append(found)
            bar.advance(note=f"base {base:g}")
        by_depth.append(torch.cat(hits).mean().item())
        right += hits
    [(losses, _)] = next_token_scores(model.model, [text], [0])
    share = torch.cat(right).mean().item()
    return BaseScore(base, share, tuple(by_depth), torch.cat(nats).mean().item(), losses.mean().item())


def extend(model: LanguageModel, base: float, target: int, folder: Path | str) -> None:
    """Write a copy of a model with another base and context, to go on training from.

    Args:
        model: the model; unchanged.
        base: rotary base.
        target: context length, in tokens.
        folder: where to write, in the layout that the model came in.
    """
    network = model.model
    before = network.config
    network.config = replace(before, rope_base=base, context=target)
    try:
        model.to_hf(folder)
    finally:
        network.config = before
