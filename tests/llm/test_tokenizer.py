"""Vocabularies: what they split comes back, domains are merged exactly, files are read as other programs write them."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.llm import tokenizer as vocabularies
from tenfold.llm.tokenizer import END_OF_DOCUMENT, ByteTokenizer, Tokenizer, measure, scripts, train

TINY = Path(vocabularies.__file__).parent / "weights" / "tenfold-tiny.tokenizer.json"
ENGLISH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
    "The mother and the other brother gathered together whether the weather was rather bad or better. "
) * 8
CODE = (
    "def total(values):\n    return sum(value for value in values if value is not None)\n\n\nfor item in items:\n" * 12
)


@pytest.fixture(scope="module")
def merged() -> vocabularies.TrainedTokenizer:
    return train({"english": [ENGLISH], "code": [CODE]}, 360)


def tokenizers() -> list[Tokenizer]:
    return [ByteTokenizer(), Tokenizer.load(TINY)]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_and_its_bytes_are_those_of_its_tokens(text: str) -> None:
    for tokenizer in tokenizers():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.eod not in ids


def test_lone_surrogates_become_replacement_characters_and_pairs_the_character_they_mean() -> None:
    for tokenizer in tokenizers():
        assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"


def test_text_that_spells_the_end_of_documents_is_text() -> None:
    for tokenizer in tokenizers():
        ids = tokenizer.encode(f"a {END_OF_DOCUMENT} b")
        assert tokenizer.eod not in ids
        assert tokenizer.decode([tokenizer.eod, *ids]) == f"{END_OF_DOCUMENT}a {END_OF_DOCUMENT} b"


def test_bytes_are_their_own_ids_and_the_next_one_ends_documents() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hé") == list("hé".encode())
    assert (tokenizer.size, tokenizer.eod) == (257, 256)
    assert tokenizer.backend.encode("hé", add_special_tokens=False).ids == tokenizer.encode("hé")


def test_the_embedded_vocabulary_has_2048_ids_and_compresses_english_threefold() -> None:
    tokenizer = Tokenizer.load(TINY)
    assert (tokenizer.size, tokenizer.eod) == (2048, 0)
    assert measure(tokenizer, [ENGLISH]).bytes_per_token > 3


# --- training ---------------------------------------------------------------------------------------------------------


def test_one_domain_gives_what_the_librarys_trainer_gives() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=329, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([ENGLISH], trainer)
    ours = train({"english": [ENGLISH]}, 330).tokenizer.backend
    for text in (ENGLISH, "whetherweather", "the 42 others"):
        assert ours.encode(text).tokens == backend.encode(text).tokens


def test_merging_has_the_exact_size_every_token_is_reachable_and_shares_add_up(merged) -> None:
    tokenizer = merged.tokenizer
    assert tokenizer.size == 360
    assert sum(merged.shares.values()) == 360 - 257
    vocabulary = tokenizer.backend.get_vocab()
    split = {token: len(tokenizer.backend.model.tokenize(token)) for token in vocabulary if token != END_OF_DOCUMENT}
    assert set(split.values()) == {1}


def test_tokens_of_both_domains_are_in_the_merged_vocabulary(merged) -> None:
    tokens = {merged.tokenizer.token_bytes(i) for i in range(360)}
    assert {b" the", b" was", b" value"} <= tokens
    assert all(share > 20 for share in merged.shares.values())


def test_a_domain_with_more_weight_gets_more_of_the_vocabulary_and_a_better_fit(merged) -> None:
    heavier = train({"english": [ENGLISH], "code": [CODE]}, 330, {"code": 4.0})
    even = train({"english": [ENGLISH], "code": [CODE]}, 330)
    assert heavier.shares["code"] > even.shares["code"]
    fit, plain = measure(heavier.tokenizer, [CODE]), measure(even.tokenizer, [CODE])
    assert fit.bytes_per_token > plain.bytes_per_token
    assert heavier.tokenizer.size == 330


def test_the_same_texts_give_the_same_vocabulary(merged) -> None:
    again = train({"english": [ENGLISH], "code": [CODE]}, 360)
    assert again.tokenizer.digest == merged.tokenizer.digest


def test_digits_stand_alone(merged) -> None:
    tokens = [merged.tokenizer.token_bytes(i) for i in merged.tokenizer.encode("in 1859")]
    assert tokens[-4:] == [b"1", b"8", b"5", b"9"]


@pytest.mark.parametrize(
    ("domains", "size", "weights", "message"),
    [
        ({"a": ["text"]}, 256, None, "fewer than the 256 bytes"),
        ({"a": ["one short text"]}, 1000, None, "give more text or a smaller size"),
        ({"a": [ENGLISH]}, 300, {"b": 1.0}, "'b' is not a domain"),
        ({"a": [ENGLISH]}, 300, {"a": 0.0}, "not a positive number"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(domains, size, weights, message) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(domains, size, weights)
    assert "\n" not in str(error.value)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_the_same_as_file_as_folder_and_pickled(merged, tmp_path: Path) -> None:
    merged.tokenizer.save(tmp_path / "one.json")
    merged.tokenizer.save(tmp_path / "folder")
    copies = [Tokenizer.load(tmp_path / "one.json"), Tokenizer.load(tmp_path / "folder")]
    for copy in [*copies, pickle.loads(pickle.dumps(merged.tokenizer))]:
        assert copy.digest == merged.tokenizer.digest
        assert copy.encode(ENGLISH) == merged.tokenizer.encode(ENGLISH)
    ByteTokenizer().save(tmp_path / "bytes.json")
    loaded = Tokenizer.load(tmp_path / "bytes.json")
    assert (loaded.eod, loaded.encode("é")) == (256, [0xC3, 0xA9])


def test_transformers_loads_a_saved_folder_and_splits_alike(merged, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    merged.tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(ENGLISH).input_ids == merged.tokenizer.encode(ENGLISH)
    assert theirs.eos_token_id == merged.tokenizer.eod
    assert merged.tokenizer.to_transformers()(ENGLISH).input_ids == merged.tokenizer.encode(ENGLISH)
    assert Tokenizer.from_transformers(theirs).encode(ENGLISH) == merged.tokenizer.encode(ENGLISH)


def test_settings_and_the_chat_template_beside_a_tokenizer_are_kept(merged, tmp_path: Path) -> None:
    merged.tokenizer.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == "{{ messages }}"


def test_the_configuration_beside_a_file_says_what_ends_a_document(merged, tmp_path: Path) -> None:
    merged.tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "z"}}')
    assert Tokenizer.load(tmp_path).eod == merged.tokenizer.encode("z")[0]
    assert Tokenizer.load(tmp_path, eod=5).eod == 5


def test_sentencepiece_like_vocabularies_give_their_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocabulary = {"<s>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581h": 4, "i": 5}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<s>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eod == 1
    assert b"".join(map(tokenizer.token_bytes, [4, 5, 2, 3])) == " hié".encode()
    assert tokenizer.decode([4, 5, 2, 3]) == " hié"


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"version":"1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(content, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    for where in (path, tmp_path):
        with pytest.raises(UserError) as error:
            Tokenizer.load(where)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_vocabulary_without_an_end_of_documents_asks_for_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="names no token that ends a document"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path, eod=1).eod == 1


@pytest.mark.parametrize("token", [-1, 257])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(UserError, match="not in the vocabulary of 257"):
        ByteTokenizer().decode([token])


def test_writing_systems_are_told_apart() -> None:
    found = {vocabularies._script(text.encode()) for text in (" the", "中", "の", "한", "ع", "12", "é")}
    assert found == {"Latin (ASCII)", "Chinese", "Japanese", "Korean", "Arabic", "digits, signs, spaces", "Latin"}
    assert vocabularies._script(b"\xe4\xb8") == "part of a character"
    assert sum(scripts(ByteTokenizer()).values()) == 257


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Run `tenfold llm tokenizer ...`: exit status, standard output, standard error."""
    from tenfold import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["llm", "tokenizer", *map(str, arguments)])
        return status or 0, *capsys.readouterr()

    return call


