"""The loop: one step after the other, on one processor or on many nodes, until the run is done or is asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, send_to_device
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from tenfold.core.console import ProgressBar, UserError, say, warn
from tenfold.core.console import progress as progress_bar
from tenfold.core.devices import resolve_device, seed_everything, set_threads
from tenfold.core.files import disk_error, make_folder, write_bytes
from tenfold.core.training import record
from tenfold.core.training.config import FitConfig
from tenfold.core.training.data import Batches, Samples, stream
from tenfold.core.training.ema import Ema
from tenfold.core.training.guard import Guard
from tenfold.core.training.interrupt import InterruptCatcher, Interrupted
from tenfold.core.training.metrics import Averages, MetricsFile, merge
from tenfold.core.training.schedule import Schedule, constant
from tenfold.core.training.snapshot import (
    Progress,
    Snapshots,
    model_tensors,
    random_state,
    restore_random_state,
)

Loss = Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor | float]]]
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Args:
        run_dir: the run's folder.
        weights: file with the final weights (the average where one is kept).
        best_weights: file with the weights of the best evaluation, where `FitConfig.best_metric` asks for it.
        steps: steps done, of `FitConfig.steps`.
        skipped: those that the guard left out.
        finished: whether all steps were done; False when `should_stop` ended the run.
        metrics: the last row of every metric, evaluated ones as `eval/NAME`.
        best: best value of `FitConfig.best_metric`.
        best_step: the step at which it was reached.
        seconds: wall time in training steps, without evaluation and checkpoints.
        cpu_seconds: processor time in training steps, of the first process.
    """

    run_dir: Path
    weights: Path
    best_weights: Path | None
    steps: int
    skipped: int
    finished: bool
    metrics: dict[str, Any]
    best: float | None
    best_step: int | None
    seconds: float
    cpu_seconds: float


def fit(
    model: nn.Module,
    dataset: Samples | Batches,
    loss: Loss,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    config: FitConfig,
    run_dir: Path | str,
    *,
    schedule: Schedule | None = None,
    evaluate: Evaluate | None = None,
    recipe: object = None,
    metadata: Mapping[str, str] | None = None,
    should_stop: Callable[[Progress], bool] | None = None,
    resume: bool = True,
    device: str = "auto",
) -> FitResult:
    """Train `model` in place, or go on with the run that `run_dir` holds.

    A run that is killed at any moment and called again ends with the weights, bit for bit, of one that was left alone (same machine,
    same number of processes and threads).

    Args:
        model: the module; its parameters are trained where they require gradients.
        dataset: the sample stream, see `data.Samples` and `data.Batches`; a pure function of the sample's number.
        loss: from the (wrapped) model and a batch on its device to the mean loss over the batch and further means to report. It must
            call the model's `forward`, or several processes cannot share gradients.
        optimizer: makes the optimiser from the model; learning rates are the base that `schedule` scales.
        config: steps, batch and the like.
        run_dir: folder of the run; on several nodes, on a file system that all of them see.
        schedule: from the number of steps done to the factor of the learning rates; constant by default.
        evaluate: from the bare model (holding the averaged weights where `ema_decay` is set, in evaluation mode, without gradients)
            and the step to metrics. Every process calls it; the first one's answer counts. Random states are put back after it.
        recipe: the room's own configuration (a dataclass or mapping), recorded beside `config` and compared on resume.
        metadata: header of every weights file, by which a room can rebuild the model.
        should_stop: asked after every step, for time budgets; a run that it ends is evaluated and saved, and can be resumed.
        resume: False refuses a folder that already holds a run instead of going on with it.
        device: `auto`, `cpu` or the accelerator's name.

    Returns:
        The result; `model` holds the final trained (not averaged) weights.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; the current step was finished and a checkpoint written.
        UserError: another configuration than the run's, a full disk, too many skipped steps, a batch size that does not divide.
    """
    set_threads(config.threads)
    accelerator = _make_accelerator(config, Path(run_dir), device)
    loop = _Loop(
        accelerator,
        model,
        dataset,
        loss,
        optimizer(model),
        config,
        Path(run_dir),
        schedule or constant(),
        metadata or {},
    )
    loop.open(recipe, resume)
    try:
        return loop.run(evaluate, should_stop)
    finally:
        loop.close()


def _make_accelerator(config: FitConfig, run_dir: Path, device: str) -> Accelerator:
    kind = resolve_device(device).type
    if config.precision == "fp16" and kind == "cpu":
        raise UserError("training: precision fp16 needs an accelerator: use bf16 or no on the CPU")
    for name in config.log_with:
        if name != "tensorboard" and find_spec(name) is None:
            raise UserError(f"training: log_with asks for {name}, which is not installed: pip install {name}")
    trackers = [name for name in config.log_with if find_spec(name)]
    # accelerate keeps its state for the whole process; another fit in it may want another precision or device.
    alone = PartialState().num_processes == 1 if PartialState._shared_state else False
    AcceleratorState._reset_state(reset_partial_state=alone)
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=kind == "cpu",
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
    )
    accelerator.gradient_accumulation_steps = (
        1  # the loop accumulates itself; the launcher's setting would divide twice
    )
    return accelerator


