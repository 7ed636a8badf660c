"""The command line: every verb runs, every error is one line with exit status 2, and start-up is quick."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import cli
from tenfold.core import console
from tenfold.planner.cli import VERBS

LLAMA = [
    "--model",
    "llama3-8b",
    "--hardware",
    "h100",
    "--devices",
    "64",
    "--tp",
    "2",
    "--pp",
    "4",
    "--gbs",
    "64",
    "--seq",
    "4096",
]


@pytest.fixture(autouse=True)
def mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.ROOMS, "planner", "training-system simulator and search")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["planner", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_simulate_prints_throughput_with_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "simulate", *LLAMA)
    assert status == 0
    assert "80% interval" in out and "MFU" in out and "causal attention" in out
    answer = run_json(capsys, "simulate", *LLAMA)
    assert answer["low"] < answer["tokens_per_s_per_device"] < answer["high"]


def test_a_plan_file_and_options_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("tp: 2\npp: 4\ngbs: 64\nseq: 4096\n")
    base = ["--model", "llama3-8b", "--hardware", "h100", "--devices", "64"]
    one = run_json(capsys, "simulate", "--config", tmp_path / "plan.yaml", *base)
    two = run_json(capsys, "simulate", "--config", tmp_path / "plan.yaml", *base, "--pp", "2")
    assert one["plan"]["pp"] == 4 and two["plan"]["pp"] == 2
    (tmp_path / "bad.yaml").write_text("tpp: 2\n")
    status, _, err = run(capsys, "simulate", "--config", tmp_path / "bad.yaml")
    assert status == 2 and "unknown field 'tpp'; nearest: tp" in err


def test_a_user_defined_sheet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sheet = "architecture: mine\nbf16: 500\nmem_gib: 64\nmem_bw: 2\nintra_gbs: 200\ninter_gbs: 25\nper_node: 8\n"
    (tmp_path / "mine.yaml").write_text(sheet)
    answer = run_json(capsys, "simulate", *LLAMA[:2], "--hardware", tmp_path / "mine.yaml", *LLAMA[4:])
    assert answer["hardware"] == "mine"
    (tmp_path / "mine.yaml").write_text(sheet.replace("bf16: 500", "bf16: -1"))
    status, _, err = run(capsys, "simulate", *LLAMA[:2], "--hardware", tmp_path / "mine.yaml", *LLAMA[4:])
    assert status == 2 and "bf16 is -1" in err


def test_search_reports_reasons_and_writes_the_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = run_json(
        capsys,
        "search",
        "--model",
        "llama3-8b",
        "--hardware",
        "h100",
        "--devices",
        32,
        "--gbs",
        64,
        "--top",
        3,
        "--simulate-best",
        10,
        "--processes",
        1,
        "--rejected",
        tmp_path / "rejected.csv",
    )
    assert len(answer["best"]) == 3 and answer["reasons"]
    assert (tmp_path / "rejected.csv").read_text().startswith("plan,reason,smallest change")


def test_shape_compare_memory_and_export(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = run_json(
        capsys,
        "shape",
        "--model",
        "llama3-8b",
        "--hardware",
        "h100",
        "--devices",
        32,
        "--gbs",
        64,
        "--hidden",
        4096,
        "--layers",
        32,
        40,
        "--processes",
        1,
    )
    assert answer["tried"] == 2 and len(answer["best"]) == 2
    for name, pp in (("a", 2), ("b", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"tp: 2\npp: {pp}\ngbs: 64\n")
    both = run_json(capsys, "compare", tmp_path / "a.yaml", tmp_path / "b.yaml", *LLAMA[:6])
    assert [one["plan"]["pp"] for one in both] == [2, 4]
    memory = run_json(capsys, "memory", *LLAMA, "--output", tmp_path / "memory.png")
    assert len(memory["memory"]) == 4 and (tmp_path / "memory.png").stat().st_size > 1000
    for framework, flag in (
        ("megatron", "--tensor-model-parallel-size 2"),
        ("mindspeed", "--pipeline-model-parallel-size 4"),
        ("torchtitan", "--parallelism.tensor_parallel_degree 2"),
    ):
        assert flag in run_json(capsys, "export", framework, *LLAMA)["flags"]
    flags = run_json(
        capsys,
        "export",
        "mindspeed",
        "--tp",
        8,
        "--pp",
        16,
        "--vpp",
        2,
        "--ep",
        4,
        "--tp-extend-ep",
        "--mbs",
        2,
        "--gbs",
        6144,
        "--dispatch",
        "hierarchical",
    )["flags"]
    assert (
        "--moe-tp-extend-ep" in flags and "--moe-hierarchical-alltoallv" in flags and "--noop-layers 61,62,63" in flags
    )


@pytest.mark.parametrize("name", ["step.json", "step.pftrace", "step.png", "step.svg", "step.html"])
def test_trace_writes_every_form(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    answer = run_json(capsys, "trace", "--output", tmp_path / name, *LLAMA, "--microbatches", 8)
    assert answer["overlaps"] == 0
    assert (tmp_path / name).stat().st_size > 500


def test_calibrate_and_validate_own_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, planner_data: Path
) -> None:
    rows = planner_data / "korthikanti_a100.csv"
    fitted = run_json(capsys, "calibrate", rows, "--base", "shipped", "--output", tmp_path / "mine.json")
    assert fitted["groups"]["all"]["median"] < 0.04
    checked = run_json(capsys, "validate", rows, "--calibration", tmp_path / "mine.json")
    assert checked["groups"]["all"]["rows"] == 4
    assert checked["groups"]["all"]["median"] == pytest.approx(fitted["groups"]["all"]["median"], abs=2e-3)


def test_placement_of_recorded_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path, planner_data: Path) -> None:
    moved = run_json(capsys, "placement", planner_data / "tinymoe_loads_ep.npz", "--devices", 8)
    assert moved["after"] < moved["before"]
    copied = run_json(capsys, "placement", planner_data / "tinymoe_loads_ep.npz", "--devices", 8, "--replicas", 40)
    assert copied["after"] < copied["before"]
    np.save(tmp_path / "nan.npy", np.array([[1.0, np.nan]]))
    status, _, err = run(capsys, "placement", tmp_path / "nan.npy", "--devices", 2)
    assert status == 2 and "is nan" in err


def test_import_of_a_hugging_face_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps({**shape, "vocab_size": 128256, "model_type": "llama"}))
    answer = run_json(capsys, "import-hf", tmp_path / "config.json", "--output", tmp_path / "shape.yaml")
    assert answer["parameters"] == 8030261248
    again = run_json(capsys, "simulate", "--model", tmp_path / "shape.yaml", *LLAMA[2:])
    assert again["tokens_per_s_per_device"] > 0


def test_profile_writes_a_sheet_that_simulate_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = run_json(capsys, "profile", "--device", "cpu", "--seconds", "0.2", "--output", tmp_path / "here.yaml")
    assert answer["tflops"] > 0
    assert run_json(
        capsys, "simulate", *LLAMA[:2], "--hardware", tmp_path / "here.yaml", *LLAMA[4:], "--memory-limit-gib", "80"
    )


def test_over_memory_is_an_error_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        "simulate",
        "--model",
        "llama3-70b",
        "--hardware",
        "h100",
        "--devices",
        64,
        "--tp",
        2,
        "--pp",
        4,
        "--gbs",
        64,
    ]
    status, _, err = run(capsys, *plan)
    assert status == 2 and "smallest change that fits" in err
    status, out, _ = run(capsys, *plan, "--over-memory")
    assert status == 0 and "does not fit" in out


@settings(max_examples=60, deadline=None)
@given(
    verb=st.sampled_from(["simulate", "memory", "export"]),
    values=st.dictionaries(
        st.sampled_from(
            [
                "--tp",
                "--pp",
                "--vpp",
                "--ep",
                "--mbs",
                "--gbs",
                "--devices",
                "--seq",
                "--model",
                "--hardware",
                "--schedule",
                "--precision",
            ]
        ),
        st.sampled_from(
            [
                "0",
                "-3",
                "1",
                "2",
                "7",
                "8",
                "64",
                "1000",
                "99999999999",
                "nan",
                "1.5",
                "",
                "llama3-8b",
                "h100",
                "zb-v",
                "fp8",
                "nonsense",
                "🦙",
            ]
        ),
        max_size=6,
    ),
)
def test_no_argument_makes_a_traceback(verb: str, values: dict[str, str]) -> None:
    import contextlib
    import io

    cli.ROOMS.setdefault("planner", "planner")
    arguments = [part for pair in values.items() for part in pair] + (
        ["--gbs", "6144"] if "--gbs" not in values else []
    )
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["planner", verb, *(["megatron"] if verb == "export" else []), *arguments])
    console.set_json_mode(False)
    assert status in (0, 2), err.getvalue()
    if status:
        assert err.getvalue().startswith("error: ")
        assert err.getvalue().count("\n") == 1
        assert "bug" not in err.getvalue()


def _child_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_simulate_starts_without_torch_in_half_a_second_of_processor_time() -> None:
    code = (
        "import sys, tenfold.cli as c; c.ROOMS.setdefault('planner', ''); "
        f"assert c.main(['planner', 'simulate', *{LLAMA!r}]) == 0; "
        "assert not {'torch', 'pandas', 'scipy', 'matplotlib', 'typeguard'} & set(sys.modules)"
    )
    # Processor time, best of three: the machine may be busy, and the first run may compile byte code.
    assert min(_child_seconds(code) for _ in range(3)) - min(_child_seconds("pass") for _ in range(2)) < 0.5


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit):
            cli.main(["planner", verb, "--help"])
        assert "Example:" in capsys.readouterr().out
