"""Checkpoints of a run: folders that are complete or not there, holding all that an exact resume needs.

`step-00001000/` holds `model.safetensors` (the weights to use: the average where one is kept), `raw.safetensors` (the
weights that are trained, only beside an average), `trainer.pt` (optimiser, gradient scaler and each process's random
state; loads with `weights_only=True`), `state.json` (counters) and `manifest.json` (every file's size, by which a
damaged folder is told).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tenfold.core import checkpoint
from tenfold.core.console import UserError, warn
from tenfold.core.files import disk_error, make_folder
from tenfold.core.training.ema import Ema, local

Metadata = Mapping[str, str] | Callable[[int], Mapping[str, str]]
"""The header of a weights file, or a function of the number of steps done that gives it."""


def header(metadata: Metadata, step: int) -> Mapping[str, str]:
    """The header of a file that is written after `step` steps."""
    return metadata(step) if callable(metadata) else metadata


@dataclass
class Progress:
    """How far a run has come.

    Args:
        step: steps done.
        skipped: those of them that the guard left out, with what it took back.
        seconds: wall time spent in training steps, over all sittings; evaluation and checkpoints are not counted.
        cpu_seconds: processor time of this process in training steps, likewise.
        best: best value of `FitConfig.best_metric` so far.
        best_step: the step at which it was reached.
        evaluated_step: the step of the last evaluation.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` in one step when all its files are on the disk.

    On failure nothing is left.

    Raises:
        UserError: the disk is full, read-only or otherwise refuses.
    """
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if path.exists():  # a damaged folder of the same step
            shutil.rmtree(path)
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    except UserError as error:  # of a file's writer: name the folder, the temporary one is gone
        raise disk_error(path, error.__cause__) if isinstance(error.__cause__, OSError) else error from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over processes (FSDP2, tensor parallelism)."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def save_weights(path: Path | None, model: nn.Module, ema: Ema | None, metadata: Mapping[str, str]) -> None:
    """Write the weights to use: the average if there is one, else the model's own.

    Args:
        path: the safetensors file; None in the processes that only take part in gathering the shards (FSDP2).
        model: the module that is trained.
        ema: its average.
        metadata: header of the file.
    """
    with ema.in_place() if ema else nullcontext():
        tensors: Mapping[str, Any] = model.state_dict()
        if is_sharded(model):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if path:
            checkpoint.save(path, tensors, metadata)


def _load_weights(path: Path, model: nn.Module) -> None:
    tensors = load_file(path)
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, dict(tensors), options=StateDictOptions(full_state_dict=True))
    else:
        checkpoint.load_into(model, tensors, str(path))


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        return get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    return optimizer.state_dict()


def _load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


class Snapshots:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`.
        keep: newest checkpoints that stay.
        metadata: goes into the header of the weights' files, so that a room can load a checkpoint as a model.
    """

    def __init__(self, folder: Path, keep: int, metadata: Metadata) -> None:
        self.folder = folder
        self.keep = keep
        self.metadata = metadata

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all there; damaged ones are named and passed over."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            if _complete(path):
                return path
            warn(f"{path} is damaged and is passed over")
        return None

    def save(
        self,
        progress: Progress,
        guard: Mapping[str, Any],
        model: nn.Module,
        ema: Ema | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        averages: list[Any],
        main: bool,
    ) -> None:
        """Write a checkpoint and remove the oldest. Every process calls it; the one with `main` set writes.

        Args:
            averages: every process's sums of what is to be reported.

        Raises:
            UserError: the disk refuses, or the weights are not finite; earlier checkpoints stay.
        """
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(local(weight)).all()):
                raise UserError(
                    f"training: the weights {name} are no longer finite at step {progress.step}; the last good "
                    f"checkpoint is {self.newest() or 'none yet'}: train anew with a lower learning rate or clip_norm"
                )
        with atomic_folder(self.folder / f"step-{progress.step:08d}") if main else nullcontext() as path:
            save_weights(path and path / "model.safetensors", model, ema, header(self.metadata, progress.step))
            if ema:
                save_weights(path and path / "raw.safetensors", model, None, {})
            trainer = {
                "optimizer": _optimizer_state(model, optimizer),
                "scaler": scaler.state_dict() if scaler else None,
            }
            if path:
                _save_safely_loadable(path / "trainer.pt", trainer)
                (path / "state.json").write_text(
                    json.dumps({"progress": asdict(progress), "guard": guard, "averages": averages})
                )
                sizes = {file.name: file.stat().st_size for file in path.iterdir()}
                (path / "manifest.json").write_text(json.dumps(sizes))
        if main:
            self._remove_old()

    def _remove_old(self) -> None:
        # Hidden first, so that a half-removed folder is never taken for a checkpoint.
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            hidden = old.with_name(f".{old.name}.removed")
            old.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def load(
        self,
        path: Path,
        model: nn.Module,
        ema: Ema | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> tuple[Progress, dict[str, Any], list[Any]]:
        """Put a checkpoint back into the model, the average, the optimiser and the scaler.

        Returns:
            The progress, the guard's state and what `save` got as `averages`.
        """
        _load_weights(path / "model.safetensors", model)
        if ema:
            ema.reset()
            _load_weights(path / "raw.safetensors", model)
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        _load_optimizer_state(model, optimizer, trainer["optimizer"])
        if scaler and trainer["scaler"]:
            scaler.load_state_dict(trainer["scaler"])
        state = json.loads((path / "state.json").read_text())
        return Progress(**state["progress"]), state["guard"], state["averages"]


def _save_safely_loadable(path: Path, content: object) -> None:
    """`torch.save` of plain containers, numbers and tensors, with the disk's error instead of torch's own."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from error


def _complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / "manifest.json").read_text())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
