"""An actor between rank 0 and the driver. It imports next to nothing: its process starts quickly."""


class Relay:
    """Carries what rank 0 says to the driver, and the driver's wish to stop to the ranks."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, bytes]] = []
        self._stop = False

    def tell(self, method: str, arguments: bytes) -> None:
        """Keep a call for the driver; its pickled arguments are not opened here."""
        self._calls.append((method, arguments))

    def drain(self) -> list[tuple[str, bytes]]:
        """Return the calls since the last time, oldest first."""
        calls, self._calls = self._calls, []
        return calls

    def request_stop(self) -> None:
        """Ask the ranks to checkpoint and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether the driver wants the run stopped."""
        return self._stop
