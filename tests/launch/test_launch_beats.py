"""A run that waits for its storage or for its last figures says that it lives, and one that hangs does not."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from s3_server import Storage

from bdkd_dist import config
from bdkd_dist.launch import mirror, worker
from bdkd_dist.launch.mirror import RunCheckpoints
from bdkd_dist.launch.run_folder import RunFolder


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
        precise_evaluator=lambda: SimpleNamespace(outputs=lambda batches: None),
        loaders=dict.fromkeys(("validation", "test"), SimpleNamespace(batches=lambda epoch, indices: [])),
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
