"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName

if TYPE_CHECKING:
    import numpy as np

OutputFolder = Annotated[Path, arg(aliases=["-o"])]
Precision = Literal["fp32", "bf16", "fp16"]


def upscale(
    paths: Positional[list[str]],
    output: OutputFolder,
    model: str | None = None,
    scale: Literal[2, 3, 4] | None = None,
    to: str | None = None,
    tile: str = "auto",
    memory: str | None = None,
    self_ensemble: bool = False,
    precision: Precision = "fp32",
    format: Literal["png", "jpg", "webp", "tiff"] | None = None,
    quality: int = 95,
    codec: Literal["h264", "hevc", "vp9"] = "h264",
    recursive: bool = False,
    skip_existing: bool = False,
    shard: str | None = None,
    device: DeviceName = "auto",
) -> object:
    """Upscale pictures and films: files, folders, patterns.

    Transparency, grey, 16-bit, colour profile and EXIF are kept. An input is never overwritten, and an output is
    complete or not there. A bad file is reported and the others are done (exit status 1).

    Args:
        paths: pictures, films, folders of them, or quoted patterns such as 'photos/*.jpg'.
        output: folder for the results, or a file name for a single input.
        model: built-in or official name, hub id, or checkpoint file; by default the built-in tenfold-x2 or tenfold-x4.
        scale: enlarge 2, 3 or 4 times; by default what the model does, without a model 2.
        to: WxH, such as 1920x1080: enlarge to fit in there, keeping the proportions.
        tile: auto (whole or exact strips as memory allows, tiles below that), none, strips, or a tile's side in pixels.
        memory: stay below this much memory, such as 4GB; by default what is free.
        self_ensemble: average over 8 flips and turns: slightly better, 8 times as slow.
        precision: of the arithmetic; bf16 and fp16 are for GPUs.
        format: of the pictures that are written; by default png, and tiff for TIFF inputs.
        quality: 1 to 100, for jpg and webp; webp at 100 is lossless.
        codec: of the films that are written.
        recursive: enter sub-folders, and keep their structure.
        skip_existing: leave what has its result already; this resumes a run.
        shard: i/n takes every n-th file from the i-th on, to share a folder among n processes.
        device: where to compute.

    Example:
        tenfold superres upscale cat.jpg -o large/
        tenfold superres upscale photos/ film.mp4 -o large/ --scale 4 --skip-existing
    """
    from tenfold.core.devices import set_threads
    from tenfold.core.sources import find_sources
    from tenfold.superres import batch

    fit = parse_size(to) if to is not None else None
    if fit and scale:
        raise UserError("give either --scale or --to, not both")
    tile_choice, budget = parse_tile(tile), parse_bytes(memory) if memory is not None else None
    sources = find_sources(paths, output, recursive)

    from tenfold.superres.upscaling import Settings, UpscaleWork, target_suffix

    set_threads()
    work = UpscaleWork(
        Settings(model, scale, fit, tile_choice, budget, self_ensemble, precision, quality, codec, device)
    )
    jobs = batch.plan(sources, output, lambda s: target_suffix(s.path, s.is_video, format, codec), work.tag)
    return batch.run(batch.take_shard(jobs, shard), work, "upscale", skip_existing)


def downscale(
    paths: Positional[list[str]],
    output: OutputFolder,
    scale: list[int],
    border: Literal["mirror", "clamp"] = "mirror",
    recursive: bool = False,
    skip_existing: bool = False,
) -> object:
    """Make low-resolution pictures exactly as MATLAB's imresize does, for training and evaluation.

    Writes OUTPUT/X2/NAMEx2.png and so on. Pictures are first cropped, at the right and bottom, to a multiple of the
    scale.

    Args:
        paths: pictures, folders of them, or quoted patterns.
        output: folder for the X2, X3, X4 folders.
        scale: one or more factors to shrink by.
        border: what lies beyond the edge: mirror (SwinIR's files) or clamp (those of RCAN and SelfExSR).
        recursive: enter sub-folders.
        skip_existing: leave what has its result already.

    Example:
        tenfold superres downscale DIV2K/HR -o DIV2K/LR_bicubic --scale 2 3 4
    """
    from tenfold.core import images
    from tenfold.core.sources import find_sources
    from tenfold.superres import batch
    from tenfold.superres.evaluation import make_low_res

    if not scale or min(scale) < 1:
        raise UserError("--scale: give one or more factors, such as --scale 2 4")
    sources = find_sources(paths, output, recursive, films=False)
    jobs: dict[batch.Job, int] = {}
    for factor in dict.fromkeys(scale):

        def suffix_of(source: batch.Source, factor: int = factor) -> str:
            return f"x{factor}" + (".tiff" if source.path.suffix.lower() in (".tif", ".tiff") else ".png")

        jobs |= dict.fromkeys(batch.plan(sources, output / f"X{factor}", suffix_of, tag=""), factor)

    def shrink(job: batch.Job, report: batch.Report) -> batch.Outcome:
        start = time.perf_counter()
        picture = images.read(job.source.path)
        small = make_low_res(picture.pixels, jobs[job], border)
        images.write(job.target, picture.with_pixels(small))
        return batch.Outcome(small.shape[1], small.shape[0], time.perf_counter() - start, f"{border} border")

    return batch.run(list(jobs), shrink, "downscale", skip_existing)


