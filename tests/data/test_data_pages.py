"""Pages read ahead: the right bytes, in bounded memory, and no hang whatever happens to a file."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdkd_dist.data.beton import Beton, BetonWriter
from bdkd_dist.data.loader import DataError
from bdkd_dist.data.order import quasi_random_order, rank_batches
from bdkd_dist.data.pages import Pages

PER_FILE = 30
MIB = 2**20


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of large images: about 7 samples a page of 2 MiB, 15 a page of 4 MiB."""
    return write(tmp_path_factory.mktemp("pages"))


def write(folder: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [folder / "train-00000.beton", folder / "train-00001.beton"]
    for number, path in enumerate(paths):
        with BetonWriter(path, PER_FILE, page_bytes=(2 + 2 * number) * MIB) as writer:
            for label in range(PER_FILE):
                writer.append_raw(generator.integers(0, 256, (300, 300 - label, 3), dtype=np.uint8), label)
    return paths


@pytest.fixture(scope="module")
def beton(paths: list[Path]) -> Beton:
    return Beton(*paths)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "bdkd-pages"]
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # those of the betons that the fixtures map


def cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def assert_right(beton: Beton, fetched: tuple[np.ndarray, np.ndarray], batch: np.ndarray) -> None:
    flat, offsets = fetched
    for index, offset in zip(batch, offsets, strict=True):
        assert np.array_equal(flat[offset : offset + beton.sizes[index]], beton.encoded(index))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 70), st.integers(1, 5), st.integers(1, 4), st.data())
def test_each_batch_finds_its_bytes_until_it_is_released(
    beton: Beton, seed: int, size: int, ahead: int, threads: int, data: st.DataObject
) -> None:
    batches = cut(np.random.default_rng(seed).permutation(2 * PER_FILE)[: data.draw(st.integers(1, 60))], size)
    with Pages(beton, batches, threads, ahead) as pages:
        open_batches: deque[tuple[int, tuple[np.ndarray, np.ndarray]]] = deque()
        for number in range(len(batches)):
            while len(open_batches) == ahead or (open_batches and data.draw(st.booleans())):
                oldest, fetched = open_batches.popleft()
                assert_right(beton, fetched, batches[oldest])  # not written over so far
                pages.release(oldest)
            open_batches.append((number, pages.fetch(number)))
        for late, fetched in open_batches:
            assert_right(beton, fetched, batches[late])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 6))
def test_memory_is_that_of_the_pages_in_use_and_ahead(beton: Beton, seed: int, size: int, ahead: int) -> None:
    batches = cut(np.random.default_rng(seed).permutation(2 * PER_FILE)[:40], size)
    used = [set(beton.pages[batch].tolist()) for batch in batches]
    most = 0
    for step in range(len(batches)):
        soon = set().union(*used[: step + ahead])
        most = max(most, len(soon & set().union(*used[step:])))
    pages = Pages(beton, batches, ahead_batches=ahead)
    assert pages.num_slots == most
    assert pages.slot_bytes == 4 * MIB


def test_samples_in_order_need_few_pages_and_read_each_once(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (read.append((args[0], args[2])), preadv(*args))[1])
    batches = cut(np.arange(2 * PER_FILE), 5)
    with Pages(beton, batches, ahead_batches=2) as pages:
        for number, batch in enumerate(batches):
            assert_right(beton, pages.fetch(number), batch)
            pages.release(number)
    assert pages.num_slots <= 3
    assert len(read) == len(set(read))


def test_a_rank_of_a_quasi_random_epoch_needs_its_share_of_pages() -> None:
    class Contents:
        """A large set's tables, without the images."""

        pages = np.repeat(np.arange(2000), 100)
        in_page = np.zeros(200_000, int)

        def page(self, number: int) -> tuple[Path, int, int]:
            return Path("x"), number * 8 * MIB, 8 * MIB

    order = quasi_random_order(np.arange(200_000), Contents.pages, 0, 0, 256)
    for world in (1, 4):
        pages = Pages(Contents(), rank_batches(order, 256, 1 % world, world))  # type: ignore[arg-type]
        assert pages.num_slots <= 1.3 * 256 / world


def test_the_memory_can_only_be_read_and_stays_the_same_array(beton: Beton) -> None:
    batches = cut(np.arange(20), 10)
    with Pages(beton, batches) as pages:
        first, second = pages.fetch(0)[0], pages.fetch(1)[0]
    assert first is second
    assert (first.dtype, first.ndim, first.flags.writeable) == (np.uint8, 1, False)


