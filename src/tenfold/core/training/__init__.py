"""One training loop for every room: exact resume, guards, EMA, metrics, on one processor or on many nodes.

A room brings a model, a dataset (a pure function of the sample's number), a loss and an optimiser, and calls `fit`.
Importing this package loads no torch, so that a room's `config.py` may hold a `FitConfig`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenfold.core.training.config import FitConfig
from tenfold.core.training.interrupt import Interrupted
from tenfold.core.training.schedule import Schedule, constant, cosine, multistep

if TYPE_CHECKING:
    from tenfold.core.training.data import Shuffled
    from tenfold.core.training.loop import FitResult, fit
    from tenfold.core.training.snapshot import Progress

__all__ = [
    "FitConfig",
    "FitResult",
    "Interrupted",
    "Progress",
    "Schedule",
    "Shuffled",
    "constant",
    "cosine",
    "fit",
    "multistep",
]


def __getattr__(name: str) -> Any:
    if name in ("fit", "FitResult"):
        from tenfold.core.training import loop

        return getattr(loop, name)
    if name == "Progress":
        from tenfold.core.training.snapshot import Progress

        return Progress
    if name == "Shuffled":
        from tenfold.core.training.data import Shuffled

        return Shuffled
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
