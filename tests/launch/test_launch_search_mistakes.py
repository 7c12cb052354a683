"""Each mistake in a search is one line, said before anything starts; what was there stays."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import searches
from rich.console import Console
from typer.testing import CliRunner

from bdkd_dist import config
from bdkd_dist.cli import app
from bdkd_dist.errors import UserError
from bdkd_dist.launch import submission
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune import algorithms, search
from bdkd_dist.launch.tune.folder import SearchFolder
from bdkd_dist.launch.tune.outcome import Found
from bdkd_dist.launch.tune.search import Asked
from bdkd_dist.launch.tune.space import load_space
from bdkd_dist.records.trials import Report, Trial

PBT = searches.RANGES + "DEFAULTS = {'scheduler': 'pbt'}\n"
MIXED = """
from ray import tune

def search_space():
    return {"optimizer.lr": tune.loguniform(0.01, 0.1), "train.seed": tune.grid_search([0, 1])}
"""


@pytest.fixture
def refused(cache: Path, tmp_path: Path) -> Callable[..., str]:
    """Return what a search says to a mistake, having checked that nothing was printed or left behind."""

    def run(space: str, asked: Asked, *overrides: str) -> str:
        file = tmp_path / "space.py"
        file.write_text(space)
        places = [f"data.prepared={cache}", f"run.storage={tmp_path / 'runs'}", "run.name=search"]
        printed = StringIO()
        before = sorted(tmp_path.rglob("*"))
        recipe = config.load("digits", [*searches.TINY, *places, *overrides])
        with pytest.raises(UserError) as caught:
            search.search(str(file), recipe, asked, Console(file=printed))
        assert printed.getvalue() == ""
        left = {path for path in tmp_path.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
        assert left - set(before) <= {tmp_path / "runs", tmp_path / "runs/search", tmp_path / "runs/search/run.lock"}
        line = str(caught.value)
        assert "\n" not in line
        return line

    return run


@pytest.mark.parametrize(
    ("space", "asked", "words"),
    [
        (searches.RANGES, Asked(goal="acuracy"), ["unknown goal 'acuracy'", "did you mean 'accuracy'?"]),
        (searches.RANGES, Asked(goal="student/gap"), ["student/gap", "allowed"]),
        (searches.RANGES, Asked(goal="student_ema/nll"), ["student_ema"]),  # there is none without train.ema_decay
        (searches.RANGES, Asked(subject_to=("student/ece=0.02",)), ["student/ece=0.02", "<="]),
        (searches.RANGES, Asked(scheduler="ahsa"), ["--scheduler", "did you mean 'asha'?"]),
        (searches.RANGES, Asked(search="tpa"), ["--search", "did you mean 'tpe'?"]),
        (searches.RANGES, Asked(search="grid"), ["--search grid", "ranges"]),
        (searches.RANGES, Asked(test="bset"), ["--test", "did you mean 'best'?"]),
        (searches.RANGES, Asked(num_trials=-1), ["--num-trials -1", "at least 1"]),
        (searches.RANGES, Asked(num_trials=0), ["--num-trials 0", "at least 1"]),
        (searches.grid(seed=[0, 1]), Asked(search="tpe"), ["--search tpe", "grid"]),
        (MIXED, Asked(), ["--search tpe", "grid"]),
        (PBT, Asked(search="tpe"), ["--search tpe", "pbt"]),
        ("def search_space():\n    return {}\n", Asked(), ["space.py", "empty"]),
        (
            searches.grid(seed=[0]).replace("train.seed", "train.sed"),
            Asked(),
            ["train.sed", "did you mean 'train.seed'?"],
        ),
    ],
)
def test_a_mistake_is_one_line(refused: Callable[..., str], space: str, asked: Asked, words: list[str]) -> None:
    line = refused(space, asked)
    for word in words:
        assert word in line


def test_trials_have_a_fixed_number_of_workers(refused: Callable[..., str]) -> None:
    assert "launch.workers=[1, 2]" in refused(searches.RANGES, Asked(), "launch.workers=[1,2]")


@pytest.mark.parametrize(("name", "said"), [("thesis.txt", "holds no search"), ("recipe.yaml", "holds no search")])
def test_a_folder_that_holds_something_else_is_kept(
    refused: Callable[..., Any], tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "runs/search").mkdir(parents=True)
    (tmp_path / "runs/search" / name).write_text("mine")
    assert said in refused(searches.RANGES, Asked())
    assert (tmp_path / "runs/search" / name).read_text() == "mine"


def test_a_damaged_search_file_is_said(refused: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "runs/search").mkdir(parents=True)
    (tmp_path / "runs/search/search.yaml").write_text("recipe: [")
    assert "search.yaml does not fit this version" in refused(searches.RANGES, Asked())


@pytest.mark.parametrize("content", ['{"number": 0', '{"number": 0, "reports": []}', "[]"])
def test_a_damaged_record_is_said(tmp_path: Path, content: str) -> None:
    folder = SearchFolder(RunFolder(tmp_path / "search"), print)
    (tmp_path / "search/trials/0000-a").mkdir(parents=True)
    (tmp_path / "search/trials/0000-a/trial.json").write_text(content)
    with pytest.raises(UserError, match=r"0000-a/trial\.json does not fit this version"):
        folder.trials()


def test_a_job_is_sent_with_a_space_that_travels_and_fits(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    for file in (tmp_path / "away/space.py", tmp_path / "space.py"):
        file.write_text(searches.RANGES)
    arguments = ["tune", "space.py", "digits", "run.storage=/shared/runs"]

    def check(space: str, *overrides: str) -> None:
        given = {"space": space, "recipe": "digits", "overrides": [*overrides]}
        submission.check(arguments, given, tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        places = ("run.storage=/shared/runs", "data.prepared=/shared/prepared")
        check("space.py", *places)
        with pytest.raises(UserError, match="does not travel"):
            check(str(tmp_path / "away/space.py"), *places)
        with pytest.raises(UserError, match=r"run\.storage=runs"):
            check("space.py", "run.storage=runs", places[1])
        (tmp_path / "space.py").write_text(searches.RANGES.replace("nu_forward", "nu_forwards"))
        with pytest.raises(UserError, match="nu_forward"):
            check("space.py", *places)


STEPS = """
from ray import tune

