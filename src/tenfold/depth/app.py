"""The room's tab on the local web page: upload a picture, see depth beside it and its points in space, download."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.web import asset_copy, readable_errors, result_file
from tenfold.depth import outputs
from tenfold.depth.config import MODELS
from tenfold.depth.pictures import PICTURE_SUFFIXES, read_picture
from tenfold.depth.predictor import DepthEstimator
from tenfold.depth.tour import PHOTOGRAPH
from tenfold.depth.view import cloud_panel

MAX_INPUT_PIXELS = 12_000_000
MAX_SHOWN_SIDE = 1600


def tab() -> None:
    """Build the tab; to be called inside a `gradio.Blocks`."""
    import gradio

    names = [entry.name for entry in MODELS]
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            upload = gradio.File(label="Picture", file_types=sorted(PICTURE_SUFFIXES), type="filepath", height=160)
            example = gradio.Button("Use the built-in photograph", size="sm")
            model = gradio.Dropdown(names, value=names[0], label="Network")
            fov = gradio.Number(label="Horizontal field of view, degrees", info="Empty: EXIF, or predicted", value=None)
            start = gradio.Button("Measure", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            shown = gradio.ImageSlider(label="Picture | Depth", interactive=False, max_height=560)
            details = gradio.Markdown()
            cloud = gradio.HTML()
            with gradio.Row():
                png = gradio.DownloadButton("Depth as 16-bit PNG", visible=False)
                ply = gradio.DownloadButton("Points as PLY", visible=False)

    example.click(readable_errors(built_in_photograph), outputs=upload)
    targets = [shown, details, cloud, png, ply]
    start.click(readable_errors(measure), inputs=[upload, model, fov], outputs=targets, api_name="depth")


def built_in_photograph() -> str:
    """A copy of the tour's photograph, as if it had been uploaded."""
    return asset_copy("tenfold.depth", PHOTOGRAPH)


@functools.lru_cache(maxsize=1)
def estimator(model: str) -> DepthEstimator:
    """The network of a name, kept for the next visitor."""
    return DepthEstimator.from_pretrained(model)


def measure(path: str | None, model: str, fov: float | None) -> tuple[Any, ...]:
    """Depth of an uploaded picture.

    Returns:
        What the slider shows, a line of details in Markdown, the point cloud's HTML, two download buttons.

    Raises:
        UserError: nothing was uploaded, or what was is no picture, damaged or too large.
    """
    import gradio

    if path is None:
        raise UserError("Choose a picture first.")
    picture = read_picture(path, MAX_INPUT_PIXELS)
    camera = None if fov else "auto"
    result = estimator(model).predict(picture, camera=camera, fov_x_deg=fov or None)
    stem = result_file("depth")
    png, ply = outputs.save(result, stem, ("png16", "ply"))
    facts = outputs.describe(result)
    details = (
        f"Median depth **{facts['depth_m']['median']:.2f} m**, horizontal field of view "
        f"**{facts['fov_x_deg']:.1f} degrees** (camera {result.camera_source})"
    )
    step = max(1, int(np.ceil(max(result.depth_m.shape) / MAX_SHOWN_SIDE)))
    pictures = (result.image[::step, ::step], outputs.colormap(result.depth_m)[::step, ::step])
    return (
        tuple(images.to_pil(images.Picture(np.ascontiguousarray(each))) for each in pictures),
        details,
        cloud_panel(result).html,
        gradio.DownloadButton(value=str(png), visible=True),
        gradio.DownloadButton(value=str(ply), visible=True),
    )
