"""The adapters to transformers, on tiny random models of the real architectures, loaded from a folder without network.

Random weights find nothing, so what is measured is the geometry and the bookkeeping: a stand-in network gives a known
answer in the model's own coordinates, and the adapter has to bring it back to the pixels of the image.
"""

import importlib.util
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_foundation_models as tiny
import torch
from safetensors.torch import load_file, save_file

from tenfold.core.console import UserError
from tenfold.core.foundation import load_detector, load_mask_generator, load_segmenter

HEIGHT, WIDTH = 48, 80
CLOSED = ("yolos", "rt_detr", "d_fine")
OPEN = ("grounding_dino", "owlv2")
SAMS = ("sam", "sam2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    built = {}

    def get(name):
        if name not in built:
            built[name] = tiny.build(name, root / name)
        return built[name]

    return get


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def answer(detector, logits: torch.Tensor, boxes: torch.Tensor) -> None:
    """Replace what the network says: logits 1 x Q x classes, boxes 1 x Q x 4, centre and size in shares of a side."""
    real = detector._model
    detector._model = lambda **_: SimpleNamespace(logits=logits, pred_boxes=boxes)
    detector._model.device, detector._model.config = real.device, real.config


# --- detectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLOSED, *OPEN])
def test_a_detector_loads_by_path_and_gives_tidy_boxes(folder, image, name):
    detector = load_detector(folder(name), "cpu", score_threshold=0.0)
    assert not detector.is_stand_in
    assert detector.name == str(folder(name))
    found = detector.detect(image, None if name in CLOSED else ["a dog", "red car"])
    assert len(found) > 0
    assert found.class_names == (("person", "ball", "goal") if name in CLOSED else ("a dog", "red car"))
    assert set(found.names) <= set(found.class_names)
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()
    assert (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()


@pytest.mark.parametrize("name", CLOSED)
def test_known_boxes_of_a_closed_set_come_back_in_pixels(folder, image, name):
    detector = load_detector(folder(name), "cpu", score_threshold=0.5)
    # YOLOS has a softmax with a last class for "nothing", the others a sigmoid for each class.
    logits = torch.full((1, 3, 4 if name == "yolos" else 3), -9.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 9.0
    logits[0, 2, -1] = 9.0 if name == "yolos" else -9.0
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    answer(detector, logits, boxes)
    found = detector.detect(image)
    assert sorted(found.names) == ["ball", "goal"]
    by_name = dict(zip(found.names, found.boxes_xyxy, strict=True))
    np.testing.assert_allclose(by_name["ball"], [20, 12, 60, 36], atol=1e-4)
    np.testing.assert_allclose(by_name["goal"], [56, 0, 80, 14.4], atol=1e-4)  # cut at the image's edge
    assert detector.detect(image, ["Ball"]).names == ["ball"]


def test_a_class_that_a_closed_set_lacks_names_the_nearest(folder, image):
    detector = load_detector(folder("yolos"), "cpu")
    with pytest.raises(UserError, match="has no class 'persons': did you mean person"):
        detector.detect(image, ["persons"])
    with pytest.raises(UserError, match="owlv2"):
        detector.detect(image, ["zebra crossing"])


def test_grounding_dino_gives_each_box_the_phrase_whose_token_scores_best(folder, image):
    detector = load_detector(folder("grounding_dino"), "cpu", score_threshold=0.5)
    # [CLS] a dog ##gie . red car . [SEP]
    logits = torch.full((1, 3, 9), -9.0)
    logits[0, 0, 3], logits[0, 0, 5] = 3.0, 1.0
    logits[0, 1, 6], logits[0, 1, 1] = 2.0, 1.0
    logits[0, 2, [0, 4, 7, 8]] = 9.0  # what the separators say counts for nothing
    answer(detector, logits, torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]]))
    found = detector.detect(image, ["a doggie", "Red car."])
    assert found.names == ["a doggie", "Red car."]
    np.testing.assert_allclose(found.scores, torch.tensor([3.0, 2.0]).sigmoid(), atol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, 40, 48], [40, 0, 80, 48]], atol=1e-4)


def test_unknown_words_still_count_as_a_phrase(folder, image):
    detector = load_detector(folder("grounding_dino"), "cpu", score_threshold=0.0)
    assert detector.detect(image, ["zebra", "dog"]).class_names == ("zebra", "dog")


def test_too_many_prompts_are_one_line(folder, image):
    detector = load_detector(folder("grounding_dino"), "cpu")
    with pytest.raises(UserError, match="fewer things at a time"):
        detector.detect(image, ["a red car"] * 12)


def test_owlv2_boxes_are_shares_of_the_padded_square(folder, image):
    detector = load_detector(folder("owlv2"), "cpu", score_threshold=0.5)
    logits = torch.tensor([[[-9.0, 9.0], [-9.0, -9.0]]])
    answer(detector, logits, torch.tensor([[[0.5, 0.3, 1.0, 0.6], [0.5, 0.5, 0.1, 0.1]]]))
    found = detector.detect(image, ["cat", "dog"])
    assert found.names == ["dog"]
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, 80, 48]], atol=1e-4)


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("prompts", [None, [], ["", " . "]])
def test_an_open_vocabulary_detector_needs_prompts(folder, image, name, prompts):
    with pytest.raises(UserError, match="told what to look for"):
        load_detector(folder(name), "cpu").detect(image, prompts)


# --- SAM -------------------------------------------------------------------------------------------------------------


