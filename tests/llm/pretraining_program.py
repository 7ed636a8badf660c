"""A small pre-training that tests run in processes of their own: to kill it, to signal it, to spoil its batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tenfold.core.console import UserError
from tenfold.llm.config import ModelConfig, Phase, TrainConfig
from tenfold.llm.phases import Timetable
from tenfold.llm.tokenizer import ByteTokenizer
from tenfold.llm.training import PhasedSequences, PretrainResult, new_model, train
from tenfold.llm.windows import Validation, Windows

MODEL = ModelConfig(vocabulary=32, width=32, layers=2, heads=2, kv_heads=1, ffn=48, context=16, init="small")
# The length doubles, the batch is halved and the rotary base grows after 40 steps; 70 steps in all.
PHASES = (
    Phase("short", 0, 40 * 64, 16, 1e4, ((0, 4),), 1e-2, warmup_steps=5),
    Phase("long", 40 * 64, 70 * 64, 32, 1e5, ((40 * 64, 2),), 1e-2, final_learning_rate=1e-3),
)
STEPS = 70


def text(seed: int, length: int = 4000) -> torch.Tensor:
    """Words of a small vocabulary in random order: easy to learn down to the choice of the word."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(32, (8, 6), generator=generator)
    order = torch.randint(8, (length // 6,), generator=torch.Generator().manual_seed(seed))
    return words[order].flatten()


class Spoiled:
    """A sample stream whose batches at some steps have wrong targets, and which kills or signals at others."""

    def __init__(self, base: PhasedSequences, bad: Sequence[int], kill: int | None, stop: int | None) -> None:
        self.base, self.bad, self.kill, self.stop = base, set(bad), kill, stop
        table = base.timetable
        self.first = {table.sequences(step).start: step for step in range(table.steps)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        step = next(self.first[i] for i in range(indices[0], -1, -1) if i in self.first)
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        batch = self.base.batch(indices)
        if step in self.bad:
            batch["targets"] = (batch["targets"] + 16) % 32
        return batch


def run(
    run_dir: Path | str,
    bad: Sequence[int] = (),
    kill: int | None = None,
    stop: int | None = None,
    keep: str = "",
    **changes: Any,
) -> PretrainResult:
    """Train in this process.

    Args:
        run_dir: folder of the run.
        bad: steps, counted from 0, whose targets are wrong.
        kill: step at which the process kills itself.
        stop: step at which it sends itself SIGTERM.
        keep: file for the weights that this process ends with.
        changes: of the TrainConfig.
    """
    settings: dict[str, Any] = {"evaluate_every": 0, "checkpoint_every": 10, **changes}
    config = TrainConfig(PHASES, **settings)
    table = Timetable(PHASES)
    parts = [Windows(text(1), phase.length, seed) for seed, phase in enumerate(PHASES)]
    model = new_model(replace(MODEL), 0)
    result = train(
        model,
        Spoiled(PhasedSequences(table, parts), bad, kill, stop),
        config,
        Path(run_dir),
        validation=Validation(text(2, 1200).tolist(), 16, ByteTokenizer()),
        device="cpu",
        peak_flops=1e11,
    )
    if keep:
        torch.save(model.state_dict(), keep)
    return result


def _child(environment: dict[str, str], run_dir: Path, options: dict[str, Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        run(run_dir, **options)
    except UserError as error:
        Path(f"{run_dir}.error").write_text(str(error))
        sys.exit(error.exit_status)


def launch(
    run_dir: Path, processes: int = 1, each: Callable[[int], dict[str, Any]] | None = None, **options: Any
) -> list[int]:
    """Run `run(run_dir, **options, **each(rank))` in new processes; return their exit codes, minus a killing signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretraining_program", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = options | (each(rank) if each else {})
        started.append(context.Process(target=_child, args=(environment, run_dir, own)))
        started[-1].start()
    for process in started:
        process.join(timeout=900)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]
