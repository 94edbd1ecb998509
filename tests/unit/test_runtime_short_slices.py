"""What the kernel says of a thread that asked for short slices."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from services.runtime.short_slices import ask_for_short_slices


def in_a_thread(work: object) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))  # type: ignore[operator]
    thread.start()
    thread.join()
    return found[0]


def slice_ns() -> int | None:
    """Of the calling thread; None where the kernel does not say."""
    file = Path(f"/proc/self/task/{threading.get_native_id()}/sched")
    found = re.search(r"se\.slice\s*:\s*(\d+)", file.read_text()) if file.exists() else None
    return None if found is None else int(found[1])


def test_the_calling_thread_gets_them_and_no_other() -> None:
    def work() -> tuple[bool, int | None, int]:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        taken = ask_for_short_slices(200e-6)
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == nice
        return taken, slice_ns(), threading.get_native_id()

    before = slice_ns()
    taken, asked, thread = in_a_thread(work)  # type: ignore[misc]
    if not taken or asked is None:
        pytest.skip("this kernel does not tell threads' slices, or this machine's architecture is not known")
    assert thread != threading.get_native_id()
    assert slice_ns() == before != 200_000
    kernel = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    assert asked == (200_000 if kernel >= (6, 12) else before)
