"""The device, the threads and the seed: chosen once, here."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Literal, get_args

from tenfold.core.console import UserError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda", "mps", "npu"]
DEVICE_NAMES: tuple[str, ...] = get_args(DeviceName)


def usable_cpus() -> int:
    """Processors that this process may run on (respects affinity and, through it, most containers)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(count: int | None = None) -> int:
    """Set torch's threads to `count`, else TENFOLD_THREADS, else OMP_NUM_THREADS, else all usable processors."""
    import torch

    wanted = (
        count or int(os.environ.get("TENFOLD_THREADS", "0") or os.environ.get("OMP_NUM_THREADS", "0")) or usable_cpus()
    )
    torch.set_num_threads(wanted)
    return wanted


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a name: `auto` takes cuda, npu, mps, cpu in this order.

    Raises:
        UserError: an unknown name, or a device that this machine does not have.
    """
    import torch

    kind = name.split(":", 1)[0]
    if kind not in DEVICE_NAMES:
        raise UserError(f"unknown device {name!r}: choose one of {', '.join(DEVICE_NAMES)}")
    present = {
        "cuda": torch.cuda.is_available(),
        "npu": hasattr(torch, "npu") and torch.npu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        return torch.device(next(candidate for candidate, there in present.items() if there))
    if not present[kind]:
        raise UserError(f"device {name!r} is not available here: use --device auto or --device cpu")
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
