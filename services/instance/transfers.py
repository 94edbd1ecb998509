"""Blocks on their way from one pool to another, while their sequences go on reading them where they were.

A block of the local pool is *shipped*: its content is written to the target's daemon, which seals it. A sealed block of
another daemon is *copied*: that daemon fills the target on our behalf, and we seal it there. Once the content is ours
at the target, the table is switched and the hold on the old place is given up. All of it runs between two steps, so
every step sees one place. What fails leaves the table as it was and gives the target back.

Used by the engine thread, which it never lets wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, BlockRef
from services.core.errors import PeerLostError
from services.core.placement import MoveEnd
from services.core.sequence import Sequence
from services.dataplane.device import BlockBytes
from services.dataplane.negotiation import Offers
from services.dataplane.peers import Copied, PeerSet, Sealed
from services.dataplane.remote_attention import RemoteAttention
from services.dataplane.wire import CopyOrder
from services.instance.control import Control, CopiesSealed, SealCopies
from services.instance.holds import Holds
from services.instance.sequence_memory import SequenceMemory
from services.rmanager.block_table import Entry, Home


class Stage(Enum):
    WAITING = "waiting"  # for room in the daemon's window
    SENT = "sent"  # the content, or the order to copy it
    SEALING = "sealing"  # it is copied, and is being sealed
    ARRIVED = "arrived"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Transfer:
    """One block.

    Attributes:
        memory: None once its sequence has gone; whatever the transfer has then is given up when it ends.
        source: where the content is read; ``home`` says what becomes of a local block.
        use_before: monotonic time after which the target may be taken back.
        sent_at: monotonic time.
        failure: why it failed, if it did.
    """

    memory: SequenceMemory | None
    index: int
    key: bytes
    source: BlockRef
    home: Home
    target: BlockRef
    use_before: float
    stage: Stage = Stage.WAITING
    sent_at: float = 0.0
    failure: MoveEnd | None = None


class Transfers:
    """All transfers of one engine.

    Args:
        pool: the mapped local pool.
        local_offers: how other daemons can reach the local one.
        free_workspace: takes back a local block of the workspace.
    """

    def __init__(
        self,
        pool: BlockBytes,
        local_offers: Offers,
        peers: PeerSet,
        remote: RemoteAttention,
        holds: Holds,
        control: Control,
        free_workspace: Callable[[BlockHandle], None],
    ) -> None:
        self._pool = pool
        self._local_offers = local_offers
        self._peers = peers
        self._remote = remote
        self._holds = holds
        self._control = control
        self._free_workspace = free_workspace
        self._waiting: list[Transfer] = []
        self._sent: dict[int, Transfer] = {}  # by tag
        self._sealing: dict[tuple[int, BlockHandle], Transfer] = {}  # by session and target
        self._next_tag = 1
        self._next_segment = 1

    @property
    def leaving(self) -> bool:
        """Whether local blocks are on their way elsewhere, and will come free without anybody's doing."""
        return any(transfer.source.kvdaemon_id == self._holds.local_id for transfer in self._all())

    def begin(
        self, memory: SequenceMemory, index: int, key: bytes, target: BlockRef, use_before: float = float("inf")
    ) -> Transfer:
        """Brings a block to ``target``, which is reserved for it. The entry is busy until the transfer has ended."""
        entry = memory.table.entries[index]
        entry.busy = True
        transfer = Transfer(memory, index, key, self._place(entry), entry.home, target, use_before)
        self._waiting.append(transfer)
        return transfer

    def adopt(self, memory: SequenceMemory, index: int, ref: BlockRef) -> None:
        """The content of a sealed block lies at ``ref`` too, under a hold of ours: that is its place from now on."""
        entry = memory.table.entries[index]
        old, entry.busy = self._place(entry), False
        self._switch(memory, index, ref)
        self._holds.release([old])

    def tick(self) -> None:
        """Takes in what has been answered, and sends what can be sent; called once per round of the engine."""
        for sealed in self._peers.take_sealed():
            self._shipped(sealed)
        copied = self._peers.take_copied()
        if copied:
            self._copied(copied)
        full: set[str] = set()  # daemons that take nothing more now: to each of them blocks go in order
        waiting, self._waiting = self._waiting, []
        for transfer in waiting:
            through = self._through(transfer)
            if through in full or not self._send(transfer, through):
                full.add(through)
                self._waiting.append(transfer)

    def sealed(self, event: CopiesSealed) -> None:
        """Copied blocks are ours at the target now."""
        if event.session_id != self._holds.session_id(event.kvdaemon_id):
            return  # nothing is held any more
        for filled, now in event.blocks:
            if now != filled:  # the content lay there already
                self._holds.release([BlockRef(event.kvdaemon_id, filled)])
            transfer = self._sealing.pop((event.session_id, filled), None)
            self._arrived(transfer, BlockRef(event.kvdaemon_id, now))

    def segment_handle(self) -> int:
        """A name for a segment that was never used before."""
        handle, self._next_segment = self._next_segment, self._next_segment + 1
        return handle

    def orphan(self, memory: SequenceMemory) -> None:
        """The sequence is gone; its busy blocks are given up when their transfers end."""
        for transfer in self._all():
            if transfer.memory is memory:
                transfer.memory = None

    def peer_lost(self, kvdaemon_id: str) -> set[Sequence]:
        """A daemon is gone with all it held. Answers the sequences with a block that has no place left."""
        affected: set[Sequence] = set()
        for transfer in list(self._all()):
            memory = transfer.memory
            if transfer.target.kvdaemon_id == kvdaemon_id:
                self._fail(transfer, MoveEnd.DESTINATION_LOST)
                if transfer.home is Home.WORKSPACE and memory is not None:
                    affected.add(memory.sequence)
            elif transfer.source.kvdaemon_id == kvdaemon_id:
                self._fail(transfer, MoveEnd.SOURCE_LOST)
        return affected

    def _place(self, entry: Entry) -> BlockRef:
        """Where the content of an entry lies."""
        if entry.remote is not None:
            return entry.remote
        assert entry.local is not None
        return BlockRef(self._holds.local_id, entry.local)

    def _all(self) -> Iterator[Transfer]:
        yield from self._waiting
        yield from self._sent.values()
        yield from self._sealing.values()

    def _through(self, transfer: Transfer) -> str:
        """The daemon that is to be told."""
        shipped = transfer.source.kvdaemon_id == self._holds.local_id
        return transfer.target.kvdaemon_id if shipped else transfer.source.kvdaemon_id

    def _send(self, transfer: Transfer, through: str) -> bool:
        """Sends a block, or the order to copy it; False if the daemon takes nothing more for now."""
        now = time.monotonic()
        if transfer.memory is None or now > transfer.use_before:
            self._fail(transfer, MoveEnd.EXPIRED)
            return True
        tag = self._next_tag
        try:
            peer = self._peers.get(through)
            if transfer.target.kvdaemon_id == through:
                content = self._pool.read(transfer.source.handle.block)
                if not peer.has_room_to_write(BLOCK_KEY_BYTES + len(content)):
                    return False
                self._peers.write_block(through, tag, transfer.target.handle, transfer.key, content)
            else:
                order = self._copy_order(transfer)
                if not peer.has_room_to_write(len(order.pack())):
                    return False
                self._peers.copy_block(through, tag, transfer.source.handle, order)
        except PeerLostError:
            return False  # peer_lost will take it out
        self._next_tag += 1
        self._sent[tag] = transfer
        transfer.stage, transfer.sent_at = Stage.SENT, now
        return True

    def _copy_order(self, transfer: Transfer) -> CopyOrder:
        """
        Raises:
            PeerLostError: there is no connection to the target's daemon.
        """
        kvdaemon_id, handle = transfer.target
        local = kvdaemon_id == self._holds.local_id
        offers = self._local_offers if local else self._peers.get(kvdaemon_id).offers
        session_id = self._holds.session_id(kvdaemon_id)
        assert session_id is not None
        return CopyOrder(transfer.key, offers, session_id, handle)

    def _shipped(self, sealed: Sealed) -> None:
        transfer = self._sent.pop(sealed.tag, None)
        if transfer is not None:
            self._arrived(transfer, BlockRef(sealed.kvdaemon_id, sealed.handle))

    def _copied(self, answers: list[Copied]) -> None:
        """Has copied blocks sealed, those at one daemon together."""
        seals: dict[tuple[str, int], list[tuple[BlockHandle, bytes]]] = {}
        for answer in answers:
            transfer = self._sent.get(answer.tag)
            if transfer is None:
                continue
            if answer.failure:
                self._fail(transfer, MoveEnd.COPY_FAILED)
                continue
            del self._sent[answer.tag]
            kvdaemon_id, handle = transfer.target
            session_id = self._holds.session_id(kvdaemon_id)
            assert session_id is not None, "otherwise peer_lost has taken it out"
            transfer.stage = Stage.SEALING
            self._sealing[session_id, handle] = transfer
            seals.setdefault((kvdaemon_id, session_id), []).append((handle, transfer.key))
        for (kvdaemon_id, session_id), blocks in seals.items():
            self._control.order(SealCopies(kvdaemon_id, session_id, tuple(blocks)))

    def _switch(self, memory: SequenceMemory, index: int, ref: BlockRef) -> None:
        if ref.kvdaemon_id == self._holds.local_id:
            emptied = memory.table.move_to_local(index, ref.handle)
        else:
            emptied = memory.table.move_to_remote(index, ref, self.segment_handle())
        if emptied is not None:
            self._remote.forget(emptied.kvdaemon_id, emptied.handle)

    def _arrived(self, transfer: Transfer | None, ref: BlockRef) -> None:
        """One hold of ours is on ``ref``, which has the content."""
        if transfer is None:  # nobody waits for it any more
            self._holds.release([ref])
            return
        transfer.stage = Stage.ARRIVED
        memory = transfer.memory
        if memory is None:
            self._holds.release([ref])
        else:
            self._switch(memory, transfer.index, ref)
            memory.table.entries[transfer.index].busy = False
        self._give_up_source(transfer)

    def _fail(self, transfer: Transfer, failure: MoveEnd) -> None:
        """Takes a transfer out; what it moved stays where it was."""
        being_sealed = transfer.stage is Stage.SEALING
        self._waiting = [other for other in self._waiting if other is not transfer]
        self._sent = {tag: other for tag, other in self._sent.items() if other is not transfer}
        self._sealing = {name: other for name, other in self._sealing.items() if other is not transfer}
        transfer.stage, transfer.failure = Stage.FAILED, failure
        if not being_sealed:  # otherwise ``sealed`` gives it up
            self._holds.release([transfer.target])
        if transfer.memory is None:
            self._give_up_source(transfer)
        else:
            transfer.memory.table.entries[transfer.index].busy = False

    def _give_up_source(self, transfer: Transfer) -> None:
        if transfer.home is Home.WORKSPACE:
            self._free_workspace(transfer.source.handle)
        else:
            self._holds.release([transfer.source])
