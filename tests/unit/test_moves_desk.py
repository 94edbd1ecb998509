"""Move instructions against an rManager and real daemons: who is listened to, and what is reserved."""

from __future__ import annotations

import asyncio

from spans import CALLER, Recorder, parent_of, told
from test_instance_rmanager import DEADLINE_S, Rig, rig

from services.core.blocks import BlockHandle
from services.core.placement import MoveEnd
from services.instance.control import (
    BeginMove,
    CopiesSealed,
    EndMove,
    EndSession,
    MoveReserved,
    ReserveMove,
    SealCopies,
)
from services.instance.move_desk import MoveAnswer, MoveInstruction

KEYS = tuple(number.to_bytes(16, "little") for number in range(20))


def instruction(r: Rig, move_id: str = "m", token: int = 5, to: str = "first", blocks: int = 3) -> MoveInstruction:
    address = {"local": r.local, "first": r.first, "second": r.second}[to].address
    return MoveInstruction(move_id, token, "request", "second" if to != "second" else "first", to, address, blocks)


async def event_of(r: Rig, kind: type) -> object:
    async with asyncio.timeout(DEADLINE_S):
        while not isinstance(event := await r.events.get(), kind):
            pass
    return event


async def reserve(r: Rig, keys: tuple[bytes, ...], **fields: object) -> tuple[MoveAnswer, MoveReserved]:
    """An instruction that the engine takes up with these keys."""
    asked = asyncio.create_task(r.rmanager.moves.instruct(instruction(r, **fields)))  # type: ignore[arg-type]
    begin = await event_of(r, BeginMove)
    assert isinstance(begin, BeginMove)
    r.rmanager.order(ReserveMove(begin.move_id, keys))
    reserved = await event_of(r, MoveReserved)
    assert isinstance(reserved, MoveReserved)
    return await asked, reserved


def test_a_move_is_accepted_with_its_room_and_told_of_when_it_ends() -> None:
    async def run() -> None:
        async with rig() as r:
            answer, reserved = await reserve(r, KEYS[:3])
            assert answer == MoveAnswer(3)
            assert (reserved.kvdaemon_id, reserved.attached, len(reserved.reserved)) == ("first", (), 3)
            assert r.reserved() == (0, 3, 0)
            assert r.rmanager.moves.reports == ()
            r.rmanager.order(EndMove("m", 2, MoveEnd.COPY_FAILED))
            await asyncio.sleep(0.01)
            (report,) = r.rmanager.moves.reports
            assert (report.move_id, report.request_id, report.moved_blocks) == ("m", "request", 2)
            assert (report.source_kvdaemon_id, report.destination_kvdaemon_id) == ("second", "first")
            assert report.end is MoveEnd.COPY_FAILED
            assert 0 < report.seconds < DEADLINE_S

    asyncio.run(run())


def test_an_instruction_that_comes_again_gets_the_first_answer() -> None:
    async def run() -> None:
        async with rig() as r:
            early = asyncio.create_task(r.rmanager.moves.instruct(instruction(r)))
            impatient = asyncio.create_task(r.rmanager.moves.instruct(instruction(r)))
            begin = await event_of(r, BeginMove)
            impatient.cancel()
            r.rmanager.order(ReserveMove("m", KEYS[:3]))
            assert await early == MoveAnswer(3)
            assert await r.rmanager.moves.instruct(instruction(r)) == MoveAnswer(3)
            r.rmanager.order(EndMove("m", 3, MoveEnd.DONE))
            await asyncio.sleep(0.01)
            assert await r.rmanager.moves.instruct(instruction(r, token=6)) == MoveAnswer(3)
            assert r.reserved() == (0, 3, 0)
            assert len(r.rmanager.moves.reports) == 1
            while not r.events.empty():
                assert not isinstance(r.events.get_nowait(), BeginMove), begin

    asyncio.run(run())


