"""The recipe on core's loop: two augmented views of a scene, the camera given in half of the steps, five losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.core import checkpoint
from tenfold.core.console import UserError
from tenfold.core.training import FitConfig, FitResult, Schedule, cosine, fit
from tenfold.depth import losses
from tenfold.depth.cameras import pinhole_rays
from tenfold.depth.config import Recipe, SceneConfig, TrainConfig, UniDepthV2Config
from tenfold.depth.data import Entry, FrameViews
from tenfold.depth.metrics import depth_metrics, mean_metrics
from tenfold.depth.model import Prediction, UniDepthV2
from tenfold.depth.preprocessing import DEVIATION, MEAN
from tenfold.depth.simulate import add_noise, random_scenes, render

UNTRAINED = ("register_tokens", "mask_token")  # stored by the layout, used by nothing
VALIDATION_SEED = 20_000  # of rooms that training never sees
VALIDATION_IMAGES = 32


def normalised(image: Tensor) -> Tensor:
    """B x 3 x H x W in [0, 1] as the networks want it."""
    return (image - image.new_tensor(MEAN)[:, None, None]) / image.new_tensor(DEVIATION)[:, None, None]


class RoomViews:
    """Endless pairs of views of rendered rooms; a batch is a pure function of its numbers.

    Images 2i and 2i + 1 are one room from one place with one direction, through two pinhole cameras: the second's
    focal length differs by up to 2^zoom and both principal points lie off the middle. Nothing is resampled, so that
    depth is exact in both. A batch draws one of the sizes.

    Args:
        config: sizes, fields of view, zoom, shift and seed.
        scenes: what the rooms hold.
    """

    def __init__(self, config: TrainConfig, scenes: SceneConfig) -> None:
        self.config = config
        self.scenes = scenes

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`image` in [0, 1], `depth` in metres, `intrinsics`, `flip`."""
        config = self.config
        chosen = np.random.default_rng((config.seed, indices[0], 3)).integers(len(config.sizes))
        height, width = config.sizes[chosen]
        intrinsics = torch.stack([self._camera(index, height, width) for index in indices])
        pairs = [index // 2 for index in indices]
        rendering = render(
            random_scenes(self.scenes, config.seed, pairs),
            pinhole_rays(intrinsics, height, width),
            self.scenes.shadows,
        )
        return {
            "image": add_noise(rendering.image, self.scenes.noise, config.seed, indices),
            "depth": rendering.points_m[:, 2:],
            "intrinsics": intrinsics,
            "flip": torch.zeros(len(indices), dtype=torch.bool),
        }

    def _camera(self, index: int, height: int, width: int) -> Tensor:
        random = np.random.default_rng((self.config.seed, index // 2, 2))
        low, high = (0.5 / math.tan(math.radians(fov) / 2) for fov in reversed(self.config.fov_deg))
        focal = 0.5 / math.tan(math.radians(random.uniform(*self.config.fov_deg)) / 2)
        zoom = 2 ** random.uniform(-self.config.zoom, self.config.zoom)
        shifts = random.uniform(-self.config.shift, self.config.shift, (2, 2))
        if index % 2:
            focal = min(max(focal * zoom, low), high)
        k = torch.eye(3)
        k[0, 0] = k[1, 1] = focal * width
        k[0, 2], k[1, 2] = (0.5 + shifts[index % 2, 0]) * width, (0.5 + shifts[index % 2, 1]) * height
        return k


def make_loss(config: TrainConfig) -> Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The recipe's loss of a batch of pairs: see `losses.py` for its terms and weights."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image, depth = normalised(batch["image"]), batch["depth"]
        rays = pinhole_rays(batch["intrinsics"], *image.shape[-2:])
        # The loop seeds each step, so that a resumed run tosses the same coin.
        given = bool(torch.rand(()) < config.given_share)
        prediction = model(image, rays if given else None)
        terms = loss_terms(prediction, image, depth, rays, batch["intrinsics"], batch["flip"], config.recipe)
        weights = losses.WEIGHTS[config.recipe]
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return total, {name: value.detach() for name, value in terms.items()}

    return loss


def loss_terms(
    prediction: Prediction,
    image: Tensor,
    depth: Tensor,
    rays: Tensor,
    intrinsics: Tensor,
    flip: Tensor,
    recipe: losses.Recipe,
) -> dict[str, Tensor]:
    """Each term of the loss, not weighted.

    Args:
        prediction: of the network.
        image: B x 3 x H x W, normalised.
        depth: B x 1 x H x W, m, 0 where it is not known.
        rays: B x 3 x H x W, of the true camera.
        intrinsics: B x 3 x 3, of the true camera.
        flip: B, whether the picture was mirrored.
        recipe: which losses.
    """
    mask = depth > 0
    known = torch.where(mask, depth, torch.ones_like(depth))
    # The rays are detached, or errors of depth would turn the camera: the two outputs stay apart (V1 section 3.4).
    guess = (prediction.rays[:, 2:].detach() * prediction.radius).clamp_min(1e-3)
    height, width = image.shape[-2:]
    own_rays = pinhole_rays(prediction.intrinsics, height, width)
    everywhere = torch.ones_like(mask)
    cells = losses.edge_cells(image, everywhere, 0.95 if recipe == "paper" else 0.9)
    side = losses.patch_side(min(height, width))
    assert prediction.log_error is not None
    if recipe == "paper":
        depth_term = losses.lambda_mse(guess.log() - known.log(), mask, (losses.MEAN_WEIGHT,))
        angles = losses.ray_angles(own_rays) - losses.ray_angles(rays)
        camera_term = losses.lambda_mse(angles, everywhere, (1.0, 1.0))
    else:
        depth_term = losses.silog(guess, known, mask)
        camera_term = losses.ray_regression(own_rays, rays, by_row=False)
    return {
        "depth": depth_term.mean(),
        "camera": camera_term.mean(),
        "invariance": losses.invariance(guess, intrinsics, mask, flip, recipe).mean(),
        "edges": losses.local_ssi(guess, known, mask, cells, side, recipe).mean(),
        "uncertainty": losses.uncertainty(prediction.log_error, guess.detach(), known, mask, recipe).mean(),
    }


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the encoder has its own rate; vectors, gains, tokens and embeddings do not decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.squeeze().ndim > 1 and not name.endswith(("pos_embed", "cls_token", "positions"))
            groups.setdefault((name.startswith("encoder."), whole), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * (config.encoder_rate if encoder else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    ]


def make_schedule(config: TrainConfig) -> Schedule:
    """Factor of the learning rates by step."""
    if config.schedule == "cosine":
        return cosine(config.steps, warmup=max(1, config.steps // 20))
    start = 0.3 * config.steps

    def factor(step: int) -> float:
        if step <= start:
            return 1.0
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - start) / max(1.0, config.steps - start)))

    return factor


def make_network(config: UniDepthV2Config, seed: int) -> UniDepthV2:
    """A network with random weights, whose unused parameters are frozen."""
    torch.manual_seed(seed)
    model = UniDepthV2(config)
    freeze_unused(model)
    return model


def freeze_unused(model: nn.Module) -> None:
    """Parameters that the layout stores and nothing uses get no gradient: several processes would wait for it."""
    for name, parameter in model.named_parameters():
        if name.endswith(UNTRAINED):
            parameter.requires_grad_(False)


class RoomValidation:
    """Scores on rendered rooms that training does not see: the camera given, and the own one."""

    def __init__(self, config: TrainConfig, scenes: SceneConfig) -> None:
        held_out = replace(config, seed=VALIDATION_SEED, sizes=config.sizes[:1])
        self.batches = [
            RoomViews(held_out, scenes).batch(range(start, start + 8)) for start in range(0, VALIDATION_IMAGES, 8)
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """d1 and SIlog with the camera `given` and with the network's `own`."""
        device = next(model.parameters()).device
        found: dict[str, float] = {}
        for name in ("given", "own"):
            rows = []
            for batch in self.batches:
                image = normalised(batch["image"].to(device))
                rays = pinhole_rays(batch["intrinsics"].to(device), *image.shape[-2:])
                points = model(image, rays if name == "given" else None).points.cpu()
                for guess, depth in zip(points[:, 2], batch["depth"][:, 0], strict=True):
                    rows.append(depth_metrics(guess.clamp_min(1e-3).flatten().numpy(), depth.flatten().numpy()))
            mean = mean_metrics(rows)
            found |= {f"{name}_{metric}": mean[metric] for metric in ("d1", "arel", "silog")}
        return found


def train(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    frames: Sequence[Entry] = (),
    start_from: UniDepthV2 | None = None,
    device: str = "auto",
) -> tuple[FitResult, UniDepthV2]:
    """Train a network, or go on with the run that `run_dir` holds.

    Args:
        recipe: network, training and rooms.
        run_dir: folder of the run.
        frames: real or stored frames to train on; none renders rooms.
        start_from: a network to start from, of the recipe's architecture; None starts from nothing.
        device: see `core.devices.resolve_device`.

    Returns:
        The loop's result, and the network with the weights to use (the average where one is kept).

    Raises:
        UserError: see `FrameViews` and `core.training.fit`; frames together with more than one size.
    """
    config = recipe.train
    dataset: RoomViews | FrameViews
    if frames:
        if len(config.sizes) > 1:
            raise UserError("training on frames takes one size: give --size HEIGHT WIDTH")
        dataset = FrameViews(frames, config.sizes[0], config.zoom, config.seed)
    else:
        dataset = RoomViews(config, recipe.scenes)
    model = start_from or make_network(recipe.model, config.seed)
    freeze_unused(model)
    result = fit(
        model,
        dataset,
        make_loss(config),
        lambda network: torch.optim.AdamW(parameter_groups(network, config), betas=(0.9, 0.999)),
        FitConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay or None,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            workers=config.workers,
        ),
        run_dir,
        schedule=make_schedule(config),
        evaluate=RoomValidation(config, recipe.scenes),
        recipe={"model": asdict(recipe.model), "train": asdict(config), "scenes": asdict(recipe.scenes)},
        metadata={"config": json.dumps(asdict(recipe.model))},
        device=device,
    )
    checkpoint.load_weights(model, result.weights)
    return result, model.cpu().eval()
