"""Search: what it finds, the reasons it gives, its agreement with the event simulation, its speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tenfold.core.console import UserError
from tenfold.planner import Cluster, Model, Plan, layout_search, search, simulate
from tenfold.planner.coefficients import load_calibration
from tenfold.planner.config import RECOMPUTE
from tenfold.planner.layout_search import run_tasks
from tenfold.planner.reproduce import PUBLISHED
from tenfold.planner.scoring import closed_form_score, grid, meaningless, narrow_space, score, space_for
from tenfold.planner.shape_search import search_shapes, shape_candidates
from tenfold.planner.shapes import parameters

SMALL = Plan(gbs=128, seq=8192)


@pytest.fixture(scope="module")
def found() -> layout_search.SearchResult:
    return search(Model.preset("llama3-70b"), Cluster.preset("h100", 64), SMALL, top=8, simulate_best=40, processes=1)


def test_the_best_plans_run_fit_and_are_in_order(found: layout_search.SearchResult) -> None:
    speeds = [e.tokens_per_s_per_device for e in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert all(e.fits for e in found.best)
    again = simulate(found.best[0].model, Cluster.preset("h100", 64), found.best[0].plan)
    assert again.tokens_per_s_per_device == pytest.approx(speeds[0])


def test_no_hand_made_plan_beats_the_search(found: layout_search.SearchResult) -> None:
    for plan in (
        SMALL.replace(tp=8, pp=4, vpp=5, recompute="fine-grained"),
        SMALL.replace(tp=4, pp=8, recompute="full"),
        SMALL.replace(tp=8, pp=2, recompute="full"),
    ):
        estimate = simulate(found.best[0].model, Cluster.preset("h100", 64), plan)
        if estimate.fits:
            assert estimate.tokens_per_s_per_device <= found.best[0].tokens_per_s_per_device * 1.001


def test_every_rejected_plan_has_a_reason_and_an_advice(found: layout_search.SearchResult) -> None:
    count = 0
    for rejected in found.rejected(400):
        count += 1
        assert rejected.reason and rejected.change
    assert count == 400
    assert found.candidates == found.feasible + int((found._columns["code"] != 0).sum())


def test_the_change_that_fits_makes_the_closed_form_fit(found: layout_search.SearchResult) -> None:
    columns, context = found._columns, found._context
    tried = 0
    for index in np.flatnonzero(columns["code"] == 7)[:40]:
        words = layout_search._change_that_fits(columns, int(index), context)
        if words.startswith("no single"):
            continue
        tried += 1
        plan = layout_search._plan_at(columns, int(index), context["plan"])
        name, _, value = words.partition(" ")
        changes = (
            {"recompute": value.split(" with ")[0], "swap": "swap" in value}
            if name == "recompute"
            else {name: int(value)}
        )
        estimate = simulate(
            found.best[0].model,
            context["cluster"],
            layout_search._with_slots(found.best[0].model, plan.replace(**changes)),
        )
        assert estimate.peak_memory_gib <= 1.1 * estimate.memory_limit_gib, words
    assert tried > 5


def test_closed_form_scores_follow_the_event_simulation() -> None:
    model, cluster = Model.preset("llama3-70b"), Cluster.preset("h100", 64)
    pairs = []
    for tp in (2, 4, 8):
        for pp, vpp in ((2, 1), (4, 1), (4, 2), (8, 1), (8, 2)):
            plan = SMALL.replace(tp=tp, pp=pp, vpp=vpp, recompute="full")
            pairs.append(
                (closed_form_score(model, cluster, plan), simulate(model, cluster, plan).tokens_per_s_per_device)
            )
    closed, event = np.array(pairs).T
    assert np.abs(closed / event - 1).max() < 0.06
    assert event[closed.argmax()] >= 0.98 * event.max()


def test_nothing_fits_is_said_with_the_nearest_plan() -> None:
    with pytest.raises(UserError, match="memory: no plan fits"):
        search(Model.preset("deepseek-v3"), Cluster.preset("h100", 8), Plan(gbs=64), simulate_best=4, processes=1)


def test_scoring_is_fast_enough() -> None:
    model, cluster = Model.preset("pangu-ultra-moe"), Cluster.preset("ascend-800t-a2", 6144)
    grids = []
    for part in grid(space_for(model, cluster, PUBLISHED)):
        keep = ~meaningless(part, model, True)
        grids.append({name: column[keep] for name, column in part.items()})
    columns = {name: np.concatenate([g[name] for g in grids])[: 1 << 16] for name in grids[0]}
    calibration = load_calibration()
    plan = PUBLISHED.replace(stack="mindspeed-2025")
    start = time.process_time()
    answer = score(model, cluster, plan, columns, calibration)
    assert len(answer["tokens"]) / (time.process_time() - start) >= 20_000


def test_shapes_keep_total_and_active_parameters() -> None:
    model = Model.preset("qwen3-30b-a3b")
    shapes = shape_candidates(model, tolerance=0.03)
    assert len(shapes) > 3
    for shape in shapes:
        assert parameters(shape) == pytest.approx(parameters(model), rel=0.03)
        assert parameters(shape, active=True) == pytest.approx(parameters(model, active=True), rel=0.1)


def test_shape_search_ranks_depths_by_how_they_fill_the_stages() -> None:
    model, cluster = Model.preset("llama3-8b"), Cluster.preset("h100", 64)
    shapes = shape_candidates(model, hidden=[4096], layers=[32, 33])
    plan = Plan(gbs=128, seq=8192)
    space = narrow_space(model, cluster, plan)
    best = search_shapes(shapes, cluster, plan, space=space, processes=1)
    assert {c.model.layers for c in best} == {32, 33}
    assert all(c.estimate.fits for c in best)


def _square(value: int) -> int:
    return value * value


def test_tasks_give_the_same_in_one_process_and_in_two() -> None:
    tasks = list(range(100))
    assert run_tasks(_square, tasks, 1) == run_tasks(_square, tasks, 2) == [v * v for v in tasks]


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UserError, match="backend: unknown 'mpi'"):
        run_tasks(_square, [1], backend="mpi")


def test_the_published_layout_is_within_the_best_twentieth() -> None:
    model, cluster = Model.preset("pangu-ultra-moe"), Cluster.preset("ascend-800t-a2", 6144)
    own = simulate(model, cluster, PUBLISHED)
    assert own.fits and own.memory_limit_gib <= 64
    found = search(model, cluster, PUBLISHED, simulate_best=1, processes=1)
    place, drawn = layout_search.simulated_place(found, own.tokens_per_s_per_device, sample=60, processes=1)
    assert drawn > 45
    assert place <= 0.05
    assert found.rank_of(closed_form_score(model, cluster, PUBLISHED)) <= 0.08  # the closed form is coarser


def test_a_plan_that_needs_no_recomputation_is_listed_once(found: layout_search.SearchResult) -> None:
    columns, plan = found._columns, found._context["plan"]
    fine = RECOMPUTE.index("fine-grained")
    chosen = np.flatnonzero((columns["code"] == 0) & (columns["recompute"] == fine))
    assert len(chosen)
    # Each would not fit without its recomputation, by the form that chose it.
    bare = {name: columns[name][chosen].astype(float) for name in grid_columns(columns)}
    bare["recompute"] = np.full(len(chosen), float(RECOMPUTE.index("none")))
    bare["swap"] = np.zeros(len(chosen))
    answer = score(found._context["model"], found._context["cluster"], plan, bare, found._context["calibration"])
    assert (answer["code"] == 7).all()


def grid_columns(columns: dict[str, np.ndarray]) -> list[str]:
    return [name for name in columns if name not in ("tokens", "code", "memory", "closed")]


def test_a_sweep_on_ray_gives_the_same_plans() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", ignore_reinit_error=True)
    try:
        model, cluster = Model.preset("llama3-8b"), Cluster.preset("h100", 32)
        one, two = (
            search(model, cluster, SMALL, top=3, simulate_best=6, processes=1, backend=backend)
            for backend in ("processes", "ray")
        )
    finally:
        ray.shutdown()
    assert [e.plan for e in one.best] == [e.plan for e in two.best]
    assert [e.step_seconds for e in one.best] == [e.step_seconds for e in two.best]
