"""A headless Chromium over its DevTools pipe, with nothing but the standard library: for tests of pages."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--remote-debugging-pipe")  # fmt: skip
# What a reader sees of each figure: loaded, inside the window, nothing in front of its middle.
LOOK = """(() => {
  const seen = image => {
    image.scrollIntoView({block: 'center', behavior: 'instant'});
    const box = image.getBoundingClientRect();
    const x = (Math.max(box.left, 0) + Math.min(box.right, innerWidth)) / 2, y = box.top + box.height / 2;
    const front = document.elementFromPoint(x, Math.min(Math.max(y, 1), innerHeight - 1)) === image;
    return {name: image.alt, loaded: image.complete && image.naturalWidth > 0, left: box.left, right: box.right, front};
  };
  const figures = [...document.images].map(seen);
  window.scrollTo(0, 0);
  return {figures, window: innerWidth, page: document.scrollingElement.scrollWidth,
          heading: document.querySelector('h1')?.textContent};
})()"""


class Tab:
    """One tab. `problems`: uncaught exceptions, console errors, failed loads; `asked`: every address loaded."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers, self.number, self.session = commands, answers, 0, None
        self.rest = b""
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command; what happens in between is kept."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        text = json.dumps({"id": self.number, "method": method, "params": parameters, **session})
        data = text.encode() + b"\0"
        while data:
            data = data[os.write(self.commands, data) :]
        while True:
            message = self._message()
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def open(self, address: str, width: int, height: int, phone: bool = False) -> None:
        """Load a page in a window of this size, to its end."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)  # fmt: skip
        self.call("Page.navigate", url=address)
        while "Page.loadEventFired" not in self.events:
            self._message()

    def value(self, expression: str) -> Any:
        """What an expression of the page's language gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def shot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _message(self, patience_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\0" not in self.rest:
                assert selector.select(max(end - time.monotonic(), 0)), "the browser does not answer"
                piece = os.read(self.answers, 1 << 16)
                assert piece, "the browser is gone"
                self.rest += piece
        text, self.rest = self.rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, said: dict[str, Any]) -> None:
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(said["entry"]["text"]))
        elif method == "Network.loadingFailed":
            self.problems.append(str(said["errorText"]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(str(said["request"]["url"]))


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A browser with an empty profile, ended when done."""
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    shell = f'exec "$@" 3<&{their_in} 4>&{their_out}'  # the pipe's ends must be the descriptors 3 and 4
    command = ["bash", "-c", shell, "bash", str(BROWSER), *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(their_in, their_out), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(their_in)
    os.close(their_out)
    try:
        yield Tab(our_out, our_in)
    finally:
        os.close(our_out)  # the browser ends when its pipe does
        os.close(our_in)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
