"""A real Chromium without a package for it: its DevTools protocol over a pipe.

`chromium` is a fixture for test modules; it skips, with a reason, where there is none.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0
# Width, and whether it is dark: a phone and a desk.
SIZES = [(390, False), (390, True), (1200, False), (1200, True)]
# Every element with text of its own: its colours as they are computed, and how they contrast.
CONTRAST = """(() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const ratio = (one, other) => {
    const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const style = getComputedStyle(element);
    const own = [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    const told = (name, colour, by, on = element) =>
      found.push([name, by * ratio(parts(colour), ground(on))]);
    if (own) told(element.tagName, element.closest("svg") ? style.fill : style.color, 1);
    if (element.matches(".curve, .mark")) told("CURVE", style.stroke, 1.5);
    if (element.matches("button, select, input")) {
      told("EDGE", style.borderTopColor, 1.5, element.parentElement);
    }
  }
  return found;
})()"""


def browser() -> str | None:
    """The browser of this machine, or of ``DARE_AGG_CHROMIUM``."""
    named = os.environ.get("DARE_AGG_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """A Chromium with one tab for a module's tests."""
    program = browser()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name one: DARE_AGG_CHROMIUM")
    with Chromium.started(program) as found:
        yield found


class Chromium:
    """One tab of a headless browser."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._numbers = itertools.count(1)
        self._held = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []

    @classmethod
    @contextlib.contextmanager
    def started(cls, program: str) -> Iterator[Chromium]:
        """Start the browser, and end it with the context."""
        # The browser reads commands from its descriptor 3 and answers on 4.
        there_in, here_out = os.pipe()
        here_in, there_out = os.pipe()
        profile = tempfile.mkdtemp(prefix="dare-agg-chromium-")

        words = [
            program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", script, "_", str(there_in), str(there_out), *words],
            pass_fds=(there_in, there_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(there_in)
        os.close(there_out)
        try:
            found = cls(here_out, here_in)
            found._attach()
            yield found
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(here_out)
            os.close(here_in)
            shutil.rmtree(profile, ignore_errors=True)

    def call(self, method: str, **words: Any) -> dict[str, Any]:
        """One command; returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, (method, told["error"])
                result: dict[str, Any] = told["result"]
                return result
            self.events.append(told)
        raise TimeoutError(method)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser ended"
            self._held += piece
        text, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Go to a page and wait until it is drawn."""
        self.events.clear()
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.documentElement?.dataset.drawn === 'yes'")

    def eval(self, code: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, code: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.eval(f"Boolean({code})"):
            assert time.monotonic() < until, f"{code} is not so after {seconds:g} s"
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        """Press a key as a keyboard does."""
        words = {"key": key, "code": key, "windowsVirtualKeyCode": _CODES.get(key, 0)}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **words, **({"text": text} if text else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shown["data"]))

    def fetched(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        self.eval("1")
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]

    def complaints(self) -> list[str]:
        """Errors of scripts and of the page's policy since it was opened."""
        self.eval("1")
        found = []
        for event in self.events:
            words = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(words["exceptionDetails"].get("exception", words)))
            if event.get("method") == "Log.entryAdded" and words["entry"]["level"] == "error":
                found.append(words["entry"]["text"])
        return found


_CODES = {
    "Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
    "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
