"""Training: what a batch is, what the loss pulls at, that it learns, resumes exactly, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tenfold import cli as front_door
from tenfold.core.config import save_yaml
from tenfold.core.console import UserError
from tenfold.depth import training
from tenfold.depth.checkpoint import load_model
from tenfold.depth.config import RECIPES, Recipe, SceneConfig, SizePolicy, TrainConfig, UniDepthV2Config, ViTConfig
from tenfold.depth.data import read_folder
from tenfold.depth.losses import WEIGHTS, invariance
from tenfold.depth.training import (
    RoomViews,
    loss_terms,
    make_loss,
    make_network,
    make_schedule,
    parameter_groups,
    train,
)

NETWORK = UniDepthV2Config(
    ViTConfig(24, 4, 2, (1, 2, 3, 4), grid=4), hidden=16, heads=2, min_width=8, sizes=SizePolicy((0.5, 2.5), 1000, 3000)
)
SETTINGS = TrainConfig(
    steps=6,
    batch_size=4,
    sizes=((28, 42),),
    recipe="paper",
    learning_rate=2e-3,
    encoder_rate=1.0,
    schedule="cosine",
    ema_decay=0.9,
    evaluate_every=0,
    checkpoint_every=3,
)
TINY = Recipe(NETWORK, SETTINGS, SceneConfig(pieces=1))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("TENFOLD_THREADS", "1")
    monkeypatch.setattr(training, "VALIDATION_IMAGES", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Run `tenfold depth ...`: exit status, standard output, standard error."""

    def call(*arguments):
        status = front_door.main(["depth", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# ---------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_its_numbers():
    one, other = (RoomViews(SETTINGS, TINY.scenes) for _ in range(2))
    a, b = one.batch(range(8, 12)), other.batch(range(8, 12))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["image"], one.batch(range(12, 16))["image"])


def test_batches_draw_from_all_sizes_and_are_of_one():
    views = RoomViews(replace(SETTINGS, sizes=((28, 42), (42, 28), (28, 28))), TINY.scenes)
    assert {views.batch(range(4 * i, 4 * i + 2))["image"].shape[2:] for i in range(20)} == {
        (28, 42),
        (42, 28),
        (28, 28),
    }


def test_cameras_vary_within_what_was_asked():
    views = RoomViews(replace(SETTINGS, fov_deg=(40, 100), shift=0.1), TINY.scenes)
    k = torch.stack([views._camera(index, 30, 50) for index in range(200)])
    fov = torch.rad2deg(2 * torch.atan(25 / k[:, 0, 0]))
    assert fov.min() > 39.9 and fov.max() < 100.1 and fov.std() > 10
    assert (k[:, 0, 2] / 50 - 0.5).abs().max() <= 0.1 and (k[:, 0, 2] / 50 - 0.5).std() > 0.03


def test_two_views_are_of_one_room():
    batch = RoomViews(replace(SETTINGS, sizes=((42, 56),), batch_size=16), TINY.scenes).batch(range(16))
    mask = torch.ones_like(batch["depth"])
    agree = invariance(batch["depth"], batch["intrinsics"], mask, recipe="paper")
    crossed = invariance(batch["depth"].roll(1, 0), batch["intrinsics"], mask, recipe="paper")
    assert agree.median() < 0.4 * crossed.median()


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_every_trained_parameter_gets_a_gradient(recipe):
    network = make_network(NETWORK, 0)
    batch = RoomViews(SETTINGS, TINY.scenes).batch(range(4))
    torch.manual_seed(1)
    total, terms = make_loss(replace(SETTINGS, recipe=recipe, given_share=0.0))(network, batch)
    assert set(terms) == set(WEIGHTS[recipe])
    expected = sum(WEIGHTS[recipe][name] * float(value) for name, value in terms.items())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    total.backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", ["paper", "release"])
def test_the_camera_does_not_learn_from_depth(recipe):
    """Rays that prompt the decoder are detached: depth errors must not turn the camera."""
    network = make_network(NETWORK, 0)
    batch = RoomViews(SETTINGS, TINY.scenes).batch(range(4))
    image = training.normalised(batch["image"])
    rays = training.pinhole_rays(batch["intrinsics"], 28, 42)
    rest = (image, batch["depth"], rays, batch["intrinsics"], batch["flip"], recipe)
    terms = loss_terms(network(image), *rest)
    head = list(network.camera.parameters())
    found = torch.autograd.grad(terms["edges"] + terms["uncertainty"], head, allow_unused=True, retain_graph=True)
    assert all(g is None for g in found)
    found = torch.autograd.grad(terms["camera"], head, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in found)


def test_the_camera_is_given_in_the_asked_share_of_steps():
    told = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = make_network(NETWORK, 0)

        def forward(self, image, rays):
            told.append(rays is not None)
            return self.network(image, rays)

    spy, batch = Spy(), RoomViews(SETTINGS, TINY.scenes).batch(range(2))
    for seed in range(20):
        torch.manual_seed(seed)
        make_loss(SETTINGS)(spy, batch)
    assert 4 <= sum(told) <= 16


def test_pixels_without_depth_do_not_matter():
    network = make_network(NETWORK, 0).eval()
    batch = RoomViews(SETTINGS, TINY.scenes).batch(range(4))
    batch["depth"][:, :, :14] = 0
    totals = []
    for other in (batch, {**batch, "depth": batch["depth"].clone()}):
        torch.manual_seed(0)
        totals.append(make_loss(SETTINGS)(network, other)[0])
    assert torch.isfinite(totals[0]) and totals[0] == totals[1]


# ---------------------------------------------------------------- optimiser and schedule


def test_the_encoder_is_slower_and_vectors_do_not_decay():
    network = make_network(NETWORK, 0)
    config = TrainConfig()
    groups = parameter_groups(network, config)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {name: of[id(p)] for name, p in network.named_parameters() if p.requires_grad}
    assert rates["encoder.patches.weight"] == (config.learning_rate / 10, 0.1)
    assert rates["adapters.0.weight"] == (config.learning_rate, 0.1)
    for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patches.bias", "camera.positions"):
        assert rates[name][1] == 0, name
    assert all(decay == 0 for name, (_, decay) in rates.items() if name.endswith(("bias", "gain", "gain1", "gain2")))
    assert not any(name.endswith(training.UNTRAINED) for name in rates)


def test_the_published_schedule_is_constant_and_then_falls_to_a_tenth():
    factor = make_schedule(TrainConfig(steps=1000))
    assert factor(0) == factor(300) == 1
    assert factor(650) == pytest.approx(0.55) and factor(1000) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 3}, "pairs"),
        ({"sizes": ((30, 42),)}, "multiples of 14"),
        ({"fov_deg": (60, 180)}, "no range"),
        ({"given_share": 2.0}, "no share"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SETTINGS, **change)


