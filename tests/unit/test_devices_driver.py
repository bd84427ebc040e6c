"""What is said of a vendor's library that cannot be loaded, and of errors that we have no meaning of."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from elasticmoe.common.devices.ascend import _AclDriver
from elasticmoe.common.devices.driver import Library
from elasticmoe.common.protocol.errors import DeviceError
from tests.devices import standins

UNKNOWN = 507_900  # to both vendors


def compiled(folder: Path, name: str, source: str, *needed: Path) -> Path:
    """A library in `folder` that needs those others, wherever they are. Skips the test without a compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"a library is compiled for this, and there is no {compiler}")
    path = folder / name
    command = [compiler, "-shared", "-fPIC", "-xc++", "-", "-o", str(path), f"-Wl,-soname,{name}", "-Wl,--no-as-needed"]
    command += ["-xnone", *map(str, needed)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def refused(library: Library, answer: int) -> tuple[str, str]:
    """Code and text of what becomes of an answer to the call `ask`."""
    with pytest.raises(DeviceError) as caught:
        library.refuse("ask", answer)
    return caught.value.code, caught.value.message


def test_a_library_that_lacks_another_one_is_told_by_that_ones_name(tmp_path: Path) -> None:
    path = compiled(tmp_path, "libascendcl.so", "", compiled(tmp_path, "libascend_hal.so", ""))
    with pytest.raises(DeviceError, match=r"libascendcl\.so cannot be loaded: install it \(libascend_hal\.so:") as got:
        Library(str(path), {}, {}, {}, "install it", {})
    assert got.value.code == "no_driver"


def test_a_librarys_own_words_are_one_line_of_bounded_length(tmp_path: Path) -> None:
    text = r"E1\n\t" + 1_000 * "long "
    source = f'extern "C" const char* words() {{ return "{text}"; }}'
    path = compiled(tmp_path, "libwordy.so", source)
    library = Library(str(path), {}, {}, {}, "", {"words": (), "missing": ()})
    code, told = refused(library, 7)
    assert code == "driver_failed"
    assert told.startswith("ask answers 7, E1 long long")
    assert len(told) < 330
    assert "\n" not in told


def test_a_gpus_driver_names_an_error_that_has_no_meaning_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        library = standins.process("cuda", folder)._of_this_process().library
        told = "ask answers 802, CUDA_ERROR_SYSTEM_NOT_READY: system not yet initialized"
        assert refused(library, 802) == ("driver_failed", told)
        told = "ask answers 1, CUDA_ERROR_INVALID_VALUE: invalid argument"
        assert refused(library, 1) == ("driver_refused", told), "a name is said once"
        assert refused(library, 400) == ("driver_refused", "ask answers 400, CUDA_ERROR_INVALID_HANDLE")
        assert refused(library, UNKNOWN) == ("driver_failed", f"ask answers {UNKNOWN}, an error that is not known here")


def test_an_npus_driver_says_what_the_refused_call_was_about_and_nothing_older(monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        driver = standins.process("npu", folder)._of_this_process()
        driver.open(0)
        library, unknown = driver.library, f"ask answers {UNKNOWN}, an error that is not known here"
        assert library.ask("aclrtReleaseMemAddress", 1)
        told = f"ask answers {UNKNOWN}, EZ9999: Inner Error! a rule of the driver is broken"
        assert refused(library, UNKNOWN) == ("driver_failed", told)
        assert refused(library, UNKNOWN) == ("driver_failed", unknown), "the text was taken"
        told = "aclrtReleaseMemAddress answers 107000, ACL_ERROR_RT_PARAM_INVALID: EZ9999: Inner Error! a rule of the "
        with pytest.raises(DeviceError, match=f"^{told}driver is broken$"):
            driver.unreserve(0, 1, 1)
        assert refused(library, UNKNOWN) == ("driver_failed", unknown), "and that of an error that has a meaning"
        again = _AclDriver(library.path).library
        assert refused(again, UNKNOWN) == ("driver_failed", unknown), "and what was said of another library's beginning"


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_library_without_words_for_errors_is_as_good(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        library = standins.process(kind, folder, "-DSTANDIN_V1")._of_this_process().library
        assert refused(library, UNKNOWN) == ("driver_failed", f"ask answers {UNKNOWN}, an error that is not known here")
