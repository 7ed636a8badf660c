"""One small run of `reproduce`: what it is, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tenfold.core.console import UserError
from tenfold.core.files import read_json, write_json
from tenfold.core.training import fit
from tenfold.llm import stability
from tenfold.llm.config import ModelConfig, TrainConfig
from tenfold.llm.data import TextFiles
from tenfold.llm.phases import Timetable, single_phase
from tenfold.llm.tokenizer import BYTES, ByteTokenizer
from tenfold.llm.training import fit_config, make_optimizer, metadata, new_model, next_token_loss, schedule
from tenfold.llm.windows import Validation, Windows

WARMUP = 10  # steps over which the rate rises
SETTLED = 20  # steps after which gradient norms count
EARLY = 10  # steps that the early training loss is the mean of
WINDOWS = 128  # of the validation
TEXT = "tinyshakespeare.txt.xz"


@dataclass(frozen=True)
class Job:
    """One run: bytes of real text, 512 of them a step.

    Attributes:
        arm: name of the model's variant.
        changes: what the variant changes in the model.
        seed: of weights and data.
        layers: depth.
        width: hidden channels; the feed-forward network has 21/8 of it, in four heads.
        rate: highest learning rate; it falls to a tenth along half a cosine.
        clip: largest gradient norm; 0 does not clip.
        precision: `no` or `bf16`.
        steps: optimiser steps.
        batch: rows of a step.
        length: bytes of a row.
    """

    arm: str
    changes: dict[str, Any] = field(hash=False)
    seed: int = 0
    layers: int = 48
    width: int = 64
    rate: float = 3e-2
    clip: float = 1.0
    precision: str = "no"
    steps: int = 200
    batch: int = 8
    length: int = 64

    @property
    def name(self) -> str:
        """Name of its folder: everything that it depends on."""
        variant = "-".join(f"{name}_{value}" for name, value in self.changes.items())
        return (
            f"{variant}-L{self.layers}-d{self.width}-lr{self.rate:g}-clip{self.clip:g}-{self.precision}-s{self.steps}"
            f"-b{self.batch}x{self.length}-seed{self.seed}"
        )

    def model(self) -> ModelConfig:
        """The network: small initialisation and an embedding of sigma 0.5 unless the arm says otherwise."""
        base = ModelConfig(
            vocabulary=BYTES,
            width=self.width,
            layers=self.layers,
            heads=4,
            kv_heads=2,
            ffn=self.width * 21 // 8,
            init="small",
            context=self.length,
        )
        return replace(base, **self.changes)

    def train(self) -> TrainConfig:
        """Its recipe, without a guard: spikes are what is looked for."""
        phases = single_phase(self.steps, self.batch, self.length, self.rate, WARMUP, final=0.1)
        return TrainConfig(
            phases,
            clip_norm=self.clip,
            guard="off",
            precision=self.precision,  # type: ignore[arg-type]
            seed=self.seed,
            evaluate_every=0,
            checkpoint_every=max(1, self.steps // 2),
            keep_checkpoints=1,
        )


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        validation: final loss in nats a byte; NaN where the run diverged.
        early: training loss around a quarter of the steps.
        spikes: loss spikes by the definition in `stability.find_spikes`.
        largest_spike: in nats.
        recovery: longest time to recover, in steps; None without spikes or recovery.
        ratio: largest gradient norm after the warm-up over the median one.
        spread: standard deviation of log10 of gradient norms after the warm-up.
        diverged: why the run was given up, or nothing.
        cpu_seconds: processor time of its steps.
        losses: of every step.
        norms: gradient norms of every step, before clipping.
        gains: mean gain by kind and layer at the end.
        initial_gains: of the norms after sub-layers, at the start.
    """

    validation: float
    early: float
    spikes: int
    largest_spike: float
    recovery: int | None
    ratio: float
    spread: float
    diverged: str
    cpu_seconds: float
    losses: list[float]
    norms: list[float]
    gains: dict[str, list[float]]
    initial_gains: dict[str, float]


def run_job(job: Job, runs: Path, text: Path | None) -> Outcome:
    """Do a run or go on with it; one that is done is read back."""
    folder = runs / job.name
    done = folder / "outcome.json"
    if done.is_file():
        return _read_outcome(done)
    config, recipe = job.model(), job.train()
    timetable = Timetable(recipe.phases)
    training, held_out = split_text(text)
    validation = Validation(held_out.tolist(), job.length, ByteTokenizer(), WINDOWS, batch=32)
    model = new_model(config, job.seed)
    begin = {kind: values["mean"][0] for kind, values in stability.gains(model).items() if "post" in kind}
    looks: dict[str, Any] = {}

    def evaluate(network: torch.nn.Module, step: int) -> dict[str, float]:
        looks["gains"] = stability.gains(network)  # type: ignore[arg-type]
        return validation(network)

    diverged, cpu_seconds = "", 0.0
    try:
        result = fit(
            model,
            Windows(training, job.length, job.seed),
            next_token_loss,
            make_optimizer(recipe, job.rate),
            replace(fit_config(recipe, timetable), log_with=(), threads=1),
            folder,
            schedule=schedule(timetable),
            evaluate=evaluate,
            recipe=asdict(job),
            metadata=metadata(config, timetable),
            device="cpu",
        )
        cpu_seconds = result.cpu_seconds
    except UserError as error:
        if "skipped" not in str(error) and "finite" not in str(error):
            raise
        diverged = str(error)
    outcome = _outcome(folder, diverged, cpu_seconds, looks.get("gains", {}), begin)
    write_json(done, asdict(outcome))
    return outcome


def _read_outcome(path: Path) -> Outcome:
    values: dict[str, Any] = read_json(path)
    for name in ("validation", "early", "ratio", "spread", "largest_spike"):
        values[name] = math.nan if values[name] is None else values[name]
    return Outcome(**values)


def _outcome(
    folder: Path, diverged: str, cpu_seconds: float, gains: dict[str, Any], begin: dict[str, float]
) -> Outcome:
    log = stability.read_run(folder)
    spikes = stability.find_spikes(log.losses)
    norms = stability.gradient_norms(log.norms, SETTLED)
    scores = [values["nats_per_byte"] for _, values in sorted(log.validation.items())]
    quarter = log.losses[max(0, len(log.losses) // 4 - EARLY) : len(log.losses) // 4]
    recoveries = [spike.recovery for spike in spikes if spike.recovery is not None]
    return Outcome(
        validation=math.nan if diverged or not scores else scores[-1],
        early=fmean(quarter) if quarter else math.nan,
        spikes=len(spikes),
        largest_spike=max((spike.height for spike in spikes), default=0.0),
        recovery=max(recoveries, default=None),
        ratio=norms.ratio if norms else math.nan,
        spread=norms.spread if norms else math.nan,
        diverged=diverged,
        cpu_seconds=cpu_seconds,
        losses=[round(loss, 4) for loss in log.losses],
        norms=[float(f"{norm:.4g}") for norm in log.norms],
        gains={kind: values["mean"] for kind, values in gains.items()},
        initial_gains=begin,
    )


def split_text(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """First 90 % and last 10 % of a text (by default the built-in one), as bytes."""
    with resources.as_file(resources.files("tenfold.llm") / "assets" / TEXT) as built_in:
        content = "".join(TextFiles(path or built_in).pieces()).encode()
    ids = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]
