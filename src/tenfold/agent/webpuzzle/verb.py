"""The verb `webpuzzle` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from tenfold.agent.config import Budget, Sampling
from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName

KindName = Literal["template", "cross_page", "riddle"]


def webpuzzle(
    stage: Positional[Literal["pool", "make", "verify", "tag", "stats"]],
    folder: Positional[Path],
    engine: str = "local:builtin",
    licence: str = "",
    kinds: tuple[KindName, ...] = ("template",),
    count: int = 300,
    llm: str = "",
    model: str = "",
    judge: str = "",
    judge_model: str = "",
    trials: int = 4,
    thresholds: tuple[int, int, int] = (4, 2, 1),
    rounds: int = 7,
    concurrency: int = 8,
    temperature: float = 0.6,
    device: DeviceName = "auto",
    seed: int = 0,
) -> object:
    """Make questions with known answers from an index: pool, make, verify, tag, stats, one after the other.

    Every stage goes on where it was stopped when it is run again with the same arguments.

    Args:
        stage: pool reads the pages, make drafts puzzles, verify checks them, tag lets an agent try each four times,
            stats writes what was kept as puzzles.jsonl, train.jsonl, dev.jsonl and test.jsonl.
        folder: where the stages are.
        engine: the index that the pages are in: local:FOLDER, or local:builtin.
        licence: for pool: of the pages' texts, which puzzles quote.
        kinds: for make: template needs no model; cross_page and riddle are written by --llm.
        count: for make: puzzles of each number of hops (template) and of each other kind.
        llm: as in `ask`. It writes (make), is asked whether it knows the answer and which page fits (verify), and tries
            the puzzles (tag). Without one, verify makes the checks that need none. `oracle` tries template puzzles.
        model: as in `ask`.
        judge: for tag: the address of a strict judge; the rules decide without one.
        judge_model: the judge's name at its address.
        trials: for tag: tries of each puzzle.
        thresholds: for tag: right tries from which a puzzle is easy, medium and hard.
        rounds: for tag: turns that may search.
        concurrency: requests at the same time.
        temperature: of the sampling.
        device: for a local model.
        seed: of draws and sampling.

    Example:
        tenfold agent webpuzzle pool puzzles --engine local:builtin --licence "CC BY-SA 4.0"
        tenfold agent webpuzzle make puzzles --count 300
        tenfold agent webpuzzle verify puzzles
        tenfold agent webpuzzle tag puzzles --llm http://localhost:8000/v1
        tenfold agent webpuzzle stats puzzles
    """
    from tenfold.agent.agent import Agent, policy_named
    from tenfold.agent.data import read_questions
    from tenfold.agent.engines import Local
    from tenfold.agent.engines import engine as engine_named
    from tenfold.agent.judges import Judge
    from tenfold.agent.oracle import oracle
    from tenfold.agent.webpuzzle import stages
    from tenfold.agent.webpuzzle.tagging import Thresholds

    if count < 1 or concurrency < 1 or trials < 1:
        raise UserError("count, concurrency and trials have to be at least 1")
    if stage == "stats":
        statistics = stages.finish_puzzles(folder, seed)
        _show(statistics)
        return statistics
    local = engine_named(engine, offline=True)
    if not isinstance(local, Local):
        raise UserError(f"{engine}: puzzles are made from an index: --engine local:FOLDER")
    if stage == "pool":
        pool = stages.make_pool(folder, local, licence)
        found = sum(len(page.facts) for page in pool.pages)
        console.say(f"{folder}: {len(pool)} pages, in which rules read {found} facts")
        return {"pages": len(pool), "facts": found}
    sampling = Sampling(temperature)
    if stage == "tag":
        if not llm:
            raise UserError("tag lets an agent try the puzzles: give --llm (an address, hf:FOLDER, or oracle)")
        if llm == "oracle":
            policy: Any = oracle(read_questions(folder / "verified.jsonl"))
        else:
            policy = policy_named(llm, model, sampling, device=device)
        agent = Agent(policy, [local], Budget(rounds=rounds))
        who = Judge(policy_named(judge, judge_model, Sampling(0.0))) if judge else None
        rows = stages.tag_puzzles(folder, agent, trials, Thresholds(*thresholds), who, seed, concurrency)
        tags = {name: sum(row["difficulty"] == name for row in rows) for name in stages.DIFFICULTIES}
        console.say(f"{folder}: {', '.join(f'{number} {name}' for name, number in tags.items())}")
        return {"puzzles": len(rows), "difficulty": tags}
    writer = policy_named(llm, model, sampling, device=device) if llm else None
    if stage == "make":
        drafts = stages.make_puzzles(folder, local, kinds, count, writer, seed)
        rejected = sum("rejected" in row for row in drafts)
        console.say(f"{folder}: {len(drafts) - rejected} drafts, {rejected} rejected")
        return {"drafts": len(drafts) - rejected, "rejected": rejected}
    checked = stages.verify_puzzles(folder, local, writer, concurrency)
    kept = sum(row["kept"] for row in checked)
    failed = sorted({name for row in checked for name, passed in row["checks"].items() if passed is False})
    counts = {name: sum(row["checks"].get(name) is False for row in checked) for name in failed}
    console.say(f"{folder}: {kept} of {len(checked)} puzzles pass")
    for name, number in counts.items():
        console.say(f"  {number} fail {name}")
    return {"checked": len(checked), "kept": kept, "failed": counts}


def _show(statistics: Any) -> None:
    from tenfold.agent.webpuzzle.tagging import DIFFICULTIES

    columns = ["kind", *DIFFICULTIES, "untagged", "all"]
    rows = [
        [kind, *(counts[name] for name in columns[1:-1]), sum(counts.values())]
        for kind, counts in statistics.by_kind.items()
    ]
    title = f"{statistics.kept} puzzles of {statistics.drafts} drafts from {statistics.pages} pages"
    console.table(columns, rows, title)
    if statistics.by_hops:
        console.table(["hops", "puzzles"], list(statistics.by_hops.items()))
    console.say(", ".join(f"{number} {name}" for name, number in statistics.splits.items()))
    if statistics.one_search is not None:
        console.say(f"one search shows the answer of {statistics.one_search:.3f} of the drafts of two and more hops")
