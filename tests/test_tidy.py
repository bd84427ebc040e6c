"""House rules that a machine can check. Each one names the file and the line that break it.

Longer than other files because all rules share one reading of the tree, and are found in one place.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES_MAX = 400
LINES_WITH_REASON_MAX = 500  # of the product
ROOMS = ("services/", "common/")
FUNCTION_LINES_MAX = 70
REPEATED_MAX = 70  # characters of a test's fixture or helper that another test file may hold too
SOURCE = ("common", "services", "cli", "native")

# Modules that may be imported by one module (or package) of the project only.
SOLE_IMPORTERS = {
    "zmq": "common/transport.py",
    "llguidance": ("common/grammar.py", "services/router/grammar/calls.py", "services/router/grammar/lark.py"),
    "redis": "common/store.py",
    "opentelemetry": ("common/tracing/spans.py", "tests/"),
    "uvicorn": "common/http/",
    "httptools": ("common/http/", "cli/load/stream.py"),  # of listeners, and of the client of load
    "torch": (
        "services/worker/",
        "common/devices/",
        "cli/models/",
        "cli/doctor",
        "cli/checks",
        "cli/version",
        "tests/",
    ),
    "transformers": "tests/",
    "elasticmoe.native.kernels": (
        "services/worker/backends/host.py",
        "services/worker/backends/addresses.py",
        "services/worker/backends/kernel_threads.py",
    ),
    "elasticmoe.native.bus": (
        # Of the exchange's files those that are one kind of it: no interface names the bus.
        *(f"services/worker/exchange/{one}.py" for one in ("bus", "mailbox", "planned", "shm", "torch_dist")),
        "services/worker/exchange/shm_barrier.py",
        "services/worker/exchange/shm_board.py",
        "services/worker/hmm/",
        "services/hmm/",
        "common/seat_sizes.py",
        "cli/doctor.py",
    ),
    "elasticmoe.native.convert": ("services/hmm/loading/convert.py", "cli/doctor.py"),
    "elasticmoe.common.devices.host": "common/devices/factory.py",  # who needs a device asks the factory
    "elasticmoe.common.devices.ascend": "common/devices/factory.py",
    "elasticmoe.common.devices.cuda": "common/devices/factory.py",
    "elasticmoe.services.worker.backends.host": "services/worker/backends/factory.py",  # likewise who computes
    "elasticmoe.services.worker.backends.torch": "services/worker/backends/factory.py",
    "elasticmoe.services.worker.backends.accelerator": (
        "services/worker/backends/factory.py",
        "services/worker/backends/accelerator/",
    ),
    "elasticmoe.services.worker.exchange.shm": "services/worker/exchange/factory.py",  # and who exchanges
    "elasticmoe.services.worker.exchange.torch_dist": "services/worker/exchange/factory.py",
    "elasticmoe.services.worker.exchange.mailbox": (
        "services/worker/exchange/factory.py",
        "services/worker/hmm/mailboxes.py",  # which maps the memory
    ),
    "elasticmoe.services.worker.exchange.shm_barrier": "services/worker/rank/assembly.py",
    "elasticmoe.services.worker.exchange.shm_board": "services/worker/rank/assembly.py",
    "elasticmoe.native.host": (
        "common/devices/",
        "common/host_shared.py",
        "services/hmm/loading/reader.py",
        "cli/doctor.py",
    ),
}
# Pure cores: decisions are functions of their arguments.
PURE = [
    "services/scaler/actions.py",
    "services/scaler/observation.py",
    "services/scaler/control/state.py",
    "services/scaler/control/autoscaling.py",
    "services/scaler/control/reconciler.py",
    "services/scaler/control/members.py",
    "services/scaler/control/watchdog.py",
    "services/scaler/operation/operation.py",
    "services/scaler/store/records.py",
    "services/scaler/operation/steps.py",
    "services/scaler/operation/migrate.py",
    "services/scaler/operation/release.py",
    "services/scaler/operation/abort.py",
    "services/scaler/operation/orphans.py",
    "services/scaler/operation/prepare.py",
    "services/scaler/operation/cutover.py",
    "services/scaler/operation/accounting.py",
    "services/scaler/planning/rebalance.py",
    "services/scaler/control/audit_log.py",
    "services/scaler/planning/placement.py",
    "services/scaler/planning/plan.py",
    "services/scaler/planning/planner.py",
    "services/scaler/store/resume.py",
    "services/scaler/planning/replica_assignment.py",
    "services/scaler/policy/config.py",
    "services/scaler/policy/demand.py",
    "services/scaler/policy/facts.py",
    "services/scaler/policy/figures.py",
    "services/scaler/policy/guards.py",
    "services/scaler/policy/price.py",
    "services/scaler/policy/recommend.py",
    "services/scaler/policy/record.py",
    "services/scaler/policy/saturation.py",
    "services/scaler/policy/signals.py",
    "services/scaler/policy/state.py",
    "services/scaler/policy/step_model.py",
    "services/scaler/policy/told.py",
    "services/scaler/policy/sender_clock.py",
    "services/router/dispatch/balancer.py",
    "services/hmm/memory/catalog.py",
    "services/worker/engine/blocks.py",
    "services/worker/engine/scheduler.py",
    "services/worker/engine/sequence.py",
    "common/http/framing.py",
    "common/http/hosts.py",
    "common/http/places.py",
    "common/layout.py",
    "common/sketch.py",
    "common/protocol/signals.py",
    "common/model_spec.py",
    "common/families/__init__.py",
    "common/families/config.py",
    "common/families/decoder.py",
    "common/families/family.py",
    "common/families/mixtral.py",
    "common/families/oracle.py",
    "common/families/qwen3_moe.py",
    "common/families/rope.py",
    "common/families/shared_keys.py",
    "cli/resume.py",
    "cli/supervisor.py",
    "cli/replay/baselines.py",
    "cli/replay/clairvoyant.py",
    "cli/replay/judge.py",
    "cli/replay/model.py",
    "cli/replay/plant.py",
    "cli/replay/policies.py",
    "cli/replay/replica.py",
    "cli/replay/simulate.py",
    "cli/traces/arrival.py",
    "cli/traces/generate.py",
    "cli/traces/profiles.py",
    "cli/traces/scale.py",
]
IMPURE_MODULES = {"time", "random", "socket", "zmq", "redis", "torch", "asyncio", "threading", "subprocess", "secrets"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("os", "system")}
FORBIDDEN_ANYWHERE = {"recv_pyobj", "send_pyobj", "trust_remote_code"}


def tracked(*endings: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [ROOT / line for line in listing.splitlines() if line.endswith(endings) and (ROOT / line).is_file()]


PYTHON = tracked(".py")
CODE = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in SOURCE]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache  # each test walks all of them: 170 MB, and not 15 times the parsing
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(module: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            if node.module == "elasticmoe.native":  # its modules are imported from it, by their names
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@cache
def runtime_imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Imports that are not only for the type checker."""
    module = tree(path)
    skipped = {
        id(child)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    return tuple(
        found
        for node in ast.walk(module)
        if id(node) not in skipped and isinstance(node, ast.Import | ast.ImportFrom)
        for found in imports(node)
    )


def test_files_and_functions_have_a_bounded_size() -> None:
    found = []
    for path in [*CODE, *tracked(".cpp", ".hpp", ".h")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LINES_MAX and "Longer than" not in "\n".join(lines[:12]):
            found.append(f"{name(path)}: {len(lines)} lines, and its top does not say why")
        if len(lines) > LINES_WITH_REASON_MAX and not name(path).startswith("tests/"):
            found.append(f"{name(path)}: {len(lines)} lines")
        if path.suffix == ".py":
            found += [
                f"{name(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno} lines"
                for node in ast.walk(tree(path))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (node.end_lineno or 0) - node.lineno > FUNCTION_LINES_MAX
            ]
    assert found == []


def test_no_bytes_become_objects_and_nothing_is_evaluated() -> None:
    found = []
    for path in PYTHON:
        if path == Path(__file__):
            continue
        module = tree(path)
        found += [f"{name(path)}:{line} {what}" for line, what in imports(module) if what in FORBIDDEN_IMPORTS]
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_NAMES:
                found.append(f"{name(path)}:{node.lineno} {node.func.id}")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES
            ):
                found.append(f"{name(path)}:{node.lineno} {node.value.id}.{node.attr}")
            if isinstance(node, ast.Attribute | ast.keyword):
                used = node.attr if isinstance(node, ast.Attribute) else node.arg
                if used in FORBIDDEN_ANYWHERE:
                    found.append(f"{name(path)}: {used}")
    assert found == []


@pytest.mark.parametrize("dependency", SOLE_IMPORTERS)
def test_dependencies_have_one_importer(dependency: str) -> None:
    allowed = SOLE_IMPORTERS[dependency]
    found = [
        f"{name(path)}:{line}"
        for path in PYTHON
        if not name(path).startswith(("tests/", *(allowed if isinstance(allowed, tuple) else (allowed,))))
        for line, what in runtime_imports(path)
        if f"{what}.".startswith(f"{dependency}.")
    ]
    assert found == []


def test_services_do_not_import_one_another_and_common_imports_no_service() -> None:
    found = []
    for path in CODE:
        parts = name(path).split("/")
        for line, what in imports(tree(path)):
            target = what.removeprefix("elasticmoe.").split(".")
            if target[0] == "cli" and parts[0] != "cli":
                found.append(f"{name(path)}:{line} imports {what}")
            if target[0] != "services":
                continue
            if parts[0] in ("common", "native") or (parts[0] == "services" and target[1:2] != parts[1:2]):
                found.append(f"{name(path)}:{line} imports {what}")
    assert found == []


def test_cores_are_pure() -> None:
    missing = [path for path in PURE if not (ROOT / path).is_file()]
    assert missing == []
    # What calls itself pure is held to it, whether it is listed or not.
    says_so = {
        name(path) for path in PYTHON if name(path).startswith(ROOMS) and says_pure(ast.get_docstring(tree(path)) or "")
    }
    assert len(says_so) > 20
    found = [
        f"{path}:{line} imports {what}"
        for path in sorted(says_so.union(PURE))
        for line, what in runtime_imports(ROOT / path)
        if what.split(".")[0] in IMPURE_MODULES
    ]
    assert found == []


def says_pure(docstring: str) -> bool:
    """Whether a module's docstring has `Pure.`, `Pure: …` or `Pure …` at the beginning of a sentence."""
    return re.search(r"(^|[.:]\s)Pure\b", docstring) is not None


def test_every_import_has_the_root() -> None:
    """In a checkout `import common` would work as well, and load everything a second time."""
    found = [
        f"{name(path)}:{line} imports {what}"
        for path in PYTHON
        for line, what in imports(tree(path))
        if what.split(".")[0] in SOURCE
    ]
    assert found == []


# Written modules that no checker of imports sees: `-m services.x`, "cli.x", `common.x`, "from common import x".
_WITHOUT_ROOT = re.compile(
    rf"""-m[ '",]+(?:{"|".join(SOURCE)})\.[a-z]|['"`](?:{"|".join(SOURCE)})\.(?!cmake|md\b|pyi?\b)[a-z_]+"""
    rf"""|\b(?:from (?:{"|".join(SOURCE)})(?:\.\w+)* import|import (?:{"|".join(SOURCE)})\.)"""
)
_MODULE = re.compile(r"\belasticmoe((?:\.[A-Za-z_]\w*)+)")
_FILE = re.compile(r"(?<![\w./<>-])((?:\.\./)*(?:[\w.-]+/)*[A-Za-z_][\w-]*\.(?:py|pyi|md|cpp))(?![\w/-]|\.\w)")
_FOLDER = re.compile(r"(?<![\w./-])((?:elasticmoe/)?(?:services|common|native|cli)/[\w/]*\w)(?![\w*{<]|\.\w)")
# Files of other projects, and ones that a test makes or that only look like files.
_FOREIGN = {
    "alloc_cpu.cpp",
    "check.py",
    "chat_template_utils.py",
    "configuration_mixtral.py",
    "configuration_qwen3_moe.py",
    "convert_hf_to_gguf.py",
    "distributed_c10d.py",
    "llama.cpp",
    "page.md",
    "xxhash_spec.md",
}


def texts() -> Iterator[tuple[str, int, str]]:
    """(file, number, line) of all that may name a file or a module of the present. CHANGELOG.md tells of the past."""
    for path in tracked(
        ".py", ".pyi", ".md", ".cpp", ".h", ".toml", ".yaml", ".service", ".sh", ".ci/run", "Makefile", "Dockerfile"
    ):
        if name(path).startswith("elasticmoe/") or path in (ROOT / "CHANGELOG.md", Path(__file__)):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield name(path), number, line


def test_every_module_that_is_written_of_has_the_root_and_exists() -> None:
    """In strings, comments and pages, such as commands to be typed."""
    found = []
    for file, number, line in texts():
        found += [f"{file}:{number} {match[0]!r}: without the root" for match in _WITHOUT_ROOT.finditer(line)]
        found += [
            f"{file}:{number} elasticmoe{match[1]}: no module"
            for match in _MODULE.finditer(line)
            if match[1].split(".")[1] in SOURCE and not is_module(match[1].split(".")[1:])
        ]
    assert found == []


def is_module(parts: list[str]) -> bool:
    """Whether these name a package, a module, or something in one."""
    folder = ROOT
    for part in parts:
        if any((folder / f"{part}{ending}").is_file() for ending in (".py", ".pyi")):
            return True
        if not (folder / part).is_dir():
            text = (folder / "__init__.py").read_text(encoding="utf-8") if (folder / "__init__.py").is_file() else ""
            return re.search(rf"\b{part}\b", text) is not None
        folder /= part
    return True


def test_files_that_are_written_of_exist() -> None:
    """A name without its folder is one of the same service, or of what all have."""
    files = [name(path) for path in tracked("")]
    found = []
    for file, number, line in texts():
        for match in _FILE.finditer(line):
            what = match[1].removeprefix("elasticmoe/").rpartition("../")[2]
            if what.rpartition("/")[2] in _FOREIGN:
                continue
            near = service_of(file) if "/" not in what else "services/"
            named = (other for other in files if f"/{other}".endswith(f"/{what}"))
            if not any(other.startswith(near) or not other.startswith("services/") for other in named):
                found.append(f"{file}:{number} {what}")
        for match in _FOLDER.finditer(line):
            what = match[1].removeprefix("elasticmoe/")
            if not any(other.startswith((f"{what}/", f"{what}.")) for other in files):
                found.append(f"{file}:{number} {what}")
    assert found == []


def service_of(file: str) -> str:
    """`services/x/` for a file of a service, `services/` for all others, which may mean any."""
    parts = file.split("/")
    return f"services/{parts[1]}/" if parts[0] == "services" and len(parts) > 2 else "services/"


def alias_of(node: ast.stmt) -> str | None:
    """The name that a statement of a module gives a type: `Name = A | B`, another name, or a subscript such as
    `Callable[...]`; but not to the bounds of a field, `Annotated[...]`, which are the module's own."""
    forms = ast.BinOp | ast.Subscript | ast.Name | ast.Attribute
    if not isinstance(node, ast.Assign) or not isinstance(node.value, forms):
        return None
    if isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) == "Annotated":
        return None
    (target, *_) = node.targets
    is_type = isinstance(target, ast.Name) and re.fullmatch("[A-Z]+[a-z][A-Za-z0-9]*", target.id)
    return target.id if is_type else None


