import errno
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from records_samples import RECIPE, eval_log, points, step_log
from small_disk import fill, small_disk

from bdkd_dist.errors import UserError
from bdkd_dist.records.growing_file import GrowingFile
from bdkd_dist.records.metric_lines import MetricLines
from bdkd_dist.records.tensorboard import TensorBoardObserver

FSYNC = os.fsync


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size_mib=1) as folder:
        yield folder


@pytest.mark.parametrize("observer_of", [MetricLines, lambda run: TensorBoardObserver(run, RECIPE)])
def test_a_full_disk_that_is_emptied_loses_and_doubles_no_record(
    disk: Path, tmp_path: Path, observer_of: type[MetricLines]
) -> None:
    def read(run: Path) -> object:
        if observer_of is MetricLines:
            return (run / "metrics.jsonl").read_bytes()
        return Counter(points(run / "tensorboard"))  # also finds a record that is not whole

    runs = [disk / "run", tmp_path / "run"]
    broken, unbroken = observers = [observer_of(run) for run in runs]
    for observer in observers:
        observer.start(0, 40)
        observer.stepped(step_log(1))
        observer.flush()
    before = read(runs[0])
    ballast = fill(disk)
    for step in range(2, 41):  # more than the page in which the file ends has room for
        for observer in observers:
            observer.stepped(step_log(step))
            if step % 10 == 0:
                observer.evaluated(eval_log(step))
    assert read(runs[0]) == before
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{runs[0]}/.* cannot be written \(.*No space left on device\)$"):
            broken.flush()
    ballast.unlink()
    broken.flush()
    unbroken.flush()
    assert read(runs[0]) == read(runs[1]) != before
    for observer in observers:
        observer.stepped(step_log(41))
        observer.close()
    assert read(runs[0]) == read(runs[1])


def test_closing_on_a_full_disk_leaves_whole_records_and_no_error(disk: Path) -> None:
    file = GrowingFile(disk / "records")
    file.write(b"a\n" * 10)
    file.flush()
    fill(disk)
    file.write(b"b\n" * 10_000)
    file.close()
    file.close()
    assert (disk / "records").read_bytes() == b"a\n" * 10


def test_what_a_failed_sync_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"of the run before\n")
    file = GrowingFile(path)
    file.write(b"durable\n")
    file.flush()
    file.write(b"lost\n")
    assert path.read_bytes().endswith(b"durable\nlost\n")

    def lose(descriptor: int) -> None:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"lost", b"\0\0\0\0"))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(UserError, match=r"records cannot be written .*Input/output error"):
        file.flush()
    monkeypatch.setattr(os, "fsync", FSYNC)
    file.write(b"later\n")
    file.flush()
    file.close()
    assert path.read_bytes() == b"of the run before\ndurable\nlost\nlater\n"


def test_a_descriptor_that_the_disk_no_longer_knows_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = GrowingFile(tmp_path / "records")
    stale, real = [file._descriptor], {name: getattr(os, name) for name in ("write", "fsync", "ftruncate")}

    def known(name: str, descriptor: int, *arguments: object) -> object:
        if descriptor in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real[name](descriptor, *arguments)

    for name in real:
        monkeypatch.setattr(os, name, lambda *arguments, name=name: known(name, *arguments))
    file.write(b"one\n")
    assert (tmp_path / "records").read_bytes() == b""
    stale.clear()
    file.write(b"two\n")
    file.flush()
    file.close()
    assert (tmp_path / "records").read_bytes() == b"one\ntwo\n"


def test_a_file_that_somebody_shortened_or_took_away_is_said_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records"
    file = GrowingFile(path)
    file.write(b"0123456789\n")
    file.flush()
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(-1))
    with pytest.raises(UserError, match="Bad file descriptor"):
        file.flush()
    monkeypatch.setattr(os, "fsync", FSYNC)
    os.truncate(path, 5)
    with pytest.raises(UserError, match=r"\(5 bytes long, where 11 were written\)$"):
        file.flush()
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        file.flush()
    assert not path.exists()
