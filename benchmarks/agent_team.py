"""Template puzzles, and one agent against a planner with researchers on them: `python -m benchmarks.agent_team`.

Both are scripts that follow a puzzle's known path, so that what differs is the form of the work and nothing else. They
have the same rounds, and the same longest conversation. A run that ended within a number of tokens, read and written
over all requests, would have ended the same way had that been its limit: this gives accuracy by total cost.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from tenfold.agent.agent import Agent
from tenfold.agent.config import Budget
from tenfold.agent.data import Question, embedded_corpus, read_questions
from tenfold.agent.engines import Local
from tenfold.agent.evaluation import spread
from tenfold.agent.index import LocalIndex
from tenfold.agent.oracle import oracle
from tenfold.agent.team_oracle import team_oracle
from tenfold.agent.webpuzzle.checks import is_right
from tenfold.agent.webpuzzle.stages import finish_puzzles, make_pool, make_puzzles, verify_puzzles
from tenfold.core import console
from tenfold.core.results import Table, write_results

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "agent_team.json"
# (tokens of a conversation, results of a search); rounds are 10 in all cases.
CASES = ((20_000, 2), (20_000, 5), (2_400, 2), (1_800, 2))
ROUNDS, QUESTIONS = 10, 150
TOTALS = (2_000, 4_000, 8_000, 16_000, 32_000)


def _measure(
    questions: list[Question], engine: Local, mode: str, budget: Budget
) -> list[tuple[Question, bool, int, int]]:
    """Of each question: whether it was right, rounds, and tokens over all requests."""
    agent = Agent(team_oracle(questions) if mode == "team" else oracle(questions), [engine], budget)

    async def all_of_them() -> list[tuple[Question, bool, int, int]]:
        rows = []
        for question in questions:
            answer = await agent.ask_async(question.question, mode="team" if mode == "team" else "answer")
            spent = answer.rollout.prompt_tokens + answer.rollout.completion_tokens
            rows.append((question, is_right(answer.answer, question.answers), answer.rounds, spent))
        return rows

    return asyncio.run(all_of_them())


def main() -> None:
    """Measure and write the tables."""
    began = time.perf_counter()
    by_case = []
    by_cost = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LocalIndex.build([embedded_corpus()], folder / "index")
        engine = Local(folder / "index")
        make_pool(folder / "puzzles", engine, "CC BY-SA 4.0")
        make_puzzles(folder / "puzzles", engine)
        drafts = verify_puzzles(folder / "puzzles", engine)
        finish_puzzles(folder / "puzzles")
        questions = spread(read_questions(folder / "puzzles" / "puzzles.jsonl"), QUESTIONS)
        for tokens, results in CASES:
            for mode in ("single", "team"):
                rows = _measure(questions, engine, mode, Budget(ROUNDS, results=results, tokens=tokens))
                levels = [[right for question, right, _, _ in rows if question.hops == hops] for hops in range(1, 6)]
                share = [f"{sum(level) / len(level):.2f}" for level in levels]
                rounds = sum(row[2] for row in rows) / len(rows)
                spent = sum(row[3] for row in rows) / len(rows)
                case = f"{tokens:,} tokens, {results} results: {mode}"
                by_case.append((case, *share, f"{rounds:.2f}", f"{spent:.0f}"))
                if (tokens, results) == CASES[0]:
                    within = [
                        sum(right and cost <= total for _, right, _, cost in rows) / len(rows) for total in TOTALS
                    ]
                    by_cost.append((mode, *(f"{value:.2f}" for value in within)))
    puzzles = []
    for hops in range(1, 6):
        level = [row for row in drafts if row["hops"] == hops]
        kept = sum(row["kept"] for row in level)
        unsound = sum(
            any(passed is False for check, passed in row["checks"].items() if check != "needs_several_searches")
            for row in level
        )
        found = sum(row["one_search_finds_it"] for row in level) / len(level)
        ends = len({row["pages"][-1] for row in level if row["kept"]})
        puzzles.append((str(hops), len(level), unsound, f"{found:.3f}", kept, ends))
    tables = [
        Table(
            "puzzles",
            "Template puzzles over the 6,119 built-in pages: drafts, those that fail a check other than that of one "
            "search, the share whose answer one search for the question shows, those that are kept, and on how many "
            "different pages their answers are",
            ("hops", "drafts", "unsound", "one search", "kept", "answer pages"),
            puzzles,
        ),
        Table(
            "modes",
            f"Right answers of two scripts that know each puzzle's path, by hops, on {len(questions)} template puzzles "
            f"with {ROUNDS} rounds of search and conversations of at most so many tokens; mean rounds, and tokens read "
            "and written over all requests of a question",
            ("longest conversation", "1 hop", "2", "3", "4", "5", "rounds", "tokens in all"),
            by_case,
        ),
        Table(
            "cost",
            "Share of all puzzles answered rightly within so many tokens, read and written over all requests "
            "(20,000 tokens a conversation, 2 results a search)",
            ("", *(f"{total:,}" for total in TOTALS)),
            by_cost,
        ),
    ]
    for table in tables:
        console.table(table.columns, table.rows, title=table.caption)
    write_results(
        OUTPUT,
        room="agent",
        kind="benchmark",
        seconds=time.perf_counter() - began,
        tables=tables,
        config={"cases": CASES, "rounds": ROUNDS, "questions": QUESTIONS},
        packages=["tantivy", "rapidfuzz"],
    )


if __name__ == "__main__":
    main()
