"""SAM, SAM 2 and object detectors through `transformers`, from a local folder: nothing here reaches for the network."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.core.console import UserError
from tenfold.core.devices import resolve_device
from tenfold.core.files import read_json
from tenfold.core.foundation import Detections, Detector, Masks, require_rgb

# model_type in config.json -> the processor class. The published SAM 2.1 checkpoints call themselves sam2_video; their
# image part is what is used here.
_SAM_PROCESSORS = {"sam": "SamProcessor", "sam2": "Sam2Processor", "sam2_video": "Sam2Processor"}


def open_detector(folder: Path, name: str, device: str, score_threshold: float) -> Detector:
    """The adapter that fits the model in a folder.

    Args:
        folder: what `save_pretrained` of a model and its processor wrote.
        name: what to call the model.
        device: `auto` or a device name.
        score_threshold: boxes below it are dropped.

    Raises:
        UserError: transformers is missing, or the folder holds no detection model that can be loaded.
    """
    kind = _model_type(folder)
    from transformers.models.auto import modeling_auto as known

    if kind in ("grounding-dino", "mm-grounding-dino"):
        return GroundingDetector(folder, name, device, score_threshold)
    if kind in ("owlv2", "owlvit"):
        return OwlDetector(folder, name, device, score_threshold)
    if kind in known.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return ClosedSetDetector(folder, name, device, score_threshold)
    raise UserError(f"{folder}: a model of type {kind!r} is not a detector that tenfold can use")


class ClosedSetDetector:
    """A detector of a fixed list of classes: RT-DETR, D-FINE, YOLOS, DETR and their kin."""

    is_stand_in = False

    def __init__(self, folder: Path, name: str, device: str, score_threshold: float) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.name = name
        self.score_threshold = score_threshold
        self._model, self._processor = _load(AutoModelForObjectDetection, AutoImageProcessor, folder, device)
        names = self._model.config.id2label
        self.class_names = tuple(str(names.get(index, index)) for index in range(max(names) + 1))

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> Detections:
        """Detect objects of the model's classes.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: keep only these classes; None keeps all.

        Raises:
            UserError: a prompt is not one of the model's classes.
        """
        require_rgb(image)
        wanted = None if prompts is None else [self._index(prompt) for prompt in prompts]
        inputs = self._processor(images=image, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        found = self._processor.post_process_object_detection(
            outputs, threshold=self.score_threshold, target_sizes=[image.shape[:2]]
        )[0]
        detections = _tidy(found["boxes"], found["scores"], found["labels"], self.class_names, image.shape)
        return detections if wanted is None else detections.select(np.isin(detections.labels, wanted))

    def _index(self, prompt: str) -> int:
        names = [name.lower() for name in self.class_names]
        if prompt.lower() in names:
            return names.index(prompt.lower())
        near = difflib.get_close_matches(prompt.lower(), names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "an open-vocabulary detector (owlv2) may know it"
        raise UserError(f"{self.name} has no class {prompt!r}: {hint}")


class GroundingDetector:
    """Grounding DINO: finds what short phrases describe.

    A box's score for a phrase is the largest of its tokens' scores, and the box takes the best phrase. (The processor's
    own decoding joins tokens across phrases, so that its labels need not be among the prompts.)
    """

    is_stand_in = False

    def __init__(self, folder: Path, name: str, device: str, score_threshold: float) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.name = name
        self.score_threshold = score_threshold
        self._model, self._processor = _load(AutoModelForZeroShotObjectDetection, AutoProcessor, folder, device)

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> Detections:
        """Detect what the prompts describe.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: one or more phrases, such as `red car`; case does not matter.

        Raises:
            UserError: no prompts, or more than the text encoder holds.
        """
        require_rgb(image)
        phrases = _phrases(prompts, self.name)
        # The model reads one sentence, its phrases parted by full stops.
        text = " ".join(f"{phrase.lower().replace('.', ' ').replace('?', ' ')}." for phrase in phrases)
        inputs = self._processor(images=image, text=text, return_tensors="pt").to(self._model.device)
        spans = self._spans(inputs["input_ids"][0].tolist())
        limit = self._model.config.max_text_len
        if len(spans) != len(phrases) or inputs["input_ids"].shape[1] > limit:
            raise UserError(f"{self.name}: the prompts do not fit into {limit} tokens: ask for fewer things at a time")
        with torch.inference_mode():
            outputs = self._model(**inputs)
        tokens = outputs.logits[0].sigmoid()  # queries x tokens
        scores, labels = torch.stack([tokens[:, span].amax(1) for span in spans], 1).max(1)
        height, width = image.shape[:2]
        centre, size = outputs.pred_boxes[0].chunk(2, dim=1)  # in shares of the image
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1) * torch.tensor([width, height, width, height]).to(
            size
        )
        keep = scores > self.score_threshold
        return _tidy(boxes[keep], scores[keep], labels[keep], tuple(phrases), image.shape)

    def _spans(self, tokens: list[int]) -> list[list[int]]:
        """The token positions of each phrase."""
        tokenizer = self._processor.tokenizer
        borders = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids(".")} - {tokenizer.unk_token_id}
        spans: list[list[int]] = [[]]
        for position, token in enumerate(tokens):
            if token not in borders:
                spans[-1].append(position)
            elif spans[-1]:
                spans.append([])
        return [span for span in spans if span]


class OwlDetector:
    """OWLv2 and OWL-ViT: find what short phrases describe."""

    is_stand_in = False

    def __init__(self, folder: Path, name: str, device: str, score_threshold: float) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.name = name
        self.score_threshold = score_threshold
        self._model, self._processor = _load(AutoModelForZeroShotObjectDetection, AutoProcessor, folder, device)

    def detect(self, image: np.ndarray, prompts: Sequence[str] | None = None) -> Detections:
        """Detect what the prompts describe.

        Args:
            image: H x W x 3 uint8, RGB.
            prompts: one or more phrases, such as `a photo of a red car`.

        Raises:
            UserError: no prompts.
        """
        require_rgb(image)
        phrases = _phrases(prompts, self.name)
        inputs = self._processor(images=image, text=[phrases], truncation=True, return_tensors="pt")
        with torch.inference_mode():
            outputs = self._model(**inputs.to(self._model.device))
        found = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self.score_threshold, target_sizes=[image.shape[:2]]
        )[0]
        return _tidy(found["boxes"], found["scores"], found["labels"], tuple(phrases), image.shape)


class SamMaskGenerator:
    """Everything in an image: SAM or SAM 2 asked at a grid of points, its duplicates removed.

    Args:
        folder: the model.
        name: what to call it.
        device: `auto` or a device name.
        points_per_side: the grid; 32 is the method's own (Segment Anything, appendix B).
        min_predicted_iou: masks whose quality the model itself rates lower are dropped.
        min_stability: masks that change more with the cut-off are dropped.
    """

    is_stand_in = False

    def __init__(
        self,
        folder: Path,
        name: str,
        device: str,
        points_per_side: int = 32,
        min_predicted_iou: float = 0.88,
        min_stability: float = 0.95,
    ) -> None:
        from transformers import pipeline

        self.name = name
        self.points_per_side = points_per_side
        self.min_predicted_iou = min_predicted_iou
        self.min_stability = min_stability
        model, processor = _load_sam(folder, device)
        self._pipeline: Any = pipeline(
            "mask-generation", model=model, image_processor=processor.image_processor, device=model.device
        )

    def masks(self, image: np.ndarray) -> Masks:
        """Segment an image (H x W x 3 uint8, RGB); the scores are the model's own estimate of each mask's IoU."""
        from PIL import Image

        require_rgb(image)
        found = self._pipeline(
            Image.fromarray(image),
            points_per_crop=self.points_per_side,
            pred_iou_thresh=self.min_predicted_iou,
            stability_score_thresh=self.min_stability,
        )
        scores = np.array([float(score) for score in found["scores"]], np.float32)
        masks = np.zeros((len(scores), *image.shape[:2]), bool)
        for index, mask in enumerate(found["masks"]):
            masks[index] = np.asarray(mask, bool)
        order = np.argsort(-scores, kind="stable")
        return Masks.of(masks[order], scores[order])


class SamSegmenter:
    """The object in a box: SAM or SAM 2 prompted with boxes."""

    is_stand_in = False

    def __init__(self, folder: Path, name: str, device: str) -> None:
        self.name = name
        self._model, self._processor = _load_sam(folder, device)

    def segment(self, image: np.ndarray, boxes_xyxy: np.ndarray) -> Masks:
        """One mask for each box; the scores are the model's own estimate of each mask's IoU.

        Args:
            image: H x W x 3 uint8, RGB.
            boxes_xyxy: N x 4, pixels.
        """
        require_rgb(image)
        boxes = np.asarray(boxes_xyxy, np.float32).reshape(-1, 4)
        if len(boxes) == 0:
            return Masks.of(np.zeros((0, *image.shape[:2]), bool), np.zeros(0))
        inputs = self._processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = {key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        inputs = inputs.to(self._model.device)
        inputs["input_boxes"] = inputs["input_boxes"].float()  # SAM's processor makes them float64
        with torch.inference_mode():
            outputs = self._model(**inputs, multimask_output=False)
        masks = self._processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), **sizes)[0]
        return Masks.of(masks[:, 0].numpy(), outputs.iou_scores[0, :, 0].float().cpu().numpy())


def _load_sam(folder: Path, device: str) -> tuple[Any, Any]:
    kind = _model_type(folder)
    import transformers

    if kind not in _SAM_PROCESSORS:
        raise UserError(f"{folder}: a model of type {kind!r} is not SAM or SAM 2")
    processor = getattr(transformers, _SAM_PROCESSORS[kind])
    return _load(transformers.AutoModelForMaskGeneration, processor, folder, device)


def _model_type(folder: Path) -> str:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("foundation models need transformers: run pip install 'tenfold[foundation]'")
    return str(read_json(folder / "config.json").get("model_type", "unknown"))


def _load(model_class: Any, processor_class: Any, folder: Path, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, and processor; a weight that the files lack is an error."""
    target = resolve_device(device)
    try:
        with _quiet():
            processor = processor_class.from_pretrained(folder, local_files_only=True)
            model, report = model_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError ...: whatever a broken folder provokes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{folder}: cannot be loaded with transformers ({reason})") from error
    # transformers itself would start these at random and go on.
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} weights are missing or of another shape ({', '.join(wrong[:3])})")
    return model.to(target).eval(), processor


def _tidy(boxes: Tensor, scores: Tensor, labels: Tensor, names: tuple[str, ...], shape: tuple[int, ...]) -> Detections:
    """Detections best first, boxes cut to the image, those without any area left out."""
    height, width = shape[:2]
    edges = boxes.float().cpu().numpy().clip(0, [width, height, width, height])
    detections = Detections(edges, scores.float().cpu().numpy(), labels.cpu().numpy(), names)
    order = np.argsort(-detections.scores, kind="stable")
    sides = edges[order, 2:] - edges[order, :2]
    return detections.select(order[(sides > 0).all(1)])


def _phrases(prompts: Sequence[str] | None, name: str) -> list[str]:
    phrases = [prompt.strip() for prompt in prompts or () if prompt.strip(" .?")]
    if not phrases:
        raise UserError(f"{name} needs to be told what to look for: give one or more prompts, such as 'red car'")
    return phrases


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's loading bars and reports; what matters of them is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