def test_a_leader_of_the_past_is_refused() -> None:
    async def run() -> None:
        async with rig() as r:
            await reserve(r, KEYS[:1], move_id="a", token=7)
            stale = await r.rmanager.moves.instruct(instruction(r, "b", token=6))
            assert stale == MoveAnswer(0, MoveEnd.STALE_LEADER)
            assert await r.rmanager.moves.instruct(instruction(r, "a", token=6)) == stale
            assert (await reserve(r, KEYS[:1], move_id="b", token=7))[0] == MoveAnswer(1)
            assert (await reserve(r, KEYS[:1], move_id="c", token=8))[0] == MoveAnswer(1)
            assert await r.rmanager.moves.instruct(instruction(r, "d", token=7)) == stale
            r.rmanager.moves.leader_token = lambda: 9  # elected, and has given no order yet
            assert await r.rmanager.moves.instruct(instruction(r, "e", token=8)) == stale
            assert (await reserve(r, KEYS[:1], move_id="f", token=9))[0] == MoveAnswer(1)

    asyncio.run(run())


def test_what_the_engine_refuses_is_no_report() -> None:
    async def run() -> None:
        async with rig() as r:
            asked = asyncio.create_task(r.rmanager.moves.instruct(instruction(r)))
            await event_of(r, BeginMove)
            r.rmanager.order(EndMove("m", 0, MoveEnd.UNKNOWN_REQUEST))
            assert await asked == MoveAnswer(0, MoveEnd.UNKNOWN_REQUEST)
            assert r.rmanager.moves.reports == ()
            assert r.reserved() == (0, 0, 0)

    asyncio.run(run())


def test_first_come_first_served() -> None:
    async def run() -> None:
        async with rig() as r:
            assert (await reserve(r, KEYS[:6], move_id="a"))[0] == MoveAnswer(6)
            assert (await reserve(r, KEYS[6:12], move_id="b"))[0] == MoveAnswer(2)
            answer, reserved = await reserve(r, KEYS[12:14], move_id="c")
            assert answer == MoveAnswer(0, MoveEnd.DESTINATION_FULL)
            assert not reserved.reserved
            r.rmanager.order(EndMove("c", 0, MoveEnd.DONE))
            await asyncio.sleep(0.01)
            assert r.rmanager.moves.reports == ()

    asyncio.run(run())


def test_the_room_expires_where_it_is_not_used() -> None:
    async def run() -> None:
        async with rig() as r:
            r.rmanager.moves._offer_ttl_s = 0.2
            _, reserved = await reserve(r, KEYS[:3])
            await asyncio.sleep(0.3)
            assert r.reserved() == (0, 0, 0)
            session = r.rmanager._sessions["first"]
            await session.release(reserved.reserved)  # its session cannot have known, and goes on
            assert session.alive

    asyncio.run(run())


def test_content_that_lies_there_is_held_and_needs_no_room() -> None:
    async def run() -> None:
        async with rig() as r:
            _, first = await reserve(r, KEYS[:2], move_id="a")
            r.rmanager.order(SealCopies("first", first.session_id, tuple(zip(first.reserved, KEYS[1:3], strict=True))))
            sealed = await event_of(r, CopiesSealed)
            assert isinstance(sealed, CopiesSealed)
            assert sealed.blocks == tuple((handle, handle) for handle in first.reserved)
            answer, second = await reserve(r, KEYS[:4], move_id="b")
            assert answer == MoveAnswer(4)
            assert second.attached == ((1, first.reserved[0]), (2, first.reserved[1]))
            assert len(second.reserved) == 2

    asyncio.run(run())


def test_a_destination_that_is_not_there() -> None:
    async def run() -> None:
        async with rig() as r:
            gone = MoveInstruction("m", 5, "request", "second", "gone", "127.0.0.1:1", 3)
            asked = asyncio.create_task(r.rmanager.moves.instruct(gone))
            await event_of(r, BeginMove)
            r.rmanager.order(ReserveMove("m", KEYS[:3]))
            reserved = await event_of(r, MoveReserved)
            assert isinstance(reserved, MoveReserved)
            assert (reserved.session_id, reserved.attached, reserved.reserved) == (0, (), ())
            assert await asked == MoveAnswer(0, MoveEnd.DESTINATION_UNREACHABLE)

    asyncio.run(run())