def test_no_batches_need_nothing(beton: Beton) -> None:
    with Pages(beton, []) as pages:
        assert pages.num_slots == 0


def test_too_many_open_batches_are_refused_instead_of_waited_for(beton: Beton) -> None:
    with Pages(beton, cut(np.arange(20), 5), ahead_batches=2) as pages:
        pages.fetch(0)
        pages.fetch(1)
        with pytest.raises(AssertionError, match="release"):
            pages.fetch(2)


def test_batches_are_released_in_order_once_they_were_fetched(beton: Beton) -> None:
    with Pages(beton, cut(np.arange(20), 5)) as pages:
        with pytest.raises(AssertionError):
            pages.release(0)
        pages.fetch(0)
        pages.fetch(1)
        with pytest.raises(AssertionError):
            pages.release(1)
        pages.release(0)
        pages.release(1)


def test_pages_are_read_ahead_of_fetches_and_no_further(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (read.add(args[2] // (2 * MIB)), preadv(*args))[1])
    one_a_page = np.array([int(np.flatnonzero(beton.pages == page)[0]) for page in np.unique(beton.pages[:PER_FILE])])
    assert len(one_a_page) >= 4
    batches = cut(one_a_page, 1)

    def settles_at(pages: set[int]) -> bool:
        deadline = time.monotonic() + 10
        while not read >= pages and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # time to read too much
        return read == pages

    number = [int(beton.page(int(beton.pages[sample]))[1] // (2 * MIB)) for sample in one_a_page]
    with Pages(beton, batches, ahead_batches=2) as pages:
        assert settles_at(set(number[:2]))
        pages.fetch(0)
        pages.release(0)
        assert settles_at(set(number[:3]))


def fetch_all(beton: Beton, batches: list[np.ndarray]) -> int:
    with Pages(beton, batches, ahead_batches=2) as pages:
        for number in range(len(batches)):
            try:
                fetched = pages.fetch(number)
            except DataError:
                with pytest.raises(DataError):
                    pages.fetch(number)  # again, and still no hang
                raise
            assert_right(beton, fetched, batches[number]) if number == 0 else None
            pages.release(number)
    return len(batches)


def test_a_file_cut_short_is_named_at_the_batch_that_needs_it(tmp_path: Path) -> None:
    paths = write(tmp_path)
    beton, batches = Beton(*paths), cut(np.arange(2 * PER_FILE), 10)
    length = 2 * 4 * MIB + 100
    os.truncate(paths[1], length)
    with pytest.raises(DataError, match=rf"{paths[1]} was cut short while it was read: it ends at byte {length}"):
        fetch_all(beton, batches)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_that_vanished_is_named(tmp_path: Path, lost: int) -> None:
    paths = write(tmp_path)
    beton = Beton(*paths)
    paths[lost].unlink()
    with pytest.raises(DataError, match=f"{paths[lost]} cannot be read: No such file or directory"):
        fetch_all(beton, cut(np.arange(2 * PER_FILE), 10))


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(5, "Input/output error"), "cannot be read: Input/output error"), (RuntimeError("bug"), "bug")],
)
def test_an_error_while_reading_reaches_the_batch_that_needs_the_page(
    beton: Beton, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    preadv = os.preadv

    def failing(descriptor: int, memory: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("00001.beton"):
            raise error
        return preadv(descriptor, memory, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with Pages(beton, cut(np.arange(2 * PER_FILE), PER_FILE)) as pages:
        assert_right(beton, pages.fetch(0), np.arange(PER_FILE))
        with pytest.raises(DataError, match=f"00001.beton.*{words}"):
            pages.fetch(1)


def test_short_reads_of_the_system_are_continued(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, memory, at: preadv(file, [memory[0][:300_007]], at))
    fetch_all(beton, cut(np.arange(2 * PER_FILE), 60))


def test_leaving_ends_threads_and_a_waiting_fetch_at_once(beton: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (gate.wait(5), preadv(*args))[1])  # a slow disk
    outcome: list[object] = []

    def consume(pages: Pages) -> None:
        try:
            outcome.append(pages.fetch(0))
        except DataError as error:
            outcome.append(error)

    with Pages(beton, cut(np.arange(20), 10)) as pages:
        consumer = threading.Thread(target=consume, args=(pages,))
        consumer.start()
        time.sleep(0.1)
        assert not outcome
        threading.Timer(0.2, gate.set).start()
        begin = time.monotonic()
    assert time.monotonic() - begin < 2  # the read that was under way, and no other
    consumer.join(2)
    assert isinstance(outcome[0], DataError)
