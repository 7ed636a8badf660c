"""The tracker and supervision: what comes in comes out, in order, with identities; what cannot be tracked is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch

from tenfold.core.checkpoint import save
from tenfold.core.console import UserError
from tenfold.tracking import checkpoint
from tenfold.tracking.config import TINY, MasaConfig
from tenfold.tracking.detection import COCO_CLASSES, NanoDet, load_detector, parse_prompts
from tenfold.tracking.model import Masa
from tenfold.tracking.predictor import Tracker


def scene(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Three coloured squares that move over grey; their boxes."""
    image = np.full((96, 128, 3), 90, np.uint8)
    boxes = np.array([[4, 10, 24, 40], [60, 20, 80, 50], [100, 50, 120, 80]], np.float32) + [2 * step, 0] * 2
    boxes[:, [0, 2]] %= 140
    boxes = boxes[boxes[:, 2] > boxes[:, 0]]
    for box, colour in zip(boxes.astype(int), ((250, 10, 10), (10, 250, 10), (20, 20, 250)), strict=False):
        image[box[1] : box[3], box[0] : box[2]] = colour
    return image, boxes


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.set_num_threads(1)
    return Tracker.from_pretrained("masa-tiny", device="cpu")


def test_masks_classes_and_data_are_kept_in_order(tracker: Tracker) -> None:
    tracker.reset()
    image, boxes = scene(0)
    masks = np.zeros((3, 96, 128), bool)
    masks[[0, 1, 2], [1, 2, 3], [5, 6, 7]] = True
    given = sv.Detections(
        xyxy=boxes,
        mask=masks,
        confidence=np.array([0.6, 0.9, 0.7]),
        class_id=np.array([5, 3, 1]),
        data={"class_name": np.array(["a", "b", "c"]), "number": np.array([10, 20, 30]), "text": ["x", "y", "z"]},
    )
    found = tracker.update(image, given)
    np.testing.assert_array_equal(found.xyxy, given.xyxy)
    np.testing.assert_array_equal(found.mask, masks)
    assert found.class_id.tolist() == [5, 3, 1]
    assert found.data["number"].tolist() == [10, 20, 30]
    assert list(found.data["text"]) == ["x", "y", "z"]
    assert sorted(found.tracker_id.tolist()) == [0, 1, 2]
    assert given.tracker_id is None


def test_identities_follow_the_objects(tracker: Tracker) -> None:
    tracker.reset()
    ids = []
    for step in range(6):
        image, boxes = scene(step)
        order = np.random.default_rng(step).permutation(3)
        found = tracker.update(image, sv.Detections(xyxy=boxes[order]))
        ids.append(found.tracker_id[np.argsort(order)].tolist())
    assert all(each == ids[0] for each in ids)


def test_boxes_that_cannot_be_tracked_are_left_out(tracker: Tracker) -> None:
    tracker.reset()
    image, boxes = scene(0)
    bad = [[0, 0, 5, 5], [10, 10, 10, 40], [30, 30, 20, 20], [200, 200, 220, 240], [0, 0, 9, 5]]
    given = sv.Detections(xyxy=np.concatenate((np.array(bad, np.float32), boxes)))
    given.xyxy[0, 0], given.xyxy[4, 2] = np.nan, np.inf  # which supervision refuses at first, and not later
    found = tracker.update(image, given)
    np.testing.assert_array_equal(found.xyxy, boxes)


def test_empty_frames_are_empty_and_do_not_break_tracks(tracker: Tracker) -> None:
    tracker.reset()
    image, boxes = scene(0)
    first = tracker.update(image, sv.Detections(xyxy=boxes)).tracker_id
    for _ in range(3):
        assert len(tracker.update(image, sv.Detections.empty())) == 0
    np.testing.assert_array_equal(tracker.update(image, sv.Detections(xyxy=boxes)).tracker_id, first)


def test_another_frame_size_is_refused_until_reset(tracker: Tracker) -> None:
    tracker.reset()
    image, boxes = scene(0)
    tracker.update(image, sv.Detections(xyxy=boxes))
    with pytest.raises(UserError, match="frame size changed from 128x96 to 64x48"):
        tracker.update(image[:48, :64].copy(), sv.Detections.empty())
    tracker.reset()
    tracker.update(image[:48, :64].copy(), sv.Detections.empty())


def test_embeddings_that_are_given_are_used(tracker: Tracker) -> None:
    tracker.reset()
    image, boxes = scene(0)
    swapped = np.eye(3, 8, dtype=np.float32) * 9
    first = tracker.update(image, sv.Detections(xyxy=boxes, data={"embedding": swapped}))
    assert len(first) == 3
    with pytest.raises(UserError, match="finite numbers, N x E"):
        tracker.update(image, sv.Detections(xyxy=boxes, data={"embedding": np.full((3, 8), np.nan)}))


def test_embedding_names_the_box_that_is_wrong(tracker: Tracker) -> None:
    image, boxes = scene(0)
    found = tracker.embed(image, boxes)
    assert found.shape == (3, 128) and found.dtype == np.float32
    assert tracker.embed(image, np.zeros((0, 4))).shape == (0, 128)
    boxes[1, 2] = np.nan
    with pytest.raises(UserError, match="box 1 "):
        tracker.embed(image, boxes)


