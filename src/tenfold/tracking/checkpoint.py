"""Official MASA checkpoints <-> ours, and what a checkpoint says of its own architecture.

The two layouts differ by names only; `NAMES` is the whole table. Tensors below `detector.` are a frozen foundation
model inside the file (SAM, Swin); they are handed on untouched, for whoever builds that model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tenfold.core import checkpoint
from tenfold.core.config import from_mapping
from tenfold.core.console import UserError
from tenfold.tracking.config import MODELS, Backbone, Fusion, MasaConfig
from tenfold.tracking.model import Masa

# (official, ours): whole dotted prefixes, `#` is a number.
NAMES = (
    ("masa_adapter.0.fpn1.1.ln", "pyramid.up4.1.norm"),
    ("masa_adapter.0.fpn1", "pyramid.up4"),
    ("masa_adapter.0.fpn2.0", "pyramid.up2"),
    ("masa_adapter.0.lateral_convs.#.conv", "pyramid.lateral.#.conv"),
    ("masa_adapter.0.lateral_convs.#.bn", "pyramid.lateral.#.norm"),
    ("masa_adapter.0.fpn_convs.#.conv", "pyramid.output.#.conv"),
    ("masa_adapter.0.fpn_convs.#.bn", "pyramid.output.#.norm"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_offset", "fusion.blocks.#.offset"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_high.norm", "fusion.blocks.#.high.norm"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_mid.norm", "fusion.blocks.#.mid.norm"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_low.norm", "fusion.blocks.#.low.norm"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_high.conv", "fusion.blocks.#.high"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_mid.conv", "fusion.blocks.#.mid"),
    ("masa_adapter.1.dyhead_blocks.#.spatial_conv_low.conv", "fusion.blocks.#.low"),
    ("masa_adapter.1.dyhead_blocks.#.scale_attn_module.1", "fusion.blocks.#.scale_attention"),
    ("masa_adapter.1.dyhead_blocks.#.task_attn_module.conv1.conv", "fusion.blocks.#.task_attention.squeeze"),
    ("masa_adapter.1.dyhead_blocks.#.task_attn_module.conv2.conv", "fusion.blocks.#.task_attention.expand"),
    ("rpn_head.rpn_conv", "rpn.conv"),
    ("rpn_head.rpn_cls", "rpn.objectness"),
    ("rpn_head.rpn_reg", "rpn.shift"),
    ("roi_head.bbox_head.shared_convs.#.conv", "rcnn.convs.#.conv"),
    ("roi_head.bbox_head.shared_convs.#.bn", "rcnn.convs.#.norm"),
    ("roi_head.bbox_head.shared_fcs", "rcnn.layers"),
    ("roi_head.bbox_head.fc_cls", "rcnn.classify"),
    ("roi_head.bbox_head.fc_reg", "rcnn.shift"),
    ("track_head.embed_head.convs.#.conv", "track_head.convs.#.conv"),
    ("track_head.embed_head.convs.#.gn", "track_head.convs.#.norm"),
    ("track_head.embed_head.fcs.0", "track_head.hidden"),
    ("track_head.embed_head.fc_embed", "track_head.embed"),
)
FOUNDATION = "detector."
OFFSETS: dict[int, Fusion] = {81: "deform", 27: "dyhead"}


Rules = list[tuple[re.Pattern[str], str]]


def rules(names: Iterable[tuple[str, str]]) -> Rules:
    """A table of (old, new) dotted prefixes, `#` being a number, made ready for `renamed`."""
    return [
        (re.compile("^" + re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.)"), new.replace("#", r"\1"))
        for old, new in names
    ]


def renamed(key: str, table: Rules) -> str:
    """A key under the first rule that fits; one that no rule knows is returned as it is."""
    for pattern, replacement in table:
        found, count = pattern.subn(replacement, key)
        if count:
            return found
    return key


_TO_OURS = rules(NAMES)
_TO_OFFICIAL = rules((ours, official) for official, ours in NAMES)


def our_name(official: str) -> str:
    """Our name of an official key; an unknown one is returned as it is."""
    return renamed(official, _TO_OURS)


def official_name(ours: str) -> str:
    """The official name of one of our keys; the inverse of `our_name`."""
    return renamed(ours.replace("pyramid.top_down.", "pyramid."), _TO_OFFICIAL)


def to_ours(official: Mapping[str, Tensor], config: MasaConfig) -> dict[str, Tensor]:
    """Official tensors under our names, without the foundation model's."""
    ours = {our_name(key): tensor for key, tensor in official.items() if not key.startswith(FOUNDATION)}
    if config.pyramid == "simple":
        ours = {re.sub(r"^pyramid\.(lateral|output)\.", r"pyramid.top_down.\1.", key): t for key, t in ours.items()}
    return ours


