"""How the web page draws: what costs a browser much is done once, and nothing that its content policy forbids."""

from __future__ import annotations

import pytest

from scripts.browser import Browser, why_not
from tests.procs.page import Page
from tests.procs.page_stage import staged

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

COLOURS = 3  # of a drawing of the map
MOVES = 50
# How often styles are worked out for one step by a key, and for many moves of the pointer within one cell.
_COUNT_STYLES = """
const canvas = document.querySelector("canvas.map");
const { left, top } = canvas.getBoundingClientRect();
const own = window.getComputedStyle;
let styles = 0;
window.getComputedStyle = (...given) => { styles += 1; return own.apply(window, given); };
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
const ofOne = styles;
for (let n = 0; n < arguments[0]; n += 1)
  canvas.dispatchEvent(new MouseEvent("mousemove", { clientX: left + 1 + (n % 2), clientY: top + 1 }));
window.getComputedStyle = own;
return [ofOne, styles - ofOne];
"""
_PATCH_TWICE = """
const done = arguments[arguments.length - 1];
import("/page/dom.js").then(({ h, patch }) => {
  const place = h("div", {});
  for (const width of ["10px", "20px"]) patch(place, h("p", { class: "wide", style: { width } }, width));
  const { style, textContent } = place.firstChild;
  done([style.width, textContent]);
}, (error) => done([String(error)]));
"""


def test_a_map_of_thousands_of_experts_works_its_colours_out_once(browser: Browser) -> None:
    """Also where nothing is known of their load, and while the pointer moves."""
    with staged(8, "idle") as url:
        page = Page.after_another(browser, url, "stage")
        page.show("experts")
        browser.wait(lambda: "expert 0: r0t0" in page.said("#expert-said"), "the map is drawn")
        assert "nothing is known of its load" in page.said("#expert-said")
        of_one, of_moves = browser.run(_COUNT_STYLES, MOVES)
        assert of_one == COLOURS, "not one for each expert"
        assert of_moves == COLOURS, "only the first move comes to another cell"
        assert "expert 0: r0t0" in page.said("#expert-said")
        page.check_quiet()


def test_a_style_that_changes_is_drawn_within_the_content_policy(browser: Browser) -> None:
    with staged(1) as url:
        page = Page.after_another(browser, url, "stage")
        assert browser.driver.execute_async_script(_PATCH_TWICE) == ["20px", "20px"]
        page.check_quiet()


def test_devices_that_have_failed_are_named_in_words(browser: Browser) -> None:
    """One that the layout uses, and one that it does not."""
    with staged(8, "failed=1,7") as url:
        page = Page.after_another(browser, url, "stage")
        browser.wait(lambda: "8 devices: 7 used, 0 free, 1 failed" in browser.text(), "all are counted")
        assert "failed" in page.said(".tile[data-device='host:7'][data-state=failed]")
        used = page.said(".tile[data-device='host:1'][data-state=used]")
        assert ("serves" in used, "failed" in used) == (True, True)
        assert "failed" not in page.said(".tile[data-device='host:0']")
        page.show("health")
        browser.wait(lambda: "failed: host:1, host:7" in browser.text(), "they are named")
        assert "host:1: its driver says that it is lost; host:7: its driver" in browser.text()
        assert page.violations() == []
        page.check_quiet()


def test_hundreds_of_devices_are_as_light_as_a_few(browser: Browser) -> None:
    with staged(384) as url:
        page = Page.after_another(browser, url, "stage")
        browser.wait(lambda: "384 devices: 336 used, 48 free" in browser.text(), "all are counted")
        assert 8 <= len(page.tiles()) <= 100
        browser.run("scrollTo(0, document.body.scrollHeight)")
        browser.wait(lambda: "host:383" in page.tiles(), "the last one is shown")
        assert "host:0" not in page.tiles()
        page.type("#device-filter", "host:200")
        browser.wait(lambda: [*page.tiles()] == ["host:200"], "one is left")
        assert page.violations() == []
        page.check_quiet()
