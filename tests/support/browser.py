"""A headless Chromium under test, spoken to through its DevTools protocol: it waits for what a page shows instead of guessing how
long that takes."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import PATIENCE
from websockets.sync.client import ClientConnection, connect

CHROMIUM = Path("/usr/bin/chromium")
SECONDS = PATIENCE  # until a page shows what it must, on a busy machine


class Page:
    """The one page of a browser."""

    def __init__(self, socket: ClientConnection):
        self._socket, self._numbers = socket, itertools.count()

    def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(SECONDS))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def text(self) -> str:
        return str(self.value("document.body ? document.body.innerText : ''"))

    def until(self, *texts: str) -> str:
        """What the page shows once it shows all of these."""
        deadline = time.monotonic() + SECONDS
        while True:
            shown = self.text()
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < deadline, f"the page does not show {missing}, but\n{shown}"
            time.sleep(0.2)

    def until_true(self, expression: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, f"not true of the page: {expression}\n{self.text()}"
            time.sleep(0.2)

    def colours(self, selector: str) -> int:
        """Different colours in the part of the page that an element takes."""
        self.until_true(f"document.querySelector({selector!r})?.getBoundingClientRect().width > 100")
        box = self.value(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        clip = {name: box[name] for name in ("x", "y", "width", "height")} | {"scale": 1}
        picture = self._call("Page.captureScreenshot", format="png", clip=clip)["data"]
        count = f"""(async () => {{
            const picture = await createImageBitmap(await (await fetch("data:image/png;base64,{picture}")).blob());
            const canvas = new OffscreenCanvas(picture.width, picture.height), context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            return new Set(new Uint32Array(context.getImageData(0, 0, picture.width, picture.height).data.buffer)).size;
        }})()"""
        return int(self.value(count))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path, width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """`folder` holds its profile."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [CHROMIUM, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None, "chromium has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait()
