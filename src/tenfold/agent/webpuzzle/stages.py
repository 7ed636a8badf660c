"""The stages of WebPuzzle: pool, make, verify, tag, stats. Each is a file of JSON lines in one folder.

A line is written whole as soon as its item is done, and a stage that was stopped, however, goes on with the same
arguments: lines that are there are not made again, a line that was cut is. At its end a stage puts its lines in order,
so that a run that was stopped and one that was not leave the same file.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tenfold.agent.data import json_line, read_rows
from tenfold.agent.policies import Policy
from tenfold.agent.webpuzzle.checks import all_checks, near_duplicates
from tenfold.agent.webpuzzle.lines import Lines, digest, read_stage
from tenfold.agent.webpuzzle.pool import Pool, page_of_row, read_page
from tenfold.agent.webpuzzle.tagging import DIFFICULTIES, Thresholds, try_once
from tenfold.agent.webpuzzle.template import templates
from tenfold.agent.webpuzzle.writing import RejectedError, write_cross_page, write_riddle
from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent
    from tenfold.agent.engines import Local
    from tenfold.agent.judges import Judge

T = TypeVar("T")
Kind = Literal["template", "cross_page", "riddle"]
KINDS: tuple[Kind, ...] = ("template", "cross_page", "riddle")
# Candidates that a model is asked about at once, and how many are tried for each puzzle that is wanted.
_WINDOW, _TRIES = 8, 5
# A page with less text has hardly three facts for a riddle.
_SHORTEST_PAGE = 150
SPLITS = (("train", 0.8), ("dev", 0.1), ("test", 0.1))


# --- pool ---------------------------------------------------------------------------------------------------------


def make_pool(folder: Path, engine: Local, licence: str = "") -> Pool:
    """Read every page of an index into the pool."""
    index = engine.index
    about = {"index": str(index.folder), "documents": len(index), "licence": licence}
    pages = []
    with (
        closing(Lines(folder, "pool", about, lambda row: str(row["url"]))) as lines,
        console.progress("reading", len(index)) as bar,
    ):
        for number, document in enumerate(index.documents()):
            page = read_page(number, document.url, document.title, document.text, document.sha256, document.date)
            pages.append(page)
            lines.add(page.row())
            bar.advance()
        lines.finish(page.row() for page in pages)
    return Pool(pages)


def load_pool(folder: Path, engine: Local) -> Pool:
    """The pool with the texts of its index.

    Raises:
        UserError: there is no pool, or the index has changed since it was read.
    """
    rows = read_stage(folder, "pool", "pool")
    texts = {document.url: (document.text, document.sha256) for document in engine.index.documents()}
    pages = []
    for row in rows:
        text, sha256 = texts.get(row["url"], ("", ""))
        if sha256 != row["sha256"]:
            raise UserError(
                f"{folder}: {row['url']} has changed since the pool was made: make a new pool in another folder"
            )
        pages.append(page_of_row(row, text))
    return Pool(pages)


# --- make ---------------------------------------------------------------------------------------------------------


def make_puzzles(
    folder: Path,
    engine: Local,
    kinds: Sequence[Kind] = ("template",),
    count: int = 300,
    policy: Policy | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draft puzzles: `count` of each number of hops by templates, `count` of every other kind by a model.

    Raises:
        UserError: a kind that needs a model and none is given; the model's endpoint is gone.
    """
    if policy is None and set(kinds) - {"template"}:
        raise UserError(f"{', '.join(sorted(set(kinds) - {'template'}))}: a language model writes these: give --llm")
    pool = load_pool(folder, engine)
    about = {
        "kinds": list(kinds),
        "count": count,
        "policy": policy.name if policy is not None and set(kinds) - {"template"} else "",
        "seed": seed,
        "pool": digest(folder, "pool"),
    }
    with closing(Lines(folder, "drafts", about, lambda row: str(row["id"]))) as lines:
        if not lines.complete:
            if "template" in kinds:
                with console.progress("templates", None) as bar:
                    for row in templates(pool, count, seed=seed):
                        lines.add({**row, "created": lines.created, "licence": _licence(folder)})
                        bar.advance()
            for kind in [kind for kind in KINDS if kind in kinds and kind != "template"]:
                assert policy is not None
                asyncio.run(_write(lines, pool, kind, count, policy, seed, _licence(folder)))
            order = sorted(lines.rows.values(), key=lambda row: (KINDS.index(row["kind"]), row["id"]))
            lines.finish(order)
    return list(lines.rows.values())


def _licence(folder: Path) -> str:
    return str(read_json(folder / "pool.run.json")["about"]["licence"])


# What tells a candidate from others, what writes it, and its date.
_Candidate = tuple[str, Callable[[], Awaitable[dict[str, Any]]], str]


