"""Many files: which pictures and films paths stand for, and getting through them all."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tenfold.core import console, video
from tenfold.core.console import PartialFailure, UserError
from tenfold.core.files import DiskError, check_writable, write_json
from tenfold.depth import outputs
from tenfold.depth.pictures import PICTURE_SUFFIXES

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


def find_files(paths: Sequence[str], recursive: bool = False) -> list[tuple[Path, Path]]:
    """Files that paths stand for, each with the folder below the output that its results belong into.

    Files are taken as they are; folders give pictures and films by their suffix, without hidden ones.

    Raises:
        UserError: a path that is nothing, or a folder without pictures.
    """
    if not paths:
        raise UserError("give at least one picture, film or folder")
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            members = sorted(path.rglob("*") if recursive else path.iterdir())
            wanted = [
                member
                for member in members
                if member.suffix.lower() in PICTURE_SUFFIXES | video.READABLE_SUFFIXES
                and member.is_file()
                and not any(part.startswith(".") for part in member.relative_to(path).parts)
            ]
            if not wanted:
                hint = "" if recursive else "; --recursive enters sub-folders"
                raise UserError(f"{path}: no pictures or films in this folder{hint}")
            found |= {member: member.parent.relative_to(path) for member in wanted if member not in found}
        elif path.exists():
            found[path] = Path()
        else:
            raise UserError(f"{path}: no such file or folder")
    return list(found.items())


def targets(files: Sequence[tuple[Path, Path]], output: Path) -> list[Path]:
    """Folder and stem of each file's results; files of one stem keep their suffix in the name."""
    stems = [output / below / path.stem for path, below in files]
    count = Counter(stems)
    return [
        stem if count[stem] == 1 else stem.with_name(f"{path.stem}_{path.suffix[1:]}")
        for stem, (path, _) in zip(stems, files, strict=True)
    ]


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
    files: Sequence[tuple[Path, Path]],
    output: Path,
    settings: Settings,
    model: str,
    skip_existing: bool = False,
    keep: Callable[[str, Depth], None] | None = None,
) -> PredictReport:
    """Work through the files; a bad one is reported and the rest is done.

    Args:
        estimator: the network.
        files: of `find_files`.
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
    with console.progress("depth", total=len(files)) as bar:
        for (path, _), target in zip(files, targets(files, output), strict=True):
            bar.advance(0, note=path.name)
            reports.append(_one(estimator, path, target, settings, skip_existing, keep))
            bar.advance(1, note=path.name)
    count = {status: sum(item.status == status for item in reports) for status in ("done", "failed", "skipped")}
    result = PredictReport(model, tuple(reports), **count)
    errors = [item.error for item in reports if item.error]
    if errors and len(errors) == len(reports):
        raise UserError(errors[0] if len(errors) == 1 else f"all {len(errors)} files failed (the first: {errors[0]})")
    if errors:
        for error in errors:
            console.warn(error)
        raise PartialFailure(f"{len(errors)} of {len(reports)} files failed (the first: {errors[0]})", result)
    return result


def _one(
    estimator: DepthEstimator,
    path: Path,
    target: Path,
    settings: Settings,
    skip_existing: bool,
    keep: Callable[[str, Depth], None] | None,
) -> FileReport:
    start = time.perf_counter()
    film = path.suffix.lower() in video.READABLE_SUFFIXES
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
    except DiskError:
        raise
    except UserError as error:
        text = str(error)
        return FileReport(str(path), "failed", error=text if str(path) in text else f"{path}: {text}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return FileReport(
            str(path), "failed", error=f"{path}: not enough memory; a lower --resolution-level needs less"
        )
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
