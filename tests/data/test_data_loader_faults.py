"""Loaders whose data, process, thread or library fails, and loaders that are left."""

import importlib.util
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loader_samples import (
    COUNT,
    assert_equal,
    every_loader,
    jpeg,
    make,
    needs_ffcv,
    order,
    picture,
    write_jpegs,
)

from bdkd_dist.data import jpeg as native_decoder
from bdkd_dist.data.augment import Transform
from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import DataError, open_loader
from bdkd_dist.errors import UserError


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton")


@every_loader
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_leaving_and_closing_end_threads_and_processes(kind: Any, threads: int, jpegs: Path) -> None:
    before = set(threading.enumerate())
    children = set(multiprocessing.active_children())
    loader = open_loader(kind, Beton(jpegs), make("resized", 48), threads)
    left = loader.batches(0, order(batch_size=1))
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_Epoch"]
    loader.close()
    del left
    wait_until(lambda: set(threading.enumerate()) <= before)
    wait_until(lambda: set(multiprocessing.active_children()) <= children)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def damaged(source: Path, target: Path, index: int, start: int, content: bytes) -> Path:
    """Copy a beton and overwrite bytes inside one of its JPEGs."""
    whole = bytearray(source.read_bytes())
    place = whole.find(Beton(source).encoded(index).tobytes()) + start
    whole[place : place + len(content)] = content
    target.write_bytes(whole)
    return target


NOISE = np.random.default_rng(0).integers(0, 256, 1200, dtype=np.uint8).tobytes()


@every_loader
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("start", "content"), [(0, bytes(64)), (650, NOISE), (20, bytes(1200))], ids=["header", "noise", "zeros"]
)
def test_a_damaged_jpeg_is_named(
    kind: Any, threads: int, start: int, content: bytes, jpegs: Path, tmp_path: Path
) -> None:
    path = damaged(jpegs, tmp_path / "damaged.beton", 17, start, content)
    loader = open_loader(kind, Beton(path), make("resized", 48), threads)
    with pytest.raises(DataError, match=r"damaged\.beton: sample 17 cannot be decoded") as caught:
        list(loader.batches(0, order()))
    assert "\n" not in str(caught.value)
    sound = [indices[indices != 17] for indices in order()[:1]]
    assert len(list(loader.batches(0, sound))) == 1
    loader.close()


@needs_ffcv
def test_jpegs_that_only_pillow_reads_are_loaded_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cmyk.beton"
    with BetonWriter(path, COUNT) as writer:
        for index in range(COUNT):
            pixels = picture(index)
            writer.append_jpeg(jpeg(pixels, "CMYK" if index == 5 else "RGB"), *pixels.shape[:2], label=0)
    transform = make("resized", 48)
    with caplog.at_level(logging.WARNING):
        loader = open_loader("ffcv", Beton(path), transform, 1)
        got = [batch for epoch in range(2) for batch in loader.batches(epoch, [np.array([5])])]
        loader.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: sample 5 is a damaged or unusual JPEG; Pillow decoded it"
    ]
    twin = open_loader("torch", Beton(path), transform, 1)
    assert_equal(got, [batch for epoch in range(2) for batch in twin.batches(epoch, [np.array([5])])])


@every_loader
def test_a_size_that_is_not_the_declared_one_is_named(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "declared.beton"
    with BetonWriter(path, 1) as writer:
        writer.append_jpeg(jpeg(picture(0)), 40, 30, label=0)
    loader = open_loader(kind, Beton(path), make("none", 32), 1)
    with pytest.raises(DataError, match=r"declared\.beton: sample 0 has 149x134 px, 40x30 were declared"):
        list(loader.batches(0, [np.array([0])]))
    loader.close()


@every_loader
@pytest.mark.timeout(60)
def test_any_exception_in_the_loader_reaches_the_caller(
    kind: Any, jpegs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("boom")

    loader = open_loader(kind, Beton(jpegs), make("resized", 48), 1)
    with monkeypatch.context() as patch:
        patch.setattr(Transform, "placements", fail)
        with pytest.raises(DataError, match=r"jpegs\d: .*boom"):
            list(loader.batches(0, order()))
    assert len(list(loader.batches(0, order()))) == len(order())
    loader.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_killed_process_reaches_the_caller(jpegs: Path) -> None:
    loader = open_loader("torch", Beton(jpegs), make("resized", 48), 2)
    reading = loader.batches(0, order(batch_size=2))
    next(reading)
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match=r"jpegs\d: loading failed: "):
        list(reading)
    assert len(list(loader.batches(0, order()))) == len(order())
    loader.close()


CTRL_C_AT_EVERY_MOMENT = """
import os, signal, sys, threading, time
from pathlib import Path

from bdkd_dist.data.beton import Beton
from bdkd_dist.data.loader import open_loader
from loader_samples import make, order


def descendants(pid):
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(child)


def press():
    while True:
        try:
            for pid in descendants(os.getpid()):
                os.kill(pid, signal.SIGINT)
                pressed.add(pid)
        except OSError:  # it ended since
            pass
        time.sleep(0.002)


if __name__ == "__main__":
    pressed = set()
    loader = open_loader("torch", Beton(Path(sys.argv[1])), make("resized", 48), 2)
    threading.Thread(target=press, daemon=True).start()
    batches = sum(1 for epoch in range(2) for _ in loader.batches(epoch, order()))
    print(batches, len(pressed) >= 4, signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ctrl_c_does_not_reach_the_processes_even_while_they_start(jpegs: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CTRL_C_AT_EVERY_MOMENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, script, jpegs], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    # At least the resource tracker, the fork server and both workers were pressed; the parent's mask is as before.
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{2 * len(order())} True set()\n", "")


def test_auto_takes_the_native_loader_where_it_loads(jpegs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> str:
        return type(open_loader("auto", Beton(jpegs), make("none", 48), 1)).__name__

    native = native_decoder.available() or importlib.util.find_spec("ffcv") is not None
    assert opened() == ("FFCVLoader" if native else "TorchLoader")
    monkeypatch.setitem(sys.modules, "bdkd_dist.data.ffcv_loader", None)
    assert opened() == "TorchLoader"


@pytest.mark.parametrize("ffcv", [None, object()], ids=["absent", "broken"])
def test_a_native_loader_that_does_not_load_is_a_users_mistake_to_ask_for(
    jpegs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ffcv: object
) -> None:
    monkeypatch.setitem(sys.modules, "bdkd_dist.data.ffcv_loader", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ffcv)
    assert type(open_loader("auto", Beton(jpegs), make("none", 48), 1)).__name__ == "TorchLoader"
    assert ("reading with torch's DataLoader" in caplog.text) == (ffcv is not None)
    with pytest.raises(UserError, match=r"data\.loader=ffcv: .*`bdkd doctor`.*data\.loader=torch reads the same files"):
        open_loader("ffcv", Beton(jpegs), make("none", 48), 1)
