"""Where the maps come from: ResNet-50 in its caffe form, and the small network of `masa-tiny`."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck


class ResNet50(nn.Module):
    """ResNet-50 whose bottlenecks halve the map in their first convolution (the caffe form); C2 to C5.

    Names of parameters are torchvision's. BatchNorm always uses its stored statistics.
    """

    def __init__(self) -> None:
        super().__init__()
        network = resnet50()
        for stage in (network.layer2, network.layer3, network.layer4):
            first = stage[0]
            assert isinstance(first, Bottleneck)
            first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.relu, self.maxpool = network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1,
            network.layer2,
            network.layer3,
            network.layer4,
        )

    def train(self, mode: bool = True) -> ResNet50:
        """Training mode for all but BatchNorm."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """B x 3 x H x W to maps of 256, 512, 1024, 2048 channels at strides 4, 8, 16, 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class SmallBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al., 2016).

    Args:
        inputs: input channels.
        width: output channels.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or inputs != width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W to B x width x H/stride x W/stride."""
        hidden = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(hidden)) + self.shortcut(x)).relu()


class SmallResNet(nn.Module):
    """A stem at stride 4 and one residual block for each of the strides 8, 16, 32.

    Args:
        stem: channels at stride 4.
        widths: channels at strides 8, 16, 32.
    """

    def __init__(self, stem: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 4, stride=4, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(),
            SmallBlock(stem, stem, 1),
        )
        self.stages = nn.ModuleList(
            SmallBlock(inputs, width, 2) for inputs, width in zip((stem, *widths[:-1]), widths, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """B x 3 x H x W to B x stem x H/4 x W/4 and a map for each width at strides 8, 16, 32."""
        maps = [self.stem(image)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps
