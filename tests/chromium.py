"""A headless Chromium for tests of pages: what it shows, and what it asks the network for."""
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """One page, driven by Chromium's own protocol. `asked` are the addresses that it has asked for."""

    def __init__(self, profile: Path):
        assert PROGRAM is not None
        self.open_sockets = contextlib.ExitStack()
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                   "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = profile / "DevToolsActivePort"
        self.wait(lambda: port.exists() and port.read_text().count("\n"), "Chromium does not start")
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"))
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket = self.open_sockets.enter_context(connect(address, max_size=None, ping_interval=None, close_timeout=1))
        self.numbers, self.asked = itertools.count(), []
        self.call("Network.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"][:80])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def drop(self, file: Path, x: int = 200, y: int = 200) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def wait(self, true: Any, otherwise: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, otherwise
            time.sleep(0.05)

    def close(self) -> None:
        self.open_sockets.close()
        self.process.terminate()
        self.process.wait(timeout=30)
