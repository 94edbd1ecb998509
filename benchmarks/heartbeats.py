"""Heartbeats to one real gManager: its servicer in a process of its own, the senders in this one.

Every sender has a channel, and so a connection, of its own. One of three is an instance with a hundred running
requests, the others are KV daemons.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2_grpc
from services.core.blocks import PoolGeometry
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    PlacementEntry,
    PoolStats,
    Report,
    RunningRequest,
    WaitingRequest,
)
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.instance_client import InstanceClients
from services.gmanager.office import Office
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planning import ActivePlanning
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.rmanager.gmanager_client import HeartbeatStream
from services.runtime.grpc_server import bind, make_server
from services.runtime.membership import Member

_REQUESTS = 100  # of an instance
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


async def measure_heartbeats(senders: int, rate: float, changed: int | None, window_s: float) -> HeartbeatCost:
    """A new gManager and new senders.

    Args:
        rate: heartbeats a second of all senders together; 0: they are connected and say nothing.
        changed: requests of each instance of which there is news in every heartbeat, beside timings and the use of
            pools. None: nothing changes, a heartbeat says no more than that its sender is alive.
        window_s: time that is measured.
    Raises: CutOffError again and again: the machine is too busy for so many senders.
    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(CutOffError), _gmanager(senders) as (pid, address):
            return await _measure(pid, address, senders, rate, changed, window_s)
    with _gmanager(senders) as (pid, address):
        return await _measure(pid, address, senders, rate, changed, window_s)


async def _measure(
    pid: int, address: str, senders: int, rate: float, changed: int | None, window_s: float
) -> HeartbeatCost:
    async with _streams(address, senders) as streams:
        sent = [0] * senders
        tasks = [
            asyncio.create_task(_send(stream, k, senders / rate, changed, sent))
            for k, stream in enumerate(streams)
            if rate > 0
        ]
        await asyncio.sleep(_SETTLE_S)
        cpu_s, begin, before = _cpu_seconds(pid), time.monotonic(), sum(sent)
        await asyncio.sleep(window_s)
        cpu_s, seconds, number = _cpu_seconds(pid) - cpu_s, time.monotonic() - begin, sum(sent) - before
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [end for end in ended if not isinstance(end, asyncio.CancelledError)]
        if lost:
            raise CutOffError(f"{len(lost)} of {senders} senders were cut off, the first by {lost[0]!r}")
    return HeartbeatCost(cpu_s / seconds, number / seconds)


@asynccontextmanager
async def _streams(address: str, senders: int) -> AsyncIterator[Sequence[HeartbeatStream]]:
    """Open streams whose full reports have been sent."""
    opening = asyncio.Semaphore(_OPENING)
    streams: dict[int, HeartbeatStream] = {}

    async def open_one(number: int) -> None:
        async with opening:
            streams[number] = HeartbeatStream(address)
            heartbeat = Heartbeat(_member(number), 0, full=True, report=_full_report(number))
            await streams[number].send(heartbeat, _SEND_TIMEOUT_S)

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(senders):
                tasks.create_task(open_one(number))
        yield [streams[number] for number in range(senders)]
    finally:
        await asyncio.gather(*(stream.close() for stream in streams.values()))


async def _send(stream: HeartbeatStream, number: int, pace_s: float, changed: int | None, sent: list[int]) -> None:
    """One heartbeat every ``pace_s``, at times of the sender's own; who is late sends at once, once."""
    rng = random.Random(number)
    await asyncio.sleep(rng.random() * pace_s)
    due = time.monotonic()
    while True:
        sequence = sent[number] + 1
        heartbeat = Heartbeat(_member(number), sequence, False, None)
        if changed is not None:
            heartbeat = _news(heartbeat, number, changed, rng)
        await stream.send(heartbeat, _SEND_TIMEOUT_S)
        sent[number] += 1
        due = max(due + pace_s, time.monotonic())
        await asyncio.sleep(due - time.monotonic())


# ------------------------------------------------------------ what they say


def _is_instance(number: int) -> bool:
    return number % 3 == 0


def _member(number: int) -> str:
    return f"{'instance' if _is_instance(number) else 'kvdaemon'}/{number}"


def _placed(request: int, blocks: int, kvdaemon: int) -> PlacementEntry:
    return PlacementEntry(f"request-{request}", str(kvdaemon), blocks, True)


def _progress(request: int, blocks: int) -> RunningRequest:
    return RunningRequest(f"request-{request}", 1e9 + request, 64 * blocks, 64 * blocks + 500)


def _full_report(number: int) -> Report:
    if not _is_instance(number):
        return _pool(free=1000)
    first = number * _REQUESTS
    requests = range(first, first + _REQUESTS)
    return InstanceReport(
        running=_REQUESTS,
        waiting=2,
        placement=tuple(_placed(request, 16, number + 1) for request in requests),
        max_running=256,
        progress=tuple(_progress(request, 16) for request in requests),
        queue=(WaitingRequest(1000, 200), WaitingRequest(3000, 500)),
    )


def _news(heartbeat: Heartbeat, number: int, changed: int, rng: random.Random) -> Heartbeat:
    """The same heartbeat with what has changed within a second, and what was measured."""
    if not _is_instance(number):
        hosting = HostingTiming(messages=800.0, context_tokens=2.5e5, compute_s=0.08 * rng.uniform(0.9, 1.1))
        return heartbeat._replace(report=_pool(free=rng.randrange(2000)), timings=(hosting,))
    blocks = 16 + heartbeat.sequence
    requests = [number * _REQUESTS + k for k in rng.sample(range(_REQUESTS), changed)]
    report = InstanceReport(
        running=_REQUESTS,
        waiting=2,
        placement=tuple(_placed(request, blocks, number + 1) for request in requests),
        ended=(f"request-{rng.choice(requests)}",),
        max_running=256,
        progress=tuple(_progress(request, blocks) for request in requests),
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


@contextmanager
def _gmanager(members: int) -> Iterator[tuple[int, str]]:
    """A gManager's server and all that its heartbeats feed, in a process of its own. Answers pid and address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, members), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()


def _serve(parent: Connection, members: int) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve_until_eof(parent, members))


async def _serve_until_eof(parent: Connection, members: int) -> None:
    view, changed = ClusterView(), MembershipSignal()
    office = Office(Member("gmanager", "g0", ""), view.forget_reports)
    office.elected(_Leads())
    now = time.monotonic()
    numbers = [str(number) for number in range(members)]
    instances = [Member("instance", k, "", "model", 100_000, str(int(k) + 1)) for k in numbers if _is_instance(int(k))]
    kvdaemons = [Member("kvdaemon", k, "") for k in numbers if not _is_instance(int(k))]
    view.set_instances({member.member_id: member for member in instances}, now)
    view.set_kvdaemons({member.member_id: member for member in kvdaemons}, now)
    # It learns from timings but makes no plans: what a plan costs is measured by itself.
    planning = ActivePlanning(view, office, InstanceClients(None), PlannerPolicy(), time.monotonic, 1e9)
    server = make_server()
    servicer = GManagerServicer(view, changed, time.monotonic, 0.25, office, planning)
    gmanager_pb2_grpc.add_GManagerServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    parent.send(address)
    with suppress(EOFError):  # the other end is closed when the benchmark dies; otherwise it kills this process
        await asyncio.to_thread(parent.recv)


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
