"""The paper's headline at the scale of the machine, in two parts.

Cost (robust, seconds): time of the spatial-channel correlation and of window self-attention as windows grow.
Quality (hours, fragile): hierarchical windows against fixed ones and against SwinIR of the same width and depth, at
equal steps and at equal processor time, with every seed reported.

The quality arms train at a constant rate and are scored on averaged weights, so that any step and any moment of a run
can be compared with any other; all start at bicubic interpolation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from tenfold.core.console import UserError, say, table
from tenfold.core.files import check_writable
from tenfold.core.plots import plot_lines, save_plot
from tenfold.core.results import Table, write_results
from tenfold.core.training import FitConfig, constant, fit
from tenfold.superres.config import HiTConfig, TrainConfig
from tenfold.superres.cost import CostRow, cost_sweep
from tenfold.superres.data import PatchPairs
from tenfold.superres.evaluation import find_pairs
from tenfold.superres.training import Validation, initialise_bicubic_path, l1_loss, make_model, make_optimizer

PAPER_GAIN = "+0.26 dB on Urban100 x2 (HiT-SIR against SwinIR-Light, 500k steps)"
PAPER_SPEED = "7.6x (HiT-SIR against SwinIR-Light, A100, x2 to 1280x720)"


@dataclass(frozen=True)
class QualityConfig:
    """The quality experiment.

    Attributes:
        minutes: processor minutes of training for each arm and seed.
        seeds: of weights, crops and augmentation.
        scale: upscaling factor.
        width: feature channels of every arm.
        blocks: blocks of six layers of every arm.
        heads: heads of every arm.
        patch: side of the low-res patch, as published.
        batch_size: patches a step.
        learning_rate: Adam's, as published; constant here.
        evaluate_every: steps between scores.
    """

    minutes: float = 20.0
    seeds: tuple[int, ...] = (0, 1, 2)
    scale: int = 2
    width: int = 32
    blocks: int = 2
    heads: int = 4
    patch: int = 64
    batch_size: int = 4
    learning_rate: float = 5e-4
    evaluate_every: int = 50


def hit_arm(ratios: tuple[float, ...]) -> Callable[[QualityConfig, int], nn.Module]:
    """HiT-SIR with the given window ratios, starting at bicubic."""

    def make(config: QualityConfig, seed: int) -> nn.Module:
        network = HiTConfig(
            variant="sir",
            scale=config.scale,
            width=config.width,
            depths=(len(ratios),) * config.blocks,
            heads=(config.heads,) * config.blocks,
            window_ratios=ratios,
        )
        return make_model(network, "bicubic", seed)

    return make


def swinir_arm(config: QualityConfig, seed: int) -> nn.Module:
    """SwinIR-light's design (window 8, shifted windows, softmax attention) at the arms' width and depth."""
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(seed)
    model = SwinIR(
        upscale=config.scale,
        img_size=config.patch,  # masks are prepared for this size, so that training pays nothing for them
        window_size=8,
        img_range=1.0,
        depths=[6] * config.blocks,
        embed_dim=config.width,
        num_heads=[config.heads] * config.blocks,
        mlp_ratio=2,
        drop_path_rate=0.0,
        upsampler="pixelshuffledirect",
    )
    initialise_bicubic_path(model.conv_first, model.conv_after_body, model.upsample[0], config.scale, 3)
    return model


ARMS: Mapping[str, Callable[[QualityConfig, int], nn.Module]] = {
    "hierarchical windows 4-64": hit_arm((0.5, 1.0, 2.0, 4.0, 6.0, 8.0)),
    "fixed windows 8": hit_arm((1.0,) * 6),
    "SwinIR": swinir_arm,
}


@dataclass(frozen=True)
class Curve:
    """One training run: Y-PSNR in dB by step and by processor second, for each evaluation set."""

    arm: str
    seed: int
    parameters: int
    steps: list[int]
    cpu_seconds: list[float]
    psnr_y: dict[str, list[float]]

    def at(self, axis: str, limit: float, name: str) -> float:
        """Score at `limit` steps or seconds, interpolated linearly between evaluations."""
        x = self.steps if axis == "steps" else self.cpu_seconds
        y = self.psnr_y[name]
        for index in range(1, len(x)):
            if x[index] >= limit:
                share = (limit - x[index - 1]) / (x[index] - x[index - 1])
                return y[index - 1] + share * (y[index] - y[index - 1])
        return y[-1]


def run_arm(
    arm: str,
    seed: int,
    config: QualityConfig,
    images: Sequence[Path],
    evaluation: Mapping[str, tuple[Path, Path | None]],
    run_dir: Path,
) -> Curve:
    """Train one arm with one seed for its time (a run that is there is resumed) and read its curve."""
    sets = {name: Validation(high, low, config.scale) for name, (high, low) in evaluation.items()}
    model = ARMS[arm](config, seed)
    fit(
        model,
        PatchPairs(images, scale=config.scale, patch=config.patch, seed=seed),
        l1_loss,
        make_optimizer(TrainConfig(learning_rate=config.learning_rate)),
        FitConfig(
            steps=1_000_000,  # time ends the run
            batch_size=config.batch_size,
            seed=seed,
            clip_norm=1.0,
            ema_decay=0.995,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.evaluate_every,
            log_every=config.evaluate_every,
            log_with=(),
            threads=1,
        ),
        run_dir,
        schedule=constant(warmup=50),
        evaluate=lambda network, step: {name: s(network, step)["psnr_y"] for name, s in sets.items()},
        recipe={"arm": arm, **asdict(replace(config, minutes=0, seeds=()))},
        should_stop=lambda progress: progress.cpu_seconds >= 60 * config.minutes,
        device="cpu",
    )
    start = {name: s.bicubic_psnr() for name, s in sets.items()}
    return read_curve(run_dir, arm, seed, sum(p.numel() for p in model.parameters()), start)


def read_curve(run_dir: Path, arm: str, seed: int, parameters: int, start: Mapping[str, float]) -> Curve:
    """The curve of a run from its `metrics.jsonl`; step 0 is bicubic interpolation, where every arm starts."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    time_at = {row["step"]: row["cpu_seconds"] for row in rows if "cpu_seconds" in row}
    scored = {row["step"]: row for row in rows if all(f"eval/{name}" in row for name in start)}
    steps = sorted(step for step in scored if step in time_at)
    return Curve(
        arm=arm,
        seed=seed,
        parameters=parameters,
        steps=[0, *steps],
        cpu_seconds=[0.0, *(time_at[step] for step in steps)],
        psnr_y={name: [value, *(scored[step][f"eval/{name}"] for step in steps)] for name, value in start.items()},
    )


