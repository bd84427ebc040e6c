"""What a field means, said where it is declared: OpenAPI documents and reference pages are made from it."""

from __future__ import annotations

from typing import Any

from msgspec import Meta


def says(text: str, *examples: Any) -> Meta:
    """For `Annotated[type, says(...)]`: the field's meaning, and values that it may have."""
    return Meta(description=text, examples=list(examples) or None)
