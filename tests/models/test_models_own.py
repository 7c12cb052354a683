"""A user's own network by ``module:function``, and what a network's output must be."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdkd_dist import models
from bdkd_dist.errors import UserError

NETS = """
from torch import nn

WIDTH = 8

def tiny(num_classes):
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))

class Linear(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))

def forgets(num_classes):
    tiny(num_classes)

def fails(num_classes):
    raise RuntimeError(f"cannot make {num_classes}\\nsecond line")

def leaves(num_classes):
    raise SystemExit(3)

def _hidden(num_classes):
    return tiny(num_classes)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current working directory with my_nets.py; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_nets.py").write_text(NETS)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(name: str, num_classes: int = 5) -> str:
    with pytest.raises(UserError) as caught:
        models.build(name, num_classes)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("function", ["tiny", "Linear", "_hidden"])
def test_a_function_or_class_beside_the_recipe_builds_the_network(folder: Path, function: str) -> None:
    network = models.build(f"my_nets:{function}", 5)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


def test_a_package_in_the_folder_works_as_in_a_script(folder: Path) -> None:
    (folder / "zoo").mkdir()
    (folder / "zoo" / "small.py").write_text("from my_nets import tiny\n")
    assert models.num_parameters(models.build("zoo.small:tiny", 4)) == 3 * 8 * 9 + 8 + 8 * 4 + 4


def test_the_folder_comes_before_installed_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "colorsys.py").write_text("from my_nets import tiny\n")  # a standard module that nothing here imports
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert isinstance(models.build("colorsys:tiny", 5), nn.Module)


def test_an_installed_module_works_too(folder: Path) -> None:
    assert isinstance(models.build("torch.nn:LazyLinear", 3), nn.LazyLinear)


def test_the_networks_seed_is_torchs(folder: Path) -> None:
    torch.manual_seed(1)
    first = nn.utils.parameters_to_vector(models.build("my_nets:tiny", 5).parameters())
    torch.manual_seed(1)
    assert torch.equal(first, nn.utils.parameters_to_vector(models.build("my_nets:tiny", 5).parameters()))


@pytest.mark.parametrize("name", ["my_nets:", ":tiny", "my_nets.py:tiny:x", "./my_nets:tiny", "my-nets:tiny", "a:b c"])
def test_another_form_is_refused_with_the_right_one(folder: Path, name: str) -> None:
    assert refusal(name) == f"network '{name}' is not allowed (allowed: module:function, such as my_nets:tiny)"


def test_a_missing_module_is_one_line_with_the_nearest_file(folder: Path) -> None:
    line = refusal("my_net:tiny")
    assert line == f"network 'my_net:tiny': no module 'my_net' in {folder} or installed; did you mean 'my_nets'?"


@pytest.mark.parametrize(("name", "missing"), [("nowhere.nets:tiny", "nowhere"), ("my_nets.sub:tiny", "my_nets.sub")])
def test_a_missing_part_of_a_dotted_module_is_named(folder: Path, name: str, missing: str) -> None:
    assert f"no module '{missing}'" in refusal(name)


def test_a_misspelt_prefix_is_told_the_right_one(folder: Path) -> None:
    assert "did you mean 'torchvision'?" in refusal("torchvison:vgg13")


def test_torchvisions_prefix_keeps_its_meaning_beside_a_file_of_that_name(folder: Path) -> None:
    (folder / "torchvision.py").write_text(NETS)
    assert type(models.build("torchvision:vgg11", 3)).__module__ == "torchvision.models.vgg"
    assert "unknown network 'torchvision:tiny'" in refusal("torchvision:tiny")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("\nraise ValueError('no such\\nluck')\n", "ValueError: no such (broken.py:2)"),
        ("def tiny(:\n", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import torch\nimport no_such_package\n", "No module named 'no_such_package' (broken.py:2)"),
        ("import sys\nsys.exit('usage: broken')\n", "SystemExit: usage: broken (broken.py:2)"),
    ],
)
def test_a_module_that_fails_while_importing_tells_its_first_line_and_place(
    folder: Path, source: str, told: str
) -> None:
    (folder / "broken.py").write_text(source)
    line = refusal("broken:tiny")
    assert line.startswith("network 'broken:tiny': importing broken fails: ")
    assert line.endswith(told)
    assert "broken" not in sys.modules


