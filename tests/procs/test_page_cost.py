"""What the web page asks for keeps to one budget of bytes in every view, whatever has to be told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.browser import Browser, why_not
from scripts.page_cost import VIEWS, wait_begun
from tests.procs.page import Page
from tests.procs.page_stage import staged
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

DEVICES = 384
MINUTE_BYTES_MAX = 200_000
PAUSE_MS_MAX = 15_000
LOOKS_MIN = 3  # in a minute: one each 15 seconds, were the machine not busy
MOVES_MIN = 6  # how often in a minute the progress of an operation is another one
DAY = "24 h"  # the view of now with all that there is of a day, which is read in this minute
# Large answers that change all the time: each is asked for again within the minute, at rest and while it grows.
AGAIN = {False: {"experts": "/v1/experts"}, True: {"transition": "/v1/operations/op-stage"}}
_BEGIN = """
performance.setResourceTimingBufferSize(5_000);
performance.clearResourceTimings();
window.begun = performance.now();
"""
_IS_OVER = "return performance.now() - window.begun > 60_000"
# How far the operation in progress is shown to be, from one look to the next.
_WATCH = """
const shown = () => document.querySelector(".progress progress")?.value;
window.moved = [shown()];
new MutationObserver(() => { if (shown() !== window.moved.at(-1)) window.moved.push(shown()); })
  .observe(document.body, { subtree: true, childList: true, attributes: true });
"""
# With the heads of answers, as large as the browser takes them to be. A stream of events has no entry.
_ASKED = """
const asked = performance.getEntriesByType("resource").filter((one) => one.responseEnd < window.begun + 60_000);
const told = asked.map((one) => `${Math.round(one.startTime - window.begun)} ms: ${one.name} ${one.transferSize}`);
const looks = asked.filter((one) => one.name.includes("/v1/now"));
return [document.hidden, asked.reduce((sum, one) => sum + one.transferSize, 0), looks.length, told];
"""
# Ten minutes of turns by a clock that needs none: a look in each, and a resource that is wanted again at once.
_PLAY = """
const [look, large, least, done] = arguments;
import("/page/budget.js").then(({ Budget }) => {
  let now = 0;
  const budget = new Budget(() => now);
  const [spent, pauses, reads] = [[], [], []];
  const charge = (bytes, isLarge) => { budget.charge(bytes, isLarge); spent.push([now, bytes]); };
  while (now < 600_000) {
    budget.begin();
    charge(look, false);
    if (large > 0 && budget.hasRoom(large)) { reads.push(now); budget.defer(large); charge(large, true); }
    pauses.push(budget.pauseMs);
    now += Math.max(least, budget.pauseMs);
  }
  const minute = (from) => spent.reduce((sum, [at, bytes]) => sum + (at >= from && at < from + 60_000 ? bytes : 0), 0);
  done([Math.max(...spent.map(([at]) => minute(at))), Math.max(...pauses), reads.length]);
}, (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def played(browser: Browser) -> Iterator[Browser]:
    """A browser that has the page's modules at hand."""
    with staged(1) as url:
        browser.open(url)
        yield browser


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_growing", [False, True], ids=["at rest", "growing"])
def test_no_view_of_hundreds_of_devices_asks_for_more_than_its_budget(is_growing: bool, tmp_path: Path) -> None:
    """Each view in a window of its own, for a minute after what it had to begin with. In that minute a day of figures
    comes to who opens it, and an operation's progress is renewed every few seconds."""
    states = ("growing",) if is_growing else ()
    with staged(DEVICES, *states) as url, Browser(tmp_path / "browser") as browser:
        driver, windows = browser.driver, {}
        for view in (*VIEWS, DAY):
            driver.switch_to.new_window("window")
            windows[view] = driver.current_window_handle
            page, name = Page(browser, url, "stage"), "now" if view == DAY else view
            page.open(name)
            wait_begun(browser, name)
            browser.run(_BEGIN)
            if view == DAY:
                page.choose(".group button:last-child")
            if view == "transition" and is_growing:
                browser.run(_WATCH)
        for view, window in windows.items():
            driver.switch_to.window(window)
            wait_until(lambda: browser.run(_IS_OVER), f"a minute of {view}", 120)
            if view == DAY:
                browser.wait(lambda: "Loading" not in browser.text(), "the day is drawn")
            is_hidden, nbytes, looks, asked = browser.run(_ASKED)
            assert not is_hidden, view
            assert nbytes <= MINUTE_BYTES_MAX, (view, nbytes, asked)
            assert looks >= LOOKS_MIN, (view, asked)
            if view in AGAIN[is_growing]:
                assert any(AGAIN[is_growing][view] in one for one in asked), (view, asked)
            if view == DAY:
                assert any("step_s=360" in one for one in asked), asked
            if view == "transition" and is_growing:
                assert len(browser.run("return window.moved")) > MOVES_MIN, asked


@pytest.mark.parametrize(
    ("look", "large", "least_ms", "reads_min"),
    [
        (9_800, 0, 1_000, 0),
        (9_800, 25_000, 1_000, 20),
        (9_800, 57_000, 1_000, 10),  # experts
        (9_800, 54_500, 300, 10),  # an operation
        (9_800, 122_000, 1_000, 5),  # a layout
        (9_800, 135_500, 1_000, 5),  # the same of more ranks
        (2_600, 0, 1_000, 0),
        (3_700, 0, 300, 0),
        (24_000, 0, 1_000, 0),
    ],
)
def test_no_minute_is_above_the_budget_and_no_look_is_put_off_for_long(
    played: Browser, look: int, large: int, least_ms: int, reads_min: int
) -> None:
    nbytes, pause_ms, reads = played.driver.execute_async_script(_PLAY, look, large, least_ms)
    assert nbytes <= MINUTE_BYTES_MAX
    assert pause_ms <= PAUSE_MS_MAX
    assert reads >= reads_min


def test_an_answer_above_a_minute_s_budget_is_paid_for_over_several(played: Browser) -> None:
    _, pause_ms, reads = played.driver.execute_async_script(_PLAY, 9_800, 1_000_000, 1_000)
    assert reads == 2
    assert pause_ms <= PAUSE_MS_MAX
