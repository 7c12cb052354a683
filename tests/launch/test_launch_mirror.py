"""What a store holds when attempts at a run are cut off, hang, meet each other or come late: the mirror, the lease."""

import json
import os
import pickle
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from runs import event_points
from s3_server import Storage

from bdkd_dist import config
from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.checkpoint import Checkpoints
from bdkd_dist.engine.observer import StepLog
from bdkd_dist.errors import UnfitNode, UserError
from bdkd_dist.launch import lease, run_folder
from bdkd_dist.launch.lease import Lease, Superseded
from bdkd_dist.launch.mirror import RECORDS, RunCheckpoints
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.tensorboard import TensorBoardObserver


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
    with pytest.raises(UnfitNode, match=f"^run.storage={tmp_path}: the run that was begun there is not seen") as caught:
        folder.check_seen(recipe)
    assert caught.value.named == f"node {socket.gethostname()}: {caught.value}"
    caught.value.node = "elsewhere"  # another node raises it, this one says it
    assert pickle.loads(pickle.dumps(caught.value)).named == f"node elsewhere: {caught.value}"
    folder.path.mkdir()
    folder.recipe.write_text(yaml.safe_dump(recipe.to_dict()))
    folder.check_seen(recipe)
    folder.recipe.write_text(config.override(recipe, ["train.epochs=3"]).to_yaml())
    with pytest.raises(UnfitNode, match="is not seen"):
        folder.check_seen(recipe)
