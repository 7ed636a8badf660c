"""UniDepthV2 (Piccinelli et al., TPAMI 2026; arXiv 2502.20110): the whole network.

A vision transformer sees the image. A camera head guesses a pinhole camera from four class tokens. The rays of that
camera, or of one that is given, prompt the decoder, which predicts each pixel's distance along its ray and its error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.depth.blocks import AttentionBlock, FeedForward, ray_angles_embedding, to_image
from tenfold.depth.cameras import intrinsics_of, pinhole_rays
from tenfold.depth.config import PATCH, UniDepthV2Config
from tenfold.depth.encoders import ViT

LOG_RADIUS_SHIFT = 2.0
LOG_BOUND = 8.0
FINE_WIDTH = 32  # channels of the heads at full resolution


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image, at the size of the network's image.

    Attributes:
        log_radius: B x 1 x H x W, natural logarithm of the distance along the ray, metres.
        log_error: B x 1 x H x W, logarithm of the expected absolute error of depth in metres; None if not asked for.
        rays: B x 3 x H x W, unit: those that the decoder was told.
        intrinsics: B x 3 x 3, of the predicted pinhole camera.
        features: B x C x h x w, the finest map that the camera has conditioned.
    """

    log_radius: Tensor
    log_error: Tensor | None
    rays: Tensor
    intrinsics: Tensor
    features: Tensor

    @property
    def radius(self) -> Tensor:
        """B x 1 x H x W, metres along the ray."""
        return self.log_radius.exp()

    @property
    def error(self) -> Tensor | None:
        """B x 1 x H x W, metres; larger is worse. The release calls it confidence."""
        return None if self.log_error is None else self.log_error.exp()

    @property
    def points(self) -> Tensor:
        """B x 3 x H x W, metres."""
        return self.rays * self.radius


