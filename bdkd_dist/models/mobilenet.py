"""MobileNetV2 for CIFAR, as the public distillation benchmarks have it (CRD's RepDistiller, mdistiller).

Sandler et al. 2018 (arXiv 1801.04381) at half width, their ``mobile_half``. Against the paper's table 2: the stage of
24 channels is not strided, so that images are halved four times in all, the first block expands too (to as many
channels as it has), ReLU stands in place of ReLU6, and there is no dropout.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import conv_bn, init_convolutions, stage

# Expansion, channels at full width, blocks and the first block's stride of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """A 1×1 expansion, a 3×3 convolution of each channel alone and a linear 1×1 projection, beside the input."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.body = nn.Sequential(
            *conv_bn(in_channels, hidden, 1),
            nn.ReLU(),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(),
            *conv_bn(hidden, channels, 1),
        )
        self.keeps_shape = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride), the input added where shapes agree."""
        return x + self.body(x) if self.keeps_shape else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images.

    Args:
        width: Factor of all channels but the last layer's 1280.
        num_classes: K.
    """

    def __init__(self, width: float, num_classes: int):
        super().__init__()
        channels = int(32 * width)
        self.stem = nn.Sequential(*conv_bn(3, channels, 3, stride=2), nn.ReLU())
        self.stages = nn.Sequential()
        for expansion, full, depth, stride in STAGES:
            out = int(full * width)
            block = partial(InvertedResidual, expansion=expansion)
            self.stages.append(stage(block, depth, channels, out, stride))
            channels = out
        self.head = nn.Sequential(*conv_bn(channels, 1280, 1), nn.ReLU())
        self.fc = nn.Linear(1280, num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        x = self.head(self.stages(self.stem(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {"mobilenetv2": partial(MobileNetV2, 0.5)}
