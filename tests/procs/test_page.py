"""The web page in a real browser, before a real deployment: what it shows is what the API tells, what it orders is
done, and it outlives what happens to the scaler. One deployment for all views."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from elasticmoe.services.scaler.api.event_stream import LISTENERS_MAX
from scripts.browser import why_not
from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.page import VIEWS, Page, two_of_four, without
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

SEEN = """const at = document.activeElement;
return at === document.body || getComputedStyle(at).outlineStyle !== "none";"""


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("failpoints"))


@pytest.fixture(scope="module")
def deployment(model_folder: Any, points: Failpoints) -> Iterator[Deployment]:
    with two_of_four(model_folder("oracle"), points) as deployment:
        yield deployment


def test_the_token_is_asked_for_once_and_stays_in_the_tab(page: Page) -> None:
    browser = page.browser
    assert browser.driver.current_url == f"{page.url}/#/now"  # what brought the token is gone
    browser.run("sessionStorage.clear()")
    browser.open(page.url)
    page.type("#token", "wrong")
    page.choose("form button")
    browser.wait(lambda: "not the deployment's" in page.said("#token-refused"), "a wrong token is refused")
    assert browser.run("return sessionStorage.length") == 0
    page.type("#token", page.token)
    page.choose("form button")
    page.wait_live()
    browser.open(f"{page.url}/#/health")  # in the same tab
    page.wait_live()
    assert page.said("nav [aria-current]") == "Health"
    assert not any(page.token in url for url in browser.requested() if "#token=" not in url)
    assert browser.run("return document.cookie") == ""


def test_the_launcher_prints_the_page_s_address_and_the_token_on_terminals_only(deployment: Deployment) -> None:
    assert f"web page            {deployment.admin_url}/  (asks for the token)" in deployment.output()
    kept = [deployment.output(), *(path.read_text(errors="replace") for path in deployment.run_dir.glob("logs/*"))]
    assert not any(deployment.token in text for text in kept)


def test_what_now_shows_is_what_the_api_tells(page: Page, deployment: Deployment) -> None:
    devices = deployment.admin("/v1/devices")["devices"]
    expected = {one["device"]: {k: v for k, v in one["memory"].items() if k != "total"} for one in devices}
    page.browser.wait(lambda: page.tiles() == expected, "tiles are the API's devices")
    states = {one["device"]: one["state"] for one in devices}
    shown = page.browser.run("return [...document.querySelectorAll('.tile')].map(({ dataset }) => ({ ...dataset }))")
    assert {tile["device"]: tile["state"] for tile in shown} == states

    def is_a_row() -> bool:
        """The page is up to some seconds behind; what it shows is one of the last rows."""
        figures = page.figures()
        columns = deployment.admin("/v1/series")["columns"]
        last = range(max(0, len(columns["at"]) - 20), len(columns["at"]))
        return any(without(columns, row) == figures for row in last)

    page.browser.wait(is_a_row, "the figures are the series'")
    page.type("#device-filter", "r1t0")
    page.browser.wait(lambda: [*page.tiles()] == ["host:1"], "the filter leaves one tile")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_every_view_can_be_read_by_everybody(page: Page, theme: str, width: int) -> None:
    browser = page.browser
    browser.theme(theme)
    browser.size(width, 900)
    try:
        for view in VIEWS:
            page.show(view)
            browser.wait(lambda: "Loading" not in browser.text(), "it is drawn")
            assert page.violations() == [], view
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), view
    finally:
        browser.size(1280, 900)
        browser.theme("light")


@pytest.mark.parametrize(
    ("view", "own"),
    [
        ("now", ("24 h", "device-filter")),
        ("events", ("event-filter", "when")),
        ("transition", ('name="kind"', 'id="replicas"', 'id="reason"', 'id="preview"', 'id="rebalance"')),
        ("decisions", ('name="mode"', 'id="ttft_s"', 'id="replicas_max"', 'id="save-policy"', "As it is now")),
    ],
)
def test_the_keyboard_reaches_everything(page: Page, view: str, own: tuple[str, ...]) -> None:
    """From the top, Tab comes to each link, button and field in turn, and what has the focus can be seen."""
    page.show(view)
    page.browser.wait(lambda: "Loading" not in page.browser.text(), "it is drawn")
    reached = set()
    wanted = page.browser.run("return document.querySelectorAll('a, button, input').length")
    for _ in range(wanted + 2):
        page.press(Keys.TAB)
        reached.add(page.browser.run("return document.activeElement.outerHTML"))
        assert page.browser.run(SEEN), page.browser.run("return document.activeElement.outerHTML")
    texts = " ".join(reached)
    for part in (
        "Skip to the view",
        *(f"#/{view}" for view in VIEWS),
        "Theme",
        "Forget token",
        *own,
    ):
        assert part in texts, part


async def test_a_scale_up_is_previewed_ordered_and_shown_under_load(
    page: Page, deployment: Deployment, model_folder: Any
) -> None:
    async with Load(deployment.base_url, clients=4, seed=1) as load:
        await asyncio.to_thread(_scale_up, page, deployment)
        await asyncio.to_thread(page.show, "now")
        await asyncio.to_thread(
            page.browser.wait, lambda: (page.figures()["generated_per_s"] or 0) > 0, "tokens are shown"
        )
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 0


def test_experts_are_where_the_layout_has_them_and_as_hot_as_the_api_tells(page: Page, deployment: Deployment) -> None:
    """After the load: what was routed stays as it was told last."""
    page.show("experts")
    told = deployment.admin("/v1/experts")
    assert told["sampled_steps"] > 0
    assert sum(sum(layer) for layer in told["load"]) == pytest.approx(1_000 * sum(map(len, told["owners"])), rel=0.01)
    layout = deployment.admin("/v1/layout")
    assert told["owners"] == [[slots[0] for slots in layer] for layer in layout["experts"]]

    def are_told() -> bool:
        ranks = deployment.admin("/v1/experts")["ranks"]
        expected = [[one["rank"], one["device"], str(one["experts"]), f"{one['imbalance']:.2f}"] for one in ranks]
        shown = [[*row[:3], row[4].partition(",")[0]] for row in page.rows("main") if len(row) == 5]
        return shown == expected

    page.browser.wait(are_told, "the ranks' imbalance is the API's")
    before = page.said("#expert-said")
    page.browser.one("canvas.map").send_keys(Keys.ARROW_RIGHT)
    page.browser.wait(lambda: page.said("#expert-said") != before, "another expert is told of")


def _scale_up(page: Page, deployment: Deployment) -> None:
    page.show("transition")
    page.browser.wait(
        lambda: page.browser.one("#replicas").get_attribute("value") == "2", "it begins with what there is"
    )
    page.type("#replicas", "900")
    page.choose("#preview")
    page.browser.wait(
        lambda: "Value must be" in page.browser.one("#replicas").get_attribute("validationMessage") or "", ""
    )
    for count in ("4", "3"):
        page.type("#replicas", count)
        assert page.browser.all("#scale") == []  # what was previewed is not what stands there
        page.choose("#preview")
        page.browser.one("#scale")
    status, plan = deployment.admin_call("POST", "/v1/scale", {"replicas": 3, "dry_run": True})
    assert status == 200
    for name in ("bytes_copied", "seconds", "pause_ms", "peak_bytes", "bytes_after"):
        shown = page.browser.one(f".plan [data-figure={name}]").get_attribute("data-value")
        assert float(shown or "nan") == pytest.approx(plan["planned"][name], rel=0.5 if name in ("seconds",) else 1e-9)
    assert deployment.admin("/v1/operations")["operations"] == []  # nothing has begun
    page.choose("#scale")
    page.browser.wait(lambda: page.browser.all(".operation[data-phase=done]"), "it is done")
    (operation,) = deployment.admin("/v1/operations")["operations"]

    def is_measured() -> bool:
        told = {row[0]: row[1:] for row in page.rows(f".operation[data-operation='{operation['op_id']}']")}
        copied, moved = told["bytes copied"], told["sequences moved"][1]
        return copied[0] == copied[1] != "–" and moved == str(operation["figures"]["sequences_moved"])

    page.browser.wait(is_measured, "planned stands beside measured")
    page.browser.wait(lambda: "3 replicas" in page.said("#size"), "the head shows the size")


def test_an_operation_is_cancelled_from_the_page(page: Page, deployment: Deployment, points: Failpoints) -> None:
    before = deployment.admin("/v1/layout")["epoch"]
    page.show("transition")
    points.arm("rank.attach")  # the rank that joins waits there
    page.choose("#kind-replicas")
    page.type("#replicas", "4")
    page.choose("#preview")
    page.choose("#scale")
    points.wait_hit("rank.attach")
    page.browser.wait(lambda: page.browser.all(".operation[data-phase=prepare]"), "it is in progress")
    page.browser.wait(lambda: "joins" in page.said(".tile[data-device='host:3'][data-state=joining]"), "who joins")
    page.choose("#cancel")
    page.browser.wait(lambda: page.browser.all(".operation[data-phase=aborted]"), "it is undone")
    points.clear()
    page.browser.wait(lambda: "cancelled" in page.said(".operation"), "and says why")
    assert deployment.admin("/v1/operations?limit=1")["operations"][0]["outcome"] == "cancelled"
    assert deployment.admin("/v1/layout")["epoch"] == before
    assert not any(button.is_displayed() for button in page.browser.all("#cancel"))


def test_an_order_is_given_by_the_keyboard_alone(page: Page, deployment: Deployment) -> None:
    page.tab_to("nav a[data-view=transition]")
    page.press(Keys.ENTER)
    page.tab_to("#replicas")
    page.press("4", Keys.ENTER)
    page.browser.one("#scale")
    page.tab_to("#scale")
    page.press(Keys.ENTER)
    page.wait_size("4 replicas")
    page.browser.wait(lambda: page.browser.all(".operation[data-phase=done]"), "it is done")
    assert deployment.admin("/v1/layout")["replicas"] == 4


@pytest.mark.parametrize("button", ["#scale", "#rebalance"])
def test_an_order_that_is_pressed_twice_is_one(page: Page, deployment: Deployment, button: str) -> None:
    before = len(deployment.admin("/v1/operations")["operations"])
    page.show("transition")
    if button == "#scale":
        page.type("#replicas", "3")
        page.choose("#preview")
        page.browser.one(button)
    page.press_twice(button)
    page.browser.wait(lambda: deployment.admin("/v1/now")["operation"] is None, "it has ended")
    assert page.said("main [role=alert]") == ""
    assert len(deployment.admin("/v1/operations")["operations"]) == before + 1
    assert deployment.admin("/v1/layout")["replicas"] == 3


def test_what_the_api_refuses_is_said(page: Page) -> None:
    page.show("transition")
    page.choose("#kind-remove")
    page.type("#remove", "r17")
    page.choose("#preview")
    page.browser.wait(lambda: "unknown_replica" in page.said("main [role=alert]"), "the refusal is shown")


def test_objectives_are_checked_and_set(page: Page, deployment: Deployment) -> None:
    page.show("decisions")
    page.browser.wait(lambda: page.browser.one("#ttft_s").get_attribute("value"), "the form is filled")
    for name, text in (("ttft_s", "-1"), ("attainment", "2"), ("replicas_min", "1.5")):
        before = page.browser.one(f"#{name}").get_attribute("value") or ""
        page.type(f"#{name}", text)
        page.browser.wait(lambda name=name: page.said(f"#{name}-error"), "it is said what is wrong")
        page.choose("#save-policy")
        page.type(f"#{name}", before)
    version = deployment.admin("/v1/policy")["version"]
    page.type("#ttft_s", "1.5")
    page.choose("#mode-act")
    page.type("#replicas_max", "3")
    page.type("#replicas_min", "3")
    page.choose("#save-policy")
    page.browser.wait(lambda: "In force" in page.browser.text(), "it is in force")
    policy = deployment.admin("/v1/policy")
    assert policy["version"] == version + 1  # none of those that were wrong
    assert (policy["policy"]["ttft_s"], policy["policy"]["mode"], policy["policy"]["replicas_min"]) == (1.5, "act", 3)

    def are_shown() -> bool:
        told = [one["reason"] for one in deployment.admin("/v1/decisions?limit=40")["decisions"]]
        shown = [one.get_attribute("data-reason") for one in page.browser.all(".timeline li[data-reason]")]
        return told == shown

    page.browser.wait(are_shown, "the decisions are the API's")
    page.choose("#mode-advise")
    page.press_twice("#save-policy")
    assert (page.said("main [role=alert]"), deployment.admin("/v1/policy")["version"]) == ("", version + 2)
    assert deployment.admin("/v1/policy")["policy"]["mode"] == "advise"  # again


def test_events_and_operations_have_addresses(page: Page, deployment: Deployment) -> None:
    (operation, *_) = deployment.admin("/v1/operations")["operations"]
    page.browser.open(f"{page.url}/#/events/{operation['op_id']}")
    page.browser.one(f".operation[data-operation='{operation['op_id']}']")
    page.browser.wait(lambda: page.browser.all(".events li[data-kind=operation_ended]"), "events are shown")
    page.choose("#event-kind option[value=operation_phase]")
    page.browser.wait(
        lambda: {li.get_attribute("data-kind") for li in page.browser.all(".events li")} == {"operation_phase"},
        "one kind is left",
    )
    link = page.browser.all(".events li .when")[0].get_attribute("href") or ""
    page.browser.open(link)
    wanted = page.browser.one(".events li.wanted")
    assert wanted.get_attribute("id") == "event-" + link.rpartition("/")[2]
    page.browser.run("document.querySelector('main table a').focus(); window.kept = document.activeElement")
    page.browser.forget_requests()
    page.browser.wait(lambda: sum("/v1/now" in url for url in page.browser.requested()) >= 3, "it is updated")
    assert page.browser.run("return document.activeElement === window.kept")


@pytest.mark.parametrize(
    ("place", "view", "text"),
    [
        ("constructor", "Now", "Devices"),
        ("events/%", "Events", "not kept any more"),
        ("events/none", "Events", "not kept any more"),
    ],
)
def test_an_address_that_names_nothing_leads_somewhere(page: Page, place: str, view: str, text: str) -> None:
    page.browser.open(f"{page.url}/#/{place}")
    page.browser.wait(lambda: text in page.browser.text(), text)
    assert page.said("nav [aria-current]") == view


def test_pages_and_views_without_events_leave_listeners_to_others(page: Page, deployment: Deployment) -> None:
    page.show("events")
    page.browser.wait(lambda: page.browser.all(".events li"), "events are shown")
    page.open()  # the browser may keep the page that is left
    page.show("events")
    page.browser.wait(lambda: page.browser.all(".events li"), "events are shown")
    page.show("now")
    headers = {"authorization": f"Bearer {deployment.token}"}

    streams: list[httpx.Response] = []

    def do_all_fit() -> bool:
        """One more listens, if the scaler has noticed that those before have gone."""
        url = f"{deployment.admin_url}/v1/events"
        answer = opened.enter_context(httpx.stream("GET", url, headers=headers, trust_env=False, timeout=60))
        if answer.status_code == 200:
            streams.append(answer)
        return len(streams) == LISTENERS_MAX

    with ExitStack() as opened:
        wait_until(do_all_fit, "as many listen as may", 60)


def test_a_scaler_that_is_killed_leaves_a_stale_page_that_goes_on(page: Page, deployment: Deployment) -> None:
    page.show("health")
    layout = deployment.admin("/v1/layout")
    fence, replicas = layout["fence"], len(layout["ranks"])
    page.browser.wait(lambda: f"fencing epoch {fence}:" in page.browser.text(), "the scaler's epoch is shown")
    os.kill(deployment.pids["scaler"], signal.SIGSTOP)  # killed at once, the next one may be too quick to be missed
    page.browser.wait(lambda: "Stale" in page.said("#stale"), "the page says that it is stale")
    assert "All ranks of the layout step" in page.browser.text()  # what was there stays
    killed = deployment.kill("scaler")
    deployment.wait_restarted("scaler", killed)
    page.wait_live()
    assert page.said("#stale") == ""
    page.browser.wait(lambda: f"fencing epoch {fence + 1}:" in page.browser.text(), "the next one's epoch is shown")

    def is_its_restart_shown() -> bool:
        """What the launcher keeps running is what the API tells, with the new process."""
        told = deployment.admin("/v1/processes")["processes"]
        expected = [[one["name"], one["state"], str(one["pid"]), str(one["restarts"])] for one in told]
        shown = [row[:4] for row in page.rows("main")]
        (scaler,) = [row for row in expected if row[0] == "scaler"]
        return int(scaler[3]) >= 1 and all(row in shown for row in expected)

    page.browser.wait(is_its_restart_shown, "its restart is shown")
    page.show("now")
    page.browser.wait(lambda: page.figures().get("replicas") == replicas, "rows come again, from the beginning")


def test_a_rank_that_dies_is_shown_as_a_fault(page: Page, deployment: Deployment) -> None:
    page.show("health")
    pids = {str(rank["pid"]) for rank in deployment.admin("/v1/layout")["ranks"]}
    page.browser.wait(lambda: pids <= {cell for row in page.rows("main") for cell in row}, "pids are the API's")
    killed = deployment.rank_pids()["r1t0"]
    os.kill(killed, signal.SIGKILL)
    page.browser.wait(
        lambda: any(row[1:3] == ["rank exited", "r1t0"] for row in page.rows("main")), "the fault is shown, and whose"
    )
    deployment.wait_serving()
    page.browser.wait(lambda: page.said("#phase") == "serving", "all is well again")

    def are_the_living_shown() -> bool:
        cells = {cell for row in page.rows("main") for cell in row}
        return str(deployment.rank_pids()["r1t0"]) in cells and str(killed) not in cells

    page.browser.wait(are_the_living_shown, "the seat has another process")