def test_the_verb_trains_and_inspects(run, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text(ENGLISH)
    (tmp_path / "code.txt").write_text(CODE)
    texts = ["--domain", f"en={tmp_path / 'en.txt'}", "--domain", f"code={tmp_path / 'code.txt'}"]
    made = tmp_path / "made.json"
    status, out, _ = run("train", *texts, "--size", 330, "-o", made, "--json")
    result = json.loads(out)
    assert status == 0 and result["size"] == 330 and sum(result["shares"].values()) == 330 - 257
    status, out, _ = run("inspect", made, *texts)
    assert status == 0 and "330 ids; 0 (<|endoftext|>) ends a document" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--domain", "en=x.txt"], "give --domain NAME=FILE and -o FILE"),
        (["train", "--domain", "x.txt", "-o", "o.json"], "expected NAME=VALUE"),
        (["train", "--domain", "en=/nowhere.txt", "-o", "o.json"], "no such file"),
        (["inspect"], "give the tokenizer.json"),
        (["inspect", "/nowhere"], "no such tokenizer"),
    ],
)
def test_the_verb_refuses_what_it_cannot_do_in_one_line(run, arguments, message) -> None:
    status, _, err = run(*arguments)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_file_with_padding_and_truncation_splits_whole_texts(tmp_path: Path) -> None:
    words = ByteTokenizer()
    words.backend.enable_truncation(4)
    words.backend.enable_padding(length=8)
    words.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("longer than four") == list(b"longer than four")
    assert loaded.encode("a") == [97]
    assert loaded.opening == ()
