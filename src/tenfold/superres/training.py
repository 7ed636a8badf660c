"""The HiT-SR recipe on core's loop: L1 loss, Adam, halved learning rate; x3 and x4 start from x2 (paper 4.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.core import checkpoint
from tenfold.core.console import UserError, say
from tenfold.core.training import FitConfig, FitResult, Schedule, cosine, fit, multistep
from tenfold.superres.checkpoint import load_model, official_arguments, save_model
from tenfold.superres.config import HiTConfig, TrainConfig
from tenfold.superres.data import PatchPairs, read_pair
from tenfold.superres.evaluation import bicubic, find_pairs, psnr_y, ssim_y
from tenfold.superres.model import DirectReconstruction, HiT, initialise
from tenfold.superres.resize import axis_weights


def l1_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean absolute difference over pixels and colours (paper eq. 10)."""
    loss = (model(batch["low"]) - batch["high"]).abs().mean()
    return loss, {}


def make_optimizer(config: TrainConfig) -> Any:
    """Factory of the published Adam: betas (0.9, 0.99), no weight decay."""
    return lambda model: torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))


def make_schedule(config: TrainConfig) -> Schedule:
    """Factor of the learning rate by step."""
    if config.schedule == "cosine":
        return cosine(config.iterations, config.warmup)
    return multistep([int(fraction * config.iterations) for fraction in config.milestones], 0.5, config.warmup)


def make_model(config: HiTConfig, init: str, seed: int, start_from: str | None = None) -> HiT:
    """A network to be trained.

    Args:
        config: its architecture.
        init: `default`, as published, or `bicubic`, see `initialise_bicubic`.
        seed: of the random weights.
        start_from: name or file of a trained network of the same architecture at any scale; all but the reconstruction
            is taken over (the published way to x3 and x4).

    Raises:
        UserError: `start_from` is of another architecture.
    """
    if init == "bicubic" and start_from:
        raise UserError("init: `bicubic` or a network to start from, not both; with the latter set init to `default`")
    torch.manual_seed(seed)
    model = HiT(config)
    initialise(model)
    if init == "bicubic":
        initialise_bicubic(model)
    if start_from:
        source = load_model(start_from)
        tensors = {key: value for key, value in source.state_dict().items() if not key.startswith("reconstruction.")}
        own = {key: value for key, value in model.state_dict().items() if key.startswith("reconstruction.")}
        checkpoint.load_into(model, {**tensors, **own}, f"{start_from} (without its reconstruction)")
    return model


@torch.no_grad()
def initialise_bicubic(model: HiT) -> None:
    """Let an untrained network be bicubic interpolation, so that short runs start there and not 10 dB below.

    First convolution, long skip and reconstruction are a linear path with a 5 x 5 low-res support, which holds the
    cubic kernel. The first 9 x channels features become the pixel's neighbourhood, the reconstruction their cubic
    weights, and the body's last convolution zero. Exact but for two pixels at the border, where the network pads with
    the mean colour.

    Raises:
        UserError: the network has too few features, or another reconstruction than `pixelshuffledirect`.
    """
    config = model.config
    if not isinstance(model.reconstruction, DirectReconstruction) or config.residual_convolution != "1conv":
        raise UserError("init: bicubic needs the reconstruction `pixelshuffledirect` and residual_convolution `1conv`")
    if config.width < 9 * config.channels:
        raise UserError(f"init: bicubic needs a width of at least {9 * config.channels}, not {config.width}")
    last = model.reconstruction[0]
    initialise_bicubic_path(model.conv_first, model.conv_after_body, last, config.scale, config.channels)


@torch.no_grad()
def initialise_bicubic_path(
    first: nn.Module, after_body: nn.Module, last: nn.Module, scale: int, channels: int
) -> None:
    """Set the linear path of a network with a long skip: see `initialise_bicubic`.

    Args:
        first: 3x3 convolution, channels -> at least 9 * channels.
        after_body: the last convolution before the skip is added.
        last: 3x3 convolution, features -> channels * scale^2, before a pixel shuffle.
        scale: upscaling factor.
        channels: of the image.
    """
    assert isinstance(first, nn.Conv2d) and isinstance(after_body, nn.Conv2d) and isinstance(last, nn.Conv2d)
    assert first.bias is not None and after_body.bias is not None and last.bias is not None
    taps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    kernel = cubic_phases(scale)  # s x 5
    first.weight[: 9 * channels] = 0
    first.bias[: 9 * channels] = 0
    for parameter in (last.weight, last.bias, after_body.weight, after_body.bias):
        parameter.zero_()
    for number, (dy, dx) in enumerate(taps):
        for colour in range(channels):
            first.weight[number * channels + colour, colour, dy + 1, dx + 1] = 1
    # A low-res offset t in -2..2 is a step k of the last convolution and a neighbour d of the first: t = k + d.
    split = {-2: (-1, -1), -1: (0, -1), 0: (0, 0), 1: (0, 1), 2: (1, 1)}
    for ty, (ky, dy) in split.items():
        for tx, (kx, dx) in split.items():
            number = taps.index((dy, dx))
            weight = torch.outer(kernel[:, ty + 2], kernel[:, tx + 2]).flatten()  # by sub-pixel, row-major
            for colour in range(channels):
                outputs = slice(colour * scale**2, (colour + 1) * scale**2)
                last.weight[outputs, number * channels + colour, ky + 1, kx + 1] = weight


