"""The networks compute what the official modules compute, and the fast convolution what torchvision's does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torchvision.ops import deform_conv2d

from tenfold.core.checkpoint import load_into
from tenfold.tracking.checkpoint import infer_config, to_ours
from tenfold.tracking.model import Masa
from tenfold.tracking.model.deform import modulated_deform_conv
from tenfold.tracking.model.heads import roi_features

FIXTURES = Path(__file__).parents[1] / "data" / "tracking"
TOLERANCE = 2e-4


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "kind"}


def network(tensors: dict[str, torch.Tensor], about: dict) -> Masa:
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    config = dataclasses.replace(
        infer_config(weights), strides=tuple(about["strides"]), head_groups=about["groups_embed_gn"]
    )
    model = Masa(config).eval()
    load_into(model, to_ours(weights, config), "fixture")
    return model


ADAPTERS = ["adapter_fpn_deformfusion_3level", "adapter_fpn_deformfusion_4level_odd", "adapter_simplefpn_dyhead"]


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_adapter_and_embeddings_equal_the_official_modules(name: str) -> None:
    tensors, about = load(name)
    model = network(tensors, about)
    maps = [tensors[f"in.backbone_feat.{level}"] for level in range(len(model.config.in_channels))]
    pyramid = model.pyramid(maps)
    fused = model.features(maps)
    for level in range(5):
        torch.testing.assert_close(pyramid[level], tensors[f"out.fpn.{level}"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(fused[level], tensors[f"out.adapter.{level}"], atol=TOLERANCE, rtol=0)
    strides = model.config.strides
    rois = tensors["in.rois"]
    read = roi_features(fused[: len(strides)], rois, strides)
    torch.testing.assert_close(read, tensors["out.roi_feats"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.embed(fused, rois), tensors["out.embeds"], atol=TOLERANCE, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    stride=st.sampled_from([1, 2]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_fast_convolution_equals_torchvision_with_gradients(
    height: int, width: int, stride: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = (-(-height // stride), -(-width // stride))
    inputs = [noise(2, 4, height, width), spread * noise(2, 18, *size), noise(2, 9, *size).sigmoid(), noise(6, 4, 3, 3)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    found = modulated_deform_conv(*ours, stride=stride)
    x, offset, mask, weight = theirs
    expected = deform_conv2d(x, offset, weight, None, stride=stride, padding=1, mask=mask)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    probe = noise(*found.shape)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, one, other in zip(("map", "offset", "mask", "kernel"), ours, theirs, strict=True):
        if name == "offset" and spread in (0.0, 1e6):
            continue  # on whole numbers the slope is not unique, and far outside it is that of rounding
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_box_is_read_from_the_level_that_its_size_asks_for() -> None:
    levels = [torch.full((1, 1, 64 >> level, 64 >> level), float(level)) for level in range(3)]
    sides = torch.tensor([10.0, 111.0, 113.0, 223.0, 225.0, 500.0])
    rois = torch.stack([torch.zeros(6), torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    read = roi_features(levels, rois, (8, 16, 32))
    # Beyond the map RoIAlign reads zeros, so the largest box is judged by its corner.
    assert read[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
