"""Shards, texts that become shards, packing and mixtures, each beside a slow and plain twin."""

import bz2
import gzip
import json
import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.core.training.data import Batches, stream
from tenfold.llm import shards
from tenfold.llm.attention import Documents
from tenfold.llm.data import PackedTokens, Shard, Source, TextFiles, open_source, shuffled, write_labels, write_shard
from tenfold.llm.tokenizer import ByteTokenizer, Tokenizer

EOD = 0


def make_documents(count: int = 40, seed: int = 0, longest: int = 30) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 50, random.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return Shard(write_shard(tmp_path / "part.one", make_documents(), EOD, 50))


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "code", "kind"), [(50, 8, "<u2"), (65_499, 8, "<u2"), (65_500, 4, "<i4")])
def test_a_shard_has_megatrons_layout_byte_for_byte(tmp_path: Path, vocabulary: int, code: int, kind: str) -> None:
    write_shard(tmp_path / "x", [[5, 6, 7], [8, EOD], [9]], EOD, vocabulary)
    size = np.dtype(kind).itemsize
    assert (tmp_path / "x.bin").read_bytes() == np.array([5, 6, 7, 0, 8, 0, 9, 0], kind).tobytes()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4) + struct.pack("<3i", 4, 2, 2)
    expected += struct.pack("<3q", 0, 4 * size, 6 * size) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == expected


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_documents_are_read_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    documents = make_documents()
    write_shard(tmp_path / "part.one", documents, EOD, 50)
    shard = Shard(tmp_path / f"part.one{suffix}")
    assert len(shard) == len(documents)
    assert [shard[i].tolist() for i in range(len(shard))] == [[*document, EOD] for document in documents]
    copy = pickle.loads(pickle.dumps(shard))
    assert np.array_equal(copy.tokens, shard.tokens) and isinstance(copy.tokens, np.memmap)


def test_documents_of_several_sequences_are_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(np.array([1, 2, 3, 0, 4, 0], "<i8").tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 5, 3, 3) + struct.pack("<3i", 2, 2, 2)
    (tmp_path / "x.idx").write_bytes(head + struct.pack("<3q", 0, 16, 32) + struct.pack("<3q", 0, 2, 3))
    shard = Shard(tmp_path / "x")
    assert [shard[i].tolist() for i in range(2)] == [[1, 2, 3, 0], [4, 0]]


def test_a_numpy_file_of_ids_is_cut_at_the_ends_of_documents(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([1, 2, 0, 3, 0, 9], np.uint16))
    shard = Shard(tmp_path / "x.npy", eod=0)
    assert [shard[i].tolist() for i in range(len(shard))] == [[1, 2, 0], [3, 0]]
    with pytest.raises(UserError, match="no document ends in it"):
        Shard(tmp_path / "x.npy", eod=7)


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", [[1]], EOD, 50)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="token id 50 is not in the vocabulary of 50"):
        write_shard(tmp_path / "x", [[1, 2], [50]], EOD, 50)
    with pytest.raises(UserError, match="no document to write"):
        write_shard(tmp_path / "y", [], EOD, 50)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: cut(p / "x.bin", 5), "x.bin: has 5 bytes where its index announces 14: truncated"),
        (lambda p: cut(p / "x.idx", 50), "x.idx: truncated"),
        (lambda p: cut(p / "x.idx", 20), "not an index"),
        (lambda p: (p / "x.idx").write_bytes(b"something else" * 9), "not an index"),
        (lambda p: (p / "x.idx").unlink(), "x.idx: no such file"),
        (lambda p: (p / "x.bin").unlink(), "x.bin: no such file"),
        (lambda p: write_labels(p / "x", "score", [1.0]), "should hold 3 finite numbers"),
        (lambda p: write_labels(p / "x", "score", [1.0, 2.0, np.nan]), "should hold 3 finite numbers"),
    ],
)
def test_a_damaged_shard_is_refused_in_one_line(tmp_path: Path, spoil, message: str) -> None:
    write_shard(tmp_path / "x", [[1, 2], [3], [4]], EOD, 50)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        Shard(tmp_path / "x")
    assert "\n" not in str(error.value)


