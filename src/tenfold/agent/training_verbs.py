"""The verbs that train and measure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from tenfold.agent.config import Budget, Sampling
from tenfold.agent.verb_inputs import DEFAULT_LLM, ProtocolName, agent_of
from tenfold.core import console
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.devices import DeviceName

if TYPE_CHECKING:
    from tenfold.agent.judges import Judge, Kind

JudgeName = Literal["judge:loose", "judge:strict"]
_KINDS: dict[JudgeName, Kind] = {"judge:loose": "loose", "judge:strict": "strict"}


def evaluate(
    questions: Positional[Path | None] = None,
    llm: str = DEFAULT_LLM,
    model: str = "",
    engine: tuple[str, ...] = ("local:index",),
    protocol: ProtocolName = "deepdiver",
    output: Path | None = None,
    limit: int | None = None,
    repeats: int = 1,
    metrics: tuple[JudgeName, ...] = (),
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
    budget = Budget(rounds, queries, results, tokens, seconds=seconds)
    if llm == "oracle":
        engines = [engine_named(name, offline) for name in engine]
        agent = Agent(oracle(asked), engines, budget, cache=cache, offline=offline)
    else:
        agent = agent_of(llm, model, engine, protocol, budget, Sampling(temperature), cache, offline, device)

    def keep(question: Question, answer: Answer) -> None:
        if traces is not None:
            name = re.sub(r"[^\w.-]+", "_", question.id)[:80]
            answer.trace.save(traces / f"{name}.jsonl")

    referee = _judge(judge or llm, judge_model or ("" if judge else model), cache, output) if metrics else None
    kinds = [_KINDS[name] for name in dict.fromkeys(metrics)]
    report, _ = evaluation.evaluate(agent, asked, output, repeats, concurrency, seed, keep, referee, kinds)
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
