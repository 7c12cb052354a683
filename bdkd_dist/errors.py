"""How a command ends other than well, said in one line; whatever else is raised is a bug of ours, and a trace."""

import difflib
import socket
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: exit status 2."""


class UnfitNode(UserError):
    """A node lacks what a run needs there, and other nodes may have it.

    Attributes:
        node: Its name: the one where this was raised.
    """

    def __init__(self, line: str):
        super().__init__(line)
        self.node = socket.gethostname()

    @property
    def named(self) -> str:
        """The line, with the node's name before it."""
        return f"node {self.node}: {self}"


class Fault(RuntimeError):
    """Something broke that is neither the user's mistake nor a bug: exit status 1."""


class Interruption(Exception):
    """A run or a search was asked to stop, and the same command goes on: exit status 130."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed spelling, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, word: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the allowed ones, with the nearest right spelling."""
    allowed = sorted(allowed)
    return UserError(f"unknown {kind} '{word}'{nearest(word, allowed)} (allowed: {', '.join(allowed)})")


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
