"""Runs whose folder is a bucket: moto's S3 server on this machine, real pyarrow, real kills."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import BDKD, assert_same_weights, break_off, command, environment, event_points, execute
from s3_server import ACCESS, SECRET, Storage

from bdkd_dist import config, models
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.engine.checkpoint import load_teacher
from bdkd_dist.errors import UserError
from bdkd_dist.launch.mirror import RECORDS
from bdkd_dist.launch.run_folder import RunFolder


def training(cache: Path, storage: Storage, name: str, *overrides: str) -> list[str]:
    return command(cache, storage.uri("runs"), "data.loader=torch", *overrides, name=name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def on_path(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a path, never interrupted."""
    folder = tmp_path_factory.mktemp("path")
    execute(command(cache, folder, "data.loader=torch"))
    return folder / "run"


@pytest.fixture(scope="module")
def in_bucket(cache: Path, storage: Storage) -> str:
    """What the same run in a bucket said; it is called ``whole``."""
    done = execute(training(cache, storage, "whole"))
    return done.stdout + done.stderr


def assert_equal_runs(storage: Storage, name: str, on_path: Path, tmp_path: Path) -> None:
    here = storage.copy_to(f"runs/{name}", tmp_path / "copied")
    assert_same_weights(here, on_path)
    assert (here / "metrics.jsonl").read_bytes() == (on_path / "metrics.jsonl").read_bytes()
    assert event_points(here) == event_points(on_path)
    assert json.loads((here / "results.json").read_text()) == json.loads((on_path / "results.json").read_text())


