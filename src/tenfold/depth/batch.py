"""Many files: what a run does with each picture and film, and getting through them all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tenfold.core import console, video
from tenfold.core.files import check_writable, write_json
from tenfold.core.sources import Job, complain, failure
from tenfold.depth import outputs

if TYPE_CHECKING:
    from tenfold.depth.camera_input import Camera
    from tenfold.depth.predictor import Depth, DepthEstimator

FRAME_FORMATS = ("png16", "npy", "npz", "exr", "ply", "glb", "mesh")  # that a film's frames are written in


@dataclass(frozen=True)
class FileReport:
    """What became of one picture or film."""

    source: str
    status: Literal["done", "skipped", "failed"]
    files: tuple[str, ...] = ()
    frames: int | None = None
    seconds: float | None = None
    camera_source: str | None = None
    intrinsics: list[list[float]] | None = None
    fov_x_deg: float | None = None
    depth_m: dict[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True)
class PredictReport:
    """What became of every file of a run."""

    model: str
    files: tuple[FileReport, ...]
    done: int
    failed: int
    skipped: int


@dataclass(frozen=True)
class Settings:
    """What a run does with each file; see `DepthEstimator.predict` and `outputs.save`."""

    formats: tuple[str, ...] = ("png16", "colormap", "json")
    scale: float = 1000.0
    max_depth_m: float | None = None
    camera: Camera | str | None = None
    fov_x_deg: float | None = None
    resolution_level: float | None = None
    uncertainty: bool = True
    shared_camera: bool = True

    @property
    def predict_options(self) -> dict[str, Any]:
        """Arguments of `predict` and `predict_video`."""
        return {
            "camera": self.camera,
            "fov_x_deg": self.fov_x_deg,
            "resolution_level": self.resolution_level,
            "uncertainty": self.uncertainty,
        }

    @property
    def save_options(self) -> dict[str, Any]:
        """Arguments of `outputs.save`."""
        return {"scale": self.scale, "max_depth_m": self.max_depth_m}


def run(
    estimator: DepthEstimator,
    jobs: Sequence[Job],
    output: Path,
    settings: Settings,
    model: str,
    skip_existing: bool = False,
    keep: Callable[[str, Depth], None] | None = None,
) -> PredictReport:
    """Work through the files; a bad one is reported and the rest is done.

    Args:
        estimator: the network.
        jobs: what is worked on; each target is the folder and the stem of its results.
        output: folder of the results.
        settings: what to do.
        model: its name, for the report.
        skip_existing: leave what has its results already.
        keep: gets the result of each picture.

    Raises:
        UserError: nothing could be done; or a disk that refuses.
        PartialFailure: some files failed; it carries the report.
    """
    check_writable(output)
    reports = []
    with console.progress("depth", total=len(jobs)) as bar:
        for job in jobs:
            bar.advance(0, note=job.source.path.name)
            reports.append(_one(estimator, job, settings, skip_existing, keep))
            bar.advance(1, note=job.source.path.name)
    count = {status: sum(item.status == status for item in reports) for status in ("done", "failed", "skipped")}
    result = PredictReport(model, tuple(reports), **count)
    complain([item.error for item in reports if item.error], len(reports), result)
    return result


def _one(
    estimator: DepthEstimator,
    job: Job,
    settings: Settings,
    skip_existing: bool,
    keep: Callable[[str, Depth], None] | None,
) -> FileReport:
    start = time.perf_counter()
    path, target, film = job.source.path, job.target, job.source.is_video
    expected = [target.with_name(target.name + outputs.FORMATS[name][0]) for name in settings.formats]
    if film:
        expected = [target.with_name(target.name + "_depth.mp4")]
    if skip_existing and all(each.exists() for each in expected):
        return FileReport(str(path), "skipped", tuple(map(str, expected)))
    try:
        check_writable(target.parent)
        if film:
            return dataclasses.replace(_film(estimator, path, target, settings), seconds=time.perf_counter() - start)
        result = estimator.predict(path, **settings.predict_options)
        written = outputs.save(result, target, settings.formats, **settings.save_options)
    except Exception as error:
        text = failure(error, job, "a lower --resolution-level needs less")
        return FileReport(str(path), "failed", error=text)
    if keep:
        keep(target.name, result)
    facts = outputs.describe(result)
    seconds = time.perf_counter() - start
    console.say(
        f"{path}: median {facts['depth_m']['median']:.2f} m, field of view {facts['fov_x_deg']:.1f} degrees "
        f"({result.camera_source}), {seconds:.1f} s -> {', '.join(each.name for each in written)}"
    )
    return FileReport(
        str(path),
        "done",
        tuple(map(str, written)),
        seconds=seconds,
        camera_source=result.camera_source,
        intrinsics=facts["intrinsics"],
        fov_x_deg=facts["fov_x_deg"],
        depth_m=facts["depth_m"],
    )


def _film(estimator: DepthEstimator, path: Path, target: Path, settings: Settings) -> FileReport:
    """NAME_depth.mp4 in colours that mean the same in all frames; further formats a frame, below NAME/."""
    reader = video.VideoReader(path)
    file = target.with_name(target.name + "_depth.mp4")
    formats = [name for name in settings.formats if name in FRAME_FORMATS]
    if settings.formats == Settings.formats:
        formats = []  # of the defaults, a film gets its colours and its camera
    frames, bounds, first = 0, (0.0, 0.0), None
    with (
        video.VideoWriter(file, reader.fps, reader.size) as writer,
        console.progress(path.name, total=reader.frame_count) as bar,
    ):
        for result in estimator.predict_video(path, shared_camera=settings.shared_camera, **settings.predict_options):
            if first is None:
                low, high = np.percentile(result.depth_m, (1, 99))
                first, bounds = outputs.describe(result), (max(0.01, 0.7 * float(low)), max(0.02, 1.4 * float(high)))
            writer.write(outputs.colormap(result.depth_m, bounds))
            if formats:
                check_writable(target)
                outputs.save(result, target / f"{frames:06d}", formats, **settings.save_options)
            frames += 1
            bar.advance(1)
    assert first is not None
    described = target.with_name(target.name + ".json")
    write_json(described, first | {"frames": frames, "colors_m": list(bounds), "shared_camera": settings.shared_camera})
    console.say(f"{path}: {frames} frames -> {file.name}")
    return FileReport(
        str(path),
        "done",
        (str(file), str(described)),
        frames=frames,
        camera_source=first["camera_source"],
        intrinsics=first["intrinsics"],
        fov_x_deg=first["fov_x_deg"],
        depth_m=first["depth_m"],
    )
