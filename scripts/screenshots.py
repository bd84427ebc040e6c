"""docs/page: pictures of the web page. `make screenshots` takes them, of a deployment that serves and grows."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from scripts.browser import Browser, why_not
from scripts.running import command, load

TARGET = Path(__file__).resolve().parent.parent / "docs" / "page"
WIDTH, HEIGHT = 1280, 800
# File, view, and what of its text shows that it has come.
PICTURES = (
    ("now", "now", "Devices"),
    ("experts", "experts", "sampled steps"),
    ("transition", "transition", "Planned beside measured"),
)


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=90.0, help="of load before the first picture, for its charts")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ELASTICMOE_RUN_DIR"] = f"{folder}/run"
        command("up", "--model", args.model, "--devices", "host:4", "--port", "0", "--admin-port", "0", "--detach")
        try:
            record(Path(folder), args.seconds)
        finally:
            command("down")


def record(folder: Path, seconds: float) -> None:
    """Load and growth, and the pictures of both."""
    status = json.loads(command("status", "--json"))
    token = (Path(status["run_dir"]) / "secrets" / "admin.token").read_text(encoding="ascii").strip()
    page = f"{status['deployment']['admin_url']}/#token={token}"
    stop = threading.Event()
    clients = [threading.Thread(target=load, args=(status["deployment"]["url"], stop)) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        stop.wait(seconds / 2)
        command("scale", "--replicas", "3", "--wait")
        stop.wait(seconds / 2)
        with Browser(folder / "browser", WIDTH, HEIGHT) as browser:
            TARGET.mkdir(exist_ok=True)
            for theme in ("light", "dark"):
                take(browser, page, theme)
    finally:
        stop.set()
        for client in clients:
            client.join()


def take(browser: Browser, page: str, theme: str) -> None:
    """The pictures of one theme; in the dark one that of the first view."""
    browser.theme(theme)
    browser.size(WIDTH, HEIGHT)
    browser.open(page)
    for file, view, text in PICTURES if theme == "light" else PICTURES[:1]:
        browser.one(f"nav a[data-view={view}]").click()
        browser.wait(lambda text=text: text in browser.text(), f"{view} is drawn")  # type: ignore[misc]
        time.sleep(3)  # for a few rows, and bars that move to their widths
        target = TARGET / f"{file}-{theme}.png"
        browser.driver.save_screenshot(str(target))
        print(f"{target}: {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
