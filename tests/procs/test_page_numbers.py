"""Every number of every view of the web page is the API's, as the page writes numbers; and the page of one device."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from scripts.browser import Browser, why_not
from tests.procs.clients import Load
from tests.procs.deployment import Deployment
from tests.procs.page import VIEWS, Page, without
from tests.procs.page_stage import staged

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}
_WRITE = """
const [wanted, done] = arguments;
import("/page/format.js").then(
  (format) => done(wanted.map(([name, ...values]) => format[name](...values))),
  (error) => done(String(error)));
"""
_TABLE = """
const table = [...document.querySelectorAll("table")].find((one) => one.caption.textContent.includes(arguments[0]));
return table === undefined ? null
  : [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
"""


class Written:
    """Numbers as the page writes them, by its own module."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def many(self, wanted: Sequence[tuple[str, Any]]) -> list[str]:
        """Each of (function, number)."""
        texts = self._browser.driver.execute_async_script(_WRITE, [list(one) for one in wanted])
        assert isinstance(texts, list), texts
        return texts

    def rows(self, wanted: Sequence[Sequence[str | tuple[str, Any]]]) -> list[list[str]]:
        """A table's cells: texts, and numbers as (function, number)."""
        texts = iter(self.many([cell for row in wanted for cell in row if isinstance(cell, tuple)]))
        return [[cell if isinstance(cell, str) else next(texts) for cell in row] for row in wanted]


async def _grow_under_load(deployment: Deployment) -> None:
    async with Load(deployment.base_url, clients=4, seed=1):
        await asyncio.to_thread(deployment.scale, replicas=3)


@pytest.fixture(scope="module")
def deployment(model_folder: Any) -> Iterator[Deployment]:
    """One that has grown under load, and is at rest."""
    deployment = Deployment(model_folder("oracle"), replicas=2, devices=4, **SETTINGS).wait_ready()
    try:
        asyncio.run(_grow_under_load(deployment))
        yield deployment
        deployment.stop()
    finally:
        deployment.discard()


def table(page: Page, caption: str) -> list[list[str]] | None:
    """The rows of the table whose caption has that text."""
    rows: list[list[str]] | None = page.browser.run(_TABLE, caption)
    return rows


def wait_rows(page: Page, caption: str, expected: list[list[str]]) -> None:
    seen: list[Any] = []

    def are_shown() -> bool:
        seen[:] = [table(page, caption)]
        return seen[0] == expected

    try:
        page.browser.wait(are_shown, f"{caption}: as the API tells")
    except AssertionError as error:
        raise AssertionError(f"{error}\nshown: {seen[0]}\ntold: {expected}") from None


def test_the_head_s(page: Page, deployment: Deployment) -> None:
    layout = deployment.admin("/v1/layout")
    size = f"{layout['replicas']} replicas, epoch {layout['epoch']}"
    page.browser.wait(lambda: page.said("#size") == size, size)


def test_an_operation_s(page: Page, deployment: Deployment) -> None:
    """Planned beside measured, of the whole and of each device, and how long each phase took."""
    page.show("transition")
    (operation,) = deployment.admin("/v1/operations")["operations"]
    planned, figures, elapsed = operation["planned"], operation["figures"], operation["elapsed_s"]
    written = Written(page.browser)
    (pause,) = written.many([("seconds", figures["flip_s_max"])])
    before, after = written.many([("number", figures["kv_blocks_before"]), ("number", figures["kv_blocks_after"])])
    rows: list[list[str | tuple[str, Any]]] = [
        ["time", ("seconds", planned["seconds"]), ("seconds", elapsed)],
        ["longest pause of a stream", ("seconds", planned["pause_ms"] / 1000), f"at most {pause}"],
        ["bytes copied", ("bytes", planned["bytes_copied"]), ("bytes", figures["bytes_copied"])],
        ["peak of all devices", ("bytes", planned["peak_bytes"]), ("bytes", figures["peak_bytes_total"])],
        ["new replicas serve after", "–", ("seconds", figures["capacity_s"])],
        ["sequences moved", "–", ("number", figures["sequences_moved"])],
        ["KV blocks", "–", f"{before} → {after}"],
    ]
    wait_rows(page, "Planned beside measured", written.rows(rows))
    shown = {row[0]: row[1:] for row in table(page, "By device") or []}
    assert shown.keys() == planned["devices"].keys()
    for device, change in planned["devices"].items():
        comes, peak, measured = written.many(
            [("bytes", change["bytes_in"]), ("bytes", change["peak_bytes"]), ("bytes", figures["peak_bytes"][device])]
        )
        what = (
            f"{change['experts_in']} in, {comes}"
            if change["experts_in"]
            else comes
            if change["bytes_in"]
            else "nothing"
        )
        experts = f"{change['experts_before']} → {change['experts_after']}"
        assert shown[device] == [what, experts, f"{peak}, measured {measured}"]
    steps = page.browser.run(
        "return [...document.querySelectorAll('.steps li.over small')].map((one) => one.textContent)"
    )
    assert steps == written.many([("seconds", one["seconds"]) for one in operation["timings"]])


def test_the_operations_(page: Page, deployment: Deployment) -> None:
    page.show("events")
    operations = deployment.admin("/v1/operations")["operations"]
    rows: list[list[str | tuple[str, Any]]] = [
        [
            one["op_id"],
            ("clock", one["accepted_unix"]),
            f"scale up, {one['planned']['replicas_before']} → {one['planned']['replicas_after']} replicas",
            one["outcome"],
            ("seconds", one["elapsed_s"]),
            ("bytes", one["figures"]["bytes_copied"]),
        ]
        for one in operations
    ]
    wait_rows(page, "Operations", Written(page.browser).rows(rows))
    told = "[...document.querySelectorAll('p.count')].find((one) => one.offsetParent)?.textContent ?? ''"
    script = f"return [{told}, document.querySelectorAll('.events li').length]"

    def is_counted() -> bool:
        told, shown = page.browser.run(script)
        return bool(told.partition(" ")[0] == str(shown))

    page.browser.wait(is_counted, "the events are counted")


def test_the_decisions_(page: Page, deployment: Deployment) -> None:
    page.show("decisions")

    def leads() -> bool:
        policy = deployment.admin("/v1/policy")
        wanted = "" if policy["target"] == policy["replicas"] else f", {policy['target']} wanted"
        lead = f"{policy['policy']['mode']} {policy['replicas']} replicas{wanted}, policy version {policy['version']}"
        return " ".join(page.said("main .lead").split()) == lead

    page.browser.wait(leads, "the policy in a line")
    policy = deployment.admin("/v1/policy")
    for name in ("ttft_s", "itl_s", "attainment", "replicas_min", "replicas_max"):
        assert float(page.browser.one(f"#{name}").get_attribute("value") or "nan") == policy["policy"][name]
    script = "return [...document.querySelectorAll('.timeline li')].map((one) => one.textContent)"

    def are_told() -> bool:
        told = deployment.admin("/v1/decisions")["decisions"]
        shown: list[str] = page.browser.run(script)
        return bool(told) and len(shown) == len(told) and all(map(says, shown, told))

    written = Written(page.browser)

    def says(text: str, decision: dict[str, Any]) -> bool:
        size = decision["target"] if decision["target"] is not None else decision["replicas"]
        evidence = decision["evidence"]
        parts = [(name, value) for name, value in evidence["raw"].items() if value is not None]
        texts = written.many([("ratio", value) for _, value in parts])
        expected = [
            f"{size} replica",
            *(f"{name.replace('_', ' ')} {is_}" for (name, _), is_ in zip(parts, texts, strict=True)),
        ]
        if evidence["smoothed"] is not None:
            smoothed, threshold = written.many([("ratio", evidence["smoothed"]), ("ratio", evidence["threshold"])])
            expected.append(f"Smoothed {smoothed}, and it grows above {threshold}.")
        if (demand := evidence["demand"]) is not None:
            names = ("requests_per_s", "prompt_tokens", "output_tokens")
            rate, prompt, output = written.many([("number", demand[name]) for name in names])
            expected.append(f"{rate} requests/s of {prompt} prompt and {output} output tokens.")
        return all(part in text for part in expected)

    page.browser.wait(are_told, "the decisions' evidence is the API's")


def test_the_ranks_and_processes_(page: Page, deployment: Deployment) -> None:
    page.show("health")
    layout = deployment.admin("/v1/layout")
    rows: list[list[str | tuple[str, Any]]] = [
        [
            f"r{rank['replica']}t{rank['tp']}",
            rank["device"],
            rank["state"],
            rank["incarnation"],
            str(rank["pid"]),
            ("seconds", rank["attach_ms"] / 1000),
            ("number", rank["experts"]),
        ]
        for rank in layout["ranks"]
    ]
    (by,) = layout["computes_by"]
    wait_rows(page, f"3 ranks, epoch {layout['epoch']}; {by}", Written(page.browser).rows(rows))
    processes = deployment.admin("/v1/processes")["processes"]
    running = [[one["name"], one["state"], str(one["pid"]), str(one["restarts"]), ""] for one in processes]
    wait_rows(page, "What the launcher keeps running", running)

    def are_standbys() -> bool:
        standbys = str(deployment.admin("/v1/devices")["standby_processes"])
        return ["standbys", standbys] in [row[:2] for row in table(page, "Who answers") or []]

    page.browser.wait(are_standbys, "the standbys")


def test_the_experts_(page: Page, deployment: Deployment) -> None:
    page.show("experts")
    told = deployment.admin("/v1/experts")
    names = {rank["slot"]: rank["rank"] for rank in told["ranks"]}
    written = Written(page.browser)
    rows = [
        [one["rank"], one["device"], ("number", one["experts"]), ("number", one["rows_per_step"])]
        for one in told["ranks"]
    ]
    expected = written.rows(rows)
    page.browser.wait(lambda: [row[:4] for row in table(page, "3 ranks") or []] == expected, "the ranks' rows")
    hottest = table(page, "Most routed to") or []
    assert hottest
    for layer, expert, rank, times in hottest:
        value = told["load"][int(layer)][int(expert)]
        assert rank == names[told["owners"][int(layer)][int(expert)]]
        assert [times] == written.many([("ratio", value / 1_000)])
    loads = sorted((value for layer in told["load"] for value in layer), reverse=True)
    shown = [told["load"][int(layer)][int(expert)] for layer, expert, *_ in hottest]
    assert shown == loads[: len(shown)]


def is_a_row_of(page: Page, url: str) -> bool:
    """The page is up to some seconds behind; what it shows is one of the last rows."""
    shown, token = page.figures(), {"Authorization": "Bearer stage"}
    columns = httpx.get(f"{url}/v1/series", headers=token, timeout=60, trust_env=False).json()["columns"]
    return any(without(columns, row) == shown for row in range(-20, 0))


def test_one_device_is_a_page_too(browser: Browser) -> None:
    with staged(1) as url:
        page = Page.after_another(browser, url, "stage")
        browser.wait(lambda: "1 device: 1 used, 0 free" in browser.text(), "it is counted")
        assert [*page.tiles()] == ["host:0"]
        browser.wait(lambda: is_a_row_of(page, url), "the figures are the series'")
        saturation = {name: value for name, value in page.figures().items() if name.endswith("_saturation")}
        assert len(saturation) == 5
        assert None not in saturation.values()
        for view in VIEWS:
            page.show(view)
            browser.wait(lambda: "Loading" not in browser.text(), "it is drawn")
            assert page.violations() == [], view
        page.check_quiet()
