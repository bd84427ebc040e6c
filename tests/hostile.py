"""`python -m tests.hostile [CONDITION...] [-- PYTEST ARGUMENTS]`, `make test-hostile`: the tests where a machine is not
kind to them. All conditions, one after another, unless some are named:

    busy     beside as many busy loops as there are cores
    holes    with 20 inherited descriptors, and holes between their numbers
    umask    under umask 077
    user     as a user without rights, in a fresh home (needs root; said to be left out elsewhere)
    shell    with what a caller's shell may have set: another time zone and locale, a narrow terminal, colours, proxies

Without further arguments what `make test` runs. No test may depend on the machine's speed, on what was inherited, on
who runs it or on what its files' modes would be. The exit status is 1 where a condition failed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.procs.another_user import NOBODY, OUT_OF_REACH, as_user
from tests.procs.descriptors import with_numbers

ROOT = Path(__file__).parent.parent
USUAL = ["-m", "not compose and not slow", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
NUMBERS = (*range(4, 11), *range(14, 19), 21, 24, 27, 30, 40, 63, 90, 200)  # 20 of them

ODD = {
    "TZ": "Pacific/Marquesas",  # nine hours and a half behind
    "LC_ALL": "C",
    "COLUMNS": "40",
    "LINES": "10",
    "FORCE_COLOR": "1",
    "SSL_CERT_FILE": "/nonexistent",
    "CDPATH": "/",
}

_Options = dict[str, Any]  # of Popen, `environment` to add to ours, and `prefix`, `numbers` of the command


@contextmanager
def busy(_: Path) -> Iterator[_Options]:
    """Loops that end with the block, or with this process."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(os.cpu_count() or 2)]
    try:
        yield {}
    finally:
        for one in loops:
            one.kill()
            one.wait()


@contextmanager
def holes(_: Path) -> Iterator[_Options]:
    """Numbers that whoever is started finds taken, and those between them free."""
    yield {"numbers": NUMBERS}


@contextmanager
def umask(_: Path) -> Iterator[_Options]:
    """Nothing that is made can be read by others."""
    yield {"umask": 0o077}


@contextmanager
def user(home: Path) -> Iterator[_Options]:
    """Who may write to nothing but the home and the folder for temporary files."""
    os.chown(home, NOBODY, NOBODY)
    yield {"prefix": as_user(NOBODY, ()) or ()}


@contextmanager
def shell(_: Path) -> Iterator[_Options]:
    """Nothing that is set for other programs changes what ours does."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    yield {"environment": {**nowhere, **ODD}}


CONDITIONS: dict[str, Callable[[Path], contextlib.AbstractContextManager[_Options]]] = {
    "busy": busy,
    "holes": holes,
    "umask": umask,
    "user": user,
    "shell": shell,
}


def run(name: str, arguments: Sequence[str]) -> int:
    """The exit status of pytest under that condition."""
    home = Path(tempfile.mkdtemp(prefix="em-hostile-"))
    # What is kept between runs is kept in the home: a user without rights cannot write to the checkout.
    environment = os.environ | {"HOME": str(home), "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--color=no",
        "-o",
        f"cache_dir={home / 'pytest'}",
        *(arguments or USUAL),
    ]
    try:
        with CONDITIONS[name](home) as options:
            environment |= options.pop("environment", {})
            command = [*options.pop("prefix", ()), *with_numbers(options.pop("numbers", ()), command)]
            return subprocess.run(command, cwd=ROOT, env=environment, check=False, **options).returncode
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    """The exit status."""
    at = argv.index("--") if "--" in argv else len(argv)
    names, arguments = argv[:at] or list(CONDITIONS), argv[at + 1 :]
    unknown = set(names) - set(CONDITIONS)
    if unknown:
        print(f"no such condition: {', '.join(sorted(unknown))}; there are {', '.join(CONDITIONS)}", file=sys.stderr)
        return 2
    results = {}
    for name in names:
        print(f"--- {name}", flush=True)
        if name == "user" and as_user(NOBODY, ()) is None:
            results[name] = f"left out: {OUT_OF_REACH}"
            continue
        status = run(name, arguments)
        results[name] = "passed" if status == 0 else f"failed: pytest ended with {status}"
    for name, result in results.items():
        print(f"{name:8} {result}")
    return int(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
