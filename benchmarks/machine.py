"""What benchmarks share: two lines that say where a figure comes from, and a clock for work that takes turns."""

import datetime
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bdkd_dist.records.environment import environment

CPU = torch.device("cpu")
Work = Callable[[], object]


def header(command: str | None = None, *, threads: bool = False, packages: Sequence[str] = ()) -> str:
    """Return date, commit, hardware and versions, and the command as a person would type it.

    Args:
        command: By default the one that was typed.
        threads: Say how many of torch's this process has; for what it computes itself, on the CPU.
        packages: Further ones whose versions matter.
    """
    found = environment()
    versions = ", ".join([_versions(found), *(f"{name} {version(name)}" for name in packages)])
    on_threads = f", {torch.get_num_threads()} CPU threads" if threads else ""
    hardware = f"{_machine(found)}{on_threads}; {versions}"
    return (
        f"date: {datetime.date.today()}   commit: {_commit(found)}   hardware: {hardware}\n"
        f"command: {typed() if command is None else command}"
    )


def header_of(starts: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return :func:`header` of trainings that ran on several days, perhaps of several commits on several machines.

    Args:
        starts: The environment of each, as :func:`bdkd_dist.records.environment.environment` returns it.
        command: As a person would type it.
    """
    days = sorted({start["started"][:10] for start in starts})
    commits, machines = (
        Counter(map(said, starts)) for said in (_commit, lambda start: f"{_machine(start)}; {_versions(start)}")
    )
    return (
        f"date: {' to '.join(dict.fromkeys((days[0], days[-1])))}   commit: {_counted(commits, ', ')}   "
        f"hardware: {_counted(machines, ' | ')}\ncommand: {command}"
    )


def _commit(found: Mapping[str, Any]) -> str:
    git = found["code"]["git"] or {}
    return git.get("commit", "?")[:7] + (" with changes" if git.get("dirty") else "")


def _machine(found: Mapping[str, Any]) -> str:
    hardware = found["hardware"]
    gpus = [gpu["name"] for gpu in hardware["gpus"] or []]
    return " and ".join([f"{hardware['cpu']}, {hardware['usable_cores']} cores", *gpus])


def _versions(found: Mapping[str, Any]) -> str:
    installed = found["packages"]
    named = [f"{name} {installed[name]}" for name in ("torch", "ray", "ffcv") if installed[name]]
    return ", ".join([f"Python {found['python']}", *named])


def _counted(said: Counter[str], between: str) -> str:
    """Return what was said, with how often where it is not all the same."""
    counted = said.most_common()
    return between.join(f"{one} ({n} of {said.total()} starts)" if len(counted) > 1 else one for one, n in counted)


def typed() -> str:
    """Return this process's command, from the repository's root; of paths of this machine the last part."""
    threads = [f"OMP_NUM_THREADS={count}"] if (count := os.environ.get("OMP_NUM_THREADS")) else []
    script, *arguments = sys.argv
    said = [shlex.quote(Path(argument).name if argument.startswith("/") else argument) for argument in arguments]
    return " ".join([*threads, ".venv/bin/python", f"benchmarks/{Path(script).name}", *said])


def clock(device: torch.device = CPU) -> float:
    """Return the time in seconds once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Work, device: torch.device = CPU) -> float:
    """Return the seconds that work takes, on an idle device."""
    began = time.perf_counter()
    work()
    return clock(device) - began


def rounds(
    work: Mapping[str, Work],
    count: int,
    *,
    warm_up: int = 1,
    device: torch.device = CPU,
    after_each: Work = lambda: None,
) -> dict[str, list[float]]:
    """Return by name the seconds of each round; all take turns, so that a drift of the machine meets all alike.

    Args:
        work: By name, in the order of a round.
        count: Of the rounds that count.
        warm_up: Rounds before these, which compile and allocate.
        device: Where the work goes on when its call returns.
        after_each: Called after each work, outside its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warm_up + count):
        for name, run in work.items():
            taken = timed(run, device)
            if number >= warm_up:
                seconds[name].append(taken)
            after_each()
    return seconds
