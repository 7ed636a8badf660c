"""After pre-training: supervised fine-tuning, and reinforcement learning from answers that can be checked, on TRL.

The paper names both stages and not their algorithms (section 3.3); TRL's SFTTrainer and GRPOTrainer do the work here.
This file reads the data, makes reward functions from short words, and leaves a folder that `load_model` and
transformers read.

Data are JSON lines. SFT takes one of three kinds:

    {"prompt": "2 + 2 =", "completion": " 4"}                                   loss on the completion
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}   needs a chat template
    {"text": "..."}                                                             loss on everything

GRPO takes `prompt` (a text, or messages where there is a chat template), and what the rewards compare with: `answer`
for `exact` and `numeric`; all fields go to a function of your own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tenfold.core.console import ProgressBar, UserError, progress
from tenfold.core.devices import resolve_device
from tenfold.core.files import check_writable, make_folder, read_json, write_json
from tenfold.llm.checkpoint import Loaded, load_model, save_hf

if TYPE_CHECKING:
    from tenfold.llm.tokenizer import Tokenizer

Stage = Literal["sft", "grpo"]
Reward = Callable[..., list[float]]
Row = dict[str, Any]

# Of TRL where it is for full fine-tuning; GRPO moves a model that is good already.
LEARNING_RATES = {"sft": 2e-5, "grpo": 1e-6}


@dataclass(frozen=True)
class PostTraining:
    """How a model is post-trained.

    Attributes:
        stage: `sft` or `grpo`.
        steps: optimiser steps.
        batch: sequences in a step and a process; for grpo completions, a multiple of `group`.
        accumulate: forward passes of `batch` sequences in a step.
        learning_rate: peak, after the warm-up; None takes 2e-5 for sft and 1e-6 for grpo.
        warmup: share of the steps over which it rises; then it falls in a straight line to 0.
        length: sft: longest sequence in tokens, what is longer is cut.
        completion: grpo: longest completion in tokens.
        group: grpo: completions of a prompt, which are compared with each other.
        temperature: grpo: of sampling.
        checkpoint_every: steps between checkpoints, from which a run that is called again goes on; 0 writes none.
        seed: of order and sampling.
    """

    stage: Stage
    steps: int
    batch: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.05
    length: int = 1024
    completion: int = 256
    group: int = 8
    temperature: float = 1.0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "length", "completion"):
            if getattr(self, name) < 1:
                raise UserError(f"post-train: {name} must be at least 1, not {getattr(self, name)}")
        if self.stage == "grpo" and (self.group < 2 or self.batch * self.accumulate % self.group):
            raise UserError(
                f"post-train: {self.batch} x {self.accumulate} completions a step are no multiple of a group of "
                f"{self.group} (at least 2)"
            )


@dataclass(frozen=True)
class PostTrained:
    """A finished run.

    Attributes:
        folder: with the model, its tokenizer and `metrics.json`.
        stage: `sft` or `grpo`.
        steps: done.
        examples: lines of data.
        first: the metrics of the first report.
        last: those of the last one.
    """

    folder: Path
    stage: str
    steps: int
    examples: int
    first: dict[str, float]
    last: dict[str, float]


def post_train(
    model: str | Path,
    data: Path | str,
    folder: Path | str,
    settings: PostTraining,
    rewards: Sequence[str] = (),
    device: str = "auto",
) -> PostTrained:
    """Fine-tune a model, or train it on rewards, and write it as a folder in Hugging Face layout.

    Args:
        model: anything that `load_model` takes; it must have a tokenizer.
        data: JSON lines, see above.
        folder: for the result, and for checkpoints.
        settings: stage, steps and the like.
        rewards: for grpo, one or more words, see `make_reward`; their values are added.
        device: `auto`, `cpu` or the accelerator's name.

    Raises:
        UserError: TRL is missing, data that do not fit the stage, an unknown reward, a model without a tokenizer.
    """
    if settings.stage == "grpo" and not rewards:
        raise UserError("post-train: grpo needs a reward: exact, numeric, regex:PATTERN or module:function")
    if settings.stage == "sft" and rewards:
        raise UserError("post-train: sft takes no rewards; they are for the stage grpo")
    functions = [make_reward(word) for word in rewards]
    rows = read_rows(data, settings.stage, rewards)
    folder = Path(folder)
    check_writable(folder)
    trl = _import_trl()

    loaded = load_model(model)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.origin}: has no tokenizer, which post-training needs")
    _check_template(rows, loaded.tokenizer, data)
    checkpoints = _own_checkpoints(folder, settings, rows, rewards) if settings.checkpoint_every else None
    with tempfile.TemporaryDirectory() as work, _quiet():
        trainer = _make_trainer(
            trl, loaded, loaded.tokenizer, rows, checkpoints or Path(work) / "checkpoints", settings, functions, device
        )
        with progress(settings.stage, settings.steps) as bar:
            trainer.add_callback(_mover(bar))
            resumed = checkpoints is not None and any(checkpoints.glob("checkpoint-*"))
            trainer.train(resume_from_checkpoint=True if resumed else None)
        trainer.save_model(str(Path(work) / "after"))
        # The report at the end of a run has no loss of its own.
        history: list[dict[str, float]] = [row for row in trainer.state.log_history if "loss" in row]
        if trainer.accelerator.is_main_process:
            trained = load_model(Path(work) / "after")
            family = "tenfold" if loaded.family == "native" else loaded.family
            save_hf(trained.model, folder, loaded.tokenizer, family, eos=loaded.eos_ids)
            write_json(folder / "metrics.json", {"stage": settings.stage, "settings": settings, "history": history})
    first, last = (history[0], history[-1]) if history else ({}, {})
    return PostTrained(folder, settings.stage, trainer.state.global_step, len(rows), first, last)


def _import_trl() -> Any:
    try:
        import datasets  # noqa: F401
        import trl
    except ImportError as error:
        raise UserError(f"post-train needs TRL ({error}): pip install 'tenfold[llm-post]'") from None
    return trl


def _own_checkpoints(folder: Path, settings: PostTraining, rows: list[Row], rewards: Sequence[str]) -> Path:
    """The folder of a run's checkpoints; UserError where it holds those of another run."""
    checkpoints = make_folder(folder / "checkpoints")
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    run = json.loads(json.dumps({"settings": asdict(settings), "rewards": list(rewards), "data": digest}))
    file = checkpoints / "run.json"
    if file.is_file() and read_json(file) != run:
        raise UserError(f"{checkpoints}: belongs to a run with other settings or data: use another folder or remove it")
    write_json(file, run)
    return checkpoints


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of transformers and datasets: there is one bar, and it is ours."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        datasets.enable_progress_bars()
        logging.enable_progress_bar()


