"""A whole video through a tracker, a frame at a time: sources, boxes, and what is written on the way.

Nothing is kept but the tracker's memory, however long the video is.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import cv2
import numpy as np

from tenfold.core import console, images
from tenfold.core.console import UserError, warn
from tenfold.core.files import atomic_write
from tenfold.core.foundation import MaskGenerator, PromptableSegmenter
from tenfold.core.video import READABLE_SUFFIXES, VideoReader, VideoWriter
from tenfold.tracking.boxes import usable
from tenfold.tracking.data import motchallenge
from tenfold.tracking.data.table import BoxTable
from tenfold.tracking.detection import Detect, supervision
from tenfold.tracking.masks import encode_mask
from tenfold.tracking.predictor import Tracker

if TYPE_CHECKING:
    from supervision import Detections

MASK_LEAST_SCORE = 0.2  # only boxes above it are given a mask (demo of the release)


@dataclass(frozen=True)
class Source:
    """Frames in order.

    Attributes:
        path: a video, or a folder of pictures (a MOTChallenge sequence or plain).
        fps: frames a second.
        size: (width, height), where it is known before the first frame.
        count: number of frames, where it is known.
        video: the reader of a video, else None.
        pictures: the files of a folder.
    """

    path: Path
    fps: Fraction
    size: tuple[int, int] | None
    count: int | None
    video: VideoReader | None = None
    pictures: tuple[Path, ...] = ()

    def frames(self) -> Iterator[np.ndarray | None]:
        """H x W x 3 uint8, RGB; None for a picture of a folder that cannot be read, which is then a gap."""
        if self.video is not None:
            yield from self.video
            return
        for path in self.pictures:
            try:
                yield images.to_rgb8(images.read(path))
            except UserError as error:
                warn(f"a gap in the sequence: {error}")
                yield None


def open_source(path: Path, fps: float | None = None) -> Source:
    """A video file, a MOTChallenge or DanceTrack sequence, or a folder of pictures in the order of their names.

    Args:
        path: where it is.
        fps: of a plain folder (25 by default).

    Raises:
        UserError: nothing there that holds frames.
    """
    if path.is_dir():
        if (path / "seqinfo.ini").is_file():
            sequence = motchallenge.read_sequence(path)
            return Source(path, sequence.fps, sequence.size, len(sequence.frames), pictures=sequence.frames)
        found = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in images.READABLE_SUFFIXES))
        if not found:
            raise UserError(f"{path}: holds no picture and no seqinfo.ini")
        return Source(path, Fraction(fps or 25).limit_denominator(1001), None, len(found), pictures=found)
    if path.exists() and path.suffix.lower() not in READABLE_SUFFIXES:
        raise UserError(f"{path}: neither a video ({', '.join(sorted(READABLE_SUFFIXES))}) nor a folder of pictures")
    video = VideoReader(path)
    return Source(path, video.fps, video.size, video.frame_count, video)


def boxes_from(table: BoxTable, least_score: float) -> Any:
    """Given observations as a function from the number of a frame to `supervision.Detections`."""
    module = supervision()

    def boxes(number: int) -> Detections:
        rows = table.rows(number)
        good = (table.scores[rows] >= least_score) & usable(table.boxes_xyxy[rows])
        labels = table.labels[rows][good]
        return module.Detections(
            xyxy=table.boxes_xyxy[rows][good].astype(np.float32),
            confidence=table.scores[rows][good],
            class_id=labels.astype(int),
            data={"class_name": np.array([table.class_names[label] for label in labels], dtype=str)},
        )

    return boxes


def segments_as_detector(generator: MaskGenerator) -> Detect:
    """Segment-and-track: every segment of a frame is a detection with its mask."""
    module = supervision()

    def detect(frame: np.ndarray) -> Detections:
        found = generator.masks(frame)
        if not len(found):
            return module.Detections.empty()
        return module.Detections(
            xyxy=found.boxes_xyxy, mask=found.masks, confidence=found.scores, class_id=np.zeros(len(found), int)
        )

    return detect


@dataclass(frozen=True)
class TrackResult:
    """What a run came to: frames, tracks, boxes, seconds, frames a second, and the files that were written."""

    frames: int
    gaps: int
    tracks: int
    boxes: int
    seconds: float
    frames_per_second: float
    video: str | None
    mot: str | None
    jsonl: str | None


class Drawing:
    """Boxes, masks, names and traces, one colour for each identity."""

    def __init__(self) -> None:
        module = supervision()
        lookup = module.ColorLookup.TRACK
        self._masks = module.MaskAnnotator(color_lookup=lookup)
        self._boxes = module.BoxAnnotator(color_lookup=lookup, thickness=2)
        self._traces = module.TraceAnnotator(color_lookup=lookup, trace_length=30)
        self._labels = module.LabelAnnotator(color_lookup=lookup, text_scale=0.4, text_padding=3)

    def __call__(self, frame: np.ndarray, detections: Detections) -> np.ndarray:
        """A copy of `frame` with all detections drawn."""
        scene = frame.copy()
        if not len(detections):
            return scene
        if detections.mask is not None:
            scene = self._masks.annotate(scene, detections)
        scene = self._traces.annotate(self._boxes.annotate(scene, detections), detections)
        names = detections.data.get("class_name")
        texts = [
            f"{int(identity) + 1}" + ("" if names is None or names[index] == "object" else f" {names[index]}")
            for index, identity in enumerate(detections.tracker_id)  # type: ignore[arg-type]
        ]
        return self._labels.annotate(scene, detections, texts)


def track_video(
    source: Source,
    tracker: Tracker,
    *,
    boxes: Any = None,
    segmenter: PromptableSegmenter | None = None,
    save: Path | None = None,
    mot: Path | None = None,
    jsonl: Path | None = None,
) -> TrackResult:
    """Track a whole video.

    Args:
        source: the frames.
        tracker: with a detector, unless `boxes` are given.
        boxes: function from the number of a frame to its detections.
        segmenter: cuts a mask for every tracked box.
        save: annotated video; its suffix names the container.
        mot: MOTChallenge text of all tracks.
        jsonl: a line of json for each frame: number, and for each object id, box, score, class and, with masks, runs.

    Raises:
        UserError: from the reader, the detector, the tracker or the disk; no file is then left behind.
    """
    start = time.perf_counter()
    count = gaps = total = 0
    identities = -1
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # beside torch's threads, OpenCV's own only wait for each other
    with contextlib.ExitStack() as stack:
        stack.callback(cv2.setNumThreads, threads)
        text = _open_text(stack, mot)
        lines = _open_text(stack, jsonl)
        writer: VideoWriter | None = None
        draw = Drawing() if save else None
        bar = stack.enter_context(console.progress("tracking", source.count))
        for number, frame in enumerate(source.frames()):
            count += 1
            if frame is None:
                gaps += 1
                bar.advance()
                continue
            found = tracker.update(frame, None if boxes is None else boxes(number))
            if segmenter is not None:
                found = _with_masks(found, frame, segmenter)
            total += len(found)
            ids = np.zeros(0, int) if found.tracker_id is None else found.tracker_id
            identities = max(identities, int(ids.max(initial=-1)))
            if text is not None:
                scores = np.ones(len(found)) if found.confidence is None else found.confidence
                motchallenge.write_rows(text, zip([number] * len(found), ids, found.xyxy, scores, strict=True))
            if lines is not None:
                lines.write(json.dumps(_line(number, found)) + "\n")
            if draw is not None and save is not None:
                if writer is None:
                    size = (frame.shape[1], frame.shape[0])
                    sound = source.path if source.video is not None and source.video.audio_streams else None
                    writer = stack.enter_context(VideoWriter(save, source.fps, size, audio_from=sound))
                writer.write(draw(frame, found))
            bar.advance(note=f"{identities + 1} tracks")
    if not count:
        raise UserError(f"{source.path}: holds no frame")
    seconds = time.perf_counter() - start
    return TrackResult(
        count,
        gaps,
        identities + 1,
        total,
        round(seconds, 3),
        round(count / seconds, 2),
        *(str(path) if path else None for path in (save, mot, jsonl)),
    )


def _open_text(stack: contextlib.ExitStack, path: Path | None) -> TextIO | None:
    """A text file that appears when all is done."""
    if path is None:
        return None
    temporary = stack.enter_context(atomic_write(path))
    return stack.enter_context(temporary.open("w", encoding="utf-8"))


def _with_masks(found: Any, frame: np.ndarray, segmenter: PromptableSegmenter) -> Any:
    if not len(found):
        return found
    masks = np.zeros((len(found), *frame.shape[:2]), bool)
    rows = np.arange(len(found))
    if found.confidence is not None:
        rows = rows[found.confidence > MASK_LEAST_SCORE]
    if len(rows):
        masks[rows] = segmenter.segment(frame, found.xyxy[rows]).masks
    found.mask = masks
    return found


def _line(number: int, found: Detections) -> dict[str, Any]:
    names = found.data.get("class_name")
    objects = []
    for index in range(len(found)):
        entry: dict[str, Any] = {
            "id": int(found.tracker_id[index]),  # type: ignore[index]
            "box_xyxy": [round(float(edge), 3) for edge in found.xyxy[index]],
        }
        if found.confidence is not None:
            entry["score"] = round(float(found.confidence[index]), 5)
        if names is not None:
            entry["class"] = str(names[index])
        if found.mask is not None:
            entry["mask"] = encode_mask(found.mask[index])
        objects.append(entry)
    return {"frame": number, "objects": objects}
