"""The loss of group relative policy optimisation over the tokens that the policy chose, and over no others.

Section 2.4 of the paper: the clipped ratio of probabilities times the advantage, less a KL penalty. What was put before
the model (results, headers of turns, the call for a final turn) counts in none of its parts: not in the ratio, not in
the KL, not in the number of tokens that the sum is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclass(frozen=True)
class GrpoLoss:
    """The loss of a batch and what to watch beside it.

    Args:
        loss: scalar, with its graph.
        kl: mean KL divergence from the reference per chosen token.
        clipped: share of chosen tokens whose ratio was clipped.
        tokens: how many tokens counted.
    """

    loss: Tensor
    kl: float
    clipped: float
    tokens: int


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of given tokens.

    Args:
        logits: B x T x V; position t predicts token t.
        ids: B x T, integers.
        temperature: that the tokens were sampled at.

    Returns:
        B x T, float32.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def completion_log_probs(
    model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, completion: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the last `completion` tokens of each row.

    Args:
        model: a causal language model of `transformers`: it is called with `input_ids` and `attention_mask`.
        ids: B x (P + C), prompts padded on the left, completions on the right.
        attention_mask: B x (P + C), 0 at padding.
        completion: C.
        temperature: that the tokens were sampled at.

    Returns:
        B x C, float32.
    """
    logits = model(input_ids=ids, attention_mask=attention_mask).logits
    return token_log_probs(logits[:, -completion - 1 : -1], ids[:, -completion:], temperature)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference_log_probs: Tensor | None = None,
    *,
    loss_type: LossType = "grpo",
    beta: float = 0.001,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    longest: int | None = None,
    batch_tokens: float | None = None,
) -> GrpoLoss:
    """The loss of a batch of rollouts.

    Args:
        log_probs: B x T, of the policy, with a graph.
        old_log_probs: B x T, of the policy that sampled the tokens.
        advantages: B, or B x T.
        mask: B x T, 1 for tokens that the policy chose, 0 for padding and for everything that it was given.
        reference_log_probs: B x T, of the reference policy; needed where `beta` is above 0.
        loss_type: how token losses become one number. `grpo`: mean over each row's tokens, then over rows (Shao et al.,
            2024, arXiv 2402.03300). `bnpo`: mean over all tokens of the batch. `dr_grpo`: sum over B x `longest` (Liu
            et al., 2025, arXiv 2503.20783). `dapo`: sum over `batch_tokens` (Yu et al., 2025, arXiv 2503.14476).
        beta: weight of the KL penalty (paper: 0.001).
        epsilon: clip range of the ratio below 1, and above it unless `epsilon_high` says otherwise (0.2 is our choice;
            the paper does not state it).
        epsilon_high: clip range above 1.
        longest: limit of completion tokens, for `dr_grpo`; T by default.
        batch_tokens: chosen tokens of the whole batch over all processes and steps of accumulation, per process, for
            `dapo`; those of this call by default.

    Raises:
        ValueError: `beta` without a reference.
    """
    if beta and reference_log_probs is None:
        raise ValueError("a KL penalty needs the log-probabilities of a reference")
    mask = mask.to(log_probs.dtype)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    # Outside the mask the numbers mean nothing, and may be infinite: they must not reach the graph.
    inside = mask > 0
    ratio = torch.where(inside, log_probs - old_log_probs, 0.0).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    token_loss = -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    kl = torch.zeros_like(token_loss)
    if reference_log_probs is not None:
        difference = torch.where(inside, reference_log_probs - log_probs, 0.0)
        kl = difference.exp() - difference - 1  # the estimator k3: never negative, unbiased
    if beta:
        token_loss = token_loss + beta * kl
    per_row = (token_loss * mask).sum(-1)
    tokens = mask.sum()
    if loss_type == "grpo":
        loss = (per_row / mask.sum(-1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = per_row.sum() / tokens.clamp(min=1.0)
    elif loss_type == "dr_grpo":
        loss = per_row.sum() / (mask.shape[0] * (longest or mask.shape[1]))
    elif loss_type == "dapo":
        loss = per_row.sum() / max(1.0, float(tokens) if batch_tokens is None else batch_tokens)
    else:
        raise ValueError(f"unknown loss type {loss_type!r}")
    with torch.no_grad():
        clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
        counted = max(1.0, float(tokens))
        return GrpoLoss(loss, float((kl * mask).sum() / counted), float((clipped * mask).sum() / counted), int(tokens))
