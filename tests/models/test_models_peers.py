"""The benchmark networks against torchvision's, changed to the same definition, and against torch's bare functions."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenetv2, resnet, shufflenetv2, vgg
from torchvision.ops import Conv2dNormActivation

from bdkd_dist import models


def scrambled(network: nn.Module) -> nn.Module:
    """Give every weight, and every normalisation its statistics, a value of its own; nothing stays at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(value * (0.9 + 0.2 * noise) if value.dim() > 1 else 0.5 + noise)
            if name.endswith("bias"):
                value.sub_(1)
    return network.eval()


def same_weights(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    """Copy the peer's state in the order of its layers, each tensor of the same shape."""
    state = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict({name: value for (name, _), value in state})
    return ours.eval()


def replace_relu6(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(module, name, nn.ReLU())
        replace_relu6(child)


def peer_resnet(name: str) -> nn.Module:
    network = getattr(resnet, name.removeprefix("cifar_"))(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def peer_mobilenet() -> nn.Module:
    setting = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network = mobilenetv2.MobileNetV2(10, width_mult=0.5, inverted_residual_setting=setting, round_nearest=4)
    first = network.features[1]
    first.conv = nn.Sequential(Conv2dNormActivation(16, 16, kernel_size=1), *first.conv)
    replace_relu6(network)
    return network


def peer_shufflenetv2() -> nn.Module:
    network = shufflenetv2.shufflenet_v2_x1_0(num_classes=10)
    network.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def peer_vgg(depths: tuple[int, ...], halvings: int) -> nn.Module:
    layers: list[str | int] = []
    for index, (depth, channels) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        layers += [channels] * depth + ["M"] * (index < halvings)
    features = vgg.make_layers(layers, batch_norm=True)  # type: ignore[arg-type]
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


PEERS = {
    "cifar_resnet18": lambda: peer_resnet("cifar_resnet18"),
    "cifar_resnet34": lambda: peer_resnet("cifar_resnet34"),
    "cifar_resnet50": lambda: peer_resnet("cifar_resnet50"),
    "mobilenetv2": peer_mobilenet,
    "shufflev2": peer_shufflenetv2,
    "vgg8": lambda: peer_vgg((1, 1, 1, 1, 1), halvings=3),
    "vgg13": lambda: peer_vgg((2, 2, 2, 2, 2), halvings=3),
}


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "side"), [*((name, 32) for name in PEERS), ("mobilenetv2", 64), ("shufflev2", 64)])
def test_logits_are_those_of_torchvisions_network_of_the_same_definition(name: str, side: int) -> None:
    theirs = scrambled(PEERS[name]())
    ours = same_weights(models.build(name, 10), theirs)
    with torch.inference_mode():
        expected, found = theirs(images(side)), ours(images(side))
    assert expected.std() > 1e-3 * expected.abs().max()  # the images differ in their logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def normalised(state: Iterator[Tensor], x: Tensor) -> Tensor:
    weight, bias, mean, variance, _ = (next(state) for _ in range(5))
    return F.batch_norm(x, mean, variance, weight, bias)


def shufflenetv1(state: Iterator[Tensor], x: Tensor) -> Tensor:
    """ShuffleNet, 3 groups, as Zhang et al. 2018 describe it (figure 2), channel by channel where they are shuffled."""
    x = F.relu(normalised(state, F.conv2d(x, next(state))))
    for channels, depth in ((240, 4), (480, 8), (960, 4)):
        for block in range(depth):
            stride = 2 if block == 0 else 1
            groups = 1 if x.shape[1] == 24 else 3
            out = F.relu(normalised(state, F.conv2d(x, next(state), groups=groups)))
            size = out.shape[1] // groups
            out = out[:, [group * size + index for index in range(size) for group in range(groups)]]
            out = F.conv2d(out, next(state), stride=stride, padding=1, groups=out.shape[1])
            out = normalised(state, F.conv2d(F.relu(normalised(state, out)), next(state), groups=3))
            if stride == 2:
                out = torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], dim=1)
            x = F.relu(out if stride == 2 else out + x)
            assert x.shape[1] == channels
    return F.linear(x.mean(dim=(2, 3)), next(state), next(state))


def wide_resnet(depth: int, widen: int, state: Iterator[Tensor], x: Tensor) -> Tensor:
    """A wide residual network of basic blocks as Zagoruyko and Komodakis 2016 describe it (table 1, figure 1a).

    As in their code, a block that changes the channels projects what its first normalisation and ReLU gave.
    """
    x = F.conv2d(x, next(state), padding=1)
    for channels, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
        for block in range((depth - 4) // 6):
            stride = first_stride if block == 0 else 1
            activated = F.relu(normalised(state, x))
            out = F.conv2d(activated, next(state), stride=stride, padding=1)
            out = F.conv2d(F.relu(normalised(state, out)), next(state), padding=1)
            x = out + (x if x.shape[1] == channels else F.conv2d(activated, next(state), stride=stride))
            assert x.shape[1] == channels
    return F.linear(F.relu(normalised(state, x)).mean(dim=(2, 3)), next(state), next(state))


WRITTEN_OUT = {
    "shufflev1": shufflenetv1,
    "wrn16_1": partial(wide_resnet, 16, 1),
    "wrn16_2": partial(wide_resnet, 16, 2),
    "wrn40_2": partial(wide_resnet, 40, 2),
}


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_logits_are_those_of_the_papers_network_written_out_in_bare_functions(name: str, side: int) -> None:
    ours = scrambled(models.build(name, 10))
    state = iter(ours.state_dict().values())
    with torch.inference_mode():
        expected, found = WRITTEN_OUT[name](state, images(side)), ours(images(side))
    assert next(state, None) is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("cifar_resnet18", [32, 32, 16, 8, 4]),
        ("cifar_resnet50", [32, 32, 16, 8, 4]),
        ("mobilenetv2", [16, 16, 16, 8, 4, 4, 2, 2]),
        ("shufflev1", [32, 16, 8, 4]),
        ("shufflev2", [32, 16, 8, 4]),
    ],
)
def test_feature_maps_shrink_stage_by_stage_as_in_the_benchmarks(name: str, sides: list[int]) -> None:
    seen: list[int] = []
    with torch.device("meta"):
        network = models.build(name, 10).eval()
        stem = network.conv1 if name.startswith("cifar_resnet") else network.stem
        for stage in (stem, *network.stages):
            stage.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
        network(torch.empty(1, 3, 32, 32))
    assert seen == sides


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        # The stem, two or three a block, and the projections: 3 (18, 34) or 4 (50) of them.
        ("cifar_resnet18", 1 + 2 * 8 + 3),
        ("cifar_resnet34", 1 + 2 * 16 + 3),
        ("cifar_resnet50", 1 + 3 * 16 + 4),
        ("mobilenetv2", 1 + 3 * 17 + 1),
        ("shufflev1", 1 + 3 * 16),
        ("shufflev2", 1 + 3 * 16 + 2 * 3 + 1),
    ],
)
def test_networks_have_as_many_convolutions_as_their_papers_tables(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        network = models.build(name, 10)
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == convolutions
    assert sum(isinstance(layer, nn.Linear) for layer in network.modules()) == 1
