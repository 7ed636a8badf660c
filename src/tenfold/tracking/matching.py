"""How well boxes and tracks go together, and who gets whom: pure functions on arrays."""

from __future__ import annotations

import numpy as np

from tenfold.tracking.config import MatchScore

UNMATCHED, SUPPRESSED = -1, -2


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    """Softmax along an axis, float32."""
    result = values - values.max(axis=axis, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=axis, keepdims=True)
    return result


def bisoftmax(products: np.ndarray) -> np.ndarray:
    """Mean of the softmax over tracks and the softmax over boxes (QDTrack): high only if both choose each other.

    Args:
        products: N x M inner products of embeddings that are not normalised.
    """
    result = softmax(products, 1)
    result += softmax(products, 0)
    result /= 2
    return result


def cosine(products: np.ndarray, embeds: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Cosine similarity from inner products: N x M."""
    lengths = np.sqrt(np.einsum("ne,ne->n", embeds, embeds)).clip(1e-12)
    memory_lengths = np.sqrt(np.einsum("me,me->m", memory, memory)).clip(1e-12)
    return products / lengths[:, None] / memory_lengths


def open_world_scores(embeds: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Mean of bi-softmax and cosine, the score of the open-world tracker.

    Args:
        embeds: N x E of the boxes.
        memory: M x E of the tracks.
    """
    products = embeds @ memory.T
    result = bisoftmax(products)
    result += cosine(products, embeds, memory)
    result /= 2
    return result


def match_scores(embeds: np.ndarray, memory: np.ndarray, kind: MatchScore) -> np.ndarray:
    """One of the scores of the tracker for fixed classes: N x M."""
    products = embeds @ memory.T
    if kind == "bisoftmax":
        return bisoftmax(products)
    if kind == "softmax":
        return softmax(products, 1)
    return cosine(products, embeds, memory)


def distance_gate(
    boxes: np.ndarray,
    frame: int | np.ndarray,
    memory_boxes: np.ndarray,
    memory_frames: np.ndarray,
    max_distance: float,
    fps: float,
) -> np.ndarray:
    """A factor that falls off outside of the radius in which a track can be by now.

    Args:
        boxes: N x 4.
        frame: number of the boxes' frame (or of each box's).
        memory_boxes: M x 4, where the tracks were last seen.
        memory_frames: M, when.
        max_distance: radius in pixels at once; it grows by e every fps / 6 frames.
        fps: frames a second.

    Returns:
        N x M in 0..1.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    memory_centres = (memory_boxes[:, :2] + memory_boxes[:, 2:]) / 2
    offset = centres[:, None] - memory_centres
    distance = np.sqrt((offset * offset).sum(-1))
    gap = np.atleast_1d(frame)[:, None] - memory_frames
    # Beyond e^80 every picture is within the radius, and float32 would overflow.
    radius = max_distance * np.exp(np.minimum(gap / (fps / 6), 80))
    return np.exp(-np.maximum(distance - radius, 0) / (100 / fps)).astype(np.float32)


def greedy(
    scores: np.ndarray,
    threshold: float,
    may_take: np.ndarray,
    takeable: np.ndarray | None = None,
    duplicate_score: float | None = None,
) -> np.ndarray:
    """Each box in turn takes the track that scores highest for it; a taken track scores 0 for all others.

    Args:
        scores: N x M, boxes in the order in which they choose; taken columns are overwritten.
        threshold: a score must be above it, 0 or more.
        may_take: N bool; a box that may not leaves its best track to others.
        takeable: M bool; False for remembered background, on which a choice is spent. None: all are.
        duplicate_score: a box that may not take its best track, but scores above this, is marked as its duplicate.

    Returns:
        N int: number of the track, `UNMATCHED`, or `SUPPRESSED` for a duplicate.
    """
    best = scores.argmax(1)
    top = scores[np.arange(len(scores)), best]
    result = np.full(len(scores), UNMATCHED)
    taken: list[int] = []
    is_taken = np.zeros(scores.shape[1], bool)
    # Zeroing columns only lowers a box's best score, so that those below the threshold now are out for good.
    for row in np.flatnonzero(top > threshold).tolist():
        column, score = int(best[row]), top[row]
        if is_taken[column]:
            scores[row, taken] = 0
            column = int(scores[row].argmax())
            score = scores[row, column]
            if not score > threshold:
                continue
        if takeable is not None and not takeable[column]:
            continue
        if may_take[row]:
            result[row] = column
            taken.append(column)
            is_taken[column] = True
        elif duplicate_score is not None and score > duplicate_score:
            result[row] = SUPPRESSED
    return result


def hungarian(
    scores: np.ndarray, threshold: float, may_take: np.ndarray, takeable: np.ndarray | None = None
) -> np.ndarray:
    """The pairing with the largest sum of scores, among pairs above the threshold; arguments as `greedy`."""
    from scipy.optimize import linear_sum_assignment

    result = np.full(len(scores), UNMATCHED)
    allowed = (scores > threshold) & may_take[:, None]
    if takeable is not None:
        allowed &= takeable
    rows, columns = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
    if not len(rows):
        return result
    part = allowed[np.ix_(rows, columns)]
    worth = np.where(part, scores[np.ix_(rows, columns)], 0)
    chosen_rows, chosen_columns = linear_sum_assignment(worth, maximize=True)
    fits = part[chosen_rows, chosen_columns]
    result[rows[chosen_rows[fits]]] = columns[chosen_columns[fits]]
    return result
