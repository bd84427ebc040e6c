"""A headless Chromium of this machine, driven through its chromedriver: for tests of the web page and for its pictures.

Nothing is downloaded: where one of the two programs is missing, `why_not` says so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 60.0
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server"),
)


def _find(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name)) is not None), None)


def why_not() -> str:
    """Why there is no browser here; empty where there is one."""
    if _find(*_BROWSERS) is None:
        return "no Chromium: install chromium"
    if _find("chromedriver") is None:
        return "no chromedriver: install chromium-driver"
    return ""


class Browser:
    """One window. For `with`. `home`: an empty folder for its profile."""

    def __init__(self, home: Path, width: int = 1280, height: int = 900) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = _find(*_BROWSERS) or ""
        for flag in (*_FLAGS, f"--user-data-dir={home}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium's does not work for root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(_find("chromedriver")))
        self._requested: list[str] = []
        self.size(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.driver.quit()

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Another size of what is seen, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def theme(self, name: str) -> None:
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Load a page anew, whatever is there."""
        self.driver.get("about:blank")
        self.driver.get(url)

    def wait(self, is_so: Callable[[], Any], what: str) -> Any:
        """What `is_so` returns once that is true. Raises TimeoutException with `what` and the page's text."""

        def tried(_: object) -> Any:
            try:
                return is_so()
            except StaleElementReferenceException:
                return None  # drawn anew meanwhile

        text = f"{what}; the page says:\n"
        try:
            return WebDriverWait(self.driver, WAIT_S, 0.2).until(tried)
        except Exception as error:
            raise AssertionError(text + self.text() + "\n" + "\n".join(self.complaints())) from error

    def all(self, selector: str) -> list[WebElement]:
        """Elements by a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The element, as soon as there is one that can be seen."""
        found: WebElement = self.wait(
            lambda: next((each for each in self.all(selector) if each.is_displayed()), None), f"{selector} is shown"
        )
        return found

    def text(self) -> str:
        """All that can be read."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the browser has warned of since the last call: violations of the content policy too."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Addresses that pages have asked for, since the beginning."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requested.append(message["params"]["request"]["url"])
        return self._requested

    def origins(self) -> set[str]:
        """Where they went; what needs no network (`data:`, and the browser's own `chrome:`) is left out."""
        split = [urlsplit(url) for url in self.requested()]
        return {f"{url.scheme}://{url.netloc}" for url in split if url.scheme not in ("data", "about", "chrome")}

    def forget_requests(self) -> None:
        """Count those from now on."""
        self.requested()
        self._requested.clear()
