"""Heartbeats to one real gManager: its servicer in a process of its own, the senders in this one.

One of three processes is an instance with a hundred running requests, the others are KV daemons. As many as the
gManager wants to hear of directly have a channel, and so a connection, of their own. The others send by way of relays;
of these only the side towards the gManager is there, as all the others' connections do not fit on the machine that the
gManager is measured on. What a daemon spends on relaying is measured by itself, with a real relay.
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

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.blocks import PoolGeometry
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    NamedKvDaemon,
    NamedRequest,
    PlacementColumns,
    PoolStats,
    ProgressColumns,
    Report,
    WaitingRequest,
)
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
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
_REQUESTS = 100  # of an instance
_ROUND = 4
RELAY_INTERVAL_S = 0.25
_SETTLE_S = 2.0
_SEND_TIMEOUT_S = 30.0
_ATTEMPTS = 3
_OPENING = 64  # connections at the same time
_GEOMETRY = PoolGeometry(layers=32, kv_heads=8, block_tokens=64, head_dim=128, dtype="bfloat16")


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
        await self._send(_full(self._number))

    async def go_on(self, pace_s: float, changed: int | None) -> None:
        news = _news(self._number, changed)
        async for sequence in _at_own_times(self._number, pace_s):
            await self._send(news[(sequence - 1) % len(news)]._replace(sequence=sequence))

    async def _send(self, heartbeat: Heartbeat) -> None:
        await self._stream.send(heartbeat, _SEND_TIMEOUT_S)
        if await self._stream.sent_to() is not None:
            raise CutOffError("it was sent to a relay")

    async def close(self) -> None:
        await self._stream.close()


class _Relay:
    """The messages of a relay for some processes, as it would write them: each process's latest heartbeats.

    A thousand heartbeats would take longer to be made than to be taken in, and both sides share the machine. So what
    there is to say was encoded before, and goes round with new sequence numbers: after a round of ``_news`` a process
    is where it was before.
    """

    def __init__(self, kvdaemon: int, members: Sequence[int], address: str) -> None:
        self._members = members
        self._name = gmanager_pb2.RelayHeartbeatsRequest(kvdaemon_id=str(kvdaemon)).SerializeToString()
        self._channel = make_channel(address)
        method = "/infinitellm.internal.v1.GManagerService/RelayHeartbeats"
        self._call: Any = self._channel.stream_stream(method, request_serializer=None, response_deserializer=None)()

    async def begin(self) -> None:
        await self._send([(number, _encoded(_full(number)), 0) for number in self._members])

    async def go_on(self, pace_s: float, changed: int | None) -> None:
        news = {number: [_encoded(heartbeat) for heartbeat in _news(number, changed)] for number in self._members}
        parts = max(round(pace_s / RELAY_INTERVAL_S), 1)  # in each of which other members speak
        async for turn in _at_own_times(self._members[0], pace_s / parts):
            sequence = 1 + (turn - 1) // parts
            speaking = self._members[(turn - 1) % parts :: parts]
            await self._send([(k, news[k][(sequence - 1) % len(news[k])], sequence) for k in speaking])

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
    instances = [number for number in range(processes) if _is_instance(number)][: DIRECT // 2]
    daemons = [number for number in range(processes) if not _is_instance(number)][: DIRECT // 2]
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


# ------------------------------------------------------------ what they say


def _is_instance(number: int) -> bool:
    return number % 3 == 0


def _member(number: int) -> str:
    return f"{'instance' if _is_instance(number) else 'kvdaemon'}/{number}"


def _named(instance: int, request: int) -> NamedRequest:
    return NamedRequest(request, f"request-{instance}-{request}", 1e9 + request, 64 * 100)


def _full_report(number: int) -> Report:
    if not _is_instance(number):
        return _pool(free=1000)
    everything = tuple(range(_REQUESTS))
    return InstanceReport(
        running=_REQUESTS,
        waiting=2,
        requests=tuple(_named(number, request) for request in everything),
        kvdaemons=(NamedKvDaemon(0, str(number + 1), True),),
        placement=PlacementColumns(everything, (0,) * _REQUESTS, (16,) * _REQUESTS),
        progress=ProgressColumns(everything, (16 * 64,) * _REQUESTS),
        max_running=256,
        queue=(WaitingRequest(1000, 200), WaitingRequest(3000, 500)),
    )


def _full(number: int) -> Heartbeat:
    return Heartbeat(_member(number), 0, full=True, report=_full_report(number))


def _news(number: int, changed: int | None) -> Sequence[Heartbeat]:
    """What a process says, in turn and again: what has changed within a second, and what was measured.

    In each heartbeat of an instance, ``changed`` requests have grown, one has ended and one has begun.
    """
    silent = Heartbeat(_member(number), 0, False, None)
    if changed is None:
        return [silent]
    rng = random.Random(number)
    if not _is_instance(number):
        return [_pool_news(silent, rng) for _ in range(_ROUND)]
    last = _REQUESTS - 1  # of the full report; the last of a round has the same number
    begun = [*range(_REQUESTS, _REQUESTS + _ROUND - 1), last]
    return [
        _instance_news(silent, number, rng.sample(range(last), changed), begun[k], begun[k - 1], rng)
        for k in range(_ROUND)
    ]


def _pool_news(heartbeat: Heartbeat, rng: random.Random) -> Heartbeat:
    hosting = HostingTiming(messages=800.0, context_tokens=2.5e5, compute_s=0.08 * rng.uniform(0.9, 1.1))
    return heartbeat._replace(report=_pool(free=rng.randrange(2000)), timings=(hosting,))


def _instance_news(
    heartbeat: Heartbeat, number: int, grown: Sequence[int], begun: int, ended: int, rng: random.Random
) -> Heartbeat:
    blocks = [rng.randint(17, 99) for _ in grown]
    report = InstanceReport(
        running=_REQUESTS,
        waiting=2,
        requests=(_named(number, begun),),
        placement=PlacementColumns((*grown, begun), (0,) * (len(grown) + 1), (*blocks, 1)),
        progress=ProgressColumns((*grown, begun), (*(64 * count for count in blocks), 64)),
        ended=(ended,),
        max_running=256,
    )
    noise = rng.uniform(0.9, 1.1)
    remote = RemoteTiming(str(number + 2), messages=32.0, rows=3.0, context_tokens=1e4, answer_s=4e-3 * noise)
    step = StepTiming(100.0, 0.0, 1.1e5, 0.04 * noise, 0.03 * noise, 0.029 * noise, (remote,), steps=25)
    return heartbeat._replace(report=report, timings=(step,))


def _pool(free: int) -> KvDaemonReport:
    size = _GEOMETRY.block_bytes
    stats = PoolStats(3000 * size, size, total=3000, free=free, workspace=100, in_use=2900 - free)
    return KvDaemonReport(stats, _GEOMETRY)


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
            Member("instance", k, "", "model", 100_000, str(int(k) + 1)) for k in numbers if _is_instance(int(k))
        ]
        kvdaemons = [Member("kvdaemon", k, "") for k in numbers if not _is_instance(int(k))]
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
