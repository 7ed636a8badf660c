"""The room's station on the tour: a held-out photograph made small and large again, and what a layer costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.core import images, plots, report
from tenfold.core.report import Figure, Panel, Station, Tile
from tenfold.superres import evaluation
from tenfold.superres.config import HiTConfig
from tenfold.superres.model import SpatialChannelCorrelation
from tenfold.superres.predictor import Upscaler
from tenfold.superres.resize import imresize_matlab

PHOTOGRAPH = "chelsea.png"
DETAIL = (116, 64, 96, 64)  # the eye: left, top, width and height in the photograph's pixels
MAP_SIDE = 64  # of the feature map that one layer is timed on
WINDOWS = (8, 16, 32)

NOTES = (
    "Photograph: Chelsea the cat, by Stefan van der Walt, CC0. None of these weights were trained on it.",
    "Small pictures are made, and bicubic enlargements computed, as MATLAB's imresize does, as in the papers. "
    "PSNR and SSIM are those of the luma channel, without a border as wide as the scale.",
    "tenfold-x2 and tenfold-x4 are small weights trained by this project, not the authors'. Those load by name, "
    "for instance --model hit-srf-x4.",
    "Noise and compression artefacts are enlarged too: these networks undo bicubic shrinking and nothing else.",
)


@dataclass(frozen=True)
class Run:
    """One scale: the small picture, both enlargements, their scores, the seconds that ours took. HxWx3 uint8."""

    scale: int
    low_res: np.ndarray
    bicubic: np.ndarray
    ours: np.ndarray
    bicubic_score: evaluation.ImageScore
    our_score: evaluation.ImageScore
    seconds: float

    @property
    def gain_db(self) -> float:
        """Y-PSNR of ours above bicubic."""
        return self.our_score.psnr_y - self.bicubic_score.psnr_y


def tour(workdir: Path) -> Station:
    """Run the station; this one needs no files, so `workdir` stays empty."""
    truth = photograph()
    x4, x2 = (run(truth, scale) for scale in (4, 2))
    correlation_ms, attention_ms = layer_costs()
    largest = WINDOWS[-1]
    return Station(
        room="superres",
        title="HiT-SR: super-resolution with windows that grow",
        paper="Zhang, Zhang, Yu: HiT-SR, Hierarchical Transformer for Efficient Image Super-Resolution. "
        "ECCV 2024, arXiv 2407.05878",
        claim="Windows that grow from layer to layer, and correlations whose cost is linear in the window's area "
        "in place of attention, enlarge pictures faithfully and cheaply.",
        command="tenfold superres upscale photo.jpg --scale 4 --output large/",
        figures=[
            Figure("Better than bicubic, x4", f"{x4.gain_db:+.2f}", "dB", _comparison(x4)),
            Figure("Better than bicubic, x2", f"{x2.gain_db:+.2f}", "dB", _comparison(x2)),
            Figure("Time at x4", f"{x4.seconds:.2f}", "s", f"to {_size(truth)}, {_threads()}"),
            Figure(
                f"A layer at window {largest}",
                f"{attention_ms[-1] / correlation_ms[-1]:.1f}",
                "x faster",
                "correlation against self-attention",
            ),
        ],
        panels=[
            report.slider_panel(
                x4.bicubic,
                x4.ours,
                "Bicubic",
                "tenfold-x4",
                alt="A tabby cat's face, enlarged four times",
                caption=f"Both sides were made from the same {_size(x4.low_res)} picture: the left by bicubic "
                "interpolation, the right by the network. Drag the divider, or move it with the arrow keys.",
            ),
            *(_closely(each, truth) for each in (x4, x2)),
            _scores(x2, x4),
            _cost_panel(correlation_ms, attention_ms),
        ],
        notes=NOTES,
    )


def photograph() -> np.ndarray:
    """The built-in photograph, H x W x 3 uint8; both sides are multiples of 4."""
    with resources.as_file(resources.files("tenfold.superres") / "assets" / PHOTOGRAPH) as path:
        return images.to_rgb8(images.read(path))


def run(truth: np.ndarray, scale: int) -> Run:
    """Make a photograph small as the benchmarks do, enlarge it by bicubic and by the built-in network, score both."""
    upscaler = Upscaler.from_pretrained(f"tenfold-x{scale}")
    low_res = evaluation.make_low_res(truth, scale)
    result = upscaler.upscale(low_res)
    bicubic = imresize_matlab(low_res, scale)
    return Run(
        scale=scale,
        low_res=low_res,
        bicubic=bicubic,
        ours=result.image,
        bicubic_score=evaluation.score_image("bicubic", bicubic, truth, scale),
        our_score=evaluation.score_image(f"tenfold-x{scale}", result.image, truth, scale),
        seconds=result.seconds,
    )


def _comparison(run: Run) -> str:
    return f"{run.our_score.psnr_y:.2f} against {run.bicubic_score.psnr_y:.2f} dB"


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _closely(run: Run, truth: np.ndarray) -> Panel:
    """The detail in four versions, pixel by pixel."""
    blocks = np.repeat(np.repeat(run.low_res, run.scale, axis=0), run.scale, axis=1)
    tiles = [
        Tile(_detail(blocks), "Input", _size(run.low_res), "The cat's eye in large blocks"),
        Tile(_detail(run.bicubic), "Bicubic", f"{run.bicubic_score.psnr_y:.2f} dB", "The eye, blurred"),
        Tile(_detail(run.ours), f"tenfold-x{run.scale}", f"{run.our_score.psnr_y:.2f} dB", "The eye, sharper"),
        Tile(_detail(truth), "Truth", _size(truth), "The eye in the original photograph"),
    ]
    return report.tiles_panel(tiles, f"A detail at x{run.scale}, every pixel shown as it is.", zoomed=True)


def _detail(image: np.ndarray) -> np.ndarray:
    left, top, width, height = DETAIL
    return image[top : top + height, left : left + width]


def _scores(*runs: Run) -> Panel:
    rows = []
    for each in runs:
        for score, seconds in ((each.bicubic_score, None), (each.our_score, each.seconds)):
            time_text = "" if seconds is None else f"{seconds:.2f}"
            rows.append([score.name, f"x{each.scale}", f"{score.psnr_y:.2f}", f"{score.ssim_y:.4f}", time_text])
    columns = ("method", "scale", "PSNR (dB)", "SSIM", "time (s)")
    return report.table_panel(columns, rows, "Scores on this photograph; higher is better.")


# --- What a layer costs -------------------------------------------------------------------------------------------


class WindowSelfAttention(nn.Module):
    """Multi-head softmax self-attention inside windows, with a relative position bias, as in SwinIR: the comparison."""

    position_bias: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        # At inference the bias is a constant, so gathering it from its table is left out of the comparison.
        self.register_buffer("position_bias", torch.zeros(1, heads, window**2, window**2))

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same; H and W are multiples of the window."""
        batch, height, width, channels = x.shape
        rows, columns, side = height // self.window, width // self.window, self.window
        windows = x.view(batch, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side**2, channels)
        q, k, v = self.qkv(windows).view(-1, side**2, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.position_bias)
        y = self.proj(attended.transpose(1, 2).reshape(-1, side**2, channels))
        return y.view(batch, rows, columns, side, side, channels).transpose(2, 3).reshape(x.shape)