def quality_tables(curves: Sequence[Curve]) -> list[Table]:
    """Gain over bicubic at the most steps and at the most time that every run reached, by arm and seed."""
    steps = min(curve.steps[-1] for curve in curves)
    seconds = min(curve.cpu_seconds[-1] for curve in curves)
    names = list(curves[0].psnr_y)
    tables = []
    for axis, limit, title in (
        ("steps", steps, f"after {steps} steps"),
        ("cpu_seconds", seconds, f"after {seconds / 60:.1f} processor minutes on one core"),
    ):
        rows: list[list[Any]] = []
        for arm in dict.fromkeys(curve.arm for curve in curves):
            runs = [curve for curve in curves if curve.arm == arm]
            row: list[Any] = [
                arm,
                runs[0].parameters,
                round(fmean(run.steps[-1] / run.cpu_seconds[-1] for run in runs), 2),
            ]
            for name in names:
                gains = [run.at(axis, limit, name) - run.psnr_y[name][0] for run in runs]
                spread = f" ± {stdev(gains):.2f}" if len(gains) > 1 else ""
                row.append(f"{fmean(gains):+.2f}{spread} ({', '.join(f'{gain:.2f}' for gain in gains)})")
            rows.append(row)
        tables.append(
            Table(
                name=f"quality_at_equal_{axis}",
                caption=(
                    f"Y-PSNR gain over bicubic in dB {title}, mean ± standard deviation over seeds (each seed). "
                    f"Paper: {PAPER_GAIN}"
                ),
                columns=("arm", "parameters", "steps/s", *names),
                rows=rows,
            )
        )
    return tables


def cost_table(rows: Sequence[CostRow]) -> Table:
    """Time by window of both operators."""
    return Table(
        name="cost",
        caption=(
            "Processor seconds of two layers (width 60, 6 heads, 192 x 192 pixels) on one thread, as windows grow. "
            f"Paper, whole network: {PAPER_SPEED}"
        ),
        columns=("window", "spatial-channel correlation, s", "window self-attention, s", "ratio"),
        rows=[
            [
                f"{row.window} x {row.window}",
                row.correlation_s,
                row.attention_s,
                None if row.attention_s is None else f"{row.attention_s / row.correlation_s:.1f}x",
            ]
            for row in rows
        ],
    )


