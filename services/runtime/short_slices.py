"""Threads that work in short turns and should begin as soon as somebody needs them.

Linux lets a thread choose its time slice (``sched_setattr``, since 6.12 for ordinary threads, without any privilege):
who asks for short ones gets the same share of a busy core in smaller pieces, and sooner after it has slept. A daemon
that answers a query of 50 us need not wait until the instance on its core has computed for 3 ms.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy (0: ordinary), flags, nice, priority, then runtime, deadline, period in ns.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


def ask_for_short_slices(seconds: float) -> bool:
    """Asks for slices of that length for the calling thread and those that it starts from now on.

    Answers whether the kernel has taken note; one that is too old ignores the length.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, 0, 0, nice, 0, int(1e9 * seconds), 0, 0)
    answer: int = ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0)
    return answer == 0
