"""A prepared folder: its manifest, and files that are verified once and again after every change."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_sources import noise

from bdkd_dist.data import prepared as room
from bdkd_dist.data import turns
from bdkd_dist.data.beton import BetonWriter
from bdkd_dist.data.prepared import MANIFEST, Part, Prepared, is_prepared, read_manifest, verify, write_manifest
from bdkd_dist.errors import UserError


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    splits: dict[str, tuple[Part, ...]] = {}
    for split, files in (("train", 2), ("test", 1)):
        parts: list[Part] = []
        for number in range(files):
            path = tmp_path / f"{split}-{number:05d}.beton"
            with BetonWriter(path, 3) as writer:
                for index in range(3):
                    writer.append_raw(noise(8, 8, seed=10 * len(splits) + 5 * number + index), index % 2)
            parts.append(Part(path.name, 3, path.stat().st_size, sum_of(path)))
        splits[split] = tuple(parts)
    write_manifest(Prepared(tmp_path, "f" * 64, ("a", "b"), splits))
    return tmp_path


def change_a_byte(path: Path) -> None:
    content = np.fromfile(path, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(path)


def test_what_is_written_is_read(folder: Path) -> None:
    found = read_manifest(folder)
    assert is_prepared(folder)
    assert not is_prepared(folder / "elsewhere")
    assert found.class_names == ("a", "b")
    assert [path.name for path in found.paths("train")] == ["train-00000.beton", "train-00001.beton"]
    assert [part.sha256 for part in found.parts] == [
        sum_of(path) for path in (*found.paths("train"), *found.paths("test"))
    ]


@pytest.mark.parametrize("name", ["../train-00000.beton", "/etc/passwd", "a/b.beton", ".verified.json", "", ".."])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"][1]["file"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(folder)


def test_the_content_depends_on_the_files_alone(folder: Path) -> None:
    found = read_manifest(folder)
    assert found.content == Prepared(Path("elsewhere"), "0", (), found.splits).content
    other = {**found.splits, "test": found.splits["train"][:1]}
    assert found.content != Prepared(folder, "0", (), other).content


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated or grown"),
        (change_a_byte, "was altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["cut", "byte", "gone"],
)
@pytest.mark.parametrize("name", ["train-00001.beton", "test-00000.beton"])
def test_damage_is_named_before_and_after_a_first_verification(folder: Path, name: str, damage, complaint: str) -> None:  # type: ignore[no-untyped-def]
    verify(read_manifest(folder))
    damage(folder / name)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name} {complaint}.*; delete the folder {folder}"):
            verify(read_manifest(folder))


def test_unchanged_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = room.sha256_of
    monkeypatch.setattr(room, "sha256_of", lambda path: (read.append(path.name), whole(path))[1])
    verify(read_manifest(folder))
    assert sorted(read) == ["test-00000.beton", "train-00000.beton", "train-00001.beton"]
    read.clear()
    verify(read_manifest(folder))
    assert read == []
    os.utime(folder / "train-00001.beton", ns=(0, 0))
    verify(read_manifest(folder))
    assert read == ["train-00001.beton"]


def test_workers_that_start_together_read_the_files_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    reading, waited = threading.Event(), threading.Event()
    whole = room.sha256_of

    def slowly(path: Path) -> str:
        read.append(path.name)
        reading.set()
        assert waited.wait(60)
        return whole(path)

    monkeypatch.setattr(room, "sha256_of", slowly)
    monkeypatch.setattr(turns.logger, "warning", lambda line, *said: waited.set())  # one waits for the other
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(verify, read_manifest(folder))
        assert reading.wait(60)
        second = pool.submit(verify, read_manifest(folder))
        first.result()
        second.result()
    assert sorted(read) == ["test-00000.beton", "train-00000.beton", "train-00001.beton"]


def test_files_that_may_only_be_read_are_read_once_on_a_node(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = room.sha256_of
    monkeypatch.setattr(room, "sha256_of", lambda path: (read.append(path.name), whole(path))[1])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("node")))
    with read_only(folder):
        verify(read_manifest(folder))
        assert len(read) == 3
        verify(read_manifest(folder))
        assert len(read) == 3
    assert not (folder / room.VERIFIED).exists()
    os.utime(folder / "train-00001.beton", ns=(0, 0))
    verify(read_manifest(folder))  # by whoever may write there
    read.clear()
    with read_only(folder):
        verify(read_manifest(folder))
    assert not read
    change_a_byte(folder / "test-00000.beton")
    with read_only(folder), pytest.raises(UserError, match="was altered"):
        verify(read_manifest(folder))


def test_a_file_system_without_locks_costs_a_look_and_no_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="no flock"), turns.turn_at(folder / "x", "nobody"):
        pass
    verify(read_manifest(folder))
    assert (folder / room.VERIFIED).exists()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount a folder over itself, so that not even root writes there."""
    mounts = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder])
    if os.geteuid() != 0 or any(subprocess.run(mount, capture_output=True).returncode for mount in mounts):
        pytest.skip("this machine does not let a test mount a folder")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"train-00000.beton": 3}'])
def test_stamps_that_cannot_be_read_only_cost_another_look(folder: Path, text: str) -> None:
    verify(read_manifest(folder))
    (folder / room.VERIFIED).write_text(text)
    verify(read_manifest(folder))
    change_a_byte(folder / "test-00000.beton")
    with pytest.raises(UserError, match="was altered"):
        verify(read_manifest(folder))


def test_a_manifest_of_another_format_is_named(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match=r"manifest\.json has format 99, this version reads 2"):
        read_manifest(folder)


def test_a_missing_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing: .* was not prepared to its end"):
        read_manifest(folder)
