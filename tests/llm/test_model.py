"""The decoder: parity with reference tensors and with transformers, packed documents, initialisation, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tenfold.llm import attention
from tenfold.llm.attention import Documents, attend
from tenfold.llm.cache import Cache
from tenfold.llm.checkpoint import layout_of, load_model
from tenfold.llm.config import PRESETS, ModelConfig
from tenfold.llm.families import FAMILIES, config_from_hf
from tenfold.llm.key_tables import to_ours, to_theirs
from tenfold.llm.model import Decoder, initialise, post_norm_gains

FIXTURES = ("dssn_small", "openpangu_embedded_small")
TINY = ModelConfig(vocabulary=61, width=24, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=40, context=128)


@pytest.fixture
def fixture_model(pangu_folder, parity):
    def load(name: str) -> tuple[Decoder, dict[str, torch.Tensor], dict]:
        return load_model(pangu_folder(name)).model, *parity(name)

    return load


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_and_every_hidden_state_equal_the_reference(name, fixture_model):
    model, tensors, _ = fixture_model(name)
    outputs = {}
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _m, _i, output, number=number: outputs.update({number: output}))
    with torch.no_grad():
        logits = model(tensors["input_ids"])
    for number in range(model.config.layers):
        assert (outputs[number] - tensors[f"hidden.{number}"]).abs().max() < 1e-5
    assert (logits - tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", FIXTURES)
def test_loss_and_all_gradients_equal_the_reference(name, fixture_model):
    model, tensors, described = fixture_model(name)
    ids = tensors["input_ids"]
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert abs(loss.item() - described["loss"]) < 1e-6
    layout = layout_of(FAMILIES["pangu"], model.config)
    expected = to_ours(layout, {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")})
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


FAMILY_OF = {"llama": "llama", "glm4": "glm4", "gemma2": "gemma2", "gemma3_text": "gemma3", "afmoe": "afmoe"}


@pytest.mark.parametrize("model_type", FAMILY_OF)
@given(
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 12]),
    ffn=st.integers(1, 50),
    length=st.integers(1, 13),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_other_shapes_equal_transformers(model_type, foreign, layers, kv_heads, group, head_dim, ffn, length, seed):
    theirs = foreign(
        model_type,
        seed,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        hidden_size=kv_heads * group * 6,
        head_dim=head_dim,
        intermediate_size=ffn,
    )
    config = config_from_hf(theirs.config.to_dict())
    model = Decoder(config)
    weights = dict(theirs.state_dict())
    if config.tied:
        del weights["lm_head.weight"]
    model.load_state_dict(to_ours(layout_of(FAMILIES[FAMILY_OF[model_type]], config), weights), strict=not config.tied)
    ids = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model(ids) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_key_tables_are_inverse_for_every_family(foreign):
    for model_type, family in FAMILY_OF.items():
        theirs = foreign(model_type).state_dict()
        layout = FAMILIES[family].layout
        from tenfold.llm.key_tables import LAYOUTS

        back = to_theirs(LAYOUTS[layout], to_ours(LAYOUTS[layout], theirs))
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[key], theirs[key]) for key in theirs)


# --- documents --------------------------------------------------------------------------------------------------------


def test_packed_documents_equal_the_reference_and_each_document_alone(fixture_model):
    model, tensors, described = fixture_model("dssn_small")
    ids = tensors["packed.input_ids"]
    documents = Documents.of(ids, described["eod_token_id"])
    assert len(documents.lengths) > len(ids)
    with torch.no_grad():
        logits = model(ids, documents)
        assert (logits - tensors["packed.logits"]).abs().max() < 1e-5
        start = 0
        for length in documents.lengths:
            alone = model(ids.flatten()[None, start : start + length])
            assert (logits.flatten(0, 1)[start : start + length] - alone[0]).abs().max() < 1e-5
            start += length


def test_documents_are_what_the_reference_allows(parity):
    tensors, described = parity("dssn_small")
    ids = tensors["packed.input_ids"]
    documents = Documents.of(ids.clone(), described["eod_token_id"])
    row = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths)).view(ids.shape)
    allowed = (row[:, :, None] == row[:, None]) & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    assert torch.equal(allowed, tensors["packed.allowed"].bool())


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 3]),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=25, deadline=None)
def test_attention_over_documents_equals_a_mask_of_all_pairs(lengths, window, softcap):
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)
    q = torch.randn(1, 4, total, 6, generator=generator)
    k, v = (torch.randn(1, 2, total, 6, generator=generator) for _ in range(2))
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    seen = (of[:, None] == of) & (distance >= 0)
    if window:
        seen &= distance < window
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    expected = weights @ v.repeat_interleave(2, 1)
    found = attend(q, k, v, 0.3, Documents(tuple(lengths)), window=window, softcap=softcap)
    assert (found - expected).abs().max() < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return output


def test_no_tensor_of_all_pairs_exists_for_8192_tokens():
    config = replace(TINY, width=16, heads=2, kv_heads=1, head_dim=8, layers=1, ffn=16)
    model = Decoder(config)
    length = 8192
    ids = torch.randint(61, (1, length), generator=torch.Generator().manual_seed(0))
    for documents in (None, Documents((3000, 1, 4000, 1191))):
        with LargestTensor() as seen:
            model(ids, documents).sum().backward()
        assert seen.elements <= length * config.vocabulary  # the logits are the largest; all pairs would be 67 M


def test_peak_memory_of_8192_tokens_stays_below_one_mask():
    script = """
