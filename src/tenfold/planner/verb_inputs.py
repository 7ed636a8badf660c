"""What the verbs of the command line take: words that options allow, and the model, cluster and plan that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.core.console import UserError
from tenfold.planner.config import Cluster, Model, Plan

if TYPE_CHECKING:
    from tenfold.planner.predictor import Estimate

Schedule = Literal[
    "auto",
    "none",
    "gpipe",
    "1f1b",
    "interleaved",
    "zb-h1",
    "interleaved-zb",
    "zb-v",
    "dualpipe",
    "dualpipev",
    "adaptive",
]
Recompute = Literal["none", "selective", "fine-grained", "moe", "full"]
Dispatch = Literal["flat", "dedup", "hierarchical"]
Precision = Literal["bf16", "fp16", "fp8", "mxfp8"]
Framework = Literal["megatron", "mindspeed", "torchtitan"]

DEFAULT_MODEL, DEFAULT_HARDWARE = "pangu-ultra-moe", "ascend-800t-a2"


def plan_of(config: Path | None, changed: dict[str, Any]) -> Plan:
    """The plan of a YAML file, or the default one, with the options that were given."""
    from tenfold.planner.data import load_plan

    given = {name: value for name, value in changed.items() if value is not None}
    if config is None:
        return Plan(**given)
    return load_plan(str(config)).replace(**given)


def inputs(model: str, hardware: str, devices: int) -> tuple[Model, Cluster]:
    """The shape and the cluster that the options name."""
    from tenfold.planner.data import load_hardware, load_model

    return load_model(model), Cluster(load_hardware(hardware), devices)


_PLAN_FIELDS = (
    *("tp", "cp", "pp", "vpp", "ep", "etp", "tp_extend_ep", "mbs", "gbs", "seq", "precision", "schedule", "recompute"),
    *("swap", "dispatch", "fsdp", "imbalance", "noop_slots", "stack", "memory_limit_gib"),
)


def given(scope: dict[str, Any]) -> dict[str, Any]:
    """The plan's fields among a verb's arguments."""
    return {name: scope[name] for name in _PLAN_FIELDS if name in scope}


def estimate_of(
    config: Path | None, model: str, hardware: str, devices: int, calibration: Path | None, changed: dict[str, Any]
) -> Estimate:
    """The estimate of the plan that a verb's options describe."""
    from tenfold.planner.coefficients import load_calibration
    from tenfold.planner.predictor import simulate as run

    shape, cluster = inputs(model, hardware, devices)
    return run(shape, cluster, plan_of(config, changed), load_calibration(calibration))


def positive(**values: int | None) -> None:
    """Refuse a count that is given and no positive whole number."""
    for name, value in values.items():
        if value is not None and not 1 <= value <= 1 << 24:
            raise UserError(f"{name}: found {value}, expected 1 to {1 << 24}")
