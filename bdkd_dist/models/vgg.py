"""VGG networks for CIFAR, as the public distillation benchmarks have them (CRD's RepDistiller, mdistiller).

Simonyan and Zisserman 2015 (arXiv 1409.1556) with batch normalisation, one linear layer in place of three, and global
average pooling in place of the last max pooling. ``vgg8`` has one convolution a stage.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bdkd_dist.models.blocks import init_convolutions

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG network for small images.

    Args:
        depths: Convolutions of each of the five stages.
        num_classes: K.
    """

    def __init__(self, depths: tuple[int, ...], num_classes: int):
        super().__init__()
        self.stages = nn.ModuleList(map(_stage, depths, (3, *CHANNELS), CHANNELS))
        self.fc = nn.Linear(CHANNELS[-1], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, K) logits; images of 64 pixels and more are halved a fourth time."""
        halvings = 4 if x.shape[-2] >= 64 else 3
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < halvings:
                x = F.max_pool2d(x, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(depth: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [
            nn.Conv2d(channels if index else in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
