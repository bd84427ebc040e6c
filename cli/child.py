"""Run as a script by the launcher: `child.py LAUNCHER_PID FDS PROGRAM ARG...` becomes PROGRAM, tied to its life.

The kernel then kills the program when the launcher dies, however it dies (also by SIGKILL). The tie is made here, in
the new process, and not between fork and exec in the launcher: no Python runs in a forked copy of it. FDS are
descriptors of listening sockets with commas between them (`-` for none): they get the numbers from 3 on, which is where
the program looks for them (sd_listen_fds(3)). Imports nothing but the standard library, so that it costs milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
LISTEN_FDS_FIRST = 3


def main() -> None:
    """Never returns. Exit code 127 with one line on stderr when the program cannot be run."""
    launcher, fds, program = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # The launcher may have died before the tie was made; then this process has another parent by now.
    if os.getppid() != launcher:
        os._exit(127)
    if fds != "-":
        place([int(fd) for fd in fds.split(",")])
        os.environ["LISTEN_PID"] = str(os.getpid())  # exec keeps it
    try:
        os.execve(program[0], program, os.environ)
    except OSError as error:
        print(f"{program[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def place(fds: list[int]) -> None:
    """Give `fds` the numbers from 3 on, in their order; none is closed before all have moved out of the way."""
    above = LISTEN_FDS_FIRST + len(fds) + max(fds)
    for number, fd in enumerate(fds):
        os.dup2(fd, above + number, inheritable=False)
        os.close(fd)
    for number in range(len(fds)):
        os.dup2(above + number, LISTEN_FDS_FIRST + number, inheritable=True)


if __name__ == "__main__":
    main()
