"""The sample stream of pre-training: documents packed into rows, sources mixed by weight, all by the row's number.

Row i is a pure function of i and the seed: nothing has a position that a checkpoint would have to hold, and any process
or worker can make any row. A source is an endless stream of tokens, epoch after epoch, each epoch all its documents in
an order of its own; row r of the source is the stream from r * T to r * T + T, whose last token is only a target.
Memory: some 24 bytes for each document, none for tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold.core.console import UserError
from tenfold.llm.attention import Documents
from tenfold.llm.shards import Shard, ShardWriter, TextFiles, write_labels, write_shard
from tenfold.llm.tokenizer import Tokenizer

__all__ = [
    "PackedTokens",
    "Shard",
    "ShardWriter",
    "Source",
    "SourceStatistics",
    "TextFiles",
    "open_source",
    "write_labels",
    "write_shard",
]

_PERIOD = 2**16  # rows after which a mixture's pattern repeats: weights are exact to 1.5e-5
_STAGES = 64  # of a curriculum: rows go from easy to hard by stage, mixed inside a stage


@dataclass(frozen=True)
class Source:
    """One part of a mixture.

    Attributes:
        shard: its documents.
        weight: share of the rows, relative to the other sources'; None takes its number of tokens.
        quality: how much scores count: a document is drawn `score ** quality` times as often as one of score 1; 0 draws
            all alike. (The paper samples high scores with higher probability and does not say how.)
        by_difficulty: whether documents come from easy to hard through the whole phase.
        name: for reports; by default that of the files.
    """

    shard: Shard
    weight: float | None = None
    quality: float = 0.0
    by_difficulty: bool = False
    name: str = ""


@dataclass(frozen=True)
class SourceStatistics:
    """What a phase takes from a source.

    Attributes:
        share: of the rows.
        rows: number of rows.
        epochs: how often each of its tokens is seen, on average.
        documents: in the source.
        tokens: in the source.
    """

    share: float
    rows: int
    epochs: float
    documents: int
    tokens: int


def open_source(
    path: Path | str,
    tokenizer: Tokenizer,
    cache: Path | str,
    *,
    weight: float | None = None,
    quality: float = 0.0,
    by_difficulty: bool = False,
    name: str = "",
) -> Source:
    """A source from text, which is split once and kept in the folder `cache`, or from a shard that exists.

    Args:
        path: text file, folder of such, prefix of a shard (or its `.bin` or `.idx`), or `.npy` of ids.
        tokenizer: the one that text is split with, or that the shard was made with.
        cache: folder for the tokens of texts.
        weight: see `Source`, as the rest.
        quality: see there.
        by_difficulty: see there.
        name: see there.

    Raises:
        UserError: nothing there, or not readable.
    """
    path = Path(path)
    is_shard = path.suffix in (".npy", ".bin", ".idx") or path.with_name(path.name + ".idx").is_file()
    shard = Shard(path, tokenizer.eod) if is_shard else TextFiles(path).shard(tokenizer, cache)
    return Source(shard, weight, quality, by_difficulty, name or path.name.partition(".")[0])


class PackedTokens:
    """Rows of packed documents from a mixture of sources (`core.training.data.Batches`).

    Args:
        sources: the mixture; a shard alone stands for a source without settings.
        length: tokens T of a row.
        seed: of all orders; give each phase its own, or it begins with the rows of the one before.
        eod: id that ends documents.
        vocabulary: number of ids that the model knows; None does not check.
        rows: number of rows of the phase, which a curriculum must know.
        reset: whether batches say where documents end, so that attention does not cross these places.

    Raises:
        UserError: no source, a weight that is not positive, a source shorter than one row, documents that do not end
            with `eod`, scores that are missing or negative, a curriculum without difficulties or `rows`.
    """

    def __init__(
        self,
        sources: Sequence[Source | Shard],
        length: int,
        seed: int = 0,
        eod: int = 0,
        *,
        vocabulary: int | None = None,
        rows: int | None = None,
        reset: bool = True,
    ) -> None:
        if not sources:
            raise UserError("data: no source is given")
        if length < 1:
            raise UserError(f"data: rows of {length} tokens are no rows")
        self._again = partial(
            PackedTokens, tuple(sources), length, seed, eod, vocabulary=vocabulary, rows=rows, reset=reset
        )
        self.sources = [source if isinstance(source, Source) else Source(source) for source in sources]
        self.names = [source.name or source.shard.prefix.name for source in self.sources]
        self.length = length
        self.eod = eod
        self.vocabulary = vocabulary
        self.reset = reset
        self._mixture = _Mixture([_weight(s, n) for s, n in zip(self.sources, self.names, strict=True)])
        self._streams = []
        for number, (source, name) in enumerate(zip(self.sources, self.names, strict=True)):
            source.shard.check_ends(eod)
            if source.by_difficulty and rows is None:
                raise UserError(f"data: {name}: an order by difficulty needs to know how many rows the phase has")
            own_rows = self._mixture.rows_of(number, rows) if rows is not None and source.by_difficulty else None
            self._streams.append(_Stream(source, name, length, (seed, number), own_rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The rows with these numbers: `tokens` and `targets` (B, T), int64, and `documents`, their lengths.

        Raises:
            UserError: an id that the model does not know.
        """
        rows = np.empty((len(indices), self.length + 1), np.int64)
        for row, index in zip(rows, indices, strict=True):
            source, number = self._mixture.locate(index)
            row[:] = self._streams[source].row(number)
        if self.vocabulary is not None and (rows.max() >= self.vocabulary or rows.min() < 0):
            wrong = int(np.flatnonzero(((rows >= self.vocabulary) | (rows < 0)).any(1))[0])
            name = self.names[self._mixture.locate(indices[wrong])[0]]
            raise UserError(
                f"data: {name} holds token id {rows[wrong].max()}, the model's vocabulary has {self.vocabulary} ids: "
                "take the tokenizer that the tokens were made with"
            )
        tokens = torch.from_numpy(rows)
        inputs = tokens[:, :-1].contiguous()
        documents = Documents.of(inputs, self.eod) if self.reset else None
        return {"tokens": inputs, "targets": tokens[:, 1:].contiguous(), "documents": documents}

    def statistics(self, rows: int) -> dict[str, SourceStatistics]:
        """What the first `rows` rows take from each source, by name."""
        report = {}
        for number, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            taken, tokens = self._mixture.rows_of(number, rows), len(source.shard.tokens)
            report[name] = SourceStatistics(
                self._mixture.shares[number], taken, taken * self.length / tokens, len(source.shard), tokens
            )
        return report