@pytest.mark.slow
class TestWholeRuns:
    def test_a_run_in_a_bucket_equals_one_on_a_path_bit_for_bit(
        self, storage: Storage, in_bucket: str, on_path: Path, tmp_path: Path
    ) -> None:
        assert_equal_runs(storage, "whole", on_path, tmp_path)
        ours = {re.sub(r"tfevents.*", "tfevents", name) for name in storage.keys("runs/whole")}
        others = [path.relative_to(on_path).as_posix() for path in on_path.rglob("*") if path.is_file()]
        theirs = {re.sub(r"tfevents.*", "tfevents", name) for name in others}
        assert ours - {RECORDS} == theirs - {"run.lock"}
        assert "s3://lab/runs/whole/figures/reliability_test.png" in in_bucket
        assert "--logdir s3://lab/runs\n" in in_bucket
        assert not list((node_folder() / "runs").glob("whole-*/*"))

    def test_unchanged_files_are_sent_once(self, storage: Storage, in_bucket: str) -> None:
        sent = [key for method, key, status in storage.requests if method == "PUT" and "/whole/" in key]
        for name in ("step-00000003.pt", "step-00000010.pt", RECORDS, "recipe.yaml", "results.json"):
            assert sum(key.endswith(name) for key in sent) == 1, name

    def test_results_come_last(self, storage: Storage, in_bucket: str) -> None:
        sent = [
            key
            for method, key, _ in storage.requests
            if method in ("PUT", "POST") and "/whole/" in key and not key.endswith(("run.lock", "/"))
        ]
        assert sent[-1].endswith("results.json")

    def test_the_same_command_again_says_it_is_finished(self, storage: Storage, in_bucket: str, cache: Path) -> None:
        before = storage.keys("runs/whole")
        done = execute(training(cache, storage, "whole"))
        assert "s3://lab/runs/whole is finished" in done.stdout
        assert "T-scaled" in done.stdout
        assert storage.keys("runs/whole") == before

    def test_another_recipe_is_kept_out(self, storage: Storage, in_bucket: str, cache: Path) -> None:
        done = execute(training(cache, storage, "whole", "objective.name=dml"), status=2)
        assert done.stderr.startswith("run.name=whole: s3://lab/runs/whole belongs to another recipe (objective.name")

    def test_evaluate_measures_a_run_in_a_bucket(self, storage: Storage, in_bucket: str) -> None:
        before = json.loads(storage.read("runs/whole/results.json"))
        execute([str(BDKD), "evaluate", storage.uri("runs/whole")])
        assert json.loads(storage.read("runs/whole/results.json")) == before
        execute([str(BDKD), "evaluate", storage.uri("runs/whole/checkpoints/step-00000009.pt")])
        of_one = [name for name in storage.keys("runs/whole") if name.startswith("evaluations/step-00000009/")]
        assert {name.split("/")[-1] for name in of_one} >= {"results.json", "test.parquet", "reliability_test.png"}
        assert "run.lock" not in storage.keys("runs/whole")

    def test_a_teacher_comes_from_a_bucket(self, storage: Storage, in_bucket: str, on_path: Path) -> None:
        here, there = models.build("resnet14", 10), models.build("resnet14", 10)
        load_teacher(here, on_path)
        load_teacher(there, storage.uri("runs/whole"))
        assert all(torch.equal(value, there.state_dict()[key]) for key, value in here.state_dict().items())
        load_teacher(there, storage.uri("runs/whole/checkpoints/step-00000009.pt"))
        with pytest.raises(UserError, match="no whole checkpoint there"):
            load_teacher(there, storage.uri("runs/nowhere"))

    def test_secrets_reach_neither_storage_nor_output(self, storage: Storage, in_bucket: str, tmp_path: Path) -> None:
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET  # of the run too
        everything = {name: storage.read(f"runs/{name}") for name in storage.keys("runs")}
        assert len(everything) > 10
        for name, content in everything.items():
            assert SECRET.encode() not in content, name
            assert ACCESS.encode() not in content, name
        assert SECRET not in in_bucket
        assert ACCESS not in in_bucket

    def test_killed_inside_an_epoch_the_same_command_ends_with_the_same_bits(
        self, storage: Storage, on_path: Path, cache: Path, tmp_path: Path, quick: Callable[[float], None]
    ) -> None:
        arguments = training(cache, storage, "killed")
        status, _ = break_off(arguments, storage.reached("runs/killed", 3), signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert "results.json" not in storage.keys("runs/killed")
        done = execute(arguments)
        assert "s3://lab/runs/killed is held by process" in done.stdout  # the dead one's lease is watched first
        assert_equal_runs(storage, "killed", on_path, tmp_path)
        assert "run.lock" not in storage.keys("runs/killed")

    def test_ctrl_c_ends_when_the_checkpoint_has_arrived(self, storage: Storage, cache: Path) -> None:
        arguments = training(cache, storage, "stopped", "train.epochs=400")
        status, output = break_off(arguments, storage.reached("runs/stopped", 3), signal.SIGINT)
        assert status == 130, output
        said = re.search(r"stopped after step (\d+); checkpoint s3://(\S+);", output)
        assert said is not None, output
        assert said[2] == f"lab/runs/stopped/checkpoints/step-{int(said[1]):08d}.pt"
        assert storage.reached("runs/stopped", int(said[1]))()
        assert "run.lock" not in storage.keys("runs/stopped")

    def test_a_storage_that_refuses_for_a_while_costs_no_bit(
        self, storage: Storage, on_path: Path, cache: Path, tmp_path: Path, quick: Callable[[float], None]
    ) -> None:
        refused: list[str] = []

        def refuses(method: str, key: str) -> bool:
            refused.extend([key] if "refused/checkpoints/step-00000005" in key and method != "HEAD" else [])
            return key == refused[-1] and len(refused) < 40 if refused else False  # pyarrow itself tries some 30 times

        storage.refuses = refuses
        try:
            done = execute(training(cache, storage, "refused"))
        finally:
            storage.refuses = lambda method, key: False
        said = [line for line in done.stdout.splitlines() if "trying again" in line]
        assert len(said) == 1
        assert said[0].startswith("s3://lab/runs/refused/checkpoints/step-00000005.pt cannot be written")
        assert "the storage answers again" in done.stdout
        assert_equal_runs(storage, "refused", on_path, tmp_path)

    def test_a_storage_that_stays_away_ends_the_run_and_a_cut_checkpoint_falls_back(
        self, storage: Storage, on_path: Path, cache: Path, tmp_path: Path, quick: Callable[[float], None]
    ) -> None:
        arguments = training(cache, storage, "away")
        storage.refuses = lambda method, key: "away/checkpoints/step-00000006" in key and method in ("PUT", "POST")
        quick(5)
        try:
            done = execute(arguments, status=2)
        finally:
            storage.refuses = lambda method, key: False
        assert "Traceback" not in done.stderr
        line = done.stderr.strip().splitlines()[-1]
        for words in ("away/checkpoints/step-00000006.pt cannot be written", "the same command goes on from it"):
            assert words in line
        local = re.search(r"lies in (\S+) until", line)
        assert local is not None
        assert (Path(local[1]) / "checkpoints/step-00000006.pt").is_file()
        kept = [name for name in storage.keys("runs/away") if name.startswith("checkpoints/")]
        assert kept == ["checkpoints/step-00000003.pt", "checkpoints/step-00000005.pt"]

        newest = "runs/away/checkpoints/step-00000005.pt"
        whole = storage.read(newest)
        storage.write(newest, whole[: len(whole) // 2])
        quick(120)
        done = execute(arguments)
        (said,) = [line for line in done.stdout.splitlines() if "falling back" in line]
        assert said.startswith("s3://lab/runs/away/checkpoints/step-00000005.pt is not a whole checkpoint")
        assert_equal_runs(storage, "away", on_path, tmp_path)

    def test_a_second_process_is_kept_out_and_a_superseded_one_stops(
        self, storage: Storage, cache: Path, quick: Callable[[float], None]
    ) -> None:
        arguments = training(cache, storage, "contested", "train.epochs=400")
        first = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        try:
            while not storage.reached("runs/contested", 3)():
                assert first.poll() is None, first.communicate()
            done = execute(arguments, status=2)
            assert done.stderr.startswith("s3://lab/runs/contested is in use by another process (process ")
            before = storage.read("runs/contested/attempt.json")
            storage.write("runs/contested/attempt.json", before.replace(b'"token": "', b'"token": "0'))
            output, errors = first.communicate(timeout=120)
        finally:
            first.kill()
        assert first.returncode == 1, errors
        assert "Traceback" not in output + errors
        assert "another attempt at this run began meanwhile" in errors.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_secret_key_in_the_storages_uri_is_refused(cache: Path) -> None:
    for uri in ("s3://key:hidden@lab/runs", "s3://lab/runs?access_key=a&secret_key=hidden"):
        done = execute(command(cache, uri), status=2)  # type: ignore[arg-type]
        assert done.stderr.startswith("run.storage=s3://lab/runs holds a secret key")
        assert "hidden" not in done.stdout + done.stderr


@pytest.mark.slow
def test_an_unknown_scheme_is_one_line(cache: Path) -> None:
    done = execute(command(cache, "s4://lab/runs"), status=2)  # type: ignore[arg-type]
    assert done.stderr.startswith("run.storage=s4://lab/runs: unknown file system 's4'; did you mean 's3'?")


def test_the_name_joins_the_folder_before_the_uris_query() -> None:
    recipe = config.load("digits", ["run.storage=s3://lab/a/runs/?region=x&scheme=http", "run.name=n"])
    folder = RunFolder.of(recipe)
    assert folder.where == "s3://lab/a/runs/n?region=x&scheme=http"
    assert str(folder) == "s3://lab/a/runs/n"
    assert (folder / "evaluations/step-1").where == "s3://lab/a/runs/n/evaluations/step-1?region=x&scheme=http"
    assert folder.above == "s3://lab/a/runs"


def test_a_file_uri_is_a_path_that_is_worked_in(tmp_path: Path) -> None:
    folder = RunFolder.of(config.load("digits", [f"run.storage=file://{tmp_path}/my%20runs", "run.name=n"]))
    assert folder.path == tmp_path / "my runs/n"
    assert not folder.is_remote
