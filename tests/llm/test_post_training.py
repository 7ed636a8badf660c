"""SFT and GRPO: what data and rewards mean, and that three steps of each leave a folder that loads."""

import json
import sys
from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.llm.checkpoint import load_model, save_hf
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Decoder, initialise
from tenfold.llm.post_training import PostTraining, last_number, make_reward, post_train, read_rows
from tenfold.llm.tokenizer import ByteTokenizer, Tokenizer

SUMS = [(a, b) for a in range(4) for b in range(4)]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DSSN model over bytes."""
    folder = tmp_path_factory.mktemp("model")
    decoder = Decoder(
        ModelConfig(vocabulary=257, width=16, layers=2, heads=2, kv_heads=1, ffn=32, eod=256, init="small")
    )
    initialise(decoder)
    save_hf(decoder, folder, ByteTokenizer())
    return folder


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.", 7), ("-2.5e3", -2500), ("about 1,234 apples", 1234), (".5", 0.5), ("none", None), ("x-", None)],
)
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_rewards_judge_each_completion_by_its_own_answer() -> None:
    completions = [" 7 ", "it is 7", "8", "no"]
    answers = ["7", "7.0", "7", "7"]
    assert make_reward("exact")(completions=completions, answer=answers, prompts=[""] * 4) == [1, 0, 0, 0]
    assert make_reward("numeric")(completions=completions, answer=answers) == [1, 1, 0, 0]
    assert make_reward("regex:^it|no$")(completions=completions) == [0, 1, 0, 1]
    spoken = [[{"role": "assistant", "content": text}] for text in completions]
    assert make_reward("numeric")(completions=spoken, answer=answers) == [1, 1, 0, 0]
    assert make_reward("exact").__name__ == "exact"


def test_a_function_of_ones_own_is_found_in_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **fields):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert make_reward("my_rewards:short")(completions=["ab", ""]) == [-2, 0]
    assert sys.path == before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("exakt", "unknown reward"),
        ("regex:", "unknown reward"),
        ("regex:(", "not a regular expression"),
        ("no_such_module_here:f", "cannot be imported"),
        ("json:nothing", "has no function nothing"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_reward(word)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "rewards", "content", "message"),
    [
        ("sft", (), "", "holds no examples"),
        ("sft", (), "{", "line 1 is not JSON"),
        ("sft", (), "[]", "line 1 is no object"),
        ("sft", (), '{"prompt": "a"}', "needs `prompt` and `completion`, `messages`, or `text`"),
        ("sft", (), '{"messages": [{"role": "user"}]}', "needs `prompt`"),
        ("sft", (), '{"text": "a"}\n{"text": "a", "x": 1}', "line 2 has the fields text, x"),
        ("grpo", (), '{"answer": 1}', "needs a `prompt`"),
        ("grpo", ("exact",), '{"prompt": "a"}', "the reward exact needs an `answer`"),
        ("grpo", ("numeric",), '{"prompt": "a", "answer": "many"}', "holds no number"),
    ],
)
def test_data_that_do_not_fit_the_stage_are_refused_in_one_line(tmp_path, stage, rewards, content, message) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(path, stage, rewards)
    assert "\n" not in str(error.value)


def test_answers_are_read_as_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "1+1=", "answer": 2}])
    assert read_rows(path, "grpo", ("numeric",)) == [{"prompt": "1+1=", "answer": "2"}]


@pytest.mark.parametrize(
    ("settings", "rewards", "message"),
    [
        ({"stage": "grpo"}, (), "grpo needs a reward"),
        ({"stage": "sft"}, ("exact",), "sft takes no rewards"),
        ({"stage": "grpo", "batch": 6, "group": 4}, ("exact",), "no multiple of a group of 4"),
        ({"stage": "sft", "batch": 0}, (), "batch must be at least 1"),
    ],
)
def test_settings_that_contradict_the_stage_are_refused(tmp_path, settings, rewards, message) -> None:
    with pytest.raises(UserError, match=message):
        post_train("nothing", tmp_path / "d.jsonl", tmp_path, PostTraining(steps=1, **settings), rewards)


def test_messages_need_a_chat_template(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = write_lines(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(UserError, match="has no chat template"):
        post_train(model, data, tmp_path / "out", PostTraining("sft", steps=1))


def test_without_trl_the_message_names_the_extra(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    data = write_lines(tmp_path / "d.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"pip install 'tenfold\[llm-post\]'"):
        post_train(model, data, tmp_path / "out", PostTraining("sft", steps=1))


# --- three steps ------------------------------------------------------------------------------------------------------


def test_sft_lowers_the_loss_and_leaves_a_folder_that_loads(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS])
    settings = PostTraining("sft", steps=3, batch=8, learning_rate=1e-2, warmup=0.0)
    result = post_train(model, data, tmp_path / "out", settings, device="cpu")
    assert result.steps == 3 and result.examples == 16
    assert result.last["loss"] < result.first["loss"] - 0.1
    before, after = load_model(model), load_model(tmp_path / "out")
    assert after.model.config == before.model.config and after.family == before.family
    assert not after.model.embed.weight.equal(before.model.embed.weight)
    assert after.tokenizer is not None and after.tokenizer.digest == before.tokenizer.digest
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    assert [row["step"] for row in history] == [1, 2, 3]


def test_grpo_trains_on_the_sum_of_its_rewards_and_goes_on_from_its_checkpoint(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in SUMS])
    settings = PostTraining("grpo", 3, batch=4, group=2, completion=4, learning_rate=1e-2, checkpoint_every=2)
    words = ("numeric", "regex:[a-z]")
    result = post_train(model, data, tmp_path / "out", settings, words, device="cpu")
    assert {"reward", "rewards/numeric/mean", "rewards/regex/mean"} <= result.last.keys()
    final = load_model(tmp_path / "out")
    assert not final.model.embed.weight.equal(load_model(model).model.embed.weight)
    # A run that stopped after step 2: the last checkpoint is gone, and the same call makes step 3 again.
    for path in (tmp_path / "out" / "checkpoints").glob("checkpoint-3/*"):
        path.unlink()
    (tmp_path / "out" / "checkpoints" / "checkpoint-3").rmdir()
    again = post_train(model, data, tmp_path / "out", settings, words, device="cpu")
    assert again.steps == 3 and again.first["step"] == 1
    with pytest.raises(UserError, match="belongs to a run with other settings or data"):
        post_train(model, data, tmp_path / "out", settings, ("numeric",), device="cpu")


def test_grpo_raises_the_reward(model: Path, tmp_path: Path) -> None:
    """A reward that random bytes earn now and then: some letter or digit in four bytes."""
    pytest.importorskip("trl")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": f"{a}+{b}="} for a, b in SUMS])
    settings = PostTraining("grpo", 16, batch=64, group=32, completion=4, learning_rate=5e-2)
    post_train(model, data, tmp_path / "out", settings, ("regex:[a-z0-9]",), device="cpu")
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    rewards = [row["reward"] for row in history]
    assert len(rewards) == 16
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards


def test_the_verb_prints_what_came_of_it(model: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("trl")
    from tenfold import cli

    data = write_lines(tmp_path / "d.jsonl", [{"text": f"{a}+{b}={a + b}"} for a, b in SUMS])
    arguments = ["post-train", model, data, "-o", tmp_path / "out", "--steps", 2, "--batch-size", 4, "--device", "cpu"]
    assert cli.main(["llm", *map(str, arguments)]) == 0
    assert "2 steps on 16 examples" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "out").size == 257
