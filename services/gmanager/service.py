"""The process of one gManager: made from its configuration, run until SIGTERM or SIGINT, ended in order."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from infinitellm.internal.v1 import gmanager_pb2_grpc
from services.core.errors import ConfigError
from services.gmanager.config import GManagerConfig
from services.gmanager.deletion_cost import deletion_cost_tasks
from services.gmanager.instance_client import InstanceClients
from services.gmanager.metrics import GManagerState
from services.gmanager.office import Office, hold_office
from services.gmanager.planning import ActivePlanning, NoPlanning, Planning
from services.gmanager.reception import Reception
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.runtime.cancelling import cancel
from services.runtime.config import load_config
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_server import bind, make_server
from services.runtime.health import HealthPort
from services.runtime.logs import setup_logging
from services.runtime.membership import Kind, Member, Membership
from services.runtime.metrics import PLANNING_TIME
from services.runtime.metrics_port import MetricsPort, make_registry
from services.runtime.process import CLOSE_WITHIN_S, collect_seldom, stop_event
from services.runtime.tracing import make_tracing

logger = logging.getLogger(__name__)


async def serve(config: GManagerConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = stop_event(CLOSE_WITHIN_S)

    tracing = make_tracing(config.tracing, "gmanager", config.member_id, config.cluster)
    view, changed, orders = ClusterView(), MembershipSignal(), InstanceClients(config.tls, tracing.tracer)
    server = make_server(config.tls, tracing.tracer)
    address = bind(server, config.listen, tls=config.tls, allow_insecure=config.allow_insecure)
    registry = make_registry()
    metrics = MetricsPort(config.metrics_listen, registry, config.allow_insecure)
    member = Member(
        "gmanager",
        config.member_id,
        config.advertise or address,
        epoch=time.time_ns(),
        metrics_address=metrics.address,
    )

    def stepped_down() -> None:
        view.forget_reports()
        planning.forget()
        changed.notify()

    office = Office(member, stepped_down)
    planning: Planning = NoPlanning()
    if config.planner:
        took = PLANNING_TIME.histogram(registry).observe
        planning = ActivePlanning(view, office, orders, config.policy, time.monotonic, config.plan_interval_s, took)
    reception = Reception(view, planning, time.monotonic, config.direct_heartbeats, config.heartbeats_per_relay)
    registry.register(GManagerState(office, view, planning, reception.relays))
    gmanager_pb2_grpc.add_GManagerServiceServicer_to_server(
        GManagerServicer(changed, config.watch_interval_s, office, reception), server
    )
    await server.start()
    metrics.start()

    etcd = EtcdClient(config.etcd, config.etcd_tls)
    membership = Membership(etcd, config.cluster)
    registration = await membership.register(member, ttl_s=config.lease_ttl_s)

    async def follow(kind: Kind, apply: Callable[[Mapping[str, Member], float], None], known: asyncio.Event) -> None:
        async for members in membership.watch(kind):
            apply(members, time.monotonic())
            changed.notify()
            known.set()

    async def lead(*known: asyncio.Event) -> None:
        for event in known:  # whoever leads is asked who there is
            await event.wait()
        await hold_office(office, membership.gmanager_election(), config.lease_ttl_s)

    instances, kvdaemons, gmanagers = asyncio.Event(), asyncio.Event(), asyncio.Event()
    tasks = [
        asyncio.create_task(follow("instance", view.set_instances, instances)),
        asyncio.create_task(follow("kvdaemon", view.set_kvdaemons, kvdaemons)),
        asyncio.create_task(follow("gmanager", view.set_gmanagers, gmanagers)),
        asyncio.create_task(lead(instances, kvdaemons, gmanagers)),
        asyncio.create_task(planning.run()),
        *deletion_cost_tasks(config.kubernetes, view, lambda: office.fencing_token is not None),
        asyncio.create_task(stop.wait()),
    ]
    health = HealthPort(config.health_listen, lambda: True, lambda: registration.entered and not stop.is_set())
    await health.start()
    logger.info("serving", extra={"address": address})
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        await cancel(tasks)  # the leader resigns: the next one need not wait for its lease to expire
        await registration.close()
        # Heartbeat and watch streams never end by themselves.
        await server.stop(grace=0)
        await orders.close()
        await etcd.close()
        await metrics.close()
        await health.close()
        await asyncio.to_thread(tracing.close)
        logger.info("stopped")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gmanager", description="One gManager of infinite-llm.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys in services/gmanager/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(GManagerConfig, arguments.config)
        setup_logging("gmanager", config.member_id, config.log_level)
        collect_seldom()
        asyncio.run(serve(config))
    except ConfigError as exc:
        print(f"gmanager: {exc}", file=sys.stderr)
        return 2
    return 0
