"""The examples, each against a deployment as somebody would run it: a chat, a tool that has to be called, an answer of
a form, and errors as the client's own exceptions. A client that is not installed is skipped, with the reason; Node's is
installed from the lock file, which needs npm's registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest

from tests.procs.deployment import ROOT, Deployment
from tests.procs.router_harness import configure

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

EXAMPLES = ROOT / "examples"
MODEL = "tiny-qwen3-moe"
TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}"
    "{# <tool_call> #}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SAID = ("chat", "chat streamed", "tool", "tool streamed", "schema", "refused", "not found")
# By package: the program, and what errors say of a parameter out of its bounds and of a model that is not served.
PYTHON = {
    "openai": ("openai_client.py", "invalid_request top_p", "model_not_found"),
    "anthropic": ("anthropic_client.py", "invalid_request max_tokens", "model_not_found"),
    "langchain_openai": ("langchain_client.py", "invalid_request top_p", "model_not_found"),
    "litellm": ("litellm_client.py", "400 True", "404"),
}
NODE = "openai_client.mjs"
KEY = "a-key-of-32-characters-for-tests"
CLIENT_SECONDS_MAX = 120.0


@pytest.fixture(scope="module")
def deployment(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("clients") / MODEL
    shutil.copytree(model_folder(MODEL), folder)
    configure(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    key = folder.parent / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    deployed = Deployment(folder, replicas=1, max_model_len=1_024, api_key_file=key).wait_ready()
    try:
        yield deployed
        deployed.stop()
    finally:
        deployed.discard()


def run(*argv: str | Path, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """Run an example, whose client takes the key from where it always does."""
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS_MAX,
        cwd="/",
        env=dict(os.environ) | {"OPENAI_API_KEY": key, "ANTHROPIC_API_KEY": key},
    )


def said_by(*argv: str | Path) -> dict[str, str]:
    """What a client prints, by the words that a line begins with."""
    done = run(*argv)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    begins = [max((words for words in SAID if line.startswith(f"{words} ")), key=len, default="") for line in lines]
    assert begins == list(SAID), done.stdout
    return {words: line[len(words) + 1 :] for words, line in zip(begins, lines, strict=True)}


def check(said: dict[str, str], refused: str, not_found: str) -> None:
    assert json.loads(said["chat"]), "a text"
    assert said["chat streamed"] == said["chat"]
    for words in ("tool", "tool streamed"):
        name, _, arguments = said[words].partition(" ")
        assert name == "weather"
        jsonschema.validate(json.loads(arguments), SCHEMA)
    jsonschema.validate(json.loads(said["schema"]), SCHEMA)
    assert (said["refused"], said["not found"]) == (refused, not_found)


@pytest.mark.parametrize("package", PYTHON)
def test_an_example_in_python(package: str, deployment: Deployment) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program, *errors = PYTHON[package]
    check(said_by(sys.executable, EXAMPLES / program, deployment.base_url), *errors)


def test_the_example_in_node(node: Path, deployment: Deployment) -> None:
    check(said_by("node", node / NODE, deployment.base_url, MODEL), *PYTHON["openai"][1:])


def check_refused(done: subprocess.CompletedProcess[str]) -> None:
    """It ends with the client's own error of a wrong key, which tells the router's words."""
    assert done.returncode != 0
    assert done.stdout == ""
    for said in ("AuthenticationError", "401", "API key is missing or wrong"):
        assert said in done.stderr, done.stderr


@pytest.mark.parametrize("package", PYTHON)
def test_a_wrong_key_is_an_error_of_the_client_in_python(package: str, deployment: Deployment) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    program = EXAMPLES / PYTHON[package][0]
    check_refused(run(sys.executable, program, deployment.base_url, MODEL, key="another-key-of-32-characters-or-so"))


def test_a_wrong_key_is_an_error_of_the_client_in_node(node: Path, deployment: Deployment) -> None:
    check_refused(run("node", node / NODE, deployment.base_url, MODEL, key="another-key-of-32-characters-or-so"))


def test_every_example_is_run() -> None:
    files = {path.name for kind in ("*.py", "*.mjs") for path in [*EXAMPLES.glob(kind), *EXAMPLES.glob(f"node/{kind}")]}
    assert files == {program for program, *_ in PYTHON.values()} | {NODE}
