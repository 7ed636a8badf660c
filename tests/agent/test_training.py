"""Training: ids and masks to the loss, groups to rewards, a run that is stopped, signs of collapse, TRL."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold.agent.collapse import LAST_SIGN, PATIENCE, WINDOW, CollapseGuard
from tenfold.agent.config import Budget, GrpoConfig, Sampling, SftConfig
from tenfold.agent.data import Question
from tenfold.agent.environment import Rollout
from tenfold.agent.reproduce import setting
from tenfold.agent.rewards import Graded
from tenfold.agent.rollouts import Batched, Example, Setting, Taught, example, play, sample_turns
from tenfold.agent.training import chosen_log_probs, collate, grade_by_rules, grpo, sft
from tenfold.agent.world import KNOWN, MISS, RELATIONS, World, tiny_policy
from tenfold.cli import main
from tenfold.core.console import UserError

WORLD = World()
PLACE = setting(WORLD)
GRPO = GrpoConfig(
    steps=4, questions=2, group=4, learning_rate=1e-3, strict_after=2, checkpoint_every=2, entropy_floor=0
)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def expert_runs(tiny: tuple[Any, Any]) -> tuple[list[Question], list[Rollout]]:
    questions = [WORLD.question(number, hops) for hops in (1, 2, 3, 4) for number in range(12)]
    questions.append(WORLD.known_question(3))
    return questions, play(PLACE, Taught(*tiny, WORLD.expert()), questions, [0] * len(questions))


# --- The world ----------------------------------------------------------------------------------------------------


def test_no_question_of_training_begins_with_a_person_that_is_held_out() -> None:
    trained = {WORLD.question(number, 1).path[0] for number in range(4_000)}
    tested = {question.path[0] for question in WORLD.held_out((1, 2, 5), 100)}
    assert len(trained) > 900 and len(tested) > 100
    assert trained.isdisjoint(tested)


def test_one_search_in_seven_misses_and_other_words_find_what_was_missed() -> None:
    asked = [(person, relation) for person in WORLD.people[:300] for relation in RELATIONS]
    missed = [(person, relation) for person, relation in asked if WORLD.found(f"{person} {relation}") is None]
    assert len(missed) / len(asked) == pytest.approx(MISS, abs=0.02)
    again = [WORLD.found(f"{relation} {person}") for person, relation in missed]
    assert sum(found is None for found in again) / len(missed) == pytest.approx(MISS, abs=0.06)
    assert all(found in (None, WORLD.facts[pair]) for found, pair in zip(again, missed, strict=True))


@pytest.mark.parametrize(
    "query", ["", "ada abbot", "ada abbot mother father", "ada ben abbot mother", "who is ada abbot mother", "mother"]
)
def test_a_search_that_does_not_name_one_person_and_one_relation_finds_nothing(query: str) -> None:
    assert WORLD.found(query) is None


def test_the_expert_follows_every_path_and_searches_once_for_each_relation_and_miss(
    expert_runs: tuple[list[Question], list[Rollout]],
) -> None:
    questions, rollouts = expert_runs
    right = 0
    for question, rollout in zip(questions, rollouts, strict=True):
        assert rollout.format_ok and rollout.status in ("answered", "forced")
        person, expected = question.path[0], 0
        for relation in [] if question.relations == (KNOWN,) else question.relations:
            first, last = person.split()
            words = [f"{person} {relation}", f"{relation} {person}", f"{last} {first} {relation}"]
            tries = next((tries for tries, query in enumerate(words, 1) if WORLD.found(query)), None)
            expected += tries or len(words)
            if tries is None:  # it gives up
                break
            person = WORLD.facts[person, relation]
        else:
            right += rollout.answer == question.answers[0]
            assert (rollout.answer == question.answers[0]) == (expected <= PLACE.budget.rounds)
        assert rollout.rounds == min(expected, PLACE.budget.rounds)
    assert right >= len(questions) - 4  # the others miss too often for seven rounds


# --- Ids and masks ------------------------------------------------------------------------------------------------


def test_what_the_expert_says_is_masked_in_and_all_else_is_masked_out(
    tiny: tuple[Any, Any], expert_runs: tuple[list[Question], list[Rollout]]
) -> None:
    tokenizer = tiny[1]
    for question, rollout in zip(*expert_runs, strict=True):
        assert len(rollout.ids) == len(rollout.mask)
        said, given = [], []
        for token, mine in zip(rollout.ids, rollout.mask, strict=True):
            (said if mine else given).append(token)
        turns = " ".join(f"{reply.text} <end>" for reply in rollout.replies)
        assert tokenizer.decode(said).split() == turns.split()
        assert "<unk>" not in tokenizer.decode(rollout.ids)
        assert question.question in tokenizer.decode(given)
        assert "<assistant>" not in tokenizer.decode(said)


def test_log_probabilities_of_chosen_tokens_are_those_of_all_logits(tiny: tuple[Any, Any]) -> None:
    model = tiny[0].eval()
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (3, 17))
    mask = (torch.rand(3, 17) < 0.3).float()
    mask[:, 0] = 0
    with torch.no_grad():
        log_probs, chosen, entropy = chosen_log_probs(model, ids, mask, 0.9)
        logits = model(input_ids=ids).logits.float() / 0.9
    assert float(chosen.sum()) == float(mask.sum())
    columns = [column for column in range(17) if mask[:, column].any()]
    for place, column in enumerate(columns):
        for row in range(3):
            before = logits[row, column - 1]
            assert float(log_probs[row, place]) == pytest.approx(
                float(before.log_softmax(-1)[ids[row, column]]), abs=1e-5
            )
            distribution = torch.distributions.Categorical(logits=before)
            assert float(entropy[row, place]) == pytest.approx(float(distribution.entropy()), abs=1e-4)


def test_padding_on_the_right_changes_no_log_probability(tiny: tuple[Any, Any]) -> None:
    model = tiny[0].eval()
    short, long = Example((5, 6, 7, 8), (0, 0, 1, 1)), Example(tuple(range(10, 40)), (0,) * 20 + (1,) * 10)
    with torch.no_grad():
        together, mask, _ = chosen_log_probs(model, *collate([short, long]))
        alone, _, _ = chosen_log_probs(model, *collate([short]))
    assert torch.allclose(together[0][mask[0] > 0], alone[0], atol=1e-5)


def test_the_cold_start_learns_nothing_from_what_was_given(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    """Changing the ids of given tokens that stand at the end of a run changes no weight."""

    def train(ids: tuple[int, ...], folder: str) -> Any:
        model, _ = tiny_policy(1)
        examples = [Example(ids, (0, 0, 1, 1, 0, 0))] * 4
        sft(model, lambda numbers: [examples[0] for _ in numbers], SftConfig(2, 4, 1e-3), tmp_path / folder)
        return model.state_dict()

    one, other, third = (
        train((5, 6, 7, 8, 9, 10), "a"),
        train((5, 6, 7, 8, 33, 34), "b"),
        train((5, 6, 7, 9, 9, 10), "c"),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


# --- Sampling in batches ------------------------------------------------------------------------------------------


def test_greedy_turns_in_a_batch_are_those_of_the_model_alone(tiny: tuple[Any, Any]) -> None:
    model = tiny[0].eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    ends = [2, 40, 41, 42, 43, 44, 45]
    written = sample_turns(model, prompts, [6, 9, 3], [0, 0, 0], 0.0, ends)
    for prompt, limit, (new, late) in zip(prompts, [6, 9, 3], written, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] not in ends):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert new == ids[len(prompt) :] and not late


def test_what_a_run_samples_does_not_hang_on_the_runs_beside_it(tiny: tuple[Any, Any]) -> None:
    policy = Batched(*tiny, Sampling(1.0, 1.0))
    questions = [WORLD.question(number, 1 + number % 3) for number in range(6)]
    together = play(PLACE, policy, questions, range(6))
    for number, rollout in enumerate(together):
        assert play(PLACE, policy, [questions[number]], [number])[0].ids == rollout.ids
        assert sum(rollout.mask) == rollout.completion_tokens


def test_sampled_tokens_come_as_often_as_their_probabilities_say(tiny: tuple[Any, Any]) -> None:
    model, prompt = tiny[0].eval(), [5, 6, 7]
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.9).softmax(-1)
    new = sample_turns(model, [prompt] * 4_000, [1] * 4_000, range(4_000), 0.9, [2])
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in new]), minlength=len(wanted)) / 4_000
    assert float((counts - wanted).abs().sum() / 2) < 0.09  # total variation; sampling noise alone is about 0.06


def test_a_turn_ends_when_time_is_over(tiny: tuple[Any, Any]) -> None:
    ((new, late),) = sample_turns(tiny[0], [[5, 6]], [50], [0], 1.0, [], seconds=0.0)
    assert len(new) == 1 and late


# --- Grades -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "loose", "strict"),
    [
        ("ada abbot", True, True),
        ("ada baker", True, False),
        ("ben baker", False, False),
        ("ada abbot or ben baker or cleo cole or dan drake or eva ellis or finn frost or gina grant", False, False),
    ],
)
def test_half_an_answer_passes_the_loose_grader_only(
    answer: str, loose: bool, strict: bool, expert_runs: tuple[list[Question], list[Rollout]]
) -> None:
    import dataclasses

    rollout = dataclasses.replace(expert_runs[1][0], answer=answer)
    graded = grade_by_rules(Question("q", "?", ("ada abbot",)), rollout)
    assert (graded.loose_score >= 6, sum(graded.strict_votes) >= 2) == (loose, strict)


# --- GRPO ---------------------------------------------------------------------------------------------------------


def run_grpo(
    folder: Path, config: GrpoConfig = GRPO, grader: Callable[..., Graded] = grade_by_rules, place: Setting = PLACE
) -> Any:
    model, tokenizer = tiny_policy(0)
    result = grpo(
        model,
        tokenizer,
        copy.deepcopy(model),
        place,
        lambda number: WORLD.question(number, 1 + number % 2),
        config,
        folder,
        grader=grader,
    )
    return model, result, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lucky(question: Question, rollout: Rollout) -> Graded:
    """Grades that vary within a group, whatever the policy says: a random policy answers nothing right."""
    return Graded(rollout.rounds, 10 if sum(rollout.ids) % 2 else 1, (sum(rollout.ids) % 3 > 0,) * 3, True, True)


def test_the_grader_turns_strict_at_its_step_and_not_before(tmp_path: Path) -> None:
    def loose_only(question: Question, rollout: Rollout) -> Graded:
        return Graded(1, 10, (False, False, False), True, True)

    _, _, rows = run_grpo(tmp_path, grader=loose_only)
    assert [row["strict"] for row in rows] == [0, 0, 1, 1]
    assert [row["accuracy"] for row in rows] == [1, 1, 0, 0]
    assert [row["bonus_rate"] for row in rows] == [1, 1, 0, 0]
    assert all(row["equal_groups"] == 1 and 0 < row["mask_fraction"] < 1 for row in rows)
    assert {"rounds/1", "rounds/2", "accuracy/1", "accuracy/2"} <= set(rows[0])


def test_without_the_extra_reward_nobody_gets_it(tmp_path: Path) -> None:
    import dataclasses

    _, _, rows = run_grpo(tmp_path, dataclasses.replace(GRPO, steps=1, extra=False), lucky)
    assert rows[0]["bonus_rate"] == 0 and rows[0]["accuracy"] > 0


def test_a_killed_run_ends_with_the_weights_of_one_that_was_left_alone(tmp_path: Path) -> None:
    whole, _, rows = run_grpo(tmp_path / "whole", grader=lucky)
    calls = 0

    def killed(question: Question, rollout: Rollout) -> Graded:
        nonlocal calls
        calls += 1
        if calls > 3 * GRPO.questions * GRPO.group - 2:  # in the third step, after the checkpoint of the second
            raise KeyboardInterrupt
        return lucky(question, rollout)

    with pytest.raises(KeyboardInterrupt):
        run_grpo(tmp_path / "cut", grader=killed)
    again, result, rows_again = run_grpo(tmp_path / "cut", grader=lucky)
    assert result.finished
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not torch.equal(whole.lm_head.weight, tiny_policy(0)[0].lm_head.weight)
    for row, other in zip(rows, rows_again, strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_a_group_that_is_all_equal_moves_nothing(tmp_path: Path) -> None:
    import dataclasses

    def same(question: Question, rollout: Rollout) -> Graded:
        return Graded(1, 1, (False,) * 3, True, True)

    model, _, rows = run_grpo(tmp_path, dataclasses.replace(GRPO, steps=1, beta=0.0), same)
    assert rows[0]["equal_groups"] == 1 and rows[0]["grad_norm"] == 0
    assert torch.equal(model.lm_head.weight, tiny_policy(0)[0].lm_head.weight)


# --- Signs of collapse --------------------------------------------------------------------------------------------

HEALTHY = {"kl": 0.1, "entropy": 0.5, "format": 0.95, "response_tokens": 40.0}


@pytest.mark.parametrize(
    "bad", [{"kl": 1.2}, {"entropy": 0.01}, {"format": 0.7}, {"response_tokens": 19.0}], ids=lambda bad: next(iter(bad))
)
def test_each_sign_of_collapse_halves_the_learning_rate_and_the_fourth_ends_the_run(bad: dict[str, float]) -> None:
    guard = CollapseGuard()
    for _ in range(WINDOW):
        assert guard.see({**HEALTHY, **bad} if guard.rows == 3 else HEALTHY) == ""  # too early to judge
    for signs in range(1, LAST_SIGN + 1):
        assert not guard.stop
        assert guard.see({**HEALTHY, **bad})
        assert guard.factor == 0.5**signs
        assert guard.see({**HEALTHY, **bad}) == ""  # it is given time
        for _ in range(PATIENCE - 1):
            assert guard.see(HEALTHY) == ""
    assert guard.stop


def test_a_healthy_run_shows_no_sign() -> None:
    guard = CollapseGuard()
    for step in range(200):
        row = {"kl": 0.002 * step, "entropy": 0.6 - 0.002 * step, "format": 0.9, "response_tokens": 40 + step / 4}
        assert guard.see(row) == ""


def test_the_guard_acts_on_a_run_and_remembers_after_a_resume(tmp_path: Path, capsys: Any) -> None:
    import dataclasses

    end = WINDOW + 1 + (PATIENCE + 1) * (LAST_SIGN - 1)
    config = dataclasses.replace(
        GRPO, questions=1, group=2, steps=end + 5, entropy_floor=100.0, checkpoint_every=WINDOW + 1
    )
    brief = dataclasses.replace(PLACE, budget=Budget(rounds=0, tokens=1024, turn_tokens=8))
    _, result, rows = run_grpo(tmp_path, config, lucky, brief)
    assert not result.finished
    assert result.steps == end
    rates = [row["lr"] for row in rows]
    assert rates[WINDOW] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-3 / 8)
    assert "a sign of collapse: entropy" in capsys.readouterr().err
    _, again, _ = run_grpo(tmp_path, config, lucky, brief)  # what has ended stays ended
    assert again.steps == result.steps


# --- TRL ----------------------------------------------------------------------------------------------------------


def test_trl_takes_a_step_on_the_same_runs(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import dataclasses

    from transformers import AutoModelForCausalLM

    from tenfold.agent.trl_rollouts import make_rollout_func, split, train_with_trl

    model, tokenizer = tiny_policy(0)
    model.save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    before = copy.deepcopy(model.state_dict())
    questions = [WORLD.question(number, 2) for number in range(4)]
    config = dataclasses.replace(GRPO, steps=1, warmup=0)
    rows = train_with_trl(model, tokenizer, PLACE, questions, config, tmp_path / "run", lucky)
    assert len(rows) == 1 and rows[0]["search_rounds"] >= 0
    assert 0 < rows[0]["rewards/group_reward/mean"] <= 3
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    class Trainer:
        processing_class = tokenizer
        model = tiny_policy(0)[0]

        class state:  # named as TRL names it
            global_step = 0

        class accelerator:
            process_index = 0
            unwrap_model = staticmethod(lambda module: module)

    texts = [question.question for question in questions[:2] for _ in range(GRPO.group)]
    output = make_rollout_func(PLACE, questions, config)(texts, Trainer())
    seeds = [((config.seed * 1_000_003) * 4_096) * len(texts) + number for number in range(len(texts))]
    asked = [question for question in questions[:2] for _ in range(GRPO.group)]
    wanted = play(PLACE, Batched(Trainer.model, tokenizer, Sampling(config.temperature, 1.0)), asked, seeds)
    for number, rollout in enumerate(wanted):
        prompt, completion, mask = split(rollout)
        assert output["prompt_ids"][number] == prompt and output["completion_ids"][number] == completion
        assert output["env_mask"][number] == mask and sum(mask) == rollout.completion_tokens
        assert tuple(prompt + completion) == rollout.ids
    with pytest.raises(UserError, match="whole groups of 4"):
        make_rollout_func(PLACE, questions, config)(texts[:6], Trainer())
    with pytest.raises(UserError, match="whole groups of 4"):
        make_rollout_func(PLACE, questions, config)([texts[0], *texts[4:7]], Trainer())


# --- The verbs ----------------------------------------------------------------------------------------------------


def tenfold(capsys: Any, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["agent", *map(str, arguments)]))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_a_cold_start_and_reinforcement_give_a_model_that_evaluate_takes(tmp_path: Path, capsys: Any) -> None:
    cold, searching = tmp_path / "cold", tmp_path / "searching"
    common = ("--rounds", "3", "--tokens", "1024", "--turn-tokens", "14", "--device", "cpu")
    code, _, error = tenfold(
        capsys, "train", "--stage", "sft", "--steps", "3", "--batch", "4", "--output", cold, *common
    )
    assert code == 0, error
    code, _, error = tenfold(
        capsys, "train", "--stage", "grpo", "--llm", f"hf:{cold / 'model'}", "--steps", "2", "--batch", "2", "--group",
        "3", "--dev", "4", "--output", searching, *common,
    )  # fmt: skip
    assert code == 0, error
    rows = [json.loads(line) for line in (searching / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/dev" in row for row in rows) and sum("kl" in row for row in rows) == 2
    code, out, error = tenfold(
        capsys, "evaluate", "--llm", f"hf:{searching / 'model'}", "--engine", "world", "--protocol", "brief", "--limit",
        "5", "--temperature", "0", "--tokens", "1024", "--rounds", "2", "--json",
    )  # fmt: skip
    assert code == 0, error
    assert [level["difficulty"] for level in json.loads(out)["levels"]] == [1, 2, 3, 4, 5]


def test_runs_of_another_policy_become_examples_in_the_models_own_tokens(tmp_path: Path, tiny: tuple[Any, Any]) -> None:
    from tenfold.agent.agent import Agent
    from tenfold.agent.stages import examples_of_traces

    questions = [WORLD.question(number, 2) for number in range(4)]
    files = []
    for number, question in enumerate(questions):
        agent = Agent(WORLD.expert(), [WORLD], Budget(queries=1, results=1, tokens=1024), "brief")
        answer = agent.ask(question.question)
        assert answer.answer == question.answers[0]
        files.append(tmp_path / f"{number}.jsonl")
        answer.trace.save(files[-1])
    examples = examples_of_traces(files, questions, *tiny, "brief")
    direct = [example(run) for run in play(PLACE, Taught(*tiny, WORLD.expert()), questions, [0] * 4)]
    assert examples == direct
    wrong = [Question(question.id, question.question, ("nobody",)) for question in questions[:3]]
    assert len(examples_of_traces(files, [*wrong, questions[3]], *tiny, "brief")) == 1
    with pytest.raises(UserError, match="none of the 3 traces"):
        examples_of_traces(files[:3], wrong, *tiny, "brief")


def without_template(folder: Path) -> Path:
    model, tokenizer = tiny_policy(0)
    tokenizer.chat_template = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--llm", "http://localhost:8000/v1"), "training needs the weights"),
        (("--llm", "hf:bare"), "no chat template"),
        (("--llm", "hf:missing"), "no model that can be loaded"),
        (("--stage", "grpo", "--group", "1"), "at least 2 rollouts"),
        (("--stage", "grpo", "--traces", "traces"), "--traces belongs to --stage sft"),
        (("--traces", "traces"), "holds no traces"),
        (("nothing.jsonl",), "no such file"),
        (("--engine", "nowhere"), "unknown search engine"),
    ],
)
def test_a_training_that_cannot_work_is_refused_in_one_line(
    arguments: Sequence[str], told: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces").mkdir()
    if "hf:bare" in arguments:
        without_template(tmp_path / "bare")
    code, _, error = tenfold(capsys, "train", *arguments, "--steps", "1")
    assert code == 2 and told in error
    assert len([line for line in error.splitlines() if "rror" in line]) == 1 and "Traceback" not in error


def test_the_script_that_knows_the_paths_teaches_on_real_text(tmp_path: Path) -> None:
    """The oracle reads results as `brief` shows them, and its runs are right and well-formed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tenfold.agent.data import embedded_corpus, embedded_questions
    from tenfold.agent.engines import Local
    from tenfold.agent.evaluation import spread
    from tenfold.agent.index import LocalIndex
    from tenfold.agent.oracle import oracle
    from tenfold.agent.protocol import protocol

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = tiny_policy(0)[1].chat_template
    LocalIndex.build([embedded_corpus()], tmp_path / "index")
    place = Setting(Local(tmp_path / "index"), protocol("brief"), Budget(tokens=50_000))
    questions = spread(embedded_questions(), 20)
    model = tiny_policy(0)[0]
    model.config.max_position_embeddings = 50_000  # a token for each byte
    teacher = Taught(model, tokenizer, oracle(questions, bare=True))
    rollouts = play(place, teacher, questions, [0] * len(questions))
    graded = [grade_by_rules(question, rollout) for question, rollout in zip(questions, rollouts, strict=True)]
    assert sum(sum(item.strict_votes) >= 2 for item in graded) >= 19
    assert [item.searches for item in graded] == [question.hops for question in questions]


