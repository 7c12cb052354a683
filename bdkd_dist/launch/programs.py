"""The programs that are installed beside this one."""

import sys
from contextlib import suppress
from pathlib import Path


def beside(name: str) -> str:
    """Return how a person calls a program of this environment from the current folder."""
    program = Path(sys.executable).with_name(name)
    with suppress(OSError, ValueError):  # the folder may be gone; the program may lie elsewhere
        return str(program.relative_to(Path.cwd()))
    return str(program)