def to_official(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the official names; the inverse of `to_ours`."""
    return {official_name(key): tensor for key, tensor in ours.items()}


def infer_config(official: Mapping[str, Tensor]) -> MasaConfig:
    """The architecture of a checkpoint in the official layout, from its keys and shapes.

    Shapes do not tell the groups of the GroupNorms: they are the released ones, 16 and 32.

    Raises:
        UserError: not a MASA checkpoint, or one of an unknown kind of fusion.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in official.items()}
    offset = "masa_adapter.1.dyhead_blocks.0.spatial_conv_offset.weight"
    try:
        fusion = OFFSETS.get(shapes[offset][0])
        if fusion is None:
            raise UserError(
                f"{offset} has {shapes[offset][0]} outputs: neither 81 (DeformFusion) nor 27 (DyHead) is MASA's fusion"
            )
        in_channels = tuple(
            shapes[f"masa_adapter.0.lateral_convs.{level}.conv.weight"][1]
            for level in range(_count(shapes, r"masa_adapter\.0\.lateral_convs\.(\d+)\."))
        )
        simple = "masa_adapter.0.fpn1.0.weight" in shapes
        backbone: Backbone = "resnet50" if "backbone.conv1.weight" in shapes else "sam" if simple else "swin-b"
        head = "track_head.embed_head."
        return MasaConfig(
            backbone=backbone,
            pyramid="simple" if simple else "fpn",
            fusion=fusion,
            in_channels=in_channels,
            strides=(8, 16, 32) if len(in_channels) == 3 else (4, 8, 16, 32),
            width=shapes["masa_adapter.0.lateral_convs.0.conv.weight"][0],
            fusion_blocks=_count(shapes, r"masa_adapter\.1\.dyhead_blocks\.(\d+)\."),
            head_convolutions=_count(shapes, r"track_head\.embed_head\.convs\.(\d+)\."),
            head_hidden=shapes[f"{head}fcs.0.weight"][0],
            embedding=shapes[f"{head}fc_embed.weight"][0],
            rcnn_convolutions=_count(shapes, r"roi_head\.bbox_head\.shared_convs\.(\d+)\."),
            rcnn_layers=_count(shapes, r"roi_head\.bbox_head\.shared_fcs\.(\d+)\."),
            # The benchmark's size; the demo of the GroundingDINO variant and Detic's own pipeline see larger pictures.
            short_side=1024,
            long_side=1024,
        )
    except KeyError as error:
        found = ", ".join(list(shapes)[:3])
        raise UserError(f"not a MASA checkpoint: key {error.args[0]!r} is missing (it begins with: {found})") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"the checkpoint's shapes do not make a MASA network: {error}") from None


def _count(shapes: Mapping[str, object], pattern: str) -> int:
    """Highest number in a group of keys, plus one; 0 where there is none."""
    return max((int(match[1]) + 1 for key in shapes if (match := re.match(pattern, key))), default=0)


@dataclass(frozen=True)
class Loaded:
    """A network and what came with it.

    Attributes:
        model: the network in evaluation mode.
        foundation: tensors of the frozen foundation model inside the file, without the prefix `detector.`.
        origin: where the weights came from, for a person.
        licence: of the weights.
    """

    model: Masa
    foundation: dict[str, Tensor]
    origin: str
    licence: str


def load(name_or_path: str, device: str | torch.device = "cpu", proposals: bool = False) -> Loaded:
    """Build and fill a network from an embedded name, an official name, a hub id or a file.

    Args:
        name_or_path: `masa-tiny`, `masa-r50`, `owner/repository`, or a path to .safetensors / .pth.
        device: where to put it.
        proposals: also build the head that proposes boxes, which tracking of given boxes does not need.

    Raises:
        UserError: unknown name, unreadable or foreign file, missing or extra keys, shapes that do not fit.
    """
    found = checkpoint.load(name_or_path, MODELS, "tenfold.tracking")
    loaded = build(found, proposals)
    return replace(loaded, model=loaded.model.to(device))


def build(found: checkpoint.Checkpoint, proposals: bool = False) -> Loaded:
    """A network from tensors in the official layout, or in ours with its configuration in the header."""
    official = not any(key.startswith(("pyramid.", "fusion.")) for key in found.tensors)
    try:
        if official:
            config = infer_config(found.tensors)
        elif found.config is None:
            raise UserError("holds a network of this project but not its configuration")
        else:
            config = from_mapping(MasaConfig, found.config, found.origin)
    except UserError as error:
        raise UserError(f"{found.origin}: {error}") from None
    tensors = to_ours(found.tensors, config) if official else dict(found.tensors)
    if config.rcnn_layers and not proposals:
        config = replace(config, rcnn_layers=0)
        tensors = {key: value for key, value in tensors.items() if not key.startswith(("rpn.", "rcnn."))}
    model = Masa(config)
    checkpoint.load_into(model, tensors, found.origin, official_name if official else str)
    foundation = {
        key.removeprefix(FOUNDATION): value for key, value in found.tensors.items() if key.startswith(FOUNDATION)
    }
    licence = found.entry.licence if found.entry else found.metadata.get("licence", "not stated in the file")
    return Loaded(model.eval(), foundation, found.origin, licence)


def header(config: MasaConfig) -> dict[str, str]:
    """What a weights file in our layout says of its network."""
    return {"config": json.dumps(asdict(config))}


def save_model(path: Path | str, model: Masa, metadata: Mapping[str, str] | None = None, half: bool = False) -> None:
    """Write a network in our layout, its configuration in the header.

    Args:
        path: .safetensors file to write (atomically).
        model: the network.
        metadata: further strings for the header (licence, recipe ...).
        half: store floating-point weights as float16.
    """
    tensors = {}
    for key, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        tensors[key] = value.half() if half and value.is_floating_point() else value
    checkpoint.save(path, tensors, {**header(model.config), **(metadata or {})})
