"""What tests of the web page do with it, in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from scripts.browser import Browser
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints

TABS_MAX = 200
# What is ordered, and how much of it has not been answered yet.
_PRESS_TWICE = """
const own = window.fetch;
window.unanswered = 0;
window.fetch = async (path, given) => {
  if ((given.method ?? "GET") === "GET") return own(path, given);
  window.unanswered += 1;
  const answer = await own(path, given);
  await answer.clone().text();
  setTimeout(() => { window.unanswered -= 1; });
  return answer;
};
const button = document.querySelector(arguments[0]);
button.click();
button.click();
"""
VIEWS = ("now", "experts", "transition", "decisions", "events", "health")
_SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}
AXE = Path(__file__).parent / "axe" / "axe.min.js"
_RUN_AXE = """
const shown = (node) => `${node.html.slice(0, 160)} ${node.failureSummary.slice(0, 200)}`;
const done = arguments[arguments.length - 1];
axe.run(document, { resultTypes: ["violations"] }).then(
  (found) => done(found.violations.map((one) => `${one.id}: ${one.help}: ${one.nodes.map(shown).join(" | ")}`)),
  (error) => done([String(error)]));
"""


@contextmanager
def two_of_four(model: Path, points: Failpoints, **settings: Any) -> Iterator[Deployment]:
    """Two replicas on four devices, with failpoints; stopped, with all its checks, at the end."""
    fixed = {**_SETTINGS, **settings, "failpoint_dir": points.folder}
    deployment = Deployment(model, replicas=2, devices=4, **fixed).wait_ready()
    try:
        yield deployment
        deployment.stop()
    finally:
        points.forget()
        deployment.discard()


class Page:
    """The page of one admin listener."""

    def __init__(self, browser: Browser, url: str, token: str) -> None:
        self.browser = browser
        self.url = url
        self.token = token

    @classmethod
    def after_another(cls, browser: Browser, url: str, token: str) -> Page:
        """One that is opened where another listener's was, which asks nothing more."""
        browser.open("about:blank")
        browser.forget_requests()
        page = cls(browser, url, token)
        page.open(forget=True)
        return page

    def open(self, view: str = "now", *, forget: bool = False) -> None:
        """Load it anew with the token in its address, and look at a view of live figures."""
        if forget:
            self.browser.open(self.url)
            self.browser.run("sessionStorage.clear(); localStorage.clear()")
        self.browser.open(f"{self.url}/#token={self.token}")
        self.wait_live()
        self.show(view)

    def show(self, view: str) -> None:
        """Go to a view by its link."""
        self.browser.one(f"nav a[data-view={view}]").click()
        self.browser.wait(lambda: self.browser.all(f"nav a[data-view={view}][aria-current=page]"), f"{view} is shown")

    def wait_live(self) -> None:
        """Until the scaler has answered."""
        self.browser.wait(lambda: self.said("#live") == "live", "the page is live")

    def wait_size(self, size: str) -> None:
        """Until the head tells of so many replicas."""
        self.browser.wait(lambda: self.said("#size").startswith(size), f"{size} in the head")

    def said(self, selector: str) -> str:
        """The text of the first element; empty where there is none that can be seen."""
        return next((found.text for found in self.browser.all(selector) if found.is_displayed()), "")

    def tiles(self) -> dict[str, dict[str, int]]:
        """By device, the numbers of each tile that is there."""
        script = "return [...document.querySelectorAll('.tile')].map((tile) => ({ ...tile.dataset }))"
        names = ("weights", "kv", "other", "free", "budget")
        return {tile["device"]: {name: int(tile[name]) for name in names} for tile in self.browser.run(script)}

    def figures(self) -> dict[str, float | None]:
        """By its column, each figure of the charts, as the API has told it."""
        script = "return [...document.querySelectorAll('.card [data-figure]')].map(({ dataset }) => ({ ...dataset }))"
        found: list[dict[str, str]] = self.browser.run(script)
        return {one["figure"]: float(one["value"]) if one["value"] else None for one in found}

    def type(self, selector: str, text: str) -> None:
        """Put `text` in the place of what is in a field."""
        field = self.browser.one(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str) -> None:
        """Press a button, or choose an option, as the page offers it."""
        found = self.browser.one(selector)
        self.browser.run("arguments[0].scrollIntoView({ block: 'center' })", found)
        found.click()

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        ActionChains(self.browser.driver).send_keys(*keys).perform()

    def press_twice(self, selector: str) -> None:
        """Press a button as who is not sure whether it was pressed. Waits until what is ordered so is answered."""
        self.browser.run(_PRESS_TWICE, selector)
        self.browser.wait(lambda: self.browser.run("return window.unanswered") == 0, "it is answered")

    def tab_to(self, selector: str) -> None:
        """Press Tab until the element has the focus. Fails where it does not come to it."""
        for _ in range(TABS_MAX):
            if self.browser.run("return document.activeElement.matches(arguments[0])", selector):
                return
            self.press(Keys.TAB)
        raise AssertionError(f"{TABS_MAX} times Tab did not come to {selector}")

    def violations(self) -> list[str]:
        """What axe finds wrong with the page as it is now."""
        self.browser.run(AXE.read_text(encoding="utf-8"))
        found: list[str] = self.browser.driver.execute_async_script(_RUN_AXE)
        return found

    def rows(self, selector: str) -> list[list[str]]:
        """The cells of a table's rows."""
        return [
            [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td")]
            for row in self.browser.all(f"{selector} tbody tr")
        ]

    def check_quiet(self) -> None:
        """Nothing was warned of, and nothing was asked of anybody but the listener."""
        complaints = [text for text in self.browser.complaints() if not _is_answer(text)]
        assert complaints == []
        assert self.browser.origins() == {self.url}


def _is_answer(complaint: str) -> bool:
    """A refusal that a test has asked for, or nobody who answers, which the browser mentions too."""
    return "Failed to load resource" in complaint or "net::ERR_" in complaint


def without(columns: dict[str, Any], row: int) -> dict[str, float | None]:
    """One row of GET /v1/series, by its columns."""
    return {name: values[row] for name, values in columns.items() if name not in ("at", "serving")}
