"""The official protocols: what is valid, how an estimate of another size is read, what comes out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tenfold.core.console import UserError
from tenfold.depth import evaluation
from tenfold.depth.data import Entry, Frame
from tenfold.depth.evaluation import PROTOCOLS, Estimate, Protocol, evaluate_entries, prepared, score, valid_mask

CAMERA = ("pinhole", (30.0, 30.0, 20.0, 15.0))


def frame_of(depth: np.ndarray, camera=CAMERA) -> Frame:
    return Frame("f", np.zeros((*depth.shape, 3), np.uint8), depth.astype(np.float32), camera)


def exact(frame: Frame) -> Estimate:
    rays = evaluation.true_rays(frame)
    points = rays / rays[..., 2:] * frame.depth_m[..., None]
    depth = np.where(frame.depth_m > 0, frame.depth_m, 1)
    return Estimate(depth, points, rays, frame.intrinsics, np.ones_like(depth))


def test_the_published_crops():
    nyu = valid_mask(np.ones((480, 640)), PROTOCOLS["nyu"])
    assert nyu.sum() == (471 - 45) * (601 - 41) and nyu[45, 41] and not nyu[44, 41] and not nyu[470, 601]
    garg = valid_mask(np.ones((352, 1216)), PROTOCOLS["kitti"])
    rows, columns = np.flatnonzero(garg.any(1)), np.flatnonzero(garg.any(0))
    # The benchmark's own numbers for 352 x 1216: rows 143 to 349, columns 43 to 1172.
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (143, 349, 43, 1172)
    eigen = np.flatnonzero(valid_mask(np.ones((352, 1216)), PROTOCOLS["kitti-eigen-crop"]).any(1))
    assert (eigen[0], eigen[-1] + 1) == (117, 321)


def test_only_depth_in_range_counts():
    depth = np.array([[0, 0.004, 5, 10, 10.1]])
    assert valid_mask(depth, Protocol(0.005, 10)).tolist() == [[False, True, True, True, False]]


def test_kitti_is_cut_before_prediction_and_its_camera_with_it():
    frame = Frame(
        "k", np.zeros((375, 1242, 3), np.uint8), np.ones((375, 1242), np.float32), ("pinhole", (707, 707, 604, 180))
    )
    cut = prepared(frame, PROTOCOLS["kitti"])
    assert cut.image.shape == (352, 1216, 3) and cut.depth_m.shape == (352, 1216)
    assert cut.camera == ("pinhole", (707, 707, 604 - 13, 180 - 23))
    assert prepared(frame, PROTOCOLS["ddad"]) is frame
    with pytest.raises(UserError, match="352 x 1216"):
        prepared(replace(frame, image=frame.image[:300]), PROTOCOLS["kitti"])


def test_a_perfect_estimate_is_perfect():
    depth = np.random.default_rng(0).uniform(1, 5, (30, 40))
    found = score(frame_of(depth), exact(frame_of(depth)), Protocol()).metrics
    assert found["d1"] == 1 and found["arel"] < 1e-6
    assert found["f_a"] == pytest.approx(0.99) and found["rho_a"] == pytest.approx(1) and found["arel_c"] == 0


def test_estimates_of_another_size_are_resized_as_pytorch_does():
    values = np.random.default_rng(0).random((6, 8, 3)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None], size=(15, 20), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(evaluation.resized(values, (15, 20)), expected[0].permute(1, 2, 0).numpy())
    assert evaluation.resized(values, (6, 8)) is values
    assert evaluation.resized(values[..., 0], (15, 20)).shape == (15, 20)


def test_depth_that_is_not_valid_does_not_matter():
    depth = np.random.default_rng(0).uniform(1, 5, (30, 40))
    holes = depth.copy()
    holes[::2] = 0
    estimate = exact(frame_of(depth))
    wrong = replace(estimate, depth_m=np.where(holes > 0, estimate.depth_m, 99))
    assert score(frame_of(holes), wrong, Protocol()).metrics["d1"] == 1


def test_points_are_compared_with_the_true_camera():
    """The right depth on the wrong camera's rays costs in 3D and not in depth."""
    depth = np.random.default_rng(0).uniform(1, 5, (30, 40))
    frame = frame_of(depth)
    wrong = exact(frame_of(depth, ("pinhole", (20.0, 20.0, 20.0, 15.0))))
    found = score(frame, wrong, Protocol()).metrics
    assert found["d1"] == 1 and found["f_a"] < 0.9 and found["mse_3d"] > 0.1 and found["rho_a"] < 0.9


def test_other_cameras_than_pinholes_have_rays():
    params = (20.0, 20.0, 20.0, 15.0, 0.6, 1.1)
    rays = evaluation.true_rays(frame_of(np.ones((30, 40)), ("eucm", params)))
    np.testing.assert_allclose(np.linalg.norm(rays, axis=-1), 1, atol=1e-6)
    assert rays.shape == (30, 40, 3) and rays[15, 0, 0] < -0.5


def test_depth_of_another_size_than_the_picture_has_the_same_rays():
    frame = frame_of(np.ones((30, 40)))
    half = replace(frame, depth_m=np.ones((15, 20), np.float32))
    np.testing.assert_allclose(
        evaluation.true_rays(half)[7, 9], np.array([-1.0 / 30, 0, 1]) / np.linalg.norm([1 / 30, 0, 1]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("depth", "estimate", "words"),
    [
        (np.zeros((4, 5)), np.ones((4, 5)), "no depth between 0 and 10 m"),
        (np.ones((4, 5)), np.full((4, 5), np.nan), "not finite and positive"),
        (np.ones((4, 5)), np.zeros((4, 5)), "not finite and positive"),
    ],
)
def test_what_cannot_be_scored_is_told(depth, estimate, words):
    with pytest.raises(UserError, match=words):
        score(frame_of(depth), Estimate(estimate), Protocol())


def test_a_set_is_the_mean_of_its_images_however_many_pixels_they_have():
    few, many = np.zeros((10, 10)), np.full((10, 10), 2.0)
    few[0, :5] = 2.0
    entries = [Entry("few", lambda: frame_of(few, None)), Entry("many", lambda: frame_of(many, None))]
    answers = iter((2.0, 4.0))
    result = evaluate_entries(lambda frame: Estimate(np.full((10, 10), next(answers))), entries, Protocol())
    assert [image.valid_pixels for image in result.images] == [5, 100]
    assert result.mean["d1"] == 0.5
    assert "f_a" not in result.mean, "without a camera there are no points to compare"
