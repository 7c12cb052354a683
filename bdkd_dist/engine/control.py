"""How a running loop is watched, and how it is told what somebody outside wants of it."""

from enum import IntEnum


class Wish(IntEnum):
    """What somebody outside wants; where ranks are told different things the greatest is done."""

    GO_ON = 0
    CHECKPOINT = 1
    """Checkpoint now and go on: the machine may be taken away soon."""
    STOP = 2
    """Checkpoint now and end."""


class Control:
    """Nobody watches and nobody wants anything; launchers have kinds of their own."""

    def beat(self) -> None:
        """A step, or a batch of an evaluation, is done. Called often: it must cost nothing."""

    def wish(self) -> Wish:
        """Return what is wanted between these two steps; ``CHECKPOINT`` is said once."""
        return Wish.GO_ON
