"""Search over layouts: score everything by the closed form, event-simulate the best, give a reason for every rejected
plan."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.planner.coefficients import Calibration, default_stack, load_calibration
from tenfold.planner.config import DISPATCH, RECOMPUTE, SCHEDULES, Cluster, Model, Plan
from tenfold.planner.memory import usable_gib
from tenfold.planner.predictor import Estimate, simulate
from tenfold.planner.scoring import CHUNK, REASONS, Space, grid, meaningless, score, space_for

_ADVICE = {
    1: "choose tp*cp*pp that divides the devices",
    2: "choose ep*etp that divides devices/pp",
    3: "change gbs to a multiple of dp*mbs, or mbs",
    4: "raise gbs, or lower mbs or pp",
    5: "change gbs so that micro-batches are a multiple of pp",
    6: "lower pp or vpp",
    8: "leave out what is not needed: swap, then recompute",
}


@dataclass(frozen=True)
class Rejected:
    """A plan that was not simulated, why, and what would make it work."""

    plan: Plan
    reason: str
    change: str


@dataclass(frozen=True)
class SearchResult:
    """Answer of a search.

    Attributes:
        best: event-simulated plans, best first.
        candidates: combinations looked at.
        feasible: of those, how many can run and fit.
        reasons: rejected plans by reason.
        score_seconds, simulate_seconds: time of the two phases.
        plans_per_second: speed of the pruned scoring.
        scores: closed-form tokens/s/device of the feasible plans, descending.
        threshold: closed-form score of the last simulated plan.
    """

    best: list[Estimate]
    candidates: int
    feasible: int
    reasons: dict[str, int]
    score_seconds: float
    simulate_seconds: float
    plans_per_second: float
    scores: np.ndarray = field(repr=False)
    simulated_from: int = 0
    _columns: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    _context: dict[str, Any] = field(repr=False, default_factory=dict)

    def rank_of(self, tokens_per_s: float) -> float:
        """Share of the feasible plans that score better than a closed-form throughput (0: the best)."""
        return float((self.scores > tokens_per_s).mean()) if len(self.scores) else 1.0

    def rank_among_all(self, tokens_per_s: float) -> float:
        """The same among all plans that were looked at; those that cannot run or do not fit count as worse."""
        return float((self.scores > tokens_per_s).sum() / self.candidates)

    def rejected(self, limit: int | None = None) -> Iterator[Rejected]:
        """Every rejected plan with its reason and the smallest change that makes it work."""
        code = self._columns["code"]
        for count, index in enumerate(np.flatnonzero(code)):
            if limit is not None and count >= limit:
                return
            yield _rejection(self._columns, int(index), self._context)


def _plan_at(columns: dict[str, np.ndarray], index: int, plan: Plan) -> Plan:
    return plan.replace(
        tp=int(columns["tp"][index]),
        pp=int(columns["pp"][index]),
        vpp=int(columns["vpp"][index]),
        cp=int(columns["cp"][index]),
        ep=int(columns["ep"][index]),
        tp_extend_ep=bool(columns["tp_extend_ep"][index]),
        mbs=int(columns["mbs"][index]),
        schedule=SCHEDULES[int(columns["schedule"][index])],
        recompute=RECOMPUTE[int(columns["recompute"][index])],
        swap=bool(columns["swap"][index]),
        dispatch=DISPATCH[int(columns["dispatch"][index])],
        fsdp=int(columns["fsdp"][index]),
        noop_slots=None,
    )


def _with_slots(model: Model, plan: Plan) -> Plan:
    return plan.replace(noop_slots=-model.layers % (plan.pp * plan.vpp))


def _rejection(columns: dict[str, np.ndarray], index: int, context: dict[str, Any]) -> Rejected:
    code = int(columns["code"][index])
    plan = _plan_at(columns, index, context["plan"])
    if code != 7:
        return Rejected(plan, REASONS[code], _ADVICE[code])
    reason = f"memory over the limit: {columns['memory'][index]:.0f} GiB of {context['limit']:.0f} GiB"
    return Rejected(plan, reason, _change_that_fits(columns, index, context))


def _change_that_fits(columns: dict[str, np.ndarray], index: int, context: dict[str, Any]) -> str:
    """The first single change, from mild to drastic, under which the closed form fits."""
    names = [f.name for f in dataclasses.fields(Space)]
    base = {name: float(columns[name][index]) for name in names}
    fine, full = float(RECOMPUTE.index("fine-grained")), float(RECOMPUTE.index("full"))
    changes: list[tuple[str, dict[str, float]]] = [
        ("recompute fine-grained", {"recompute": fine}),
        ("recompute fine-grained with swap", {"recompute": fine, "swap": 1.0}),
        ("recompute full", {"recompute": full, "swap": 0.0}),
        (f"mbs {int(base['mbs'] / 2)}", {"mbs": base["mbs"] / 2}),
        ("fsdp 1", {"fsdp": 1.0}),
        *(
            (f"{name} {int(base[name] * factor)}", {name: base[name] * factor})
            for factor in (2, 4, 8)
            for name in ("ep", "tp", "pp", "cp")
        ),
    ]
    usable = [
        (words, change)
        for words, change in changes
        if all(value >= 1 or name in ("swap", "recompute") for name, value in change.items())
    ]
    changed = {name: np.array([{**base, **change}[name] for _, change in usable]) for name in names}
    answer = score(context["model"], context["cluster"], context["plan"], changed, context["calibration"])
    fits = np.flatnonzero(answer["code"] == 0)
    if len(fits):
        return usable[int(fits[0])][0]
    return "no single change: more devices or several changes"


def _simulate_one(task: tuple[Model, Cluster, Plan, Calibration]) -> Estimate | str:
    model, cluster, plan, calibration = task
    try:
        return simulate(model, cluster, plan, calibration)
    except UserError as error:
        return str(error)


def run_tasks(
    function: Callable[[Any], Any], tasks: list[Any], processes: int | None = None, backend: str = "processes"
) -> list[Any]:
    """Map over tasks in this process (1), in several processes (default: all usable cores), or on a Ray cluster.

    Raises:
        UserError: backend "ray" without ray installed.
    """
    if backend == "ray":
        try:
            import ray  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise UserError(
                "backend: ray is not installed: pip install 'tenfold[planner]', or use backend processes"
            ) from None
        if not ray.is_initialized():
            ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
        remote = ray.remote(function)
        return list(ray.get([remote.remote(task) for task in tasks]))
    if backend != "processes":
        raise UserError(f"backend: unknown {backend!r}: choose processes or ray")
    workers = (
        processes or len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else processes or os.cpu_count() or 1
    )
    if workers <= 1 or len(tasks) < 64:
        return [function(task) for task in tasks]
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, tasks, chunksize=max(1, len(tasks) // (4 * workers))))


def search(
    model: Model,
    cluster: Cluster,
    plan: Plan,
    top: int = 10,
    simulate_best: int = 120,
    space: Space | None = None,
    calibration: Calibration | None = None,
    memory_limit_gib: float | None = None,
    processes: int | None = None,
    backend: str = "processes",
    progress: Callable[[int], None] | None = None,
) -> SearchResult:
    """Find the fastest layouts that fit.

    Args:
        model, cluster: what is trained where.
        plan: gives batch, sequence, precision, stack and imbalance; its layout is ignored.
        top: plans to return.
        simulate_best: plans to event-simulate after the closed-form scoring.
        space: values to combine; None for `space_for`.
        calibration: coefficients; None for the shipped ones.
        memory_limit_gib: usable memory per device; None for 94% of the sheet.
        processes: worker processes; None for all usable cores.
        backend: "processes" or "ray".
        progress: called with the number of combinations done.

    Raises:
        UserError: nothing fits; the message says what the nearest plan lacks.
    """
    calibration = calibration or load_calibration()
    if plan.stack == "auto":
        plan = plan.replace(stack=default_stack(cluster.hardware))
    if memory_limit_gib is not None:
        plan = plan.replace(memory_limit_gib=memory_limit_gib)
    space = space or space_for(model, cluster, plan)
    cluster.hardware.peak(plan.precision)
    start = time.perf_counter()
    kept: list[dict[str, np.ndarray]] = []
    looked = 0
    for combinations in grid(space):
        keep = ~meaningless(combinations, model, True in space.tp_extend_ep)
        kept_columns = {name: column[keep].astype(np.float64) for name, column in combinations.items()}
        for first in range(0, int(keep.sum()), CHUNK):
            part = {name: column[first : first + CHUNK] for name, column in kept_columns.items()}
            answer = score(model, cluster, plan, part, calibration)
            kept.append({name: column.astype(np.float32) for name, column in part.items()} | answer)
            looked += len(answer["code"])
            if progress:
                progress(looked)
    columns = {name: np.concatenate([chunk[name] for chunk in kept]) for name in kept[0]} if kept else {}
    score_seconds = time.perf_counter() - start
    if not looked:
        raise UserError("space: no combination of the given values suits the model and the cluster: widen tp, pp or ep")
    tokens = columns["tokens"]
    feasible = int((columns["code"] == 0).sum())
    reasons = {REASONS[code]: count for code, count in sorted(Counter(columns["code"].tolist()).items()) if code}
    context = {
        "model": model,
        "cluster": cluster,
        "plan": plan,
        "calibration": calibration,
        "limit": usable_gib(cluster, plan),
    }
    if not feasible:
        nearest = int(np.argmin(np.where(columns["code"] == 7, columns["memory"], np.inf)))
        words = _plan_at(columns, nearest, plan).describe()
        if (columns["code"] == 7).any():
            raise UserError(
                f"memory: no plan fits {context['limit']:.0f} GiB; the smallest needs "
                f"{columns['memory'][nearest]:.0f} GiB ({words}): "
                f"{_change_that_fits(columns, nearest, context)}"
            )
        raise UserError(f"gbs: no plan suits {cluster.devices} devices and gbs {plan.gbs}: {reasons}")
    order = np.argsort(-tokens, kind="stable")[: min(simulate_best, feasible)]
    plans = [_with_slots(model, _plan_at(columns, int(i), plan)) for i in order]
    start = time.perf_counter()
    answers = run_tasks(_simulate_one, [(model, cluster, one, calibration) for one in plans], processes, backend)
    estimates = [answer for answer in answers if isinstance(answer, Estimate) and answer.fits]
    for answer in answers:
        if isinstance(answer, str):
            reasons[answer.split(":")[0]] = reasons.get(answer.split(":")[0], 0) + 1
        elif not answer.fits:
            reasons["memory over the limit (event simulation)"] = (
                reasons.get("memory over the limit (event simulation)", 0) + 1
            )
    estimates.sort(key=lambda estimate: -estimate.tokens_per_s_per_device)
    return SearchResult(
        best=estimates[:top],
        candidates=looked,
        feasible=feasible,
        reasons=reasons,
        score_seconds=score_seconds,
        simulate_seconds=time.perf_counter() - start,
        plans_per_second=looked / score_seconds,
        scores=np.sort(tokens[tokens > 0])[::-1],
        simulated_from=len(order),
        _columns=columns,
        _context=context,
    )


def simulated_place(
    found: SearchResult, tokens_per_s: float, sample: int = 300, seed: int = 0, processes: int | None = None
) -> tuple[float, int]:
    """A throughput's place among the feasible plans of a search, by event simulation of a random sample of them.

    The closed form of the scoring is good to some percent, which is enough to choose what to simulate but not to say
    how many plans are faster than a given one.

    Args:
        found: the search.
        tokens_per_s: event-simulated tokens/s/device to place.
        sample: plans to simulate.
        seed: of the draw.
        processes: worker processes; None for all usable cores.

    Returns:
        Share of the plans that are faster (0: none), and the number of plans that were simulated and fit.
    """
    feasible = np.flatnonzero(found._columns["code"] == 0)
    drawn = np.random.default_rng(seed).choice(feasible, min(sample, len(feasible)), replace=False)
    model, cluster, plan = (found._context[name] for name in ("model", "cluster", "plan"))
    tasks = [
        (model, cluster, _with_slots(model, _plan_at(found._columns, int(i), plan)), found._context["calibration"])
        for i in drawn
    ]
    answers = run_tasks(_simulate_one, tasks, processes)
    speeds = [a.tokens_per_s_per_device for a in answers if isinstance(a, Estimate) and a.fits]
    # A plan that equals the given one is no faster.
    faster = sum(speed > tokens_per_s * (1 + 1e-6) for speed in speeds)
    return (faster / len(speeds) if speeds else 1.0), len(speeds)
