from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from tenfold.agent.agent import Agent
from tenfold.agent.data import Question, embedded_corpus, embedded_questions
from tenfold.agent.engines import Local
from tenfold.agent.evaluation import Row, bootstrap, evaluate, spearman, spread, summarise, tables
from tenfold.agent.index import LocalIndex
from tenfold.agent.oracle import oracle, read_date
from tenfold.agent.policies import PolicyError, Scripted
from tenfold.core.console import UserError


@pytest.fixture(scope="module")
def wiki(tmp_path_factory: pytest.TempPathFactory) -> LocalIndex:
    folder = tmp_path_factory.mktemp("wiki")
    LocalIndex.build([embedded_corpus()], folder)
    return LocalIndex.load(folder)


def test_the_scripted_oracle_answers_what_it_should_in_as_many_rounds_as_hops(wiki: LocalIndex) -> None:
    questions = spread(embedded_questions(), 400)
    assert sum(question.hops == 2 for question in questions) > 150
    report, rows = evaluate(Agent(oracle(questions), [Local(wiki)]), questions)
    assert report.metrics["correct"].mean >= 0.97  # the bar; all 1,126 give 0.995
    hops = {question.id: question.hops for question in questions}
    right = [row for row in rows if row.correct]
    assert all(row.rounds == hops[row.id] for row in right)
    assert all(row.citations == row.supported == 1 for row in right)
    assert all(row.format_ok and row.status == "answered" for row in rows)
    assert report.spearman is not None and report.spearman > 0.98
    assert report.spearman_p is not None and report.spearman_p < 0.01
    assert [level.difficulty for level in report.levels] == [1, 2, 3]
    assert "Spearman" in tables(report)[1][0]


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(wiki: LocalIndex, tmp_path: Path) -> None:
    questions = spread(embedded_questions(), 12)

    def run(folder: str) -> bytes:
        evaluate(Agent(oracle(questions), [Local(wiki)]), questions, tmp_path / folder, repeats=2)
        return (tmp_path / folder / "rows.jsonl").read_bytes()

    whole = run("whole")
    assert run("whole") == whole  # nothing is asked again
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 24
    for kept in (0, 1, 7):
        folder = tmp_path / f"cut{kept}"
        folder.mkdir()
        (folder / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
        # What a kill leaves: some rows in the order in which they came, the last one cut.
        some = random.Random(kept).sample(lines, kept)
        (folder / "rows.jsonl").write_bytes(b"".join(some) + lines[-1][:20])
        assert run(folder.name) == whole
    with pytest.raises(UserError, match="another seed"):
        evaluate(Agent(oracle(questions), [Local(wiki)]), questions, tmp_path / "whole", repeats=2, seed=5)


def test_an_endpoint_that_is_gone_ends_the_run_and_a_single_failure_does_not(wiki: LocalIndex) -> None:
    questions = spread(embedded_questions(), 12)
    script = oracle(questions).script

    def gone(messages: object) -> str:
        raise PolicyError("unreachable", "not reached")

    with pytest.raises(UserError, match="5 questions failed one after another"):
        evaluate(Agent(Scripted(gone), [Local(wiki)]), questions, concurrency=1)

    def once(messages: list[dict]) -> str:
        if questions[3].question in messages[0]["content"]:
            raise PolicyError("bad answer", "broken")
        return script(messages)  # type: ignore[operator, return-value]

    report, rows = evaluate(Agent(Scripted(once), [Local(wiki)]), questions)  # type: ignore[arg-type]
    assert len(rows) == 11 and report.failed == (f"{questions[3].id}: broken",)


def test_questions_that_cannot_be_told_apart_are_refused(wiki: LocalIndex) -> None:
    agent = Agent(Scripted(["x"]), [Local(wiki)])
    same = [Question("a", "Who?", ("x",)), Question("a", "Where?", ("y",))]
    with pytest.raises(UserError, match="names have to differ"):
        evaluate(agent, same)
    with pytest.raises(UserError, match="no questions"):
        evaluate(agent, [])


def test_repeats_count_as_one_question() -> None:
    row = Row("a", 0, 1, "", "answered", 1.0, 1, 1, 1, 1, True, 1, 1, 0, 0, 9, 9, 9, 0, 0)
    rows = [dataclasses.replace(row, id=name, repeat=n, correct=c) for name, n, c in
            [("a", 0, 1.0), ("a", 1, 0.0), ("b", 0, 1.0), ("b", 1, 1.0)]]  # fmt: skip
    report = summarise(rows)
    assert (report.questions, report.repeats) == (2, 2)
    assert report.metrics["correct"].mean == 0.75
    assert report.metrics["correct"].low >= 0.5  # means of questions are 0.5 and 1
    assert report.spearman is None
    assert json.dumps(dataclasses.asdict(report))


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draw = random.Random(0)
    covered = 0
    for number in range(100):
        found = bootstrap([float(draw.random() < 0.3) for _ in range(60)], number)
        covered += found.low <= 0.3 <= found.high
    assert 88 <= covered <= 100


def test_rank_correlation_counts_ties_at_their_mean_rank() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx((1.0, 0.09), abs=0.05)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1])[0] == pytest.approx(-1.0)  # type: ignore[index]
    # By hand: ranks 1.5 1.5 3 4 and 1 2 3.5 3.5, so 4 / 4.5.
    assert spearman([1, 1, 2, 3], [1, 2, 5, 5])[0] == pytest.approx(8 / 9)  # type: ignore[index]
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_a_limit_is_spread_over_the_levels() -> None:
    questions = embedded_questions()
    taken = spread(questions, 11)
    assert [sum(question.hops == hops for question in taken) for hops in (1, 2, 3)] == [5, 5, 1]
    assert spread(questions, None) == questions and len(spread(questions, 10**6)) == len(questions)
    with pytest.raises(UserError, match="at least 1"):
        spread(questions, 0)


@pytest.mark.parametrize(
    ("text", "relation", "date"),
    [
        ("A (born 3 May 1900) was lit. B died in 1950.", "born", "3 May 1900"),
        ("A (3 May 1900 – 4 June 1950) was a lamp.", "died", "4 June 1950"),
        ("A (May 3, 1900 - June 4, 1950) was a lamp.", "born", "May 3, 1900"),
        ("A was a lamp. She died on 4 June 1950.", "died", "4 June 1950"),
        ("A was a lamp.", "born", None),
    ],
)
def test_the_oracle_reads_dates_as_they_are_written(text: str, relation: str, date: str | None) -> None:
    assert read_date(text, relation) == date
