"""Official HiT-SR checkpoints <-> ours, and what a checkpoint says of its own architecture.

A checkpoint tells what it is: variant, widths, depths and scale follow from its keys and shapes. The two key layouts
differ by the tables `LAYER_PARTS` and `TOP_PARTS`, and by the 1x1 convolutions, which are linear layers here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tenfold.core import checkpoint
from tenfold.core.console import UserError
from tenfold.superres.config import MODELS, HiTConfig, Variant
from tenfold.superres.model import HiT, relative_position_index

OFFICIAL_LAYER = r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\."
OUR_LAYER = r"blocks\.(\d+)\.layers\.(\d+)\."

# (official, ours) below a layer, whole dotted prefixes.
LAYER_PARTS = (
    ("correlation.qv.conv.0", "correlation.features.squeeze"),
    ("correlation.qv.conv.2", "correlation.features.spatial"),
    ("correlation.qv.conv.4", "correlation.features.expand"),
    ("correlation.qv.linear", "correlation.features.linear"),
    ("correlation.ngram_window_partition.ngram_context.unigram_embed", "correlation.context.unigram"),
    ("correlation.ngram_window_partition.ngram_context.ngram_attn", "correlation.context.attention"),
    ("correlation.ngram_window_partition.ngram_context.merge", "correlation.context.merge"),
    ("correlation.pos", "correlation.position_bias"),
    ("mlp.dwconv.depthwise_conv.0", "mlp.depthwise"),
)
# (official, ours) at the top, whole dotted prefixes; the head's names depend on which head it is.
TOP_PARTS = (("patch_embed.norm", "patch_norm"),)
POINTWISE = ("features.squeeze.weight", "features.expand.weight", "features.linear.weight", "context.merge.weight")
INDEX_BUFFER = "correlation.ngram_window_partition.ngram_context.ngram_attn.relative_position_index"
HEAD_MODULES = ("conv_before_upsample", "upsample", "conv_up1", "conv_up2", "conv_hr", "conv_last")


def to_ours(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under our names; 1x1 convolutions lose their two unit axes, index buffers are left out."""
    direct = "conv_before_upsample.0.weight" not in official
    ours = {}
    for key, tensor in official.items():
        if key.endswith("ngram_attn.relative_position_index"):
            continue
        name = _rename_to_ours(key, direct)
        pointwise = name.endswith(POINTWISE) and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
        ours[name] = tensor.flatten(1) if pointwise else tensor
    return ours


