"""A real browser for tests of a page: headless Chromium, spoken to through two pipes in its own debugging protocol.

    with Browser() as browser:
        browser.open(path, width=390, dark=True)
        browser.value("document.title")          # of an expression in the page
        browser.click("#reset")                  # by a CSS selector, with the mouse
        browser.requests, browser.errors         # what the page asked for, and what it complained about

No package is needed, only the browser: `apt install chromium`, or CHROMIUM=/path/to/chrome.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser():
    """The path of a Chromium. Raises FileNotFoundError that says what to do."""
    found = os.environ.get("CHROMIUM")
    for name in NAMES:
        found = found or shutil.which(name)
    if not found:
        raise FileNotFoundError("no Chromium: apt install chromium, or set CHROMIUM to the path of a browser")
    return found


class Browser:
    """One page of one headless Chromium."""

    def __enter__(self):
        self.profile = tempfile.mkdtemp()
        to_browser, self.out = os.pipe()
        self.inward, from_browser = os.pipe()
        command = [find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--hide-scrollbars", "--no-first-run", f"--user-data-dir={self.profile}", "about:blank"]

        def pass_pipes():
            # The browser reads from descriptor 3 and writes to 4; first away from where they may be by chance.
            source = os.dup(to_browser)
            sink = os.dup(from_browser)
            spare = [os.dup(source), os.dup(sink)]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, preexec_fn=pass_pipes, close_fds=False, **quiet)
        os.close(to_browser)
        os.close(from_browser)
        self.buffer = b""
        self.number = 0
        self.session = None
        self.requests = []
        self.errors = []
        targets = self.call("Target.getTargets")["targetInfos"]
        [page] = [target for target in targets if target["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inward)
        shutil.rmtree(self.profile, ignore_errors=True)

    # The protocol: JSON objects that end with a zero byte -------------------------------------------------------------

    def call(self, method, **parameters):
        """Ask for something and wait for the answer, a dict."""
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters)
        if self.session:
            message["sessionId"] = self.session
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self.out, rest) :]
        while True:
            answer = self.receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def receive(self):
        """The next message; what it tells of requests and errors is noted."""
        while b"\0" not in self.buffer:
            piece = os.read(self.inward, 2**20)
            assert piece, "the browser has ended"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self.note(message.get("method"), message.get("params"))
        return message

    def note(self, method, found):
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(found["args"])[:500])
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {found['message']}")

    # What a test does -------------------------------------------------------------------------------------------------

    def open(self, path, width=1280, height=900, dark=False):
        """Open a file and wait until its scripts are done -> seconds that took."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        started = time.perf_counter()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait_for("document.documentElement?.dataset.ready === 'yes'")
        return time.perf_counter() - started

    def value(self, expression):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait_for(self, expression, seconds=60):
        """Wait until an expression is true."""
        end = time.perf_counter() + seconds
        while not self.value(expression):
            assert time.perf_counter() < end, f"never true: {expression}; {self.errors}"
            time.sleep(0.02)

    def place(self, selector):
        """The middle of an element, after scrolling it into view: (x, y)."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return box[0], box[1]

    def point_at(self, selector):
        """Move the mouse to an element."""
        x, y = self.place(selector)
        self.move(x, y)

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """Click on an element with the mouse."""
        x, y = self.place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def choose(self, selector, value):
        """Set an input, a select or a box, as a user does."""
        name = "checked" if isinstance(value, bool) else "value"
        self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.{name} = {json.dumps(value)};"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )
        time.sleep(0.12)  # a search waits until the typing stops

    def texts(self, selector):
        """The texts of all elements that a selector finds."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def rows(self, selector):
        """The body of a table: a list of texts for every row."""
        rows = f"[...document.querySelectorAll({json.dumps(selector + ' tbody tr')})]"
        return self.value(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))")

    def screenshot(self, path, full=False):
        """Write what is to be seen, or the whole page, as a PNG file."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(found["data"]))
