"""The room's station on the tour: a generated clip at a low frame rate, tracked by appearance and by motion alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenfold.core import report
from tenfold.core.report import Figure, Station
from tenfold.core.video import VideoWriter
from tenfold.tracking import zero_shot
from tenfold.tracking.association import Associator
from tenfold.tracking.config import MatcherConfig
from tenfold.tracking.data.synthetic import Clip, ClipConfig
from tenfold.tracking.data.table import BoxTable
from tenfold.tracking.predictor import Tracker

CLIP = ClipConfig(frames=48, speed=26.0, seed=3)
FPS = 6
MOTION_ONLY = MatcherConfig(
    init_score=0.3, obj_score=0.05, match_score=0.1, memory_frames=30, assignment="hungarian", motion=1.0
)

NOTES = (
    "The clip is generated: figures in three colours that walk, hide each other and turn round; a tenth of their boxes "
    "is missed and all are shaken. The network never saw such figures.",
    "masa-tiny is a small network of this project, not the authors'. It stands where its training begins: as a colour "
    "histogram read in stripes. The authors' networks load by name or file.",
    "Motion alone is the Kalman filter and overlap of this room with the same rules and the same boxes.",
)


@dataclass(frozen=True)
class Run:
    """One way of tracking the clip: share of boxes under the right identity, changes of identity, seconds a frame."""

    name: str
    kept: float
    switches: int
    seconds: float


def tour(workdir: Path) -> Station:
    """Run the station; the tracked clip is written into `workdir`."""
    from tenfold.tracking.streaming import Drawing, boxes_from

    clip = Clip(CLIP)
    frames, detections, truth = list(clip.frames()), clip.detections(), clip.truth()
    tracker = Tracker.from_pretrained("masa-tiny")
    draw, given = Drawing(), boxes_from(detections, 0.0)
    path = workdir / "tracked.mp4"
    ids = np.full(len(detections), -1)
    seconds = 0.0
    with VideoWriter(path, FPS, CLIP.size) as writer:
        for number, frame in enumerate(frames):
            found = given(number)
            found.data["row"] = np.arange(len(detections))[detections.rows(number)]
            start = time.perf_counter()
            tracked = tracker.update(frame, found)
            seconds += time.perf_counter() - start
            ids[tracked.data["row"]] = tracked.tracker_id
            writer.write(draw(frame, tracked))
    ours = Run("masa-tiny", *score(detections, ids), seconds / CLIP.frames)
    theirs = motion_only(detections)
    accuracy = {
        name: zero_shot.matching_accuracy(zero_shot.describe_frames(frames, truth, describe, range(CLIP.frames)), 10)
        for name, describe in (("masa-tiny", tracker.embed), ("colour histogram", zero_shot.colour_histogram))
    }
    return Station(
        room="tracking",
        title="MASA: track anything that can be detected",
        paper="Li, Ke, Danelljan, Piccinelli, Segu, Van Gool, Yu: Matching Anything by Segmenting Anything. "
        "CVPR 2024, arXiv 2406.04221",
        claim="Two views of a still image, with the segments in them, teach what the same thing looks like; no video "
        "and no identity is needed.",
        command="tenfold tracking track street.mp4 --save tracked.mp4",
        figures=[
            Figure(
                "Boxes under the right identity",
                f"{100 * ours.kept:.0f}",
                "%",
                f"motion alone {100 * theirs.kept:.0f} %",
            ),
            Figure("Changes of identity", str(ours.switches), "", f"motion alone {theirs.switches}"),
            Figure("Found again after 10 frames", f"{100 * accuracy['masa-tiny']:.0f}", "%", "by appearance alone"),
            Figure("A frame", f"{1000 * ours.seconds:.0f}", "ms", f"{CLIP.size[0]} x {CLIP.size[1]}, this machine"),
        ],
        panels=[
            report.video_panel(
                path,
                alt=f"{CLIP.figures} figures with numbered boxes of one colour each walk across a patterned ground",
                caption=f"Tracked by masa-tiny at {FPS} frames a second: a number and a colour for each identity. "
                "Figures move by more than their own width from frame to frame, where overlap says little.",
            ),
            report.table_panel(
                ("way", "right identity (%)", "changes of identity"),
                [(run.name, f"{100 * run.kept:.1f}", run.switches) for run in (ours, theirs)],
                "The same boxes, with and without appearance.",
            ),
            report.table_panel(
                ("description", "found again after 10 frames (%)"),
                [(name, f"{100 * value:.1f}") for name, value in accuracy.items()],
                "True boxes matched by appearance alone.",
            ),
        ],
        notes=NOTES,
    )


def motion_only(detections: BoxTable) -> Run:
    """The clip without looking at it."""
    associator = Associator(MOTION_ONLY)
    ids = np.full(len(detections), -1)
    for number in range(CLIP.frames):
        rows = detections.rows(number)
        count = rows.stop - rows.start
        found = associator.update(
            detections.boxes_xyxy[rows], detections.scores[rows], np.zeros(count), np.zeros((count, 1)), number
        )
        ids[rows.start + found.kept] = found.ids
    return Run("motion alone", *score(detections, ids), 0.0)


def score(detections: BoxTable, ids: np.ndarray) -> tuple[float, int]:
    """Share of boxes under the identity that the best one-to-one pairing gives their figure; changes of identity."""
    from scipy.optimize import linear_sum_assignment

    together = np.zeros((int(detections.ids.max()) + 1, int(ids.max(initial=0)) + 1))
    tracked = ids >= 0
    np.add.at(together, (detections.ids[tracked], ids[tracked]), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    switches = 0
    for figure in np.unique(detections.ids):
        own = ids[(detections.ids == figure) & tracked]
        switches += int((own[1:] != own[:-1]).sum())
    return float(together[rows, columns].sum() / len(detections)), switches
