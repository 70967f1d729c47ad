"""What several files of tests share."""

import os

import pytest

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                 if os.access(p, os.X_OK)), None)


def pytest_collection_modifyitems(config, items):
    "Leave out the tests marked `long` unless `-m` speaks of them."
    if "long" not in (config.option.markexpr or ""):
        long = [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def browser():
    "A browser: one for all tests of a worker, since two of Playwright's loops cannot run in one thread."
    if CHROMIUM is None:
        pytest.skip("no Chromium at /usr/bin/chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--font-render-hinting=none"])
        yield chromium
        chromium.close()