def evaluate(
    high_res: Positional[Path],
    low_res: Path | None = None,
    super_res: Path | None = None,
    model: str | None = None,
    scale: Literal[2, 3, 4] | None = None,
    border: Literal["mirror", "clamp"] = "mirror",
    lpips: bool = False,
    self_ensemble: bool = False,
    precision: Precision = "fp32",
    device: DeviceName = "auto",
) -> object:
    """Score a network, or finished outputs, by the published protocol: PSNR and SSIM on Y, border cropped.

    NAME.png in the folder of ground truth belongs to NAMEx2.png or NAME.png in the other, or in its sub-folder X2.

    Args:
        high_res: folder of ground truth.
        low_res: folder of low-resolution pictures; by default they are made as MATLAB does.
        super_res: score the pictures in this folder and run no network.
        model: name or file of a network, or bicubic; by default the built-in one.
        scale: upscaling factor; by default the network's, 2 without one.
        border: convention of low-resolution pictures that are made here, see downscale.
        lpips: also give the LPIPS distance (needs the lpips package and its weights).
        self_ensemble: average over 8 flips and turns.
        precision: of the arithmetic; bf16 and fp16 are for GPUs.
        device: where to compute.

    Example:
        tenfold superres evaluate Set5/HR --low-res Set5/LR_bicubic --model tenfold-x2
        tenfold superres evaluate Set5/HR --super-res results/ --scale 4
    """
    from tenfold.core.devices import set_threads
    from tenfold.superres import evaluation

    set_threads()
    run: evaluation.Upscale | None = None
    if super_res is not None:
        if model is not None or scale is None:
            raise UserError("--super-res: give --scale with it, and no --model")
    elif model == "bicubic":
        run = evaluation.bicubic(scale or 2)
    else:
        from tenfold.superres.upscaling import Settings, UpscaleWork

        upscaler = UpscaleWork(Settings(model, scale, precision=precision, device=device)).upscaler((1, 1))
        scale = scale or upscaler.scale  # type: ignore[assignment]

        def run(image: np.ndarray) -> np.ndarray:
            return upscaler.upscale(image, self_ensemble=self_ensemble).image

    perceptual = evaluation.load_lpips(device) if lpips else None
    result = evaluation.evaluate_pairs(
        run, high_res, low_res, scale=scale or 2, super_res=super_res, border=border, perceptual=perceptual
    )
    rows = [
        (
            score.name,
            f"{score.psnr_y:.3f}",
            f"{score.ssim_y:.5f}",
            f"{score.psnr_rgb:.3f}",
            f"{score.ssim_rgb:.5f}",
            *([] if score.lpips is None else [f"{score.lpips:.4f}"]),
        )
        for score in (*result.images, result.mean)
    ]
    columns = ("image", "PSNR-Y (dB)", "SSIM-Y", "PSNR-RGB (dB)", "SSIM-RGB", *(["LPIPS"] if lpips else []))
    console.table(columns, rows, title=f"x{result.scale}; low-res: {result.low_res}")
    return result


