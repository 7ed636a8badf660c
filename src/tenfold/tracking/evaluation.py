"""HOTA, CLEAR and IDF1 by the reference library (trackeval), and TETA; what each benchmark leaves out first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tenfold.core.console import UserError
from tenfold.tracking.boxes import areas, iou
from tenfold.tracking.data.table import BoxTable

Benchmark = Literal["plain", "mot17", "mot20", "kitti"]
# Classes of MOT16/17/20 that a result may match without being right or wrong (numbers of `motchallenge.CLASSES`).
_DISTRACTORS = {"mot17": (2, 7, 8, 12), "mot20": (2, 6, 7, 8, 12)}
_KITTI_LEAST_HEIGHT = 25


@dataclass(frozen=True)
class Scores:
    """Scores of one sequence, or of several taken together; shares are 0..1.

    Attributes:
        hota: mean over 19 thresholds of the geometric mean of `det_a` and `ass_a` (so `det_a` and `ass_a`).
        det_a: detection accuracy.
        ass_a: association accuracy.
        loc_a: mean overlap of what was matched.
        mota: 1 - (misses + false alarms + switches) / boxes.
        idf1: F1 of the best global pairing of identities.
        id_switches: number of changes of a true object's identity.
        fragments: number of times a true object is lost and found again.
        mostly_tracked: true objects tracked for at least 0.8 of their time.
        mostly_lost: true objects tracked for less than 0.2 of it.
        truth_boxes: boxes to be found.
        result_boxes: boxes that were judged.
    """

    hota: float
    det_a: float
    ass_a: float
    loc_a: float
    mota: float
    idf1: float
    id_switches: int
    fragments: int
    mostly_tracked: int
    mostly_lost: int
    truth_boxes: int
    result_boxes: int


def evaluate_sequence(truth: BoxTable, result: BoxTable, benchmark: Benchmark = "plain") -> Scores:
    """Score one sequence.

    Args:
        truth: ground truth; where it lists annotated frames, only they are judged.
        result: boxes with identities.
        benchmark: what is left out before: `plain` (MOT15, DanceTrack, SportsMOT) rows marked as ignored only, `mot17`
            and `mot20` also matches of distractor classes, `kitti` also what lies in ignored regions or is low.

    Raises:
        UserError: trackeval is missing, an identity that occurs twice in a frame, or nothing to be found.
    """
    return evaluate_sequences({"sequence": (truth, result)}, benchmark)


def evaluate_sequences(pairs: Mapping[str, tuple[BoxTable, BoxTable]], benchmark: Benchmark = "plain") -> Scores:
    """Score several sequences taken together, by summing counts as the reference does; see `evaluate_sequence`."""
    return _scores(detailed(pairs, benchmark))


def evaluate_each(
    pairs: Mapping[str, tuple[BoxTable, BoxTable]], benchmark: Benchmark = "plain"
) -> tuple[dict[str, Scores], Scores]:
    """Scores of each sequence, by its name, and of all taken together; see `evaluate_sequence`."""
    judged = _judge(pairs, benchmark)
    return {name: _scores(_combined({name: own})) for name, own in judged.items()}, _scores(_combined(judged))


def detailed(pairs: Mapping[str, tuple[BoxTable, BoxTable]], benchmark: Benchmark = "plain") -> dict[str, Any]:
    """Every field of trackeval's HOTA, CLEAR and Identity, as `FAMILY.FIELD`; see `evaluate_sequences`."""
    return _combined(_judge(pairs, benchmark))


