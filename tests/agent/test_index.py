from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.agent import store as store_module
from tenfold.agent.data import embedded_corpus, embedded_questions, read_documents, read_questions
from tenfold.agent.index import LocalIndex
from tenfold.agent.lexical import Lexical, words
from tenfold.agent.passages import (
    LONGEST_PASSAGE,
    best_passages,
    cut_to_tokens,
    estimate_tokens,
    split_spans,
    take_passages,
)
from tenfold.agent.search import EmptyIndex
from tenfold.core.console import UserError


@pytest.fixture(scope="module")
def wiki(tmp_path_factory: pytest.TempPathFactory) -> LocalIndex:
    folder = tmp_path_factory.mktemp("wiki")
    started = time.process_time()
    report = LocalIndex.build([embedded_corpus()], folder)
    assert time.process_time() - started < 10  # 1.3 s on one idle core; the bar is 5 s on two
    assert report.documents == 6119
    return LocalIndex.load(folder)


def pages(folder: Path, number: int = 30) -> Path:
    folder.mkdir()
    for position in range(number):
        (folder / f"{position:03}.html").write_text(
            f"<html><title>Page {position}</title><body><p>Lamp number {position} burns {1000 + position} candles."
        )
    return folder


def contents(index: LocalIndex) -> list[tuple[str, str, int]]:
    """What an index holds, for comparisons: addresses, hashes and how often a search finds each page."""
    found = index.search("lamp candles", 500)
    return sorted((result.url, result.sha256, len(result.passages)) for result in found)


def test_the_first_page_of_a_question_is_found_and_the_answer_page_of_two_hops_is_not(wiki: LocalIndex) -> None:
    questions = embedded_questions()[::3]
    one_hop = [q for q in questions if q.hops == 1]
    two_hop = [q for q in embedded_questions() if q.hops == 2]

    def recall(chosen: Sequence, position: int) -> float:
        hits = [q.path[position] in [r.title for r in wiki.search(q.question, 2)] for q in chosen]
        return sum(hits) / len(hits)

    assert recall(one_hop, 0) >= 0.97
    assert recall(two_hop, 0) >= 0.97
    assert recall(two_hop, 1) <= 0.10


def test_a_query_takes_two_milliseconds_at_most(wiki: LocalIndex) -> None:
    questions = [q.question for q in embedded_questions()[:200]]

    def milliseconds() -> float:
        started = time.process_time()
        for question in questions:
            wiki.search(question, 2)
        return (time.process_time() - started) / len(questions) * 1e3

    assert min(milliseconds() for _ in range(3)) < 2.0


def test_results_say_where_they_come_from_and_their_passages_are_in_their_text(wiki: LocalIndex) -> None:
    (result,) = wiki.search("Teutberga queen of Lotharingia", 1)
    assert result.title == "Teutberga"
    assert all(passage in result.text for passage in result.passages)
    assert "875" in result.text
    page = wiki.page(result.url)
    assert (page.text, page.sha256) == (result.text, result.sha256)
    with pytest.raises(UserError, match="not in the index"):
        wiki.page("file:///etc/passwd")


@pytest.mark.parametrize("query", ["", "???", '"', "title:(", "AND OR NOT", "a" * 100_000, "a " * 20_000, "\x00", "中"])
def test_any_string_is_a_query(wiki: LocalIndex, query: str) -> None:
    assert len(wiki.search(query, 2)) <= 2


def test_chinese_is_found_by_parts_of_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("灯塔\n\n灰岬灯塔建于一八七一年。", encoding="utf-8")
    (tmp_path / "b.txt").write_text("桥梁\n\n石桥建于一九〇二年。", encoding="utf-8")
    LocalIndex.build([tmp_path], tmp_path / "index")
    (first, *_) = LocalIndex.load(tmp_path / "index").search("灰岬灯塔是什么时候建的", 2)
    assert "灰岬灯塔" in first.text
    assert words("灰岬灯塔x").split() == ["灰岬", "岬灯", "灯塔", "x"]


