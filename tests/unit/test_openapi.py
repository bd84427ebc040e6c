"""Both OpenAPI documents tell what everything means, show what to send, and say who is let in. That they are true is
tested by test_http_schemathesis.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.version import version
from elasticmoe.services.router.api import told
from elasticmoe.services.router.api.examples import EXAMPLES as router_examples
from elasticmoe.services.scaler.api.docs import ANSWERS
from elasticmoe.services.scaler.api.examples import EXAMPLES as admin_examples
from tests.unit import test_http_surfaces as surfaces
from tests.unit.test_http_schemathesis import serving_admin, serving_router
from tests.unit.test_http_surfaces import App, call, document_of

__all__ = ["serving_admin", "serving_router"]

TOKEN = {"Authorization": "Bearer secret"}
DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture
def documents(serving_router: App, serving_admin: App) -> list[dict[str, Any]]:
    return [document_of(serving_router), document_of(serving_admin, headers=TOKEN)]


def operations_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_operations_and_answers_are_described(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        assert document["info"]["description"]
        assert document["info"]["version"] == version()  # the software's, not the framework's
        for name, operation in operations_of(document):
            contents = [answer["content"] for answer in operation["responses"].values()]
            assert all("example" in one["application/json"] for one in contents if "application/json" in one), name
            assert operation["description"].endswith("."), name
            assert all(answer["description"] for answer in operation["responses"].values()), name
            assert all(parameter["description"] for parameter in operation.get("parameters", ())), name


def test_every_field_is_described(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        schemas = document["components"]["schemas"]
        assert len(schemas) > 10
        for name, schema in schemas.items():
            assert schema.get("description"), name
            for field, part in schema.get("properties", {}).items():
                is_tag = set(part) == {"enum"}
                assert is_tag or part.get("description"), f"{name}.{field}"


def test_references_lead_somewhere(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        named = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
        assert named == set(document["components"]["schemas"]) & named
        assert named <= set(document["components"]["schemas"])


def test_examples_are_answered(serving_router: App, serving_admin: App) -> None:
    num_tried = 0
    for app, headers in ((serving_router, {}), (serving_admin, TOKEN)):
        for name, operation in operations_of(document_of(app, headers=headers)):
            if "requestBody" not in operation:
                continue
            example = operation["requestBody"]["content"]["application/json"]["example"]
            method, path = name.split()
            given = {**headers, "content-type": "application/json"}
            answer = asyncio.run(call(app, method, path, json.dumps(example).encode(), given))
            assert answer.status_code in (200, 202), f"{name}: {answer.text}"
            num_tried += 1
    assert num_tried == 10


def test_examples_of_answers_are_such_answers() -> None:
    router_answers = {name for name in router_examples if not name.endswith("Request")}
    for kind, example in [
        *((kind, router_examples[name]) for name, kind in vars(told).items() if name in router_answers),
        *((kind, admin_examples[name]) for name, kind in ANSWERS.items()),
    ]:
        given = msgspec.json.encode(example)
        again = msgspec.json.encode(msgspec.json.decode(given, type=kind))
        assert json.loads(again) == json.loads(given), kind


def test_what_is_open_says_so_and_all_else_asks(serving_router: App, serving_admin: App) -> None:
    """The admin document asks for the token exactly where the listener does."""
    document = document_of(serving_admin, headers=TOKEN)
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for name, operation in operations_of(document):
        method, path = name.split()
        if path in surfaces.STREAMS:
            continue
        answer = asyncio.run(call(serving_admin, method, path.replace("{op_id}", "x"), b"", {}))
        assert (answer.status_code == 401) == (operation["security"] == [{"bearer": []}]), name
    # A router without a key asks nobody.
    assert all(not operation["security"] for _, operation in operations_of(document_of(serving_router)))


def test_a_router_with_a_key_says_so(tmp_path: Path) -> None:
    app = surfaces.make_router(tmp_path, surfaces.Dispatcher, api_key=b"k")
    key = {"Authorization": "Bearer k"}
    for name, operation in operations_of(document_of(app, headers=key)):
        method, path = name.split()
        answer = asyncio.run(call(app, method, path.replace("{name}", "m"), b"", {}))
        assert (answer.status_code == 401) == (operation["security"] == [{"bearer": []}]), name


def test_pages_name_the_documents_and_every_path(documents: list[dict[str, Any]]) -> None:
    router, admin = documents
    page = (DOCS / "admin-api.md").read_text()
    for name, _ in operations_of(admin):
        path = name.split()[1].replace("{op_id}", "OP")
        assert path in page, name
    assert "/openapi.json" in page
    assert "/openapi.json" in (DOCS / "api.md").read_text()
    assert len(list(operations_of(router))) >= 10