def cubic_phases(scale: int) -> Tensor:
    """Weights of the low-res offsets -2..2 for each of the `scale` sub-pixels of cubic interpolation: scale x 5."""
    size = 9  # wide enough that pixel 4 sees no border
    indices, weights = axis_weights(size, size * scale, scale, "mirror")
    kernel = np.zeros((scale, 5))
    for phase in range(scale):
        row = 4 * scale + phase
        for index, weight in zip(indices[row], weights[row], strict=True):
            if weight:
                kernel[phase, index - 4 + 2] += weight
    return torch.from_numpy(kernel).float()


class Validation:
    """Mean Y-PSNR and SSIM over a folder of images, under the published protocol (section 5 of the evaluation page)."""

    def __init__(self, high_res: Path | str, low_res: Path | str | None, scale: int) -> None:
        self.scale = scale
        self.images = [read_pair(pair, scale) for pair in find_pairs(high_res, low_res, scale)]

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Scores of `model` on the device where its weights are."""
        device = next(model.parameters()).device
        scores = []
        for images in self.images:
            low = torch.from_numpy(images.low).to(device).permute(2, 0, 1)[None].float().div(255)
            output = model(low).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0).byte().cpu().numpy()
            scores.append((psnr_y(output, images.high, self.scale), ssim_y(output, images.high, self.scale)))
        psnr, ssim = np.mean(scores, axis=0)
        return {"psnr_y": float(psnr), "ssim_y": float(ssim)}

    def bicubic_psnr(self) -> float:
        """Mean Y-PSNR of bicubic interpolation on the same images, in dB."""
        upscale = bicubic(self.scale)
        return float(np.mean([psnr_y(upscale(i.low), i.high, self.scale) for i in self.images]))


def train(
    images: Path | str | Sequence[Path | str],
    run_dir: Path | str,
    model_config: HiTConfig,
    config: TrainConfig,
    *,
    low_res: Path | str | None = None,
    validation: Path | str | None = None,
    validation_low_res: Path | str | None = None,
    start_from: str | None = None,
    device: str = "auto",
    metadata: Mapping[str, str] | None = None,
) -> FitResult:
    """Train a network; `run_dir/hit-VARIANT-xSCALE.safetensors` is the result in the official layout.

    Args:
        images: folder of high-res images, or several.
        run_dir: folder of the run; a run that it holds is resumed.
        model_config: architecture.
        config: recipe.
        low_res: folder of the low-res partners; None makes them as MATLAB does.
        validation: folder of images to score during training; None skips it.
        validation_low_res: their low-res partners.
        start_from: see `make_model`.
        device: see `core.devices.resolve_device`.
        metadata: strings for the header of the result (licence, data).

    Raises:
        UserError: see `PatchPairs`, `make_model` and `core.training.fit`.
    """
    run_dir = Path(run_dir)
    dataset = PatchPairs(images, low_res, scale=model_config.scale, patch=config.patch, seed=config.seed)
    model = make_model(model_config, config.init, config.seed, start_from)
    evaluate = Validation(validation, validation_low_res, model_config.scale) if validation else None
    if evaluate:
        say(f"bicubic on the validation images: {evaluate.bicubic_psnr():.3f} dB")
    result = fit(
        model,
        dataset,
        l1_loss,
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
        schedule=make_schedule(config),
        evaluate=evaluate,
        recipe={"model": asdict(model_config), "train": asdict(config), "start_from": start_from or ""},
        metadata={"config": json.dumps(official_arguments(model_config))},
        device=device,
    )
    # Read back: the weights on the disk are the averaged ones, where an average is kept.
    checkpoint.load_weights(model, result.weights)
    save_model(run_dir / f"hit-{model_config.variant}-x{model_config.scale}.safetensors", model, metadata)
    return result
