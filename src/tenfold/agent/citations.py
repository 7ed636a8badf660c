"""Which sentence of an answer rests on which words of a source, and which rests on nothing.

An answer cites its sources by number, [2] or [2][9]. Each cited sentence is held against the stored text of those
sources, and the closest span of one or two sentences is quoted. Its numbers must stand in the span, and a denial must
not face an affirmation; beyond that, likeness of words decides, or whoever can tell whether one follows from the other.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tenfold.agent.lexical import rank_in_memory
from tenfold.agent.passages import split_spans
from tenfold.agent.search import Result

# Likeness from which a sentence counts as supported.
THRESHOLD = 0.8

# (quoted span, sentence) to whether the sentence follows from it: a language model, for example.
Entails = Callable[[str, str], bool]

_MARK = re.compile(r"\[(\d{1,3}(?:\s*[,，]\s*\d{1,3})*)\]")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Fig|approx|ca|e\.g|i\.e|[A-Z])|\b[A-Z]\.[A-Z])\.$"
)
# Possessive, and begun at the start of a run only: the sources are a stranger's, and rows of dots must not take long.
_END = re.compile(
    r"(?<![.!?])[.!?]++[\"'”’)]*+(?:\s*+\[\d[\d,，\s]*+\])*+(?=\s|$)"
    r"|(?<![。！？])[。！？]++[”’」』）]*+(?:\s*+\[\d[\d,，\s]*+\])*+|\n+"
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|without|cannot)\b|n't\b|[不没未无非]")
# Words that carry no claim: they may differ freely.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        "a an the of in on at to for from by with and or as is was are were be been being it its this that these "
        "he she they his her their which who whom whose has had have did do does also then than there "
        "those 的 了 是 在 和 与",
    )
)
_LONGEST_SENTENCE = 1_000
_LONGEST_SOURCE, _PASSAGES_OF_LONG_SOURCE = 30_000, 20


@dataclass(frozen=True)
class Citation:
    """One sentence of an answer and one source that it cites.

    Args:
        sentence: without the marks.
        start: where it begins in the answer.
        end: where it ends in the answer, marks included.
        mark: the number in brackets, counted from 1.
        url: the source's address; empty where no source has that number.
        title: the source's title.
        quote: the words of the source that come closest.
        span: their first and last + 1 character in the source's text; None where there are none.
        likeness: 0 to 1.
        supported: whether the quote carries the sentence.
        reason: why not, where it does not.
        sha256: of the source's text.
        fetched_at: when that text was read.
    """

    sentence: str
    start: int
    end: int
    mark: int
    url: str
    title: str
    quote: str
    span: tuple[int, int] | None
    likeness: float
    supported: bool
    reason: str
    sha256: str
    fetched_at: str


def check_citations(answer: str, sources: Sequence[Result], entails: Entails | None = None) -> list[Citation]:
    """Every pair of a cited sentence and a source in an answer, in order.

    Args:
        answer: text with marks such as [2]; a mark belongs to the sentence that it ends or stands in.
        sources: source n of the marks is sources[n - 1].
        entails: is asked where words alone do not decide for the sentence, and its word counts; the rule of numbers
            stands above it.
    """
    found = []
    for start, end in sentences(answer):
        whole = answer[start:end]
        marks = [int(number) for group in _MARK.findall(whole) for number in re.findall(r"\d+", group)]
        sentence = re.sub(r"\s+([.!?,;:。！？，])", r"\1", " ".join(_MARK.sub(" ", whole).split()))
        for mark in dict.fromkeys(marks):
            if not 1 <= mark <= len(sources):
                reason = f"there is no source {mark}"
                found.append(Citation(sentence, start, end, mark, "", "", "", None, 0.0, False, reason, "", ""))
                continue
            source = sources[mark - 1]
            text = source.text if len(source.text) >= sum(map(len, source.passages)) else "\n".join(source.passages)
            span, likeness, reason = support(sentence, text, source.title)
            quote = text[span[0] : span[1]] if span else ""
            if reason.startswith("the words") and entails is not None and entails(quote, sentence):
                reason = ""
            found.append(
                Citation(
                    sentence=sentence,
                    start=start,
                    end=end,
                    mark=mark,
                    url=source.url,
                    title=source.title,
                    quote=quote,
                    span=span,
                    likeness=round(likeness, 4),
                    supported=not reason,
                    reason=reason,
                    sha256=source.sha256,
                    fetched_at=source.fetched_at,
                )
            )
    return found


def uncited_sentences(answer: str) -> list[str]:
    """Sentences of an answer that cite nothing."""
    spans = [answer[start:end].strip() for start, end in sentences(answer)]
    # Headings of a report claim nothing.
    return [text for text in spans if not _MARK.search(text) and not text.startswith("#")]


def renumber_marks(answer: str, numbers: Mapping[int, Sequence[int]]) -> str:
    """An answer whose marks stand for other numbers.

    Args:
        answer: text with marks such as [2].
        numbers: what each number becomes; one that is not there, or becomes nothing, goes.
    """

    def mark(found: re.Match[str]) -> str:
        old = [int(number) for number in re.findall(r"\d+", found[0])]
        return "".join(f"[{new}]" for new in dict.fromkeys(new for number in old for new in numbers.get(number, ())))

    return re.sub(r" +(?=[.!?,;])", "", _MARK.sub(mark, answer))


def cited(answer: str) -> list[int]:
    """The numbers that an answer cites, each once, in order."""
    groups = (re.findall(r"\d+", group) for group in _MARK.findall(answer))
    return list(dict.fromkeys(int(number) for group in groups for number in group))


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence, English or Chinese; marks after its end belong to it."""
    spans = []
    start = 0
    for found in _END.finditer(text):
        ending = text[start : found.end()].rstrip()
        if found[0].startswith(".") and _ABBREVIATION.search(ending):
            continue
        spans.append((start, found.end()))
        start = found.end()
    spans.append((start, len(text)))
    stripped = []
    for first, last in spans:
        body = text[first:last].strip()
        if body:
            offset = first + text[first:last].index(body[0])
            stripped.append((offset, offset + len(body)))
    return stripped


