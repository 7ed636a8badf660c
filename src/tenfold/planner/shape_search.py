"""Search over model shapes: those of equal total and active parameters, each with its best layout."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tenfold.core.console import UserError
from tenfold.planner.coefficients import Calibration, load_calibration
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.layout_search import run_tasks, search
from tenfold.planner.predictor import Estimate
from tenfold.planner.scoring import Space
from tenfold.planner.shapes import parameters


@dataclass(frozen=True)
class ShapeCandidate:
    """A model shape with its best layout."""

    model: Model
    parameters: int
    active_parameters: int
    estimate: Estimate


def shape_candidates(
    model: Model,
    tolerance: float = 0.03,
    hidden: Sequence[int] = (),
    layers: Sequence[int] = (),
    experts: Sequence[int] = (),
    topk: Sequence[int] = (),
) -> list[Model]:
    """Shapes with the total and active parameters of `model`, within `tolerance`.

    The expert width follows from the total, the top-k from the active parameters, so that each combination has at
    most one shape.
    """
    hiddens = list(hidden) or sorted(
        {round(model.hidden * f / 256) * 256 for f in (0.8, 0.9, 1.0, 1.1, 1.2)} | {model.hidden}
    )
    depths = list(layers) or sorted(
        {max(model.first_dense + 2, model.layers + d) for d in (-16, -8, -5, -3, -1, 0, 1, 3, 5, 8, 16)}
    )
    counts = list(experts) or ([model.experts // 2, model.experts, model.experts * 2] if model.experts else [0])
    tops = list(topk) or ([max(1, model.topk // 2), model.topk, model.topk * 2] if model.experts else [0])
    total, active = parameters(model), parameters(model, active=True)
    found = []
    for width, depth, count, k in itertools.product(hiddens, depths, counts, tops):
        base = dataclasses.replace(
            model, name=f"h{width}-L{depth}" + (f"-E{count}-k{k}" if count else ""), hidden=width, layers=depth
        )
        if model.experts:
            unit = dataclasses.replace(
                base, experts=count, topk=k, moe_ffn=128, shared_ffn=128 * max(model.shared_experts, 0)
            )
            flat = dataclasses.replace(unit, moe_ffn=0, shared_ffn=0)
            slope = (parameters(unit) - parameters(flat)) / 128
            ffn = round((total - parameters(flat)) / slope / 16) * 16 if slope else 0
            shape = dataclasses.replace(base, experts=count, topk=k, moe_ffn=ffn, shared_ffn=ffn * model.shared_experts)
        else:
            unit, flat = dataclasses.replace(base, ffn=128), dataclasses.replace(base, ffn=0)
            slope = (parameters(unit) - parameters(flat)) / 128
            ffn = round((total - parameters(flat)) / slope / 16) * 16
            shape = dataclasses.replace(base, ffn=ffn)
        if (
            ffn < 64
            or abs(parameters(shape) / total - 1) > tolerance
            or abs(parameters(shape, active=True) / active - 1) > max(tolerance, 0.1)
        ):
            continue
        found.append(shape)
    return found


def _best_layout(task: tuple[Model, Cluster, Plan, Calibration, Space | None]) -> Estimate | str:
    model, cluster, plan, calibration, space = task
    try:
        return search(
            model, cluster, plan, top=1, simulate_best=12, space=space, calibration=calibration, processes=1
        ).best[0]
    except (UserError, IndexError) as error:
        return str(error)


def search_shapes(
    shapes: list[Model],
    cluster: Cluster,
    plan: Plan,
    top: int = 10,
    space: Space | None = None,
    calibration: Calibration | None = None,
    processes: int | None = None,
    backend: str = "processes",
) -> list[ShapeCandidate]:
    """The best layout of every shape, fastest shape first (tokens/s; parameters are equal by construction)."""
    calibration = calibration or load_calibration()
    answers = run_tasks(
        _best_layout, [(shape, cluster, plan, calibration, space) for shape in shapes], processes, backend
    )
    found = [
        ShapeCandidate(shape, parameters(shape), parameters(shape, active=True), answer)
        for shape, answer in zip(shapes, answers, strict=True)
        if isinstance(answer, Estimate)
    ]
    return sorted(found, key=lambda candidate: -candidate.estimate.tokens_per_s_per_device)[:top]
