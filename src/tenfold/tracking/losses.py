"""Losses of the appearance network: which boxes of two views are the same thing (spec section 3).

All take dense matrices, rows being boxes of the key view and columns boxes of the reference view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def unbiased_contrast(key: Tensor, reference: Tensor, targets: Tensor, normalise: bool = True) -> Tensor:
    """Softmax contrast in which several positives of a row count as one (UnbiasedContrastLoss of the release).

    Args:
        key: K x E embeddings.
        reference: N x E embeddings.
        targets: K x N, 1 where both belong to the same instance.
        normalise: divide the positives' part of the denominator by their number, as published.

    Returns:
        The mean over rows that have a positive; 0 (with a gradient) where none has.
    """
    positive = targets > 0
    distances = key @ reference.t()
    shifted = distances - distances.detach().amax(1, keepdim=True)
    exponents = shifted.exp()
    count = positive.sum(1)
    share = exponents.masked_fill(~positive, 0).sum(1)
    if normalise:
        share = share / count.clamp_min(1)
    denominator = share + exponents.masked_fill(positive, 0).sum(1)
    # A row without positives has a denominator of its negatives, and no term; it is left out of the mean.
    rows = -((shifted - denominator.clamp_min(1e-30).log()[:, None]).masked_fill(~positive, 0).sum(1))
    rows = rows / count.clamp_min(1)
    valid = count > 0
    return (rows * valid).sum() / valid.sum().clamp_min(1)


def margin_l2(
    key: Tensor, reference: Tensor, targets: Tensor, negative_margin: float = 0.1, negatives_per_positive: float = 3.0
) -> Tensor:
    """Squared error of cosines to 1 and 0, on all positives and the hardest negatives (auxiliary loss of QDTrack).

    Args:
        key: K x E.
        reference: N x E.
        targets: K x N.
        negative_margin: a negative below this cosine costs nothing.
        negatives_per_positive: negatives that are kept for each positive.
    """
    positive = targets > 0
    cosine = functional.normalize(key, dim=1) @ functional.normalize(reference, dim=1).t()
    cosine = torch.where(positive, cosine, cosine - negative_margin).clamp(0, 1)
    errors = (cosine - positive.to(cosine.dtype)) ** 2
    positives = int(positive.sum())
    hard = errors[~positive]
    if len(hard) / (positives + 1e-6) > negatives_per_positive:
        hard = hard.topk(int(positives * negatives_per_positive)).values
    kept = torch.cat((errors[positive], hard))
    return kept.sum() / max(len(kept), 1) + 0 * cosine.sum()


def multi_positive_cross_entropy(key: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """log(1 + sum over pairs of exp(negative - positive)): QDTrack's loss, for comparison.

    Args:
        key: K x E.
        reference: N x E.
        targets: K x N.
    """
    positive = targets > 0
    distances = key @ reference.t()
    negatives = distances.masked_fill(positive, float("-inf")).logsumexp(1)
    positives = (-distances).masked_fill(~positive, float("-inf")).logsumexp(1)
    valid = positive.any(1)
    total = torch.where(valid & (~positive).any(1), negatives + positives, distances.new_tensor(float("-inf")))
    rows = functional.softplus(total)  # log(1 + e^x); e^-inf is a row with nothing to compare
    return rows[valid].sum() / valid.sum().clamp_min(1)