def to_official(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the official names and shapes, index buffers of HiT-SNG included; the inverse of `to_ours`."""
    official = {}
    for key, tensor in ours.items():
        name = _rename_to_official(key)
        official[name] = tensor[:, :, None, None] if key.endswith(POINTWISE) else tensor
        if key.endswith("context.attention.qkv.weight"):
            layer = re.match(OUR_LAYER, key)
            assert layer is not None
            official[f"layers.{layer[1]}.residual_group.blocks.{layer[2]}.{INDEX_BUFFER}"] = relative_position_index(2)
    return official


def _rename_to_ours(key: str, direct: bool) -> str:
    layer = re.match(OFFICIAL_LAYER, key)
    if layer:
        return f"blocks.{layer[1]}.layers.{layer[2]}." + _swap(key[layer.end() :], LAYER_PARTS)
    key = re.sub(r"^layers\.(\d+)\.conv\.", r"blocks.\1.conv.", key)
    if direct and key.startswith("upsample.0."):
        return key.replace("upsample.0.", "reconstruction.0.", 1)
    if key.split(".", 1)[0] in HEAD_MODULES:
        return f"reconstruction.{key}"
    return _swap(key, TOP_PARTS)


def _rename_to_official(key: str) -> str:
    layer = re.match(OUR_LAYER, key)
    if layer:
        prefix = f"layers.{layer[1]}.residual_group.blocks.{layer[2]}."
        return prefix + _swap(key[layer.end() :], tuple((ours, official) for official, ours in LAYER_PARTS))
    key = re.sub(r"^blocks\.(\d+)\.conv\.", r"layers.\1.conv.", key)
    key = re.sub(r"^reconstruction\.0\.", "upsample.0.", key)
    return _swap(key.removeprefix("reconstruction."), tuple((ours, official) for official, ours in TOP_PARTS))


def _swap(key: str, parts: tuple[tuple[str, str], ...]) -> str:
    for old, new in parts:
        if key.startswith(old + "."):
            return new + key[len(old) :]
    return key


def infer_config(official: Mapping[str, Tensor], given: Mapping[str, Any] | None = None) -> HiTConfig:
    """The architecture of a checkpoint in the official layout, from its keys and shapes.

    Args:
        official: tensors by official key.
        given: constructor arguments from a `config.json` beside it (official names), where there is one. They decide
            what shapes cannot tell: the base window, and window ratios of 1 and below.

    Raises:
        UserError: not a HiT-SR checkpoint, or one whose windows the shapes leave open and no config.json settles.
    """
    given = dict(given or {})
    shapes = {key: tuple(tensor.shape) for key, tensor in official.items()}
    for required in (
        "conv_first.weight",
        "layers.0.residual_group.blocks.0.correlation.qv.linear.weight",
        "norm.weight",
    ):
        if required not in shapes:
            raise UserError(_not_hit(shapes, required))
    depths = _depths(shapes)
    layer0 = "layers.0.residual_group.blocks.0."
    variant: Variant = (
        "srf"
        if f"{layer0}mlp.dwconv.depthwise_conv.0.weight" in shapes
        else "sng"
        if f"{layer0}{INDEX_BUFFER}" in shapes or f"{layer0}{_UNIGRAM}" in shapes
        else "sir"
    )
    try:
        width, channels = shapes["conv_first.weight"][:2]
        reconstruction, scale = _reconstruction(shapes, channels, given)
        base = _pair(given.get("base_win_size", (8, 8)))
        return HiTConfig(
            variant=variant,
            scale=scale,
            channels=channels,
            width=width,
            depths=depths,
            heads=tuple(
                shapes[f"layers.{block}.residual_group.blocks.0.correlation.pos.pos3.2.weight"][0]
                for block in range(len(depths))
            ),
            base_window=base,
            window_ratios=_window_ratios(shapes, max(depths), depths.index(max(depths)), base, given),
            mlp_ratio=shapes[f"{layer0}mlp.fc1.weight"][0] / width,
            reconstruction=reconstruction,
            residual_convolution="1conv" if "layers.0.conv.weight" in shapes else "3conv",
            image_range=float(given.get("img_range", 1.0)),
        )
    except KeyError as error:
        raise UserError(_not_hit(shapes, str(error.args[0]))) from None
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # of shapes, or of what config.json holds
        raise UserError(f"the checkpoint's shapes do not make a HiT-SR network: {error}") from None


_UNIGRAM = "correlation.ngram_window_partition.ngram_context.unigram_embed.weight"


def _not_hit(shapes: Mapping[str, tuple], missing: str) -> str:
    found = ", ".join(list(shapes)[:3])
    return f"not a HiT-SR checkpoint: key {missing!r} is missing (it begins with: {found})"


def _depths(shapes: Mapping[str, tuple]) -> tuple[int, ...]:
    layers: dict[int, int] = {}
    for key in shapes:
        match = re.match(OFFICIAL_LAYER, key)
        if match:
            layers[int(match[1])] = max(layers.get(int(match[1]), 0), int(match[2]) + 1)
    return tuple(layers[block] for block in sorted(layers))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[1])


def _reconstruction(shapes: Mapping[str, tuple], channels: int, given: Mapping[str, Any]) -> tuple[Any, int]:
    if "conv_hr.weight" in shapes:
        return "nearest+conv", 4
    if "conv_before_upsample.0.weight" in shapes:
        stages = [shape for key, shape in shapes.items() if re.fullmatch(r"upsample\.\d+\.weight", key)]
        return "pixelshuffle", math.prod(math.isqrt(shape[0] // shape[1]) for shape in stages)
    scale = math.isqrt(shapes["upsample.0.weight"][0] // channels)
    if channels * scale**2 != shapes["upsample.0.weight"][0]:
        raise ValueError(
            f"upsample.0.weight has {shapes['upsample.0.weight'][0]} outputs, which is no {channels} x scale^2"
        )
    return "pixelshuffledirect", scale


def _window_ratios(
    shapes: Mapping[str, tuple], depth: int, block: int, base: tuple[int, int], given: Mapping[str, Any]
) -> tuple[float, ...]:
    """Window ratios of the deepest block: from config.json, else from HiT-SNG's unigram kernels, else by cell area."""
    layers = [f"layers.{block}.residual_group.blocks.{layer}." for layer in range(depth)]
    if "hier_win_ratios" in given:
        ratios = tuple(float(ratio) for ratio in given["hier_win_ratios"])
    elif f"{layers[0]}{_UNIGRAM}" in shapes:
        return tuple(shapes[f"{layer}{_UNIGRAM}"][2] / base[0] for layer in layers)
    else:
        ratios = HiTConfig().window_ratios
    found = [shapes[f"{layer}correlation.spatial_linear.weight"][1] for layer in layers]
    expected = [max(1, int(ratio)) ** 2 for ratio in ratios[:depth]]
    if found == expected:
        return ratios
    if "hier_win_ratios" in given:
        raise ValueError(
            f"hier_win_ratios {list(ratios)} ask for cells of {expected} pixels, but the weights have {found}"
        )
    # A cell of one pixel fits every window up to the base, a larger one only its own.
    if min(found) > 1:
        return tuple(float(math.isqrt(pixels)) for pixels in found)
    raise UserError(
        f"the window sizes cannot be told from the shapes alone (cells of {found} pixels; 1 may be ratio 0.5 or 1): "
        'put a config.json with "hier_win_ratios" beside the checkpoint'
    )


def load_model(name_or_path: str, device: str | torch.device = "cpu", config: Mapping[str, Any] | None = None) -> HiT:
    """Build and fill a network from an embedded name, an official name, a hub id or a file.

    Args:
        name_or_path: `tenfold-x2`, `hit-srf-x4`, `owner/repository`, or a path to .safetensors / .pth.
        device: where to put it.
        config: official constructor arguments that shapes cannot tell (such as `hier_win_ratios`), for a file without a
            config.json; they win over the file's own.

    Returns:
        The network in evaluation mode.

    Raises:
        UserError: unknown name, unreadable or foreign file, missing or extra keys, shapes that do not fit.
    """
    loaded = checkpoint.load(name_or_path, MODELS, "tenfold.superres")
    return build(loaded, config).to(device)


def build(loaded: checkpoint.Checkpoint, given: Mapping[str, Any] | None = None) -> HiT:
    """A network in evaluation mode from tensors in the official layout, or in ours (the checkpoints of a run)."""
    ours = any(re.match(OUR_LAYER, key) for key in loaded.tensors)
    official = to_official(loaded.tensors) if ours else loaded.tensors
    try:
        config = infer_config(official, {**(loaded.config or {}), **(given or {})})
    except UserError as error:
        raise UserError(f"{loaded.origin}: {error}") from None
    model = HiT(config)
    checkpoint.load_into(model, to_ours(official), loaded.origin, str if ours else _rename_to_official)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. Windows are (height, width) in pixels, one for each layer of a block."""

    origin: str
    architecture: str
    scale: int
    channels: int
    parameters: int
    bytes: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    reconstruction: str
    licence: str


def inspect_checkpoint(name_or_path: str) -> Inspection:
    """Say what a checkpoint is; arguments and errors as `load_model`, which is as strict."""
    loaded = checkpoint.load(name_or_path, MODELS, "tenfold.superres")
    model = build(loaded)
    config = model.config
    return Inspection(
        origin=loaded.origin,
        architecture=f"HiT-{config.variant.upper()}",
        scale=config.scale,
        channels=config.channels,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in loaded.tensors.values()),
        width=config.width,
        depths=config.depths,
        heads=config.heads,
        windows=config.windows,
        reconstruction=config.reconstruction,
        licence=licence(loaded),
    )


def licence(loaded: checkpoint.Checkpoint) -> str:
    """Licence of weights: of their table entry, else as the file states it."""
    return loaded.entry.licence if loaded.entry else loaded.metadata.get("licence", "not stated in the file")


def official_arguments(config: HiTConfig) -> dict[str, Any]:
    """The constructor arguments of the official code, as in the hub's config.json."""
    return {
        "upscale": config.scale,
        "in_chans": config.channels,
        "img_size": 64,
        "base_win_size": list(config.base_window),
        "img_range": config.image_range,
        "depths": list(config.depths),
        "embed_dim": config.width,
        "num_heads": list(config.heads),
        "mlp_ratio": config.mlp_ratio,
        "upsampler": config.reconstruction,
        "resi_connection": config.residual_convolution,
        "hier_win_ratios": list(config.window_ratios),
    }


def save_model(
    path: Any, model: HiT, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a network in the official layout, its constructor arguments in the file's metadata.

    Args:
        path: .safetensors file to write (atomically).
        model: the network.
        metadata: further strings for the header (licence, recipe ...).
        dtype: store floating-point weights in this type (torch.float16 halves the file).
    """
    import json

    tensors = {
        key: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for key, tensor in to_official(dict(model.named_parameters())).items()
    }
    header = {"config": json.dumps(official_arguments(dataclasses.replace(model.config))), **(metadata or {})}
    checkpoint.save(path, tensors, header)
