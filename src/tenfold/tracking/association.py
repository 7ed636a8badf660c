"""From boxes with embeddings to identities, frame by frame: the trackers of MASA (spec section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tenfold.tracking import matching
from tenfold.tracking.boxes import iou
from tenfold.tracking.config import MatcherConfig
from tenfold.tracking.memory import TrackMemory
from tenfold.tracking.motion import KalmanBank


@dataclass(frozen=True, eq=False)
class Associated:
    """The boxes of a frame that belong to tracks, best score first.

    Attributes:
        kept: K numbers of the given boxes.
        ids: K identities, from 0.
    """

    kept: np.ndarray
    ids: np.ndarray


_NOTHING = Associated(np.zeros(0, np.int64), np.zeros(0, np.int64))


class Associator:
    """Gives boxes their identities.

    With `matcher="tao"` and `"bdd"`, greedy assignment and no motion, identities and order are those of MasaTaoTracker
    and MasaBDDTracker.

    Args:
        config: the rules.
    """

    def __init__(self, config: MatcherConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget all tracks; identities start again at 0."""
        self.memory = TrackMemory()
        self.motion = KalmanBank() if self.config.motion else None
        self.next_id = 0
        self._backdrops: list[tuple[np.ndarray, np.ndarray]] = []  # embeddings, labels; newest first
        self._frame = -1

    def update(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        embeds: np.ndarray,
        frame: int | None = None,
    ) -> Associated:
        """Take the boxes of the next frame.

        A frame without boxes leaves the memory as it is; tracks age by the numbers of the frames that have some.

        Args:
            boxes: N x 4, pixels; finite and with an area.
            scores: N.
            labels: N, classes.
            embeds: N x E.
            frame: its number; by default one more than the last.
        """
        frame = self._frame + 1 if frame is None else frame
        passed = max(frame - self._frame, 1) if self._frame >= 0 else 1
        self._frame = frame
        if self.motion is not None:
            self.motion.predict(min(passed, self.config.memory_frames))
        if not len(boxes):
            return _NOTHING
        order = np.argsort(-np.asarray(scores), kind="stable")
        boxes, scores = np.asarray(boxes, np.float32)[order], np.asarray(scores, np.float32)[order]
        keep = ~self._superfluous(boxes, scores)
        order = order[keep]
        boxes, scores = boxes[keep], scores[keep]
        labels, embeds = np.asarray(labels, np.int64)[order], np.asarray(embeds, np.float32)[order]
        found = self._assign(boxes, scores, labels, embeds, frame)
        ids = self._identities(found, scores)
        self._remember(found, ids, boxes, labels, embeds, frame)
        tracked = ids >= 0
        return Associated(order[tracked], ids[tracked])

    def _superfluous(self, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Boxes, best first, that overlap a better one by so much that they are distractors or duplicates."""
        config = self.config
        count = len(boxes)
        if config.matcher == "tao":
            # Sorted by score, the weak ones are the last; only they can be dropped.
            first = int(np.searchsorted(-scores, -np.float32(config.distractor_score), side="right"))
            limits = np.full((count - first, 1), config.duplicate_iou, np.float32)
        else:
            first = 0
            limits = np.where(scores < config.obj_score, config.duplicate_iou, config.class_iou)[:, None]
        result = np.zeros(count, bool)
        if first < count:
            better = np.arange(count) < np.arange(first, count)[:, None]
            result[first:] = ((iou(boxes[first:], boxes) > limits.astype(np.float32)) & better).any(1)
        return result

    def _assign(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, embeds: np.ndarray, frame: int
    ) -> np.ndarray:
        """For each box the row of its track in the memory, or `UNMATCHED`, or `SUPPRESSED`."""
        config, memory = self.config, self.memory
        if not len(memory) or not len(boxes):
            return np.full(len(boxes), matching.UNMATCHED)
        takeable = None
        if config.matcher == "tao":
            worth = matching.open_world_scores(embeds, memory.embeds)
            if config.max_distance is not None:
                worth *= matching.distance_gate(
                    boxes, frame, memory.boxes, memory.frames, config.max_distance, config.fps
                )
        else:
            known, known_labels = memory.embeds, memory.labels
            if self._backdrops:
                known = np.concatenate((known, *[embeds for embeds, _ in self._backdrops]))
                known_labels = np.concatenate((known_labels, *[labels for _, labels in self._backdrops]))
            worth = matching.match_scores(embeds, known, config.score)
            if config.with_classes:
                worth *= labels[:, None] == known_labels
            takeable = np.arange(len(known)) < len(memory)
        if self.motion is not None:
            worth = self._with_motion(worth, boxes, frame)
        may_take = scores > config.obj_score
        if config.assignment == "hungarian":
            return matching.hungarian(worth, config.match_score, may_take, takeable)
        duplicate = config.duplicate_score if config.matcher == "bdd" else None
        return matching.greedy(worth, config.match_score, may_take, takeable, duplicate)

    def _with_motion(self, worth: np.ndarray, boxes: np.ndarray, frame: int) -> np.ndarray:
        """Appearance and overlap with the expected place, weighed; nothing beyond reach. Background has no place.

        The longer a track was not seen, the less its expected place says: the weight of the overlap falls by e every
        `motion_frames`, and the reach, in heights of the box, grows by `reach_growth` a frame.
        """
        assert self.motion is not None
        config, count = self.config, len(self.memory)
        expected = self.motion.boxes()
        gap = frame - self.memory.frames
        weight = (config.motion * np.exp(-(gap - 1) / config.motion_frames)).astype(np.float32)
        known = worth[:, :count]
        known *= 1 - weight
        known += weight * iou(boxes, expected)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        places = (expected[:, :2] + expected[:, 2:]) / 2
        reach = (config.reach + config.reach_growth * gap) * (expected[:, 3] - expected[:, 1])
        offset = centres[:, None] - places
        known[(offset * offset).sum(-1) > reach * reach] = 0
        return worth

    def _identities(self, found: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Identity of each box: its track's, a new one, or the mark that it has none."""
        ids = found.copy()
        matched = found >= 0
        if matched.any():
            ids[matched] = self.memory.ids[found[matched]]
        born = (found == matching.UNMATCHED) & (scores > self.config.init_score)
        count = int(born.sum())
        ids[born] = np.arange(self.next_id, self.next_id + count)
        self.next_id += count
        return ids

    def _remember(
        self,
        found: np.ndarray,
        ids: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        embeds: np.ndarray,
        frame: int,
    ) -> None:
        config, memory = self.config, self.memory
        matched = found >= 0
        if matched.any():
            rows = found[matched]
            memory.update(
                rows,
                config.momentum,
                boxes=boxes[matched],
                labels=labels[matched],
                embeds=embeds[matched],
                frames=np.full(len(rows), frame),
            )
            if self.motion is not None:
                self.motion.update(rows, boxes[matched])
        born = (ids >= 0) & ~matched
        memory.append(
            ids=ids[born],
            boxes=boxes[born],
            labels=labels[born],
            embeds=embeds[born],
            frames=np.full(int(born.sum()), frame),
        )
        if self.motion is not None:
            self.motion.append(boxes[born])
        if config.matcher == "bdd":
            self._remember_background(ids, boxes, labels, embeds)
        if len(memory):
            recent = frame - memory.frames < config.memory_frames
            memory.keep(recent)
            if self.motion is not None:
                self.motion.keep(recent)

    def _remember_background(self, ids: np.ndarray, boxes: np.ndarray, labels: np.ndarray, embeds: np.ndarray) -> None:
        """Unmatched, unborn boxes of the last frames, so that background takes its share of the softmax."""
        rows = np.flatnonzero(ids == matching.UNMATCHED)
        better = np.arange(len(boxes)) < rows[:, None]
        hidden = ((iou(boxes[rows], boxes) > self.config.duplicate_iou) & better).any(1)
        rows = rows[~hidden]
        self._backdrops.insert(0, (embeds[rows], labels[rows]))
        del self._backdrops[self.config.backdrop_frames :]