class _Loop:
    """One sitting of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        dataset: Samples | Batches,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        config: FitConfig,
        run_dir: Path,
        schedule: Schedule,
        metadata: Mapping[str, str],
    ) -> None:
        self.accelerator = accelerator
        self.dataset = dataset
        self.loss = loss
        self.config = config
        self.run_dir = run_dir
        self.schedule = schedule
        self.metadata = dict(metadata)
        self.main = accelerator.is_main_process
        model.train()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self.callable = torch.compile(self.model) if config.compile else self.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.ema = Ema(self.bare, config.ema_decay) if config.ema_decay is not None else None
        self.guard = Guard(config.loss_spike_factor, config.gradient_spike_factor)
        self.snapshots = Snapshots(run_dir / "checkpoints", config.keep_checkpoints, self.metadata)
        self.progress = Progress()
        self.averages = Averages()
        self.saved_step = -1
        self.metrics: MetricsFile | None = None

    def open(self, recipe: object, resume: bool) -> None:
        """Read the checkpoint to go on from, or start a new run."""
        accelerator = self.accelerator
        if self.main:
            make_folder(self.run_dir)
            record.check(self.run_dir, self.config, recipe, resume)
        newest = [str(self.snapshots.newest() or "") if self.main else ""]
        broadcast_object_list(newest)
        seed_everything(self.config.seed + accelerator.process_index)
        if newest[0]:
            path = Path(newest[0])
            self.progress, guard, ranks = self.snapshots.load(
                path, self.bare, self.ema, self.optimizer.optimizer, accelerator.scaler
            )
            self.guard.restore(guard)
            if accelerator.process_index < len(ranks):  # a larger number of processes than before seeds the new ones
                own = ranks[accelerator.process_index]
                self.averages.restore(own["averages"])
                restore_random_state(own["random"])
            self.saved_step = self.progress.step
            if self.main:
                say(f"resuming {self.run_dir} at step {self.progress.step} of {self.config.steps}")
        if self.main:
            self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.progress.step)
        with self._random_state_kept():
            accelerator.init_trackers(
                "tenfold",
                init_kwargs={
                    "tensorboard": {"purge_step": self.progress.step + 1},
                    "wandb": {"name": self.run_dir.name, "dir": str(self.run_dir), "resume": "allow"},
                },
            )

    def close(self) -> None:
        """Let go of files and trackers, and undo what accelerate wrapped around the model."""
        if self.metrics:
            self.metrics.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def run(self, evaluate: Evaluate | None, should_stop: Callable[[Progress], bool] | None) -> FitResult:
        """Do the remaining steps."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        batches = stream(
            self.dataset,
            range(progress.step, config.steps),
            config.batch_size,
            config.accumulate,
            accelerator.process_index,
            accelerator.num_processes,
            config.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        stop = False
        with (
            InterruptCatcher() as interrupt,
            closing(batches),
            progress_bar("training", config.steps, progress.step) as bar,
        ):

            def wishes() -> list[float]:
                return [float(interrupt.received), float(should_stop is not None and should_stop(progress))]

            while progress.step < config.steps and not stop:
                wall, cpu = time.perf_counter(), time.process_time()
                signal_number, stop = self._step(next(batches), wishes)
                progress.step += 1
                progress.seconds += time.perf_counter() - wall
                progress.cpu_seconds += time.process_time() - cpu
                last = stop or progress.step == config.steps
                self._log(bar, last)
                if signal_number and not last:
                    self._save()
                    raise Interrupted(
                        f"training stopped by a signal at step {progress.step} of {config.steps}; a checkpoint is in "
                        f"{self.snapshots.folder}: run the same command again to go on",
                        signal_number,
                    )
                if evaluate and (last or (config.evaluate_every and progress.step % config.evaluate_every == 0)):
                    self._evaluate(evaluate)
                due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
                # While steps are being skipped the last checkpoint is the last known good one: leave it in place.
                if last or (due and not self.guard.consecutive):
                    self._save()
        return self._result(finished=progress.step == config.steps)

    def _step(self, micro_batches: list[Any], wishes: Callable[[], list[float]]) -> tuple[int, bool]:
        """One optimiser step, or the guard's refusal of it. Returns the signal that came and whether to stop after this step."""
        config, accelerator = self.config, self.accelerator
        factor = self.schedule(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        total: Tensor | float = 0.0
        for index, batch in enumerate(micro_batches, 1):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            synced = index == len(micro_batches)
            with nullcontext() if synced else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss, values = self.loss(self.callable, batch)
                accelerator.backward(loss / config.accumulate if config.accumulate > 1 else loss)
            total = total + loss.detach()
            self.averages.add(values)
        accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        numbers = [float(total) / config.accumulate, float(norm)]
        if accelerator.num_processes > 1:
            asked = wishes()
            signals = [float(asked[0] == 2), float(asked[0] == 15)]
            reduced = accelerator.reduce(
                torch.tensor([*numbers, *signals, asked[1]], device=accelerator.device), "mean"
            )
            mean_loss, mean_norm, interrupt, terminate, stop = reduced.tolist()
            numbers, wish = [mean_loss, mean_norm], [2.0 if interrupt else 15.0 if terminate else 0.0, stop]
        reason = self.guard.judge(*numbers)
        if reason:
            self._skip(reason)
        else:
            if config.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip_norm, norm)
            self.optimizer.step()
            if self.ema:
                self.ema.update()
            self.averages.add({"loss": numbers[0], "grad_norm": numbers[1]})
        self.optimizer.zero_grad()
        if accelerator.num_processes == 1:
            wish = wishes()
        return int(wish[0]), bool(wish[1])

    def _skip(self, reason: str) -> None:
        """Leave a step out; give the run up when too many follow each other."""
        step = self.progress.step + 1
        self.progress.skipped += 1
        if self.accelerator.scaler:  # fp16: an overflow lowers the scale
            self.accelerator.scaler.update()
        if self.guard.consecutive > self.config.max_skips:
            good = self.snapshots.newest()
            raise UserError(
                f"training: {self.guard.consecutive} steps in a row had to be skipped, at step {step} because {reason}; the last good "
                f"checkpoint is {good or 'none yet'}: start a new run from it with a lower learning rate, and check the data"
            )
        if self.main:
            warn(f"step {step} is skipped: {reason}")

    def _log(self, bar: ProgressBar, last: bool) -> None:
        config, progress = self.config, self.progress
        shown = ""
        if last or progress.step % config.log_every == 0:
            states = gather_object([self.averages.state()])
            self.averages.restore({})
            means = merge(states)
            row: dict[str, Any] = {"step": progress.step, "loss": means.pop("loss", None), **means}
            row["lr"] = self.optimizer.param_groups[0]["lr"]
            row["skipped"] = progress.skipped
            row["seconds"] = round(progress.seconds, 3)
            row["cpu_seconds"] = round(progress.cpu_seconds, 3)
            self._write(row)
            shown = f"loss {row['loss']:.4g}" if row["loss"] is not None else "loss -"
        bar.advance(1, note=shown)

    def _write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(row)
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        try:
            self.accelerator.log(numbers, step=row["step"])
        except OSError as error:
            raise disk_error(self.run_dir / "tensorboard", error) from error

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        state = random_state()
        yield
        restore_random_state(state)

    def _evaluate(self, evaluate: Evaluate) -> None:
        config, progress = self.config, self.progress
        self.bare.eval()
        with self._random_state_kept(), self.ema.in_place() if self.ema else nullcontext():
            with torch.no_grad():
                answer: list[Any] = [dict(evaluate(self.bare, progress.step))]
            broadcast_object_list(answer)
            values: dict[str, float] = answer[0]
            better = self._is_best(values)
            if better:
                progress.best, progress.best_step = values[config.best_metric or ""], progress.step
                tensors = model_tensors(self.bare)
                if self.main:
                    write_bytes(self.run_dir / "best.safetensors", to_safetensors(tensors, self.metadata or None))
        self.bare.train()
        self._write({"step": progress.step, **{f"eval/{name}": value for name, value in values.items()}})
        if self.main:
            say(f"step {progress.step}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))

    def _is_best(self, values: Mapping[str, float]) -> bool:
        name, best = self.config.best_metric, self.progress.best
        if name is None:
            return False
        if name not in values:
            raise UserError(f"training: best_metric {name!r} is not evaluated: choose one of {', '.join(values)}")
        return best is None or (values[name] > best if self.config.best_mode == "max" else values[name] < best)

    def _save(self) -> None:
        if self.saved_step == self.progress.step:
            return
        ranks = gather_object([{"random": random_state(), "averages": self.averages.state()}])
        self.snapshots.save(
            self.progress,
            self.guard.state(),
            self.bare,
            self.ema,
            self.optimizer.optimizer,
            self.accelerator.scaler,
            ranks,
            self.main,
        )
        self.saved_step = self.progress.step
        self.accelerator.wait_for_everyone()

    def _result(self, finished: bool) -> FitResult:
        progress, weights = self.progress, self.run_dir / "model.safetensors"
        with self.ema.in_place() if self.ema else nullcontext():
            tensors = model_tensors(self.bare)
        if self.main:
            write_bytes(weights, to_safetensors(tensors, self.metadata or None))
        return FitResult(
            run_dir=self.run_dir,
            weights=weights,
            best_weights=self.run_dir / "best.safetensors" if progress.best_step is not None else None,
            steps=progress.step,
            skipped=progress.skipped,
            finished=finished,
            metrics=dict(self.metrics.last) if self.metrics else {},
            best=progress.best,
            best_step=progress.best_step,
            seconds=progress.seconds,
            cpu_seconds=progress.cpu_seconds,
        )
