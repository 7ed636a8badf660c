"""The needle sweep: needles where they should be, scores by their definition, the better base taken and written."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny_models import language_model

from tenfold import cli as front_door
from tenfold.core.console import UserError
from tenfold.llm import context
from tenfold.llm.checkpoint import load_model
from tenfold.llm.context import extend, haystack, sweep
from tenfold.llm.tokenizer import ByteTokenizer

HAY = "It was a quiet street, and nobody spoke. " * 60


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_at_its_depth_and_its_number_is_asked_for_at_the_end(depth):
    hay = list(HAY.encode())
    found = haystack(ByteTokenizer().encode, hay, 200, depth, random.Random(1))
    assert len(found.ids) == 201 and found.answer == 5
    text = bytes(found.ids.tolist()).decode()
    question = text[: -found.answer].rpartition(" The secret number of ")[2]
    name = question.removesuffix(" is")
    needle = f" The secret number of {name} is{text[-found.answer :]}."
    start = text.index(needle)
    rest = 201 - len(needle) - len(f" The secret number of {name} is") - found.answer
    assert start == round(depth * rest)
    assert text[:start] + text[start + len(needle) : start + len(needle) + rest - start] in HAY  # the hay is whole


def test_a_target_without_room_for_a_needle_is_refused():
    with pytest.raises(UserError, match="target 20: needle, question and answer alone have"):
        haystack(ByteTokenizer().encode, list(HAY.encode()), 20, 0.5, random.Random(0))


def test_scores_are_those_of_the_model_with_each_base():
    model = language_model(context=64)
    result = sweep(model, HAY, 150, [1e4, 1e6], depths=3, needles=1, seed=4)
    assert model.model.rotary.base == 1e4  # as before
    assert (result.trained_base, result.trained_context, result.depths) == (1e4, 64, (0.0, 0.5, 1.0))
    draw = random.Random(4)
    questions = [haystack(model.tokenizer.encode, list(HAY.encode()), 150, depth, draw) for depth in (0, 0.5, 1)]
    for score in result.scores:
        model.model.rotary.base = score.rope_base
        shares, nats = [], []
        for question in questions:
            with torch.no_grad():
                log = model.model(question.ids[None, :-1])[0, -question.answer :].log_softmax(-1)
            answer = question.ids[-question.answer :]
            shares.append((log.argmax(-1) == answer).double().mean().item())
            nats.append(-log.gather(1, answer[:, None]).mean().item())
        assert score.by_depth == pytest.approx(shares) and score.found == pytest.approx(sum(shares) / 3)
        assert score.answer_nats == pytest.approx(sum(nats) / 3, abs=1e-4)
        with torch.no_grad():
            log = model.model(torch.tensor([list(HAY.encode()[:150])]))[0].log_softmax(-1)
        wanted = torch.tensor(list(HAY.encode()[1:151]))
        assert score.loss == pytest.approx(-log.gather(1, wanted[:, None]).mean().item(), abs=1e-4)


def test_the_base_that_finds_most_is_taken_and_of_equals_the_one_with_the_lower_loss(monkeypatch):
    table = {1e4: (0.5, 2.0), 1e5: (0.9, 3.0), 1e6: (0.9, 2.5), 1e7: (0.2, 1.0)}
    monkeypatch.setattr(
        context, "_score", lambda model, base, *rest: context.BaseScore(base, table[base][0], (), 0.0, table[base][1])
    )
    assert sweep(language_model(), HAY, 150, list(table)).best == 1e6


def test_the_model_is_as_before_when_a_sweep_fails(monkeypatch):
    model = language_model()

    def fails(*inputs):
        raise UserError("not finite")

    monkeypatch.setattr(context, "next_token_scores", fails)
    with pytest.raises(UserError):
        sweep(model, HAY, 150, [1e7])
    assert model.model.rotary.base == 1e4


def test_a_copy_has_the_new_base_and_context_and_the_same_weights(tmp_path):
    model = language_model(norm="dssn", context=64)
    extend(model, 1.6e6, 4096, tmp_path / "long")
    assert (model.model.config.rope_base, model.context) == (1e4, 64)
    loaded = load_model(tmp_path / "long")
    assert (loaded.model.config.rope_base, loaded.model.config.context) == (1.6e6, 4096)
    assert loaded.model.rotary.base == 1.6e6
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `tenfold llm extend-context MODEL ...` on a tiny model: exit status, standard output, standard error."""
    monkeypatch.setenv("TENFOLD_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    language_model(context=64).to_hf("model")
    (tmp_path / "hay.txt").write_text(HAY)

    def call(*arguments):
        status = front_door.main(["llm", "extend-context", "model", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_verb_prints_a_table_writes_a_copy_and_gives_json(run):
    arguments = ("--target", 150, "--bases", "1e4,1e6", "--text", "hay.txt", "--depths", 2, "--needles", 1)
    status, out, _ = run(*arguments, "-o", "long")
    assert status == 0 and "trained with base 10000 to 64 tokens, run at 150" in out and "wrote long" in out
    status, out, _ = run(*arguments, "--json")
    result = json.loads(out)
    assert [score["rope_base"] for score in result["scores"]] == [1e4, 1e6]
    assert load_model("long").model.config.rope_base == result["best"]


def test_the_built_in_text_is_long_enough_for_long_targets():
    assert len(context.built_in_text()) > 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bases", "1e4,huge"), "--bases: 'huge' is not a number"),
        (("--bases", "1e4,-5"), "bases: -5.0: give one or more positive numbers"),
        (("--bases", "inf"), "bases: inf"),
        (("--target", "5000"), "the haystack has 2460 tokens, and the target is 5000: give a longer --text"),
        (("--target", "10"), "target 10: needle, question and answer alone"),
        (("--depths", "0"), "depths 0, needles 2"),
        (("--text", "none.txt"), "none.txt: No such file"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(run, arguments, message):
    given = {"--target": "150", "--bases": "1e4", "--text": "hay.txt"} | dict([arguments])
    status, _, err = run(*(part for pair in given.items() for part in pair))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