# --- texts ------------------------------------------------------------------------------------------------------------


def documents_of(shard: Shard) -> list[str]:
    return [bytes(shard[i][:-1].astype(np.uint8)).decode() for i in range(len(shard))]


def test_texts_of_all_kinds_become_documents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("Été\r\nand more\n", encoding="utf-8", newline="")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "one"}\n\n{"text": "two\\n"}\n{"text": ""}\n'))
    (folder / "ignored.md").write_text("no")
    shard = TextFiles(folder).shard(ByteTokenizer(), tmp_path / "cache")
    assert documents_of(shard) == ["Été\r\nand more\n", "packed", "one", "two\n", ""]


def test_a_text_is_split_once_for_its_content_and_the_tokenizer(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("first")
    texts, tokenizer = TextFiles(tmp_path / "a.txt"), ByteTokenizer()
    first = texts.shard(tokenizer, tmp_path / "cache")
    monkeypatch.setattr(shards.TextFiles, "_split", lambda *_: pytest.fail("split again"))
    assert texts.shard(tokenizer, tmp_path / "cache").prefix == first.prefix
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text("other")
    other = texts.shard(tokenizer, tmp_path / "cache")
    assert documents_of(other) == ["other"] and other.prefix != first.prefix


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tmp_path: Path, monkeypatch) -> None:
    tokenizer = Tokenizer.load(Path(shards.__file__).parent / "weights" / "tenfold-tiny.tokenizer.json")
    text = "The whale   rose.\n\nIt was 1851;\r\n  the sea,\n\n\n\tthe ship\n'twas\n— all  \n\nwent down\n" * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(shards, "_PIECE", 64)
    files = TextFiles(tmp_path / "a.txt")
    assert len(list(files.pieces())) > 20
    assert "".join(files.pieces()) == text
    shard = files.shard(tokenizer, tmp_path / "cache")
    assert shard.tokens.tolist() == [*tokenizer.encode(text), tokenizer.eod]


