"""The recipe of the appearance network: two views of a still image, dense contrast between their boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.core import checkpoint
from tenfold.core.console import UserError
from tenfold.core.training import FitConfig, FitResult, cosine, fit
from tenfold.tracking.checkpoint import header, save_model
from tenfold.tracking.config import MasaConfig, TrainConfig
from tenfold.tracking.data.stills import StillSet, ViewPairs
from tenfold.tracking.losses import margin_l2, unbiased_contrast
from tenfold.tracking.model import Masa
from tenfold.tracking.model.masa import MEAN, STD

TRACK_WEIGHT = 0.25  # of the contrast; the auxiliary loss has weight 1 (spec section 3)


def to_input(images: Tensor) -> Tensor:
    """... x H x W x 3 uint8, RGB, to ... x 3 x H x W float, normalised."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() - mean) / std).movedim(-1, -3).contiguous()


def pair_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast and auxiliary loss between key and reference boxes, averaged over the images of the batch.

    Args:
        model: a `Masa`.
        batch: see `ViewPairs.sample`, stacked: images B x 2 x S x S x 3, boxes B x 2 x P x 4, ids B x 2 x P.
    """
    boxes, ids = batch["boxes"], batch["ids"]
    count = ids.shape[0]
    used = (ids >= 0).flatten(0, 1)  # 2B x P; image 2i is key i, 2i + 1 its reference
    used[0::2] &= ids[:, 0] > 0  # background is compared with, and never asks
    rois = torch.cat((used.nonzero()[:, :1].to(boxes.dtype), boxes.flatten(0, 1)[used]), dim=1)
    found = model(to_input(batch["images"].flatten(0, 1)), rois)
    numbers = ids.flatten(0, 1)[used]
    contrast, auxiliary, correct, asked = [], [], [], 0
    for image in range(count):
        key, reference = rois[:, 0] == 2 * image, rois[:, 0] == 2 * image + 1
        same = numbers[key, None] == numbers[reference]
        rows = same.any(1)
        if not rows.any():
            continue
        keys, references, same = found[key][rows], found[reference], same[rows]
        contrast.append(unbiased_contrast(keys, references, same))
        auxiliary.append(margin_l2(keys, references, same))
        best = (keys @ references.t()).detach().argmax(1)
        correct.append(same[torch.arange(len(best)), best].float().sum())
        asked += len(best)
    if not contrast:
        zero = found.sum() * 0
        return zero, {}
    track, aux = torch.stack(contrast).mean(), torch.stack(auxiliary).mean()
    loss = TRACK_WEIGHT * track + aux
    return loss, {"track": track.detach(), "aux": aux.detach(), "accuracy": torch.stack(correct).sum() / max(asked, 1)}


class Validation:
    """Share of boxes whose best match in the other view is the same instance, on pairs that training never sees.

    Args:
        stills: held-out pictures.
        config: views as in training; the draws are fixed.
        pairs: number of pairs.
    """

    def __init__(self, stills: StillSet, config: TrainConfig, pairs: int = 48) -> None:
        self.samples = [
            {key: torch.from_numpy(value)[None] for key, value in ViewPairs(stills, config).sample(index).items()}
            for index in range(pairs)
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """`accuracy` of `model`, on the device where its weights are."""
        device = next(model.parameters()).device
        found = []
        for sample in self.samples:
            _, means = pair_loss(model, {key: value.to(device) for key, value in sample.items()})
            if "accuracy" in means:
                found.append(float(means["accuracy"]))
        return {"accuracy": float(np.mean(found)) if found else 0.0}


def make_optimizer(config: TrainConfig) -> Any:
    """Factory of AdamW; no decay on biases, norms and the colour bins."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith("colour")]
        known = {id(p) for p in decayed}
        rest = [p for p in model.parameters() if id(p) not in known]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    return make


def make_model(config: MasaConfig, seed: int) -> Masa:
    """An untrained network.

    Raises:
        UserError: its backbone is a foundation model, which has no training here.
    """
    if config.backbone not in ("resnet50", "tiny"):
        raise UserError(f"training: the backbone {config.backbone} is a foundation model: choose masa-r50 or masa-tiny")
    torch.manual_seed(seed)
    return Masa(config)


def start_colours(model: Masa, stills: StillSet, seed: int) -> None:
    """Begin the colour branch of the small network with the colours that the training pictures have (k-means)."""
    import cv2

    if model.colour is None:
        return
    rng = np.random.default_rng(seed)
    pixels = []
    for number in rng.choice(len(stills), min(len(stills), 64), replace=False):
        image = stills.still(int(number)).image.reshape(-1, 3)
        pixels.append(image[rng.integers(0, len(image), 400)])
    samples = ((np.concatenate(pixels) - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    cv2.setRNGSeed(seed)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 30, 1e-3)
    labels = np.zeros((len(samples), 1), np.int32)  # to be filled
    _, _, centres = cv2.kmeans(samples, model.config.colours, labels, stop, 1, cv2.KMEANS_PP_CENTERS)
    model.colour.start_from(torch.from_numpy(centres))


def train(
    stills: StillSet,
    run_dir: Path | str,
    model_config: MasaConfig,
    config: TrainConfig,
    *,
    validation: StillSet | None = None,
    device: str = "auto",
    metadata: Mapping[str, str] | None = None,
) -> FitResult:
    """Train a network; `run_dir/masa.safetensors` is the result. A run that the folder holds is resumed.

    Args:
        stills: pictures with instances.
        run_dir: folder of the run.
        model_config: architecture; the head that proposes boxes is left out.
        config: recipe.
        validation: held-out pictures to score during training.
        device: see `core.devices.resolve_device`.
        metadata: strings for the header of the result (licence, data).

    Raises:
        UserError: see `make_model` and `core.training.fit`.
    """
    model_config = replace(model_config, rcnn_layers=0, rcnn_convolutions=0)
    model = make_model(model_config, config.seed)
    start_colours(model, stills, config.seed)
    evaluate = Validation(validation, config) if validation is not None else None
    result = fit(
        model,
        ViewPairs(stills, config),
        pair_loss,
        make_optimizer(config),
        FitConfig(
            steps=config.iterations,
            batch_size=config.batch_size,
            seed=config.seed,
            clip_norm=config.clip_norm or None,
            precision=config.precision,
            ema_decay=config.ema_decay or None,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            workers=config.workers,
        ),
        run_dir,
        schedule=cosine(config.iterations, config.warmup),
        evaluate=evaluate,
        recipe={"model": asdict(model_config), "train": asdict(config)},
        metadata=header(model_config),
        device=device,
    )
    # Read back: the weights on the disk are the averaged ones, where an average is kept.
    checkpoint.load_weights(model, result.weights)
    save_model(Path(run_dir) / "masa.safetensors", model, metadata, half=True)
    return result
