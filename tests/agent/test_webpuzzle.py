"""WebPuzzle: puzzles by templates over the built-in corpus and by a model over HTTP; stages killed and gone on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from endpoints import Handler, follows, served
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.agent.agent import Agent
from tenfold.agent.config import Budget
from tenfold.agent.data import embedded_corpus, read_questions
from tenfold.agent.endpoint import Endpoint
from tenfold.agent.engines import Local
from tenfold.agent.index import LocalIndex
from tenfold.agent.oracle import oracle
from tenfold.agent.policies import Scripted
from tenfold.agent.team_oracle import team_oracle
from tenfold.agent.webpuzzle import stages
from tenfold.agent.webpuzzle.checks import mechanical, near_duplicates
from tenfold.agent.webpuzzle.pool import Pool, read_page
from tenfold.agent.webpuzzle.relations import is_work, read_facts
from tenfold.agent.webpuzzle.tagging import Thresholds
from tenfold.agent.webpuzzle.verb import webpuzzle
from tenfold.agent.webpuzzle.writing import contains, find_span, self_check
from tenfold.core.console import UserError, to_jsonable


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Local]:
    """Template puzzles over the built-in corpus, verified."""
    folder = tmp_path_factory.mktemp("webpuzzle")
    LocalIndex.build([embedded_corpus()], folder / "index")
    engine = Local(folder / "index")
    stages.make_pool(folder / "puzzles", engine, "CC BY-SA 4.0")
    stages.make_puzzles(folder / "puzzles", engine)
    stages.verify_puzzles(folder / "puzzles", engine)
    return folder / "puzzles", engine


def test_templates_give_a_thousand_verified_puzzles_of_one_to_five_hops(made: tuple[Path, Local]) -> None:
    folder, engine = made
    drafts, verified = rows(folder / "drafts.jsonl"), rows(folder / "verified.jsonl")
    kept = [row for row in verified if row["kept"]]
    assert len(kept) >= 1_000
    hops = Counter(row["hops"] for row in kept)
    assert set(hops) == {1, 2, 3, 4, 5} and hops[3] + hops[4] + hops[5] >= 400 and hops[5] >= 30
    # Each kept puzzle passes every check again, from the pool and by other code than that which made it.
    pool = stages.load_pool(folder, engine)
    for row in kept:
        assert all(passed is not False for passed in mechanical(row, pool).values()), row["id"]
        assert len(row["path"]) == row["hops"] == len(row["relations"])
    # Nearly all that the generator makes is sound; what is dropped is what one search finds.
    several = [row for row in verified if row["hops"] > 1]
    assert sum(row["one_search_finds_it"] for row in several) / len(several) <= 0.10
    unsound = [row for row in verified if any(v is False for k, v in row["checks"].items() if "search" not in k)]
    assert len(unsound) <= 0.01 * len(drafts), [(row["id"], row["checks"]) for row in unsound]


def test_a_search_for_the_question_does_not_find_the_answers_page(made: tuple[Path, Local]) -> None:
    folder, engine = made
    for row in random.Random(0).sample([r for r in rows(folder / "verified.jsonl") if r["kept"] and r["hops"] > 1], 60):
        found = engine.index.search(row["question"], 2)
        assert all(result.title != row["path"][-1] for result in found)
        assert not any(contains(row["question"], re.sub(r"\s*\(.*", "", title)) for title in row["path"][1:])


def test_the_oracle_solves_template_puzzles_in_as_many_rounds_as_hops(made: tuple[Path, Local], tmp_path: Path) -> None:
    folder, engine = made
    some = [row for row in rows(folder / "verified.jsonl") if row["kept"]]
    some = [row for hops in range(1, 6) for row in [r for r in some if r["hops"] == hops][:4]]
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "verified.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    policy = oracle(read_questions(tmp_path / "p" / "verified.jsonl"))
    tagged = stages.tag_puzzles(tmp_path / "p", Agent(policy, [engine]))
    assert sum(row["difficulty"] == "easy" for row in tagged) >= 0.9 * len(tagged)
    assert all(row["rounds"] == row["hops"] for row in tagged if row["difficulty"] == "easy")
    statistics = stages.finish_puzzles(tmp_path / "p")
    assert statistics.kept == 20 and statistics.by_hops == dict.fromkeys(range(1, 6), 4)
    assert sum(statistics.splits.values()) == 20
    questions = read_questions(tmp_path / "p" / "puzzles.jsonl")
    assert questions[0].checklist and questions[0].path


def test_a_scripted_team_is_right_where_the_single_script_is(made: tuple[Path, Local], tmp_path: Path) -> None:
    folder, engine = made
    kept = [row for row in rows(folder / "verified.jsonl") if row["kept"]]
    some = [row for hops in range(1, 6) for row in [r for r in kept if r["hops"] == hops][:3]]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    questions = read_questions(tmp_path / "some.jsonl")
    team = Agent(team_oracle(questions), [engine], Budget(rounds=10))
    for row, question in zip(some, questions, strict=True):
        answer = team.ask(question.question, mode="team")
        assert contains(answer.answer, row["answers"][0]) and answer.rounds == row["hops"]
        assert [source.title for source in answer.sources] == [row["path"][-1]]
        assert all(citation.supported for citation in answer.citations)


def test_no_page_stands_behind_puzzles_of_two_splits(made: tuple[Path, Local]) -> None:
    folder, _ = made
    kept = [row for row in rows(folder / "verified.jsonl") if row["kept"]]
    split = stages.split_by_pages(kept)
    pages: dict[int, set[str]] = {}
    for row in kept:
        for page in row["pages"]:
            pages.setdefault(page, set()).add(split[row["id"]])
    assert all(len(names) == 1 for names in pages.values())
    counts = Counter(split.values())
    assert min(counts["dev"], counts["test"]) >= 0.05 * len(kept)
    assert {row["hops"] for row in kept if split[row["id"]] == "train"} == {1, 2, 3, 4, 5}


# --- Stopped and taken up again -----------------------------------------------------------------------------------

MORE = " The work was done in a small town by the sea, in the spring, with the help of many people who lived there."
FILM = "{name} is a {year} drama film directed by {director} and starring {star}." + MORE
PERSON = "{name} ({born} – 3 March 1990) was a film director." + MORE


def small_corpus(folder: Path) -> Local:
    people = ["Adam Stone", "Berta Field", "Carl Winter"]
    folder.mkdir()
    lines = []
    for number, person in enumerate(people):
        born = f"{number + 1} May 19{number}0"
        lines.append({"title": person, "text": PERSON.format(name=person, born=born)})
        for film in range(3):
            name = f"{['River', 'Tower', 'Garden'][film]} of {person.split()[1]}"
            star = f"{['Dora', 'Emil', 'Frieda'][film]} Lake"
            text = FILM.format(name=name, year=1940 + 5 * film + number, director=person, star=star)
            lines.append({"title": name, "text": text})
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    LocalIndex.build([folder / "c.jsonl"], folder / "index")
    return Local(folder / "index")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Local]:
    folder = tmp_path_factory.mktemp("small") / "corpus"
    return folder, small_corpus(folder)


def stage_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_stages(folder: Path, engine: Local) -> None:
    stages.make_pool(folder, engine)
    stages.make_puzzles(folder, engine, count=20)
    stages.verify_puzzles(folder, engine)
    stages.tag_puzzles(folder, Agent(oracle(read_questions(folder / "verified.jsonl")), [engine]))
    stages.finish_puzzles(folder)


def test_a_stage_that_was_cut_anywhere_ends_with_the_same_bytes(small: tuple[Path, Local], tmp_path: Path) -> None:
    _, engine = small
    all_stages(tmp_path / "whole", engine)
    expected = stage_files(tmp_path / "whole")
    draw = random.Random(0)
    for name in ("pool", "drafts", "verified", "trials"):
        lines = expected[f"{name}.jsonl"].splitlines(keepends=True)
        assert len(lines) > 3
        for kept in (0, 1, len(lines) - 1):
            folder = tmp_path / f"{name}{kept}"
            shutil.copytree(tmp_path / "whole", folder)
            # What a kill leaves: some lines in the order in which they came, the last one cut, and no word of an end.
            some = draw.sample(lines, kept) if name != "pool" else lines[:kept]
            (folder / f"{name}.jsonl").write_bytes(b"".join(some) + lines[-1][:25])
            run = json.loads((folder / f"{name}.run.json").read_text())
            (folder / f"{name}.run.json").write_text(json.dumps({**run, "complete": False}))
            all_stages(folder, engine)
            assert stage_files(folder) == expected


def test_a_killed_process_loses_and_doubles_nothing(small: tuple[Path, Local], tmp_path: Path) -> None:
    corpus, engine = small
    stages.make_pool(tmp_path, engine)
    slow = follows(llm_turns, latency_s=0.03)
    with served(slow) as (base, requests):
        command = [sys.executable, "-m", "tenfold", "agent", "webpuzzle", "make", str(tmp_path), "--llm", base]
        command += ["--engine", f"local:{corpus / 'index'}", "--kinds", "riddle", "--count", "6"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while len(requests) < 7 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = len(requests)
        assert before >= 7 and not json.loads((tmp_path / "drafts.run.json").read_text())["complete"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    drafts = rows(tmp_path / "drafts.jsonl")
    names = [row["id"] for row in drafts]
    assert len(set(names)) == len(names) and sum("rejected" not in row for row in drafts) >= 6


def test_the_verb_gives_what_its_schema_says(small: tuple[Path, Local], tmp_path: Path) -> None:
    corpus, _ = small
    schema = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "agent-webpuzzle.json").read_text())
    for stage in ("pool", "make", "verify", "tag", "stats"):
        llm = "oracle" if stage == "tag" else ""
        outcome = webpuzzle(stage, tmp_path, engine=f"local:{corpus / 'index'}", llm=llm, count=5)  # type: ignore[arg-type]
        jsonschema.validate(json.loads(json.dumps(to_jsonable(outcome))), schema)
    with pytest.raises(UserError, match="give --llm"):
        webpuzzle("tag", tmp_path, engine=f"local:{corpus / 'index'}")
    with pytest.raises(UserError, match="local:FOLDER"):
        webpuzzle("pool", tmp_path, engine="http://example.org")


def test_other_arguments_do_not_mix_with_what_is_there(small: tuple[Path, Local], tmp_path: Path) -> None:
    _, engine = small
    stages.make_pool(tmp_path, engine)
    with pytest.raises(UserError, match="stage make has not been run"):
        stages.verify_puzzles(tmp_path, engine)
    stages.make_puzzles(tmp_path, engine, count=3)
    with pytest.raises(UserError, match="another count"):
        stages.make_puzzles(tmp_path, engine, count=4)
    with pytest.raises(UserError, match="give --llm"):
        stages.make_puzzles(tmp_path, engine, kinds=("riddle",))


# --- Puzzles by a model -------------------------------------------------------------------------------------------


def llm_turns(messages: list[dict[str, Any]]) -> str:
    """A model that copies quotes, writes a riddle without names, and knows nothing by heart."""
    text = str(messages[-1]["content"])
    if text.startswith("Below is the text"):
        pages = re.findall(r"page (\d+): (.*)\n(.*)\n", text)
        facts = []
        for number, _, body in pages:
            quotes = re.findall(r"is a \d+ drama film|directed by \w+ \w+|starring \w+ \w+|was a film director", body)
            facts += [{"page": int(number), "fact": f"it {quote}", "quote": quote} for quote in quotes]
        facts.append({"page": 1, "fact": "invented", "quote": "words that no page has"})
        return json.dumps({"facts": facts})
    if text.startswith("These facts are about"):
        attributes = [
            {
                "fact": 1,
                "original": "is a 1940 drama film",
                "rewritten": "a work for the screen from the middle of a century",
            },
            {"fact": 2, "original": "directed by", "rewritten": "made by somebody with a season in the name"},
        ]
        question = f"Which work of the screen number {len(text)} is meant?"
        return json.dumps({"attributes": attributes, "question": question, "aliases": [], "checklist": "the title"})
    if text.startswith("These facts were taken"):
        named = re.search(r"directed by (\w+ \w+)", text)
        name = named[1] if named else "nobody"
        return json.dumps(
            {"question": f"Who made these {len(text)} films?", "answer": name, "aliases": [], "facts": []}
        )
    if text.startswith("Is this question suitable"):
        return '{"suitable": true}'
    if text.startswith("A riddle, and pages"):
        return '{"fitting": [1]}'
    return "unknown"


def test_a_model_writes_riddles_and_questions_across_pages_over_http(small: tuple[Path, Local], tmp_path: Path) -> None:
    _, engine = small
    stages.make_pool(tmp_path, engine)
    with served(follows(llm_turns)) as (base, requests):
        drafts = stages.make_puzzles(tmp_path, engine, ("cross_page", "riddle"), 4, Endpoint(base))
        asked = len(requests)
        stages.make_puzzles(tmp_path, engine, ("cross_page", "riddle"), 4, Endpoint(base))
        assert len(requests) == asked  # what is done is not asked for again
        verified = stages.verify_puzzles(tmp_path, engine, Endpoint(base))
    made = [row for row in drafts if "rejected" not in row]
    assert {row["kind"] for row in made} == {"cross_page", "riddle"}
    pool = stages.load_pool(tmp_path, engine)
    texts = {page.url: page.text for page in pool.pages}
    for row in verified:
        assert row["sources"] and row["checks"]["spans"]
        assert all(find_span(texts[source["url"]], source["span"]) for source in row["sources"])
        assert row["generator"]["model"].startswith("tiny at") and len(row["generator"]["prompt_sha"]) == 16
    kept = [row for row in verified if row["kept"]]
    assert all(row["closed_book"] == 0 and row["checks"]["suitable"] for row in kept)
    riddles = [row for row in verified if row["kind"] == "riddle" and row["checks"].get("unique") is not None]
    # This model always calls the first page the fitting one: only where that is the right one is a riddle unique.
    assert riddles and any(not row["checks"]["unique"] for row in riddles)


def test_what_the_model_knows_by_heart_is_no_puzzle(small: tuple[Path, Local], tmp_path: Path) -> None:
    _, engine = small
    stages.make_pool(tmp_path, engine)
    stages.make_puzzles(tmp_path, engine, count=3)
    known = rows(tmp_path / "drafts.jsonl")[0]

    def turns(messages: Any) -> str:
        return str(known["answers"][0]) if known["question"] in str(messages[-1]["content"]) else "unknown"

    verified = stages.verify_puzzles(tmp_path, engine, Scripted(turns))
    row = next(row for row in verified if row["id"] == known["id"])
    assert row["closed_book"] == 3 and not row["kept"]
    assert any(other["kept"] for other in verified)


def test_a_writer_that_is_gone_stops_the_stage_and_says_how_to_go_on(small: tuple[Path, Local], tmp_path: Path) -> None:
    _, engine = small
    stages.make_pool(tmp_path, engine)

    def behave(handler: Handler, number: int) -> None:
        if number > 4:
            handler.whole({"error": {"message": "no such key"}}, 401)
        else:
            handler.say(llm_turns(handler.request_body["messages"]))

    with served(behave) as (base, _), pytest.raises(UserError, match="run the same command again"):
        stages.make_puzzles(tmp_path, engine, ("riddle",), 6, Endpoint(base))


@pytest.mark.parametrize(
    ("rewritten", "problem"),
    [
        (("a tower of the north", "an old light"), ""),
        (("the Lamp of the north", "an old light"), "'Lamp'"),
        (("40 candles", "an old light"), "1 attributes"),
    ],
)
def test_a_riddle_that_names_its_answer_is_rejected(rewritten: tuple[str, str], problem: str) -> None:
    attributes = [
        {"original": original, "rewritten": new}
        for original, new in zip(("40 candles", "lit in 1900"), rewritten, strict=True)
    ]
    assert problem in self_check(attributes, ["Lamp"], ["Lamp (tower)"])
    assert bool(self_check(attributes, ["Lamp"], ["Lamp (tower)"])) is bool(problem)


# --- The pieces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Mr. Ace is a 1946 American film written by Fred F. Finkelhoffe and directed by Edwin L. Marin. It stars "
            "George Raft and Sylvia Sidney.",
            {"year": "1946", "writer": "Fred F. Finkelhoffe", "director": "Edwin L. Marin", "star": "George Raft"},
        ),
        (
            "Janis Joplin ( January 19, 1943 – October 4, 1970) was a singer.",
            {"born": "January 19, 1943", "died": "October 4, 1970"},
        ),
        (
            "Otto II (1 May 1215 – 10 January 1271) was the son of Gerard III, Count of Guelders. He married Anna, "
            "daughter of John Smith.",
            {"parent": "Gerard III", "born": "1 May 1215"},
        ),
    ],
)
def test_rules_read_what_a_page_says_of_its_subject(text: str, expected: dict[str, str]) -> None:
    found = {fact.relation: fact.value for fact in read_facts(text) if fact.relation != "cast"}
    assert expected.items() <= found.items()
    assert "John Smith" not in found.values()
    assert all(text[fact.start : fact.end] == fact.value for fact in read_facts(text))


@pytest.mark.parametrize(
    ("text", "work"),
    [
        ("Lamp is a 1946 film directed by A. B.", True),
        ("Goldy Notay is a Canadian actress known for film and television.", False),
        ("Edward Sloman was an English silent film director.", False),
        ("Lamp Pictures is a film production company.", False),
    ],
)
def test_people_and_companies_are_no_works(text: str, work: bool) -> None:
    assert is_work(text) is work


def test_a_step_that_two_pages_fit_is_no_step() -> None:
    film = FILM.format(name="{}", year="{}", director="Adam Stone", star="Dora Lake")
    texts = {
        "One": film.format("One", 1940),
        "Two": film.format("Two", 1945),
        "Three": film.format("Three", 1945),
        "Adam Stone": PERSON.format(name="Adam Stone", born="1 May 1900"),
    }
    from tenfold.agent.webpuzzle.template import Chains

    pool = Pool(read_page(number, title, title, text, "", None) for number, (title, text) in enumerate(texts.items()))
    steps = {(number, step.target) for number, found in Chains(pool).steps.items() for step in found}
    assert (0, 3) in steps and (3, 0) in steps
    assert not {(0, 1), (0, 2), (3, 1), (3, 2)} & steps  # two films of 1945
    assert (1, 0) in steps


def test_a_name_that_goes_on_is_not_the_person_of_the_shorter_title() -> None:
    texts = {
        "Otto": "Otto Gilmour (1 May 1800 – 2 June 1880) was the son of Allan Gilmour, Sr and Ann Hill.",
        "Emil": "Emil Gilmour (1 May 1800 – 2 June 1880) was the son of Allan Gilmour and Ann Hill.",
        "Allan Gilmour": "Allan Gilmour (1 May 1770 – 2 June 1840) was a merchant.",
    }
    pool = Pool(read_page(number, title, title, text, "", None) for number, (title, text) in enumerate(texts.items()))
    found = [pool.target_of(page, "parent") for page in pool.pages]
    assert found[0] is None and found[1] is pool.pages[2]


def test_near_duplicates_are_found_and_others_are_not() -> None:
    words = [
        "which",
        "keeper",
        "of",
        "the",
        "northern",
        "tower",
        "lit",
        "the",
        "lamp",
        "that",
        "burns",
        "forty",
        "candles",
        "in",
        "the",
        "year",
        "of",
        "the",
        "great",
        "storm",
    ]
    base = {"id": "a", "question": " ".join(words), "answers": ["Berta"]}
    same = {"id": "b", "question": " ".join(words).upper() + "?", "answers": ["Berta"]}
    other = {"id": "c", "question": " ".join(reversed(words)), "answers": ["Carl"]}
    assert near_duplicates([base, same, other]) == {"b"}


@given(st.integers(0, 4))
@settings(deadline=None, max_examples=10)
def test_tags_follow_the_rule_of_four_trials(correct: int) -> None:
    expected = {4: "easy", 3: "medium", 2: "medium", 1: "hard", 0: "outlier"}
    assert Thresholds().difficulty(correct) == expected[correct]


def test_thresholds_that_do_not_fall_are_refused() -> None:
    with pytest.raises(UserError, match="have to fall"):
        Thresholds(2, 2, 1)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=25), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_splits_never_share_a_page(groups: list[list[int]], seed: int) -> None:
    puzzles = [{"id": str(number), "pages": pages} for number, pages in enumerate(groups)]
    split = stages.split_by_pages(puzzles, seed)
    assert set(split) == {row["id"] for row in puzzles}
    for one in puzzles:
        for other in puzzles:
            if set(one["pages"]) & set(other["pages"]):  # type: ignore[arg-type]
                assert split[one["id"]] == split[other["id"]]  # type: ignore[index]
