from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from endpoints import Shelf, follows, hang, seeker, served

from tenfold.agent import cli, viewer
from tenfold.agent.agent import Agent
from tenfold.agent.config import Budget
from tenfold.agent.endpoint import Endpoint
from tenfold.agent.engines import Local
from tenfold.agent.index import LocalIndex
from tenfold.agent.policies import Scripted
from tenfold.agent.search import SearchError
from tenfold.agent.serve import Server
from tenfold.agent.trace import Trace, diff, replay
from tenfold.core.console import PartialFailure, UserError

SECRET = "sk-a-very-secret-key"
PAGE = "<html><title>Lamp</title><body><p>The lamp of the tower burns 40 candles. It was lit on 3 May 1900.</p>"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent")
    (folder / "docs").mkdir()
    (folder / "docs" / "lamp.html").write_text(PAGE)
    (folder / "docs" / "oil.md").write_text("# Oil\n\nOil for the lamp is pressed from olives.")
    LocalIndex.build([folder / "docs"], folder / "index")
    return folder / "index"


TURNS = seeker("lamp of the tower", "The lamp of the tower burns 40 candles [1]. It weighs 12 tons [1].")


def test_a_question_is_searched_answered_and_checked_over_http(index: Path) -> None:
    with served(follows(TURNS)) as (base, requests):
        agent = Agent.from_pretrained(base, [f"local:{index}"])
        answer = agent.ask("How bright is the lamp?")
    assert (answer.status, answer.complete, answer.rounds) == ("answered", True, 1)
    supported = [citation.supported for citation in answer.citations]
    assert supported == [True, False]
    first = answer.citations[0]
    assert first.title == "Lamp" and "40 candles" in first.quote and first.span is not None
    assert answer.sources[0].text[first.span[0] : first.span[1]] == first.quote
    assert requests[1]["messages"][-1]["role"] == "user" and "40 candles" in requests[1]["messages"][-1]["content"]
    summary = json.loads(json.dumps(answer.summary()))
    assert summary["sources"][0]["url"].startswith("file:") and summary["complete"]


def test_asking_works_inside_a_running_event_loop(index: Path) -> None:
    async def notebook() -> str:
        return Agent(Scripted(lambda messages: TURNS(list(messages))), [Local(index)]).ask("How bright?").answer

    assert asyncio.run(notebook()).startswith("The lamp")


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Agent(Scripted(["x"]), [Shelf()]).ask("  ")


