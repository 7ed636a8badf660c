"""Official UniDepth checkpoints <-> ours, and what a checkpoint says of its own architecture.

The version and most sizes follow from keys and shapes; the rest from `config.json`, and without one from the release.
The two key layouts differ by the tables below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tenfold.core import checkpoint
from tenfold.core.config import near
from tenfold.core.console import UserError
from tenfold.depth.config import (
    MODELS,
    PRESETS,
    ConvNeXtConfig,
    SizePolicy,
    UniDepthConfig,
    UniDepthV1Config,
    UniDepthV2Config,
    ViTConfig,
)
from tenfold.depth.model import UniDepthV2
from tenfold.depth.model_v1 import UniDepthV1

Network: TypeAlias = UniDepthV1 | UniDepthV2
Names: TypeAlias = tuple[tuple[str, str], ...]

# (official, ours) of what a module holds.
FEED_FORWARD: Names = (("proj1", "expand"), ("proj2", "reduce"))
ATTENTION: Names = (
    ("norm_attnx", "norm_x"),
    ("norm_attnctx", "norm_context"),
    ("ls1.gamma", "gain_attention"),
    ("ls2.gamma", "gain_mlp"),
    ("mlp.proj1", "mlp.expand"),
    ("mlp.proj2", "mlp.reduce"),
)
VIT_BLOCK: Names = (
    ("attn.qkv", "qkv"),
    ("attn.proj", "out"),
    ("ls1.gamma", "gain1"),
    ("ls2.gamma", "gain2"),
    ("mlp.fc1", "expand"),
    ("mlp.fc2", "reduce"),
)
CONVNEXT_BLOCK: Names = (("conv_dw", "depthwise"), ("gamma", "gain"), ("mlp.fc1", "expand"), ("mlp.fc2", "reduce"))
DECODER_BLOCK: Names = (("dwconv", "depthwise"), ("gamma", "gain"), ("pwconv1", "expand"), ("pwconv2", "reduce"))

# (official, ours, names inside) of modules; {} is a number. The first row that fits a key counts.
_ENCODER: tuple[tuple[str, str, Names], ...] = (
    ("pixel_encoder.patch_embed.proj", "encoder.patches", ()),
    ("pixel_encoder.blocks.{}", "encoder.blocks.{}", VIT_BLOCK),
    ("pixel_encoder.stages.{}.blocks.{}", "encoder.stages.{}.blocks.{}", CONVNEXT_BLOCK),
    ("pixel_encoder", "encoder", ()),
    ("pixel_decoder.input_adapter.input_adapters.{}", "adapters.{}", ()),
    ("pixel_decoder.level_embeds", "level_embeds", ()),
    ("pixel_decoder.camera_layer.latents_pos", "camera.positions", ()),
)
V2_MODULES = (
    *_ENCODER,
    ("pixel_decoder.camera_token_adapter.input_adapters.{}", "token_adapters.{}", ()),
    ("pixel_decoder.camera_layer.project", "camera.project", FEED_FORWARD),
    ("pixel_decoder.camera_layer.aggregate1", "camera.blocks.0", ATTENTION),
    ("pixel_decoder.camera_layer.aggregate2", "camera.blocks.1", ATTENTION),
    ("pixel_decoder.camera_layer.out_pinhole", "camera.out", FEED_FORWARD),
    ("pixel_decoder.depth_layer.prompt_camera.{}.layers.0", "prompts.{}", ATTENTION),
    ("pixel_decoder.depth_layer.process_features.{}", "laterals.{}", ()),
    ("pixel_decoder.depth_layer.ups.{}.convs.{}", "ups.{}.units.{}", (("gamma", "gain"),)),
    ("pixel_decoder.depth_layer.ups.{}.up.0", "ups.{}.project", ()),
    ("pixel_decoder.depth_layer.to_latents", "to_latents", ()),
    ("pixel_decoder.depth_layer.depth_mlp.2.0", "depth_head.norm", ()),
    ("pixel_decoder.depth_layer.depth_mlp.2.1", "depth_head.linear", ()),
    ("pixel_decoder.depth_layer.to_depth_lr", "depth_head.low", ()),
    ("pixel_decoder.depth_layer.to_depth_hr.0", "depth_head.high", ()),
    ("pixel_decoder.depth_layer.to_depth_hr.2", "depth_head.out", ()),
    ("pixel_decoder.depth_layer.confidence_mlp.0", "error_head.norm", ()),
    ("pixel_decoder.depth_layer.confidence_mlp.1", "error_head.linear", ()),
    ("pixel_decoder.depth_layer.to_confidence_lr", "error_head.low", ()),
    ("pixel_decoder.depth_layer.to_confidence_hr.0", "error_head.high", ()),
    ("pixel_decoder.depth_layer.to_confidence_hr.2", "error_head.out", ()),
)
_STRIDES = ((0, 16, 8), (1, 8, 4), (2, 4, 2))  # of each step of V1's depth head: its rays and blocks, its result
V1_MODULES = (
    *_ENCODER,
    ("pixel_decoder.token_adapter.input_adapters.{}", "token_adapters.{}", ()),
    ("pixel_decoder.level_embed_layer", "level_embed", ()),
    ("pixel_decoder.camera_layer.in_features", "camera.features", FEED_FORWARD),
    ("pixel_decoder.camera_layer.cls_project", "camera.tokens", ()),
    ("pixel_decoder.camera_layer.aggregate", "camera.gather", ATTENTION),
    ("pixel_decoder.camera_layer.layers.{}", "camera.blocks.{}", ATTENTION),
    ("pixel_decoder.camera_layer.out", "camera.out", FEED_FORWARD),
    ("pixel_decoder.depth_layer.features_channel_cat", "depth.merge", ()),
    ("pixel_decoder.depth_layer.to_latents", "depth.to_latents", FEED_FORWARD),
    ("pixel_decoder.depth_layer.aggregate_16", "depth.gather", ATTENTION),
    ("pixel_decoder.depth_layer.prompt_camera", "depth.prompt", ATTENTION),
    *(
        row
        for step, stride, finer in _STRIDES
        for row in (
            (f"pixel_decoder.depth_layer.project_rays{stride}", f"depth.project_rays.{step}", FEED_FORWARD),
            (f"pixel_decoder.depth_layer.layers_{stride}.{{}}", f"depth.blocks.{step}.{{}}", ATTENTION),
            (f"pixel_decoder.depth_layer.up{finer}.convs.{{}}", f"depth.ups.{step}.blocks.{{}}", DECODER_BLOCK),
            (f"pixel_decoder.depth_layer.up{finer}.up.0", f"depth.ups.{step}.project", ()),
            (f"pixel_decoder.depth_layer.up{finer}.up.2", f"depth.ups.{step}.smooth", ()),
            (f"pixel_decoder.depth_layer.out{finer}", f"depth.outs.{step}", ()),
        )
    ),
)

_PROMPT_V2 = "pixel_decoder.depth_layer.prompt_camera.0.layers.0.q.weight"
_PROMPT_V1 = "pixel_decoder.depth_layer.project_rays16.proj2.weight"


def to_ours(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under our names; the tensors are the same."""
    rows = _compile(V2_MODULES if _PROMPT_V2 in official else V1_MODULES, official_first=True)
    return {_rename(key, rows): tensor for key, tensor in official.items()}


