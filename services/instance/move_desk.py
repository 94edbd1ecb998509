"""The gManager's move instructions, on the instance's asyncio side: who may give them, the answers, and how they ended.

An instruction goes to the engine, which chooses blocks; the engine asks for their places here, and what comes of that
is the answer. Instructions are told apart by their ids: one that comes again gets the first one's answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from opentelemetry.trace import NoOpTracer, Span, Tracer

from services.core.blocks import BlockHandle
from services.core.errors import InfiniteLLMError
from services.core.placement import MoveEnd, MoveReport
from services.core.trace_context import TraceContext
from services.instance.control import BeginMove, EndMove, EngineEvent, MoveReserved, ReserveMove
from services.rmanager.daemon_client import DaemonSession
from services.runtime.tracing import entered, ns_ago, under

_log = logging.getLogger(__name__)
_OFFER_TTL_S = 30.0  # how long the destination keeps room that is not used
_REMEMBERED = 1024  # moves whose answers are known
_REPORTED = 64  # latest ended moves that are told of

SessionWith = Callable[[str, str], Awaitable[DaemonSession | None]]


@dataclass(frozen=True, slots=True)
class MoveInstruction:
    """See ``MoveBlocksRequest`` in instance.proto."""

    move_id: str
    fencing_token: int
    request_id: str
    source_kvdaemon_id: str
    destination_kvdaemon_id: str
    destination_address: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class MoveAnswer:
    """``refusal`` is None where the move is accepted; ``trace`` is the request's span, if it is traced."""

    accepted_blocks: int
    refusal: MoveEnd | None = None
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    instruction: MoveInstruction
    began: float  # monotonic
    answer: asyncio.Future[MoveAnswer]


class MoveDesk:
    """Used by the asyncio thread.

    Args:
        session_with: the session with a daemon by its id and control address, opened if there is none; None where the
            daemon gives none.
        post: puts an event into the engine's inbox.
        tracer: makes the moves' spans.

    Attributes:
        leader_token: answers the fencing token of the newest leader that the election has told of. Who has got no order
            of that leader yet refuses those of the one before all the same.
    """

    def __init__(
        self,
        session_with: SessionWith,
        post: Callable[[EngineEvent], None],
        tracer: Tracer | None = None,
        offer_ttl_s: float = _OFFER_TTL_S,
    ) -> None:
        self._session_with = session_with
        self._post = post
        self._tracer = tracer or NoOpTracer()
        self._spans: dict[str, Span] = {}  # of traced moves that are active
        self._offer_ttl_s = offer_ttl_s
        self.leader_token: Callable[[], int] = lambda: 0
        self._highest_token = 0  # of an order
        self._active: dict[str, _Known] = {}  # until the engine ends them, which it does once with each
        self._ended: OrderedDict[str, _Known] = OrderedDict()
        self._reports: deque[MoveReport] = deque(maxlen=_REPORTED)

    @property
    def reports(self) -> tuple[MoveReport, ...]:
        """The latest moves that have ended, oldest first."""
        return tuple(self._reports)

    async def instruct(self, instruction: MoveInstruction) -> MoveAnswer:
        """Begins a move, unless it is known already. Answers when it is decided whether it takes place."""
        if instruction.fencing_token < max(self._highest_token, self.leader_token()):
            return MoveAnswer(0, MoveEnd.STALE_LEADER)
        self._highest_token = instruction.fencing_token
        known = self._active.get(instruction.move_id) or self._ended.get(instruction.move_id)
        if known is None:
            known = _Known(instruction, time.monotonic(), asyncio.get_running_loop().create_future())
            self._active[instruction.move_id] = known
            self._post(
                BeginMove(
                    instruction.move_id,
                    instruction.request_id,
                    instruction.source_kvdaemon_id,
                    instruction.destination_kvdaemon_id,
                    instruction.num_blocks,
                )
            )
        return await asyncio.shield(known.answer)  # a caller that goes away changes nothing

    async def reserve(self, order: ReserveMove) -> None:
        """Answers the engine with MoveReserved and the instructor with what was got, whatever happens."""
        known = self._active.get(order.move_id)
        if known is None:  # the engine has ended it since
            return
        kvdaemon_id = known.instruction.destination_kvdaemon_id
        if order.trace is not None:
            self._spans[order.move_id] = self._begin_span(known, order.trace)
        reserved_at = time.monotonic()
        session_id = 0
        attached: dict[int, BlockHandle] = {}
        reserved: list[BlockHandle] = []
        refusal: MoveEnd | None = MoveEnd.DESTINATION_UNREACHABLE
        try:
            session = await self._session_with(kvdaemon_id, known.instruction.destination_address)
            if session is not None:
                reserved_at = time.monotonic()
                found = await session.attach(order.keys)
                missing = len(order.keys) - len(found)
                with entered(order.trace):
                    room = await self._reserve(session, missing, known.instruction.request_id)
                if session.alive:  # an event that names its session follows no event that names its successor
                    session_id, attached, reserved = session.opened.session_id, found, room
                    refusal = None if attached or reserved else MoveEnd.DESTINATION_FULL
        except InfiniteLLMError as error:  # the session has ended, and with it what it held
            _log.warning("no place for a move", extra={"move": order.move_id, "to": kvdaemon_id, "why": str(error)})
        finally:
            self._post(
                MoveReserved(
                    order.move_id,
                    kvdaemon_id,
                    session_id,
                    tuple(attached.items()),
                    tuple(reserved),
                    reserved_at,
                    self._offer_ttl_s / 2,  # the other half is for what is on its way
                )
            )
            _answer(known, MoveAnswer(len(attached) + len(reserved), refusal, order.trace))

    def end(self, order: EndMove) -> None:
        """The engine has ended a move, or has refused to begin it."""
        known = self._ended[order.move_id] = self._active.pop(order.move_id)
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        if (span := self._spans.pop(order.move_id, None)) is not None:
            span.set_attributes({"infinite_llm.move.blocks": order.moved_blocks, "infinite_llm.move.end": order.end})
            span.end()
        if not known.answer.done():
            _answer(known, MoveAnswer(0, order.end))
        elif known.answer.result().refusal is None:
            instruction = known.instruction
            report = MoveReport(
                order.move_id,
                instruction.request_id,
                instruction.source_kvdaemon_id,
                instruction.destination_kvdaemon_id,
                order.moved_blocks,
                time.monotonic() - known.began,
                order.end,
            )
            self._reports.append(report)
            _log.info("move ended", extra={"move": report.move_id, "blocks": report.moved_blocks, "end": report.end})

    def _begin_span(self, known: _Known, request: TraceContext) -> Span:
        instruction = known.instruction
        attributes = {
            "infinite_llm.move.id": instruction.move_id,
            "infinite_llm.move.source": instruction.source_kvdaemon_id,
            "infinite_llm.move.destination": instruction.destination_kvdaemon_id,
        }
        begun = ns_ago(time.monotonic() - known.began)
        return self._tracer.start_span("move", under(request), attributes=attributes, start_time=begun)

    async def _reserve(self, session: DaemonSession, blocks: int, request_id: str) -> list[BlockHandle]:
        if not blocks:
            return []
        return await session.reserve(blocks, 0, request_id=request_id, ttl_s=self._offer_ttl_s)


def _answer(known: _Known, answer: MoveAnswer) -> None:
    if not known.answer.done():
        known.answer.set_result(answer)
