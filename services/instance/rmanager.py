"""The instance's rManager: sessions with daemons, and the orders of its engine carried out in them.

Runs in the asyncio thread. Placing a prompt is all or nothing: what is cached is attached to, the rest is reserved in
the local pool as far as it has room, and beyond that in the pools of others, in proportion to their room. Who fits
into its own pool takes nothing from an instance whose own requests wait: where everybody is short of memory, lending it
to and fro gives nobody more of it, and leaves everybody's blocks far away. A daemon refuses at once what it has no room
for, and nothing that was borrowed is borrowed on, so there are no cycles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opentelemetry.trace import Tracer

from services.core.blocks import BlockHandle, BlockRef, PoolGeometry
from services.core.errors import ConfigError, ContextTooLongError, InfiniteLLMError, UnavailableError
from services.core.placement import Room, RoomView
from services.dataplane.negotiation import choose_address
from services.dataplane.peers import PeerSet
from services.instance.capacity import Capacity
from services.instance.control import (
    CopiesSealed,
    EndMove,
    EndSession,
    EngineEvent,
    LocalSealed,
    Order,
    PeerOpened,
    PromptDeferred,
    PromptRefused,
    PromptReserved,
    Release,
    Replenish,
    Replenished,
    ReserveMove,
    ReservePrompt,
    SealCopies,
    SealLocal,
)
from services.instance.lookahead import too_much_later
from services.instance.move_desk import MoveDesk
from services.rmanager.daemon_client import DaemonSession
from services.rmanager.gmanager_client import GManagerClient
from services.rmanager.lenders import shares
from services.runtime.tls import MutualTls
from services.runtime.tracing import entered

_log = logging.getLogger(__name__)
_BLIND_S = 2.0  # a gManager that did not answer is not asked again before
_FRESH_S = 0.1  # a view of the cluster this old is good enough to begin a prompt with


@dataclass(frozen=True, slots=True)
class RManagerSettings:
    """What an rManager is told once.

    Attributes:
        workspace: open blocks the engine holds when no request runs; not available to requests.
        tls: the instance's own identity.
    """

    instance_id: str
    geometry: PoolGeometry
    workspace: int
    call_timeout_s: float
    tls: MutualTls | None = None


class _Hold(NamedTuple):
    """One block, held in one session."""

    session: DaemonSession
    handle: BlockHandle

    @property
    def ref(self) -> BlockRef:
        return BlockRef(self.session.kvdaemon_id, self.handle)


class RManager:
    """Carries out the engine's orders. ``order`` may be called from the engine thread; the rest is asyncio's.

    Args:
        local: the open session with the local daemon.
        post: puts an event into the engine's inbox.
        on_fatal: called when the engine cannot go on, because the local daemon and with it the pool is gone.
        tracer: makes the moves' spans.
    """

    def __init__(
        self,
        settings: RManagerSettings,
        local: DaemonSession,
        gmanager: GManagerClient,
        peers: PeerSet,
        post: Callable[[EngineEvent], None],
        on_fatal: Callable[[str], None],
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._local = local
        self._gmanager = gmanager
        self._peers = peers
        self._post = post
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, DaemonSession] = {}
        self._opening: dict[str, asyncio.Task[DaemonSession | None]] = {}
        self._view = RoomView()  # the last answer of a gManager
        self._viewed_at = -math.inf  # monotonic
        self._capacity = Capacity(time.monotonic())
        self._look_again_at = -math.inf  # monotonic
        self._tasks: set[asyncio.Task[None]] = set()
        self.moves = MoveDesk(self._session_at, post, tracer)

    def order(self, order: Order) -> None:
        """Takes an order from the engine thread."""
        self._loop.call_soon_threadsafe(self._start, order)

    async def close(self) -> None:
        """Ends all sessions but the local one, which belongs to the caller."""
        for task in (*self._tasks, *self._opening.values()):
            task.cancel()
        await asyncio.gather(*(session.close() for session in self._sessions.values()), return_exceptions=True)

    # ------------------------------------------------------------ orders

    def _start(self, order: Order) -> None:
        # Each order is a task of its own; calls to one daemon keep their order because DaemonSession grants them in the
        # order of asking, and an order that has a single call asks for it before it first waits.
        task = self._loop.create_task(self._guarded(self._execute(order)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except InfiniteLLMError as error:
            # The session concerned has ended, and the engine knows; only the local one cannot be done without.
            _log.warning("order not carried out", extra={"why": str(error)})
            if not self._local.alive:
                self._on_fatal(f"local kvdaemon lost: {error}")
        except Exception as error:  # a bug; an engine that waits for this answer would wait forever
            _log.critical("order failed", exc_info=True)
            self._on_fatal(f"rManager failed: {error}")

    async def _execute(self, order: Order) -> None:
        match order:
            case ReservePrompt():
                with entered(order.trace):
                    await self._reserve_prompt(order)
            case SealLocal(blocks):
                now = await self._local.seal(blocks)
                own = [handle for handle, _ in blocks]
                self._post(LocalSealed(tuple(zip(own, now, strict=True))))
            case Release(kvdaemon_id, session_id, handles):
                session = self._session(kvdaemon_id)
                if session is not None and session.opened.session_id == session_id:
                    await session.release(handles)
            case Replenish(blocks, spare_wanted):
                await self._replenish(blocks, spare_wanted)
            case SealCopies(kvdaemon_id, session_id, blocks):
                session = self._session(kvdaemon_id)
                if session is not None and session.opened.session_id == session_id:
                    now = await session.seal(blocks)
                    own = [handle for handle, _ in blocks]
                    self._post(CopiesSealed(kvdaemon_id, session_id, tuple(zip(own, now, strict=True))))
            case ReserveMove():
                await self.moves.reserve(order)
            case EndMove():
                self.moves.end(order)
            case EndSession(kvdaemon_id, session_id, _):
                session = self._sessions.get(kvdaemon_id)
                if session is not None and session.opened.session_id == session_id:
                    del self._sessions[kvdaemon_id]
                    await session.close()

    async def _reserve_prompt(self, order: ReservePrompt) -> None:
        """Answers with PromptReserved, PromptDeferred or PromptRefused, whatever happens."""
        held: list[_Hold] = []
        missing = 0
        fits_here = order.max_blocks <= self._own_blocks
        try:
            await self._look(_FRESH_S)
            older = self._view.oldest_starving
            if older is not None and older < order.age:  # what comes free is not for us
                self._post(PromptDeferred(order.age.request_id, order.attempt, starves=False))
                return
            refusal = self._too_long(order)
            if refusal is not None:
                self._post(PromptRefused(order.age.request_id, order.attempt, refusal))
                return
            attached = await self._attach(order.keys, held)
            if self._wants_too_much_later(order, len(attached)):
                await self._give_back(held)
                self._post(PromptDeferred(order.age.request_id, order.attempt, starves=False))
                return
            missing = order.full_blocks - len(attached) + 1  # and its tail
            handles = await self._local.reserve(missing, 0, request_id=order.age.request_id)
            local = [_Hold(self._local, handle) for handle in handles]
            held += local
            missing -= len(local)
            remote = await self._borrow(missing, order.age.request_id, spare_wanted=fits_here) if missing else []
            held += remote
            missing -= len(remote)
            # A session that is alive has no successor: the engine hears of these blocks before it hears of one, and
            # cannot take them for blocks of the same daemon's next session.
            if not missing and all(hold.session.alive for hold in held):
                held = []
                tail = (local or remote).pop()
                self._post(
                    PromptReserved(
                        order.age.request_id,
                        order.attempt,
                        attached=tuple(hold.ref for hold in attached),
                        local=tuple(hold.handle for hold in local),
                        remote=tuple(hold.ref for hold in remote),
                        tail=tail.ref,
                    )
                )
                return
        except InfiniteLLMError as error:
            _log.warning("reservation interrupted", extra={"request_id": order.age.request_id, "why": str(error)})
        await self._give_back(held)
        self._post(PromptDeferred(order.age.request_id, order.attempt, not fits_here, missing))

    @property
    def _own_blocks(self) -> int:
        """That requests can have in the own pool if nobody else has any."""
        return self._local.opened.total_blocks - self._settings.workspace

    def _wants_too_much_later(self, order: ReservePrompt, attached: int) -> bool:
        """By the latest view. Args: attached: blocks of the prompt that are held already."""
        spare = sum(room.free_blocks for room in self._view.rooms if not room.wanted)
        return too_much_later(order.expected_blocks, order.peak_blocks - attached, self._own_blocks, spare)

    def _too_long(self, order: ReservePrompt) -> ContextTooLongError | None:
        """Why this request can never be served, if so: it needs more blocks than can ever be free for it."""
        own = self._own_blocks
        if order.max_blocks <= own:
            return None
        others = self._capacity.limit(time.monotonic())
        if others is None or order.max_blocks <= own + others:
            return None
        size = self._settings.geometry.block_tokens
        return ContextTooLongError(
            f"the request needs up to {order.max_blocks * size} tokens of KV cache ({order.max_blocks} rBlocks, "
            f"prompt and max_tokens together); the cluster has {(own + others) * size} ({own + others} rBlocks in "
            f"{len(self._view.rooms) + 1} KV daemons): shorten the prompt, lower max_tokens, or add KV daemons"
        )

    async def _attach(self, keys: Sequence[bytes], held: list[_Hold]) -> list[_Hold]:
        """Holds on the longest cached beginning of a prompt; adds them to ``held`` as they are taken."""
        if not keys:
            return []
        found: dict[int, _Hold] = {}
        surplus: list[_Hold] = []
        for session in (self._local, *self._sessions.values()):
            for index, handle in (await session.attach(keys)).items():
                hold = _Hold(session, handle)
                held.append(hold)
                if index in found:
                    surplus.append(hold)
                else:
                    found[index] = hold
        length = next(index for index in range(len(keys) + 1) if index not in found)
        attached = [found[index] for index in range(length)]
        surplus += [hold for index, hold in sorted(found.items()) if index >= length]
        held[:] = attached
        await self._give_back(surplus)
        return attached

    async def _replenish(self, blocks: int, spare_wanted: bool) -> None:
        """Answers with Replenished, whatever happens."""
        local: list[BlockHandle] = []
        remote: list[_Hold] = []
        try:
            local = await self._local.reserve(blocks, 0)
            if len(local) < blocks:
                remote = await self._borrow(blocks - len(local), "", spare_wanted)
        finally:
            starving = self._view.oldest_starving
            refs = tuple(hold.ref for hold in remote if hold.session.alive)  # as for prompts
            self._post(Replenished(tuple(local), refs, starving))

    async def _give_back(self, holds: Sequence[_Hold]) -> None:
        """Never fails: whoever calls it still owes the engine an answer."""
        by_session: dict[DaemonSession, list[BlockHandle]] = {}
        for hold in reversed(holds):
            by_session.setdefault(hold.session, []).append(hold.handle)
        for session, handles in by_session.items():
            with contextlib.suppress(InfiniteLLMError):  # the session has ended, and its holds with it
                await session.release(handles)

    # ------------------------------------------------------------ other daemons

    async def _borrow(self, blocks: int, request_id: str, spare_wanted: bool = False) -> list[_Hold]:
        """Up to ``blocks`` blocks reserved on other daemons, interleaved.

        Args:
            spare_wanted: not on those whose own instance has requests that wait.
        """
        await self._look(0.0)
        rooms = [room for room in self._view.rooms if room.free_blocks and not (spare_wanted and room.wanted)]
        grants: list[list[_Hold]] = []
        left = blocks
        for room, share in zip(rooms, shares(blocks, [room.free_blocks for room in rooms]), strict=True):
            granted = await self._reserve_at(room, share, request_id)
            left -= len(granted)
            grants.append(granted)
        for at, room in enumerate(rooms):  # views are stale: whoever has more may fill the gap
            if left:
                more = await self._reserve_at(room, left, request_id)
                left -= len(more)
                grants[at] += more
        return _interleave(grants)

    async def _reserve_at(self, room: Room, blocks: int, request_id: str) -> list[_Hold]:
        if not blocks:
            return []
        try:
            session = await self._session_with(room)
            if session is None:
                return []
            handles = await session.reserve(blocks, 0, request_id=request_id)
        except InfiniteLLMError as error:
            _log.warning("no room from kvdaemon", extra={"kvdaemon": room.kvdaemon_id, "why": str(error)})
            return []
        return [_Hold(session, handle) for handle in handles]

    async def _look(self, max_age_s: float) -> None:
        """Asks the gManager who has room and who starves, unless that is known well enough.

        Without a gManager the last view stays in use, but for who starves: that request may long be done.
        """
        now = time.monotonic()
        if now - self._viewed_at <= max_age_s or now < self._look_again_at:
            return
        try:
            self._view = await self._gmanager.find_room(self._settings.geometry, exclude=(self._local.kvdaemon_id,))
            self._viewed_at = time.monotonic()
            self._capacity.see(sum(room.total_blocks for room in self._view.rooms), self._viewed_at)
        except UnavailableError as error:
            self._view = RoomView(self._view.rooms)
            self._look_again_at = time.monotonic() + _BLIND_S
            _log.warning("no gManager: using its last view", extra={"why": str(error), "rooms": len(self._view.rooms)})

    def _session(self, kvdaemon_id: str) -> DaemonSession | None:
        if kvdaemon_id == self._local.kvdaemon_id:
            return self._local
        return self._sessions.get(kvdaemon_id)

    async def _session_at(self, kvdaemon_id: str, address: str) -> DaemonSession | None:
        if kvdaemon_id == self._local.kvdaemon_id:
            return self._local
        return await self._session_with(Room(kvdaemon_id, address, 0, 0))

    async def _session_with(self, room: Room) -> DaemonSession | None:
        """The session with a daemon, opened if there is none. Concurrent callers share one attempt."""
        session = self._sessions.get(room.kvdaemon_id)
        if session is not None and session.alive:
            return session
        task = self._opening.get(room.kvdaemon_id)
        if task is None:
            task = self._loop.create_task(self._open(room))
            self._opening[room.kvdaemon_id] = task
            task.add_done_callback(lambda _: self._opening.pop(room.kvdaemon_id, None))
        return await asyncio.shield(task)

    async def _open(self, room: Room) -> DaemonSession | None:
        session_id = 0

        def lost(kvdaemon_id: str, reason: str) -> None:
            if self._sessions.get(kvdaemon_id) is session:
                del self._sessions[kvdaemon_id]
            self._peers.report_lost(kvdaemon_id, session_id, reason)

        session = DaemonSession(
            room.kvdaemon_id,
            room.address,
            instance_id=self._settings.instance_id,
            epoch=time.time_ns(),
            geometry=self._settings.geometry,
            mapped=False,
            on_lost=lost,
            call_timeout_s=self._settings.call_timeout_s,
            tls=self._settings.tls,
        )
        try:
            opened = await session.open()
        except InfiniteLLMError as error:
            _log.warning("kvdaemon gave no session", extra={"kvdaemon": room.kvdaemon_id, "why": str(error)})
            return None
        session_id = opened.session_id
        try:
            address = choose_address(self._peers.schemes, opened.offers)
        except ConfigError as error:
            _log.warning("kvdaemon cannot be reached", extra={"kvdaemon": room.kvdaemon_id, "why": str(error)})
            await session.close()
            return None
        _log.info("session with kvdaemon", extra={"kvdaemon": room.kvdaemon_id, "data_address": address})
        self._sessions[room.kvdaemon_id] = session
        self._post(PeerOpened(room.kvdaemon_id, address, opened.session_id, opened.offers))
        return session


def _interleave(grants: Sequence[Sequence[_Hold]]) -> list[_Hold]:
    """Merges lists, each spread evenly over the result: attention over a prefix then keeps all daemons busy."""
    placed = [((at + 0.5) / len(holds), n, hold) for n, holds in enumerate(grants) for at, hold in enumerate(holds)]
    return [hold for _, _, hold in sorted(placed, key=lambda entry: entry[:2])]
