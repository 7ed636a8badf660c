"""The parts of the training loop: schedules, sample stream, guard, average, metrics, record, checkpoint folders."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold.core.console import UserError
from tenfold.core.training import FitConfig, Shuffled, constant, cosine, multistep, record
from tenfold.core.training.data import micro_batches, stream
from tenfold.core.training.ema import Ema
from tenfold.core.training.guard import ENOUGH, WINDOW, Guard, spike_bar
from tenfold.core.training.interrupt import InterruptCatcher
from tenfold.core.training.metrics import Averages, MetricsFile, merge
from tenfold.core.training.randomness import seed_step
from tenfold.core.training.snapshot import atomic_folder


def test_importing_the_package_and_its_configuration_loads_no_torch() -> None:
    code = "import sys, tenfold.core.training as t; t.FitConfig(1, 1), t.cosine(3); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Schedules


def test_multistep_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7, 8], gamma=0.5)
    ours = multistep([8, 3, 7], gamma=0.5)
    for step in range(12):
        assert ours(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_cosine_rises_linearly_then_falls_to_its_floor() -> None:
    factor = cosine(steps=110, warmup=10, floor=0.1)
    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.55)
    assert factor(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(110) == factor(500) == pytest.approx(0.1)


def test_constant_is_one_after_its_warm_up() -> None:
    assert [constant()(step) for step in (0, 1000)] == [1.0, 1.0]
    assert [constant(warmup=4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


# The sample stream


@settings(deadline=None, max_examples=60)
@given(
    step=st.integers(0, 10**9),
    size=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    processes=st.integers(1, 5),
)
def test_processes_and_micro_batches_share_out_the_samples_of_a_step(
    step: int, size: int, accumulate: int, processes: int
) -> None:
    batch_size = size * accumulate * processes
    taken = [
        index
        for rank in range(processes)
        for part in micro_batches(step, batch_size, accumulate, rank, processes)
        for index in part
    ]
    assert taken == list(range(step * batch_size, (step + 1) * batch_size))


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 10 .* multiple of 4"):
        micro_batches(0, 10, 2, 0, 2)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 50), seed=st.integers(0, 100))
def test_every_pass_of_a_shuffled_order_sees_each_item_once(size: int, seed: int) -> None:
    order = Shuffled(size, seed)
    for epoch in range(3):
        assert sorted(order(epoch * size + i) for i in range(size)) == list(range(size))


def test_shuffled_orders_differ_between_passes_and_seeds_and_are_reproducible() -> None:
    passes = [[Shuffled(100, seed)(i) for i in range(200)] for seed in (0, 0, 1)]
    assert passes[0] == passes[1] != passes[2]
    assert passes[0][:100] != passes[0][100:]


class Squares:
    def sample(self, index: int) -> dict[str, object]:
        if index == 90:
            raise UserError("sample 90 is missing")
        return {"x": torch.full((2,), index**2), "name": f"sample {index}"}


class Ragged:
    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [torch.arange(index % 5) for index in indices]


def test_workers_give_the_same_batches_in_the_same_order() -> None:
    def collect(workers: int) -> list:
        return list(stream(Squares(), range(3, 7), 8, 2, 1, 2, workers, pin_memory=False))

    alone, shared = collect(0), collect(2)
    assert [len(parts) for parts in alone] == [2] * 4
    assert alone[0][0]["x"][:, 0].tolist() == [28**2, 29**2]
    for left, right in zip(chain(*alone), chain(*shared), strict=True):
        assert torch.equal(left["x"], right["x"]) and left["name"] == right["name"]


def test_a_dataset_may_build_its_batches_itself() -> None:
    ((batch,),) = stream(Ragged(), range(1), 4, 1, 0, 1, 0, pin_memory=False)
    assert [len(points) for points in batch] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_dataset_stays_one_line(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(stream(Squares(), range(80, 100), 1, 1, 0, 1, workers, pin_memory=False))
    assert str(caught.value) == "sample 90 is missing"
    assert multiprocessing.active_children() == [], "a worker that stays would keep the program from ending"


def test_starting_workers_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(stream(Squares(), range(1), 1, 1, 0, 1, 1, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_of_a_step_depend_on_seed_step_and_process_only() -> None:
    import random

    def draw(*key: int) -> tuple:
        seed_step(*key, torch.device("cpu"))
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = draw(0, 5, 0)
    random.random(), np.random.rand(3), torch.rand(7)
    assert draw(0, 5, 0) == first
    for other in (draw(1, 5, 0), draw(0, 6, 0), draw(0, 5, 1)):
        assert not set(other) & set(first)


# Guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_not_finite_are_never_accepted(loss: float, norm: float) -> None:
    guard = Guard(None, None)
    assert guard.judge(loss, norm)
    assert guard.consecutive == 1
    assert guard.judge(1.0, 1.0) is None
    assert guard.consecutive == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=150), st.floats(1.5, 20))
def test_a_spike_is_what_exceeds_the_factor_times_the_median_of_accepted_losses(
    losses: list[float], factor: float
) -> None:
    guard, accepted = Guard(factor, None), []
    for loss in losses:
        spike = len(accepted) >= ENOUGH and loss > factor * median(accepted[-WINDOW:])
        assert bool(guard.judge(loss, 1.0)) == spike
        if not spike:
            accepted.append(loss)


def test_gradient_norms_are_judged_only_when_asked() -> None:
    silent, alert = Guard(None, None), Guard(None, 5.0)
    for _ in range(ENOUGH):
        assert silent.judge(1.0, 1.0) is alert.judge(1.0, 1.0) is None
    assert silent.judge(1.0, 6.0) is None
    assert "gradient norm 6 is above 5 x" in (alert.judge(1.0, 6.0) or "")


def test_a_spike_stands_above_the_last_fifty_losses_by_its_height_and_by_six_robust_deviations() -> None:
    assert spike_bar([1.0] * (ENOUGH - 1)) is None
    assert spike_bar([9.0] * 30 + [1.0] * 50) == pytest.approx(1.2)
    noisy = [1.0, 1.2, 0.8] * 20  # a third of the last 50 lies on the median, the others 0.2 from it
    assert spike_bar(noisy) == pytest.approx(1.0 + 6 * 1.4826 * 0.2)
    assert spike_bar(noisy, height=3.0) == pytest.approx(4.0)


def test_a_guard_with_a_height_refuses_what_a_factor_would_not_see() -> None:
    guard = Guard(None, None, loss_height=0.2)
    for _ in range(ENOUGH):
        assert guard.judge(-1.0, 1.0) is None
    assert guard.judge(-0.81, 1.0) is None
    assert "the loss -0.7 is a spike" in (guard.judge(-0.7, 1.0) or "")
    assert guard.judge(-1.0, 1.0) is None


def test_losses_around_zero_have_no_spikes() -> None:
    guard = Guard(2.0, None)
    assert not any(guard.judge(loss, 1.0) for loss in [-1.0] * 30 + [50.0])


def test_a_guard_goes_on_from_its_state_through_json() -> None:
    guard, copy = Guard(3.0, 3.0), Guard(3.0, 3.0)
    for value in np.random.default_rng(0).uniform(0.1, 2, 100):
        guard.judge(float(value), float(value) / 3)
    copy.restore(json.loads(json.dumps(guard.state())))
    for value in np.random.default_rng(1).uniform(0.1, 6, 100):
        assert guard.judge(float(value), 0.1) == copy.judge(float(value), 0.1)


# Average of the weights


def test_average_equals_the_sum_written_out() -> None:
    torch.manual_seed(0)
    model, decay = nn.Linear(3, 2).double(), 0.9
    model.bias.requires_grad_(False)
    ema, history = Ema(model, decay), [model.weight.detach().clone()]
    for _ in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update()
        history.append(model.weight.detach().clone())
    weights = [decay**20] + [(1 - decay) * decay ** (20 - i) for i in range(1, 21)]
    expected = sum(weight * value for weight, value in zip(weights, history, strict=True))
    with ema.in_place():
        torch.testing.assert_close(model.weight.detach(), expected, atol=1e-12, rtol=0)
    assert torch.equal(model.weight.detach(), history[-1])


def test_weights_come_back_when_an_evaluation_fails_on_the_average() -> None:
    model = nn.Linear(3, 2)
    ema, before = Ema(model, 0.5), model.weight.detach().clone()
    ema.averages[0].add_(1)
    with pytest.raises(ZeroDivisionError), ema.in_place():
        assert torch.equal(model.weight.detach(), before + 1)
        raise ZeroDivisionError
    assert torch.equal(model.weight.detach(), before)


# Metrics


def test_means_over_processes_weigh_every_report_equally() -> None:
    first, second = Averages(), Averages()
    for value in (1.0, 2.0, 3.0):
        first.add({"loss": torch.tensor(value), "own": value})
    second.add({"loss": 10.0})
    assert merge([first.state(), second.state()]) == {"loss": 4.0, "own": 2.0}


def test_rows_beyond_the_resumed_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 2, "lo')
    metrics = MetricsFile(path, step=2)
    assert metrics.last == {"step": 2, "loss": 2.0}
    metrics.write({"step": 3, "loss": math.nan})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None},
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_stops_the_metrics_with_one_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, step=0)
    metrics.file.close()
    with Path("/dev/full").open("a") as metrics.file:
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: no space is left on the disk"):
            metrics.write({"step": 1})
        metrics.close()


# Interrupts


def test_a_second_ctrl_c_stops_at_once_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), InterruptCatcher() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def enter() -> None:
        with InterruptCatcher():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


# Record of the configuration


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The folder of a run that has left a checkpoint."""
    record.check(tmp_path, FitConfig(10, 4), {"lr": 1e-3, "model": {"width": 60}}, True)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    return tmp_path


