"""What several files of tests share."""

import http.client
import os
import signal
from pathlib import Path

import pytest

# Tests send SIGINT to themselves and to processes of their own; whoever starts the tests in the background may ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                 if os.access(p, os.X_OK)), None)


class OnePiece(http.client.HTTPConnection):
    "Sends the head and the body of a request in one piece: no pause of the machine comes between them, and no time limit of a body."

    def send(self, data):
        self.pieces.append(data)

    def request(self, *args, **more):
        self.pieces = []
        super().request(*args, **more)
        self.connect()
        self.sock.sendall(b"".join(self.pieces))


def alive(pid):
    "Tell whether a process has not ended; one that nobody has asked for its status has."
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (ProcessLookupError, FileNotFoundError):
        return False


def pytest_collection_modifyitems(config, items):
    "Leave out the tests marked `long` unless `-m` speaks of them."
    if "long" not in (config.option.markexpr or ""):
        long = [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="module")
def browser():
    "A browser for the tests of one file: while it is open, Playwright's event loop counts as running, and `asyncio.run` is refused."
    if CHROMIUM is None:
        pytest.skip("no Chromium at /usr/bin/chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--font-render-hinting=none"])
        yield chromium
        chromium.close()
