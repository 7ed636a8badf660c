"""The room's station: the built-in corpus is indexed, questions of one to three hops are answered by a script that
follows their paths, one run is shown turn by turn, and the small trained policy searches its closed world."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tenfold.agent import viewer
from tenfold.agent.agent import Agent, Answer
from tenfold.agent.data import Question, embedded_corpus, embedded_questions
from tenfold.agent.engines import Local
from tenfold.agent.evaluation import Report, Row, evaluate, spread
from tenfold.agent.index import LocalIndex
from tenfold.agent.oracle import oracle
from tenfold.agent.reproduce import BUDGET, HOPS, ideal_rounds
from tenfold.agent.seeker import load_seeker
from tenfold.agent.world import World
from tenfold.core.report import Figure, Station, interactive_panel, plot_lines, plot_panel, table_panel

_QUESTIONS = 81
# Of the closed world: questions of each depth.
_PER_DEPTH = 30


def _evaluated(
    agent: Agent, questions: Sequence[Question], concurrency: int = 8
) -> tuple[Report, list[Row], dict[str, Answer]]:
    """An evaluation with its answers by the questions' names."""
    answers: dict[str, Answer] = {}

    def keep(question: Question, answer: Answer) -> None:
        answers[question.id] = answer

    report, rows = evaluate(agent, questions, concurrency=concurrency, on_answer=keep)
    return report, rows, answers


def tour(workdir: Path) -> Station:
    """Run the station.

    Args:
        workdir: where the index is made.
    """
    built = LocalIndex.build([embedded_corpus()], workdir / "index")
    index = LocalIndex.load(workdir / "index")
    questions = spread(embedded_questions(), _QUESTIONS)
    started = time.perf_counter()
    for question in questions:
        index.search(question.question, 2)
    per_query_ms = 1_000 * (time.perf_counter() - started) / len(questions)
    report, rows, answers = _evaluated(Agent(oracle(questions), [Local(index)]), questions)
    deepest = max(rows, key=lambda row: (row.correct, row.rounds))
    hops = [float(level.difficulty) for level in report.levels]
    plot = plot_lines(
        {
            "scripted policy": (hops, [level.rounds.mean for level in report.levels]),
            "one round for each hop": (hops, hops),
        },
        "hops of the question",
        "rounds of search",
    )
    world = World()
    seeker = Agent(load_seeker(), [world], BUDGET, "brief")
    asked = world.held_out(HOPS, _PER_DEPTH)
    learned, learned_rows, runs = _evaluated(seeker, asked, concurrency=len(asked))
    depths = [float(level.difficulty) for level in learned.levels]
    scaling = plot_lines(
        {
            "trained policy": (depths, [level.rounds.mean for level in learned.levels]),
            "asking again after each miss": (depths, [ideal_rounds(hops) for hops in HOPS]),
        },
        "hops of the question",
        "rounds of search",
    )
    longest = max(learned_rows, key=lambda row: (row.correct, row.rounds))
    shown = [answers[row.id] for row in rows if row.correct][:: max(1, len(rows) // 5)][:5]
    supported, correct = report.metrics["supported"].mean, report.metrics["correct"].mean
    return Station(
        room="agent",
        title="An agent that searches, verifies and cites",
        paper="DeepDiver: Adaptive Search Intensity Scaling via Open-Web Reinforcement Learning, NeurIPS 2025, "
        "arXiv 2505.24332",
        claim="Trained by reinforcement on real pages, a 7B model searches more where a question is harder, and "
        "reaches models that are a hundred times as large.",
        command='tenfold agent ask "Who ...?" --llm http://localhost:8000/v1 --engine local:index --trace run.jsonl',
        panels=[
            plot_panel(
                plot,
                "Line: rounds of search grow with the hops of the question, one for one.",
                f"{report.questions} questions over the built-in corpus. The policy is a script that follows each "
                "question's path: this shows that loop, search and citations work, not that a model has learned.",
            ),
            interactive_panel(
                viewer.render_html(answers[deepest.id].trace),
                "The record of one run",
                f"The record of one run of {deepest.rounds} rounds, as `tenfold agent trace view` writes it.",
                height_px=560,
            ),
            plot_panel(
                scaling,
                "Two lines: rounds of search of the trained policy and those that its questions take, over one to five "
                "hops.",
                f"A policy of 150,000 parameters, trained by cold start and GRPO (`tenfold agent reproduce`), on "
                f"{learned.questions} questions of a closed world that begin with people whom it was not trained on. "
                f"Spearman of rounds and hops: {learned.spearman or 0:.2f}. Five hops were not trained.",
            ),
            table_panel(
                ["hops", "right", "rounds", "rounds of asking again after each miss"],
                [
                    (
                        level.difficulty,
                        f"{level.correct.mean:.2f}",
                        f"{level.rounds.mean:.2f}",
                        f"{ideal_rounds(level.difficulty):.2f}",
                    )
                    for level in learned.levels
                ],
                "The trained policy by depth.",
            ),
            interactive_panel(
                viewer.render_html(runs[longest.id].trace),
                "One run of the trained policy",
                f"The trained policy at work: {longest.rounds} rounds, some of which found nothing.",
                height_px=420,
            ),
            table_panel(
                ["question", "answer", "rounds", "the words that it rests on"],
                [
                    (
                        answer.question,
                        answer.answer,
                        answer.rounds,
                        answer.citations[0].quote[:160] if answer.citations else "-",
                    )
                    for answer in shown
                ],
                "Answers with their sources' own words.",
            ),
        ],
        figures=[
            Figure("answered right", f"{100 * correct:.1f}", "%", f"{report.questions} questions"),
            Figure("citations that their source carries", f"{100 * supported:.0f}", "%"),
            Figure("pages indexed", f"{built.documents:,}", "", f"in {built.seconds:.1f} s"),
            Figure("trained policy: Spearman of rounds and hops", f"{learned.spearman or 0:.2f}", ""),
            Figure("a query", f"{per_query_ms:.2f}", "ms", "mean over the questions"),
        ],
        notes=(
            "Corpus: first paragraphs of Wikipedia articles, CC BY-SA 4.0, by the authors of Wikipedia.",
            "No large language model is at work here; `ask` and `evaluate` take any OpenAI-compatible endpoint.",
        ),
    )
