"""The room's tab on the local web page: upload a video, see it tracked, download it and the tracks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.core.console import UserError
from tenfold.core.video import READABLE_SUFFIXES, VideoReader, VideoWriter
from tenfold.core.web import readable_errors, result_file

if TYPE_CHECKING:
    from tenfold.tracking.predictor import Embedder

# A visitor waits for the result: about two minutes on two cores.
MAX_FRAMES = 900


def tab() -> None:
    """Build the tab; to be called inside a `gradio.Blocks`."""
    import gradio

    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            upload = gradio.File(label="Video", file_types=sorted(READABLE_SUFFIXES), type="filepath", height=160)
            example = gradio.Button("Use a generated clip", size="sm")
            classes = gradio.Textbox(
                label="Only these classes", placeholder="person . dog", info="Empty: all of COCO's 80"
            )
            score = gradio.Slider(0.1, 0.9, 0.35, step=0.05, label="Least score of a box")
            start = gradio.Button("Track", variant="primary")
        with gradio.Column(scale=3, min_width=300):
            shown = gradio.Video(label="Tracked", interactive=False, height=560)
            details = gradio.Markdown()
            download = gradio.DownloadButton("Download the tracks (MOTChallenge text)", visible=False)
    example.click(readable_errors(generated_clip), outputs=upload)
    start.click(
        readable_errors(track_upload),
        inputs=[upload, classes, score],
        outputs=[shown, details, download],
        api_name="tracking",
    )


def generated_clip() -> str:
    """The tour's clip, as if it had been uploaded. Its figures are no people to a detector, who may find none."""
    from tenfold.tracking.data.synthetic import Clip, ClipConfig

    clip = Clip(ClipConfig(frames=20, speed=6))
    target = result_file("clip.mp4")
    with VideoWriter(target, 6, clip.config.size) as writer:
        for frame in clip.frames():
            writer.write(frame)
    return str(target)


@functools.lru_cache(maxsize=1)
def _embedder() -> Embedder:
    """The network, kept for the next visitor."""
    from tenfold.core.devices import resolve_device
    from tenfold.tracking import checkpoint
    from tenfold.tracking.predictor import Embedder

    return Embedder(checkpoint.load("masa-tiny"), resolve_device("auto"))


def track_upload(path: str | None, classes: str, score: float) -> tuple[str, str, object]:
    """Track an uploaded video.

    Returns:
        The annotated video, a line of details in Markdown, and the download button.

    Raises:
        UserError: nothing was uploaded, what was is no video, or one that is too long.
    """
    import gradio

    from tenfold.tracking import streaming
    from tenfold.tracking.detection import EMBEDDED, load_detector, parse_prompts
    from tenfold.tracking.predictor import Tracker, find_matcher

    if path is None:
        raise UserError("Choose a video first.")
    frames = VideoReader(path).frame_count
    if frames is not None and frames > MAX_FRAMES:
        raise UserError(f"This page takes up to {MAX_FRAMES} frames and the video has {frames}: use the command line.")
    prompts = parse_prompts(classes) if classes.strip() else None
    detect = load_detector(EMBEDDED, prompts, score_threshold=score)
    tracker = Tracker(_embedder(), find_matcher("video"), detect)
    video, text = result_file(f"{Path(path).stem}-tracked.mp4"), result_file(f"{Path(path).stem}.txt")
    result = streaming.track_video(streaming.open_source(Path(path)), tracker, save=video, mot=text)
    details = (
        f"**{result.tracks}** tracks with {result.boxes} boxes in {result.frames} frames, "
        f"{result.frames_per_second:.1f} frames a second"
    )
    return str(video), details, gradio.DownloadButton(value=str(text), visible=True)
