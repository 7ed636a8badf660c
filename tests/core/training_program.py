"""A small training that tests run in processes of their own: to kill them, to signal them, and to run several of them.

Every kind of randomness that a run may use takes part, so that a resume which forgets one of them is found out: dropout
(torch), noise in the loss (NumPy) and a random sign (Python).
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tenfold.core.console import UserError
from tenfold.core.training import FitConfig, FitResult, cosine, fit

STEPS = 24
BATCH = 8


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(dropout), nn.Tanh(), nn.Linear(12, 1))


class Teacher:
    """Noisy samples of a fixed function; kills the process when it is asked for sample `fatal_index`."""

    def __init__(self, fatal_index: int | None = None) -> None:
        self.fatal_index = fatal_index

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.fatal_index:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.from_numpy(np.random.default_rng((3, index)).standard_normal(6).astype(np.float32))
        return {"x": x, "y": x.sin().sum(0, keepdim=True)}


def noisy_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    noise = 0.01 * float(np.random.standard_normal()) * random.choice((-1, 1))
    error = (model(batch["x"]) - batch["y"] + noise).abs().mean()
    return error, {"error": error.detach()}


def quiet_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    error = (model(batch["x"]) - batch["y"]).square().mean()
    return error, {"root": error.detach().sqrt()}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    run_dir: Path | str,
    fatal_index: int | None = None,
    fatal_sync: int | None = None,
    signal_at: tuple[int, int] | None = None,
    noisy: bool = True,
    **overrides: Any,
) -> FitResult:
    """Train in this process.

    Args:
        run_dir: folder of the run.
        fatal_index: number of the sample at which the process kills itself.
        fatal_sync: the call of `os.fsync` at which it does, counted from 1: somewhere inside the writing of a file.
        signal_at: (step, signal) that the process sends itself.
        noisy: random loss and dropout; without them the result does not depend on the number of processes.
        overrides: of the FitConfig.
    """
    if fatal_sync:
        real, calls = os.fsync, iter(range(1, 10**6))

        def fsync(handle: int) -> None:
            if next(calls) == fatal_sync:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync

    def interrupt(progress: Any) -> bool:
        if signal_at and progress.step == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        return False

    settings = {"steps": STEPS, "batch_size": BATCH, "ema_decay": 0.9, "clip_norm": 1.0, "checkpoint_every": 5}
    settings |= {"log_every": 1, "log_with": (), "threads": 1, **overrides}
    return fit(
        make_model(0.1 if noisy else 0.0),
        Teacher(fatal_index),
        noisy_loss if noisy else quiet_loss,
        adam,
        FitConfig(**settings),
        run_dir,
        schedule=cosine(STEPS, warmup=3),
        should_stop=interrupt,
        device="cpu",
    )


def _child(environment: dict[str, str], target: Callable[..., object], run_dir: Path, options: dict[str, Any]) -> None:
    os.environ.update(environment)
    try:
        target(run_dir, **options)
    except UserError as error:
        Path(f"{run_dir}.error").write_text(str(error))
        sys.exit(error.exit_status)


def launch(run_dir: Path, processes: int = 1, target: Callable[..., object] = train, **options: Any) -> list[int]:
    """Run `target(run_dir, **options)` in new processes that form one group.

    Options named `rank0` or `rank1` are dictionaries for one process only. A UserError's text goes to `RUN_DIR.error`.

    Returns:
        Their exit codes, minus the signal where one killed them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tenfold.core.training.loop", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = [options.pop(f"rank{rank}", {}) for rank in range(processes)]
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(context.Process(target=_child, args=(environment, target, run_dir, options | own[rank])))
        started[-1].start()
    for process in started:
        process.join(timeout=60)
        if process.is_alive():  # waits for a partner that is gone; torchrun would end it
            process.kill()
            process.join()
    return [process.exitcode for process in started]
