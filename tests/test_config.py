"""Recipes and overrides: right ones load, wrong ones are one line that names key, value, allowed and nearest."""

from pathlib import Path

import pytest
import yaml

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.objectives import BDKD, DML, ParameterSchedule


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_shipped_recipe_loads_and_reads_back_equal(name: str) -> None:
    recipe = config.load(name)
    assert recipe.run.name == name
    assert config.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_recipes_of_the_pairs_are_all_there() -> None:
    pairs = {"r32x4_r8x4", "r56_r20", "r110_r32", "wrn40_2_wrn16_2", "vgg13_vgg8"}
    expected = {f"{data}_{pair}" for data in ("cifar10", "cifar100") for pair in pairs}
    assert set(config.recipe_names()) == expected | {"digits", "digits_few", "clothing_r34_r18", "imagenet_r34_r18"}


def test_a_base_that_leads_back_is_one_line(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text(f"base: {other}")
    other.write_text(f"base: {one}")
    with pytest.raises(UserError, match=r"other.yaml: base=.*one.yaml leads back"):
        config.load(str(one))


def test_workers_are_a_number_or_two_bounds() -> None:
    assert config.load("digits", ["launch.workers=[2,4]"]).launch.max_workers == 4
    assert config.load("digits", ["launch.workers=[2,4]"]).launch.min_workers == 2
    assert config.load("digits", ["launch.workers=[3,3]"]).launch.workers == 3
    for wrong in ("0", "[4,2]", "[0,2]", "two", "[1,2,3]", "1.5", "[1.0,2]"):
        with pytest.raises(UserError, match=r"launch.workers.*is not allowed; a number from 1, or \[min, max\]"):
            config.load("digits", [f"launch.workers={wrong}"])


def test_a_base_is_merged_below_its_recipe() -> None:
    recipe = config.load("cifar100_r56_r20")
    assert (recipe.models.teacher, recipe.models.student) == ("resnet56", "resnet20")
    assert (recipe.data.num_classes, recipe.data.augment.pad_px, recipe.train.epochs) == (100, 4, 240)
    assert recipe.schedule.milestones == (150, 180, 210)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.epochs=5", lambda r: r.train.epochs, 5),
        ("optimizer.lr=1e-3", lambda r: r.optimizer.lr, 1e-3),
        ("optimizer.nesterov=false", lambda r: r.optimizer.nesterov, False),
        ("optimizer.clip_grad_norm=none", lambda r: r.optimizer.clip_grad_norm, None),
        ("data.augment.crop=none", lambda r: r.data.augment.crop, "none"),  # a word of the key's own
        ("objective.teacher_term=none", lambda r: r.objective.teacher_term, "none"),
        ("schedule.milestones=[3,4]", lambda r: r.schedule.milestones, (3, 4)),
        ("run.name=007", lambda r: r.run.name, "007"),
        ("objective.nu_reverse=3", lambda r: r.objective.nu_reverse, 3.0),
        ("data.augment.flip=true", lambda r: r.data.augment.flip, True),
    ],
)
def test_overrides_are_parsed_by_the_keys_type(override: str, read, value: object) -> None:
    got = read(config.load("digits", [override]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("other", ["launch.workers=1", "launch.device=cpu"])
def test_a_part_of_a_gpu_is_for_workers_that_need_not_speak_to_each_other_there(other: str) -> None:
    config.load("digits", ["launch.workers=2", "launch.gpus_per_worker=0.5", other])


@pytest.mark.parametrize(
    ("overrides", "read", "schedule"),
    [
        (
            ["objective.student_weight={start: 0, end: 3, shape: sigmoid, until: 0.3}"],
            "student_weight",
            (0, 3, "sigmoid", 0.3),
        ),
        (
            ["objective.student_weight={start: 0, end: 3}", "objective.student_weight.until=0.5"],
            "student_weight",
            (0, 3, "linear", 0.5),
        ),
        (["objective.ce_weight.end=0.2"], "ce_weight", (1, 0.2, "linear", 1)),  # from the number that it was
        (["objective.ce_weight=0.5", "objective.ce_weight.end=0.2"], "ce_weight", (0.5, 0.2, "linear", 1)),
        (["objective.weight.start=0", "objective.name=kdcl"], "weight", (0, 1, "linear", 1)),
    ],
)
def test_any_number_of_an_objective_may_be_a_schedule(
    overrides: list[str], read: str, schedule: tuple[float, float, str, float]
) -> None:
    recipe = config.load("digits", overrides)
    start, end, shape, until = schedule
    assert getattr(recipe.objective, read) == ParameterSchedule(start=start, end=end, shape=shape, until=until)  # type: ignore[arg-type]
    assert config.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert getattr(config.override(recipe, [f"objective.{read}=2"]).objective, read) == 2


def test_a_recipe_changes_a_part_of_its_bases_schedule(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text(config.load("digits", ["objective.student_weight={start: 0, end: 3, shape: cosine}"]).to_yaml())
    mine.write_text(f"base: {base}\nobjective: {{student_weight: {{end: 5}}, teacher_weight: {{start: 0, end: 1}}}}")
    objective = config.load(str(mine)).objective
    assert objective.student_weight == ParameterSchedule(start=0, end=5, shape="cosine")
    assert objective.teacher_weight == ParameterSchedule(start=0, end=1)


def test_changing_the_objective_drops_the_former_ones_parameters(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(config.load("digits", ["objective.nu_reverse=3"]).to_yaml())
    assert config.load(str(path)).objective.nu_reverse == 3
    assert config.load(str(path), ["objective.name=dml"]).objective.name == "dml"
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {path}\nobjective: {{name: dml}}")
    assert config.load(str(other)).objective == DML()
    assert config.load(str(other), ["objective.name=bdkd"]).objective == BDKD()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=5"], ["train.epoch", "did you mean 'train.epochs'"]),
        (["trian.epochs=5"], ["trian", "did you mean 'train"]),
        (["epochs=5"], ["epochs", "train.epochs"]),
        (["train.epochs"], ["train.epochs", "key=value"]),
        (["train.epochs=many"], ["train.epochs=many", "integer"]),
        (["train.epochs=0"], ["train.epochs=0", "greater than or equal to 1"]),
        (["train.label_smoothing=1"], ["train.label_smoothing=1", "less than 1"]),
        (["train.label_smoothing=-0.1"], ["train.label_smoothing=-0.1", "greater than or equal to 0"]),
        (["train.precision=fp8"], ["train.precision=fp8", "'fp32', 'bf16' or 'fp16'"]),
        (["objective.name=bdkdd"], ["objective.name", "bdkdd", "did you mean 'bdkd'", "dml"]),
        (["objective.nu_revers=3"], ["objective.nu_revers", "did you mean 'objective.nu_reverse'"]),
        (["objective.nu_reverse=-1"], ["objective.nu_reverse=-1.0 is not allowed (allowed: finite, >= 0)"]),
        (["objective.name=dml", "objective.nu_reverse=2"], ["objective.nu_reverse"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
        (["launch.workers=33"], ["train.batch_size=64", "less than two images", "launch.workers=33"]),
        (
            ["launch.workers=2", "launch.gpus_per_worker=0.5"],
            ["launch.gpus_per_worker=0.5 with launch.workers=2", "NCCL"],
        ),
        (["data.cache=process"], ["data.cache=process needs data.order=quasi_random", "data.order=random"]),
        (["data.cache=process", "data.order=quasi_random", "data.loader=torch"], ["FFCV", "data.loader=torch"]),
        (["data.cache=ram"], ["data.cache=ram", "'os' or 'process'"]),
        (["data.stage=ssd"], ["data.stage=ssd", "'shared', 'local' or 'memory'"]),
        (["data.resize.start_px=16"], ["data.resize"]),
        (["data.resize={start_px: 16, end_px: 32, to_epoch: 0}"], ["data.resize"]),
        (["data.resize={start_px: 20, end_px: 32, to_epoch: 5}"], ["start_px=20", "multiple_px=32"]),
        (["data.resize={start_px: 32, end_px: 64, from_epoch: 5, to_epoch: 5}"], ["to_epoch=5", "from_epoch=5"]),
        (["data.resize={start_px: 32, end_px: 32, to_epoch: 99}"], ["data.resize.to_epoch=99", "train.epochs=30"]),
        (["data.augment.hue=0.7"], ["data.augment.hue=0.7", "0.5"]),
        (["schedule.kind=step"], ["schedule.milestones"]),
        (["schedule.kind=step", "schedule.milestones=[4,3]"], ["milestones must rise"]),
        (["optimizer.momentum=0"], ["nesterov"]),
        (["run.name=a/b"], ["run.name=a/b"]),
        (["train.epochs.x=1"], ["train.epochs"]),
        (["data=5"], ["data is a section", "e.g. data.dataset=5"]),
        (["objective=kd"], ["objective is a section", "objective.name=kd"]),
        (["objective.name=[kd]"], ["objective.name", "did you mean 'kd'"]),
        (["objective.name=kd"], ["objective.name=kd", "models.teacher_checkpoint"]),
        (["objective.name=switokd", "models.students=[resnet8,resnet14]"], ["switokd", "takes 1 student", "names 2"]),
        (["models.students=resnet8"], ["models.students=resnet8", "list", "[resnet8]"]),
        (["models.students=[resnet8"], ["models.students", "[resnet8,resnet20]"]),
        (["models.student=none"], ["a student is missing"]),
        (["train.compile=true", "train.gradient_shares=true"], ["train.gradient_shares", "train.compile"]),
        (
            ["objective.student_weight={start: 0, end: 1, shape: sigmod}"],
            ["objective.student_weight.shape=sigmod", "'linear', 'sigmoid' or 'cosine'", "did you mean 'sigmoid'"],
        ),
        (
            ["objective.student_weight={start: 0, end: 1, until: 0}"],
            ["objective.student_weight.until=0.0 is not allowed (allowed: finite, > 0, <= 1)"],
        ),
        (
            ["objective.temperature={start: 0, end: 1}"],
            ["objective.temperature.start=0.0 is not allowed (allowed: finite, > 0)"],
        ),
        (["objective.nu_forward.end=-1"], ["objective.nu_forward.end=-1.0 is not allowed (allowed: finite, >= 0)"]),
        (["objective.ce_weight.edn=0"], ["objective.ce_weight.edn", "did you mean 'objective.ce_weight.end'?"]),
        (["objective.ce_weight={start: 0}"], ["does not set objective.ce_weight.end"]),
        (["objective.ce_weight={start: 0"], ["objective.ce_weight", "not a section, e.g. {start: 0, end: 1}"]),
        (["objective.ce_weight.end.x=1"], ["unknown recipe key 'objective.ce_weight.end.x'"]),
        (["objective.gate={start: 0, end: 1}"], ["objective.gate", "'hard' or 'soft'"]),
        (["objective.gate.end=1"], ["objective.gate.end", "gate is no number that may change", "allowed: ce_weight"]),
        (["objective.ce_wieght.end=1"], ["ce_wieght is no number", "did you mean 'ce_weight'"]),
        (["objective.name=ce", "objective.ce_weight.end=1"], ["ce_weight is no number", "none of this objective"]),
        (["models.teacher_checkpoint="], ["models.teacher_checkpoint"]),
    ],
)
def test_a_wrong_override_is_one_line_with_key_value_and_what_is_allowed(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        config.load("digits", overrides)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: digits\nmodels: {students: [resnet8, resnet14]}", ["student and students are both set"]),
        ("- a list", ["holds no sections"]),
        ("a: [", ["is not YAML"]),
        ("run: 5", ["run"]),
        ("models: {teacher: resnet20}", ["does not set"]),
    ],
)
def test_a_broken_recipe_file_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(str(path))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar100_r56_r20'"):
        config.load("cifar100_r56_r21")
    with pytest.raises(UserError, match="does not exist"):
        config.load("nowhere/mine.yaml")


def test_differences_ignore_where_and_how_a_run_runs() -> None:
    recipe = config.load("digits")
    moved = config.load("digits", ["run.name=x", "launch.workers=2", "data.loader=torch", "data.root=/tmp"])
    assert list(config.differences(recipe, moved)) == []
    changed = config.load("digits", ["objective.nu_reverse=3"])
    assert list(config.differences(recipe, changed)) == [("objective.nu_reverse", 2.0, 3.0)]
    other = config.load("digits", ["objective.name=dml"])
    assert next(config.differences(recipe, other)) == ("objective.name", "bdkd", "dml")


def test_the_later_of_student_and_students_counts() -> None:
    several = config.load("digits", ["models.students=[resnet8,resnet14]"])
    assert several.models.by_role == {"teacher": "resnet20", "student_1": "resnet8", "student_2": "resnet14"}
    back = config.load("digits", ["models.students=[resnet8,resnet14]", "models.student=resnet14"])
    assert back.models.by_role == {"teacher": "resnet20", "student": "resnet14"}
    again = config.override(several, ["models.student=resnet14"])
    assert again.models.by_role == back.models.by_role
    assert config.from_dict(several.to_dict()) == several