import resource, torch
torch.set_num_threads(1)
from tenfold.llm.attention import Documents
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Decoder
model = Decoder(ModelConfig(vocabulary=61, width=16, layers=1, heads=2, kv_heads=1, ffn=16))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run = lambda n: model(torch.zeros(1, n, dtype=torch.int64), Documents((n // 2, n - n // 2))).sum().backward()
run(64)
before = peak()
run(8192)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert (
        int(done.stdout) < 8192 * 8192
    )  # bytes of a boolean mask; in float32 the scores of one head take 4 times that


@pytest.mark.parametrize("kind", ["window", "past", "softcap"])
def test_no_mask_of_all_pairs_exists_where_attention_needs_masks(kind):
    """8192 tokens with a window, after a cached past, and with bounded scores: by block, forward and backward."""
    length, generator = 8192, torch.Generator().manual_seed(0)
    new = length - 100 if kind == "past" else length
    q = torch.randn(1, 2, new, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(1, 1, length, 8, generator=generator, requires_grad=True) for _ in range(2))
    kept: dict[int, int] = {}
    with LargestTensor() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: note(kept, t), lambda t: t):
        settings = {"window": {"window": 300}, "softcap": {"softcap": 5.0}}.get(kind, {})
        output = attend(q, k, v, 0.3, **settings)
        output.sum().backward()
    assert seen.elements <= 2 * 2**20  # a block's scores of two heads; all pairs would be 67 M of each head
    if kind != "past":  # whose queries all see nearly all keys
        assert sum(kept.values()) < length * length / 4  # bytes
    # Some rows, against a softmax over what they see.
    for row in (0, 1, 299, 300, 4096, new - 1):
        last = row + length - new
        first = max(0, last - 299) if kind == "window" else 0
        scores = q[0, :, row] @ k[0, 0, first : last + 1].T * 0.3
        if kind == "softcap":
            scores = 5 * torch.tanh(scores / 5)
        assert (output[0, :, row] - scores.softmax(-1) @ v[0, 0, first : last + 1]).abs().max() < 1e-5


def note(kept: dict[int, int], tensor: torch.Tensor) -> torch.Tensor:
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


@given(
    past=st.integers(0, 20),
    length=st.integers(1, 20),
    window=st.sampled_from([0, 1, 3, 7]),
    softcap=st.sampled_from([0.0, 2.0]),
    pairs=st.sampled_from([1, 30, 90]),
)
@settings(max_examples=25, deadline=None)
def test_attention_by_blocks_equals_attention_at_once(past, length, window, softcap, pairs):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, 6, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, past + length, 6, generator=generator, requires_grad=True) for _ in range(2))
    whole = attention.causal_attention(q, k, v, 0.3, window, softcap)
    wanted = torch.autograd.grad(whole.square().sum(), (q, k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_PAIRS", pairs)
        blocks = attention.causal_attention(q, k, v, 0.3, window, softcap)
        found = torch.autograd.grad(blocks.square().sum(), (q, k, v))
    assert (whole - blocks).abs().max() < 1e-5
    assert all((a - b).abs().max() < 1e-5 * max(1.0, a.abs().max().item()) for a, b in zip(wanted, found, strict=True))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(), ("sliding", "full", "sliding")])
