"""Spikes by their definition, gradient statistics, looks at gains and activations, and the page that draws them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.llm import stability
from tenfold.llm.config import ModelConfig
from tenfold.llm.inspection import inspect
from tenfold.llm.model import Decoder, initialise


def noisy(steps: int, seed: int = 0, sigma: float = 0.02) -> list[float]:
    generator = random.Random(seed)
    return [2.0 + generator.gauss(0, sigma) for _ in range(steps)]


def test_a_spike_is_found_once_with_its_height_and_its_recovery() -> None:
    losses = noisy(200)
    losses[120:124] = [2.6, 3.1, 2.9, 2.5]
    (spike,) = stability.find_spikes(losses)
    assert (spike.step, spike.steps, spike.recovery) == (121, 4, 4)
    assert spike.height == pytest.approx(3.1 - 2.0, abs=0.02)


def test_neither_noise_nor_small_steps_nor_a_steady_fall_is_a_spike() -> None:
    assert stability.find_spikes(noisy(400)) == []
    small = noisy(200)
    small[100] += 0.15  # many sigma, but under 0.2 nat
    assert stability.find_spikes(small) == []
    wild = noisy(200, sigma=0.2)
    wild[100] = 2.0 + 0.9  # over 0.2 nat, but within 6 sigma of what is normal here
    assert stability.find_spikes(wild) == []
    assert stability.find_spikes([5.0 * 0.98**step for step in range(200)]) == []


def test_a_run_that_does_not_come_back_has_no_recovery() -> None:
    losses = [*noisy(100), *(value + 3 for value in noisy(20))]
    spikes = stability.find_spikes(losses)
    assert spikes[0].recovery is None
    (lost,) = stability.find_spikes([*noisy(60), math.nan, math.nan])
    assert math.isnan(lost.height) or lost.height == math.inf


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.5, 9.0), min_size=0, max_size=120))
def test_spikes_equal_the_definition_written_out(losses: list[float]) -> None:
    marked = []
    for t, loss in enumerate(losses):
        window = losses[max(0, t - 50) : t]
        if len(window) >= 16:
            middle = median(window)
            deviation = median([abs(value - middle) for value in window])
            if loss - middle > max(0.2, 6 * 1.4826 * deviation):
                marked.append(t + 1)
    found = stability.find_spikes(losses)
    assert [step for spike in found for step in range(spike.step, spike.step + spike.steps)] == marked


def test_gradient_statistics_leave_out_the_warm_up() -> None:
    norms = stability.gradient_norms([1000.0] * 20 + [1.0, 10.0, 1.0, 10.0, 1.0], warmup=20)
    assert norms is not None
    assert (norms.median, norms.largest, norms.largest_step, norms.ratio) == (1.0, 10.0, 22, 10.0)
    assert norms.spread == pytest.approx(math.sqrt(2 / 5 * 3 / 5))
    assert stability.gradient_norms([1.0] * 20, warmup=20) is None


def small_model(**changes: object) -> Decoder:
    settings: dict = {"vocabulary": 32, "width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "ffn": 24, "context": 16}
    model = Decoder(ModelConfig(**settings | changes))
    initialise(model, 0)
    return model


def test_gains_are_read_by_kind_and_layer() -> None:
    model = small_model()
    with torch.no_grad():
        model.layers[1].post_mlp_norm.weight.copy_(torch.arange(16.0))
    gains = stability.gains(model)
    assert set(gains) == set(stability.GAINS)
    assert gains["post_attention_norm"]["mean"] == pytest.approx([0.283 / math.sqrt(3)] * 3)
    assert gains["post_mlp_norm"]["mean"][1] == 7.5
    assert gains["post_mlp_norm"]["std"][1] == pytest.approx(math.sqrt((16**2 - 1) / 12))
    assert set(stability.gains(small_model(norm="pre"))) == {"pre_attention_norm", "pre_mlp_norm"}
    assert set(stability.gains(small_model(norm="post"))) == {"post_attention_norm", "post_mlp_norm"}


def test_a_look_measures_what_the_layers_really_pass_on_and_leaves_no_hook() -> None:
    model = small_model()
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    row = stability.look(model, tokens, 5)
    outputs = []
    handle = model.layers[1].register_forward_hook(lambda _m, _i, output: outputs.append(output.detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    seen = row["activations"]["output of the layer"]
    assert seen["std"][1] == pytest.approx(outputs[0].std(correction=0).item(), rel=1e-5)
    assert seen["top"][1] == pytest.approx(outputs[0].abs().max().item(), rel=1e-6)
    assert len(row["activations"]["input of down"]["mean"]) == 3
    assert not any(module._forward_hooks for module in model.modules())
    json.dumps(row)


def test_norms_whose_input_is_below_their_epsilon_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    tiny = small_model(post_norm_eps=1.0)
    assert len(stability.below_epsilon(tiny, stability.look(tiny, tokens, 0))) == 6
    normal = small_model(post_norm_eps=1e-12)
    assert stability.below_epsilon(normal, stability.look(normal, tokens, 0)) == []
    stability.report_start(tiny, tokens, tmp_path / "looks.jsonl")
    told = capsys.readouterr()
    assert "post-norm input mean square vs eps 1" in told.out
    assert "6 of 6 norms after sub-layers start with inputs below their epsilon 1" in told.err
    stability.report_start(tiny, tokens, tmp_path / "looks.jsonl")
    assert capsys.readouterr().out == "", "a run that goes on does not say it again"


def write_run(folder: Path, losses: list[float], refused: tuple[int, ...] = ()) -> None:
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            row: dict = {"step": step, "lr": 1e-3, "skipped": 0, "loss": loss, "grad_norm": 1.0}
            if step in refused:
                row |= {"loss": None, "refused_loss": loss, "refused_grad_norm": 1.0}
                del row["grad_norm"]
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": len(losses), "eval/bits_per_byte": 2.5}) + "\n")
        file.write('{"step": 9')  # what a kill can leave


def test_a_runs_log_holds_every_step_and_the_last_look_of_each(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [*noisy(60), 4.0, *noisy(20)], refused=(61,))
    for value in (1, 2):  # the second is written after a resume
        stability.append_row(
            tmp_path / "run" / stability.FILE, {"step": 10, "gains": {}, "activations": {}, "n": value}
        )
    log = stability.read_run(tmp_path / "run")
    assert len(log.losses) == 81 and log.losses[60] == 4.0 and log.refused == [61]
    assert log.validation == {81: {"bits_per_byte": 2.5}}
    assert [row["n"] for row in log.looks] == [2]
    summary = stability.summary(log)
    assert summary["spikes"] == 1 and summary["spike_list"][0].step == 61
    with pytest.raises(UserError, match="holds no run"):
        stability.read_run(tmp_path)


def test_the_page_of_a_run_draws_losses_norms_gains_and_activations(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [*noisy(60), 4.0, *noisy(20)])
    model, tokens = small_model(), torch.zeros(1, 8, dtype=torch.int64)
    for step in (0, 80):
        stability.append_row(tmp_path / "run" / stability.FILE, stability.look(model, tokens, step))
    found = inspect(str(tmp_path / "run"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert found["spikes"] == 1 and json.loads((tmp_path / "page.json").read_text())["spikes"] == 1
    assert page.count('<picture class="plot">') == 7
    for words in ("Loss by step: 81 steps, 1 spikes", "Gradient norm by step", "mean gain", "largest activation"):
        assert words in page
    assert "after feed-forward" in page and "At step 0" in page
