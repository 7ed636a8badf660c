"""The command line of the agent: one thin function per verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tenfold.agent.config import Budget, Sampling
from tenfold.agent.training_verbs import evaluate, reproduce, train
from tenfold.agent.verb_inputs import DEFAULT_LLM, ProtocolName, agent_of
from tenfold.agent.webpuzzle.verb import webpuzzle
from tenfold.core import console
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.devices import DeviceName
from tenfold.core.files import write_bytes

if TYPE_CHECKING:
    from tenfold.agent.search import Page


def index(documents: Positional[tuple[Path, ...]], output: Path = Path("index"), embedding: str = "") -> object:
    """Make documents searchable: HTML, Markdown, text, PDF, ZIM archives and JSONL corpora.

    A second run with the same arguments reads what has changed since the first one, and a run that was stopped goes on
    where it was.

    Args:
        documents: files and folders.
        output: the folder of the index.
        embedding: a sentence encoder (folder or hub name), to search by meaning as well as by words.

    Example:
        tenfold agent index docs/ notes.md library.pdf --output index
        tenfold agent index wikipedia.zim --output wiki --embedding sentence-transformers/all-MiniLM-L6-v2
    """
    from tenfold.agent.index import LocalIndex

    embed = None
    if embedding:
        from tenfold.agent.dense import sentence_embedder

        embed = sentence_embedder(embedding)
    report = LocalIndex.build(documents, output, embed, embedding or None)
    console.say(
        f"{report.folder}: {report.documents} documents in {report.passages} passages "
        f"({report.read} files read, {report.unchanged} unchanged, {report.removed} gone, "
        f"{report.passed_over} of other kinds passed over) in {report.seconds:.1f} s"
    )
    for _, problem in report.problems:
        console.warn(problem)
    if report.problems:
        raise PartialFailure(f"{len(report.problems)} files could not be read; the others are indexed", report)
    return report


def fetch(
    urls: Positional[tuple[str, ...]],
    query: str = "",
    cache: Path | None = None,
    allow_network: tuple[str, ...] = (),
    offline: bool = False,
) -> object:
    """Read pages of the web as the agent reads them: checked addresses, small bodies, readable text.

    Args:
        urls: addresses that begin with http:// or https://.
        query: show the passages that fit this query instead of the whole text.
        cache: file in which pages are kept.
        allow_network: private networks that may be opened as well, such as 10.1.0.0/16.
        offline: read from the cache only.

    Example:
        tenfold agent fetch https://www.python.org/about/ --query "who keeps Python"
    """
    import asyncio

    from tenfold.agent.cache import Cache
    from tenfold.agent.fetch import Fetcher, Limits
    from tenfold.agent.passages import best_passages, joined

    if not urls:
        raise UserError("no address was given: for example https://www.python.org/about/")
    fetcher = Fetcher(Limits(networks=allow_network), Cache(cache) if cache is not None else None, offline)

    async def read() -> list[Page | BaseException]:
        return await asyncio.gather(*(fetcher.open_page(url) for url in urls), return_exceptions=True)

    outcomes = asyncio.run(read())
    pages = []
    problems = []
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            problems.append(str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            pages.append(outcome)
            shown = best_passages(outcome.text, query, outcome.title) if query else (outcome.text,)
            console.say(f"{outcome.title}\n{outcome.url}\n")
            console.say(joined(shown) + "\n")
    if problems and not pages:
        raise UserError("; ".join(problems))
    if problems:
        raise PartialFailure("; ".join(problems), {"pages": pages})
    return {"pages": pages}


def _to_stderr(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def ask(
    question: Positional[str],
    llm: str = DEFAULT_LLM,
    model: str = "",
    engine: tuple[str, ...] = ("local:index",),
    protocol: ProtocolName = "deepdiver",
    rounds: int = 7,
    queries: int = 5,
    results: int = 2,
    tokens: int = 20_000,
    seconds: float = 300.0,
    temperature: float = 0.6,
    seed: int | None = None,
    cache: Path | None = None,
    offline: bool = False,
    open_urls: bool = False,
    mode: Literal["answer", "team", "report"] = "answer",
    trace: Path | None = None,
    device: DeviceName = "auto",
) -> dict[str, Any]:
    """Answer a question by searching, with citations that were held against their sources.

    Args:
        question: the question.
        llm: address of an OpenAI-compatible endpoint, or hf: and the folder or hub name of a model. A key is taken from
            the environment variable TENFOLD_LLM_KEY.
        model: the model's name at the endpoint; its first one by default.
        engine: where to search: local:FOLDER, brave, serper, searxng:URL, langsearch, ddgs; several are fused.
        protocol: the form of the model's turns.
        rounds: turns that may search.
        queries: searches of one turn.
        results: pages shown for each search.
        tokens: length of the whole conversation.
        seconds: time for all of it.
        temperature: of the sampling.
        seed: of the sampling.
        cache: file that keeps what was searched and read.
        offline: open no connection but the endpoint's.
        open_urls: let the model open addresses that no search found.
        mode: answer: one run; team: a planner gives tasks to researchers, who search; report: a long text in sections,
            each of which is searched for. The budget is that of all of them, but for tokens: those are of each
            conversation.
        trace: write the record of the run to this file.
        device: for a local model.

    Example:
        tenfold agent ask "Who keeps Python?" --llm http://localhost:8000/v1 --engine local:index --trace run.jsonl
        tenfold agent ask "Who keeps Python?" --llm http://localhost:11434/v1 --model qwen3:8b --engine ddgs
        tenfold agent ask "How did lighthouses change?" --engine local:index --mode report --rounds 12
    """
    from tenfold.agent.serve import answer_text, progress

    agent = agent_of(
        llm,
        model,
        engine,
        protocol,
        Budget(rounds, queries, results, tokens, seconds=seconds),
        Sampling(temperature, seed=seed),
        cache,
        offline,
        device,
        open_urls,
    )
    answer = agent.ask(question, on_event=progress(_to_stderr), mode=mode)
    if trace is not None:
        answer.trace.save(trace)
    console.say(("" if not answer.rounds else "\n") + answer_text(answer))
    for problem in answer.problems:
        console.warn(problem)
    summary = answer.summary()
    if not answer.answer:
        raise PartialFailure(f"no answer: {answer.stopped_by or answer.status}", summary)
    return summary


def chat(
    llm: str = DEFAULT_LLM,
    model: str = "",
    engine: tuple[str, ...] = ("local:index",),
    protocol: ProtocolName = "deepdiver",
    temperature: float = 0.6,
    cache: Path | None = None,
    offline: bool = False,
    device: DeviceName = "auto",
) -> dict[str, Any]:
    """Ask one question after another; earlier ones and their answers are remembered. An empty line ends it.

    Args:
        llm: as in `ask`.
        model: as in `ask`.
        engine: as in `ask`.
        protocol: as in `ask`.
        temperature: as in `ask`.
        cache: as in `ask`.
        offline: as in `ask`.
        device: as in `ask`.

    Example:
        tenfold agent chat --llm http://localhost:8000/v1 --engine local:index
    """
    from tenfold.agent.serve import answer_text, progress

    agent = agent_of(llm, model, engine, protocol, Budget(), Sampling(temperature), cache, offline, device)
    history: list[dict[str, Any]] = []
    asked = 0
    while True:
        _to_stderr("> ")
        question = sys.stdin.readline().strip()
        if not question:
            return {"questions": asked}
        try:
            answer = agent.ask(question, history[-6:], on_event=progress(_to_stderr))
        except UserError as error:
            console.warn(str(error))
            continue
        asked += 1
        console.say(answer_text(answer))
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.answer or "-"}]


def trace(
    action: Positional[Literal["view", "diff", "replay"]],
    files: Positional[tuple[Path, ...]],
    output: Path | None = None,
) -> dict[str, Any]:
    """Look at the record of a run: view it, compare two, or run one again without a model and without a network.

    Args:
        action: view shows a run, diff says where two runs differ, replay runs the loop again with the same turns and
            results and says whether the same comes out.
        files: one trace, or two for diff.
        output: for view: write a page (.html) instead of printing; it needs no other file.

    Example:
        tenfold agent trace view run.jsonl --output run.html
        tenfold agent trace diff monday.jsonl tuesday.jsonl
    """
    import asyncio

    from tenfold.agent import viewer
    from tenfold.agent.trace import Trace, diff, replay

    wanted = 2 if action == "diff" else 1
    if len(files) != wanted:
        raise UserError(f"trace {action} takes {wanted} file{'s' if wanted > 1 else ''}, and {len(files)} were given")
    traces = [Trace.load(file) for file in files]
    final = traces[0].first("final")
    if action == "view":
        if output is not None:
            write_bytes(output, viewer.render_html(traces[0]).encode("utf-8", "replace"))
            console.say(f"{output} is written: open it in a browser")
        else:
            for line in viewer.lines(traces[0]):
                console.say(line)
        return {"answer": final.get("answer"), "status": final.get("status"), "page": output}
    if action == "replay":
        _, again = asyncio.run(replay(traces[0]))
        traces.append(again)
    # A replay has no limits to meet.
    passed_over = ("budget", "status") if action == "replay" else ()
    found = [difference for difference in diff(*traces) if difference.where not in passed_over]
    for difference in found:
        console.say(f"{difference.where}\n  - {difference.first[:300]}\n  + {difference.second[:300]}")
    if not found:
        console.say("no difference" if action == "diff" else "the same turns, sources and answer came out")
    if found and action == "replay":
        raise PartialFailure("the replay differs from the trace", {"differences": found})
    return {"differences": found}


def serve(
    llm: str = DEFAULT_LLM,
    model: str = "",
    engine: tuple[str, ...] = ("local:index",),
    protocol: ProtocolName = "deepdiver",
    host: str = "127.0.0.1",
    port: int = 8080,
    mcp: bool = False,
    temperature: float = 0.6,
    cache: Path | None = None,
    offline: bool = False,
    device: DeviceName = "auto",
) -> dict[str, Any]:
    """Put the agent behind an OpenAI-compatible endpoint, so that any chat program can use it.

    In a stream, its reasoning and searches come as reasoning, and then the answer. Beyond this machine (--host) it asks
    for the key in the environment variable TENFOLD_SERVE_KEY.

    Args:
        llm: as in `ask`.
        model: as in `ask`.
        engine: as in `ask`.
        protocol: as in `ask`.
        host: address to listen on.
        port: port to listen on.
        mcp: speak the Model Context Protocol over standard input and output instead, with the tools search, open_page
            and ask; for programs that start this command themselves.
        temperature: as in `ask`.
        cache: as in `ask`.
        offline: as in `ask`.
        device: as in `ask`.

    Example:
        tenfold agent serve --llm http://localhost:8000/v1 --engine local:index --port 8080
        tenfold agent serve --mcp --llm http://localhost:8000/v1 --engine local:index
    """
    from tenfold.agent.serve import MODEL, Server

    agent = agent_of(llm, model, engine, protocol, Budget(), Sampling(temperature), cache, offline, device)
    if mcp:
        from tenfold.agent.mcp_server import mcp_server

        mcp_server(agent).run("stdio")
        return {"host": "", "port": 0}
    server = Server(agent, host, port, os.environ.get("TENFOLD_SERVE_KEY", ""))
    console.say(f"http://{host}:{server.port}/v1 offers the model {MODEL}; Ctrl-C ends it")
    server.serve()
    return {"host": host, "port": server.port}


VERBS: dict[str, Callable[..., object]] = {
    "ask": ask,
    "chat": chat,
    "index": index,
    "fetch": fetch,
    "trace": trace,
    "webpuzzle": webpuzzle,
    "evaluate": evaluate,
    "serve": serve,
    "train": train,
    "reproduce": reproduce,
}
