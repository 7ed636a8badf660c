"""What the room's tests share: the recorded networks, a tiny network, a photograph."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tenfold.depth.checkpoint import create, infer_config, to_ours
from tenfold.depth.config import SizePolicy, UniDepthV2Config, ViTConfig
from tenfold.depth.model import UniDepthV2

LOCAL = Path(__file__).parents[1] / "data" / "depth"
PHOTOGRAPH = Path(__file__).parents[2] / "src" / "tenfold" / "depth" / "assets" / "office.jpg"
RECORDED = ("v2_a", "v1_vit", "v1_convnext")


@functools.cache
def recorded_weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(root / f"depth/fixtures/{name}.weights.safetensors").items()}


@functools.cache
def recorded_network(root: Path, name: str):
    weights = recorded_weights(root, name)
    network = create(infer_config(weights, json.loads((root / f"depth/fixtures/{name}.config.json").read_text())))
    network.load_state_dict(to_ours(weights))
    return network.eval()


@functools.cache
def tiny_network(seed: int = 0) -> UniDepthV2:
    """A V2 network with random weights that depend on everything, for sizes up to 100 x 100 pixels."""
    torch.manual_seed(seed)
    config = UniDepthV2Config(
        ViTConfig(32, 4, 2, (1, 2, 3, 4), grid=7),
        hidden=64,
        heads=4,
        min_width=64,
        sizes=SizePolicy(pixels_min=4_000, pixels_max=10_000),
    )
    network = UniDepthV2(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |a - b| / |b| over pixels; the last axis is the vector's."""
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())
