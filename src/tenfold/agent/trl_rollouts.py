"""The environment inside TRL's GRPOTrainer: for models that need what TRL has (several processes, vLLM, PEFT, logging).

TRL asks a `rollout_func` for prompts, completions and an `env_mask` that is 1 at tokens of the model; here they come
from the same runs as everywhere else in this room. The reward of a rollout hangs on its whole group, so it is computed
where the group is, and handed to TRL's reward function as a finished number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.agent.config import GrpoConfig, Sampling
from tenfold.agent.data import Question
from tenfold.agent.outcome import Rollout
from tenfold.agent.rewards import Stage, group_rewards
from tenfold.agent.rollouts import Batched, Setting, play
from tenfold.agent.training import Grader, grade_by_rules
from tenfold.core.console import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def split(rollout: Rollout) -> tuple[list[int], list[int], list[int]]:
    """A run as TRL wants it: ids up to the first token of the policy, ids from there on, and the latter's mask.

    A run in which the policy wrote nothing has its last token as a completion that counts nowhere.
    """
    first = rollout.mask.index(1) if 1 in rollout.mask else len(rollout.ids) - 1
    return list(rollout.ids[:first]), list(rollout.ids[first:]), list(rollout.mask[first:])


def make_rollout_func(
    setting: Setting, questions: Sequence[Question], config: GrpoConfig, grader: Grader = grade_by_rules
) -> Callable[[list[str], Any], dict[str, Any]]:
    """The function that GRPOTrainer takes as `rollout_func`.

    Args:
        setting: engine, protocol, budget.
        questions: those of the data set, whose column `prompt` holds their texts.
        config: group, temperature, reward.
        grader: grades of one run.
    """
    known: Mapping[str, Question] = {question.question: question for question in questions}

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        asked = [known[prompt] for prompt in prompts]
        if len(asked) % config.group or any(
            len({question.question for question in asked[first : first + config.group]}) > 1
            for first in range(0, len(asked), config.group)
        ):
            raise UserError(
                f"grpo: a process got {len(asked)} prompts that are no whole groups of {config.group}: the extra "
                "reward needs whole groups, so make the batch of a process a multiple of the group"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        was_training = model.training
        policy = Batched(model, trainer.processing_class, Sampling(config.temperature, 1.0))
        step, rank = trainer.state.global_step, trainer.accelerator.process_index
        first_seed = ((config.seed * 1_000_003 + step) * 4_096 + rank) * len(asked)
        rollouts = play(setting, policy, asked, [first_seed + number for number in range(len(asked))])
        model.train(was_training)
        stage: Stage = "loose" if step < config.strict_after else "strict"
        totals: list[float] = []
        for first in range(0, len(asked), config.group):
            graded = [grader(asked[n], rollouts[n]) for n in range(first, first + config.group)]
            totals += [reward.total for reward in group_rewards(graded, stage, config.extra)]
        parts = [split(rollout) for rollout in rollouts]
        return {
            "prompt_ids": [prompt for prompt, _, _ in parts],
            "completion_ids": [completion for _, completion, _ in parts],
            "logprobs": None,  # TRL computes those of the policy that sampled itself
            "env_mask": [mask for _, _, mask in parts],
            "group_reward": totals,
            "search_rounds": [float(rollout.rounds) for rollout in rollouts],
        }

    return rollout_func


def group_reward(completions: Sequence[Any], group_reward: Sequence[float], **columns: Any) -> list[float | None]:
    """TRL's reward function: what `rollout_func` has computed over the groups."""
    log = columns.get("log_metric")
    if log is not None and columns.get("search_rounds"):
        rounds = columns["search_rounds"]
        log("search_rounds", sum(rounds) / len(rounds))
    return list(group_reward)


def train_with_trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    questions: Sequence[Question],
    config: GrpoConfig,
    folder: Path | str,
    grader: Grader = grade_by_rules,
    use_cpu: bool = True,
) -> list[dict[str, float]]:
    """Train a policy in place with TRL's trainer.

    Args:
        model: the policy. TRL keeps the reference itself; it has to be able to load the model anew from
            `model.config.name_or_path`, so a model made in memory is saved first.
        tokenizer: its tokenizer, with a chat template and a token to pad with.
        setting: engine, protocol, budget.
        questions: to train on.
        config: steps, group, reward and the like.
        folder: for TRL's checkpoints.
        grader: grades of one run.
        use_cpu: leave accelerators alone.

    Returns:
        TRL's log, one row a step.

    Raises:
        UserError: TRL is not installed.
    """
    try:
        import trl
        from datasets import Dataset
        from transformers import PrinterCallback, ProgressCallback
    except ImportError as error:
        raise UserError(f"--backend trl needs TRL ({error}): pip install 'tenfold[llm-post]'") from None
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.questions * config.group,
        num_generations=config.group,
        max_completion_length=setting.budget.tokens,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup,
        beta=config.beta,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        loss_type=config.loss_type,
        scale_rewards=config.scale,
        mask_truncated_completions=False,  # a run's last token ends its turn, and says nothing of limits
        max_grad_norm=config.clip_norm,
        weight_decay=0.0,
        seed=config.seed,
        logging_steps=1,
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        report_to="none",
        use_cpu=use_cpu,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        reward_funcs=group_reward,
        train_dataset=Dataset.from_list([{"prompt": question.question} for question in questions]),
        rollout_func=make_rollout_func(setting, questions, config, grader),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    resumed = any(Path(folder).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if resumed else None)
    return [row for row in trainer.state.log_history if "loss" in row]
