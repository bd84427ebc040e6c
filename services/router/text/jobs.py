"""What is asked of texts."""

from __future__ import annotations

from typing import Any

import msgspec


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat template is given. `required`: variables that the template must read, because the request would
    otherwise be answered as if it had not said them; `add_special`: the tokenizer's own special tokens around it."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    required: tuple[str, ...] = ()
    add_special: bool = False