def test_only_changed_files_are_read_again_and_vanished_ones_leave(tmp_path: Path) -> None:
    folder = pages(tmp_path / "docs", 5)
    index = tmp_path / "index"
    assert LocalIndex.build([folder], index).read == 5
    again = LocalIndex.build([folder], index)
    assert (again.read, again.unchanged) == (0, 5)
    (folder / "000.html").write_text("<p>A submarine cable lies here now.")
    (folder / "004.html").unlink()
    (folder / "new.md").write_text("# Tides\n\nThe tide turns at noon.")
    third = LocalIndex.build([folder], index)
    assert (third.read, third.unchanged, third.removed, third.documents) == (2, 3, 1, 5)
    opened = LocalIndex.load(index)
    assert opened.search("submarine", 1)[0].url.endswith("000.html")
    assert opened.search("tide", 1)[0].title == "Tides"
    assert not [result for result in opened.search("lamp number", 9) if result.url.endswith(("000.html", "004.html"))]


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from tenfold.agent import index, lexical, store
where, after = sys.argv[3], int(sys.argv[4])
index._BATCH_SECONDS = 0.0
owner = {"files": store.Store, "words": lexical.Lexical}[where]
commit, count = owner.commit, 0
def commit_and_die(self):
    global count
    commit(self)
    count += 1
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
owner.commit = commit_and_die
index.LocalIndex.build([Path(sys.argv[1])], Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("where", "after"), [("files", 2), ("files", 17), ("words", 1)])
def test_a_killed_build_goes_on_and_ends_as_if_it_had_not_been_killed(tmp_path: Path, where: str, after: int) -> None:
    folder = pages(tmp_path / "docs")
    arguments = [str(folder), str(tmp_path / "index"), where, str(after)]
    done = subprocess.run([sys.executable, "-c", KILLED_BUILD, *arguments], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="did not end"):
        LocalIndex.load(tmp_path / "index")
    report = LocalIndex.build([folder], tmp_path / "index")
    assert report.read < 30
    LocalIndex.build([folder], tmp_path / "whole")
    assert contents(LocalIndex.load(tmp_path / "index")) == contents(LocalIndex.load(tmp_path / "whole"))
    assert report.documents == report.passages == 30


def test_a_killed_read_of_a_corpus_goes_on_in_the_middle_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": n, "title": f"T{n}", "text": f"lamp {n}"}) + "\n" for n in range(1200)))
    kept = store_module.Store.add
    added = []

    def add(self: store_module.Store, *arguments: str) -> None:
        if len(added) == 700:
            raise KeyboardInterrupt
        added.append(arguments[1])
        kept(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module.Store, "add", add)
    with pytest.raises(KeyboardInterrupt):
        LocalIndex.build([corpus], tmp_path / "index")
    monkeypatch.setattr(store_module.Store, "add", lambda self, *a: added.append(a[1]) or kept(self, *a))
    assert LocalIndex.build([corpus], tmp_path / "index").documents == 1200
    assert len(added) == 700 + 700  # 500 of the first 700 were kept


def test_a_second_build_at_the_same_time_is_refused(tmp_path: Path) -> None:
    folder = pages(tmp_path / "docs", 2)
    LocalIndex.build([folder], tmp_path / "index")
    holder = Lexical(tmp_path / "index" / "words")
    holder.open_writer()
    with pytest.raises(UserError, match="written by another process"):
        LocalIndex.build([folder], tmp_path / "index")
    holder.close()
    assert LocalIndex.build([folder], tmp_path / "index").unchanged == 2


def nothing(folder: Path) -> Sequence[Path]:
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return [folder]


def missing(folder: Path) -> Sequence[Path]:
    return [folder / "absent"]


def damaged_zim(folder: Path) -> Sequence[Path]:
    (folder / "a.zim").write_bytes(b"ZIM\x04" + bytes(200))
    return [folder / "a.zim"]


def no_text(folder: Path) -> Sequence[Path]:
    (folder / "a.txt").write_bytes(bytes(range(32)) * 100)
    return [folder / "a.txt"]


def no_json(folder: Path) -> Sequence[Path]:
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    return [folder / "a.jsonl"]


