"""A rank's line to the driver: a thread that says every second how far the rank is, and hears what is wanted of it."""

import os
import socket
import sys
import threading
import time
import traceback
from typing import Any

import ray

from bdkd_dist.engine.control import Control, Wish
from bdkd_dist.launch.relay import Beat

BEAT_S = 1.0
PACKAGE = f"{os.sep}bdkd_dist{os.sep}"


class Watch(Control):
    """The control of a rank under Ray Train.

    Args:
        relay: The actor that the driver listens to.
        rank: Of this worker.
        world_size: Of its group.
    """

    def __init__(self, relay: Any, rank: int, world_size: int):
        context = ray.get_runtime_context()
        # A group's workers share a placement group, and the next group has another.
        group = context.get_placement_group_id()
        self._beat = Beat(group, rank, world_size, context.get_node_id(), socket.gethostname(), os.getpid(), 0)
        self._relay = relay
        self._done = 0
        self._wish = Wish.GO_ON
        self._checkpointing = False
        threading.Thread(target=self._talk, name="watch", daemon=True).start()

    def beat(self) -> None:
        """See :meth:`Control.beat`."""
        self._done += 1

    def wish(self) -> Wish:
        """See :meth:`Control.wish`. Rank 0 speaks for all: the others might hear of it a step later."""
        if self._checkpointing:  # it was wished for the last time, and is there
            self._checkpointing = False
            self._relay.done.remote("checkpoint")
        wish = self._wish if self._beat.rank == 0 else Wish.GO_ON
        if wish == Wish.CHECKPOINT:
            self._wish, self._checkpointing = Wish.GO_ON, True
        return wish

    def is_current(self) -> bool:
        """Whether no other workers were started in place of this one's group."""
        return ray.get(self._relay.is_current.remote(self._beat.group))

    def _talk(self) -> None:
        while True:
            try:
                orders = ray.get(self._relay.beat.remote(self._beat._replace(done=self._done)))
            except ray.exceptions.ActorUnavailableError:  # the connection broke, and may come back
                time.sleep(BEAT_S)
                continue
            except Exception:  # the driver is gone, and Ray ends this process too
                return
            if "leave" in orders:
                os._exit(1)
            if "stacks" in orders:
                self._relay.show_stack.remote(self._beat.rank, stacks())
            if "stop" in orders:
                self._wish = Wish.STOP
            elif "checkpoint" in orders and self._wish == Wish.GO_ON:
                self._wish = Wish.CHECKPOINT
            time.sleep(BEAT_S)


def stacks() -> str:
    """Return what this process's threads that run this package's code are doing, the calling thread left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    shown = []
    for ident, frame in sys._current_frames().items():
        lines = traceback.extract_stack(frame)
        ours = [number for number, line in enumerate(lines) if PACKAGE in line.filename]
        if ours and ident != threading.get_ident():
            shown.append(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_list(lines[ours[0] :]))}")
    return "".join(shown)
