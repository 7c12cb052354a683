"""Processes below another one, some of which may end while one looks."""

from contextlib import suppress

import psutil


def below(pid: int, name: str) -> list[psutil.Process]:
    """Return the processes below one whose name holds a word."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in child.name():
                found.append(child)
    return found
