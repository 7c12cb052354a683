"""Residual networks for CIFAR, as the public distillation benchmarks have them (CRD's RepDistiller, mdistiller).

He et al. 2016 (arXiv 1512.03385), section 4.2, with projection shortcuts (option B): a 3×3 stem and three stages of
n basic blocks, depth 6n + 2. The ``x4`` networks are four times as wide, except for a stem of 32 channels.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import BasicBlock, init_convolutions, stage


class CifarResNet(nn.Module):
    """A residual network for small images.

    Args:
        depth: 6n + 2 layers.
        stem: Channels of the first convolution.
        width: Channels of the first stage; they double with each further stage.
        num_classes: K.
    """

    def __init__(self, depth: int, stem: int, width: int, num_classes: int):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        assert rest == 0, "depth is 6n + 2"
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = stage(BasicBlock, blocks, stem, width, stride=1)
        self.layer2 = stage(BasicBlock, blocks, width, 2 * width, stride=2)
        self.layer3 = stage(BasicBlock, blocks, 2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth, 16, 16) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, 32, 64) for depth in (8, 32)},
}
