"""What a test leaves open, whatever else in its process is closed meanwhile."""

from __future__ import annotations

import os


def open_files() -> set[tuple[str, str]]:
    """This process's file descriptors, each with what it is open on.

    A test asks what has come to them (``open_files() - before``), not how many there are: one that an earlier test
    left to the garbage collector may go at any time.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:  # the listing's own
            continue
    return found
