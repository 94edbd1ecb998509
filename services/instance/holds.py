"""Giving up holds on blocks, wherever they lie. Used by the engine thread."""

from __future__ import annotations

from collections.abc import Iterable

from services.core.blocks import BlockHandle, BlockRef
from services.dataplane.peers import PeerSet
from services.instance.control import Control, Release


class Holds:
    """Knows the session behind every hold: that with the local daemon, or that of a data connection."""

    def __init__(self, local_kvdaemon_id: str, local_session_id: int, peers: PeerSet, control: Control) -> None:
        self.local_id = local_kvdaemon_id
        self._local_session = local_session_id
        self._peers = peers
        self._control = control

    def session_id(self, kvdaemon_id: str) -> int | None:
        """The present session with a daemon; None where there is none."""
        return self._local_session if kvdaemon_id == self.local_id else self._peers.session_id(kvdaemon_id)

    def release(self, refs: Iterable[BlockRef]) -> None:
        """Gives up one hold on each block, in this order; those of sessions that are over have gone with them."""
        by_daemon: dict[str, list[BlockHandle]] = {}
        for ref in refs:
            by_daemon.setdefault(ref.kvdaemon_id, []).append(ref.handle)
        for kvdaemon_id, handles in by_daemon.items():
            session_id = self.session_id(kvdaemon_id)
            if session_id is not None:
                self._control.order(Release(kvdaemon_id, session_id, tuple(handles)))