def test_a_missing_function_is_one_line_with_the_nearest_public_one(folder: Path) -> None:
    line = refusal("my_nets:tinny")
    assert line == (
        "unknown function of my_nets 'tinny'; did you mean 'tiny'? (allowed: Linear, fails, forgets, leaves, tiny)"
    )


def test_what_is_no_function_is_refused(folder: Path) -> None:
    assert refusal("my_nets:WIDTH") == "network 'my_nets:WIDTH' is of type int (allowed: a function of num_classes)"


def test_what_is_no_module_is_refused(folder: Path) -> None:
    assert (
        refusal("my_nets:forgets")
        == "network 'my_nets:forgets' returned a value of type NoneType (allowed: a torch.nn.Module)"
    )


def test_a_function_that_raises_tells_its_first_line_and_place(folder: Path) -> None:
    place = 1 + NETS.splitlines().index('    raise RuntimeError(f"cannot make {num_classes}\\nsecond line")')
    expected = f"network 'my_nets:fails' fails for num_classes=5: RuntimeError: cannot make 5 (my_nets.py:{place})"
    assert refusal("my_nets:fails") == expected
    assert "SystemExit: 3" in refusal("my_nets:leaves")


def test_fewer_than_two_classes_are_refused_before_the_function_is_called(folder: Path) -> None:
    assert "num_classes=1 is not allowed" in refusal("my_nets:fails", 1)


class Returns(nn.Module):
    """A network of one answer, which notes the mode that it was asked in."""

    def __init__(self, answer: object):
        super().__init__()
        self.answer = answer
        self.dropout = nn.Dropout()
        self.asked_in_training: bool | None = None

    def forward(self, x: Tensor) -> object:
        self.asked_in_training = self.training
        return self.answer


def test_one_row_of_logits_an_image_passes_and_the_mode_stays() -> None:
    network = Returns(torch.zeros(2, 5)).train()
    network.dropout.eval()
    models.check_output(network, 5, 32)
    assert network.asked_in_training is False
    assert network.training
    assert not network.dropout.training


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "resnet18"])
def test_the_projects_networks_pass(name: str) -> None:
    models.check_output(models.build(name, 7), 7, 32)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (torch.zeros(2, 4), "two images of 32×32 px give float32 (2, 4) (allowed: floats (2, 5))"),
        (torch.zeros(2, 5, 1, 1), "two images of 32×32 px give float32 (2, 5, 1, 1) (allowed: floats (2, 5))"),
        (torch.zeros(1, 5), "two images of 32×32 px give float32 (1, 5) (allowed: floats (2, 5))"),
        (torch.zeros(2, 5).long(), "two images of 32×32 px give int64 (2, 5) (allowed: floats (2, 5))"),
        (
            (torch.zeros(2, 5),),
            "two images of 32×32 px give a value of type tuple (allowed: a tensor of logits (2, 5))",
        ),
    ],
)
def test_any_other_output_is_refused(answer: object, told: str) -> None:
    with pytest.raises(UserError) as caught:
        models.check_output(Returns(answer), 5, 32)
    assert str(caught.value) == told


def test_a_network_that_does_not_take_the_images_is_refused_and_keeps_its_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).train()
    models.check_output(network, 5, 8)
    with pytest.raises(UserError, match=r"^images of 32×32 px fail in the network: RuntimeError: mat1 and mat2"):
        models.check_output(network, 5, 32)
    assert all(module.training for module in network.modules())
