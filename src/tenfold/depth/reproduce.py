"""The paper's headline at the scale of the machine (V1 table 5): what a camera and its output space are worth.

Small networks that differ in one thing each learn metric depth from rendered rooms of wide camera variation, and are
scored on cameras that they have seen, on those that they have not, and on real frames. A network that is prompted by
rays is scored twice: with the camera that it predicts, and with the true one given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.core import checkpoint
from tenfold.core.console import UserError, say, table
from tenfold.core.files import check_writable
from tenfold.core.plots import plot_bars, save_plot
from tenfold.core.results import Table, write_results
from tenfold.core.training import FitConfig, cosine, fit
from tenfold.depth.ablation import ARMS, AblationNetwork, RenderedPairs, arm_loss, pinhole
from tenfold.depth.cameras import pinhole_rays, rays
from tenfold.depth.config import SceneConfig
from tenfold.depth.data import Entry, cut_view
from tenfold.depth.metrics import depth_metrics, mean_metrics, ray_errors_deg
from tenfold.depth.simulate import add_noise, random_scenes, render

PLAIN, SPHERICAL, CARTESIAN, CONSISTENT = ARMS
TEST_SEED = 10_000  # of rooms that no arm is trained on
TEST_IMAGES = 96
FISHEYE = "fisheye 140 deg, unseen"
# Horizontal fields of view in degrees, and how far the principal point may lie from the middle.
BANDS: Mapping[str, tuple[float, float, float]] = {
    "35-105 deg, as trained": (35, 105, 0),
    "35-50 deg": (35, 50, 0),
    "90-105 deg": (90, 105, 0),
    "28-33 deg, unseen": (28, 33, 0),
    "110-120 deg, unseen": (110, 120, 0),
    "principal point 12 % off, unseen": (35, 105, 0.12),
    "another size, unseen": (35, 105, 0),
}
INSIDE, NARROW, WIDE, SHIFTED, RESIZED = (list(BANDS)[index] for index in (0, 3, 4, 5, 6))
PAPER = {  # V1 table 5: out-of-domain d1, SIlog, F_A
    "plain": "Baseline++ (spherical, no camera): 51.2 / 18.1 / 38.3",
    SPHERICAL: "without L_con: 52.9 / 14.9 / 45.2",
    CARTESIAN: "without the spherical output: 37.1 / 22.5 / 21.8",
    CONSISTENT: "full: 57.1 / 14.8 / 49.7",
    "given": "oracle (true camera): 68.1 / 14.8 / 57.2",
}


@dataclass(frozen=True)
class ReproduceConfig:
    """The experiment.

    Args:
        steps: optimiser steps of each arm and seed.
        seeds: of rooms, cameras, weights and noise.
        pairs: rendered pairs of views a seed; all arms of a seed learn from the same.
        size: height and width of the pictures.
        batch_size: pictures a step, two of a pair side by side.
        learning_rate: AdamW's, after a warm-up, on a cosine to zero.
        weight_decay: AdamW's.
    """

    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 3072
    size: tuple[int, int] = (24, 32)
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01


QUICK = ReproduceConfig()
FULL = ReproduceConfig(steps=8000, pairs=16_384, size=(48, 64), batch_size=16)


@dataclass(frozen=True)
class Score:
    """Means over a test set.

    Args:
        arm: which network.
        seed: of its training.
        camera: what it was told: `mean` (the plain arm), `own` or `given`.
        test: name of the test set.
        metrics: d1, arel, silog, error_3d_m, ray_error_deg; on real frames d1_si and silog.
    """

    arm: str
    seed: int
    camera: str
    test: str
    metrics: dict[str, float]


def train_arm(arm: str, seed: int, config: ReproduceConfig, data: RenderedPairs, run_dir: Path) -> Path:
    """Train one arm with one seed, or go on with the run that `run_dir` holds; returns the file of its weights."""
    torch.manual_seed(seed)
    model = AblationNetwork(ARMS[arm])
    result = fit(
        model,
        data,
        arm_loss(ARMS[arm]),
        lambda network: torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        ),
        FitConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            seed=seed,
            clip_norm=1.0,
            checkpoint_every=250,
            keep_checkpoints=1,
            log_every=100,
            log_with=(),
            threads=1,
        ),
        run_dir,
        schedule=cosine(config.steps, warmup=config.steps // 20),
        recipe=_recipe(arm, config),
        device="cpu",
    )
    return result.weights


def _recipe(arm: str, config: ReproduceConfig) -> Mapping[str, object]:
    return {"arm": asdict(ARMS[arm]), **{name: value for name, value in asdict(config).items() if name != "seeds"}}


@dataclass(frozen=True)
class TestSet:
    """Rendered pictures of rooms that no arm has seen: B x 3 x H x W each."""

    image: Tensor
    points: Tensor
    rays: Tensor


def test_set(name: str, size: tuple[int, int], count: int) -> TestSet:
    """The rendered test set of this name."""
    height, width = (size[0] * 4 // 3, size[1] * 5 // 4) if name == RESIZED else size
    random = np.random.default_rng((TEST_SEED, list(BANDS).index(name) if name in BANDS else len(BANDS)))
    if name == FISHEYE:
        focal = 0.5 * width / np.deg2rad(70)  # equidistant but for a little bending
        camera = [focal, focal, width / 2, height / 2, 0.02, -0.01, *[0.0] * 10]
        directions = rays("fisheye624", torch.tensor(camera), height, width).expand(count, -1, -1, -1)
    else:
        low, high, shift = BANDS[name]
        fov = torch.from_numpy(random.uniform(low, high, count)).float()
        off = torch.from_numpy(random.uniform(-shift, shift, (count, 2))).float()
        directions = pinhole_rays(pinhole(fov, height, width, off), height, width)
    scenes = random_scenes(SceneConfig(), TEST_SEED, range(count))
    rendering = render(scenes, directions)
    image = add_noise(rendering.image, SceneConfig().noise, TEST_SEED, range(count))
    return TestSet(image, rendering.points_m, directions)


@torch.no_grad()
def score(model: AblationNetwork, test: TestSet, given: bool) -> dict[str, float]:
    """Metrics of each image, averaged."""
    output = model.eval()(test.image, test.rays if given else None)
    rows = []
    for points, guess, truth, rays_ in zip(output["points"], output["rays"], test.points, test.rays, strict=True):
        depth = depth_metrics(points[2].clamp_min(1e-3).flatten().numpy(), truth[2].flatten().numpy())
        angles = ray_errors_deg(guess.permute(1, 2, 0).numpy(), rays_.permute(1, 2, 0).numpy())
        rows.append(
            {name: depth[name] for name in ("d1", "arel", "silog")}
            | {"error_3d_m": float((points - truth).norm(dim=0).mean()), "ray_error_deg": float(angles.mean())}
        )
    return mean_metrics(rows)


@dataclass(frozen=True)
class RealView:
    """A real frame cut to the networks' size.

    Args:
        image: 3 x H x W in [0, 1].
        depth: 1 x H x W, m, 0 where it is not known.
        rays: 1 x 3 x H x W, unit, of the true camera.
    """

    image: Tensor
    depth: Tensor
    rays: Tensor


def real_views(frames: Sequence[Entry], size: tuple[int, int]) -> list[RealView]:
    """Those of the frames that have a pinhole camera."""
    views = []
    for entry in frames:
        frame = entry.read()
        if frame.intrinsics is None:
            continue
        scale = max(size[0] / frame.image.shape[0], size[1] / frame.image.shape[1])
        image, depth, intrinsics = cut_view(frame, scale, (0.0, 0.0), size)
        views.append(RealView(image, depth, pinhole_rays(intrinsics[None], *size)))
    return views


@torch.no_grad()
def score_real(model: AblationNetwork, views: Sequence[RealView], given: bool) -> dict[str, float]:
    """Scale-invariant metrics on real frames."""
    rows = []
    for view in views:
        z = model.eval()(view.image[None], view.rays if given else None)["points"][0, 2].clamp_min(1e-3)
        valid = view.depth[0] > 0
        found = depth_metrics(z[valid].numpy(), view.depth[0][valid].numpy())
        rows.append({name: found[name] for name in ("d1_si", "silog")})
    return mean_metrics(rows)


def score_arm(
    arm: str, seed: int, weights: Path, tests: Mapping[str, TestSet], views: Sequence[RealView]
) -> list[Score]:
    """All scores of one trained network."""
    model = AblationNetwork(ARMS[arm])
    checkpoint.load_weights(model, weights)
    cameras = ("own", "given") if ARMS[arm].prompt else ("mean",)
    scores = []
    for camera in cameras:
        for name, test in tests.items():
            if name != FISHEYE or camera != "own":  # the predicted camera is always a pinhole
                scores.append(Score(arm, seed, camera, name, score(model, test, camera == "given")))
        if views:
            scores.append(Score(arm, seed, camera, "real frames", score_real(model, views, camera == "given")))
    return scores


# ---------------------------------------------------------------- tables


def values(scores: Sequence[Score], arm: str, camera: str, test: str, metric: str) -> list[float]:
    """One number for each seed, in the order of the seeds."""
    return [s.metrics[metric] for s in scores if (s.arm, s.camera, s.test) == (arm, camera, test)]


def _shown(numbers: Sequence[float], digits: int = 3) -> str | None:
    if not numbers:
        return None
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{spread}"


def result_tables(scores: Sequence[Score]) -> list[Table]:
    """One table of the test sets for each metric that matters, one of the arms beside the paper's."""
    variants = list(dict.fromkeys((s.arm, s.camera) for s in scores))
    tests = list(dict.fromkeys(s.test for s in scores if s.test != "real frames"))
    columns = ("cameras of the test", *(f"{arm}, {_told(camera)}" for arm, camera in variants))
    tables = []
    for name, metric, caption in (
        ("d1", "d1", "Share of pixels within 25 % of the true depth (d1)"),
        ("error_3d", "error_3d_m", "Mean distance of predicted and true points, m"),
        ("ray_error", "ray_error_deg", "Mean angle between the rays that were used and the true ones, degrees"),
        ("silog", "silog", "SIlog, 100 x standard deviation of the log ratio"),
    ):
        rows = [[test, *(_shown(values(scores, *variant, test, metric)) for variant in variants)] for test in tests]
        tables.append(Table(name, f"{caption}; mean ± standard deviation over seeds", columns, rows))
    rows = []
    for arm, camera in variants:
        cells = [_shown(values(scores, arm, camera, INSIDE, metric)) for metric in ("d1", "silog", "error_3d_m")]
        real = [_shown(values(scores, arm, camera, "real frames", metric)) for metric in ("d1_si", "silog")]
        key = "plain" if arm == PLAIN else "given" if camera == "given" else arm
        rows.append([f"{arm}, {_told(camera)}", *cells, *real, PAPER[key]])
    tables.append(
        Table(
            "ablation",
            "The arms on cameras as trained, on real frames (out of domain, scale-invariant), and the paper "
            "with full-size networks (V1 table 5, ConvNeXt-L, out of domain: d1 / SIlog / F_A)",
            ("arm", "d1", "SIlog", "3D error, m", "real d1 after scaling", "real SIlog", "paper"),
            rows,
        )
    )
    return tables