def support(sentence: str, text: str, title: str = "") -> tuple[tuple[int, int] | None, float, str]:
    """The span of a text that comes closest to a sentence.

    Args:
        sentence: a claim.
        text: the source.
        title: its title, whose words count as said everywhere in it.

    Returns:
        The span in characters, the likeness from 0 to 1, and why the span does not carry the sentence (empty if it
        does).
    """
    claim = _normal(sentence)[:_LONGEST_SENTENCE]
    words = _content_words(claim)
    if not words:
        return None, 0.0, "the sentence claims nothing that could be looked up"
    numbers = set(_numbers(claim))
    heading = _normal(title)
    spans = sentences(text) if len(text) <= _LONGEST_SOURCE else _likely_sentences(text, claim)
    windows = spans + [(first, last) for (first, _), (_, last) in itertools.pairwise(spans)]
    best: tuple[tuple[bool, float, int, int], tuple[int, int], float, str] | None = None
    for start, end in windows:
        said = _normal(text[start:end])
        known = heading + "\n" + said
        missing = numbers - set(_numbers(known))
        likeness = _likeness(claim, words, said, known)
        denied = bool(_NEGATION.search(claim)) != bool(_NEGATION.search(said))
        if missing:
            reason = f"the source does not say {', '.join(sorted(missing))} there"
        elif denied and likeness >= THRESHOLD:
            reason = "the words match, but one denies and the other does not"
        elif likeness < THRESHOLD:
            reason = "the words are not those of the source"
        else:
            reason = ""
        # Of spans that are equally like it, the one that says it itself, and not by its title.
        own = len(set(words) & set(_content_words(said)))
        key = (not reason, likeness, own, start - end)
        if best is None or key > best[0]:
            best = (key, (start, end), likeness, reason)
    if best is None:
        return None, 0.0, "the source has no text"
    return best[1], best[2], best[3]


def _likely_sentences(text: str, claim: str) -> list[tuple[int, int]]:
    """The sentences of those passages of a long text that share most with a claim."""
    passages = split_spans(text)
    chosen = sorted(rank_in_memory(claim, "", [text[start:end] for start, end in passages])[:_PASSAGES_OF_LONG_SOURCE])
    found = []
    for start, end in (passages[position] for position in chosen):
        found += [(start + first, start + last) for first, last in sentences(text[start:end])]
    return found or sentences(text[:_LONGEST_SOURCE])


def _likeness(claim: str, words: Sequence[str], said: str, known: str) -> float:
    """The share of the claim's words that the span has, near-spellings counted, or its likeness as a string."""
    from rapidfuzz import fuzz, process

    there = _content_words(known)
    vocabulary = set(there)
    covered = 0.0
    for word in words:
        if word in vocabulary:
            covered += 1.0
        elif len(word) > 3 and there:
            close = process.extractOne(word, vocabulary, scorer=fuzz.ratio, score_cutoff=80)
            covered += close[1] / 100 if close else 0.0
    in_order = fuzz.partial_ratio(claim, said) / 100 if len(claim) <= len(said) else fuzz.ratio(claim, said) / 100
    return max(covered / len(words), in_order)


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return text.replace("’", "'").replace("–", "-")


def _content_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text) if word not in _FUNCTION_WORDS]


def _numbers(text: str) -> list[str]:
    # 1,234 and 1234 are the same number, and so are 05 and 5.
    return [found.replace(",", "").lstrip("0") or "0" for found in _NUMBER.findall(text)]