def _judge(
    pairs: Mapping[str, tuple[BoxTable, BoxTable]], benchmark: Benchmark
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every field of each family of scores, of each sequence by itself."""
    metrics = _metrics()
    judged = {}
    for name, (truth, result) in pairs.items():
        data = _arrays(*_prepared(truth, result, benchmark), name)
        judged[name] = {family: metric.eval_sequence(data) for family, metric in metrics.items()}
    return judged


def _combined(judged: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """What `_judge` found of some sequences, taken together, as `FAMILY.FIELD`."""
    fields: dict[str, Any] = {}
    for family, metric in _metrics().items():
        results = {name: own[family] for name, own in judged.items()}
        combined = metric.combine_sequences(results) if len(results) > 1 else next(iter(results.values()))
        fields |= {f"{family}.{field}": value for field, value in combined.items()}
    if not fields["CLEAR.CLR_TP"] + fields["CLEAR.CLR_FN"]:
        raise UserError("the ground truth has no box to be found, so nothing can be scored")
    return fields


def _scores(fields: Mapping[str, Any]) -> Scores:
    mean = {name: float(np.mean(fields[f"HOTA.{name}"])) for name in ("HOTA", "DetA", "AssA", "LocA")}
    return Scores(
        hota=mean["HOTA"],
        det_a=mean["DetA"],
        ass_a=mean["AssA"],
        loc_a=mean["LocA"],
        mota=float(fields["CLEAR.MOTA"]),
        idf1=float(fields["Identity.IDF1"]),
        id_switches=int(fields["CLEAR.IDSW"]),
        fragments=int(fields["CLEAR.Frag"]),
        mostly_tracked=int(fields["CLEAR.MT"]),
        mostly_lost=int(fields["CLEAR.ML"]),
        truth_boxes=int(fields["CLEAR.CLR_TP"] + fields["CLEAR.CLR_FN"]),
        result_boxes=int(fields["CLEAR.CLR_TP"] + fields["CLEAR.CLR_FP"]),
    )


def _metrics() -> dict[str, Any]:
    try:
        from trackeval.metrics import CLEAR, HOTA, Identity
    except ImportError:
        raise UserError("trackeval is not installed: run pip install 'tenfold[tracking-eval]'") from None
    return {"HOTA": HOTA(), "CLEAR": CLEAR({"PRINT_CONFIG": False}), "Identity": Identity({"PRINT_CONFIG": False})}


def _arrays(truth: BoxTable, result: BoxTable, name: str) -> dict[str, Any]:
    """What trackeval's metrics take: identities from 0 without gaps, and the overlaps of each frame."""
    frames = sorted(truth.annotated_frames) if truth.annotated_frames is not None else None
    numbers = range(max(truth.last_frame, result.last_frame) + 1) if frames is None else frames
    if frames is not None:
        truth, result = (table.select(np.isin(table.frames, frames)) for table in (truth, result))
    renumbered = []
    for table, what in ((truth, "ground truth"), (result, "result")):
        pairs = np.stack((table.frames, table.ids), axis=1)
        unique, counts = np.unique(pairs, axis=0, return_counts=True)
        if (counts > 1).any():
            frame, identity = unique[int(counts.argmax())]
            raise UserError(f"{name}: identity {identity} occurs twice in frame {frame} of the {what}")
        renumbered.append(np.unique(table.ids, return_inverse=True))
    (truth_ids, truth_numbers), (result_ids, result_numbers) = renumbered
    data: dict[str, Any] = {"gt_ids": [], "tracker_ids": [], "similarity_scores": []}
    for number in numbers:
        ours, theirs = truth.rows(number), result.rows(number)
        data["gt_ids"].append(truth_numbers[ours])
        data["tracker_ids"].append(result_numbers[theirs])
        data["similarity_scores"].append(iou(truth.boxes_xyxy[ours], result.boxes_xyxy[theirs], np.float64))
    return data | {
        "num_timesteps": len(data["gt_ids"]),
        "num_gt_ids": len(truth_ids),
        "num_tracker_ids": len(result_ids),
        "num_gt_dets": len(truth),
        "num_tracker_dets": len(result),
    }


def _prepared(truth: BoxTable, result: BoxTable, benchmark: Benchmark) -> tuple[BoxTable, BoxTable]:
    """Both tables without what the benchmark does not judge."""
    ignored = truth.ignored
    if benchmark in ("mot17", "mot20"):
        judged = np.ones(len(result), bool)
        for frame in np.unique(result.frames):
            ours, theirs = truth.rows(frame), result.rows(frame)
            rows, columns = _pairs(iou(truth.boxes_xyxy[ours], result.boxes_xyxy[theirs], np.float64))
            wrong = np.isin(truth.labels[ours][rows], _DISTRACTORS[benchmark])
            judged[theirs.start + columns[wrong]] = False
        return truth.select((truth.labels == 1) & ~ignored), result.select(judged)
    if benchmark == "kitti":
        judged = np.ones(len(result), bool)
        for frame in np.unique(result.frames):
            ours, theirs = truth.rows(frame), result.rows(frame)
            real, regions = ~ignored[ours], truth.boxes_xyxy[ours][ignored[ours]]
            boxes = result.boxes_xyxy[theirs]
            free = np.ones(len(boxes), bool)
            free[_pairs(iou(truth.boxes_xyxy[ours][real], boxes, np.float64))[1]] = False
            low = boxes[:, 3] - boxes[:, 1] <= _KITTI_LEAST_HEIGHT
            inside = (share_inside(boxes, regions) >= 0.5 - np.finfo(float).eps).any(1)
            judged[theirs] = ~(free & (low | inside))
        return truth.select(~ignored), result.select(judged)
    return truth.select(~ignored), result


def _pairs(overlaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the best pairing at an overlap of at least 0.5."""
    from scipy.optimize import linear_sum_assignment

    worth = np.where(overlaps >= 0.5 - np.finfo(float).eps, overlaps, 0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    fits = worth[rows, columns] > 0
    return rows[fits], columns[fits]


def share_inside(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Which share of each box's own area lies in each region: N x M."""
    corner = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    sides = (np.minimum(boxes[:, None, 2:], regions[None, :, 2:]) - corner).clip(0)
    return sides.prod(-1) / np.maximum(areas(boxes), 1e-9)[:, None]


@dataclass(frozen=True)
class Teta:
    """Tracking every thing accuracy; shares are 0..1, means over classes and thresholds."""

    teta: float
    loc_a: float
    assoc_a: float
    cls_a: float


def teta(pairs: Sequence[tuple[BoxTable, BoxTable]]) -> Teta:
    """TETA of sequences (Li et al., Tracking Every Thing in the Wild, ECCV 2022, section 4).

    A result is judged only where it overlaps some true box by 0.5 or more (annotations are not exhaustive), and then
    belongs to the cluster of the true box that it overlaps most. Localisation and association ignore classes;
    classification is judged on what was localised. `LocA` and `ClsA` are TP / (TP + FP + FN), `AssocA` the mean of
    TPA / (TPA + FPA + FNA) over localised boxes.

    Args:
        pairs: truth and result of each sequence, with the same class names.

    Raises:
        UserError: the class names differ, or nothing is to be found.
    """
    classes = sorted({int(label) for truth, _ in pairs for label in truth.labels[~truth.ignored]})
    if not classes:
        raise UserError("the ground truth has no box to be found, so nothing can be scored")
    for truth, result in pairs:
        if truth.class_names != result.class_names:
            raise UserError("truth and result do not have the same class names: TETA needs them")
    thresholds = np.arange(0.05, 0.99, 0.05)
    matched = [_localise(truth, result) for truth, result in pairs]
    hits = [
        [_hits(*pair, own, threshold) for pair, own in zip(pairs, matched, strict=True)] for threshold in thresholds
    ]
    parts = np.array([[_class_scores(pairs, matched, at, label) for at in hits] for label in classes])
    loc_a, assoc_a, cls_a = parts.mean((0, 1))
    return Teta(float((loc_a + assoc_a + cls_a) / 3), float(loc_a), float(assoc_a), float(cls_a))


@dataclass(frozen=True, eq=False)
class _Localised:
    """Rows of truth and result that were paired, their overlap, and the true row whose cluster each result is in."""

    truth_rows: np.ndarray
    result_rows: np.ndarray
    overlaps: np.ndarray
    cluster: np.ndarray


def _localise(truth: BoxTable, result: BoxTable) -> _Localised:
    """Pair boxes frame by frame as HOTA does, preferring identities that go together over the whole sequence."""
    from scipy.optimize import linear_sum_assignment

    true_ids, true_numbers = np.unique(truth.ids, return_inverse=True)
    found_ids, found_numbers = np.unique(result.ids, return_inverse=True)
    together = np.zeros((len(true_ids), len(found_ids)))
    cluster = np.full(len(result), -1)
    overlaps = {}
    for frame in np.unique(truth.frames):
        ours, theirs = truth.rows(frame), result.rows(frame)
        overlap = iou(truth.boxes_xyxy[ours], result.boxes_xyxy[theirs], np.float64)
        overlaps[frame] = overlap
        if not overlap.size:
            continue
        union = overlap.sum(0)[None] + overlap.sum(1)[:, None] - overlap
        share = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
        np.add.at(together, (true_numbers[ours][:, None], found_numbers[theirs][None]), share)
        best = overlap.argmax(0)
        inside = overlap[best, np.arange(overlap.shape[1])] >= 0.5 - np.finfo(float).eps
        cluster[theirs] = np.where(inside, ours.start + best, -1)
    counts = np.bincount(true_numbers, minlength=len(true_ids))[:, None] + np.bincount(
        found_numbers, minlength=len(found_ids)
    )
    alignment = together / np.maximum(counts - together, 1e-12)
    pairs: list[tuple[int, int, float]] = []
    for frame, overlap in overlaps.items():
        ours, theirs = truth.rows(frame), result.rows(frame)
        worth = alignment[np.ix_(true_numbers[ours], found_numbers[theirs])] * overlap
        for row, column in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
            pairs.append((ours.start + row, theirs.start + column, overlap[row, column]))
    columns = np.array(pairs).reshape(-1, 3)
    return _Localised(columns[:, 0].astype(int), columns[:, 1].astype(int), columns[:, 2], cluster)


@dataclass(frozen=True, eq=False)
class _Hits:
    """What is localised at one threshold: rows of truth and of result, and TPA / (TPA + FPA + FNA) of each pair."""

    truth_rows: np.ndarray
    result_rows: np.ndarray
    association: np.ndarray


def _hits(truth: BoxTable, result: BoxTable, pairing: _Localised, threshold: float) -> _Hits:
    """The pairs that overlap by the threshold; only judged results count as false associations."""
    good = pairing.overlaps >= threshold - np.finfo(float).eps
    rows, columns = pairing.truth_rows[good], pairing.result_rows[good]
    judged = pairing.cluster >= 0
    judged[columns] = True
    true_counts = dict(zip(*np.unique(truth.ids, return_counts=True), strict=True))
    found_counts = dict(zip(*np.unique(result.ids[judged], return_counts=True), strict=True))
    ids = np.stack((truth.ids[rows], result.ids[columns]), axis=1)
    unique, index, counts = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
    share = np.array(
        [
            count / (true_counts[true] + found_counts[found] - count)
            for (true, found), count in zip(unique.tolist(), counts.tolist(), strict=True)
        ]
    )
    return _Hits(rows, columns, share[index.reshape(-1)])


def _class_scores(
    pairs: Sequence[tuple[BoxTable, BoxTable]], matched: Sequence[_Localised], hits: Sequence[_Hits], label: int
) -> tuple[float, float, float]:
    """LocA, AssocA and ClsA of one class at one threshold."""
    found = clusters = true_boxes = 0
    association = 0.0
    right = wrong = missed = 0
    for (truth, result), pairing, own in zip(pairs, matched, hits, strict=True):
        ours = (truth.labels == label) & ~truth.ignored
        of_class = ours[own.truth_rows]
        found += int(of_class.sum())
        true_boxes += int(ours.sum())
        in_cluster = (pairing.cluster >= 0) & ours[pairing.cluster]
        # A hit at a low threshold may lie outside of every cluster; it is judged all the same.
        clusters += len(np.union1d(np.flatnonzero(in_cluster), own.result_rows[of_class]))
        association += float(own.association[of_class].sum())
        predicted = result.labels[own.result_rows] == label
        right += int((of_class & predicted).sum())
        wrong += int((~of_class & predicted).sum())
        missed += int((of_class & ~predicted).sum())
    missed += true_boxes - found
    loc_a = found / max(true_boxes + clusters - found, 1)
    return loc_a, association / max(found, 1), right / max(right + wrong + missed, 1)
