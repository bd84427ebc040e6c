"""The admin surface's OpenAPI document: bodies from the structs that decode them, answers from those that encode
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Response

from elasticmoe.common.http import openapi
from elasticmoe.common.http.errors import ErrorBody
from elasticmoe.common.http.openapi import REF, json_content, refusals
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.contract import ScaleStatus
from elasticmoe.services.scaler.api.examples import EXAMPLES
from elasticmoe.services.scaler.api.policy_views import DecisionsView, PolicyBody, PolicyView
from elasticmoe.services.scaler.api.requests import RebalanceBody, ScaleBody

ABOUT = """How an operator scales a running deployment, and sees what it does: `docs/admin-api.md` has every call by
curl, `docs/scaling.md` what an operation is, `docs/reference/` the error codes and the events."""
_TOKEN = """The text of `RUN_DIR/secrets/admin.token`, as `Authorization: Bearer TOKEN`. On this machine
`RUN_DIR/sockets/admin.sock` is the same listener, and nobody else can be behind it."""
_TEXTS = {
    "400": "The request breaks a stated bound",
    "401": "The token is missing or wrong",
    "403": "The request comes from a page that is not this listener's",
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

ANSWERS = {
    kind.__name__: kind
    for kind in (
        views.Health,
        views.Ready,
        views.Layout,
        views.Devices,
        views.Operation,
        views.Operations,
        views.Moves,
        views.Plan,
        views.Now,
        views.SeriesView,
        views.ExpertsView,
        views.Processes,
        ScaleStatus,
        PolicyView,
        DecisionsView,
    )
}
_CONFIG = {
    "type": "object",
    "description": "Every setting of the scaler that is in force, by its name: docs/reference/configuration.md",
}


def describe(
    answer: str,
    codes: tuple[str, ...],
    *,
    body: type[msgspec.Struct] | None = None,
    status: int = 200,
    told: str = "The answer",
    query: Mapping[str, tuple[str, Any]] = {},
) -> dict[str, Any]:
    """Keyword arguments of a route. `answer`: one of the document's schemas, or a media type. `codes`: of refusals.
    `told`: what the answer is. `query`: by its name, what a parameter means, and a value."""
    content: dict[str, Any] = {answer: {"schema": {"type": "string"}}}
    if answer in ANSWERS or answer == "Config":
        content = json_content(answer, EXAMPLES[answer])
    responses: dict[str, Any] = {str(status): {"description": told, "content": content}}
    responses |= refusals(_TEXTS, codes)
    extra: dict[str, Any] = {"responses": responses}
    if query:
        extra["parameters"] = [
            {"name": name, "in": "query", "required": False, "description": meaning}
            | {"schema": {"type": "string"}, "example": example}
            for name, (meaning, example) in query.items()
        ]
    if body is ScaleBody:  # accepted, or with `dry_run` only planned
        responses["200"] = {"description": "The plan of a dry run", "content": json_content("Plan", EXAMPLES["Plan"])}
    if body is not None:
        content = json_content(body.__name__, EXAMPLES[body.__name__])
        extra["requestBody"] = {"required": body is not RebalanceBody, "content": content}
    return {"openapi_extra": extra, "response_model": None, "response_class": Response, "status_code": status}


def describe_ready() -> dict[str, Any]:
    """As `describe`, for GET /ready: the same body whether ready or not."""
    described = describe("Ready", PUBLIC, told="It serves")
    responses = described["openapi_extra"]["responses"]
    responses["503"] = {**responses["200"], "description": "Not serving; the body says why"}
    return described


def install(app: FastAPI, public: frozenset[str]) -> None:
    """Let the app's OpenAPI document contain the schemas that `describe` names."""

    def schemas() -> dict[str, Any]:
        structs = (ScaleBody, RebalanceBody, PolicyBody, ErrorBody, *ANSWERS.values())
        _, found = msgspec.json.schema_components(structs, ref_template=REF + "{name}")
        return {**found, "Config": _CONFIG}

    openapi.install(app, schemas, _TOKEN, public)