def _make_trainer(
    trl: Any,
    loaded: Loaded,
    tokenizer: Tokenizer,
    rows: list[Row],
    checkpoints: Path,
    settings: PostTraining,
    rewards: list[Reward],
    device: str,
) -> Any:
    """TRL's trainer, silent: what it reports goes to callbacks."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback

    from tenfold.llm.transformers_model import TenfoldForCausalLM

    model = TenfoldForCausalLM.from_decoder(loaded.model.float())
    model.generation_config.eos_token_id = list(loaded.eos_ids)
    chosen = resolve_device(device)
    common: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate or LEARNING_RATES[settings.stage],
        "warmup_steps": round(settings.warmup * settings.steps),
        "seed": settings.seed,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "steps" if settings.checkpoint_every else "no",
        "save_steps": max(settings.checkpoint_every, 1),
        "save_total_limit": 2,
        "use_cpu": chosen.type == "cpu",
        "bf16": chosen.type != "cpu",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer.to_transformers(),
    }
    if settings.stage == "sft":
        trainer = trl.SFTTrainer(**options, args=trl.SFTConfig(**common, max_length=settings.length))
    else:
        grpo = trl.GRPOConfig(
            **common,
            num_generations=settings.group,
            max_completion_length=settings.completion,
            temperature=settings.temperature,
        )
        trainer = trl.GRPOTrainer(**options, args=grpo, reward_funcs=rewards)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _mover(bar: ProgressBar) -> Any:
    """A callback that moves the bar with each report."""
    from transformers import TrainerCallback

    class Mover(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if "loss" in rest["logs"]:
                bar.advance(note=f"loss {float(rest['logs']['loss']):.3f}")

    return Mover()


# --- data -------------------------------------------------------------------------------------------------------------


def read_rows(path: Path | str, stage: Stage, rewards: Sequence[str] = ()) -> list[Row]:
    """The lines of a data file, checked for the stage.

    Raises:
        UserError: no such file, not JSON lines, or a line that lacks what the stage needs.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object")
        row = _checked(row, stage, rewards, where)
        if rows and row.keys() != rows[0].keys():
            raise UserError(f"{where} has the fields {', '.join(row)} where the first line has {', '.join(rows[0])}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no examples")
    return rows


