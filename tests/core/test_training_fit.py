"""The loop as a whole, in this process: against a loop written out, and with bad numbers, disks and settings."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_program import Teacher, adam, make_model, quiet_loss

from tenfold.core import checkpoint
from tenfold.core.console import UserError
from tenfold.core.training import FitConfig, FitResult, Interrupted, cosine, fit, multistep


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(
    run_dir: Path, dataset: Any = None, loss: Any = quiet_loss, optimizer: Any = adam, **options: Any
) -> FitResult:
    """`fit` on a tiny problem; options are those of `fit` where it has them, else of `FitConfig`."""
    of_fit = ("schedule", "evaluate", "recipe", "metadata", "samples", "should_stop", "resume", "device", "model")
    keywords = {"device": "cpu"} | {name: options.pop(name) for name in of_fit if name in options}
    settings = {"steps": 12, "batch_size": 8, "checkpoint_every": 4, "log_every": 1, "log_with": (), "threads": 1}
    model = keywords.pop("model", None) or make_model(dropout=0)
    return fit(model, dataset or Teacher(), loss, optimizer, FitConfig(**settings | options), run_dir, **keywords)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path).items())])


def written_out(
    steps: list[int], optimizer: Any, clip: float | None = None, factor: Any = lambda step: 1.0
) -> torch.Tensor:
    """The weights after a plain loop over the given steps."""
    model = make_model(dropout=0)
    updates = optimizer(model)
    base = updates.param_groups[0]["lr"]
    for step in steps:
        samples = [Teacher().sample(index) for index in range(step * 8, step * 8 + 8)]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "y")}
        updates.zero_grad()
        quiet_loss(model, batch)[0].backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        updates.param_groups[0]["lr"] = base * factor(step)
        updates.step()
    return torch.cat([tensor.flatten() for _, tensor in sorted(model.state_dict().items())])


# The algorithm


def test_the_loop_equals_a_loop_written_out(tmp_path: Path) -> None:
    schedule = cosine(12, warmup=2)
    result = train(tmp_path, schedule=schedule, clip_norm=0.5)
    assert torch.equal(weights(result.weights), written_out(list(range(12)), adam, 0.5, schedule))
    assert (result.steps, result.skipped, result.finished) == (12, 0, True)
    assert [row["lr"] for row in rows(tmp_path)] == [0.01 * schedule(step) for step in range(12)]
    assert min(row["grad_norm"] for row in rows(tmp_path)) > 0.5, "the bar for clipping should have been reached"


def test_batches_may_change_by_step_and_a_resumed_run_takes_the_same(tmp_path: Path) -> None:
    class Numbers(Teacher):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def batch(self, indices: Any) -> dict[str, torch.Tensor]:
            self.seen += indices
            samples = [self.sample(index) for index in indices]
            return {name: torch.stack([sample[name] for sample in samples]) for name in ("x", "y")}

    def growing(step: int) -> range:
        return range(4 * step, 4 * step + 4) if step < 6 else range(24 + 8 * (step - 6), 24 + 8 * (step - 5))

    def half(progress: Any) -> bool:
        return progress.step == 7

    whole, parted = Numbers(), Numbers()
    result = train(tmp_path / "whole", whole, samples=growing)
    assert whole.seen == list(range(24 + 48))
    train(tmp_path / "parted", parted, samples=growing, should_stop=half)
    again = train(tmp_path / "parted", parted, samples=growing)
    assert parted.seen == whole.seen
    assert torch.equal(weights(again.weights), weights(result.weights))


def test_the_header_of_weights_may_say_at_which_step_they_were_written(tmp_path: Path) -> None:
    train(tmp_path, metadata=lambda step: {"step": str(step)})
    for path, step in (("checkpoints/step-00000008/model.safetensors", "8"), ("model.safetensors", "12")):
        with safe_open(tmp_path / path, "pt") as file:
            assert file.metadata()["step"] == step


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    whole, parts = train(tmp_path / "1", optimizer=sgd), train(tmp_path / "4", optimizer=sgd, accumulate=4)
    torch.testing.assert_close(weights(parts.weights), weights(whole.weights), atol=1e-6, rtol=0)
    for one, four in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-5)


def test_kept_weights_are_the_average_and_training_goes_on_from_the_raw_ones(tmp_path: Path) -> None:
    plain, averaged = train(tmp_path / "plain", checkpoint_every=1, keep_checkpoints=12), None
    averaged = train(tmp_path / "averaged", ema_decay=0.8)
    history = [weights(tmp_path / f"plain/checkpoints/step-{step:08d}/model.safetensors") for step in range(1, 13)]
    start = make_model(0).state_dict()
    expected = torch.cat([tensor.flatten() for _, tensor in sorted(start.items())])
    for raw in history:
        expected = 0.8 * expected + 0.2 * raw
    torch.testing.assert_close(weights(averaged.weights), expected, atol=1e-6, rtol=0)
    folder = tmp_path / "averaged/checkpoints/step-00000012"
    assert torch.equal(weights(folder / "model.safetensors"), weights(averaged.weights))
    assert torch.equal(weights(folder / "raw.safetensors"), weights(plain.weights))


def test_rows_hold_means_since_the_last_row(tmp_path: Path) -> None:
    train(tmp_path / "each")
    train(tmp_path / "fifth", log_every=5)
    each, fifth = rows(tmp_path / "each"), rows(tmp_path / "fifth")
    assert [row["step"] for row in fifth] == [5, 10, 12]
    for row, span in zip(fifth, (each[:5], each[5:10], each[10:]), strict=True):
        for name in ("loss", "root", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([other[name] for other in span]))


def test_bfloat16_trains_close_to_float32_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = make_model(dropout=0)
    half, full = train(tmp_path / "half", precision="bf16", model=model), train(tmp_path / "full")
    distance = (weights(half.weights) - weights(full.weights)).abs().max()
    assert 0 < distance < 0.02
    assert model(torch.ones(1, 6)).dtype == torch.float32
    assert "forward" not in vars(model) or not hasattr(model.forward, "__wrapped__")


def test_compile_trains_through_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, compiled = torch.compile, []

    def compile_eagerly(module: nn.Module) -> Any:
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    result = train(tmp_path, compile=True, steps=3)
    assert len(compiled) == 1
    assert torch.equal(weights(result.weights), written_out([0, 1, 2], adam))


# Evaluation


def test_evaluation_sees_the_average_without_gradients_and_changes_nothing(tmp_path: Path) -> None:
    seen: dict[int, tuple] = {}

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        seen[step] = (torch.is_grad_enabled(), model.training, model[0].weight.clone())
        np.random.rand(), torch.rand(3)
        return {"step_root": step**0.5}

    silent = train(tmp_path / "silent", model=make_model(0.3), ema_decay=0.5)
    result = train(tmp_path / "loud", model=make_model(0.3), ema_decay=0.5, evaluate=evaluate, evaluate_every=5)
    assert list(seen) == [5, 10, 12]
    assert all(state[:2] == (False, False) for state in seen.values())
    assert torch.equal(seen[12][2], load_file(result.weights)["0.weight"])
    assert torch.equal(weights(result.weights), weights(silent.weights))
    assert result.metrics["eval/step_root"] == 12**0.5
    assert [row["step"] for row in rows(tmp_path / "loud") if "eval/step_root" in row] == [5, 10, 12]


@pytest.mark.parametrize(("mode", "best_step"), [("max", 4), ("min", 8)])
def test_the_best_weights_are_kept(tmp_path: Path, mode: str, best_step: int) -> None:
    scores = {4: 3.0, 8: 1.0, 12: 2.0}
    result = train(
        tmp_path, evaluate=lambda model, step: {"score": scores[step]}, evaluate_every=4, best_metric="score",
        best_mode=mode, keep_checkpoints=3, metadata={"config": "{}"},
    )  # fmt: skip
    assert (result.best, result.best_step) == (scores[best_step], best_step)
    assert result.best_weights is not None
    assert torch.equal(
        weights(result.best_weights), weights(tmp_path / f"checkpoints/step-{best_step:08d}/model.safetensors")
    )
    with safe_open(result.best_weights, "pt") as file:
        assert file.metadata() == {"config": "{}"}


def test_an_unknown_best_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'psnr' is not evaluated: choose one of ssim, lpips"):
        train(tmp_path, evaluate=lambda model, step: {"ssim": 1.0, "lpips": 0.0}, evaluate_every=2, best_metric="psnr")


# Stopping and going on


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_run_that_its_budget_ended_goes_on_exactly(tmp_path: Path, stop: int) -> None:
    options = {"ema_decay": 0.7, "clip_norm": 1.0, "log_every": 3, "model": None}
    whole = train(tmp_path / "whole", **options | {"model": make_model(0.2)})
    first = train(
        tmp_path / "cut", should_stop=lambda progress: progress.step == stop, **options | {"model": make_model(0.2)}
    )
    assert (first.steps, first.finished) == (stop, False)
    second = train(tmp_path / "cut", **options | {"model": make_model(0.2)})
    assert (second.steps, second.finished) == (12, True)
    assert torch.equal(weights(second.weights), weights(whole.weights))
    assert second.seconds > first.seconds


def test_a_budget_that_is_used_up_stays_used_up(tmp_path: Path) -> None:
    options = {"should_stop": lambda progress: progress.step >= 5, "evaluate": lambda model, step: {"a": 1.0}}
    train(tmp_path, **options)
    before = rows(tmp_path)
    assert train(tmp_path, **options).steps == 5
    assert rows(tmp_path) == before


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path, best_metric="a", evaluate=lambda model, step: {"a": 1.0})
    content = first.weights.read_bytes()

    class Empty:
        def sample(self, index: int) -> dict:
            raise AssertionError("no sample is needed")

    again = train(tmp_path, Empty(), best_metric="a", evaluate=lambda model, step: {"a": 2.0})
    assert again == first
    assert again.weights.read_bytes() == content


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(tmp_path: Path) -> None:
    train(tmp_path, checkpoint_every=5, keep_checkpoints=9)
    shutil.rmtree(tmp_path / "checkpoints/step-00000010")
    shutil.rmtree(tmp_path / "checkpoints/step-00000012")
    seen = []
    train(tmp_path, checkpoint_every=5, evaluate_every=5, evaluate=lambda model, step: seen.append(step) or {"a": 1.0})
    assert seen == [5, 10, 12]


def test_only_the_newest_checkpoints_stay_and_a_damaged_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = weights(train(tmp_path, checkpoint_every=3).weights)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]
    damaged = folder / "step-00000012" / "trainer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = train(tmp_path, checkpoint_every=3)
    assert torch.equal(weights(again.weights), whole)
    output = capsys.readouterr()
    assert "step-00000012 is damaged" in output.err and "at step 9 of 12" in output.out


def test_a_checkpoint_loads_as_a_model_and_without_running_code(tmp_path: Path) -> None:
    train(tmp_path, metadata={"config": '{"width": 12}'})
    folder = tmp_path / "checkpoints/step-00000012"
    loaded = checkpoint.load(folder)
    assert loaded.config == {"width": 12}
    model = make_model(0)
    checkpoint.load_into(model, loaded.tensors, loaded.origin)
    torch.load(folder / "trainer.pt", weights_only=True)


def test_a_model_that_the_checkpoint_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match="step-00000012") as caught:
        train(tmp_path, model=nn.Linear(6, 1))
    assert "\n" not in str(caught.value)


def test_tied_weights_stay_tied_through_a_resume(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 1))
        model[2].weight = model[0].weight
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * 0.1 * (number + 1))
        return model

    whole = train(tmp_path / "whole", model=tied(), ema_decay=0.5)
    train(tmp_path / "cut", model=tied(), ema_decay=0.5, should_stop=lambda progress: progress.step == 6)
    model = tied()
    cut = train(tmp_path / "cut", model=model, ema_decay=0.5)
    assert torch.equal(weights(cut.weights), weights(whole.weights))
    assert model[2].weight is model[0].weight


# Bad numbers


class Poisoned(Teacher):
    """Puts `value` into the targets of the samples of some steps."""

    def __init__(self, steps: set[int], value: float) -> None:
        super().__init__()
        self.steps, self.value = steps, value

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().sample(index)
        return sample | {"y": torch.full((1,), self.value)} if index // 8 in self.steps else sample


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_loss_that_is_not_finite_leaves_no_trace(tmp_path: Path, value: float) -> None:
    result = train(tmp_path, Poisoned({3, 7, 8}, value), optimizer=sgd, log_every=4)
    assert torch.equal(weights(result.weights), written_out([0, 1, 2, 4, 5, 6, 9, 10, 11], sgd))
    assert result.skipped == 3
    assert [row["skipped"] for row in rows(tmp_path)] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["root"]) for row in rows(tmp_path))


def test_a_finite_loss_with_an_infinite_gradient_is_skipped(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        value, _ = quiet_loss(model, batch)
        poisoned = bool((batch["y"] == 0).all())
        return (value + (model[0].weight * 0).sum().sqrt() if poisoned else value), {}

    result = train(tmp_path, Poisoned({5}, 0.0), loss, sgd)
    assert torch.equal(weights(result.weights), written_out([step for step in range(12) if step != 5], sgd))
    assert result.skipped == 1


def test_a_loss_spike_is_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, Poisoned({20}, 1e3), optimizer=sgd, steps=22)
    assert torch.equal(weights(result.weights), written_out([step for step in range(22) if step != 20], sgd))
    assert "step 21 is skipped: the loss" in capsys.readouterr().err
    careless = train(tmp_path / "careless", Poisoned({20}, 1e3), optimizer=sgd, steps=22, loss_spike_factor=None)
    assert careless.skipped == 0


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_a_rollback_takes_back_all_since_the_checkpoint_and_goes_on_with_the_next_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: Any
) -> None:
    result = train(tmp_path, Poisoned({9}, math.nan), optimizer=optimizer, on_spike="rollback")
    assert torch.equal(weights(result.weights), written_out([*range(8), 10, 11], optimizer))
    assert (result.steps, result.skipped) == (12, 2)
    assert "step 10 is rolled back to the checkpoint of step 8, and 2 batches are left out" in capsys.readouterr().err


def test_a_rollback_before_the_first_checkpoint_is_a_skip(tmp_path: Path) -> None:
    result = train(tmp_path, Poisoned({2}, math.nan), optimizer=sgd, on_spike="rollback")
    assert torch.equal(weights(result.weights), written_out([0, 1, *range(3, 12)], sgd))
    assert result.skipped == 1


def test_rollbacks_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 steps in a row had to be skipped"):
        train(tmp_path, Poisoned(set(range(6, 40)), math.nan), steps=40, max_skips=3, on_spike="rollback")


def test_too_many_bad_steps_end_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path, Poisoned(set(range(6, 40)), math.nan), steps=40, max_skips=5, checkpoint_every=2)
    message = str(caught.value)
    assert "6 steps in a row" in message and "step 12" in message and "\n" not in message
    # Steps 7 and 8 were skipped: the checkpoint of step 8 must not push out an older good one.
    good = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert good == ["step-00000004", "step-00000006"]
    assert good[-1] in message
    assert torch.equal(
        weights(tmp_path / "checkpoints" / good[-1] / "model.safetensors"), written_out(list(range(6)), adam)
    )


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def broken(step: int) -> float:
        return math.nan if step == 7 else 1.0

    with pytest.raises(UserError, match=r"weights 0.weight are no longer finite at step 8; .*step-00000006"):
        train(tmp_path, schedule=broken, checkpoint_every=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


# Bad disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a file system of 256 KiB; without the right to mount one, files that refuse to grow."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        real = os.fsync

        def fsync(handle: int) -> None:
            if sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > 256 * 1024:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("parameters", [5_000, 12_000])
def test_a_full_disk_costs_one_line_and_no_checkpoint(small_disk: Path, parameters: int) -> None:
    """Some checkpoints (weights and two moments) fit and the next does not, in its optimiser or in its weights."""
    run_dir = small_disk / "run"

    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, parameters // 8), nn.Tanh(), nn.Linear(parameters // 8, 1))

    with pytest.raises(UserError) as caught:
        train(run_dir, model=wide(), keep_checkpoints=9, checkpoint_every=1)
    message = str(caught.value)
    assert (
        message.startswith("cannot write") and message.endswith("no space is left on the disk") and "\n" not in message
    )
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left and left == [f"step-{step:08d}" for step in range(1, len(left) + 1)]
    whole = train(small_disk.parent / "whole", model=wide(), checkpoint_every=1, keep_checkpoints=12)
    for name in left:
        for file in ("model.safetensors", "trainer.pt"):
            kept = (run_dir / "checkpoints" / name / file).read_bytes()
            assert kept == (whole.run_dir / "checkpoints" / name / file).read_bytes()


def test_a_read_only_folder_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* a part of the path is a file"):
        train(tmp_path / "file" / "run")


# Bad settings


def test_a_resume_with_another_configuration_names_the_field_and_loses_nothing(tmp_path: Path) -> None:
    first = train(tmp_path, recipe={"lr": 0.01})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"recipe.lr is 0.01 there and 0.02 here"):
        train(tmp_path, recipe={"lr": 0.02})
    with pytest.raises(UserError, match="already holds a run"):
        train(tmp_path, recipe={"lr": 0.01}, resume=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert first.finished


def test_a_signal_during_the_last_evaluation_is_not_swallowed(tmp_path: Path) -> None:
    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {"a": 1.0}

    with pytest.raises(Interrupted) as caught:
        train(tmp_path, evaluate=evaluate)
    assert caught.value.exit_status == 143
    assert train(tmp_path, evaluate=lambda model, step: {"a": 2.0}).metrics["eval/a"] == 1.0


def test_settings_that_this_machine_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        train(tmp_path, precision="fp16")
    with pytest.raises(UserError, match="no_such_tracker, which is not installed"):
        train(tmp_path, log_with=("no_such_tracker",))
    with pytest.raises(UserError, match="batch_size 8 cannot be shared"):
        train(tmp_path, accumulate=3)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_rows_and_a_resume_replaces_those_that_were_lost(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, log_with=("tensorboard",), schedule=multistep([6]), steps=12)
    shutil.rmtree(tmp_path / "checkpoints/step-00000012")
    train(tmp_path, log_with=("tensorboard",), schedule=multistep([6]), steps=12)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "tenfold"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == {row["step"]: pytest.approx(row["loss"], rel=1e-6) for row in rows(tmp_path)}
    assert len(events.Scalars("lr")) == 12
