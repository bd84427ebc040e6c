"""What the applications of both listeners have in common, so that neither differs from the other by accident."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException

from elasticmoe.common.http.errors import on_error, on_status
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.version import version


def make_app(title: str, about: str) -> FastAPI:
    """An app without routes: no redirects, no pages from elsewhere, and errors as errors.py has them."""
    app = FastAPI(
        title=title,
        description=about,
        version=version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(ElasticMoEError, on_error)
    app.add_exception_handler(HTTPException, on_status)
    app.add_exception_handler(Exception, on_error)
    return app


def json_response(value: Any, status: int = 200) -> Response:
    """An answer of what msgspec can encode."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
