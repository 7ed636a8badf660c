"""Two views agree on where things went, boxes are drawn as they should be, and training learns and resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.core.console import UserError
from tenfold.tracking import checkpoint
from tenfold.tracking.augment import Still, clip, make_view, project, warp
from tenfold.tracking.config import TINY, AugmentConfig, TrainConfig
from tenfold.tracking.data.stills import ViewPairs, read_coco, shake
from tenfold.tracking.data.synthetic import Clip, ClipConfig
from tenfold.tracking.training import train
from tenfold.tracking.zero_shot import colour_histogram, describe_frames, matching_accuracy

VIEWS = AugmentConfig(size=96, resize=(0.8, 1.6))


def still(seed: int, count: int = 6) -> Still:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(8, 40, (count, 2))), axis=1)
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return Still(image, clip(boxes, 120, 90), np.arange(1, count + 1) + 100 * seed)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_boxes_of_both_views_are_the_originals_under_the_recorded_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = still(1), still(2)
    for _ in range(2):
        view = make_view(*pictures, VIEWS, rng)
        for box, number, source in zip(view.boxes_xyxy, view.ids, view.sources, strict=True):
            original = pictures[source].boxes_xyxy[pictures[source].ids == number]
            expected = project(view.homographies[source], original)[0]
            if source == 0:  # hulls are cut to the first picture's frame
                left, top, right, bottom = view.canvas
                expected = np.clip(expected, [left, top] * 2, [right, bottom] * 2)
            assert np.abs(box - expected).max() < 1


def test_pixels_go_where_boxes_go() -> None:
    image = np.zeros((90, 120, 3), np.uint8)
    box = np.array([[40.0, 30, 60, 50]])
    image[30:50, 40:60] = 255
    config = dataclasses.replace(VIEWS, mixup=0, hue=0, saturation=0, value=0, rotate_deg=0, shear_deg=0)
    for seed in range(20):
        view = make_view(Still(image, box, np.array([1])), None, config, np.random.default_rng(seed))
        inside = np.zeros(view.image.shape[:2], bool)
        if len(view.boxes_xyxy):
            left, top, right, bottom = np.clip(np.round(view.boxes_xyxy[0]), 0, 96).astype(int)
            inside[top:bottom, left:right] = True
        bright = view.image.min(2) > 200
        assert (bright != inside).sum() <= 0.12 * max(inside.sum(), 40)


def test_one_composed_warp_is_the_plain_chain() -> None:
    rng = np.random.default_rng(0)
    smooth = np.array(Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((120, 90)))
    first = np.array([[0.9, 0.1, 5], [-0.05, 1.1, 3], [0, 0, 1]])
    second = np.diag([1.2, 1.2, 1.0])
    chain = warp(warp(smooth, first, 130), second, 96).astype(int)
    composed = warp(smooth, second @ first, 96).astype(int)
    assert np.abs(chain - composed)[8:-24, 8:-8].mean() < 3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), jitter=st.floats(0, 0.4))
def test_shaken_boxes_keep_an_overlap_that_makes_them_positives(seed: int, jitter: float) -> None:
    boxes = still(seed % 50).boxes_xyxy.astype(np.float32)
    moved = shake(boxes, jitter, np.random.default_rng(seed))
    corner = np.maximum(boxes[:, :2], moved[:, :2])
    inter = (np.minimum(boxes[:, 2:], moved[:, 2:]) - corner).clip(0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (moved[:, 2:] - moved[:, :2]).prod(1) - inter
    assert (inter >= 0.699 * union).all()


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """Three frames of a generated clip as stills, and their boxes as COCO json."""
    clip_of_three = Clip(ClipConfig(frames=3, size=(160, 120), figures=5))
    folder = tmp_path / "pictures"
    folder.mkdir()
    content: dict = {"images": [], "annotations": []}
    for number, frame in enumerate(clip_of_three.frames()):
        Image.fromarray(frame).save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 120})
        for left, top, right, bottom in clip_of_three.boxes(number).tolist():
            row = {
                "id": len(content["annotations"]),
                "image_id": number,
                "bbox": [left, top, right - left, bottom - top],
            }
            content["annotations"].append(row)
    content["annotations"].append({"id": 99, "image_id": 0, "bbox": [0, 0, 0.5, 9]})
    content["annotations"].append({"id": 100, "image_id": 0, "bbox": [0, 0, 9, 9], "ignore": True})
    content["annotations"].append({"id": 101, "image_id": 0, "bbox": [500, 0, 9, 9]})
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path, folder


def test_instances_that_cannot_be_trained_on_are_dropped(pictures: tuple[Path, Path]) -> None:
    stills = read_coco(*pictures)
    assert [len(ids) for ids in stills.ids] == [5, 5, 5]
    assert sorted(np.concatenate(stills.ids).tolist()) == list(range(1, 16))
    (pictures[1] / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png, which is not there"):
        read_coco(*pictures)


def test_a_pair_is_a_pure_function_of_its_number(pictures: tuple[Path, Path]) -> None:
    config = TrainConfig(positives=8, negatives=4, augment=VIEWS)
    first, second = (ViewPairs(read_coco(*pictures), config) for _ in range(2))
    first.sample(0)
    for name, value in first.sample(5).items():
        np.testing.assert_array_equal(value, second.sample(5)[name])


def test_training_goes_on_where_it_was_and_its_result_can_be_loaded(
    pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    config = TrainConfig(
        iterations=3,
        batch_size=2,
        warmup=1,
        positives=8,
        negatives=4,
        augment=VIEWS,
        checkpoint_every=1,
        evaluate_every=0,
    )
    stills = read_coco(*pictures)
    result = train(stills, tmp_path / "run", TINY, config, validation=stills, device="cpu")
    assert result.finished and np.isfinite(result.metrics["loss"])
    again = train(stills, tmp_path / "run", TINY, config, validation=stills, device="cpu")
    assert again.steps == 3
    loaded = checkpoint.load(str(tmp_path / "run" / "masa.safetensors"))
    image, rois = torch.randn(1, 3, 64, 96), torch.tensor([[0.0, 5, 5, 40, 60]])
    with torch.no_grad():
        assert torch.isfinite(loaded.model(image, rois)).all()


def test_the_histogram_finds_figures_of_different_colours_again() -> None:
    clip_of_figures = Clip(ClipConfig(frames=12, figures=4, speed=6))
    described = describe_frames(clip_of_figures.frames(), clip_of_figures.truth(), colour_histogram, range(12))
    assert matching_accuracy(described, 5) > 0.9
    shuffled = {number: (ids[::-1], embeds) for number, (ids, embeds) in described.items() if number < 6}
    mixed = {**described, **shuffled}
    assert matching_accuracy(mixed, 6) < 0.5
