"""``python die_with_parent.py PARENT_PID PROGRAM [ARGUMENT ...]``: becomes PROGRAM, and dies with its parent.

Run as a script between a process and each of its children. PR_SET_PDEATHSIG is this process's and stays through the
exec. A parent that died before it was set can no longer be the parent afterwards, so looking then closes the race.
Doing this in a process of its own, instead of between fork and exec, is safe when the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    try:
        os.execv(program, sys.argv[2:])
    except OSError as exc:
        sys.exit(f"{program}: {exc.strerror}")


if __name__ == "__main__":
    main()
