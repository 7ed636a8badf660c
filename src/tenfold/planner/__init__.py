"""Predict and search how a large language model trains on a cluster: step time, MFU, memory, timeline. Imports no
torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tenfold.planner.config import Cluster, Hardware, Model, Plan

if TYPE_CHECKING:
    from tenfold.planner.layout_search import search
    from tenfold.planner.predictor import Estimate, Planner, simulate

__all__ = ["Cluster", "Estimate", "Hardware", "Model", "Plan", "Planner", "search", "simulate"]

_WHERE = {"Estimate": "predictor", "Planner": "predictor", "simulate": "predictor", "search": "layout_search"}


def __getattr__(name: str) -> object:
    """Names that need NumPy are imported when they are first used; from then on they are plain attributes."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tenfold.planner.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
