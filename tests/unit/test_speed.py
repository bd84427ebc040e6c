"""No property test depends on how fast the machine is: a shared profile (tests/conftest.py) is in force everywhere."""

from __future__ import annotations

import ast

from hypothesis import HealthCheck, settings

from tests.test_tidy import ROOT, tracked


def test_the_profile_has_no_deadline_and_bears_slow_draws() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_no_settings_of_a_test_take_that_back() -> None:
    found = []
    for path in tracked(".py"):
        calls = (node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call))
        for call in calls:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
            checks = given.get("suppress_health_check", "too_slow")
            is_patient = "deadline" not in given and ("too_slow" in checks or checks == "list(HealthCheck)")
            if getattr(call.func, "id", "") == "settings" and not is_patient:
                found.append(f"{path}:{call.lineno}")
    assert found == []
