"""The network strip by strip: what the plain run computes, with its working set in cache and two maps in memory.

Every operator of a layer stays within a row of windows, but for the 3x3 convolution on the padded map (one pixel
around), the 5x5 depthwise convolution of HiT-SRF (two), and the context of HiT-SNG (one window around). So a layer
runs over strips of window rows, in place; the rows that the next strip needs are read before they are overwritten.
Results differ from the plain run only by the order of float sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.superres.maps import convolve, pad_by_reflection, reflected_indices

if TYPE_CHECKING:
    from tenfold.superres.model import (
        ConvFeedForward,
        HierarchicalBlock,
        HierarchicalLayer,
        HiT,
        SpatialChannelCorrelation,
    )

# Pixels that are worked on at once, per thread: 60 channels of them and their temporaries fit a core's cache (1-2 MB).
PIXELS = 8192
# Rows that the reconstruction reads above and below: no head's convolutions reach further, in low-resolution pixels.
RECONSTRUCTION_REACH = 4


def preferable(image: Tensor) -> bool:
    """Whether strips are the faster way to run: on a processor, in full precision, where no graph is recorded."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return image.device.type == "cpu" and not recorded and not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def upscale(model: HiT, image: Tensor, progress: Callable[[float], None] | None = None) -> Tensor:
    """Run a network without gradients.

    Args:
        model: any HiT network.
        image: B x channels x H x W, float, in [0, 1].
        progress: called with the fraction done, 0..1.

    Returns:
        B x channels x sH x sW, not clamped, equal to the plain run up to the order of sums.
    """
    batch, channels, height, width = image.shape
    scale = model.config.scale
    result = image.new_empty(batch, channels, scale * height, scale * width)
    for index in range(batch):
        _upscale_one(model, image[index : index + 1], result[index : index + 1], progress or (lambda fraction: None))
    return result


def _upscale_one(model: HiT, image: Tensor, result: Tensor, progress: Callable[[float], None]) -> None:
    height, width = image.shape[2:]
    scale = model.config.scale
    centred = ((image - model.mean) * model.config.image_range).movedim(1, 3)
    # Convolutions read rows around: taller ranges read fewer of them twice.
    chunks = _chunks(0, height, width, least=32)
    blocks = [cast("HierarchicalBlock", block) for block in model.blocks]
    steps = sum(len(block.layers) for block in blocks) + 2

    def shallow_features(rows: Tensor) -> Tensor:  # cheaper to compute twice than to keep
        return model.shallow_features(rows.movedim(3, 1))

    x = image.new_empty(1, height, width, model.config.width)  # input of the present block
    features = torch.empty_like(x)
    for top, bottom in chunks:
        x[:, top:bottom] = model.patch_norm(_with_halo(shallow_features, centred, top, bottom, 1))
    done = 0
    reach = 1 if model.config.residual_convolution == "1conv" else 2
    for block in blocks:
        source = x
        for layer in block.layers:
            _run_layer(cast("HierarchicalLayer", layer), source, features)
            source = features
            done += 1
            progress(done / steps)
        for top, bottom in chunks:
            x[:, top:bottom] += _with_halo(partial(convolve, block.conv), features, top, bottom, reach)
    for top, bottom in chunks:
        body = _with_halo(lambda rows: convolve(model.conv_after_body, model.norm(rows)), x, top, bottom, reach)
        features[:, top:bottom] = body + _with_halo(shallow_features, centred, top, bottom, 1)
    progress((done + 1) / steps)
    for top, bottom in chunks:
        part = _with_halo(
            lambda rows: model.reconstruct(rows).movedim(1, 3), features, top, bottom, RECONSTRUCTION_REACH, scale
        )
        result[:, :, scale * top : scale * bottom] = part.movedim(3, 1)
    progress(1.0)


