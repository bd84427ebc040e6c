"""What the tests of all drivers' rules share: the rule files, and what holds of each."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from elasticmoe.common.devices.driver import CopyPart, Driver, Meaning
from elasticmoe.common.protocol.errors import ElasticMoEError

Rule = dict[str, str]
PAGE = 2 << 20
_FOLDER = Path(__file__).parent
_FIELDS = {"name", "text", "source", "call", "answer", "code_from", "ours"}


def rules(kind: str) -> list[Rule]:
    """Of a vendor's driver, as its file lists them."""
    return _listed(kind, "rule")


def _listed(kind: str, what: str) -> list[Rule]:
    made: list[Rule] = tomllib.loads((_FOLDER / f"rules/{kind}.toml").read_text())[what]
    return made


def check_answers(kind: str) -> None:
    """Each error that the stand-in can answer is that of a rule, or is listed beside them with its source."""
    in_source = set(re.findall(r"\b(?:ACL|CUDA)_ERROR_\w+", (_FOLDER / f"standin/{kind}.cpp").read_text()))
    others = _listed(kind, "code")
    assert all(set(code) == {"name", "when", "source"} and all(code.values()) for code in others)
    assert in_source == {rule["answer"] for rule in rules(kind)} | {code["name"] for code in others}


_SIZES = """
#include <%s>
#include <algorithm>
#include <initializer_list>
#include <type_traits>
template <class R, class... A>
constexpr bool takes(R (*)(A...), std::initializer_list<size_t> wanted) {
  const std::initializer_list<size_t> has = {size_t{0}, (std::is_pointer_v<A> ? 0 : sizeof(A))...};
  return std::equal(has.begin() + 1, has.end(), wanted.begin(), wanted.end());
}
"""


def check_sizes(header: str, includes: Sequence[Path], calls: Mapping[str, Sequence[Any]]) -> None:
    """A compiler that reads the vendor's declarations finds a pointer where ours has one, and numbers of the same size
    elsewhere. Skips the test without a compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the vendor's declarations are read by a C++ compiler, and there is no {compiler}")
    checks = [
        f'static_assert(takes(&{name}, {{{", ".join(map(_size_of, types))}}}), "{name}");'
        for name, types in calls.items()
    ]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-deprecated-declarations", "-xc++", "-"]
    command += [f"-isystem{folder}" for folder in includes]
    done = subprocess.run(
        command, input=_SIZES % header + "\n".join(checks), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _size_of(kind: Any) -> str:
    is_pointer = kind in (ctypes.c_void_p, ctypes.c_char_p) or issubclass(kind, ctypes._Pointer)
    return "size_t{0}" if is_pointer else str(ctypes.sizeof(kind))


def check_rule(rule: Rule, breach: Callable[[], object], refusals: Mapping[int, Meaning]) -> None:
    """Breaking it is one error of ours, whose text ends in the call, the driver's number and its name, and what else
    the driver says of it on the same line."""
    with pytest.raises(ElasticMoEError) as caught:
        breach()
    assert caught.value.code == rule["ours"]
    number = next(code for code, refusal in refusals.items() if refusal.name == rule["answer"])
    assert re.search(rf"{rule['call']}(V2)? answers {number}, {rule['answer']}(: .+)?\Z", caught.value.message)


def check_complete(listed: Sequence[Rule], broken: Collection[str]) -> None:
    """Every rule says all, and is broken."""
    assert {rule["name"] for rule in listed} == set(broken)
    assert all(set(rule) == _FIELDS and all(rule.values()) for rule in listed)


def check_declared(text: str, result: str, calls: Mapping[str, Sequence[Any]]) -> None:
    """The vendor declares each call with as many parameters as ours has."""
    for name, types in calls.items():
        found = re.search(rf"\b{result}\s+(?:CUDAAPI\s+)?{name}\s*\(([^)]*)\)\s*;", text)
        assert found is not None, name
        parameters = [part.strip() for part in found[1].split(",")]
        assert len([part for part in parameters if part not in ("", "void")]) == len(types), name


def check_codes(text: str, refusals: Mapping[int, Meaning]) -> None:
    """The vendor gives each code its number."""
    for number, refusal in refusals.items():
        assert re.search(rf"\b{refusal.name}\s*=?\s*{number}\b", text), refusal


def in_a_new_thread(act: Callable[[], object]) -> None:
    """Do something where no thread-local state is; raises what it raises."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except ElasticMoEError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def mapped(driver: Driver, device: int = 0, pages: int = 1) -> tuple[int, int]:
    """The beginning of a range, and the handle that is mapped there; more of the range is free."""
    address, handle = driver.reserve(device, 8 * PAGE), driver.create(device, pages * PAGE)
    driver.map(device, [(address, pages * PAGE, handle)])
    driver.allow(device, address, pages * PAGE, True)
    return address, handle


class Two(Protocol):
    """The drivers of two processes."""

    @property
    def owner(self) -> Driver:
        """Of the one that makes memory."""
        ...

    @property
    def user(self) -> Driver:
        """Of the other one."""
        ...


def more_memory_than_there_is(two: Two) -> None:
    """Of 64 MiB the other process has 16."""
    two.user.create(0, 16 << 20)
    two.owner.create(0, 50 << 20)


def release_twice(two: Two) -> None:
    """The second time it is none."""
    handle = two.owner.create(0, PAGE)
    two.owner.release(0, handle)
    two.owner.release(0, handle)


def give_back_a_range_in_use(two: Two) -> None:
    """Something is mapped in it."""
    two.owner.unreserve(0, mapped(two.owner)[0], 8 * PAGE)


def map_beside_a_granule(two: Two) -> None:
    """At a page of the host's."""
    two.owner.map(0, [(two.owner.reserve(0, 4 * PAGE) + 4096, PAGE, two.owner.create(0, PAGE))])


def map_beyond_the_range(two: Two) -> None:
    """Its second half is not reserved."""
    two.owner.map(0, [(two.owner.reserve(0, PAGE), 2 * PAGE, two.owner.create(0, 2 * PAGE))])


def map_over_a_mapping(two: Two) -> None:
    """Over the end of a longer one."""
    address, _ = mapped(two.owner, pages=2)
    two.owner.map(0, [(address + PAGE, PAGE, two.owner.create(0, PAGE))])


def unmap_in_flight(two: Two) -> None:
    """A copy there has begun, and nobody has waited for it."""
    (src, _), (dst, _) = mapped(two.owner), mapped(two.owner)
    event = two.owner.copy(0, [CopyPart(dst, src, PAGE, 0, 0)])
    two.owner.unmap(0, dst, PAGE)
    two.owner.wait(0, event)


def copy_from_a_stranger(two: Two) -> None:
    """The source is another device's, and said to be this one's."""
    (src, _), (dst, _) = mapped(two.owner, 1), mapped(two.owner, 0)
    two.owner.copy(0, [CopyPart(dst, src, PAGE, 0, 0)])
