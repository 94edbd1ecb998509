"""Heartbeats to one real gManager: its servicer in a process of its own, the senders in this one.

What processes say is in ``heartbeat_news``. As many as the gManager wants to hear of directly have a channel, and so a
connection, of their own. The others send by way of relays; of these only the side towards the gManager is there, as all
the others' connections do not fit on the machine that the gManager is measured on. What a daemon spends on relaying is
measured by itself, with a real relay.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import grpc.aio

from benchmarks.heartbeat_news import full_heartbeat, is_instance, news
from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.placement import Heartbeat
from services.gmanager.instance_client import InstanceClients
from services.gmanager.office import Office
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planning import ActivePlanning
from services.gmanager.reception import Reception
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.rmanager.gmanager_client import HeartbeatStream
from services.rmanager.heartbeat_messages import heartbeat_to_proto
from services.rmanager.heartbeat_relay import HeartbeatRelay
from services.runtime.cancelling import cancel
from services.runtime.grpc_channel import make_channel
from services.runtime.grpc_server import bind, make_server
from services.runtime.membership import Member
from services.runtime.process import collect_seldom

DIRECT = 256  # processes that the gManager hears of without a relay
RELAY_INTERVAL_S = 0.25
_SETTLE_S = 2.0
_SEND_TIMEOUT_S = 30.0
_ATTEMPTS = 3
_OPENING = 64  # connections at the same time


@asynccontextmanager
async def one_poller() -> AsyncIterator[None]:
    """Several measurements belong within one of these, on one event loop.

    With the last of its channels gRPC ends its poller and waits for it, which may be waiting for the event loop.
    """
    async with grpc.aio.insecure_channel("127.0.0.1:1"):  # never connected
        yield


class CutOffError(RuntimeError):
    """Connections were lost while they were measured."""


@dataclass(frozen=True, slots=True)
class HeartbeatCost:
    """What the gManager's process needed, in one window: processor seconds a second, and heartbeats a second."""

    cores: float
    heartbeats_per_s: float


async def measure_heartbeats(processes: int, rate: float, changed: int | None, window_s: float) -> HeartbeatCost:
    """What heartbeats cost a new gManager.

    Args:
        processes: that send heartbeats, directly or by way of relays.
        rate: heartbeats a second of all together; 0: they are connected and say nothing.
        changed: requests of each instance of which there is news in every heartbeat, beside timings and the use of
            pools. None: nothing changes, a heartbeat says no more than that its sender is alive.
        window_s: time that is measured.
    Raises: CutOffError again and again: the machine is too busy for so many senders.
    """
    pace_s = processes / rate if rate else 0
    for _ in range(_ATTEMPTS - 1):
        with suppress(CutOffError), _process(_serve_gmanager, processes) as gmanager:
            return await _measure(gmanager, gmanager, _fleet(processes, gmanager.address), pace_s, changed, window_s)
    with _process(_serve_gmanager, processes) as gmanager:
        return await _measure(gmanager, gmanager, _fleet(processes, gmanager.address), pace_s, changed, window_s)


async def measure_relay(members: int, window_s: float) -> HeartbeatCost:
    """What a daemon spends on relaying: real streams to a relay in a process of its own, each with a heartbeat a second
    without news, and a gManager behind it."""
    with (
        _process(_serve_gmanager, members) as gmanager,
        _process(_serve_relay, gmanager.address) as relay,
    ):
        fleet = [_Direct(number, relay.address, relay=True) for number in range(members)]
        return await _measure(relay, gmanager, fleet, 1.0, None, window_s)


async def _measure(
    process: _Served, gmanager: _Served, fleet: Sequence[_Sender], pace_s: float, changed: int | None, window_s: float
) -> HeartbeatCost:
    """What ``process`` uses, once every sender has said everything, and how many heartbeats reach the gManager."""
    opening = asyncio.Semaphore(_OPENING)
    tasks: list[asyncio.Task[None]] = []

    async def begin(sender: _Sender) -> None:
        async with opening:
            await sender.begin()

    try:
        async with asyncio.TaskGroup() as group:
            for sender in fleet:
                group.create_task(begin(sender))
        if pace_s:
            tasks = [asyncio.create_task(sender.go_on(pace_s, changed)) for sender in fleet]
        await asyncio.sleep(_SETTLE_S)
        begin_s, begin_cpu_s, before = time.monotonic(), process.cpu_s, await gmanager.taken()
        await asyncio.sleep(window_s)
        cpu_s, taken = process.cpu_s - begin_cpu_s, await gmanager.taken() - before
        seconds = time.monotonic() - begin_s
        lost = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if lost:
            raise CutOffError(f"{len(lost)} of {len(fleet)} senders were cut off, the first by {lost[0]!r}")
    finally:
        await cancel(tasks)
        await asyncio.gather(*(sender.close() for sender in fleet))
    return HeartbeatCost(cpu_s / seconds, taken / seconds)


# ------------------------------------------------------------ who sends


class _Sender(Protocol):
    """Sends what one process, or one relay's, have to say."""

    async def begin(self) -> None:
        """Opens the stream; the first reports are full."""

    async def go_on(self, pace_s: float, changed: int | None) -> None:
        """A heartbeat of each process every ``pace_s``, until cancelled; raises when the stream is lost."""

    async def close(self) -> None: ...


class _Direct:
    """A process with a stream of its own, to the gManager or to a relay."""

    def __init__(self, number: int, address: str, relay: bool = False) -> None:
        self._number = number
        self._stream = HeartbeatStream(address, relay=relay)

    async def begin(self) -> None:
        await self._send(full_heartbeat(self._number))

    async def go_on(self, pace_s: float, changed: int | None) -> None:
        said = news(self._number, changed)
        async for sequence in _at_own_times(self._number, pace_s):
            await self._send(said[(sequence - 1) % len(said)]._replace(sequence=sequence))

    async def _send(self, heartbeat: Heartbeat) -> None:
        await self._stream.send(heartbeat, _SEND_TIMEOUT_S)
        if await self._stream.sent_to() is not None:
            raise CutOffError("it was sent to a relay")

    async def close(self) -> None:
        await self._stream.close()


class _Relay:
    """The messages of a relay for some processes, as it would write them: each process's latest heartbeats.

    A thousand heartbeats would take longer to be made than to be taken in, and both sides share the machine. So what
    there is to say was encoded before, and goes round with new sequence numbers: after a round of ``news`` a process
    is where it was before.
    """

    def __init__(self, kvdaemon: int, members: Sequence[int], address: str) -> None:
        self._members = members
        self._name = gmanager_pb2.RelayHeartbeatsRequest(kvdaemon_id=str(kvdaemon)).SerializeToString()
        self._channel = make_channel(address)
        method = "/infinitellm.internal.v1.GManagerService/RelayHeartbeats"
        self._call: Any = self._channel.stream_stream(method, request_serializer=None, response_deserializer=None)()

    async def begin(self) -> None:
        await self._send([(number, _encoded(full_heartbeat(number)), 0) for number in self._members])

    async def go_on(self, pace_s: float, changed: int | None) -> None:
        said = {number: [_encoded(heartbeat) for heartbeat in news(number, changed)] for number in self._members}
        parts = max(round(pace_s / RELAY_INTERVAL_S), 1)  # in each of which other members speak
        async for turn in _at_own_times(self._members[0], pace_s / parts):
            sequence = 1 + (turn - 1) // parts
            speaking = self._members[(turn - 1) % parts :: parts]
            await self._send([(k, said[k][(sequence - 1) % len(said[k])], sequence) for k in speaking])

    async def _send(self, heartbeats: Sequence[tuple[int, bytes, int]]) -> None:
        relayed = (_field(1, number) + _field(2, body + _field(2, sequence)) for number, body, sequence in heartbeats)
        async with asyncio.timeout(_SEND_TIMEOUT_S):
            await self._call.write(self._name + b"".join(_field(2, one) for one in relayed))
        if self._call.done():
            raise CutOffError(f"the gManager ended a relay's call: {await self._call.details()}")

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


def _fleet(processes: int, gmanager: str) -> Sequence[_Sender]:
    """As many direct ones as the gManager takes of each kind; the daemons among them relay for the others."""
    instances = [number for number in range(processes) if is_instance(number)][: DIRECT // 2]
    daemons = [number for number in range(processes) if not is_instance(number)][: DIRECT // 2]
    direct = {*instances, *daemons}
    others = [number for number in range(processes) if number not in direct]
    shares = [others[k :: len(daemons)] for k in range(len(daemons))]
    relays = [_Relay(number, share, gmanager) for number, share in zip(daemons, shares, strict=True) if share]
    return [*(_Direct(number, gmanager) for number in direct), *relays]


async def _at_own_times(seed: int, pace_s: float) -> AsyncIterator[int]:
    """1, 2, 3, ..., one every ``pace_s``; who is late goes on at once, once."""
    await asyncio.sleep(random.Random(seed).random() * pace_s)
    due = time.monotonic()
    for turn in itertools.count(1):
        yield turn
        due = max(due + pace_s, time.monotonic())
        await asyncio.sleep(due - time.monotonic())


def _encoded(heartbeat: Heartbeat) -> bytes:
    return heartbeat_to_proto(heartbeat).SerializeToString()


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message, a number or a message; of several with the same number the last one counts."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Fixed:
    """A gManager that stays where it is."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def address(self) -> str:
        return self._address

    async def moved_from(self, address: str | None) -> None:
        await asyncio.Event().wait()


# ------------------------------------------------------------ the gManager


class _Leads:
    """A lease that is always held: there is no other gManager."""

    fencing_token = 1
    held = True


class _Served:
    """A server in a process of its own."""

    def __init__(self, pid: int, pipe: Connection) -> None:
        self.pid = pid
        self.address: str = pipe.recv()
        self._pipe = pipe

    @property
    def cpu_s(self) -> float:
        """User and system time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def taken(self) -> int:
        """Heartbeats that it has taken in."""
        self._pipe.send(None)
        return int(await asyncio.to_thread(self._pipe.recv))


@contextmanager
def _process(serve: Callable[[Connection, Any], None], of: int | str) -> Iterator[_Served]:
    """``serve`` in a process of its own, which lives as long as this one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, of), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield _Served(process.pid, ours)
    finally:
        process.kill()
        process.join()
        ours.close()


class _Counting(ActivePlanning):
    """It learns from timings but makes no plans: what a plan costs is measured by itself."""

    taken = 0

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        self.taken += 1
        super().observe(heartbeat, now)


def _serve_gmanager(parent: Connection, members: int) -> None:
    """A gManager's server and all that its heartbeats feed."""
    collect_seldom()

    async def serve() -> None:
        view, changed = ClusterView(), MembershipSignal()
        office = Office(Member("gmanager", "g0", ""), view.forget_reports)
        office.elected(_Leads())
        now = time.monotonic()
        numbers = [str(number) for number in range(members)]
        instances = [
            Member("instance", k, "", "model", 100_000, str(int(k) + 1)) for k in numbers if is_instance(int(k))
        ]
        kvdaemons = [Member("kvdaemon", k, "") for k in numbers if not is_instance(int(k))]
        view.set_instances({member.member_id: member for member in instances}, now)
        view.set_kvdaemons({member.member_id: member for member in kvdaemons}, now)
        planning = _Counting(view, office, InstanceClients(None), PlannerPolicy(), time.monotonic, 1e9)
        reception = Reception(view, planning, time.monotonic, DIRECT)
        server = make_server()
        gmanager_pb2_grpc.add_GManagerServiceServicer_to_server(
            GManagerServicer(changed, 0.25, office, reception), server
        )
        await _until_eof(parent, server, lambda: planning.taken)

    asyncio.run(serve())


def _serve_relay(parent: Connection, gmanager: str) -> None:
    """A relay as it is served by a KV daemon."""

    async def serve() -> None:
        relay, server = HeartbeatRelay("1", _Fixed(gmanager)), make_server()
        relay.start()
        gmanager_pb2_grpc.add_HeartbeatRelayServiceServicer_to_server(relay, server)
        await _until_eof(parent, server)

    asyncio.run(serve())


async def _until_eof(parent: Connection, server: grpc.aio.Server, taken: Callable[[], int] = lambda: 0) -> None:
    address = bind(server, "127.0.0.1:0")
    await server.start()
    parent.send(address)
    with suppress(EOFError):  # the other end is closed when the benchmark dies; otherwise it kills this process
        while True:
            await asyncio.to_thread(parent.recv)
            parent.send(taken())
