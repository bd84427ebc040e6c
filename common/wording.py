"""What the decoders' complaints mean, for people: what a value has to be, what it is, and what was meant. Pure.

The library (msgspec) names types, regular expressions and paths of its own. Texts of ours name the field, the limit and
the value: `replicas: has to be a whole number of at least 1; it is 0`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from elasticmoe.common.devices.names import COUNT_PATTERN
from elasticmoe.common.protocol.limits import RANKS_MAX

_PATH = re.compile(r"^(.*) - at (`key` in )?`\$([^`]*)`$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `([^`]+)`(.*)$", re.DOTALL)
_BOUND = re.compile(r"^ (>=|<=|>|<) (\S+)$")
_LENGTH = re.compile(r"^ of length (>=|<=|==) (\d+)$")
_PATTERN = re.compile(r"^ matching regex '(.*)'$", re.DOTALL)
_GOT = re.compile(r"^, got `([^`]+)`$")
_ENUM = re.compile(r"^Invalid enum value (.*)$", re.DOTALL)
_FIELD = re.compile(r"^Object (missing required|contains unknown) field `([^`]*)`$")
_MALFORMED = re.compile(r"^JSON is malformed: .*\(byte (\d+)\)$", re.DOTALL)
_ONE_OF = re.compile(r"^\^\(([\w|-]+)\)(?:\$|\\Z)$")
_CHARACTERS = re.compile(r"^\^\[([^\]]+)\]\{(\d+),(\d+)\}(?:\$|\\Z)$")

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_PARTS = {"str": ("character", "characters"), "array": ("entry", "entries"), "object": ("member", "members")}
_COMPARED = {">=": "of at least", "<=": "of at most", ">": "above", "<": "below", "==": "of exactly"}
# What regular expressions of ours mean, where it does not follow from their form.
_PATTERNS = {
    COUNT_PATTERN: f"has to be host:N, N being a number of devices from 1 to {RANKS_MAX}, or numbers of accelerators "
    "such as npu:0-7, cuda:0,cuda:2 or cuda:0/4",
    r"^[^\x00-\x1f\x7f-\x9f]*\Z": "has to be a text without control characters",
    r"^(https?://[^\s/?#@]+(/[^\s?#]*)?)?\Z": "has to be empty, or http:// or https:// with a host, perhaps a "
    "port and a path",
    r"^[\x21-\x7e ]{0,4096}$": "has to be at most 4096 visible ASCII characters and spaces",
}
_CHARS_MAX = 40


class Complaint(NamedTuple):
    """`path`: of the value that is wrong, such as `stop[1]`; empty for the whole. `needs`: what it has to be. `got`:
    the kind that it is, where the library tells; empty where it does not. `is_name`: not the value but one of the names
    in it. `is_field`: a field that it has or lacks, whatever it is."""

    path: str
    needs: str
    got: str = ""
    is_name: bool = False
    is_field: bool = False

    def told(self, value: str = "") -> str:
        """The text; `value`: what it is, as `shown` gives it."""
        what = f"a name in {self.path}: " if self.is_name else f"{self.path}: " if self.path else ""
        is_what = "" if self.is_name or self.is_field else value or self.got
        return what + self.needs + (f"; it is {is_what}" if is_what else "")


def read(error: msgspec.ValidationError, kind: Any = None) -> Complaint:
    """What the library complains about. `kind`: the struct that was to be decoded: its choices and fields are told."""
    match = _PATH.match(str(error))
    what, is_name, path = match.groups() if match else (str(error), None, "")
    name = path.lstrip(".")
    if isinstance(error.__cause__, ValueError):  # of a struct's own check: its text is ours
        return Complaint(name, str(error.__cause__), is_field=True)
    return _read(what, name, kind)._replace(is_name=bool(is_name))


def _read(what: str, name: str, kind: Any) -> Complaint:
    if _ENUM.match(what):
        return Complaint(name, f"has to be one of {', '.join(_choices(kind, name)) or 'those allowed'}")
    if field := _FIELD.match(what):
        if field[1].startswith("missing"):
            return Complaint(name, f"needs a field {field[2]!r}", is_field=True)
        meant = nearest(field[2], _fields(kind, name))
        return Complaint(name, f"has no field {field[2][:_CHARS_MAX]!r}{meant}", is_field=True)
    expected = _EXPECTED.match(what)
    if expected is None:
        return Complaint(name, "is not valid")
    return _expected(name, expected[1], expected[2])


def _expected(name: str, kinds: str, rest: str) -> Complaint:
    names = [kind for kind in kinds.split(" | ") if kind != "null"]
    if "multiple of" in rest or {"int", "float"} <= set(names):  # a whole number is written 4 or 4.0
        names = ["int", *(kind for kind in names if kind not in ("int", "float"))]
        rest = "" if "multiple of" in rest else rest
    needs = "has to be " + " or ".join(_KINDS.get(kind, kind) for kind in names or ["null"])
    if bound := _BOUND.match(rest):
        return Complaint(name, f"{needs} {_COMPARED[bound[1]]} {bound[2].removesuffix('.0')}")
    if length := _LENGTH.match(rest):
        one, many = _PARTS[names[0]]
        return Complaint(name, f"{needs} {_COMPARED[length[1]]} {length[2]} {one if length[2] == '1' else many}")
    if pattern := _PATTERN.match(rest):
        return Complaint(name, of_pattern(pattern[1].replace("\\\\", "\\")))
    got = _GOT.match(rest)
    return Complaint(name, needs, _KINDS.get(got[1], got[1]) if got else "")


def of_pattern(pattern: str) -> str:
    """What a regular expression asks for. All that settings and bodies have are known here: a test compares."""
    if pattern in _PATTERNS:
        return _PATTERNS[pattern]
    if one_of := _ONE_OF.match(pattern):
        return f"has to be one of {one_of[1].replace('|', ', ')}"
    if characters := _CHARACTERS.match(pattern):
        allowed = " ".join(re.findall(r"\w-\w|\\?.", characters[1]))
        return f"has to be {characters[2]} to {characters[3]} of the characters {allowed}"
    return "is not of the form that is needed"


def not_json(error: Exception, raw: bytes) -> str:
    """Why `raw` is no JSON document."""
    if not raw.strip():
        return "the body is empty; it has to be a JSON object"
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, UnicodeDecodeError) or "surrogate" in str(error):
        return "the body is not valid JSON: it is not text in UTF-8 without halves of surrogate pairs"
    if "truncated" in str(error):
        return f"the body is not valid JSON: it ends after {counted(len(raw), 'byte')}, before it is complete"
    malformed = _MALFORMED.match(str(error))
    where = f": what stands at byte {malformed[1]} is not allowed there" if malformed else ""
    return f"the body is not valid JSON{where}"


def broken_json(error: Exception) -> str:
    """Where a file stops to be JSON, as `is not valid JSON` goes on."""
    if isinstance(error, json.JSONDecodeError):
        return f"at line {error.lineno}, column {error.colno}"
    return "because it is nested too deeply" if isinstance(error, RecursionError) else "in UTF-8"


def undecodable(error: Exception) -> str:
    """Why a stored value or a message is none that is expected."""
    return read(error).told() if isinstance(error, msgspec.ValidationError) else "its bytes are not of its format"


def shown(value: Any) -> str:
    """A value, as a text may repeat it: short and printable."""
    if value in ("", [], (), {}):
        return "empty"
    if isinstance(value, str):
        text = json.dumps(value)  # in which a character may take twelve
        is_short = len(value) <= _CHARS_MAX and len(text) <= 2 * _CHARS_MAX
        return text if is_short else f"a text of {counted(len(value), 'character')}"
    if isinstance(value, list | tuple):
        return f"a list of {counted(len(value), 'entry', 'entries')}"
    if isinstance(value, dict):
        return f"an object of {counted(len(value), 'member')}"
    return "null" if value is None else str(value).lower()[:_CHARS_MAX]


def size(nbytes: float) -> str:
    """`1.29 GiB`, for people: three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 1000 or unit == "TiB":
            break
        nbytes /= 1024
    decimals = 0 if unit == "B" or nbytes >= 100 else 1 if nbytes >= 10 else 2
    return f"{nbytes:.{decimals}f} {unit}"