class UniDepthV2(nn.Module):
    """The network.

    Example:
        >>> from tenfold.depth.config import PRESETS
        >>> network = UniDepthV2(PRESETS["tenfold-depth-tiny"]).eval()
        >>> network(torch.zeros(1, 3, 70, 84)).log_radius.shape
        torch.Size([1, 1, 70, 84])
    """

    def __init__(self, config: UniDepthV2Config) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.encoder.dim, config.hidden
        self.encoder = ViT(config.encoder, "size")
        self.adapters = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(4))
        self.token_adapters = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(4))
        levels = nn.init.orthogonal_(torch.empty(4, hidden))[None, None]
        self.level_embeds = nn.Parameter(levels, requires_grad=False)  # stored, not used
        self.camera = CameraHead(config)
        self.prompts = nn.ModuleList(
            AttentionBlock(hidden, config.heads, config.expansion, gain=False, bias=False) for _ in range(4)
        )
        self.to_latents = nn.Linear(hidden, hidden)
        incoming = (hidden, *config.widths[:-1])
        self.laterals = nn.ModuleList(
            nn.ConvTranspose2d(hidden, width, 2**stage, 2**stage) for stage, width in enumerate(incoming)
        )
        self.ups = nn.ModuleList(
            UpStage(before, after, units, config.kernel)
            for before, after, units in zip(incoming, config.widths, config.units, strict=True)
        )
        self.depth_head = DenseHead(config.widths[-1])
        self.error_head = DenseHead(config.widths[-1])

    def forward(self, image: Tensor, rays: Tensor | None = None, error: bool = True) -> Prediction:
        """Predict.

        Args:
            image: B x 3 x H x W, normalised by ImageNet's mean and deviation; H and W multiples of 14.
            rays: B x 3 x H x W unit rays of the true camera; None prompts with the predicted one.
            error: whether the expected error is computed.
        """
        height, width = image.shape[-2:]
        grid = (height // PATCH, width // PATCH)
        chosen = self.encode(image)
        maps = [adapter(tokens[:, 1:]) for adapter, tokens in zip(self.adapters, chosen, strict=True)]
        intrinsics = self.look(chosen, height, width)
        if rays is None:
            rays = pinhole_rays(intrinsics, height, width)
        features, fine = self.decode(maps, rays.detach(), grid)
        heads = [self.depth_head, self.error_head] if error else [self.depth_head]
        raw = [each.clamp(-LOG_BOUND, LOG_BOUND) for each in run_heads(heads, fine, (height, width))]
        return Prediction(raw[0] + LOG_RADIUS_SHIFT, raw[1] if error else None, rays, intrinsics, features)

    def predict_intrinsics(self, image: Tensor) -> Tensor:
        """Only the camera, B x 3 x 3, which needs no decoder; `image` as in `forward`."""
        return self.look(self.encode(image), image.shape[-2], image.shape[-1])

    def encode(self, image: Tensor) -> list[Tensor]:
        """The normed outputs of the four chosen blocks, B x (1 + hw) x dim."""
        outputs = self.encoder(image)
        return [self.encoder.norm(outputs[end - 1]) for end in self.config.encoder.ends]

    def look(self, chosen: list[Tensor], height: int, width: int) -> Tensor:
        """The camera that the class tokens see, B x 3 x 3."""
        classes = [adapter(tokens[:, :1]) for adapter, tokens in zip(self.token_adapters, chosen, strict=True)]
        return self.camera(torch.cat(classes, dim=1), height, width)

    def decode(self, maps: list[Tensor], rays: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Adapted maps (B x hw x C) and rays -> the conditioned map B x C x h x w, and features at eight times h, w."""
        prompt = ray_angles_embedding(rays, *grid, self.config.hidden)
        conditioned = [block(x, context=prompt) for block, x in zip(self.prompts, maps, strict=True)]
        latents = features = to_image(self.to_latents(conditioned[0]), *grid)
        for lateral, up, tokens in zip(self.laterals, self.ups, conditioned[1:], strict=True):
            latents = up(latents + lateral(to_image(tokens, *grid)))
        return features, latents


class CameraHead(nn.Module):
    """Four class tokens -> a pinhole camera."""

    def __init__(self, config: UniDepthV2Config) -> None:
        super().__init__()
        hidden = config.hidden
        self.positions = nn.Parameter(torch.randn(1, 4, hidden) * 0.02)
        self.project = FeedForward(hidden, 1)
        self.blocks = nn.ModuleList(
            AttentionBlock(hidden, config.heads, config.expansion, gain=config.camera_gain, bias=False)
            for _ in range(2)
        )
        self.out = FeedForward(hidden, 1, 1)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """B x 4 x hidden and the image's size -> intrinsics B x 3 x 3."""
        x = self.project(tokens)
        for block in self.blocks:
            x = block(x, position=self.positions)
        raw = self.out(x)[..., 0]
        # As tensors, since sizes are symbols when the network is exported.
        diagonal = (raw.new_zeros(()) + (height * height + width * width)).sqrt()
        focal = 0.7 * diagonal * raw[:, :2].exp()
        centre = torch.stack([raw[:, 2].sigmoid() * width, raw[:, 3].sigmoid() * height], dim=1)
        return intrinsics_of(torch.cat([focal, centre], dim=1))


class ResidualUnit(nn.Module):
    """Twice leaky ReLU and convolution, gain, residual."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> the same."""
        moved = self.conv1(F.leaky_relu(x, 0.01))
        moved = self.conv2(F.leaky_relu(moved, 0.01, inplace=True))
        return x + self.gain * moved


class UpStage(nn.Module):
    """Residual units, then other channels at twice the size."""

    def __init__(self, before: int, after: int, units: int, kernel: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(ResidualUnit(before, kernel) for _ in range(units))
        self.project = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x C' x 2H x 2W."""
        for unit in self.units:
            x = unit(x)
        return F.interpolate(self.project(x), scale_factor=2, mode="bilinear", align_corners=False)


class DenseHead(nn.Module):
    """Features at 8/14 of the image's size -> one number a pixel at its full size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, dim)
        self.low = nn.Conv2d(dim, dim // 2, 3, padding=1, padding_mode="reflect")
        self.high = nn.Conv2d(dim // 2, FINE_WIDTH, 3, padding=1, padding_mode="reflect")
        self.out = nn.Conv2d(FINE_WIDTH, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """B x C x h x w -> B x 1 x H x W."""
        x = self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.finish(self.low(x), size)

    def finish(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """After the coarse convolution: B x C / 2 x h x w -> B x 1 x H x W."""
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        return self.out(F.leaky_relu(self.high(x), 0.01, inplace=True))

    def merged(self) -> tuple[Tensor, Tensor]:
        """Norm's gain, linear layer and coarse convolution as one convolution of normalised features.

        There is nothing between them, and a map that is linear in each pixel commutes with padding by reflection.
        """
        gained = self.linear.weight * self.norm.weight
        offset = self.linear.bias + self.linear.weight @ self.norm.bias
        weight = torch.einsum("omyx,mc->ocyx", self.low.weight, gained)
        assert self.low.bias is not None
        return weight, self.low.bias + self.low.weight.sum((2, 3)) @ offset


def run_heads(heads: list[DenseHead], x: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Each head's B x 1 x H x W. Without gradients they share one norm and one convolution."""
    if torch.is_grad_enabled():
        return [head(x, size) for head in heads]
    parts = [head.merged() for head in heads]
    weight, bias = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    normed = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2)
    coarse = F.conv2d(F.pad(normed, (1, 1, 1, 1), mode="reflect"), weight, bias)
    return [head.finish(part, size) for head, part in zip(heads, coarse.chunk(len(heads), dim=1), strict=True)]
