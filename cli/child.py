"""Run as a script by the launcher: `child.py LAUNCHER_PID PROGRAM ARG...` becomes PROGRAM, tied to the launcher's life.

The kernel then kills the program when the launcher dies, however it dies (also by SIGKILL). The tie is made here, in
the new process, and not between fork and exec in the launcher: no Python runs in a forked copy of it. Imports nothing
but the standard library, so that it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns. Exit code 127 with one line on stderr when the program cannot be run."""
    launcher, program = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # The launcher may have died before the tie was made; then this process has another parent by now.
    if os.getppid() != launcher:
        os._exit(127)
    try:
        os.execv(program[0], program)
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


if __name__ == "__main__":
    main()
