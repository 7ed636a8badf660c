"""The room's tab on the local web page: upload a picture, see it enlarged beside bicubic interpolation, download it."""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.images import Picture
from tenfold.core.web import asset_copy, readable_errors, result_file
from tenfold.superres.config import MODELS
from tenfold.superres.predictor import Progress, Upscaler
from tenfold.superres.tour import PHOTOGRAPH

# A visitor waits for the result: 4 million pixels take about a minute on two cores at x2.
MAX_INPUT_PIXELS = 4_000_000
# What the page shows; the download always has every pixel.
MAX_SHOWN_SIDE = 2048
_METHODS = {"whole": "in one piece", "strips": "in exact strips", "tiles": "in tiles"}


def tab() -> None:
    """Build the tab; to be called inside a `gradio.Blocks`."""
    import gradio

    embedded = [entry.name for entry in MODELS if entry.source == "embedded"]
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            upload = gradio.File(
                label="Picture", file_types=sorted(images.READABLE_SUFFIXES), type="filepath", height=160
            )
            example = gradio.Button("Use the built-in photograph", size="sm")
            model = gradio.Radio(
                [(f"x{name.rpartition('x')[2]} ({name})", name) for name in embedded],
                value=embedded[0],
                label="Enlarge",
            )
            ensemble = gradio.Checkbox(label="Self-ensemble", info="A little sharper, eight times as slow")
            start = gradio.Button("Enlarge", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            shown = gradio.ImageSlider(
                label="Bicubic | HiT-SR", interactive=False, buttons=["fullscreen"], max_height=640
            )
            details = gradio.Markdown()
            download = gradio.DownloadButton("Download as PNG", visible=False)

    def handle(path: str | None, model: str, self_ensemble: bool, progress=gradio.Progress()):  # noqa: B008 - gradio looks for it there
        return enlarge(path, model, self_ensemble, lambda done: progress(done, desc="Enlarging"))

    example.click(readable_errors(built_in_photograph), outputs=upload)
    outputs = [shown, details, download]
    start.click(readable_errors(handle), inputs=[upload, model, ensemble], outputs=outputs, api_name="superres")


def built_in_photograph() -> str:
    """A copy of the tour's photograph, as if it had been uploaded."""
    return asset_copy("tenfold.superres", PHOTOGRAPH)


@functools.lru_cache(maxsize=2)
def upscaler(model: str) -> Upscaler:
    """The network of a name, kept for the next visitor."""
    return Upscaler.from_pretrained(model)


def enlarge(
    path: str | None, model: str, self_ensemble: bool, progress: Progress | None = None
) -> tuple[tuple[Image.Image, Image.Image], str, object]:
    """Enlarge an uploaded file.

    Returns:
        What the slider shows (bicubic, ours), a line of details in Markdown, and the download button.

    Raises:
        UserError: nothing was uploaded, or what was is no picture, damaged or too large.
    """
    import gradio

    if path is None:
        raise UserError("Choose a picture first.")
    source = images.read(path, max_pixels=MAX_INPUT_PIXELS)
    result = upscaler(model).upscale(source, self_ensemble=self_ensemble, progress=progress)
    enlarged: Picture = result.image
    file = result_file(f"{Path(path).stem}-x{result.scale}.png")
    images.write(file, enlarged)

    size = min(1.0, MAX_SHOWN_SIDE / max(enlarged.width, enlarged.height))
    shown = (max(1, round(enlarged.width * size)), max(1, round(enlarged.height * size)))
    before, after = (_opaque(picture).resize(shown, Image.Resampling.BICUBIC) for picture in (source, enlarged))
    details = (
        f"{source.width} x {source.height} to **{enlarged.width} x {enlarged.height}** in **{result.seconds:.1f} s** "
        f"by {model}, {_METHODS.get(result.method, result.method)}{', self-ensemble' if self_ensemble else ''}"
    )
    return (before, after), details, gradio.DownloadButton(value=str(file), visible=True)


def _opaque(picture: Picture) -> Image.Image:
    """8-bit RGB for the screen; what is transparent lies on white."""
    image = images.to_pil(picture.with_pixels(images.convert_depth(picture.pixels, "uint8"))).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
