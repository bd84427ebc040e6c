"""benchmarks/page.md: what one viewer of the web page costs, before a staged deployment of hundreds of devices.

The listener is the scaler's own; the deployment is the stage of its tests, whose every rank has another load in each
turn. The browser is a real one. Processor time is the serving process's with a viewer, less without one: the stage
itself is in both. Bytes are what the browser has received, heads and streams too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.settings import parse_seconds
from elasticmoe.cli.terminal import say
from scripts.browser import Browser, why_not
from tests.procs.page_stage import staged

STAGE = "tests.procs.page_stage"
TOKEN = "stage"
# Each view, and what it asks for as the last of what it begins with.
VIEWS = {
    "now": "/v1/policy",
    "experts": "/v1/experts",
    "transition": "/v1/operations?",
    "decisions": "/v1/decisions",
    "events": "/v1/operations?",
    "health": "/v1/processes",
}
GROWING_VIEWS = ("transition",)  # it shows the operation in progress, which is large
SETTLE_S = 5.0  # a view's first readings are over
_HAS_COME = "return performance.getEntriesByType('resource').some((one) => one.name.includes(arguments[0]))"
_PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def main() -> None:
    """Measure at rest and while it grows, print a table, write raw data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=whole(1), default=384, metavar="N", help="of the staged deployment (384)")
    parser.add_argument("--seconds", type=parse_seconds, default=60.0, metavar="S", help="each view is watched (60)")
    parser.add_argument("--loads", type=whole(1), default=10, metavar="N", help="of the page with an empty cache (10)")
    add_output(parser)
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "browser") as browser:
        with staged(args.devices) as url:
            paints = [first_paint(browser, url) for _ in range(args.loads)]
            rows = watched(browser, url, args.seconds, "at rest", tuple(VIEWS))
        with staged(args.devices, "growing") as url:
            rows += watched(browser, url, args.seconds, "growing", GROWING_VIEWS)
    paint = {"loads": len(paints), "median_ms": statistics.median(paints), "worst_ms": max(paints)}
    say(table(rows))
    say(f"first contentful paint: {paint['median_ms']:.0f} ms, worst of {len(paints)} {paint['worst_ms']:.0f} ms")
    facts = {
        "provenance": provenance(command(args)),
        "devices": args.devices,
        "seconds": args.seconds,
        "first_paint": {**paint, "all_ms": paints},
        "rows": rows,
    }
    say(f"raw data: {write_raw(args.output, 'page', facts).name}")


def command(args: argparse.Namespace) -> str:
    """How to measure the same: without the folder, which is this machine's."""
    return f"python -m scripts.page_cost --devices {args.devices} --seconds {args.seconds:g} --loads {args.loads}"


def first_paint(browser: Browser, url: str) -> float:
    """Milliseconds from the navigation to the first text, with nothing in the browser's cache."""
    browser.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.open(f"{url}/#token={TOKEN}")
    painted: float = browser.wait(lambda: browser.run(_PAINT), "the page is painted")
    return painted


def watched(browser: Browser, url: str, seconds: float, state: str, views: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each view, and two without a viewer: before the others and after them."""
    server = server_pid()
    alone = [unseen(browser, server, seconds / 3)]
    seen = {view: one_view(browser, url, server, view, seconds) for view in views}
    alone.append(unseen(browser, server, seconds / 3))
    rows: list[dict[str, Any]] = [{"state": state, "view": name, **figures} for name, figures in seen.items()]
    for row in rows:
        row["viewer, % of a core"] = round(row["server, % of a core"] - statistics.mean(alone), 2)
    nobody: dict[str, Any] = {"KB/min": 0.0, "requests/min": 0.0, "looks/min": 0.0, "viewer, % of a core": ""}
    first, last = [{"state": state, "view": "nobody", **nobody, "server, % of a core": round(one, 2)} for one in alone]
    return [first, *rows, last]


def unseen(browser: Browser, server: int, seconds: float) -> float:
    """What the server's process costs while nobody looks."""
    browser.driver.get("about:blank")
    time.sleep(SETTLE_S)
    begun, before = time.monotonic(), cpu_s(server)
    time.sleep(seconds)
    return 100 * (cpu_s(server) - before) / (time.monotonic() - begun)


def one_view(browser: Browser, url: str, server: int, view: str, seconds: float) -> dict[str, float]:
    """What a viewer of this view receives and costs."""
    browser.open(f"{url}/#token={TOKEN}")
    browser.one(f"nav a[data-view={view}]").click()
    wait_begun(browser, view)
    time.sleep(SETTLE_S)
    received(browser)
    begun, before = time.monotonic(), cpu_s(server)
    time.sleep(seconds)
    passed, used = time.monotonic() - begun, cpu_s(server) - before
    nbytes, urls = received(browser)
    return {
        "KB/min": round(nbytes / 1000 * 60 / passed, 1),
        "requests/min": round(len(urls) * 60 / passed, 1),
        "looks/min": round(sum("/v1/now" in one for one in urls) * 60 / passed, 1),
        "server, % of a core": round(100 * used / passed, 2),
    }


def wait_begun(browser: Browser, view: str) -> None:
    """Until the page has what this view begins with."""
    browser.wait(lambda: browser.run(_HAS_COME, VIEWS[view]), f"{view} has what it begins with")


def received(browser: Browser) -> tuple[int, list[str]]:
    """Bytes that have come since the last call, and what was asked for since."""
    ended: dict[str, int] = {}
    chunks: dict[str, int] = {}
    urls = []
    for entry in browser.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        told = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(told["request"]["url"])
        elif message["method"] == "Network.dataReceived":
            chunks[told["requestId"]] = chunks.get(told["requestId"], 0) + told["dataLength"]
        elif message["method"] == "Network.loadingFinished":
            ended[told["requestId"]] = told["encodedDataLength"]
    return sum((chunks | ended).values()), urls


def server_pid() -> int:
    """The stage's process: a child of this one."""
    for line in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(line.read_text().rpartition(")")[2].split()[1])
            words = (line.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        if parent == os.getpid() and STAGE.encode() in words:
            return int(line.parent.name)
    raise LookupError(f"no {STAGE} runs")


def cpu_s(pid: int) -> float:
    """Processor seconds of the process's living threads, to the nanosecond."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


if __name__ == "__main__":
    main()
