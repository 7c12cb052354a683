"""ImageNet's residual networks on CIFAR, as the public distillation benchmarks have them (RepDistiller, mdistiller).

He et al. 2016 (arXiv 1512.03385), table 1, with a 3×3 stem that keeps the image's size in place of the strided 7×7 and
its max pooling. A bottleneck is strided at its 3×3 convolution.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import BasicBlock, init_convolutions, shortcut, stage


class Bottleneck(nn.Module):
    """A 3×3 convolution of a quarter of the channels between two 1×1 ones, beside a shortcut as in ``BasicBlock``."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        hidden = channels // 4
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ImageNetResNet(nn.Module):
    """A residual network of four stages for small images.

    Args:
        block: Builds a block of (channels in, channels out, stride).
        width: Channels of the first stage; they double with each further stage.
        depths: Blocks of each stage.
        num_classes: K.
    """

    def __init__(
        self, block: Callable[[int, int, int], nn.Module], width: int, depths: tuple[int, ...], num_classes: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        self.stages = nn.Sequential()
        for index, depth in enumerate(depths):
            out = width * 2**index
            self.stages.append(stage(block, depth, channels, out, stride=1 if index == 0 else 2))
            channels = out
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "cifar_resnet18": partial(ImageNetResNet, BasicBlock, 64, (2, 2, 2, 2)),
    "cifar_resnet34": partial(ImageNetResNet, BasicBlock, 64, (3, 4, 6, 3)),
    "cifar_resnet50": partial(ImageNetResNet, Bottleneck, 256, (3, 4, 6, 3)),
}
