"""What the engine thread and the asyncio thread say to each other.

Orders go from the engine to the rManager (asyncio), which executes those for one daemon in the order given. Events go
the other way into the engine's inbox, which wakes it. Both are plain values; the threads share nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.core.blocks import BlockHandle, BlockRef
from services.core.errors import InfiniteLLMError
from services.core.placement import MoveEnd
from services.core.sequence import Request, RequestAge
from services.core.trace_context import TraceContext
from services.dataplane.negotiation import Offers

# ---------------------------------------------------------------- orders: engine -> rManager


@dataclass(frozen=True, slots=True)
class ReservePrompt:
    """Find what is cached of a prompt and reserve room for the rest, all of it or nothing.

    Attributes:
        attempt: tells this reservation's answer from an earlier one's.
        keys: of the prompt's full blocks that may be attached to.
        full_blocks: full blocks of the prompt.
        max_blocks: blocks that the request can need in the end; more than the cluster has is refused for good.
        expected_blocks: blocks that the request is expected to hold in the end.
        peak_blocks: the most of the local pool that those running and this one are expected to want together later, if
            nothing of its prompt is cached.
        trace: what the calls for it belong to.
    """

    age: RequestAge
    attempt: int
    keys: tuple[bytes, ...]
    full_blocks: int
    max_blocks: int
    expected_blocks: int = 0
    peak_blocks: int = 0
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class SealLocal:
    """Seal full blocks of the local pool."""

    blocks: tuple[tuple[BlockHandle, bytes], ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Give up one hold on each block of one daemon (tail first: evicted before those they build on).

    Attributes:
        session_id: the session that holds them; if another has taken its place, they are free already.
    """

    kvdaemon_id: str
    session_id: int
    handles: tuple[BlockHandle, ...]


@dataclass(frozen=True, slots=True)
class Replenish:
    """Bring blocks for the workspace; for those the local pool lacks, room elsewhere to spill to.

    Attributes:
        spare_wanted: not on daemons whose own instance has requests that wait.
    """

    blocks: int
    spare_wanted: bool


@dataclass(frozen=True, slots=True)
class EndSession:
    """The data connection to a daemon is gone: end its session, so that the daemon drops what it held for us."""

    kvdaemon_id: str
    session_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class SealCopies:
    """Seal blocks that another daemon has filled for us.

    Attributes:
        session_id: the session that has reserved them; if another has taken its place, they are gone.
    """

    kvdaemon_id: str
    session_id: int
    blocks: tuple[tuple[BlockHandle, bytes], ...]


@dataclass(frozen=True, slots=True)
class ReserveMove:
    """Find places at the move's destination for blocks with these keys: the same content, or room for it.

    Attributes:
        trace: the request's span, if it is traced.
    """

    move_id: str
    keys: tuple[bytes, ...]
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class EndMove:
    """The move has ended, or does not begin."""

    move_id: str
    moved_blocks: int
    end: MoveEnd


Order = ReservePrompt | SealLocal | Release | Replenish | EndSession | SealCopies | ReserveMove | EndMove


class Control(Protocol):
    """The rManager, as the engine sees it. Called by the engine thread; never blocks."""

    def order(self, order: Order) -> None: ...


# ---------------------------------------------------------------- events: asyncio -> engine


@dataclass(frozen=True, slots=True)
class Submit:
    """A request; one of the same id is replaced, unless it came by a later stream."""

    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """The gateway has no more use for a request that it sent by this stream."""

    request_id: str
    stream_id: int


@dataclass(frozen=True, slots=True)
class AbortStream:
    """A gateway is gone: end all its requests."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class PromptReserved:
    """Answer to ReservePrompt: the prompt's blocks.

    Attributes:
        attached: sealed blocks of the prompt's beginning, one hold each.
        local: open blocks of the local pool.
        remote: blocks reserved elsewhere, in the order in which they are to be filled.
        tail: a block for what comes after the prompt's full blocks: one of the local pool or, where it has none, one
            elsewhere, so that something can leave the local pool for it.
    """

    request_id: str
    attempt: int
    attached: tuple[BlockRef, ...]
    local: tuple[BlockHandle, ...]
    remote: tuple[BlockRef, ...]
    tail: BlockRef


@dataclass(frozen=True, slots=True)
class PromptDeferred:
    """Answer to ReservePrompt: no room now.

    Attributes:
        starves: others must leave it what comes free. Not so where it waits for an older request that starves, or for
            room in its own pool, which has enough for it.
        missing: blocks for which there was no room.
    """

    request_id: str
    attempt: int
    starves: bool
    missing: int = 0


@dataclass(frozen=True, slots=True)
class PromptRefused:
    """Answer to ReservePrompt: it can never be served."""

    request_id: str
    attempt: int
    error: InfiniteLLMError


@dataclass(frozen=True, slots=True)
class LocalSealed:
    """Answer to SealLocal: own block, and the block that holds its content now (another one if sealed before)."""

    blocks: tuple[tuple[BlockHandle, BlockHandle], ...]


@dataclass(frozen=True, slots=True)
class Replenished:
    """Answer to Replenish; both are empty where there is no room anywhere.

    Attributes:
        oldest_starving: the oldest request of the cluster that cannot go on for want of blocks, if that was asked.
    """

    local: tuple[BlockHandle, ...]
    remote: tuple[BlockRef, ...]
    oldest_starving: RequestAge | None = None


@dataclass(frozen=True, slots=True)
class CopiesSealed:
    """Answer to SealCopies: filled block, and the block that holds its content now (another one if sealed before)."""

    kvdaemon_id: str
    session_id: int
    blocks: tuple[tuple[BlockHandle, BlockHandle], ...]


@dataclass(frozen=True, slots=True)
class BeginMove:
    """The gManager wants sealed blocks of a request to lie on another daemon."""

    move_id: str
    request_id: str
    source_kvdaemon_id: str
    destination_kvdaemon_id: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class MoveReserved:
    """Answer to ReserveMove; without any block the move has been refused.

    Attributes:
        kvdaemon_id, session_id: the destination, and the session there that holds the blocks.
        attached: (index of the key, block) of content that lay there already, one hold each.
        reserved: blocks to be filled.
        reserved_at: monotonic time, not later than the reservation.
        use_within_s: how soon after that, or after the last use of one of them, each must be used.
    """

    move_id: str
    kvdaemon_id: str
    session_id: int
    attached: tuple[tuple[int, BlockHandle], ...]
    reserved: tuple[BlockHandle, ...]
    reserved_at: float
    use_within_s: float


@dataclass(frozen=True, slots=True)
class PeerOpened:
    """A session with a daemon is open; its data plane can be connected to, at ``address`` from here."""

    kvdaemon_id: str
    address: str
    session_id: int
    offers: Offers


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine thread."""


EngineEvent = (
    Submit
    | Abort
    | AbortStream
    | PromptReserved
    | PromptDeferred
    | PromptRefused
    | LocalSealed
    | Replenished
    | CopiesSealed
    | BeginMove
    | MoveReserved
    | PeerOpened
    | Stop
)