def reproduce(
    output: Path,
    parts: Sequence[str],
    quality: QualityConfig,
    images: Sequence[Path],
    evaluation: Mapping[str, tuple[Path, Path | None]],
    runs: Path,
) -> dict[str, Any]:
    """Run the parts, print the tables, write the results and the plots.

    Args:
        output: result file, for instance `results/reproduce/superres.json`; plots go beside it.
        parts: of `cost` and `quality`.
        quality: settings of the quality part.
        images: folders of training images.
        evaluation: name -> (ground truth, low-res partners or None).
        runs: folder of the training runs, which are resumed where they stand.

    Returns:
        The written object.

    Raises:
        UserError: no seed, no time; images that are missing or cannot be read; spandrel, which the SwinIR arm needs, is
            not installed; a folder that cannot be written to. All of it before the work.
    """
    if "quality" in parts:
        _check_quality(quality, images, evaluation)
    check_writable(output.parent)
    started = time.time()
    tables: list[Table] = []
    curves: list[Curve] = []
    if "cost" in parts:
        rows = cost_sweep()
        tables.append(cost_table(rows))
        attention = [(row.window, row.attention_s) for row in rows if row.attention_s is not None]
        series = {
            "spatial-channel correlation": ([r.window for r in rows], [r.correlation_s for r in rows]),
            "window self-attention": ([window for window, _ in attention], [seconds for _, seconds in attention]),
        }
        figure = plot_lines(series, "window side, pixels", "processor seconds", log_x=True, log_y=True)
        save_plot(figure, output.with_name("superres_cost.svg"))
    if "quality" in parts:
        for seed in quality.seeds:
            for number, arm in enumerate(ARMS):
                say(f"{arm}, seed {seed}: {quality.minutes:g} processor minutes")
                curves.append(run_arm(arm, seed, quality, images, evaluation, runs / f"arm{number}-seed{seed}"))
        tables += quality_tables(curves)
        for name in curves[0].psnr_y:
            save_plot(quality_plot(curves, name), output.with_name(f"superres_quality_{name.lower()}.svg"))
    for item in tables:
        table(item.columns, item.rows, title=item.caption)
    return write_results(
        output,
        room="superres",
        kind="reproduce",
        seconds=time.time() - started,
        tables=tables,
        config=asdict(quality) | {"parts": list(parts), "images": [folder.name for folder in images]},
        seeds=quality.seeds if "quality" in parts else (),
        packages=("spandrel",),
        paper={"speed": PAPER_SPEED, "quality": PAPER_GAIN},
        curves=curves,
    )


def _check_quality(
    config: QualityConfig, images: Sequence[Path], evaluation: Mapping[str, tuple[Path, Path | None]]
) -> None:
    """Raise for what would otherwise come up after hours, when the third network is to be trained."""
    if not config.seeds or min(config.seeds) < 0:
        raise UserError("the quality part needs at least one seed, and none below 0")
    if not config.minutes > 0:
        raise UserError(f"the quality part needs time: --minutes {config.minutes:g} is none")
    for folder in images:
        find_pairs(folder, None, config.scale)
    for high_res, low_res in evaluation.values():
        find_pairs(high_res, low_res, config.scale)
    if find_spec("spandrel") is None:
        raise UserError("the SwinIR arm needs spandrel: pip install 'tenfold[bench]'")


def quality_plot(curves: Sequence[Curve], name: str) -> Any:
    """Mean Y-PSNR by processor minute for each arm, with the band between the worst and the best seed."""
    end = min(curve.cpu_seconds[-1] for curve in curves)
    moments = [end * index / 20 for index in range(21)]
    series, spread = {}, {}
    for arm in dict.fromkeys(curve.arm for curve in curves):
        runs = [[run.at("cpu_seconds", moment, name) for moment in moments] for run in curves if run.arm == arm]
        minutes = [moment / 60 for moment in moments]
        by_moment = list(zip(*runs, strict=True))
        series[arm] = (minutes, [fmean(values) for values in by_moment])
        spread[arm] = ([min(values) for values in by_moment], [max(values) for values in by_moment])
    return plot_lines(series, "processor minutes of training", f"Y-PSNR on {name}, dB", spread=spread)
