"""HiT-SR: Hierarchical Transformer for Efficient Image Super-Resolution (Zhang et al., ECCV 2024; arXiv 2407.05878).

The file reads as the paper's method section. Feature maps are channels-last, `B x H x W x C`; a map and its tokens
(`B x HW x C`) are then the same memory, convolutions run on a permuted view, and layer norms act on the last axis.

Two exact rewritings make it fast; neither approximates anything:

- The spatial self-correlation has no softmax, so `(q v'^T / d + P) v' = q (v'^T v') / d + P v'`: a d x d product per
  window and head instead of an L x M one, and one matrix product per head for all windows together.
- The bias P of a cell is the mean of a table over the cell's pixels: average-pool the table once, then P is a window
  sliding over the pooled table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.superres.config import HiTConfig

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, official code


class HiT(nn.Module):
    """The whole network (paper fig. 2): shallow convolution, hierarchical blocks, reconstruction."""

    def __init__(self, config: HiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        mean = RGB_MEAN if config.channels == 3 else (0.0,) * config.channels
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(config.channels, width, 3, padding=1)
        self.patch_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            HierarchicalBlock(config, depth, heads) for depth, heads in zip(config.depths, config.heads, strict=True)
        )
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = residual_convolution(config)
        self.reconstruction = RECONSTRUCTIONS[config.reconstruction](config)

    def forward(self, image: Tensor) -> Tensor:
        """Upscale.

        Args:
            image: B x channels x H x W, float, in [0, 1]; any H, W >= 1.

        Returns:
            B x channels x sH x sW, not clamped.
        """
        shallow = self.shallow_features((image - self.mean) * self.config.image_range)
        features = self.patch_norm(shallow)
        for block in self.blocks:
            features = block(features)
        features = convolve(self.conv_after_body, self.norm(features)) + shallow
        return self.reconstruct(features)

    def shallow_features(self, centred: Tensor) -> Tensor:
        """B x channels x H x W, mean-free -> B x H x W x C."""
        return to_map(self.conv_first(centred))

    def reconstruct(self, features: Tensor) -> Tensor:
        """B x H x W x C -> B x channels x sH x sW."""
        return self.reconstruction(to_image(features)) / self.config.image_range + self.mean


class HierarchicalBlock(nn.Module):
    """Hierarchical transformer block: layers whose windows grow from 4 to 64 pixels, then a convolution (paper 3.2)."""

    def __init__(self, config: HiTConfig, depth: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HierarchicalLayer(config, heads, config.windows[index]) for index in range(depth))
        self.conv = residual_convolution(config)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        features = x
        for layer in self.layers:
            features = layer(features)
        return convolve(self.conv, features) + x


class HierarchicalLayer(nn.Module):
    """Spatial-channel correlation, then feed-forward; each normalised *after* the operator and added (paper 3.2)."""

    def __init__(self, config: HiTConfig, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.correlation = SpatialChannelCorrelation(config, heads, window)
        self.norm1 = nn.LayerNorm(config.width)
        hidden = int(config.width * config.mlp_ratio)
        self.mlp = (
            ConvFeedForward(config.width, hidden) if config.variant == "srf" else FeedForward(config.width, hidden)
        )
        self.norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        x = x + self.norm1(self.correlation(x))
        return x + self.norm2(self.mlp(x))


class SpatialChannelCorrelation(nn.Module):
    """Softmax-free correlations over space and over channels inside a window (SCC, paper 3.3).

    The first half of the features are queries q, the second half values v (c = C/2 channels each). A head has
    d = c / heads of them. Cost is linear in the window's area L.
    """

    def __init__(self, config: HiTConfig, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.cells = (min(window[0], config.base_window[0]), min(window[1], config.base_window[1]))
        self.cell = (window[0] // self.cells[0], window[1] // self.cells[1])
        self.padding_multiple = (2 * window[0], 2 * window[1]) if config.variant == "sng" else window
        self.features = DualFeatureExtraction(config.width)
        self.context = NGramContext(config.width, heads, window) if config.variant == "sng" else None
        self.spatial_linear = nn.Linear(self.cell[0] * self.cell[1], 1)
        self.position_bias = PositionBias(config.width // 4 // 4, heads, window, self.cell)
        self.proj = nn.Linear(config.width, config.width)
        # 1/d where two channels belong to the same head, else 0: the spatial correlation keeps heads apart.
        d = config.width // 2 // heads
        channel_head = torch.arange(config.width // 2) // d
        self.register_buffer("same_head", (channel_head[:, None] == channel_head).float() / d, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        height, width = x.shape[1:3]
        padded = pad_by_reflection(x, self.padding_multiple)
        qv = self.features(padded)
        if self.context is not None:
            qv = self.context(qv)
        y = self.correlate(to_windows(qv, self.window))
        return from_windows(y, self.window, padded.shape)[:, :height, :width]

    def correlate(self, windows: Tensor) -> Tensor:
        """Both correlations and the output projection.

        Args:
            windows: queries and values, N x L x C.

        Returns:
            N x L x C.
        """
        if torch.is_autocast_enabled(windows.device.type):
            # Sums over a window of 4096 pixels overflow in fp16: the black images of the official code's issue 1.
            with torch.autocast(windows.device.type, enabled=False):
                return self.correlate(windows.float())
        count, area, channels = windows.shape
        half = channels // 2
        q, v = windows[..., :half], windows[..., half:]
        summary = self.summarise(v)  # v', N x M x c

        # Spatial self-correlation (eq. 4): (q v'^T / d + P) v' of each head = q (v'^T v') / d + P v'.
        spatial = summary.transpose(1, 2) @ summary * self.same_head  # N x c x c
        by_head = summary.view(count, -1, self.heads, half // self.heads).permute(2, 0, 3, 1)  # heads x N x d x M
        positional = by_head.flatten(1, 2) @ self.position_bias()  # heads x N d x L
        positional = positional.view(self.heads, count, -1, area).transpose(0, 1).reshape(count, half, area)
        y_spatial = torch.baddbmm(positional, spatial, q.transpose(1, 2))  # N x c x L

        # Channel self-correlation (eq. 5): v (q^T v / L)^T.
        channel = q.transpose(1, 2) @ v / area  # N x c x c
        y_channel = channel @ v.transpose(1, 2)  # N x c x L

        y = torch.cat((y_spatial, y_channel), dim=1)
        return torch.baddbmm(self.proj.bias, y.transpose(1, 2), self.proj.weight.t().expand(count, -1, -1))

    def summarise(self, v: Tensor) -> Tensor:
        """S-Linear: one learned weighted sum over the pixels of each cell, N x L x c -> N x M x c."""
        (cells_y, cells_x), (cell_y, cell_x) = self.cells, self.cell
        weight = self.spatial_linear.weight.view(1, cell_y, 1, cell_x)
        rows = torch.eye(cells_y, dtype=v.dtype, device=v.device).view(cells_y, 1, cells_y, 1, 1, 1)
        columns = torch.eye(cells_x, dtype=v.dtype, device=v.device).view(cells_x, 1, 1, cells_x, 1)
        sums = (rows * columns * weight).view(cells_y * cells_x, -1)  # M x L, each row zero outside of its cell
        return sums @ v + self.spatial_linear.bias


class DualFeatureExtraction(nn.Module):
    """Queries and values as the product of a convolutional and a linear branch (DFE, paper 3.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // 5)
        self.spatial = nn.Conv2d(width // 5, width // 5, 3, padding=1)
        self.expand = nn.Linear(width // 5, width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        squeezed = F.leaky_relu(self.squeeze(x), 0.2)
        convolved = F.leaky_relu(convolve(self.spatial, squeezed), 0.2)
        return self.expand(convolved) * self.linear(x)


class PositionBias(nn.Module):
    """Relative position bias P from a small network on pixel offsets, averaged over the pixels of each cell."""

    def __init__(self, width: int, heads: int, window: tuple[int, int], cell: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.cell = cell
        self.pos_proj = nn.Linear(2, width)
        self.pos1 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos2 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.pos3 = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, heads))
        self._kept: tuple[tuple, Tensor] | None = None

    def forward(self) -> Tensor:
        """The bias, heads x M x L; outside of training it is computed once and kept until a weight changes."""
        device = self.pos_proj.weight.device.type
        if torch.is_autocast_enabled(device):  # offsets reach 63, and a kept bias must serve every precision
            with torch.autocast(device, enabled=False):
                return self.forward()
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.compute()
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.compute())
        return self._kept[1]

    def compute(self) -> Tensor:
        """P[i j, y x] = mean over a < cell_y, b < cell_x of T[y - (i cell_y + a), x - (j cell_x + b)]."""
        table = self.table()
        pooled = F.avg_pool2d(table, self.cell, stride=1)[0]  # heads x (2 window - cell)
        # A slide of `window` rows that starts at row i' * cell belongs to cell i = cells - 1 - i'.
        slides = pooled.unfold(1, self.window[0], self.cell[0]).unfold(2, self.window[1], self.cell[1])
        slides = slides.flip(1, 2)  # heads x cells_y x cells_x x window_y x window_x
        return slides.reshape(pooled.shape[0], -1, self.window[0] * self.window[1])

    def table(self) -> Tensor:
        """T for every offset query - key, in pixels: 1 x heads x (2 window_y - 1) x (2 window_x - 1)."""
        like = self.pos_proj.weight
        dy = torch.arange(1 - self.window[0], self.window[0], device=like.device, dtype=like.dtype)
        dx = torch.arange(1 - self.window[1], self.window[1], device=like.device, dtype=like.dtype)
        offsets = torch.stack(torch.meshgrid(dy, dx, indexing="ij"), dim=-1)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets)))).permute(2, 0, 1)[None]


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them (HiT-SIR, HiT-SNG)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class ConvFeedForward(nn.Module):
    """Feed-forward network with a residual 5x5 depthwise convolution inside (HiT-SRF, after SRFormer)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same."""
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden + F.gelu(convolve(self.depthwise, hidden)))


