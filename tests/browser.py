"""A browser without a window, driven over the WebDriver protocol: as much of it as the tests of a page need."""

import base64
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import requests

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


class Browser:
    """Chromium with its driver, as a context manager; raises where a command fails."""

    def __enter__(self) -> "Browser":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy between this machine and itself
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._wait()
            switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
            logs = {"browser": "ALL", "performance": "ALL"}
            options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": switches}, "goog:loggingPrefs": logs}
            session = self.command("POST", "/session", {"capabilities": {"alwaysMatch": options}})
            self.url += f"/session/{session['sessionId']}"
        except BaseException:
            self.driver.kill()
            raise
        return self

    def _wait(self) -> None:
        for _ in range(100):
            try:
                return self.command("GET", "/status")
            except requests.ConnectionError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def __exit__(self, *_: object) -> None:
        try:
            self.command("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()

    def command(self, method: str, path: str, body: Any = None) -> Any:
        """One command of the protocol; returns its value."""
        answer = self.http.request(method, self.url + path, json=body if method == "POST" else None, timeout=60)
        value = answer.json()["value"]
        if not answer.ok:
            raise RuntimeError(f"{path}: {value['message']}")
        return value

    def open(self, page: Path) -> None:
        """Load a file from disk."""
        self.command("POST", "/url", {"url": page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """Run a function's body in the page and return its value."""
        return self.command("POST", "/execute/sync", {"script": script, "args": []})

    def tell(self, name: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.command("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def press(self, selector: str, *keys: str) -> None:
        """Focus an element and press keys, as a person without a mouse."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def click(self, selector: str) -> None:
        """Click in the middle of an element, where it is seen."""
        using = {"using": "css selector", "value": selector}
        (element,) = self.command("POST", "/element", using).values()
        self.command("POST", f"/element/{element}/click", {})

    def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """Show the page in a window of this size, by day or by night."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page, below the window too."""
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def console(self) -> list[str]:
        """What the page and the browser complained about since the last call."""
        return [entry["message"] for entry in self.command("POST", "/se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """Addresses asked for since the last call, of what is not inside the page."""
        events = [json.loads(e["message"])["message"] for e in self.command("POST", "/se/log", {"type": "performance"})]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]