async def _write(lines: Lines, pool: Pool, kind: Kind, count: int, policy: Policy, seed: int, licence: str) -> None:
    """Let a model write puzzles of a kind, a window of candidates at a time, until there are enough."""
    candidates: list[_Candidate] = []
    if kind == "cross_page":
        for name, pages in pool.groups():
            dates = max(page.date or "" for page in pages)
            text = "\n".join(page.url for page in pages)
            candidates.append((text, partial(write_cross_page, policy, name, pages), dates))
    else:
        for page in pool.pages:
            if len(page.text) >= _SHORTEST_PAGE:
                candidates.append((page.url, partial(write_riddle, policy, page), page.date or ""))
    random.Random(f"{seed}/{kind}").shuffle(candidates)
    # What was published last is least likely to be known by heart (the paper's appendix D.3).
    candidates.sort(key=lambda candidate: candidate[2], reverse=True)
    candidates = candidates[: count * _TRIES]

    async def one(candidate: _Candidate) -> None:
        text, write, _ = candidate
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if name not in lines.rows:
            try:
                row = await write()
            except RejectedError as error:
                lines.add({"id": name, "kind": kind, "rejected": str(error)})
            else:
                lines.add({"id": name, **row, "created": lines.created, "licence": licence})

    def enough() -> bool:
        return sum(row["kind"] == kind and "rejected" not in row for row in lines.rows.values()) >= count

    try:
        await _in_windows(kind, candidates, one, _WINDOW, enough=enough)
    finally:
        await policy.close()


