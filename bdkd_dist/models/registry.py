"""Networks by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bdkd_dist.errors import UserError, nearest
from bdkd_dist.models import cifar_resnet, vgg, wrn

CIFAR: dict[str, Callable[[int], nn.Module]] = {**cifar_resnet.BUILDERS, **wrn.BUILDERS, **vgg.BUILDERS}

PREFIX = "torchvision:"

# By default these two return a tuple while training, and warn that they initialise slowly.
_ONE_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def build(name: str, num_classes: int) -> nn.Module:
    """Return a freshly initialised network that maps (B, 3, H, W) floats to (B, ``num_classes``) logits.

    Args:
        name: One of :func:`names`. The CIFAR families (``resnet20``, ``resnet8x4``, ``wrn40_2``, ``vgg13``, …) come
            first; other names are torchvision's classifiers (``resnet18``, ``mobilenet_v3_small``, …), without
            pretrained weights. ``vgg11``, ``vgg13``, ``vgg16`` and ``vgg19`` are in both: the bare name is the CIFAR
            network, ``torchvision:vgg13`` torchvision's. The prefix is allowed for any name of torchvision.
        num_classes: K, at least 2.

    Raises:
        UserError: An unknown name, or fewer than two classes.
    """
    if num_classes < 2:
        raise UserError(f"num_classes={num_classes} is not allowed (allowed: 2 or more)")
    if name in CIFAR:
        return CIFAR[name](num_classes)
    bare = name.removeprefix(PREFIX)
    if bare in _torchvision_names():
        from torchvision.models import get_model

        options: dict[str, Any] = _ONE_OUTPUT.get(bare, {})
        return get_model(bare, weights=None, num_classes=num_classes, **options)
    raise UserError(
        f"unknown network '{name}'{nearest(name, names())} "
        f"(allowed: {', '.join(CIFAR)}, or a torchvision classifier such as resnet18)"
    )


def names() -> list[str]:
    """Return every name that :func:`build` knows: the CIFAR families, then torchvision's classifiers."""
    theirs = (PREFIX + name if name in CIFAR else name for name in _torchvision_names())
    return [*CIFAR, *theirs]


def num_parameters(module: nn.Module) -> int:
    """Return the number of a network's parameters (buffers such as running statistics are none)."""
    return sum(parameter.numel() for parameter in module.parameters())


def _torchvision_names() -> list[str]:
    from torchvision import models  # imported only for a name that is not ours

    return models.list_models(module=models)