# ---------------------------------------------------------------- runs


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    """On one batch again and again, which even this network can learn."""
    batches = {size: RoomViews(SETTINGS, TINY.scenes).batch(range(size)) for size in (4, 8)}
    monkeypatch.setattr(RoomViews, "batch", lambda self, indices: batches[len(indices)])
    settings = replace(SETTINGS, steps=60, learning_rate=6e-3, checkpoint_every=0, given_share=1.0)
    result, _ = train(replace(TINY, train=settings), tmp_path / "run", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    depth = [row["depth"] for row in rows if "depth" in row]
    assert result.finished and depth[-1] < 0.75 * depth[0]
    assert 0 <= result.metrics["eval/given_d1"] <= 1 and math.isfinite(result.metrics["eval/own_silog"])


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(tmp_path, monkeypatch):
    train(TINY, tmp_path / "whole", device="cpu")
    real = RoomViews.batch

    def failing(self, indices):
        if indices[0] >= 5 * SETTINGS.batch_size and len(indices) == SETTINGS.batch_size:
            raise KeyboardInterrupt
        return real(self, indices)

    monkeypatch.setattr(RoomViews, "batch", failing)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "cut", device="cpu")
    monkeypatch.setattr(RoomViews, "batch", real)
    train(TINY, tmp_path / "cut", device="cpu")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_frames_take_one_size(tmp_path):
    frames = [training.Entry("x", lambda: None)]
    settings = replace(SETTINGS, sizes=((28, 42), (28, 28)))
    with pytest.raises(UserError, match="one size"):
        train(replace(TINY, train=settings), tmp_path, frames=frames, device="cpu")