def test_a_name_of_a_type_means_one_thing() -> None:
    """Classes and aliases. Answers' documents (api/views.py, api/told.py) may share names with what they tell of:
    theirs are OpenAPI's."""
    places: dict[str, list[str]] = {}
    for path in CODE:
        if name(path).startswith(ROOMS) and path.suffix == ".py" and path.name not in ("views.py", "told.py"):
            for node in tree(path).body:
                named = node.name if isinstance(node, ast.ClassDef) else alias_of(node)
                if named is not None:
                    places.setdefault(named, []).append(name(path))
    assert len(places) > 300
    assert {what: where for what, where in places.items() if len(where) > 1} == {}


def test_the_command_line_stays_out_of_services() -> None:
    """What it needs of a running service it asks for. Planning, policy and loading are libraries: `bench plan`,
    `bench policy` and `bench load` measure their limits, `policy replay` tries the one and makes again what was
    decided."""
    scaling = ("planning.", "policy.", "control.autoscaling", "control.replay", "observation")
    libraries = (*(f"scaler.{library}" for library in scaling), "hmm.loading.loader", "hmm.memory.memory")
    found = [
        f"{name(path)}:{line} imports {what}"
        for path in CODE
        if name(path).startswith("cli/")
        for line, what in imports(tree(path))
        if what.startswith("elasticmoe.services.")
        and not what.startswith(tuple(f"elasticmoe.services.{library}" for library in libraries))
    ]
    assert found == []


