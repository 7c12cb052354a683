"""Values of a space as names of runs, and moved into its ranges."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launch_space import DIGITS, loaded

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.launch.tune.space import Space


def test_names_are_of_the_last_part_of_the_key_with_four_digits(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"objective.nu_forward": tune.uniform(1, 3), "train.epochs": 5')
    assert space.text_of({"objective.nu_forward": 2.1034, "objective.gate": "soft"}) == "nu_forward-2.103-gate-soft"
    assert space.text_of({"objective.nu_forward": 2.0, "train.epochs": 5}) == "nu_forward-2"
    assert space.text_of({"objective.name": "dml", "train.seed": 12345}) == "objective-dml-seed-12345"
    assert space.text_of({"optimizer.weight_decay": 1.2346e-5, "optimizer.nesterov": True}) == (
        "weight_decay-1.235e-05-nesterov-true"
    )
    assert space.text_of({"schedule.milestones": [3, 4], "optimizer.clip_grad_norm": None}) == (
        "milestones-3-4-clip_grad_norm-none"
    )
    assert space.text_of({"models.teacher": "my_nets:tiny é", "data.augment.hue": -0.5}) == (
        "teacher-my_nets_tiny_-hue--0.5"
    )
    assert space.text_of({"objective.student_weight.end": 3.0}) == "student_weight.end-3"
    assert space.text_of({}) == ""


def test_names_are_cut_between_values(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"train.seed": tune.randint(0, 9)')
    values = {f"objective.value_{letter}": 1.234 for letter in "abcdefg"}
    text = space.text_of(values)
    assert text == "-".join(f"value_{letter}-1.234" for letter in "abcde")  # 5·13 + 4; a sixth would make 83
    assert space.text_of(values, max_len=13) == "value_a-1.234"
    assert space.text_of(values, max_len=12) == ""
    assert len(space.text_of(values, max_len=27)) == 27


VALUE = st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans(), st.none(), st.lists(st.integers()))


@settings(max_examples=150, deadline=None)
@given(values=st.lists(VALUE, min_size=1, max_size=5))
def test_names_fit_into_a_runs_name(values: list[Any]) -> None:
    space = Space("mine", {}, {}, "")
    text = space.text_of({f"objective.p{index}": value for index, value in enumerate(values)})
    assert len(text) <= 80
    assert re.fullmatch(r"[A-Za-z0-9_.+-]*", text)
    assert config.replace(DIGITS, {"run.name": f"0003-{text}"}).run.name == f"0003-{text}"


def test_values_are_moved_into_the_ranges_and_onto_their_steps() -> None:
    from ray import tune

    from bdkd_dist.launch.tune.space import Space

    domains = {
        "optimizer.lr": tune.loguniform(0.01, 0.1),
        "data.augment.rand_ops": tune.randint(0, 9),
        "data.augment.rand_magnitude": tune.qrandint(0, 30, 5),
        "optimizer.momentum": tune.quniform(0.5, 0.95, 0.05),
        "objective.gate": tune.choice(["hard", "soft"]),
    }
    space = Space("space", domains, {}, "")
    low = {"optimizer.lr": 0.001, "data.augment.rand_ops": -1, "data.augment.rand_magnitude": -4}
    high = {"optimizer.lr": 0.7, "data.augment.rand_ops": 11, "data.augment.rand_magnitude": 36}
    assert space.within(low) == {"optimizer.lr": 0.01, "data.augment.rand_ops": 0, "data.augment.rand_magnitude": 0}
    assert space.within(high) == {"optimizer.lr": 0.1, "data.augment.rand_ops": 8, "data.augment.rand_magnitude": 30}
    inside = {"data.augment.rand_magnitude": 12, "objective.gate": "soft", "optimizer.momentum": 0.83}
    moved = space.within(inside)
    assert moved["data.augment.rand_magnitude"] == 10
    assert moved["objective.gate"] == "soft"
    assert abs(moved["optimizer.momentum"] - 0.85) < 1e-12


def test_paths_of_a_space_are_those_of_the_folder_where_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = """
        "models.teacher_checkpoint": tune.choice(["runs/alone", "~/runs/alone", "/runs/alone", "s3://lab/alone", None]),
        "data.root": tune.grid_search(["v1", "s3://lab/v2"]),
        "data.prepared": "prepared",
        "data.order": tune.choice(["random", "quasi_random"]),
        "models.teacher": tune.choice(["resnet8", "resnet14"]),
        "objective.gate": "hard",
        "data.augment.crop": "pad",
        "optimizer.lr": tune.uniform(0.1, 1),
    """
    space = loaded(tmp_path, body)
    here, home = str(tmp_path), str(Path.home())
    alone = [f"{here}/runs/alone", f"{home}/runs/alone", "/runs/alone", "s3://lab/alone", None]
    assert space.space["models.teacher_checkpoint"].categories == alone
    assert space.space["data.root"] == {"grid_search": [f"{here}/v1", "s3://lab/v2"]}
    assert space.space["data.prepared"] == f"{here}/prepared"
    assert space.space["data.order"].categories == ["random", "quasi_random"]
    assert space.space["models.teacher"].categories == ["resnet8", "resnet14"]
    assert (space.space["objective.gate"], space.space["data.augment.crop"]) == ("hard", "pad")
    assert space.relative_paths == (
        ("models.teacher_checkpoint", "runs/alone"),
        ("models.teacher_checkpoint", "~/runs/alone"),
        ("data.root", "v1"),
        ("data.prepared", "prepared"),
    )
    assert space.text_of({"models.teacher_checkpoint": alone[0]}) == "teacher_checkpoint-alone"
    assert config.replace(DIGITS, space.draws(1, seed=0)[0]).data.prepared == f"{here}/prepared"


def test_an_empty_path_is_refused_as_the_user_wrote_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models\.teacher_checkpoint"):
        loaded(tmp_path, '"models.teacher_checkpoint": tune.choice(["", "runs/alone"])')
