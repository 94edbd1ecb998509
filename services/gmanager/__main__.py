"""``python -m services.gmanager --config FILE``: runs one gManager until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from infinitellm.internal.v1 import gmanager_pb2_grpc
from services.core.errors import ConfigError
from services.gmanager.config import GManagerConfig
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.runtime.config import load_config
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_server import bind, make_server
from services.runtime.logs import setup_logging
from services.runtime.membership import Kind, Member, Membership

logger = logging.getLogger(__name__)


async def serve(config: GManagerConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    view, changed = ClusterView(), MembershipSignal()
    server = make_server()
    gmanager_pb2_grpc.add_GManagerServiceServicer_to_server(
        GManagerServicer(view, changed, time.monotonic, config.watch_interval_s), server
    )
    address = bind(server, config.listen, allow_insecure=config.allow_insecure)
    await server.start()

    etcd = EtcdClient(config.etcd)
    membership = Membership(etcd, config.cluster)

    async def follow(kind: Kind, apply: Callable[[Mapping[str, Member], float], None]) -> None:
        async for members in membership.watch(kind):
            apply(members, time.monotonic())
            changed.notify()

    tasks = [
        asyncio.create_task(follow("instance", view.set_instances)),
        asyncio.create_task(follow("kvdaemon", view.set_kvdaemons)),
        asyncio.create_task(stop.wait()),
    ]
    member = Member("gmanager", config.member_id, config.advertise or address, epoch=time.time_ns())
    registration = await membership.register(member, ttl_s=config.lease_ttl_s)
    logger.info("serving", extra={"address": address})
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await registration.close()
        # Heartbeat and watch streams never end by themselves.
        await server.stop(grace=0)
        await etcd.close()
        logger.info("stopped")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.gmanager", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; keys in services/gmanager/config.py")
    arguments = parser.parse_args()
    try:
        config = load_config(GManagerConfig, arguments.config)
        setup_logging("gmanager", config.member_id, config.log_level)
        asyncio.run(serve(config))
    except ConfigError as exc:
        print(f"gmanager: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
