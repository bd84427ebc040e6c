"""In a text worker: a request's structure to a grammar that has been tried.

It is tried with the limits that ranks have, on a vocabulary of single bytes and the model's special tokens: whether a
grammar can be read does not depend on the other tokens.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from elasticmoe.common.grammar import GrammarError, GrammarMatcher, GrammarTokens
from elasticmoe.common.grammar_text import pack_grammar
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.limits import GRAMMAR_BYTES_MAX, GRAMMAR_PACKED_BYTES_MAX
from elasticmoe.services.router.grammar.calls import calls_in_json, literal
from elasticmoe.services.router.grammar.lark import grammar_of
from elasticmoe.services.router.grammar.structure import Structure, Thought, too_large

_UNSUPPORTED: Final = re.compile(r"Unimplemented keys|Unknown format|not supported|unsupported", re.IGNORECASE)
_COMPLEX: Final = re.compile(r"too (complex|large|many|big|deep)|limit|fuel|exceed", re.IGNORECASE)


class GrammarCompiler:
    """Of one model. `special`: the names of its special tokens by id; `size`: all its tokens."""

    def __init__(self, special: dict[int, bytes], size: int) -> None:
        self._ids = {name.decode(errors="replace"): token_id for token_id, name in special.items()}
        tokens = [special.get(token_id, b"") for token_id in range(size)]
        self._tokens = GrammarTokens([*tokens, *(bytes([byte]) for byte in range(256))], special)

    def compile(self, structure: Structure, thought: Thought | None) -> bytes:
        """The grammar's text, packed. Raises InvalidRequest with what is wrong with it."""
        plain = calls_in_json(structure)
        if plain is not None:  # what is no schema is told by the library, which reads all of it there
            self._packed(plain, None)
        try:
            return self._packed(structure, thought)
        except InvalidRequest:
            if structure.instead is not None:  # the refusal names the one that is refused, where it is one
                self._packed(msgspec.structs.replace(structure, instead=None), None)
                self._packed(structure.instead, None)
            raise

    def _packed(self, structure: Structure, thought: Thought | None) -> bytes:
        param, instead = structure.param, structure.instead
        name = param if instead is None else f"{param} together with {instead.param}"
        try:
            text = grammar_of(structure, thought, self._mark)
        except (InvalidRequest, MemoryError):
            raise
        except Exception as error:  # of the libraries that turn patterns to rules
            text = f"{name} cannot be read: {' '.join(str(error).split())[:200]}"
            raise InvalidRequest(text, code="invalid_grammar", param=param) from None
        if (size := len(text.encode())) > GRAMMAR_BYTES_MAX:
            limit = f"the limit is {GRAMMAR_BYTES_MAX}"
            raise too_large(f"{name} makes a grammar of {size} bytes; {limit}", param)
        packed = pack_grammar(text)
        if len(packed) > GRAMMAR_PACKED_BYTES_MAX:
            limit = f"the limit is {GRAMMAR_PACKED_BYTES_MAX}"
            raise too_large(f"{name} makes a grammar of {len(packed)} bytes, compressed; {limit}", param)
        self._try(text, param)
        return packed

    def _try(self, text: str, param: str) -> None:
        """Raises InvalidRequest for a grammar that cannot be read."""
        try:
            state = GrammarMatcher(self._tokens, text).state()
        except GrammarError as error:
            raise _refusal(error, param) from None
        if state.error is not None:
            raise _refusal(state.error, param)

    def _mark(self, text: str) -> str:
        token_id = self._ids.get(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"


def _refusal(error: GrammarError, param: str) -> InvalidRequest:
    said = error.message
    if _UNSUPPORTED.search(said):
        return InvalidRequest(f"{param} asks for what is not supported: {said}", code="unsupported_schema", param=param)
    if _COMPLEX.search(said):
        return InvalidRequest(f"{param} is too complex: {said}", code="grammar_too_complex", param=param)
    return InvalidRequest(f"{param} is not valid: {said}", code="invalid_grammar", param=param)
