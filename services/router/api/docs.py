"""The OpenAPI document: bodies and answers are described from the structs that decode and encode them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response

from elasticmoe.common.http import openapi
from elasticmoe.common.http.errors import ErrorBody
from elasticmoe.common.http.openapi import REF, json_content, refusals
from elasticmoe.services.router.api import messages_schemas, responses_schemas, schemas, told
from elasticmoe.services.router.api.examples import EXAMPLES
from elasticmoe.services.router.api.words import (
    ANTHROPIC_WORDS,
    MESSAGE_WORDS,
    RESPONSES_WORDS,
    TOOL_WORDS,
    WORDS,
    UnsupportedAnthropicWords,
    UnsupportedMessageWords,
    UnsupportedResponsesWords,
    UnsupportedToolWords,
    UnsupportedWords,
)

ABOUT = """An OpenAI-compatible API for one model. What is honoured, ignored and refused: `docs/api.md`; framing,
limits, hosts and origins: `docs/http.md`; error codes: `docs/reference/errors.md`. Scaling has an API of its own, on
the admin listener."""
_KEY = """The text of the file that the setting `api_key_file` names, as `Authorization: Bearer KEY`. Without that
setting no key is asked for, and only hosts are served that `docs/http.md` names."""
_REFUSED = WORDS | MESSAGE_WORDS | RESPONSES_WORDS | ANTHROPIC_WORDS | TOOL_WORDS
_BASES = (
    UnsupportedMessageWords,
    UnsupportedWords,
    UnsupportedResponsesWords,
    UnsupportedAnthropicWords,
    UnsupportedToolWords,
)
_ERRORS = {
    "400": "The request breaks a stated bound, or asks for what is not supported",
    "401": "The key is missing or wrong",
    "403": "The host or the page's origin is not known, and there is no key; see allowed_hosts and cors_origins",
    "404": "No such model or path",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not JSON by its content type, or it is compressed",
    "429": "Too many requests are being served; see Retry-After",
    "500": "The engine cannot compute this request (`request_failed`, `bad_logits`); others are not affected",
    "503": "No replica is ready; see Retry-After",
    "504": "The request exceeded its deadline",
}


def describe(
    body: type[msgspec.Struct] | None,
    answer: type[msgspec.Struct] | None,
    *,
    chunk: type[msgspec.Struct] | None = None,
    event: type[msgspec.Struct] | None = None,
    names_model: bool = False,
    unready: type[msgspec.Struct] | None = None,
) -> Any:
    """Keyword arguments of a route: how its body and its answers look. `answer` None: plain text. `names_model`: its
    path does, and may name none. `chunk`: what the events of a streamed answer hold; or `event`: what they have in
    common where they have names. `unready`: the body of its 503,
    where that is no error's."""
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = json_content(answer.__name__, EXAMPLES[answer.__name__])
    if chunk is not None:
        content["text/event-stream"] = {"schema": _event_of(chunk)}
    if event is not None:
        content["text/event-stream"] = {"schema": _named_event_of(event)}
    short = ("400", "401", "403", "404", "503") if names_model else ("400", "401", "403", "503")
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    responses |= refusals(_ERRORS, _ERRORS if body is not None else short)
    if unready is not None:
        why = json_content(unready.__name__, EXAMPLES[unready.__name__])
        responses["503"] = {"description": "Not serving; the body says why", "content": why}
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": json_content(body.__name__, EXAMPLES[body.__name__])}
    return {"openapi_extra": extra, "response_model": None, "response_class": Response}


def _event_of(chunk: type[msgspec.Struct]) -> dict[str, Any]:
    """An event of a stream. Before OpenAPI 3.2 the schema of an event stream is read as that of each of its events."""
    parts = [{"$ref": REF + chunk.__name__}, {"$ref": REF + "ErrorBody"}]
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    meaning = "A chunk; an error, where the answer ends early; the end"
    data = {"anyOf": [{"const": "[DONE]"}, json], "description": meaning}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _named_event_of(event: type[msgspec.Struct]) -> dict[str, Any]:
    """An event that has a name, which is the `type` of what it holds, too."""
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": REF + event.__name__}}
    return {"type": "object", "required": ["event", "data"], "properties": {"event": {"type": "string"}, "data": json}}


def install(app: FastAPI, public: frozenset[str], *, has_key: bool) -> None:
    """Let the app's OpenAPI document contain the structs' schemas. With a key, all paths but `public` ones ask for
    it."""

    def components() -> dict[str, Any]:
        kinds = [
            kind
            for kind in {**vars(schemas), **vars(responses_schemas), **vars(messages_schemas), **vars(told)}.values()
            if isinstance(kind, type)
        ]
        structs = [ErrorBody, *(kind for kind in kinds if issubclass(kind, msgspec.Struct) and kind not in _BASES)]
        _, found = msgspec.json.schema_components(structs, ref_template=REF + "{name}")
        return {name: _plain(schema) for name, schema in found.items()}

    openapi.install(app, components, _KEY, public, is_needed=has_key)


def _plain(schema: Any) -> Any:
    """Without what the structs have for decoding alone: words that are refused, and whole floats beside integers, which
    JSON Schema takes for integers anyway."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema if not (isinstance(part, dict) and part.get("multipleOf") == 1.0)]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _plain(part) for name, part in schema.items()}
    union = plain.get("anyOf")
    if isinstance(union, list) and len(union) == 1:
        plain = {**plain, **union[0]}
        del plain["anyOf"]
    properties = plain.get("properties")
    if isinstance(properties, dict):
        refused = [name for name, part in properties.items() if part == {} and name in _REFUSED]
        plain["properties"] = {name: part for name, part in properties.items() if name not in refused}
    return plain
