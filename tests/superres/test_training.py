"""Training: where it starts, that it learns, that it survives, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tenfold import cli as front_door
from tenfold.core.config import save_yaml
from tenfold.core.console import UserError
from tenfold.superres.checkpoint import load_model, save_model
from tenfold.superres.config import HiTConfig, Recipe, TrainConfig
from tenfold.superres.evaluation import evaluate_pairs
from tenfold.superres.predictor import Upscaler
from tenfold.superres.resize import imresize_matlab
from tenfold.superres.training import Validation, cubic_phases, make_model, make_optimizer, make_schedule, train

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "superres-train.json"
PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"
NETWORK = HiTConfig(variant="srf", scale=2, width=28, depths=(2,), heads=(2,), window_ratios=(0.5, 1.0))
SETTINGS = TrainConfig(
    iterations=12,
    batch_size=2,
    patch=8,
    learning_rate=2e-3,
    schedule="cosine",
    clip_norm=1.0,
    ema_decay=0.9,
    evaluate_every=6,
    checkpoint_every=3,
    seed=0,
)


def waves(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with edges and gradients at several sizes: what interpolation blurs and a network can learn."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    total = np.zeros((height, width, 3))
    for _ in range(6):
        angle, length = random.uniform(0, np.pi), random.uniform(5, 20)
        phase = (x * np.cos(angle) + y * np.sin(angle)) / length + random.uniform(0, 1, 3)[:, None, None]
        total += np.sign(np.sin(2 * np.pi * phase)).transpose(1, 2, 0)
    return (127.5 + 20 * total).clip(0, 255).astype(np.uint8)


def save_pictures(folder: Path, count: int = 3, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    for seed in range(count):
        Image.fromarray(waves(size, size + 8, seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("pictures") / "in")


@pytest.fixture
def recipe(tmp_path):
    """A YAML recipe that takes a second."""
    save_yaml(tmp_path / "recipe.yaml", Recipe(NETWORK, SETTINGS))
    return tmp_path / "recipe.yaml"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("TENFOLD_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Run `tenfold superres ...`: exit status, standard output, standard error."""

    def call(*arguments):
        status = front_door.main(["superres", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("variant", "channels"), [("srf", 3), ("sng", 1)])
def test_a_network_can_start_at_bicubic_interpolation(scale, variant, channels):
    model = make_model(replace(NETWORK, variant=variant, scale=scale, channels=channels), "bicubic", 0)
    low = np.random.default_rng(0).random((14, 17, channels))
    with torch.no_grad():
        output = model(torch.from_numpy(low).float().permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    expected = imresize_matlab(low, scale)
    inner = np.s_[2 * scale : -2 * scale, 2 * scale : -2 * scale]  # two pixels see the border's padding
    np.testing.assert_allclose(output[inner], expected[inner], atol=1e-5)
    assert np.abs(output - expected).max() > 1e-3, "if the border were exact too, its exception could go"


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_cubic_phases_sum_to_one_and_mirror_each_other(scale):
    phases = cubic_phases(scale)
    assert phases.shape == (scale, 5)
    torch.testing.assert_close(phases.sum(1), torch.ones(scale))
    torch.testing.assert_close(phases.flip(0, 1), phases)


def test_a_network_that_starts_at_bicubic_can_learn_everywhere(pictures, tmp_path):
    """Zeros that block each other's gradients would freeze the body: all weights must move within a few steps."""
    settings = replace(SETTINGS, init="bicubic", ema_decay=0.0, iterations=4, evaluate_every=0)
    train(pictures, tmp_path, NETWORK, settings, device="cpu")
    start = make_model(NETWORK, "bicubic", SETTINGS.seed).state_dict()
    end = load_model(str(tmp_path / "hit-srf-x2.safetensors")).state_dict()
    assert [key for key in start if torch.equal(start[key], end[key]) and "position_bias" not in key] == []


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (replace(NETWORK, width=24), "width of at least 27, not 24"),
        (replace(NETWORK, reconstruction="pixelshuffle"), "pixelshuffledirect"),
        (replace(NETWORK, residual_convolution="3conv"), "1conv"),
    ],
)
def test_networks_that_cannot_hold_bicubic_are_refused(network, words):
    with pytest.raises(UserError, match=words):
        make_model(network, "bicubic", 0)


def test_start_from_takes_all_but_the_reconstruction(tmp_path):
    save_model(tmp_path / "x2.safetensors", make_model(NETWORK, "default", 1))
    source = load_model(str(tmp_path / "x2.safetensors")).state_dict()
    network = replace(NETWORK, scale=3)
    fresh = make_model(network, "default", 2).state_dict()
    model = make_model(network, "default", 2, str(tmp_path / "x2.safetensors"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if key.startswith("reconstruction.") else source)[key]), key


