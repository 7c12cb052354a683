"""Pieces of a source convert as Ray tasks, on whatever nodes of a cluster are free.

A task whose worker dies is started again by Ray. What it had half written has another name than what is whole, so a
worker that still lives somewhere does no harm.
"""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import ray

from bdkd_dist.data.converting import BrokenImage, Converted, Task, Tell, convert
from bdkd_dist.data.prepare import ConvertAll
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.launch import cluster

MAX_RETRIES = 3
"""How often a piece is begun again whose worker died."""
AHEAD = 4
"""So many batches of images are read before they are written."""
VISIBLE_WITHIN_S = 15.0
"""Network file systems show a new file to other nodes after some seconds."""


def on_ray(address: str) -> ConvertAll:
    """Return what converts pieces on a Ray cluster.

    Args:
        address: Of the cluster: ``auto``, ``HOST:PORT``, or ``local`` for one of this machine alone.
    """

    def convert_all(tasks: Sequence[Task], tell: Tell) -> list[Converted]:
        if not tasks:
            return []
        with cluster.connected(address):
            return _gather(tasks, tell)

    return convert_all


def _gather(tasks: Sequence[Task], tell: Tell) -> list[Converted]:
    """Start all tasks; see that each one's file is here; the first failure ends it."""
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_convert)
    pending = {remote.remote(task): position for position, task in enumerate(tasks)}
    done: dict[int, Converted] = {}
    while pending:
        (reference,), _ = ray.wait(list(pending), num_returns=1)
        position = pending.pop(reference)
        task = tasks[position]
        done[position], node = _result(reference, task)
        _see(task, done[position], node)
        tell(task.split, len(task.piece))
    return [done[position] for position in range(len(tasks))]


def _result(reference: Any, task: Task) -> tuple[Converted, str]:
    try:
        kind, value, node = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # our bug: Ray shows the trace of the worker
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{task.split}, piece {task.piece.name}: its worker died {MAX_RETRIES + 1} times ({first_line(error)}); "
            "what is whole is kept, the same command goes on"
        ) from None
    match kind:
        case "converted":
            return value, node
        case "broken":
            raise BrokenImage(value)
        case "system":
            raise OSError(*value)
    raise UserError(value)


def _convert(task: Task) -> tuple[str, Any, str]:
    """Convert a piece on some node; what a user can mend is returned, as Ray would wrap an exception in its trace."""
    node = socket.gethostname()
    if not task.path.parent.is_dir():
        return "mistaken", _invisible(task, f"the folder is not there on node {node}"), node
    try:
        with ThreadPoolExecutor(1) as decoder:
            return "converted", convert(task, decoder, AHEAD, lambda split, images: None, Event()), node
    except BrokenImage as error:
        return "broken", str(error), node
    except UserError as error:
        return "mistaken", f"{error} (node {node})", node
    except OSError as error:
        return "system", (error.errno, f"{error.strerror or first_line(error)} (node {node})"), node


def _see(task: Task, converted: Converted, node: str) -> None:
    """See that what another node wrote has arrived here."""
    deadline_s = time.monotonic() + VISIBLE_WITHIN_S
    while converted.part is not None:
        try:
            if task.path.stat().st_size == converted.part.bytes:
                return
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline_s:
            raise UserError(_invisible(task, f"{task.path.name}, which node {node} wrote, is not here"))
        time.sleep(0.2)


def _invisible(task: Task, what: str) -> str:
    folder = str(task.path.parent).removesuffix(".building")
    return f"{folder}: {what}; with --address the folder must lie on a file system that all nodes share"
