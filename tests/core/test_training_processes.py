"""Runs that are killed, signalled or spread over processes, each in processes of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_program import train_and_save
from training_program import BATCH, STEPS, launch, train


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert launch(run_dir) == [0]
    return run_dir


def same_files(left: Path, right: Path) -> None:
    for name in ("model.safetensors", f"checkpoints/step-{STEPS:08d}/raw.safetensors"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    optimizers = [
        torch.load(run / f"checkpoints/step-{STEPS:08d}/trainer.pt", weights_only=True)["optimizer"]["state"]
        for run in (left, right)
    ]
    for one, other in zip(*(optimizer.values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert curve(left) == curve(right)


@pytest.mark.parametrize("step", [2, 10, 17])
def test_kill_in_a_step_then_resume_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path, step: int) -> None:
    assert launch(tmp_path, fatal_index=step * BATCH + 3) == [-signal.SIGKILL]
    assert not (tmp_path / "model.safetensors").exists()
    assert launch(tmp_path) == [0]
    same_files(tmp_path, undisturbed)


@pytest.mark.parametrize("sync", [12, 19, 25])
def test_kill_while_a_checkpoint_is_written_then_resume_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path, sync: int
) -> None:
    assert launch(tmp_path, fatal_sync=sync) == [-signal.SIGKILL]
    assert list((tmp_path / "checkpoints").glob(".step-*.partial")), "the kill should have hit a half-written folder"
    assert launch(tmp_path) == [0]
    same_files(tmp_path, undisturbed)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_leaves_a_checkpoint_of_the_current_step_and_the_shell_status(
    undisturbed: Path, tmp_path: Path, number: int, status: int
) -> None:
    assert launch(tmp_path, signal_at=(8, int(number))) == [status]
    assert (tmp_path / "checkpoints" / "step-00000008").is_dir()
    (line,) = Path(f"{tmp_path}.error").read_text().splitlines()
    assert "after step 8 of 24" in line and "run the same command again" in line
    assert launch(tmp_path) == [0]
    same_files(tmp_path, undisturbed)


def test_two_gloo_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    options = {"noisy": False, "accumulate": 2, "ema_decay": None}
    train(tmp_path / "one", **options)
    assert launch(tmp_path / "two", 2, **options) == [0, 0]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == STEPS
    assert one[-1] < 0.7 * one[0], "the curve should fall, or equality would show little"
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)


def test_two_processes_resume_exactly_after_one_was_killed(tmp_path: Path) -> None:
    assert launch(tmp_path / "whole", 2) == [0, 0]
    # The second process dies; the first one then finds its partner gone, and torchrun would end it.
    codes = launch(tmp_path / "killed", 2, rank1={"fatal_index": 12 * BATCH + 6})
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert launch(tmp_path / "killed", 2) == [0, 0]
    same_files(tmp_path / "whole", tmp_path / "killed")


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    assert launch(tmp_path, 2, rank1={"signal_at": (6, int(signal.SIGTERM))}) == [143, 143]
    (newest,) = [path for path in (tmp_path / "checkpoints").iterdir() if path.name != "step-00000005"]
    assert newest.name in ("step-00000006", "step-00000007")


def test_shards_average_save_and_go_on_as_the_whole_model_does(tmp_path: Path) -> None:
    assert launch(tmp_path, 2, target=train_and_save) == [0, 0]
    end, resumed, whole = (tmp_path / f"step-0000000{number}" for number in (2, 3, 4))
    for name in ("model.safetensors", "raw.safetensors"):
        assert (resumed / name).read_bytes() == (end / name).read_bytes()
    for name in ("model.safetensors", "raw.safetensors"):
        expected, found = load_file(whole / name), load_file(end / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)
