"""Our language models inside lm-evaluation-harness (`pip install 'tenfold[llm-eval]'`)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tenfold.core.console import UserError
from tenfold.llm.evaluation import score_continuations
from tenfold.llm.generation import LanguageModel, Sampling


class HarnessModel(TemplateLM):
    """A language model as the harness asks for it.

    Args:
        model: the language model.
        batch: texts at a time.
    """

    def __init__(self, model: LanguageModel, batch: int = 8) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, which also stands before a text that has nothing before it."""
        return self.model.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, nothing added."""
        return self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(nats, share == 1.0) for nats, share in score_continuations(self.model, pairs, self.batch, "requests")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the harness's own windows, after the token that ends a document."""
        results = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.model.context,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            results.append(sum(nats for nats, _ in score_continuations(self.model, pairs, self.batch, "requests")))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string."""
        texts = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            length = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
            draws = bool(settings.get("do_sample")) and float(settings.get("temperature", 1.0)) > 0
            sampling = Sampling(
                temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
                top_p=float(settings.get("top_p", 1.0)),
                top_k=int(settings.get("top_k", 0)),
            )
            length = min(length, self.model.context - 1)
            # The end of a prompt that is too long is taken, as the harness does with its own models.
            ids = self.model.tokenizer.encode(prompt)[length - self.model.context :]
            stop = [until] if isinstance(until, str) else until
            texts.append(self.model.continue_ids([ids], length, sampling, stop)[0].text)
        return texts


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks of the harness.

    Args:
        model: the language model.
        tasks: names that `lm_eval ls tasks` lists, or YAML files of tasks.
        limit: most examples of a task.
        shots: worked examples before each question; None takes the task's own number.
        batch: texts at a time.
        seed: of the choice of worked examples.

    Returns:
        Metrics by task, standard errors beside them.

    Raises:
        UserError: an unknown task, or one whose data set is not here and cannot be fetched.
    """
    files = [task for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    loaded = []
    for task in tasks:
        if task in files:
            if not Path(task).is_file():
                raise UserError(f"{task}: no such task file")
        elif task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them all"
            raise UserError(f"unknown task {task!r}: {hint}")
        loaded += _load(manager, task)
    result = simple_evaluate(
        model=HarnessModel(model, batch),
        tasks=loaded,
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert result is not None  # only other ranks of a distributed run get nothing
    scores = {**result.get("results", {}), **result.get("groups", {})}
    return {name: _numbers(row) for name, row in scores.items()}


def _load(manager: TaskManager, task: str) -> list[Any]:
    """The task's examples, loaded apart from the run, so that a data set that cannot be had is one clear line."""
    try:
        found = manager.load(task)
    except Exception as error:  # data set libraries raise anything, from OSError to ValueError
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"task {task}: its data set cannot be loaded ({type(error).__name__}: {reason}): run it once with a "
            "network connection, or give a task file whose data are local"
        ) from None
    return [*(found["groups"].values() or found["tasks"].values())]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
