"""What a layer costs as its window grows: spatial-channel correlation beside window self-attention."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.superres.config import HiTConfig
from tenfold.superres.model import HierarchicalLayer, relative_position_index


@dataclass(frozen=True)
class CostRow:
    """Processor seconds of two layers on one map; `attention_s` is None where it was left out."""

    window: int
    correlation_s: float
    attention_s: float | None


class WindowAttentionLayer(nn.Module):
    """A layer of SwinIR (Liang et al. 2021) without the shift: pre-norm window self-attention and an MLP."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same; H and W are multiples of the window."""
        batch, height, width, channels = x.shape
        side, area = self.window, self.window**2
        windows = self.norm1(x).view(batch, height // side, side, width // side, side, channels).transpose(2, 3)
        qkv = self.qkv(windows.reshape(-1, area, channels))
        q, k, v = qkv.view(-1, area, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) * (channels // self.heads) ** -0.5 + bias).softmax(-1)
        y = self.proj((attention @ v).transpose(1, 2).reshape(-1, area, channels))
        y = y.view(batch, height // side, width // side, side, side, channels).transpose(2, 3)
        x = x + y.reshape(x.shape)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@torch.no_grad()
def cost_sweep(
    windows: Sequence[int] = (4, 8, 16, 32, 48, 64),
    attention_windows: Sequence[int] = (4, 8, 16, 32),
    side: int = 192,
    width: int = 60,
    heads: int = 6,
    repeats: int = 3,
) -> list[CostRow]:
    """Time two layers of each kind on one thread, interleaved; the least of `repeats` counts.

    Args:
        windows: window sides in pixels that divide `side`.
        attention_windows: those of them at which self-attention is timed too (at 32 it takes seconds and gigabytes).
        side: side of the square map in pixels.
        width: channels.
        heads: heads of both operators.
        repeats: timed runs of each, after one that is not timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        features = torch.randn(1, side, side, width, generator=torch.Generator().manual_seed(0))
        rows = []
        for window in windows:
            config = HiTConfig(variant="sir", width=width, depths=(1,), heads=(heads,), window_ratios=(window / 8,))
            layers: list[nn.Module] = [HierarchicalLayer(config, heads, config.windows[0])]
            if window in attention_windows:
                layers.append(WindowAttentionLayer(width, heads, window))
            least = [float("inf")] * len(layers)
            for repeat in range(repeats + 1):
                for index, layer in enumerate(layers):
                    start = time.process_time()
                    layer(layer(features))
                    if repeat:
                        least[index] = min(least[index], time.process_time() - start)
            rows.append(CostRow(window, least[0], least[1] if len(least) > 1 else None))
        return rows
    finally:
        torch.set_num_threads(threads)
