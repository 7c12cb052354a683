"""Whose turn it is at a run: a lease on storage that knows no locks, and the newest attempt, which alone may write."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from bdkd_dist.data.sources.storage import Place
from bdkd_dist.engine.patience import patiently
from bdkd_dist.errors import Fault, UserError
from bdkd_dist.files import json_text

LEASE, ATTEMPT = "run.lock", "attempt.json"
REFRESH_S = 10.0
WATCH_S = 30.0
"""A lease that stays as it is for so long is nobody's any more. No clocks are compared."""
SETTLE_S = 1.0
"""Of two processes that take a lease at once, the later writer has it; so long the other may need to see that."""


class Superseded(Fault):
    """Another attempt at this run began: this one writes nothing more."""


class Lease:
    """A run's folder in a store, held against other processes while this one lives.

    Args:
        place: The run's folder.
        say: Told one line when there is something to wait for.
    """

    def __init__(self, place: Place, say: Callable[[str], None]):
        self._place, self._say = place, say
        self._owner = _myself()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease, watching first whether somebody who holds it still lives.

        Raises:
            UserError: Another process holds it, or the store cannot be written.
        """
        if (there := self._place.find(LEASE)) is not None:
            self._watch(there)
        self._write(0)
        time.sleep(SETTLE_S)
        if (there := self._place.find(LEASE)) is None or not self._mine(there):
            raise self._in_use(there)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back, if it is still this process's."""
        self._released.set()
        self._thread.join()
        try:
            if (there := self._place.find(LEASE)) is not None and self._mine(there):
                self._place.delete(LEASE)
        except UserError as error:
            self._say(f"{error}; the next command watches it for {WATCH_S:.0f} s")

    def _watch(self, there: bytes) -> None:
        self._say(f"{self._place.where()} is held by {_said(there)}: watching for {WATCH_S:.0f} s whether that lives")
        until = time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCH_S / 10))
            if (now := self._place.find(LEASE)) is None:
                return
            if now != there:
                raise self._in_use(now)

    def _refresh(self) -> None:
        count = 0
        while not self._released.wait(REFRESH_S):
            count += 1
            try:
                there = self._place.find(LEASE)
                if there is not None and not self._mine(there):
                    return  # taken over: what this one would write is refused by its attempt
                self._write(count)
            except UserError:
                pass  # who watches cannot read it either

    def _write(self, count: int) -> None:
        self._place.write(LEASE, json_text(self._owner | {"count": count}))

    def _mine(self, content: bytes) -> bool:
        return _parsed(content).get("token") == self._owner["token"]

    def _in_use(self, there: bytes | None) -> UserError:
        holder = "" if there is None else f" ({_said(there)})"
        return UserError(f"{self._place.where()} is in use by another process{holder}; choose another run.name")


class Attempt:
    """This process's try at a run. One that was given up for lost may live on: the newest alone may write.

    Args:
        place: The run's folder.
        say: Told one line when the storage refuses.
    """

    def __init__(self, place: Place, say: Callable[[str], None]):
        self._place, self._say = place, say
        self._myself = _myself()
        content = json_text(self._myself | {"began": datetime.now(UTC).isoformat(timespec="seconds")})
        patiently(lambda: place.write(ATTEMPT, content), say)

    def check(self) -> None:
        """Raise Superseded unless this is the newest attempt.

        Raises:
            UserError: The storage cannot be read.
        """
        there = self._place.find(ATTEMPT)
        if there is None:
            raise Superseded(f"{self._place.where()} was removed or emptied meanwhile; nothing more is written there")
        if _parsed(there).get("token") != self._myself["token"]:
            raise Superseded(
                f"{self._place.where()}: another attempt at this run began meanwhile ({_said(there)}); this one "
                "stops and writes nothing more there"
            )


def _myself() -> dict[str, Any]:
    return {"token": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _said(content: bytes) -> str:
    parsed = _parsed(content)
    return f"process {parsed.get('process', '?')} on {parsed.get('host', 'an unknown host')}"
