"""The two stages of the paper's training: a cold start on good traces, then GRPO on rollouts of the policy itself.

Both learn from ids and masks as the environment made them: nothing is tokenised again, and no token that the policy
was given counts. The loop around them is the house's (`tenfold.core.training`): a run that is killed and started again
with the same arguments ends with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold.agent.collapse import CollapseGuard
from tenfold.agent.config import GrpoConfig, Sampling, SftConfig
from tenfold.agent.data import Question
from tenfold.agent.grpo import grpo_loss
from tenfold.agent.outcome import Rollout
from tenfold.agent.rewards import (
    Graded,
    Reward,
    Stage,
    advantages,
    exact_match,
    f1,
    group_rewards,
    same_value,
    sub_exact_match,
    without_marks,
)
from tenfold.agent.rollouts import Batched, Example, QuestionOf, Setting, play
from tenfold.core.console import warn
from tenfold.core.training import FitConfig, FitResult, fit
from tenfold.core.training.schedule import constant, cosine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ExamplesOf = Callable[[Sequence[int]], list[Example]]
Grader = Callable[[Question, Rollout], Graded]
Evaluate = Callable[[nn.Module, int], Mapping[str, float]]

_WARMUP_SHARE, _COSINE_FLOOR = 0.03, 0.1
# Words that an answer may have beyond those of the right one before the third vote calls it a list of candidates.
_SPARE_WORDS = 12


# --- Token ids to tensors -----------------------------------------------------------------------------------------


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Ids and mask of runs, each B x T, padded with zeros on the right.

    A causal model needs no attention mask there: what stands to the right is seen by nothing that counts.
    """
    longest = max(len(item.ids) for item in examples)
    ids = torch.zeros((len(examples), longest), dtype=torch.long)
    mask = torch.zeros((len(examples), longest))
    for row, item in enumerate(examples):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.mask)] = torch.tensor(item.mask, dtype=torch.float32)
    return ids, mask


