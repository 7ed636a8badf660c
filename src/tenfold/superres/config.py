"""What a HiT-SR network, its training and its released weights are, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tenfold.core.config import ModelEntry

Variant = Literal["sir", "srf", "sng"]
Reconstruction = Literal["pixelshuffledirect", "pixelshuffle", "nearest+conv"]
ResidualConvolution = Literal["1conv", "3conv"]


@dataclass(frozen=True)
class HiTConfig:
    """Hyper-parameters of one HiT-SR network (paper section 3; defaults are the released ones).

    Attributes:
        variant: `sir` (HiT-SIR, plain feed-forward), `srf` (HiT-SRF, feed-forward with a 5x5 depthwise convolution) or
            `sng` (HiT-SNG, N-gram window context).
        scale: upscaling factor s.
        channels: colour channels of the image (3, or 1 for grey).
        width: feature channels C, a multiple of 2 * heads.
        depths: layers in each block.
        heads: heads of the spatial self-correlation, one number a block.
        base_window: base window (height, width) in pixels.
        window_ratios: window of layer j of every block, as a multiple of the base window.
        mlp_ratio: hidden width of the feed-forward network as a multiple of `width`.
        reconstruction: the head after the body.
        residual_convolution: the convolution that closes a block, and the body.
        image_range: factor on the mean-free image.
    """

    variant: Variant = "srf"
    scale: int = 4
    channels: int = 3
    width: int = 60
    depths: tuple[int, ...] = (6, 6, 6, 6)
    heads: tuple[int, ...] = (6, 6, 6, 6)
    base_window: tuple[int, int] = (8, 8)
    window_ratios: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0)
    mlp_ratio: float = 2.0
    reconstruction: Reconstruction = "pixelshuffledirect"
    residual_convolution: ResidualConvolution = "1conv"
    image_range: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in ("sir", "srf", "sng"):
            raise ValueError(f"variant: {self.variant!r} is not one of sir, srf, sng")
        if len(self.heads) != len(self.depths):
            raise ValueError(f"heads: {len(self.heads)} numbers for {len(self.depths)} blocks")
        for heads in self.heads:
            if self.width % (2 * heads):
                raise ValueError(f"width: {self.width} is not a multiple of 2 x {heads} heads")
        if len(self.window_ratios) < max(self.depths):
            raise ValueError(f"window_ratios: {len(self.window_ratios)} ratios for blocks of {max(self.depths)} layers")
        for window in self.windows:
            if min(window) < 1:
                raise ValueError(f"window_ratios: a window of {window} pixels is empty")
            if all(side > base for side, base in zip(window, self.base_window, strict=True)) and any(
                side % base for side, base in zip(window, self.base_window, strict=True)
            ):
                raise ValueError(
                    f"window_ratios: window {window} is larger than the base {self.base_window} but no multiple of it"
                )

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Window (height, width) of each layer of a block, in pixels."""
        height, width = self.base_window
        return tuple((int(height * ratio), int(width * ratio)) for ratio in self.window_ratios[: max(self.depths)])


@dataclass(frozen=True)
class TrainConfig:
    """The published recipe (official option files; paper section 4.1); every field can be set from the command line.

    Attributes:
        iterations: optimiser steps.
        batch_size: low-resolution patches a step, over all processes (the paper: 4 GPUs x 16).
        patch: side of the low-resolution patch in pixels.
        learning_rate: Adam's, with betas (0.9, 0.99).
        schedule: `multistep` halves the rate at `milestones`; `cosine` falls to zero after `warmup` steps.
        milestones: as fractions of `iterations` (250k, 400k, 450k, 475k of 500k).
        warmup: linear warm-up steps of the cosine schedule.
        clip_norm: bound on the gradient norm; 0 switches it off, as published.
        ema_decay: decay of the averaged weights; 0 switches them off, as published.
        init: `default` (published) or `bicubic` (starts at bicubic interpolation; for short runs).
        precision: `no` is fp32.
        evaluate_every: steps between two evaluations.
        checkpoint_every: steps between two checkpoints.
        seed: of weights, crops and augmentation.
        workers: processes that prepare patches; 0 prepares them in the training process.
    """

    iterations: int = 500_000
    batch_size: int = 64
    patch: int = 64
    learning_rate: float = 5e-4
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    warmup: int = 0
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    init: Literal["default", "bicubic"] = "default"
    precision: Literal["no", "bf16", "fp16"] = "no"
    evaluate_every: int = 5000
    checkpoint_every: int = 5000
    seed: int = 1226
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: {self.learning_rate} is not a positive number")
        if self.patch < 1:
            raise ValueError(f"patch: {self.patch} pixels a side are no patch")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative")


@dataclass(frozen=True)
class Recipe:
    """A network and the way it is trained."""

    model: HiTConfig
    train: TrainConfig


def embedded_recipe(scale: int) -> Recipe:
    """The recipe of the embedded weights: a small HiT-SRF, cosine schedule, from bicubic, 25 minutes on one core."""
    return Recipe(
        HiTConfig(
            variant="srf",
            scale=scale,
            width=40,
            depths=(4, 4),
            heads=(4, 4),
            window_ratios=(0.5, 1.0, 2.0, 4.0),
        ),
        TrainConfig(
            iterations=4000,
            batch_size=8,
            patch=32,
            learning_rate=1e-3,
            schedule="cosine",
            warmup=100,
            clip_norm=1.0,
            ema_decay=0.999,
            init="bicubic",
            evaluate_every=500,
            checkpoint_every=500,
            seed=0,
        ),
    )


RECIPES = {
    "paper": Recipe(HiTConfig(), TrainConfig()),
    "tenfold-x2": embedded_recipe(2),
    "tenfold-x4": embedded_recipe(4),
}

PARAMETERS = {  # of the released models, counted on the official code
    ("sir", 2): 772_064,
    ("sir", 3): 780_179,
    ("sir", 4): 791_540,
    ("srf", 2): 846_944,
    ("srf", 3): 855_059,
    ("srf", 4): 866_420,
    ("sng", 2): 1_012_584,
    ("sng", 3): 1_020_699,
    ("sng", 4): 1_032_060,
}

OFFICIAL_MODELS = tuple(
    ModelEntry(
        name=f"hit-{variant}-x{scale}",
        room="superres",
        summary=f"HiT-{variant.upper()} x{scale}, trained on DIV2K by the authors",
        source="hub",
        location=f"XiangZ/hit-{variant}-{scale}x",
        parameters=parameters,
        licence="Apache-2.0 (authors' release)",
    )
    for (variant, scale), parameters in PARAMETERS.items()
)

EMBEDDED_MODELS = tuple(
    ModelEntry(
        name=f"tenfold-x{scale}",
        room="superres",
        summary=f"small HiT-SRF x{scale}, trained by this project on openly licensed pictures",
        source="embedded",
        location=f"tenfold-x{scale}.safetensors",
        parameters=parameters,
        licence="Apache-2.0; training pictures CC0, CC BY, CC BY-SA, LGPL and GPL (see the card)",
        bytes=size,
        card="README.md#model-card",
    )
    for scale, parameters, size in ((2, 155_816, 659_840), (4, 168_812, 711_824))
)

MODELS = EMBEDDED_MODELS + OFFICIAL_MODELS
