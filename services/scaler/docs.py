"""The admin surface's OpenAPI document: bodies from the structs that decode them, answers by their fields."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from common.http.errors import ErrorBody
from services.scaler.orders import RebalanceBody, ScaleBody

_REF = "#/components/schemas/"
_TEXTS = {
    "400": "The request breaks a stated bound",
    "401": "The token is missing or wrong",
    "403": "Requests from browsers are refused",
    "404": "There is no such operation",
    "408": "The body did not come in time",
    "409": "The state does not allow it now, or this scaler is superseded",
    "413": "The body is too large",
    "415": "The body is compressed",
    "422": "The target cannot be reached",
    "429": "Too many orders wait",
    "503": "What is needed for the answer is not there yet",
    "504": "The scaler did not answer in time",
}
PUBLIC = ("400", "403", "415")
READING = (*PUBLIC, "401", "503")
FINDING = (*READING, "404")
ORDERING = (*READING, "408", "409", "413", "422", "429", "504")
CANCELLING = (*ORDERING, "404")

# What operators' programs may rely on; answers have more than that.
_ANSWERS = {
    "Health": ("status",),
    "Ready": ("phase", "reason", "bytes_done", "bytes_total", "error"),
    "Layout": ("epoch", "fence", "phase", "reason", "tp", "replicas", "operation", "ranks", "experts"),
    "Devices": ("standby_processes", "devices"),
    "Operation": ("op_id", "kind", "phase", "outcome", "reason", "request", "accepted_unix", "deadline_s", "error"),
    "Operations": ("operations",),
    "Plan": ("kind", "planned", "legs"),
    "Config": (),
}


def describe(
    answer: str, codes: tuple[str, ...], *, body: type[msgspec.Struct] | None = None, status: int = 200
) -> dict[str, Any]:
    """Keyword arguments of a route. `answer`: one of the document's schemas, or a media type. `codes`: of refusals."""
    content: dict[str, Any] = {answer: {"schema": {"type": "string"}}}
    if answer in _ANSWERS:
        content = {"application/json": {"schema": {"$ref": _REF + answer}}}
    error = {"application/json": {"schema": {"$ref": _REF + "ErrorBody"}}}
    responses: dict[str, Any] = {str(status): {"description": "The answer", "content": content}}
    responses |= {code: {"description": _TEXTS[code], "content": error} for code in codes}
    extra: dict[str, Any] = {"responses": responses}
    if body is ScaleBody:  # accepted, or with `dry_run` only planned
        plan = {"application/json": {"schema": {"$ref": _REF + "Plan"}}}
        responses["200"] = {"description": "The plan of a dry run", "content": plan}
    if body is not None:
        schema = {"schema": {"$ref": _REF + body.__name__}}
        extra["requestBody"] = {"required": body is ScaleBody, "content": {"application/json": schema}}
    return {"openapi_extra": extra, "response_model": None, "status_code": status}


def describe_ready() -> dict[str, Any]:
    """As `describe`, for GET /ready: the same body whether ready or not."""
    described = describe("Ready", PUBLIC)
    responses = described["openapi_extra"]["responses"]
    responses["503"] = {**responses["200"], "description": "Not serving; the reason is given"}
    return described


def install(app: FastAPI) -> None:
    """Let the app's OpenAPI document contain the schemas that `describe` names, and no refusal that nobody gives."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            structs = (ScaleBody, RebalanceBody, ErrorBody)
            _, schemas = msgspec.json.schema_components(structs, ref_template=_REF + "{name}")
            answers = {name: {"type": "object", "required": list(fields)} for name, fields in _ANSWERS.items()}
            document["components"] = {"schemas": {**schemas, **answers}}
            for path in document["paths"].values():
                for operation in path.values():
                    if operation["responses"].get("422", {}).get("description") == "Validation Error":
                        del operation["responses"]["422"]  # the framework's
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