class NGramContext(nn.Module):
    """Bigram context of neighbouring windows, added to queries and values (HiT-SNG, after NGramSwin).

    Each window is summed up as one uni-gram vector of C/2 channels; every 2x2 neighbourhood of windows attends within
    itself, once looking forward (right, below) and once backward; both are merged and added to all pixels of the
    window.
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window
        self.unigram = nn.Conv2d(2, 1, window, stride=window)
        self.attention = NeighbourhoodAttention(width // 2, heads)
        self.merge = nn.Linear(width, width)

    def forward(self, qv: Tensor) -> Tensor:
        """B x H' x W' x C -> the same; H' and W' hold at least two windows."""
        batch, height, width, channels = qv.shape
        pairs = qv.permute(0, 3, 1, 2).reshape(batch * channels // 2, 2, height, width)  # channels (2k, 2k + 1)
        unigram = self.unigram(pairs).view(batch, channels // 2, height // self.window[0], width // self.window[1])
        forward = self.attention(F.pad(unigram, (0, 1, 0, 1), mode="reflect"))
        backward = self.attention(F.pad(unigram, (1, 0, 1, 0), mode="reflect"))
        context = self.merge(torch.cat((forward, backward), dim=-1))  # B x rows x columns x C
        rows, columns = context.shape[1:3]
        windows = qv.view(batch, rows, self.window[0], columns, self.window[1], channels)
        return (windows + context[:, :, None, :, None]).view_as(qv)


class NeighbourhoodAttention(nn.Module):
    """Multi-head self-attention inside every 2x2 neighbourhood of a map, averaged over its four members."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("relative_position_index", relative_position_index(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """B x c x (R + 1) x (K + 1) -> B x R x K x c."""
        batch, width = x.shape[:2]
        neighbours = x.unfold(2, 2, 1).unfold(3, 2, 1)  # B x c x R x K x 2 x 2
        rows, columns = neighbours.shape[2:4]
        tokens = neighbours.permute(0, 2, 3, 4, 5, 1).reshape(-1, 4, width)
        q, k, v = self.qkv(tokens).view(-1, 4, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # heads x 4 x 4
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(q.shape[0], -1, -1, -1))
        attended = attended.transpose(1, 2).reshape(-1, 4, width)
        # The projection is linear: the mean over the four members may come first.
        return self.proj(attended.mean(1)).view(batch, rows, columns, width)


def relative_position_index(side: int) -> Tensor:
    """Row of the bias table for each pair of a side x side neighbourhood, int64 (side^2 x side^2)."""
    coordinates = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    difference = coordinates[:, :, None] - coordinates[:, None, :] + side - 1
    return difference[0] * (2 * side - 1) + difference[1]


def residual_convolution(config: HiTConfig) -> nn.Module:
    """The convolution that closes a block or the body: one 3x3, or a bottleneck of three."""
    width = config.width
    if config.residual_convolution == "1conv":
        return nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(width, width // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width // 4, width // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width // 4, width, 3, padding=1),
    )


class DirectReconstruction(nn.Sequential):
    """One convolution and a pixel shuffle (all released models)."""

    def __init__(self, config: HiTConfig) -> None:
        super().__init__(
            nn.Conv2d(config.width, config.channels * config.scale**2, 3, padding=1), nn.PixelShuffle(config.scale)
        )


class PixelShuffleReconstruction(nn.Module):
    """Convolution and pixel shuffle by 2 again and again, or once by 3 (classical SR)."""

    def __init__(self, config: HiTConfig, features: int = 64) -> None:
        super().__init__()
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(config.width, features, 3, padding=1), nn.LeakyReLU(0.01))
        factors = [3] if config.scale == 3 else [2] * int(math.log2(config.scale))
        if math.prod(factors) != config.scale:
            raise ValueError(f"scale: {config.scale} is neither 3 nor a power of two, which `pixelshuffle` needs")
        stages: list[nn.Module] = []
        for factor in factors:
            stages += [nn.Conv2d(features, features * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        self.upsample = nn.Sequential(*stages)
        self.conv_last = nn.Conv2d(features, config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x channels x sH x sW."""
        return self.conv_last(self.upsample(self.conv_before_upsample(x)))