def other_columns(folder: Path) -> Sequence[Path]:
    (folder / "a.jsonl").write_text('{"question": "x"}\n')
    return [folder / "a.jsonl"]


def empty_file(folder: Path) -> Sequence[Path]:
    (folder / "a.html").touch()
    return [folder / "a.html"]


def bomb(folder: Path) -> Sequence[Path]:
    row = json.dumps({"text": "0" * 1_000_000}).encode() + b"\n"
    with gzip.open(folder / "a.jsonl.gz", "wb") as file:
        for _ in range(60):
            file.write(row)
    return [folder / "a.jsonl.gz"]


def long_line(folder: Path) -> Sequence[Path]:
    with gzip.open(folder / "a.jsonl.gz", "wb") as file:
        file.write(b"0" * 20_000_000)
    return [folder / "a.jsonl.gz"]


def cut_gzip(folder: Path) -> Sequence[Path]:
    whole = gzip.compress(json.dumps({"text": os.urandom(3000).hex()}).encode())
    (folder / "a.jsonl.gz").write_bytes(whole[:-500])
    return [folder / "a.jsonl.gz"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "holds no document"),
        (missing, "no such file or folder"),
        (damaged_zim, "not known here|damaged"),
        (no_text, "not text"),
        (no_json, "line 2: not JSON"),
        (other_columns, "has no text.*question"),
        (empty_file, "the file is empty"),
        (bomb, "refused, because it unpacks"),
        (long_line, "longer than 16 MB"),
        (cut_gzip, "damaged gzip"),
    ],
)
def test_what_cannot_be_indexed_is_named_in_one_line(
    tmp_path: Path, make: Callable[[Path], Sequence[Path]], message: str
) -> None:
    (tmp_path / "docs").mkdir()
    with pytest.raises(UserError, match=message) as error:
        LocalIndex.build(make(tmp_path / "docs"), tmp_path / "index")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no index is here|did not end"):
        LocalIndex.load(tmp_path / "index")


def test_one_bad_file_of_a_folder_does_not_stop_the_others(tmp_path: Path, run_tenfold: Callable) -> None:
    folder = pages(tmp_path / "docs", 3)
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing else")
    report = LocalIndex.build([folder], tmp_path / "index")
    assert report.documents == 3
    assert [Path(path).name for path, _ in report.problems] == ["bad.pdf"]


def test_an_index_without_documents_says_so(tmp_path: Path) -> None:
    folder = pages(tmp_path / "docs", 1)
    LocalIndex.build([folder], tmp_path / "index")
    (folder / "000.html").unlink()
    (folder / "b.html").write_text("<p></p>")
    with pytest.raises(UserError, match="no text was found"):
        LocalIndex.build([folder], tmp_path / "index")
    with pytest.raises(EmptyIndex, match="holds no document"):
        LocalIndex.load(tmp_path / "index").search("lamp", 1)


@pytest.mark.parametrize("name", ["documents.sqlite", "words/meta.json"])
def test_a_damaged_index_is_told_by_name(tmp_path: Path, name: str) -> None:
    LocalIndex.build([pages(tmp_path / "docs", 2)], tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(b"garbage" * 100)
    with pytest.raises(UserError, match="again"):
        LocalIndex.load(tmp_path / "index")


def test_an_index_is_no_document_of_itself(tmp_path: Path) -> None:
    folder = pages(tmp_path / "docs", 2)
    LocalIndex.build([folder], folder / "index")
    assert LocalIndex.build([folder], folder / "index").documents == 2


def letters(texts: Sequence[str]) -> np.ndarray:
    """A stand-in for a sentence encoder: synonyms that share a letter are near each other."""
    return np.array([[text.lower().count(c) + 0.01 for c in string.ascii_lowercase] for text in texts], np.float32)


def test_vectors_find_what_words_do_not_and_follow_changes(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("zzz zzzz zzzzz")
    (folder / "b.txt").write_text("lamp and light")
    LocalIndex.build([folder], tmp_path / "index", letters)
    assert LocalIndex.load(tmp_path / "index").search("zz", 1) == []
    assert LocalIndex.load(tmp_path / "index", letters).search("zz", 1)[0].url.endswith("a.txt")
    (folder / "a.txt").write_text("qqq qqqq now")
    LocalIndex.build([folder], tmp_path / "index", letters)
    opened = LocalIndex.load(tmp_path / "index", letters)
    assert opened.search("q", 1)[0].url.endswith("a.txt")
    assert opened._dense is not None
    assert len(opened._dense) == 2
    with pytest.raises(UserError, match="vectors of length 26"):
        LocalIndex.build([pages(tmp_path / "more", 1)], tmp_path / "index", lambda texts: letters(texts)[:, :5])


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.sampled_from("ab .!\n\t。x"), max_size=4000))
def test_passages_hold_every_visible_character_once_in_order(text: str) -> None:
    spans = split_spans(text)
    assert all(start < end and end - start <= LONGEST_PASSAGE for start, end in spans)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=500), st.integers(2, 80))
