"""Hosts and origins: what a browser can be made to send must not pass, what programs of this machine send must."""

from __future__ import annotations

from typing import Any

import pytest

from elasticmoe.common.http.framing import is_authority
from elasticmoe.common.http.hosts import HostPolicy, OwnPages, split
from elasticmoe.common.protocol.errors import ConfigError, Forbidden


def policy(*, bound: str = "127.0.0.1", allowed: str = "", origins: str = "", is_open: bool = True) -> HostPolicy:
    return HostPolicy(bound, split(allowed), split(origins), is_open=is_open)


def is_known(host: str, *, local: str = "127.0.0.1", **settings: Any) -> bool:
    assert is_authority(host.encode())
    try:
        policy(**settings).check_host(host.encode(), local)
    except Forbidden as refused:
        return refused.code != "host_refused"
    return True


LOOPBACK = ["localhost", "LocalHost:8000", "localhost.", "a.localhost:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"]
LOOPBACK += ["[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "10.0.0.1",
    "",
    ":80",
]
FOREIGN += [
    "notlocalhost",
    "0x7f.1",
    "2130706433",
    "[::2]",
    "127.0.0.1.:x".removesuffix(":x") + "nip.io",
    "%6cocalhost",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_names_are_known(host: str) -> None:
    assert is_known(host)
    assert is_known(host, bound="0.0.0.0")


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_not(host: str) -> None:
    assert not is_known(host)
    assert not is_known(host, bound="::", local="::1")
    assert is_known(host, is_open=False), "a key proves who asks"
    assert is_known(host, allowed="*")


def test_the_bound_name_the_local_address_and_allowed_names_are_known() -> None:
    assert is_known("router:8000", bound="router")
    assert is_known("10.1.2.3:8000", bound="0.0.0.0", local="10.1.2.3")
    assert is_known("10.1.2.3", bound="::", local="::ffff:10.1.2.3")
    assert not is_known("10.1.2.4", bound="0.0.0.0", local="10.1.2.3")
    allowed = "api.example.org:8000, *.svc.cluster.local,[fd00::1],fd00::3"
    for host in ("API.example.org:443", "router.ns.svc.cluster.local:8000", "[fd00::1]:80", "[FD00:0::1]", "[fd00::3]"):
        assert is_known(host, allowed=allowed)
    for host in ("x.api.example.org", "svc.cluster.local", "evilsvc.cluster.local", "[fd00::2]"):
        assert not is_known(host, allowed=allowed)


def test_without_a_host_there_is_no_browser() -> None:
    policy().check_host(None, "127.0.0.1")


def may_ask(origin: str, host: str = "localhost:8000", **settings: Any) -> bool:
    try:
        policy(**settings).check_origin(origin.encode(), host.encode(), "127.0.0.1")
    except Forbidden as refused:
        return refused.code != "origin_refused"
    return True


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "",
        "http://localhost",
        "http://localhost:3000",
        "https://127.0.0.1:8000",
        "file://",
    ],
)
def test_pages_of_other_origins_may_not_ask(origin: str) -> None:
    assert not may_ask(origin)
    assert may_ask(origin, is_open=False)
    assert may_ask(origin, origins="*")


def test_own_pages_and_allowed_ones_may_ask() -> None:
    assert may_ask("http://localhost:8000")
    assert may_ask("https://LOCALHOST:8000")
    origins = "https://chat.example.org,null"
    for origin in ("https://chat.example.org", "https://CHAT.example.org", "null"):
        assert may_ask(origin, origins=origins)
        assert policy(origins=origins).allows(origin.encode())
    for origin in ("http://chat.example.org", "https://chat.example.org:444", "https://chat.example.org.evil.example"):
        assert not may_ask(origin, origins=origins)
        assert not policy(origins=origins).allows(origin.encode())


@pytest.mark.parametrize("entry", ["http://a", "a/b", "user@a", "a b", "[::", "a:b", "\u00e9"])
def test_a_host_that_no_request_has_stops_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        policy(allowed=entry)


@pytest.mark.parametrize("origin", ["chat.example.org", "https://", "https://a/b", "://a", "https://a/"])
def test_an_origin_that_no_page_has_stops_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        policy(origins=origin)


OPERATORS = OwnPages("127.0.0.1")


def test_an_operator_s_listener_is_reached_by_any_name_and_answers_no_other_origin() -> None:
    OPERATORS.check_host(b"anything", "127.0.0.1")
    assert not OPERATORS.allows(b"http://localhost")


@pytest.mark.parametrize("host", ["localhost:8100", "127.0.0.1:8100", "[::1]:8100", "page.localhost:8100", "10.0.0.7"])
def test_its_own_pages_may_ask_it_by_the_names_that_they_are_given_out_by(host: str) -> None:
    local = "10.0.0.7"
    OPERATORS.check_page(host.encode(), local)
    for origin in (f"http://{host}", f"https://{host}"):
        OPERATORS.check_origin(origin.encode(), host.encode(), local)
    for origin in ("http://localhost", "http://localhost:8101", "null", "", "http://evil.example", f"{host}"):
        with pytest.raises(Forbidden) as refused:
            OPERATORS.check_origin(origin.encode(), host.encode(), local)
        assert refused.value.code == "origin_refused"


@pytest.mark.parametrize("host", ["evil.example:8100", "10.0.0.8:8100", "", "localhost.evil.example"])
def test_a_page_by_a_name_of_others_is_none_of_its_own(host: str) -> None:
    """DNS rebinding: the name leads here, and what the browser has by it names itself so."""
    with pytest.raises(Forbidden) as refused:
        OPERATORS.check_origin(f"http://{host}".encode(), host.encode(), "127.0.0.1")
    assert refused.value.code == "origin_refused"
    with pytest.raises(Forbidden) as refused:
        OPERATORS.check_page(host.encode(), "127.0.0.1")
    assert refused.value.code == "host_refused"
    with pytest.raises(Forbidden):
        OPERATORS.check_page(None, "127.0.0.1")
