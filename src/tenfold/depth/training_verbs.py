"""The verbs that train, make data and measure. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName

if TYPE_CHECKING:
    from tenfold.depth.data import CameraParameters, Entry
    from tenfold.depth.model import UniDepthV2

OutputFolder = Annotated[Path, arg(aliases=["-o"])]
Dataset = Literal[
    "folder", "nyu", "kitti", "sunrgbd", "diode", "eth3d", "ibims", "void", "hammer", "nuscenes", "ddad", "tum"
]


def train(
    frames: Positional[list[Path]] = [],  # noqa: B006 - tyro reads it and nothing changes it
    *,
    output: OutputFolder,
    recipe: str = "tenfold-depth-tiny",
    dataset: Dataset = "folder",
    start_from: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    learning_rate: float | None = None,
    losses: Literal["paper", "release"] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    workers: int | None = None,
    seed: int | None = None,
    device: DeviceName = "auto",
) -> object:
    """Train a UniDepthV2 network on rendered rooms, or on your own frames with depth.

    A stopped run goes on when the command is given again. OUTPUT/depth.safetensors is the network in half precision, in
    the official layout: every other verb takes it. OUTPUT/model.safetensors has the weights as they were trained.

    Args:
        frames: folders of frames to train on; none renders rooms.
        output: folder of the run.
        recipe: tenfold-depth-tiny, paper, or a YAML file with `model`, `train` and `scenes`.
        dataset: how the folders are laid out.
        start_from: a network to start from: name, hub id or file; its architecture replaces the recipe's.
        steps: optimiser steps.
        batch_size: pictures a step, in pairs of views.
        size: height and width of the pictures in pixels, multiples of 14.
        learning_rate: AdamW's.
        losses: as the paper prints them, or as the release trains.
        evaluate_every: steps between two evaluations on rendered rooms.
        checkpoint_every: steps between two checkpoints.
        workers: processes that prepare pictures.
        seed: of weights, scenes and augmentation.
        device: where to compute.

    Example:
        tenfold depth train -o runs/tiny
        tenfold depth train recordings/ -o runs/mine --start-from tenfold-depth-tiny --size 84 112 --steps 500
    """
    import dataclasses

    from tenfold.core.config import named_or_yaml, replaced
    from tenfold.depth.config import RECIPES, Recipe

    chosen = named_or_yaml(Recipe, recipe, RECIPES)
    settings = replaced(
        chosen.train,
        steps=steps,
        batch_size=batch_size,
        sizes=(size,) if size else None,
        learning_rate=learning_rate,
        recipe=losses,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        workers=workers,
        seed=seed,
    )

    from tenfold.depth import checkpoint, training

    entries = [entry for folder in frames for entry in _entries(dataset, folder)]
    start: UniDepthV2 | None = None
    model = chosen.model
    if start_from:
        start = _v2(start_from)
        model = start.config
    result, network = training.train(
        Recipe(model, settings, chosen.scenes), output, frames=entries, start_from=start, device=device
    )
    checkpoint.save(network, str(output / "depth.safetensors"), half=True)
    return dataclasses.asdict(result)


def _v2(name: str) -> UniDepthV2:
    from tenfold.depth.checkpoint import load_model
    from tenfold.depth.model import UniDepthV2

    network = load_model(name)
    if not isinstance(network, UniDepthV2):
        raise UserError(f"--start-from {name}: this is a UniDepthV1 network; training is for V2")
    return network


def _entries(dataset: str, root: Path) -> list[Entry]:
    from tenfold.depth.readers import READERS

    return READERS[dataset](root)


def generate(
    output: Positional[Path],
    count: int = 100,
    size: tuple[int, int] = (480, 640),
    fov_deg: tuple[float, float] = (35.0, 105.0),
    shift: float = 0.1,
    camera: Path | None = None,
    texture: Literal["ruled", "varied"] = "varied",
    pieces: int = 6,
    shadows: bool = True,
    seed: int = 0,
) -> object:
    """Make frames of rendered rooms with exact depth and known cameras.

    OUTPUT gets `rgb/`, `depth/` (16 bits, mm; 0 where a camera looks behind itself) and `frames.json`, which `train`
    and `evaluate` read.

    Args:
        output: folder; it must not hold frames yet.
        count: number of frames.
        size: height and width in pixels.
        fov_deg: range of the horizontal fields of view of pinhole cameras, degrees.
        shift: of their principal points from the middle, at most, in image sizes.
        camera: a JSON file {"name", "params"} of one camera for all frames instead, for instance a fisheye.
        texture: ruled (tiles of 0.4 m, wall courses of 0.3 m) or varied.
        pieces: of furniture in a room.
        shadows: cast shadows.
        seed: of rooms, cameras and noise.

    Example:
        tenfold depth generate rooms/ --count 20 --size 240 320
    """
    if count < 1 or min(size) < 2 or pieces < 0:
        raise UserError("generate: --count, --size and --pieces are positive numbers")
    if not 0 < fov_deg[0] <= fov_deg[1] < 170:
        raise UserError(f"--fov-deg {fov_deg[0]:g} {fov_deg[1]:g}: expected a range within 0 and 170 degrees")

    from tenfold.depth import rooms
    from tenfold.depth.config import SceneConfig

    scenes = SceneConfig(pieces=pieces, texture=texture, shadows=shadows)
    cameras = rooms.PinholeRange(fov_deg, shift) if camera is None else _camera_file(camera)
    with console.progress("generate", count) as bar:
        rooms.write_frames(output, count, size, cameras, scenes, seed, bar.advance)
    return {"folder": str(output), "frames": count, "size": list(size), "seed": seed}


def _camera_file(path: Path) -> CameraParameters:
    from tenfold.depth.camera_input import Camera

    found = Camera.from_file(path)
    return found.model, found.params


def evaluate(
    dataset: Positional[Dataset],
    root: Positional[Path],
    model: str = "tenfold-depth-tiny",
    camera: Literal["predicted", "given"] = "predicted",
    protocol: str | None = None,
    max_depth: float | None = None,
    resolution_level: float | None = None,
    limit: int | None = None,
    device: DeviceName = "auto",
) -> object:
    """Score a network by a dataset's own protocol: range and crop, per image, then averaged.

    Args:
        dataset: how ROOT is laid out, and by default which protocol holds.
        root: the dataset's folder.
        model: name, hub id or file of a network.
        camera: whether the network is told each frame's camera.
        protocol: another dataset's protocol, or kitti-eigen-crop.
        max_depth: deepest valid depth in metres, instead of the protocol's.
        resolution_level: 0 to 9, see `predict`.
        limit: score only so many frames, spread evenly over the set.
        device: where to compute.

    Example:
        tenfold depth evaluate folder recordings/ --max-depth 8
        tenfold depth evaluate nyu nyu_test/ --model unidepth-v2-vits14
    """
    import dataclasses

    from tenfold.core.config import near
    from tenfold.core.devices import set_threads
    from tenfold.depth import evaluation

    name = protocol or dataset
    if name not in evaluation.PROTOCOLS:
        raise UserError(f"--protocol {name}: {near(name, list(evaluation.PROTOCOLS))}")
    chosen = evaluation.PROTOCOLS[name]
    if max_depth is not None:
        if max_depth <= 0:
            raise UserError(f"--max-depth {max_depth:g} is not a depth")
        chosen = dataclasses.replace(chosen, max_depth_m=max_depth)
    entries = _entries(dataset, root)
    if limit is not None:
        if limit < 1:
            raise UserError(f"--limit {limit}: score at least one frame")
        entries = entries[:: max(1, len(entries) // limit)][:limit]

    from tenfold.depth.predictor import DepthEstimator

    set_threads()
    estimator = DepthEstimator.from_pretrained(model, device)
    result = evaluation.evaluate_entries(evaluation.of_estimator(estimator, camera, resolution_level), entries, chosen)
    console.table(
        ("metric", f"mean of {len(result.images)} frames"),
        [(metric, f"{value:.4g}") for metric, value in result.mean.items()],
        title=f"{model} on {root}, camera {camera}, depth to {chosen.max_depth_m:g} m",
    )
    return result


def reproduce(
    output: OutputFolder = Path("results/reproduce/depth.json"),
    full: bool = False,
    seeds: tuple[int, ...] = (0, 1, 2),
    frames: Path | None = None,
    runs: Path = Path("runs/reproduce-depth"),
) -> object:
    """Reproduce the paper's claim at small scale: what a camera module and a spherical output are worth.

    Four small networks learn from rendered rooms with each seed: a plain depth head, camera prompting with the
    spherical and with the Cartesian output, and the former with the invariance loss. Each takes about two minutes of
    one core (with --full about an hour); a stopped run is resumed.

    Args:
        output: result file; the plot goes beside it.
        full: 8000 steps on 48 x 64 pixels instead of 2000 on 24 x 32.
        seeds: one training of every network for each.
        frames: folder of real frames to score on as well, scale-invariantly; by default those below TENFOLD_DATA.
        runs: folder of the training runs.

    Example:
        tenfold depth reproduce --seeds 0 -o depth.json
    """
    import dataclasses
    import os

    from tenfold.core.devices import set_threads
    from tenfold.depth import reproduce as experiment

    set_threads(1)
    if frames is None and "TENFOLD_DATA" in os.environ:
        frames = Path(os.environ["TENFOLD_DATA"]) / "depth" / "rgbd"
    entries = _entries("folder", frames) if frames else []
    config = dataclasses.replace(experiment.FULL if full else experiment.QUICK, seeds=seeds)
    return experiment.reproduce(output, config, runs / ("full" if full else "quick"), entries)


TRAINING_VERBS: dict[str, Callable[..., object]] = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "reproduce": reproduce,
}
