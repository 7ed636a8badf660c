"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from tenfold.core import console
from tenfold.core.console import UserError
from tenfold.core.devices import DeviceName
from tenfold.depth.training_verbs import TRAINING_VERBS, OutputFolder

if TYPE_CHECKING:
    from tenfold.depth.camera_input import Camera

Format = Literal["png16", "npy", "npz", "exr", "colormap", "ply", "glb", "mesh", "json", "html"]
DEFAULT_MODEL = "tenfold-depth-tiny"


def predict(
    paths: Positional[list[str]],
    output: OutputFolder,
    model: str = DEFAULT_MODEL,
    camera: str | None = None,
    fov_x: float | None = None,
    format: tuple[Format, ...] = ("png16", "colormap", "json"),
    scale: float = 1000.0,
    max_depth: float | None = None,
    resolution_level: float | None = None,
    uncertainty: bool = True,
    shared_camera: bool = True,
    view: bool = False,
    recursive: bool = False,
    skip_existing: bool = False,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: DeviceName = "auto",
) -> object:
    """Metric depth, 3D points and the camera of pictures and films.

    Results have the picture's size. A film becomes a film of depth in colours, and its camera as JSON; other formats
    are written for each of its frames. A bad file is reported and the others are done (exit status 1). The authors'
    weights may not be used commercially.

    Args:
        paths: pictures, films, and folders of them.
        output: folder for the results.
        model: official or built-in name, hub id, folder, or weights file; the default is built in, and a toy.
        camera: the camera, where it is known: a file (JSON or .npy, see docs/depth.md), exif (the focal length that the
            photograph carries), or auto (that, where there is one). Otherwise it is predicted.
        fov_x: horizontal field of view in degrees, where that is known.
        format: one or more of png16 (16-bit, metres x scale), npy, npz (everything), exr, colormap, ply and glb
            (points), mesh (a surface), json (the camera), html (a page to look at).
        scale: of png16: stored value = metres x scale.
        max_depth: metres; what is farther is left out of png16, ply, glb and mesh.
        resolution_level: 0 (quick) to 9 (fine) of V2's range of resolutions.
        uncertainty: also predict the error (V2); --no-uncertainty takes less time.
        shared_camera: one camera for all frames of a film, so that depth does not flicker.
        view: then show the point clouds in the browser, until Ctrl-C.
        recursive: enter sub-folders, and keep their structure.
        skip_existing: leave what has its results already.
        precision: of the arithmetic; bf16 and fp16 are for GPUs.
        device: where to compute.

    Example:
        tenfold depth predict photo.jpg -o out/ --format png16 ply json
        tenfold depth predict fisheye/ -o out/ --camera aria.json --resolution-level 3
    """
    from tenfold.core.devices import set_threads
    from tenfold.core.sources import find_sources, jobs_in_folder
    from tenfold.depth import batch
    from tenfold.depth.outputs import FORMATS
    from tenfold.depth.pictures import PICTURE_SUFFIXES

    if not format:
        raise UserError(f"--format: give at least one of {', '.join(FORMATS)}")
    if max_depth is not None and not max_depth > 0:
        raise UserError(f"--max-depth {max_depth:g}: give metres above 0")
    if not 0 < scale < float("inf"):
        raise UserError(f"--scale {scale:g}: give a number above 0")
    if camera is not None and fov_x is not None:
        raise UserError("give either --camera or --fov-x, not both")
    jobs = jobs_in_folder(find_sources(paths, output, recursive, pictures=PICTURE_SUFFIXES), output, lambda source: "")
    told: Camera | str | None = camera
    if camera is not None and camera not in ("exif", "auto"):
        from tenfold.depth.camera_input import Camera

        told = Camera.from_file(camera)  # a file that holds none is told before a network is loaded

    from tenfold.depth.predictor import Depth, DepthEstimator

    set_threads()
    if model == DEFAULT_MODEL:
        console.warn(
            f"{model} has seen rendered rooms only: its metres are no measurement. "
            "--model unidepth-v2-vits14 loads the authors' network (CC BY-NC 4.0)"
        )
    estimator = DepthEstimator.from_pretrained(model, device, precision)
    settings = batch.Settings(format, scale, max_depth, told, fov_x, resolution_level, uncertainty, shared_camera)
    shown: list[tuple[str, Depth]] = []
    result = batch.run(
        estimator,
        jobs,
        output,
        settings,
        model,
        skip_existing,
        keep=(lambda name, found: shown.append((name, found))) if view else None,
    )
    if view:
        from tenfold.depth.view import serve

        serve(shown)
    return result


def export(
    model: Positional[str],
    output: OutputFolder,
    height: int = 490,
    width: int = 644,
    dynamic: bool = True,
    rays: bool = False,
    uncertainty: bool = True,
) -> object:
    """Write a network as an ONNX file, checked against PyTorch at sizes that the export did not see.

    Input `image`: B x 3 x H x W, normalised by ImageNet's mean and deviation, H and W multiples of 14 (V1: its one
    size). Outputs: `radius_m` (V1: `depth_m`), `intrinsics`, `rays_out`, and V2's `error_m`.

    Args:
        model: official or built-in name, hub id, folder, or weights file.
        output: the .onnx file.
        height: of the exported image (V2).
        width: likewise.
        dynamic: batch, height and width are free at run time (V2).
        rays: take `rays` (B x 3 x H x W, unit) as a second input, for cameras that are known.
        uncertainty: with the output `error_m`.

    Example:
        tenfold depth export unidepth-v2-vits14 -o unidepth.onnx
    """
    if output.suffix.lower() != ".onnx":
        raise UserError(f"-o {output}: name a file that ends in .onnx")
    if min(height, width) < 28 or height % 14 or width % 14:
        raise UserError(f"--height {height} --width {width}: give multiples of 14, from 28 on")

    from tenfold.core.devices import set_threads
    from tenfold.depth import onnx_file
    from tenfold.depth.checkpoint import licence, load_model

    set_threads()
    network = load_model(model)
    sizes = ((height, width), (280, 392), (406, 294))
    metadata = {"architecture": type(network).__name__, "licence": licence(model)}
    result = onnx_file.write(network, output, sizes, rays, uncertainty, dynamic, metadata)
    console.table(
        ("image", "largest relative difference"),
        [(f"{wide} x {high}", f"{difference:.1e}") for high, wide, difference in result.checked],
        title=f"{output}: {result.bytes / 1e6:.1f} MB; ONNX Runtime against PyTorch",
    )
    return result


VERBS: dict[str, Callable[..., object]] = {
    "predict": predict,
    "export": export,
    **TRAINING_VERBS,
}