def chosen_log_probs(
    model: nn.Module, ids: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the tokens that the policy chose.

    Logits are made for those columns only in which some row has such a token.

    Args:
        model: a causal language model of `transformers`.
        ids: B x T.
        mask: B x T; the first column is 0.
        temperature: that the tokens were sampled at.

    Returns:
        Log-probabilities, the mask, and the entropies of the distributions (without a graph), each B x C for the C
        columns.
    """
    columns = mask.any(0).nonzero().squeeze(-1)
    columns = columns[columns > 0]
    logits = model(input_ids=ids, logits_to_keep=columns - 1).logits.float() / temperature
    log_all = logits.log_softmax(-1)
    picked = log_all.gather(-1, ids[:, columns].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_all.exp() * log_all).sum(-1)
    return picked, mask[:, columns], entropy


# --- Cold start ---------------------------------------------------------------------------------------------------


class _Examples:
    """The examples of an SFT run as batches."""

    def __init__(self, examples_of: ExamplesOf) -> None:
        self.examples_of = examples_of

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return collate(self.examples_of(indices))


def sft(
    model: PreTrainedModel,
    examples_of: ExamplesOf,
    config: SftConfig,
    folder: Path | str,
    *,
    evaluate: Evaluate | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> FitResult:
    """Fine-tune a model in place on good runs, or go on with the run in `folder`.

    Args:
        model: the policy.
        examples_of: the examples with these numbers of an endless stream, a pure function of the numbers.
        config: steps and the like.
        folder: of the run.
        evaluate: as in `tenfold.core.training.fit`.
        recipe: what else defines the run; it is compared on resume.
        device: `auto`, `cpu` or the accelerator's name.
    """

    def loss(forward: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
        ids, mask = batch
        log_probs, chosen, _ = chosen_log_probs(forward, ids, mask)
        value = -(log_probs * chosen).sum() / chosen.sum()
        return value, {"mask_fraction": float(mask.mean()), "tokens": float(mask.sum())}

    return fit(
        model,
        _Examples(examples_of),
        loss,
        lambda module: torch.optim.AdamW(module.parameters(), config.learning_rate, (0.9, 0.98), weight_decay=0.0),
        FitConfig(
            steps=config.steps,
            batch_size=config.batch,
            seed=config.seed,
            clip_norm=config.clip_norm,
            checkpoint_every=config.checkpoint_every,
            log_every=max(1, config.steps // 100),
            log_with=(),
        ),
        folder,
        schedule=cosine(config.steps, max(1, round(_WARMUP_SHARE * config.steps)), _COSINE_FLOOR),
        evaluate=evaluate,
        recipe={"sft": asdict(config), **(recipe or {})},
        device=device,
    )


# --- Grades without a judge ---------------------------------------------------------------------------------------


def grade_by_rules(question: Question, rollout: Rollout) -> Graded:
    """Grades of a run by string metrics, for questions with short answers.

    Loose: a score of 1 + 9 F1, rounded up, so that half of the words pass (6 of 10). Strict: three votes (exact match;
    the same date, number or words; the right answer within a few words), of which two pass; a list of candidates fails
    in all three.
    """
    said = without_marks(rollout.answer)
    golds = question.answers
    longest = max(len(gold.split()) for gold in golds) + _SPARE_WORDS
    brief = len(said.split()) <= longest
    return Graded(
        searches=rollout.rounds,
        loose_score=math.ceil(1 + 9 * f1(said, golds)),
        strict_votes=(
            bool(exact_match(said, golds)),
            brief and bool(same_value(said, golds)),
            brief and bool(sub_exact_match(said, golds)),
        ),
        format_ok=rollout.format_ok and rollout.status in ("answered", "forced"),
        answered=bool(rollout.answer),
    )


# --- GRPO ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """One group of rollouts with its rewards: every rollout of one question, and of no other."""

    question: Question
    rollouts: tuple[Rollout, ...]
    rewards: tuple[Reward, ...]


def play_groups(
    setting: Setting,
    policy: Batched,
    questions: Sequence[Question],
    grader: Grader,
    stage: Stage,
    config: GrpoConfig,
    step: int,
) -> list[Played]:
    """The rollouts of a step, all at once, and their rewards. A question that is drawn twice makes two groups."""
    total = len(questions) * config.group
    seeds = [(config.seed * 1_000_003 + step) * total + number for number in range(total)]
    asked = [question for question in questions for _ in range(config.group)]
    rollouts = play(setting, policy, asked, seeds)
    played = []
    for number, question in enumerate(questions):
        group = rollouts[number * config.group : (number + 1) * config.group]
        graded = [grader(question, rollout) for rollout in group]
        played.append(Played(question, tuple(group), tuple(group_rewards(graded, stage, config.extra))))
    return played


def figures(groups: Sequence[Played]) -> dict[str, float]:
    """What a step's rollouts were like: parts of the reward, rounds and accuracy by difficulty, lengths, masks."""
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = len(rollouts)
    row = {
        "reward": sum(reward.total for reward in rewards) / count,
        "format": sum(reward.format for reward in rewards) / count,
        "accuracy": sum(reward.accuracy for reward in rewards) / count,
        "bonus_rate": sum(reward.extra for reward in rewards) / count,
        "rounds": sum(rollout.rounds for rollout in rollouts) / count,
        "queries": sum(rollout.queries for rollout in rollouts) / count,
        "response_tokens": sum(sum(rollout.mask) for rollout in rollouts) / count,
        "mask_fraction": sum(sum(rollout.mask) for rollout in rollouts) / sum(len(item.mask) for item in rollouts),
        "unanswered": sum(not rollout.answer for rollout in rollouts) / count,
        "equal_groups": sum(len({reward.total for reward in group.rewards}) == 1 for group in groups) / len(groups),
    }
    for hops in sorted({group.question.hops for group in groups if group.question.hops is not None}):
        level = [group for group in groups if group.question.hops == hops]
        members = sum(len(group.rollouts) for group in level)
        row[f"rounds/{hops}"] = sum(rollout.rounds for group in level for rollout in group.rollouts) / members
        row[f"accuracy/{hops}"] = sum(reward.accuracy for group in level for reward in group.rewards) / members
    return row


class _Numbers:
    """Batches of question numbers: the questions are drawn, and played, by the loss."""

    def batch(self, indices: Sequence[int]) -> list[int]:
        return list(indices)


def grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel,
    setting: Setting,
    question_of: QuestionOf,
    config: GrpoConfig,
    folder: Path | str,
    *,
    grader: Grader = grade_by_rules,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    best_metric: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> FitResult:
    """Train a policy in place by its own rollouts, or go on with the run in `folder`.

    Args:
        model: the policy; on its first step it should be `reference`.
        tokenizer: its tokenizer, with a chat template.
        reference: what the KL penalty holds it to; it is not changed.
        setting: engine, protocol and budget: the environment is that of `ask` and `evaluate`.
        question_of: question number n of an endless stream.
        config: steps, group, rewards and the like.
        folder: of the run; `metrics.jsonl` there has a row for every step.
        grader: grades of one run; rules by default.
        evaluate: as in `tenfold.core.training.fit`.
        evaluate_every: steps between evaluations; 0 evaluates at the end only.
        best_metric: the evaluated metric whose best weights are kept.
        recipe: what else defines the run; it is compared on resume.
        device: `auto`, `cpu` or the accelerator's name.
    """
    reference = reference.eval().requires_grad_(False)
    policy = Batched(model, tokenizer, Sampling(config.temperature, 1.0))
    watch = _Watch(Path(folder) / "metrics.jsonl", config.entropy_floor)
    warmed = constant(config.warmup)

    def loss(forward: nn.Module, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        step = numbers[0] // config.questions
        stage: Stage = "loose" if step < config.strict_after else "strict"
        model.eval()
        groups = play_groups(setting, policy, [question_of(n) for n in numbers], grader, stage, config, step)
        model.train()
        value, row = _loss_of(forward, reference, groups, config)
        row |= {"strict": float(stage == "strict"), "learning_factor": watch.guard.factor}
        watch.see(row)
        return value, dict(row)

    return fit(
        model,
        _Numbers(),
        loss,
        lambda module: torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=0.0),
        FitConfig(
            steps=config.steps,
            batch_size=config.questions,
            seed=config.seed,
            clip_norm=config.clip_norm,
            loss_spike_factor=None,  # the loss of GRPO is near 0 and of either sign
            checkpoint_every=config.checkpoint_every,
            evaluate_every=evaluate_every,
            best_metric=best_metric,
            log_every=1,
            log_with=(),
        ),
        folder,
        schedule=lambda step: warmed(step) * watch.at(step).factor,
        evaluate=evaluate,
        recipe={"grpo": asdict(config), **(recipe or {})},
        should_stop=lambda progress: watch.at(progress.step).stop,
        device=device,
    )


def _loss_of(
    forward: nn.Module, reference: nn.Module, groups: Sequence[Played], config: GrpoConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step, and its figures."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    better = [value for group in groups for value in advantages([item.total for item in group.rewards], config.scale)]
    device = next(forward.parameters()).device
    ids, mask = (tensor.to(device) for tensor in collate([Example(item.ids, item.mask) for item in rollouts]))
    counted = mask
    if config.mask_truncated:
        counted = mask * torch.tensor([float(bool(item.answer)) for item in rollouts], device=device).unsqueeze(1)
    log_probs, chosen, entropy = chosen_log_probs(forward, ids, mask, config.temperature)
    with torch.no_grad():
        reference_log_probs, _, _ = chosen_log_probs(reference, ids, mask, config.temperature)
    columns = mask.any(0)
    columns[0] = False
    result = grpo_loss(
        log_probs,
        log_probs.detach(),  # one update a batch: the policy that sampled is the policy that learns
        torch.tensor(better, dtype=torch.float32, device=device),
        counted[:, columns],
        reference_log_probs,
        loss_type=config.loss_type,
        beta=config.beta,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
    )
    row = figures(groups)
    row |= {
        "kl": result.kl,
        "clipped": result.clipped,
        "entropy": float((entropy * chosen).sum() / chosen.sum().clamp(min=1.0)),
    }
    return result.loss, row


class _Watch:
    """The collapse guard of a run at any step; after a resume it is made anew from the run's rows."""

    def __init__(self, metrics: Path, entropy_floor: float) -> None:
        self.metrics, self.entropy_floor = metrics, entropy_floor
        self.guard = CollapseGuard(entropy_floor)

    def at(self, step: int) -> CollapseGuard:
        """The guard after `step` steps."""
        if self.guard.rows != step:
            self.guard = CollapseGuard(self.entropy_floor)
            lines = self.metrics.read_text().splitlines() if step else []
            for row in map(json.loads, lines):
                if "kl" in row and row["step"] <= step:
                    self.guard.see(row)
        return self.guard

    def see(self, row: Mapping[str, float]) -> None:
        """Take in the figures of the step that is being done."""
        sign = self.guard.see(row)
        if sign:
            warn(
                f"step {self.guard.rows}: a sign of collapse: {sign}; "
                + (
                    "the run ends"
                    if self.guard.stop
                    else f"the learning rate is now {self.guard.factor:g} of what it was"
                )
            )
