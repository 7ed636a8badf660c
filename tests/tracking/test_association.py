"""Identities are those of the official trackers, whatever the sequence; the fast greedy choice is the plain one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from tenfold.tracking import matching
from tenfold.tracking.association import Associator
from tenfold.tracking.config import MATCHERS, MatcherConfig
from tenfold.tracking.motion import KalmanBank, to_measurement

FIXTURES = Path(__file__).parents[1] / "data" / "tracking"
CONFIGS = ["tao_benchmark", "demo", "bdd", "bdd_cosine_cats", "bdd_softmax_cats"]


def config_of(about: dict) -> MatcherConfig:
    """Our settings of an official configuration."""
    common = {
        "matcher": about["tracker"],
        "init_score": about["init_score_thr"],
        "obj_score": about["obj_score_thr"],
        "match_score": about["match_score_thr"],
        "memory_frames": about["memo_tracklet_frames"],
        "momentum": about["memo_momentum"],
    }
    if about["tracker"] == "tao":
        distance = about["max_distance"]
        return MatcherConfig(**common, max_distance=None if distance == -1 else distance, fps=about["fps"])
    return MatcherConfig(
        **common,
        backdrop_frames=about["memo_backdrop_frames"],
        duplicate_score=about["nms_conf_thr"],
        duplicate_iou=about["nms_backdrop_iou_thr"],
        class_iou=about["nms_class_iou_thr"],
        with_classes=about["with_cats"],
        score=about["match_metric"],
    )


@pytest.mark.parametrize("sequence", ["a", "b"])
@pytest.mark.parametrize("name", CONFIGS)
def test_identities_boxes_and_order_are_the_official_ones(sequence: str, name: str) -> None:
    path = FIXTURES / f"tracker_sequences_{sequence}.safetensors"
    with safe_open(path, "np") as file:
        about = file.metadata()
    tensors = load_file(path)
    tracker = Associator(config_of(json.loads(about["configs"])[name]))
    for frame in range(int(about["frames"])):
        given = {part: tensors[f"in.{frame}.{part}"] for part in ("boxes", "scores", "labels", "embeds")}
        found = tracker.update(**given, frame=frame)
        expected = {part: tensors[f"out.{name}.{frame}.{part}"] for part in ("boxes", "labels", "scores", "ids")}
        np.testing.assert_array_equal(found.ids, expected["ids"], err_msg=f"frame {frame}")
        for part in ("boxes", "labels", "scores"):
            np.testing.assert_array_equal(given[part][found.kept], expected[part], err_msg=f"frame {frame}")


@pytest.mark.parametrize("case", range(4))
def test_distance_gate_is_the_official_one(case: int) -> None:
    tensors = load_file(FIXTURES / "distance_mask.safetensors")
    boxes, frame, memory_boxes, memory_frames, params, mask = (
        tensors[f"{case}.{part}"] for part in ("boxes", "frame", "memo_boxes", "memo_frames", "params", "mask")
    )
    found = matching.distance_gate(boxes, frame, memory_boxes, memory_frames, float(params[0]), float(params[1]))
    np.testing.assert_allclose(found, mask, atol=1e-5)


def plain_greedy(scores: np.ndarray, threshold: float, may_take: np.ndarray) -> list[int]:
    """The rule as it is written down."""
    scores, result = scores.copy(), []
    for row in range(len(scores)):
        column = int(scores[row].argmax())
        if scores[row, column] > threshold and may_take[row]:
            result.append(column)
            others = np.arange(len(scores)) != row
            scores[others, column] = 0
        else:
            result.append(-1)
    return result


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 999))
def test_greedy_choice_equals_the_plain_rule(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, may_take = rng.uniform(-0.3, 1, (rows, columns)).astype(np.float32), rng.random(rows) > 0.2
    expected = plain_greedy(scores, 0.3, may_take)
    assert matching.greedy(scores.copy(), 0.3, may_take).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 999))
def test_hungarian_choice_is_no_worse_than_greedy_and_obeys_the_gates(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, may_take = rng.random((rows, columns)).astype(np.float32), rng.random(rows) > 0.2
    found = matching.hungarian(scores, 0.4, may_take)
    taken = found[found >= 0]
    assert len(set(taken.tolist())) == len(taken)
    assert all(may_take[row] and scores[row, column] > 0.4 for row, column in enumerate(found) if column >= 0)

    def total(pairs: np.ndarray) -> float:
        return float(sum(scores[row, column] for row, column in enumerate(pairs) if column >= 0))

    assert total(found) >= total(matching.greedy(scores.copy(), 0.4, may_take)) - 1e-6


def test_kalman_bank_equals_the_filter_of_eight_by_eight_matrices() -> None:
    rng = np.random.default_rng(0)
    start = np.concatenate((rng.uniform(0, 300, (5, 2)), rng.uniform(350, 600, (5, 2))), 1)
    bank = KalmanBank()
    bank.append(start)
    move, look = np.eye(8) + np.eye(8, k=4), np.eye(4, 8)
    filters = []
    for z in to_measurement(start):
        std = np.array([z[3] / 10, z[3] / 10, 1e-2, z[3] / 10, z[3] / 16, z[3] / 16, 1e-5, z[3] / 16])
        filters.append([np.concatenate((z, np.zeros(4))), np.diag(std**2)])
    for step in range(6):
        bank.predict()
        rows = np.array([0, 2, 3]) if step % 2 else np.arange(5)
        boxes = start[rows] + step * 4 + rng.normal(0, 2, (len(rows), 4))
        bank.update(rows, boxes)
        measured = dict(zip(rows.tolist(), to_measurement(boxes), strict=True))
        for number, state in enumerate(filters):
            mean, covariance = state
            h = mean[3]
            noise = np.array([h / 20, h / 20, 1e-2, h / 20, h / 160, h / 160, 1e-5, h / 160])
            mean, covariance = move @ mean, move @ covariance @ move.T + np.diag(noise**2)
            if number in measured:
                h = mean[3]
                spread = look @ covariance @ look.T + np.diag(np.array([h / 20, h / 20, 1e-1, h / 20]) ** 2)
                gain = covariance @ look.T @ np.linalg.inv(spread)
                mean = mean + gain @ (measured[number] - look @ mean)
                covariance = covariance - gain @ spread @ gain.T
            filters[number] = [mean, covariance]
        expected = np.stack([state[0] for state in filters])
        np.testing.assert_allclose(bank.mean[:, :, 0], expected[:, :4], rtol=1e-9)
        np.testing.assert_allclose(bank.mean[:, :, 1], expected[:, 4:], rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), name=st.sampled_from(sorted(MATCHERS)), hungarian=st.booleans())
def test_identities_are_unique_in_a_frame_and_never_given_twice(seed: int, name: str, hungarian: bool) -> None:
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(MATCHERS[name], assignment="hungarian" if hungarian else "greedy")
    tracker, seen = Associator(config), -1
    for _ in range(8):
        count = int(rng.integers(0, 9))
        corner = rng.uniform(0, 200, (count, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(5, 60, (count, 2))), 1)
        found = tracker.update(boxes, rng.random(count), np.zeros(count), rng.normal(0, 3, (count, 8)))
        assert len(set(found.ids.tolist())) == len(found.ids)
        new = sorted(number for number in found.ids.tolist() if number > seen)
        assert new == list(range(seen + 1, seen + 1 + len(new)))
        seen = max([seen, *new])


def test_a_lost_track_comes_back_within_the_memory_and_not_after() -> None:
    tracker = Associator(dataclasses.replace(MATCHERS["tao"], memory_frames=10))
    box, one, other = np.array([[0.0, 0, 10, 10]]), np.array([[9.0, 0.0]]), np.array([[0.0, 9.0]])

    def identity(embed: np.ndarray, frame: int) -> int:
        return int(tracker.update(box, np.ones(1), np.zeros(1), embed, frame).ids[0])

    first = identity(one, 0)
    assert identity(other, 5) != first
    assert identity(one, 9) == first
    identity(other, 19)  # ten frames later the first is forgotten
    assert identity(one, 20) not in (first,)
