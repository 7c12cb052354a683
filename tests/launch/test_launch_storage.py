"""Runs whose folder is a bucket: moto's S3 server on this machine, real pyarrow, real kills."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from runs import BDKD, assert_same_weights, break_off, command, environment, event_points, execute
from s3_server import ACCESS, CREDENTIALS, SECRET, Storage, serve

from bdkd_dist import config, models
from bdkd_dist.data.node_folder import node_folder
from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.checkpoint import Checkpoints, load_teacher
from bdkd_dist.engine.observer import StepLog
from bdkd_dist.errors import UserError
from bdkd_dist.launch import lease, mirror, run_folder, worker
from bdkd_dist.launch.lease import Lease, Superseded
from bdkd_dist.launch.mirror import RECORDS, RunCheckpoints
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.tensorboard import TensorBoardObserver

QUICK = """
from bdkd_dist.engine import patience
from bdkd_dist.launch import lease

lease.REFRESH_S, lease.WATCH_S = 0.3, 3.0
patience.STORAGE_PATIENCE_S = {patience_s}
"""


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for key, value in CREDENTIALS.items():
            patch.setenv(key, value)
        yield server


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let processes started from here watch a lease for 3 s, and wait for a storage for as long as given."""

    def set_patience(seconds: float) -> None:
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site/sitecustomize.py").write_text(QUICK.format(patience_s=seconds))

    set_patience(120)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setattr(lease, "REFRESH_S", 0.1)
    monkeypatch.setattr(lease, "WATCH_S", 1.0)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    return set_patience


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


@pytest.fixture(params=["path", "bucket"])
def place(request: pytest.FixtureRequest, storage: Storage, tmp_path: Path) -> Place:
    return Place(str(tmp_path) if request.param == "path" else storage.uri(f"places/{tmp_path.name}"))


def test_what_is_written_is_found_until_it_is_deleted(place: Place) -> None:
    assert place.find("a/b.txt") is None
    place.write("a/b.txt", b"one")
    place.write("a/b.txt", b"two")
    assert place.find("a/b.txt") == b"two"
    assert place.exists("a/b.txt")
    assert not place.exists("a")
    assert [file.path for file in (place / "a").listing()[0]] == ["b.txt"]  # nothing beside it
    place.delete("a/b.txt")
    place.delete("a/b.txt")
    assert place.find("a/b.txt") is None


@pytest.mark.slow
def test_what_cannot_be_written_leaves_what_was_there(storage: Storage) -> None:
    place = Place(storage.uri("places/refused"))
    place.write("x", b"old" * 4_000_000)
    parts: list[str] = []

    def refuses(method: str, key: str) -> bool:
        parts.extend([key] if method == "PUT" else [])
        return len(parts) > 1  # the first part arrives

    storage.refuses = refuses
    try:
        with pytest.raises(
            UserError, match=r"^s3://lab/places/refused/x cannot be written: .*reduce your request rate"
        ):
            place.write("x", b"new" * 10_000_000)
    finally:
        storage.refuses = lambda method, key: False
    assert place.find("x") == b"old" * 4_000_000


def test_the_newest_attempt_alone_saves(place: Place) -> None:
    older = RunCheckpoints(RunFolder(place.root), print)
    older.save(1, {"w": torch.zeros(2)})
    older.wait()
    newer = RunCheckpoints(RunFolder(place.root), print)
    with pytest.raises(Superseded, match=rf"another attempt at this run began meanwhile \(process {os.getpid()} on "):
        older.save(2, {"w": torch.ones(2)})
    with pytest.raises(Superseded):
        older.check()
    assert RunFolder(place.root).kept() == ["step-00000001.pt"]
    newer.save(3, {"w": torch.ones(2)})
    newer.wait()
    assert RunFolder(place.root).kept() == ["step-00000001.pt", "step-00000003.pt"]


def test_what_a_lost_attempt_sent_late_is_dropped(storage: Storage) -> None:
    run = RunFolder(storage.uri("runs/late"))
    with RunCheckpoints(run, print) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {})
        checkpoints.wait()
        storage.write("runs/late/checkpoints/step-00000009.pt", b"of an attempt that was given up for lost")
        checkpoints.save(3, {})
    assert run.kept() == ["step-00000002.pt", "step-00000003.pt"]


