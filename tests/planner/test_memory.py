"""Memory: the published figures, the closed form, and the exact choice of what to recompute."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.planner import evaluation
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.memory import BUCKET, _pieces, activation_bytes, choose_items
from tenfold.planner.operators import plan_vector
from tenfold.planner.predictor import simulate
from tenfold.planner.shapes import shape_vector


def test_activations_and_state_of_the_a100_runs_agree_with_the_publication() -> None:
    for run in evaluation.a100_runs():
        if run["activation_error"] is not None:
            assert abs(run["activation_error"]) <= 0.03, run
        assert abs(run["state_error"]) <= 0.05, run


@pytest.mark.parametrize("tp", [1, 8])
def test_a_plain_layer_keeps_what_the_closed_form_says(tp: int) -> None:
    model = Model.preset("gpt3-175b")
    plan = Plan(tp=tp, mbs=2, gbs=2, seq=2048, stack="megatron-2021/22")
    p = plan_vector(plan, tp, unfused=True)
    sbh = 2 * 2048 * model.hidden
    full, _ = activation_bytes(shape_vector(model), p, "none")
    selective, _ = activation_bytes(shape_vector(model), p, "selective")
    whole, _ = activation_bytes(shape_vector(model), p, "full")
    assert full == pytest.approx(sbh / tp * (34 + 5 * model.heads * 2048 / model.hidden))
    assert selective == pytest.approx(34 * sbh / tp)
    assert whole == pytest.approx(2 * sbh / tp)


def brute_force(sizes: list[int], costs: list[float], need: int) -> float | None:
    best = None
    for mask in itertools.product((0, 1), repeat=len(sizes)):
        if sum(s for s, m in zip(sizes, mask, strict=True) if m) >= need:
            cost = sum(c for c, m in zip(costs, mask, strict=True) if m)
            best = cost if best is None or cost < best else best
    return best


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 8))
def test_the_knapsack_is_exact(data: st.DataObject, count: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    costs = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    need = data.draw(st.integers(1, sum(sizes) + 3))
    expected = brute_force(sizes, costs, need)
    answer = choose_items(
        tuple(float(s * BUCKET) for s in sizes), tuple(float(c) for c in costs), (1,) * count, float(need * BUCKET), 0.0
    )
    if expected is None:
        assert answer is None
        return
    assert answer is not None
    assert answer.seconds == pytest.approx(expected)
    assert answer.saved >= need * BUCKET
    assert sum(c for c, take in zip(costs, answer.recompute, strict=True) if take) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_swap_never_moves_more_than_its_budget_nor_an_item_twice(data: st.DataObject) -> None:
    sizes = tuple(float(s * BUCKET) for s in data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=5)))
    costs = tuple(float(c) for c in data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))))
    counts = tuple(data.draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes))))
    need = 0.6 * sum(s * c for s, c in zip(sizes, counts, strict=True))
    budget = data.draw(st.floats(0.05, 0.9)) * need
    plain = choose_items(sizes, costs, counts, need, 0.0)
    answer = choose_items(sizes, costs, counts, need, budget)
    assert plain is not None and answer is not None
    assert answer.swap_bytes <= budget * 1.001
    assert all(r + w <= c for r, w, c in zip(answer.recompute, answer.swap, counts, strict=True))
    assert answer.saved >= need
    assert answer.seconds <= plain.seconds + 1e-9


def test_fine_grained_recompute_fits_what_would_not_fit() -> None:
    model, cluster = Model.preset("pangu-ultra-moe"), Cluster.preset("ascend-800t-a2", 6144)
    plan = Plan(tp=8, pp=16, vpp=2, ep=4, tp_extend_ep=True, mbs=2, gbs=6144, seq=8192)
    plain, chosen, whole = (
        simulate(model, cluster, plan.replace(recompute=policy)) for policy in ("none", "fine-grained", "full")
    )
    assert not plain.fits
    assert chosen.fits and whole.fits
    assert whole.peak_memory_gib < chosen.peak_memory_gib <= chosen.memory_limit_gib < plain.peak_memory_gib
    assert whole.tokens_per_s_per_device < chosen.tokens_per_s_per_device


def test_expert_state_is_sharded_over_the_expert_grid_only() -> None:
    model, cluster = Model.preset("qwen3-235b-a22b"), Cluster.preset("h100", 256)
    one, two = (simulate(model, cluster, Plan(pp=8, ep=ep, gbs=512, seq=4096, noop_slots=2)) for ep in (4, 8))
    assert one.memory[1].weights > 1.5 * two.memory[1].weights


def test_one_layer_may_be_made_again_and_another_of_the_same_item_moved() -> None:
    # Three layers of 15 buckets, 23 to free, room on the host for one: one moves, one is made again.
    bucket = float(BUCKET)
    choice = choose_items((15 * bucket,), (1.0,), (3,), 23 * bucket, 29 * bucket)
    assert choice is not None
    assert (choice.recompute, choice.swap) == ((1,), (1,))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 80), ways=st.sampled_from([2, 3]), data=st.data())
def test_pieces_of_an_item_can_be_dealt_in_any_shares(count: int, ways: int, data: st.DataObject) -> None:
    pieces = _pieces(count, ways)
    first = data.draw(st.integers(0, count))
    heaps = [first, count - first]
    if ways == 3:
        second = data.draw(st.integers(0, count - first))
        heaps = [first, second, count - first - second]
    for piece in pieces:
        heaps[heaps.index(max(heaps))] -= piece
    assert heaps == [0] * ways