def test_a_tracker_without_any_source_of_boxes_says_so(tracker: Tracker) -> None:
    image, _ = scene(0)
    with pytest.raises(UserError, match="no detections and no detector"):
        tracker.update(image)


def test_own_proposals_need_the_head(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no head that proposes boxes"):
        Tracker.from_pretrained("masa-tiny", detector="proposals", device="cpu")
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, rcnn_layers=2)
    checkpoint.save_model(tmp_path / "with-head.safetensors", Masa(config))
    with_head = Tracker.from_pretrained(tmp_path / "with-head.safetensors", detector="proposals", device="cpu")
    found = with_head.update(scene(0)[0])
    assert len(found) <= 50 and np.isfinite(found.xyxy).all()


# --- detectors -----------------------------------------------------------------------------------------------------


def test_builtin_detector_finds_what_is_in_a_photograph() -> None:
    from skimage.data import astronaut, chelsea, coffee

    detector = NanoDet()
    for image, name in ((astronaut(), "person"), (chelsea(), "cat"), (coffee(), "cup")):
        found = detector.detect(image)
        assert name in found.names
        assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy[:, 2] <= image.shape[1]).all()
    assert set(detector.detect(astronaut(), ["person"]).names) == {"person"}
    with pytest.raises(UserError, match="no class 'dragon'"):
        detector.detect(astronaut(), ["dragon"])
    assert len(COCO_CLASSES) == 80


def test_detectors_of_any_kind_become_functions() -> None:
    given = sv.Detections(xyxy=np.array([[0.0, 0, 5, 5]]))
    assert load_detector(lambda frame: given)(scene(0)[0]) is given
    assert len(load_detector("motion")(scene(0)[0])) == 0
    assert parse_prompts("red car . dog") == ["red car", "dog"]
    with pytest.raises(UserError, match="name what to look for"):
        parse_prompts(" . ")


# --- checkpoints ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "r50": (MasaConfig(), {}),
    "detic": (
        MasaConfig(
            backbone="swin-b", in_channels=(256, 512, 1024), strides=(8, 16, 32), rcnn_convolutions=0, rcnn_layers=2
        ),
        {},
    ),
    "sam-b": (
        MasaConfig(
            backbone="sam",
            pyramid="simple",
            fusion="dyhead",
            in_channels=(768,) * 4,
            rcnn_convolutions=0,
            rcnn_layers=2,
        ),
        {"detector.backbone.pos_embed": torch.zeros(1, 64, 64, 768)},
    ),
    "sam-h": (
        MasaConfig(
            backbone="sam",
            pyramid="simple",
            fusion="dyhead",
            in_channels=(1280,) * 4,
            rcnn_convolutions=0,
            rcnn_layers=2,
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_layouts_tell_what_they_are_and_go_round(name: str) -> None:
    config, foundation = LAYOUTS[name]
    with torch.device("meta"):
        state = Masa(config).state_dict()
    official = {key: torch.zeros(()).expand(value.shape) for key, value in checkpoint.to_official(state).items()}
    assert {key.split(".")[0] for key in official} <= {"backbone", "masa_adapter", "rpn_head", "roi_head", "track_head"}
    official |= foundation
    assert checkpoint.infer_config(official) == config
    assert {key: value.shape for key, value in checkpoint.to_ours(official, config).items()} == {
        key: value.shape for key, value in state.items()
    }


def small_official() -> dict[str, torch.Tensor]:
    config = MasaConfig(
        backbone="swin-b",
        in_channels=(16, 24, 40),
        strides=(8, 16, 32),
        width=32,
        fusion_blocks=1,
        head_hidden=64,
        embedding=32,
        rcnn_convolutions=0,
        rcnn_layers=2,
    )
    torch.manual_seed(0)
    return checkpoint.to_official(Masa(config).state_dict())


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    official = {key: value.contiguous() for key, value in small_official().items()}
    path = tmp_path / "adapter.safetensors"
    save(path, official)
    assert checkpoint.load(str(path)).model.rcnn is None
    assert checkpoint.load(str(path), proposals=True).model.rcnn is not None
    offset = "masa_adapter.1.dyhead_blocks.0.spatial_conv_offset.weight"
    save(path, official | {offset: torch.zeros(54, 32, 3, 3)})
    with pytest.raises(UserError, match=r"neither 81 .* nor 27"):
        checkpoint.load(str(path))
    save(path, official | {"masa_adapter.1.extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected: masa_adapter\.1\.extra\.weight"):
        checkpoint.load(str(path))
    save(path, {key: value for key, value in official.items() if "fpn_convs.1" not in key})
    with pytest.raises(UserError, match=r"missing: masa_adapter\.0\.fpn_convs\.1"):
        checkpoint.load(str(path))
    save(path, {"weight": torch.zeros(2)})
    with pytest.raises(UserError, match="not a MASA checkpoint"):
        checkpoint.load(str(path))


def test_a_file_without_its_foundation_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save(path, {key: value.contiguous() for key, value in small_official().items()})
    with pytest.raises(UserError, match="not its frozen swin-b backbone"):
        Tracker.from_pretrained(path, device="cpu")
