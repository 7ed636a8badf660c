"""One stage of training from names and files, as the verb `train` has them: a model, questions or traces, an engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.agent.config import Budget, GrpoConfig, SftConfig
from tenfold.agent.data import Question, embedded_questions, read_questions
from tenfold.agent.engines import Local
from tenfold.agent.engines import engine as engine_named
from tenfold.agent.oracle import oracle
from tenfold.agent.policies import Scripted
from tenfold.agent.protocol import protocol as protocol_named
from tenfold.agent.rollouts import Batched, Example, Setting, Taught, example, play, taught
from tenfold.agent.search import Search
from tenfold.agent.trace import Recorded, Trace
from tenfold.agent.training import ExamplesOf, grade_by_rules, grpo, sft
from tenfold.agent.world import RELATIONS, RL_WEIGHTS, SFT_WEIGHTS, World, tiny_policy
from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.files import make_folder
from tenfold.core.training.data import Shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """A finished stage.

    Args:
        stage: `sft` or `grpo`.
        model: folder with the model and its tokenizer, as `--llm hf:FOLDER` takes it.
        steps: done.
        finished: False where the collapse guard ended the run.
        metrics: the last figures.
        dev: accuracy on the questions that were kept back; None where there are none.
    """

    stage: str
    model: Path
    steps: int
    finished: bool
    metrics: dict[str, Any]
    dev: float | None


def load_policy(llm: str, seed: int, offline: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train: `tiny` is a new one for the closed world, `hf:FOLDER` one of `transformers`.

    Raises:
        UserError: another name, a model that cannot be loaded, a tokenizer without a chat template.
    """
    from tenfold.agent.local_model import LocalModel

    if llm == "tiny":
        return tiny_policy(seed)
    if not llm.startswith("hf:"):
        raise UserError(
            f"--llm {llm}: training needs the weights: give hf: and the folder or hub name of a transformers model, or "
            "tiny for a new small one"
        )
    loaded = LocalModel.from_pretrained(llm.removeprefix("hf:"), "cpu", None, offline)
    return loaded.model, loaded.tokenizer


def examples_of_traces(
    files: Sequence[Path],
    questions: Sequence[Question],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: str,
) -> list[Example]:
    """Good runs of another model as examples: its turns and results, in the tokens of this one.

    A trace is taken if all its turns kept to the form and it ended with an answer; where its question is among those
    given, the answer has to be right by the strict rules as well.

    Args:
        files: traces.
        questions: with right answers; may be empty.
        model: that learns.
        tokenizer: its tokenizer.
        protocol: the form in which results are shown to it.

    Raises:
        UserError: no trace is good.
    """
    known = {question.question: question for question in questions}
    examples = []
    for file in files:
        trace = Trace.load(file)
        start = trace.first("run_start")
        replies = trace.replies()
        if not replies or trace.first("final").get("status") != "answered":
            continue
        recorded = Recorded(trace)
        setting = Setting(recorded, protocol_named(protocol), trace.lifted_budget(), recorded)
        question = known.get(start["question"], Question(file.stem, start["question"], ()))
        rollout = taught(setting, model, tokenizer, question, Scripted(replies, start["policy"]))
        graded = grade_by_rules(question, rollout) if question.answers else None
        if rollout.format_ok and (graded is None or graded.strict_pass):
            examples.append(example(rollout))
    if not examples:
        raise UserError(f"none of the {len(files)} traces is one to learn from: well-formed and right to the end")
    console.say(f"{len(examples)} of {len(files)} traces are good examples")
    return examples