def inspect(checkpoint: Positional[str]) -> object:
    """Say what a checkpoint is: architecture, scale, size, licence. Everything is told from its keys and shapes.

    Args:
        checkpoint: built-in or official name, hub id, or a .safetensors or .pth file.

    Example:
        tenfold superres inspect HiT-SRF-4x.pth
    """
    from tenfold.superres.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    windows = " ".join(f"{height}x{width}" for height, width in found.windows)
    console.table(
        ("what", "value"),
        [
            ("architecture", found.architecture),
            ("scale", f"x{found.scale}"),
            ("colour channels", found.channels),
            ("parameters", f"{found.parameters:,}"),
            ("weights", f"{found.bytes / 1e6:.2f} MB"),
            ("width, depths, heads", f"{found.width}, {list(found.depths)}, {list(found.heads)}"),
            ("windows", windows),
            ("reconstruction", found.reconstruction),
            ("licence", found.licence),
        ],
        title=found.origin,
    )
    return found


def train(
    images: Positional[list[Path]],
    output: OutputFolder,
    recipe: str = "paper",
    variant: Literal["sir", "srf", "sng"] | None = None,
    scale: Literal[2, 3, 4] | None = None,
    low_res: Path | None = None,
    validation: Path | None = None,
    validation_low_res: Path | None = None,
    start_from: str | None = None,
    init: Literal["default", "bicubic"] | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    patch: int | None = None,
    learning_rate: float | None = None,
    precision: Literal["no", "bf16", "fp16"] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    workers: int | None = None,
    seed: int | None = None,
    device: DeviceName = "auto",
) -> object:
    """Train a network on folders of images; the same command again resumes a run that was stopped.

    OUTPUT/hit-VARIANT-xSCALE.safetensors is the result, in the official layout. On several GPUs or machines start it
    through `torchrun -m tenfold` or `accelerate launch -m tenfold`.

    Args:
        images: folders of high-resolution images.
        output: folder of the run.
        recipe: paper, tenfold-x2 or tenfold-x4 (the built-in networks), or a YAML file with `model` and `train`.
        variant: of the network; by default the recipe's.
        scale: of the network; by default the recipe's.
        low_res: folder of low-res partners such as 0001x2.png; by default made as MATLAB does.
        validation: folder of images to score during training.
        validation_low_res: their low-res partners.
        start_from: a trained network of the same sizes, at any scale, to start from (the published way to x3 and x4).
        init: default, or bicubic to start at bicubic interpolation (for short runs).
        iterations: optimiser steps.
        batch_size: low-res patches a step, over all processes.
        patch: side of a low-res patch in pixels.
        learning_rate: of Adam, at its highest.
        precision: no (float32), bf16 or fp16.
        evaluate_every: steps between two scores.
        checkpoint_every: steps between two checkpoints.
        workers: processes that prepare patches.
        seed: of weights, crops and augmentation.
        device: where to train.

    Example:
        tenfold superres train DIV2K/HR -o runs/srf-x2 --variant srf --scale 2 --low-res DIV2K/LR_bicubic
        tenfold superres train pictures/ -o runs/small --recipe tenfold-x2 --iterations 500
    """
    import dataclasses

    from tenfold.core.config import named_or_yaml, replaced
    from tenfold.superres.config import RECIPES, Recipe

    if not images:
        raise UserError("no folder of images given: tenfold superres train FOLDER -o RUN")

    chosen = named_or_yaml(Recipe, recipe, RECIPES)
    model = replaced(chosen.model, variant=variant, scale=scale)
    settings = replaced(
        chosen.train,
        init=init,
        iterations=iterations,
        batch_size=batch_size,
        patch=patch,
        learning_rate=learning_rate,
        precision=precision,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        workers=workers,
        seed=seed,
    )

    from tenfold.superres import training

    result = training.train(
        images,
        output,
        model,
        settings,
        low_res=low_res,
        validation=validation,
        validation_low_res=validation_low_res,
        start_from=start_from,
        device=device,
    )
    return dataclasses.asdict(result)