def _told(camera: str) -> str:
    return {"mean": "no camera", "own": "own camera", "given": "camera given"}[camera]


@dataclass(frozen=True)
class Bar:
    """One claim: what was measured and what it must reach."""

    claim: str
    measured: float
    wanted: float
    met: bool


def bars(scores: Sequence[Score], full: bool) -> list[Bar]:
    """The claims, on means over seeds; those whose arms were not trained are left out."""

    def mean(arm: str, camera: str, test: str, metric: str) -> float:
        found = values(scores, arm, camera, test, metric)
        return fmean(found) if found else float("nan")

    found = []
    for test, least in ((INSIDE, 0.25), (NARROW, 0.30), (WIDE, 0.30)):
        gain = mean(SPHERICAL, "given", test, "d1") - mean(PLAIN, "mean", test, "d1")
        found.append(Bar(f"d1 with the camera given, above plain, {test}", gain, least, gain >= least))
    for metric, most, name in (("error_3d_m", 0.90, "3D error"), ("ray_error_deg", 0.75, "ray error")):
        ratio = mean(SPHERICAL, "own", INSIDE, metric) / mean(PLAIN, "mean", INSIDE, metric)
        found.append(Bar(f"{name} with the own camera, over plain, {INSIDE}", ratio, most, ratio <= most))
    ratio = mean(SPHERICAL, "own", INSIDE, "silog") / mean(CARTESIAN, "own", INSIDE, "silog")
    found.append(Bar(f"SIlog, spherical over Cartesian, {INSIDE}", ratio, 0.92, ratio <= 0.92))
    if full:
        gain = mean(SPHERICAL, "own", INSIDE, "d1") - mean(PLAIN, "mean", INSIDE, "d1")
        found.append(Bar(f"d1 with the own camera, above plain, {INSIDE}", gain, 0.0, gain > 0))
    return [bar for bar in found if bar.measured == bar.measured]