def test_start_from_another_architecture_is_refused(tmp_path):
    save_model(tmp_path / "x2.safetensors", make_model(NETWORK, "default", 1))
    with pytest.raises(UserError, match=r"x2\.safetensors .*without its reconstruction.* does not fit"):
        make_model(replace(NETWORK, variant="sir", scale=3), "default", 2, str(tmp_path / "x2.safetensors"))


def test_the_seed_makes_the_weights():
    one, same, other = (make_model(NETWORK, "default", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv_first.weight"], other["conv_first.weight"])


def test_the_published_schedule_and_optimiser():
    factor = make_schedule(TrainConfig())
    steps = (0, 249_999, 250_000, 400_000, 450_000, 475_000, 499_999)
    assert [factor(step) for step in steps] == [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
    optimizer = make_optimizer(TrainConfig())(torch.nn.Linear(1, 1))
    assert type(optimizer) is torch.optim.Adam
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "weight_decay")} == {
        "lr": 5e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 0,
    }


# ---------------------------------------------------------------- learning


def test_training_lowers_the_loss_and_beats_its_start(pictures, tmp_path):
    settings = replace(
        SETTINGS, iterations=60, batch_size=4, patch=12, learning_rate=1e-3, init="bicubic", evaluate_every=30
    )
    result = train(pictures, tmp_path / "run", NETWORK, settings, validation=pictures, device="cpu")
    assert result.finished and result.steps == 60
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    assert result.metrics["eval/psnr_y"] > Validation(pictures, None, 2).bicubic_psnr() + 0.3


def test_training_from_the_published_start_lowers_the_loss(pictures, tmp_path):
    settings = replace(SETTINGS, iterations=40, schedule="multistep", learning_rate=2e-3, ema_decay=0.0, clip_norm=0.0)
    train(pictures, tmp_path / "run", NETWORK, settings, device="cpu")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_validation_scores_are_those_of_evaluate(pictures):
    path = str(PARITY / "tiny_srf_x2.state.safetensors")
    found = Validation(pictures, None, 2)(load_model(path), 0)
    upscaler = Upscaler.from_pretrained(path, device="cpu")
    expected = evaluate_pairs(lambda low: upscaler.upscale(low).image, pictures, scale=2).mean
    assert found["psnr_y"] == pytest.approx(expected.psnr_y, abs=0.01)
    assert found["ssim_y"] == pytest.approx(expected.ssim_y, abs=1e-3)


def test_the_bicubic_baseline_is_that_of_evaluate(pictures):
    expected = evaluate_pairs(lambda low: imresize_matlab(low, Fraction(2)), pictures, scale=2).mean
    assert Validation(pictures, None, 2).bicubic_psnr() == pytest.approx(expected.psnr_y, abs=1e-9)


# ---------------------------------------------------------------- the verb


def test_train_writes_a_network_that_the_other_verbs_take(run, pictures, recipe, tmp_path):
    command = ("train", pictures, "-o", tmp_path / "run", "--recipe", recipe, "--validation", pictures)
    status, out, _ = run(*command, "--json")
    assert status == 0
    returned = json.loads(out)
    jsonschema.validate(returned, json.loads(SCHEMA.read_text()))
    assert returned["finished"] is True and returned["steps"] == 12
    assert returned["metrics"]["eval/psnr_y"] > 5

    network = tmp_path / "run" / "hit-srf-x2.safetensors"
    status, out, _ = run("inspect", network, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["architecture"], found["scale"], found["windows"]) == ("HiT-SRF", 2, [[4, 4], [8, 8]])
    # What is written is the average of the weights, as it was scored.
    scores = Validation(pictures, None, 2)(load_model(str(network)), 12)
    assert scores["psnr_y"] == pytest.approx(returned["metrics"]["eval/psnr_y"], abs=1e-6)


def test_options_replace_single_settings_of_a_recipe(run, pictures, tmp_path):
    command = ("train", pictures, "-o", tmp_path / "run", "--recipe", "tenfold-x2", "--iterations", 1)
    status, *_ = run(*command, "--variant", "sir", "--scale", 3, "--patch", 8, "--batch-size", 1, "--seed", 5)
    assert status == 0
    model = load_model(str(tmp_path / "run" / "hit-sir-x3.safetensors"))
    assert (model.config.width, model.config.scale, model.config.variant) == (40, 3, "sir")


KILLED = """
import os, signal, sys
from tenfold import cli
from tenfold.superres.data import PatchPairs

whole = PatchPairs.sample
def sample(self, index):
    if index == {fatal}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, index)
PatchPairs.sample = sample
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kill_9_and_the_same_command_again_give_the_same_file(run, pictures, recipe, tmp_path):
    def command(name):
        return ("train", pictures, "-o", tmp_path / name, "--recipe", recipe, "--device", "cpu")

    assert run(*command("whole"))[0] == 0

    program = KILLED.format(fatal=2 * 8 + 1)  # in the ninth of 12 steps, two after a checkpoint
    arguments = [sys.executable, "-c", program, "superres", *map(str, command("killed"))]
    killed = subprocess.run(arguments, env={**os.environ}, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir())[-1] == "step-00000006"
    assert not (tmp_path / "killed/hit-srf-x2.safetensors").exists()

    status, out, err = run(*command("killed"))
    assert status == 0 and "at step 6 of 12" in out + err
    for name in ("hit-srf-x2.safetensors", "model.safetensors", "checkpoints/step-00000012/raw.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_run_is_left_as_it_is(run, pictures, recipe, tmp_path):
    command = ("train", pictures, "-o", tmp_path / "run", "--recipe", recipe)
    assert run(*command)[0] == 0
    before = (tmp_path / "run/hit-srf-x2.safetensors").read_bytes()
    (tmp_path / "run/hit-srf-x2.safetensors").unlink()
    status, out, err = run(*command)
    assert status == 0 and "at step 12 of 12" in out + err
    assert (tmp_path / "run/hit-srf-x2.safetensors").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused(run, pictures, recipe, tmp_path):
    command = ("train", pictures, "-o", tmp_path / "run", "--recipe", recipe)
    assert run(*command)[0] == 0
    before = (tmp_path / "run/hit-srf-x2.safetensors").read_bytes()
    status, _, err = run(*command, "--learning-rate", "0.01")
    assert status == 2 and len(err.splitlines()) == 1
    assert "recipe.train.learning_rate is 0.002 there and 0.01 here" in err
    assert (tmp_path / "run/hit-srf-x2.safetensors").read_bytes() == before


def test_bicubic_start_and_start_from_exclude_each_other(run, pictures, recipe, tmp_path):
    save_model(tmp_path / "x2.safetensors", make_model(NETWORK, "default", 1))
    command = ("train", pictures, "-o", tmp_path / "run", "--recipe", recipe, "--scale", 3)
    start = ("--start-from", tmp_path / "x2.safetensors")
    status, _, err = run(*command, *start, "--init", "bicubic")
    assert status == 2 and len(err.splitlines()) == 1 and "not both" in err
    assert run(*command, *start)[0] == 0
    assert load_file(tmp_path / "run/hit-srf-x3.safetensors")["upsample.0.weight"].shape == (27, 28, 3, 3)


def one_line(run, *arguments) -> str:
    status, _, err = run(*arguments)
    assert status == 2, err
    (line,) = err.splitlines()
    return line


def test_an_unknown_recipe_gets_the_nearest_names(run, pictures, tmp_path):
    line = one_line(run, "train", pictures, "-o", tmp_path / "run", "--recipe", "tenfold-x")
    assert "tenfold-x2" in line and "YAML" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {scale: 2}\ntrain: {iteration: 3}", "iterations"),
        ("model: {scale: two}\ntrain: {}", "scale"),
        ("model: {width: 30, heads: [4, 4, 4, 4]}\ntrain: {}", "width"),
        ("- a list", "recipe.yaml"),
        ("model: {scale: [", "recipe.yaml"),
    ],
)
def test_a_broken_yaml_recipe_is_named(run, pictures, tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_text(text)
    assert words in one_line(run, "train", pictures, "-o", tmp_path / "run", "--recipe", tmp_path / "recipe.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--patch", "0"), "patch"),
        (("--patch", "-4"), "patch"),
        (("--iterations", "0"), "steps must be at least 1"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
        (("--learning-rate", "nan"), "learning_rate"),
        (("--patch", "64"), "has 128 pixels a side"),
    ],
)
def test_settings_that_cannot_train_are_refused(run, pictures, recipe, tmp_path, options, words):
    assert words in one_line(run, "train", pictures, "-o", tmp_path / "run", "--recipe", recipe, *options)


def test_a_folder_without_images_is_refused(run, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, words in (("empty", "no images here"), ("nowhere", "no such folder")):
        line = one_line(run, "train", tmp_path / folder, "-o", tmp_path / "run", "--recipe", recipe)
        assert words in line
    assert run("train", "-o", tmp_path / "run", "--recipe", recipe)[0] == 2
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- embedded weights


@pytest.mark.parametrize(("scale", "gain"), [(2, 1.5), (4, 1.0)])
def test_embedded_weights_beat_bicubic_on_set5(data_root, scale, gain):
    set5 = Validation(data_root / "superres/Set5/HR", data_root / "superres/Set5/LR_bicubic", scale)
    assert len(set5.images) == 5
    model = load_model(f"tenfold-x{scale}")
    gains = []
    for images in set5.images:
        set5.images = [images]
        gains.append(set5(model, 0)["psnr_y"] - set5.bicubic_psnr())
    assert min(gains) > 0
    assert np.mean(gains) >= gain
