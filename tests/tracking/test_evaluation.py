"""Our scores are the reference's on real sequences; what each benchmark leaves out, and TETA, by hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tenfold.core.console import UserError
from tenfold.tracking.data import motchallenge
from tenfold.tracking.data.table import BoxTable
from tenfold.tracking.evaluation import detailed, evaluate_sequence, evaluate_sequences, teta

CASES = ["pets09_s2l1_sort", "pets09_s2l1_bytetrack", "pets09_s2l1_ocsort", "tud-campus"]


@pytest.mark.parametrize("case", CASES)
def test_every_field_equals_trackeval_on_real_sequences(case: str, data_root: Path) -> None:
    folder = data_root / "tracking" / "metrics"
    truth_path = (
        folder / "tud-campus_gt.txt" if case == "tud-campus" else data_root / "tracking" / "pets09_s2l1" / "gt.txt"
    )
    result_path = folder / ("tud-campus_result.txt" if case == "tud-campus" else f"{case}.txt")
    truth, result = motchallenge.read(truth_path, truth=True), motchallenge.read(result_path)
    expected = json.loads((folder / "expected_trackeval.json").read_text())[case]
    found = detailed({case: (truth, result)})
    for name, value in expected.items():
        if name != "summary":
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)
    assert evaluate_sequence(truth, result).hota * 100 == pytest.approx(expected["summary"]["HOTA"], abs=2e-3)


def table(rows: list[tuple], names: tuple[str, ...] = ("object",), **more: object) -> BoxTable:
    """Rows of (frame, id, left, label) with boxes of 10 x 30 pixels."""
    frames, ids, left, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    boxes = [[x, 0, x + 10, 30] for x in left]
    return BoxTable.of(frames, ids, boxes, np.ones(len(rows)), labels, names, **more)  # type: ignore[arg-type]


def test_perfect_tracks_score_one_and_a_swap_costs_association_only() -> None:
    truth = table([(frame, identity, 50 * identity, 0) for frame in range(10) for identity in (1, 2)])
    perfect = evaluate_sequence(truth, truth)
    assert (perfect.hota, perfect.mota, perfect.idf1, perfect.id_switches) == (1, 1, 1, 0)
    swapped = table([(frame, one if frame < 5 else 3 - one, 50 * one, 0) for frame in range(10) for one in (1, 2)])
    scores = evaluate_sequence(truth, swapped)
    assert scores.det_a == 1
    assert scores.id_switches == 2
    assert scores.ass_a == pytest.approx(1 / 3)


def test_sequences_are_combined_by_their_counts() -> None:
    long = table([(frame, 1, 0, 0) for frame in range(30)])
    short = table([(frame, 1, 0, 0) for frame in range(10)])
    lost = table([(0, 1, 500, 0)])
    scores = evaluate_sequences({"long": (long, long), "short": (short, lost)})
    assert scores.mota == pytest.approx(1 - 11 / 40)


def test_mot17_does_not_judge_what_matches_a_distractor() -> None:
    truth = table([(0, 1, 0, 1), (0, 2, 100, 8)], motchallenge.CLASSES)
    result = table([(0, 1, 0, 0), (0, 2, 100, 0), (0, 3, 300, 0)])
    assert evaluate_sequence(truth, result, "mot17").result_boxes == 2
    assert evaluate_sequence(truth, result, "mot17").truth_boxes == 1
    assert evaluate_sequence(truth, result, "plain").result_boxes == 3


def test_kitti_does_not_judge_what_lies_in_a_region_that_nobody_cares_for() -> None:
    truth = table([(0, 1, 0, 0), (0, -1, 100, 8)], ("Car",) * 9, ignored=[False, True])
    result = table([(0, 1, 0, 0), (0, 2, 101, 0), (0, 3, 300, 0)])
    assert evaluate_sequence(truth, result, "kitti").result_boxes == 2


def test_only_annotated_frames_are_judged() -> None:
    truth = table([(0, 1, 0, 0), (5, 1, 0, 0)], annotated_frames=frozenset({0, 5}))
    result = table([(frame, 1, 0, 0) for frame in range(10)])
    assert evaluate_sequence(truth, result).mota == 1


def test_an_identity_twice_in_a_frame_is_refused() -> None:
    truth = table([(0, 1, 0, 0)])
    with pytest.raises(UserError, match="identity 7 occurs twice in frame 0 of the result"):
        evaluate_sequence(truth, table([(0, 7, 0, 0), (0, 7, 50, 0)]))


def test_teta_parts_where_they_are_lost() -> None:
    names = ("cat", "dog")
    truth = table([(frame, 1, 0, 0) for frame in range(8)], names)
    assert teta([(truth, truth)]).teta == pytest.approx(1)
    # Boxes far from every true one are not judged: annotation is not exhaustive.
    extra = table([(frame, identity, 400 * identity, 0) for frame in range(8) for identity in (0, 1)], names)
    assert teta([(truth, extra)]).teta == pytest.approx(1)
    wrong_class = teta([(truth, table([(frame, 1, 0, 1) for frame in range(8)], names))])
    assert (wrong_class.loc_a, wrong_class.assoc_a, wrong_class.cls_a) == pytest.approx((1, 1, 0))
    cut = teta([(truth, table([(frame, frame // 4, 0, 0) for frame in range(8)], names))])
    assert (cut.loc_a, cut.assoc_a, cut.cls_a) == pytest.approx((1, 0.5, 1))
    half = teta([(truth, table([(frame, 1, 0, 0) for frame in range(4)], names))])
    assert (half.loc_a, half.assoc_a, half.cls_a) == pytest.approx((0.5, 0.5, 0.5))
