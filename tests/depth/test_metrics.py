"""The metrics: the official values, brute-force twins, and what they must not change by."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import spearmanr

from tenfold.depth import metrics

SINGLE_PRECISION = {"arel_ssi": 4e-6}  # the fixture's least squares were solved in float32


@pytest.fixture(scope="module")
def fixture(data_root):
    folder = data_root / "depth" / "fixtures"
    return load_file(folder / "metrics.safetensors"), json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("image", range(4))
def test_depth_metrics_are_the_official_ones(fixture, image):
    tensors, expected = fixture
    valid = tensors["mask"][image, 0].bool()
    found = metrics.depth_metrics(*(tensors[name][image, 0][valid].numpy() for name in ("pred", "gt")))
    for name, values in expected["depth"].items():
        tolerance = SINGLE_PRECISION.get(name, 1e-6)
        assert found[name] == pytest.approx(values[image], rel=1e-6, abs=tolerance), name


@pytest.mark.parametrize("image", range(4))
def test_cloud_metrics_are_the_official_ones(fixture, image):
    tensors, expected = fixture
    valid = tensors["mask"][image, 0].bool().numpy()
    clouds = (tensors[name][image].permute(1, 2, 0).numpy()[valid] for name in ("points_pred", "points_gt"))
    found = metrics.cloud_metrics(*clouds, expected["min_depth"], expected["max_depth"])
    for ours, theirs in (("mse_3d", "MSE_3d"), ("chamfer", "chamfer"), ("f_a", "F1")):
        assert found[ours] == pytest.approx(expected["points"][theirs][image], abs=1e-6)


def test_the_f_score_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    p, g = random.normal(size=(60, 3)), random.normal(size=(80, 3))
    squared = ((p[:, None] - g[None]) ** 2).sum(2)
    thresholds = np.geomspace(0.01, 0.5, 100)
    scores = []
    for threshold in thresholds:
        precision, recall = np.mean(squared.min(1) < threshold), np.mean(squared.min(0) < threshold)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    area = metrics._f_area(squared.min(1), squared.min(0), thresholds)
    assert area == pytest.approx(sum((a + b) / 2 for a, b in itertools.pairwise(scores)) / 100)


def test_a_perfect_prediction_is_perfect():
    depth = np.linspace(0.5, 9, 200)
    found = metrics.depth_metrics(depth, depth)
    assert all(found[name] == 1 for name in ("d05", "d1", "d2", "d3", "tau", "d1_si", "d1_ssi"))
    assert max(found[name] for name in ("arel", "rmse", "silog", "log10", "sqrel", "medianlog")) < 1e-9
    cloud = np.random.default_rng(0).normal(size=(50, 3))
    assert metrics.cloud_metrics(cloud, cloud, 0.01, 10)["f_a"] == pytest.approx(0.99)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.2, 5.0), st.integers(0, 1000))
def test_scale_invariant_metrics_do_not_see_the_scale(scale, seed):
    random = np.random.default_rng(seed)
    truth = random.uniform(0.5, 9, 101)
    guess = truth * random.uniform(0.7, 1.3, 101)
    one, other = metrics.depth_metrics(guess, truth), metrics.depth_metrics(scale * guess, truth)
    for name in ("silog", "d1_si", "arel_si", "arel_ssi", "tau_si"):
        assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name


def test_the_angle_between_rays_is_exact_for_small_angles():
    angle = 1e-7
    rays = np.array([[math.sin(angle), 0, math.cos(angle)]])
    assert metrics.ray_errors_deg(rays, np.array([[0.0, 0, 1]]))[0] == pytest.approx(math.degrees(angle), rel=1e-6)


def turned(rays: np.ndarray, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return rays @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T


def test_rho_falls_with_the_angle_between_the_cameras():
    rays = np.random.default_rng(0).normal(size=(100, 3)) * [0.3, 0, 0] + [0, 0, 1]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    found = [metrics.camera_metrics(turned(rays, angle), rays)["rho_a"] for angle in (0.0, 5.0, 14.9, 20.0)]
    assert found[0] == pytest.approx(1)
    assert found[1] == pytest.approx((15 - 5) / 14.5, abs=0.01)
    assert found[2] < 0.02 and found[3] == 0


def test_wide_cameras_are_given_wider_thresholds():
    behind = np.array([[math.sin(2.0), 0, math.cos(2.0)], [0, 0, 1.0]])
    assert metrics.camera_metrics(turned(behind, 16), behind)["rho_a"] > 0.15
    assert metrics.camera_metrics(turned(behind[1:], 16), behind[1:])["rho_a"] == 0


def test_relative_error_of_the_intrinsics():
    true = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    guess = np.array([[110.0, 0, 50], [0, 90, 44], [0, 0, 1]])
    found = metrics.camera_metrics(np.eye(3), np.eye(3), guess, true)
    assert found["arel_c"] == pytest.approx((0.1 + 0.1 + 0 + 0.1) / 4)


def test_an_uncertainty_that_is_the_error_has_no_area():
    random = np.random.default_rng(0)
    truth = random.uniform(1, 5, 500)
    guess = truth * random.uniform(0.5, 1.8, 500)
    error = np.maximum(guess / truth, truth / guess)
    assert metrics.uncertainty_metrics(error, guess, truth)["ause"] == pytest.approx(0, abs=1e-12)
    chance = metrics.uncertainty_metrics(random.random(500), guess, truth)
    assert chance["nause"] == pytest.approx(1, abs=0.25)
    expected = spearmanr(error, np.abs(guess - truth)).statistic
    assert metrics.uncertainty_metrics(error, guess, truth)["spearman"] == pytest.approx(expected)


def test_ranks_of_equal_values_are_shared():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, 40).astype(float), random.integers(0, 4, 40).astype(float)
    found = metrics._correlation(metrics._ranks(a), metrics._ranks(b))
    assert found == pytest.approx(spearmanr(a, b).statistic)


def test_large_clouds_are_thinned_alike():
    points = np.random.default_rng(0).normal(size=(480, 640, 3)).astype(np.float32)
    valid = np.ones((480, 640), bool)
    thin, mask = metrics.thinned(points, valid)
    assert 0.9 * metrics.CLOUD_POINTS < mask.sum() <= metrics.CLOUD_POINTS
    assert thin.shape[:2] == mask.shape
    same, untouched = metrics.thinned(points, valid & (np.arange(640) < 100))
    assert same is points and untouched.shape == (480, 640)


def test_a_set_is_averaged_over_images():
    assert metrics.mean_metrics([{"d1": 1.0, "rho_a": 0.5}, {"d1": 0.0}]) == {"d1": 0.5, "rho_a": 0.5}
