"""The decoder under transformers' Auto classes: the same numbers, and what its tools ask of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tenfold.core.checkpoint import load
from tenfold.llm.checkpoint import load_model, save_hf
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Decoder, initialise
from tenfold.llm.tokenizer import ByteTokenizer
from tenfold.llm.transformers_model import TenfoldConfig, TenfoldForCausalLM, TenfoldModel

TINY = ModelConfig(vocabulary=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=40, context=64, eod=1)
KINDS = {
    "dssn": TINY,
    "post": replace(TINY, norm="post", tied=True),
    "biases": replace(
        TINY, norm="pre", attention_bias=True, mlp_bias=True, rotation="interleaved", rotary_fraction=0.5
    ),
    "everything": replace(
        TINY,
        norm="sandwich",
        activation="gelu_tanh",
        unit_offset_norms=True,
        embedding_scale=24**0.5,
        qk_norm=True,
        attention_softcap=5.0,
        logit_softcap=3.0,
        attention_gate=True,
        local_rope_base=100.0,
        layer_kinds=("sliding", "full", "sliding"),
        sliding_window=4,
    ),
}


def decoder(kind: str = "dssn", **changes) -> Decoder:
    model = Decoder(replace(KINDS[kind], **changes))
    initialise(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_loads_through_the_auto_classes_with_equal_logits(kind, tmp_path):
    ours = decoder(kind)
    save_hf(ours, tmp_path, max_shard_bytes=10_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, TenfoldForCausalLM)
    assert theirs.config.decoder_config() == ours.config
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            theirs.set_attn_implementation(implementation)
            assert (theirs(ids()).logits - ours(ids())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_saving_from_transformers_gives_back_every_bit(kind, tmp_path):
    ours = decoder(kind).bfloat16()
    save_hf(ours, tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = load(tmp_path / "a").tensors, load(tmp_path / "b").tensors
    assert first.keys() == second.keys()
    assert all(first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first)
    assert load_model(tmp_path / "b").model.config == ours.config


def test_a_llama_folder_loads_in_llama_where_this_library_is_not_installed(tmp_path):
    ours = decoder("dssn", norm="pre", tied=True)
    save_hf(ours, tmp_path, family="llama", max_shard_bytes=10_000)
    script = """
