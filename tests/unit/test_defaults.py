"""Defaults stand in common/settings.py alone: what pages, compose files and help texts say of them is compared."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec
import pytest

from elasticmoe.cli import scale, up
from elasticmoe.common.config import CONFIGS, defaults

ROOT = Path(__file__).parent.parent.parent
DEFAULTS = defaults()
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").glob("*.md")]
COMPOSE = ROOT / "compose.yaml"
# What a container sets itself, whatever the default: see the comments there.
SET_IN_CONTAINERS = {"model": "/models/model", "admin_host": "0.0.0.0", "host": "0.0.0.0", "allowed_hosts": "router"}
# Statements in prose: where, a pattern whose group is the value, and the setting.
PROSE = [
    ("README.md", r"router, default 127\.0\.0\.1:(\d+)", "port"),
    ("README.md", r"router, default ([\d.]+):", "host"),
    ("README.md", r"scaler, default 127\.0\.0\.1:(\d+)", "admin_port"),
    ("README.md", r"scaler, default ([\d.]+):", "admin_host"),
    ("docs/api.md", r"`answer_bytes_max` \(default (\d+) MiB", "answer_bytes_max"),
    ("docs/api.md", r"`stream_keepalive_s` \(default (\d+) s", "stream_keepalive_s"),
    ("docs/scaling.md", r"`deadline_s`, default (\d+)", "operation_deadline_s"),
    ("docs/promises.md", r"`requests_max` .{0,80}fixed number \((\d+)\)", "requests_max"),
    ("docs/runbooks/crash-loop.md", r"`rank_restarts_max` times \((\d+)\)", "rank_restarts_max"),
    ("docs/runbooks/crash-loop.md", r"`rank_restarts_window_s` \((\d+) s\)", "rank_restarts_window_s"),
    ("benchmarks/recovery.md", r"\| (\d+) \(default\) \|", "max_tokens_per_step"),
]
# Of `elasticmoe up`: flags whose name is not the setting's.
FLAGS = {
    "device-memory": "device_bytes",
    "kv-memory": "kv_bytes",
    "store": "store_url",
    "ttft": "ttft_s",
    "itl": "itl_s",
}


def same(text: str, setting: str) -> bool:
    """Whether a page's `text` is the setting's default, `empty` for an empty one."""
    value = DEFAULTS[setting]
    if isinstance(value, bool):
        return text.strip("`") == str(value).lower()
    if isinstance(value, int | float):
        return float(text) == value
    return text.strip("`") == (str(value) or "empty")


def test_settings_of_one_name_have_one_default() -> None:
    fields = [field for struct in CONFIGS for field in msgspec.structs.fields(struct)]
    found = {(field.name, repr(field.default)) for field in fields if field.default is not msgspec.NODEFAULT}
    assert len(found) == len({name for name, _ in found})


def test_compose_repeats_no_default_that_differs() -> None:
    text = COMPOSE.read_text()
    stated = re.findall(r"\$\{ELASTICMOE_([A-Z_]+):?-([^}]*)\}", text)
    assert {name.lower() for name, _ in stated} >= {"port", "admin_port"}
    ours = [(name.lower(), value) for name, value in stated if name.lower() in DEFAULTS]
    assert [(n, value) for n, value in ours if not same(value, n) and value != SET_IN_CONTAINERS.get(n)] == []
    for name, value in re.findall(r"^ +ELASTICMOE_([A-Z_]+): *([^#\n]*)", text, re.MULTILINE):
        setting, value = name.lower(), value.strip()
        assert setting in DEFAULTS, f"compose.yaml sets {name}, which no process knows"
        stated = re.sub(r"\$\{[A-Z_]+:?-([^}]*)\}", r"\1", value)
        assert not stated or stated == SET_IN_CONTAINERS.get(setting), (name, value)
    # The ports inside the containers are the product's, Jaeger's and Grafana's.
    ports = [str(DEFAULTS["admin_port"]), str(DEFAULTS["port"]), "16686", "3000"]
    assert re.findall(r":-\d+\}:(\d+)\"", text) == ports


def test_tables_of_settings_tell_the_defaults() -> None:
    num_compared = 0
    for page in PAGES:
        for line in page.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            names = re.findall(r"ELASTICMOE_([A-Z_]+)`", cells[0]) if line.startswith("|") else []
            if not names or len(cells) < 2:
                continue
            for name, value in zip(names, cells[1].split(", "), strict=True):
                if name.lower() in DEFAULTS:
                    in_containers = page.parent.name == "deploy" and SET_IN_CONTAINERS.get(name.lower())
                    assert same(value, name.lower()) or value.strip("`") == in_containers, (page.name, name, value)
                    num_compared += 1
    assert num_compared >= 12


def test_flags_in_the_readme_tell_the_defaults() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\[--([a-z-]+) (\d+)\]", text)
    assert {name for name, _ in found} == {"port", "admin-port"}
    for flag, value in found:
        assert same(value, flag.replace("-", "_")), (flag, value)


@pytest.mark.parametrize(("page", "pattern", "setting"), PROSE)
def test_prose_tells_the_defaults(page: str, pattern: str, setting: str) -> None:
    values = re.findall(pattern, (ROOT / page).read_text(), re.DOTALL)
    assert values, f"{page} does not say it any more: take the pattern out here"
    unit = 1 << 20 if "MiB" in pattern else 1
    assert all(same(str(int(value) * unit) if unit > 1 else value, setting) for value in values), values


def test_every_default_in_prose_is_compared() -> None:
    """A sentence with the word and a number beside a setting is one of PROSE."""
    near = re.compile(
        r"`([a-z_]+)`[^.|`\n]{0,30}\bdefault\b[^.|`\n]{0,10}\d|\bdefault\b[^.|`\n]{0,10}\d[^.|\n]{0,30}`([a-z_]+)`"
    )
    for page in PAGES:
        for match in near.finditer(page.read_text()):
            setting = match[1] or match[2]
            if setting in DEFAULTS:
                assert any(page.name in where and setting == name for where, _, name in PROSE), match[0]


def test_help_texts_tell_the_defaults() -> None:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    num_compared = 0
    for action in parser._actions:
        told = re.search(r"\(default ([^ ;)]+)", action.help or "") if action.default is None else None
        flag = action.option_strings[0].removeprefix("--") if action.option_strings else ""
        setting = FLAGS.get(flag, flag.replace("-", "_"))
        if told is None or setting not in DEFAULTS:
            continue
        value = told[1]
        if value.endswith("MiB"):
            value = str(int(value.removesuffix("MiB")) << 20)
        if time := re.fullmatch(r"([\d.]+)(m?)s", value):
            value = f"{float(time[1]) / (1000 if time[2] else 1):g}"
        assert same(value, setting), (flag, value)
        num_compared += 1
    assert num_compared >= 8
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    assert f"({DEFAULTS['operation_deadline_s']:g})" in parser.format_help()
