"""Networks by name: the CIFAR families of the public distillation benchmarks, and torchvision's classifiers."""

from bdkd_dist.models.registry import build, names, num_parameters

__all__ = ["build", "names", "num_parameters"]
