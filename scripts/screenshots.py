"""docs/page: pictures of the web page. `make screenshots` takes them, of a deployment that serves and grows."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from scripts.browser import Browser, why_not
from scripts.running import command, load
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import wait_until

TARGET = Path(__file__).resolve().parent.parent / "docs" / "page"
WIDTH, HEIGHT = 1280, 800
MOVING_HEIGHT = 1000  # what moves stands below the form
SETTLE_S = 3.0  # for a few rows, and bars that move to their widths
LOOK_S = 0.4  # until the scaler has seen what the HMM has done
COPY = "hmm.copy"
COPIED = 0.3  # of a leg's bytes, where the growth is held for its picture


class Picture(NamedTuple):
    """`text`: what of the view's text shows that it has come."""

    file: str
    view: str
    text: str
    themes: tuple[str, ...] = ("light",)


PICTURES = (
    Picture("now", "now", "Devices", ("light", "dark")),
    Picture("experts", "experts", "sampled steps"),
    Picture("transition", "transition", "Planned beside measured"),
)
MOVING = Picture("transition-moving", "transition", "records by device")


class Running(NamedTuple):
    """The deployment that is pictured."""

    url: str
    admin_url: str
    token: str

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{self.admin_url}/#token={self.token}"

    def copied(self) -> float | None:
        """The share of the bytes that the operation in progress copies; None without one."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = httpx.get(f"{self.admin_url}/v1/now", headers=headers, timeout=60, trust_env=False)
        progress: dict[str, Any] | None = answer.raise_for_status().json()["progress"]
        return progress["bytes_done"] / max(1, progress["bytes_total"]) if progress is not None else None


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=float, default=90.0, help="of load before the first picture, for its charts")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        points = Failpoints(Path(folder) / "failpoints")
        os.environ["ELASTICMOE_RUN_DIR"] = f"{folder}/run"
        os.environ["ELASTICMOE_FAILPOINT_DIR"] = str(points.folder)
        command("up", "--model", args.model, "--devices", "host:4", "--port", "0", "--admin-port", "0", "--detach")
        try:
            record(Path(folder), points, args.seconds)
        finally:
            command("down")


def record(folder: Path, points: Failpoints, seconds: float) -> None:
    """Load and growth, and the pictures of both."""
    status = json.loads(command("status", "--json"))
    token = (Path(status["run_dir"]) / "secrets" / "admin.token").read_text(encoding="ascii").strip()
    running = Running(status["deployment"]["url"], status["deployment"]["admin_url"], token)
    stop = threading.Event()
    clients = [threading.Thread(target=load, args=(running.url, stop)) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        TARGET.mkdir(exist_ok=True)
        stop.wait(seconds / 2)
        with Browser(folder / "browser", WIDTH, HEIGHT) as browser:
            take_moving(browser, running, points)
            for replicas in ("2", "3"):  # what the last one has cost is shown, and nobody has held it
                command("scale", "--replicas", replicas, "--wait")
            stop.wait(seconds / 2)
            for theme in ("light", "dark"):
                show(browser, running, theme, HEIGHT)
                for picture in PICTURES:
                    if theme in picture.themes:
                        take(browser, picture, theme)
    finally:
        points.forget()
        stop.set()
        for client in clients:
            client.join()


def take_moving(browser: Browser, running: Running, points: Failpoints) -> None:
    """A growth that is held while its records are copied, as tests hold it; it has ended afterwards."""
    show(browser, running, "light", MOVING_HEIGHT)
    points.arm(COPY)
    command("scale", "--replicas", "3")
    points.wait_hit(COPY)
    while (running.copied() or 0.0) < COPIED:
        points.arm(COPY)  # who waits goes on, and the next piece is held
        points.wait_hit(COPY)
        time.sleep(LOOK_S)
    take(browser, MOVING, "light")
    points.clear()
    wait_until(lambda: running.copied() is None, "the growth has ended", 60)


def show(browser: Browser, running: Running, theme: str, height: int) -> None:
    """Load the page in a theme and a size."""
    browser.theme(theme)
    browser.size(WIDTH, height)
    browser.open(running.page)


def take(browser: Browser, picture: Picture, theme: str) -> None:
    """Go to its view, and write what is seen."""
    browser.one(f"nav a[data-view={picture.view}]").click()
    browser.wait(lambda: picture.text in browser.text(), f"{picture.file} is drawn")
    time.sleep(SETTLE_S)
    target = TARGET / f"{picture.file}-{theme}.png"
    browser.driver.save_screenshot(str(target))
    print(f"{target}: {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
