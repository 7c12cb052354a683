"""Search spaces read from files: what is refused before anything starts, and what is drawn."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.launch.tune.space import Space, load_space

DIGITS = config.load("digits")


def written(folder: Path, body: str, head: str = "", name: str = "mine.py") -> str:
    """Write a space file whose ``search_space`` returns the dict of that text; return its path."""
    path = folder / name
    path.write_text(
        f"import numpy as np\nfrom ray import tune\n{head}\n\ndef search_space():\n    return {{{body}}}\n",
        encoding="utf-8",
    )
    return str(path)


def loaded(folder: Path, body: str, head: str = "") -> Space:
    return load_space(written(folder, body, head), DIGITS)


ALL_DOMAINS = """
    "objective.nu_forward": tune.uniform(0.5, 4),
    "objective.nu_reverse": tune.quniform(0.5, 4, 0.5),
    "optimizer.lr": tune.loguniform(1e-3, 1),
    "optimizer.weight_decay": tune.qloguniform(1e-4, 1e-2, 1e-4),
    "train.batch_size": tune.qrandint(32, 128, 32),
    "data.augment.rand_ops": tune.randint(0, 9),
    "data.augment.pad_px": tune.lograndint(1, 8),
    "objective.gate": tune.choice(["hard", "soft"]),
    "schedule.milestones": tune.choice([[3, 4], [5]]),
    "train.ema_decay": None,
    "train.epochs": 5,
