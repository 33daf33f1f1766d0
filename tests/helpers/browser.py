"""A real browser, and the page of `sssd space` as its visitor sees it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A headless Chromium that can reach this machine only; the test skips, and says so, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium is not here: install Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"),
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{switch}")
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield window
    finally:
        window.quit()


class SpacePage:
    """The page in a browser, loaded anew, with the answers to its first example there.

    Args:
        browser: of `chromium`.
        address: of the server.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address
        browser.get(address)
        self.wait(lambda: len(self.labels()) == 5)

    def wait(self, ready: Callable[[], Any]) -> Any:
        """What `ready` gives, once that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 60).until(lambda _: ready())

    def all(self, selector: str) -> list[Any]:
        """The elements of a CSS selector."""
        return list(self.browser.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """What stands in the first of them."""
        return str(self.all(selector)[0].text)

    def labels(self) -> list[str]:
        """The class that each exit and the ensemble answers."""
        script = "return [...document.querySelectorAll('#answers .card')].map(card => card.dataset.label)"
        return list(self.browser.execute_script(script))

    def verdict(self, number: int) -> str:
        """What the page says of early exit, once it says that the image leaves at this exit."""
        return str(self.wait(lambda: self.all(f'#answers .verdict[data-exit="{number}"]'))[0].text)

    def choose_example(self, number: int) -> None:
        """Clicks on one of the examples, and waits for other answers."""
        before = self.text("#answers")
        self.all("#examples .gallery-item")[number].click()
        self.wait(lambda: self.text("#answers") != before)

    def upload(self, file: Path) -> None:
        """Gives a file in the place of the image that is there."""
        self.all("#image button[aria-label='Remove Image']")[0].click()
        self.wait(lambda: self.all("#image input[type=file]"))[0].send_keys(str(file))

    def width_on(self, width: int, *, mobile: bool) -> int:
        """How wide the page is in a window, or on a phone, of this width."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wide = int(self.browser.execute_script("return document.documentElement.scrollWidth"))
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return wide

    def hosts(self) -> set[str]:
        """Where all that the page loaded came from, but for what it has in itself as a `data:` address."""
        names = self.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        return {"/".join(name.split("/")[:3]) for name in names if not name.startswith("data:")}

    def errors(self) -> list[str]:
        """What the browser's console tells as an error."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
