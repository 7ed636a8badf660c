"""What UniDepth networks and their released weights are, as plain data. Imports no torch.

Sizes are those of the official release (github.com/lpiccinelli-eth/UniDepth at 8d8cfe4), read from its key lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tenfold.core.config import ModelEntry

PATCH = 14  # pixels a side of a DINOv2 patch


@dataclass(frozen=True)
class ViTConfig:
    """A DINOv2 vision transformer.

    Args:
        dim: channels.
        depth: blocks.
        heads: of attention.
        ends: number of the last block of each of the four groups, counted from 1.
        grid: patches a side of the stored position embedding.
    """

    dim: int = 384
    depth: int = 12
    heads: int = 6
    ends: tuple[int, ...] = (3, 6, 9, 12)
    grid: int = 37

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim: {self.dim} channels do not divide by {self.heads} heads")
        _check_ends(self.ends, self.depth)


@dataclass(frozen=True)
class ConvNeXtConfig:
    """A ConvNeXt.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        ends: number of the last block of each of the four groups, counted from 1 over all stages.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    dims: tuple[int, ...] = (192, 384, 768, 1536)
    ends: tuple[int, ...] = (3, 6, 33, 36)

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims):
            raise ValueError(f"dims: {len(self.dims)} widths for {len(self.depths)} stages")
        _check_ends(self.ends, sum(self.depths))


def _check_ends(ends: tuple[int, ...], depth: int) -> None:
    if len(ends) != 4 or list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] > depth:
        raise ValueError(f"ends: {list(ends)} are not four growing block numbers of {depth} blocks")


@dataclass(frozen=True)
class SizePolicy:
    """Which sizes a V2 network sees.

    Args:
        ratio_bounds: width over height is padded into this range.
        pixels_min: of the network's image.
        pixels_max: of the network's image.
    """

    ratio_bounds: tuple[float, float] = (0.5, 2.5)
    pixels_min: int = 200_000
    pixels_max: int = 600_000

    def __post_init__(self) -> None:
        if not 0 < self.ratio_bounds[0] <= self.ratio_bounds[1]:
            raise ValueError(f"ratio_bounds: {list(self.ratio_bounds)} is no range of ratios")
        if not 0 < self.pixels_min <= self.pixels_max:
            raise ValueError(f"pixels_min: {self.pixels_min} to {self.pixels_max} is no range of pixels")


