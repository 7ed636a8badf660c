"""A text in passages, how long text is in tokens, and the best passages of a page for a query."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Characters of a passage: about 220 tokens of English, so that two or three of them fill one result.
PASSAGE_CHARACTERS, LONGEST_PASSAGE = 900, 1_300
# Not given by the paper (section E.8 says only that two results per query are shown).
TOKENS_PER_RESULT, TOKENS_PER_QUERY, TOKENS_PER_ROUND = 600, 1_600, 4_000

CountTokens = Callable[[str], int]
# Stands between passages of one page.
GAP = "\n[...]\n"

_PIECE = re.compile(r"[A-Za-z]{1,5}|\d{1,3}|[^\W\d_]|[^\w\s]|_|\n+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, rather too many than too few: no tokenizer is needed for it.

    A piece of up to five letters or three digits, a letter of another script, and a punctuation mark count one each.
    """
    return len(_PIECE.findall(text))


def cut_to_tokens(text: str, tokens: int) -> str:
    """The start of a text that `estimate_tokens` finds no longer than `tokens`; a cut text ends in an ellipsis."""
    if tokens < 2:
        return ""
    end = 0
    for number, piece in enumerate(_PIECE.finditer(text), start=1):
        if number > tokens:
            return text[:end].rstrip() + "…"
        if number < tokens:
            end = piece.end()
    return text


def joined(passages: Sequence[str]) -> str:
    """Passages of one page as one text."""
    return GAP.join(passages)


def split_spans(text: str) -> list[tuple[int, int]]:
    """Cut a text into passages at paragraphs, and long paragraphs at sentences.

    Returns:
        (start, end) of each passage in characters of `text`, in order, without surrounding white space; together they
        hold every character that is not white space.
    """
    units: list[tuple[int, int]] = []
    for start, end in _pieces(text, 0, len(text), re.compile(r"\n\s*\n|\n")):
        if end - start <= LONGEST_PASSAGE:
            units.append((start, end))
            continue
        for first, last in _pieces(text, start, end, _SENTENCE_END):
            units += [
                (position, min(last, position + LONGEST_PASSAGE)) for position in range(first, last, LONGEST_PASSAGE)
            ]
    spans: list[tuple[int, int]] = []
    for start, end in units:
        if spans and end - spans[-1][0] <= PASSAGE_CHARACTERS:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _pieces(text: str, start: int, end: int, boundary: re.Pattern[str]) -> list[tuple[int, int]]:
    """Non-empty pieces of text[start:end] between boundaries, stripped."""
    pieces = []
    positions = [start]
    for found in boundary.finditer(text, start, end):
        positions += [found.start(), found.end()]
    positions.append(end)
    for first, last in zip(positions[::2], positions[1::2], strict=True):
        stripped = text[first:last].strip()
        if stripped:
            offset = first + text[first:last].index(stripped[0])
            pieces.append((offset, offset + len(stripped)))
    return pieces


def best_passages(text: str, query: str, title: str = "", tokens: int = TOKENS_PER_RESULT) -> tuple[str, ...]:
    """The passages of a page that fit a query best, in the page's order, together at most `tokens` long.

    A text that is short enough is returned whole; where no passage shares a word with the query, its start.
    """
    if estimate_tokens(text[: tokens * 12]) <= tokens and len(text) <= tokens * 12:
        return (text,) if text else ()
    from tenfold.agent.lexical import rank_in_memory

    spans = split_spans(text)
    order = rank_in_memory(query, title, [text[start:end] for start, end in spans]) or list(range(len(spans)))
    return take_passages(text, spans, order, tokens)


def take_passages(
    text: str, spans: Sequence[tuple[int, int]], order: Sequence[int], tokens: int = TOKENS_PER_RESULT
) -> tuple[str, ...]:
    """Passages in the order of their merit until `tokens` are used up, then put back into the order of the text.

    Neighbours are joined. The best passage is cut where it alone is too long.
    """
    taken: list[int] = []
    left = tokens
    for position in order:
        start, end = spans[position]
        cost = estimate_tokens(text[start:end]) + 1
        if cost <= left:
            taken.append(position)
            left -= cost
        elif not taken:
            return (cut_to_tokens(text[start:end], tokens),)
    joined: list[tuple[int, int, int]] = []
    for position in sorted(taken):
        start, end = spans[position]
        if joined and joined[-1][2] == position - 1:
            joined[-1] = (joined[-1][0], end, position)
        else:
            joined.append((start, end, position))
    return tuple(text[start:end] for start, end, _ in joined)
