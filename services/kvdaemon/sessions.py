"""The ledger between the daemon's two threads, and the life of sessions.

The ledger is the only thing that both threads change. The asyncio thread opens and ends sessions and serves control
calls; the worker thread asks whether a session is still valid and what it may touch. Nobody tells the worker which
sessions ended: it is woken and asks the ledger, so there is one truth and nothing to keep in step with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from services.core.blocks import PoolGeometry
from services.core.errors import InvalidRequestError, SessionRevokedError
from services.rmanager.holder import Session
from services.rmanager.ledger import Ledger

_log = logging.getLogger(__name__)


class SharedLedger:
    """A ledger behind its lock: ``with shared as ledger: ...``.

    One plain lock for everything, also in the asyncio thread: ledger operations take microseconds per block and never
    wait for anything, and neither thread computes, copies or sends while it holds the lock.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()

    def __enter__(self) -> Ledger:
        self._lock.acquire()
        return self._ledger

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class Sessions:
    """Opens and ends sessions. Used by the asyncio thread.

    Args:
        sessions_ended: called after sessions may have ended, so that the worker closes their data connections.
    """

    def __init__(self, shared: SharedLedger, sessions_ended: Callable[[], None]) -> None:
        self._shared = shared
        self._sessions_ended = sessions_ended

    def open(self, instance_id: str, epoch: int, geometry: PoolGeometry, mapped: bool) -> tuple[Session, int]:
        """Opens a session and answers it with the pool's number of blocks. Raises as ``Ledger.open_session`` does."""
        try:
            with self._shared as ledger:
                session = ledger.open_session(instance_id, epoch, geometry, mapped)
                total_blocks = ledger.total_blocks
        finally:
            self._sessions_ended()  # the instance's earlier one, even if this one is refused
        _log.info(
            "session opened",
            extra={"session": hex(session.session_id), "instance": instance_id, "epoch": epoch, "mapped": mapped},
        )
        return session, total_blocks

    def close(self, session_id: int) -> None:
        """Ends a session. What it holds is free now, but a mapped session's blocks, which wait for ``hung_up``."""
        with self._shared as ledger:
            if ledger.revoked(session_id):
                return
            ledger.close_session(session_id)
        _log.info("session ended", extra={"session": hex(session_id)})
        self._sessions_ended()

    def check(self, session_id: int) -> None:
        """
        Raises:
            SessionRevokedError: the session is over.
        """
        with self._shared as ledger:
            if ledger.revoked(session_id):
                raise SessionRevokedError(f"session {session_id:#x} is over; open a new one")

    def may_map(self, session_id: int) -> bool:
        """Whether the session may have the pool's memory; if so, from now on only ``hung_up`` frees its blocks."""
        try:
            with self._shared as ledger:
                ledger.begin_mapping(session_id)
        except (SessionRevokedError, InvalidRequestError) as error:
            _log.warning("refused to pass the pool: %s", error)
            return False
        return True

    def hung_up(self, session_id: int) -> None:
        """The process that had mapped the pool is gone."""
        with self._shared as ledger:
            ledger.hang_up(session_id)
        _log.info("mapping ended", extra={"session": hex(session_id)})
        self._sessions_ended()
