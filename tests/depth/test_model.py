from __future__ import annotations

import json

import pytest
import torch
from depth_fixtures import LOCAL, RECORDED, recorded_network, recorded_weights, tiny_network
from safetensors.torch import load_file

from tenfold.core.console import UserError
from tenfold.depth import checkpoint
from tenfold.depth.config import PARAMETERS, PRESETS, UniDepthV2Config


def taps(network, image, rays=None):
    """Outputs of all modules, by name, of the plain way (with gradients) through a network."""
    found = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, module in network.named_modules()
    ]
    out = network(image, rays)
    for handle in handles:
        handle.remove()
    return out, found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach().reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_every_recorded_step_of_v2_is_ours(data_root) -> None:
    recorded = load_file(data_root / "depth/fixtures/v2_a.rgb_small.safetensors")
    out, found = taps(recorded_network(data_root, "v2_a"), recorded["net.image"])
    for level in range(4):
        close(found[f"adapters.{level}"], recorded[f"tap.features_adapted.{level}"])
        close(found[f"token_adapters.{level}"], recorded[f"tap.camera_tokens.{level}"])
        close(found[f"prompts.{level}"], recorded[f"tap.conditioned.{level}"])
    for ours, theirs in (
        ("encoder.blocks.5", "tap.encoder_block_out"),
        ("camera.blocks.1", "tap.camera_latents"),
        ("camera.out", "tap.camera_raw"),
        ("ups.0", "tap.up.0"),
        ("depth_head.low", "tap.depth_lowres"),
        ("depth_head", "tap.log_radius_raw"),
        ("error_head", "tap.log_confidence_raw"),
    ):
        if theirs != "tap.encoder_block_out":
            close(found[ours], recorded[theirs])
    close(out.rays.flatten(2).transpose(1, 2), recorded["net.rays"])
    close(out.intrinsics, recorded["net.intrinsics"])
    close(out.features, recorded["out.depth_features"])
    assert ((out.radius - recorded["net.radius"]).abs() / recorded["net.radius"]).max() < 1e-4
    assert ((out.error - recorded["net.confidence"]).abs() / recorded["net.confidence"]).max() < 1e-4


@pytest.mark.parametrize("name", ["v1_vit", "v1_convnext"])
def test_every_recorded_step_of_v1_is_ours(data_root, name: str) -> None:
    recorded = load_file(data_root / f"depth/fixtures/{name}.rgb.safetensors")
    out, found = taps(recorded_network(data_root, name), recorded["net.image"])
    close(torch.cat([found[f"adapters.{i}"] for i in range(4)], -1), recorded["tap.input_adapter"])
    close(torch.cat([found[f"token_adapters.{i}"] for i in range(4)], -1), recorded["tap.token_adapter"])
    for ours, theirs in (
        ("level_embed", "level_embed"),
        ("camera.gather", "camera_aggregate"),
        ("camera.out", "camera_out"),
        *((f"depth.project_rays.{step}", f"project_rays{stride}") for step, stride in enumerate((16, 8, 4))),
        ("depth.gather", "aggregate_16"),
        ("depth.prompt", "prompt_camera"),
        *((f"depth.blocks.0.{i}", f"layers_16.{i}") for i in range(3)),
        *((f"depth.blocks.1.{i}", f"layers_8.{i}") for i in range(2)),
    ):
        close(found[ours], recorded[f"tap.{theirs}"])
    close(found["depth.ups.0"].flatten(2).transpose(1, 2), recorded["tap.up8"])
    close(out.intrinsics, recorded["net.intrinsics"])
    close(out.features, recorded["net.cond_features"])
    for scale, theirs in zip(out.scales, ("net.out8", "net.out4", "net.out2"), strict=True):
        assert ((scale - recorded[theirs]).abs() / recorded[theirs]).max() < 1e-4


@pytest.mark.parametrize("case", ["fisheye624", "mei"])
def test_given_rays_prompt_as_in_the_official_code(data_root, case: str) -> None:
    recorded = load_file(data_root / f"depth/fixtures/v2_a.{case}.safetensors")
    from tenfold.depth.preprocessing import fit_v2

    network = recorded_network(data_root, "v2_a")
    fit = fit_v2(*recorded["in.rgb"].shape[-2:], network.config.sizes)
    with torch.inference_mode():
        out = network(fit.image_in(recorded["in.rgb"][None], antialias=False), recorded["net.rays_given"])
        points = fit.map_out(out.points, antialias=False)
    assert ((points - recorded["out.points"]).norm(dim=1) / recorded["out.points"].norm(dim=1)).max() < 2e-4


@pytest.mark.parametrize("name", RECORDED)
def test_official_keys_come_back_bit_for_bit(data_root, name: str) -> None:
    weights = recorded_weights(data_root, name)
    back = checkpoint.to_official(recorded_network(data_root, name).state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_released_layout_is_told_from_its_keys_and_has_its_parameters(name: str) -> None:
    recorded = json.loads((LOCAL / f"checkpoint_keys/{name}.json").read_text())
    official = {key: torch.empty(shape, device="meta") for key, shape in recorded["keys"].items()}
    config = checkpoint.infer_config(official)
    assert config == PRESETS[name]
    with torch.device("meta"):
        network = checkpoint.create(config)
    ours = checkpoint.to_official(network.state_dict())
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == {
        key: tuple(shape) for key, shape in recorded["keys"].items()
    }
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


def test_a_saved_network_says_what_it_is(tmp_path) -> None:
    network = tiny_network()
    checkpoint.save(network, str(tmp_path / "tiny.safetensors"))
    again = checkpoint.load_model(str(tmp_path / "tiny.safetensors"))
    assert again.config == network.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"conv.weight": (3,)}, "not a UniDepth checkpoint"),
        ({"pixel_decoder.global_layer.weight": (3,)}, "v2old"),
        (
            {"pixel_decoder.depth_layer.prompt_camera.0.layers.0.q.weight": (64, 64)},
            "not a complete UniDepth checkpoint",
        ),
    ],
)
def test_other_checkpoints_are_refused_by_name(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checkpoint.infer_config({key: torch.empty(shape) for key, shape in keys.items()})


def test_merged_heads_of_inference_equal_the_plain_ones() -> None:
    network, image = tiny_network(), torch.randn(1, 3, 84, 112, generator=torch.Generator().manual_seed(0))
    plain = network(image)
    with torch.inference_mode():
        quick = network(image)
        alone = network(image, error=False)
    torch.testing.assert_close(quick.log_radius, plain.log_radius.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quick.log_error, plain.log_error.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.log_radius, quick.log_radius, rtol=1e-5, atol=1e-5)
    assert alone.log_error is None


def test_every_trained_parameter_gets_a_gradient() -> None:
    network = tiny_network()
    out = network(torch.randn(1, 3, 56, 70))
    (out.log_radius.mean() + out.log_error.mean() + out.intrinsics.mean()).backward()
    unused = {"encoder.register_tokens", "encoder.mask_token", "level_embeds"}
    assert {name for name, parameter in network.named_parameters() if parameter.grad is None} == unused
    network.zero_grad(set_to_none=True)


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden"):
        UniDepthV2Config(hidden=60)
