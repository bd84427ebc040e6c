"""The tests of this folder run only where they are asked for: `pytest -m soak`."""

from __future__ import annotations

from tests.procs.conftest import pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_collection_modifyitems", "pytest_configure"]