def to_official(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the official names; the inverse of `to_ours`."""
    rows = _compile(V2_MODULES if "error_head.out.weight" in ours else V1_MODULES, official_first=False)
    return {_rename(key, rows): tensor for key, tensor in ours.items()}


Row: TypeAlias = tuple[re.Pattern[str], str, Names]


def _compile(modules: Sequence[tuple[str, str, Names]], official_first: bool) -> list[Row]:
    rows = []
    for official, ours, names in modules:
        old, new = (official, ours) if official_first else (ours, official)
        pattern = re.compile("^" + re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)")
        rows.append((pattern, new, names if official_first else tuple((b, a) for a, b in names)))
    return rows


def _rename(key: str, rows: Sequence[Row]) -> str:
    for pattern, new, names in rows:
        match = pattern.match(key)
        if match:
            rest = key[match.end() + 1 :]
            for old_name, new_name in names:
                if rest == old_name or rest.startswith(old_name + "."):
                    rest = new_name + rest[len(old_name) :]
                    break
            start = new.format(*match.groups())
            return f"{start}.{rest}" if rest else start
    return key


# --- what a checkpoint is --------------------------------------------------------------------------------------------


def infer_config(official: Mapping[str, Tensor], given: Mapping[str, Any] | None = None) -> UniDepthConfig:
    """The architecture of a checkpoint in the official layout, from its keys and shapes.

    Args:
        official: tensors by official key.
        given: the `config.json` beside it, where there is one. It decides what shapes cannot tell: heads, which blocks
            are read, and the sizes of images.

    Raises:
        UserError: not a UniDepth checkpoint, one of a layout that is not supported, or one whose config does not fit.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in official.items()}
    settings = _Settings(given or {})
    try:
        if _PROMPT_V2 in shapes:
            return _infer_v2(shapes, settings)
        if _PROMPT_V1 in shapes:
            return _infer_v1(shapes, settings)
    except KeyError as error:
        raise UserError(f"not a complete UniDepth checkpoint: it has no {error.args[0]}") from None
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # of shapes, or of what config.json holds
        raise UserError(f"the checkpoint's shapes and config.json do not make a UniDepth network: {error}") from None
    raise UserError(_not_unidepth(shapes))


