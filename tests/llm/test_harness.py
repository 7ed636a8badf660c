"""lm-evaluation-harness with a task whose data lie beside it, and with one whose data cannot be fetched."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import language_model

from tenfold import cli as front_door
from tenfold.core.console import UserError

pytest.importorskip("lm_eval", reason="needs lm_eval")

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "green"], "answer": 0},
    {"question": "Two and two make", "choices": ["nine", "four", "six"], "answer": 1},
    {"question": "Grass is", "choices": ["red", "green"], "answer": 1},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Task files by name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = {}
    for name, content in {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}.items():
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(content.format(data=data))
    return files


def log_likelihood(model, before, text):
    """Nats of a text after ids, one forward pass."""
    ids = [*before, *text.encode()]
    with torch.no_grad():
        log = model.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return sum(log[place - 1, ids[place]].item() for place in range(len(before), len(ids)))


def test_tasks_with_local_data_score_as_their_definitions_say(tasks):
    from tenfold.llm.harness import run_tasks

    model = language_model()
    results = run_tasks(model, [str(path) for path in tasks.values()])
    right = 0
    for row in QUESTIONS:
        scores = [log_likelihood(model, row["question"].encode(), f" {choice}") for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert results["tiny_choice"]["acc"] == pytest.approx(right / 3)
    nats = sum(log_likelihood(model, [256], row["question"]) for row in QUESTIONS)
    size = sum(len(row["question"]) for row in QUESTIONS)
    bits = -nats / size / torch.tensor(2.0).log().item()
    assert results["tiny_rolling"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert results["tiny_writing"]["exact_match"] == 0.0


def test_continuations_are_our_own_greedy_ones(tasks):
    from lm_eval.api.instance import Instance

    from tenfold.llm.harness import HarnessModel

    model = language_model()
    request = Instance("generate_until", {}, ("The sky is", {"until": ["~"], "max_gen_toks": 9}), 0)
    assert HarnessModel(model).generate_until([request]) == [
        model.generate("The sky is", 9, temperature=0, stop="~").text
    ]


def test_an_unknown_task_is_told_with_the_nearest_names(tasks, tmp_path, monkeypatch):
    from tenfold.llm import harness

    # The harness's own thousands of tasks take seconds to list.
    known = harness.TaskManager(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(harness, "TaskManager", lambda include_defaults: known)
    with pytest.raises(UserError, match=r"unknown task 'tiny_choise': did you mean tiny_choice"):
        harness.run_tasks(language_model(), ["tiny_choise"])
    with pytest.raises(UserError, match="unknown task 'zzz': `lm_eval ls tasks` lists them all"):
        harness.run_tasks(language_model(), ["zzz"])


def test_a_data_set_that_cannot_be_fetched_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TENFOLD_THREADS", "1")
    task = tmp_path / "far.yaml"
    task.write_text(CHOICE.format(data="unused").replace("dataset_path: json", "dataset_path: nobody/nowhere"))
    model = tmp_path / "model"
    language_model().to_hf(model)
    status = front_door.main(["llm", "evaluate", str(model), "--tasks", str(task)])
    err = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and f"task {task}: its data set cannot be loaded" in err[-1]
    status = front_door.main(["llm", "evaluate", str(model), "--tasks", "missing.yaml"])
    assert status == 2 and "missing.yaml: no such task file" in capsys.readouterr().err


def test_without_the_harness_its_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert front_door.main(["llm", "evaluate", "tenfold-tiny", "--tasks", "arc_easy"]) == 2
    assert "pip install 'tenfold[llm-eval]'" in capsys.readouterr().err