def test_a_cut_text_is_within_its_tokens(text: str, tokens: int) -> None:
    cut = cut_to_tokens(text, tokens)
    assert estimate_tokens(cut) <= tokens
    assert cut == text or text.startswith(cut.removesuffix("…"))


def test_the_best_passages_of_a_long_page_hold_the_answer_and_keep_to_the_budget() -> None:
    filler = [f"Paragraph {n} tells of harbours, ropes and the price of herring. " * 8 for n in range(200)]
    filler[150] = "The tower at Grey Point was lit in 1871 by Ada Brook."
    text = "\n\n".join(filler)
    chosen = best_passages(text, "Who lit the tower at Grey Point?", "Harbours", 600)
    assert any("Ada Brook" in passage for passage in chosen)
    assert sum(map(estimate_tokens, chosen)) <= 600
    assert best_passages("short", "anything") == ("short",)
    assert best_passages("", "anything") == ()
    assert best_passages(text, "zzz")[0].startswith("Paragraph 0")
    assert take_passages("x" * 9000, [(0, 9000)], [0], 100)[0].endswith("…")


def test_a_zim_archive_gives_its_articles_and_nothing_else(tmp_path: Path) -> None:
    archive = Path(__file__).parents[1] / "data" / "agent" / "small.zim"
    documents = {document.url: document for document in read_documents(archive)}
    assert len(documents) == 41
    lighthouse = documents["zim://small.zim/lighthouse"]
    assert "Grey Point was lit in 1871" in lighthouse.text
    assert documents["zim://small.zim/page/7"].title == "Page 7"


def test_a_cut_or_garbled_zim_archive_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    whole = (Path(__file__).parents[1] / "data" / "agent" / "small.zim").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "a.zim"
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if trial % 3 == 0 else whole)
        for _ in range(rng.integers(1, 20)):
            damaged[rng.integers(min(len(damaged), 3000 if trial % 2 else len(damaged)))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            list(read_documents(path))
        except UserError:
            refused += 1
    assert refused > 50


def test_question_sets_are_read_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "simple.csv").write_text('metadata,problem,answer\n{},"Who, exactly?",Ada\n')
    (tmp_path / "frames.tsv").write_text("\tPrompt\tAnswer\n0\tWhere?\tGrey Point\n")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    assert read_questions(tmp_path / "simple.csv")[0].question == "Who, exactly?"
    assert read_questions(tmp_path / "frames.tsv")[0].answers == ("Grey Point",)
    with pytest.raises(UserError, match="needs a question and answers; its columns are text"):
        read_questions(tmp_path / "other.jsonl")
    hops = [question.hops for question in embedded_questions()]
    assert (hops.count(1), hops.count(2), hops.count(3)) == (900, 225, 1)


def test_the_verb_builds_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tenfold.agent.cli import VERBS
    from tenfold.core.console import PartialFailure

    folder = pages(tmp_path / "docs", 2)
    VERBS["index"]((folder,), tmp_path / "index")
    assert "2 documents in 2 passages" in capsys.readouterr().out
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nothing else")
    with pytest.raises(PartialFailure, match="1 files could not be read"):
        VERBS["index"]((folder,), tmp_path / "index")
