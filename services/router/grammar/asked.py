"""What a request asks its answer to look like."""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.schemas import GenerateRequest, ResponseFormat, StructuredOutputs
from elasticmoe.services.router.grammar.structure import Structure, structure

_OBJECT = '{"type":"object"}'
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_REFUSED = ("structural_tag", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def structure_of(raw: GenerateRequest) -> Structure | None:
    """None where it may be any text. Raises InvalidRequest for what cannot be asked, for two structures at once, and
    for one that is too large."""
    form = raw.response_format
    by_format = None if form is None or form.type == "text" else _of_format(form)
    if raw.structured_outputs is None:
        return by_format
    if by_format is not None:
        text = "structured_outputs and response_format exclude one another"
        raise InvalidRequest(text, param="structured_outputs")
    return _of_structured(raw.structured_outputs)


def _of_format(form: ResponseFormat) -> Structure:
    param = "response_format"
    if form.type == "json_object":
        return structure("json", _OBJECT, param)
    if form.type != "json_schema":
        text = f"{param} is not supported: type {form.type[:40]!r}; supported: text, json_object, json_schema"
        raise InvalidRequest(text, code="unsupported", param=param)
    if form.json_schema is None:
        raise InvalidRequest(f"{param} of type json_schema has no json_schema", param=param)
    given = form.json_schema.schema
    return structure("json", _OBJECT if given is None else _text(given), f"{param}.json_schema.schema")


def _of_structured(asked: StructuredOutputs) -> Structure:
    for name in _REFUSED:
        if getattr(asked, name):
            param = f"structured_outputs.{name}"
            raise InvalidRequest(f"{param} is not supported", code="unsupported", param=param)
    found = [name for name in _KINDS if getattr(asked, name) not in (None, False)]
    if len(found) != 1:
        text = f"structured_outputs has {len(found)} of {', '.join(_KINDS)}; it has to have one"
        raise InvalidRequest(text, param="structured_outputs")
    param = f"structured_outputs.{found[0]}"
    if asked.json is not None:
        return structure("json", asked.json if isinstance(asked.json, str) else _text(asked.json), param)
    if found == ["json_object"]:
        return structure("json", _OBJECT, param)
    if asked.choice is not None:
        return structure("choice", _text(asked.choice), param)
    if asked.regex is not None:
        return structure("regex", asked.regex, param)
    return structure("grammar", asked.grammar or "", param)


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