# ---------------------------------------------------------------- the verbs


@pytest.fixture
def recipe(tmp_path):
    save_yaml(tmp_path / "recipe.yaml", replace(TINY, train=replace(SETTINGS, steps=2)))
    return tmp_path / "recipe.yaml"


def test_generate_train_and_evaluate_fit_together(run, recipe, tmp_path):
    rooms, out = tmp_path / "rooms", tmp_path / "run"
    status, *_ = run("generate", rooms, "--count", 3, "--size", 42, 56, "--seed", 4)
    assert status == 0
    frames = [entry.read() for entry in read_folder(rooms)]
    assert len(frames) == 3 and frames[0].image.shape == (42, 56, 3)
    assert all((frame.depth_m > 0.2).all() and frame.intrinsics is not None for frame in frames)

    status, printed, _ = run("train", rooms, "-o", out, "--recipe", recipe, "--json")
    assert status == 0 and json.loads(printed)["finished"] is True
    assert load_model(str(out / "depth.safetensors")).config == NETWORK

    for camera in ("given", "predicted"):
        command = ("evaluate", "folder", rooms, "--model", out / "depth.safetensors", "--camera", camera)
        status, printed, _ = run(*command, "--limit", 2, "--json")
        assert status == 0
        found = json.loads(printed)
        assert len(found["images"]) == 2
        assert {"d1", "silog", "f_a", "rho_a", "arel_c", "ause"} <= found["mean"].keys()

    status, *_ = run("train", "-o", tmp_path / "more", "--recipe", recipe, "--start-from", out / "depth.safetensors")
    assert status == 0


def test_generate_sees_through_a_fisheye(run, tmp_path):
    """Depth is z: it falls to zero, which means none, where a wide camera looks sideways."""
    camera = {"name": "fisheye624", "params": [13.0, 13.0, 28.0, 21.0] + [0.0] * 12}
    (tmp_path / "camera.json").write_text(json.dumps(camera))
    command = ("generate", tmp_path / "rooms", "--count", 1, "--size", 42, 56, "--camera", tmp_path / "camera.json")
    assert run(*command)[0] == 0
    frame = read_folder(tmp_path / "rooms")[0].read()
    assert frame.camera == ("fisheye624", tuple(camera["params"]))
    assert (frame.depth_m[21, :6] == 0).all() and (frame.depth_m[18:24, 24:32] > 0).all()
    one = read_folder(tmp_path / "rooms")[0].read().image
    np.testing.assert_array_equal(one, frame.image)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "rooms", "--count", 0), "positive"),
        (("generate", "rooms", "--fov-deg", 50, 190), "within 0 and 170"),
        (("generate", "rooms", "--camera", "nowhere.json"), "nowhere.json"),
        (("train", "-o", "run", "--recipe", "papre"), "neither a YAML file nor a known recipe"),
        (("train", "-o", "run", "--size", 30, 40), "multiples of 14"),
        (("train", "nowhere", "-o", "run"), "nowhere"),
        (("evaluate", "nyu", "nowhere"), "nowhere"),
        (("evaluate", "folder", ".", "--protocol", "nuy"), "nyu"),
        (("evaluate", "folder", ".", "--max-depth", -1), "not a depth"),
        (("reproduce", "--seeds", -1), "none below 0"),
    ],
)
def test_bad_requests_end_in_one_line(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    status, _, errors = run(*arguments)
    assert status == 2
    assert words in errors and "Traceback" not in errors


def test_rooms_are_not_written_over_others(run, tmp_path):
    command = ("generate", tmp_path / "rooms", "--count", 1, "--size", 14, 20)
    assert run(*command)[0] == 0
    status, _, errors = run(*command)
    assert status == 2 and "already holds frames" in errors


def test_the_embedded_recipe_is_a_recipe():
    recipe = RECIPES["tenfold-depth-tiny"]
    count = sum(p.numel() for p in make_network(recipe.model, 0).parameters())
    assert 1_000_000 < count < 2_000_000