def train(
    stage: Literal["sft", "grpo"],
    llm: str,
    engines: Sequence[str],
    protocol: str,
    budget: Budget,
    output: Path,
    config: SftConfig | GrpoConfig,
    questions: Path | None = None,
    traces: Sequence[Path] = (),
    dev: int = 0,
    backend: Literal["tenfold", "trl"] = "tenfold",
    device: str = "cpu",
    offline: bool = False,
) -> Trained:
    """Do one stage, or go on with it.

    Args:
        stage: `sft` or `grpo`.
        llm: as in `load_policy`.
        engines: names of engines; `world` alone is the closed world.
        protocol: the form of turns and results.
        budget: of one question.
        output: folder of the run; the model is in `model` there.
        config: of the stage.
        questions: a set of questions; the built-in ones, or the world's, by default.
        traces: sft: runs to learn from; without them the script that knows the paths of the questions teaches.
        dev: grpo: questions to keep back, on which the best weights are chosen.
        backend: grpo: this room's loop or TRL's.
        device: `auto`, `cpu` or the accelerator's name.
        offline: open no connection.
    """
    model, tokenizer = load_policy(llm, config.seed, offline)
    world = World() if tuple(engines) == ("world",) else None
    asked = [] if world is not None and questions is None else _questions(questions)
    made = [engine_named(name, offline) for name in engines]
    local = [engine for engine in made if isinstance(engine, Local)]
    engine = made[0] if len(made) == 1 and (world or local) else Search(made)
    setting = Setting(engine, protocol_named(protocol), budget, local[0] if local else None)
    recipe = {"llm": llm, "engines": list(engines), "protocol": protocol, "budget": asdict(budget)}
    recipe["questions"] = str(questions or ("world" if world else "built-in"))
    make_folder(output)
    if isinstance(config, SftConfig):
        examples_of = _examples(model, tokenizer, setting, asked, traces, protocol, world, config)
        result = sft(model, examples_of, config, output, recipe=recipe, device=device)
        return _save(stage, model, tokenizer, output, result.steps, result.finished, result.metrics, None)
    keep = (
        asked[len(asked) - dev :] if dev and asked else world.held_out((1, 2, 3, 4), dev // 4) if world and dev else []
    )
    asked = asked[: len(asked) - len(keep)] if asked else []
    if world is None and not asked:
        raise UserError(f"--dev keeps back all {len(keep)} questions: there is none left to train on")
    order = Shuffled(len(asked), config.seed)

    def question_of(number: int) -> Question:
        if asked:
            return asked[order(number)]
        assert world is not None
        return world.draw(number, RL_WEIGHTS, config.seed)

    if backend == "trl":
        from tenfold.agent.trl_rollouts import train_with_trl

        drawn = asked or [question_of(number) for number in range(config.steps * config.questions)]
        start = model.config.name_or_path
        if not start:  # TRL loads the reference by name
            model.save_pretrained(output / "start")
            model.config._name_or_path = str(output / "start")
        rows = train_with_trl(model, tokenizer, setting, drawn, config, output / "trl", use_cpu=device == "cpu")
        return _save(stage, model, tokenizer, output, len(rows), True, dict(rows[-1]) if rows else {}, None)

    def evaluate(module: Any, step: int) -> Mapping[str, float]:
        rollouts = play(setting, Batched(module, tokenizer), keep, [0] * len(keep))
        graded = [grade_by_rules(question, rollout) for question, rollout in zip(keep, rollouts, strict=True)]
        return {
            "dev": sum(item.strict_pass and item.format_ok for item in graded) / len(graded),
            "dev_rounds": sum(item.searches for item in graded) / len(graded),
        }

    result = grpo(
        model,
        tokenizer,
        copy.deepcopy(model),
        setting,
        question_of,
        config,
        output,
        evaluate=evaluate if keep else None,
        evaluate_every=config.checkpoint_every if keep else 0,
        best_metric="dev" if keep else None,
        recipe=recipe,
        device=device,
    )
    if result.best_weights is not None:
        from tenfold.core.checkpoint import load_weights

        load_weights(model, result.best_weights)
    return _save(stage, model, tokenizer, output, result.steps, result.finished, result.metrics, result.best)


def _questions(path: Path | None) -> list[Question]:
    return read_questions(path) if path is not None else embedded_questions()


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    asked: Sequence[Question],
    traces: Sequence[Path],
    protocol: str,
    world: World | None,
    config: SftConfig,
) -> ExamplesOf:
    """Examples by their numbers: of traces, of the world's expert, or of the script that knows the questions' paths."""
    still = copy.deepcopy(model)  # its tokens are wanted only, and its mode must not change in training
    if traces:
        examples = examples_of_traces(traces, asked, still, tokenizer, protocol)
        order = Shuffled(len(examples), config.seed)
        return lambda numbers: [examples[order(number)] for number in numbers]
    if world is not None:
        expert = Taught(still, tokenizer, world.expert())

        def of_world(numbers: Sequence[int]) -> list[Example]:
            drawn = [world.draw(number, SFT_WEIGHTS, config.seed) for number in numbers]
            return [example(rollout) for rollout in play(setting, expert, drawn, [0] * len(drawn))]

        return of_world
    pathed = [question for question in asked if question.path and set(question.relations).isdisjoint(RELATIONS)]
    if not pathed:
        raise UserError("sft needs --traces: these questions have no paths that a script could follow")
    order = Shuffled(len(pathed), config.seed)
    teacher = Taught(still, tokenizer, oracle(pathed, bare=protocol == "brief"))
    kept: dict[int, Example | None] = {}

    def good(item: int) -> Example:
        """The run of a question, or of the next one that the script gets right within the budget."""
        for other in (*range(item, len(pathed)), *range(item)):
            if other not in kept:
                question = pathed[other]
                rollout = play(setting, teacher, [question], [0])[0]
                right = rollout.format_ok and grade_by_rules(question, rollout).strict_pass
                kept[other] = example(rollout) if right else None
            found = kept[other]
            if found is not None:
                return found
        raise UserError("the script answers none of these questions with this engine, protocol and budget")

    def of_oracle(numbers: Sequence[int]) -> list[Example]:
        return [good(order(number)) for number in numbers]

    return of_oracle


def _save(
    stage: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    steps: int,
    finished: bool,
    metrics: Mapping[str, Any],
    dev: float | None,
) -> Trained:
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = make_folder(output / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Trained(stage, folder, steps, finished, dict(metrics), dev)


def trace_files(paths: Sequence[Path]) -> list[Path]:
    """The traces of files and folders. Raises UserError where there is none."""
    found = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if paths and not found:
        raise UserError(f"{paths[0]}: holds no traces (*.jsonl)")
    return found