@dataclass(frozen=True)
class UniDepthV2Config:
    """A UniDepthV2 network.

    Args:
        encoder: the vision transformer.
        hidden: channels of the decoder.
        heads: of its attention blocks.
        expansion: hidden over outer width of its feed-forward layers.
        units: residual units in each of the three upsampling stages.
        min_width: no stage has fewer channels than this (`out_dim` of the official configurations).
        kernel: side of the residual units' convolutions.
        camera_gain: whether the camera's blocks have gains per channel (`layer_scale` above 0).
        sizes: which sizes the network sees.
    """

    encoder: ViTConfig = field(default_factory=ViTConfig)
    hidden: int = 256
    heads: int = 8
    expansion: int = 4
    units: tuple[int, ...] = (2, 2, 2)
    min_width: int = 32
    kernel: int = 3
    camera_gain: bool = True
    sizes: SizePolicy = field(default_factory=SizePolicy)

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden % 8:
            raise ValueError(f"hidden: {self.hidden} channels do not divide by 8 and by {self.heads} heads")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels that leave each upsampling stage."""
        return tuple(max(self.hidden // 2**stage, self.min_width) for stage in range(len(self.units)))


@dataclass(frozen=True)
class UniDepthV1Config:
    """A UniDepthV1 network.

    Args:
        encoder: a vision transformer or a ConvNeXt.
        hidden: channels of the decoder at stride 16.
        heads: of its attention blocks at stride 16; half of them at 8, a quarter at 4.
        expansion: hidden over outer width of its feed-forward layers.
        blocks: attention blocks at strides 16, 8 and 4.
        image_shape: height and width of the network's image.
    """

    encoder: ViTConfig | ConvNeXtConfig = field(default_factory=lambda: ViTConfig(1024, 24, 16, (5, 12, 18, 24)))
    hidden: int = 512
    heads: int = 8
    expansion: int = 4
    blocks: tuple[int, int, int] = (3, 2, 1)
    image_shape: tuple[int, int] = (462, 616)

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % 4:
            raise ValueError(f"hidden: {self.hidden} channels do not divide by {self.heads} heads, or these by 4")


UniDepthConfig: TypeAlias = UniDepthV1Config | UniDepthV2Config

VIT_S = ViTConfig()
VIT_B = ViTConfig(768, 12, 12, (3, 6, 9, 12))
VIT_L = ViTConfig(1024, 24, 16, (6, 12, 18, 24))
VIT_L_V1 = ViTConfig(1024, 24, 16, (5, 12, 18, 24))

# Our own size: it learns on rendered rooms, on one processor.
TINY = UniDepthV2Config(
    ViTConfig(96, 6, 3, (1, 3, 4, 6), grid=16),
    hidden=64,
    heads=4,
    min_width=8,
    sizes=SizePolicy(pixels_min=6_000, pixels_max=9_000),
)

PRESETS: dict[str, UniDepthConfig] = {
    "unidepth-v2-vits14": UniDepthV2Config(VIT_S, 256, min_width=32),
    "unidepth-v2-vitb14": UniDepthV2Config(VIT_B, 384, min_width=48),
    "unidepth-v2-vitl14": UniDepthV2Config(VIT_L, 512, min_width=64),
    "unidepth-v1-vitl14": UniDepthV1Config(VIT_L_V1),
    "unidepth-v1-cnvnxtl": UniDepthV1Config(ConvNeXtConfig()),
    "tenfold-depth-tiny": TINY,
}

PARAMETERS = {  # counted on the official code
    "unidepth-v2-vits14": 34_184_323,
    "unidepth-v2-vitb14": 114_421_379,
    "unidepth-v2-vitl14": 353_831_043,
    "unidepth-v1-vitl14": 347_004_802,
    "unidepth-v1-cnvnxtl": 238_895_490,
}

_SUMMARIES = {
    "unidepth-v2-vits14": "UniDepthV2 ViT-S: the quickest, trained on 16 M images by the authors",
    "unidepth-v2-vitb14": "UniDepthV2 ViT-B, trained on 16 M images by the authors",
    "unidepth-v2-vitl14": "UniDepthV2 ViT-L: the most exact, trained on 16 M images by the authors",
    "unidepth-v1-vitl14": "UniDepthV1 ViT-L, trained on 3 M images by the authors",
    "unidepth-v1-cnvnxtl": "UniDepthV1 ConvNeXt-L, trained on 3 M images by the authors",
}

OFFICIAL_MODELS = tuple(
    ModelEntry(
        name=name,
        room="depth",
        summary=summary,
        source="hub",
        location=f"lpiccinelli/{name}",
        parameters=PARAMETERS[name],
        licence="CC BY-NC 4.0 (authors' release; not for commercial use)",
    )
    for name, summary in _SUMMARIES.items()
)

EMBEDDED_MODELS = (
    ModelEntry(
        name="tenfold-depth-tiny",
        room="depth",
        summary="small UniDepthV2, trained by this project on rendered rooms: shows how it works, not for measuring",
        source="embedded",
        location="tenfold-depth-tiny.safetensors",
        parameters=1_520_995,
        licence="Apache-2.0",
        bytes=3_072_574,
        card="README.md#model-card",
    ),
)

MODELS = EMBEDDED_MODELS + OFFICIAL_MODELS


@dataclass(frozen=True)
class SceneConfig:
    """What the rooms hold.

    Args:
        pieces: of furniture, at most; one that would stand on the camera is left out.
        wall_pieces: doors and pictures.
        balls: spheres and ellipsoids on the floor.
        texture: `ruled` has floor tiles of 0.4 m and wall courses of 0.3 m; `varied` has any pattern of any size on
            any surface.
        shadows: cast the first lamp's shadows, for twice the time.
        noise: standard deviation of the sensor's noise, of 1.
        height_m: range of the camera's height.
        pitch_deg: range of the camera's pitch; negative looks down.
        roll_deg: the camera's roll is within plus and minus this.
    """

    pieces: int = 5
    wall_pieces: int = 1
    balls: int = 1
    texture: Literal["ruled", "varied"] = "ruled"
    shadows: bool = False
    noise: float = 0.02
    height_m: tuple[float, float] = (1.2, 1.8)
    pitch_deg: tuple[float, float] = (-20.0, 11.0)
    roll_deg: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """How a V2 network is trained.

    Args:
        steps: optimiser steps.
        batch_size: pictures a step, two views of a scene side by side.
        sizes: height and width of the pictures, of which each batch draws one; multiples of 14.
        recipe: `paper` or `release`, see `losses.py`.
        learning_rate: AdamW's.
        encoder_rate: the encoder's, as a share of it (the papers: a tenth; 1 for an encoder that starts from nothing).
        weight_decay: of matrices and kernels; the rest has none.
        schedule: `paper` is constant for 30 percent and then a cosine to a tenth; `cosine` warms up and falls to zero.
        given_share: share of the steps in which the decoder is prompted with the true rays; its own in the others.
        fov_deg: horizontal fields of view of rendered pictures.
        zoom: between the two views of a scene at most, as a power of two.
        shift: of the principal point from the middle at most, in image sizes.
        clip_norm: bound on the gradient norm.
        ema_decay: of the averaged weights; 0 keeps none.
        seed: of weights, scenes and augmentation.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        checkpoint_every: steps between checkpoints.
        workers: processes that prepare pictures.
    """

    steps: int = 300_000
    batch_size: int = 128
    sizes: tuple[tuple[int, int], ...] = ((462, 616), (518, 518), (378, 686))
    recipe: Literal["paper", "release"] = "release"
    learning_rate: float = 5e-5
    encoder_rate: float = 0.1
    weight_decay: float = 0.1
    schedule: Literal["paper", "cosine"] = "paper"
    given_share: float = 0.5
    fov_deg: tuple[float, float] = (35.0, 105.0)
    zoom: float = 1.0
    shift: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.9995
    seed: int = 0
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size: {self.batch_size} is not made of pairs of views")
        if not self.sizes or any(side < 2 * PATCH or side % PATCH for size in self.sizes for side in size):
            raise ValueError(f"sizes: sides are multiples of {PATCH} from {2 * PATCH} on, not {list(self.sizes)}")
        if not 0 < self.fov_deg[0] <= self.fov_deg[1] < 170:
            raise ValueError(f"fov_deg: {list(self.fov_deg)} is no range of pinhole cameras (0 to 170)")
        if not 0 <= self.given_share <= 1:
            raise ValueError(f"given_share: {self.given_share} is no share")


@dataclass(frozen=True)
class Recipe:
    """A network, the way it is trained, and the rooms that it is trained on where no frames are given."""

    model: UniDepthV2Config
    train: TrainConfig
    scenes: SceneConfig


RECIPES = {
    "paper": Recipe(UniDepthV2Config(), TrainConfig(), SceneConfig()),
    "tenfold-depth-tiny": Recipe(
        TINY,
        TrainConfig(
            steps=1500,
            batch_size=8,
            sizes=((70, 98), (84, 84), (56, 112)),
            recipe="paper",
            learning_rate=1e-3,
            encoder_rate=1.0,
            weight_decay=0.05,
            schedule="cosine",
            ema_decay=0.998,
            checkpoint_every=200,
            evaluate_every=500,
        ),
        SceneConfig(pieces=6, balls=1, texture="varied", roll_deg=3.0),
    ),
}
