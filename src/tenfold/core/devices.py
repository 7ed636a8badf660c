"""The device, the threads and the seed: chosen once, here."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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


def memory_bytes() -> tuple[int, int]:
    """Total and available memory in bytes; a container's limit (cgroup v2) counts where it is lower."""
    total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        line = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split(maxsplit=1)[0]
        available = int(line) * 1024
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # the word "max", where there is no limit
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def wait_asleep() -> None:
    """Let OpenMP threads that wait for each other fall asleep soon; to be called before torch is imported.

    GNU's OpenMP spins for 300 000 turns at every barrier. Where other programs want the processors too, the thread that
    is waited for does not get one meanwhile: a picture on two threads then took eight times the processor time that it
    takes with threads that sleep. 10 000 turns should still cover the gaps between a network's operators. What the user
    has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let the C library keep the memory that a training step frees for the next one; of glibc, elsewhere nothing.

    glibc hands large blocks back to the system at once, which then clears every page again when it is touched: of a
    training step on the CPU with 30 million weights that was 8 to 11 % of the processor time; peaks differed by 1 %.
    Afterwards what is free is handed back, and the limits are those to which glibc itself rises with use.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX
    library = ctypes.CDLL(None)
    library.mallopt(mmap_max, 0)  # no block outside the heap
    library.mallopt(trim_threshold, -1)  # and no end of the heap given back
    try:
        yield
    finally:
        library.mallopt(mmap_max, 65536)
        library.mallopt(mmap_threshold, 2**25)
        library.mallopt(trim_threshold, 2**26)
        library.malloc_trim(0)


def set_threads(count: int | None = None) -> int:
    """Set torch's threads to `count`, else TENFOLD_THREADS, else OMP_NUM_THREADS, else all usable processors."""
    import torch

    wanted = count or _threads_from("TENFOLD_THREADS") or _threads_from("OMP_NUM_THREADS") or usable_cpus()
    torch.set_num_threads(wanted)
    return wanted


def _threads_from(variable: str) -> int:
    text = os.environ.get(variable) or "0"
    if not text.isdecimal():
        raise UserError(f"the environment variable {variable} is {text!r}: it should be a number of threads")
    return int(text)


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
