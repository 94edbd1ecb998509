"""The process of one KV daemon.

The main thread runs asyncio: control calls, the pool socket, membership, heartbeats. One worker thread owns the
transport and the kernels. The ledger lies between them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
import threading
import time
from pathlib import Path

import torch

from infinitellm.internal.v1.gmanager_pb2_grpc import add_HeartbeatRelayServiceServicer_to_server
from infinitellm.internal.v1.kvdaemon_pb2_grpc import add_KvDaemonServiceServicer_to_server
from services.core.errors import InfiniteLLMError
from services.core.placement import KvDaemonSnapshot
from services.dataplane.device import Device
from services.dataplane.devices import open_device
from services.dataplane.pool_socket import PoolSocketServer
from services.dataplane.select import listening_transport
from services.kvdaemon.config import KvDaemonConfig
from services.kvdaemon.hosted_traces import HostedTraces
from services.kvdaemon.metrics import DaemonState
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.server import KvDaemonServicer, SessionTerms
from services.kvdaemon.sessions import Sessions, SharedLedger
from services.kvdaemon.worker import Worker
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.rmanager.heartbeat_relay import HeartbeatRelay
from services.rmanager.ledger import Ledger
from services.runtime.config import load_config
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_server import bind, make_server
from services.runtime.health import HealthPort
from services.runtime.logs import setup_logging
from services.runtime.membership import Member, Membership
from services.runtime.metrics_port import MetricsPort, make_registry
from services.runtime.process import CLOSE_WITHIN_S, stop_event
from services.runtime.short_slices import ask_for_short_slices
from services.runtime.tracing import make_tracing

_log = logging.getLogger("services.kvdaemon")
_STOP_TIMEOUT_S = 5.0
_SLICE_S = 200e-6  # of the worker: about what a query takes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.kvdaemon", description="One KV daemon of infinite-llm.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys as in services/kvdaemon/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(KvDaemonConfig, arguments.config)
        setup_logging("kvdaemon", config.member_id)
        torch.set_num_threads(config.num_threads)
        asyncio.run(serve(config))
    except InfiniteLLMError as error:
        sys.exit(f"infinite-llm kvdaemon: {error}")
    return 0


async def serve(config: KvDaemonConfig) -> None:
    """Runs the daemon until SIGTERM or SIGINT."""
    stop = stop_event(CLOSE_WITHIN_S)

    device = open_device(config.device)
    pool = device.make_pool(config.pool_bytes, config.huge_pages)
    shared = SharedLedger(Ledger(config.pool_bytes, lambda: secrets.randbits(64)))
    data_plane = listening_transport(config.transports, config.dataplane, config.link)
    tracing = make_tracing(config.tracing, "kvdaemon", config.member_id, config.cluster)
    traces = None if config.tracing is None else HostedTraces(tracing.tracer)
    view = PoolView(pool, device.load_kernels(config.num_threads), device)
    worker = Worker(data_plane.transport, shared, view, traces)
    sessions = Sessions(shared, worker.sessions_ended)
    pool_socket = PoolSocketServer(config.pool_socket, pool, sessions.may_map, sessions.hung_up)
    terms = SessionTerms(data_plane.offers, str(config.pool_socket), config.ping_interval_s, config.session_timeout_s)
    etcd = EtcdClient(config.etcd, config.etcd_tls)
    membership = Membership(etcd, config.cluster)
    locator = GManagerLocator(membership)
    relay = HeartbeatRelay(config.member_id, locator, config.heartbeat_interval_s, config.tls)
    server = make_server(config.tls, tracing.tracer)
    add_KvDaemonServiceServicer_to_server(KvDaemonServicer(shared, sessions, terms), server)
    add_HeartbeatRelayServiceServicer_to_server(relay, server)
    address = bind(server, config.listen, tls=config.tls, allow_insecure=config.allow_insecure)
    registry = make_registry()
    registry.register(DaemonState(config.member_id, shared, worker))
    metrics = MetricsPort(config.metrics_listen, registry, config.allow_insecure)

    thread = threading.Thread(target=_run, args=(worker, device), name="worker", daemon=True)
    thread.start()
    pool_socket.start()
    await server.start()
    metrics.start()
    heartbeat = HeartbeatSender(
        f"kvdaemon/{config.member_id}",
        locator,
        lambda: _snapshot(shared),
        config.heartbeat_interval_s,
        worker.hosting.drain,
        tls=config.tls,
    )
    heartbeat.start()
    relay.start()
    registration = await membership.register(
        Member(
            kind="kvdaemon",
            member_id=config.member_id,
            address=address,
            epoch=time.time_ns(),
            metrics_address=metrics.address,
        )
    )
    health = HealthPort(
        config.health_listen,
        lambda: time.monotonic() - worker.round_at < config.stall_timeout_s,
        lambda: registration.entered and not stop.is_set(),
    )
    await health.start()
    _log.info(
        "serving",
        extra={
            "address": address,
            "data_addresses": data_plane.offers.addresses,
            "pool_mib": config.pool_mib,
            "device": device.name,
        },
    )

    await stop.wait()
    _log.info("stopping")
    await heartbeat.close()  # first: who sends heartbeats counts as a member without an entry, too
    await registration.close()
    await relay.close()
    await locator.close()
    await etcd.close()
    await server.stop(grace=None)  # sessions last as long as their clients like: there is nothing to wait for
    worker.stop()
    await asyncio.to_thread(thread.join, _STOP_TIMEOUT_S)
    pool_socket.close()
    pool.close()
    await metrics.close()
    await health.close()
    await asyncio.to_thread(tracing.close)


def _snapshot(shared: SharedLedger) -> KvDaemonSnapshot:
    with shared as ledger:
        return KvDaemonSnapshot(ledger.stats(), ledger.geometry)


def _run(worker: Worker, device: Device) -> None:
    """The worker's thread. An error here is a bug, and a process that answers gRPC but computes nothing is worse than
    a dead one, which its instances notice at once."""
    try:
        device.enter_thread()
        ask_for_short_slices(_SLICE_S)
        worker.run()
    except BaseException:
        _log.critical("the worker failed, ending", exc_info=True)
        os._exit(1)