def _weight(source: Source, name: str) -> float:
    weight = len(source.shard.tokens) if source.weight is None else source.weight
    if not 0 < weight < float("inf"):
        raise UserError(f"data: {name} has the weight {weight}, which is not a positive number: leave the source out")
    return weight


class _Mixture:
    """Which source a row comes from: a fixed pattern that keeps every stretch of rows near the weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        exact = np.asarray(weights, np.float64) / np.sum(weights) * _PERIOD
        counts = np.maximum(np.floor(exact).astype(np.int64), 1)
        # Largest remainders; a source that was raised to one row is paid for by the largest.
        for _ in range(max(_PERIOD - int(counts.sum()), 0)):
            counts[np.argmax(exact - counts)] += 1
        counts[np.argmax(counts)] -= counts.sum() - _PERIOD
        self.counts = counts
        self.shares = (counts / _PERIOD).tolist()
        # The j-th of c rows of a source stands at (j + 1/2) / c of the period.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        order = np.argsort(places, kind="stable")
        self._source = np.repeat(np.arange(len(counts)), counts)[order]
        self._number = np.concatenate([np.arange(count) for count in counts])[order]

    def locate(self, index: int) -> tuple[int, int]:
        """Source of a row, and its number among the rows of that source."""
        period, place = divmod(index, _PERIOD)
        source = int(self._source[place])
        return source, period * int(self.counts[source]) + int(self._number[place])

    def rows_of(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows come from a source."""
        periods, rest = divmod(rows, _PERIOD)
        return periods * int(self.counts[source]) + int((self._source[:rest] == source).sum())


