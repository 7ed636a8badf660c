"""What the agent's loop costs beside the model: `python -m benchmarks.agent` writes results/benchmarks/agent.json.

Beside it, how long `ask` takes from its start as a process to its first request to the model. A server with a fixed
latency stands in for the model, in a process of its own. Ideal is what a loop that costs nothing would need: the
longest question's turns times the latency. The scripted oracle is scored in the same run.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tenfold.agent.agent import Agent
from tenfold.agent.data import embedded_corpus, embedded_questions
from tenfold.agent.endpoint import Endpoint
from tenfold.agent.engines import Local
from tenfold.agent.evaluation import evaluate
from tenfold.agent.index import LocalIndex
from tenfold.agent.oracle import oracle
from tenfold.core import console
from tenfold.core.results import Table, write_results

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "agent.json"
# Seconds a turn, and questions at once.
CASES, REPEATS = ((1.0, 1), (1.0, 50), (4.0, 50)), 3
# Runs of `ask` whose start is timed.
FIRST_ACTIONS = 5


class _Mock(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_POST(self) -> None:
        """Wait, then search in the first two turns and answer in the third."""
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        said = sum(message["role"] == "assistant" for message in messages)
        query = f"film director {said} {len(messages[0]['content'])}"
        action = f"web_search|{{'search_queries': [{query!r}]}}" if said < 2 else "It was 1950 [1]."
        time.sleep(float(self.path.split("/")[1]))
        content = {"content": f"<thinking>Turn {said + 1}.</thinking>{action}"}
        events = [{"choices": [{"delta": content, "finish_reason": "stop"}]}]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


class _MockServer(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


def _serve(pipe: Connection) -> None:
    server = _MockServer(("127.0.0.1", 0), _Mock)
    pipe.send(server.server_address[1])
    server.serve_forever()


async def _rollouts(base: str, index: LocalIndex, count: int) -> tuple[float, float]:
    """Wall and processor seconds for `count` questions at once, after one that opens everything."""
    agent = Agent(Endpoint(base, "mock"), [Local(index)])
    await agent.ask_async("Who directed the film?")
    started, processor = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(agent.ask_async(f"Who directed film {number}?") for number in range(count)))
    spent = time.perf_counter() - started, time.process_time() - processor
    assert all(answer.status == "answered" and answer.rounds == 2 for answer in answers)
    await agent.policy.close()
    return spent


def _first_actions(folder: Path) -> list[float]:
    """Seconds from the start of `tenfold agent ask` to its first request, from an index that is there."""

    class Clock(_Mock):
        asked = 0.0

        def do_POST(self) -> None:
            Clock.asked = Clock.asked or time.perf_counter()
            super().do_POST()

    server = _MockServer(("127.0.0.1", 0), Clock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/0/v1"
    command = [sys.executable, "-m", "tenfold", "agent", "ask", "Who directed it?", "--model", "mock", "--llm", base]
    seconds = []
    for _ in range(FIRST_ACTIONS):
        Clock.asked, started = 0.0, time.perf_counter()
        subprocess.run([*command, "--engine", f"local:{folder}"], capture_output=True, check=True)
        seconds.append(Clock.asked - started)
    server.shutdown()
    return seconds


def main() -> None:
    """Measure and write the tables."""
    began = time.perf_counter()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    port = ours.recv()
    samples: dict[str, list[float]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        LocalIndex.build([embedded_corpus()], folder)
        index = LocalIndex.load(folder)
        for latency_s, count in CASES:
            base = f"http://127.0.0.1:{port}/{latency_s}/v1"
            spent = [asyncio.run(_rollouts(base, index, count)) for _ in range(REPEATS)]
            walls = [wall for wall, _ in spent]
            samples[f"{count} at once, {latency_s:g} s"] = walls
            wall = statistics.median(walls)
            processor = statistics.median(seconds for _, seconds in spent)
            share = f"{3 * latency_s / wall:.3f}"
            rows.append(
                (f"{count} at once", f"{latency_s:g}", f"{wall:.2f}", share, f"{1_000 * processor / count:.1f}")
            )
        process.terminate()
        starts = _first_actions(Path(folder))
        samples["first action"] = starts
        questions = embedded_questions()
        report, _ = evaluate(Agent(oracle(questions), [Local(index)]), questions)
    throughput = Table(
        "throughput",
        f"Questions of three turns against a mock endpoint: seconds it takes for a turn, wall seconds (median of "
        f"{REPEATS}), share of the ideal throughput, and processor milliseconds of the loop a question",
        ("questions", "a turn s", "wall s", "of ideal", "processor ms"),
        rows,
    )
    correct = report.metrics["correct"].mean
    found = Table(
        "oracle",
        f"The scripted oracle on {report.questions} built-in questions; "
        f"{100 * report.metrics['supported'].mean:.1f}% of its citations are carried by their source; Spearman of "
        f"rounds and hops {report.spearman or 0:.3f}",
        ("hops", "questions", "correct", "rounds", "tokens"),
        [
            (
                str(level.difficulty),
                level.questions,
                f"{level.correct.mean:.3f}",
                f"{level.rounds.mean:.2f}",
                f"{level.tokens:.0f}",
            )
            for level in report.levels
        ]
        + [
            (
                "all",
                report.questions,
                f"{correct:.3f}",
                f"{report.rounds:.2f}",
                f"{report.tokens:.0f}",
            )
        ],
    )
    for table in (throughput, found):
        console.table(table.columns, table.rows, title=table.caption)
    write_results(
        OUTPUT,
        room="agent",
        kind="benchmark",
        seconds=time.perf_counter() - began,
        tables=[throughput, found],
        config={"cases": CASES, "repeats": REPEATS},
        packages=["httpx", "tantivy", "rapidfuzz"],
        samples=samples,
        first_action_s=statistics.median(starts),
    )
    console.say(f"{OUTPUT} is written")


if __name__ == "__main__":
    main()