def layer_costs(repeats: int = 5) -> tuple[list[float], list[float]]:
    """Milliseconds of one correlation and of one self-attention for each of `WINDOWS`, at the released width and heads.

    Both are timed in turn on the same map of `MAP_SIDE` x `MAP_SIDE`, on one thread and in its own processor time, so
    that other work on the machine counts for little. After a run to warm up, the shortest of `repeats` counts.
    """
    config = HiTConfig()
    features = torch.rand(1, MAP_SIDE, MAP_SIDE, config.width)
    correlation_ms: list[float] = []
    attention_ms: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for window in WINDOWS:
            correlation = SpatialChannelCorrelation(config, config.heads[0], (window, window)).eval()
            attention = WindowSelfAttention(config.width, config.heads[0], window).eval()
            with torch.inference_mode():
                pairs = [(_cpu_ms(correlation, features), _cpu_ms(attention, features)) for _ in range(repeats + 1)]
            correlation_ms.append(min(ours for ours, _ in pairs[1:]))
            attention_ms.append(min(theirs for _, theirs in pairs[1:]))
    finally:
        torch.set_num_threads(threads)
    return correlation_ms, attention_ms


def _cpu_ms(layer: Callable[[Tensor], Tensor], features: Tensor) -> float:
    started = time.thread_time()
    layer(features)
    return (time.thread_time() - started) * 1000


def _cost_panel(correlation_ms: list[float], attention_ms: list[float]) -> Panel:
    figure = plots.plot_lines(
        {"Spatial-channel correlation": (WINDOWS, correlation_ms), "Window self-attention": (WINDOWS, attention_ms)},
        x_label="window side (pixels)",
        y_label="one layer (ms)",
        log_x=True,
        log_y=True,
    )
    told = "; ".join(
        f"at window {window}, {ours:.1f} ms against {theirs:.1f} ms"
        for window, ours, theirs in zip(WINDOWS, correlation_ms, attention_ms, strict=True)
    )
    return report.plot_panel(
        figure,
        alt=f"Time of one layer as windows grow, correlation against self-attention: {told}.",
        caption=f"Time of one layer on a {MAP_SIDE} x {MAP_SIDE} map on one thread, measured just now. "
        "Self-attention compares every pixel of a window with every other; the correlation does not.",
    )
