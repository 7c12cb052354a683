"""Networks by name: shapes, determinism, names."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from bdkd_dist import models
from bdkd_dist.errors import UserError
from bdkd_dist.models.registry import CIFAR

SMALL = ["resnet8", "resnet8x4", "wrn16_1", "wrn16_2", "vgg8", "vgg11", "mobilenetv2", "shufflev1", "shufflev2"]


def images(side: int = 32, samples: int = 4) -> torch.Tensor:
    return torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "torchvision:vgg13"])
def test_torchvisions_own_counts_hold_for_its_networks(name: str) -> None:
    published = get_model_weights(name.removeprefix("torchvision:")).DEFAULT.meta["num_params"]
    with torch.device("meta"):
        assert models.num_parameters(models.build(name, 1000)) == published


@pytest.mark.parametrize("name", CIFAR)
def test_logits_are_one_row_an_image(name: str) -> None:
    network = models.build(name, 10)
    network.eval()
    with torch.inference_mode():
        logits = network(images(samples=2))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "side"), [("cifar_resnet18", 64), ("cifar_resnet50", 64), ("wrn16_8", 64), ("resnet18", 224)]
)
def test_larger_networks_take_larger_images(name: str, side: int) -> None:
    network = models.build(name, 10).eval()
    with torch.inference_mode():
        assert network(images(side, samples=1)).shape == (1, 10)


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet50", "mobilenetv2", "shufflev1", "shufflev2"])
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, 10)
    nn.functional.cross_entropy(network(images(16)), torch.arange(4)).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", [*SMALL, "cifar_resnet18", "cifar_resnet50"])
def test_logits_under_bf16_autocast_are_close_to_the_full_ones(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, 10)
    network(images())  # running statistics that fit the images, as a trained network has
    network.eval()
    with torch.inference_mode():
        full = network(images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = network(images())
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", [8, 28, 64])
def test_other_image_sizes_work_too(name: str, side: int) -> None:
    network = models.build(name, 10)
    logits = network(images(side))  # training mode: batch normalisation must see more than one value a channel
    assert logits.shape == (4, 10)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "sides"),
    [("resnet8", (32, 32, 16, 8)), ("wrn16_1", (32, 32, 16, 8)), ("vgg8", (32, 16, 8, 4, 4))],
)
def test_feature_maps_shrink_as_in_the_published_networks(name: str, sides: tuple[int, ...]) -> None:
    network = models.build(name, 10).eval()
    stages = list(network.stages) if name == "vgg8" else [network.conv1, network.layer1, network.layer2, network.layer3]
    seen: list[int] = []
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.inference_mode():
        network(images())
    assert tuple(seen) == sides


def test_vgg_halves_large_images_a_fourth_time() -> None:
    network = models.build("vgg8", 10).eval()
    seen: list[int] = []
    network.stages[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    with torch.inference_mode():
        network(images(64))
    assert seen == [4]


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_the_seed_alone_decides_the_initial_weights(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(models.build(name, 10).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", [*(name for name in SMALL if "shuffle" not in name), "cifar_resnet18"])
def test_convolutions_start_with_the_variance_of_their_fan_out(name: str) -> None:
    torch.manual_seed(0)
    convolutions = [m for m in models.build(name, 10).modules() if isinstance(m, nn.Conv2d)]
    for layer in convolutions:
        expected = (2 / (layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1])) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=6 / layer.weight.numel() ** 0.5)


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_is_deterministic_and_independent_of_the_batch(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, 10)
    with torch.inference_mode():
        training = network(images())
        network.eval()
        first, again, alone = network(images()), network(images()), network(images()[:1])
    assert torch.equal(first, again)
    torch.testing.assert_close(first[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, training)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_memory_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    network = models.build(name, 10).eval()
    with torch.inference_mode():
        expected = network(images())
        network.to(memory_format=torch.channels_last)
        found = network(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_one_tensor_and_no_warning(name: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        network = models.build(name, 7).train()
        logits = network(torch.empty(2, 3, 299, 299))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models.names() if name not in CIFAR and "regnet" not in name])
def test_every_torchvision_name_gives_one_row_of_logits_an_image_in_training(name: str) -> None:
    with torch.device("meta"):  # shapes alone; regnet computes its own shape with tensors and cannot
        side = 299 if name == "inception_v3" else 224
        assert models.build(name, 7).train()(torch.empty(2, 3, side, side)).shape == (2, 7)


def test_the_smallest_regnet_builds_and_runs() -> None:
    assert models.build("regnet_y_400mf", 7)(images(64)).shape == (4, 7)


def test_names_are_unique_and_shadowed_ones_carry_the_prefix() -> None:
    names = models.names()
    assert len(set(names)) == len(names)
    for name in ("resnet20", "wrn40_2", "vgg13", "resnet18", "resnet34", "mobilenet_v3_small"):
        assert name in names
    prefixed = {name for name in names if ":" in name}
    assert prefixed == {f"torchvision:vgg{depth}" for depth in (11, 13, 16, 19)}
    assert not [name for name in names if "fasterrcnn" in name or "deeplab" in name or "raft" in name]


def test_a_bare_vgg_is_ours_and_the_prefix_gives_torchvisions() -> None:
    with torch.device("meta"):
        assert type(models.build("vgg11", 10)).__module__ == "bdkd_dist.models.vgg"
        assert type(models.build("torchvision:vgg11", 10)).__module__ == "torchvision.models.vgg"
        assert type(models.build("torchvision:resnet18", 10)).__module__ == "torchvision.models.resnet"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt20", "resnet20"),
        ("resnet32_x4", "resnet32x4"),
        ("wrn_40_2", "wrn40_2"),
        ("mobilenetv3", "mobilenetv2"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflev1"),
        ("cifar_resnet_50", "cifar_resnet50"),
        ("torchvision:vgg8", "torchvision:vgg"),
        ("fasterrcnn_resnet50_fpn", None),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest_spelling(name: str, nearest: str | None) -> None:
    with pytest.raises(UserError) as caught:
        models.build(name, 10)
    line = str(caught.value)
    assert "\n" not in line
    assert f"unknown network '{name}'" in line
    assert "resnet20" in line
    if nearest:
        assert f"did you mean '{nearest}" in line


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(num_classes: int) -> None:
    for name in ("resnet20", "resnet18"):
        with pytest.raises(UserError, match=f"num_classes={num_classes} is not allowed"):
            models.build(name, num_classes)


def test_torchvision_is_not_imported_for_our_own_networks() -> None:
    script = (
        "import sys; from bdkd_dist import models; models.build('resnet8', 10);"
        "sys.exit(any(name.startswith('torchvision') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