async def _in_windows(
    title: str,
    todo: Sequence[T],
    one: Callable[[T], Awaitable[None]],
    size: int,
    done: int = 0,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Do all that is to be done, a window of it at once, until that is enough; `done` of it was done before."""
    with console.progress(title, done + len(todo), done) as bar:
        for start in range(0, len(todo), size):
            window = todo[start : start + size]
            await _all(one(item) for item in window)
            bar.advance(len(window))
            if enough():
                break


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Run all to their ends, and raise the first failure then: what the others did is not lost."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise UserError(f"{outcome}; run the same command again to go on") from outcome
        if isinstance(outcome, BaseException):
            raise outcome


# --- verify -------------------------------------------------------------------------------------------------------


def verify_puzzles(
    folder: Path, engine: Local, policy: Policy | None = None, concurrency: int = 8
) -> list[dict[str, Any]]:
    """Check every draft; lines say what each check found, and whether the puzzle is kept."""
    drafts = [row for row in read_stage(folder, "drafts", "make") if "rejected" not in row]
    if not drafts:
        raise UserError(f"{folder}: holds no draft that was not rejected: see drafts.jsonl for the reasons")
    about = {"policy": policy.name if policy is not None else "", "drafts": digest(folder, "drafts")}
    with closing(Lines(folder, "verified", about, lambda row: str(row["id"]))) as lines:
        if not lines.complete:
            pool = load_pool(folder, engine)
            asyncio.run(_verify(lines, drafts, pool, engine, policy, concurrency))
            rows = [lines.rows[draft["id"]] for draft in drafts]
            twice = near_duplicates([row for row in rows if row["kept"]])
            for row in rows:
                row["checks"]["no_duplicate"] = row["id"] not in twice if row["kept"] else None
                row["kept"] = row["kept"] and row["id"] not in twice
            lines.finish(rows)
    return [lines.rows[draft["id"]] for draft in drafts]


async def _verify(
    lines: Lines,
    drafts: Sequence[dict[str, Any]],
    pool: Pool,
    engine: Local,
    policy: Policy | None,
    concurrency: int,
) -> None:
    todo = [draft for draft in drafts if draft["id"] not in lines.rows]

    async def one(draft: dict[str, Any]) -> None:
        lines.add({**draft, **await all_checks(draft, pool, engine, policy)})

    try:
        await _in_windows("checking", todo, one, concurrency, len(drafts) - len(todo))
    finally:
        if policy is not None:
            await policy.close()


# --- tag ----------------------------------------------------------------------------------------------------------


def tag_puzzles(
    folder: Path,
    agent: Agent,
    trials: int = 4,
    thresholds: Thresholds | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    concurrency: int = 8,
) -> list[dict[str, Any]]:
    """Let an agent try every kept puzzle and tag it by how often it was right."""
    thresholds = thresholds or Thresholds()
    if trials < thresholds.easy:
        raise UserError(f"{trials} trials cannot make a puzzle easy, which takes {thresholds.easy} right ones")
    rows = [row for row in read_stage(folder, "verified", "verify") if row["kept"]]
    about = {
        "policy": agent.policy.name,
        "judge": judge.policy.name if judge is not None else "rules",
        "trials": trials,
        "rounds": agent.budget.rounds,
        "seed": seed,
        "verified": digest(folder, "verified"),
    }
    with closing(Lines(folder, "trials", about, lambda row: f"{row['id']}/{row['trial']}")) as lines:
        if not lines.complete:
            asyncio.run(_try(lines, rows, trials, agent, judge, seed, concurrency))
            lines.finish(lines.rows[f"{row['id']}/{trial}"] for row in rows for trial in range(trials))
    tagged = []
    for row in rows:
        tries = [lines.rows[f"{row['id']}/{trial}"] for trial in range(trials)]
        correct = sum(item["correct"] for item in tries)
        rounds = sum(item["rounds"] for item in tries) / trials
        tag = {"difficulty": thresholds.difficulty(correct), "n_correct": correct, "n_trials": trials, "rounds": rounds}
        tagged.append({**row, **tag})
    write_bytes(folder / "tagged.jsonl", b"".join(map(json_line, tagged)))
    done = {"about": {**about, **vars(thresholds)}, "created": lines.created, "complete": True}
    write_json(folder / "tagged.run.json", done)
    return tagged


async def _try(
    lines: Lines,
    rows: Sequence[dict[str, Any]],
    trials: int,
    agent: Agent,
    judge: Judge | None,
    seed: int,
    concurrency: int,
) -> None:
    todo = [(row, trial) for row in rows for trial in range(trials) if f"{row['id']}/{trial}" not in lines.rows]

    async def one(wanted: tuple[dict[str, Any], int]) -> None:
        lines.add(await try_once(*wanted, agent, judge, seed))

    try:
        await _in_windows("trying", todo, one, concurrency, len(rows) * trials - len(todo))
    finally:
        await agent.policy.close()
        if judge is not None:
            await judge.policy.close()


# --- stats --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What there is in the end.

    Args:
        pages: in the pool.
        drafts: puzzles that were drafted.
        rejected: drafts that came to nothing, by reason.
        failed: puzzles that did not pass, by check.
        kept: puzzles in the end.
        by_kind: kind to difficulty (`untagged` where there was no tagging) to count.
        by_hops: hops to count, where they are known.
        splits: split to count.
        one_search: share of the puzzles of two and more hops whose answer one search shows.
        isolated: puzzles that no try from memory solved; None where none was made.
    """

    pages: int
    drafts: int
    rejected: dict[str, int]
    failed: dict[str, int]
    kept: int
    by_kind: dict[str, dict[str, int]]
    by_hops: dict[int, int]
    splits: dict[str, int]
    one_search: float | None
    isolated: int | None


def finish_puzzles(folder: Path, seed: int = 0) -> Statistics:
    """Write what was kept as `puzzles.jsonl`, and as train, dev and test with no page in two of them."""
    drafts = read_stage(folder, "drafts", "make")
    verified = read_stage(folder, "verified", "verify")
    if (folder / "tagged.run.json").exists():
        tagged = {row["id"]: row for row in read_stage(folder, "tagged", "tag")}
    else:
        tagged = {}
    untagged = {"difficulty": None, "n_correct": None, "n_trials": None}
    kept = [{**row, **untagged, **tagged.get(row["id"], {})} for row in verified if row["kept"]]
    split = split_by_pages(kept, seed)
    puzzles = [{**row, "split": split[row["id"]]} for row in kept]
    write_bytes(folder / "puzzles.jsonl", b"".join(map(json_line, puzzles)))
    for name, _ in SPLITS:
        write_bytes(folder / f"{name}.jsonl", b"".join(json_line(row) for row in puzzles if row["split"] == name))
    by_kind: dict[str, dict[str, int]] = {}
    for row in puzzles:
        counts = by_kind.setdefault(row["kind"], dict.fromkeys([*DIFFICULTIES, "untagged"], 0))
        counts[row["difficulty"] or "untagged"] += 1
    several = [row for row in verified if row["hops"] is not None and row["hops"] > 1 and "one_search_finds_it" in row]
    known = [row for row in puzzles if row.get("closed_book") is not None]
    failed = Counter(check for row in verified for check, passed in row["checks"].items() if passed is False)
    statistics = Statistics(
        pages=sum(1 for _ in read_rows(folder / "pool.jsonl")),
        drafts=len(drafts),
        rejected=dict(Counter(row["rejected"] for row in drafts if "rejected" in row)),
        failed=dict(failed),
        kept=len(puzzles),
        by_kind=by_kind,
        by_hops=dict(sorted(Counter(row["hops"] for row in puzzles if row["hops"] is not None).items())),
        splits={name: sum(row["split"] == name for row in puzzles) for name, _ in SPLITS},
        one_search=sum(row["one_search_finds_it"] for row in several) / len(several) if several else None,
        isolated=sum(row["closed_book"] == 0 for row in known) if known else None,
    )
    write_json(folder / "stats.json", statistics)
    return statistics


def split_by_pages(rows: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, str]:
    """A split for each puzzle, so that no page stands behind puzzles of two splits.

    Puzzles that share pages, directly or through others, stay together; the largest such sets are placed first, each
    in the split that lacks most of its share.
    """
    parent: dict[int, int] = {}

    def root(page: int) -> int:
        while parent.setdefault(page, page) != page:
            parent[page] = parent[parent[page]]
            page = parent[page]
        return page

    for row in rows:
        for page in row["pages"][1:]:
            parent[root(page)] = root(row["pages"][0])
    groups: dict[int, list[str]] = {}
    for row in rows:
        groups.setdefault(root(row["pages"][0]), []).append(row["id"])
    order = sorted(groups.values(), key=min)
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)
    counts = {name: 0 for name, _ in SPLITS}
    found = {}
    for group in order:
        name = max(SPLITS, key=lambda split: split[1] * len(rows) - counts[split[0]])[0]
        counts[name] += len(group)
        found.update(dict.fromkeys(group, name))
    return found
