"""What several of the CIFAR families are built from."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a :func:`shortcut`."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


def conv_bn(in_channels: int, channels: int, side: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a side×side convolution that keeps the image's size but for its stride, and its batch norm."""
    return [
        nn.Conv2d(in_channels, channels, side, stride, padding=side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Return the identity, or a strided 1×1 convolution with batch norm where a block changes the shape."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(*conv_bn(in_channels, channels, 1, stride))


def stage(
    block: Callable[[int, int, int], nn.Module], depth: int, in_channels: int, channels: int, stride: int
) -> nn.Sequential:
    """Return ``depth`` blocks of (channels in, channels out, stride); the first alone changes channels and size."""
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(depth - 1)))


def init_convolutions(network: nn.Module) -> None:
    """Draw the weights of convolutions for ReLU from their fan-out (He et al. 2015, arXiv 1502.01852); biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
