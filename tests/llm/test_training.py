"""Pre-training: exact resume across phases, the guard on bad batches, one decision over ranks, what a run leaves."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pretraining_program import MODEL, PHASES, STEPS, launch, run, text
from safetensors import safe_open
from safetensors.torch import load_file

from tenfold.cli import main
from tenfold.core.console import UserError
from tenfold.llm import stability
from tenfold.llm.checkpoint import load_model
from tenfold.llm.config import DataSource, Phase, Recipe, TrainConfig
from tenfold.llm.data import PackedTokens
from tenfold.llm.inspection import inspect
from tenfold.llm.phases import Timetable, single_phase
from tenfold.llm.tokenizer import ByteTokenizer
from tenfold.llm.training import PhasedSequences, make_optimizer, new_model, next_token_loss, phase_rows, pretrain
from tenfold.llm.windows import Validation, Windows


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    assert launch(run_dir) == [0]
    return run_dir


def rows(run_dir: Path) -> list[dict]:
    return [row for row in stability.read_rows(run_dir / "metrics.jsonl") if "lr" in row]


def validation(run_dir: Path) -> float:
    log = stability.read_run(run_dir)
    return log.validation[STEPS]["loss"]


def same_weights(left: Path, right: Path) -> bool:
    return (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [random.Random(1).randrange(5, 39), random.Random(2).randrange(41, 69)])
def test_kill_9_at_a_random_step_of_either_phase_then_resume_ends_with_the_same_bits(
    clean: Path, tmp_path: Path, step: int
) -> None:
    assert launch(tmp_path / "run", kill=step) == [-signal.SIGKILL]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert launch(tmp_path / "run") == [0]
    assert same_weights(tmp_path / "run", clean)
    assert [(row["loss"], row["grad_norm"]) for row in rows(tmp_path / "run")] == [
        (row["loss"], row["grad_norm"]) for row in rows(clean)
    ]


def test_sigterm_leaves_a_complete_checkpoint_that_is_a_model_and_can_go_on(clean: Path, tmp_path: Path) -> None:
    assert launch(tmp_path / "run", stop=44) == [128 + signal.SIGTERM]
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-00000045")
    assert load_model(newest).model.config.rope_base == 1e5
    assert launch(tmp_path / "run") == [0]
    assert same_weights(tmp_path / "run", clean)


def test_a_killed_run_that_rolls_back_ends_with_the_same_bits_as_one_that_was_not_killed(tmp_path: Path) -> None:
    options = {"bad": [55], "guard": "rollback"}
    assert launch(tmp_path / "whole", **options) == [0]
    assert launch(tmp_path / "killed", kill=58, **options) == [-signal.SIGKILL]
    assert launch(tmp_path / "killed", **options) == [0]
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


# --- guard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guard", "refused"), [("skip", 1), ("rollback", 6)])
def test_a_corrupt_batch_is_refused_and_the_run_ends_where_the_clean_one_does(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], guard: str, refused: int
) -> None:
    result = run(tmp_path / "run", bad=[55], guard=guard)
    told = capsys.readouterr().err
    assert result.refused == refused and result.finished
    (bad,) = [row for row in rows(tmp_path / "run") if row["loss"] is None]
    assert bad["step"] == 56
    assert bad["refused_loss"] > 5 * rows(clean)[54]["loss"], "the batch should be one of five times the loss"
    if guard == "skip":
        assert "step 56 is skipped: the loss" in told
    else:
        assert "step 56 is rolled back to the checkpoint of step 50, and 6 batches are left out: the loss" in told
    assert abs(validation(tmp_path / "run") - validation(clean)) < 0.02


def test_without_the_guard_the_same_batch_does_harm(clean: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run", bad=[55], guard="off", clip_norm=0.0)
    guarded = run(tmp_path / "guarded", bad=[55], guard="skip", clip_norm=0.0)
    assert result.refused == 0 and guarded.refused == 1
    spikes = stability.find_spikes(stability.read_run(tmp_path / "run").losses)
    assert [spike.step for spike in spikes][:1] == [56]
    assert validation(tmp_path / "run") > validation(tmp_path / "guarded")


def test_two_ranks_decide_alike_when_only_one_of_them_sees_the_bad_batch(tmp_path: Path) -> None:
    def own(rank: int) -> dict:
        return {"bad": [55, 56] if rank == 1 else [], "keep": str(tmp_path / f"rank{rank}.pt")}

    for guard in ("skip", "rollback"):
        assert launch(tmp_path / guard, 2, own, guard=guard) == [0, 0]
        weights = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        log = stability.read_run(tmp_path / guard)
        assert log.refused == [56, 57]
        assert len(log.losses) == STEPS


# --- parts ------------------------------------------------------------------------------------------------------------


def test_every_step_uses_the_length_base_batch_and_rate_of_its_phase(clean: Path) -> None:
    table = Timetable(PHASES)
    assert [row["lr"] for row in rows(clean)] == pytest.approx([table.learning_rate(s) for s in range(STEPS)])
    sequences = PhasedSequences(table, [Windows(text(1), phase.length, n) for n, phase in enumerate(PHASES)])
    for step, shape, base in ((39, (4, 16), 1e4), (40, (2, 32), 1e5)):
        batch = sequences.batch(table.sequences(step))
        assert batch["tokens"].shape == shape and batch["rope_base"] == base
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_the_weights_say_which_base_and_length_they_were_trained_with(clean: Path) -> None:
    with safe_open(clean / "model.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert (config["rope_base"], config["context"]) == (1e5, 32)
    assert load_file(clean / "model.safetensors").keys() == new_model(MODEL, 0).state_dict().keys()


def test_loss_is_the_mean_over_all_positions_in_float32() -> None:
    model = new_model(MODEL, 0).bfloat16()
    tokens = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))
    loss, _ = next_token_loss(model, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    logits = model(tokens[:, :-1]).float()
    by_hand = [-F.log_softmax(logits[b, t], -1)[tokens[b, t + 1]] for b in range(3) for t in range(8)]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_the_optimiser_is_the_papers_and_decays_gains_by_default() -> None:
    model = new_model(MODEL, 0)
    optimizer = make_optimizer(TrainConfig(PHASES), 1e-3)(model)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.1)
    assert len(group["params"]) == len(list(model.parameters()))
    undecayed = make_optimizer(TrainConfig(PHASES, decay_norms=False), 1e-3)(model).param_groups[1]
    assert undecayed["weight_decay"] == 0 and all(parameter.dim() == 1 for parameter in undecayed["params"])


def test_gains_and_optimiser_state_stay_float32_under_bf16(tmp_path: Path) -> None:
    result = run(tmp_path / "run", precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(result.weights).values())
    trainer = torch.load(tmp_path / f"run/checkpoints/step-{STEPS:08d}/trainer.pt", weights_only=True)
    states = trainer["optimizer"]["state"].values()
    assert states and all(state["exp_avg"].dtype == torch.float32 for state in states)
    assert result.loss is not None and result.loss < 2.0


def test_validation_counts_bits_of_the_bytes_that_tokens_stand_for() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 256) + self.bias

    scores = Validation(list(range(200)), 32, ByteTokenizer(), batch=4)(Uniform())
    assert scores == pytest.approx({"loss": math.log(256), "nats_per_byte": math.log(256), "bits_per_byte": 8.0})


def test_windows_are_a_pure_function_of_their_numbers_and_lie_in_the_text() -> None:
    windows = Windows(torch.arange(100), 10, seed=3)
    batch = windows.batch([5, 9, 5])
    assert torch.equal(batch["tokens"][0], batch["tokens"][2])
    assert torch.equal(batch["tokens"] + 1, batch["targets"])
    assert torch.equal(windows.batch([9])["tokens"][0], batch["tokens"][1])
    starts = {int(windows.batch([index])["tokens"][0, 0]) for index in range(2000)}
    assert starts == set(range(90))
    with pytest.raises(UserError, match="fewer than one sequence of 100"):
        Windows(torch.arange(100), 100)


def test_utilisation_counts_each_phase_at_its_length(clean: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    matrices = 2 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 48) + 32 * 32
    attention = [2 * 12 * 32 * (length + 1) / 2 for length in (16, 32)]
    flops = 40 * 64 * (6 * matrices + attention[0]) + 30 * 64 * (6 * matrices + attention[1])
    assert result.tokens == 70 * 64
    assert result.mfu == pytest.approx(flops / result.seconds / 1e11)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


# --- the whole --------------------------------------------------------------------------------------------------------


def recipe(path: Path, **changes: object) -> Recipe:
    model = replace(MODEL, vocabulary=257, eod=None)
    train = TrainConfig(single_phase(6, 2, 16, 1e-2), **changes)  # type: ignore[arg-type]
    return Recipe(model, train, (DataSource(str(path)),))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 40)
    return path


def test_a_runs_folder_is_a_model_with_its_tokenizer(tmp_path: Path, book: Path) -> None:
    result = pretrain(recipe(book), tmp_path / "run", validation=[book], device="cpu", peak_flops=1e11)
    loaded = load_model(tmp_path / "run")
    assert loaded.tokenizer is not None and loaded.tokenizer.eod == loaded.model.config.eod == 256
    assert result.bits_per_byte is not None and 0 < result.bits_per_byte < 12
    log = stability.read_run(tmp_path / "run")
    assert [row["step"] for row in log.looks] == [0, 6]
    assert len(log.losses) == 6
    again = pretrain(recipe(book), tmp_path / "run", validation=[book], device="cpu", peak_flops=1e11)
    assert again.steps == 6 and again.seconds == result.seconds
    found = inspect(str(result.weights), tmp_path / "model.html", text=book)
    assert len(found["look"]["activations"]["output of the layer"]["std"]) == 2
    assert (tmp_path / "model.html").read_text().count('<picture class="plot">') == 5


def test_a_folder_of_another_run_is_not_continued(tmp_path: Path, book: Path) -> None:
    pretrain(recipe(book), tmp_path / "run", device="cpu", peak_flops=1e11)
    with pytest.raises(UserError, match=r"started with another configuration: recipe\.train\.weight_decay is 0\.1"):
        pretrain(recipe(book, weight_decay=0.2), tmp_path / "run", device="cpu", peak_flops=1e11)


def test_each_phase_has_its_own_mixture(tmp_path: Path, book: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("0123456789" * 200)
    phases = (
        phase_of("first", 0, 64),
        phase_of("second", 64, 128),
    )
    mixed = Recipe(
        replace(MODEL, vocabulary=257),
        TrainConfig(phases),
        (DataSource(str(book), phases=("first",)), DataSource(str(other), phases=("second",))),
    )
    table, words = Timetable(phases), ByteTokenizer()
    first, second = (phase_rows(mixed, number, table, words, tmp_path / "tokens") for number in (0, 1))
    assert isinstance(first, PackedTokens)
    assert bytes(second.batch([0])["tokens"][0].tolist()).isdigit()
    assert not bytes(first.batch([0])["tokens"][0].tolist()).isdigit()
    wrong = replace(mixed, data=(DataSource(str(book), phases=("frist",)),))
    with pytest.raises(UserError, match="for the phase 'frist'; did you mean first"):
        phase_rows(wrong, 0, table, words, tmp_path / "tokens")


def phase_of(name: str, start: int, end: int) -> Phase:
    return replace(PHASES[0], name=name, start=start, end=end, length=8, batch=((start, 2),), warmup_steps=0)


SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--kv-heads", "1", "--ffn", "16", "--vocabulary", "257"]
SHORT = ["--steps", "2", "--batch-size", "2", "--length", "16", "--device", "cpu"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*SMALL, *SHORT, "--kv-heads", "3"], "2 heads cannot share 3 key/value heads equally"),
        ([*SMALL, *SHORT, "--length", "100000"], "one row takes 100001"),
        ([*SMALL, *SHORT, "--text", "absent.txt"], "absent.txt: no such file"),
        ([*SMALL, *SHORT, "--vocabulary", "300"], "300"),
        ([*SMALL, *SHORT, "--recipe", "tenfold-tyni"], "did you mean tenfold-tiny"),
        ([*SMALL, *SHORT, "--steps", "0"], "steps is 0, and should be 1 or more"),
        ([*SMALL, *SHORT, "--batch-size", "0"], "batch is 0, and should be 1 or more"),
        ([*SMALL, *SHORT, "--length", "0"], "length is 0, and should be 1 or more"),
        ([*SMALL, *SHORT, "--learning-rate", "0"], "learning rates from 0.0 to 0.0 should be positive"),
        ([*SMALL, *SHORT, "--learning-rate", "nan"], "learning rates from nan to nan should be positive"),
        ([*SMALL, *SHORT, "--warmup", "-1"], "warmup_steps -1 is negative"),
        ([*SMALL, *SHORT, "--accumulate", "0"], "accumulate: 0 is below 1"),
        ([*SMALL, *SHORT, "--seed", "-1"], "seed: -1 is below 0"),
        ([*SMALL, *SHORT, "--post-norm-eps", "-1"], "post_norm_eps: -1.0 is negative"),
        ([*SMALL, *SHORT, "--peak-flops", "-1"], "--peak-flops -1.0: give a positive number"),
        (["gap.yaml"], "a gap between 'a' and 'b'"),
        (["base.yaml"], "rope_base 0.0 should be positive"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was a dark and stormy night. " * 30)
    model = "model: {vocabulary: 257, width: 16, layers: 1, heads: 2, kv_heads: 1, ffn: 16}\n"
    phase = "{name: %s, start: %s, end: %s, length: 8, rope_base: %s, batch: [[%s, 1]], learning_rate: 1e-3}"
    first = phase % ("a", 0, 80, 1e4, 0)
    Path("gap.yaml").write_text(f"{model}train: {{phases: [{first}, {phase % ('b', 96, 160, 1e4, 96)}]}}\n")
    Path("base.yaml").write_text(f"{model}train: {{phases: [{phase % ('a', 0, 80, 0, 0)}]}}\n")
    texts = [] if "--text" in options else ["--text", "book.txt"]
    with pytest.raises(SystemExit) as caught:
        sys_exit(main(["llm", "pretrain", *options, *texts, "-o", "run"]))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def sys_exit(status: object) -> None:
    raise SystemExit(status)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path, book: Path) -> None:
    ByteTokenizer().save(tmp_path / "bytes")
    small = replace(recipe(book), model=replace(MODEL, vocabulary=256))
    with pytest.raises(UserError, match="257 ids and the model a vocabulary of 256"):
        pretrain(small, tmp_path / "run", tokenizer=tmp_path / "bytes", device="cpu")


def test_a_command_that_was_refused_binds_no_tokenizer(tmp_path: Path, book: Path) -> None:
    ByteTokenizer().save(tmp_path / "bytes")
    changed = ByteTokenizer()
    changed.backend.add_tokens(["stormy"])
    changed.save(tmp_path / "others")
    small = replace(recipe(book), model=replace(MODEL, vocabulary=257))
    with pytest.raises(UserError, match="258 ids and the model a vocabulary of 257"):
        pretrain(small, tmp_path / "run", tokenizer=tmp_path / "others", device="cpu")
    assert pretrain(small, tmp_path / "run", tokenizer=tmp_path / "bytes", device="cpu").finished
    with pytest.raises(UserError, match="was started with another tokenizer"):
        pretrain(small, tmp_path / "run", tokenizer=tmp_path / "others", device="cpu")


def test_phases_over_the_same_text_have_rows_of_their_own(tmp_path: Path, book: Path) -> None:
    phases = (phase_of("first", 0, 64), phase_of("second", 64, 128))
    mixed = Recipe(replace(MODEL, vocabulary=257), TrainConfig(phases), (DataSource(str(book)),))
    table = Timetable(phases)
    book.write_text("".join(f"{number:07d}\n" for number in range(200)))  # no two rows are alike
    first, second = (phase_rows(mixed, number, table, ByteTokenizer(), tmp_path / "tokens") for number in (0, 1))
    begin, then = (part.batch(range(60))["tokens"] for part in (first, second))
    assert (begin != then).any(1).float().mean() > 0.9
    assert torch.equal(
        phase_rows(mixed, 1, table, ByteTokenizer(), tmp_path / "tokens").batch(range(60))["tokens"], then
    )


# Prints what this process did that only one should do.
WORK = """
import sys
from dataclasses import replace
import torch
from tenfold.core.console import UserError
from tenfold.llm import shards, training
from tenfold.llm.config import DataSource, ModelConfig, Recipe, TrainConfig
from tenfold.llm.phases import single_phase

train, split = training.train_tokenizer, shards.TextFiles._split
training.train_tokenizer = lambda *arguments: (print("TRAINED"), train(*arguments))[1]
shards.TextFiles._split = lambda *arguments: (print("SPLIT"), split(*arguments))[1]
torch.set_num_threads(1)
length = int(sys.argv[3])
model = ModelConfig(vocabulary=280, width=16, layers=1, heads=2, kv_heads=1, ffn=16, context=length)
recipe = Recipe(model, TrainConfig(single_phase(2, 2, length, 1e-3)), (DataSource(sys.argv[1]),))
try:
    training.pretrain(recipe, sys.argv[2], validation=[sys.argv[1]], device="cpu", peak_flops=1e12)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(("length", "status"), [(16, 0), (100_000, 2)])
def test_of_two_processes_only_the_first_trains_the_tokenizer_and_splits_the_text(
    tmp_path: Path, book: Path, length: int, status: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-c", WORK, str(book), str(tmp_path / "run"), str(length)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, told
    assert (told[0].count("TRAINED"), told[0].count("SPLIT")) == (1, 1)
    assert "TRAINED" not in told[1] and "SPLIT" not in told[1]
    if status:
        assert "one row takes 100001" in told[0] and "the first process has failed" in told[1]