class NearestReconstruction(nn.Module):
    """Nearest-neighbour doubling twice, each followed by a convolution (real-world SR; x4 only)."""

    def __init__(self, config: HiTConfig, features: int = 64) -> None:
        super().__init__()
        if config.scale != 4:
            raise ValueError(f"scale: {config.scale}, but `nearest+conv` is x4 only")
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(config.width, features, 3, padding=1), nn.LeakyReLU(0.01))
        self.conv_up1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv_up2 = nn.Conv2d(features, features, 3, padding=1)
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x channels x 4H x 4W."""
        x = self.conv_before_upsample(x)
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


RECONSTRUCTIONS = {
    "pixelshuffledirect": DirectReconstruction,
    "pixelshuffle": PixelShuffleReconstruction,
    "nearest+conv": NearestReconstruction,
}


def to_image(features: Tensor) -> Tensor:
    """B x H x W x C map -> B x C x H x W view of the same memory."""
    return features.permute(0, 3, 1, 2)


def to_map(image: Tensor) -> Tensor:
    """B x C x H x W -> contiguous B x H x W x C."""
    return image.permute(0, 2, 3, 1).contiguous()


def convolve(convolution: nn.Module, features: Tensor) -> Tensor:
    """Apply a convolution to a B x H x W x C map."""
    return to_map(convolution(to_image(features)))


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a B x H' x W' x C map into its N windows of L tokens, N x L x C."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def from_windows(windows: Tensor, window: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Put N x L x C windows together into a map of shape B x H' x W' x C."""
    batch, height, width, channels = shape
    x = windows.view(batch, height // window[0], width // window[1], window[0], window[1], channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def pad_by_reflection(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Pad a B x H x W x C map at the bottom and right to multiples, reflecting without repeating the edge.

    Where the padding is longer than the map, it bounces back and forth, which the official code cannot do.
    """
    for axis, factor in zip((1, 2), multiple, strict=True):
        size = x.shape[axis]
        extra = -size % factor
        if extra:
            x = torch.cat((x, x.index_select(axis, reflected_indices(size, extra, x.device))), dim=axis)
    return x


def reflected_indices(size: int, extra: int, device: torch.device) -> Tensor:
    """Source indices of the `extra` positions after the end: a triangle wave of period 2 (size - 1), int64."""
    if size == 1:
        return torch.zeros(extra, dtype=torch.long, device=device)
    position = torch.arange(size, size + extra, device=device) % (2 * (size - 1))
    return torch.minimum(position, 2 * (size - 1) - position)


def initialise(model: HiT) -> None:
    """The published initialisation: linear layers truncated normal 0.02, bias 0; convolutions as PyTorch has them."""
    pointwise_convolutions = {  # 1x1 convolutions of the official code, kept as linear layers here
        module
        for parent in model.modules()
        for module in (
            (parent.squeeze, parent.expand, parent.linear)
            if isinstance(parent, DualFeatureExtraction)
            else (parent.merge,)
            if isinstance(parent, NGramContext)
            else ()
        )
    }
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in pointwise_convolutions:
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, NeighbourhoodAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
