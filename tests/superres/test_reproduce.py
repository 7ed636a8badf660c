"""The reproduction of the paper's claims, on maps and pictures so small that it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from tenfold import cli as front_door
from tenfold.core.console import UserError
from tenfold.superres import reproduce as experiment
from tenfold.superres.cost import CostRow, WindowAttentionLayer, cost_sweep
from tenfold.superres.evaluation import evaluate_pairs
from tenfold.superres.reproduce import ARMS, Curve, QualityConfig, cost_table, quality_tables, reproduce
from tenfold.superres.resize import imresize_matlab

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "reproduce.json"
SMALL = QualityConfig(minutes=0.01, seeds=(0, 1), width=28, blocks=1, heads=2, patch=16, batch_size=1, evaluate_every=4)


def small_sweep() -> list[CostRow]:
    return cost_sweep(windows=(4, 8), attention_windows=(4,), side=16, width=20, heads=2, repeats=1)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    """Folders of training and evaluation pictures: coarse noise, which interpolation cannot restore."""
    random = np.random.default_rng(0)
    for name, side in (("train", 48), ("Held-Out", 32)):
        (tmp_path / name).mkdir()
        pixels = random.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    return tmp_path / "train", tmp_path / "Held-Out"


# ---------------------------------------------------------------- cost


def test_the_cost_sweep_times_both_operators():
    before = torch.get_num_threads()
    rows = small_sweep()
    assert [row.window for row in rows] == [4, 8]
    assert all(row.correlation_s > 0 for row in rows)
    assert rows[0].attention_s > 0 and rows[1].attention_s is None
    assert torch.get_num_threads() == before


def test_the_cost_table_shows_ratios_and_gaps():
    table = cost_table([CostRow(4, 0.5, 1.0), CostRow(64, 0.5, None)])
    assert list(table.rows) == [["4 x 4", 0.5, 1.0, "2.0x"], ["64 x 64", 0.5, None, None]]


@torch.no_grad()
def test_the_attention_that_is_timed_looks_inside_its_window_only():
    torch.manual_seed(0)
    layer, x = WindowAttentionLayer(20, 2, 8), torch.randn(1, 16, 16, 20)
    y = x.clone()
    y[0, 3, 12] += torch.randn(20)
    changed = (layer(x) - layer(y)).abs().amax(-1)[0]
    assert (changed[:8, 8:] > 0).all()
    changed[:8, 8:] = 0
    assert changed.max() < 1e-5


# ---------------------------------------------------------------- curves


CURVE = Curve("arm", 0, 10, [0, 10, 30], [0.0, 2.0, 10.0], {"Set5": [30.0, 31.0, 33.0]})


@pytest.mark.parametrize(
    ("axis", "limit", "score"),
    [
        ("steps", 0, 30.0),
        ("steps", 5, 30.5),
        ("steps", 10, 31.0),
        ("steps", 20, 32.0),
        ("steps", 30, 33.0),
        ("cpu_seconds", 4.0, 31.5),
        ("cpu_seconds", 99.0, 33.0),
    ],
)
def test_a_curve_is_read_between_its_points(axis, limit, score):
    assert CURVE.at(axis, limit, "Set5") == pytest.approx(score)


def test_quality_tables_compare_where_all_runs_have_been():
    slow = Curve("slow", 0, 20, [0, 5, 10], [0.0, 10.0, 20.0], {"Set5": [30.0, 31.0, 32.0]})
    by_steps, by_time = quality_tables([CURVE, slow])
    # At 10 steps: 31 and 32 dB. At 10 seconds: 33 and 31 dB.
    assert [row[0] for row in by_steps.rows] == ["arm", "slow"]
    assert [row[3] for row in by_steps.rows] == ["+1.00 (1.00)", "+2.00 (2.00)"]
    assert [row[3] for row in by_time.rows] == ["+3.00 (3.00)", "+1.00 (1.00)"]
    assert "after 10 steps" in by_steps.caption


def test_quality_tables_report_every_seed():
    other = Curve("arm", 1, 10, [0, 10, 30], [0.0, 2.0, 10.0], {"Set5": [30.0, 31.0, 35.0]})
    assert quality_tables([CURVE, other])[0].rows[0][3] == "+4.00 ± 1.41 (3.00, 5.00)"


def test_a_loss_has_one_sign():
    worse = Curve("arm", 0, 10, [0, 10], [0.0, 2.0], {"Set5": [30.0, 29.5]})
    assert quality_tables([worse])[0].rows[0][3] == "-0.50 (-0.50)"


def test_arms_have_the_same_width_and_depth_and_start_at_bicubic(pictures):
    config = QualityConfig()
    low = torch.rand(1, 3, 64, 64)
    parameters = {}
    for name, make in ARMS.items():
        model = make(config, 0).eval()
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            output = model(low)[0].permute(1, 2, 0).double().numpy()
        expected = imresize_matlab(low[0].permute(1, 2, 0).double().numpy(), 2)
        np.testing.assert_allclose(output[4:-4, 4:-4], expected[4:-4, 4:-4], atol=1e-5)
    assert max(parameters.values()) < 1.3 * min(parameters.values()), parameters


# ---------------------------------------------------------------- the whole


def test_a_small_run_writes_tables_plots_and_curves_and_can_go_on(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "cost_sweep", small_sweep)
    images, evaluation = pictures
    output = tmp_path / "results" / "superres.json"

    def run():
        sets = {"Held-Out": (evaluation, None)}
        return reproduce(output, ("cost", "quality"), SMALL, [images], sets, tmp_path / "runs")

    result = run()
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["tables"] == json.loads(json.dumps(result["tables"]))
    names = [table["name"] for table in written["tables"]]
    assert names == ["cost", "quality_at_equal_steps", "quality_at_equal_cpu_seconds"]
    assert [row[0] for row in written["tables"][1]["rows"]] == list(ARMS)
    assert result["seeds"] == [0, 1] and result["room"] == "superres" and result["kind"] == "reproduce"
    for arm in ARMS:
        assert arm in printed
    for name in ("superres_cost.svg", "superres_quality_held-out.svg"):
        assert "<svg" in (output.parent / name).read_text()

    curves = written["curves"]
    assert [(curve["arm"], curve["seed"]) for curve in curves] == [(arm, seed) for seed in (0, 1) for arm in ARMS]
    bicubic = evaluate_pairs(lambda low: imresize_matlab(low, 2), evaluation, scale=2).mean.psnr_y
    for curve in curves:
        assert len(curve["steps"]) == len(curve["cpu_seconds"]) == len(curve["psnr_y"]["Held-Out"]) >= 2
        assert curve["cpu_seconds"][-1] >= 60 * SMALL.minutes
        assert curve["psnr_y"]["Held-Out"][0] == pytest.approx(bicubic)
        assert np.isfinite(curve["psnr_y"]["Held-Out"]).all()

    run()  # the runs are there: nothing is trained again
    assert json.loads(output.read_text())["curves"] == curves


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `tenfold superres reproduce ...` without TENFOLD_DATA: exit status, standard output, standard error."""
    monkeypatch.delenv("TENFOLD_DATA", raising=False)

    def call(*arguments):
        status = front_door.main(["superres", "reproduce", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_cost_part_needs_no_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "cost_sweep", small_sweep)
    status, out, _ = run("--part", "cost", "-o", tmp_path / "cost.json", "--json")
    assert status == 0
    jsonschema.validate(json.loads(out), json.loads(SCHEMA.read_text()))
    assert json.loads(out)["tables"][0]["name"] == "cost"
    assert (tmp_path / "cost.json").exists() and (tmp_path / "superres_cost.svg").exists()


def test_missing_images_are_said_at_once(run, pictures, tmp_path):
    images, evaluation = pictures
    options = ("-o", tmp_path / "out.json", "--runs", tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for given, words in (
        (("--part", "quality"), "set TENFOLD_DATA"),
        (("--part", "all", "--images", images), "set TENFOLD_DATA"),
        (("--part", "quality", "--images", tmp_path / "nowhere", "--evaluation", evaluation), "no such folder"),
        (("--part", "quality", "--images", images, "--evaluation", tmp_path / "empty"), "no images here"),
    ):
        status, _, err = run(*given, *options)
        assert status == 2 and words in err and "Traceback" not in err, (given, err)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("quality", "words"),
    [(QualityConfig(seeds=()), "seed"), (QualityConfig(seeds=(-1,)), "seed"), (QualityConfig(minutes=0), "time")],
)
def test_a_run_without_seeds_or_time_is_refused(pictures, tmp_path, quality, words):
    images, evaluation = pictures
    with pytest.raises(UserError, match=words):
        reproduce(
            tmp_path / "out.json", ("quality",), quality, [images], {"Set": (evaluation, None)}, tmp_path / "runs"
        )


def test_what_is_missing_is_said_before_the_first_arm_is_trained(pictures, tmp_path, monkeypatch):
    images, evaluation = pictures
    monkeypatch.setattr(experiment, "run_arm", lambda *arguments: pytest.fail("an arm was trained"))
    monkeypatch.setattr(experiment, "cost_sweep", lambda: pytest.fail("layers were timed"))
    sets = {"Set": (evaluation, None)}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        reproduce(tmp_path / "file" / "out.json", ("cost",), SMALL, [], {}, tmp_path / "runs")
    monkeypatch.setattr(experiment, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="spandrel"):
        reproduce(tmp_path / "out.json", ("cost", "quality"), SMALL, [images], sets, tmp_path / "runs")
