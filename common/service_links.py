"""Environment variables that Kubernetes sets in every container for each Service of its namespace.

A Service called `elasticmoe`, or `elasticmoe-` and more, gives names that begin as our settings do, one of them exactly
`ELASTICMOE_PORT`. What is such a link is told by name and value together, in the forms of
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables and Docker's links, which they
follow; everything else that begins so is a setting, or a mistake.
"""

from __future__ import annotations

import ipaddress
import re

# Of a Service's name in capitals nothing (`elasticmoe`) or its end (`elasticmoe-router`: ROUTER_) is left here.
_SERVICE = r"(?:[A-Z0-9_]*[A-Z0-9]_)?"
_NUMBER = r"[1-9][0-9]{0,4}"
_HOST = re.compile(rf"{_SERVICE}SERVICE_HOST")
_SERVICE_PORT = re.compile(rf"{_SERVICE}SERVICE_PORT(?:_[A-Z0-9_]+)?")
_PORT = re.compile(rf"{_SERVICE}PORT")
_LINK = re.compile(rf"{_SERVICE}PORT_(?P<port>{_NUMBER})_(?P<protocol>TCP|UDP|SCTP)(?P<part>|_PROTO|_PORT|_ADDR)")
_URL = re.compile(rf"(?P<protocol>tcp|udp|sctp)://(?P<host>\[[0-9a-f:.]+\]|[0-9.]+):(?P<port>{_NUMBER})")


def is_service_link(name: str, value: str) -> bool:
    """Whether the variable `ELASTICMOE_<name>` with this value was made for a Service. `PORT` with a number is not."""
    if _HOST.fullmatch(name):
        return _is_address(value)
    if _SERVICE_PORT.fullmatch(name):
        return _is_port(value)
    link = _LINK.fullmatch(name)
    if link is None:
        return _PORT.fullmatch(name) is not None and _is_url(value)
    port, protocol = link["port"], link["protocol"].lower()
    return {
        "": _is_url(value, protocol, port),
        "_PROTO": value == protocol,
        "_PORT": value == port,
        "_ADDR": _is_address(value),
    }[link["part"]]


def _is_url(value: str, protocol: str = "", port: str = "") -> bool:
    found = _URL.fullmatch(value)
    if found is None or not _is_address(found["host"].strip("[]")) or not _is_port(found["port"]):
        return False
    return protocol in ("", found["protocol"]) and port in ("", found["port"])


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _is_port(value: str) -> bool:
    return re.fullmatch(_NUMBER, value) is not None and int(value) <= 65_535