def counted(number: int, one: str, many: str = "") -> str:
    """`1 replica`, `2 replicas`; `many` where an s does not do."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def nearest(word: str, known: Iterable[str], spelt: Callable[[str], str] = str) -> str:
    """`; did you mean 'replicas'?` where one of `known` is near, else nothing. `spelt`: how users write it."""
    found = difflib.get_close_matches(word[:_CHARS_MAX], list(known), 1)
    return f"; did you mean {spelt(found[0])!r}?" if found else ""


def _fields(kind: Any, path: str) -> list[str]:
    described = _at(kind, path)
    return (
        [field.encode_name for field in described.fields] if isinstance(described, msgspec.inspect.StructType) else []
    )


def _choices(kind: Any, path: str) -> list[str]:
    described = _at(kind, path)
    return [str(value) for value in described.values] if isinstance(described, msgspec.inspect.LiteralType) else []


def _at(kind: Any, path: str) -> msgspec.inspect.Type | None:
    """The type of the value at `path` in a struct; of a union, the part that has fields or choices."""
    described = _plain(msgspec.inspect.type_info(kind)) if kind is not None else None
    for name in re.findall(r"[^.\[\]]+|\[", path):
        if described is None or name.isdigit():
            continue
        if name in ("[", "[..."):
            described = _plain(getattr(described, "item_type", None))
        else:
            fields = getattr(described, "fields", ())
            described = next((_plain(field.type) for field in fields if field.encode_name == name), None)
    return described


def _plain(described: Any) -> msgspec.inspect.Type | None:
    inspect = msgspec.inspect
    while isinstance(described, inspect.Metadata):
        described = described.type
    if isinstance(described, inspect.UnionType):
        told = (inspect.StructType, inspect.LiteralType, inspect.ListType)
        return next((part for part in map(_plain, described.types) if isinstance(part, told)), None)
    return described if isinstance(described, inspect.Type) else None
