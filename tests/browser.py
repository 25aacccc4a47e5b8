"""A headless Chromium for the tests of pages; where there is none, they skip and say so.

It is Debian's (`apt-get install chromium chromium-driver`), driven through selenium, with a new empty profile.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

WIDTHS = (1280, 390)
THEMES = ("light", "dark")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    """A selenium driver, one for the tests of a module."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(f"{'chromium' if chromium is None else 'chromedriver'} is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in (*_ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with selenium.Chrome(options=options, service=selenium.ChromeService(driver)) as chrome:
        chrome.get("about:blank")  # the new tab's own page is left, and what it logged
        console(chrome), requests(chrome)
        yield chrome


def visit(browser, page: Path, width: int = 1280, theme: str = "light") -> None:
    """Open a page in a window of `width` pixels on a system with `theme`."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    browser.get(page.as_uri())


def console(browser) -> list[str]:
    """What the page wrote to the console since the last call, errors of loading included."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser) -> list[str]:
    """The addresses that were asked for since the last call, but for those of no network."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [url for url in found if not url.startswith(("file:", "data:", "chrome:"))]


def background(browser) -> tuple[int, ...]:
    """Red, green and blue of the page's background, 0 to 255."""
    text = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(","))


def screenshot(browser, path: Path) -> None:
    """The whole page, beyond the window."""
    size = browser.execute_script(
        "const e = document.documentElement; return [e.clientWidth, e.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    data = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(data["data"]))


def overflowing(browser) -> int:
    """Pixels by which the page is wider than its window."""
    return browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth")


def covering_labels(browser, selector: str) -> list[str]:
    """Pairs of texts in the visible pictures that match `selector` which lie on each other."""
    return browser.execute_script(
        """
        const found = [];
        for (const svg of document.querySelectorAll(arguments[0])) {
          if (!svg.getClientRects().length) continue;
          const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
          boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([two, b]) => {
            const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (across > 2 && down > 3) found.push(`${one} | ${two}`);
          }));
        }
        return found;
        """,
        selector,
    )
