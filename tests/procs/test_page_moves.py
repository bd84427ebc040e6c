"""The web page while records and sequences move: who sends what to whom, as the plan in force has it, and whether
everybody can read it. Operations of a real deployment are held in their midst."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from scripts.browser import Browser, why_not
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.page import VIEWS, Page, two_of_four
from tests.procs.page_stage import MOVING, staged

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

PAIRS_SHOWN = 12  # services/scaler/page/moves.js
WIDTHS = (1280, 380)
THEMES = ("light", "dark")
_TABLE = """
const table = [...document.querySelectorAll("table")].find((one) => one.caption.textContent === arguments[0]);
const rows = table === undefined ? [] : [...table.tBodies[0].rows];
return rows.map((row) => [...row.cells].map((cell) => cell.textContent));
"""
_ARROWS = """
const arrows = [...document.querySelectorAll(arguments[0] + " path")];
return arrows.map(({ dataset }) => [dataset.from, dataset.to, dataset.records]);
"""
_NUMBERS = """
const [values, done] = arguments;
import("/page/format.js").then(({ bytes }) => done(values.map(bytes)), (error) => done([String(error)]));
"""


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("failpoints"))


@pytest.fixture(scope="module")
def deployment(model_folder: Any, points: Failpoints) -> Iterator[Deployment]:
    with two_of_four(model_folder("oracle"), points, granularity=1 << 20) as deployment:
        yield deployment


@pytest.fixture(autouse=True)
def nobody_is_held(points: Failpoints) -> Iterator[None]:
    """Whatever a test has held goes on when it has failed."""
    yield
    points.forget()


class Pair(NamedTuple):
    """What goes from one device to another, as a plan's copies have it; its bytes as the API tells them."""

    source: str
    target: str
    records: int
    experts: int
    bytes: int

    @property
    def arrow(self) -> list[str]:
        """As the page marks it."""
        return [self.source, self.target, str(self.records)]


