"""MASA: track anything that any detector can see, by an appearance model learned from still images.

The names below are imported when they are first used, so that `tenfold tracking --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.tracking.evaluation import evaluate_sequence
    from tenfold.tracking.model import Masa
    from tenfold.tracking.predictor import Tracker

__all__ = ["Masa", "Tracker", "evaluate_sequence"]

_MODULE_OF = {"Masa": "model", "Tracker": "predictor", "evaluate_sequence": "evaluation"}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"tenfold.tracking.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
