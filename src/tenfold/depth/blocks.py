"""What both versions are built of: feed-forward and cross-attention blocks, resizing of maps, positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Norm, linear, GELU, linear."""

    def __init__(self, dim: int, expansion: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.reduce = nn.Linear(expansion * dim, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        """... x dim -> ... x out."""
        return self.reduce(F.gelu(self.expand(self.norm(x))))


class AttentionBlock(nn.Module):
    """Attention from x to a context (x itself without one), then a feed-forward layer, both residual.

    Args:
        dim: channels of x.
        heads: of attention.
        expansion: of the feed-forward layer.
        gain: whether each residual branch is scaled by channel.
        bias: of the attention's linear layers.
        within_pixel: attention among the heads of one token instead of among tokens. The released V1 computes this at
            strides 8 and 4: its Nystrom attention got tensors in which the heads stand where it looks for the sequence.
    """

    def __init__(
        self, dim: int, heads: int, expansion: int, gain: bool, bias: bool, within_pixel: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.within_pixel = heads, within_pixel
        self.norm_x = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.mlp = FeedForward(dim, expansion)
        self.gain_attention = nn.Parameter(torch.ones(dim)) if gain else None
        self.gain_mlp = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        position: Tensor | None = None,
        context_position: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: B x N x dim.
            context: B x M x dim; without one x itself, before its norm, with the context's own norm.
            position: added to queries after their projection, like q.
            context_position: added to keys after their projection, like k.
        """
        q = self.q(self.norm_x(x))
        k, v = self.kv(self.norm_context(x if context is None else context)).chunk(2, dim=-1)
        q = q if position is None else q + position
        k = k if context_position is None else k + context_position
        attended = self.out(self._attend(q, k, v))
        x = x + (attended if self.gain_attention is None else self.gain_attention * attended)
        moved = self.mlp(x)
        return x + (moved if self.gain_mlp is None else self.gain_mlp * moved)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if self.within_pixel:
            # 4 x 4 scores a pixel: written out, since a kernel call for a million tiny attentions costs more.
            scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / math.sqrt(q.shape[-1])
            return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2).flatten(-2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def to_tokens(image: Tensor) -> Tensor:
    """B x C x H x W -> B x HW x C."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """B x HW x C -> B x C x H x W, a view with channels last in memory."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def interpolate(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing; B x C x H x W. Nothing is computed where the size is right."""
    if tuple(image.shape[-2:]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def interpolate_rays(rays: Tensor, size: tuple[int, int]) -> Tensor:
    """Unit rays at another size, again of unit length; B x 3 x H x W."""
    rays = interpolate(rays, size)
    return rays / rays.norm(dim=1, keepdim=True).clamp_min(1e-4)


def sine_positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """DETR's sine embedding of a grid, normalised: channels x H x W, first half for rows, second half for columns."""
    half = channels // 2
    power = 2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half
    scale = 10_000.0**power

    def encode(count: int) -> Tensor:
        place = torch.arange(1, count + 1, device=device, dtype=torch.float32)
        angle = (place / (place[-1] + 1e-6) * 2 * math.pi)[:, None] / scale
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)

    rows, columns = encode(height).T[:, :, None], encode(width).T[:, None, :]
    return torch.cat([rows.expand(-1, -1, width), columns.expand(-1, height, -1)])


def ray_angles_embedding(rays: Tensor, height: int, width: int, channels: int) -> Tensor:
    """Sines of a ray's polar angle and azimuth, at frequencies from 1 to half of the larger side.

    Args:
        rays: B x 3 x h x w, resized to the grid here.
        height: of the grid.
        width: likewise.
        channels: half for each angle.

    Returns:
        B x HW x channels.
    """
    x, y, z = interpolate_rays(rays, (height, width)).flatten(2).unbind(1)
    polar = torch.acos(z.clamp(-1, 1))
    # A ray straight up or down has no azimuth; the release keeps |x| above this bound, and 0 counts as positive.
    azimuth = torch.atan2(y, torch.where(x < 0, -1.0, 1.0) * x.abs().clamp_min(1e-3))
    none = polar.new_zeros(())  # sizes as tensors, since they are symbols when the network is exported
    highest = (torch.maximum(none + height, none + width) / 2).floor()
    return torch.cat([fourier(angle, channels // 2, highest) for angle in (polar, azimuth)], dim=-1)


def fourier(values: Tensor, bands: int, highest: float | Tensor) -> Tensor:
    """sin(pi f x) for `bands` frequencies f, evenly spaced in the logarithm from 1 to `highest`: ... x bands."""
    share = torch.linspace(0.0, 1.0, bands, device=values.device, dtype=values.dtype)
    octaves = share * (values.new_zeros(()) + highest).log2()
    return (values.unsqueeze(-1) * (2.0**octaves * math.pi)).sin()


def spherical_harmonics(directions: Tensor, degree: int = 8) -> Tensor:
    """Real spherical harmonics Y(n, m), orthonormal on the sphere, with the Condon-Shortley sign.

    By the recurrences of the associated Legendre functions, divided by sin^m so that poles need no care.

    Args:
        directions: ... x 3, unit vectors.
        degree: the largest n.

    Returns:
        ... x (degree + 1)^2; Y(n, m) at n (n + 1) + m.
    """
    x, y, z = directions.unbind(-1)
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]  # sin^m cos(m phi), sin^m sin(m phi)
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        if m:
            cosine.append(x * cosine[-1] - y * sine[m - 1])
            sine.append(x * sine[-1] + y * cosine[m - 1])
        legendre[m, m] = torch.full_like(z, float((-1) ** m * math.prod(range(1, 2 * m, 2))))
        if m < degree:
            legendre[m + 1, m] = (2 * m + 1) * z * legendre[m, m]
        for n in range(m + 2, degree + 1):
            legendre[n, m] = ((2 * n - 1) * z * legendre[n - 1, m] - (n + m - 1) * legendre[n - 2, m]) / (n - m)
    out = []
    for n in range(degree + 1):
        for m in range(-n, n + 1):
            order = abs(m)
            size = (2 * n + 1) / (4 * math.pi) * math.factorial(n - order) / math.factorial(n + order)
            factor = math.sqrt(size if m == 0 else 2 * size)
            out.append(factor * legendre[n, order] * (sine if m < 0 else cosine)[order])
    return torch.stack(out, dim=-1)