def test_only_config_reads_the_environment() -> None:
    allowed = ("common/config.py", "cli/", "tests/", "benchmarks/")
    found = [
        f"{name(path)}:{node.lineno}"
        for path in CODE
        if not name(path).startswith(allowed)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("os", "environ"), ("os", "getenv")}
    ]
    assert found == []


# What may print besides cli/terminal.py, which cleans what it prints: the console on it, and programs whose output
# programs of ours read.
PRINTERS = ("cli/terminal.py", "cli/console.py", "cli/child.py", "cli/maker.py", "cli/models/__main__.py")
# What may make HTTP clients: one place, so that all of them ignore the environment alike.
CLIENT_MAKERS = ("cli/http.py",)


def test_the_command_line_prints_in_one_place() -> None:
    found = []
    for path in CODE:
        if not name(path).startswith("cli/") or name(path) in PRINTERS:
            continue
        for node in ast.walk(tree(path)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("print", "Console", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{name(path)}:{node.lineno} {called}")
    assert found == []


def test_clients_and_lines_come_from_one_place() -> None:
    makers = {f"httpx.{what}" for what in ("Client", "AsyncClient", "get", "post", "request", "stream")}
    found = []
    for path in CODE:
        if not name(path).startswith("cli/") or name(path) in CLIENT_MAKERS:
            continue
        for node in ast.walk(tree(path)):
            called = node.func if isinstance(node, ast.Call) else None
            is_reader = isinstance(called, ast.Attribute) and called.attr in ("iter_lines", "aiter_lines", "iter_text")
            if called is not None and (is_reader or ast.unparse(called) in makers):
                found.append(f"{name(path)}:{called.lineno} {ast.unparse(called)}")
    assert found == []


def test_nothing_listens_everywhere() -> None:
    found = [
        f"{name(path)}:{number}"
        for path in CODE
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "0.0.0.0" in line or "tcp://*" in line
    ]
    assert found == []


def test_no_error_is_swallowed() -> None:
    found = []
    for path in CODE:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(part, ast.Pass | ast.Continue) for part in node.body):
                found.append(f"{name(path)}:{node.lineno}")
    assert found == []


def test_public_things_have_docstrings() -> None:
    found = []
    for path in CODE:
        module = tree(path)
        if ast.get_docstring(module) is None:
            found.append(f"{name(path)}: module")
        classes = [node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for scope in [module, *classes]:
            for node in scope.body:
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                special = node.name.startswith("_") and node.name != "__call__"
                if not special and ast.get_docstring(node) is None and "abstractmethod" not in ast.unparse(node):
                    found.append(f"{name(path)}:{node.lineno} {node.name}")
    assert found == []


def test_no_docstring_comes_too_late() -> None:
    """A text behind a function's first statement is no docstring, and nothing else either."""
    found = [
        f"{name(path)}:{part.lineno} {node.name}"
        for path in PYTHON
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for part in node.body[1:]
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
    ]
    assert found == []


def test_nothing_is_there_for_tests_alone() -> None:
    """What a module defines at its top, and no decorator hands on, is named somewhere in the product."""
    named: set[str] = set()
    defined: list[tuple[str, str]] = []
    for path in PYTHON:
        if name(path).startswith("tests/"):
            continue
        module = tree(path)
        for node in ast.walk(module):
            if isinstance(node, ast.Name | ast.Attribute):
                named.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.add(node.value)
        defined += [
            (f"{name(path)}:{node.lineno}", node.name)
            for node in module.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list
        ]
    assert [(place, what) for place, what in defined if what not in named] == []


def test_every_test_waits_for_events() -> None:
    found = [
        f"{name(path)}:{node.lineno}"
        for path in tracked("_test.py", ".py")
        if name(path).startswith("tests/")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (node.value.id, node.attr) == ("time", "sleep")
    ]
    assert found == []


def test_what_tests_start_from_is_written_once() -> None:
    """A fixture or helper of some size that two test files hold word for word belongs into a conftest or a helper."""
    holders: dict[str, list[str]] = {}
    for path in PYTHON:
        for node in tree(path).body if name(path).startswith("tests/") else ():
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                body = "\n".join(ast.unparse(part) for part in node.body[ast.get_docstring(node) is not None :])
                if len(body) > REPEATED_MAX:
                    holders.setdefault(body, []).append(f"{name(path)}:{node.lineno} {node.name}")
    assert [places for places in holders.values() if len(places) > 1] == []