def _chunks(start: int, stop: int, width: int, least: int = 1) -> list[tuple[int, int]]:
    """Cut rows start..stop into ranges of about PIXELS pixels per thread, and of `least` rows."""
    step = max(least, PIXELS * torch.get_num_threads() // width)
    return [(top, min(top + step, stop)) for top in range(start, stop, step)]


def _with_halo(
    function: Callable[[Tensor], Tensor], source: Tensor, top: int, bottom: int, halo: int, scale: int = 1
) -> Tensor:
    """`function(source)[:, top:bottom]` of a function that reads up to `halo` rows around; rows scale by `scale`."""
    first, last = max(top - halo, 0), min(bottom + halo, source.shape[1])
    return function(source[:, first:last])[:, scale * (top - first) : scale * (bottom - first)]


def _run_layer(layer: HierarchicalLayer, source: Tensor, target: Tensor) -> None:
    """target <- layer(source), 1 x H x W x C; both may be the same map."""
    correlation = layer.correlation
    matrices = correlation.matrices()
    window = correlation.window
    height, width = source.shape[1:3]
    feed_forward = _FeedForward(layer, target)
    for start, windows in _window_strips(correlation, source):
        rows, columns, area, channels = windows.shape
        y = windows.new_empty(1, rows * window[0], columns * window[1], channels)
        by_window = y.view(rows, window[0], columns, window[1], channels).transpose(1, 2)
        step = max(1, PIXELS * torch.get_num_threads() // (rows * area))
        for first in range(0, columns, step):
            part = windows[:, first : first + step]
            correlated = correlation.correlate(part.reshape(-1, area, channels), *matrices)
            by_window[:, first : first + step] = correlated.view(*part.shape[:2], *window, channels)
        for top, bottom in _chunks(start, min(start + y.shape[1], height), width):
            x = source[:, top:bottom] + layer.norm1(y[:, top - start : bottom - start, :width])
            feed_forward.add(top, x)


def _window_strips(correlation: SpatialChannelCorrelation, source: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and queries and values of one strip after the other, as rows x columns x L x C windows.

    A strip is handed out when those that it depends on have been read, and the one after it.
    """
    held: tuple[int, Tensor] | None = None
    context = correlation.context
    unigrams: list[Tensor] = []  # of HiT-SNG, one row of windows each
    for strip in _features(correlation, source):
        if context is not None:
            unigrams += context.unigrams(strip[1].flatten(0, 1)).view(*strip[1].shape[:2], -1).unbind()
        if held is not None:
            yield _in_context(correlation, held, unigrams)
        held = strip
    assert held is not None
    if context is not None:
        unigrams.append(unigrams[-2])  # below the last row of windows comes its reflection
    yield _in_context(correlation, held, unigrams)


def _in_context(
    correlation: SpatialChannelCorrelation, strip: tuple[int, Tensor], unigrams: list[Tensor]
) -> tuple[int, Tensor]:
    """Add the N-gram context of HiT-SNG to a strip of windows."""
    start, windows = strip
    if correlation.context is not None:
        first = start // correlation.window[0]
        above = unigrams[first - 1] if first else unigrams[1]
        around = torch.stack((above, *unigrams[first : first + windows.shape[0] + 1]))
        windows += correlation.context.bigrams(around[None])[0, :, :, None]
    return strip


def _features(correlation: SpatialChannelCorrelation, source: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and dual features of one strip of window rows after the other, rows x columns x L x C."""
    features, window = correlation.features, correlation.window
    height, width, channels = source.shape[1:]
    extra = -height % correlation.padding_multiple[0]
    # Reflected rows are copied at once: what they mirror may be overwritten before they are needed.
    below = source[:, :0] if extra == 0 else source[:, reflected_indices(height, extra, source.device)]
    step = window[0] * max(1, PIXELS * torch.get_num_threads() // (window[0] * width))
    for top in range(0, height + extra, step):
        bottom = min(top + step, height + extra)
        first, last = max(top - 1, 0), min(bottom + 1, height + extra)
        rows = source[:, first : min(last, height)]
        if last > height:
            rows = torch.cat((rows, below[:, max(first - height, 0) : last - height]), dim=1)
        rows = pad_by_reflection(rows, (1, correlation.padding_multiple[1]))
        inner = slice(top - first, bottom - first)
        neighbourhood = features.neighbourhood(rows)
        count, columns = (bottom - top) // window[0], rows.shape[2] // window[1]
        windows = source.new_empty(count, columns, *window, channels)
        by_row = windows.transpose(1, 2)
        shape = (count, window[0], rows.shape[2], -1)
        rows, neighbourhood = rows[0, inner].view(shape), neighbourhood[0, inner].view(shape)
        for begin, end in _chunks(0, window[0], count * rows.shape[2]):
            product = by_row[:, begin:end]
            torch.mul(
                features.expand(neighbourhood[:, begin:end]).view(product.shape),
                features.linear(rows[:, begin:end]).view(product.shape),
                out=product,
            )
        yield top, windows.flatten(2, 3)


class _FeedForward:
    """Second half of a layer, on rows as they come; HiT-SRF's depthwise convolution lags two rows behind."""

    def __init__(self, layer: HierarchicalLayer, target: Tensor) -> None:
        self.layer = layer
        self.target = target
        self.depthwise = getattr(layer.mlp, "depthwise", None)
        if self.depthwise is not None:
            _, self.height, width, _ = target.shape
            rows = 4 + max(bottom - top for top, bottom in _chunks(0, self.height, width)) + 2
            self.hidden = target.new_zeros(1, rows, width, layer.mlp.fc1.out_features)
            self.held = 2  # rows kept: at first the zero padding, later the last four

    def add(self, top: int, x: Tensor) -> None:
        """Take rows top.. of x, 1 x rows x W x C, and write those rows of the target that can be finished."""
        layer, target = self.layer, self.target
        bottom = top + x.shape[1]
        if self.depthwise is None:
            torch.add(x, layer.norm2(layer.mlp(x)), out=target[:, top:bottom])
            return
        target[:, top:bottom] = x
        end = self.held + x.shape[1]
        self.hidden[:, self.held : end] = F.gelu(layer.mlp.fc1(x))
        if bottom == self.height:
            self.hidden[:, end : end + 2] = 0
            end += 2
        if end > 4:
            first = top - self.held + 2  # the first row that has two above it
            ready = target[:, first : first + end - 4]
            ready += layer.norm2(self.contract(self.hidden[:, :end]))
        self.held = min(end, 4)
        self.hidden[:, : self.held] = self.hidden[:, end - self.held : end].clone()

    def contract(self, hidden: Tensor) -> Tensor:
        """What is left of HiT-SRF's feed-forward network: 1 x (rows + 4) x W x hidden -> 1 x rows x W x C."""
        mlp = cast("ConvFeedForward", self.layer.mlp)
        depthwise = mlp.depthwise
        convolved = F.conv2d(
            hidden.movedim(3, 1), depthwise.weight, depthwise.bias, padding=(0, 2), groups=depthwise.groups
        )
        return mlp.fc2(hidden[:, 2:-2] + F.gelu(convolved.movedim(1, 3)))