def test_a_cached_forward_in_pieces_equals_one_pass(kinds):
    model = Decoder(replace(TINY, layer_kinds=kinds, sliding_window=4 if kinds else 0))
    initialise(model)
    ids = torch.randint(61, (2, 15), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 2, 15)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in ids.split((5, 1, 1, 8), 1)]
        assert (torch.cat(pieces, 1) - model(ids)).abs().max() < 1e-5


# --- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["tiny", "small"])
@pytest.mark.parametrize(("width", "layers"), [(64, 48), (256, 24)])
def test_weights_start_with_the_papers_standard_deviations(width, layers, init):
    config = ModelConfig(
        vocabulary=2048, width=width, layers=layers, heads=4, kv_heads=2, ffn=2 * width, init=init, norm="dssn"
    )
    model = Decoder(config)
    initialise(model)
    tiny, small = math.sqrt(1 / (2 * width * layers)), math.sqrt(2 / (5 * width))
    inner, outer = (tiny, tiny) if init == "tiny" else (small, small / math.sqrt(layers))
    groups = {"q": inner, "k": inner, "v": inner, "o": outer, "gate": inner, "up": inner, "down": outer}
    for name, sigma in groups.items():
        weights = [p.flatten() for key, p in model.named_parameters() if key.endswith(f".{name}.weight")]
        assert torch.cat(weights).std().item() == pytest.approx(sigma, rel=0.02), name
    assert model.embed.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(inner, rel=0.02)
    for layer in model.layers:
        assert torch.equal(layer.post_attention_norm.weight, torch.full((width,), 0.283 / math.sqrt(layers)))
        assert torch.equal(layer.post_mlp_norm.weight, torch.full((width,), 0.432 / math.sqrt(layers)))
        assert torch.equal(layer.pre_attention_norm.weight, torch.ones(width))


def test_depth_scaling_of_the_135b_model_has_the_papers_gains():
    attention, mlp = post_norm_gains(PRESETS["pangu-ultra-135b"])
    assert (round(attention, 5), round(mlp, 5)) == (0.02919, 0.04456)


def test_the_135b_preset_has_133_9_billion_parameters_on_the_meta_device():
    with torch.device("meta"):
        model = Decoder(PRESETS["pangu-ultra-135b"])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == 133.9


def test_a_seed_draws_the_same_weights_and_another_seed_others():
    def drawn(seed: int) -> torch.Tensor:
        model = Decoder(TINY)
        initialise(model, seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


# --- norm placements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "norms"), [("pre", 2), ("sandwich", 4), ("dssn", 4), ("post", 2)])
def test_each_placement_has_its_norms_and_every_one_gets_a_gradient(norm, norms):
    model = Decoder(replace(TINY, norm=norm))
    initialise(model)
    gains = [key for key, _ in model.named_parameters() if "_norm.weight" in key and key.startswith("layers.0.")]
    assert len(gains) == norms
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_sandwich_and_dssn_differ_in_their_first_gains_only():
    plain, scaled = (Decoder(replace(TINY, norm=norm)) for norm in ("sandwich", "dssn"))
    initialise(plain)
    initialise(scaled)
    for (key, a), (_, b) in zip(plain.named_parameters(), scaled.named_parameters(), strict=True):
        assert torch.equal(a, b) == ("post_" not in key)
    plain.load_state_dict(scaled.state_dict())
    ids = torch.arange(9)[None]
    assert torch.equal(plain(ids), scaled(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "deep"}, "norm: 'deep' is not one of pre, sandwich, dssn, post"),
        ({"kv_heads": 3}, "kv_heads: 4 heads cannot share 3"),
        ({"rope_base": 0.0}, "rope_base: 0.0 is not a positive number"),
        ({"layer_kinds": ("full",)}, "layer_kinds: 1 kinds for 3 layers"),
        ({"eod": 61}, "eod: 61 is not an id of the vocabulary"),
    ],
)
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)
