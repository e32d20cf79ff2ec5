"""A page in headless Chromium, by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Tab": 9, "Enter": 13}


class Browser:
    """Chromium with one page. ``faults``: what it reported: exceptions, console errors, refused resources, and requests
    to any server but ``own``."""

    own = "file:"

    def __init__(self, folder: Path) -> None:
        (ours, theirs), (back, forth) = os.pipe(), os.pipe()  # we write to `theirs`' peer and read from `back`

        def place():  # Chromium reads from 3 and writes to 4
            for fd, high in ((ours, 40), (forth, 41)):
                os.dup2(fd, high)
            os.dup2(40, 3)
            os.dup2(41, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-dev-shm-usage", "about:blank"]
        self.process = subprocess.Popen(
            [PROGRAM, *options],
            pass_fds=(3, 4),
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(ours), os.close(forth)
        self.out, self.back, self.buffer, self.number = theirs, back, b"", 0
        self.faults, self.events, self.asked, self.session = [], [], {}, None
        (page,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.session = None
            self.call("Browser.close", limit=5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.out), os.close(self.back)

    def call(self, method: str, limit: float = 120, **parameters):
        """The result of a command; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        end = time.monotonic() + limit
        while (answer := self.receive(end)).get("id") != self.number:
            self.note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self, end: float) -> dict:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, end - time.monotonic()))
            if not ready or not (data := os.read(self.back, 1 << 20)):
                raise RuntimeError("Chromium does not answer")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.faults.append(parameters["exceptionDetails"].get("exception", parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.faults.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.faults.append(parameters["args"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith((self.own, "data:", "about:", "blob:")):
                self.asked[parameters["requestId"]] = url
                self.faults.append(url)
        elif method == "Network.loadingFailed" and parameters.get("blockedReason") == "csp":
            self.faults.remove(self.asked[parameters["requestId"]])

    def open(self, path: Path | str, width: int = 1280, height: int = 900, touch: bool = False) -> float:
        """Load a file or an address; the seconds until it is loaded and its first cards are there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.events, began = [], time.monotonic()
        self.call("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.note(self.receive(began + 120))
        return time.monotonic() - began

    def value(self, expression: str):
        """Of a JavaScript expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def key(self, name: str) -> None:
        """Press one of `KEYS`, or a character."""
        for kind in ("rawKeyDown" if name in KEYS else "keyDown", "keyUp"):
            about = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]} if name in KEYS else {"key": name}
            self.call("Input.dispatchKeyEvent", type=kind, **about)

    def until(self, expression: str, limit: float = 20) -> None:
        """Wait until a JavaScript expression is true. RuntimeError after ``limit`` seconds."""
        end = time.monotonic() + limit
        while not self.value(expression):
            if time.monotonic() > end:
                raise RuntimeError(f"not true within {limit} s: {expression}")
            time.sleep(0.02)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """x, y, width, height in the window, after scrolling it into view."""
        into_view = "e.scrollIntoView({block: 'center', behavior: 'instant'}); await frame(); await frame()"
        frame = "const frame = () => new Promise(requestAnimationFrame)"
        box = "const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
        script = f"const e = document.querySelector({selector!r}); {frame}; {into_view}; {into_view}; {box}"
        return tuple(self.value(f"(async () => {{ {script} }})()"))

    def click(self, selector: str) -> None:
        x, y, width, height = self.box(selector)
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x + width / 2, "y": y + height / 2}
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def drag(self, selector: str, share: float) -> None:
        """Press in the middle of an element and release at this share of its width."""
        x, y, width, height = self.box(selector)
        at = {"y": y + height / 2, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x + width / 2, **at)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * share, buttons=1, **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + width * share, **at)

    def swipe(self, selector: str, share: float) -> None:
        """`drag` by a finger."""
        x, y, width, height = self.box(selector)
        for kind, at in (
            ("touchStart", 0.5),
            ("touchMove", (0.5 + share) / 2),
            ("touchMove", share),
            ("touchEnd", None),
        ):
            points = [] if at is None else [{"x": x + width * at, "y": y + height / 2}]
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        options = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))
