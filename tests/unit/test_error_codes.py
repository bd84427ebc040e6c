"""Every code that the product raises anywhere is in the registry, with the status and the retryability that it has
there; and nothing is in the registry that nobody raises."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from elasticmoe.common.error_codes import CODES, GROUPS
from elasticmoe.common.http.errors import error_response, status_of
from elasticmoe.common.protocol import errors
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, Unavailable
from elasticmoe.services.scaler.api import requests as orders
from elasticmoe.services.worker.engine import rows, sampler

ROOT = Path(__file__).parent.parent.parent
FILES = [path for part in ("common", "services", "cli") for path in sorted((ROOT / part).rglob("*.py"))]
KINDS: dict[str, type[ElasticMoEError]] = {
    name: kind
    for module in (errors, orders, rows, sampler)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and issubclass(kind, ElasticMoEError)
}
# Where an error becomes the answer to an HTTP request.
ANSWERING = ("common/http/", "services/router/", "services/scaler/api/", "services/scaler/control/admission.py")
# What takes a code at a place of its own: the place of the code, and of whether it is retryable.
POSITIONS = {"Refused": (0, 2), "jobs.Refused": (1, None), "Refusal": (1, None)}


class Site(NamedTuple):
    """One place that gives an error its code. `kind`: what is made there, by its name."""

    where: str
    code: str
    kind: str
    is_retryable: bool | None
    status: int | None = None


@cache
def trees() -> dict[str, ast.Module]:
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}


@cache
def constants() -> dict[str, str]:
    """Texts that have a name in capitals."""
    found = {}
    for tree in trees().values():
        for node in tree.body:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            target = node.targets[0] if isinstance(node, ast.Assign) else target
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id.isupper() and isinstance(value, ast.Constant):
                found[target.id] = value.value
    return found


def texts_of(node: ast.AST) -> list[str]:
    """The codes that an expression may be; none for one that passes on another error's."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.IfExp):
        return texts_of(node.body) + texts_of(node.orelse)
    if isinstance(node, ast.Name):
        return [constants()[node.id]] if node.id in constants() else []
    return []


def sites_of_call(where: str, node: ast.Call) -> Iterator[Site]:
    name = ast.unparse(node.func)
    words = {word.arg: word.value for word in node.keywords}
    at, retryable_at = POSITIONS.get(name, (None, None))
    retryable = words.get("retryable")
    if at is None:
        code = words.get("code")
    else:
        code = node.args[at] if len(node.args) > at else words.get("code")
        if retryable_at is not None and len(node.args) > retryable_at:
            retryable = node.args[retryable_at]
    kind = KINDS.get(name.rpartition(".")[2])
    is_retryable = kind.retryable if kind is not None else None
    if name == "Refused":
        is_retryable = False
    if isinstance(retryable, ast.Constant):
        is_retryable = retryable.value
    elif retryable is not None:
        is_retryable = None
    status = node.args[0].value if name == "Refusal" and isinstance(node.args[0], ast.Constant) else None
    for text in texts_of(code) if code is not None else []:
        yield Site(where, text, name, is_retryable, status if isinstance(status, int) else None)


def sites_of_defaults(where: str, node: ast.FunctionDef) -> Iterator[Site]:
    positional = list(zip(node.args.args[::-1], node.args.defaults[::-1], strict=False))
    for argument, default in [*positional, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]:
        if argument.arg == "code" and default is not None:
            yield from (Site(where, text, node.name, None) for text in texts_of(default))


@cache
def sites() -> list[Site]:
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                found += sites_of_call(where, node)
            elif isinstance(node, ast.FunctionDef):
                found += sites_of_defaults(where, node)
            elif isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
                        target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                        if ast.unparse(target) == "code" and (texts := texts_of(line.value)) and texts[0]:
                            found.append(Site(where, texts[0], node.name, None))
    return found


def test_every_code_is_in_the_registry() -> None:
    assert len(sites()) > 200
    assert [site for site in sites() if site.code not in CODES] == []


def test_every_family_is_in_the_registry() -> None:
    assert {kind.code for kind in KINDS.values()} - set(CODES) == set()


def test_nothing_is_in_the_registry_that_nobody_raises() -> None:
    written = "\n".join(
        node.value
        for name, tree in trees().items()
        if not name.startswith("common/error_codes/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert [code for code in CODES if code not in written] == []
    assert sum(map(len, GROUPS.values())) == len(CODES)


def test_the_registry_says_what_may_be_tried_again() -> None:
    for code, known in CODES.items():
        seen = {site.is_retryable for site in sites() if site.code == code and site.is_retryable is not None}
        seen |= {kind.retryable for kind in KINDS.values() if kind.code == code and kind is not ElasticMoEError}
        if known.is_retryable is None:
            assert seen == {True, False}, (code, [site for site in sites() if site.code == code])
        else:
            assert seen <= {known.is_retryable}, (code, [site for site in sites() if site.code == code])


def test_the_registry_says_which_statuses_answers_have() -> None:
    for site in sites():
        known = CODES[site.code]
        if site.status is not None:
            assert site.status in known.statuses, site
        elif site.kind == "ConfigError":
            continue  # stops a start
        elif site.where.startswith(ANSWERING) and (kind := KINDS.get(site.kind.rpartition(".")[2])) is not None:
            error = kind.__new__(kind)
            error.code, error.retryable = site.code, bool(site.is_retryable)
            assert status_of(error) in known.statuses, site


def test_texts_tell_what_it_means_and_what_to_do() -> None:
    for code, known in CODES.items():
        assert known.meaning[:1].isupper() or known.meaning[:1] == "`", code
        assert known.remedy, code
        assert not known.meaning.endswith("."), code


@pytest.mark.parametrize("code", [code for code, known in CODES.items() if 409 in known.statuses])
def test_conflicts_say_whether_to_come_again(code: str) -> None:
    """What is in the way of an order may end: then the same order may be accepted."""
    kinds = [kind for kind in KINDS.values() if kind.code == code]
    error = kinds[0].__new__(kinds[0]) if kinds else Conflict("", code=code, retryable=CODES[code].is_retryable)
    error.message = ""
    assert error.retryable == CODES[code].is_retryable
    assert ("retry-after" in error_response(error).headers) == bool(CODES[code].is_retryable)


def test_an_error_of_another_process_has_its_codes_status() -> None:
    assert status_of(ElasticMoEError("", code="kv_exhausted", retryable=True)) == 429
    assert status_of(ElasticMoEError("", code="out_of_memory", retryable=True)) == 503
    assert status_of(ElasticMoEError("", code="duplicate_request_id")) == 500  # between processes: no client's business
    assert status_of(ElasticMoEError("", code="nobody_knows", retryable=True)) == 503
    assert status_of(Unavailable("", code="nobody_knows")) == 503
