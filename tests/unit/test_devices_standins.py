"""A run on a stand-in differs from one on hardware in a library's path and in what torch calls the device: nothing else
of the product is changed, and nothing in it knows that there are stand-ins."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import standins, vendor

_TOLD = """
import json
from elasticmoe.common.devices import factory
def told(backend):
    return [f"{one.__module__}.{one.__qualname__}" for one in backend.__mro__]
print(json.dumps({name: told(backend) for name, backend in factory._BACKENDS.items()}))
"""
PRODUCT = ("common", "services", "cli", "native")


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_stand_ins_class_is_the_products_but_for_two_names(kind: str, tmp_path: Path) -> None:
    product, stand_in = standins.KINDS[kind], standins.device_class(kind, tmp_path / "lib.so")
    changed = {
        name
        for name in set(dir(product)) | set(dir(stand_in))
        if inspect.getattr_static(product, name, None) is not inspect.getattr_static(stand_in, name, None)
    }
    of_every_class = {"__doc__", "__module__", "__dict__", "__weakref__", "__abstractmethods__", "__annotations__"}
    assert changed - of_every_class - {"_abc_impl"} == {"library", "torch_device"}
    assert (stand_in.library, stand_in.torch_device) == (str(tmp_path / "lib.so"), "cpu")


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_process_on_a_stand_in_has_the_products_backends_but_for_that_class(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> dict[str, list[str]]:
        settings = {"PYTHONPATH": str(vendor.ROOT), **os.environ}
        done = subprocess.run([sys.executable, "-c", _TOLD], env=settings, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    hardware = told()
    with standins.memory(monkeypatch):
        standins.install(kind, monkeypatch)
        stand_in = told()
    assert stand_in[kind][1:] == hardware[kind]
    assert stand_in | {kind: hardware[kind]} == hardware


def test_the_product_does_not_know_of_stand_ins() -> None:
    files = [
        path for room in PRODUCT for path in (vendor.ROOT / room).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    assert len(files) > 100
    words = re.compile("STANDIN_|stand-?in.*driver|standin_", re.IGNORECASE)
    assert [path for path in files if words.search(path.read_text(encoding="utf-8"))] == []