def search_space():
    return {"train.batch_size": tune.DOMAIN, "data.augment.rand_magnitude": tune.qrandint(0, 30, 5)}
"""


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        ("qlograndint(8, 64, 8)", ["train.batch_size is tune.qlograndint", "tune.qrandint or tune.lograndint"]),
        ("qloguniform(8, 64, 8)", ["train.batch_size is tune.qloguniform", "tune.quniform or tune.loguniform"]),
    ],
)
def test_steps_on_a_logarithm_are_not_for_tpe(tmp_path: Path, domain: str, words: list[str]) -> None:
    (tmp_path / "space.py").write_text(STEPS.replace("DOMAIN", domain))
    space = load_space(str(tmp_path / "space.py"), config.load("digits", searches.TINY))
    algorithms.check_domains("random", space)
    with pytest.raises(UserError, match="--search tpe: ") as caught:
        algorithms.check_domains("tpe", space)
    line = str(caught.value)
    assert "\n" not in line
    for word in [*words, "--search random"]:
        assert word in line


@pytest.mark.parametrize("domain", ["qrandint(8, 64, 8)", "lograndint(8, 64)", "choice([8, 64])"])
def test_other_domains_are_for_tpe(tmp_path: Path, domain: str) -> None:
    (tmp_path / "space.py").write_text(STEPS.replace("DOMAIN", domain))
    space = load_space(str(tmp_path / "space.py"), config.load("digits", searches.TINY))
    algorithms.check_domains("tpe", space)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**80])
def test_a_large_seed_is_one_as_any(tmp_path: Path, seed: int) -> None:
    (tmp_path / "space.py").write_text(searches.RANGES)
    recipe = config.load("digits", searches.TINY)
    plan, _ = search._planned(str(tmp_path / "space.py"), recipe, Asked(seed=seed, scheduler="hyperband"))
    ended = [Trial(0, "0000", {"objective.nu_forward": 1.0, "objective.gate": "soft"}, "stopped")]
    algorithm, _, left = algorithms.asked_for(plan, ended)
    assert left == plan.num_trials - 1
    assert algorithm.suggest("next")["trial"]["number"] == 1
    algorithms.scheduler_of(plan, ended)
    assert algorithms.listed(plan)[0]["number"] == 0


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(searches.RANGES)
    said = CliRunner().invoke(
        app, ["tune", str(tmp_path / "space.py"), "digits", f"run.storage={tmp_path}", "--seed", "-1"]
    )
    assert said.exit_code == 2
    assert "Invalid value for '--seed'" in said.stderr
    assert not list(tmp_path.glob("digits*"))


@pytest.mark.parametrize(
    ("asked", "space", "scheduler"),
    [
        (Asked(), searches.RANGES, "asha"),
        (Asked(test="all"), searches.RANGES, "none"),
        (Asked(), searches.grid(seed=[0, 1]), "none"),
        (Asked(scheduler="median"), searches.grid(seed=[0, 1]), "median"),
        (Asked(), PBT, "pbt"),
    ],
)
def test_what_is_to_be_compared_is_not_stopped_unless_asked(
    tmp_path: Path, asked: Asked, space: str, scheduler: str
) -> None:
    (tmp_path / "space.py").write_text(space)
    plan, _ = search._planned(str(tmp_path / "space.py"), config.load("digits", searches.TINY), asked)
    assert plan.scheduler == scheduler


def test_a_shipped_spaces_name_leads_to_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UserError, match=r"did you mean 'tune_spaces/objectives\.py'"):
        search._planned("objectives", config.load("digits"), Asked())


def found(tmp_path: Path, *trials: Trial, subject_to: tuple[str, ...] = ()) -> Found:
    """A search that ended with these trials."""
    (tmp_path / "space.py").write_text(searches.RANGES)
    recipe = config.load("digits", [*searches.TINY, f"run.storage={tmp_path}", "run.name=search"])
    plan, _ = search._planned(str(tmp_path / "space.py"), recipe, Asked(goal="accuracy", subject_to=subject_to))
    folder = SearchFolder(RunFolder.of(recipe), print)
    for trial in trials:
        folder.record(trial)
    folder.describe(recipe, {}, device="CPU")
    return Found(folder, plan, recipe, list(trials), [])


def test_a_search_in_which_nothing_finished_says_so_and_leaves_its_table(tmp_path: Path) -> None:
    stopped = Trial(0, "0000", {"objective.nu_forward": 1.0}, "stopped", reports=[Report(1, {"student/top1": 0.2})])
    failed = Trial(1, "0001", {"objective.nu_forward": 2.0}, "failed", reason="the loss is not finite at step 3")
    nothing = found(tmp_path, stopped, failed)
    assert nothing.lacking() == (
        f"none of the 2 trials in {tmp_path}/search came to its end; trial 0001: the loss is not finite at step 3"
    )
    nothing.write("bdkd tune")
    assert pq.read_table(tmp_path / "search/trials.parquet")["status"].to_pylist() == ["stopped", "failed"]
    assert not (tmp_path / "search/best.yaml").exists()
    assert [row.count("0000") for row in map(str, nothing.lines())] == [0, 0]


def test_a_search_without_a_trial_that_meets_the_bound_names_the_nearest(tmp_path: Path) -> None:
    trials = [
        Trial(
            number,
            f"{number:04d}",
            {"objective.nu_forward": 1.0 + number},
            "finished",
            reports=[Report(3, {"student/top1": top1, "student/ece": ece})],
        )
        for number, (top1, ece) in enumerate([(0.9, 0.2), (0.5, 0.03), (0.8, 0.1)])
    ]
    line = found(tmp_path, *trials, subject_to=("ece<=0.02",)).lacking()
    assert line.startswith("no finished trial meets student/ece<=0.02; the nearest is trial 0001: ")
    assert "student/ece 3 % (asked: <= 2 %)" in line
