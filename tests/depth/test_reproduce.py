"""The experiment: arms that differ in what they should, test sets, bars, and a whole run in small."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tenfold.core.console import UserError
from tenfold.depth import reproduce as experiment
from tenfold.depth.ablation import ARMS, AblationNetwork, RenderedPairs, arm_loss, pinhole
from tenfold.depth.cameras import pinhole_rays
from tenfold.depth.data import read_folder
from tenfold.depth.reproduce import (
    CARTESIAN,
    CONSISTENT,
    FISHEYE,
    INSIDE,
    NARROW,
    PLAIN,
    RESIZED,
    SHIFTED,
    SPHERICAL,
    WIDE,
    ReproduceConfig,
    Score,
    bars,
    reproduce,
)

SMALL = ReproduceConfig(steps=4, seeds=(0, 1), pairs=8, size=(12, 16), batch_size=4)


@pytest.fixture(autouse=True)
def small_tests(monkeypatch):
    monkeypatch.setattr(experiment, "TEST_IMAGES", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(arm: str) -> AblationNetwork:
    torch.manual_seed(0)
    return AblationNetwork(ARMS[arm]).eval()


def rays_of(fov_deg: float) -> torch.Tensor:
    return pinhole_rays(pinhole(torch.tensor([fov_deg]), 12, 16), 12, 16)


def test_all_arms_have_one_size_but_for_the_last_layer():
    counts = {arm: sum(p.numel() for p in network(arm).parameters()) for arm in ARMS}
    assert counts[PLAIN] == counts[SPHERICAL] == counts[CONSISTENT]
    assert 0 < counts[CARTESIAN] - counts[PLAIN] < 500


def test_the_plain_arm_does_not_see_the_camera_and_the_others_do():
    image = torch.rand(1, 3, 12, 16)
    for arm in ARMS:
        model = network(arm)
        narrow, wide = (model(image, rays_of(fov))["points"] for fov in (40.0, 90.0))
        assert torch.equal(narrow, wide) == (arm == PLAIN), arm


def test_spherical_points_lie_on_the_prompting_rays():
    model = network(SPHERICAL)
    image, rays = torch.rand(2, 3, 12, 16), rays_of(60.0).expand(2, -1, -1, -1)
    points = model(image, rays)["points"]
    torch.testing.assert_close(torch.nn.functional.normalize(points, dim=1), rays, rtol=1e-4, atol=1e-5)
    given = torch.tensor([True, False])
    mixed = model(image, rays, given)
    torch.testing.assert_close(mixed["rays"][0], rays[0])
    torch.testing.assert_close(mixed["rays"][1], mixed["predicted_rays"][1])


def test_the_camera_head_learns_from_rays_only():
    data = RenderedPairs(4, (12, 16), 0)
    model = network(SPHERICAL)
    _, terms = arm_loss(ARMS[SPHERICAL])(model, data.batch(range(4)))
    head = list(model.camera_head.parameters())
    assert all(g is None for g in torch.autograd.grad(terms["depth"], head, allow_unused=True, retain_graph=True))
    assert all(g is not None for g in torch.autograd.grad(terms["camera"], head))


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_learns(arm):
    data, model = RenderedPairs(4, (12, 16), 0), network(arm)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch, loss = data.batch(range(8)), arm_loss(ARMS[arm])
    totals = []
    for _ in range(15):
        total, _ = loss(model, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]


def test_the_test_sets_are_what_their_names_say():
    for name, (low, high, _) in experiment.BANDS.items():
        test = experiment.test_set(name, (12, 16), 3)
        left, right = test.rays[:, :, 6, 0], test.rays[:, :, 6, -1]
        across = torch.rad2deg(torch.acos((left * right).sum(1)))
        assert (across > 0.85 * low).all() and (across < high + 1).all(), name
        torch.testing.assert_close(torch.nn.functional.normalize(test.points, dim=1), test.rays, rtol=1e-4, atol=1e-5)
    shifted = experiment.test_set(SHIFTED, (12, 16), 3).rays
    assert (shifted[:, 0, :, 7] + shifted[:, 0, :, 8]).abs().max() > 0.02
    assert experiment.test_set(RESIZED, (12, 16), 1).image.shape[2:] == (16, 20)
    fisheye = experiment.test_set(FISHEYE, (12, 16), 1).rays
    assert 125 < float(torch.rad2deg(torch.acos((fisheye[0, :, 6, 0] * fisheye[0, :, 6, -1]).sum()))) < 145


def scores_of(plain: float, given: float, own_error: float, silog: float) -> list[Score]:
    rows = []
    for test in (INSIDE, NARROW, WIDE):
        same = {"arel": 0.1, "silog": silog}
        flat = {"d1": plain, "error_3d_m": 1.0, "ray_error_deg": 5.0, "arel": 0.1, "silog": 10.0}
        rows += [
            Score(PLAIN, 0, "mean", test, {"d1": plain, "error_3d_m": 1.0, "ray_error_deg": 10.0, **same}),
            Score(SPHERICAL, 0, "given", test, {"d1": given, "error_3d_m": 0.5, "ray_error_deg": 0.0, **same}),
            Score(SPHERICAL, 0, "own", test, {"d1": plain, "error_3d_m": own_error, "ray_error_deg": 5.0, **same}),
            Score(CARTESIAN, 0, "own", test, flat),
        ]
    return rows


def test_bars_say_what_is_met():
    met = bars(scores_of(0.4, 0.8, 0.8, 9.0), full=False)
    assert len(met) == 6 and all(bar.met for bar in met)
    assert [bar.met for bar in bars(scores_of(0.6, 0.8, 0.95, 9.5), full=False)] == [
        False,
        False,
        False,
        False,
        True,
        False,
    ]
    assert len(bars(scores_of(0.4, 0.8, 0.8, 9.0), full=True)) == 7


def test_bars_of_arms_that_were_not_trained_are_left_out():
    without = [score for score in scores_of(0.4, 0.8, 0.8, 9.0) if score.arm != CARTESIAN]
    assert len(bars(without, full=False)) == 5


def test_a_whole_run_in_small(tmp_path, data_root):
    frames = [entry for entry in read_folder(data_root / "depth" / "rgbd") if entry.name in ("tum", "sunrgbd")]
    output = tmp_path / "out" / "depth.json"
    found = reproduce(output, SMALL, tmp_path / "runs", frames, arms=(PLAIN, SPHERICAL))
    written = json.loads(output.read_text())
    assert written["tables"] == json.loads(json.dumps(found["tables"]))
    assert written["seeds"] == [0, 1] and output.with_name("depth_d1.svg").is_file()
    assert {table["name"] for table in written["tables"]} == {
        "d1",
        "error_3d",
        "ray_error",
        "silog",
        "ablation",
        "bars",
    }
    assert {score["camera"] for score in written["scores"]} == {"mean", "own", "given"}
    real = [score for score in written["scores"] if score["test"] == "real frames"]
    assert len(real) == 6 and all("silog" in score["metrics"] for score in real)
    weights = (tmp_path / "runs" / "arm0-seed0" / "model.safetensors").stat().st_mtime_ns
    again = reproduce(output, SMALL, tmp_path / "runs", frames, arms=(PLAIN, SPHERICAL))
    assert again["scores"] == found["scores"]
    assert (tmp_path / "runs" / "arm0-seed0" / "model.safetensors").stat().st_mtime_ns == weights


def test_no_seed_is_told(tmp_path):
    with pytest.raises(UserError, match="at least one seed"):
        reproduce(tmp_path / "a.json", replace(SMALL, seeds=()), tmp_path)
