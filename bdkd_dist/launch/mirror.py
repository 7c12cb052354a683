"""A run's state brought to a store while training goes on: records first, then the checkpoint that they reach to."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bdkd_dist.engine.checkpoint import KEPT, Checkpoints
from bdkd_dist.engine.patience import STORAGE_PATIENCE_S, patiently
from bdkd_dist.errors import UserError
from bdkd_dist.files import json_text
from bdkd_dist.launch.lease import Attempt, Superseded
from bdkd_dist.launch.run_folder import RunFolder
from bdkd_dist.records.tensorboard import EVENT_FILE, event_files

BEAT_S = 1.0
SILENT_S = STORAGE_PATIENCE_S + 300.0
"""A storage that neither takes nor refuses a file for so long hangs: who waits for it is no longer said to live."""
METRICS = "metrics.jsonl"
RECORDS = "records.json"
"""Names the event files that count: one that was sent under a new name does so once the old one does not."""


class RunCheckpoints(Checkpoints):
    """The checkpoints of one attempt at a run, on rank 0; those at a URI come and go through a :class:`Mirror`.

    Args:
        run: The run's folder.
        warn: Says one line to the person.
        beat: Called while there is something to wait for, a few times a minute at least.

    Raises:
        UserError: The storage cannot be written or read.
    """

    def __init__(self, run: RunFolder, warn: Callable[[str], None], beat: Callable[[], None] = lambda: None):
        super().__init__(run.checkpoints, warn, run.name)
        self._run, self._beat = run, beat
        self._attempt = Attempt(run.place, warn)
        self._mirror = Mirror(run, self._attempt.check, warn, beat) if run.is_remote else None

    def check(self) -> None:
        """See :meth:`Checkpoints.check`; raises Superseded where another attempt began."""
        patiently(self._attempt.check, self.warn, self.pause)

    def pause(self, seconds: float) -> None:
        """See :meth:`Checkpoints.pause`."""
        self._beat()
        super().pause(seconds)

    def set_aside(self, damaged: Sequence[Path]) -> None:
        """See :meth:`Checkpoints.set_aside`; those at a URI are removed there with the next one that is sent."""
        if damaged:
            self.check()
        for path in damaged:
            with suppress(OSError):
                path.rename(f"{path}.damaged")

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """See :meth:`Checkpoints.save`; returns before it has travelled, but not before the one before it has."""
        self.wait()
        path = super().save(step, state)
        if self._mirror is not None:
            self._mirror.push()
        return path

    def wait(self) -> None:
        """See :meth:`Checkpoints.wait`."""
        if self._mirror is not None:
            self._mirror.wait()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mirror is None:
            return
        in_order = kind is None or issubclass(kind, Exception)
        self._mirror.close(in_order)
        if in_order:  # Ray ends its processes without their own clearing up
            self._run.discard()


class _Record(NamedTuple):
    """A file of records, which only grows: what is in it now."""

    name: str
    size: int
    mtime_ns: int


class _Stopped(Exception):
    """The process ends: what is under way is left."""


class Mirror:
    """Brings what rank 0 writes in its working folder to the run's URI, one push at a time, beside the training.

    Each file is whole or absent there. A process that is killed at any moment leaves a state to go on from.

    Args:
        run: The run's folder, at a URI; what a run goes on from is brought here from it.
        check: Raises where this attempt may write no more.
        say: Says one line to the person.
        beat: Called every second of a wait, unless the storage hangs.
    """

    def __init__(
        self,
        run: RunFolder,
        check: Callable[[], None],
        say: Callable[[str], None],
        beat: Callable[[], None] = lambda: None,
    ):
        self._run, self._check, self._say, self._beat = run, check, say, beat
        self._sent: set[tuple[Any, ...]] = set()
        self._event_files: list[str] = []
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._heard_s = 0.0  # when the storage last took or refused something
        self._stop = threading.Event()
        self._pull()

    def push(self) -> None:
        """Send the records as they are now, then the checkpoints, in a thread."""
        self.wait()
        arguments = (self._records(), [path.name for path in event_files(self._run.tensorboard)], self._checkpoints())
        self._heard_s = time.monotonic()
        self._thread = threading.Thread(target=self._in_thread, args=arguments, name="mirror", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the push that is under way, and raise what ended it."""
        if self._thread is not None:
            while self._thread.is_alive():
                if time.monotonic() - self._heard_s < SILENT_S:
                    self._beat()
                self._thread.join(BEAT_S)
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def close(self, in_order: bool) -> None:
        """Send what was recorded since the last push and wait for it, or, not ``in_order``, leave all as it is."""
        if not in_order:
            self._stop.set()
            if self._thread is not None and self._thread.is_alive():
                self._run.unsent = True
        elif self._failure is None:
            self.push()
            self.wait()

    def _pull(self) -> None:
        """Bring records and the newest checkpoints here: what lies in the storage counts, not what lay here."""
        run, place = self._run, self._run.place
        for folder in (run.tensorboard, run.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        listed = patiently(lambda: place.find(RECORDS), self._say)
        if listed is not None:
            self._event_files = list(json.loads(listed)["event_files"])
        checkpoints = patiently(run.kept, self._say)[-KEPT:]
        names = [f"{run.tensorboard.name}/{name}" for name in self._event_files]
        run.fetch(METRICS, *names, *(f"{run.checkpoints.name}/{name}" for name in checkpoints), say=self._say)
        self._sent = {*self._records(), *self._checkpoints()}

    def _records(self) -> list[_Record]:
        """Return the files of records as they are, in the order in which they are sent."""
        metrics = self._run.path / METRICS
        return self._as_they_are([metrics] if metrics.is_file() else [], event_files(self._run.tensorboard))

    def _checkpoints(self) -> list[_Record]:
        return self._as_they_are(Checkpoints(self._run.checkpoints).paths())

    def _as_they_are(self, *paths: Sequence[Path]) -> list[_Record]:
        stats = [(path.relative_to(self._run.path).as_posix(), path.stat()) for path in chain(*paths)]
        return [_Record(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def _in_thread(self, *arguments: Any) -> None:
        try:
            self._send_all(*arguments)
        except _Stopped:
            pass
        except Superseded as error:  # what is here is nobody's any more
            self._failure = error
        except Exception as error:  # raised where the training waits for this
            self._run.unsent = True
            self._failure = error
            if isinstance(error, UserError):
                self._failure = UserError(
                    f"{error}; the last good checkpoint is kept, and the same command goes on from it; what could not "
                    f"be sent lies in {self._run.path} until then"
                )

    def _send_all(self, records: list[_Record], event_files: list[str], checkpoints: list[_Record]) -> None:
        for record in records:
            self._send(record)
        if event_files != self._event_files:
            self._write(RECORDS, json_text({"event_files": event_files}))
            self._event_files = event_files
        # Also those that an attempt sent which was killed before they counted.
        for name in set(self._try(self._sent_event_files)) - set(event_files):
            self._delete(f"{self._run.tensorboard.name}/{name}")
        for checkpoint in checkpoints:
            self._send(checkpoint)
        # Also those that an attempt which was given up for lost has sent meanwhile.
        kept = {Path(checkpoint.name).name for checkpoint in checkpoints}
        for name in set(self._try(self._run.kept)) - kept:
            self._delete(f"{self._run.checkpoints.name}/{name}")

    def _sent_event_files(self) -> list[str]:
        folder = self._run.place / self._run.tensorboard.name
        names = [file.path for file in folder.listing()[0]] if folder.is_folder() else []
        return [name for name in names if name.startswith(EVENT_FILE)]

    def _send(self, record: _Record) -> None:
        if record not in self._sent:
            with (self._run.path / record.name).open("rb") as file:
                self._write(record.name, file.read(record.size))
            self._sent.add(record)

    def _write(self, name: str, content: bytes) -> None:
        self._try(lambda: self._run.place.write(name, content))

    def _delete(self, name: str) -> None:
        self._try(lambda: self._run.place.delete(name))

    def _try(self, action: Callable[[], Any]) -> Any:
        """Return what an action returns, tried again as long as this attempt is the newest."""

        def checked() -> Any:
            self._heard_s = time.monotonic()
            self._check()
            return action()

        return patiently(checked, self._say, self._pause)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped
