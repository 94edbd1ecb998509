"""Copies from daemon to daemon: whose right it is, what is refused, and that queries do not wait for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kvdaemon_rig import DEADLINE_S, GEOMETRY, Rig, as_bytes, key, segment

from services.core.blocks import BlockHandle
from services.dataplane import wire
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.negotiation import Offers
from services.dataplane.transport import Accepted, Connection, Event, Received
from services.dataplane.wire import CopyOrder, Header, Kind, Role


@pytest.fixture
def pair() -> Iterator[tuple[Rig, Rig]]:
    hub = LoopbackHub()
    with Rig(hub=hub, name="source") as source, Rig(hub=hub, name="destination") as destination:
        yield source, destination


def send_copy(rig: Rig, connection: Connection, block: BlockHandle, number: int, order: CopyOrder) -> None:
    header = Header(Kind.COPY, sequence=number, step=number, block=block)
    rig.send(connection, header, order.pack())


def copy(rig: Rig, connection: Connection, block: BlockHandle, order: CopyOrder) -> str:
    """Why a copy failed; empty if it did not."""
    send_copy(rig, connection, block, 5, order)
    header, payload = rig.receive(connection)
    assert (header.sequence, header.step) == (5, 5)
    assert (header.kind is Kind.COPIED) == (not payload)
    return payload.decode()


def seal(rig: Rig, session: int, block: BlockHandle, number: int) -> BlockHandle:
    with rig.shared as ledger:
        return ledger.seal(session, [block], [key(number)])[0]


def test_a_block_is_copied_and_sealed_by_its_session(pair: tuple[Rig, Rig]) -> None:
    source, destination = pair
    here, there = source.open(), destination.open()
    blocks = source.sealed(here, range(6))
    targets = destination.reserve(there, 6, ttl_s=60)
    connection = source.connect(here)
    for number, (block, target) in enumerate(zip(blocks, targets, strict=True)):
        assert not copy(source, connection, block, CopyOrder(key(number), destination.offers, there, target))
        assert seal(destination, there, target, number) == target
        torch.testing.assert_close(destination.blocks()[target.block], source.blocks()[block.block])
    with source.shared as ledger:
        ledger.release(here, blocks)
        assert ledger.stats().in_use == 0


def test_what_the_client_does_not_hold_is_not_copied(pair: tuple[Rig, Rig]) -> None:
    source, destination = pair
    here, there = source.open(), destination.open()
    (block,), (foreign,) = source.sealed(here, [1]), source.sealed(source.open("b"), [2])
    (target,) = destination.reserve(there, 1, ttl_s=60)
    connection = source.connect(here)
    stale = BlockHandle(block.block, block.generation + 1)
    for handle, number in ((foreign, 2), (block, 2), (stale, 1), (BlockHandle(999, 1), 1)):
        order = CopyOrder(key(number), destination.offers, there, target)
        assert "STALE_GENERATION" in copy(source, connection, handle, order)
    assert not copy(source, connection, block, CopyOrder(key(1), destination.offers, there, target))


def test_what_the_destination_refuses_is_told_and_harms_nothing(pair: tuple[Rig, Rig]) -> None:
    source, destination = pair
    here, there = source.open(), destination.open()
    blocks = source.sealed(here, range(2))
    (target,) = destination.reserve(there, 1, ttl_s=60)
    (promised,) = destination.reserve(there, 1)
    (sealed,) = destination.sealed(there, [9])
    connection = source.connect(here)
    before = destination.blocks().clone()
    for bad in (promised, sealed, BlockHandle(target.block, target.generation + 1)):
        order = CopyOrder(key(0), destination.offers, there, bad)
        assert "STALE_GENERATION" in copy(source, connection, blocks[0], order)
    order = CopyOrder(key(0), destination.offers, 4711, target)
    assert "SESSION_REVOKED" in copy(source, connection, blocks[0], order)
    order = CopyOrder(key(0), Offers(("loopback:nobody",)), there, target)
    assert "PEER_LOST" in copy(source, connection, blocks[0], order)
    order = CopyOrder(key(0), Offers(("carrier-pigeon:far",)), there, target)
    assert "CONFIG" in copy(source, connection, blocks[0], order)
    torch.testing.assert_close(destination.blocks(), before)
    assert not copy(source, connection, blocks[1], CopyOrder(key(1), destination.offers, there, target))


def test_a_daemon_reaches_the_other_by_what_both_have(tmp_path: Path) -> None:
    """Whatever the client reaches either of them by."""
    with Rig(scheme="both", directory=tmp_path, name="s") as source, Rig(scheme="tcp", name="d") as far:
        here, there = source.open(), far.open()
        blocks = source.sealed(here, range(2))
        targets = far.reserve(there, 2, ttl_s=60)
        connection = source.connect(here)
        offers = Offers(("carrier-pigeon:far", *far.offers.addresses), "another machine's socket")
        assert not copy(source, connection, blocks[0], CopyOrder(key(0), offers, there, targets[0]))
        torch.testing.assert_close(far.blocks()[targets[0].block], source.blocks()[blocks[0].block])
        nothing_in_common = Offers((f"shm:{tmp_path}/d",), "another machine's socket")
        failure = copy(source, connection, blocks[1], CopyOrder(key(1), nothing_in_common, there, targets[1]))
        assert "connects over shm, tcp, the daemon offers shm" in failure


def test_the_right_to_write_ends_with_the_session(pair: tuple[Rig, Rig]) -> None:
    source, destination = pair
    here, there = source.open(), destination.open()
    blocks = source.sealed(here, range(2))
    targets = destination.reserve(there, 2, ttl_s=60)
    connection = source.connect(here)
    orders = [CopyOrder(key(n), destination.offers, there, target) for n, target in enumerate(targets)]
    assert not copy(source, connection, blocks[0], orders[0])
    destination.sessions.close(there)
    assert "SESSION_REVOKED" in copy(source, connection, blocks[1], orders[1])
    other = destination.open("b")
    assert len(destination.reserve(other, 16)) == 16


def test_roles(pair: tuple[Rig, Rig]) -> None:
    """A writer may fill offered blocks and nothing else; an owner writes under the content's key."""
    _, rig = pair
    session = rig.open()
    (block,) = rig.sealed(session, [1])
    (offered,) = rig.reserve(session, 1, ttl_s=60)
    content = as_bytes(rig.random(*GEOMETRY.block_shape))
    plan = wire.pack_plan([segment(0, 1, 20, [(block, 0)])])
    for header, parts in (
        (Header(Kind.PLAN, step=1, rows=1), plan),
        (Header(Kind.QUERY, step=1), []),
        (Header(Kind.WRITE_BLOCK, block=offered), [key(2), content]),
        (Header(Kind.FORGET), []),
        (Header(Kind.COPY, block=block), [CopyOrder(key(1), rig.offers, session, offered).pack()]),
    ):
        connection = rig.connect(session, role=Role.WRITER)
        rig.send(connection, header, *parts)
        assert f"{header.kind.name} from the session's writer" in rig.refusal(connection)
    for role, header, parts in (
        (Role.OWNER, Header(Kind.FILL_BLOCK, block=offered), [content]),
        (Role.READER, Header(Kind.FILL_BLOCK, block=offered), [content]),
        (Role.READER, Header(Kind.WRITE_BLOCK, block=offered), [key(2), content]),
        (
            Role.READER,
            Header(Kind.COPY, block=block),
            [CopyOrder(key(1), Offers((rig.address,)), session, offered).pack()],
        ),
    ):
        connection = rig.connect(session, role=role)
        rig.send(connection, header, *parts)
        assert f"{header.kind.name} from the session's {role.name.lower()}" in rig.refusal(connection)
    connection = rig.connect(session, role=Role.WRITER)
    rig.send(connection, Header(Kind.FILL_BLOCK, block=offered), content[:-1])
    assert "INVALID_REQUEST" in rig.refusal(connection)
    connection = rig.connect(session, role=Role.WRITER)
    rig.send(connection, Header(Kind.FILL_BLOCK, sequence=3, block=offered), content)
    header, _ = rig.receive(connection)
    assert (header.kind, header.sequence, header.block) == (Kind.BLOCK_FILLED, 3, offered)


class SlowDestination:
    """A daemon that fills blocks when it is told to."""

    def __init__(self, hub: LoopbackHub) -> None:
        self.transport = LoopbackTransport(hub, "slow")
        self.address = self.transport.listen()
        self.connections: list[Connection] = []
        self.fills: list[tuple[Connection, BlockHandle, bytes]] = []

    def order(self, number: int) -> CopyOrder:
        """To copy content ``number`` into its block of that number."""
        return CopyOrder(key(number), Offers((self.address,)), 7, BlockHandle(number, 1))

    def look(self, timeout: float = 0.0) -> None:
        for event in self.transport.poll(timeout):
            self._take(event)

    def wait_for_fills(self, count: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.fills) < count:
            assert time.monotonic() < deadline
            self.look(0.1)

    def answer(self, fill: tuple[Connection, BlockHandle, bytes]) -> None:
        fill[0].send([Header(Kind.BLOCK_FILLED, block=fill[1]).pack()])

    def _take(self, event: Event) -> None:
        match event:
            case Accepted(connection, hello):
                assert wire.unpack_hello(hello).role is Role.WRITER
                self.connections.append(connection)
            case Received(connection, message):
                header, payload = wire.unpack(message.data)
                assert header.kind is Kind.FILL_BLOCK
                self.fills.append((connection, header.block, bytes(payload)))
                message.release()


def test_queries_do_not_wait_for_the_copies_before_them() -> None:
    hub = LoopbackHub()
    slow = SlowDestination(hub)
    with Rig(hub=hub, name="source") as source:
        session = source.open()
        blocks = source.sealed(session, range(12))
        connection = source.connect(session)
        for number, block in enumerate(blocks):
            send_copy(source, connection, block, number, slow.order(number))
        source.send_plan(connection, 1, segment(0, 1, 100, [(blocks[0], 0)]))
        for _ in range(3):
            source.send_query(connection, source.random(1, 2, GEOMETRY.head_dim), step=1)
            source.partial(connection)
        for number, block in enumerate(blocks):
            slow.wait_for_fills(number + 1)
            slow.look(0.02)
            assert len(slow.fills) == number + 1, "one at a time"
            _, target, content = slow.fills[number]
            assert target == BlockHandle(number, 1)
            assert content == bytes(as_bytes(source.blocks()[block.block]))
            slow.answer(slow.fills[number])
            header, _ = source.receive(connection)
            assert (header.kind, header.sequence) == (Kind.COPIED, number)
        assert len(slow.connections) == 1
    slow.transport.close()


def test_copies_of_a_client_that_is_gone_are_dropped_and_those_of_others_go_on() -> None:
    hub = LoopbackHub()
    slow = SlowDestination(hub)
    with Rig(hub=hub, name="source") as source:
        session, other = source.open(), source.open("b")
        blocks, others = source.sealed(session, range(4)), source.sealed(other, range(10, 12))
        connection, second = source.connect(session), source.connect(other)
        for number, block in enumerate(blocks):
            send_copy(source, connection, block, number, slow.order(number))
        for number, block in enumerate(others, 10):
            send_copy(source, second, block, number, slow.order(number))
        slow.wait_for_fills(1)
        source.sessions.close(session)
        assert "SESSION_REVOKED" in source.refusal(connection)
        for count in (2, 3):
            slow.answer(slow.fills[count - 2])
            slow.wait_for_fills(count)
        assert [block.block for _, block, _ in slow.fills] == [0, 10, 11]
        slow.answer(slow.fills[2])
        for number in (10, 11):
            header, _ = source.receive(second)
            assert (header.kind, header.sequence) == (Kind.COPIED, number)
    slow.transport.close()


def test_a_destination_that_hangs_up_fails_all_that_was_meant_for_it() -> None:
    hub = LoopbackHub()
    slow = SlowDestination(hub)
    with Rig(hub=hub, name="source") as source:
        session = source.open()
        connection = source.connect(session)
        for number, block in enumerate(source.sealed(session, range(3))):
            send_copy(source, connection, block, number, slow.order(number))
        slow.wait_for_fills(1)
        slow.connections[0].close()
        for number in range(3):
            header, payload = source.receive(connection)
            assert (header.kind, header.sequence) == (Kind.COPY_FAILED, number)
            assert b"connection lost" in payload
    slow.transport.close()


def test_a_destination_that_never_answers_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.kvdaemon.copier._COPY_TIMEOUT_S", 0.2)
    hub = LoopbackHub()
    slow = SlowDestination(hub)
    with Rig(hub=hub, name="source") as source:
        session = source.open()
        (block,) = source.sealed(session, [1])
        assert "not answered" in copy(source, source.connect(session), block, slow.order(1))
        with source.shared as ledger:
            ledger.release(session, [block])  # it is pinned no more
            assert ledger.stats().cached == 1
    slow.transport.close()
