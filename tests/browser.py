"""A real browser without a window, spoken to through its DevTools pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT_S = 120
needs_browser = pytest.mark.skipif(BINARY is None, reason="no browser here: apt-get install chromium")


class Tab:
    """An open page.

    Attributes:
        errors: What the page threw, and what the console says of errors and of things the page may not do.
        requests: Addresses that it asked for.
    """

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from, self._buffer = to_browser, from_browser, b""
        self._number, self._session = 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a DevTools command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def show(self, path: Path, width_px: int = 1280, dark: bool = False) -> None:
        """Open a file in a window of that width, and wait until it is there."""
        self.resize(width_px, dark)
        self._loaded = False
        self.requests.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def resize(self, width_px: int, dark: bool = False) -> None:
        """Change the window's width and the colours that the user prefers."""
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """Return what an expression of JavaScript comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def dom(self) -> str:
        """Return the page as it is now."""
        return self.run("document.documentElement.outerHTML")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key where the focus is."""
        of_key = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **of_key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **of_key)

    def click(self, selector: str) -> None:
        """Press the mouse's button in the middle of an element."""
        script = f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
        x, y = self.run(
            f"{script} const r = e.getBoundingClientRect(); return [r.x + r.width/2, r.y + r.height/2] }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """Write the page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], LIMIT_S)
            assert ready, "the browser says nothing"
            part = os.read(self._from, 2**20)
            assert part, "the browser is gone"
            self._buffer += part
        one, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(one)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(str(parameters["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])


@contextmanager
def browser() -> Iterator[Tab]:
    """Start the browser and open an empty tab; whatever runs in it ends with the block."""
    if BINARY is None:
        pytest.skip("no browser here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BINARY, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        commands, to_browser = os.pipe()
        from_browser, answers = os.pipe()
        # The browser reads its commands from descriptor 3 and answers on 4.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (commands, answers)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        process = subprocess.Popen(
            command,
            preexec_fn=place,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for descriptor in (commands, answers, *high):
            os.close(descriptor)
        try:
            yield Tab(to_browser, from_browser)
        finally:
            os.close(to_browser)  # its end of the pipe closes: it ends by itself
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(from_browser)
