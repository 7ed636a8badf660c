"""The command line of the agent: one thin function per verb."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from tenfold.agent.config import Budget, Sampling
from tenfold.agent.webpuzzle.verb import webpuzzle
from tenfold.core import console
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.devices import DeviceName
from tenfold.core.files import write_bytes

if TYPE_CHECKING:
    from tenfold.agent.agent import Agent
    from tenfold.agent.judges import Judge
    from tenfold.agent.search import Page

# Where vLLM and llama.cpp's server listen by default, or nearly.
DEFAULT_LLM = "http://localhost:8000/v1"
ProtocolName = Literal["deepdiver", "brief", "search-r1", "native"]


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
    from tenfold.agent.passages import best_passages

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
            console.say("\n[...]\n".join(shown) + "\n")
    if problems and not pages:
        raise UserError("; ".join(problems))
    if problems:
        raise PartialFailure("; ".join(problems), {"pages": pages})
    return {"pages": pages}


def _agent(
    llm: str,
    model: str,
    engine: tuple[str, ...],
    protocol: str,
    budget: Budget,
    sampling: Sampling,
    cache: Path | None,
    offline: bool,
    device: str,
    open_urls: bool = False,
) -> Agent:
    from tenfold.agent.agent import Agent

    return Agent.from_pretrained(
        llm,
        engine,
        model=model,
        budget=budget,
        sampling=sampling,
        protocol=protocol,
        cache=cache,
        offline=offline,
        device=device,
        open_any_url=open_urls,
    )


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

    agent = _agent(
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
    tell = progress(lambda text: print(text, end="", file=sys.stderr, flush=True))
    answer = agent.ask(question, on_event=tell, mode=mode)
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

    agent = _agent(llm, model, engine, protocol, Budget(), Sampling(temperature), cache, offline, device)
    history: list[dict[str, Any]] = []
    asked = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return {"questions": asked}
        try:
            answer = agent.ask(
                question,
                history[-6:],
                on_event=progress(lambda text: print(text, end="", file=sys.stderr, flush=True)),
            )
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


def evaluate(
    questions: Positional[Path | None] = None,
    llm: str = DEFAULT_LLM,
    model: str = "",
    engine: tuple[str, ...] = ("local:index",),
    protocol: ProtocolName = "deepdiver",
    output: Path | None = None,
    limit: int | None = None,
    repeats: int = 1,
    metrics: tuple[Literal["judge:loose", "judge:strict"], ...] = (),
    judge: str = "",
    judge_model: str = "",
    concurrency: int = 8,
    rounds: int = 7,
    queries: int = 5,
    results: int = 2,
    tokens: int = 20_000,
    seconds: float = 300.0,
    temperature: float = 0.6,
    cache: Path | None = None,
    offline: bool = False,
    traces: Path | None = None,
    device: DeviceName = "auto",
    seed: int = 0,
) -> object:
    """Score an agent on a set of questions, and show how its searches grow with difficulty.

    Args:
        questions: JSONL with question and answers (FRAMES as TSV, SimpleQA as CSV); the 1,126 built-in questions over
            the built-in corpus by default, and with `--engine world` those of the closed world.
        llm: as in `ask`; `oracle` follows the known path of each question, without a language model.
        model: as in `ask`.
        engine: as in `ask`; `local:builtin` is the built-in corpus.
        protocol: as in `ask`.
        output: folder for rows and report; the same command again goes on where a stopped run was.
        limit: ask that many questions, drawn evenly over the levels of difficulty.
        repeats: how often each question is asked.
        metrics: judges to ask beside the rules: judge:strict (three differently worded prompts, two of three votes) and
            judge:loose (a score from 1 to 10, 6 passes).
        judge: address of the judge's endpoint; that of --llm by default. Take a model of another family.
        judge_model: the judge's name there.
        concurrency: questions at the same time.
        rounds: as in `ask`.
        queries: as in `ask`.
        results: as in `ask`.
        tokens: as in `ask`.
        seconds: time for one question.
        temperature: as in `ask`.
        cache: as in `ask`.
        offline: as in `ask`.
        traces: folder for the record of every run.
        device: as in `ask`.
        seed: of the sampling and the intervals.

    Example:
        tenfold agent evaluate --llm oracle --engine local:builtin --limit 60
        tenfold agent evaluate --llm tenfold-seeker --protocol brief --engine world --temperature 0 --limit 100
        tenfold agent evaluate questions.jsonl --llm http://localhost:8000/v1 --engine local:index --output scores
    """
    from tenfold.agent import evaluation
    from tenfold.agent.agent import Agent, Answer
    from tenfold.agent.data import Question, embedded_questions, read_questions
    from tenfold.agent.engines import engine as engine_named
    from tenfold.agent.oracle import oracle
    from tenfold.agent.world import World

    if questions is None and engine == ("world",):
        asked = evaluation.spread(World().held_out((1, 2, 3, 4, 5), 100), limit)
    else:
        asked = evaluation.spread(read_questions(questions) if questions else embedded_questions(), limit)
    engines = [engine_named(name, offline) for name in engine]
    budget = Budget(rounds, queries, results, tokens, seconds=seconds)
    if llm == "oracle":
        agent = Agent(oracle(asked), engines, budget, cache=cache, offline=offline)
    else:
        agent = Agent.from_pretrained(
            llm,
            engines,
            model=model,
            budget=budget,
            sampling=Sampling(temperature),
            protocol=protocol,
            cache=cache,
            offline=offline,
            device=device,
        )

    def keep(question: Question, answer: Answer) -> None:
        if traces is not None:
            name = re.sub(r"[^\w.-]+", "_", question.id)[:80]
            answer.trace.save(traces / f"{name}.jsonl")

    referee = _judge(judge or llm, judge_model or ("" if judge else model), cache, output) if metrics else None
    kinds = tuple(name.removeprefix("judge:") for name in dict.fromkeys(metrics))
    report, _ = evaluation.evaluate(
        agent,
        asked,
        output,
        repeats,
        concurrency,
        seed,
        keep,
        referee,
        kinds,  # type: ignore[arg-type]
    )
    for title, columns, rows in evaluation.tables(report):
        console.table(columns, rows, title)
    if report.failed:
        raise PartialFailure(f"{len(report.failed)} questions have no answer: {report.failed[0]}", report)
    return report


def _judge(llm: str, model: str, cache: Path | None, output: Path | None) -> Judge:
    """The judge of an evaluation; its verdicts are kept in the cache, or beside the rows."""
    from tenfold.agent.agent import policy_named
    from tenfold.agent.cache import Cache
    from tenfold.agent.judges import Judge

    if llm == "oracle":
        raise UserError("the oracle judges nothing: name a judge with --judge, for example http://localhost:8000/v1")
    where = cache or (output / "judge.sqlite" if output is not None else None)
    return Judge(policy_named(llm, model, Sampling(0.0)), Cache(where) if where is not None else None)


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

    agent = _agent(llm, model, engine, protocol, Budget(), Sampling(temperature), cache, offline, device)
    if mcp:
        from tenfold.agent.mcp_server import mcp_server

        mcp_server(agent).run("stdio")
        return {"host": "", "port": 0}
    server = Server(agent, host, port, os.environ.get("TENFOLD_SERVE_KEY", ""))
    console.say(f"http://{host}:{server.port}/v1 offers the model {MODEL}; Ctrl-C ends it")
    server.serve()
    return {"host": host, "port": server.port}


def train(
    questions: Positional[Path | None] = None,
    stage: Literal["sft", "grpo"] = "sft",
    llm: str = "tiny",
    engine: tuple[str, ...] = ("world",),
    protocol: ProtocolName = "brief",
    output: Path = Path("trained"),
    traces: tuple[Path, ...] = (),
    steps: int | None = None,
    batch: int | None = None,
    group: int = 14,
    learning_rate: float | None = None,
    temperature: float = 0.9,
    beta: float = 0.001,
    strict_after: int | None = None,
    extra_reward: bool = True,
    mask_truncated: bool = False,
    entropy_floor: float = 0.05,
    dev: int = 0,
    backend: Literal["tenfold", "trl"] = "tenfold",
    rounds: int = 7,
    queries: int = 5,
    results: int = 2,
    tokens: int = 20_000,
    turn_tokens: int = 2_048,
    offline: bool = False,
    device: DeviceName = "auto",
    seed: int = 0,
) -> object:
    """Train a policy to search: a cold start on good runs (sft), then reinforcement by its own runs (grpo).

    Both learn from the runs of `ask` and `evaluate`, token by token as they were. A run that was stopped goes on with
    the same command. What comes out is a folder for `--llm hf:OUTPUT/model`.

    Args:
        questions: JSONL with question and answers; by default the closed world's with --engine world, else the built-in
            ones.
        stage: sft or grpo.
        llm: hf: and the folder or hub name of a model, or `tiny` for a new policy of 150,000 parameters for the world.
        engine: where to search, as in `ask`; `world` is the closed world.
        protocol: the form of turns and results; `brief` has no instructions.
        output: folder of the run and of the trained model.
        traces: sft: runs to learn from (files, or folders as `evaluate --traces` writes them); without them a script
            that knows the paths of the questions teaches.
        steps: optimiser steps: 440 by default for sft, 120 for grpo.
        batch: examples of a step of sft (16 by default), or questions of a step of grpo (8 by default; 32 in the
            paper).
        group: grpo: runs of each question.
        learning_rate: 5e-3 for sft and 5e-4 for grpo of a tiny policy by default, else 1e-5 and 1e-6.
        temperature: grpo: of the sampling.
        beta: grpo: weight of the KL penalty.
        strict_after: grpo: step from which the strict grader decides; two thirds of the steps by default.
        extra_reward: grpo: give the extra search reward.
        mask_truncated: grpo: leave runs without an answer out of the loss.
        entropy_floor: grpo: entropy below which the policy counts as collapsing.
        dev: grpo: questions to keep back, on which the best weights are chosen.
        backend: grpo: tenfold's own loop, or TRL's trainer.
        rounds: as in `ask`.
        queries: as in `ask`.
        results: as in `ask`.
        tokens: as in `ask`.
        turn_tokens: longest turn.
        offline: open no connection.
        device: where to train.
        seed: of questions, sampling and new weights.

    Example:
        tenfold agent train --stage sft --output cold
        tenfold agent train --stage grpo --llm hf:cold/model --output searching
        tenfold agent train mine.jsonl --stage sft --llm hf:Qwen/Qwen3-0.6B --traces runs --engine local:index
    """
    from tenfold.agent import stages
    from tenfold.agent.config import GrpoConfig, SftConfig

    small = engine == ("world",)
    config: SftConfig | GrpoConfig
    if stage == "sft":
        config = SftConfig(
            steps=440 if steps is None else steps,
            batch=16 if batch is None else batch,
            learning_rate=(5e-3 if small else 1e-5) if learning_rate is None else learning_rate,
            seed=seed,
        )
    else:
        if traces:
            raise UserError("--traces belongs to --stage sft; grpo learns from runs of its own")
        count = 120 if steps is None else steps
        config = GrpoConfig(
            steps=count,
            questions=8 if batch is None else batch,
            group=group,
            temperature=temperature,
            learning_rate=(5e-4 if small else 1e-6) if learning_rate is None else learning_rate,
            beta=beta,
            strict_after=2 * count // 3 if strict_after is None else strict_after,
            extra=extra_reward,
            mask_truncated=mask_truncated,
            entropy_floor=entropy_floor,
            seed=seed,
        )
    trained = stages.train(
        stage,
        llm,
        engine,
        protocol,
        Budget(rounds, queries, results, tokens, turn_tokens),
        output,
        config,
        questions,
        stages.trace_files(traces),
        dev,
        backend,
        device,
        offline,
    )
    console.say(f"{trained.model}: {stage}, {trained.steps} steps")
    if not trained.finished:
        raise PartialFailure("the run ended early: see its warnings", trained)
    return trained


def reproduce(
    output: Path = Path("results/reproduce/agent.json"),
    seeds: tuple[int, ...] = (0, 1, 2),
    loose_steps: int = 60,
    strict_steps: int = 40,
    quick: bool = False,
    runs: Path = Path("runs/reproduce-agent"),
) -> object:
    """Reproduce the paper's claim at small scale: reinforcement teaches a policy to search as a question needs.

    A policy of 150,000 parameters in a closed world: cold start, GRPO with the loose and then the strict grader, and
    the controls (no extra reward, loose only, facts known by heart). It takes about half an hour of one idle core for
    each seed; a stopped run goes on.

    Args:
        output: result file; plots go beside it.
        seeds: one experiment for each.
        loose_steps: steps of GRPO with the loose grader, up to the switch.
        strict_steps: steps after it.
        quick: a few steps of everything, to see that it works; its figures say nothing.
        runs: folder of the training runs.

    Example:
        tenfold agent reproduce --quick --output quick.json --runs quick
    """
    from dataclasses import replace

    from tenfold.agent import reproduce as experiment

    if not seeds or min(seeds) < 0:
        raise UserError("reproduce needs at least one seed, and none below 0")
    if min(loose_steps, strict_steps) < 1:
        raise UserError("reproduce needs at least one step before the switch of the grader and one after it")
    plan = replace(experiment.Plan(), seeds=seeds, loose=loose_steps, strict=strict_steps)
    if quick:
        plan = experiment.QUICK
    return experiment.reproduce(output, plan, runs)


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
