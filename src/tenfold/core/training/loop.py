"""The loop: one step after the other, on one processor or on many nodes, until the run is done or is asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn

from tenfold.core.console import UserError, say, warn
from tenfold.core.console import progress as progress_bar
from tenfold.core.devices import keep_freed_memory, set_threads
from tenfold.core.files import disk_error, make_folder
from tenfold.core.training import record
from tenfold.core.training.config import FitConfig
from tenfold.core.training.data import Batches, Samples, SamplesOfStep, stream
from tenfold.core.training.ema import Ema
from tenfold.core.training.guard import Guard
from tenfold.core.training.interrupt import InterruptCatcher, Interrupted
from tenfold.core.training.metrics import Averages, MetricsFile, merge
from tenfold.core.training.processes import agree, make_accelerator
from tenfold.core.training.randomness import seed_step
from tenfold.core.training.schedule import Schedule, constant
from tenfold.core.training.snapshot import Metadata, Progress, Snapshots, header, is_sharded, save_weights

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
        skipped: those that the guard left out or took back.
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
    metadata: Metadata | None = None,
    samples: SamplesOfStep | None = None,
    should_stop: Callable[[Progress], bool] | None = None,
    resume: bool = True,
    data_share: tuple[int, int] | None = None,
    device: str = "auto",
) -> FitResult:
    """Train `model` in place, or go on with the run that `run_dir` holds.

    A run that is killed at any moment and called again ends with the weights, bit for bit, of one that was left alone
    (same machine, same number of processes and threads).

    Args:
        model: the module; its parameters are trained where they require gradients. One whose parameters are spread over
            the processes already (DTensors of FSDP2 or tensor parallelism) is left as it is; another is copied to each
            process (DDP), or spread as `accelerate launch` was told.
        dataset: the sample stream, see `data.Samples` and `data.Batches`; a pure function of the sample's number.
        loss: from the (wrapped) model and a batch on its device to the mean loss over the batch and further means to
            report. It must call the model's `forward`, or several processes cannot share gradients.
        optimizer: makes the optimiser from the model; learning rates are the base that `schedule` scales.
        config: steps, batch and the like.
        run_dir: folder of the run; on several nodes, on a file system that all of them see.
        schedule: from the number of steps done to the factor of the learning rates; constant by default.
        evaluate: from the bare model (holding the averaged weights where `ema_decay` is set, in evaluation mode,
            without gradients) and the step to metrics. Every process calls it; the first one's answer counts. Random
            states are put back after it.
        recipe: the room's own configuration (a dataclass or mapping), recorded beside `config` and compared on resume.
        metadata: header of every weights file, by which a room can rebuild the model, or a function of the step that
            gives it.
        samples: from the number of steps done to the numbers of the samples of the next step, where batches grow or
            shrink in the course of a run: each range begins where the last one ended. By default all batches are of
            `config.batch_size`.
        should_stop: asked after every step, for time budgets; a run that it ends is evaluated and saved, and can be
            resumed.
        resume: False refuses a folder that already holds a run instead of going on with it.
        data_share: which share of a step's samples this process takes and of how many, where several processes work on
            the same samples; by default each process has a share of its own.
        device: `auto`, `cpu` or the accelerator's name.

    Returns:
        The result; `model` holds the final trained (not averaged) weights.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; the current step was finished and a checkpoint written.
        UserError: another configuration than the run's, a full disk, too many skipped steps, a batch size that does not
            divide.
    """
    run_dir = Path(run_dir)
    set_threads(config.threads)
    accelerator = make_accelerator(config, run_dir, device, data_share)
    if accelerator.is_main_process:
        make_folder(run_dir)
        record.check(run_dir, config, recipe, resume)
    loop = _Loop(accelerator, model, optimizer(model), loss, schedule or constant(), config, run_dir, metadata or {})
    try:
        loop.open()
        with keep_freed_memory():
            return loop.run(dataset, samples, data_share, evaluate, should_stop)
    finally:
        loop.close()


class _Loop:
    """One sitting of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        schedule: Schedule,
        config: FitConfig,
        run_dir: Path,
        metadata: Metadata,
    ) -> None:
        self.accelerator = accelerator
        self.loss = loss
        self.schedule = schedule
        self.config = config
        self.run_dir = run_dir
        self.metadata = metadata
        self.main = accelerator.is_main_process
        model.train()
        if is_sharded(model):
            self.model, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare = accelerator.unwrap_model(self.model)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.parameters = [parameter for parameter in self.bare.parameters() if parameter.requires_grad]
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.ema = Ema(self.bare, config.ema_decay) if config.ema_decay is not None else None
        self.guard = Guard(config.loss_spike_factor, config.gradient_spike_factor, config.loss_spike_height)
        self.snapshots = Snapshots(run_dir / "checkpoints", config.keep_checkpoints, metadata)
        self.progress = Progress()
        self.averages = Averages()
        self.saved_step: int | None = None
        self.metrics: MetricsFile | None = None
        self.note = ""

    def open(self) -> None:
        """Go on from the newest checkpoint, or start a new run."""
        accelerator = self.accelerator
        newest = [str(self.snapshots.newest() or "") if self.main else ""]
        broadcast_object_list(newest)
        if newest[0]:
            self.progress, guard, averages = self.snapshots.load(
                Path(newest[0]), self.bare, self.ema, self.optimizer.optimizer, accelerator.scaler
            )
            self.guard.restore(guard)
            if accelerator.process_index < len(averages):  # there may be more processes than before
                self.averages.restore(averages[accelerator.process_index])
            self.saved_step = self.progress.step
        if self.main:
            self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", self.progress.step)
            if newest[0]:
                say(f"resuming {self.run_dir} at step {self.progress.step} of {self.config.steps}")
        with _disk_errors_named(self.run_dir / "tensorboard"):
            accelerator.init_trackers(
                "tenfold",
                init_kwargs={
                    "tensorboard": {"purge_step": self.progress.step + 1},
                    "wandb": {"name": self.run_dir.name, "dir": str(self.run_dir)},
                },
            )

    def close(self) -> None:
        """Let go of files and trackers, and undo what accelerate wrapped around the model's forward."""
        if self.metrics:
            self.metrics.close()
        for tracker in self.accelerator.trackers:
            with suppress(OSError):  # of a full disk, which the last write has reported already
                tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def run(
        self,
        dataset: Samples | Batches,
        samples: SamplesOfStep | None,
        data_share: tuple[int, int] | None,
        evaluate: Evaluate | None,
        should_stop: Callable[[Progress], bool] | None,
    ) -> FitResult:
        """Do the remaining steps."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        alone = accelerator.num_processes == 1
        rank, shares = data_share or (accelerator.process_index, accelerator.num_processes)
        batches = stream(
            dataset,
            range(progress.step, config.steps),
            config.batch_size,
            config.accumulate,
            rank,
            shares,
            config.workers,
            pin_memory=accelerator.device.type == "cuda",
            samples=samples,
        )
        with (
            InterruptCatcher() as interrupt,
            closing(batches),
            progress_bar("training", config.steps, progress.step) as bar,
        ):

            def wishes() -> tuple[int, bool]:
                stop = bool(should_stop and should_stop(progress))
                return interrupt.received, stop

            signal_number, stop = 0, False
            if progress.step:  # a run that its budget had ended stays ended
                *_, stop = agree(accelerator, 0.0, 0.0, *wishes())
            while True:
                last = stop or progress.step == config.steps
                if evaluate and not signal_number and self._evaluation_due(last):
                    self._evaluate(evaluate)
                    signal_number = signal_number or interrupt.received * alone
                due = config.checkpoint_every and progress.step and progress.step % config.checkpoint_every == 0
                # While steps are being skipped, no new checkpoint may push out the last one before them.
                if last or signal_number or (due and not self.guard.consecutive):
                    self._save()
                if last and not signal_number:
                    result = self._result()
                    signal_number = interrupt.received * alone
                    if not signal_number:
                        return result
                if signal_number:
                    raise Interrupted(
                        f"training was stopped by a signal after step {progress.step} of {config.steps}; the "
                        f"checkpoint is in {self.snapshots.folder}: run the same command again to go on",
                        signal_number,
                    )
                wall, cpu = time.perf_counter(), time.process_time()
                # Several processes agree within the step, so that a wish takes effect one step later than alone.
                signal_number, stop = self._step(next(batches), *((0, False) if alone else wishes()))
                progress.step += 1
                progress.seconds += time.perf_counter() - wall
                progress.cpu_seconds += time.process_time() - cpu
                if alone:
                    signal_number, stop = wishes()
                if stop or progress.step == config.steps or progress.step % config.log_every == 0:
                    self._log()
                bar.advance(1, note=self.note)

    def _step(self, batches: list[Any], signal_number: int, stop: bool) -> tuple[int, bool]:
        """One optimiser step, or the guard's refusal of it.

        Args:
            batches: the micro-batches of this process.
            signal_number: signal that this process got, 0 for none.
            stop: whether this process wants to stop.

        Returns:
            The signal that any process got, and whether any wants to stop.
        """
        config, accelerator = self.config, self.accelerator
        seed_step(config.seed, self.progress.step, accelerator.process_index, accelerator.device)
        factor = self.schedule(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        total: Tensor | float = 0.0
        reported = []
        for number, batch in enumerate(batches, 1):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with nullcontext() if number == len(batches) else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss, values = self.loss(self.forward, batch)
                accelerator.backward(loss / len(batches))
            total = total + loss.detach() / len(batches)
            reported.append(values)
        accelerator.unscale_gradients()
        norm = gradient_norm(self.parameters)
        mean_loss, mean_norm, signal_number, stop = agree(accelerator, float(total), float(norm), signal_number, stop)
        reason = self.guard.judge(mean_loss, mean_norm)
        if reason:
            self.averages.add({"refused_loss": mean_loss, "refused_grad_norm": mean_norm})
            self._refuse(reason)
        else:
            if config.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip_norm, norm)
            self.optimizer.step()
            if self.ema:
                self.ema.update()
            for values in reported:
                self.averages.add(values)
            self.averages.add({"loss": mean_loss, "grad_norm": mean_norm})
        self.optimizer.optimizer.zero_grad()  # accelerate's own looks up a signature in every step
        return signal_number, stop

    def _refuse(self, reason: str) -> None:
        """Leave a step out, or all since the last checkpoint; give the run up when too many follow each other.

        Every process decides by the same reduced numbers and so does the same.
        """
        step = self.progress.step + 1
        self.progress.skipped += 1
        if self.accelerator.scaler:  # fp16: an overflow must lower the scale, though no step is taken
            self.accelerator.scaler.update()
        if self.guard.consecutive > self.config.max_skips:
            raise UserError(
                f"training: {self.guard.consecutive} steps in a row had to be skipped, the last, step {step}, because "
                f"{reason}; the last good checkpoint is {self.snapshots.newest() or 'none yet'}: start a new run from "
                "it with a lower learning rate, and check the data"
            )
        if self.config.on_spike == "rollback" and self._roll_back(reason):
            return
        if self.main:
            warn(f"step {step} is skipped: {reason}")

    def _roll_back(self, reason: str) -> bool:
        """Take the weights, optimiser and average of the newest checkpoint, and go on with the next batch.

        The step counter moves on: the data position and the schedules are functions of it, so that a run that is killed
        afterwards and resumes at that checkpoint meets the same spike and does the same again.

        Returns:
            Whether there was a checkpoint.
        """
        newest = [str(self.snapshots.newest() or "") if self.main else ""]
        broadcast_object_list(newest)
        if not newest[0]:
            return False
        refusals = self.guard.consecutive
        then, guard, _ = self.snapshots.load(
            Path(newest[0]), self.bare, self.ema, self.optimizer.optimizer, self.accelerator.scaler
        )
        self.guard.restore(guard | {"consecutive": refusals})
        step = self.progress.step + 1
        lost = step - then.step
        # What was skipped since has been counted; so has this step.
        self.progress.skipped = then.skipped + lost
        if self.main:
            warn(
                f"step {step} is rolled back to the checkpoint of step {then.step}, and {lost} batches are left out: "
                f"{reason}"
            )
        return True

    def _log(self) -> None:
        """Write one row of means since the last."""
        progress = self.progress
        means = merge(gather_object([self.averages.state()]))
        self.averages.restore({})
        row: dict[str, Any] = {"step": progress.step, "loss": means.pop("loss", None), **means}
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row["skipped"] = progress.skipped
        row["seconds"] = round(progress.seconds, 3)
        row["cpu_seconds"] = round(progress.cpu_seconds, 3)
        self._write(row)
        self.note = "every step skipped" if row["loss"] is None else f"loss {row['loss']:.4g}"

    def _write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(row)
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        with _disk_errors_named(self.run_dir / "tensorboard"):
            self.accelerator.log(numbers, step=row["step"])

    def _evaluation_due(self, last: bool) -> bool:
        every, step = self.config.evaluate_every, self.progress.step
        return step != self.progress.evaluated_step and (last or bool(every and step and step % every == 0))

    def _evaluate(self, evaluate: Evaluate) -> None:
        config, progress = self.config, self.progress
        self.bare.eval()
        with self.ema.in_place() if self.ema else nullcontext(), torch.no_grad():
            answer: list[Any] = [dict(evaluate(self.bare, progress.step))]
        self.bare.train()
        broadcast_object_list(answer)
        values: dict[str, float] = answer[0]
        progress.evaluated_step = progress.step
        if self._is_best(values):
            progress.best, progress.best_step = values[config.best_metric or ""], progress.step
            path = self.run_dir / "best.safetensors" if self.main else None
            save_weights(path, self.bare, self.ema, header(self.metadata, progress.step))
        self._write({"step": progress.step, **{f"eval/{name}": float(value) for name, value in values.items()}})
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
        averages = gather_object([self.averages.state()])
        self.snapshots.save(
            self.progress,
            self.guard.state(),
            self.bare,
            self.ema,
            self.optimizer.optimizer,
            self.accelerator.scaler,
            averages,
            self.main,
        )
        self.saved_step = self.progress.step
        self.accelerator.wait_for_everyone()

    def _result(self) -> FitResult:
        progress, weights = self.progress, self.run_dir / "model.safetensors"
        save_weights(weights if self.main else None, self.bare, self.ema, header(self.metadata, progress.step))
        metrics = [dict(self.metrics.last) if self.metrics else {}]
        broadcast_object_list(metrics)
        return FitResult(
            run_dir=self.run_dir,
            weights=weights,
            best_weights=self.run_dir / "best.safetensors" if progress.best_step is not None else None,
            steps=progress.step,
            skipped=progress.skipped,
            finished=progress.step == self.config.steps,
            metrics=metrics[0],
            best=progress.best,
            best_step=progress.best_step,
            seconds=progress.seconds,
            cpu_seconds=progress.cpu_seconds,
        )


@contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, of FSDP2's shards as well."""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
