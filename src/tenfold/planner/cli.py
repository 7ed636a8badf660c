"""The command line of the planner: one thin function per verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.planner.config import Cluster, Model, Plan

if TYPE_CHECKING:
    from tenfold.planner.calibration import Calibration
    from tenfold.planner.predictor import Estimate

ScheduleName = Literal[
    "auto", "none", "gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zb-v", "dualpipe", "dualpipev", "adaptive"
]
