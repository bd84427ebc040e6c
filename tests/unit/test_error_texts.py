"""Every error text of the product, collected from its source: each has a code, and limit and value where it has one;
what a library says reaches nobody as it is. `python -m tests.unit.test_error_texts` lists them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elasticmoe.common.protocol.errors import Unready

ROOT = Path(__file__).parent.parent.parent
SOURCE = ("common", "services", "cli")
BASE = "ElasticMoEError"
INTERNAL = "internal_error"
# Errors that are nobody's fault but ours: clients are told `internal error`, these texts are for the log.
FOR_THE_LOG = {
    "unexpected error",
    "{} failed with {}",
    "the engine sent an invalid answer",
    "tokens could not be taken",
    "the router's {} loop has ended",
    "the order could not be carried out: {}",
    "{} in the rank; see the worker's log",
}
# Texts of exceptions that are not of our classes and yet ours, or the user's own.
WORDS_OF_OURS = {
    "{}.{}: {}": "extents, common/devices/extents.py",
    "{}: {}": "extents, common/devices/extents.py",
    "the bus of {} bytes cannot be opened: {}": "native/src/bus",
    "layout: {}": "common/layout.py",
    "devices: {}": "common/devices/names.py",
    "no bus of {} ranks with {} tokens each: {}": "native/src/bus",
    "no ledger of {} rows with {} tokens and {} blocks each: {}": "native/src/ledger",
    "chat template does not compile: {}": "what is wrong with the template, of which only its compiler knows",
    "the chat template refuses the messages: {}": "the template's own words",
    "{}; seed {}": "cli/chaos.py",
    None: "ledger rows (native/src/ledger), and benchmarks",
}
CODE = re.compile(r"[a-z][a-z0-9_]{2,40}")
# A text with one of these states a limit, and so has to give it and the value.
LIMIT = re.compile(
    r"\b(limit|at most|at least|exceeds?|more than|less than|too (?:long|large|many|few|short|small))\b(?! one)"
)


@dataclass(frozen=True)
class Made:
    """One place where an error is made. `text`: its f-string with `{}` for what is filled in; None where it comes from
    elsewhere. `filled`: the source of what is filled in. `handled`: the name and the types of the exception that is
    being handled."""

    place: str
    kind: str
    code: str | None
    text: str | None
    filled: tuple[str, ...]
    handled: tuple[str, tuple[str, ...]] | None


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for folder in SOURCE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def families() -> dict[str, str | None]:
    """The classes of errors, with the code that each has by itself."""
    classes = {
        node.name: node for _, module in modules() for node in ast.walk(module) if isinstance(node, ast.ClassDef)
    }
    found: dict[str, str | None] = {BASE: INTERNAL}

    def code_of(name: str) -> str | None:
        for item in classes[name].body:
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "code":
                return str(ast.literal_eval(item.value))
        return next((found[base] for base in map(ast.unparse, classes[name].bases) if base in found), None)

    grown = True
    while grown:
        new = [n for n, node in classes.items() if n not in found and {ast.unparse(b) for b in node.bases} & set(found)]
        found |= {name: code_of(name) for name in new}
        grown = bool(new)
    return found


FAMILIES = families()


def text_of(node: ast.expr) -> tuple[str | None, tuple[str, ...]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, ()
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        filled = tuple(ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue))
        return "".join(map(str, parts)), filled
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        (left, more), (right, rest) = text_of(node.left), text_of(node.right)
        return f"{left or '{}'}{right or '{}'}", (*more, *rest)
    return None, (ast.unparse(node),)


def made_in(path: Path, module: ast.Module) -> Iterator[Made]:
    parents = {child: node for node in ast.walk(module) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        kind = ast.unparse(node.func).rpartition(".")[2]
        if kind not in FAMILIES or not node.args or (path.name == "refusal.py" and path.parent.name == "http"):
            continue
        if isinstance(node.args[0], ast.Constant) and not isinstance(node.args[0].value, str):
            continue  # another Refusal: common/http/refusal.py, bytes of an answer
        scope: ast.AST = node
        handled = None
        while scope in parents and not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            scope = parents[scope]
            if isinstance(scope, ast.ExceptHandler) and scope.name and scope.type and handled is None:
                types = scope.type.elts if isinstance(scope.type, ast.Tuple) else [scope.type]
                handled = (scope.name, tuple(ast.unparse(each) for each in types))
        text, filled = text_of(node.args[0])
        if isinstance(node.args[0], ast.Name):  # the text has a name, because the line would be long
            name = node.args[0].id
            texts = [
                text_of(item.value)
                for item in ast.walk(scope)
                if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == name and item.lineno < node.lineno
            ]
            text, filled = texts[-1] if texts else (None, (name,))
        given = next((keyword.value for keyword in node.keywords if keyword.arg == "code"), None)
        code = FAMILIES[kind] if given is None else ast.unparse(given).strip("'")
        place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
        yield Made(place, kind, code, text, filled, handled)


ALL = [made for path, module in modules() for made in made_in(path, module)]


def test_they_are_found() -> None:
    assert len(FAMILIES) >= 20
    assert len(ALL) >= 300
    assert len([made for made in ALL if made.text]) >= 0.9 * len(ALL)
    assert {made.code for made in ALL} >= {
        "does_not_fit",
        "bad_config",
        "invalid_request",
        "not_running",
        "port_in_use",
    }


def test_each_has_a_code() -> None:
    internal = [made for made in ALL if made.code == INTERNAL]
    assert [f"{made.place}: {made.text}" for made in internal if made.text not in FOR_THE_LOG] == []
    given = [(made.place, made.code) for made in ALL if re.fullmatch(r"\w+", str(made.code))]
    assert len(given) >= 0.9 * len(ALL)
    assert [f"{place}: {code}" for place, code in given if not CODE.fullmatch(str(code).lower())] == []


def test_each_that_tells_to_come_again_says_how_to_see_when() -> None:
    """But for the HMM's, which only the scaler hears, and asks again."""
    made = [made for made in ALL if made.code == "not_ready" and not made.place.startswith("services/hmm/")]
    assert len(made) >= 8
    assert [f"{each.place}: {each.text}" for each in made if each.kind != "Unready"] == []
    assert str(Unready("why")) == "why: try again in a moment (`elasticmoe status` shows how far it is)"


def test_each_that_states_a_limit_gives_it_and_the_value() -> None:
    lacking = []
    for made in ALL:
        if made.text is None or not LIMIT.search(made.text):
            continue
        figures = len(made.filled) + len(re.findall(r"\b\d[\d.]*\b", made.text))
        if figures < (1 if made.text.endswith(", the limit") else 2):  # there the value is the limit
            lacking.append(f"{made.place}: {made.text}")
    assert lacking == []


def is_ours(name: str) -> bool:
    return name.rpartition(".")[2] in FAMILIES


def test_no_text_is_a_librarys() -> None:
    found = []
    for made in ALL:
        if made.handled is None or all(is_ours(each) for each in made.handled[1]):
            continue
        name = made.handled[0]
        raw = {name, f"str({name})", f"repr({name})"}
        if raw & set(made.filled) and made.text not in WORDS_OF_OURS:
            found.append(f"{made.place}: {made.handled[1]} in {made.text!r}")
    assert found == []


if __name__ == "__main__":
    for made in sorted(ALL, key=lambda made: (made.code or "", made.place)):
        print(f"{made.code:<28}{made.place:<48}{made.text or '(from elsewhere)'}")
