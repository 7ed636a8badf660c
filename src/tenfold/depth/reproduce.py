"""The paper's headline at the scale of the machine (V1 table 5): what a camera and its output space are worth.

Small networks that differ in one thing each learn metric depth from rendered rooms of wide camera variation, and are
scored on cameras that they have seen and on those that they have not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tenfold.core.training import FitConfig, cosine, fit
from tenfold.depth.ablation import ARMS, AblationNetwork, RenderedPairs, arm_loss


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
