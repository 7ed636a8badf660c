"""Checkpoints: official files load strictly, tell what they are, and come back bit for bit."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.core import hub
from tenfold.core.checkpoint import load_file as load_checkpoint
from tenfold.core.console import UserError
from tenfold.superres.checkpoint import infer_config, load_model, official_arguments, save_model, to_official, to_ours
from tenfold.superres.config import EMBEDDED_MODELS, MODELS, OFFICIAL_MODELS, PARAMETERS, RECIPES, HiTConfig
from tenfold.superres.model import HiT

PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"
FIXTURES = sorted(path.name.removesuffix(".json") for path in PARITY.glob("*.json"))
# 1-pixel cells first, and not the default schedule: ratio 0.5 and ratio 1 look the same there.
AMBIGUOUS = [
    "tiny_sir_x3",
    "tiny_sir_x4_pixelshuffle_3conv",
    "tiny_srf_x2_smallinput",
    "tiny_srf_x3",
    "tiny_srf_x4_nearestconv",
]
X2 = PARITY / "tiny_srf_x2.state.safetensors"
LAYER = "layers.0.residual_group.blocks.1."


def official_state(name):
    return load_file(PARITY / f"{name}.state.safetensors")


def description(name):
    return json.loads((PARITY / f"{name}.json").read_text())


def same_bits(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and tensor.shape == right[key].shape, key
        assert torch.equal(tensor, right[key]), key


# ---------------------------------------------------------------- official files


@pytest.mark.parametrize("name", FIXTURES)
def test_official_keys_fit_ours_strictly(name):
    facts = description(name)
    model = load_model(str(PARITY / f"{name}.state.safetensors"), config=facts["config"])
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert model.state_dict().keys() == to_ours(official_state(name)).keys()
    assert not model.training


@pytest.mark.parametrize("name", FIXTURES)
def test_the_way_from_official_to_ours_and_back_changes_no_bit(name, tmp_path):
    official = official_state(name)
    same_bits(to_official(to_ours(official)), official)

    model = load_model(str(PARITY / f"{name}.state.safetensors"), config=description(name)["config"])
    save_model(tmp_path / "back.safetensors", model, {"licence": "free"})
    same_bits(load_file(tmp_path / "back.safetensors"), official)

    again = load_model(str(tmp_path / "back.safetensors"))  # its header has the windows
    assert again.config.windows == model.config.windows
    same_bits(again.state_dict(), model.state_dict())
    assert load_checkpoint(tmp_path / "back.safetensors").metadata["licence"] == "free"


def test_index_buffers_of_hit_sng_come_back():
    official = official_state("tiny_sng_x2")
    buffers = {key for key, tensor in official.items() if tensor.dtype == torch.int64}
    assert len(buffers) == 6
    assert buffers <= to_official(to_ours(official)).keys()


@pytest.mark.parametrize(("variant", "scale"), PARAMETERS)
def test_official_models_have_the_published_sizes(variant, scale):
    with torch.device("meta"):
        model = HiT(HiTConfig(variant=variant, scale=scale))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[variant, scale]
    official = to_official(dict(model.named_parameters()))
    assert len(official) == {"sir": 834, "srf": 882, "sng": 1074}[variant]
    shapes = {key: tuple(tensor.shape) for key, tensor in official.items()}
    layer = "layers.3.residual_group.blocks.5."
    assert shapes["upsample.0.weight"] == (3 * scale**2, 60, 3, 3)
    assert shapes["patch_embed.norm.weight"] == (60,)
    assert shapes[f"{layer}correlation.qv.conv.0.weight"] == (12, 60, 1, 1)
    assert shapes[f"{layer}correlation.qv.linear.weight"] == (60, 60, 1, 1)
    assert shapes[f"{layer}correlation.spatial_linear.weight"] == (1, 64)
    assert shapes[f"{layer}correlation.pos.pos3.2.weight"] == (6, 3)
    context = f"{layer}correlation.ngram_window_partition.ngram_context."
    assert shapes.get(f"{context}unigram_embed.weight") == ((1, 2, 64, 64) if variant == "sng" else None)
    assert shapes.get(f"{context}merge.weight") == ((60, 60, 1, 1) if variant == "sng" else None)


# ---------------------------------------------------------------- detection


def check_detected(found, facts):
    given = facts["config"]
    base_y, base_x = given["base_win_size"]
    assert found.variant == facts["variant"].removeprefix("HiT_").lower()
    assert found.scale == given["upscale"]
    assert found.channels == given["in_chans"]
    assert found.width == given["embed_dim"]
    assert found.depths == tuple(given["depths"])
    assert found.heads == tuple(given["num_heads"])
    assert found.mlp_ratio == given["mlp_ratio"]
    assert found.reconstruction == given["upsampler"]
    assert found.residual_convolution == given["resi_connection"]
    assert found.windows == tuple((int(base_y * ratio), int(base_x * ratio)) for ratio in given["hier_win_ratios"])


@pytest.mark.parametrize("name", FIXTURES)
def test_a_checkpoint_with_its_config_tells_what_it_is(name):
    check_detected(infer_config(official_state(name), description(name)["config"]), description(name))


@pytest.mark.parametrize("name", sorted(set(FIXTURES) - set(AMBIGUOUS)))
def test_a_checkpoint_alone_tells_what_it_is(name):
    check_detected(infer_config(official_state(name)), description(name))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_windows_that_shapes_leave_open_are_asked_for(name):
    with pytest.raises(UserError, match=r"window sizes cannot be told .*config\.json with \"hier_win_ratios\""):
        infer_config(official_state(name))


@pytest.mark.parametrize(
    "config",
    [
        HiTConfig("sir", 2, channels=1, width=24, depths=(2, 1), heads=(3, 2)),
        HiTConfig("srf", 3, width=20, depths=(1, 3), heads=(2, 1), mlp_ratio=1.5, reconstruction="pixelshuffle"),
        HiTConfig("sng", 8, width=16, depths=(2,), heads=(2,), reconstruction="pixelshuffle"),
        HiTConfig("sng", 4, width=32, depths=(2,), heads=(4,), window_ratios=(1.0, 3.0), residual_convolution="3conv"),
        HiTConfig("srf", 4, width=20, depths=(2,), heads=(2,), window_ratios=(4.0, 2.0), reconstruction="nearest+conv"),
    ],
)
def test_detection_reads_back_what_was_built(config):
    tensors = to_official(dict(HiT(config).named_parameters()))
    for given in (None, official_arguments(config)):
        found = infer_config(tensors, given)
        assert found.windows == config.windows
        assert official_arguments(found) | {"hier_win_ratios": 0} == official_arguments(config) | {"hier_win_ratios": 0}
    assert found == config


def test_a_config_that_contradicts_the_weights_is_refused():
    with pytest.raises(UserError, match=r"hier_win_ratios .* ask for cells of"):
        infer_config(official_state("tiny_srf_x2"), {"hier_win_ratios": [1, 2, 4]})


@pytest.mark.parametrize("given", [{"hier_win_ratios": None}, {"base_win_size": []}, {"base_win_size": "wide"}])
def test_a_config_of_another_kind_is_refused(given):
    with pytest.raises(UserError, match="do not make a HiT-SR network"):
        infer_config(official_state("tiny_srf_x2"), given)


# ---------------------------------------------------------------- damaged and foreign files


def saved(folder, tensors):
    path = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return str(path)


def broken(change):
    tensors = official_state("tiny_srf_x2")
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}norm1.weight"), f"1 missing: {LAYER}norm1.weight"),
        (lambda t: t.pop(f"{LAYER}correlation.qv.conv.2.bias"), f"1 missing: {LAYER}correlation.qv.conv.2.bias"),
        (lambda t: t.pop("conv_first.weight"), "not a HiT-SR checkpoint: key 'conv_first.weight' is missing"),
        (lambda t: t.pop("layers.0.residual_group.blocks.0.mlp.fc1.weight"), "mlp.fc1.weight' is missing"),
        (lambda t: t.update({"extra.weight": torch.ones(2)}), "1 unexpected: extra.weight"),
        (
            lambda t: t.update({f"{LAYER}norm1.weight": torch.ones(7)}),
            r"of another shape: .*norm1.weight \(expected 20, found 7\)",
        ),
        (lambda t: t[f"{LAYER}mlp.fc1.bias"].fill_(float("nan")), "NaN or infinite values in 1 tensors .*mlp.fc1.bias"),
        (lambda t: t["norm.bias"].fill_(float("inf")), "NaN or infinite"),
        (lambda t: t.update({"upsample.0.weight": torch.ones(13, 20, 3, 3)}), "has 13 outputs, which is no 3 x scale"),
        (lambda t: t.update({"conv_first.weight": torch.ones(20)}), "do not make a HiT-SR network"),
        (lambda t: t.update({"upsample.0.weight": torch.tensor(1.0)}), "do not make a HiT-SR network"),
    ],
)
def test_a_damaged_checkpoint_gives_one_line_that_names_the_place(change, words, tmp_path):
    path = saved(tmp_path, broken(change))
    with pytest.raises(UserError, match=words) as caught:
        load_model(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_foreign_network_is_named_as_such(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 3, 3))
    with pytest.raises(UserError, match=r"not a HiT-SR checkpoint.*it begins with: 0\."):
        load_model(saved(tmp_path, layers.state_dict()))


# ---------------------------------------------------------------- the ways in which people hold checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params": state},
        lambda state: {"params_ema": state, "params": {key: torch.zeros_like(value) for key, value in state.items()}},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"params": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "params", "params_ema", "state_dict", "module.", "params with module."],
)
@pytest.mark.parametrize("name", ["tiny_srf_x2", "tiny_sng_x2"])
def test_pth_wrappers_are_taken_off(wrap, name, tmp_path):
    official = official_state(name)
    torch.save(wrap(official), tmp_path / "net.pth")
    same_bits(to_official(load_model(str(tmp_path / "net.pth")).state_dict()), official)


def test_weights_stored_in_half_precision_are_read(tmp_path):
    half = {key: tensor.half() for key, tensor in official_state("tiny_srf_x2").items()}
    model = load_model(saved(tmp_path, half))
    same_bits(to_official(model.state_dict()), {key: tensor.float() for key, tensor in half.items()})


def test_a_checkpoint_of_an_unfinished_run_loads(tmp_path):
    """A run keeps its weights under our own names."""
    official = official_state("tiny_sng_x2")
    path = saved(tmp_path, dict(load_model(saved(tmp_path, official)).named_parameters()))
    same_bits(to_official(dict(load_model(path).named_parameters())), official)


def test_a_folder_with_weights_and_config_loads(tmp_path):
    save_file(official_state("tiny_sir_x3"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(description("tiny_sir_x3")["config"]))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        check_detected(load_model(str(place)).config, description("tiny_sir_x3"))


def test_the_official_names_are_hub_repositories():
    assert {entry.name: entry.location for entry in OFFICIAL_MODELS} == {
        f"hit-{variant}-x{scale}": f"XiangZ/hit-{variant}-{scale}x"
        for variant in ("sir", "srf", "sng")
        for scale in (2, 3, 4)
    }
    assert all(entry.source == "hub" for entry in OFFICIAL_MODELS)


@pytest.mark.parametrize("asked", ["hit-srf-x2", "XiangZ/hit-srf-2x"])
def test_an_official_name_is_fetched_from_its_repository(asked, monkeypatch):
    wanted = []

    def fetch(repo_id, filename, revision=None):
        wanted.append((repo_id, filename))
        return PARITY / "full_srf_x2.state.safetensors" if filename == "model.safetensors" else None

    monkeypatch.setattr(hub, "fetch", fetch)
    model = load_model(asked)
    assert ("XiangZ/hit-srf-2x", "model.safetensors") in wanted
    assert {repo_id for repo_id, _ in wanted} == {"XiangZ/hit-srf-2x"}
    assert (model.config.variant, model.config.scale) == ("srf", 2)


def test_a_misspelt_name_gets_the_nearest_ones():
    with pytest.raises(UserError, match=r"did you mean .*tenfold-x2"):
        load_model("tenfold-2")


# ---------------------------------------------------------------- embedded weights


@pytest.mark.parametrize("entry", EMBEDDED_MODELS, ids=lambda entry: entry.name)
def test_embedded_weights_are_what_the_table_says(entry):
    file = resources.files("tenfold.superres") / "weights" / entry.location
    size = len(file.read_bytes())
    assert size == entry.bytes and size <= 1_500_000
    model = load_model(entry.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    assert entry.name == f"tenfold-x{model.config.scale}"
    assert model.config == RECIPES[entry.name].model
    metadata = load_checkpoint(Path(str(file))).metadata
    assert "licence" in metadata


def test_names_are_unique():
    names = [entry.name for entry in MODELS]
    assert len(set(names)) == len(names) == 11
