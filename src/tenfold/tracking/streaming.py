"""A whole video through a tracker, a frame at a time: sources, boxes, and what is written on the way.

Nothing is kept but the tracker's memory, however long the video is.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import cv2
import numpy as np

from tenfold.core import console, foundation, images
from tenfold.core.console import UserError, warn
from tenfold.core.files import atomic_write
from tenfold.core.foundation import MaskGenerator, PromptableSegmenter, supervision
from tenfold.core.video import READABLE_SUFFIXES, VideoReader, VideoWriter
from tenfold.tracking.boxes import usable
from tenfold.tracking.data import motchallenge
from tenfold.tracking.data.table import BoxTable
from tenfold.tracking.detection import Detect
from tenfold.tracking.masks import encode_mask
from tenfold.tracking.predictor import Embedder, Tracker

if TYPE_CHECKING:
    from supervision import Detections

Boxes = Callable[[int], "Detections"]
"""From the number of a frame to its detections."""

MASK_LEAST_SCORE = 0.2  # only boxes above it are given a mask (demo of the release)


@dataclass(frozen=True)
class Source:
    """Frames in order.

    Attributes:
        path: a video, or a folder of pictures (a MOTChallenge sequence or plain).
        fps: frames a second.
        count: number of frames, where it is known.
        video: the reader of a video, else None.
        pictures: the files of a folder.
    """

    path: Path
    fps: Fraction
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
            return Source(path, sequence.fps, len(sequence.frames), pictures=sequence.frames)
        found = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in images.READABLE_SUFFIXES))
        if not found:
            raise UserError(f"{path}: holds no picture and no seqinfo.ini")
        return Source(path, Fraction(fps or 25).limit_denominator(1001), len(found), pictures=found)
    if path.exists() and path.suffix.lower() not in READABLE_SUFFIXES:
        raise UserError(f"{path}: neither a video ({', '.join(sorted(READABLE_SUFFIXES))}) nor a folder of pictures")
    video = VideoReader(path)
    return Source(path, video.fps, video.frame_count, video)


def boxes_from(table: BoxTable, least_score: float) -> Boxes:
    """Given observations as a function from the number of a frame to `supervision.Detections`."""
    supervision()

    def boxes(number: int) -> Detections:
        rows = table.rows(number)
        good = (table.scores[rows] >= least_score) & usable(table.boxes_xyxy[rows])
        found = foundation.Detections(table.boxes_xyxy[rows], table.scores[rows], table.labels[rows], table.class_names)
        return found.select(good).to_supervision()

    return boxes


def embed_video(source: Source, table: BoxTable, embedder: Embedder) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the given boxes of a video.

    Returns:
        The rows of `table` that could be looked at, K, and K x E.
    """
    kept, found = [np.zeros(0, int)], [np.zeros((0, embedder.length), np.float32)]
    with console.progress("embedding", source.count) as bar:
        for number, frame in enumerate(source.frames()):
            rows = table.rows(number)
            if frame is not None and rows.start < rows.stop:
                good = np.arange(rows.start, rows.stop)[usable(table.boxes_xyxy[rows], frame.shape[1::-1])]
                if len(good):
                    kept.append(good)
                    found.append(embedder.embed(embedder.features(frame), table.boxes_xyxy[good]))
            bar.advance()
    return np.concatenate(kept), np.concatenate(found)


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
            for index, identity in enumerate(identities(detections))
        ]
        return self._labels.annotate(scene, detections, texts)


def identities(tracked: Detections) -> np.ndarray:
    """`tracker_id` of what a tracker returned."""
    assert tracked.tracker_id is not None
    return tracked.tracker_id


def track_video(
    source: Source,
    tracker: Tracker,
    *,
    boxes: Boxes | None = None,
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
    last = -1
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
            ids = identities(found)
            last = max(last, int(ids.max(initial=-1)))
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
            bar.advance(note=f"{last + 1} tracks")
    if not count:
        raise UserError(f"{source.path}: holds no frame")
    seconds = time.perf_counter() - start
    return TrackResult(
        count,
        gaps,
        last + 1,
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


def _with_masks(found: Detections, frame: np.ndarray, segmenter: PromptableSegmenter) -> Detections:
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
    for index, identity in enumerate(identities(found)):
        entry: dict[str, Any] = {
            "id": int(identity),
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
