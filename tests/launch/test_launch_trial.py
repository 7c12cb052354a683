"""A trial's process: what it takes over from another trial, and that it serves one after the other."""

import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from searches import TINY

from bdkd_dist import config
from bdkd_dist.data.dataset import find_prepared
from bdkd_dist.launch import cluster
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.launch.tune import places
from bdkd_dist.launch.tune.folder import RECORD
from bdkd_dist.launch.tune.places import SearchCluster
from bdkd_dist.launch.tune.trial import CHECKPOINT, TrialProcess, take_over, taken_before
from bdkd_dist.launch.vigil import WorkersLost
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.trials import Report, Trial

pytestmark = [pytest.mark.slow, pytest.mark.ray]
BUSY, KEEN = {"objective.nu_forward": 3.0}, {"objective.nu_forward": 1.5, "train.seed": 1}


@pytest.fixture(scope="module")
def process(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Start a process for a trial, as Ray Tune does, with the folder of trials in which it works."""
    from ray import tune

    storage = tmp_path_factory.mktemp("trials")
    recipe = config.load("digits", [*TINY, f"data.prepared={cache}", f"run.storage={storage}", "data.threads=1"])
    find_prepared(recipe.data)
    with pytest.MonkeyPatch.context() as patch, cluster.connected("local", 2):
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        settings = {"recipe": recipe.to_dict(), "goal": Goal.parse("nll"), "replays": False, "cuda": False}
        kind = ray.remote(tune.with_parameters(TrialProcess, **settings))

        def start(name: str, values: dict[str, Any]) -> Any:
            known(storage / name)
            return kind.options(num_cpus=1).remote(config=trial(name, values))

        start.storage = storage  # type: ignore[attr-defined]
        yield start


def trial(name: str, values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"trial": {"number": 0, "name": name, "values": values, **more}}


def known(folder: Path, *epochs: int) -> None:
    """Write what the driver knows of a trial before it asks for it: the epochs that it was told of."""
    folder.mkdir(exist_ok=True)
    reports = [Report(epoch, {}, {}, 1.0) for epoch in epochs]
    (folder / RECORD).write_bytes(Trial(0, folder.name, {}, reports=reports).to_json())


def newest(folder: Path) -> dict[str, Any]:
    return torch.load(max(folder.glob("checkpoints/step-*.pt")), weights_only=True)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, network in one["networks"].items():
        for key, value in network.items():
            assert torch.equal(value, other["networks"][name][key]), f"{name}.{key}"
    for key, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], other["optimizer"]["state"][key]["momentum_buffer"]), key
    assert (one["step"], one["epoch"]) == (other["step"], other["epoch"])


def test_a_trial_that_exploits_another_has_its_state_bit_for_bit_and_trains_on_from_it(
    process: Any, tmp_path: Path
) -> None:
    donor, taker = process("donor", KEEN), process("taker", BUSY)
    first = [ray.get([donor.train.remote(), taker.train.remote()]) for _ in range(2)][-1]
    assert [result["epoch"] for result in first] == [2, 2]
    ray.get(donor.save.remote(str(tmp_path / "given")))
    given = torch.load(tmp_path / "given" / CHECKPOINT, weights_only=True)
    assert_equal(given, newest(process.storage / "donor"))
    with pytest.raises(AssertionError):
        assert_equal(given, newest(process.storage / "taker"))

    # As Ray does: the same process, with the donor's values, and then its state.
    taken = {"number": 1, "epoch": 2}
    assert ray.get(taker.reset.remote(trial("taker", KEEN, taken=taken)))
    ray.get(taker.restore.remote(str(tmp_path / "given")))
    ray.get(taker.save.remote(str(tmp_path / "kept")))  # before anything is trained
    assert (tmp_path / "kept" / CHECKPOINT).read_bytes() == (tmp_path / "given" / CHECKPOINT).read_bytes()
    ends = ray.get([donor.train.remote(), taker.train.remote()])
    assert [end["epoch"] for end in ends] == [3, 3]
    assert ends[0]["metrics"] == ends[1]["metrics"]
    assert_equal(newest(process.storage / "donor"), newest(process.storage / "taker"))

    # A trial that is started again after a loss gets the same old state from Ray, and keeps its own newer one.
    assert ray.get(taker.reset.remote(trial("taker", KEEN, taken=taken)))
    ray.get(taker.restore.remote(str(tmp_path / "given")))
    ray.get(taker.save.remote(str(tmp_path / "again")))
    assert_equal(torch.load(tmp_path / "again" / CHECKPOINT, weights_only=True), newest(process.storage / "donor"))
    ray.kill(donor)
    ray.kill(taker)


def test_a_process_that_served_one_trial_serves_the_next_as_a_new_one_would(process: Any) -> None:
    used, new = process("before", BUSY), process("new", KEEN)
    ray.get(used.train.remote())
    known(process.storage / "used")
    assert ray.get(used.reset.remote(trial("used", KEEN)))
    one, other = ([ray.get(actor.train.remote()) for _ in range(3)] for actor in (used, new))
    assert [result["metrics"] for result in one] == [result["metrics"] for result in other]
    assert [result["done"] for result in one] == [False, False, True]
    assert_equal(newest(process.storage / "used"), newest(process.storage / "new"))
    ray.kill(used)
    ray.kill(new)


def test_a_trials_own_fault_is_a_result_with_its_reason(process: Any) -> None:
    actor = process("broken", {"data.train_limit": 20})  # less than a batch
    result = ray.get(actor.train.remote())
    assert result["done"]
    assert not result["of_node"]
    assert "train.batch_size=64: larger than the 20 training images" in result["failed"]
    assert "goal" not in result
    ray.kill(actor)


def test_a_finished_trial_that_is_asked_again_says_its_end_again_and_trains_no_further(process: Any) -> None:
    shorter = KEEN | {"train.epochs": 2}  # than the recipe's three
    actor = process("ended", shorter)
    ends = [ray.get(actor.train.remote()) for _ in range(2)]
    known(process.storage / "ended", 1, 2)
    state = newest(process.storage / "ended")
    assert ray.get(actor.reset.remote(trial("ended", shorter, resumed=True)))
    again = ray.get(actor.train.remote())
    assert again["done"]
    assert (again["epoch"], again["metrics"]) == (2, ends[-1]["metrics"])
    assert_equal(newest(process.storage / "ended"), state)
    ray.kill(actor)


def test_a_trial_on_a_node_that_does_not_see_the_searchs_folder_says_so(process: Any) -> None:
    actor = process("elsewhere", KEEN)
    shutil.rmtree(process.storage / "elsewhere")
    result = ray.get(actor.train.remote())
    assert result["done"]
    assert result["of_node"]
    seen = f"node {socket.gethostname()}: run.storage: {process.storage / 'elsewhere'}, where the search was begun, "
    assert result["failed"].startswith(f"{seen}is not seen; give")
    assert not (process.storage / "elsewhere").exists()
    ray.kill(actor)


def test_data_that_are_a_trials_own_values_are_its_own_mistake(process: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    actor = process("mistaken", {"data.stage": "local", "data.stage_folder": str(tmp_path / "file")})
    result = ray.get(actor.train.remote())
    assert f"data.stage=local: {tmp_path / 'file'}: " in result["failed"]
    assert not result["of_node"]
    ray.kill(actor)


def test_a_trial_that_cannot_be_closed_costs_the_next_nothing(process: Any) -> None:
    actor = process("lost", BUSY)
    ray.get(actor.train.remote())
    shutil.rmtree(process.storage / "lost")
    (process.storage / "lost").write_text("a file, as if the disk were gone")
    known(process.storage / "after")
    assert ray.get(actor.reset.remote(trial("after", KEEN)))
    result = ray.get(actor.train.remote())
    (line,) = result["warnings"]
    assert line.startswith(f"the last records of {process.storage / 'lost'} may be lacking (")
    assert result["epoch"] == 1
    ray.kill(actor)


def test_an_evaluation_that_no_node_can_run_is_waited_for_and_given_up(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SAY_EVERY_S", 0.0)  # at every look
    there = SearchCluster(None, config.load("digits", ["launch.wait_timeout_s=3", "launch.cpus_per_worker=64"]))
    said: list[str] = []
    evaluation = ray.remote(lambda: None).options(**there.options).remote()
    with pytest.raises(WorkersLost, match=r"launch\.wait_timeout_s=3: gave up waiting for a node with 64 CPU since"):
        there.wait([evaluation], said.append)
    assert all(re.match(r"waiting for a node with 64 CPU since \d+ s; .* free on 1 node", line) for line in said)
    quick = ray.remote(lambda: None).remote()
    ray.get(quick, timeout=120)  # a process for it may have to start first
    assert there.wait([quick, evaluation], said.append) == ([quick], [evaluation])
    ray.cancel(evaluation)


def test_what_a_trial_takes_over_stands_alone_among_its_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    for step in (3, 6, 9):
        torch.save({"step": step}, folder.checkpoints / f"step-{step:08d}.pt")
    torch.save({"step": 6, "of": "another"}, tmp_path / "given.pt")
    mark = {"taken": {"number": 3, "epoch": 2}, "values": {}}
    assert taken_before(folder, print) is None
    take_over(folder, (tmp_path / "given.pt").read_bytes(), mark, print)
    assert taken_before(folder, print) == mark["taken"]
    assert folder.kept() == ["step-00000006.pt"]
    assert (folder.checkpoints / "step-00000006.pt").read_bytes() == (tmp_path / "given.pt").read_bytes()