import json, sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tenfold":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, LlamaForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is LlamaForCausalLM and "tenfold" not in sys.modules
model.save_pretrained(sys.argv[2])
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[3]))).logits.tolist()))
"""
    command = [sys.executable, "-c", script, tmp_path, tmp_path / "back", json.dumps(ids().tolist())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert (torch.tensor(json.loads(done.stdout.splitlines()[-1])) - ours(ids())).abs().max() < 1e-5
    sent, back = load(tmp_path).tensors, load(tmp_path / "back").tensors
    assert sent.keys() == back.keys()
    assert all(torch.equal(sent[key], back[key]) for key in sent)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_transformers_cache_equals_recomputing(kind):
    ours = decoder(kind)
    theirs = TenfoldForCausalLM.from_decoder(ours)
    prompt = ids(1, 6)
    found = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["dssn", "everything"])
def test_left_padding_changes_nothing(kind):
    theirs = TenfoldForCausalLM.from_decoder(decoder(kind))
    prompt = ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    with torch.no_grad():
        alone = theirs(prompt).logits
        assert (theirs(padded, attention_mask=mask).logits[:, 3:] - alone).abs().max() < 1e-5
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = torch.cat([padded, ids(1, 9)])
    found = theirs.generate(both, attention_mask=torch.cat([mask, torch.ones_like(mask)]), **options)
    assert torch.equal(found[0, 9:], theirs.generate(prompt, **options)[0, 6:])


def test_rows_packed_by_positions_do_not_see_each_other():
    ours = decoder()
    theirs = TenfoldForCausalLM.from_decoder(ours)
    text = ids(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = theirs(text, position_ids=positions, use_cache=False).logits
        alone = torch.cat([ours(text[:, :4]), ours(text[:, 4:])], 1)
    assert (packed - alone).abs().max() < 1e-5


def test_labels_give_the_shifted_mean_cross_entropy():
    theirs = TenfoldForCausalLM.from_decoder(decoder())
    labels = ids().masked_fill(torch.arange(11) < 3, -100)
    output = theirs(ids(), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    theirs = TenfoldForCausalLM.from_decoder(decoder()).train()
    theirs(ids(), labels=ids()).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    theirs.zero_grad()
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    theirs(ids(), labels=ids()).loss.backward()
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], atol=1e-6), name


def test_hidden_states_and_kept_logits_are_transformers_own():
    ours = decoder("everything")
    theirs = TenfoldForCausalLM.from_decoder(ours)
    with torch.no_grad():
        output = theirs(ids(), output_hidden_states=True, logits_to_keep=2)
        assert len(output.hidden_states) == 4
        assert (output.hidden_states[-1] - ours.hidden(ids())).abs().max() < 1e-5
        assert (output.logits - ours(ids())[:, -2:]).abs().max() < 1e-5
        assert isinstance(theirs(ids(), return_dict=False), tuple)
        embedded = theirs.get_input_embeddings()(ids())
        assert torch.equal(theirs(inputs_embeds=embedded).logits, theirs(ids()).logits)


def test_the_two_forms_of_a_model_share_their_parameters():
    for kind in ("dssn", "post"):
        ours = decoder(kind)
        theirs = TenfoldForCausalLM.from_decoder(ours)
        again = theirs.to_decoder()
        assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
        assert {id(p) for p in ours.parameters()} == {id(p) for p in again.parameters()}
        with torch.no_grad():
            assert torch.equal(again(ids()), ours(ids()))


def test_a_new_model_starts_as_the_configuration_says():
    config = ModelConfig(vocabulary=512, width=64, layers=8, heads=4, kv_heads=2, ffn=128)
    theirs = AutoModelForCausalLM.from_config(TenfoldConfig.of(config))
    sigma = (1 / (2 * 64 * 8)) ** 0.5
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):
            gain = 0.283 if "post_attention" in name else 0.432 if "post_mlp" in name else 8**0.5
            assert torch.allclose(parameter, torch.tensor(gain / 8**0.5)), name
        elif "embed_tokens" in name:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.02)
        else:
            assert parameter.std().item() == pytest.approx(sigma, rel=0.08), name


def test_auto_classes_know_the_model_and_the_plans_name_its_modules():
    config = TenfoldConfig.of(TINY)
    assert isinstance(AutoModel.from_config(config), TenfoldModel)
    assert AutoConfig.for_model("tenfold_llm").model_type == "tenfold_llm"
    model = TenfoldForCausalLM(config)
    names = {name for name, _ in model.model.named_modules()}
    assert {key.replace("*", "0") for key in config.base_model_tp_plan} <= names
    assert set(config.base_model_pp_plan) <= names
    assert model._supports_attention_backend


def test_a_folder_tells_transformers_where_its_class_is(tmp_path, monkeypatch):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    save_hf(decoder(), tmp_path / "m")
    places = json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"]
    found = {name: get_class_from_dynamic_module(place, str(tmp_path / "m")) for name, place in places.items()}
    assert found == {"AutoConfig": TenfoldConfig, "AutoModel": TenfoldModel, "AutoModelForCausalLM": TenfoldForCausalLM}


def test_keyword_arguments_reach_an_attention_implementation_from_outside():
    from transformers import AttentionInterface

    seen = []

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **arguments):
        seen.append((module.layer_idx, module.is_causal, arguments["instances"]))
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None

    AttentionInterface.register("tenfold_test", attention)
    theirs = TenfoldForCausalLM.from_decoder(decoder())
    theirs.set_attn_implementation("tenfold_test")
    with torch.no_grad():
        theirs(ids(), instances="here")
    assert seen == [(0, True, "here"), (1, True, "here"), (2, True, "here")]


def test_a_folder_has_a_tokenizer_that_transformers_loads(tmp_path):
    from transformers import AutoTokenizer

    save_hf(decoder("dssn", vocabulary=257, eod=256), tmp_path, ByteTokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [97, 98]
    assert tokenizer.eos_token_id == 256


def test_lora_adapts_the_projections(tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs peft")
    theirs = TenfoldForCausalLM.from_decoder(decoder())
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q", "v"], task_type="CAUSAL_LM"))
    adapted(input_ids=ids(), labels=ids()).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name for name in trained)
