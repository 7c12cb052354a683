"""What a method is called beside others."""

from collections.abc import Sequence

from bdkd_dist import config
from bdkd_dist.config import flatten
from bdkd_dist.records.comparison import method_labels


def labels(*overrides: Sequence[str]) -> list[str]:
    recipes = [flatten(config.load("digits", list(keys)).to_dict()) for keys in overrides]
    return method_labels(recipes)


def test_a_method_is_called_by_what_is_its_own() -> None:
    bdkd, dml = "objective.name=bdkd", "objective.name=dml"
    assert labels([bdkd], [dml]) == ["objective bdkd", "objective dml"]
    assert labels([bdkd, "optimizer.lr=0.05"], [dml, "optimizer.lr=0.1"]) == ["bdkd, lr 0.05", "dml, lr 0.1"]
    assert labels(["optimizer.lr=0.05"], ["optimizer.lr=0.012345678"]) == ["lr 0.05", "lr 0.01235"]
    several = ["models.students=[resnet8,resnet14]"]
    assert labels([], several) == ["student resnet8", "students [resnet8,resnet14]"]
    resize = "data.resize={start_px: 16, end_px: 32, to_epoch: 5, multiple_px: 8}"
    steps = "start_px 16, end_px 32, from_epoch 0, to_epoch 5, multiple_px 8"
    assert labels([], [resize]) == ["resize none", steps]
    assert labels([], ["optimizer.clip_grad_norm=2"]) == ["clip_grad_norm none", "clip_grad_norm 2"]


def test_parameters_are_told_among_the_methods_of_one_objective() -> None:
    found = labels(["objective.nu_reverse=2.5"], ["objective.nu_reverse=3"], ["objective.name=dml"])
    assert found == ["bdkd, nu_reverse 2.5", "bdkd, nu_reverse 3", "dml"]


def test_a_teacher_is_told_among_the_methods_of_one_objective() -> None:
    kd, by = ["objective.name=kd"], "models.teacher_checkpoint"
    assert labels([*kd, f"{by}=runs/ce-0"], ["objective.name=dml"]) == ["objective kd", "objective dml"]
    assert labels([*kd, f"{by}=runs/ce-0"], [*kd, f"{by}=runs/long"]) == [
        "teacher_checkpoint ce-0",
        "teacher_checkpoint long",
    ]