def _not_unidepth(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any("global_layer" in key or "camera_layer.out_shift" in key for key in shapes):
        return (
            "this is a checkpoint of the withdrawn layout v2old; use unidepth-v2-vits14 or unidepth-v2-vitl14 instead"
        )
    if any(key.startswith("pixel_decoder.angular_module") for key in shapes):
        return "this is a checkpoint of UniK3D, another network; use a UniDepth checkpoint"
    return "not a UniDepth checkpoint: it has none of the decoder's keys (pixel_decoder.depth_layer....)"


class _Settings:
    """Values of a nested `config.json`, by dotted path."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def get(self, path: str, default: Any) -> Any:
        value: Any = self._content
        for name in path.split("."):
            if not isinstance(value, Mapping) or value.get(name) is None:
                return default
            value = value[name]
        return value


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many modules of a list there are; `pattern` has its number as the group."""
    found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if found != set(range(len(found))):
        raise ValueError(f"modules {pattern} are not numbered from 0 without gaps")
    return len(found)


def _infer_vit(shapes: Mapping[str, tuple[int, ...]], given: _Settings, version: int) -> ViTConfig:
    dim = shapes["pixel_encoder.cls_token"][-1]
    depth = _count(shapes, r"pixel_encoder\.blocks\.(\d+)\.")
    cells = shapes["pixel_encoder.pos_embed"][1] - 1
    grid = round(cells**0.5)
    if grid * grid != cells:
        raise ValueError(f"a position embedding of {cells} cells is not square")
    if shapes["pixel_encoder.register_tokens"][1] != 1 or given.get("model.pixel_encoder.num_register_tokens", 0):
        raise ValueError("register tokens are not used by any released UniDepth, and not supported")
    known = {24: (5, 12, 18, 24) if version == 1 else (6, 12, 18, 24), 12: (3, 6, 9, 12)}
    ends = given.get("model.pixel_encoder.output_idx", known.get(depth, tuple(depth * i // 4 for i in (1, 2, 3, 4))))
    heads = given.get("model.pixel_encoder.tiny_heads", max(1, dim // 64))
    return ViTConfig(dim, depth, int(heads), tuple(int(end) for end in ends), grid)


def _infer_v2(shapes: Mapping[str, tuple[int, ...]], given: _Settings) -> UniDepthV2Config:
    decoder = "pixel_decoder.depth_layer."
    hidden = shapes[_PROMPT_V2][0]
    widths = [shapes[f"{decoder}ups.{stage}.up.0.weight"][0] for stage in range(3)]
    bounds = "data.augmentations.shape_constraints."
    defaults = SizePolicy()
    ratio = given.get(bounds + "ratio_bounds", defaults.ratio_bounds)
    config = UniDepthV2Config(
        encoder=_infer_vit(shapes, given, version=2),
        hidden=hidden,
        heads=int(given.get("model.num_heads", 8)),
        expansion=shapes[f"{decoder}prompt_camera.0.layers.0.mlp.proj1.weight"][0] // hidden,
        units=tuple(_count(shapes, rf"pixel_decoder\.depth_layer\.ups\.{stage}\.convs\.(\d+)\.") for stage in range(3)),
        min_width=widths[-1] if widths[-1] > hidden // 4 else hidden // 8,  # where it shows, else as released
        kernel=shapes[f"{decoder}ups.0.convs.0.conv1.weight"][-1],
        camera_gain="pixel_decoder.camera_layer.aggregate1.ls1.gamma" in shapes,
        sizes=SizePolicy(
            (float(ratio[0]), float(ratio[1])),
            int(given.get(bounds + "pixels_min", defaults.pixels_min)),
            int(given.get(bounds + "pixels_max", defaults.pixels_max)),
        ),
    )
    return config


def _infer_v1(shapes: Mapping[str, tuple[int, ...]], given: _Settings) -> UniDepthV1Config:
    encoder: ViTConfig | ConvNeXtConfig
    if "pixel_encoder.stem.0.weight" in shapes:
        stages = _count(shapes, r"pixel_encoder\.stages\.(\d+)\.")
        depths = tuple(_count(shapes, rf"pixel_encoder\.stages\.{i}\.blocks\.(\d+)\.") for i in range(stages))
        dims = tuple(shapes[f"pixel_encoder.stages.{i}.blocks.0.conv_dw.weight"][0] for i in range(stages))
        own = tuple(sum(depths[: i + 1]) for i in range(stages))
        ends = given.get("model.pixel_encoder.output_idx", own)
        encoder = ConvNeXtConfig(depths, dims, tuple(int(end) for end in ends))
    else:
        encoder = _infer_vit(shapes, given, version=1)
    decoder = "pixel_decoder.depth_layer."
    hidden = shapes[_PROMPT_V1][0]
    blocks = tuple(_count(shapes, rf"pixel_decoder\.depth_layer\.layers_{stride}\.(\d+)\.") for stride in (16, 8, 4))
    shape = given.get("data.image_shape", (462, 616))
    return UniDepthV1Config(
        encoder=encoder,
        hidden=hidden,
        heads=int(given.get("model.num_heads", 8)),
        expansion=shapes[f"{decoder}prompt_camera.mlp.proj1.weight"][0] // hidden,
        blocks=(blocks[0], blocks[1], blocks[2]),
        image_shape=(int(shape[0]), int(shape[1])),
    )


def official_config(config: UniDepthConfig) -> dict[str, Any]:
    """What `config.json` says of a network, in the official layout; `infer_config` reads it back."""
    encoder = config.encoder
    pixel_encoder: dict[str, Any] = {"output_idx": list(encoder.ends)}
    if isinstance(encoder, ViTConfig):
        pixel_encoder |= {"tiny_heads": encoder.heads}
    model = {"num_heads": config.heads, "expansion": config.expansion, "pixel_encoder": pixel_encoder}
    if isinstance(config, UniDepthV1Config):
        return {"model": {"name": "UniDepthV1", **model}, "data": {"image_shape": list(config.image_shape)}}
    sizes = config.sizes
    constraints = {
        "ratio_bounds": list(sizes.ratio_bounds),
        "pixels_min": sizes.pixels_min,
        "pixels_max": sizes.pixels_max,
    }
    return {
        "model": {"name": "UniDepthV2", **model},
        "data": {"augmentations": {"shape_constraints": constraints}},
    }


# --- loading and saving ----------------------------------------------------------------------------------------------


def create(config: UniDepthConfig) -> Network:
    """A network with random weights."""
    return UniDepthV1(config) if isinstance(config, UniDepthV1Config) else UniDepthV2(config)


def build(loaded: checkpoint.Checkpoint) -> Network:
    """The network of a checkpoint, in float32 and evaluation mode. Raises UserError where it is none of UniDepth."""
    preset = PRESETS.get(loaded.entry.name) if loaded.entry else None
    try:
        config = infer_config(loaded.tensors, loaded.config)
    except UserError as error:
        raise UserError(f"{loaded.origin}: {error}") from None
    if preset is not None and loaded.config is None:
        config = preset
    with torch.device("meta"):
        network = create(config)
    network = network.to_empty(device="cpu").float()
    rows = _compile(V1_MODULES if isinstance(network, UniDepthV1) else V2_MODULES, official_first=False)
    checkpoint.load_into(network, to_ours(loaded.tensors), loaded.origin, lambda key: _rename(key, rows))
    return network.eval()


def load_model(name_or_path: str, device: str | torch.device = "cpu") -> Network:
    """Find, read and build a network.

    Args:
        name_or_path: embedded or official name, hub id, folder, or a .safetensors, .bin or .pth file.
        device: where to put it.

    Raises:
        UserError: nothing answers to the name, or it is no UniDepth checkpoint.
    """
    if re.search(r"v2old", name_or_path) and not re.search(r"[\\/.]", name_or_path):
        raise UserError(f"{name_or_path}: the layout v2old was withdrawn; {near(name_or_path, list(PRESETS))}")
    return build(checkpoint.load(name_or_path, MODELS, "tenfold.depth")).to(device)


def save(network: Network, path: str, metadata: Mapping[str, str] | None = None, half: bool = False) -> None:
    """Write a network in the official layout as safetensors, with its `config` in the header.

    Args:
        network: the network.
        path: the file.
        metadata: further text entries of the header.
        half: store float16.
    """
    tensors = to_official({key: tensor.detach().cpu() for key, tensor in network.state_dict().items()})
    if half:
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    config = json.dumps(official_config(network.config))
    checkpoint.save(path, tensors, {**(metadata or {}), "config": config})


def licence(name_or_path: str) -> str:
    """The licence of a model's weights, as far as it is known."""
    entry = next((entry for entry in MODELS if name_or_path in (entry.name, entry.location)), None)
    return entry.licence if entry else "that of the file"