class _Stream:
    """One source as an endless stream of tokens, cut into rows."""

    def __init__(self, source: Source, name: str, length: int, seed: tuple[int, ...], rows: int | None) -> None:
        self.shard = source.shard
        self.length = length
        self.seed = seed
        self.lengths = np.diff(self.shard.starts)
        self.tokens = int(self.lengths.sum())
        if self.tokens < length + 1:
            raise UserError(f"data: {name} has {self.tokens} tokens, and one row takes {length + 1}: give more text")
        self.copies = _copies(source, self.lengths, name)
        self.difficulty: np.ndarray | None = None
        self.block = max(1, self.tokens // length)  # rows that are shuffled among each other
        self.rows = rows
        if rows is not None:
            if "difficulty" not in self.shard.labels:
                raise UserError(
                    f"data: {name} says of no document how difficult it is ({self.shard.prefix}.difficulty.npy)"
                )
            self.difficulty = np.asarray(self.shard.labels["difficulty"])
            self.block = -(-max(rows, 1) // _STAGES)
        self._ends = [0]  # of the epochs that are known, in tokens
        self._epoch = lru_cache(maxsize=4)(self._draw)

    def row(self, number: int) -> np.ndarray:
        """Row `number` (T + 1,), after the rows have been mixed."""
        if self.rows is not None:
            number %= max(self.rows, 1)  # a run that goes on beyond the phase begins it again
        block, place = divmod(number, self.block)
        size = self.block if self.rows is None else min(self.block, self.rows - block * self.block)
        start = (block * self.block + shuffled(place, size, (*self.seed, block))) * self.length
        return self._read(start, start + self.length + 1)

    def _read(self, start: int, end: int) -> np.ndarray:
        parts = []
        while start < end:
            epoch, before = self._epoch_at(start)
            documents, ends = self._epoch(epoch)
            stop = min(end, before + int(ends[-1]))
            place = np.arange(start - before, stop - before)
            which = np.searchsorted(ends, place, "right")
            parts.append(self.shard.tokens[place - ends[which] + self.shard.starts[documents[which] + 1]])
            start = stop
        return np.concatenate(parts)

    def _epoch_at(self, position: int) -> tuple[int, int]:
        """The epoch of a position in the stream, and where it begins."""
        if self.copies is None and self.rows is None:
            epoch = position // self.tokens
            return epoch, epoch * self.tokens
        while self._ends[-1] <= position:  # epochs that are drawn by score differ in length
            self._ends.append(self._ends[-1] + int(self._epoch(len(self._ends) - 1)[1][-1]))
        epoch = int(np.searchsorted(self._ends, position, "right")) - 1
        return epoch, self._ends[epoch]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in their order, and where each ends in it."""
        random = np.random.default_rng((*self.seed, epoch))
        needed = self.tokens if self.rows is None else self.rows * self.length + 1
        if self.copies is None and self.rows is None:
            order = random.permutation(len(self.lengths))
        else:
            order = self._sample(random, needed)
        if self.difficulty is not None:
            order = order[np.argsort(self.difficulty[order], kind="stable")]
        return order, np.cumsum(self.lengths[order])

    def _sample(self, random: np.random.Generator, needed: int) -> np.ndarray:
        """Documents of at least `needed` tokens in a random order, each as often as expected, give or take one."""
        order = random.permutation(len(self.lengths))
        copies = np.ones(len(order)) if self.copies is None else self.copies
        marks = np.floor(np.cumsum(copies[order] * (needed / self.tokens)) + random.random())  # systematic sampling
        order = np.repeat(order, np.diff(marks, prepend=0.0).astype(np.int64))
        random.shuffle(order)
        missing = needed - int(self.lengths[order].sum())
        while missing > 0:
            more = random.permutation(np.flatnonzero(copies))
            more = more[: int(np.searchsorted(np.cumsum(self.lengths[more]), missing)) + 1]
            order = np.concatenate([order, more])
            missing -= int(self.lengths[more].sum())
        return order


def _copies(source: Source, lengths: np.ndarray, name: str) -> np.ndarray | None:
    """How often each document is expected in an epoch, which has as many tokens as the source; None: once."""
    if not source.quality:
        return None
    if "score" not in source.shard.labels:
        raise UserError(f"data: {name} gives no scores to its documents ({source.shard.prefix}.score.npy)")
    scores = np.asarray(source.shard.labels["score"], np.float64)
    if (scores < 0).any() or (source.quality < 0 and (scores == 0).any()):
        raise UserError(f"data: {name} has a score of {scores.min():g}: scores must be positive to be weights")
    weights = scores**source.quality
    total = float((weights * lengths).sum())
    if not total > 0:
        raise UserError(f"data: {name}: all scores are 0, so that nothing would be drawn")
    return weights * (lengths.sum() / total)


def shuffled(place: int, size: int, seed: Sequence[int]) -> int:
    """The item at `place` in a random order of `size` items, found without making the order.

    A Feistel network permutes the numbers below the next power of four; numbers beyond `size` are sent through again
    until they fall below it (cycle walking), which leaves a permutation of the rest.
    """
    if size == 1:
        return 0
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [int(key) | 1 for key in _keys(tuple(seed))]
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = ((right + key) * 0x9E3779B97F4A7C15 ^ key >> 7) & (2**64 - 1)
            mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
            left, right = right, left ^ (mixed >> 29 & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=1024)
def _keys(seed: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(6, np.uint64)
