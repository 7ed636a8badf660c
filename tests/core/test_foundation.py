"""The data types of masks and detections, and the classical stand-ins: on images whose answer is known."""

import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenfold.core.console import UserError
from tenfold.core.foundation import (
    Detections,
    Masks,
    boxes_of_masks,
    load_detector,
    load_mask_generator,
    load_segmenter,
)


def overlap(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return (mask & other).sum() / (mask | other).sum()


def box_mask(shape: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# --- data types ------------------------------------------------------------------------------------------------------


def test_detections_take_the_agreed_dtypes_and_refuse_unequal_lengths():
    found = Detections([[0, 1, 2, 3]], [0.5], [1], ["a", "b"])
    assert (found.boxes_xyxy.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.names == ["b"]
    assert len(Detections([], [], [])) == 0
    with pytest.raises(ValueError, match="do not match"):
        Detections([[0, 1, 2, 3]], [0.5, 0.6], [1])
    with pytest.raises(ValueError, match="do not match"):
        Masks.of(np.zeros((2, 3, 3)), np.zeros(1))


def test_select_keeps_rows_together():
    found = Detections(np.arange(12).reshape(3, 4), [0.3, 0.2, 0.1], [0, 1, 2], ("x", "y", "z"))
    by_index, by_mask = found.select(np.array([2, 0])), found.select(np.array([False, True, False]))
    assert by_index.names == ["z", "x"]
    assert by_index.boxes_xyxy[0].tolist() == [8, 9, 10, 11]
    assert by_mask.names == ["y"]


@given(hnp.arrays(bool, st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5))))
@settings(deadline=None, max_examples=60)
def test_the_box_of_a_mask_is_the_smallest_that_holds_it(masks):
    boxes = boxes_of_masks(masks)
    assert boxes.shape == (len(masks), 4)
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == wanted


class FakeDetections(SimpleNamespace):
    """The fields of supervision.Detections that are used, which is not a dependency."""

    def __init__(self, xyxy, confidence=None, class_id=None, data=None):
        super().__init__(xyxy=xyxy, confidence=confidence, class_id=class_id, data=data or {})


def test_detections_go_to_supervision_and_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=FakeDetections))
    found = Detections(np.arange(8).reshape(2, 4), [0.9, 0.4], [2, 0], ("dog", "cat", "car"))
    theirs = found.to_supervision()
    assert theirs.data["class_name"].tolist() == ["car", "dog"]
    back = Detections.from_supervision(theirs)
    assert back.names == ["car", "dog"]
    np.testing.assert_array_equal(back.boxes_xyxy, found.boxes_xyxy)
    np.testing.assert_array_equal(back.scores, found.scores)
    np.testing.assert_array_equal(back.labels, found.labels)


@pytest.mark.parametrize(
    ("theirs", "names"),
    [
        (FakeDetections(np.zeros((0, 4))), []),
        (FakeDetections(np.ones((2, 4))), ["object", "object"]),
        (FakeDetections(np.ones((2, 4)), class_id=np.array([3, 1])), ["3", "1"]),
        (FakeDetections(np.ones((2, 4)), data={"class_name": np.array(["b", "a"])}), ["b", "a"]),
        (FakeDetections(np.zeros((0, 4)), class_id=np.zeros(0, int), data={"class_name": np.array([])}), []),
    ],
)
def test_what_supervision_does_not_know_gets_a_default(theirs, names):
    found = Detections.from_supervision(theirs)
    assert found.names == names
    assert (found.scores == 1).all()


def test_missing_supervision_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install 'tenfold\[tracking\]'"):
        Detections([], [], []).to_supervision()


# --- regions ---------------------------------------------------------------------------------------------------------


def shapes_on_noise(scale: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """A disc, a bar and a ring's inside on a grey ground, all with a little noise."""
    height, width = 120 * scale, 160 * scale
    masks = [np.zeros((height, width), np.uint8) for _ in range(3)]
    cv2.circle(masks[0], (40 * scale, 40 * scale), 25 * scale, 1, -1)
    cv2.rectangle(masks[1], (90 * scale, 15 * scale), (145 * scale, 45 * scale), 1, -1)
    cv2.ellipse(masks[2], (80 * scale, 90 * scale), (50 * scale, 18 * scale), 20, 0, 360, 1, -1)
    image = np.full((height, width, 3), 120, np.float64)
    for mask, colour in zip(masks, ((200, 60, 50), (40, 90, 200), (60, 170, 70)), strict=True):
        image[mask > 0] = colour
    noisy = image + np.random.default_rng(0).normal(0, 4, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), [mask > 0 for mask in masks]


@pytest.mark.parametrize("scale", [2, 6])
def test_regions_find_shapes_at_any_resolution(scale):
    generator = load_mask_generator("regions")
    assert generator.is_stand_in
    assert "stand-in" in generator.name
    image, shapes = shapes_on_noise(scale)
    found = generator.masks(image)
    assert found.masks.shape[1:] == image.shape[:2]
    for shape in shapes:
        best = max(overlap(mask, shape) for mask in found.masks)
        assert best > 0.9
    top = found.masks[: 2 * len(shapes)]
    assert all(max(overlap(mask, shape) for mask in top) > 0.9 for shape in shapes), "clear shapes come first"


def test_regions_are_scored_sorted_distinct_and_reproducible():
    image, _ = shapes_on_noise()
    found, again = (load_mask_generator("regions").masks(image) for _ in range(2))
    np.testing.assert_array_equal(found.masks, again.masks)
    assert (np.diff(found.scores) <= 0).all()
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    flat = found.masks.reshape(len(found), -1).astype(np.float32)
    shared, sizes = flat @ flat.T, flat.sum(1)
    overlaps = shared / (sizes[:, None] + sizes - shared)
    assert (overlaps[~np.eye(len(found), dtype=bool)] <= 0.9).all()
    np.testing.assert_array_equal(found.boxes_xyxy, boxes_of_masks(found.masks))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 2), (7, 3), (40, 1)])