def test_labels_of_lines_become_labels_of_documents(tmp_path: Path) -> None:
    lines = [{"text": "a", "score": 2, "difficulty": 0.5}, {"text": "b", "score": 3.5, "difficulty": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shard = TextFiles(tmp_path / "a.jsonl").shard(ByteTokenizer(), tmp_path / "cache")
    assert shard.labels["score"].tolist() == [2, 3.5]
    assert shard.labels["difficulty"].tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"  \n ", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", "café".encode("latin-1"), "not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"texts": "a"}', "line 1 is no object with a `text`"),
        ("a.jsonl", b"[1]", "line 1 is no object with a `text`"),
        ("a.jsonl", b'{"text": "a", "score": "good"}', "its score is not a number"),
        ("a.jsonl", b'{"text": "a", "score": 1}\n{"text": "b"}', "1 of 2 documents have a score"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.zst", b"x", "unpack it first"),
        ("a.pdf", b"x", "not a kind of text"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        TextFiles(tmp_path / name).shard(ByteTokenizer(), tmp_path / "cache")
    assert "\n" not in str(error.value) and name in str(error.value)
    assert not list((tmp_path / "cache").glob("*.idx")) if (tmp_path / "cache").exists() else True


def test_missing_and_empty_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none.txt", "no such file"), (tmp_path / "empty", "holds no text")):
        with pytest.raises(UserError, match=message):
            TextFiles(path)


def test_a_source_opens_from_text_and_from_shards(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    np.save(tmp_path / "b.npy", np.array([104, 256], np.int32))
    write_shard(tmp_path / "c", [[105]], 256, 257)
    found = [
        open_source(tmp_path / n, ByteTokenizer(), tmp_path / "cache", weight=2.0) for n in ("a.txt", "b.npy", "c")
    ]
    assert [source.shard.tokens.tolist() for source in found] == [[*b"hello", 256], [104, 256], [105, 256]]
    assert [source.name for source in found] == ["a", "b", "c"] and found[0].weight == 2.0


# --- packing ----------------------------------------------------------------------------------------------------------


def rows_of(packed: PackedTokens, count: int) -> np.ndarray:
    """Rows with the last target as their last column."""
    batch = packed.batch(range(count))
    return np.concatenate([batch["tokens"].numpy(), batch["targets"][:, -1:].numpy()], 1)


def test_targets_are_the_next_tokens_and_documents_end_where_attention_does(shard: Shard) -> None:
    batch = PackedTokens([shard], 16, seed=1, eod=EOD).batch(range(5))
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["documents"] == Documents.of(batch["tokens"], EOD)
    assert sum(batch["documents"].lengths) == 5 * 16
    assert PackedTokens([shard], 16, eod=EOD, reset=False).batch([0])["documents"] is None


def test_a_row_is_a_function_of_its_number_alone(shard: Shard) -> None:
    packed = PackedTokens([shard], 8, seed=3, eod=EOD)
    assert isinstance(packed, Batches)
    expected = rows_of(packed, 300)
    late = PackedTokens([shard], 8, seed=3, eod=EOD)  # begins at row 290, as a resumed run does
    assert np.array_equal(late.batch(range(290, 300))["tokens"], expected[290:, :-1])
    backwards = pickle.loads(pickle.dumps(packed)).batch(range(299, -1, -1))["tokens"]
    assert np.array_equal(backwards.flip(0), expected[:, :-1])
    assert not np.array_equal(rows_of(PackedTokens([shard], 8, seed=4, eod=EOD), 300), expected)


def test_workers_and_processes_make_the_same_rows(shard: Shard) -> None:
    packed = PackedTokens([shard], 8, seed=3, eod=EOD)
    expected = packed.batch(range(8, 16))["tokens"]
    halves = [next(stream(packed, range(2, 3), 4, 1, rank, 2, workers, False)) for rank, workers in ((0, 0), (1, 1))]
    assert torch.equal(torch.cat([half[0]["tokens"] for half in halves]), expected[:4])


def test_an_epoch_has_every_token_once_and_each_epoch_another_order(tmp_path: Path) -> None:
    documents = [[*range(10 * i + 1, 10 * i + 10)] for i in range(1, 9)]  # 8 documents of 10 tokens with their end
    packed = PackedTokens([Shard(write_shard(tmp_path / "x", documents, EOD, 100))], 5, seed=0, eod=EOD)
    per_epoch = 80 // 5
    epochs = [packed.batch(range(e * per_epoch, (e + 1) * per_epoch))["tokens"] for e in range(3)]
    expected = sorted([EOD] * 8 + [token for document in documents for token in document])
    for tokens in epochs:
        assert sorted(tokens.flatten().tolist()) == expected
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_rows_cut_the_stream_of_documents_without_gaps(shard: Shard) -> None:
    length, epochs = 7, 3
    rows = rows_of(PackedTokens([shard], length, seed=2, eod=EOD), epochs * len(shard.tokens) // length)
    documents = {tuple(shard[i].tolist()) for i in range(len(shard))}
    # The twin: rows found in the order of the stream, by the last token of one being the first of the next.
    stream_of = PackedTokens([shard], length, seed=2, eod=EOD)._streams[0]
    text = stream_of._read(0, len(shard.tokens) * epochs)
    assert sorted(map(tuple, rows)) == sorted(
        tuple(text[i * length : i * length + length + 1]) for i in range(len(rows))
    )
    pieces = np.split(text, np.flatnonzero(text == EOD) + 1)
    assert {tuple(piece.tolist()) for piece in pieces if piece.size} == documents


def test_neighbouring_rows_of_one_long_document_are_not_in_its_order(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "x", [range(1, 4001)], EOD, 5000))
    firsts = PackedTokens([shard], 10, seed=0, eod=EOD).batch(range(400))["tokens"][:, 0]
    assert (firsts.diff() == 10).float().mean() < 0.05


@given(size=st.integers(1, 3000), seed=st.integers(0, 10))
@settings(deadline=None, max_examples=25)
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(shuffled(i, size, (seed, 1)) for i in range(size)) == list(range(size))


def test_shuffled_mixes_evenly() -> None:
    places = np.array([[shuffled(i, 10, (seed,)) for i in range(10)] for seed in range(3000)])
    for item in range(10):  # each of the 10 places is as likely as any other: 300 expected, deviation 16
        assert np.abs(np.bincount(places[:, item], minlength=10) - 300).max() < 90


# --- mixtures ---------------------------------------------------------------------------------------------------------


def three_sources(folder: Path) -> list[Shard]:
    return [
        Shard(write_shard(folder / name, [[value] * 99] * 5, EOD, 10))
        for name, value in zip("abc", (1, 2, 3), strict=True)
    ]


def test_every_stretch_of_rows_keeps_to_the_weights(tmp_path: Path) -> None:
    weights = (6.0, 3.0, 1.0)
    sources = [Source(s, weight=w) for s, w in zip(three_sources(tmp_path), weights, strict=True)]
    packed = PackedTokens(sources, 10, eod=EOD)
    kinds = np.array([packed._mixture.locate(i)[0] for i in range(5000)])
    for start, stop in ((0, 5000), (0, 50), (1234, 1334), (4000, 4020)):
        counts = np.bincount(kinds[start:stop], minlength=3)
        assert np.abs(counts - np.array(weights) / 10 * (stop - start)).max() <= 2
    for number in range(3):
        own = [packed._mixture.locate(i)[1] for i in range(5000) if kinds[i] == number]
        assert own == list(range(len(own)))
        assert packed._mixture.rows_of(number, 5000) == len(own)
    values = packed.batch(range(100))["tokens"].max(1).values
    assert Counter(values.tolist()) == {1: 60, 2: 30, 3: 10}


def test_the_pattern_goes_on_beyond_its_period(tmp_path: Path) -> None:
    packed = PackedTokens(
        [Source(s, weight=w) for s, w in zip(three_sources(tmp_path), (1, 1, 1e-9), strict=True)], 10, eod=EOD
    )
    period = 2**16
    for index in (period - 1, period, 3 * period + 17):
        source, number = packed._mixture.locate(index)
        assert packed._mixture.rows_of(source, index) == number
    assert sum(packed._mixture.rows_of(source, 3 * period) for source in range(3)) == 3 * period
    assert packed._mixture.rows_of(2, period) == 1  # the smallest share that there is


def test_without_weights_sources_count_by_their_tokens_and_statistics_say_so(tmp_path: Path) -> None:
    small = Shard(write_shard(tmp_path / "small", [[1] * 99] * 10, EOD, 10))
    large = Shard(write_shard(tmp_path / "large", [[2] * 99] * 30, EOD, 10))
    report = PackedTokens([small, Source(large, name="big")], 10, eod=EOD).statistics(800)
    assert (report["small"].share, report["big"].share) == (0.25, 0.75)
    assert (report["small"].rows, report["big"].rows) == (200, 600)
    assert report["small"].epochs == 200 * 10 / 1000 and report["big"].documents == 30


@pytest.mark.parametrize("quality", [1.0, 2.0])
def test_documents_are_drawn_in_proportion_to_their_scores(tmp_path: Path, quality: float) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 12, 30)
    scores = random.integers(0, 4, 30).astype(float)
    write_shard(tmp_path / "x", [[i + 1] * n for i, n in enumerate(lengths)], EOD, 100)
    write_labels(tmp_path / "x", "score", scores)
    packed = PackedTokens([Source(Shard(tmp_path / "x"), quality=quality)], 8, seed=0, eod=EOD)
    rows = 40 * int((lengths + 1).sum()) // 8
    counts = np.bincount(packed.batch(range(rows))["tokens"].flatten(), minlength=31)[1:] / lengths
    expected = 40 * scores**quality * (lengths + 1).sum() / (scores**quality * (lengths + 1)).sum()
    assert np.abs(counts - expected).max() < 13  # copies are rounded at random, by 3.2 at most in 40 epochs, times 4
    assert counts[scores == 0].max() == 0


def test_a_curriculum_goes_from_easy_to_hard_through_the_phase_and_takes_everything(tmp_path: Path) -> None:
    difficulty = np.random.default_rng(0).permutation(200)
    write_shard(tmp_path / "x", [[int(d) + 1] * 9 for d in difficulty], EOD, 300)
    write_labels(tmp_path / "x", "difficulty", difficulty)
    for rows in (100, 200, 330):  # half an epoch, one, one and two thirds
        packed = PackedTokens([Source(Shard(tmp_path / "x"), by_difficulty=True)], 10, seed=1, eod=EOD, rows=rows)
        hardness = packed.batch(range(rows))["tokens"].float().max(1).values
        stage = -(-rows // 64)
        means = [float(part.mean()) for part in hardness.split(stage)]
        assert means == sorted(means)
        times = np.bincount(packed.batch(range(rows))["tokens"].flatten(), minlength=201)[1:]
        assert times.sum() == rows * 9 and times.max() - times.min() <= 2 * 9
    with pytest.raises(UserError, match="how many rows the phase has"):
        PackedTokens([Source(Shard(tmp_path / "x"), by_difficulty=True)], 10, eod=EOD)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "x has the weight 0.0, which is not a positive number"),
        ({"weight": -1.0}, "not a positive number"),
        ({"weight": float("nan")}, "not a positive number"),
        ({"quality": 1.0}, "gives no scores"),
        ({"by_difficulty": True}, "how difficult it is"),
    ],
)
def test_a_source_that_cannot_be_mixed_is_refused(tmp_path: Path, change, message) -> None:
    shard = Shard(write_shard(tmp_path / "x", make_documents(), EOD, 50))
    with pytest.raises(UserError, match=message):
        PackedTokens([Source(shard, **change)], 8, eod=EOD, rows=10)


def test_scores_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "x", [[1] * 20, [2] * 20], EOD, 50)
    for scores, message in (([1.0, -1.0], "score of -1"), ([0.0, 0.0], "all scores are 0")):
        write_labels(tmp_path / "x", "score", scores)
        with pytest.raises(UserError, match=message):
            PackedTokens([Source(Shard(tmp_path / "x"), quality=1.0)], 8, eod=EOD)


def test_text_shorter_than_a_row_no_source_and_another_end_are_refused(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "x", [[1, 2, 3]], EOD, 50))
    assert PackedTokens([shard], 3, eod=EOD).batch([0, 5])["tokens"].shape == (2, 3)
    for sources, length, eod, message in (
        ([shard], 4, EOD, "x has 4 tokens, and one row takes 5"),
        ([], 4, EOD, "no source is given"),
        ([shard], 0, EOD, "no rows"),
        ([shard], 3, 7, "ends with id 0, not with the end of documents 7"),
    ):
        with pytest.raises(UserError, match=message):
            PackedTokens(sources, length, eod=eod)


def test_an_id_that_the_model_does_not_know_is_refused_with_the_sources_name(shard: Shard) -> None:
    assert PackedTokens([shard], 8, eod=EOD, vocabulary=50).batch(range(60))["tokens"].max() == 49
    with pytest.raises(UserError, match=r"part.one holds token id 49, the model's vocabulary has 49 ids"):
        PackedTokens([shard], 8, eod=EOD, vocabulary=49).batch(range(60))
