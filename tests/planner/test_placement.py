"""Expert placement and token copies, against the recorded cases and brute force."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.planner import placement
from tenfold.planner.collectives import count_token_copies, expected_copies_per_token


def test_replication_equals_the_recorded_cases(planner_data: Path) -> None:
    arrays = np.load(planner_data / "eplb_cases.npz")
    for case in json.loads((planner_data / "eplb_cases.json").read_text()):
        weight = arrays[case["name"] + ".weight"]
        ours = placement.replicate(weight, case["replicas"], case["groups"], case["nodes"], case["gpus"])
        assert np.array_equal(ours.physical_to_logical, arrays[case["name"] + ".phy2log"])
        assert np.array_equal(ours.counts, arrays[case["name"] + ".logcnt"])
        # Replicas of one expert carry equal load; which of them is called the first is a tie.
        theirs = arrays[case["name"] + ".log2phy"]
        assert np.array_equal(np.sort(ours.logical_to_physical, axis=-1), np.sort(theirs, axis=-1))
        load = placement.replicated_device_loads(weight, ours, case["gpus"])
        assert placement.fullness(load).mean() == pytest.approx(case["mean_max_over_mean_after"], abs=1e-6)


def test_greedy_placement_equals_the_recorded_cases(planner_data: Path) -> None:
    for case in json.loads((planner_data / "placement_greedy_cases.json").read_text()):
        load = np.array(case["load"])
        device = placement.place_greedy(load, case["devices"])
        assert device.tolist() == case["device_of_expert"]
        balanced = placement.device_loads(load, device, case["devices"])
        assert placement.variation(balanced) == pytest.approx(case["cv_after"], abs=1e-12)
        assert placement.fullness(balanced) == pytest.approx(case["max_over_mean_after"], abs=1e-12)


def test_fifty_eight_layers_of_256_experts_are_placed_quickly() -> None:
    loads = np.random.default_rng(0).lognormal(size=(58, 256))
    placement.place_greedy(loads, 32)
    start = time.process_time()
    placement.place_greedy(loads, 32)
    assert time.process_time() - start < 0.3


@settings(max_examples=40, deadline=None)
@given(
    devices=st.integers(1, 6),
    slots=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_greedy_placement_equals_its_brute_force_twin(devices: int, slots: int, seed: int) -> None:
    load = np.random.default_rng(seed).integers(0, 50, devices * slots).astype(float)
    total, count, expected = [0.0] * devices, [0] * devices, [0] * len(load)
    for expert in sorted(range(len(load)), key=lambda e: -load[e]):
        chosen = min((d for d in range(devices) if count[d] < slots), key=lambda d: (total[d], d))
        expected[expert] = chosen
        total[chosen] += load[expert]
        count[chosen] += 1
    if slots > 1:
        assert placement.place_greedy(load, devices).tolist() == expected
    else:
        assert sorted(placement.place_greedy(load, devices).tolist()) == list(range(devices))


def test_the_moving_average_planner_balances_recorded_loads(planner_data: Path) -> None:
    loads = np.load(planner_data / "tinymoe_loads_ep.npz")["loads"].sum(axis=2).astype(float)
    planner = placement.PlacementPlanner(2, 32, 8)
    first = planner.device_of_expert
    static, planned, moves = [], [], 0
    for step, load in enumerate(loads):
        if step >= 100:
            static.append(placement.fullness(placement.device_loads(load, first, 8)))
            planned.append(placement.fullness(placement.device_loads(load, planner.device_of_expert, 8)))
        decision = planner.observe(load)
        moves += int(decision.migrated.sum()) if decision else 0
    assert np.mean(static) == pytest.approx(1.295, abs=1e-3)
    assert np.mean(planned) == pytest.approx(1.237, abs=1e-3)
    assert 10 <= moves <= 17


def test_a_migration_that_gains_too_little_is_not_made() -> None:
    planner = placement.PlacementPlanner(1, 4, 2, period=1, threshold=0.08)
    decision = planner.observe(np.array([[10.0, 10.0, 10.0, 11.0]]))
    assert decision is not None
    assert not decision.migrated.any()
    assert planner.device_of_expert.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "bad", [np.array([1.0, np.nan]), np.array([1.0, -1.0]), np.array([np.inf, 1.0]), np.array(["a", "b"])]
)
def test_loads_that_are_no_loads_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(UserError, match="loads"):
        placement.place_greedy(bad, 2)


def test_devices_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(UserError, match="valid: 1, 2, 3, 4, 6, 12"):
        placement.PlacementPlanner(1, 12, 5)


def test_documents_are_spread_by_attention_cost() -> None:
    lengths = np.array([8, 4, 4, 4, 4, 2, 2, 2, 2])
    rank = placement.balance_documents(lengths, 2)
    cost = [float((lengths[rank == r] ** 2.0).sum()) for r in range(2)]
    assert abs(cost[0] - cost[1]) <= 16


def test_token_copies_equal_the_recorded_counts(planner_data: Path) -> None:
    arrays = np.load(planner_data / "a2a_volume_cases.npz")
    for index, case in enumerate(json.loads((planner_data / "a2a_volume_cases.json").read_text())):
        ours = count_token_copies(arrays[f"case{index}.topk_idx"], case["experts"], case["ranks_per_node"])
        assert ours.flat_inter == case["flat"]["inter_node_token_copies"]
        assert ours.flat_intra == case["flat"]["intra_node_token_copies"]
        assert ours.flat_local == case["flat"]["local"]
        assert ours.max_receive_over_mean == pytest.approx(case["flat"]["max_recv_over_mean"])
        assert ours.rank_dedup == case["rank_dedup"]["copies"]
        assert ours.rank_dedup_inter == case["rank_dedup"]["inter_node"]
        assert ours.node_dedup_inter == case["node_dedup"]["inter_node_token_copies"]
        assert ours.hierarchical_inter == case["allgather_hierarchical"]["inter_node_token_copies"]
        assert ours.hierarchical_intra == case["allgather_hierarchical"]["intra_node_token_copies"]
        assert np.array_equal(ours.send, arrays[f"case{index}.send_counts"])


def test_expected_copies_show_where_each_dispatch_wins() -> None:
    assert [round(float(expected_copies_per_token(d, 8, 4)), 1) for d in ("flat", "hierarchical", "dedup")] == [
        6.0,
        3.0,
        2.7,
    ]
    assert [round(float(expected_copies_per_token(d, 8, 8)), 1) for d in ("flat", "hierarchical", "dedup")] == [
        7.0,
        7.0,
        4.6,
    ]


@settings(max_examples=20, deadline=None)
@given(nodes=st.integers(1, 4), per_node=st.integers(1, 3), k=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_counted_copies_obey_their_order(nodes: int, per_node: int, k: int, seed: int) -> None:
    ranks = nodes * per_node
    experts = 4 * ranks
    rng = np.random.default_rng(seed)
    routing = np.stack([[rng.choice(experts, k, replace=False) for _ in range(8)] for _ in range(ranks)])
    copies = count_token_copies(routing, experts, per_node)
    assert copies.node_dedup_inter <= copies.rank_dedup_inter <= copies.flat_inter
    assert copies.flat_inter + copies.flat_intra + copies.flat_local == ranks * 8 * k
