"""What a training run is told. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tenfold.core.console import UserError


@dataclass(frozen=True)
class FitConfig:
    """How long, how large and how carefully to train.

    Args:
        steps: optimiser steps of the whole run.
        batch_size: samples in a step, over all processes and accumulated micro-batches.
        seed: of the sample stream and of every random generator.
        accumulate: micro-batches into which each process cuts its share of a step, to save memory.
        clip_norm: largest gradient norm; None does not clip.
        precision: of the forward pass: `no` is float32, `bf16` and `fp16` are automatic mixed precision (weights stay
            float32).
        ema_decay: decay of the exponential moving average of the weights, which is then what is evaluated and kept;
            None keeps none.
        compile: run the model through `torch.compile`.
        loss_spike_factor: refuse a step whose loss is above this many times the running median; None never does. It
            judges positive losses only.
        gradient_spike_factor: the same for the gradient norm.
        loss_spike_height: refuse a step whose loss is a spike in this sense: above the median of the last 50 by more
            than this and by more than 6 robust standard deviations (see `guard.spike_bar`); None never does.
        on_spike: what becomes of a refused step, whose batch is left out either way. `skip` goes on with the weights as
            they are, which is right where the batch is bad. `rollback` goes back to the weights of the newest
            checkpoint and leaves out all batches since, which is right where the weights have gone bad.
        max_skips: stop the run when more steps than this are refused in a row.
        best_metric: the evaluated metric whose best weights are kept in `best.safetensors`.
        best_mode: whether a larger (`max`) or a smaller (`min`) `best_metric` is better.
        evaluate_every: steps between evaluations; 0 evaluates after the last step only.
        checkpoint_every: steps between checkpoints; 0 writes one after the last step only.
        keep_checkpoints: number of newest checkpoints that stay on the disk.
        log_every: steps between rows of `metrics.jsonl`.
        log_with: trackers of accelerate that get the same rows (`tensorboard`, `wandb`, ...). TensorBoard is left out
            silently where it is not installed.
        workers: processes that prepare samples; 0 prepares them in the training process.
        threads: torch threads; None takes TENFOLD_THREADS, OMP_NUM_THREADS or all processors.
    """

    steps: int
    batch_size: int
    seed: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float | None = None
    compile: bool = False
    loss_spike_factor: float | None = 10.0
    gradient_spike_factor: float | None = None
    loss_spike_height: float | None = None
    on_spike: Literal["skip", "rollback"] = "skip"
    max_skips: int = 20
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    log_with: tuple[str, ...] = ("tensorboard",)
    workers: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"training: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("evaluate_every", "checkpoint_every", "max_skips", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"training: {name} must not be negative, not {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"training: ema_decay must be in [0, 1), not {self.ema_decay}")


# Fields that change what a run shows or how fast it is, and not the weights that it ends with: a resumed run may change
# them.
FREE_ON_RESUME = frozenset(
    {"evaluate_every", "checkpoint_every", "keep_checkpoints", "log_every", "log_with", "workers", "threads"}
)
