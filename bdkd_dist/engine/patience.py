"""Trying again what a storage refuses for a while."""

import time
from collections.abc import Callable
from typing import TypeVar

from bdkd_dist.errors import UserError, first_line

T = TypeVar("T")
STORAGE_PATIENCE_S = 600.0
"""For so long a run waits for its storage before it ends."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
SAID_EVERY_S = 30.0


def patiently(action: Callable[[], T], say: Callable[[str], None], pause: Callable[[float], object] = time.sleep) -> T:
    """Return what an action returns, trying it again, after pauses that double, while the storage refuses.

    Args:
        action: Reads or writes, and raises UserError or OSError where that is refused; may be done twice.
        say: Told one line at the first refusal, every half minute while it lasts, and when it is over.
        pause: Waits so many seconds.

    Raises:
        UserError: The last refusal, after :data:`STORAGE_PATIENCE_S`.
    """
    began, said, pause_s = time.monotonic(), -SAID_EVERY_S, FIRST_PAUSE_S
    refused = False
    while True:
        try:
            result = action()
        except (OSError, UserError) as error:
            reason = first_line(error)
            waited = time.monotonic() - began
            if waited + pause_s > STORAGE_PATIENCE_S:
                tried = f"; tried for {waited:,.0f} s" if refused else ""
                raise UserError(f"{reason}{tried}") from None
            if waited - said >= SAID_EVERY_S:
                say(f"{reason}; trying again, for {STORAGE_PATIENCE_S - waited:,.0f} s at most")
                said = waited
            refused = True
            pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            if refused:
                say(f"the storage answers again, after {time.monotonic() - began:,.0f} s")
            return result