def reproduce(
    output: Path,
    config: ReproduceConfig,
    runs: Path,
    frames: Sequence[Entry] = (),
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, Any]:
    """Train what is not trained yet, score it, print the tables, write results and plot.

    Args:
        output: result file; the plot goes beside it.
        config: the experiment.
        runs: folder of the training runs, which are resumed where they stand.
        frames: real frames.
        arms: names of `ARMS`; the plain one is what the others are compared with.

    Raises:
        UserError: no seeds, or a folder that cannot be written to.
    """
    if not config.seeds or min(config.seeds) < 0:
        raise UserError("give at least one seed, and none below 0")
    check_writable(output.parent)
    started = time.time()
    tests = {name: test_set(name, config.size, TEST_IMAGES) for name in (*BANDS, FISHEYE)}
    views = real_views(frames, config.size)
    scores: list[Score] = []
    for seed in config.seeds:
        data: RenderedPairs | None = None
        for number, arm in enumerate(ARMS):
            if arm not in arms:
                continue
            run_dir = runs / f"arm{number}-seed{seed}"
            weights = run_dir / "model.safetensors"
            if not weights.is_file():
                say(f"{arm}, seed {seed}: {config.steps} steps")
                data = data or RenderedPairs(config.pairs, config.size, seed)
                weights = train_arm(arm, seed, config, data, run_dir)
            scores += score_arm(arm, seed, weights, tests, views)
    tables = result_tables(scores)
    claims = bars(scores, full=config.steps >= FULL.steps)
    tables.append(
        Table(
            "bars",
            "What the experiment must show, on means over seeds",
            ("claim", "measured", "wanted", "met"),
            [[bar.claim, round(bar.measured, 3), bar.wanted, "yes" if bar.met else "no"] for bar in claims],
        )
    )
    for item in tables:
        table(item.columns, item.rows, title=item.caption)
    save_plot(_plot(scores), output.with_name("depth_d1.svg"))
    return write_results(
        output,
        room="depth",
        kind="reproduce",
        seconds=time.time() - started,
        tables=tables,
        config=asdict(config) | {"arms": list(arms), "real_frames": len(frames)},
        seeds=config.seeds,
        paper=PAPER,
        scores=scores,
    )


def _plot(scores: Sequence[Score]) -> Any:
    """d1 of each variant, on cameras as trained and on the two unseen bands."""
    lengths, spread = {}, {}
    for test, short in ((INSIDE, "as trained"), (NARROW, "28-33 deg"), (WIDE, "110-120 deg")):
        for arm, camera in ((PLAIN, "mean"), (SPHERICAL, "own"), (SPHERICAL, "given")):
            found = values(scores, arm, camera, test, "d1")
            if found:
                name = f"{short}: {_told(camera)}"
                lengths[name], spread[name] = fmean(found), (min(found), max(found))
    return plot_bars(lengths, "share of pixels within 25 % of the true depth", spread=spread)
