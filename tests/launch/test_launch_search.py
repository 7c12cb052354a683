"""``bdkd tune`` from end to end: what it leaves, what it survives, what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import searches
import without_ray
import yaml
from processes import below
from rich.console import Console
from runs import assert_same_weights, break_off, environment, event_points, execute
from searches import command, records
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from bdkd_dist import config
from bdkd_dist.errors import UserError
from bdkd_dist.launch.tune import search as launched
from bdkd_dist.launch.tune.search import Asked

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a space file."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("space") / "space.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="module")
def ended(written: Callable[[str], Path], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of three seeds that train and one learning rate at which the loss leaves the numbers."""
    storage = tmp_path_factory.mktemp("ended")
    space = written(searches.grid(lr=[0.05, 1e12], seed=[0, 1]))
    words = ["--scheduler", "none", "--goal", "nll"]
    done = execute(command(space, cache, storage, *words))
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("preparing train") <= 1  # by the driver, for all
    return storage / "search"


def test_every_trial_is_recorded_and_the_diverged_ones_say_why(ended: Path) -> None:
    trials = records(ended)
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    by_lr = {lr: [t for t in trials if t["values"]["optimizer.lr"] == lr] for lr in (0.05, 1e12)}
    assert [trial["status"] for trial in by_lr[0.05]] == ["finished", "finished"]
    assert [trial["status"] for trial in by_lr[1e12]] == ["failed", "failed"]
    assert all("not finite" in trial["reason"] for trial in by_lr[1e12])
    for trial in by_lr[0.05]:
        lines = [json.loads(line) for line in (ended / "trials" / trial["name"] / "metrics.jsonl").open()]
        evaluated = [line for line in lines if "validation" in line]
        assert [report["epoch"] for report in trial["reports"]] == [1, 2, 3]
        assert [r["metrics"]["student/nll"] for r in trial["reports"]] == [
            line["validation"]["student"]["nll"] for line in evaluated
        ]
        assert trial["device_s"] == pytest.approx(sum(report["wall_s"] for report in trial["reports"]))


def test_the_best_on_validation_alone_is_looked_at_on_test(ended: Path) -> None:
    finished = [trial for trial in records(ended) if trial["status"] == "finished"]
    best = min(finished, key=lambda trial: trial["reports"][-1]["metrics"]["student/nll"])
    with_results = [path.parent.name for path in ended.glob("trials/*/results.json")]
    assert with_results == [best["name"]]
    recipe = config.load(str(ended / "best.yaml"))
    assert recipe.train.seed == best["values"]["train.seed"]
    assert recipe.optimizer.lr == 0.05


def test_the_table_of_trials_is_what_the_records_say(ended: Path) -> None:
    table = pq.read_table(ended / "trials.parquet").to_pylist()
    for row, trial in zip(table, records(ended), strict=True):
        assert (row["number"], row["status"], row["name"]) == (trial["number"], trial["status"], trial["name"])
        assert row["optimizer.lr"] == trial["values"]["optimizer.lr"]
        assert [r["epoch"] for r in row["reports"]] == [r["epoch"] for r in trial["reports"]]
    for name in ("report.html", "pareto.png"):
        assert (ended / name).stat().st_size > 1000


def test_tensorboard_shows_every_trial_in_the_hparams_tab(ended: Path) -> None:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(ended / "trials"))
    multiplexer.Reload()
    trials = records(ended)
    assert len(trials) == 4
    for trial in trials:
        run = f"{trial['name']}/tensorboard"
        content = multiplexer.GetAccumulator(run).summary_metadata
        begun = _plugin(content["_hparams_/session_start_info"]).session_start_info
        assert begun.hparams["optimizer.lr"].number_value == trial["values"]["optimizer.lr"]
        ended_as = _plugin(content["_hparams_/session_end_info"]).session_end_info.status
        assert ended_as == {"finished": 1, "failed": 2}[trial["status"]]  # STATUS_SUCCESS, STATUS_FAILURE
        if trial["status"] == "finished":
            assert event_points(ended / "trials" / trial["name"])[("val/student/nll", 9)] == 1