def test_an_event_file_that_was_sent_under_a_new_name_counts_once(storage: Storage) -> None:
    run = RunFolder(storage.uri("runs/renamed"))
    old, new = (f"events.out.tfevents.{name}" for name in ("0000000009.host", "0000000000.earlier"))
    with RunCheckpoints(run, print):
        run.tensorboard.mkdir()
        (run.tensorboard / old).write_bytes(b"points")
    # A push that was cut off between the new name and the list of names that count:
    storage.write(f"runs/renamed/tensorboard/{new}", b"points")
    other = RunFolder(run.where)
    RunCheckpoints(other, print)
    assert [path.name for path in other.tensorboard.iterdir()] == [old]
    # A whole push:
    third = RunFolder(run.where)
    with RunCheckpoints(third, print):
        (third.tensorboard / old).rename(third.tensorboard / new)
    assert [name for name in storage.keys("runs/renamed") if "tfevents" in name] == [f"tensorboard/{new}"]


class Killed(Exception):
    """The process ends here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, method: str, name: str) -> None:
    """Let a method of a store raise for files of this name."""
    real = getattr(Place, method)

    def raises(self: Place, path: str, *content: bytes) -> None:
        if name in path:
            raise Killed
        real(self, path, *content)

    monkeypatch.setattr(Place, method, raises)


def attempt(uri: str, steps: int) -> None:
    """Go on from what lies there, for so many steps that are checkpoints too."""
    run = RunFolder(uri)
    with RunCheckpoints(run, print) as checkpoints:
        state, _ = checkpoints.read_newest()
        begun = 0 if state is None else state["step"]
        observer = TensorBoardObserver(run.path, "recipe")
        observer.start(begun, 9)
        try:
            for step in range(begun + 1, begun + steps + 1):
                observer.stepped(StepLog(step, 9, 0, {"train/loss": float(step)}, 1.0, 1.0))
                observer.flush()
                checkpoints.save(step, {})
                checkpoints.wait()
        finally:
            observer.close()


@pytest.mark.parametrize("whole_before", [0, 2])
def test_attempts_killed_before_their_event_file_counts_leave_each_point_once(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_before: int
) -> None:
    name, nodes = f"runs/killed-early-{whole_before}", count(1)
    monkeypatch.setattr(socket, "gethostname", lambda: f"node-{next(nodes)}")  # event files are named after it
    if whole_before:
        attempt(storage.uri(name), whole_before)
    for _ in range(2):
        with monkeypatch.context() as patch:
            kill_at(patch, "write", RECORDS)
            with pytest.raises(Killed):
                attempt(storage.uri(name), 1)
    assert max(event_points(storage.copy_to(name, tmp_path / "before")).values()) > 1  # they did send theirs
    attempt(storage.uri(name), 2)
    points = event_points(storage.copy_to(name, tmp_path / "after"))
    tags = ("train/loss", "speed/images_per_s")
    expected = {(tag, step) for tag in tags for step in range(1, whole_before + 3)} | {("recipe/text_summary", 0)}
    assert points == dict.fromkeys(expected, 1)


def test_an_attempt_killed_before_it_removes_an_old_event_file_leaves_it_to_the_next(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.uri("runs/killed-late")
    old, new = (f"events.out.tfevents.{name}" for name in ("0000000009.host", "0000000000.earlier"))
    run = RunFolder(uri)
    with RunCheckpoints(run, print):
        run.tensorboard.mkdir()
        (run.tensorboard / old).write_bytes(b"points")
    run = RunFolder(uri)
    with monkeypatch.context() as patch:
        kill_at(patch, "delete", old)
        with pytest.raises(Killed), RunCheckpoints(run, print):
            (run.tensorboard / old).rename(run.tensorboard / new)
    assert [name for name in storage.keys("runs/killed-late") if "tfevents" in name] == [
        f"tensorboard/{new}",
        f"tensorboard/{old}",
    ]
    storage.write("runs/killed-late/tensorboard/plugins.txt", b"of somebody else")
    with RunCheckpoints(RunFolder(uri), print):
        pass
    assert [name for name in storage.keys("runs/killed-late") if name.startswith("tensorboard/")] == [
        f"tensorboard/{new}",
        "tensorboard/plugins.txt",
    ]


def test_a_damaged_checkpoint_takes_no_whole_ones_place(place: Place) -> None:
    with RunCheckpoints(RunFolder(place.root), print) as checkpoints:
        for step in (4, 9):
            checkpoints.save(step, {})
    place.write("checkpoints/step-00000009.pt", b"damaged")
    run = RunFolder(place.root)
    with RunCheckpoints(run, print) as checkpoints:
        state, _ = checkpoints.read_newest()
        assert state is not None
        assert state["step"] == 4
        assert (run.checkpoints / "step-00000009.pt.damaged").read_bytes() == b"damaged"
        checkpoints.save(5, {})
    assert RunFolder(place.root).kept() == ["step-00000004.pt", "step-00000005.pt"]


def test_where_no_checkpoint_is_whole_the_next_attempt_does_not_start_from_scratch(place: Place) -> None:
    for step in (4, 9):
        place.write(f"checkpoints/step-{step:08d}.pt", b"damaged")
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint in"), RunCheckpoints(RunFolder(place.root), print) as kept:
            kept.read_newest()


def test_an_evaluation_leaves_a_damaged_checkpoint_where_it_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {})
    checkpoints.save(9, {}).write_bytes(b"damaged")
    state, _ = checkpoints.read_newest()
    assert state is not None
    assert state["step"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004.pt", "step-00000009.pt"]


def test_an_attempt_superseded_while_the_disk_refuses_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    older = RunCheckpoints(run, print)
    run.checkpoints.write_text("in the way of the folder")

    def pause(seconds: float) -> None:
        RunCheckpoints(RunFolder(tmp_path), print)
        run.checkpoints.unlink()

    monkeypatch.setattr(older, "pause", pause)
    with pytest.raises(Superseded):
        older.save(1, {})
    assert not run.checkpoints.exists()


@dataclass
class Held:
    """A store that answers no write while it is held."""

    closed: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(storage: Storage) -> Iterator[Held]:
    held = Held()

    def refuses(method: str, key: str) -> bool:
        if held.closed.is_set() and method in ("PUT", "POST"):
            held.asked.set()
            held.let_go.wait(60)
        return False

    storage.refuses = refuses
    yield held
    held.let_go.set()
    storage.refuses = lambda method, key: False


def test_the_last_push_beats(storage: Storage, monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(mirror, "BEAT_S", 0.02)
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        if held.asked.is_set():
            held.let_go.set()

    run = RunFolder(storage.uri("runs/beaten"))
    with RunCheckpoints(run, print, beat):
        (run.path / "metrics.jsonl").write_text("{}\n")
        held.closed.set()
    assert beats
    assert held.asked.wait(0)
    assert held.let_go.wait(0)  # by a beat, while the store was asked


def test_a_push_that_hangs_is_not_said_to_live(storage: Storage, monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(mirror, "BEAT_S", 0.05)
    monkeypatch.setattr(mirror, "SILENT_S", 0.3)
    beats: list[int] = []
    with RunCheckpoints(RunFolder(storage.uri("runs/hanging")), print, lambda: beats.append(1)) as checkpoints:
        held.closed.set()
        checkpoints.save(1, {})
        waiting = threading.Thread(target=checkpoints.wait)
        waiting.start()
        assert held.asked.wait(60)
        before = len(beats)
        time.sleep(2)
        after = len(beats)
        held.let_go.set()
        waiting.join()
    assert after - before <= 7  # 0.05 s and more lie between two; for ever would be 40


def test_a_run_beats_while_it_calibrates_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BEAT_S", 0.02)
    beaten = threading.Event()
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        beaten.set()

    def calibrated(*_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        assert beaten.wait(60)
        return {}, {}

    monkeypatch.setattr(worker, "calibrated", calibrated)
    monkeypatch.setattr(worker, "predictions", lambda outputs: None)
    monkeypatch.setattr(worker, "rank_shard", lambda *_: [])
    recipe = config.load("digits", [])
    trainer = SimpleNamespace(
        recipe=recipe,
        dataset=SimpleNamespace(validation=SimpleNamespace(indices=[]), test=SimpleNamespace(indices=[])),
        evaluator=SimpleNamespace(outputs=lambda loader, batches: None),
        loaders={"validation": None, "test": None},
        control=SimpleNamespace(beat=beat),
        rank=0,
        world=1,
    )
    worker.finish(trainer, None)  # type: ignore[arg-type]
    counted = len(beats)
    time.sleep(0.1)
    assert len(beats) == counted


def test_beats_go_on_for_no_longer_than_a_run_may_take_to_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BEAT_S", 0.05)
    monkeypatch.setattr(worker, "FINISHED_WITHIN_S", 0.3)
    beats: list[int] = []
    with worker.beating(lambda: beats.append(1)):
        time.sleep(1.5)
    assert len(beats) <= 6


@pytest.mark.parametrize(("error", "kept"), [(MemoryError, True), (Superseded, False)])
def test_what_did_not_reach_the_store_is_kept_unless_it_is_nobodys(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, error: type[Exception], kept: bool
) -> None:
    run = RunFolder(storage.uri(f"runs/unsent-{kept}"))
    checkpoints = RunCheckpoints(run, print)

    def raises(self: Place, path: str, content: bytes) -> None:
        raise error

    monkeypatch.setattr(Place, "write", raises)
    checkpoints.save(1, {})
    with pytest.raises(error):
        checkpoints.wait()
    checkpoints.__exit__(error, error(), None)
    run.discard()  # as the process does when it ends
    assert (run.checkpoints / "step-00000001.pt").is_file() == kept
    run.unsent = False
    run.discard()


def test_results_that_could_not_be_sent_are_kept(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(storage.uri("runs/unsent-results"))
    run.results.write_text("{}")

    def raises(self: Place, path: str, content: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(Place, "write", raises)
    with pytest.raises(MemoryError):
        run.push(run.results)
    run.discard()
    assert run.results.is_file()
    run.unsent = False
    run.discard()


def test_a_checkpoint_under_way_when_the_process_is_interrupted_is_kept(storage: Storage, held: Held) -> None:
    run = RunFolder(storage.uri("runs/interrupted"))
    checkpoints = RunCheckpoints(run, print)
    held.closed.set()
    checkpoints.save(1, {})
    checkpoints.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    run.discard()
    assert (run.checkpoints / "step-00000001.pt").is_file()
    run.unsent = False
    run.discard()


def test_a_lease_is_kept_while_its_holder_lives_and_taken_when_it_does_not(
    storage: Storage, quick: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = Place(storage.uri("runs/leased")), list[str]()
    first = Lease(place, said.append)
    first.acquire()
    with pytest.raises(UserError, match="in use by another process"):
        Lease(place, said.append).acquire()
    first.release()
    assert place.find(lease.LEASE) is None
    place.write(lease.LEASE, json.dumps({"token": "x", "host": "gone", "process": 7}).encode())
    second = Lease(place, said.append)
    second.acquire()
    second.release()
    assert [line for line in said if "held by process 7 on gone" in line] == said[1:]


def test_a_node_that_does_not_see_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 0)
    recipe = config.load("digits", [f"run.storage={tmp_path}", "run.name=n"])
    folder = RunFolder.of(recipe)
    with pytest.raises(UserError, match=rf"^run.storage={tmp_path}: node \S+ does not see the run"):
        folder.check_seen(recipe)
    folder.path.mkdir()
    folder.recipe.write_text(yaml.safe_dump(recipe.to_dict()))
    folder.check_seen(recipe)
    folder.recipe.write_text(config.override(recipe, ["train.epochs=3"]).to_yaml())
    with pytest.raises(UserError, match="does not see the run"):
        folder.check_seen(recipe)