def pairs_of(leg: dict[str, Any]) -> list[Pair]:
    """The largest pairs that the API tells, the largest first."""
    told = leg["moves"]
    records = Counter((source, target) for _, source, target in leg["copies"])
    experts = Counter((source, target) for name, source, target in leg["copies"] if name.startswith("expert."))
    assert (told["pairs"], told["records"], told["bytes"]) == (len(records), len(leg["copies"]), leg["bytes_copied"])
    assert len(told["moves"]) == min(50, told["pairs"])
    sizes = [size for *_, size in told["moves"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == told["bytes"] or told["pairs"] > 50
    for source, target, count, of_experts, _ in told["moves"]:
        assert (count, of_experts) == (records[source, target], experts[source, target])
    return [Pair(source or "checkpoint", *rest) for source, *rest in told["moves"]]


def in_bytes(page: Page, *values: int) -> list[str]:
    """As the page writes them."""
    texts: list[str] = page.browser.driver.execute_async_script(_NUMBERS, values)
    return texts


def plan_of(deployment: Deployment, **order: Any) -> dict[str, Any]:
    status, plan = deployment.admin_call("POST", "/v1/scale", {**order, "dry_run": True})
    assert status == 200, plan
    assert isinstance(plan, dict)
    return plan


def check_everybody_can_read(page: Page, what: str) -> None:
    """In both themes, wide and narrow: axe finds nothing, and nothing overflows."""
    browser = page.browser
    try:
        for theme in THEMES:
            browser.theme(theme)
            for width in WIDTHS:
                browser.size(width, 900)
                assert page.violations() == [], f"{what}, {theme}, {width}"
                assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), f"{what}, {width}"
    finally:
        browser.size(1280, 900)
        browser.theme("light")


def wait_moves(page: Page, plan: dict[str, Any], leg: int) -> None:
    """Until the operation in progress shows that leg's pairs, in words and as arrows."""
    pairs = pairs_of(plan["legs"][leg - 1])
    assert pairs, "something moves in it"
    sizes = in_bytes(page, *(pair.bytes for pair in pairs))
    expected = [[*pair.arrow, str(pair.experts), size] for pair, size in zip(pairs, sizes, strict=True)]
    legs = len(plan["legs"])
    caption = f"Leg {leg} of {legs}: records by device" if legs > 1 else "Records by device"
    seen: list[Any] = []

    def are_shown() -> bool:
        seen[:] = [page.browser.run(_TABLE, caption), page.browser.run(_ARROWS, ".moves")]
        return seen == [expected, [pair.arrow for pair in pairs]]

    try:
        page.browser.wait(are_shown, f"the pairs of leg {leg}")
    except AssertionError as error:
        raise AssertionError(f"{error}\nshown: {seen}\ntold: {expected}") from None


def wait_bytes(page: Page, deployment: Deployment, op_id: str) -> None:
    """Until the present leg's bytes, done and all, are the API's."""

    def are_told() -> bool:
        progress = deployment.admin(f"/v1/operations/{op_id}")["progress"]
        done, total = in_bytes(page, progress["bytes_done"], progress["bytes_total"])
        return f"{done} of {total} copied." in page.said(".moves .route-lead")

    page.browser.wait(are_told, "the bytes are the API's")


def preview(page: Page, replicas: int) -> None:
    page.show("transition")
    page.choose("#kind-replicas")
    page.type("#replicas", str(replicas))
    page.choose("#preview")
    page.browser.one("#scale")


def test_a_growth_shows_who_sends_what_from_leg_to_leg(page: Page, deployment: Deployment, points: Failpoints) -> None:
    plan = plan_of(deployment, replicas=3)
    preview(page, 3)
    assert len({pair.records for pair in pairs_of(plan["legs"][0])}) > 1, "one sends more than the other"
    assert page.browser.run(_ARROWS, ".plan") == [pair.arrow for leg in plan["legs"] for pair in pairs_of(leg)]
    check_everybody_can_read(page, "a plan's preview")
    points.arm("hmm.copy")
    points.arm("scaler.leg2.prepare.before")
    page.choose("#scale")
    points.wait_hit("hmm.copy", 60)
    op_id = deployment.admin("/v1/now")["operation"]
    wait_moves(page, plan, 1)
    wait_bytes(page, deployment, op_id)
    check_everybody_can_read(page, "an operation in progress")
    points.release("hmm.copy")
    points.wait_hit("scaler.leg2.prepare.before", 60)  # it gets no further before the next leg is held too
    points.arm("hmm.copy")
    points.release("scaler.leg2.prepare.before")
    points.wait_hit("hmm.copy", 60)
    wait_moves(page, plan, 2)
    wait_bytes(page, deployment, op_id)
    page.open("transition")  # what this page had seen is gone, and the layout is another one
    wait_moves(page, plan, 2)
    told = deployment.admin(f"/v1/operations/{op_id}/moves")
    assert told == {"op_id": op_id, "legs": [leg["moves"] for leg in plan["legs"]]}
    points.clear()
    assert deployment.wait_operation(op_id)["outcome"] == "done"
    assert deployment.admin(f"/v1/operations/{op_id}/moves")["legs"] is None
    page.browser.wait(lambda: page.browser.all(".operation[data-phase=done]"), "it is done")
    page.browser.wait(lambda: not page.said(".moves"), "nothing moves any more")
    check_everybody_can_read(page, "planned beside measured")


def test_what_was_ordered_elsewhere_is_shown(page: Page, deployment: Deployment, points: Failpoints) -> None:
    order = {"replicas": 4}
    plan = plan_of(deployment, **order)
    points.arm("hmm.copy")
    op_id = deployment.order(**order)
    points.wait_hit("hmm.copy", 60)
    page.show("transition")
    wait_moves(page, plan, 1)
    status, answer = deployment.admin_call("DELETE", f"/v1/operations/{op_id}")
    assert status == 202, answer
    points.clear()
    assert deployment.wait_operation(op_id)["outcome"] == "cancelled"


def test_a_removal_ordered_elsewhere_is_shown(page: Page, deployment: Deployment, points: Failpoints) -> None:
    if deployment.admin("/v1/now")["replicas"] == 2:
        assert deployment.scale(replicas=3)["outcome"] == "done"
    order = {"remove": ["r2"]}
    plan = plan_of(deployment, **order)
    page.show("transition")
    points.arm("hmm.copy")
    op_id = deployment.order(**order)
    points.wait_hit("hmm.copy", 60)
    wait_moves(page, plan, 1)
    points.clear()
    assert deployment.wait_operation(op_id)["outcome"] == "done"


def test_the_token_s_form_can_be_read_by_everybody(page: Page) -> None:
    page.browser.run("sessionStorage.clear()")
    page.browser.open(page.url)
    page.browser.one("#token")
    check_everybody_can_read(page, "the token's form")
    page.type("#token", "wrong")
    page.choose("form button")
    page.browser.wait(lambda: page.said("#token-refused"), "it is refused")
    check_everybody_can_read(page, "a refused token")


def test_a_stale_page_can_be_read_by_everybody(page: Page, deployment: Deployment) -> None:
    pid = deployment.pids["scaler"]
    os.kill(pid, signal.SIGSTOP)
    try:
        page.browser.wait(lambda: "Stale" in page.said("#stale"), "the page says that it is stale")
        check_everybody_can_read(page, "a stale page")
    finally:
        os.kill(pid, signal.SIGCONT)
    page.wait_live()


def test_hundreds_of_devices_can_be_read_by_everybody_in_every_view(browser: Browser) -> None:
    with staged(384, "growing") as url:
        page = Page.after_another(browser, url, "stage")
        for view in VIEWS:
            page.show(view)
            browser.wait(lambda: "Loading" not in browser.text(), "it is drawn")
            check_everybody_can_read(page, view)
        page.show("transition")
        headers = {"Authorization": f"Bearer {page.token}"}
        body = {"devices": [f"host:{number}" for number in range(384)], "dry_run": True}
        plan = httpx.post(f"{url}/v1/scale", headers=headers, json=body, timeout=60, trust_env=False).json()
        pairs = pairs_of(plan["legs"][0])
        assert len(pairs) > 2 * PAIRS_SHOWN
        told = plan["legs"][0]["moves"]
        browser.wait(lambda: len(browser.run(_ARROWS, ".moves")) == PAIRS_SHOWN, "the largest are shown")
        shown = browser.run(_TABLE, "Records by device")
        assert [row[:3] for row in shown] == [pair.arrow for pair in pairs[:PAIRS_SHOWN]]
        others = told["records"] - sum(pair.records for pair in pairs[:PAIRS_SHOWN])
        left = f"and {told['pairs'] - PAIRS_SHOWN} further pairs, with {others} records"
        assert page.said(".route-rest") == left
        moving = browser.one(".sequences")
        ranks = httpx.get(f"{url}/v1/now", headers=headers, timeout=60, trust_env=False).json()["ranks"]
        assert moving.get_attribute("data-moving") == str(sum(rank[5] for rank in ranks)) == str(len(MOVING))
        assert "others from 4 further devices" in moving.text
        check_everybody_can_read(page, "a growth of hundreds")
        page.check_quiet()