def test_regions_of_tiny_images(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert load_mask_generator("regions").masks(image).masks.shape[1:] == size


def test_an_even_image_has_no_regions():
    assert len(load_mask_generator("regions").masks(np.full((50, 60, 3), 90, np.uint8))) == 0


# --- boxes to masks --------------------------------------------------------------------------------------------------


def test_grabcut_finds_the_shape_in_a_box_and_ignores_the_other_boxes():
    image, shapes = shapes_on_noise()
    boxes = boxes_of_masks(np.array(shapes)) + np.array([-3.5, -3.5, 3.5, 3.5])
    segmenter = load_segmenter("grabcut")
    assert segmenter.is_stand_in
    found = segmenter.segment(image, boxes)
    for mask, shape in zip(found.masks, shapes, strict=True):
        assert overlap(mask, shape) > 0.95
    alone = segmenter.segment(image, boxes[1:2])
    np.testing.assert_array_equal(alone.masks[0], found.masks[1])


def test_grabcut_takes_a_box_without_surroundings_whole_and_an_empty_one_as_empty():
    image, _ = shapes_on_noise()
    height, width = image.shape[:2]
    boxes = [[0, 0, width, height], [-50, -50, width + 9, height + 9], [30, 30, 30, 60], [500, 500, 600, 600]]
    found = load_segmenter("grabcut").segment(image, np.array(boxes))
    assert [int(mask.sum()) for mask in found.masks] == [height * width, height * width, 0, 0]
    assert load_segmenter("grabcut").segment(image, np.zeros((0, 4))).masks.shape == (0, height, width)


# --- motion ----------------------------------------------------------------------------------------------------------


def walk(frames: int, seed: int = 0, start: int = 5) -> list[tuple[np.ndarray, tuple[int, int, int, int]]]:
    """A noisy still scene that a bright rectangle enters in frame `start` and walks through, and its box."""
    random = np.random.default_rng(seed)
    scene = cv2.GaussianBlur(random.integers(0, 160, (96, 128, 3)).astype(np.float32), (0, 0), 5) + 30
    result = []
    for index in range(frames):
        left = 5 + 4 * (index - start)
        box = (left, 30, left + 20, 70)
        frame = scene + random.normal(0, 2, scene.shape)
        if index >= start:
            frame[box[1] : box[3], box[0] : box[2]] = (230, 220, 90)
        result.append((frame.clip(0, 255).astype(np.uint8), box))
    return result


def test_motion_follows_what_moves():
    detector = load_detector("motion")
    assert detector.is_stand_in
    for index, (frame, box) in enumerate(walk(25, start=5)):
        found = detector.detect(frame)
        if index < 5:
            assert len(found) == 0
            continue
        assert found.names == ["moving"]
        assert overlap(box_mask((96, 128), tuple(found.boxes_xyxy[0].astype(int))), box_mask((96, 128), box)) > 0.8
        assert found.scores[0] > 0.8


def test_a_still_scene_has_no_motion():
    detector = load_detector("motion")
    still, _ = walk(1)[0]
    random = np.random.default_rng(1)
    for _ in range(10):
        frame = (still + random.normal(0, 2, still.shape)).clip(0, 255).astype(np.uint8)
        assert len(detector.detect(frame)) == 0


def test_a_cut_and_a_new_size_are_no_motion():
    detector = load_detector("motion")
    for frame, _ in walk(8):
        detector.detect(frame)
    assert len(detector.detect(255 - walk(1, seed=9)[0][0])) == 0
    assert len(detector.detect(np.zeros((50, 60, 3), np.uint8))) == 0


def test_motion_has_no_names():
    with pytest.raises(UserError, match="cannot look for named things"):
        load_detector("motion").detect(walk(1)[0][0], ["person"])


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_an_image_of_another_kind_is_refused(wrong):
    for call in (
        load_detector("motion").detect,
        load_mask_generator("regions").masks,
        lambda image: load_segmenter("grabcut").segment(image, np.zeros((0, 4))),
    ):
        with pytest.raises(UserError, match="expected an RGB image"):
            call(wrong)
