from __future__ import annotations

import hashlib
import re
import time

import pytest

from tenfold.agent.citations import check_citations, sentences, support, uncited_sentences
from tenfold.agent.data import embedded_corpus, read_documents
from tenfold.agent.search import Result


def source(text: str, title: str = "Grey Point") -> Result:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Result("http://a.test/", title, text, None, 1.0, (text,), "local", digest, "2025-01-01")


TOWER = source(
    "The tower at Grey Point was lit on 3 May 1871. Its keeper was Ada Brook, who was born in Hull. "
    "The light was not visible from the river. It burned 1,200 candles a year."
)
BRIDGE = source("石桥建于1902年。它长三百米，没有灯。", "石桥")


@pytest.mark.parametrize(
    ("sentence", "quote"),
    [
        ("The tower at Grey Point was lit on 3 May 1871 [1].", "3 May 1871"),
        ("It was lit on 3 May 1871.[1]", "3 May 1871"),
        ("Its keeper, Ada Brook, was born in Hull [1]", "born in Hull"),
        ("The light was not visible from the river [1].", "not visible"),
        ("The tower burned 1200 candles a year [1].", "1,200 candles"),
        ("The tower was lit on 3 May 1871, and its keeper was Ada Brook, born in Hull [1].", "Ada Brook"),
        ("石桥建于1902年[2]。", "石桥建于1902年"),
    ],
)
def test_what_a_source_says_is_supported_and_quoted(sentence: str, quote: str) -> None:
    (citation,) = check_citations(sentence, [TOWER, BRIDGE])
    assert citation.supported, citation.reason
    assert quote in citation.quote
    text = [TOWER, BRIDGE][citation.mark - 1].text
    assert citation.span is not None
    assert text[citation.span[0] : citation.span[1]] == citation.quote
    assert citation.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("The tower at Grey Point was lit on 3 May 1872 [1].", "does not say 1872"),
        ("The light was visible from the river [1].", "one denies"),
        ("The tower was painted white by sailors from Norway [1].", "not those of the source"),
        ("The tower was lit in 1871 [7].", "there is no source 7"),
        ("The tower was lit in 1871 [0].", "there is no source 0"),
        ("Yes [1].", "not those of the source"),
        ("It was [1].", "claims nothing"),
        ("石桥建于1903年[2]。", "does not say 1903"),
        ("石桥有灯[2]。", "one denies|not those"),
    ],
)
def test_what_a_source_does_not_say_is_flagged_with_the_reason(sentence: str, reason: str) -> None:
    (citation,) = check_citations(sentence, [TOWER, BRIDGE])
    assert not citation.supported
    assert re.search(reason, citation.reason)


def test_each_mark_of_each_sentence_is_one_citation() -> None:
    answer = "The tower was lit on 3 May 1871 [1][2]. Its keeper was Ada Brook [1, 2]. Nothing is known of its end."
    found = check_citations(answer, [TOWER, BRIDGE])
    assert [(item.mark, item.supported) for item in found] == [(1, True), (2, False), (1, True), (2, False)]
    assert answer[found[0].start : found[0].end] == "The tower was lit on 3 May 1871 [1][2]."
    assert found[0].sentence == "The tower was lit on 3 May 1871."
    assert uncited_sentences(answer) == ["Nothing is known of its end."]


def test_a_judge_may_support_other_words_but_not_other_numbers() -> None:
    said: list[tuple[str, str]] = []

    def yes(quote: str, sentence: str) -> bool:
        said.append((quote, sentence))
        return True

    (other_words,) = check_citations("A woman from Hull looked after the lamp [1].", [TOWER], yes)
    assert other_words.supported
    assert said[0][1] == "A woman from Hull looked after the lamp."
    (other_number,) = check_citations("The tower at Grey Point was lit on 3 May 1890 [1].", [TOWER], yes)
    assert not other_number.supported
    assert len(said) == 1


def test_sentences_end_where_a_reader_says_so() -> None:
    text = "Dr. J. Smith came at 3.15 p.m. on 1. May. He left! Did he? 他走了。是吗？\n- An item\n- Another"
    parts = [text[start:end] for start, end in sentences(text)]
    assert parts[0].startswith("Dr. J. Smith came at 3.15")
    assert parts[-6:] == ["He left!", "Did he?", "他走了。", "是吗？", "- An item", "- Another"]
    assert sentences("") == sentences("  \n ") == []


def test_true_sentences_of_a_corpus_are_supported_and_those_of_other_pages_are_not() -> None:
    documents = [d for d, _ in zip(read_documents(embedded_corpus()), range(120), strict=False) if len(d.text) > 80]
    own = other = 0
    for position, document in enumerate(documents):
        start, end = sentences(document.text)[0]
        claim = document.text[start:end]
        own += support(claim, document.text, document.title)[2] == ""
        stranger = documents[(position + 7) % len(documents)]
        other += support(claim, stranger.text, stranger.title)[2] == ""
    assert own / len(documents) >= 0.99
    assert other / len(documents) <= 0.02


def test_a_sentence_is_found_in_a_long_source() -> None:
    filler = "\n\n".join(
        f"Paragraph {n} is about ropes, herring and the price of salt in harbour {n}." for n in range(3000)
    )
    long = source(filler[:90_000] + "\n\nThe tower at Grey Point was lit on 3 May 1871.\n\n" + filler[90_000:])
    (citation,) = check_citations("The tower at Grey Point was lit on 3 May 1871 [1].", [long])
    assert citation.supported
    assert citation.span is not None
    assert long.text[citation.span[0] : citation.span[1]] == citation.quote


@pytest.mark.parametrize("text", ["." * 300_000, "[1 " * 100_000, "。" * 300_000, ". " * 100_000, "a" * 300_000])
def test_hostile_sources_and_answers_are_read_in_time(text: str) -> None:
    started = time.process_time()
    check_citations("[1]" * 2000 + "a " * 2000 + "[1]. The lamp is lit [1].", [source(text)])
    sentences(text)
    assert time.process_time() - started < 5


def test_the_quote_is_the_sentence_that_says_it_where_the_title_says_it_too() -> None:
    text = "The lamp burns 40 candles. It was lit on 3 May 1900."
    span, likeness, reason = support("The lamp burns 40 candles.", text, title=text)
    assert (span, likeness, reason) == ((0, 26), 1.0, "")
