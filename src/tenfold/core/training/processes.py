"""The processes of a run: what accelerate is told about them, and what they decide together."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration

from tenfold.core.console import UserError
from tenfold.core.devices import resolve_device
from tenfold.core.training.config import FitConfig
from tenfold.core.training.data import micro_batches


def make_accelerator(
    config: FitConfig, run_dir: Path, device: str, data_share: tuple[int, int] | None = None
) -> Accelerator:
    """accelerate's view of this process: alone, or one of many that `accelerate launch` or `torchrun` started.

    Raises:
        UserError: the device is not there, cannot do the precision, a tracker is not installed, or the batch does not
            divide.
    """
    kind = resolve_device(device).type
    if config.precision == "fp16" and kind == "cpu":
        raise UserError("training: precision fp16 needs an accelerator: use bf16 or no on the CPU")
    for name in config.log_with:
        if name != "tensorboard" and find_spec(name) is None:
            raise UserError(f"training: log_with asks for {name}, which is not installed: pip install {name}")
    trackers = [name for name in config.log_with if find_spec(name)]
    # accelerate keeps its settings for the life of the process, and the next fit in it may want another precision or
    # device. The group of processes, once formed, stays.
    formed = bool(PartialState._shared_state) and PartialState().num_processes > 1
    AcceleratorState._reset_state(reset_partial_state=not formed)
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=kind == "cpu",
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
    )
    # The loop accumulates by itself; the launcher's setting would divide the gradients once more.
    accelerator.gradient_accumulation_steps = 1
    rank, shares = data_share or (accelerator.process_index, accelerator.num_processes)
    micro_batches(0, config.batch_size, config.accumulate, rank, shares)
    return accelerator


def agree(
    accelerator: Accelerator, loss: float, gradient_norm: float, signal_number: int, stop: bool
) -> tuple[float, float, int, bool]:
    """The means of two numbers over the processes, and whether any process got a signal (and which) or wants to stop.

    Every process gets the same bits, so that all decide alike.
    """
    if accelerator.num_processes == 1:
        return loss, gradient_norm, signal_number, stop
    own = [loss, gradient_norm, float(signal_number == 2), float(signal_number == 15), float(stop)]
    loss, gradient_norm, interrupt, terminate, wish = accelerator.reduce(
        torch.tensor(own, device=accelerator.device), "mean"
    ).tolist()
    return loss, gradient_norm, 2 if interrupt else 15 if terminate else 0, wish > 0
