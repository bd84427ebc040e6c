"""What both listeners' OpenAPI documents have in common: how refusals look, and who is let in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI

from elasticmoe.common.error_codes import CODES
from elasticmoe.common.http.errors import type_of

REF = "#/components/schemas/"
BEARER = "bearer"

_RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer"}}}


def json_content(schema: str, example: Any = None) -> dict[str, Any]:
    """A body of JSON: one of the document's schemas, and what it may look like."""
    content: dict[str, Any] = {"schema": {"$ref": REF + schema}}
    if example is not None:
        content["example"] = example
    return {"application/json": content}


def refusals(texts: Mapping[str, str], statuses: Iterable[str]) -> dict[str, Any]:
    """The document's answers with an error, by status; `texts` says what each means."""
    found: dict[str, Any] = {}
    for status in statuses:
        code = next(name for name, known in CODES.items() if int(status) in known.statuses[:1])
        detail = {"message": CODES[code].meaning, "type": type_of(int(status)), "param": None, "code": code}
        content = json_content("ErrorBody", {"error": detail})
        found[status] = {"description": texts[status], "content": content}
        if status in ("409", "429", "503", "504"):
            found[status]["headers"] = _RETRY_AFTER
    return found


def install(
    app: FastAPI, schemas: Callable[[], dict[str, Any]], token: str, public: frozenset[str], *, is_needed: bool = True
) -> None:
    """Let the app's document, made when it is first asked for, have these `schemas`, no refusal that nobody gives, and
    who is let in: `token` describes the bearer token, which is asked for on all paths but `public` ones, unless it is
    not `is_needed` at all."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            scheme = {"type": "http", "scheme": "bearer", "description": token}
            document["components"] = {"schemas": schemas(), "securitySchemes": {BEARER: scheme}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if operation["responses"].get("422", {}).get("description") == "Validation Error":
                        del operation["responses"]["422"]  # the framework's
                    operation["security"] = [{BEARER: []}] if is_needed and path not in public else []
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