def paint_boxes(**inputs: torch.Tensor) -> SimpleNamespace:
    """A segmenter that is always right: low-resolution logits that are positive inside each prompted box (64 -> 16)."""
    grid = torch.arange(16) * 4 + 2
    left, top, right, bottom = (inputs["input_boxes"][0, :, side, None, None] for side in range(4))  # N x 1 x 1
    inside = (grid >= left) & (grid <= right) & (grid[:, None] >= top) & (grid[:, None] <= bottom)
    count = len(inside)
    return SimpleNamespace(
        pred_masks=inside.float()[None, :, None] * 20 - 10, iou_scores=torch.linspace(0.9, 0.5, count)[None, :, None]
    )


@pytest.mark.parametrize("name", SAMS)
def test_boxes_reach_the_network_and_masks_come_back_in_pixels(folder, image, name):
    segmenter = load_segmenter(folder(name), "cpu")
    boxes = np.array([[0, 0, 40, 48], [20, 12, 60, 36], [50, 30, 80, 48]], np.float32)
    real, segmenter._model = segmenter._model, lambda multimask_output, **inputs: paint_boxes(**inputs)
    segmenter._model.device = real.device
    found = segmenter.segment(image, boxes)
    assert found.masks.shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.5], atol=1e-6)
    for mask, box in zip(found.masks, boxes, strict=True):
        left, top, right, bottom = box.astype(int)
        wanted = np.zeros_like(mask)
        wanted[top:bottom, left:right] = True
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.8


@pytest.mark.parametrize("name", SAMS)
def test_the_real_network_gives_one_mask_for_each_box(folder, image, name):
    segmenter = load_segmenter(folder(name), "cpu")
    found = segmenter.segment(image, np.array([[5, 5, 40, 40], [1.5, 2.5, 30, 20.25]]))
    assert found.masks.shape == (2, HEIGHT, WIDTH)
    assert found.masks.dtype == bool
    assert np.isfinite(found.scores).all()
    assert segmenter.segment(image, np.zeros((0, 4))).masks.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", SAMS)
def test_everything_in_an_image_is_asked_for_at_a_grid_of_points(folder, image, name, monkeypatch):
    generator = load_mask_generator(folder(name), "cpu")
    generator.points_per_side, generator.min_stability = 3, 0.5

    def paint_discs(input_points, **_):
        grid = torch.arange(16) * 4.0 + 2
        x, y = (input_points[0, :, 0, axis, None, None] for axis in range(2))  # N x 1 x 1
        near = (grid - x) ** 2 + (grid[:, None] - y) ** 2 < 9**2
        masks = (near.float() * 20 - 10)[None, :, None].expand(1, len(near), 3, 16, 16)
        return {"pred_masks": masks, "iou_scores": torch.full((1, len(near), 3), 0.95)}

    monkeypatch.setattr(generator._pipeline, "model", generator._pipeline.model)
    monkeypatch.setattr(generator._pipeline.model, "forward", paint_discs)
    found = generator.masks(image)
    assert found.masks.shape == (9, HEIGHT, WIDTH), "three equal masks a point are one"
    centres = np.sort((found.boxes_xyxy[:, 0] + found.boxes_xyxy[:, 2]) / 2)
    thirds = np.repeat([WIDTH / 6, WIDTH / 2, WIDTH * 5 / 6], 3)
    np.testing.assert_allclose(centres, thirds, atol=5)


@pytest.mark.parametrize("name", SAMS)
def test_the_real_network_can_fill_an_image_with_masks(folder, image, name):
    generator = load_mask_generator(folder(name), "cpu")
    generator.points_per_side, generator.min_predicted_iou, generator.min_stability = 2, -1e9, -1.0
    found = generator.masks(image)
    assert found.masks.shape[1:] == (HEIGHT, WIDTH)
    assert len(found) == len(found.scores) == len(found.boxes_xyxy)
    assert (np.diff(found.scores) <= 0).all()


# --- what cannot be loaded -------------------------------------------------------------------------------------------


def test_a_missing_weight_is_an_error_and_not_a_random_one(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder("yolos").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    removed = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != removed}, broken / "model.safetensors")
    with pytest.raises(UserError, match="1 weights are missing"):
        load_detector(broken, "cpu")
    (broken / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_detector(broken, "cpu")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(folder, tmp_path):
    for path in folder("yolos").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(folder("yolos") / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_detector(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("load", "name", "expected"),
    [
        (load_detector, "sam", "not a detector"),
        (load_segmenter, "yolos", "not SAM"),
        (load_mask_generator, "owlv2", "not SAM"),
    ],
)
def test_a_model_of_another_kind_is_one_line(folder, load, name, expected):
    with pytest.raises(UserError, match=expected):
        load(folder(name), "cpu")


def test_an_empty_folder_and_an_unknown_name_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.json"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match="did you mean grounding-dino"):
        load_detector("groundingdino")
    with pytest.raises(UserError, match="choose one of sam, sam2, regions"):
        load_mask_generator("zzz")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="hf download PekingU/rtdetr_r50vd"):
        load_detector("rt-detr")
    assert time.monotonic() - start < 5


def test_missing_transformers_names_the_extra(folder, monkeypatch):
    path = folder("yolos")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tenfold\[foundation\]"):
        load_detector(path)


def test_loading_prints_nothing_and_leaves_the_librarys_settings(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    path = folder("yolos")
    capfd.readouterr()
    load_detector(path, "cpu")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_an_image_of_another_kind_is_refused(folder):
    detector = load_detector(folder("yolos"), "cpu")
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UserError, match="expected an RGB image"):
            detector.detect(wrong)
