"""An actor between the ranks and the driver. It imports next to nothing: its process starts quickly."""

import time
from typing import NamedTuple


class Beat(NamedTuple):
    """What a rank says of itself every second."""

    group: str
    """The workers that started together."""
    rank: int
    world_size: int
    node: str
    """The node's id."""
    host: str
    pid: int
    done: int
    """Steps and batches of evaluations, since this worker started."""


class Workers(NamedTuple):
    """The workers as the driver sees them."""

    beats: dict[int, Beat]
    """The last of every rank that has started."""
    silent_s: float
    """Since any of them was heard."""
    idle_s: float
    """Since any of them had done something more, or since the last of them started."""

    @property
    def begun(self) -> bool:
        """Whether a step is done; before that data may have to be copied and networks compiled."""
        return any(beat.done for beat in self.beats.values())

    @property
    def complete(self) -> bool:
        """Whether all ranks have started."""
        return bool(self.beats) and len(self.beats) == next(iter(self.beats.values())).world_size


class Relay:
    """Carries what ranks say to the driver, and the driver's orders to the ranks."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, bytes]] = []
        self._groups: list[str] = []  # the last is the current one
        self._beats: dict[int, Beat] = {}
        self._heard_at_s = self._done_at_s = time.monotonic()
        self._orders: dict[int, set[str]] = {}
        self._awaited: set[str] = set()
        self._stop = False
        self._stacks: dict[int, str] = {}

    def tell(self, method: str, arguments: bytes) -> None:
        """Keep a call for the driver; its pickled arguments are not opened here."""
        self._calls.append((method, arguments))

    def drain(self) -> list[tuple[str, bytes]]:
        """Return the calls since the last time, oldest first."""
        calls, self._calls = self._calls, []
        return calls

    def beat(self, beat: Beat) -> set[str]:
        """Take a rank's beat; return what is ordered: ``stop``, ``checkpoint``, ``stacks``.

        Ranks of a group that another has followed are told ``leave``: they may have been cut off when it was made.
        """
        if beat.group not in self._groups:
            self._begin(beat.group)
        elif beat.group != self._groups[-1]:
            return {"leave"}
        self._heard_at_s = time.monotonic()
        before = self._beats.get(beat.rank)
        if before is None or before.done != beat.done:
            self._done_at_s = self._heard_at_s
        self._beats[beat.rank] = beat
        return self._orders.pop(beat.rank, set()) | ({"stop"} if self._stop else set())

    def is_current(self, group: str) -> bool:
        """Whether this group is the last that was heard of."""
        return self._groups[-1:] in ([], [group])

    def workers(self) -> Workers:
        """Return who has started, and for how long nothing was heard or done."""
        now_s = time.monotonic()
        return Workers(dict(self._beats), now_s - self._heard_at_s, now_s - self._done_at_s)

    def forget_workers(self) -> None:
        """The workers are lost: those that still live are told to leave."""
        self._begin("")

    def _begin(self, group: str) -> None:
        self._groups.append(group)
        self._beats, self._orders, self._stacks = {}, {}, {}
        self._awaited.clear()

    def order(self, what: str) -> None:
        """Tell every rank something once."""
        for rank in self._beats:
            self._orders.setdefault(rank, set()).add(what)
        if self._beats:
            self._awaited.add(what)

    def done(self, what: str) -> None:
        """Rank 0 has followed an order."""
        self._awaited.discard(what)

    def is_awaited(self, what: str) -> bool:
        """Whether rank 0 has an order that it has not followed yet."""
        return what in self._awaited

    def request_stop(self) -> None:
        """Ask the ranks to checkpoint and stop, those too that start from now on."""
        self._stop = True

    def show_stack(self, rank: int, stack: str) -> None:
        """Keep what a rank is doing."""
        self._stacks[rank] = stack

    def stacks(self) -> dict[int, str]:
        """Return what ranks were doing that were asked."""
        return dict(self._stacks)
