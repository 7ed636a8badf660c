"""Predict and search how a large language model trains on a cluster: step time, MFU, memory, timeline. Imports no torch."""

from tenfold.planner.config import Cluster, Hardware, Model, Plan
from tenfold.planner.predictor import Estimate, Planner, simulate

__all__ = ["Cluster", "Estimate", "Hardware", "Model", "Plan", "Planner", "search", "simulate"]


def __getattr__(name: str) -> object:
    """`search` is loaded when it is first used."""
    if name == "search":
        from tenfold.planner.search import search

        return search
    raise AttributeError(name)