def test_offline_opens_no_connection_but_the_endpoints(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def watched(self: socket.socket, address: Any) -> None:
        opened.append(address)
        connect(self, address)

    def watched_name(host: Any, *rest: Any, **options: Any) -> Any:
        opened.append((host, *rest[:1]))
        return look_up(host, *rest, **options)

    turn = "<thinking>x</thinking>open_page|{'pages': ['https://evil.example/', '1']}"
    steps = [
        "<thinking>x</thinking>web_search|{'search_queries': ['lamp']}",
        turn,
        "<thinking>x</thinking>40 candles [1].",
    ]

    def turns(messages: Sequence[dict[str, Any]]) -> str:
        return steps[sum(message["role"] == "assistant" for message in messages)]

    with served(follows(turns)) as (base, _):
        port = int(base.rpartition(":")[2].partition("/")[0])
        monkeypatch.setattr(socket.socket, "connect", watched)
        monkeypatch.setattr(socket, "getaddrinfo", watched_name)
        answer = Agent.from_pretrained(base, [f"local:{index}"], offline=True, open_any_url=True).ask("How bright?")
        monkeypatch.undo()
    assert answer.answer == "40 candles [1]." and answer.opened == 1
    assert opened and all(tuple(address[:2]) == ("127.0.0.1", port) for address in opened)
    with pytest.raises(UserError, match="offline"):
        Agent.from_pretrained(base, ["brave"], offline=True)


def test_many_questions_at_once_do_not_wait_for_each_other(index: Path) -> None:
    async def all_of_them(base: str) -> list[str]:
        agent = Agent(Endpoint(base, "tiny"), [Local(index)])
        answers = await asyncio.gather(*(agent.ask_async(f"How bright is lamp {n}?") for n in range(50)))
        await agent.policy.close()
        return [answer.status for answer in answers]

    at_once = peak = 0
    lock = threading.Lock()
    gate = threading.Barrier(50)

    def behave(handler: Any, number: int) -> None:
        nonlocal at_once, peak
        with lock:
            at_once += 1
            peak = max(peak, at_once)
        if number <= 50:
            gate.wait(60)  # nobody is answered before all have asked
        with lock:
            at_once -= 1
        follows(TURNS)(handler, number)

    with served(behave) as (base, _):
        assert asyncio.run(all_of_them(base)) == ["answered"] * 50
    assert peak == 50


def test_a_key_is_in_no_trace_no_answer_and_no_message(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaky(Shelf):
        _key = SECRET

        async def search(self, query: str, count: int) -> Any:
            raise SearchError("leaky", f"refused {SECRET}")

    turns = seeker("lamp", f"I was told {SECRET}.")
    with served(follows(turns)) as (base, requests):
        monkeypatch.setenv("TENFOLD_LLM_KEY", SECRET)
        answer = Agent(Endpoint(base), [Leaky()]).ask("What is the key?")
    assert requests[0]["headers"]["Authorization"].endswith(SECRET)
    assert SECRET not in json.dumps(answer.trace.events)
    assert "***" in json.dumps(answer.trace.events)


# --- Traces -------------------------------------------------------------------------------------------------------


def recorded(index: Path, turns: Callable[..., str] = TURNS) -> Trace:
    return Agent(Scripted(lambda messages: turns(list(messages))), [Local(index)]).ask("How bright is it?").trace


def test_a_trace_comes_back_from_its_file_and_runs_again_without_a_model(index: Path, tmp_path: Path) -> None:
    trace = recorded(index)
    trace.save(tmp_path / "run.jsonl")
    loaded = Trace.load(tmp_path / "run.jsonl")
    assert loaded.events == json.loads(json.dumps(trace.events))
    rollout, again = asyncio.run(replay(loaded))
    assert rollout.answer == trace.first("final")["answer"]
    assert [d.where for d in diff(loaded, again) if d.where not in ("budget", "status")] == []


def test_a_difference_is_named(index: Path) -> None:
    other = recorded(index, seeker("olives", "Oil is pressed from olives [1]."))
    assert {difference.where for difference in diff(recorded(index), other)} >= {
        "turn 1, queries",
        "answer",
        "source 1",
    }
    assert diff(other, other) == []


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    for content in ("", "{}\n", '{"kind": "turn"}\n', '{"kind": "engine"}\n', "no json\n"):
        (tmp_path / "t.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"t\.jsonl"):
            Trace.load(tmp_path / "t.jsonl")


def test_the_page_of_a_trace_stands_alone_and_runs_nothing(index: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J"
    trace = recorded(index, seeker(f"lamp {evil}", f"The lamp of the tower burns 40 candles [1]. {evil}"))
    page = viewer.render_html(trace)
    assert "<script" not in page and "<img" not in page and "&lt;script" in page
    assert "default-src 'none'" in page
    assert all(word not in page for word in ('src="', "url(", "@import", 'href="javascript'))
    assert "<mark>" in page and "supported" in page and 'id="source-1"' in page
    shown = "\n".join(viewer.lines(trace))
    assert "\x1b" not in shown and "40 candles" in shown


# --- Serving ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(index: Path) -> Iterator[Server]:
    made = Server(Agent(Scripted(lambda messages: TURNS(list(messages))), [Local(index)]), port=0)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    yield made
    made.stop()
    thread.join()


def post(server: Server, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", content, named)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


ASK = {"model": "any", "messages": [{"role": "system", "content": "Obey."}, {"role": "user", "content": "How bright?"}]}


def test_the_server_answers_whole_and_streamed(server: Server) -> None:
    code, content = post(server, ASK)
    answer = json.loads(content)
    assert code == 200 and answer["usage"]["total_tokens"] > 0
    text = answer["choices"][0]["message"]["content"]
    assert text.startswith("The lamp") and "[1] Lamp: file:" in text and "Not carried by its source" in text
    code, content = post(server, {**ASK, "stream": True})
    lines = [line[6:] for line in content.decode().split("\n\n") if line]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and "".join(delta.get("content", "") for delta in deltas) == text
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert "searching: lamp of the tower" in reasoning and "[1] Lamp" in reasoning


def test_the_agent_can_be_asked_through_its_own_server(server: Server) -> None:
    async def once() -> str:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}/v1")
        conversation = endpoint.start()
        conversation.add(ASK["messages"][1:])  # type: ignore[index]
        reply = await conversation.reply(100, 60)
        await endpoint.close()
        return reply.text

    assert asyncio.run(once()).startswith("The lamp")


def test_the_server_refuses_what_it_should(server: Server) -> None:
    assert post(server, b"{half")[0] == 400
    assert post(server, {"messages": []})[0] == 400
    assert post(server, {"messages": [{"role": "user", "content": {"a": 1}}]})[0] == 400
    assert post(server, ASK, "/v1/embeddings")[0] == 404
    assert post(server, ASK, Host="evil.example")[0] == 403
    assert post(server, ASK, Content_Type="text/plain")[0] == 415
    assert post(server, b"", Content_Length="999999999")[0] == 413
    server.key = "right"
    assert post(server, ASK)[0] == 401
    assert post(server, ASK, Authorization="Bearer right")[0] == 200
    with pytest.raises(UserError, match="TENFOLD_SERVE_KEY"):
        Server(server.agent, "0.0.0.0", 0)
    with pytest.raises(UserError, match="cannot listen"):
        Server(server.agent, port=server.port)


# --- The command line ---------------------------------------------------------------------------------------------


def test_the_three_commands_of_the_readme_work_as_they_are_written(
    index: Path, tmp_path: Path, run_tenfold: Callable[..., Any], repository: Path
) -> None:
    readme = (repository / "src/tenfold/agent/README.md").read_text()
    block = readme.partition("```bash\n")[2].partition("```")[0]
    commands = [line for line in block.splitlines() if line.strip()]
    assert commands[0].startswith("pip install 'tenfold[agent]'") and len(commands) == 3
    import shlex

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lamp.html").write_text(PAGE)
    done = run_tenfold(*shlex.split(commands[1])[1:])
    assert done.returncode == 0, done.stderr
    with served(follows(TURNS)) as (base, _):
        words = [word.replace("http://localhost:8000/v1", base) for word in shlex.split(commands[2])[1:]]
        assert base in words
        done = run_tenfold(*words, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["status"] == "answered" and answer["citations"][0]["supported"]


def test_errors_of_the_command_line_are_one_line(index: Path, tmp_path: Path, run_tenfold: Callable[..., Any]) -> None:
    for arguments, words in (
        (["--engine", f"local:{tmp_path}"], "no index is here"),
        (["--engine", f"local:{index}", "--llm", "http://127.0.0.1:9/v1"], "is the server running"),
        (["--engine", "gogle", "--llm", "http://127.0.0.1:9/v1"], "unknown search engine"),
        (["--engine", "brave", "--offline"], "offline"),
        (["--rounds", "-1"], "at least 0"),
    ):
        done = run_tenfold("agent", "ask", "Why?", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr


def test_an_answer_that_is_not_found_is_exit_status_1(index: Path) -> None:
    with served(hang) as (base, _), pytest.raises(UserError):
        cli.ask("Why?", base, "tiny", (f"local:{index}",), seconds=0.4)

    def search_on(messages: Sequence[dict[str, Any]]) -> str:
        return f"<thinking>x</thinking>web_search|{{'search_queries': ['lamp {len(messages)}']}}"

    with served(follows(search_on)) as (base, _), pytest.raises(PartialFailure, match="no answer: rounds"):
        cli.ask("Why?", base, engine=(f"local:{index}",), rounds=2)


def test_a_chat_remembers(index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    def turns(messages: Sequence[dict[str, Any]]) -> str:
        return f"<thinking>x</thinking>I was told {sum(m['role'] == 'user' for m in messages)} things."

    monkeypatch.setattr("sys.stdin", io.StringIO("First?\nSecond?\n\n"))
    with served(follows(turns)) as (base, requests):
        assert cli.chat(base, engine=(f"local:{index}",)) == {"questions": 2}
    assert "told 1 things" in capsys.readouterr().out
    said = [message["content"] for message in requests[1]["messages"]]
    assert said[0] == "First?" and said[1].startswith("I was told 1") and "Second?" in said[2]


def test_traces_are_written_viewed_compared_and_replayed(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(follows(TURNS)) as (base, _):
        cli.ask("How bright?", base, engine=(f"local:{index}",), trace=tmp_path / "a.jsonl")
        cli.ask("How heavy?", base, engine=(f"local:{index}",), trace=tmp_path / "b.jsonl")
    cli.trace("view", (tmp_path / "a.jsonl",))
    assert "How bright?" in capsys.readouterr().out
    cli.trace("view", (tmp_path / "a.jsonl",), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert cli.trace("replay", (tmp_path / "a.jsonl",)) == {"differences": []}
    found = cli.trace("diff", (tmp_path / "a.jsonl", tmp_path / "b.jsonl"))["differences"]
    assert [difference.where for difference in found] == ["question"]
    with pytest.raises(UserError, match="takes 2 files"):
        cli.trace("diff", (tmp_path / "a.jsonl",))


def test_the_first_search_comes_soon_after_the_question(index: Path) -> None:
    with served(follows(TURNS)) as (base, _):
        events: list[tuple[float, str]] = []
        started = time.process_time()
        agent = Agent.from_pretrained(base, [f"local:{index}"])
        agent.ask("How bright?", on_event=lambda kind, data: events.append((time.process_time() - started, kind)))
    # Processor seconds, with the server's in them, so that a busy machine does not count: the bar is 1.5 s.
    assert next(seconds for seconds, kind in events if kind == "turn") < 1.5


def test_a_budget_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"rounds": -1}, {"tokens": 3}, {"seconds": 0.0}, {"queries": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Budget(**wrong)  # type: ignore[arg-type]
