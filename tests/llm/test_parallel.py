"""A model on two processes is the model on one; the tokens of packed documents are shared out fairly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_program import run
from safetensors.torch import load_file

from tenfold.core.console import UserError
from tenfold.llm.config import Layout, ModelConfig
from tenfold.llm.context_parallel import split_documents, split_sequence, work
from tenfold.llm.model import Decoder
from tenfold.llm.parallel import Spread, layout_of, prepare

PROGRAM = Path(__file__).with_name("parallel_program.py")
TOLERANCE = 1e-5


def answers_of(program: Path, folder: Path) -> dict:
    """What two processes found that did all checks of a program, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder / "answers.json")],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [process.communicate(timeout=1200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    return {"folder": folder, **json.loads((folder / "answers.json").read_text())}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return answers_of(PROGRAM, tmp_path_factory.mktemp("parallel"))


CHECKS = {
    "fsdp dssn": 47,
    "fsdp rich": 86,
    "tensor dssn": 47,
    "tensor rich": 86,
    "tensor post": 39,
    "tensor pre": 39,
    "context dssn": 47,
    "context rich": 86,
    "pipeline dssn": 47,
    "pipeline post": 39,
    "pipeline whole rows": 47,
    "pipeline interleaved": 47,
    "prepare fsdp": 47,
    "prepare tensor": 86,
    "prepare context": 47,
}


@pytest.mark.parametrize(("name", "tensors"), CHECKS.items())
def test_two_processes_find_the_loss_and_gradients_of_one(answers: dict, name: str, tensors: int) -> None:
    answer = answers[name]
    assert "error" not in answer, answer["error"]
    assert answer["loss"] <= TOLERANCE
    assert answer["gradient"] <= TOLERANCE, answer
    assert answer["tensors"] == tensors


@pytest.mark.parametrize("name", ["tensor dssn", "tensor rich"])
def test_tensor_parallel_processes_hold_half_of_the_matrices_each(answers: dict, name: str) -> None:
    assert 0.5 <= answers[name]["share"] < 0.52


@pytest.mark.parametrize("name", ["context dssn", "context rich"])
def test_context_parallel_processes_take_half_of_the_tokens_and_leave_other_batches_alone(
    answers: dict, name: str
) -> None:
    assert answers[name]["tokens"] == 48
    assert answers[name]["unshared"] <= TOLERANCE


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("one_process")
    return folder, run(folder)


RUNS = ["copies", "fsdp", "tensor", "context", "resumed"]


@pytest.mark.parametrize("name", RUNS)
def test_training_on_any_layout_is_training_on_one_process(
    answers: dict, one_process: tuple[Path, list[float]], name: str
) -> None:
    _, expected = one_process
    answer = answers[f"run {name}"]
    assert "error" not in answer, answer["error"]
    assert expected[0] - expected[-1] > 0.2, "the loss should fall, or equality would show little"
    assert answer["losses"] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_checkpoints_of_any_layout_are_files_of_one_process(
    answers: dict, one_process: tuple[Path, list[float]], name: str
) -> None:
    folder, _ = one_process
    for file in ("model.safetensors", "checkpoints/step-00000004/model.safetensors"):
        expected, found = load_file(folder / file), load_file(answers["folder"] / name / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-5, rtol=0)


@pytest.mark.skipif(find_spec("torchtitan") is None, reason="needs torchtitan, which wants other versions than we do")
def test_torchtitan_builds_spreads_and_initialises_the_model_that_one_process_has(tmp_path: Path) -> None:
    found = answers_of(PROGRAM.with_name("torchtitan_program.py"), tmp_path)
    for name in ("tensor", "fsdp"):
        assert found[name]["loss"] <= TOLERANCE and found[name]["gradient"] <= TOLERANCE
    assert found["keys"] and found["parameters"] == 37408


# --- Shares of documents ----------------------------------------------------------------------------------------------


def brute_force_work(lengths: list[int], taken: list[list[range]]) -> list[int]:
    starts = [
        start for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False) for _ in [0] * length
    ]
    return [sum(token - starts[token] + 1 for span in ranges for token in span) for ranges in taken]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.sampled_from([2, 4, 8]))
def test_every_token_is_taken_once_and_totals_differ_by_one_at_most(lengths: list[int], cp: int) -> None:
    taken = split_documents(lengths, cp)
    assert sorted(token for ranges in taken for span in ranges for token in span) == list(range(sum(lengths)))
    totals = [sum(map(len, ranges)) for ranges in taken]
    assert max(totals) - min(totals) <= (sum(lengths) % cp != 0)
    assert work(lengths, taken) == brute_force_work(lengths, taken)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([2, 4, 8]))
def test_work_is_balanced_for_all_packings_of_documents_that_are_not_tiny(data: st.DataObject, cp: int) -> None:
    lengths = data.draw(st.lists(st.integers(64 * cp, 256 * cp), min_size=1, max_size=50))
    shares = work(lengths, split_documents(lengths, cp))
    assert max(shares) / (sum(shares) / cp) <= 1.05


def test_cutting_the_sequence_instead_of_its_documents_is_unbalanced() -> None:
    lengths = [4096, 512, 512, 512, 512, 1024, 1024]
    sequence, documents = (
        max(shares) / (sum(shares) / 4)
        for shares in (work(lengths, split(lengths, 4)) for split in (split_sequence, split_documents))
    )
    assert sequence > 1.3 and documents <= 1.01


def test_one_document_is_cut_as_the_sequence_is() -> None:
    assert split_documents([64], 4) == split_sequence([64], 4)
    assert split_documents([64], 4)[1] == [range(8, 16), range(48, 56)]


# --- What cannot be ---------------------------------------------------------------------------------------------------

SMALL = ModelConfig(vocabulary=96, width=32, layers=2, heads=4, kv_heads=2, ffn=48)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout(tp=4), "kv_heads cannot be shared equally by 4 devices"),
        (Layout(fsdp=2), "torchrun --nproc-per-node 2"),
        (Layout(pp=4), "2 layers do not fill 4"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(layout: Layout, says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        prepare(Decoder(SMALL), layout)
    assert "\n" not in str(refusal.value)


def test_a_pipeline_is_refused_where_it_cannot_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"tenfold\.llm\.pipeline"):
        prepare(Decoder(SMALL), Layout(pp=2))


def test_half_precision_floats_are_refused_for_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="fp16"):
        prepare(Decoder(SMALL), Layout(fsdp=2), precision="fp16")


def test_flags_share_out_the_processes() -> None:
    assert layout_of(8, tp=2) == Layout(dp=4, tp=2)
    assert layout_of(8, fsdp=True, tp=2, cp=2) == Layout(fsdp=2, tp=2, cp=2)
    for tp, cp in ((3, 1), (2, 8), (0, 1)):
        with pytest.raises(UserError, match="cannot be shared out"):
            layout_of(8, tp=tp, cp=cp)


def test_one_process_is_left_as_it_is_and_a_model_on_meta_is_made() -> None:
    with torch.device("meta"):
        model = Decoder(SMALL)
    assert prepare(model, Layout()) == Spread(Layout())
    assert not any(parameter.is_meta for parameter in model.parameters())
