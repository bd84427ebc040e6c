"""The web page's files: each is listed, public and guarded by what a browser is told with it; nothing else is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from elasticmoe.services.scaler.api.admin import PROBES, PUBLIC_PATHS
from elasticmoe.services.scaler.api.page import FOLDER, PAGES, WORDS
from elasticmoe.services.scaler.policy.state import Reason
from tests.test_tidy import ROOT, tracked
from tests.unit.test_scaler_admin import Listener, snapshot_of
from tests.unit.transitions import UP, World

HERE = FOLDER.resolve()
OWN = [path for path in sorted(HERE.rglob("*.*")) if "vendor" not in path.parts]
LINES_MAX, LINE_CHARS_MAX = 400, 120
ORIGIN = "http://scaler"


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener(snapshot_of(World(UP.before)))) as listener:
        yield listener


def client_of(listener: Listener) -> httpx.AsyncClient:
    """Without a token."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=listener.app), base_url=ORIGIN)  # type: ignore[arg-type]


async def test_every_route_asks_for_the_token_but_those_that_are_listed(listener: Listener) -> None:
    routes = [route for route in listener.app._app._app.routes if hasattr(route, "methods")]  # type: ignore[attr-defined]
    assert {"/v1/now", "/v1/series", "/v1/scale", "/openapi.json", "/"} <= {route.path for route in routes}
    async with client_of(listener) as client:
        for route in routes:
            for method in route.methods:
                answer = await client.request(method, route.path.replace("{op_id}", "x"))
                assert (answer.status_code == 401) == (route.path not in PUBLIC_PATHS), (method, route.path)
        for path in (
            "/page",
            "/page/",
            "/page/none.js",
            "/page/../main.js",
            "/page/vendor/LICENSE",
            "/index.html",
        ):
            assert (await client.get(path)).status_code == 401, path
        for path in PAGES:  # and only to be read
            assert (await client.post(path)).status_code == 405
    assert {"/health", "/ready"} == PROBES
    assert PAGES.keys() == PUBLIC_PATHS - PROBES


async def test_every_file_is_given_out_with_what_guards_it(listener: Listener) -> None:
    async with client_of(listener) as client:
        for path in PAGES:
            answer = await client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            for name, value in (("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer")):
                assert answer.headers[name] == value
            assert not any(name.startswith("access-control") for name in answer.headers)
            again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert (await client.head(path)).headers["etag"] == answer.headers["etag"]


async def test_its_own_page_may_ask_and_no_other(listener: Listener) -> None:
    token = {"authorization": "Bearer secret"}
    async with client_of(listener) as client:
        for path in ("/", "/v1/now", "/page/main.js"):
            assert (await client.get(path, headers={**token, "origin": ORIGIN})).status_code == 200
            for origin in ("http://evil", "null", "http://scaler:81", "https://evil.scaler", ""):
                answer = await client.get(path, headers={**token, "origin": origin})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")
        host = {"host": "evil.example:8100"}  # a name that leads here
        assert (await client.get("/", headers=host)).json()["error"]["code"] == "host_refused"
        asked = await client.get("/v1/now", headers={**token, **host, "origin": "http://evil.example:8100"})
        assert asked.json()["error"]["code"] == "origin_refused"
        assert (await client.get("/v1/now", headers={**token, **host})).status_code == 200  # a program by any name


def test_every_file_is_listed_and_none_is_missing() -> None:
    listed = {HERE / name for name in PAGES.values() if name is not None}
    there = set(tracked(".html", ".js", ".css", ".svg")) & set(HERE.rglob("*"))
    assert listed == there


def test_files_name_only_what_the_listener_has() -> None:
    """No address of elsewhere, and every module that is imported is given out."""
    for path in OWN:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        for name in re.findall(r'from "(.*?)"', text):
            assert f"/page/{(path.parent / name).resolve().relative_to(HERE)}" in PAGES, (path, name)
        if path.suffix == ".html":
            assert set(re.findall(r'(?:src|href)="(/.*?)"', text)) <= PAGES.keys()
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", text)


def test_text_never_becomes_markup_or_code() -> None:
    for path in OWN:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:", text
        )
        if path.name != "session.js":
            assert "Storage" not in text, path


def test_files_are_small_enough_to_be_read() -> None:
    for path in OWN:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= LINES_MAX, path
        assert max(map(len, lines), default=0) <= LINE_CHARS_MAX, path


def test_vendored_files_are_what_was_published() -> None:
    page = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")
    hashes = dict(re.findall(r"^\| `([\w.]+)` \|.*`([0-9a-f]{64})` \|$", page, re.MULTILINE))
    vendored = {path.name: path for path in (FOLDER / "vendor").iterdir() if path.name != "LICENSE"}
    assert hashes.keys() == vendored.keys()
    for name, path in vendored.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hashes[name], name
    assert "MIT" in (FOLDER / "vendor" / "LICENSE").read_text()


async def test_the_words_of_the_page_are_those_of_the_commands(listener: Listener) -> None:
    async with client_of(listener) as client:
        words = json.loads((await client.get(WORDS)).text)
    assert set(words["reasons"]) == {reason.value for reason in Reason}
    assert "rank_exited" in words["events"]
    assert Path(FOLDER, "index.html").is_file()
