"""What a daemon computes for others: for the gManager's cost model sums until a heartbeat asks, and all in all."""

from __future__ import annotations

import threading

from services.core.timings import HostingTiming


class Hosting:
    """Filled by the worker thread, emptied by the asyncio thread.

    Attributes:
        queries, queries_s: all queries ever, with prefill rows or without, and the seconds in the kernel.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages = 0
        self._context_tokens = 0.0
        self._compute_s = 0.0
        self.queries = 0
        self.queries_s = 0.0

    def answered(self, queries: int, compute_s: float) -> None:
        """Takes in any queries."""
        self.queries += queries
        self.queries_s += compute_s

    def add(self, queries: int, context_tokens: float, compute_s: float) -> None:
        """Takes in queries of one plan without prefill rows.

        Args:
            context_tokens: of a query's rows in this pool, divided by the number of layers.
            compute_s: of all of them.
        """
        with self._lock:
            self._messages += queries
            self._context_tokens += queries * context_tokens
            self._compute_s += compute_s

    def drain(self) -> tuple[HostingTiming, ...]:
        """Everything since the last call; nothing if there was no such query."""
        with self._lock:
            taken = HostingTiming(self._messages, self._context_tokens, self._compute_s)
            self._messages, self._context_tokens, self._compute_s = 0, 0.0, 0.0
        return (taken,) if taken.messages else ()