def test_a_session_that_ends_while_it_reserves_gives_nothing() -> None:
    async def run() -> None:
        async with rig() as r:
            await reserve(r, KEYS[:1], move_id="a")
            r.first.reserving.open.clear()
            r.first.reserving.asked.clear()
            asked = asyncio.create_task(r.rmanager.moves.instruct(instruction(r, "b")))
            await event_of(r, BeginMove)
            r.rmanager.order(ReserveMove("b", KEYS[:3]))
            await r.first.reserving.asked.wait()
            r.rmanager.order(EndSession("first", 1, "its data connection broke"))
            reserved = await event_of(r, MoveReserved)
            assert isinstance(reserved, MoveReserved)
            assert (reserved.session_id, reserved.attached, reserved.reserved) == (0, (), ())
            assert await asked == MoveAnswer(0, MoveEnd.DESTINATION_UNREACHABLE)
            await r.first.wait_for_sessions(0)
            r.first.reserving.open.set()

    asyncio.run(run())


def test_a_move_home_reserves_in_the_local_pool() -> None:
    async def run() -> None:
        async with rig() as r:
            answer, reserved = await reserve(r, KEYS[:6], to="local")
            assert answer == MoveAnswer(4)
            assert r.reserved() == (4, 0, 0)
            assert reserved.kvdaemon_id == "local"
            r.rmanager.order(SealCopies("local", reserved.session_id, ((reserved.reserved[0], KEYS[0]),)))
            sealed = await event_of(r, CopiesSealed)
            assert sealed == CopiesSealed("local", reserved.session_id, ((reserved.reserved[0],) * 2,))
            assert r.reserved() == (3, 0, 0)

    asyncio.run(run())


def test_copies_of_a_session_that_is_over_are_not_sealed_in_its_successor() -> None:
    async def run() -> None:
        async with rig() as r:
            _, first = await reserve(r, KEYS[:2], move_id="a")
            r.rmanager.order(EndSession("first", first.session_id, "its data connection broke"))
            await r.first.wait_for_sessions(0)
            _, second = await reserve(r, KEYS[:2], move_id="b")
            assert second.session_id != first.session_id
            r.rmanager.order(SealCopies("first", first.session_id, ((BlockHandle(0, 1), KEYS[0]),)))
            r.rmanager.order(SealCopies("first", second.session_id, ((second.reserved[0], KEYS[0]),)))
            sealed = await event_of(r, CopiesSealed)
            assert isinstance(sealed, CopiesSealed)
            assert sealed.session_id == second.session_id

    asyncio.run(run())


def test_a_move_of_a_traced_request_has_a_span() -> None:
    recorder = Recorder()

    async def run() -> None:
        async with rig(recorder.tracer) as r:
            asked = asyncio.create_task(r.rmanager.moves.instruct(instruction(r)))
            await event_of(r, BeginMove)
            r.rmanager.order(ReserveMove("m", KEYS[:3], CALLER))
            await event_of(r, MoveReserved)
            assert await asked == MoveAnswer(3, None, CALLER)
            r.rmanager.order(EndMove("m", 2, MoveEnd.COPY_FAILED))
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    await asyncio.sleep(0.01)
                    if recorder.named("move"):
                        break

    asyncio.run(run())
    reserve, move = recorder.spans
    assert reserve.name.endswith("KvDaemonService/Reserve")
    assert [parent_of(span) for span in (reserve, move)] == [CALLER, CALLER]
    assert told(move) == {
        "infinite_llm.move.id": "m",
        "infinite_llm.move.source": "second",
        "infinite_llm.move.destination": "first",
        "infinite_llm.move.blocks": 2,
        "infinite_llm.move.end": "COPY_FAILED",
    }
    assert move.start_time is not None
    assert reserve.start_time is not None
    assert move.start_time <= reserve.start_time
