"""Watching counters in shared memory: ``watch_counters`` of ``src/abi.h``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_uint64, c_void_p
from enum import IntEnum

from kernels.cpu.library import WatchCall, load_library


class Watched(IntEnum):
    """How a watch ended."""

    TIMEOUT = 0
    CHANGED = 1  # a counter has
    READY = 2  # the descriptor is readable
    CONTENDED = 3  # others want this core


_ENDINGS = tuple(Watched)


class CounterWatch:
    """Looks at counters that other processes write to, without sleep and without the GIL.

    Args:
        counters: in shared memory, which stays mapped for as long as they live.
        fd: a descriptor that ends a watch, too, once it is readable.
    """

    def __init__(self, counters: Sequence[c_uint64], fd: int) -> None:
        count = len(counters)
        self._counters = tuple(counters)
        self._addresses = (c_void_p * count)(*map(addressof, counters))
        self._seen = (c_uint64 * count)()
        self._call = WatchCall(
            counters=addressof(self._addresses), seen=addressof(self._seen), spin_ns=0, count=count, fd=fd
        )
        self._by_reference = byref(self._call)
        self._watch_counters = load_library().watch_counters

    def watch(self, seen: list[int], spin_s: float) -> Watched:
        """Looks until a counter is not what it was in ``seen``, for ``spin_s`` at most."""
        self._seen[:] = [*seen]
        self._call.spin_ns = int(1e9 * spin_s)
        ending: int = self._watch_counters(self._by_reference)
        return _ENDINGS[ending]
