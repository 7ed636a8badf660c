"""HiT-SR computed the way that the published code computes it, on the weights of one of our networks.

Own code, for comparison only. Correlation maps are formed explicitly (L x M for each head and window), and every
forward of every layer builds the position bias anew, by a gather of all L x L pixel pairs that is then averaged over
cells. The rest (norms, feed-forward, convolutions) is shared with our network and costs the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenfold.superres.maps import convolve, from_windows, pad_by_reflection, to_windows
from tenfold.superres.model import HierarchicalLayer, HiT, PositionBias, SpatialChannelCorrelation


class OfficialStyle(nn.Module):
    """A network with the weights of `model`, B x channels x H x W -> B x channels x sH x sW."""

    def __init__(self, model: HiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """As `HiT.forward`, whole maps at once."""
        model = self.model
        shallow = model.shallow_features((image - model.mean) * model.config.image_range)
        x = model.patch_norm(shallow)
        for block in model.blocks:
            features = x
            for layer in block.layers:
                features = self.layer(layer, features)
            x = x + convolve(block.conv, features)
        return model.reconstruct(convolve(model.conv_after_body, model.norm(x)) + shallow)

    def layer(self, layer: HierarchicalLayer, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        x = x + layer.norm1(self.correlation(layer.correlation, x))
        return x + layer.norm2(layer.mlp(x))

    def correlation(self, scc: SpatialChannelCorrelation, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        height, width = x.shape[1:3]
        padded = pad_by_reflection(x, scc.padding_multiple)
        qv = scc.features(padded)
        if scc.context is not None:
            qv = scc.context(qv)
        windows = to_windows(qv, scc.window)
        count, area, channels = windows.shape
        heads, half = scc.heads, channels // 2
        d = half // heads
        q, v = windows.view(count, area, 2, heads, d).permute(2, 0, 3, 1, 4)  # N x heads x L x d
        (cells_y, cells_x), (cell_y, cell_x) = scc.cells, scc.cell
        pixels = v.reshape(count, heads, cells_y, cell_y, cells_x, cell_x, d).permute(0, 1, 2, 4, 6, 3, 5)
        summary = scc.spatial_linear(pixels.reshape(count, heads, cells_y * cells_x, d, cell_y * cell_x))[..., 0]
        correlation_map = q @ summary.transpose(-2, -1) / d + position_bias(scc.position_bias, scc.cells)
        y_spatial = (correlation_map @ summary).transpose(1, 2).reshape(count, area, half)
        q, v = (part.transpose(1, 2).reshape(count, area, half) for part in (q, v))
        y_channel = (q.transpose(1, 2) @ v / area @ v.transpose(1, 2)).transpose(1, 2)
        y = scc.proj(torch.cat((y_spatial, y_channel), dim=-1))
        return from_windows(y, scc.window, padded.shape)[:, :height, :width]


def position_bias(bias: PositionBias, cells: tuple[int, int]) -> Tensor:
    """Bias of each pixel and cell, heads x L x M: a table of all offsets, gathered for all pixel pairs, averaged."""
    (height, width), (cell_y, cell_x) = bias.window, bias.cell
    table = bias.table()[0].flatten(1).t()  # offsets x heads
    pixels = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    offsets = (pixels[:, :, None] - pixels[:, None, :]).permute(1, 2, 0).contiguous()
    offsets[:, :, 0] += height - 1
    offsets[:, :, 1] += width - 1
    offsets[:, :, 0] *= 2 * width - 1
    pairs = table[offsets.sum(-1).flatten()]  # L L x heads
    pairs = pairs.view(height * width, cells[0], cell_y, cells[1], cell_x, -1).permute(5, 0, 1, 3, 2, 4)
    return pairs.reshape(pairs.shape[0], height * width, cells[0] * cells[1], -1).mean(-1)


def largest_difference(model: HiT, height: int, width: int) -> float:
    """Between our network and its official-style twin, on a random picture."""
    image = torch.rand(1, model.config.channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((model(image) - OfficialStyle(model)(image)).abs().max())
