"""Queries that compiled code answers: ``answering`` of ``src/abi.h``, and watching for them.

The loop that waits for messages and the one that answers them are one, so that a query of a decode step costs its
attention and little else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from ctypes import addressof, byref, c_uint64, c_void_p
from enum import IntEnum
from typing import NamedTuple

from kernels.cpu.library import Answering, AttentionCall, Channel, WatchCall, load_library


class Answered(NamedTuple):
    """What has been done since one was told last: queries, seconds of computing, bytes of messages.

    ``ago_s``: how long ago the last answer was computed.
    """

    queries: int
    compute_s: float
    received_bytes: int
    sent_bytes: int
    ago_s: float


class CompiledQueries:
    """The queries of one plan, which compiled code may answer once a transport has set the channel.

    Args:
        context: of the kernels, which must be kept.
        call: one layer's attention, but for what a query brings.
        layer_stride: elements of the pool from one layer to the next.
        kept: whatever else ``call`` points to.
    """

    def __init__(
        self, context: int, call: AttentionCall, layers: int, layer_stride: int, kept: Sequence[object]
    ) -> None:
        self._kept = kept
        self._answering = Answering(kernels=context, attention=call, layers=layers, layer_stride=layer_stride)
        self.channel: Channel = self._answering.channel
        self._told = Answered(0, 0.0, 0, 0, 0.0)

    @property
    def address(self) -> int:
        return addressof(self._answering)

    @property
    def answered(self) -> int:
        """Queries so far."""
        count: int = self._answering.answered
        return count

    def allow(self, step: int, ended: c_uint64, ended_before: int) -> None:
        """Queries of this step may be answered for as long as ``ended`` is what it was before."""
        answering = self._answering
        self._ended = ended
        answering.step, answering.ended, answering.ended_before = step, addressof(ended), ended_before

    def take_answered(self) -> Answered:
        """What has been done since the last call."""
        a, told = self._answering, self._told
        ago_s = 1e-9 * (time.monotonic_ns() - a.answered_at_ns)
        self._told = Answered(a.answered, 1e-9 * a.computed_ns, a.received_bytes, a.sent_bytes, ago_s)
        return Answered(
            self._told.queries - told.queries,
            self._told.compute_s - told.compute_s,
            self._told.received_bytes - told.received_bytes,
            self._told.sent_bytes - told.sent_bytes,
            ago_s,
        )


class Watched(IntEnum):
    """How a watch ended."""

    TIMEOUT = 0
    CHANGED = 1  # something has come that is no query to be answered here
    READY = 2  # the descriptor is readable
    CONTENDED = 3  # others want this core
    TAKEN = 4  # the answer has come, and has been merged


ENDINGS = tuple(Watched)  # by the number that compiled code answers


class ConnectionWatch:
    """Looks at connections, without sleep and without the GIL.

    Args:
        counters: of each connection what its peer writes to, in shared memory that stays mapped for as long as they
            live; None: it is a stream.
        fd: a descriptor that ends a watch, too, once it is readable.
    """

    def __init__(self, counters: Sequence[c_uint64 | None], fd: int) -> None:
        count = len(counters)
        self._counters = tuple(counters)
        self._addresses = (c_void_p * count)(*(None if one is None else addressof(one) for one in counters))
        self._seen = (c_uint64 * count)()
        self._answering = (c_void_p * count)()
        self._call = WatchCall(
            counters=addressof(self._addresses),
            seen=addressof(self._seen),
            answering=addressof(self._answering),
            spin_ns=0,
            count=count,
            fd=fd,
        )
        self._by_reference = byref(self._call)
        self._watch_connections = load_library().watch_connections

    def watch(self, seen: Sequence[int], queries: Sequence[CompiledQueries | None], spin_s: float) -> Watched:
        """Looks until something has come that is no query to be answered here, for ``spin_s`` at most after the last
        one that was.

        Args:
            seen: what each counter was; anything for streams.
            queries: for each connection, what is answered right here, with the channel's present state.
        """
        self._seen[:] = [*seen]
        self._answering[:] = [None if one is None else one.address for one in queries]
        self._call.spin_ns = int(1e9 * spin_s)
        ending: int = self._watch_connections(self._by_reference)
        return ENDINGS[ending]
