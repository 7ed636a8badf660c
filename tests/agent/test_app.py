"""The room's tab, asked as its button asks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from endpoints import follows, seeker, served

from tenfold.agent.index import LocalIndex
from tenfold.core.console import UserError

app = pytest.importorskip("tenfold.agent.app")


def test_a_question_shows_its_searches_and_then_answer_and_trace(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lamp.txt").write_text("The lamp <script>alert(1)</script> burns 40 candles.")
    LocalIndex.build([tmp_path / "docs"], tmp_path / "index")
    with served(follows(seeker("lamp", "The lamp burns 40 candles [1]."))) as (base, _):
        states = list(app.ask("How bright?", base, "", f"local:{tmp_path / 'index'}", "answer", 3))
    answer, happened, trace = states[-1]
    assert answer.startswith("The lamp burns 40 candles [1].") and "searching: lamp" in happened
    assert all(state[0] == "" for state in states[:-1])
    # The page stands in a frame without rights, and nothing of it outside.
    assert trace.startswith("<iframe sandbox srcdoc=") and "<script>" not in trace and trace.count('"') == 6


@pytest.mark.parametrize(
    ("question", "llm", "words"),
    [
        (" ", "http://localhost:1/v1", "Type a question"),
        ("Who?", "hf:model", "an address"),
        ("Who?", "x", "an address"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(question: str, llm: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list(app.ask(question, llm, "", "local:builtin", "answer", 3))


def test_an_endpoint_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "lamp.txt").write_text("The lamp burns.")
    LocalIndex.build([tmp_path / "lamp.txt"], tmp_path / "index")
    with pytest.raises(UserError, match="not reached"):
        list(app.ask("Who?", "http://127.0.0.1:9/v1", "m", f"local:{tmp_path / 'index'}", "answer", 3))