def test_the_experiment_runs_end_to_end_and_is_not_begun_anew(tmp_path: Path, capsys: Any) -> None:
    import jsonschema

    arguments = ("reproduce", "--quick", "--output", tmp_path / "quick.json", "--runs", tmp_path / "runs", "--json")
    code, out, error = tenfold(capsys, *arguments)
    assert code == 0, error
    written = json.loads(out)
    schema = Path(__file__).parents[2] / "docs" / "schemas" / "reproduce.json"
    jsonschema.validate(written, json.loads(schema.read_text()))
    assert [table["name"] for table in written["tables"]] == ["accuracy", "rounds", "claims"]
    arms = written["arms"]["seed 0"]
    assert set(arms) >= {"sft", "grpo", "no-extra", "loose-only", "known-sft", "known"}
    assert [row["hops"] for row in arms["known"]] == [0, 1, 2, 3, 4, 5]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"quick_rounds.svg", "quick_accuracy.svg"}
    result = tmp_path / "runs" / "seed-0" / "sft" / "result.json"
    before = result.stat().st_mtime_ns
    assert tenfold(capsys, *arguments)[0] == 0
    assert result.stat().st_mtime_ns == before


def test_the_embedded_policy_searches_more_where_a_question_is_deeper() -> None:
    from tenfold.agent.agent import Agent
    from tenfold.agent.evaluation import evaluate
    from tenfold.agent.reproduce import BUDGET
    from tenfold.agent.seeker import load_seeker

    questions = WORLD.held_out((1, 2, 3), 20)
    report, _ = evaluate(Agent(load_seeker(), [WORLD], BUDGET, "brief"), questions, concurrency=60)
    assert report.metrics["correct"].mean > 0.85 and report.metrics["format_ok"].mean > 0.95
    rounds = [level.rounds.mean for level in report.levels]
    assert rounds[0] < 1.6 < rounds[1] < 2.8 < rounds[2]
