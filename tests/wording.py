"""What only libraries say: none of it may reach a user as it is."""

from __future__ import annotations

import re

LIBRARY = re.compile(
    r"Expected `|expected `|at `\$|\$\.|matching regex|\^\[|\\\\Z|malformed|Input data|invalid character|\(byte \d|"
    r"codec can't|surrogates not allowed|\[Errno|Traceback|^  File |<class '|object at 0x|"
    r"argument -|invalid \w+ value|invalid choice|choose from|unrecognized arg|the following arguments|"
    r"msgspec|zmq|ZMQ|httpx|httpcore|urllib|pydantic|starlette|FastAPI|jsondecode|JSONDecodeError|ValidationError|"
    r"Expecting value|Extra data|line \d+ column|[A-Z]\w+(?:Error|Exception|Timeout)\b|None\b|nan is|NoneType"
)
_NOUNS = (
    "bytes characters entries members replicas devices processes experts requests streams ranks tokens sequences "
    "seconds minutes records threads blocks layers steps legs times choices messages tools operations faults files"
)
PLURAL_OF_ONE = re.compile(rf"(?<![\d.,:-])1 (?:other |more )?(?:{_NOUNS.replace(' ', '|')})\b")
CODE = re.compile(r"[a-z][a-z0-9_]{2,40}")
TEXT_CHARS_MAX = 500


def faults_of(code: str, text: str) -> list[str]:
    """What is wrong with an error as a user meets it; nothing, if it is as it should be."""
    found = [f"a library's words: {match[0]!r}"] if (match := LIBRARY.search(text)) else []
    if match := PLURAL_OF_ONE.search(text):
        found.append(f"more than one of it: {match[0]!r}")
    if not CODE.fullmatch(code):
        found.append(f"no code: {code!r}")
    if not text.strip() or "\n" in text:
        found.append("not one line")
    if len(text) > TEXT_CHARS_MAX:
        found.append(f"{len(text)} characters")
    return found