def _checked(row: Row, stage: Stage, rewards: Sequence[str], where: str) -> Row:
    """The row, an answer as text; UserError where it lacks what the stage needs."""
    if stage == "grpo":
        if not (isinstance(row.get("prompt"), str) or _is_messages(row.get("prompt"))):
            raise UserError(f"{where}: grpo needs a `prompt`, a text or a list of messages")
        needs_answer = [word for word in rewards if word in ("exact", "numeric")]
        if needs_answer and not isinstance(row.get("answer"), str | int | float):
            raise UserError(f"{where}: the reward {needs_answer[0]} needs an `answer`")
        if "numeric" in rewards and last_number(str(row["answer"])) is None:
            raise UserError(f"{where}: its answer {row['answer']!r} holds no number, which the reward numeric compares")
        return row | ({"answer": str(row["answer"])} if "answer" in row else {})
    pair = isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
    if not (pair or isinstance(row.get("text"), str) or _is_messages(row.get("messages"))):
        raise UserError(f"{where}: sft needs `prompt` and `completion`, `messages`, or `text`")
    return row


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _check_template(rows: list[Row], tokenizer: Tokenizer, data: Path | str) -> None:
    conversational = "messages" in rows[0] or isinstance(rows[0].get("prompt"), list)
    if conversational and not tokenizer.settings.get("chat_template"):
        raise UserError(
            f"{data}: holds messages, and the model's tokenizer has no chat template: give `prompt` and `completion` "
            "as text, or put a chat_template into its tokenizer_config.json"
        )


# --- rewards ----------------------------------------------------------------------------------------------------------


def make_reward(word: str) -> Reward:
    """A reward function in TRL's form, from a word.

    Args:
        word: `exact`: 1 where the completion, stripped, is the answer. `numeric`: 1 where the last number of the
            completion equals that of the answer to 1e-6. `regex:PATTERN`: 1 where the pattern is found.
            `module:function`: a function of yours, importable from the current folder, that takes `completions` and the
            fields of the data as keyword lists and gives a number for each completion.

    Raises:
        UserError: another word, a wrong pattern, a function that is not there.
    """
    if word == "exact":
        return _named("exact", lambda text, answer: float(text.strip() == answer.strip()))
    if word == "numeric":
        return _named("numeric", lambda text, answer: float(_same_number(text, answer)))
    kind, _, rest = word.partition(":")
    if kind == "regex" and rest:
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise UserError(f"reward {word!r}: not a regular expression ({error})") from None
        return _named("regex", lambda text, answer: float(pattern.search(text) is not None))
    if rest:
        return _imported(kind, rest, word)
    raise UserError(f"unknown reward {word!r}: exact, numeric, regex:PATTERN or module:function")


def _named(name: str, judge: Callable[[str, str], float]) -> Reward:
    """A reward from the judgement of one completion; TRL reports it by its name."""

    def reward(completions: list[Any], answer: list[str] | None = None, **fields: Any) -> list[float]:
        answers = answer or [""] * len(completions)
        return [judge(text_of(c), a) for c, a in zip(completions, answers, strict=True)]

    reward.__name__ = name
    return reward


def text_of(completion: Any) -> str:
    """The text of a completion, which TRL gives as a text or as messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text; commas in it group digits."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(text: str, answer: str) -> bool:
    given, wanted = last_number(text), last_number(answer)
    return given is not None and wanted is not None and abs(given - wanted) <= 1e-6 * max(1.0, abs(wanted))


def _imported(module: str, name: str, word: str) -> Reward:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"reward {word!r}: the module cannot be imported ({error})") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"reward {word!r}: {module} has no function {name}")
    return found
