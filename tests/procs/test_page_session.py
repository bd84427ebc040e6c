"""The web page's token, and whose deployment a page shows that is left open while another one takes its place."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from scripts.browser import Browser, why_not
from tests.procs.page import Page
from tests.procs.page_stage import staged
from tests.procs.waiting import free_port

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

NO_TOKENS = ("“stage”", "stage\u200b", "schlüssel", "two words")


def wait_told(page: Page, num: int) -> None:
    """Until there are so many faults and events, and no others: as many as ranks of the stage have died."""

    def are_told() -> bool:
        return [row[1:3] for row in page.rows("main") if row[1:2] == ["rank exited"]] == [
            ["rank exited", f"r{replica}t0"] for replica in reversed(range(num))
        ]

    page.show("health")
    page.browser.wait(are_told, f"{num} faults")
    page.show("events")
    page.browser.wait(lambda: f"{num} events of {num}." in page.browser.text(), f"{num} events")


@pytest.mark.parametrize("way", ["its token is typed", "its address is opened", "it has the same token"])
def test_a_page_that_is_left_open_keeps_nothing_of_the_deployment_before(browser: Browser, way: str) -> None:
    """The next one's scaler begins at the same fencing epoch, so its events have the same names."""
    port = free_port()
    with staged(7, "token=one", "instance=i-one", port=port) as url:
        page = Page.after_another(browser, url, "one")
        page.wait_size("7 replicas")
        wait_told(page, 6)
    token = "one" if way == "it has the same token" else "two"
    with staged(2, f"token={token}", "instance=i-two", port=port):
        if way == "its token is typed":
            page.type("#token", token)
            page.choose("form button")
        elif way == "its address is opened":
            browser.driver.get(f"{url}/#token={token}")  # only what is behind `#` is another one: nothing is loaded
        page.wait_size("2 replicas")
        wait_told(page, 2)
        page.check_quiet()


def test_what_can_be_no_token_is_refused_wherever_it_stands(browser: Browser) -> None:
    with staged(1) as url:
        page = Page.after_another(browser, url, "stage")
        browser.run("sessionStorage.clear()")
        for token in NO_TOKENS:
            browser.open(url)
            page.type("#token", token)
            page.choose("form button")
            wait_refused(page, f"{url}/")
            for open_ in (browser.open, browser.driver.get):  # loaded anew, and with the page already there
                open_(f"{url}/#token={quote(token)}")
                wait_refused(page, f"{url}/#/now")
        page.type("#token", page.token)
        page.choose("form button")
        page.wait_size("1 replica")
        page.check_quiet()


def wait_refused(page: Page, address: str) -> None:
    """Until what was given is said to be no token, is not kept, and is not in the address any more."""
    page.browser.wait(lambda: page.browser.driver.current_url == address, address)
    page.browser.wait(lambda: "can be no token" in page.said("#token-refused"), "it is refused")
    assert page.browser.run("return sessionStorage.length") == 0