def _plugin(metadata: Any) -> HParamsPluginData:
    return HParamsPluginData.FromString(metadata.plugin_data.content)


def test_typed_again_nothing_is_trained(ended: Path, cache: Path, written: Callable[[str], Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in ended.glob("trials/*/checkpoints/*")}
    space = written(searches.grid(lr=[0.05, 1e12], seed=[0, 1]))
    done = execute(command(space, cache, ended.parent, "--scheduler", "none"))
    assert "searching" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in ended.glob("trials/*/checkpoints/*")} == before


def test_a_trial_that_cannot_be_evaluated_costs_neither_the_others_nor_the_report(
    ended: Path, cache: Path, written: Callable[[str], Path], tmp_path: Path
) -> None:
    search = tmp_path / "search"
    shutil.copytree(ended, search)
    (search / "report.html").unlink()
    broken, whole = (trial["name"] for trial in records(search) if trial["status"] == "finished")
    for name in (broken, whole):
        for result in ("results.json", "predictions/test.parquet"):
            (search / "trials" / name / result).unlink(missing_ok=True)
    for checkpoint in (search / "trials" / broken / "checkpoints").glob("*.pt"):
        checkpoint.write_bytes(b"cut")
    space = written(searches.grid(lr=[0.05, 1e12], seed=[0, 1]))
    words = ["--scheduler", "none", "--goal", "nll", "--test", "all"]
    done = execute(command(space, cache, tmp_path, *words), status=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("no checkpoint in")
    assert broken in last
    assert (search / "trials" / whole / "results.json").is_file()
    assert (search / "report.html").is_file()


def test_a_node_that_lacks_what_trials_need_ends_the_search_and_no_trial(
    cache: Path, written: Callable[[str], Path], tmp_path: Path
) -> None:
    near = tmp_path / "near"
    near.write_text("in the place of the folder, so that nothing can be copied there")
    space = written(searches.grid(nu=[1, 2, 3]))
    going = command(space, cache, tmp_path, "--scheduler", "none", "data.stage=local", f"data.stage_folder={near}")
    done = execute(going, status=2)
    assert re.fullmatch(
        rf"node \S+: data\.stage=local: {near}: .*; the same command goes on", done.stderr.strip().splitlines()[-1]
    )
    assert {trial["status"] for trial in records(tmp_path / "search")} == {"running"}
    near.unlink()
    execute(going)
    assert [trial["status"] for trial in records(tmp_path / "search")] == 3 * ["finished"]

    (tested,) = (tmp_path / "search").glob("trials/*/results.json")
    tested.unlink()
    shutil.rmtree(near)
    near.write_text("again")
    done = execute(going, status=2)
    assert re.fullmatch(rf"node \S+: data\.stage=local: {near}: .*", done.stderr.strip().splitlines()[-1])


def test_a_search_over_relative_paths_goes_on_from_its_own_folder_alone(
    cache: Path, written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = searches.grid(lr=[0.05]).replace("    return {", '    return {\n        "data.stage_folder": "copies",')
    words = command(written(lines), cache, tmp_path, "train.epochs=1")
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "searching" in execute(words).stdout
    recipe = config.load(str(next(tmp_path.glob("search/trials/*/recipe.yaml"))))
    assert recipe.data.stage_folder == str(tmp_path / "here/copies")
    assert "searching" not in execute(words).stdout
    monkeypatch.chdir(tmp_path / "elsewhere")
    (line,) = execute(words, status=2).stderr.splitlines()
    assert "holds another search (paths is" in line


def test_another_search_in_the_folder_is_refused(ended: Path, cache: Path, written: Callable[[str], Path]) -> None:
    same = searches.grid(lr=[0.05, 1e12], seed=[0, 1])
    files = {path: path.stat().st_mtime_ns for path in ended.rglob("*") if path.is_file() and path.name != "run.lock"}
    for space, asked, overrides, said in (
        (same, Asked(goal="ece"), [], "goal is nll there, ece here"),
        (same, Asked(seed=3), [], "seed is 0 there, 3 here"),
        (same, Asked(), ["train.epochs=4"], "train.epochs is 3 there, 4 here"),
        (same + "# other\n", Asked(), [], "space is other lines there"),
    ):
        _, _, file, recipe, *words = command(written(space), cache, ended.parent, *overrides)
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            launched.search(file, config.load(recipe, words), asked, Console(quiet=True))
        assert "choose another run.name" in str(caught.value)
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_killed_search_keeps_finished_trials_and_goes_on_with_the_others(
    ended: Path, written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(searches.grid(lr=[0.05], seed=[0, 1, 2, 3]))
    arguments = command(space, cache, tmp_path, "--scheduler", "none", "--test", "all")
    search = tmp_path / "search"

    def amid() -> bool:
        done = [trial["status"] for trial in _whole_records(search)]
        going = [trial for trial in _whole_records(search) if trial["status"] == "running" and trial["reports"]]
        return "finished" in done and bool(going)

    break_off(arguments, amid, signal.SIGKILL)
    kept = {trial["name"]: trial for trial in _whole_records(search) if trial["status"] == "finished"}
    stamps = {name: _stamp(search / "trials" / name) for name in kept}
    partly = [t["name"] for t in _whole_records(search) if t["status"] == "running" and t["reports"]]
    execute(arguments)
    after = {trial["name"]: trial for trial in records(search)}
    assert [trial["status"] for trial in after.values()] == ["finished"] * 4
    for name, trial in kept.items():
        assert after[name] == trial
        assert _stamp(search / "trials" / name) == stamps[name]
    for name in partly:
        assert [report["epoch"] for report in after[name]["reports"]] == [1, 2, 3]
        points = event_points(search / "trials" / name)
        assert {points[("val/student/nll", step)] for step in (3, 6, 9)} == {1}
    unbroken = [trial for trial in records(ended) if trial["status"] == "finished"]
    by_seed = {trial["values"]["train.seed"]: trial["name"] for trial in unbroken}
    for trial in after.values():
        if (name := by_seed.get(trial["values"]["train.seed"])) is not None:
            assert_same_weights(search / "trials" / trial["name"], ended / "trials" / name)


def _stamp(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.glob("checkpoints/*")}


def _whole_records(search: Path) -> list[dict[str, Any]]:
    return records(search) if search.exists() else []


def test_ctrl_c_ends_with_what_was_found_and_the_same_command_goes_on(
    written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(searches.RANGES)
    arguments = command(space, cache, tmp_path, "--num-trials", "3", "--scheduler", "asha", "--search", "tpe")
    search = tmp_path / "search"
    amid = lambda: any(t["status"] in ("finished", "stopped") for t in _whole_records(search))  # noqa: E731
    status, output = break_off(arguments, amid, signal.SIGINT)
    assert status == 130, output
    assert "go on with: bdkd tune" in output
    assert "Traceback" not in output
    done = {t["number"]: t for t in _whole_records(search) if t["status"] != "running"}
    execute([*arguments, "--num-trials", "4"])  # the number may grow
    after = records(search)
    assert [trial["number"] for trial in after] == [0, 1, 2, 3]
    assert all(trial["status"] in ("finished", "stopped") for trial in after)
    assert all(after[number] == trial for number, trial in done.items())
    drawn = [trial["values"]["objective.nu_forward"] for trial in after]
    assert len(set(drawn)) == 4  # going on does not draw the first ones again


def test_bohb_like_pareto_search_under_a_constraint(
    written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(searches.RANGES)
    words = ["--goal", "pareto", "--search", "tpe", "--scheduler", "hyperband", "--num-trials", "4"]
    words += ["--subject-to", "teacher/ece>=0.001"]  # which all meet
    execute(command(space, cache, tmp_path, *words))
    finished = [trial for trial in records(tmp_path / "search") if trial["status"] == "finished"]
    pairs = {t["name"]: t["reports"][-1]["metrics"] for t in finished}
    front = {
        name
        for name, one in pairs.items()
        if not any(
            other["student/top1"] >= one["student/top1"]
            and other["student/ece"] <= one["student/ece"]
            and (other["student/top1"], other["student/ece"]) != (one["student/top1"], one["student/ece"])
            for other in pairs.values()
        )
    }
    assert {path.parent.name for path in (tmp_path / "search").glob("trials/*/results.json")} == front


def test_a_constraint_that_nothing_meets_names_the_nearest(
    written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(searches.grid(lr=[0.05, 0.01]))
    words = ["--goal", "accuracy", "--subject-to", "ece<=0.00001", "--scheduler", "median"]
    done = execute(command(space, cache, tmp_path, *words), status=2)
    trials = [trial for trial in records(tmp_path / "search") if trial["status"] == "finished"]
    nearest = min(trials, key=lambda trial: trial["reports"][-1]["metrics"]["student/ece"])
    line = done.stderr.strip().splitlines()[-1]
    assert f"the nearest is trial {nearest['number']:04d}" in line
    assert (tmp_path / "search/trials.parquet").exists()


def test_population_based_training_changes_values_and_survives_a_kill(
    written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(
        "from ray import tune\nDEFAULTS = {'scheduler': 'pbt'}\n"
        "def search_space():\n    return {'objective.nu_forward': tune.uniform(0.5, 4)}\n"
    )
    arguments = command(space, cache, tmp_path, "--num-trials", "4", "train.epochs=5")

    def amid() -> bool:
        return any(trial["taken"] for trial in _whole_records(tmp_path / "search"))

    break_off(arguments, amid, signal.SIGKILL)
    execute(arguments)
    trials = records(tmp_path / "search")
    assert [trial["status"] for trial in trials] == ["finished"] * 4
    schedules = [[report["values"]["objective.nu_forward"] for report in trial["reports"]] for trial in trials]
    assert any(len(set(schedule)) > 1 for schedule in schedules)
    assert all(0.5 <= value <= 4 for schedule in schedules for value in schedule)
    assert all([report["epoch"] for report in trial["reports"]] == [1, 2, 3, 4, 5] for trial in trials)
    lineages = [[tuple(report["metrics"].items()) for report in trial["reports"]] for trial in trials]
    # Who took over another's state has its past.
    assert any(one[0] == other[0] for number, one in enumerate(lineages) for other in lineages[:number])
    assert not (tmp_path / "search/ray").exists()
    assert yaml.safe_load((tmp_path / "search/best.yaml").read_text())["objective"]["name"] == "bdkd"


def test_a_search_in_a_bucket(
    storage: Any, written: Callable[[str], Path], cache: Path, tmp_path: Path, quick: Callable[[float], None]
) -> None:
    space = written(searches.grid(seed=[0, 1]))
    arguments = command(space, cache, storage.uri("runs"), "--scheduler", "none", name="bucket")
    execute(arguments)
    here = storage.copy_to("runs/bucket", tmp_path / "copy")
    assert [trial["status"] for trial in records(here)] == ["finished", "finished"]
    assert {"best.yaml", "report.html", "search.yaml", "trials.parquet"} <= {path.name for path in here.iterdir()}
    assert len(list(here.glob("trials/*/results.json"))) == 1
    assert not math.isnan(records(here)[0]["reports"][-1]["metrics"]["student/nll"])
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in b"".join(
        path.read_bytes() for path in here.rglob("*") if path.is_file()
    )


def test_a_trial_that_loses_one_of_its_two_workers_goes_on_to_the_same_bits(
    written: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    space = written(searches.grid(lr=[0.05]))
    words = ("launch.workers=2", "train.epochs=5", "data.loader=torch", "data.threads=1")
    # What it is compared with no Ray has started.
    unbroken = without_ray.train_two_ranks(cache, tmp_path, *searches.TINY, *words, "optimizer.lr=0.05")
    process = subprocess.Popen(
        command(space, cache, tmp_path, *words, "--scheduler", "none", name="broken"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        while not any(trial["reports"] for trial in _whole_records(tmp_path / "broken")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        (rank,) = below(process.pid, "Rank")
        rank.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "trial 0000 lost a process or node; it goes on from its checkpoint" in output
    assert "Traceback" not in output
    (trial,) = records(tmp_path / "broken")
    assert [report["epoch"] for report in trial["reports"]] == [1, 2, 3, 4, 5]
    assert_same_weights(tmp_path / "broken/trials" / trial["name"], unbroken)
