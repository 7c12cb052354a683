"""Trying again what a storage refuses for a while."""

import time
from collections.abc import Callable
from typing import TypeVar

from bdkd_dist.errors import UserError

T = TypeVar("T")
STORAGE_PATIENCE_S = 600.0
"""For so long a run waits for its storage before it ends."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
SAID_EVERY_S = 30.0


def patiently(action: Callable[[], T], say: Callable[[str], None], pause: Callable[[float], object] = time.sleep) -> T:
    """Return what an action returns, trying it again, after pauses that double, while it raises UserError.

    Args:
        action: Reads or writes; may be done twice.
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
        except UserError as error:
            waited = time.monotonic() - began
            if waited + pause_s > STORAGE_PATIENCE_S:
                if not refused:
                    raise
                raise UserError(f"{error}; tried for {waited:,.0f} s") from None
            if waited - said >= SAID_EVERY_S:
                say(f"{error}; trying again, for {STORAGE_PATIENCE_S - waited:,.0f} s at most")
                said = waited
            refused = True
            pause(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            if refused:
                say(f"the storage answers again, after {time.monotonic() - began:,.0f} s")
            return result
