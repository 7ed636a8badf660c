"""Checkpoints of a run: folders that are complete or not there, holding all that an exact resume needs.

`step-00001000/` holds `model.safetensors` (the weights to use: the average where one is kept), `raw.safetensors` (the weights that
are trained, only beside an average), `trainer.pt` (optimiser, gradient scaler and each process's random state; loads with
`weights_only=True`), `state.json` (counters) and `manifest.json` (every file's size, by which a damaged folder is told).
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from tenfold.core.console import UserError, warn
from tenfold.core.files import disk_error, make_folder
from tenfold.core.training.ema import Ema


@dataclass
class Progress:
    """How far a run has come.

    Args:
        step: steps done.
        skipped: those of them that the guard left out.
        seconds: wall time spent in training steps, over all sittings; evaluation and checkpoints are not counted.
        cpu_seconds: processor time of this process in training steps, likewise.
        best: best value of `FitConfig.best_metric` so far.
        best_step: the step at which it was reached.
    """

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` in one step when all its files are on the disk; on failure nothing is left.

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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators in this process, as tensors and numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_state` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU. Under FSDP2 every process must call it, and only the first one gets the tensors."""
    if _sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Tied weights share memory, which safetensors refuses: each name gets a copy.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Load a whole state dict, strictly. Raises UserError where it does not fit."""
    try:
        if _sharded(model):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(model, dict(tensors), options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{origin} does not fit this model: {' '.join(str(error).split())[:300]}") from error


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if _sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        return get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    return optimizer.state_dict()


def _load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if _sharded(model):
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

    def __init__(self, folder: Path, keep: int, metadata: Mapping[str, str]) -> None:
        self.folder = folder
        self.keep = keep
        self.metadata = dict(metadata)

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
        ranks: list[Any],
        main: bool,
    ) -> None:
        """Write a checkpoint and remove the oldest. Every process calls it; the one with `main` set writes.

        Args:
            ranks: random state and metric sums of every process.

        Raises:
            UserError: the disk refuses, or the weights are not finite; earlier checkpoints stay.
        """
        raw = model_tensors(model)
        averaged = None
        if ema:
            with ema.in_place():
                averaged = model_tensors(model)
        trainer = {
            "optimizer": _optimizer_state(model, optimizer),
            "scaler": scaler.state_dict() if scaler else None,
            "ranks": ranks,
        }
        if not main:
            return
        spoilt = next((name for name, tensor in raw.items() if not bool(torch.isfinite(tensor).all())), None)
        if spoilt:
            raise UserError(
                f"training: the weights {spoilt} are no longer finite at step {progress.step}; the last good checkpoint is "
                f"{self.newest() or 'none yet'}: train anew with a lower learning rate or with clip_norm"
            )
        with atomic_folder(self.folder / f"step-{progress.step:08d}") as path:
            (path / "model.safetensors").write_bytes(to_safetensors(averaged or raw, self.metadata or None))
            if averaged:
                (path / "raw.safetensors").write_bytes(to_safetensors(raw))
            buffer = io.BytesIO()
            torch.save(trainer, buffer)
            (path / "trainer.pt").write_bytes(buffer.getbuffer())
            (path / "state.json").write_text(json.dumps({"progress": asdict(progress), "guard": guard}))
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            (path / "manifest.json").write_text(json.dumps(sizes))
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
            The progress, the guard's state and what `save` got as `ranks`.
        """
        load_model_tensors(model, load_file(path / "model.safetensors"), path)
        if ema:
            ema.reset()
            load_model_tensors(model, load_file(path / "raw.safetensors"), path)
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        _load_optimizer_state(model, optimizer, trainer["optimizer"])
        if scaler and trainer["scaler"]:
            scaler.load_state_dict(trainer["scaler"])
        state = json.loads((path / "state.json").read_text())
        return Progress(**state["progress"]), state["guard"], trainer["ranks"]


def _complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / "manifest.json").read_text())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