def export(model: Positional[str], output: Annotated[Path, arg(aliases=["-o"])]) -> object:
    """Write a network as an ONNX file for pictures of any size, checked against PyTorch.

    Input `image`: B x channels x H x W, float32, in [0, 1]. Output `upscaled`: the same, larger, not clipped. ONNX
    Runtime and PyTorch are compared at several sizes, and a file that differs is not kept.

    Args:
        model: built-in or official name, hub id, or a .safetensors or .pth file.
        output: the .onnx file.

    Example:
        tenfold superres export tenfold-x2 -o tenfold-x2.onnx
    """
    if output.suffix.lower() != ".onnx":
        raise UserError(f"-o {output}: name a file that ends in .onnx")

    from tenfold.core import checkpoint as files
    from tenfold.core.devices import set_threads
    from tenfold.superres import onnx_file
    from tenfold.superres.checkpoint import build, licence
    from tenfold.superres.config import MODELS

    set_threads()
    loaded = files.load(model, MODELS, "tenfold.superres")
    network = build(loaded)
    config = network.config
    metadata = {
        "architecture": f"HiT-{config.variant.upper()}",
        "scale": str(config.scale),
        "licence": licence(loaded),
    }
    result = onnx_file.write(network, output, metadata)
    console.table(
        ("picture", "largest difference"),
        [(f"{width} x {height}", f"{difference:.1e}") for height, width, difference in result.checked],
        title=f"{output}: {result.bytes / 1e6:.2f} MB; ONNX Runtime against PyTorch, samples in [0, 1]",
    )
    return result


def reproduce(
    output: OutputFolder = Path("results/reproduce/superres.json"),
    part: Literal["all", "cost", "quality"] = "all",
    images: list[Path] | None = None,
    evaluation: Path | None = None,
    evaluation_low_res: Path | None = None,
    minutes: float = 20.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    runs: Path = Path("runs/reproduce-superres"),
) -> object:
    """Reproduce the paper's two claims at small scale: cost as windows grow, and quality at equal steps and equal time.

    Cost takes a minute. Quality trains three networks with each seed (hierarchical windows, fixed windows, SwinIR) and
    takes `minutes` on one core for each of them; a stopped run is resumed.

    Args:
        output: result file; plots go beside it.
        part: cost, quality, or all.
        images: folders of training images; by default T91 and BSDS500-train below TENFOLD_DATA/superres/train.
        evaluation: folder of ground-truth images; by default Set5 below TENFOLD_DATA/superres.
        evaluation_low_res: their low-res partners; by default made as MATLAB does.
        minutes: processor minutes of training for each network and seed.
        seeds: one training for each.
        runs: folder of the training runs.

    Example:
        tenfold superres reproduce --part cost -o cost.json
    """
    import os

    from tenfold.superres import reproduce as experiment

    parts = ("cost", "quality") if part == "all" else (part,)
    data = Path(os.environ["TENFOLD_DATA"]) / "superres" if "TENFOLD_DATA" in os.environ else None
    if "quality" in parts and data is None and (images is None or evaluation is None):
        raise UserError("the quality part needs images: give --images and --evaluation, or set TENFOLD_DATA")
    folders = images or ([data / "train/T91", data / "train/BSDS500-train"] if data else [])
    if evaluation is not None:
        sets = {evaluation.name: (evaluation, evaluation_low_res)}
    else:
        sets = {"Set5": (data / "Set5/HR", data / "Set5/LR_bicubic")} if data else {}
    quality = experiment.QualityConfig(minutes=minutes, seeds=seeds)
    return experiment.reproduce(output, parts, quality, folders, sets, runs)


def parse_size(text: str) -> tuple[int, int]:
    """`1920x1080` -> (1920, 1080). Raises UserError for other text."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or not (int(match[1]) and int(match[2])):
        raise UserError(f"--to {text}: expected WIDTHxHEIGHT in pixels, such as 1920x1080")
    return int(match[1]), int(match[2])


def parse_tile(text: str) -> Literal["auto", "none", "strips"] | int:
    """A word, or a tile's side in pixels. Raises UserError for other text."""
    if text in ("auto", "none", "strips"):
        return text  # type: ignore[return-value]
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--tile {text}: expected auto, none, strips or a side in pixels")
    return int(text)


def parse_bytes(text: str) -> int:
    """`4GB`, `800MB`, `1.5GiB` or a plain number of bytes. Raises UserError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?", text.strip())
    if not match or float(match[1]) == 0:
        raise UserError(f"--memory {text}: expected an amount such as 4GB or 800MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("kmgt".find(match[2].lower()) + 1 if match[2] else 0))


VERBS: dict[str, Callable[..., object]] = {
    "upscale": upscale,
    "downscale": downscale,
    "evaluate": evaluate,
    "inspect": inspect,
    "train": train,
    "export": export,
    "reproduce": reproduce,
}
