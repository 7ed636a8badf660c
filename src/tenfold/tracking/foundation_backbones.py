"""The frozen foundation models below MASA's other variants: SAM's ViT by transformers, Swin by torchvision.

Their weights lie in the official MASA files themselves, under the names of segment-anything and of mmdet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tenfold.core.checkpoint import load_into
from tenfold.core.console import UserError
from tenfold.tracking.checkpoint import renamed, rules
from tenfold.tracking.config import MasaConfig

Maps = Callable[[Tensor], list[Tensor]]

# (segment-anything, transformers) below the image encoder.
SAM_RULES = rules(
    (
        ("patch_embed.proj", "patch_embed.projection"),
        ("blocks.#.norm1", "layers.#.layer_norm1"),
        ("blocks.#.norm2", "layers.#.layer_norm2"),
        ("blocks.#", "layers.#"),
        ("neck.0", "neck.conv1"),
        ("neck.1", "neck.layer_norm1"),
        ("neck.2", "neck.conv2"),
        ("neck.3", "neck.layer_norm2"),
    )
)
SAM_HEADS = {768: 12, 1024: 16, 1280: 16}
SWIN_HEADS = {96: (3, 6, 12, 24), 128: (4, 8, 16, 32), 192: (6, 12, 24, 48)}
# (below a block in mmdet, below a block in torchvision)
SWIN_BLOCK = (
    ("attn.w_msa.", "attn."),
    ("ffn.layers.0.0.", "mlp.0."),
    ("ffn.layers.1.", "mlp.3."),
)


def open_backbone(config: MasaConfig, tensors: Mapping[str, Tensor], device: torch.device) -> Maps | None:
    """The foundation model of a network, ready to run; None for networks with a backbone of their own.

    Args:
        config: the network.
        tensors: what the file holds below `detector.`.
        device: where to run.

    Returns:
        A function from a picture (B x 3 x H x W, normalised) to the maps that `Masa.features` takes.

    Raises:
        UserError: the file does not hold the model's weights, or they do not fit.
    """
    if config.backbone not in ("sam", "swin-b"):
        return None
    encoder = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    if not encoder:
        raise UserError(
            f"the file holds MASA's adapter but not its frozen {config.backbone} backbone (keys `detector.backbone.`): "
            "use the file of the authors' release, which has both"
        )
    try:
        build = sam_backbone if config.backbone == "sam" else swin_backbone
        return build(encoder, device)
    except (KeyError, IndexError) as error:
        raise UserError(f"the frozen {config.backbone} backbone in the file lacks {error}") from None


def sam_backbone(tensors: Mapping[str, Tensor], device: torch.device) -> Maps:
    """SAM's image encoder: raw outputs of its four global-attention blocks at stride 16, not the neck's."""
    try:
        from transformers import SamVisionConfig, SamVisionModel
    except ImportError:
        raise UserError("transformers is not installed: run pip install 'tenfold[foundation]'") from None
    width = tensors["pos_embed"].shape[-1]
    depth = 1 + max(int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key)))
    taken = [depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4)]
    network = SamVisionModel(
        SamVisionConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=SAM_HEADS[width],
            global_attn_indexes=taken,
            image_size=16 * tensors["pos_embed"].shape[1],
            mlp_dim=tensors["blocks.0.mlp.lin1.weight"].shape[0],
        )
    )
    ours = {"vision_encoder." + renamed(key, SAM_RULES): value for key, value in tensors.items()}
    load_into(network, ours, "SAM's image encoder in the file")
    network.eval().requires_grad_(False).to(device)

    def run(image: Tensor) -> list[Tensor]:
        states = network(image, output_hidden_states=True).hidden_states  # depth + 1 of B x H x W x C
        return [states[block + 1].permute(0, 3, 1, 2) for block in taken]

    return run


class _SwinMaps(nn.Module):
    """torchvision's Swin without its classifier; the outputs of stages 2, 3, 4, each through a LayerNorm."""

    def __init__(self, width: int, depths: list[int], window: int) -> None:
        super().__init__()
        from torchvision.models.swin_transformer import SwinTransformer

        network = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=width,
            depths=depths,
            num_heads=list(SWIN_HEADS[width]),
            window_size=[window, window],
            stochastic_depth_prob=0.0,
        )
        self.features = network.features
        self.norms = nn.ModuleList(nn.LayerNorm(width * 2**stage) for stage in (1, 2, 3))

    def forward(self, image: Tensor) -> list[Tensor]:
        """B x 3 x H x W to maps at strides 8, 16, 32."""
        x, maps = image, []
        for index, part in enumerate(self.features):
            x = part(x)  # B x H x W x C from the first on
            if index in (3, 5, 7):
                maps.append(self.norms[(index - 3) // 2](x).permute(0, 3, 1, 2))
        return maps


def swin_backbone(tensors: Mapping[str, Tensor], device: torch.device) -> Maps:
    """Swin in mmdet's layout (Detic, GroundingDINO): maps at strides 8, 16, 32."""
    width = tensors["patch_embed.projection.weight"].shape[0]
    depths = [
        1 + max(int(m[1]) for key in tensors if (m := re.match(rf"stages\.{stage}\.blocks\.(\d+)\.", key)))
        for stage in range(4)
    ]
    table = tensors["stages.0.blocks.0.attn.w_msa.relative_position_bias_table"]
    window = (round(table.shape[0] ** 0.5) + 1) // 2
    network = _SwinMaps(width, depths, window)
    # norm0 is of the stage at stride 4, which is not used.
    used = {key: value for key, value in tensors.items() if not key.startswith("norm0.")}
    ours = {_swin_name(key): _swin_value(key, value) for key, value in used.items()}
    indices = {k: v for k, v in network.state_dict().items() if k.endswith("relative_position_index")}
    load_into(network, {**ours, **indices}, "the Swin backbone in the file")
    network.eval().requires_grad_(False).to(device)
    return network


def _swin_name(key: str) -> str:
    """torchvision's name of one of mmdet's keys."""
    for old, new in (
        ("patch_embed.projection.", "features.0.0."),
        ("patch_embed.norm.", "features.0.2."),
        *((f"norm{stage}.", f"norms.{stage - 1}.") for stage in (1, 2, 3)),
    ):
        if key.startswith(old):
            return new + key[len(old) :]
    block = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", key)
    if block:
        rest = block[3]
        for old, new in SWIN_BLOCK:
            if rest.startswith(old):
                rest = new + rest[len(old) :]
        return f"features.{1 + 2 * int(block[1])}.{block[2]}.{rest}"
    merge = re.match(r"stages\.(\d+)\.downsample\.(.*)", key)
    return f"features.{2 + 2 * int(merge[1])}.{merge[2]}" if merge else key


def _swin_value(key: str, value: Tensor) -> Tensor:
    """Patch merging goes channel by channel in mmdet, and pixel by pixel, columns first, in torchvision."""
    if ".downsample." not in key:
        return value
    channels = value.shape[-1] // 4
    by_pixel = value.reshape(*value.shape[:-1], channels, 4)[..., [0, 2, 1, 3]]
    return by_pixel.transpose(-1, -2).reshape(value.shape)