def test_a_changed_field_is_named_with_both_values(started: Path) -> None:
    before = (started / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        record.check(started, FitConfig(10, 8, seed=1), {"lr": 1e-3, "model": {"width": 64}}, True)
    for part in ("fit.batch_size is 4 there and 8 here", "fit.seed is 0", "recipe.model.width is 60 there and 64 here"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and "lr" not in str(caught.value)
    assert (started / "config.yaml").read_bytes() == before


def test_fields_that_leave_the_weights_alone_may_change(started: Path) -> None:
    recipe = {"lr": 1e-3, "model": {"width": 60}}
    record.check(started, FitConfig(10, 4, workers=2, log_every=3, checkpoint_every=7, log_with=()), recipe, True)
    assert "workers: 2" in (started / "config.yaml").read_text()


def test_a_folder_with_a_run_is_refused_when_not_resuming(started: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        record.check(started, FitConfig(10, 4), {"lr": 1e-3, "model": {"width": 60}}, False)


def test_a_run_from_before_a_field_existed_goes_on_with_the_fields_default(started: Path) -> None:
    path, recipe = started / "config.yaml", {"lr": 1e-3, "model": {"width": 60}}
    before = path.read_text()
    path.write_text(before.replace("  on_spike: skip\n", ""))
    assert path.read_text() != before
    record.check(started, FitConfig(10, 4), recipe, True)
    path.write_text(before.replace("  on_spike: skip\n", ""))
    with pytest.raises(UserError, match="on_spike is skip there and rollback here"):
        record.check(started, FitConfig(10, 4, on_spike="rollback"), recipe, True)


def test_a_run_that_left_no_checkpoint_may_start_anew_with_another_configuration(tmp_path: Path) -> None:
    record.check(tmp_path, FitConfig(10, 4), None, True)
    record.check(tmp_path, FitConfig(10, 2), None, False)
    assert "batch_size: 2" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulate", "log_every"])
def test_counts_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=f"{field} must be at least 1, not 0"):
        FitConfig(**{"steps": 1, "batch_size": 1, field: 0})


# Checkpoint folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
