"""The web page of `services/scaler/page`: its files, each under a path of its own, and what a browser is told with
them.

They are public, for they say nothing of the deployment: the page asks for the token and sends it with each of its
requests. Nothing else is given out, whatever lies beside them. `vendor/` holds others' work as it was published, with
its licence (docs/dashboard.md names versions and hashes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from fastapi import FastAPI, Request, Response

from elasticmoe.common.http.door import local_of
from elasticmoe.common.http.hosts import OwnPages
from elasticmoe.services.scaler.api.events import KINDS
from elasticmoe.services.scaler.policy.words import REASONS

FOLDER = Path(__file__).parent.parent / "page"
_TYPES = {
    ".svg": "image/svg+xml",
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
}
_FILES = (
    "icon.svg",
    "style.css",
    "parts.css",
    "tiles.css",
    "main.js",
    "api.js",
    "feed.js",
    "budget.js",
    "store.js",
    "session.js",
    "dom.js",
    "format.js",
    "charts.js",
    "tiles.js",
    "operation.js",
    "moves.js",
    "views/now.js",
    "views/experts.js",
    "views/transition.js",
    "views/decisions.js",
    "views/events.js",
    "views/health.js",
    "vendor/uPlot.js",
    "vendor/uPlot.css",
)
WORDS = "/page/words.json"
PAGES: Mapping[str, str | None] = {"/": "index.html", **{f"/page/{name}": name for name in _FILES}, WORDS: None}
"""By path, the file in FOLDER; none where it is made here."""

# Scripts, styles and requests of this listener alone; nobody frames it, and no text becomes markup or script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",  # asked for again, and answered with 304 while it is the same
}


class _PageFile(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def add_page(app: FastAPI, hosts: OwnPages) -> None:
    """Add the page's files to the app; they are read now. Raises OSError for one that is missing."""
    for path, name in PAGES.items():
        app.get(path, include_in_schema=False)(_endpoint(_load(name), hosts))


def _load(name: str | None) -> _PageFile:
    if name is None:
        content, ending = _words(), ".json"
    else:
        content, ending = (FOLDER / name).read_bytes(), Path(name).suffix
    return _PageFile(content, f"{_TYPES[ending]}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _words() -> bytes:
    """What reasons and kinds of events say to a person, as commands say it too."""
    return msgspec.json.encode({"reasons": REASONS, "events": {name: kind.when for name, kind in KINDS.items()}})


def _endpoint(file: _PageFile, hosts: OwnPages) -> Callable[[Request], object]:
    async def page_file(request: Request) -> Response:
        host = request.headers.get("host")
        hosts.check_page(host.encode("latin-1") if host is not None else None, local_of(request.scope))
        headers = {**_HEADERS, "etag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

    return page_file
