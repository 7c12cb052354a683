"""ShuffleNets for CIFAR, as the public distillation benchmarks have them (CRD's RepDistiller, mdistiller).

V1: Zhang et al. 2018 (arXiv 1707.01083) with three groups; V2: Ma et al. 2018 (arXiv 1807.11164) at width 1. Against
the papers: the stem is a 1×1 convolution that keeps the image's size, no max pooling follows it, and V1 has a ReLU
after the depthwise convolution too. Weights begin as torch's own initialisation has them.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import conv_bn, stage

STEM = 24
DEPTHS = (4, 8, 4)
V1_GROUPS = 3
V1_CHANNELS = (240, 480, 960)
V2_CHANNELS = (116, 232, 464)
V2_HEAD = 1024


class GroupedBlock(nn.Module):
    """V1's block: a grouped 1×1 convolution, shuffle, a depthwise 3×3 and another grouped 1×1, beside a shortcut.

    Where the block is strided the shortcut is the input's 3×3 average, joined as further channels; otherwise the input
    is added.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        own = channels - in_channels if stride == 2 else channels
        hidden = own // 4
        groups = 1 if in_channels == STEM else V1_GROUPS  # the stem has too few channels to group
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()  # one group would only be copied
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, own, 1, groups=V1_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(out + x)


class SplitBlock(nn.Module):
    """V2's block: half the channels pass through three convolutions, the others stand aside; both are shuffled.

    Where the block is strided both halves see the whole input, and the one aside is convolved too.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        half = channels // 2
        seen = in_channels if stride == 2 else half
        self.aside: nn.Module = nn.Identity()
        if stride == 2:
            self.aside = nn.Sequential(*_depthwise(seen, stride), *_pointwise(seen, half))
        self.body = nn.Sequential(*_pointwise(seen, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        aside, seen = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return F.channel_shuffle(torch.cat([self.aside(aside), self.body(seen)], dim=1), 2)


class ShuffleNetV1(nn.Module):
    """ShuffleNet with three groups for small images; K is ``num_classes``."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(3, STEM))
        self.stages = _stages(GroupedBlock, V1_CHANNELS)
        self.fc = nn.Linear(V1_CHANNELS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        return self.fc(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of width 1 for small images; K is ``num_classes``."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(3, STEM))
        self.stages = _stages(SplitBlock, V2_CHANNELS)
        self.head = nn.Sequential(*_pointwise(V2_CHANNELS[-1], V2_HEAD))
        self.fc = nn.Linear(V2_HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        return self.fc(F.adaptive_avg_pool2d(self.head(self.stages(self.stem(x))), 1).flatten(1))


def _stages(block: Callable[[int, int, int], nn.Module], channels: tuple[int, ...]) -> nn.Sequential:
    pairs = pairwise((STEM, *channels))
    return nn.Sequential(*(stage(block, depth, *pair, stride=2) for depth, pair in zip(DEPTHS, pairs, strict=True)))


def _pointwise(in_channels: int, channels: int) -> list[nn.Module]:
    return [*conv_bn(in_channels, channels, 1), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return conv_bn(channels, channels, 3, stride, groups=channels)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {"shufflev1": ShuffleNetV1, "shufflev2": ShuffleNetV2}
