"""From what an answer has to look like to a grammar in llguidance's Lark."""

from __future__ import annotations

import json
import re

import msgspec
from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from elasticmoe.common.grammar import FREE_SPELLING
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.grammar.calls import LarkMark, json_rule, lark_of_calls, literal
from elasticmoe.services.router.grammar.schema import DEPTH_MAX, read_schema
from elasticmoe.services.router.grammar.structure import Structure, Thought, too_large


def grammar_of(structure: Structure, thought: Thought | None, mark: LarkMark) -> str:
    """The grammar. Raises InvalidRequest."""
    answers = {"answer": _lark(structure, mark)}
    if structure.instead is not None:
        answers["instead"] = _lark(structure.instead, mark)
    if thought is None and len(answers) == 1:
        return FREE_SPELLING + answers["answer"]
    begin, rules = ("", "") if thought is None else _thinking(thought, mark)
    outer = f"{FREE_SPELLING}start: {begin}({' | '.join(f'@{name}' for name in answers)})\n{rules}"
    named = [{"name": name, "lark_grammar": FREE_SPELLING + lark} for name, lark in answers.items()]
    return json.dumps({"grammars": [{"lark_grammar": outer}, *named]}, ensure_ascii=False)


def _lark(structure: Structure, mark: LarkMark) -> str:
    if structure.kind == "grammar":
        return _own(structure)
    if structure.kind == "calls":
        return lark_of_calls(structure, mark)
    return f"start: {_rule(structure)}\n"


def _rule(structure: Structure) -> str:
    match structure.kind:
        case "json":
            return json_rule(read_schema(structure.text, structure.param))
        case "regex":
            if _ends_in_escape(structure.text):
                text = f"{structure.param} ends in a backslash that escapes nothing"
                raise InvalidRequest(text, code="invalid_grammar", param=structure.param)
            return f"/{regex_to_lark(structure.text, 'dws')}/"
        case _:
            return " | ".join(literal(choice) for choice in msgspec.json.decode(structure.text, type=list[str]))


def _ends_in_escape(pattern: str) -> bool:
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 1


def _own(structure: Structure) -> str:
    """A client's grammar. What is nested too deep is refused before anybody reads it, by all brackets that it has."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{}\])]", structure.text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    if deepest > DEPTH_MAX:
        text = f"{structure.param} has brackets of {deepest} levels; the limit is {DEPTH_MAX}"
        raise too_large(text, structure.param)
    try:
        return str(any_to_lark(structure.text))
    except Exception as error:  # the library has errors of many kinds for it
        text = f"{structure.param} is neither Lark nor GBNF: {' '.join(str(error).split())[:200]}"
        raise InvalidRequest(text, code="invalid_grammar", param=structure.param) from None


def _thinking(thought: Thought, mark: LarkMark) -> tuple[str, str]:
    """What an answer begins with where the model thinks first, and its rules."""
    closing = mark(thought.close)
    spelled = regex_to_lark(re.escape(thought.close), "")
    if closing.startswith("<["):  # spelled with other tokens it ends the thinking for the answer's reader
        inside = f"thinking: THOUGHT {closing}\nTHOUGHT: /(?s:.*)/ & ~/(?s:.*){spelled}(?s:.*)/\n"
    else:
        inside = f"thinking[lazy]: /(?s:.*){spelled}/\n"
    begin = "thinking SPACES" if thought.is_inside else f"({mark(thought.open)} thinking SPACES)?"
    return f"{begin} ", f"{inside}SPACES: /[ \\t\\r\\n]{{0,8}}/\n"
