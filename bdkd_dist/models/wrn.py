"""Wide residual networks for CIFAR, as the public distillation benchmarks have them (CRD's RepDistiller, mdistiller).

Zagoruyko and Komodakis 2016 (arXiv 1605.07146), without dropout: pre-activation blocks, depth 6n + 4.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import init_convolutions, stage


class PreActivationBlock(nn.Module):
    """Two normalised 3×3 convolutions beside a shortcut.

    Where the channels change, the shortcut is a 1×1 convolution of the *activated* input, otherwise the input itself.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """A wide residual network for small images.

    Args:
        depth: 6n + 4 layers.
        widen: Channels of the stages are 16, 32 and 64 times this.
        num_classes: K.
    """

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        assert rest == 0, "depth is 6n + 4"
        width = 16 * widen
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = stage(PreActivationBlock, blocks, 16, width, stride=1)
        self.layer2 = stage(PreActivationBlock, blocks, width, 2 * width, stride=2)
        self.layer3 = stage(PreActivationBlock, blocks, 2 * width, 4 * width, stride=2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    f"wrn{depth}_{widen}": partial(WideResNet, depth, widen)
    for depth, widen in ((16, 1), (16, 2), (16, 8), (40, 1), (40, 2))
}