"""


def test_every_domain_is_read_and_drawn_within_its_bounds(tmp_path: Path) -> None:
    space = loaded(tmp_path, ALL_DOMAINS)
    assert space.name == "mine"
    assert space.text == (tmp_path / "mine.py").read_text()
    assert space.defaults == {}
    assert space.grid_size() is None
    assert not space.has_grid
    for values in space.draws(50, seed=0):
        assert 0.5 <= values["objective.nu_forward"] <= 4
        assert values["objective.nu_reverse"] in np.arange(0.5, 4.5, 0.5)
        assert 1e-3 <= values["optimizer.lr"] <= 1
        assert values["train.batch_size"] in (32, 64, 96, 128)
        assert values["data.augment.rand_ops"] in range(9)
        assert values["data.augment.pad_px"] in range(1, 8)
        assert values["objective.gate"] in ("hard", "soft")
        assert values["schedule.milestones"] in ([3, 4], [5])
        assert (values["train.ema_decay"], values["train.epochs"]) == (None, 5)


def test_the_parts_of_a_schedule_are_keys_of_their_own(tmp_path: Path) -> None:
    body = """
        "objective.name": tune.choice(["bdkd", "dml"]),
        "objective.student_weight.start": 0.0,
        "objective.student_weight.end": tune.loguniform(1, 10),
        "objective.student_weight.shape": tune.choice(["linear", "sigmoid"]),
        "objective.weight.until": tune.uniform(0.1, 1),
    """
    seen = set()
    for values in loaded(tmp_path, body).draws(20, seed=0):
        objective = config.replace(DIGITS, values).objective
        if objective.name == "bdkd":
            schedule, plain = objective.student_weight, objective.teacher_weight
            assert (schedule.start, schedule.end) == (0, values["objective.student_weight.end"])
            assert plain == 1
        else:
            assert (objective.weight.start, objective.weight.end) == (1, 1)
            assert objective.weight.until == values["objective.weight.until"]
        seen.add(objective.name)
    assert seen == {"bdkd", "dml"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('"objective.student_weight.end": tune.uniform(-1, 1)', ["objective.student_weight.end=-1.0 is not allowed"]),
        ('"objective.student_weight.until": tune.uniform(0.5, 1.5)', ["objective.student_weight.until=1.5"]),
        ('"objective.gate.end": tune.uniform(0, 1)', ["gate is no number that may change over training"]),
        (
            '"objective.student_weight": {"start": 0, "end": tune.uniform(0, 1)}',
            ["a domain inside a section is not allowed", "objective.student_weight.end"],
        ),
    ],
)
def test_a_schedule_out_of_bounds_is_one_line(tmp_path: Path, body: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, body)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_draws_are_a_function_of_the_seed(tmp_path: Path) -> None:
    space = loaded(tmp_path, ALL_DOMAINS)
    assert space.draws(8, seed=3) == space.draws(8, seed=3)
    assert space.draws(8, seed=3)[:5] == space.draws(5, seed=3)
    assert space.draws(8, seed=3) != space.draws(8, seed=4)


def test_draws_are_those_of_numpys_generator(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"optimizer.lr": tune.loguniform(1e-3, 1)')
    generator = np.random.default_rng(7)
    expected = [math.exp(generator.uniform(math.log(1e-3), math.log(1))) for _ in range(6)]
    assert [values["optimizer.lr"] for values in space.draws(6, seed=7)] == pytest.approx(expected, rel=1e-12)


def test_draws_leave_pythons_and_numpys_own_generators_alone(tmp_path: Path) -> None:
    space = loaded(tmp_path, ALL_DOMAINS)
    np.random.seed(5)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    space.draws(3, seed=0)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_drawn_values_are_plain_python(tmp_path: Path) -> None:
    body = """
        "optimizer.lr": tune.choice(np.logspace(-3, -1, 5)),
        "train.seed": tune.grid_search(np.arange(3)),
        "data.mean": np.array([0.5, 0.5, 0.5]),
        "train.batch_size": np.int64(32),
        "objective.nu_forward": tune.quniform(1, 3, 0.5),
        "train.epochs": tune.randint(np.int64(3), np.int64(9)),
    """

    def kinds(value: Any) -> set[type]:
        return set().union(*map(kinds, value)) if isinstance(value, list) else {type(value)}

    for values in loaded(tmp_path, body).draws(6, seed=0):
        assert kinds(list(values.values())) == {int, float}
        assert json.loads(json.dumps(values)) == values


def test_a_grid_is_all_its_combinations_once(tmp_path: Path) -> None:
    body = '"train.seed": tune.grid_search(range(3)), "objective.gate": tune.grid_search(["hard", "soft"])'
    space = loaded(tmp_path, body + ', "train.epochs": 4')
    assert space.grid_size() == 6
    drawn = [(values["train.seed"], values["objective.gate"]) for values in space.draws(100, seed=0)]
    assert len(drawn) == 6
    assert set(drawn) == set(itertools.product(range(3), ("hard", "soft")))
    assert all(values["train.epochs"] == 4 for values in space.draws(100, seed=0))
    assert space.draws(4, seed=0) == space.draws(100, seed=1)[:4]


def test_a_grid_counts_a_value_that_is_listed_twice_once(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"train.seed": tune.grid_search([0, 1, 0])')
    assert space.grid_size() == 2
    assert [values["train.seed"] for values in space.draws(9, seed=0)] == [0, 1]


def test_constants_alone_are_one_combination(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"train.seed": 4')
    assert space.grid_size() == 1
    assert space.draws(5, seed=0) == [{"train.seed": 4}]


def test_a_grid_with_domains_goes_round_with_a_new_draw_each_time(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"train.seed": tune.grid_search([0, 1]), "optimizer.lr": tune.uniform(0.1, 1)')
    assert space.grid_size() is None
    assert space.has_grid
    drawn = space.draws(5, seed=0)
    assert [values["train.seed"] for values in drawn] == [0, 1, 0, 1, 0]
    assert len({values["optimizer.lr"] for values in drawn}) == 5


def test_parameters_of_an_objective_come_only_with_the_objectives_that_have_them(tmp_path: Path) -> None:
    space = loaded(
        tmp_path,
        """
        "objective.nu_forward": tune.grid_search([1.0, 3.0]),
        "objective.name": tune.grid_search(["bdkd", "dml", "jeffreys"]),
        "objective.temperature": tune.grid_search([1.0, 2.0]),
        """,
    )
    drawn = space.draws(100, seed=0)
    # bdkd has both parameters, jeffreys a temperature, dml neither: 4 + 2 + 1.
    assert space.grid_size() == len(drawn) == 7
    by_name = {name: [v for v in drawn if v["objective.name"] == name] for name in ("bdkd", "jeffreys", "dml")}
    assert {name: len(values) for name, values in by_name.items()} == {"bdkd": 4, "jeffreys": 2, "dml": 1}
    assert by_name["dml"] == [{"objective.name": "dml"}]
    for values in drawn:
        assert config.replace(DIGITS, values).objective.name == values["objective.name"]


def test_other_searches_values_are_made_to_fit_too(tmp_path: Path) -> None:
    body = '"objective.name": tune.choice(["bdkd", "akl"]), "objective.nu_forward": tune.uniform(1, 3)'
    space = loaded(tmp_path, body)
    suggested = {"objective.nu_forward": 2.0, "objective.name": "akl", "train.seed": 1}
    assert space.fitting(suggested) == {"objective.name": "akl", "train.seed": 1}
    assert space.fitting(suggested | {"objective.name": "bdkd"}) == suggested | {"objective.name": "bdkd"}
    assert space.fitting({"objective.nu_forward": 2.0}) == {"objective.nu_forward": 2.0}


def test_keys_that_need_each_other_are_checked_together(tmp_path: Path) -> None:
    body = '"schedule.milestones": tune.choice([[3], [4, 5]]), "schedule.kind": tune.choice(["cosine", "step"])'
    loaded(tmp_path, body)
    with pytest.raises(UserError, match=r"schedule.kind=step needs schedule.milestones"):
        loaded(tmp_path, '"schedule.kind": tune.choice(["cosine", "step"])')


def test_one_wrong_combination_of_a_grid_is_found(tmp_path: Path) -> None:
    epochs, warmups = list(range(2, 22)), [*np.linspace(0, 1.9, 19).tolist(), 2]  # only the last goes with no 2 epochs
    body = f'"train.epochs": tune.grid_search({epochs}), "schedule.warmup_epochs": tune.grid_search({warmups})'
    with pytest.raises(UserError, match=r"mine.py: schedule.warmup_epochs=2.0 leaves none of train.epochs=2"):
        loaded(tmp_path, body)


def test_a_larger_grid_is_checked_all_over_by_draws(tmp_path: Path) -> None:
    epochs, warmups = list(range(31, 1, -1)), np.linspace(0, 30, 20).tolist()  # 600, of which the first 20 are right
    body = f'"train.epochs": tune.grid_search({epochs}), "schedule.warmup_epochs": tune.grid_search({warmups})'
    with pytest.raises(UserError, match=r"mine.py: schedule.warmup_epochs=.* leaves none of train.epochs="):
        loaded(tmp_path, body)


def test_only_values_that_a_quantized_domain_reaches_are_checked(tmp_path: Path) -> None:
    space = loaded(tmp_path, '"data.augment.rand_ops": tune.qrandint(0, 9, 4)')
    assert {values["data.augment.rand_ops"] for values in space.draws(30, seed=0)} == {0, 4, 8}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", ["search_space() is empty", "objective.nu_forward"]),
        ('"objective.nu_forwrd": tune.uniform(1, 2)', ["nu_forwrd", "did you mean 'objective.nu_forward'"]),
        ('"optimizr.lr": tune.uniform(0.1, 1)', ["optimizr", "did you mean"]),
        ('"lr": tune.uniform(0.1, 1)', ["unknown recipe key 'lr'", "optimizer.lr"]),
        ('"optimizer": {"lr": tune.uniform(0.1, 1)}', ["optimizer is a section; set its keys"]),
        ('"run.name": tune.choice(["a", "b"])', ["run.name changes nothing that is computed"]),
        ('"launch.workers": tune.choice([1, 2])', ["launch.workers changes nothing that is computed"]),
        ("5: tune.uniform(0, 1)", ["the key 5 is of type int"]),
        ('"objective.nu_forward": tune.uniform(-1, 2)', ["objective.nu_forward=-1.0 is not allowed", ">= 0"]),
        ('"optimizer.momentum": tune.uniform(0.5, 1)', ["optimizer.momentum=1.0", "less than 1"]),
        ('"data.augment.rand_ops": tune.randint(0, 10)', ["data.augment.rand_ops=9", "less than or equal to 8"]),
        ('"data.augment.rand_ops": tune.qrandint(0, 10, 5)', ["data.augment.rand_ops=10"]),
        ('"train.batch_size": tune.randint(1, 9)', ["train.batch_size=1", "greater than or equal to 2"]),
        ('"train.epochs": tune.uniform(3, 5.5)', ["train.epochs=5.5", "integer"]),
        ('"objective.gate": tune.choice(["hard", "sofd"])', ["sofd", "soft"]),
        ('"objective.gate": tune.grid_search(["hard", "sofd"])', ["sofd", "soft"]),
        ('"objective.gate": "sofd"', ["sofd", "soft"]),
        ('"objective.gate": tune.choice([])', ["objective.gate: nothing to choose from"]),
        ('"objective.gate": tune.grid_search([])', ["objective.gate: nothing to choose from"]),
        ('"optimizer.lr": tune.uniform(1, 0.1)', ["optimizer.lr: there is no value between the bounds 1 and 0.1"]),
        ('"train.seed": tune.randint(3, 3)', ["train.seed: there is no value between the bounds 3 and 3"]),
        ('"train.seed": tune.qrandint(11, 19, 20)', ["train.seed: there is no value between the bounds 11 and 19"]),
        ('"optimizer.lr": tune.randn(1, 1)', ["optimizer.lr: tune.randn, which has no bounds", "loguniform"]),
        ('"optimizer.lr": tune.sample_from(lambda: 1)', ["optimizer.lr: tune.sample_from, which has no bounds"]),
        ('"objective.name": tune.choice(["bdkd", "kd"])', ["objective.name=kd", "models.teacher_checkpoint"]),
        ('"objective.name": tune.choice(["bdkdd"])', ["bdkdd", "did you mean 'bdkd'"]),
        ('"objective.name": tune.choice([["bdkd"]])', ["objective.name"]),
        (
            '"objective.name": tune.choice(["ce", "bdkd"]), "objective.nu_forwrd": tune.uniform(1, 2)',
            ["objective.nu_forwrd", "did you mean 'objective.nu_forward'"],
        ),
        (
            '"objective.name": tune.choice(["ce", "dml"]), "objective.nu_forward": tune.uniform(1, 2)',
            ["unknown recipe key 'objective.nu_forward'"],
        ),
        (
            '"objective.name": tune.choice(["ce", "jeffreys"]), "objective.temperature": tune.uniform(0, 2)',
            ["objective.temperature=0.0 is not allowed", "> 0"],
        ),
    ],
)
def test_a_space_that_the_recipe_does_not_take_is_one_line(tmp_path: Path, body: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, body)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("mine.py: ")
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def search_space(:\n", ["mine.py: is not Python: line 1"]),
        ("\0", ["mine.py: is not Python"]),
        ("x = 1\n", ["mine.py: defines no function search_space()"]),
        ("search_space = {}\n", ["mine.py: defines no function search_space()"]),
        ("import nowhere_at_all\n", ["fails in line 1 with ModuleNotFoundError", "nowhere_at_all"]),
        ("\n\nimport broken_beside\n", ["fails in line 3 with SyntaxError"]),
        ("def search_space():\n    x = 1\n    return tune.uniform(0, x)\n", ["line 3 with NameError", "'tune'"]),
        (
            "from ray import tune\ndef search_space():\n    return {'a': tune.loguniform(0, 1)}\n",
            ["line 3", "ValueError"],
        ),
        ("def search_space(recipe):\n    return {}\n", ["fails with TypeError", "recipe"]),
        ("raise SystemExit(3)\n", ["fails in line 1 with SystemExit: 3"]),
        ("def search_space():\n    raise ValueError('one\\ntwo')\n", ["fails in line 2 with ValueError: one"]),
        ("def search_space():\n    return [1]\n", ["search_space() returned a value of type list"]),
        ("def search_space():\n    pass\n", ["search_space() returned a value of type NoneType"]),
    ],
)
def test_a_file_that_holds_no_space_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "broken_beside.py").write_text("def f(:\n")
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_space(str(path), DIGITS)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_a_missing_file_names_the_nearest_beside(tmp_path: Path) -> None:
    written(tmp_path, "", name="weighting.py")
    with pytest.raises(UserError, match=r"there is no space file .*wieghting.py; did you mean 'weighting.py'\?"):
        load_space(str(tmp_path / "wieghting.py"), DIGITS)
    with pytest.raises(UserError, match=r"there is no space file nowhere/mine\.py"):
        load_space("nowhere/mine.py", DIGITS)
    with pytest.raises(UserError, match="there is no space file"):
        load_space(str(tmp_path), DIGITS)


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_space(str(tmp_path / "mine.py"), DIGITS)


def test_defaults_of_the_command_line_are_read(tmp_path: Path) -> None:
    head = 'DEFAULTS = {"goal": "ece", "search": "grid", "scheduler": "none", "num_trials": 3, "test": "all"}'
    assert loaded(tmp_path, '"train.seed": 1', head).defaults == {
        **{"goal": "ece", "search": "grid", "scheduler": "none"},
        **{"num_trials": 3, "test": "all"},
    }


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ('DEFAULTS = {"gaol": "ece"}', ["unknown key of DEFAULTS", "'gaol'", "did you mean 'goal'", "scheduler"]),
        ("DEFAULTS = {5: 1}", ["unknown key of DEFAULTS", "'5'"]),
        ('DEFAULTS = ["goal"]', ["DEFAULTS is of type list"]),
        ('DEFAULTS = {"num_trials": "3"}', ["num_trials='3'", "int"]),
        ('DEFAULTS = {"num_trials": True}', ["num_trials=True", "int"]),
        ('DEFAULTS = {"goal": None}', ["goal=None", "str"]),
    ],
)
def test_wrong_defaults_are_one_line(tmp_path: Path, head: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, '"train.seed": 1', head)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_a_file_may_import_from_beside_itself_and_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "beside_the_space.py").write_text("LOWEST = 0.25\n")
    head = "from dataclasses import dataclass\nfrom beside_the_space import LOWEST\n@dataclass\nclass A:\n    x: int"
    path = written(tmp_path, '"optimizer.lr": tune.uniform(LOWEST, 1)', head)
    paths = list(sys.path)
    space = load_space(path, DIGITS)
    del sys.modules["beside_the_space"]
    assert space.space["optimizer.lr"].lower == 0.25
    assert sys.path == paths
    assert not [name for name in sys.modules if "mine" in name.split("_")]
    assert not list(tmp_path.glob("__pycache__/mine*"))


def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, '"train.seed": tune.randint(0, 9)')
    monkeypatch.chdir(tmp_path)
    assert load_space("mine.py", DIGITS).name == "mine"
